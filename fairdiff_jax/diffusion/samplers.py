r"""Reverse processes, each a single `lax.scan`.

From t to an earlier s (Song et al. 2021, eq. 12 and 16),

    x_s = sqrt(abar_s) x_0 + sqrt(1 - abar_s - sigma^2) eps + sigma z
    sigma = eta sqrt((1 - abar_s) / (1 - abar_t)) sqrt(1 - abar_t / abar_s)

with (x_0, eps) as the network sees them at x_t. eta = 0 is DDIM; eta = 1 is
ancestral sampling, which over all T steps is the DDPM of Ho et al. 2020 with
the posterior's variance. DPM-Solver++(2M) (Lu et al. 2022, algorithm 2) takes
the step before, from r to t, into account: with lambda = log(sqrt(abar) /
sqrt(1 - abar)) and h = lambda_s - lambda_t,

    D   = x_0(t) + (x_0(t) - x_0(r)) h / (2 h_before)
    x_s = sqrt((1 - abar_s) / (1 - abar_t)) x_t - sqrt(abar_s) (e^-h - 1) D

where D = x_0(t) in its first and last step.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fairdiff_jax.diffusion.process import add_noise, to_x0_and_eps
from fairdiff_jax.diffusion.schedule import Schedule


def example_keys(key: jax.Array, index: jax.Array) -> jax.Array:
  """One key per example, by the example's index [B] in the global batch."""
  return jax.vmap(jax.random.fold_in, (None, 0))(key, index)


