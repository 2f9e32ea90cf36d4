"""What a report measures of synthetic cases: realism and privacy."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fairdiff_jax.data.cases import Cases
from fairdiff_jax.evaluation import matched, privacy, realism, results
from fairdiff_jax.evaluation.features import Extractor
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
    "patient": np.array(test.patient or test.name),
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
  few = len({*(train.patient or train.name)}) < privacy.FEWEST
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
