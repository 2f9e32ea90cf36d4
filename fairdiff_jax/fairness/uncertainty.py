"""How far the figures of a test set can be trusted: intervals and tests.

Cases are resampled with replacement within their group, so that every
resample has the groups' sizes; cases of unknown group are one more stratum,
which counts in the overall mean only. A patient's cases, such as two eyes, are
alike: where patients are known, they are drawn whole (the cluster bootstrap;
Davison and Hinkley 1997, ch. 3.8), the mean of a group is over the cases drawn,
groups keep their weights in the overall mean, and what is said of cases below
holds of patients. Intervals are percentile intervals (Efron and Tibshirani
1993, ch. 13), of the means as they are, of gap and ES with a correction:

The gap and the standard deviation s of the group means grow with the means'
sampling noise v (the mean over groups of variance / cases): s² exceeds the
true one by v on average, and in a resample by 2 v. Without a correction, where
2 to 6 groups of 50 are truly equal, a percentile interval of ES covers only
87% to 42% of the time instead of 95%, a bias-corrected or basic one 82% to
91%, and a percentile interval of the gap never. So the group means of a
resample are first drawn together about their mean until s² is less by 2 v, or
0 (their coverage: docs/methods.md).

With few cases a resample knows nothing that they do not: four that happen to
gain alike would give p = 0.001. So the p of a mean of fewer than
`MIN_RESAMPLED` cases, and that of gap and ES where a group has fewer than
`MIN_CASES`, come from exchanging the two runs' results of a case with
probability 1/2, which changes nothing if the runs are alike; p is the share of
exchanges that set them as far apart as they are. Of n cases that differ, n
signs decide: no p is below 2 / 2^n, however it was found, and none is given for
fewer than `MIN_TESTED` cases, which cannot reach 5%. Of runs that are alike, in
1,000 simulated test sets for each of seven sizes from 8 to 200 cases a group,
with and without 5% of failures, so many p were below 5% (standard error 0.7):
3.1% to 6.3% of a mean, 3.4% to 6.1% of at least one of three groups after Holm,
0% to 6.4% of gap and ES.

An interval speaks of the draw of test cases for one trained network, not of
another training: for that, train with several seeds and use `over_seeds`.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from fairdiff_jax.fairness import metrics

MIN_CASES = 30  # below this, an interval is not to be trusted
MIN_TESTED = 6  # below this, no p: 2 / 2^5 is above 5%
MIN_RESAMPLED = 200  # below this, p of a mean comes from exchanges
ALL_EXCHANGES = 12  # cases that differ, up to which all exchanges are made
EXACT_RANKS = 50  # cases that differ, up to which Wilcoxon's p is exact
CHUNK = 1 << 20  # cases drawn at a time
UNDEFINED = (float("nan"), float("nan"))


class _Patients(NamedTuple):
  """What is drawn as one: `k` measures of patients, each in one group.

  Attributes:
    sums: `[p, k]`, over a patient's cases.
    cases: `[p]`, how many they are.
    group: `[p]`, -1 unknown.
  """

  sums: np.ndarray
  cases: np.ndarray
  group: np.ndarray

  def of(self, chosen: np.ndarray | slice) -> Self:
    """Some of the patients."""
    return type(self)(*(x[chosen] for x in self))

  def strata(self) -> dict[int, Self]:
    """By group."""
    return {int(g): self.of(self.group == g) for g in np.unique(self.group)}

  def mean(self) -> np.ndarray:
    """`[k]`, over all cases."""
    return self.sums.sum(0) / self.cases.sum()

  def noise(self) -> np.ndarray:
    """Variance `[k]` of the mean, linearised as that of a ratio."""
    left = self.sums - self.cases[:, None] * self.mean()
    number = len(left)
    shrink = max(1, number - 1) / number * self.cases.sum() ** 2
    return np.square(left).sum(0) / shrink


def _patients(
  values: np.ndarray, group: np.ndarray, patient: np.ndarray | None
) -> _Patients:
  """Gathers cases `[n, k]` by patient; None where each is one of its own."""
  if patient is None:
    return _Patients(values, np.ones(len(values), int), group)
  pairs = np.unique(patient, return_inverse=True)[1] * (group.max() + 2)
  keys, first, index = np.unique(
    pairs + group + 1, return_index=True, return_inverse=True
  )
  sums = np.stack(
    [np.bincount(index, column, len(keys)) for column in values.T], axis=1
  )
  return _Patients(sums, np.bincount(index), group[first])


def _resampled_means(
  patients: _Patients, num_resamples: int, rng: np.random.Generator
) -> np.ndarray:
  """Means `[num_resamples, k]` over the cases of resampled patients."""
  n = len(patients.cases)
  alike = (patients.cases == 1).all()
  rows = max(1, CHUNK // n)
  sizes = np.diff([*range(0, num_resamples, rows), num_resamples])
  parts = []
  for size in sizes:
    drawn = rng.integers(n, size=(size, n))
    cases = n if alike else patients.cases.take(drawn).sum(1)
    # Column by column: taking whole rows costs twenty times as much.
    columns = patients.sums.T
    parts.append([column.take(drawn).sum(1) / cases for column in columns])
  return np.concatenate(parts, axis=1).T


def _bootstrap(
  patients: _Patients,
  num_resamples: int,
  seed: int,
  definition: str,
) -> dict[Any, np.ndarray]:
  """Resampled figures of `k` measures of the same patients.

  Args:
    patients: One at least, without NaN.
    num_resamples: Number of resamples.
    seed: Seed of the draws.
    definition: Of equity scaling.

  Returns:
    `[num_resamples, k]` of "overall", "gap", "es" (both corrected) and, by its
    index, of every group with cases; NaN where undefined.
  """
  rng = np.random.default_rng(seed)
  strata = patients.strata()
  means = {
    g: _resampled_means(of, num_resamples, rng) for g, of in strata.items()
  }
  noise = [of.noise() for g, of in strata.items() if g >= 0]
  noise_of_mean = np.mean(noise, 0) if noise else 0.0
  return _figures(means, strata, definition, noise_of_mean)


def _exchange(
  pairs: _Patients,
  num_exchanges: int,
  seed: int,
  definition: str,
) -> dict[Any, np.ndarray]:
  """Figures of two runs whose results of a patient are exchanged at random.

  Args:
    pairs: Both runs' results, of one patient at least, without NaN.
    num_exchanges: Number of random exchanges, where not all are made.
    seed: Seed of the draws.
    definition: Of equity scaling.

  Returns:
    As `_bootstrap`, but not corrected; the first row is of the runs as they
    are.
  """
  differs = pairs.sums[:, 0] != pairs.sums[:, 1]
  count = int(differs.sum())
  if count <= ALL_EXCHANGES:
    swapped = np.arange(2**count)[:, None] >> np.arange(count) & 1
  else:
    rng = np.random.default_rng(seed)
    swapped = rng.integers(2, size=(num_exchanges + 1, count), dtype=np.int8)
    swapped[0] = 0
  means, strata = {}, pairs.strata()
  for g, stratum in strata.items():
    moving = pairs.sums[differs & (pairs.group == g)]
    change = np.diff(moving)[:, 0] / stratum.cases.sum()
    moved = swapped[:, pairs.group[differs] == g] @ change
    means[g] = stratum.mean() + np.stack([moved, -moved], 1)
  return _figures(means, strata, definition)


def _figures(
  means: dict[int, np.ndarray],
  strata: dict[int, _Patients],
  definition: str,
  noise: np.ndarray | float = 0.0,
) -> dict[Any, np.ndarray]:
  """Adds the figures of all groups to the means `[r, k]` of each.

  Args:
    means: By group, -1 unknown.
    strata: The groups' patients.
    definition: Of equity scaling.
    noise: v of the group means `[k]`, for which gap and ES are corrected.

  Returns:
    As `_bootstrap`.
  """
  sizes = {g: of.cases.sum() for g, of in strata.items()}
  overall = np.asarray(
    sum(sizes[g] * m for g, m in means.items()) / sum(sizes.values())
  )
  alone = [g for g, of in strata.items() if len(of.cases) < 2]
  if len(alone) == len(sizes):
    overall = np.full_like(overall, np.nan)
  means = means | {g: np.full_like(overall, np.nan) for g in alone}
  of_groups = np.reshape(
    [m for g, m in means.items() if g >= 0], (-1, *overall.shape)
  )
  gap = np.full_like(overall, np.nan)
  if len(of_groups) > 1:
    plain = of_groups.std(0, ddof=1)
    wanted = np.sqrt(np.maximum(plain**2 - 2 * noise, 0))
    shrink = np.divide(wanted, plain, out=plain.copy(), where=plain != 0)
    center = of_groups.mean(0)
    of_groups = center + shrink * (of_groups - center)
    gap = np.ptp(of_groups, axis=0)
  es = overall / (1 + metrics.spread(of_groups, overall, definition))
  figures: dict[Any, np.ndarray] = {"overall": overall, "gap": gap, "es": es}
  return figures | means


def _interval(
  resampled: np.ndarray, level: float, n: int | None = None
) -> tuple[float, float]:
  """Percentile interval of `[num_resamples]`, expanded for a mean of n."""
  from scipy import stats  # here and below: seconds to import

  tail = (1 - level) / 2
  if n is not None and n > 1:
    quantile = stats.t.ppf(tail, n - 1) * (n / (n - 1)) ** 0.5
    tail = stats.norm.cdf(quantile)
  low, high = np.quantile(resampled, [tail, 1 - tail])
  return float(low), float(high)


def _p_value(resampled: np.ndarray, n: int | None = None) -> float:
  """Two-sided p that resampled differences `[num_resamples]` are about 0.

  It is the smallest 1 - level at which `_interval` leaves out 0.
  """
  from scipy import stats

  if np.isnan(resampled).any():
    return float("nan")
  beyond = min(int(np.sum(resampled <= 0)), int(np.sum(resampled >= 0)))
  tail = (beyond + 1) / (len(resampled) + 1)
  if n is not None:
    tail = stats.t.cdf(stats.norm.ppf(tail) * (1 - 1 / n) ** 0.5, n - 1)
  return float(min(1, 2 * tail))


def _p_exchanged(exchanged: np.ndarray) -> float:
  """Share of differences `[r]` that are as far from 0 as the first one."""
  if np.isnan(exchanged).any():
    return float("nan")
  size = np.abs(exchanged)
  return float(np.mean(size >= size[0] * (1 - 1e-9) - 1e-12))


def _check(level: float, num_resamples: int) -> None:
  if not 0 < level < 1:
    raise ValueError(f"level must lie between 0 and 1, got {level}")
  if num_resamples < 1:
    raise ValueError(f"num_resamples must be positive, got {num_resamples}")


def _kinds(lower_is_better: bool) -> tuple[str, ...]:
  return ("overall", "gap") if lower_is_better else ("overall", "gap", "es")


def _few(patients: _Patients, names: Sequence[str]) -> list[str]:
  groups = enumerate(names)
  return [k for g, k in groups if (patients.group == g).sum() < MIN_CASES]


def _known(
  values: np.ndarray, group: np.ndarray, patient: Sequence[str] | None
) -> _Patients:
  """The patients of the cases `[n, k]` that are known of all measures."""
  known = ~np.isnan(values).any(1)
  of = None
  if patient is not None:
    of = np.asarray(patient)
    if of.shape != group.shape:
      raise ValueError(
        f"patient must be [n] as group, got {of.shape} and {group.shape}"
      )
    of = of[known] if known.any() else None
  return _patients(values[known], group[known], of)


def intervals(
  values: np.ndarray,
  group: np.ndarray,
  names: Sequence[str],
  *,
  patient: Sequence[str] | None = None,
  level: float = 0.95,
  num_resamples: int = 2000,
  seed: int = 0,
  lower_is_better: bool = False,
  definition: str = "fairdiff_std",
) -> dict:
  """Bootstrap intervals of the figures of `metrics.summarize`.

  >>> values = [0.7, 0.8, 0.9, 0.8] * 10
  >>> found = intervals(values, [0, 0, 1, 1] * 10, ["A", "B"])
  >>> [round(end, 2) for end in found["groups"]["A"]], found["few"]
  ([0.72, 0.78], ['A', 'B'])

  Args:
    values: `[n]`, one a case; NaN is left out.
    group: `[n]` index into `names`, -1 unknown. Unknown cases count in the
      overall mean only.
    names: Names of the groups.
    patient: `[n]`, whose case it is; None where each is of another.
    level: Share of such intervals that cover the truth.
    num_resamples: Number of resamples.
    seed: Seed of the draws.
    lower_is_better: True for distances and errors, which have no ES.
    definition: Of equity scaling, as for `metrics.equity_scaled`.

  Returns:
    `overall`, `gap` and, where more is better, `es`, each (low, high);
    `groups` {name: (low, high)}; `level`; `few`, names of the groups with
    fewer than `MIN_CASES` cases. (NaN, NaN) for a mean of no or one case, for
    the gap of fewer than two groups, and for gap and ES where a group has one
    case.

  Raises:
    ValueError: As `metrics.summarize`, or a level outside (0, 1), or no
      resample.
  """
  _check(level, num_resamples)
  metrics.summarize(values, group, names, definition=definition)  # may raise
  values, group = np.asarray(values, np.float64), np.asarray(group)
  patients = _known(values[:, None], group, patient)
  resampled = {}
  if len(patients.cases):
    resampled = _bootstrap(patients, num_resamples, seed, definition)

  def interval(key, n=None):
    if key not in resampled:
      return UNDEFINED
    return _interval(resampled[key][:, 0], level, n)

  sizes: dict[str, int | None] = dict.fromkeys(_kinds(lower_is_better))
  sizes["overall"] = len(patients.cases)
  return {
    **{kind: interval(kind, n) for kind, n in sizes.items()},
    "groups": {
      name: interval(g, (patients.group == g).sum())
      for g, name in enumerate(names)
    },
    "level": level,
    "few": _few(patients, names),
  }


def compare(
  values_a: np.ndarray,
  values_b: np.ndarray,
  group: np.ndarray,
  names: Sequence[str],
  *,
  patient: Sequence[str] | None = None,
  level: float = 0.95,
  num_resamples: int = 2000,
  seed: int = 0,
  lower_is_better: bool = False,
  definition: str = "fairdiff_std",
) -> dict:
  """Tests whether run b differs from run a on the same cases.

  >>> a, b = [0.7, 0.8] * 20, [0.8, 0.85] * 20
  >>> found = compare(a, b, [0, 1] * 20, ["A", "B"])
  >>> round(found["overall"]["difference"], 3), found["overall"]["p"] < 0.01
  (0.075, True)

  A resample draws the same cases for both, and the bootstrap's p is the
  smallest 1 - level at which the interval of the difference leaves out 0. With
  fewer than `MIN_RESAMPLED` cases of a mean, or `MIN_CASES` of a group for gap
  and ES, the p of the same name comes from exchanging the runs' results: from
  all exchanges of up to `ALL_EXCHANGES` cases that differ, else from random
  ones. Wilcoxon's is that of the signed-rank test of the cases' differences,
  exact for up to `EXACT_RANKS` that are not 0. `p_..._holm` is adjusted over
  the groups.

  Args:
    values_a: `[n]`, one a case; a case that is NaN in either is left out.
    values_b: `[n]`, the same cases.
    group: `[n]` index into `names`, -1 unknown.
    names: Names of the groups.
    patient: As for `intervals`.
    level: Level of the intervals.
    num_resamples: Number of resamples, and of exchanges where not all are made.
    seed: Seed of the draws.
    lower_is_better: True for distances and errors, which have no ES.
    definition: Of equity scaling, as for `metrics.equity_scaled`.

  Returns:
    `overall`, `gap` and, where more is better, `es`: {`difference` (b - a, of
    the figures of `metrics.summarize`), `low`, `high`, `p`}; `groups` {name:
    {`difference`, `low`, `high`, `p_bootstrap`, `p_wilcoxon`,
    `p_bootstrap_holm`, `p_wilcoxon_holm`, `n`}}; `level`; `few`, names of the
    groups with fewer than `MIN_CASES` cases. NaN where undefined, as for
    `intervals`, and each p of fewer than `MIN_TESTED` cases. No p is below
    2 / 2^n, n the cases that differ.

  Raises:
    ValueError: As `intervals`, or the two differ in length.
  """
  _check(level, num_resamples)
  values = [np.asarray(v, np.float64) for v in (values_a, values_b)]
  if values[0].shape != values[1].shape:
    raise ValueError(f"lengths differ: {values[0].shape}, {values[1].shape}")
  group = np.asarray(group)
  missing = np.isnan(values[0]) | np.isnan(values[1])
  first, second = (
    metrics.summarize(
      np.where(missing, np.nan, v),
      group,
      names,
      lower_is_better=lower_is_better,
      definition=definition,
    )
    for v in values
  )
  pairs = _known(np.stack(values, 1), group, patient)
  few = _few(pairs, names)
  options = (num_resamples, seed, definition)
  resampled = _bootstrap(pairs, *options) if len(pairs.cases) else {}

  few_cases = any(first["groups"][name]["n"] for name in few)

  def row(key, difference, p_name):
    """A figure's row; `key` is its kind, or the group of a mean."""
    if key not in resampled:
      return dict.fromkeys(("difference", "low", "high", p_name), math.nan)
    member = slice(None) if isinstance(key, str) else pairs.group == key
    mine = pairs.of(member)
    number = len(mine.cases)
    n = None if key in ("gap", "es") else number  # of a mean
    draws = np.diff(resampled[key])[:, 0]
    low, high = _interval(draws, level, n)
    if number < MIN_TESTED:
      p = math.nan
    elif n < MIN_RESAMPLED if n else few_cases:
      exchanged = _exchange(mine, *options)
      p = _p_exchanged(np.diff(exchanged[key])[:, 0])
    else:
      p = _p_value(draws, n)
    least = min(1.0, 2.0 ** (1 - np.count_nonzero(np.diff(mine.sums))))
    return {
      "difference": difference,
      "low": low,
      "high": high,
      p_name: float(np.maximum(p, least)),  # NaN stays
    }

  result = {
    kind: row(kind, second[kind] - first[kind], "p")
    for kind in _kinds(lower_is_better)
  }
  rows = {}
  for g, name in enumerate(names):
    a, b = (summary["groups"][name] for summary in (first, second))
    rows[name] = row(g, b["mean"] - a["mean"], "p_bootstrap") | {
      "p_wilcoxon": _wilcoxon(
        (np.diff(pairs.sums)[:, 0] / pairs.cases)[pairs.group == g]
      ),
      "n": a["n"],
    }
  for test in ("p_bootstrap", "p_wilcoxon"):
    adjusted = holm([r[test] for r in rows.values()])
    for r, p in zip(rows.values(), adjusted, strict=True):
      r[f"{test}_holm"] = float(p)
  return {**result, "groups": rows, "level": level, "few": few}


