"""Measures of a segmentation, and of how fairly it treats the groups.

Masks are integer arrays `[n, H, W]`: 0 background, 1 rim, 2 cup; a class is
a value or a tuple of values, as in `DISC`. A measure gives one value a case,
NaN where it is undefined; means leave NaN out. Plain numpy on the host.

    Dice = 2 |A ∩ B| / (|A| + |B|)          IoU = |A ∩ B| / |A ∪ B|
    ES   = overall / (1 + spread of the group means)
"""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

RIM = 1
CUP = 2
DISC = (1, 2)

Class = int | tuple[int, ...]


def _regions(label, prediction, cls: Class) -> tuple[np.ndarray, np.ndarray]:
  """Pixels of `cls` in both masks, as two bool `[n, H, W]`."""
  label, prediction = np.asarray(label), np.asarray(prediction)
  if label.ndim != 3 or label.shape != prediction.shape:
    raise ValueError(
      "label and prediction must both be [n, H, W], got "
      f"{label.shape} and {prediction.shape}"
    )
  return np.isin(label, cls), np.isin(prediction, cls)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
  """`numerator / denominator`, NaN where the denominator is 0."""
  out = np.full(numerator.shape, np.nan)
  return np.divide(numerator, denominator, out=out, where=denominator > 0)


def _overlap(label, prediction, cls: Class):
  """Sizes `[n]` of A ∩ B, A and B."""
  a, b = _regions(label, prediction, cls)
  return [np.count_nonzero(m, axis=(1, 2)) for m in (a & b, a, b)]


def _with_empty(values, size_label, size_prediction, empty: str) -> np.ndarray:
  """`values` `[n]` with what the policy says where the label is empty."""
  if empty == "exclude":
    return values
  if empty == "published":
    return np.where(size_label > 0, values, np.sign(size_prediction))
  raise ValueError(f"empty must be 'exclude' or 'published', got {empty!r}")


def dice(
  label: np.ndarray,
  prediction: np.ndarray,
  cls: Class,
  empty: str = "exclude",
) -> np.ndarray:
  """Dice coefficient of one class, in [0, 1].

  Args:
    label: Masks `[n, H, W]`.
    prediction: Masks `[n, H, W]`.
    cls: Value or values that make up the class.
    empty: What a case counts whose label lacks the class. "exclude": NaN when
      the prediction lacks it too, else 0. "published": 0 when the prediction
      lacks it too, else 1, which is what the public FairSeg and FairDiff code
      does and only good for comparing with its numbers.

  Returns:
    `[n]` float64.

  Raises:
    ValueError: Shapes differ or are not `[n, H, W]`, or unknown `empty`.
  """
  both, size_a, size_b = _overlap(label, prediction, cls)
  values = _ratio(2 * both, size_a + size_b)
  return _with_empty(values, size_a, size_b, empty)


def iou(
  label: np.ndarray,
  prediction: np.ndarray,
  cls: Class,
  empty: str = "exclude",
) -> np.ndarray:
  """Intersection over union of one class; arguments as for `dice`."""
  both, size_a, size_b = _overlap(label, prediction, cls)
  values = _ratio(both, size_a + size_b - both)
  return _with_empty(values, size_a, size_b, empty)


