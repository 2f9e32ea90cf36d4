r"""Noise schedules.

A schedule fixes how fast a forward diffusion forgets its data,

    q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I),    t = 1..T
    abar_t = prod_{s <= t} (1 - beta_s),    abar_0 = 1

(Ho et al. 2020, eq. 2 and 4). Step 0 is the data itself, so that arrays of
a schedule have T + 1 entries and are indexed by t without an offset.
"""

from typing import NamedTuple

import numpy as np


class Schedule(NamedTuple):
  """Variance schedule; `beta` and `alpha_bar` are float32 [T + 1]."""

  beta: np.ndarray
  alpha_bar: np.ndarray

  @property
  def num_steps(self) -> int:
    return len(self.beta) - 1


def make_schedule(
  name: str, num_steps: int, beta_start: float = 1e-4, beta_end: float = 0.02
) -> Schedule:
  """Builds a schedule of `num_steps` steps.

  Args:
    name: 'linear' (betas equally spaced), 'scaled_linear' (square roots of
      betas equally spaced, Stable Diffusion) or 'cosine' (Nichol & Dhariwal
      2021, eq. 17; takes no betas).
    num_steps: T.
    beta_start: beta_1.
    beta_end: beta_T.

  Raises:
    ValueError: if `name` is unknown.
  """
  if name == "linear":
    beta = np.linspace(beta_start, beta_end, num_steps)
  elif name == "scaled_linear":
    beta = np.linspace(beta_start**0.5, beta_end**0.5, num_steps) ** 2
  elif name == "cosine":
    t = np.arange(num_steps + 1) / num_steps
    f = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    beta = np.minimum(1 - f[1:] / f[:-1], 0.999)
  else:
    raise ValueError(
      f"unknown schedule {name!r}; use 'linear', 'scaled_linear' or 'cosine'"
    )
  beta = np.concatenate([[0.0], beta])
  alpha_bar = np.cumprod(1 - beta)
  return Schedule(beta.astype(np.float32), alpha_bar.astype(np.float32))
