"""Batch normalisation over the examples of the whole global batch.

With w_b the weight of example b, s the positions of one example, and sums that
run over every shard of the batch:

  n     = sum_b sum_s w_b
  mu    = sum_b sum_s w_b x_bs / n
  var   = sum_b sum_s w_b (x_bs - mu)^2 / n
  y     = scale (x - mu) / sqrt(var + epsilon) + bias

  running_mean <- momentum running_mean + (1 - momentum) mu
  running_var  <- momentum running_var  + (1 - momentum) var n / (n - 1)

With g the gradient of y and h = (x - mu) / sqrt(var + epsilon), that of x is

  scale / sqrt(var + epsilon) (g - w / n (sum g + h sum g h))

which is written down, for it passes over x fewer times than what automatic
differentiation makes of the two sums.
"""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp


def _sum(x):
  return jnp.sum(x, tuple(range(x.ndim - 1)))


def _over_shards(total, axis_name):
  return total if axis_name is None else jax.lax.psum(total, axis_name)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _normalise(axis_name, epsilon, x, weight, scale, bias, running):
  """Normalises x [B, ..., C] by the batch.

  Args:
    axis_name: mapped axis that holds the shards of the batch, or None.
    epsilon: added to the variance.
    x: [B, ..., C].
    weight: [B, 1, ..., 1], float32.
    scale: [C].
    bias: [C].
    running: mean and variance [C], for a batch without any weight.

  Returns:
    y [B, ..., C] in the type of x, the global count [], and the mean and the
    biased variance [C] that it was normalised by. Only y has a gradient.
  """
  return _normalise_forward(
    axis_name, epsilon, x, weight, scale, bias, running
  )[0]


def _moments(axis_name, values, weight, running):
  """Count [], share of every example, mean and biased variance [C]."""
  count = _over_shards(
    jnp.sum(weight) * math.prod(values.shape[1:-1]), axis_name
  )
  share = weight / jnp.where(count > 0, count, 1)
  mean = _over_shards(_sum(share * values), axis_name)
  mean = jnp.where(count > 0, mean, running[0])
  # The mean is where the variance is least: through it, it has no gradient.
  centred = values - jax.lax.stop_gradient(mean)
  var = _over_shards(_sum(share * jnp.square(centred)), axis_name)
  return count, share, mean, jnp.where(count > 0, var, running[1])


def _normalise_forward(axis_name, epsilon, x, weight, scale, bias, running):
  values = x.astype(jnp.float32)
  count, share, mean, var = _moments(axis_name, values, weight, running)
  rate = jax.lax.rsqrt(var + epsilon)
  y = (values - mean) * (scale * rate) + bias
  return (y.astype(x.dtype), count, mean, var), (x, share, scale, mean, rate)


def _normalise_backward(axis_name, epsilon, residuals, gradients):
  del epsilon
  x, share, scale, mean, rate = residuals
  g = gradients[0].astype(jnp.float32)
  h = (x.astype(jnp.float32) - mean) * rate
  sum_g, sum_gh = _sum(g), _sum(g * h)
  through_mean, through_var = (
    _over_shards(total, axis_name) for total in (sum_g, sum_gh)
  )
  of_x = scale * rate * (g - share * (through_mean + h * through_var))
  return of_x.astype(x.dtype), None, sum_gh, sum_g, None


_normalise.defvjp(_normalise_forward, _normalise_backward)


@jax.custom_vjp
def _highest(x):
  """Maximum [B, C] of x [B, N, C], whose gradient is that of one position."""
  return jnp.max(x, axis=1)


def _highest_forward(x):
  # Computed once: with other rounding no position would equal its maximum.
  x = jax.lax.optimization_barrier(x)
  highest = jnp.max(x, axis=1)
  position = jnp.arange(x.shape[1])[:, None]
  reached = jnp.where(x == highest[:, None], position, x.shape[1] - 1)
  return highest, (jnp.min(reached, axis=1), position)


def _highest_backward(residuals, gradient):
  first, position = residuals
  return (jnp.where(position == first[:, None], gradient[:, None], 0),)


_highest.defvjp(_highest_forward, _highest_backward)


class BatchNorm(nn.Module):
  """Batch normalisation with PyTorch's statistics, masked and global.

  `flax.linen.BatchNorm` does not serve. Over devices it averages the *means* of
  each device, which is wrong as soon as padding leaves them unequal counts, and
  its running variance is the biased one, where PyTorch's (hence every
  published checkpoint's) is unbiased. Here sums and counts are added over
  `axis_name`, so the per-shard view (`pmap`) and the global view (`jit`, where
  `axis_name` is None) give the same numbers. The variance takes two passes,
  because E[x^2] - E[x]^2 loses its digits when the mean is large.

  Attributes:
    axis_name: mapped axis that holds the shards of the batch, or None.
    momentum: share of the running statistics that one update keeps; PyTorch
      calls one minus this `momentum`.
    epsilon: added to the variance.
    learn_bias: whether the bias has a gradient; not where a later batch
      normalisation cancels it and leaves only rounding noise.
    highest: whether the maximum over the positions is what is wanted, which
      needs no other position to be normalised.
  """

  axis_name: str | None = None
  momentum: float = 0.9
  epsilon: float = 1e-5
  learn_bias: bool = True
  highest: bool = False

  @nn.compact
  def __call__(
    self, x: jax.Array, weight: jax.Array | None, train: bool
  ) -> jax.Array:
    """Normalises x over all axes but the last.

    Args:
      x: [B, ..., C]; [B, N, C] if `highest`.
      weight: [B], how often an example counts, 0 for padding; None counts each
        once.
      train: normalise by the batch and update the running statistics
        (collection 'batch_stats', float32), rather than normalise by them. A
        batch without any weight uses the running statistics and keeps them.

    Returns:
      [B, ..., C] in the type of x, or [B, C] if `highest`; padding is
      normalised like the rest.
    """
    features = x.shape[-1:]
    scale = self.param("scale", nn.initializers.ones, features)
    bias = self.param("bias", nn.initializers.zeros, features)
    if not self.learn_bias:
      bias = jax.lax.stop_gradient(bias)
    running_mean = self.variable("batch_stats", "mean", jnp.zeros, features)
    running_var = self.variable("batch_stats", "var", jnp.ones, features)

    mean, var = running_mean.value, running_var.value

    def normalised(mean, var):
      gain = scale * jax.lax.rsqrt(var + self.epsilon)
      values = x
      if self.highest:  # of a negative scale, it is the lowest
        sign = jnp.where(scale < 0, -1, 1).astype(x.dtype)
        values = sign * _highest(sign * x)
      return ((values - mean) * gain + bias).astype(x.dtype)

    if not train:
      return normalised(mean, var)

    if weight is None:
      weight = jnp.ones(len(x))
    weight = weight.astype(jnp.float32).reshape(-1, *(1,) * (x.ndim - 1))
    axis_name = None if self.is_initializing() else self.axis_name
    if self.highest:
      count, _, batch_mean, batch_var = _moments(
        axis_name, x.astype(jnp.float32), weight, (mean, var)
      )
      y = normalised(batch_mean, batch_var)
    else:
      y, count, batch_mean, batch_var = _normalise(
        axis_name, self.epsilon, x, weight, scale, bias, (mean, var)
      )
    if not self.is_initializing():
      unbiased = batch_var * count / jnp.where(count > 1, count - 1, 1)
      running_mean.value = self._running(count, mean, batch_mean)
      running_var.value = self._running(count, var, unbiased)
    return y

  def _running(self, count, old, new):
    new = self.momentum * old + (1 - self.momentum) * new
    return jnp.where(count > 0, new, old)
