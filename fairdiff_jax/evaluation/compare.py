"""Comparison of methods: what a study says with several runs, and seeds.

A *method* is what a config says of how a run is trained; runs that differ only
in what a seed changes, its number, the training patients and where they lie,
are its seeds. `group_runs` finds the methods among runs, `compare_runs` reads
the runs' `report/cases.csv` and writes `comparison.csv` (every measure, one
figure a row), `comparison.md` (Dice, for a README), `index.html` (the same and
a chart; no script, nothing loaded) and `summary.json` (the rows again, the
paired differences alone, and what was compared).

Tests are paired by test case. With several seeds a figure is its mean over
the seeds, beside its standard deviation; intervals and tests are of each
case's mean over the seeds, so that they hold the chance of the test cases,
not that of the seeds.
"""

import dataclasses
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from fairdiff_jax import config as configs
from fairdiff_jax import files
from fairdiff_jax.data import domain as domains
from fairdiff_jax.data.domain import FUNDUS, Domain
from fairdiff_jax.evaluation import comparison, report, segmentation
from fairdiff_jax.evaluation.comparison import LEVEL, Rows
from fairdiff_jax.evaluation.results import TABLE
from fairdiff_jax.fairness import metrics, uncertainty
from fairdiff_jax.layout import Layout
from fairdiff_jax.training.validation import LAST

SCHEMA = 1  # of summary.json: raised when a key changes its meaning or goes
KEYS = ("method", "class", "measure", "figure", "group")
DIFFERENCE = (
  *("difference", "difference_low", "difference_high"),
  *("p", "p_holm", "p_wilcoxon", "p_wilcoxon_holm"),
)
VALUES = ("n", "n_seeds", "value", "sd", "low", "high", *DIFFERENCE, "share")
# Fields that say which training patients, or which test patients, a run had.
NOT_OF_METHODS = (
  "seed",
  *(f"data.phantom.{name}" for name in ("seed", "test", "test_seed")),
)


def group_runs(
  runs: Sequence[str | Path], names: Sequence[str] | None = None
) -> dict[str, list[Path]]:
  """Sorts runs into methods: runs that differ only in what a seed changes.

  A method is called as its runs' directories are without a trailing `_N` or
  `_seedN`; where these differ, or are those of another method too, by the
  fields in which the methods differ.

  Args:
    runs: Work directories.
    names: What to call the methods, in the order of their first runs.

  Returns:
    Name -> its runs, in the order given.

  Raises:
    FileNotFoundError: A directory holds no run.
    ValueError: No run, two of one config, seed and data, or names that do not
      fit.
  """
  fields: dict[str, dict[str, Any]] = {}
  methods: dict[str, dict[Hashable, Path]] = {}
  for run in map(Path, runs):
    record = configs.load_record(run)
    method = _method(record)
    key = json.dumps(method)
    fields[key] = method
    seeds, seed = methods.setdefault(key, {}), _seed(record)
    if seed in seeds:
      raise ValueError(
        f"{seeds[seed]} and {run} have one config, seed and data; leave one out"
      )
    seeds[seed] = run
  members = [list(seeds.values()) for seeds in methods.values()]
  found = _names(members, list(fields.values()))
  chosen = list(names or found)
  if len(chosen) != len(found) or len(set(chosen)) != len(chosen):
    raise ValueError(
      f"{len(found)} methods ({'; '.join(found)}) want as many different names,"
      f" got {', '.join(chosen)}; give them by --names"
    )
  return dict(zip(chosen, members, strict=True))


def _method(record: configs.Record) -> dict[str, Any]:
  """The fields that make a run's method, by name, in JSON's types."""
  fields = configs.compared(record.config)
  method = {k: v for k, v in fields.items() if k not in NOT_OF_METHODS}
  for network in ("image", "segmenter"):  # wherever they lie
    method[f"{network}.weights"] = Path(record.config[network].weights).name
  return method | {"changes": list(record.changes)}


def _seed(record: configs.Record) -> Hashable:
  """What tells the runs of a method apart."""
  data = record.config.data
  origin = (data.phantom.seed, data.source, data.directory, data.split)
  return record.config.seed, record.data or origin


def _names(
  members: Sequence[Sequence[Path]], fields: Sequence[Mapping[str, Any]]
) -> list[str]:
  """What the methods are called, from their runs and fields."""
  stems = [
    {re.sub(r"_(seed)?\d+$", "", run.resolve().name) for run in runs}
    for runs in members
  ]
  shared = Counter(next(iter(s)) for s in stems if len(s) == 1)
  varying = [
    name
    for name in dict.fromkeys(itertools.chain(*fields))
    if len({json.dumps(of.get(name)) for of in fields}) > 1
  ]
  names = []
  for stem, of in zip(stems, fields, strict=True):
    listed = ", ".join(f"{name}={_plain(of.get(name))}" for name in varying)
    common = stem.pop() if len(stem) == 1 else ""
    if common and shared[common] > 1:
      common = f"{common}, {listed}"
    names.append(common or listed or "all runs")
  return names


