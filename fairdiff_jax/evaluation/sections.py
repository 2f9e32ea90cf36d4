"""The sections of a report: each a function from results to a section.

A new figure is one function here, of synthetic cases in `synthetic_sections`,
and its name in `SECTIONS`. One that has nothing to show returns None; an
undefined figure is a dash.
"""

from collections.abc import Callable, Iterable, Mapping

import numpy as np
from markupsafe import Markup

from fairdiff_jax.evaluation import figures, segmentation, verdict
from fairdiff_jax.evaluation.glossary import glossary, ratio_title
from fairdiff_jax.evaluation.page import (
  PARTS,
  Cell,
  Section,
  interval,
  number,
  table,
)
from fairdiff_jax.evaluation.results import CURVE, Results
from fairdiff_jax.evaluation.synthetic_sections import (
  agreement,
  privacy,
  real_beside_synthetic,
  realism,
)
from fairdiff_jax.fairness.uncertainty import MIN_CASES
from fairdiff_jax.training import goodput

WORST, WORST_IN_ALL = 4, 24  # cases shown, of a group and at most
BROWSED = 150  # thumbnails in all
LEAST = 4  # and of every group at least
ALL = {"overall": "All cases"}
OF_GROUPS = {"es": "ES-Dice", "gap": "Gap", "worst": "Worst group"}
TITLES = {
  "risk": "Risk by group",
  "validation": "Validation ES-Dice, mean of the parts",
  "validation/es_dice": "Validation ES-Dice",
}
VALIDATION = "validation/dice/"  # and a structure: a chart of its groups
ALONE = ("Loss: total", "Loss: fairness")  # sums that a baseline has not alike
NAMES = {"dice": "Dice", "iou": "IoU", "hd95": "HD95, px"}
PROVENANCE = {
  "date": "evaluated",
  "version": "fairdiff_jax",
  "commit": "commit",
  "jax": "JAX",
  "devices": "devices of the evaluation",
  "command": "command",
  "training_seconds": "training, s",
  "training_goodput": "all starts of the training",
  "baseline_seconds": "training of the baseline, s",
  "baseline_goodput": "all starts of the baseline's",
}


def _marked(groups: Mapping[str, int]) -> dict[str, str]:
  """Names as they are shown, with a mark at those of small groups."""
  mark = "\N{NO-BREAK SPACE}†"
  return {g: g + mark * (n < MIN_CASES) for g, n in groups.items()}


def _sized(groups: Mapping[str, int]) -> dict[str, str]:
  return {g: f"{t} (n={groups[g]})" for g, t in _marked(groups).items()}


def _few(groups: Mapping[str, int]) -> str:
  if all(n >= MIN_CASES for n in groups.values()):
    return ""
  return f" † fewer than {MIN_CASES} cases: trust neither mean nor interval."


def headline(results: Results) -> Section | None:
  """What sets the first two models apart, by group, and their figures."""
  if not results.models:
    return None
  differences, groups = results.differences, results.groups
  pair = dict(list(results.summaries.items())[:2])
  blocks = {}
  for cls in results.domain.reported:
    rows = blocks[cls.title()] = [
      _figure_row(results, pair, cls, key, label) for key, label in ALL.items()
    ]
    rows += [_group_row(results, pair, cls, group) for group in groups]
    rows += [
      _figure_row(results, pair, cls, key, label)
      for key, label in OF_GROUPS.items()
    ]
  head = ["Dice", *pair, *(["Difference"] if differences else [])]
  body = table("Headline", head, blocks)
  if differences and groups:
    charts = [
      figures.differences(cls, differences[cls]["dice"], _marked(groups))
      for cls in results.domain.reported
    ]
    body = PARTS.charts(charts) + body
  known = sum(groups.values())
  sizes = [f"{text} {groups[g]}" for g, text in _marked(groups).items()]
  if known < results.n:
    sizes.append(f"{segmentation.UNKNOWN} {results.n - known}")
  note = (
    f"In points, with 95% intervals, on {results.n} test cases"
    f" ({', '.join(sizes)}).{_few(groups)}"
  )
  if differences:
    first, second = pair
    note += (
      f" Differences are {first} less {second}, paired by test case, taken"
      " before rounding; a hollow dot is one whose interval holds 0. They are"
      " called better or worse only above"
      f" {number(verdict.NOISE)} points, where their interval leaves out 0 and"
      f" p is below {verdict.SIGNIFICANT}; gap and ES-Dice only where the"
      " verdict is fairer or less fair; that of the worst groups never, as the"
      " data chose them."
    )
  return Section("Headline", body, note)


