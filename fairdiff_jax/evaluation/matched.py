"""Sets of features and of clouds, real beside synthetic, with intervals.

The kernel distance is unbiased: it takes all cases, and its interval is the
jackknife's over patients. All else depends on how many cases there are, and so
is measured between halves of n cases, drawn `DRAWS` times without replacement
(the delete-half jackknife, Shao & Wu 1989: their spread is the standard error
of all cases), beside what two halves of the real cases, of different patients,
give at the same n: what perfect synthetic cases would have.

Clouds are compared by the chamfer distance

    CD(X, Y) = mean_x min_y |x - y|^2 + mean_y min_x |x - y|^2

of contours in a 64-pixel image: MMD, COV, and the accuracy of the nearest
neighbour in telling the sets apart (1-NNA, Yang et al. 2019), .5 at best.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.spatial.distance import cdist

from fairdiff_jax.data.contours import mask_to_points
from fairdiff_jax.data.domain import Domain
from fairdiff_jax.evaluation.realism import (
  MIN_CASES,
  comparable,
  frechet_distance,
  matching,
  precision_recall,
)

DRAWS = 30
WIDTH = 1.96  # standard errors, of intervals of 95%
SHARES = ("precision", "recall", "COV", "COV, published", "1-NNA")
POINTS = 128  # of a cloud
MOST = 300  # real cases of a group whose clouds are compared

# Of index sets: (first [n], second [m]) -> figures by name.
Measure = Callable[[np.ndarray, np.ndarray], dict[str, float]]


def kernel_distance_interval(
  real: np.ndarray,
  synthetic: np.ndarray,
  patient: Sequence[Any] | None = None,
  other: Sequence[Any] | None = None,
) -> tuple[float, float, float]:
  """The unbiased kernel distance (KID) and its interval of 95%.

  As `realism.kernel_distance`, but that cases of one patient are no pair: they
  are alike. The interval is the jackknife's, which leaves out a patient at a
  time; it is wide rather than narrow where the two distributions are one.

  Args:
    real: features [n, D].
    synthetic: features [m, D].
    patient: whose the real ones are [n]; None for a patient each.
    other: whose the synthetic ones are [m], likewise.

  Returns:
    The distance, and both ends; NaN with fewer than 2 patients on a side.
  """
  x, y = (np.asarray(a, np.float64) for a in (real, synthetic))
  owners = []
  for rows, of in ((x, patient), (y, other)):
    of = np.arange(len(rows)) if of is None else np.asarray(of)
    owners.append(np.unique(of, return_inverse=True)[1])
  counts = [np.bincount(of) for of in owners]
  if min(map(len, counts)) < 2:
    return (np.nan,) * 3

  def kernel(a, b):
    return (a @ b.T / a.shape[1] + 1) ** 3

  def summed(k, of):  # over the rows of a patient
    order = np.argsort(of, kind="stable")
    starts = np.searchsorted(of[order], np.arange(of.max() + 1))
    return np.add.reduceat(k[order], starts, axis=0)

  def within(rows, of, count):
    """The mean over pairs, and those [p] without a patient."""
    k = kernel(rows, rows)
    k[of[:, None] == of] = 0
    of_patient = summed(k, of).sum(1)
    n = count.sum()
    pairs = n * n - (count**2).sum()
    left = pairs - 2 * count * (n - count)
    total = of_patient.sum()
    with np.errstate(invalid="ignore", divide="ignore"):
      return total / pairs, (total - 2 * of_patient) / left

  k = kernel(x, y)
  total, (n, m) = k.sum(), k.shape
  inner = [
    within(rows, of, count)
    for rows, of, count in zip((x, y), owners, counts, strict=True)
  ]
  value = inner[0][0] + inner[1][0] - 2 * total / k.size
  variance = 0.0
  for side, (of, count) in enumerate(zip(owners, counts, strict=True)):
    rest = total - summed(k if side == 0 else k.T, of).sum(1)
    number = (n - count) * m if side == 0 else n * (m - count)
    without = inner[side][1] + inner[1 - side][0] - 2 * rest / number
    p = len(count)
    variance += (p - 1) / p * ((without - without.mean()) ** 2).sum()
  half = WIDTH * np.sqrt(variance)
  return float(value), float(value - half), float(value + half)


def halves(
  measure: Measure,
  real: np.ndarray,
  synthetic: np.ndarray,
  patient: np.ndarray,
  seed: int = 0,
) -> tuple[int, dict[str, dict[str, float]]]:
  """Figures between halves of n cases.

  Args:
    measure: gives them, of two sets of rows.
    real: rows of the real cases.
    synthetic: rows of the synthetic ones.
    patient: whose the real ones are.
    seed: of what is drawn.

  Returns:
    n, and name -> {`value`, `low`, `high`, `real`, `real_low`, `real_high`},
    the last three of real against real cases; n is 0 and there is no figure
    where a side has fewer than `MIN_CASES`.
  """
  who = np.unique(patient, return_inverse=True)[1]
  most = np.bincount(who, minlength=1).max()
  n = min(len(synthetic) // 2, (len(real) - most + 1) // 2)
  if min(len(real), len(synthetic)) < MIN_CASES or n < MIN_CASES // 4:
    return 0, {}
  rng = np.random.default_rng(seed)
  drawn: dict[str, list[dict[str, float]]] = {"": [], "real": []}
  for _ in range(DRAWS):
    order = np.argsort(rng.permutation(who.max() + 1)[who], kind="stable")
    first, rest = order[:n], order[n:]
    rest = rest[who[rest] != who[first[-1]]][:n]
    made = rng.permutation(synthetic)[:n]
    drawn[""].append(measure(real[first], made))
    drawn["real"].append(measure(real[first], real[rest]))
  result: dict[str, dict[str, float]] = {}
  for side, figures in drawn.items():
    for name in figures[0]:
      values = np.array([f[name] for f in figures])
      middle, half = values.mean(), WIDTH * values.std(ddof=1)
      ends = np.array([middle - half, middle + half])
      ends = ends.clip(0, 1 if name in SHARES else None)
      keys = [f"real_{k}" if side else k for k in ("low", "high")]
      found = dict(zip([side or "value", *keys], [middle, *ends], strict=True))
      row = result.setdefault(name, {})
      row.update({k: float(v) for k, v in found.items()})
  return n, result


def of_features(
  real: np.ndarray,
  synthetic: np.ndarray,
  patient: Sequence[Any] | None = None,
  seed: int = 0,
) -> dict[str, Any]:
  """Every measure between sets of features.

  Args:
    real: [n, D], of cases that neither generators nor extractor have seen.
    synthetic: [m, D].
    patient: whose the real ones are [n]; None for a patient each.
    seed: of what is drawn.

  Returns:
    {`kid`, `kid_interval`, `kid_real`, `kid_real_interval` (of two halves of
    the real patients), `n`, `measures`: as `halves` gives them}.
  """
  real, synthetic = (np.asarray(x, np.float64) for x in (real, synthetic))
  patient = np.arange(len(real)) if patient is None else np.asarray(patient)
  if min(len(real), len(synthetic)) < MIN_CASES:
    kid = within = (np.nan,) * 3
  else:
    kid = kernel_distance_interval(real, synthetic, patient)
    who = np.unique(patient, return_inverse=True)[1]
    one = (np.random.default_rng(seed).permutation(who.max() + 1) % 2)[who] > 0
    within = kernel_distance_interval(
      *(real[one], real[~one], patient[one], patient[~one])
    )
  pooled = np.concatenate([real, synthetic])
  distance = cdist(pooled, pooled)

  def measure(a, b):
    precision, recall = precision_recall(pooled[a], pooled[b])
    return {
      "FID": frechet_distance(pooled[a], pooled[b]),
      "precision": precision,
      "recall": recall,
      **matching(distance[np.ix_(a, b)]),
      **{
        f"{name}, published": value
        for name, value in matching(distance[np.ix_(b, a)]).items()
      },
    }

  rows = np.arange(len(pooled))
  n, measures = halves(
    measure, rows[: len(real)], rows[len(real) :], patient, seed
  )
  return {
    "kid": kid[0],
    "kid_interval": kid[1:],
    "kid_real": within[0],
    "kid_real_interval": within[1:],
    "n": n,
    "measures": measures,
  }


def nearest_neighbour_accuracy(
  distance: np.ndarray, a: np.ndarray, b: np.ndarray
) -> float:
  """Share of cases whose nearest other case is of their own set (1-NNA).

  Args:
    distance: [n, n] among all cases.
    a: rows of the one set.
    b: rows of the other.
  """
  rows = np.concatenate([a, b])
  among = distance[np.ix_(rows, rows)].copy()
  np.fill_diagonal(among, np.inf)
  first = np.arange(len(rows)) < len(a)
  return float((first[among.argmin(1)] == first).mean())


def clouds_of(masks: np.ndarray, domain: Domain) -> np.ndarray:
  """Clouds [n, POINTS, 3] of masks [n, H, W], lengths of a 64-pixel image."""
  unit = min(masks.shape[1:]) / 64
  clouds = np.empty((len(masks), POINTS, 3), np.float32)
  for i, mask in enumerate(masks):
    clouds[i] = mask_to_points(mask, POINTS, domain.parents, missing_ok=True)
  clouds[..., :2] /= unit
  return clouds


def chamfer(clouds: np.ndarray) -> np.ndarray:
  """Chamfer distances [n, n] among clouds [n, N, 3]."""
  return np.asarray(_chamfer(jnp.asarray(clouds)))


@jax.jit
def _chamfer(clouds):
  def to_all(cloud):
    square = (clouds**2).sum(-1)[:, None] + (cloud**2).sum(-1)[:, None]
    square = jnp.maximum(square - 2 * cloud @ clouds.swapaxes(1, 2), 0)
    return square.min(1).mean(-1) + square.min(2).mean(-1)

  return jax.lax.map(to_all, clouds)


def of_clouds(
  real: np.ndarray,
  synthetic: np.ndarray,
  domain: Domain,
  patient: Sequence[Any] | None = None,
  seed: int = 0,
) -> dict[str, Any]:
  """The measures between the contours of masks.

  Args:
    real: masks [n, H, W] of classes, of which `MOST` are taken.
    synthetic: masks [m, H, W].
    domain: what they show.
    patient: whose the real ones are [n]; None for a patient each.
    seed: of what is drawn.

  Returns:
    {`n`, `measures`: as `halves` gives them}.
  """
  patient = np.arange(len(real)) if patient is None else np.asarray(patient)
  if min(len(real), len(synthetic)) < MIN_CASES:
    return {"n": 0, "measures": {}}
  taken = np.sort(np.random.default_rng(seed).permutation(len(real))[:MOST])
  masks = np.concatenate([real[taken], synthetic])
  distance = chamfer(clouds_of(masks, domain))

  def measure(a, b):
    accuracy = nearest_neighbour_accuracy(distance, a, b)
    return matching(distance[np.ix_(a, b)]) | {"1-NNA": accuracy}

  rows = np.arange(len(masks))
  n, measures = halves(
    *(measure, rows[: len(taken)], rows[len(taken) :], patient[taken], seed)
  )
  return {"n": n, "measures": measures}


def compare(
  real: Mapping[str, Any],
  synthetic: Mapping[str, Any],
  domain: Domain,
  groups: Sequence[str],
  seed: int = 0,
) -> dict[str, dict[str, Any]]:
  """Features and clouds of real beside synthetic cases, group by group.

  Args:
    real: `mask` [n, H, W], `group` names [n], `patient` [n], and `features`
      [n, D] or None; of cases that neither generators nor extractor have seen.
    synthetic: `mask`, `group` and `features` of m cases.
    domain: what masks show.
    groups: their names.
    seed: of what is drawn.

  Returns:
    Group, or 'all' as `realism.comparable` has it -> {`clouds`: as
    `of_clouds`, and `features`: as `of_features` where there are such}.
  """
  result = {}
  of = comparable(real["group"], synthetic["group"], groups)
  for name, (a, b) in of.items():
    patient = np.asarray(real["patient"])[a]
    found = result[name] = {
      "clouds": of_clouds(
        *(real["mask"][a], synthetic["mask"][b], domain, patient, seed)
      )
    }
    if real["features"] is not None:
      found["features"] = of_features(
        *(real["features"][a], synthetic["features"][b], patient, seed)
      )
  return result
