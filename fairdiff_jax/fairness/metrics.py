"""Measures of a segmentation, and of how fairly it treats the groups.

Masks are integer arrays `[n, H, W]`: 0 background, 1 rim, 2 cup; a class is
a value or a tuple of values, as in `DISC`. A measure gives one value a case,
NaN where it is undefined; means leave NaN out. Plain numpy on the host.

    Dice = 2 |A ∩ B| / (|A| + |B|)          IoU = |A ∩ B| / |A ∪ B|
    ES   = overall / (1 + spread of the group means)
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cv2
import numpy as np
from scipy import spatial

RIM = 1
CUP = 2
DISC = (1, 2)

EMPTY = ("exclude", "published")
EQUITY = ("fairdiff_std", "fairseg_sum", "population_std")

Class = int | tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Definitions:
  """Which of the definitions in print a set of figures follows.

  Attributes:
    empty: what an absent class counts, as for `dice`, `iou` and `hd95`.
    equity: of equity scaling, as for `equity_scaled`.

  Raises:
    ValueError: Unknown definition.
  """

  empty: str = "exclude"
  equity: str = "fairdiff_std"

  def __post_init__(self):
    _check_name("empty", self.empty, EMPTY)
    _check_name("equity", self.equity, EQUITY)


def _check_name(what: str, name: str, names: Sequence[str]) -> None:
  if name not in names:
    raise ValueError(
      f"{what} must be one of {', '.join(map(repr, names))}, got {name!r}"
    )


DEFAULT = Definitions()


def _region(mask: np.ndarray, cls: Class) -> np.ndarray:
  """Pixels of `cls`, as bool of the mask's shape."""
  values = cls if isinstance(cls, tuple) else (cls,)
  return functools.reduce(np.logical_or, [mask == v for v in values])