def _figure_row(
  results: Results,
  pair: Mapping[str, dict],
  cls: str,
  key: str,
  label: str,
) -> list[Cell]:
  """A row of the headline: a figure of each model, and their difference."""
  cells = [Cell(label)]
  for summary in pair.values():
    dice = summary[cls]["dice"]
    value, ends = number(verdict.headline(summary, cls)[key]), [None, None]
    if key != "worst":
      ends = dice["interval"][key]
    elif dice["worst"] in dice["groups"]:
      value = f"{dice['worst']} {value}"
      ends = dice["interval"]["groups"][dice["worst"]]
    cells.append(Cell(value, interval(ends)))
  if results.differences:
    row = results.differences[cls]["dice"][key]
    word = verdict.gain(key, row)
    finding = results.verdict.findings[cls].word
    allowed = {1: verdict.FAIRER, -1: verdict.LESS_FAIR}
    if finding == verdict.SILENT or (
      key != "overall" and allowed.get(word) != finding
    ):
      word = 0
    cells.append(_difference(row, word))
  return cells


def _group_row(
  results: Results, pair: Mapping[str, dict], cls: str, group: str
) -> list[Cell]:
  """A row of the headline: the mean of a group."""
  cells = [Cell(_marked(results.groups)[group])]
  for summary in pair.values():
    dice = summary[cls]["dice"]
    ends = dice["interval"]["groups"][group]
    cells.append(Cell(number(dice["groups"][group]["mean"]), interval(ends)))
  if results.differences:
    row = results.differences[cls]["dice"]["groups"][group]
    silent = results.verdict.findings[cls].word == verdict.SILENT
    cells.append(_difference(row, 0 if silent else verdict.gain(group, row)))
  return cells


def _difference(row: Mapping[str, float | None], word: int) -> Cell:
  word = {1: "better", -1: "worse", 0: ""}[word]
  value = number(row["difference"], sign="+")
  ends = [row.get("low"), row.get("high")]
  return Cell(f"{value} {word}".strip(), interval(ends, sign="+"), word)


def dice_by_group(results: Results) -> Section | None:
  """Dot plots of every model's Dice."""
  if not results.groups:
    return None
  sized = _sized(results.groups)
  charts = [
    figures.dots(cls, results.summaries, sized)
    for cls in results.domain.reported
  ]
  note = "In points. Lines are 95% intervals. Axes are zoomed."
  return Section("Dice by group", PARTS.charts(charts), note)


def measures(results: Results) -> Section | None:
  """Every measure of every model, a column for each group."""
  if not results.models:
    return None
  groups, n = results.groups, results.n
  titles = {
    (cls, m): f"{cls.title()} {name}"
    for m, name in NAMES.items()
    for cls in results.domain.reported
  }
  for name in results.domain.ratios:
    titles[segmentation.key(name), "error"] = ratio_title(name)
  blocks = {}
  for (cls, measure), title in titles.items():
    style = {"hd95": (1, 1), "error": (1, 3)}.get(measure, (100, 1))
    rows = blocks[title] = []
    for name, summary in results.summaries.items():
      found = summary[cls][measure]
      ends = found["interval"]
      means = [(found["overall"], found["n"], n, ends["overall"])]
      for group, count in groups.items():
        of = found["groups"][group]
        means.append((of["mean"], of["n"], count, ends["groups"][group]))
      row = [Cell(name)]
      for mean, defined, count, bounds in means:
        few = f" n={defined}" if defined < count else ""
        detail = f"{interval(bounds, *style)}{few}".strip()
        row.append(Cell(number(mean, *style), detail))
      rows.append(row)
  head = [Cell("Model"), Cell("All", f"n={n}")]
  head += [Cell(t, f"n={groups[g]}") for g, t in _marked(groups).items()]
  note = (
    "Dice and IoU in points, with 95% intervals. A small n in a cell says how"
    f" many cases the measure is defined for, where that is not all."
    f"{_few(groups)}"
  )
  return Section(
    "All measures by group", table("All measures", head, blocks), note
  )