def _plain(value: Any) -> str:
  return value if isinstance(value, str) else json.dumps(value)


def read_cases(
  run: str | Path, domain: Domain = FUNDUS
) -> dict[str, np.ndarray]:
  """Columns `[n]` of a run's `report/cases.csv`, as `per_case` made them.

  It is the table of the run's own model; its baseline is in another.

  Raises:
    FileNotFoundError: The run has no such table.
    ValueError: The table is empty, or lacks columns or numbers.
  """
  path = Layout(run).report / TABLE
  remedy = f"make it with: fairdiff evaluate --workdir {run}"
  if not path.exists():
    raise FileNotFoundError(f"{path} does not exist; {remedy}")
  present, rows = files.read_csv(path)
  patients = ("patient",) if "patient" in present else ()
  if not rows:
    raise ValueError(f"{path} holds no case; {remedy}")
  columns = {}
  words = ("name", "group", *patients)
  for name in (*words, *map("_".join, segmentation.scores(domain))):
    if name not in present:
      raise ValueError(f"{path} has no column {name!r}; {remedy}")
    columns[name] = np.array([row[name] for row in rows])
    if name not in words:
      try:
        columns[name] = np.array([float(row[name] or "nan") for row in rows])
      except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; {remedy}") from error
  return columns


def _domain(summaries: Mapping[Path, Mapping]) -> Domain:
  """What all these reports are of.

  Raises:
    ValueError: Two differ.
  """
  (first, expected), *others = (
    (run, domains.parse(of["domain"]) if of.get("domain") else FUNDUS)
    for run, of in summaries.items()
  )
  for run, domain in others:
    if domain != expected:
      raise ValueError(
        f"{first} and {run} report other structures: {domains.text(expected)}"
        f" and {domains.text(domain)}; compare runs of one data set"
      )
  return expected


def _definitions(summaries: Mapping[Path, Mapping]) -> metrics.Definitions:
  """What all these reports were measured by.

  Raises:
    ValueError: A report has no figures, or two differ in their definitions.
  """
  for run, summary in summaries.items():
    if summary.get("tables") == {}:
      raise ValueError(
        f"the report of {run} has no segmentation figures; leave it out"
      )
  (first, expected), *others = (
    (run, metrics.Definitions(**summary["definitions"]))
    for run, summary in summaries.items()
  )
  for run, definitions in others:
    if definitions != expected:
      raise ValueError(
        f"{first} and {run} were evaluated by different definitions:"
        f" {expected} and {definitions}; evaluate one of them again"
        " (fairdiff evaluate)"
      )
  return expected


def _check_chosen(summaries: Mapping[Path, Mapping]) -> None:
  """Raises ValueError unless all are of checkpoints chosen in the same way.

  The best of several on validation beside the last of another run: the one has
  a head start.
  """
  (first, expected), *others = (
    (run, next((c["chosen"] for c in of.get("checkpoints", {}).values()), LAST))
    for run, of in summaries.items()
  )
  for run, chosen in others:
    if chosen != expected:
      raise ValueError(
        f"{first} was evaluated at its {expected} checkpoint, {run} at its"
        f" {chosen} one; evaluate both alike (fairdiff evaluate --checkpoint"
        " last)"
      )


def _check_tested(
  summaries: Mapping[Path, Mapping], tables: Mapping[Path, segmentation.Columns]
) -> None:
  """Raises ValueError unless all were tested on the same cases.

  Images and masks can only be the same where they have one size.
  """
  seen: dict[tuple, tuple[Path, str]] = {}
  for run, summary in summaries.items():
    cases = len(tables[run]["name"])
    if summary.get("n", cases) != cases:
      raise ValueError(
        f"{run}: {TABLE} has {cases} cases, {report.SUMMARY} speaks of"
        f" {summary['n']}; evaluate it again (fairdiff evaluate)"
      )
    facts = summary.get("facts", {})
    digest = facts.get(report.TEST_DIGEST)
    if digest is None:
      continue
    size = (facts.get("image size"), facts.get("crop"))
    first, expected = seen.setdefault(size, (run, digest))
    if digest != expected:
      raise ValueError(
        f"{first} and {run} were not tested on the same cases: their names,"
        " images or masks differ; evaluate both on the same data"
      )


