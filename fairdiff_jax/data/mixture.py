r"""Which cases a training epoch is made of.

A mixture is an array of case indices, with repeats: the pool of one epoch.
With n_g real cases of group g and N = max_g n_g unless a size is given:

    none            every real case once
    repeat_sample   real cases repeated until every group has N
    equal_scale     each group N_g: its real cases (a subset if n_g > N_g),
                    filled up with synthetic ones

N_g = N, unless sizes are tilted to the groups of high risk: then N_g is in
proportion to R_g^tilt, and all groups together have G N.

The published Equal Scale takes every real case once; with a few dozen cases
of a minority its epoch is then nearly all synthetic. A `real_share` r > 0
guarantees that at least r N_g of each group's cases are real, by repeating
them, and fills up with synthetic ones only the rest.
"""

from collections.abc import Sequence

import numpy as np

from fairdiff_jax.data.groups import group_counts

STRATEGIES = ("none", "repeat_sample", "equal_scale")


def repeat_to(
  rng: np.random.Generator, indices: np.ndarray, size: int
) -> np.ndarray:
  """Exactly `size` of the indices, each as often as any other or once more."""
  if size and not len(indices):
    raise ValueError(f"cannot draw {size} cases from none")
  whole, rest = divmod(size, len(indices)) if size else (0, 0)
  extra = rng.permutation(indices)[:rest]
  return np.concatenate([np.repeat(indices, whole), extra]).astype(np.int64)


def powered_pool(
  rng: np.random.Generator, group: np.ndarray, power: float
) -> np.ndarray:
  """A pool in which a case of group g counts in proportion to n_g^-power.

  Power 0 is every case once; power 1 gives all groups the same share. The
  largest group's cases count once, or more if that rounds a minority's better.
  """
  groups, counts = np.unique(group, return_counts=True)
  weight = (counts / counts.max()) ** -power
  return np.concatenate(
    [
      repeat_to(rng, np.flatnonzero(group == g), round(n * w))
      for g, n, w in zip(groups, counts, weight, strict=True)
    ]
  )


def group_sizes(
  group: np.ndarray,
  num_groups: int,
  *,
  size: int = 0,
  risk: np.ndarray | None = None,
  tilt: float = 0,
) -> np.ndarray:
  """Cases N_g [G] that an epoch has of every group.

  Args:
    group: group index [n] of the real training cases.
    num_groups: G.
    size: N, cases per group; 0 means as many as the largest group has.
    risk: running risk [G] of the groups, 0 or None while it is not known.
    tilt: exponent of the risk; 0 gives every group N.
  """
  counts = group_counts(group, num_groups)
  size = size or counts.max(initial=0)
  if not tilt or risk is None or not np.all(np.asarray(risk) > 0):
    return np.full(num_groups, size)
  share = np.asarray(risk, np.float64) ** tilt
  return np.round(num_groups * size * share / share.sum()).astype(int)


def synthetic_quota(
  group: np.ndarray, sizes: np.ndarray, real_share: float = 0
) -> np.ndarray:
  """Synthetic cases [G] that Equal Scale needs of every group.

  Args:
    group: group index [n] of the real training cases.
    sizes: N_g [G].
    real_share: least real share of each group, 0 to 1; 0 is as published.

  Raises:
    ValueError: if `real_share` is not in 0..1.
  """
  if not 0 <= real_share <= 1:
    raise ValueError(f"fairness.real_share={real_share} is not in 0..1")
  counts = group_counts(group, len(sizes))
  real = np.maximum(counts, np.ceil(real_share * sizes).astype(int))
  return np.maximum(sizes - real, 0)


def training_pool(
  rng: np.random.Generator,
  strategy: str,
  real_group: np.ndarray,
  synthetic_group: np.ndarray,
  group_names: Sequence[str],
  sizes: np.ndarray,
) -> np.ndarray:
  """The epoch of a data strategy.

  Args:
    rng: decides subsets and remainders.
    strategy: 'none', 'repeat_sample' or 'equal_scale'.
    real_group: group index [n] of the real cases, -1 for unknown.
    synthetic_group: group index [m] of the synthetic cases. Equal Scale takes
      all of them, and fills every group up to N_g with real ones: while there
      are none it is Repeat Sample.
    group_names: names of the G groups.
    sizes: N_g [G].

  Returns:
    Indices into the real cases followed by the synthetic ones. Cases of
    unknown group are there once.

  Raises:
    ValueError: if the strategy is unknown, or a group has no real case.
  """
  if strategy not in STRATEGIES:
    raise ValueError(
      f"unknown data strategy {strategy!r}; use one of {', '.join(STRATEGIES)}"
    )
  if strategy == "none":
    return np.arange(len(real_group))
  parts = [np.flatnonzero(real_group < 0)]
  for g, (name, size) in enumerate(zip(group_names, sizes, strict=True)):
    real = np.flatnonzero(real_group == g)
    synthetic = np.empty(0, np.int64)
    if strategy == "equal_scale":
      synthetic = len(real_group) + np.flatnonzero(synthetic_group == g)
    if not len(real):
      raise ValueError(
        f"group {name} has no training case, so {strategy} cannot give it"
        f" {size}; choose another data.attribute or fairness.strategy='none'"
      )
    parts.append(synthetic)
    parts.append(repeat_to(rng, real, max(size - len(synthetic), 0)))
  return np.concatenate(parts)