def _scores(results: Results) -> np.ndarray:
  """Mean Dice `[n]` of the subject over the parts; inf where undefined."""
  score = np.stack(
    [results.columns[f"{cls}_dice"] for cls in results.domain.parts]
  )
  known = ~np.isnan(score)
  count = known.sum(0)
  total = np.where(known, score, 0).sum(0)
  return np.where(count > 0, total / np.maximum(count, 1), np.inf)


def _members(results: Results) -> dict[str, np.ndarray]:
  """Group -> its cases, those with the lowest mean Dice first."""
  order = np.argsort(_scores(results), kind="stable")
  of = results.case_groups[order]
  names = [*results.groups]
  if (of == segmentation.UNKNOWN).any():
    names.append(segmentation.UNKNOWN)
  return {name: order[of == name] for name in names}


def _shown(
  results: Results, chosen: Iterable[int], most: int
) -> list[tuple[Markup, tuple[str, ...]]]:
  """(picture of at most so many pixels, lines under it) of test cases."""
  columns, domain, cases = results.columns, results.domain, results.cases
  items = []
  for i in chosen:
    found = ", ".join(
      f"{cls} {number(columns[f'{cls}_dice'][i])}" for cls in domain.parts
    )
    name, group = columns["name"][i], columns["group"][i]
    picture = figures.picture(
      cases["image"][i],
      f"Case {name}, {group}, with outlines of label and prediction",
      domain,
      most,
      label=cases["label"][i],
      prediction=cases["prediction"][i],
    )
    items.append((picture, (name, found)))
  return items


def _legend(results: Results, text: str) -> Markup:
  parts = " and ".join(results.domain.parts)
  return PARTS.legend() + Markup("; {} {}, {}.").format(
    text, parts, next(iter(results.models))
  )