def example_normal(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Standard normal noise [B, *shape], drawn per example from keys [B]."""
  return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def sampling_times(
  num_train_steps: int, num_steps: int, spacing: str = "even"
) -> np.ndarray:
  """The times that a reverse process visits, int32 [num_steps + 1], falling.

  Args:
    num_train_steps: T.
    num_steps: steps taken, at most T.
    spacing: 'even', T to 0 in equal steps; 'leading', as Stable Diffusion's
      DDIM: i floor(T / n) + 2 for i < n, and last 1, so that the least noise
      is left in; 'linspace', as diffusers' DPM-Solver++: T to 1 in n equal
      steps but for the last, which goes to 0.

  Raises:
    ValueError: if `num_steps` is not in 1..T, or `spacing` unknown.
  """
  if not 1 <= num_steps <= num_train_steps:
    raise ValueError(
      f"{num_steps} sampling steps asked of a schedule with"
      f" {num_train_steps}; use 1 to {num_train_steps}"
    )
  if spacing == "even":
    times = np.linspace(num_train_steps, 0, num_steps + 1).round()
  elif spacing == "leading":
    stride = num_train_steps // num_steps
    times = np.append(np.arange(num_steps)[::-1] * stride + 2, 1)
    times = np.minimum(times, num_train_steps)
  elif spacing == "linspace":
    times = np.linspace(num_train_steps - 1, 0, num_steps + 1).round() + 1
    times[-1] = 0
  else:
    raise ValueError(
      f"unknown spacing {spacing!r}; use 'even', 'leading' or 'linspace'"
    )
  return times.astype(np.int32)


def check_solver(name: str) -> None:
  """Raises ValueError unless `sample` knows a solver of this name."""
  if name not in SOLVERS:
    raise ValueError(
      f"unknown solver {name!r}; use {' or '.join(map(repr, SOLVERS))}"
    )


def started(times: np.ndarray, strength: float) -> np.ndarray:
  """The times that are left for a start from data instead of noise.

  Args:
    times: of the whole reverse process, falling.
    strength: share of its steps that are taken; 1 is all of them, 0 none (Meng
      et al. 2022, SDEdit).
  """
  taken = round(strength * (len(times) - 1))
  return times[len(times) - 1 - taken :]


def sample(
  denoise: Callable[[jax.Array, jax.Array], jax.Array],
  noise: jax.Array,
  keys: jax.Array,
  *,
  schedule: Schedule,
  prediction: str,
  num_steps: int,
  solver: str = "ddim",
  spacing: str = "even",
  eta: float = 1.0,
  x_0: jax.Array | None = None,
  strength: float = 1.0,
) -> jax.Array:
  """Runs the reverse process from noise, or noisy data, to data.

  Args:
    denoise: (x_t [B, ...], t int32 [B]) -> the network's output [B, ...].
    noise: to start from [B, ...].
    keys: one key per example [B]; noise depends on nothing else.
    schedule: noise schedule with T steps.
    prediction: what the network predicts: 'eps', 'x0' or 'v'.
    num_steps: steps taken, at most T.
    solver: 'ddim' or 'dpm++2m', which has no eta.
    spacing: of the times, as for `sampling_times`.
    eta: 0 for DDIM, 1 for ancestral sampling.
    x_0: data [B, ...] to start from, with noise added, if `strength` < 1.
    strength: as for `started`.

  Returns:
    x_0 [B, ...].

  Raises:
    ValueError: if `num_steps` is not in 1..T, or a name is unknown.
  """
  times = sampling_times(schedule.num_steps, num_steps, spacing)
  batch = noise.shape[0]
  if x_0 is None:
    x_t = noise
  else:
    times = started(times, strength)
    if len(times) == 1:
      return x_0
    x_t = add_noise(schedule, x_0, jnp.full(batch, times[0]), noise)
  check_solver(solver)
  solve = SOLVERS[solver](schedule, times, keys, eta)

  def step(carry, now_and_next):
    x_t, before, r = carry
    t, s = now_and_next
    everyone = jnp.full(batch, t)
    output = denoise(x_t, everyone)
    x_0, eps = to_x0_and_eps(schedule, prediction, output, x_t, everyone)
    return (solve(Seen(x_t, x_0, eps, before), r, t, s), x_0, t), None

  start = (x_t, jnp.zeros_like(x_t), jnp.asarray(times[0]))
  (found, _, _), _ = jax.lax.scan(step, start, (times[:-1], times[1:]))
  return found


class Seen(NamedTuple):
  """What a step knows of the data, each [B, ...].

  Attributes:
    x_t: the noisy data.
    x_0: the data as the network sees them now.
    eps: the noise, likewise.
    before: the data as the network saw them a step before; zeros at first.
  """

  x_t: jax.Array
  x_0: jax.Array
  eps: jax.Array
  before: jax.Array


def _ddim(schedule, times, keys, eta):
  del times
  abar = jnp.asarray(schedule.alpha_bar)

  def solve(seen, r, t, s):
    del r
    abar_t, abar_s = abar[t], abar[s]
    sigma = eta * jnp.sqrt((1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s))
    z = example_normal(
      jax.vmap(jax.random.fold_in, (0, None))(keys, t), seen.x_t.shape[1:]
    )
    direction = jnp.sqrt(jnp.maximum(1 - abar_s - sigma**2, 0))
    return jnp.sqrt(abar_s) * seen.x_0 + direction * seen.eps + sigma * z

  return solve


def _dpm(schedule, times, keys, eta):
  del keys, eta
  abar = jnp.asarray(schedule.alpha_bar)
  half_log_snr = _half_log_snr(schedule)

  def solve(seen, r, t, s):
    x_t, x_0, _, before = seen
    rise = half_log_snr[s] - half_log_snr[t]
    slope = rise / (half_log_snr[t] - half_log_snr[r]) / 2
    middle = (r > t) & (s != times[-1])  # neither the first step nor the last
    mixed = x_0 + jnp.where(middle, slope, 0) * (x_0 - before)
    ratio = jnp.sqrt((1 - abar[s]) / (1 - abar[t]))
    return ratio * x_t - jnp.sqrt(abar[s]) * jnp.expm1(-rise) * mixed

  return solve


# Solvers by name: (schedule, times, keys [B], eta) -> (what is seen, the times
# before, now and next) -> x at the next time.
SOLVERS: dict[str, Callable[..., Callable[..., jax.Array]]] = {
  "ddim": _ddim,
  "dpm++2m": _dpm,
}


def _half_log_snr(schedule: Schedule) -> jax.Array:
  """lambda [T + 1]; large, not infinite, for the data itself."""
  abar = np.float64(schedule.alpha_bar)
  noise = np.maximum(1 - abar, 1e-20)
  return jnp.asarray((np.log(abar) - np.log(noise)) / 2, jnp.float32)