def _check_paired(tables: Mapping[Path, segmentation.Columns]) -> None:
  (first, expected), *others = (
    (run, [f"{n} ({g})" for n, g in zip(c["name"], c["group"], strict=True)])
    for run, c in tables.items()
  )
  for run, cases in others:
    pairs = itertools.zip_longest(expected, cases, fillvalue="absent")
    for number, (a, b) in enumerate(pairs, 1):
      if a != b:
        raise ValueError(
          f"{first} and {run} were not tested on the same cases: case {number}"
          f" is {a} in the one, {b} in the other"
        )


def _figures(summary: Mapping, key: str | None = None) -> dict:
  """(figure, group) -> the value, from `summarize` or `uncertainty`."""
  figures = {
    (f, ""): summary[f] for f in ("overall", "es", "gap") if f in summary
  }
  for name, value in summary["groups"].items():
    figures["group", name] = value[key] if key else value
  return figures


def _measure(
  values: np.ndarray,
  reference: np.ndarray | None,
  group: np.ndarray,
  names: Sequence[str],
  patient: np.ndarray | None,
  lower_is_better: bool,
  definition: str,
) -> dict[tuple[str, str], dict[str, float]]:
  """Every figure of one measure of one method.

  Args:
    values: `[s, n]`, one a seed and case, NaN where undefined.
    reference: `[r, n]` of the method to compare with, if any.
    group: `[n]` index into `names`, -1 unknown.
    names: Names of the groups.
    patient: `[n]`, whose case it is; None where each is of another.
    lower_is_better: True for distances and errors.
    definition: Of equity scaling.

  Returns:
    (figure, group) -> `VALUES` but the share.
  """
  arguments = (group, names)
  options = {"lower_is_better": lower_is_better, "definition": definition}
  drawn = {"level": LEVEL, "patient": patient}
  seeds = [
    _figures(metrics.summarize(v, *arguments, **options), "mean")
    for v in values
  ]
  mean = _over_seeds(values)
  counts = metrics.summarize(mean, *arguments, **options)
  bounds = _figures(uncertainty.intervals(mean, *arguments, **drawn, **options))
  rows = {}
  for key, (low, high) in bounds.items():
    over = uncertainty.over_seeds([figures[key] for figures in seeds])
    rows[key] = dict.fromkeys(VALUES, math.nan) | {
      "n": counts["groups"][key[1]]["n"] if key[1] else counts["n"],
      "n_seeds": len(values),
      "value": over["mean"],
      "sd": over["sd"],
      "low": low,
      "high": high,
    }
  means = {k: r["value"] for k, r in rows.items() if k[1] and r["n"]}
  if means:
    key = (max if lower_is_better else min)(means, key=means.get)
    rows["worst", key[1]] = dict(rows[key])
  if reference is not None:
    tests = uncertainty.compare(
      _over_seeds(reference), mean, *arguments, **drawn, **options
    )
    for key, test in _figures(tests).items():
      rows[key] |= {
        "difference": test["difference"],
        "difference_low": test["low"],
        "difference_high": test["high"],
        "p": test["p_bootstrap" if key[1] else "p"],
        "p_holm": test.get("p_bootstrap_holm", math.nan),
        "p_wilcoxon": test.get("p_wilcoxon", math.nan),
        "p_wilcoxon_holm": test.get("p_wilcoxon_holm", math.nan),
      }
  return rows


def _rows(
  cases: Mapping[str, Sequence[segmentation.Columns]],
  reference: str,
  definition: str,
  domain: Domain,
) -> Rows:
  """Every figure of every measure of every method."""
  columns = cases[reference][0]
  names = list(segmentation.groups(columns))
  index = {name: i for i, name in enumerate(names)}
  group = np.array([index.get(g, -1) for g in columns["group"].tolist()])
  rows: Rows = {}
  for method, seeds in tqdm(cases.items(), desc="methods", unit="method"):
    for cls, measure in segmentation.scores(domain):
      column = f"{cls}_{measure}"
      against = None
      if method != reference:
        against = np.stack([c[column] for c in cases[reference]])
      figures = _measure(
        np.stack([c[column] for c in seeds]),
        against,
        group,
        names,
        columns.get("patient"),
        measure in segmentation.LOWER_IS_BETTER,
        definition,
      )
      for key, row in figures.items():
        rows[(method, cls, measure, *key)] = row
  return rows


def _over_seeds(values: np.ndarray) -> np.ndarray:
  """`[s, n]` -> `[n]`: each case's mean over the seeds that define it."""
  return np.ma.masked_invalid(values).mean(0).filled(np.nan)