def _wilcoxon(differences: np.ndarray) -> float:
  """Two-sided p of the signed-rank test; NaN below `MIN_TESTED` cases.

  Differences of 0 are left out, equal ones share the mean of their ranks.
  """
  from scipy import stats

  if len(differences) < MIN_TESTED:
    return float("nan")
  differences = differences[differences != 0]
  if not len(differences):
    return 1.0
  if len(differences) > EXACT_RANKS:
    return float(stats.wilcoxon(differences).pvalue)
  # Of all 2^n choices of signs, how many give each sum of positive ranks;
  # ranks are doubled, so that those of equal differences are whole.
  ranks = np.rint(2 * stats.rankdata(np.abs(differences))).astype(int)
  choices = np.zeros(ranks.sum() + 1)
  choices[0] = 1
  for rank in ranks:
    choices[rank:] = choices[rank:] + choices[: len(choices) - rank]
  found = ranks[differences > 0].sum()
  tail = min(choices[: found + 1].sum(), choices[found:].sum())
  return float(min(1, 2 * tail / choices.sum()))


def holm(p: Sequence[float] | np.ndarray) -> np.ndarray:
  """Holm's adjustment of p-values for testing them all (Holm 1979).

  Args:
    p: `[m]`; NaN is left out.

  Returns:
    `[m]` in the same order, at most 1; NaN where `p` is.
  """
  adjusted = np.asarray(p, np.float64).copy()
  known = np.flatnonzero(~np.isnan(adjusted))
  order = known[np.argsort(adjusted[known])]
  factors = np.arange(len(order), 0, -1)
  steps = np.maximum.accumulate(factors * adjusted[order])
  adjusted[order] = np.minimum(steps, 1)
  return adjusted


def over_seeds(figures: Sequence[float] | np.ndarray) -> dict:
  """Mean and spread of one figure over runs that differ in their seed.

  Args:
    figures: `[s]`, one a run; NaN is left out.

  Returns:
    `mean`; `sd` with s - 1; `n`; `low` and `high`, Student's 95% interval of
    the mean. NaN where undefined: all for no run, all but the mean for one.
  """
  from scipy import stats

  values = np.asarray(figures, np.float64)
  values = values[~np.isnan(values)]
  n = len(values)
  mean = float(values.mean()) if n else float("nan")
  sd = float(values.std(ddof=1)) if n > 1 else float("nan")
  half = float(stats.t.ppf(0.975, max(1, n - 1))) * sd / max(1, n) ** 0.5
  ends = {"low": mean - half, "high": mean + half}
  return {"mean": mean, "sd": sd, "n": n, **ends}
