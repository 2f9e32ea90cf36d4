"""Batch normalisation over the examples of the whole global batch.

With w_b the weight of example b, s the positions of one example, and sums that
run over every shard of the batch:

  n     = sum_b sum_s w_b
  mu    = sum_b sum_s w_b x_bs / n
  var   = sum_b sum_s w_b (x_bs - mu)^2 / n
  y     = scale (x - mu) / sqrt(var + epsilon) + bias

  running_mean <- momentum running_mean + (1 - momentum) mu
  running_var  <- momentum running_var  + (1 - momentum) var n / (n - 1)
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp


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
  """

  axis_name: str | None = None
  momentum: float = 0.9
  epsilon: float = 1e-5
  learn_bias: bool = True

  @nn.compact
  def __call__(
    self, x: jax.Array, weight: jax.Array | None, train: bool
  ) -> jax.Array:
    """Normalises x over all axes but the last.

    Args:
      x: [B, ..., C].
      weight: [B], how often an example counts, 0 for padding; None counts each
        once.
      train: normalise by the batch and update the running statistics
        (collection 'batch_stats', float32), rather than normalise by them. A
        batch without any weight uses the running statistics and keeps them.

    Returns:
      [B, ..., C] in the type of x; padding is normalised like the rest.
    """
    features = x.shape[-1:]
    scale = self.param("scale", nn.initializers.ones, features)
    bias = self.param("bias", nn.initializers.zeros, features)
    if not self.learn_bias:
      bias = jax.lax.stop_gradient(bias)
    running_mean = self.variable("batch_stats", "mean", jnp.zeros, features)
    running_var = self.variable("batch_stats", "var", jnp.ones, features)

    values = x.astype(jnp.float32)
    mean, var = running_mean.value, running_var.value
    if train:
      count, batch_mean, batch_var = self._moments(values, weight)
      filled = count > 0
      unbiased = batch_var * count / jnp.where(count > 1, count - 1, 1)
      if not self.is_initializing():
        running_mean.value = jnp.where(
          filled, self._running(mean, batch_mean), mean
        )
        running_var.value = jnp.where(filled, self._running(var, unbiased), var)
      mean = jnp.where(filled, batch_mean, mean)
      var = jnp.where(filled, batch_var, var)

    gain = scale * jax.lax.rsqrt(var + self.epsilon)
    return ((values - mean) * gain + bias).astype(x.dtype)

  def _moments(self, x, weight):
    """Global count [], mean [C] and biased variance [C] of x [B, ..., C]."""
    batch, *positions, _ = x.shape
    if weight is None:
      weight = jnp.ones(batch)
    weight = weight.astype(jnp.float32).reshape(batch, *(1,) * (x.ndim - 1))
    axes = tuple(range(x.ndim - 1))

    count = self._over_shards(jnp.sum(weight) * math.prod(positions))
    safe_count = jnp.where(count > 0, count, 1)
    mean = self._over_shards(jnp.sum(weight * x, axes)) / safe_count
    squares = jnp.sum(weight * jnp.square(x - mean), axes)
    return count, mean, self._over_shards(squares) / safe_count

  def _over_shards(self, total):
    if self.axis_name is None or self.is_initializing():
      return total
    return jax.lax.psum(total, self.axis_name)

  def _running(self, old, new):
    return self.momentum * old + (1 - self.momentum) * new