def _add_shares(
  rows: Rows, methods: Iterable[str], ends: Sequence[str], domain: Domain
):
  """Shares of the distance of ES-Dice between two methods, where it is > 0."""
  for cls, method in itertools.product(domain.reported, methods):
    key = (cls, "dice", "es", "")
    start, stop = (rows[(end, *key)]["value"] for end in ends)
    if stop > start:
      row = rows[(method, *key)]
      row["share"] = (row["value"] - start) / (stop - start)


def compare_runs(
  methods: Mapping[str, Sequence[str | Path]],
  out: str | Path,
  *,
  reference: str | None = None,
  ceiling: str | None = None,
) -> list[dict]:
  """Compares methods; writes `comparison.csv`, `.md`, `index.html`, a summary.

  Args:
    methods: Name -> its runs' directories, one a seed. All runs must have been
      evaluated on the same test cases, by the same definitions.
    out: Made whole, or not at all; must be empty if it is there.
    reference: The method that the others are tested against; None for the
      first.
    ceiling: The method whose ES-Dice is the best to hope for. Each method
      then also gets the share of the way from the reference that it closes:
      (ES - ES of reference) / (ES of ceiling - ES of reference).

  Returns:
    The rows of `comparison.csv`: `KEYS` and `VALUES`, NaN where there is
    none. Units are those of `cases.csv`: overlap in [0, 1], HD95 in pixels.

  Raises:
    FileExistsError: `out` holds files.
    FileNotFoundError: A run has no complete report.
    OSError: A file cannot be written; the message names it.
    ValueError: No method, a method without run, an unknown reference or
      ceiling, a damaged report, or runs that were not tested on the same cases
      or by the same definitions.
  """
  out = Path(out)
  if out.exists() and any(out.iterdir()):
    raise FileExistsError(
      f"{out} is not empty; empty it, or give another --out"
    )
  if not methods:
    raise ValueError("no run to compare")
  reference = next(iter(methods)) if reference is None else reference
  for name in (reference, *([ceiling] if ceiling else [])):
    if name not in methods:
      raise ValueError(f"no method {name!r} among {', '.join(methods)}")
  for name, runs in methods.items():
    if not runs:
      raise ValueError(f"method {name!r} has no run")
  summaries = {
    Path(run): report.read(run) for run in itertools.chain(*methods.values())
  }
  definitions, domain = _definitions(summaries), _domain(summaries)
  cases = {
    name: {Path(run): read_cases(run, domain) for run in runs}
    for name, runs in methods.items()
  }
  tables_of = {r: c for runs in cases.values() for r, c in runs.items()}
  _check_paired(tables_of)
  _check_chosen(summaries)
  _check_tested(summaries, tables_of)
  rows = _rows(
    {name: list(runs.values()) for name, runs in cases.items()},
    reference,
    definitions.equity,
    domain,
  )
  if ceiling:
    _add_shares(rows, methods, (reference, ceiling), domain)
  result = [dict(zip(KEYS, k, strict=True)) | row for k, row in rows.items()]

  columns = next(iter(cases[reference].values()))
  groups = segmentation.groups(columns)
  n = len(columns["group"])
  lead = comparison.warning(groups)
  notes = comparison.notes(groups, n, reference, ceiling, definitions, domain)
  tables = {}
  for cls in domain.reported:
    tables |= comparison.tables(rows, cls, groups, reference, ceiling)
  charts = [comparison.chart(rows, cls, groups) for cls in domain.reported]
  summary = {
    "schema": SCHEMA,
    "definitions": dataclasses.asdict(definitions),
    "n": n,
    "groups": groups,
    "methods": {k: list(map(str, runs)) for k, runs in methods.items()},
    "reference": reference,
    "ceiling": ceiling,
    "level": LEVEL,
    "rows": result,
    "differences": [
      {key: row[key] for key in (*KEYS, "n", "n_seeds", *DIFFERENCE)}
      for row in result
      if row["method"] != reference and row["figure"] != "worst"
    ],
  }
  text = json.dumps(
    segmentation.json_ready(summary), indent=2, ensure_ascii=False
  )
  with files.new_directory(out.absolute()) as directory:
    segmentation.write_csv(
      directory / "comparison.csv",
      {key: [row[key] for row in result] for key in (*KEYS, *VALUES)},
    )
    markdown = comparison.markdown(lead, notes, tables)
    files.write(directory / "comparison.md", markdown)
    page = comparison.render(lead, notes, tables, charts)
    files.write(directory / report.PAGE, page)
    files.write(directory / report.SUMMARY, text + "\n")
  return result
