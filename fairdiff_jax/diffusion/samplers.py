r"""Reverse processes, each a single `lax.scan`.

From t to an earlier s (Song et al. 2021, eq. 12 and 16),

    x_s = sqrt(abar_s) x_0 + sqrt(1 - abar_s - sigma^2) eps + sigma z
    sigma = eta sqrt((1 - abar_s) / (1 - abar_t)) sqrt(1 - abar_t / abar_s)

with (x_0, eps) as the network sees them at x_t. eta = 0 is DDIM; eta = 1 is
ancestral sampling, which over all T steps is the DDPM of Ho et al. 2020 with
the posterior's variance.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fairdiff_jax.diffusion.process import to_x0_and_eps
from fairdiff_jax.diffusion.schedule import Schedule


def example_keys(key: jax.Array, index: jax.Array) -> jax.Array:
  """One key per example, by the example's index [B] in the global batch."""
  return jax.vmap(jax.random.fold_in, (None, 0))(key, index)


def example_normal(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Standard normal noise [B, *shape], drawn per example from keys [B]."""
  return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def sample(
  denoise: Callable[[jax.Array, jax.Array], jax.Array],
  x_T: jax.Array,
  keys: jax.Array,
  *,
  schedule: Schedule,
  prediction: str,
  num_steps: int,
  eta: float = 1.0,
) -> jax.Array:
  """Runs the reverse process from noise to data.

  Args:
    denoise: (x_t [B, ...], t int32 [B]) -> the network's output [B, ...].
    x_T: starting noise [B, ...].
    keys: one key per example [B]; noise depends on nothing else.
    schedule: noise schedule with T steps.
    prediction: what the network predicts: 'eps', 'x0' or 'v'.
    num_steps: steps taken, equally spaced in 0..T; at most T.
    eta: 0 for DDIM, 1 for ancestral sampling.

  Returns:
    x_0 [B, ...].

  Raises:
    ValueError: if `num_steps` is not in 1..T.
  """
  if not 1 <= num_steps <= schedule.num_steps:
    raise ValueError(
      f"{num_steps} sampling steps asked of a schedule with"
      f" {schedule.num_steps}; use 1 to {schedule.num_steps}"
    )
  times = np.linspace(schedule.num_steps, 0, num_steps + 1).round()
  times = times.astype(np.int32)
  batch = x_T.shape[0]

  def step(x_t, t_and_s):
    t, s = t_and_s
    x_0, eps = to_x0_and_eps(
      schedule,
      prediction,
      denoise(x_t, jnp.full(batch, t)),
      x_t,
      jnp.full(batch, t),
    )
    abar = jnp.asarray(schedule.alpha_bar)
    abar_t, abar_s = abar[t], abar[s]
    sigma = eta * jnp.sqrt((1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s))
    z = example_normal(
      jax.vmap(jax.random.fold_in, (0, None))(keys, t), x_t.shape[1:]
    )
    direction = jnp.sqrt(jnp.maximum(1 - abar_s - sigma**2, 0))
    return jnp.sqrt(abar_s) * x_0 + direction * eps + sigma * z, None

  x_0, _ = jax.lax.scan(step, x_T, (times[:-1], times[1:]))
  return x_0
