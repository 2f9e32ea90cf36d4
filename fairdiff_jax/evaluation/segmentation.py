"""Measures of a segmenter on a test set: case by case, and by group.

The columns made by `per_case` are plain data that explain themselves: the
group stands there by name, so that they can be written, joined and summarised
without the vocabulary they came from.
"""

import math
import os
from collections.abc import Mapping, Sequence

import numpy as np

from fairdiff_jax import files
from fairdiff_jax.data.domain import FUNDUS, Domain
from fairdiff_jax.fairness import metrics, uncertainty

MEASURES = {"dice": metrics.dice, "iou": metrics.iou, "hd95": metrics.hd95}
LOWER_IS_BETTER = ("hd95", "error")
UNKNOWN = "unknown"

Columns = Mapping[str, np.ndarray]


def key(name: str) -> str:
  """A ratio's name as tables and summaries have it, 'cup_to_disc'."""
  return name.replace(" ", "_")


def scores(domain: Domain = FUNDUS) -> list[tuple[str, str]]:
  """Every (reported name, measure), then (ratio's key, 'error')."""
  found = [(cls, measure) for cls in domain.reported for measure in MEASURES]
  return found + [(key(ratio), "error") for ratio in domain.ratios]


def per_case(
  labels: np.ndarray,
  predictions: np.ndarray,
  names: Sequence[str],
  group: np.ndarray,
  group_names: Sequence[str],
  empty: str = "exclude",
  domain: Domain = FUNDUS,
  patient: Sequence[str] = (),
) -> dict[str, np.ndarray]:
  """Measures every case.

  Args:
    labels: Masks `[n, H, W]`, classes of the domain.
    predictions: Masks `[n, H, W]`.
    names: Names of the cases, `n` of them.
    group: `[n]` index into `group_names`, -1 unknown.
    group_names: Names of the groups.
    empty: What an absent class counts, as for `metrics.dice`.
    domain: What is reported.
    patient: Names of the patients, `n` of them; () where each case is one.

  Returns:
    Columns `[n]`: `name`, `group` (the group's name or `UNKNOWN`), `patient`
    where one has several cases (a number: tables go where names should not),
    `<class>_<measure>` for what is reported (cup, rim, disc) and dice, iou,
    hd95 (pixels), and `<ratio>_error` (cup_to_disc). NaN where undefined.

  Raises:
    ValueError: Shapes or lengths differ, or a group has no name.
  """
  group = np.asarray(group)
  if not len(labels) == len(names) == len(group):
    raise ValueError(
      f"{len(labels)} labels, {len(names)} names, {len(group)} groups"
    )
  if np.any((group < -1) | (group >= len(group_names))):
    raise ValueError(f"group must lie in -1..{len(group_names) - 1}")
  columns = {
    "name": np.asarray(list(names), str),
    "group": np.asarray([*group_names, UNKNOWN], str)[group],
  }
  if len({*patient}) < len(patient):
    columns["patient"] = np.unique(patient, return_inverse=True)[1]
  classes = domain.reported_classes
  for cls, values in classes.items():
    for measure, function in MEASURES.items():
      columns[f"{cls}_{measure}"] = function(labels, predictions, values, empty)
  for ratio, (part, whole) in domain.ratios.items():
    columns[f"{key(ratio)}_error"] = metrics.ratio_error(
      labels, predictions, classes[part], classes[whole]
    )
  return columns


def write_csv(path: str | os.PathLike, columns: Columns) -> None:
  """Writes columns `[n]` as a table with a header; NaN becomes an empty cell.

  Raises:
    OSError: It cannot be written.
    ValueError: The columns differ in length.
  """
  rows = zip(*(np.asarray(c).tolist() for c in columns.values()), strict=True)
  files.write_csv(path, list(columns), [list(map(_cell, row)) for row in rows])


def _cell(value):
  if isinstance(value, float):
    return "" if math.isnan(value) else f"{value:.6g}"
  return value


def json_ready(tree):
  """The same nested data in JSON's types, with None for NaN and infinity."""
  if isinstance(tree, Mapping):
    return {str(key): json_ready(value) for key, value in tree.items()}
  if isinstance(tree, np.generic | np.ndarray):
    tree = tree.tolist()
  if isinstance(tree, list | tuple):
    return [json_ready(value) for value in tree]
  if isinstance(tree, float):
    return tree if math.isfinite(tree) else None
  return tree if isinstance(tree, int | str | None) else str(tree)


def groups(columns: Columns) -> dict[str, int]:
  """Number of cases of every known group, by name in alphabetical order."""
  names, counts = np.unique(columns["group"], return_counts=True)
  return {
    str(name): int(count)
    for name, count in zip(names, counts, strict=True)
    if name != UNKNOWN
  }


def _indices(columns: Columns) -> tuple[np.ndarray, list[str]]:
  """Index `[n]` of every case's group, -1 unknown, and the groups' names."""
  names = list(groups(columns))
  index = {name: g for g, name in enumerate(names)}
  group = np.array([index.get(str(g), -1) for g in columns["group"]], int)
  return group, names


def summary(
  columns: Columns,
  definition: str = "fairdiff_std",
  domain: Domain = FUNDUS,
) -> dict[str, dict[str, dict]]:
  """Figures of a segmenter by class, then measure.

  Args:
    columns: Columns as `per_case` returns them.
    definition: Of equity scaling, as for `metrics.equity_scaled`.
    domain: What is reported.

  Returns:
    `{"cup": {"dice": figures, "iou": figures, "hd95": figures}, "rim": ...,
    "disc": ..., "cup_to_disc": {"error": figures}}` where `figures` is what
    `metrics.summarize` returns and, as `interval`, what
    `uncertainty.intervals` does; with None for NaN and lists for tuples, so
    that JSON can hold it.
  """
  group, names = _indices(columns)
  result: dict[str, dict[str, dict]] = {}
  for cls, measure in scores(domain):
    arguments = (columns[f"{cls}_{measure}"], group, names)
    options = {
      "lower_is_better": measure in LOWER_IS_BETTER,
      "definition": definition,
    }
    figures = metrics.summarize(*arguments, **options)
    interval = uncertainty.intervals(
      *arguments, patient=columns.get("patient"), **options
    )
    result.setdefault(cls, {})[measure] = json_ready(
      {**figures, "interval": interval}
    )
  return result


def difference(
  columns: Columns,
  baseline: Columns,
  definition: str = "fairdiff_std",
  domain: Domain = FUNDUS,
) -> dict[str, dict]:
  """What sets a segmenter's Dice apart from a baseline's on the same cases.

  Args:
    columns: Columns as `per_case` returns them.
    baseline: Those of the baseline, the same cases in the same order.
    definition: Of equity scaling, as for `metrics.equity_scaled`.
    domain: What is reported.

  Returns:
    `{"cup": {"dice": differences}, "rim": ..., "disc": ...}` where
    `differences` is what `uncertainty.compare` returns, segmenter less
    baseline, with None for NaN. It also has `worst`: {`difference`} of the
    means of each one's worst group, without a test, as the data chose them.
  """
  group, names = _indices(columns)
  result = {}
  for cls in domain.reported:
    values = [c[f"{cls}_dice"] for c in (baseline, columns)]
    paired = uncertainty.compare(
      *(*values, group, names),
      patient=columns.get("patient"),
      definition=definition,
    )
    old, new = (
      figures["groups"].get(figures["worst"], {"mean": math.nan})["mean"]
      for figures in (metrics.summarize(v, group, names) for v in values)
    )
    worst = {"difference": new - old}
    result[cls] = {"dice": json_ready({**paired, "worst": worst})}
  return result
