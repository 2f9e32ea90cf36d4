"""How synthetic patients look beside real ones, without a segmenter.

Statistics of every case say what could betray it: sharpness of edges, contrast,
grain, vessels, sizes. A small classifier that is given all of them tries to
tell synthetic cases from real ones; the area under its curve (AUC) is .5 where
it cannot. It is asked about patients that it has not seen: images made from
nine would else be known by whom they show, be they as real as those. Lengths
are pixels of a 64-pixel image, intensities in [-1, 1].

Distances between sets of feature vectors say the same of any features: those
of Frechet (Heusel et al. 2017), of kernels (Binkowski et al. 2018), of nearest
neighbours (precision and recall, Kynkaanniemi et al. 2019; MMD and COV,
Achlioptas et al. 2018).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import linalg, ndimage
from scipy.spatial.distance import cdist

from fairdiff_jax.data.audit import signed_distance
from fairdiff_jax.data.statistics import GREY_LEVEL

MIN_CASES = 16  # of a group, real and synthetic, for an AUC
FOLDS = 5
REPEATS = 3  # divisions into folds
RIDGE = 2.0  # penalty on the classifier's weights
RESAMPLES = 500
LEVEL = 95  # percent, of all intervals
BANDS = ((0.03, 0.1), (0.1, 0.2), (0.2, 0.32), (0.32, 0.5))  # cycles per pixel
ALL = "all"  # what the groups together are called
Structures = Mapping[str, Sequence[int]]


def statistics(
  image: np.ndarray, mask: np.ndarray, structures: Structures
) -> dict[str, np.ndarray]:
  """Statistics of cases.

  Args:
    image: uint8 [n, H, W], or RGB [n, H, W, 3], of which the mean is taken.
    mask: [n, H, W] of classes, 0 background.
    structures: name -> the classes that it consists of.

  Returns:
    Columns [n], NaN where undefined: `brightness` of the background, `contrast
    of <structure>` to it, `edge of <structure>` (mean gradient on its border),
    `size of <structure>` (root of its area), `<a> to <b>` (ratio of sizes,
    where a lies within b), `grain` (standard deviation of what a blur by one
    pixel takes away from the background), `detail 1..4` (logarithm of the
    amplitude in bands of frequency, coarse to fine), `vessels` (99th percentile
    of the background's dark ridges); of RGB images also `red to green`
    and `blue to green`, ratios of what the background has of them.
  """
  n, *shape = mask.shape
  unit = min(shape) / 64
  colour = image.astype(np.float32) / 127.5 - 1
  x = colour if image.ndim == 3 else colour.mean(-1)
  blurred = _blur(x, unit)
  background = mask == 0
  away = _distance(background) > 3 * unit - 0.5  # from the nearest structure
  brightness = _mean(x, background)
  result = {"brightness": brightness}
  if image.ndim == 4:
    red, green, blue = (
      _mean(colour[..., c], background) + 1 + GREY_LEVEL for c in range(3)
    )
    result |= {"red to green": red / green, "blue to green": blue / green}
  gradient = np.hypot(
    *(_blur(x, 0.5 * unit, order) for order in ((1, 0), (0, 1)))
  )
  inside = {
    name: np.isin(mask, classes) for name, classes in structures.items()
  }
  sizes = {}
  for name, region in inside.items():
    border = np.abs(_distance(region)) < unit
    border &= region.any((1, 2), keepdims=True)
    sizes[name] = np.sqrt(region.sum((1, 2))) / unit
    sizes[name][sizes[name] == 0] = np.nan
    result[f"contrast of {name}"] = _mean(x, region) - brightness
    result[f"edge of {name}"] = unit * _mean(gradient, border)
    result[f"size of {name}"] = sizes[name]
  for a, first in structures.items():
    for b, second in structures.items():
      if set(first) < set(second):
        result[f"{a} to {b}"] = sizes[a] / sizes[b]
  result["grain"] = _spread(x - blurred, away)
  window = np.hanning(shape[0])[:, None] * np.hanning(shape[1])
  amplitude = np.abs(np.fft.fft2((x - _blur(x, 8 * unit)) * window)) ** 2
  frequency = unit * np.hypot(
    np.fft.fftfreq(shape[0])[:, None], np.fft.fftfreq(shape[1])
  )
  for i, (low, high) in enumerate(BANDS, start=1):
    band = (frequency >= low) & (frequency < high)
    power = amplitude[:, band].mean(1) if band.any() else np.full(n, np.nan)
    result[f"detail {i}"] = np.log(power + 1e-9) / 2
  ridges = unit**2 * _ridges(x, unit)
  result["vessels"] = np.array(
    [
      np.percentile(r[a], 99) if a.any() else np.nan
      for r, a in zip(ridges, away, strict=True)
    ]
  )
  return result


def _blur(x, sigma, order=(0, 0)):
  return ndimage.gaussian_filter(
    x, (0, sigma, sigma), order=(0, *order), mode="nearest"
  )


def _ridges(x, sigma):
  """Larger curvature [n, H, W]: positive on dark lines."""
  rr, cc, rc = (_blur(x, sigma, order) for order in ((2, 0), (0, 2), (1, 1)))
  return (rr + cc) / 2 + np.hypot((rr - cc) / 2, rc)


def _distance(regions):
  return np.array([signed_distance(r) for r in regions]).reshape(regions.shape)


def _mean(x, where):
  """Mean [n] where true, NaN of nothing."""
  number = where.sum((1, 2))
  total = np.where(where, x, 0).sum((1, 2), dtype=np.float64)
  return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def _spread(x, where):
  mean = _mean(x, where)
  return np.sqrt(_mean((x - mean[:, None, None]) ** 2, where))


def two_sample_auc(
  real: np.ndarray,
  synthetic: np.ndarray,
  seed: int = 0,
  patient: Sequence[Any] | None = None,
  source: Sequence[Any] | None = None,
) -> tuple[float, float, float]:
  """AUC of a classifier of synthetic against real cases, cross-validated.

  Logistic regression on standardised features and their squares. .5 is chance;
  less, by chance as well.

  The interval is that of Nadeau & Bengio (2003): J folds share training cases,
  so that the variance of their mean is (1/J + n_test / n_train) times that of
  one. Those of further divisions are no new cases: the degrees of freedom of
  Student's t are those of one division.

  Args:
    real: features [n, D], NaN where unknown.
    synthetic: features [m, D].
    seed: of folds.
    patient: whose each real case is [n], all of whose are in one fold; None
      where every case is a patient of its own.
    source: whose images each synthetic case is made from [m] or [m, S]. A
      classifier has learned nothing of the first one of those that it judges:
      that a patient is known again is no matter of how real the image looks.

  Returns:
    The AUC, mean over folds, and its interval; NaN where either side has fewer
    than `MIN_CASES`, or there are fewer patients than folds.
  """
  from scipy import stats  # takes long to import

  n, m = len(real), len(synthetic)
  sides = []
  for number, whose in ((n, patient), (m, source)):
    whose = np.arange(number) if whose is None else np.asarray(whose)
    who = np.unique(whose, return_inverse=True)[1]
    sides.append(who.reshape(number, whose.size // max(number, 1)))
  if min(n, m) < MIN_CASES or any(
    len(np.unique(who[:, 0])) < FOLDS for who in sides
  ):
    return (np.nan,) * 3
  rng = np.random.default_rng(seed)
  x = np.concatenate([real, synthetic]).astype(np.float64)
  label = np.arange(n + m) >= n
  found = []
  for _ in range(REPEATS):
    folds = [_folds(rng, who) for who in sides]
    for k in range(FOLDS):
      judged = np.concatenate([fold[:, 0] == k for fold in folds])
      train = np.concatenate([(fold != k).all(1) for fold in folds])
      score = _scores(x, label, train)[judged[~train]]
      found.append(auc(score[~label[judged]], score[label[judged]]))
  mean, variance = np.mean(found), np.var(found, ddof=1)
  error = np.sqrt((1 / len(found) + 1 / (FOLDS - 1)) * variance)
  half = stats.t.ppf(0.5 + LEVEL / 200, FOLDS - 1) * error
  return float(mean), float(max(mean - half, 0)), float(min(mean + half, 1))


def _folds(rng, who) -> np.ndarray:
  """Folds of cases' patients [n, S], the first of which are in every fold."""
  first = np.isin(np.arange(who.max() + 1), who[:, 0])
  fold = np.empty(len(first), int)
  for some in (first, ~first):
    fold[some] = rng.permutation(some.sum()) % FOLDS
  return fold[who]


def _scores(x, label, train) -> np.ndarray:
  """Scores of the cases that are not in training."""
  # A feature that no case has tells nothing.
  known = np.where(np.isfinite(x[train]).any(0), x[train], 0)
  center, scale = np.nanmean(known, axis=0), np.nanstd(known, axis=0) + 1e-9
  z = np.clip(np.nan_to_num((x - center) / scale), -3, 3)
  z = np.concatenate([z, z**2 - 1], axis=1)
  weights = _logistic(z[train], label[train])
  return z[~train] @ weights[:-1]


def auc(lower: np.ndarray, upper: np.ndarray) -> float:
  """Chance that one of `upper` exceeds one of `lower`; ties count half."""
  return float((np.sign(upper[:, None] - lower) / 2 + 0.5).mean())


def _logistic(x, label):
  """Weights [D + 1] of a ridge-penalised logistic regression; Newton."""
  x = np.c_[x, np.ones(len(x))]
  weights = np.zeros(x.shape[1])
  penalty = np.full(x.shape[1], RIDGE)
  penalty[-1] = 1e-6
  for _ in range(25):
    p = 1 / (1 + np.exp(-np.clip(x @ weights, -30, 30)))
    hessian = (x * (p * (1 - p))[:, None]).T @ x + np.diag(penalty)
    weights -= np.linalg.solve(hessian, x.T @ (p - label) + penalty * weights)
  return weights


def _percentiles(values):
  tail = (100 - LEVEL) / 2
  known = values[np.isfinite(values)]
  if not len(known):
    return np.nan, np.nan
  return tuple(float(v) for v in np.percentile(known, (tail, 100 - tail)))


def comparable(
  real: Sequence[str], synthetic: Sequence[str], groups: Sequence[str]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Which cases are compared, by group.

  Args:
    real: groups of the real cases [n].
    synthetic: of the synthetic ones [m].
    groups: the names.

  Returns:
    Group -> (rows of real cases, rows of synthetic ones); and 'all', of the
    groups that both sides have, the real ones in the synthetic proportions.
  """
  real, synthetic = np.asarray(real, str), np.asarray(synthetic, str)
  found = {
    g: (np.flatnonzero(real == g), np.flatnonzero(synthetic == g))
    for g in groups
  }
  both = [rows for rows in found.values() if min(map(len, rows))]
  times = min((len(r) / len(s) for r, s in both), default=0)
  pieces = [[np.empty(0, int)], [np.empty(0, int)]]
  for r, s in both:
    pieces[0].append(r[: max(int(times * len(s)), 1)])
    pieces[1].append(s)
  return found | {ALL: (np.concatenate(pieces[0]), np.concatenate(pieces[1]))}


def compare(
  real: Mapping[str, np.ndarray],
  synthetic: Mapping[str, np.ndarray],
  structures: Structures,
  groups: Sequence[str],
  seed: int = 0,
) -> dict[str, dict[str, Any]]:
  """Real beside synthetic cases, group by group.

  Args:
    real: `image` uint8 [n, H, W], `mask` [n, H, W], `group` names [n] and, if
      patients have several cases, `patient` [n].
    synthetic: the same of m cases; `patient` [m] or [m, S] if images are made
      from patients'.
    structures: name -> the classes that it consists of.
    groups: names of the groups.
    seed: of folds and resamples.

  Returns:
    Group, or 'all' as `comparable` has it -> {`auc`, `auc_interval` (low,
    high), `real` and `synthetic` numbers of cases, `statistics`: name ->
    {`real`, `synthetic`, `ratio`, `low`, `high`}}. A statistic is its mean over
    cases, and `... between patients` the standard deviation over them; a ratio
    is that of synthetic to real, of `detail` that of amplitudes. Ratios and
    their intervals, by resampling cases, are NaN where a side has fewer than 2.
  """
  tables = [
    statistics(x["image"], x["mask"], structures) for x in (real, synthetic)
  ]
  patients = [
    np.asarray(x.get("patient", np.arange(len(x["mask"]))))
    for x in (real, synthetic)
  ]
  result = {}
  of = comparable(real["group"], synthetic["group"], groups)
  for name, rows in of.items():
    rng = np.random.default_rng(seed)
    sides = [
      {k: v[row] for k, v in table.items()}
      for table, row in zip(tables, rows, strict=True)
    ]
    features = [np.stack([*side.values()], axis=1) for side in sides]
    whose = (who[row] for who, row in zip(patients, rows, strict=True))
    area, low, high = two_sample_auc(*features, seed, *whose)
    found = {"auc": area, "auc_interval": (low, high)}
    found |= dict(zip(("real", "synthetic"), map(len, rows), strict=True))
    found["statistics"] = _beside(rng, *sides)
    result[name] = found
  return result


def _beside(rng, real, synthetic):
  index = [
    rng.integers(
      max(len(s["brightness"]), 1), size=(RESAMPLES, len(s["brightness"]))
    )
    for s in (real, synthetic)
  ]
  result = {}
  for name in real:
    kinds = {name: np.nanmean}
    if name == "brightness" or " to " in name:
      kinds[f"{name} between patients"] = np.nanstd
    for title, function in kinds.items():
      values = [s[name] for s in (real, synthetic)]
      if min(np.isfinite(v).sum() for v in values) < 2:
        result[title] = dict.fromkeys(
          ("real", "synthetic", "ratio", "low", "high"), np.nan
        )
        continue
      a, b = (float(function(v)) for v in values)
      with np.errstate(all="ignore"):
        draws = [
          function(v[i], axis=1) for v, i in zip(values, index, strict=True)
        ]
      if name == "brightness" and function is np.nanmean:
        a, b, draws = a + 1, b + 1, [d + 1 for d in draws]  # 0 is black
      if name.startswith("detail"):
        a, b, draws = np.exp(a), np.exp(b), [np.exp(d) for d in draws]
      with np.errstate(all="ignore"):
        ratio, (low, high) = np.divide(b, a), _percentiles(draws[1] / draws[0])
      result[title] = {
        "real": float(a),
        "synthetic": float(b),
        "ratio": float(ratio),
        "low": low,
        "high": high,
      }
  return result


def frechet_distance(real: np.ndarray, synthetic: np.ndarray) -> float:
  """Frechet distance between normal distributions fitted to features (FID).

  |mu_r - mu_s|^2 + tr(C_r + C_s - 2 (C_r C_s)^(1/2)), with covariances of
  divisor n - 1. It is biased upwards in small samples: compare at equal n.

  Args:
    real: [n, D], n at least 2.
    synthetic: [m, D], m at least 2.

  Raises:
    ValueError: of shapes that do not fit.
  """
  real, synthetic = _features(real, synthetic, 2)
  difference = real.mean(0) - synthetic.mean(0)
  if max(len(real), len(synthetic)) <= real.shape[1]:
    # Of few cases, with X_r and X_s less their means:
    # tr (C_r C_s)^(1/2) = |X_r X_s^T|_* / ((n - 1) (m - 1))^(1/2)
    a, b = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (real, synthetic))
    trace = linalg.svdvals(a @ b.T).sum()
    return float(
      difference @ difference + (a**2).sum() + (b**2).sum() - 2 * trace
    )
  a, b = (np.atleast_2d(np.cov(x.T)) for x in (real, synthetic))
  # tr (AB)^(1/2) from the eigenvalues of B^(1/2) A B^(1/2), which are real.
  value, vector = linalg.eigh(b)
  root = vector * np.sqrt(np.maximum(value, 0)) @ vector.T
  values = linalg.eigvalsh(root @ a @ root)
  trace = np.sqrt(np.maximum(values, 0)).sum()
  return float(difference @ difference + np.trace(a) + np.trace(b) - 2 * trace)


def kernel_distance(real: np.ndarray, synthetic: np.ndarray) -> float:
  """Squared maximum mean discrepancy (KID), unbiased: it may be negative.

  With the kernel (x . y / D + 1)^3 of features [n, D] and [m, D], n and m at
  least 2.

  Raises:
    ValueError: of shapes that do not fit.
  """
  real, synthetic = _features(real, synthetic, 2)

  def kernel(x, y):
    return (x @ y.T / x.shape[1] + 1) ** 3

  def within(x):
    k = kernel(x, x)
    return (k.sum() - np.trace(k)) / (len(x) * (len(x) - 1))

  across = kernel(real, synthetic).mean()
  return float(within(real) + within(synthetic) - 2 * across)


def precision_recall(
  real: np.ndarray, synthetic: np.ndarray, k: int = 3
) -> tuple[float, float]:
  """Share of synthetic features within the real ones' manifold, and converse.

  A manifold is the union of balls about a set's points up to their k-th
  nearest neighbours.

  Args:
    real: [n, D], n above k.
    synthetic: [m, D], m above k.
    k: neighbours.

  Raises:
    ValueError: of shapes that do not fit.
  """
  real, synthetic = _features(real, synthetic, k + 1)

  def share(points, of):
    radius = np.sort(cdist(of, of), axis=1)[:, k]
    return float((cdist(points, of) <= radius).any(1).mean())

  return share(synthetic, real), share(real, synthetic)


def minimum_matching_distance(
  real: np.ndarray, synthetic: np.ndarray, *, published: bool = False
) -> float:
  """Mean distance from a real case to its nearest synthetic one (MMD).

  Args:
    real: features [n, D].
    synthetic: [m, D].
    published: as the paper's public code has it, with the roles swapped.

  Raises:
    ValueError: of shapes that do not fit.
  """
  return matching(_distances(real, synthetic, published))["MMD"]


def coverage(
  real: np.ndarray, synthetic: np.ndarray, *, published: bool = False
) -> float:
  """Share of real cases that are the nearest of some synthetic one (COV).

  Args:
    real: features [n, D].
    synthetic: [m, D].
    published: as the paper's public code has it, with the roles swapped.

  Raises:
    ValueError: of shapes that do not fit.
  """
  return matching(_distances(real, synthetic, published))["COV"]


def matching(distance: np.ndarray) -> dict[str, float]:
  """MMD and COV, of the distances [n, m] from real to synthetic cases."""
  return {
    "MMD": float(distance.min(1).mean()),
    "COV": len(np.unique(distance.argmin(0))) / len(distance),
  }


def _distances(real, synthetic, published: bool) -> np.ndarray:
  """Distances from real to synthetic features, or with the roles swapped."""
  distance = cdist(*_features(real, synthetic, 1))
  return distance.T if published else distance


def _features(real, synthetic, least: int):
  real, synthetic = (np.asarray(x, np.float64) for x in (real, synthetic))
  for name, x in (("real", real), ("synthetic", synthetic)):
    if x.ndim != 2 or x.shape[1] != real.shape[-1] or len(x) < least:
      raise ValueError(
        f"{name} features have shape {x.shape}; give at least {least} rows of"
        f" {real.shape[-1]} features"
      )
    if not np.isfinite(x).all():
      raise ValueError(f"{name} features are not finite")
  return real, synthetic