def _surface_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Distance, in pixels, from each surface pixel of `a` to that of `b`."""
  surface_a = a ^ ndimage.binary_erosion(a)
  surface_b = b ^ ndimage.binary_erosion(b)
  return ndimage.distance_transform_edt(~surface_b)[surface_a]


def hd95(label: np.ndarray, prediction: np.ndarray, cls: Class) -> np.ndarray:
  """95th percentile of the symmetric surface distance, as MedPy defines it.

  The surface is what an erosion with the 4-neighbourhood takes away; the
  distances of both directions are pooled before the percentile.

  Args:
    label: Masks `[n, H, W]`.
    prediction: Masks `[n, H, W]`.
    cls: Value or values that make up the class.

  Returns:
    `[n]` float64 in pixels, NaN where label or prediction lacks the class.
  """
  distances = np.full(len(label), np.nan)
  for i, (a, b) in enumerate(
    zip(*_regions(label, prediction, cls), strict=True)
  ):
    if not (a.any() and b.any()):
      continue
    box = ndimage.find_objects((a | b).astype(np.uint8))[0]
    a, b = a[box], b[box]
    pooled = np.concatenate(
      [_surface_distances(a, b), _surface_distances(b, a)]
    )
    distances[i] = np.percentile(pooled, 95)
  return distances


def cup_to_disc_error(label: np.ndarray, prediction: np.ndarray) -> np.ndarray:
  """Absolute error of the area ratio of cup to disc.

  Args:
    label: Masks `[n, H, W]`.
    prediction: Masks `[n, H, W]`.

  Returns:
    `[n]` float64 in [0, 1], NaN where label or prediction has no disc.
  """
  cups = _regions(label, prediction, CUP)
  discs = _regions(label, prediction, DISC)
  ratio_label, ratio_prediction = (
    _ratio(np.count_nonzero(c, axis=(1, 2)), np.count_nonzero(d, axis=(1, 2)))
    for c, d in zip(cups, discs, strict=True)
  )
  return np.abs(ratio_label - ratio_prediction)


def equity_scaled(
  group_means: Sequence[float] | np.ndarray,
  overall: float,
  definition: str = "fairdiff_std",
) -> float:
  """Equity-scaled value of a measure in [0, 1] where more is better.

  Args:
    group_means: `[G]`; groups without a value are NaN and left out.
    overall: Mean over all cases.
    definition: Spread of the group means m_g in `overall / (1 + spread)`.
      "fairseg_sum": sum_g |m_g - overall| (FairSeg); "fairdiff_std": standard
      deviation with G - 1 (FairDiff's tables); "population_std": with G
      (FairMedFM).

  Returns:
    The scaled value; `overall` itself where fewer than two groups are left
    for a standard deviation.

  Raises:
    ValueError: Unknown `definition`.
  """
  means = np.asarray(group_means, np.float64)
  means = means[~np.isnan(means)]
  if definition == "fairseg_sum":
    spread = np.abs(means - overall).sum()
  elif definition in ("fairdiff_std", "population_std"):
    ddof = int(definition == "fairdiff_std")
    spread = means.std(ddof=ddof) if len(means) > 1 else 0.0
  else:
    raise ValueError(
      "definition must be 'fairseg_sum', 'fairdiff_std' or 'population_std', "
      f"got {definition!r}"
    )
  return float(overall / (1 + spread))


def _mean(values: np.ndarray) -> float:
  return float(values.mean()) if len(values) else float("nan")


def summarize(
  values: np.ndarray,
  group: np.ndarray,
  names: Sequence[str],
  *,
  lower_is_better: bool = False,
) -> dict:
  """Overall and group means of one measure, and how far they lie apart.

  Args:
    values: `[n]`, one a case; NaN is left out.
    group: `[n]` index into `names`, -1 unknown. Unknown cases count in the
      overall mean only.
    names: Names of the groups.
    lower_is_better: True for distances and errors, which have no equity-scaled
      value.

  Returns:
    `overall`, `n`, `groups` {name: {`mean`, `n`}}, `gap` (best minus worst
    group, never negative), `worst` (a name, None without groups) and, where
    more is better, `es` (FairDiff's definition).

  Raises:
    ValueError: Lengths differ, or a group has no name.
  """
  values, group = np.asarray(values, np.float64), np.asarray(group)
  if values.ndim != 1 or values.shape != group.shape:
    raise ValueError(
      f"values and group must both be [n], got {values.shape}, {group.shape}"
    )
  if len(group) and not (-1 <= group.min() and group.max() < len(names)):
    raise ValueError(f"group must lie in -1..{len(names) - 1}")
  known = ~np.isnan(values)
  values, group = values[known], group[known]
  cases = {name: values[group == g] for g, name in enumerate(names)}
  means = {name: _mean(v) for name, v in cases.items() if len(v)}
  result = {
    "overall": _mean(values),
    "n": len(values),
    "groups": {k: {"mean": _mean(v), "n": len(v)} for k, v in cases.items()},
    "gap": float("nan"),
    "worst": None,
  }
  if means:
    pick = max if lower_is_better else min
    result["worst"] = pick(means, key=means.get)
    result["gap"] = max(means.values()) - min(means.values())
  if not lower_is_better:
    result["es"] = equity_scaled(list(means.values()), result["overall"])
  return result
