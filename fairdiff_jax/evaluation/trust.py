"""What a report measures of synthetic cases: realism, privacy, agreement."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fairdiff_jax.data.cases import Cases
from fairdiff_jax.evaluation import matched, privacy, realism, results
from fairdiff_jax.evaluation.features import Extractor
from fairdiff_jax.fairness.metrics import dice
from fairdiff_jax.synthesis.generate import Generated


def realism_of(
  test: Cases,
  group: np.ndarray,
  synthetic: Mapping[str, np.ndarray],
  names: Sequence[str],
  extractor: Extractor | None,
) -> dict[str, dict[str, Any]]:
  """How synthetic cases look beside test cases, by every measure.

  Args:
    test: real cases, which neither generators nor segmenters have seen.
    group: names of their groups.
    synthetic: `image`, `mask` and `group` names.
    names: of the groups.
    extractor: what sees them; None to leave features out.

  Returns:
    Group, or 'all' -> what `realism.compare` and `matched.compare` give.
  """
  real = {
    "image": test.image,
    "mask": test.mask,
    "group": group,
    "patient": np.array(test.whose),
    "features": None,
  }
  result = realism.compare(real, synthetic, test.domain.regions, names)
  if extractor and len(test.name) and len(synthetic["group"]):
    real["features"] = extractor(test.image, real=True)
    synthetic = {**synthetic, "features": extractor(synthetic["image"])}
  found = matched.compare(real, synthetic, test.domain, names)
  for name, row in found.items():
    if extractor and "features" in row:
      told = {"network": extractor.network, "extractor": extractor.words}
      row["features"] = told | row["features"]
    result[name] |= row
  return result


def privacy_of(
  sources: Mapping[str, Generated],
  train: Cases,
  test: Cases,
  group: tuple[np.ndarray, np.ndarray],
  see: Callable[[np.ndarray], np.ndarray] | None,
) -> tuple[dict[str, Any], dict[str, list[results.Pair]]]:
  """How near synthetic cases are to training patients.

  Args:
    sources: synthetic cases by what they are.
    train: the training cases.
    test: real cases that nothing has learned from.
    group: of these and of those.
    see: images -> features; None to compare pixels alone.

  Returns:
    Source -> what `Privacy.measure` gives, and the nearest pairs; nothing with
    too few patients, or fewer than `MIN_CASES` cases of a source.
  """
  few = len({*train.whose}) < privacy.FEWEST
  if few or any(len(c.image) < realism.MIN_CASES for c in sources.values()):
    return {}, {}
  against = privacy.Privacy(train, see)
  figures, pairs = {}, {}
  for source, cases in sources.items():
    figures[source], near = against.measure(
      cases.image, cases.mask, test, *group
    )
    pairs[source] = [
      results.Pair(
        distance,
        train.name[real],
        (cases.image[made], train.image[real]),
        (cases.mask[made], train.mask[real]),
      )
      for made, real, distance in privacy.closest(near, results.PAIRS)
    ]
    figures[source]["pairs"] = [
      {"real": pair.name, "distance": pair.distance} for pair in pairs[source]
    ]
  return figures, pairs


def agreement(
  found: Mapping[str, np.ndarray],
  generated: Generated,
  synthetic_group: np.ndarray,
  test: Cases,
  test_group: np.ndarray,
  names: tuple[str, ...],
  empty: str,
) -> dict[str, dict[str, dict[str, float]]]:
  """A segmenter's Dice on synthetic cases beside its Dice on real ones.

  Args:
    found: its masks of 'synthetic' and 'real' cases.
    generated: the synthetic cases.
    synthetic_group: their groups.
    test: the real cases.
    test_group: theirs.
    names: of the groups.
    empty: what an absent structure counts, as for `metrics.dice`.

  Returns:
    group (or 'all', the mean over groups) -> class -> {'synthetic', 'real',
    'ratio', 'below': the share of synthetic cases below the 1% quantile of the
    group's real ones}; NaN where there is no case, for the ratio to 0, and for
    the share with fewer than `MIN_CASES` real ones.
  """
  sides = {
    "synthetic": (generated.mask, found["synthetic"], synthetic_group),
    "real": (test.mask, found["real"], test_group),
  }
  result: dict[str, dict[str, dict[str, float]]] = {}
  for cls in test.domain.parts:
    code = test.domain.reported_classes[cls]
    made, seen = (
      [scores[group == g] for g in range(len(names))]
      for label, prediction, group in sides.values()
      for scores in [dice(label, prediction, code, empty)]
    )
    figures = np.array(
      [
        [_mean(a), _mean(b), _below(a, b)]
        for a, b in zip(made, seen, strict=True)
      ]
    )
    for i, name in enumerate((*names, "all")):
      synthetic, real, below = (
        _mean(of) if name == "all" else float(of[i]) for of in figures.T
      )
      result.setdefault(name, {})[cls] = {
        "synthetic": synthetic,
        "real": real,
        "ratio": synthetic / real if real > 0 else math.nan,
        "below": below,
      }
  return result


def _below(synthetic: np.ndarray, real: np.ndarray) -> float:
  """Share of synthetic scores below the 1% quantile of real ones."""
  a, b = (x[np.isfinite(x)] for x in (synthetic, real))
  if not len(a) or len(b) < realism.MIN_CASES:
    return math.nan
  return float((a < np.quantile(b, privacy.QUANTILE)).mean())


def _mean(values: Sequence[float] | np.ndarray) -> float:
  """Mean of the values that are known; NaN where none is."""
  known = np.asarray(values, float)
  known = known[np.isfinite(known)]
  return float(known.mean()) if len(known) else math.nan