def worst_cases(results: Results) -> Section | None:
  """Those of each group with the lowest Dice."""
  if "prediction" not in (results.cases or {}) or not results.n:
    return None
  members = _members(results)
  each = max(1, min(WORST, WORST_IN_ALL // len(members)))
  body = Markup("").join(
    PARTS.heading(name)
    + PARTS.pictures(_shown(results, of[:each], figures.LARGE), "cases")
    for name, of in members.items()
  )
  text = f"the {each} test cases of each group with the lowest mean Dice of"
  return Section("Worst cases by group", body, _legend(results, text))


def browse(results: Results) -> Section | None:
  """Thumbnails of test cases, from the worst to the best of each group."""
  if "prediction" not in (results.cases or {}) or not results.n:
    return None
  members = _members(results)
  each = max(LEAST, BROWSED // len(members))
  folds = []
  for name, of in members.items():
    chosen = [*figures.spread(of, each)]
    items = _shown(results, chosen, figures.SMALL)
    title = f"{name}: {len(chosen)} of {len(of)} cases"
    folds.append(PARTS.fold(title, PARTS.pictures(items, "cases thumbnails")))
  text = (
    "from the worst case of a group to its best, evenly over their ranks by"
    " mean Dice of"
  )
  return Section(
    "Cases by group", Markup("").join(folds), _legend(results, text)
  )


def _counted(label: str, counts: Mapping[str, Mapping[str, int]]) -> Markup:
  """Cases by group and source, with sums."""
  sources = list(dict.fromkeys(k for row in counts.values() for k in row))
  rows = {g: [row.get(k, 0) for k in sources] for g, row in counts.items()}
  rows["All"] = np.sum(list(rows.values()), axis=0).tolist()
  cells = [
    [Cell(group), *(Cell(f"{v:,}") for v in [*row, sum(row)])]
    for group, row in rows.items()
  ]
  return table(label, ["Group", *sources, "total"], {"": cells})


def training_cases(results: Results) -> Section | None:
  """Real training cases, and those of the bank."""
  if not results.counts:
    return None
  title = "Training cases by group"
  return Section(title, _counted(title, results.counts))


def epoch(results: Results) -> Section | None:
  """What the segmenter's last epoch held."""
  if not results.epoch:
    return None
  note = (
    "What the segmenter saw in its last epoch, by group: different real cases,"
    " how often one of them came again, and synthetic ones."
  )
  body = _counted("An epoch by group", results.epoch)
  return Section("What an epoch held", body, note)


def training(results: Results) -> Section | None:
  """Curves of the log, the baseline's too, with the run's phases.

  A loss has a chart of its own; of others, such as the groups' risks, those
  that differ in the last part of their names share one.
  """
  drawn: dict[str, dict[str, str]] = {}  # title -> name in it -> key
  for key in results.curves:
    parent, _, name = key.rpartition("/")
    title = f"Loss: {name}" if parent == "loss" else TITLES.get(parent, parent)
    if parent.startswith(VALIDATION):
      title = f"Validation Dice by group: {parent.removeprefix(VALIDATION)}"
    drawn.setdefault(title, {})[name] = key
  order = sorted(drawn, key=lambda title: not title.startswith("Loss: "))
  charts = []
  for title in order:
    lines, dashed = (
      {name: of[key] for name, key in drawn[title].items() if key in of}
      for of in (results.curves, results.baseline_curves)
    )
    if title in ALONE:
      dashed = {}
    charts.append(figures.training(title, lines, dashed, results.phases))
  if not charts:
    return None
  note = f"Each curve is averaged to at most {CURVE} points."
  if results.phases:
    spans = [
      f"{start} to {stop}: {', '.join(networks) or 'nothing learns'}"
      for start, stop, networks in results.phases
    ]
    note += f" Phases of the run, in steps: {'; '.join(spans)}."
  if results.baseline_curves:
    note += (
      f" The baseline starts where the segmenter does, at step"
      f" {results.baseline_start}."
    )
  return Section("Training", PARTS.charts(charts), note)


def the_run(results: Results) -> Section | None:
  """What else there is to say of the run."""
  if not results.facts:
    return None
  return Section("The run", PARTS.definitions(list(results.facts.items())))


def provenance(results: Results) -> Section | None:
  """When, by what, on what and how long."""
  found = results.to_json()["provenance"]
  items = [
    (label, goodput.told(value) if key.endswith("_goodput") else value)
    for key, label in PROVENANCE.items()
    if (value := found.get(key)) is not None
  ]
  if not items:
    return None
  note = (
    "Times of training are those of its steps, without interruptions; what its"
    " starts took leaves out those that were killed."
  )
  return Section("Provenance", PARTS.definitions(items), note)


def tables(results: Results) -> Section | None:
  """Links to the files beside the page."""
  items = [
    (file, f"every measure of every test case, {model}")
    for model, file in results.tables.items()
  ]
  items.append(("summary.json", "every figure of this page by name"))
  return Section("Files", PARTS.files(items))


def definitions(results: Results) -> Section | None:
  """What the words mean."""
  if not results.models:
    return None
  words = glossary(results.definitions, results.domain)
  return Section("Definitions", PARTS.definitions(list(words.items())))


# In the order of the page.
SECTIONS: tuple[Callable[[Results], Section | None], ...] = (
  headline,
  dice_by_group,
  measures,
  worst_cases,
  browse,
  real_beside_synthetic,
  realism,
  privacy,
  agreement,
  training_cases,
  epoch,
  training,
  the_run,
  provenance,
  tables,
  definitions,
)