def _cases(
  label, prediction, cls: Class
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Pixels of `cls` in label and prediction, two bool `[H, W]` a case."""
  label, prediction = np.asarray(label), np.asarray(prediction)
  if label.ndim != 3 or label.shape != prediction.shape:
    raise ValueError(
      "label and prediction must both be [n, H, W], got "
      f"{label.shape} and {prediction.shape}"
    )
  for masks in zip(label, prediction, strict=True):
    a, b = (_region(mask, cls) for mask in masks)
    yield a, b


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
  """`numerator / denominator`, NaN where the denominator is 0."""
  out = np.full(numerator.shape, np.nan)
  return np.divide(numerator, denominator, out=out, where=denominator > 0)


def _overlap(label, prediction, cls: Class) -> np.ndarray:
  """Sizes `[3, n]` of A ∩ B, A and B."""
  sizes = [
    [np.count_nonzero(m) for m in (a & b, a, b)]
    for a, b in _cases(label, prediction, cls)
  ]
  return np.array(sizes, int).reshape(-1, 3).T


def _with_empty(values, size_label, size_prediction, empty: str) -> np.ndarray:
  """`values` `[n]` with what the policy says where the label is empty."""
  _check_name("empty", empty, EMPTY)
  if empty == "exclude":
    return values
  return np.where(size_label > 0, values, np.sign(size_prediction))


def dice(
  label: np.ndarray,
  prediction: np.ndarray,
  cls: Class,
  empty: str = "exclude",
) -> np.ndarray:
  """Dice coefficient of one class, in [0, 1].

  >>> label, found = [[[0, 1], [2, 2]]], [[[0, 1], [1, 2]]]
  >>> dice(label, found, CUP).tolist(), dice(label, found, DISC).tolist()
  ([0.6666666666666666], [1.0])

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
  """Intersection over union of one class; arguments as for `dice`.

  >>> iou([[[0, 1], [2, 2]]], [[[0, 1], [1, 2]]], CUP).tolist()
  [0.5]
  """
  both, size_a, size_b = _overlap(label, prediction, cls)
  values = _ratio(both, size_a + size_b - both)
  return _with_empty(values, size_a, size_b, empty)


def _surface(mask: np.ndarray) -> np.ndarray:
  """Pixels `[k, 2]` that an erosion with the 4-neighbourhood takes away."""
  surface = mask.copy()
  surface[1:-1, 1:-1] &= ~(
    mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
  )
  return np.argwhere(surface)


def _surface_distances(
  a: np.ndarray, b: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Distances in pixels from surface to surface of two bool `[H, W]`.

  Returns:
    `[k]` from every surface pixel of `a` to the nearest of `b`, and `[l]` the
    other way; infinite where there is none.
  """
  x, y, width, height = cv2.boundingRect((a | b).view(np.uint8))
  box = np.s_[y : y + height, x : x + width]
  points_a, points_b = _surface(a[box]), _surface(b[box])
  return (
    spatial.cKDTree(points_b).query(points_a)[0],
    spatial.cKDTree(points_a).query(points_b)[0],
  )


def hd95(
  label: np.ndarray,
  prediction: np.ndarray,
  cls: Class,
  empty: str = "exclude",
) -> np.ndarray:
  """95th percentile of the symmetric surface distance, as MedPy defines it.

  >>> hd95([[[1, 0, 0, 0]]], [[[0, 0, 0, 1]]], 1).tolist()
  [3.0]

  The surface is what an erosion with the 4-neighbourhood takes away; the
  distances of both directions are pooled before the percentile.

  Args:
    label: Masks `[n, H, W]`.
    prediction: Masks `[n, H, W]`.
    cls: Value or values that make up the class.
    empty: What a case counts whose label or prediction lacks the class.
      "exclude": NaN. "published": 0, as if it were perfect, which is what the
      public FairSeg and FairDiff code does.

  Returns:
    `[n]` float64 in pixels.

  Raises:
    ValueError: Shapes differ or are not `[n, H, W]`, or unknown `empty`.
  """
  _check_name("empty", empty, EMPTY)
  absent = np.nan if empty == "exclude" else 0.0
  values = [
    np.percentile(np.concatenate(_surface_distances(a, b)), 95)
    if a.any() and b.any()
    else absent
    for a, b in _cases(label, prediction, cls)
  ]
  return np.array(values, np.float64)


def boundary_dice(
  label: np.ndarray,
  prediction: np.ndarray,
  cls: Class,
  tolerance: float = 2.0,
) -> np.ndarray:
  """Surface Dice at a tolerance (Nikolov et al. 2018, arXiv:1809.04430).

  >>> boundary_dice([[[1, 0, 0, 0]]], [[[0, 0, 1, 0]]], 1).tolist()
  [1.0]

  The share of both surfaces, taken together, that lies within `tolerance` of
  the other one. Surfaces are those of `hd95`, and every pixel counts alike.

  Args:
    label: Masks `[n, H, W]`.
    prediction: Masks `[n, H, W]`.
    cls: Value or values that make up the class.
    tolerance: Largest distance, in pixels, that still counts as agreement.

  Returns:
    `[n]` float64 in [0, 1]; 0 where only one of label and prediction has the
    class, NaN where neither has.

  Raises:
    ValueError: Shapes differ or are not `[n, H, W]`, or a negative tolerance.
  """
  if tolerance < 0:
    raise ValueError(f"tolerance must not be negative, got {tolerance}")
  values = []
  for a, b in _cases(label, prediction, cls):
    distances = np.concatenate(_surface_distances(a, b))
    values.append(np.mean(distances <= tolerance) if len(distances) else np.nan)
  return np.array(values, np.float64)


def cup_to_disc_error(
  label: np.ndarray, prediction: np.ndarray, kind: str = "area"
) -> np.ndarray:
  """Absolute error of the ratio of cup to disc.

  Args:
    label: Masks `[n, H, W]`.
    prediction: Masks `[n, H, W]`.
    kind: What is divided. "area": pixels; "vertical": height, the number of
      rows from the topmost pixel to the lowest.

  Returns:
    `[n]` float64 in [0, 1], NaN where label or prediction has no disc.

  Raises:
    ValueError: Shapes differ or are not `[n, H, W]`, or unknown `kind`.
  """
  return ratio_error(label, prediction, CUP, DISC, kind)


def ratio_error(
  label: np.ndarray,
  prediction: np.ndarray,
  part: Class,
  whole: Class,
  kind: str = "area",
) -> np.ndarray:
  """Absolute error of the ratio of two classes; see `cup_to_disc_error`.

  >>> ratio_error([[[1, 2], [2, 2]]], [[[1, 1], [1, 2]]], CUP, DISC).tolist()
  [0.5]
  """
  size: Callable[[np.ndarray], int]
  if kind == "area":
    size = np.count_nonzero
  elif kind == "vertical":
    size = _height
  else:
    raise ValueError(f"kind must be 'area' or 'vertical', got {kind!r}")
  parts, wholes = (
    np.array(
      [[size(a), size(b)] for a, b in _cases(label, prediction, cls)], int
    ).reshape(-1, 2)
    for cls in (part, whole)
  )
  ratio_label, ratio_prediction = _ratio(parts, wholes).T
  return np.abs(ratio_label - ratio_prediction)


def _height(region: np.ndarray) -> int:
  """Rows from the topmost to the lowest pixel of a bool `[H, W]`."""
  return cv2.boundingRect(region.view(np.uint8))[3]


def spread(
  means: np.ndarray, overall: np.ndarray | float, definition: str
) -> np.ndarray:
  """Spread of group means `[G, ...]` as in `equity_scaled`: `[...]`."""
  _check_name("definition", definition, EQUITY)
  if definition == "fairseg_sum":
    return np.abs(means - overall).sum(0)
  if len(means) < 2:
    return np.zeros_like(overall)
  return means.std(0, ddof=int(definition == "fairdiff_std"))


def equity_scaled(
  group_means: Sequence[float] | np.ndarray,
  overall: float,
  definition: str = "fairdiff_std",
) -> float:
  """Equity-scaled value of a measure in [0, 1] where more is better.

  >>> equity_scaled([0.8, 0.8], overall=0.8)
  0.8
  >>> round(equity_scaled([0.7, 0.9], overall=0.8), 3)
  0.701

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
  return float(overall / (1 + spread(means, overall, definition)))


def _mean(values: np.ndarray) -> float:
  return float(values.mean()) if len(values) else float("nan")


def summarize(
  values: np.ndarray,
  group: np.ndarray,
  names: Sequence[str],
  *,
  lower_is_better: bool = False,
  definition: str = "fairdiff_std",
) -> dict:
  """Overall and group means of one measure, and how far they lie apart.

  >>> figures = summarize([0.75, 0.5, 0.5], [0, 1, 1], ["A", "B"])
  >>> figures["worst"], figures["gap"]
  ('B', 0.25)

  Args:
    values: `[n]`, one a case; NaN is left out.
    group: `[n]` index into `names`, -1 unknown. Unknown cases count in the
      overall mean only.
    names: Names of the groups.
    lower_is_better: True for distances and errors, which have no equity-scaled
      value.
    definition: Definition of equity scaling, as for `equity_scaled`.

  Returns:
    `overall`, `n`, `groups` {name: {`mean`, `n`}}; of the group means m_g,
    `gap` (max m_g - min m_g), `ratio` (min m_g / max m_g, so in [0, 1]; 1 for
    equal groups, also where all are 0), `std` (standard deviation with G - 1;
    NaN for one group) and `worst` (a name); where more is better, `es`.
    Without groups, `worst` is None, `es` is `overall` and the others are NaN.

  Raises:
    ValueError: Lengths differ, a group has no name, or unknown `definition`.
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
  result: dict[str, Any] = {
    "overall": _mean(values),
    "n": len(values),
    "groups": {k: {"mean": _mean(v), "n": len(v)} for k, v in cases.items()},
    **dict.fromkeys(("gap", "ratio", "std"), float("nan")),
    "worst": None,
  }
  if means:
    pick = max if lower_is_better else min
    result["worst"] = pick(means, key=means.__getitem__)
    low, high = min(means.values()), max(means.values())
    result["gap"] = high - low
    result["ratio"] = low / high if high > 0 else 1.0
  if len(means) > 1:
    result["std"] = float(np.std(list(means.values()), ddof=1))
  if not lower_is_better:
    result["es"] = equity_scaled(
      list(means.values()), result["overall"], definition
    )
  return result
