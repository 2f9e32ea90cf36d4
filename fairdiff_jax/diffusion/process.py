r"""The forward process and what a network may predict of it.

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps,    eps ~ N(0, I)
    v_t = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0

(Ho et al. 2020, eq. 4; Salimans & Ho 2022, appendix D). A network predicts
'eps', 'x0' or 'v'; each determines the other two. `x` stands for any
[B, ...], `t` for int32 [B].
"""

import jax
import jax.numpy as jnp

from fairdiff_jax.diffusion.schedule import Schedule


def signal_and_noise(
  schedule: Schedule, t: jax.Array, ndim: int
) -> tuple[jax.Array, jax.Array]:
  """sqrt(abar_t) and sqrt(1 - abar_t), shaped [B, 1, ...] of rank `ndim`."""
  alpha_bar = jnp.asarray(schedule.alpha_bar)[t]
  alpha_bar = alpha_bar.reshape(alpha_bar.shape + (1,) * (ndim - 1))
  return jnp.sqrt(alpha_bar), jnp.sqrt(1 - alpha_bar)


def add_noise(
  schedule: Schedule, x_0: jax.Array, t: jax.Array, eps: jax.Array
) -> jax.Array:
  """x_t, a sample of q(x_t | x_0)."""
  signal, noise = signal_and_noise(schedule, t, x_0.ndim)
  return signal * x_0 + noise * eps


def target(
  schedule: Schedule,
  prediction: str,
  x_0: jax.Array,
  t: jax.Array,
  eps: jax.Array,
) -> jax.Array:
  """What a network that predicts `prediction` should say of x_t."""
  if prediction == "eps":
    return eps
  if prediction == "x0":
    return x_0
  if prediction == "v":
    signal, noise = signal_and_noise(schedule, t, x_0.ndim)
    return signal * eps - noise * x_0
  raise ValueError(f"unknown prediction {prediction!r}; use 'eps', 'x0' or 'v'")


def min_snr_weight(
  schedule: Schedule, prediction: str, t: jax.Array, gamma: float
) -> jax.Array:
  """Min-SNR's weight [B] of the loss (Hang et al. 2023, eq. 5 to 7).

  That of x_0's error is min(snr, gamma), snr = abar / (1 - abar); of an error
  of eps it is 1 / snr, of v 1 / (snr + 1) times that.
  """
  signal, noise = signal_and_noise(schedule, t, 1)
  snr = (signal / noise) ** 2
  of_x0 = {"eps": 1 / snr, "x0": jnp.ones_like(snr), "v": 1 / (snr + 1)}
  return jnp.minimum(snr, gamma) * of_x0[prediction]


def to_x0_and_eps(
  schedule: Schedule,
  prediction: str,
  output: jax.Array,
  x_t: jax.Array,
  t: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Turns a network's output at x_t into its (x_0, eps)."""
  signal, noise = signal_and_noise(schedule, t, x_t.ndim)
  if prediction == "eps":
    return (x_t - noise * output) / signal, output
  if prediction == "x0":
    return output, (x_t - signal * output) / noise
  if prediction == "v":
    return signal * x_t - noise * output, noise * x_t + signal * output
  raise ValueError(f"unknown prediction {prediction!r}; use 'eps', 'x0' or 'v'")
