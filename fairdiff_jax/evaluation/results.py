"""The results of a run: everything that its report says, and `summary.json`.

A report goes one way: `Results` are gathered, each section is a function of
them (`sections`), and the page is made of sections (`page`).
"""

import dataclasses
import datetime
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from fairdiff_jax import array_files, files
from fairdiff_jax import config as configs
from fairdiff_jax.data import domain as domains
from fairdiff_jax.data.domain import FUNDUS, Domain
from fairdiff_jax.data.mixture import group_sizes, training_pool
from fairdiff_jax.evaluation import segmentation
from fairdiff_jax.evaluation.page import PALETTE
from fairdiff_jax.evaluation.verdict import Verdict, conclude
from fairdiff_jax.fairness.metrics import DEFAULT, Definitions
from fairdiff_jax.layout import Layout
from fairdiff_jax.training import goodput
from fairdiff_jax.training.banks import CASES

SCHEMA = 1  # of summary.json: raised when a key changes its meaning or goes
TABLE = "cases.csv"
PAIRS = 6  # nearest ones that are shown
CURVE = 60  # points a curve is averaged to
CURVES = ("loss/", "risk/", "validation/")  # what of a log is drawn
PLACES = range(1, len(PALETTE) + 1)  # of models
STRATEGIES = {
  "none": "real cases alone, each once an epoch",
  "repeat_sample": "real cases alone, those of small groups repeated (Repeat"
  " Sample)",
  "equal_scale": "real and synthetic cases (Equal Scale)",
}


class Pair(NamedTuple):
  """A synthetic case and the training case that is nearest.

  Attributes:
    distance: in pixels.
    name: of the training case.
    image: of both, uint8 [H, W], or RGB [H, W, 3].
    mask: of both, [H, W].
  """

  distance: float
  name: str
  image: tuple[np.ndarray, np.ndarray]
  mask: tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Results:
  """What a report says, and what it is said from.

  Attributes:
    title: heading of the page.
    models: name -> columns of `segmentation.per_case`, on the same cases. The
      first is the subject, the second, if any, the baseline.
    reason: why there is no model, where there is none: a clause.
    notices: what a reader must know first, a sentence each.
    baseline: what the baseline is, a clause.
    made_up: whether the patients are.
    cases: test cases in the order of the columns: `image` uint8 `[n, H, W]` or
      RGB `[n, H, W, 3]`, `label` and, where there are models, `prediction` (the
      subject's) `[n, H, W]`; where there is none, `group` `[n]` names.
    synthetic: `image` `[m, H, W]` uint8, or RGB, `mask` `[m, H, W]`, `group`
      `[m]` names.
    realism: what `realism.compare` and `matched.compare` give.
    privacy: source of synthetic cases -> what `privacy.Privacy.measure` gives,
      and `pairs`.
    pairs: source -> the nearest pairs.
    agreement: segmenter -> group -> class -> {`synthetic`, `real`, `ratio`,
      `below`}: its Dice in [0, 1] on synthetic and real cases, their ratio, and
      the share of synthetic cases below the real 1% quantile.
    checkpoints: model -> what `Trained.checkpoint` gives; of the run also where
      there is no model.
    counts: group -> source ('real', 'synthetic') -> number of training cases.
    epoch: what `epoch` gives.
    log: path of a `metrics.jsonl`; a notice says if it cannot be read.
    baseline_log: that of the baseline; left out if it is not there.
    baseline_start: the run's step at which the baseline's first would be.
    phases: (from, to, networks that learn) of the run's steps.
    facts: what else there is to say of the run, name -> value.
    provenance: what `provenance` gives.
    definitions: what the columns were measured by, and how to scale by equity.
    domain: what masks show, and what is reported.

  Raises:
    ValueError: no model and no reason, too many models, or lengths or cases
      that do not match.
  """

  title: str
  models: Mapping[str, segmentation.Columns]
  reason: str = ""
  notices: Sequence[str] = ()
  baseline: str = ""
  made_up: bool = False
  cases: Mapping[str, np.ndarray] | None = None
  synthetic: Mapping[str, Any] | None = None
  realism: Mapping[str, Any] | None = None
  privacy: Mapping[str, Any] | None = None
  pairs: Mapping[str, Sequence[Pair]] | None = None
  agreement: Mapping[str, Any] | None = None
  checkpoints: Mapping[str, Mapping[str, Any]] | None = None
  counts: Mapping[str, Mapping[str, int]] | None = None
  epoch: Mapping[str, Mapping[str, int]] | None = None
  log: str | Path | None = None
  baseline_log: str | Path | None = None
  baseline_start: int = 0
  phases: Sequence[tuple[int, int, Sequence[str]]] = ()
  facts: Mapping[str, object] | None = None
  provenance: Mapping[str, object] | None = None
  definitions: Definitions = DEFAULT
  domain: Domain = FUNDUS

  def __post_init__(self):
    if not self.models and not self.reason:
      raise ValueError("no models to report on, and no reason why")
    if len(self.models) > len(PALETTE):
      raise ValueError(f"at most {len(PALETTE)} models, got {len(self.models)}")
    lists = [
      list(zip(columns["name"], columns["group"], strict=True))
      for columns in self.models.values()
    ]
    if any(names != lists[0] for names in lists):
      raise ValueError("the models were not measured on the same cases")
    sizes = {key: len(value) for key, value in (self.cases or {}).items()}
    if self.models:
      sizes["measured"] = self.n
    if len(set(sizes.values())) > 1:
      counts = ", ".join(f"{n} {key}" for key, n in sizes.items())
      raise ValueError(f"the cases differ in number: {counts}")

  @property
  def columns(self) -> segmentation.Columns:
    """Those of the subject."""
    return next(iter(self.models.values()), {"name": [], "group": []})

  @property
  def n(self) -> int:
    """Test cases that were measured."""
    return len(self.columns["name"])

  @cached_property
  def groups(self) -> dict[str, int]:
    """Test cases of every known group."""
    return segmentation.groups(self.columns)

  @property
  def case_groups(self) -> np.ndarray:
    """Name of the group `[n]` of every test case that is shown."""
    of = self.columns if self.models else self.cases
    return np.asarray((of or {"group": []})["group"], str)

  @cached_property
  def summaries(self) -> dict[str, dict]:
    """Model -> class -> measure -> figures, as `segmentation.summary`."""
    return {
      name: segmentation.summary(c, self.definitions.equity, self.domain)
      for name, c in self.models.items()
    }

  @cached_property
  def differences(self) -> dict[str, dict]:
    """Class -> what sets the subject apart from the baseline; {} without."""
    if len(self.models) < 2:
      return {}
    pair = list(self.models.values())[:2]
    return segmentation.difference(*pair, self.definitions.equity, self.domain)

  @cached_property
  def verdict(self) -> Verdict:
    """What follows."""
    return conclude(
      self.summaries,
      self.differences,
      [*self.domain.reported],
      self.domain.headline,
      reason=self.reason,
      baseline=self.baseline,
      made_up=self.made_up,
    )

  @cached_property
  def _logs(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str]:
    """Records of the run's log and of the baseline's, and what is missing."""
    records, baseline, missing = [], [], ""
    if self.log is not None:
      try:
        records = files.read_json_lines(self.log)
      except FileNotFoundError:
        missing = f"No curves of the training: {self.log} does not exist."
      except (OSError, ValueError) as error:
        missing = f"No curves of the training: {error}."
    if self.baseline_log is not None and Path(self.baseline_log).exists():
      try:
        baseline = files.read_json_lines(self.baseline_log)
      except (OSError, ValueError) as error:
        missing += f" No curves of the baseline: {error}."
    return records, baseline, missing.strip()

  @property
  def remarks(self) -> list[str]:
    """The notices, and what is missing of the logs."""
    missing = self._logs[-1]
    return [*self.notices, *([missing] if missing else [])]

  @cached_property
  def curves(self) -> dict[str, np.ndarray]:
    """Of the run, as `curves` gives them."""
    return curves(self._logs[0])

  @cached_property
  def baseline_curves(self) -> dict[str, np.ndarray]:
    """Of the baseline, at the steps of the run."""
    shift = np.array([[self.baseline_start], [0]])
    return {k: v + shift for k, v in curves(self._logs[1]).items()}

  @property
  def tables(self) -> dict[str, str]:
    """Model -> the file of its cases."""
    names = [f"cases_{i}.csv" if i > 1 else TABLE for i in PLACES]
    return dict(zip(self.models, names, strict=False))

  def to_json(self) -> dict[str, Any]:
    """What `summary.json` holds but the tables' digests, in JSON's types."""
    timed = dict(zip(("training", "baseline"), self._logs, strict=False))
    seconds = {f"{k}_seconds": trained_seconds(v) for k, v in timed.items()}
    return segmentation.json_ready(
      {
        "schema": SCHEMA,
        "title": self.title,
        "verdict": str(self.verdict),
        "findings": {
          cls: finding._asdict()
          for cls, finding in self.verdict.findings.items()
        },
        "cautions": self.verdict.cautions,
        "notices": self.remarks,
        "n": self.n,
        "groups": self.groups,
        "models": self.summaries,
        "difference": self.differences,
        "checkpoints": self.checkpoints or {},
        "realism": self.realism or {},
        "privacy": self.privacy or {},
        "agreement": self.agreement or {},
        "training_cases": self.counts or {},
        "epoch": self.epoch or {},
        "phases": [
          {"start": start, "stop": stop, "networks": [*networks]}
          for start, stop, networks in self.phases
        ],
        "facts": self.facts or {},
        "provenance": {**(self.provenance or {}), **seconds},
        "definitions": dataclasses.asdict(self.definitions),
        "domain": domains.to_json(self.domain),
        "tables": self.tables,
      }
    )


def curves(records: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
  """Curves of a log, averaged over bins of steps.

  A step that was logged twice, as after a restart, counts as last written.

  Args:
    records: lines of a `metrics.jsonl`.

  Returns:
    For every name that starts as one of `CURVES` and has a finite value:
    `[2, k]`, steps and values, k at most `CURVE`.
  """
  values: dict[str, dict[float, float]] = {}
  for record in records:
    step = record.get("step")
    for key, value in record.items():
      if (
        key.startswith(CURVES)
        and isinstance(step, int | float)
        and isinstance(value, int | float)
      ):
        values.setdefault(key, {})[step] = value
  result = {}
  for key, by_step in values.items():
    points = np.array(sorted(by_step.items()), float)
    points = points[np.isfinite(points).all(1)]
    if len(points):
      bins = np.array_split(points, min(CURVE, len(points)))
      result[key] = np.transpose([part.mean(0) for part in bins])
  return result


def trained_seconds(records: Sequence[Mapping[str, Any]]) -> float | None:
  """What a log's steps took, without interruptions; None if it has no step."""
  seconds: dict[float, float] = {}
  for record in records:
    step, each = record.get("step"), record.get("seconds_per_step")
    if isinstance(step, int | float) and isinstance(each, int | float):
      seconds[step] = each
  total, before = 0.0, 0.0
  for step, each in sorted(seconds.items()):
    total += each * (step - before)
    before = step
  return round(total, 1) if seconds else None


def epoch(
  config: ConfigDict,
  names: Sequence[str],
  group: np.ndarray,
  synthetic: Sequence[int],
  bank: Path | None = None,
) -> dict[str, dict[str, int]]:
  """What the segmenter's last epoch held, by group.

  Args:
    config: the run's config.
    names: of the groups.
    group: `[n]` of the training cases, -1 unknown.
    synthetic: cases `[G]` of the bank in use.
    bank: its directory; None without.

  Returns:
    Group -> {`real`: different real cases, `repeated`: how often one of them
    is there again, `synthetic`}; 'unknown' where there are such. {} where no
    segmenter learns, or the bank cannot be read.
  """
  start, stop = configs.span(config, "segmenter")
  if start == stop:
    return {}
  fairness = config.fairness
  sizes = group_sizes(group, len(names), size=fairness.group_size)
  if bank is not None:
    try:
      sizes = array_files.read_npz(bank / CASES, ("sizes",))["sizes"]
    except (OSError, ValueError):
      sizes = None
    if sizes is None or not sum(synthetic):
      return {}
  made = np.repeat(np.arange(len(names)), synthetic)
  rng = np.random.default_rng(0)  # which cases are repeated matters not
  pool = training_pool(rng, fairness.strategy, group, made, names, sizes)
  of = np.concatenate([group, made])[pool]
  is_real = pool < len(group)
  result = {}
  for g, name in [*enumerate(names), (-1, segmentation.UNKNOWN)]:
    real = pool[is_real & (of == g)]
    different = len(np.unique(real))
    if g >= 0 or different:
      result[name] = {
        "real": different,
        "repeated": len(real) - different,
        "synthetic": int((~is_real & (of == g)).sum()),
      }
  return result


def about_run(config: ConfigDict, layout: Layout) -> dict[str, Any]:
  """The fields of `Results` that a run's config and directory tell.

  Args:
    config: the run's config.
    layout: of its directory.
  """
  from fairdiff_jax.training.schedule import phases  # with JAX: it is slow

  baseline = layout.baseline
  try:
    about = describe_baseline(config, configs.load(baseline.workdir))
  except (OSError, ValueError):  # there is none, or none that can be used
    about = ""
  return {
    "baseline": about,
    "made_up": config.data.source == "phantom",
    "baseline_log": baseline.log,
    "baseline_start": configs.span(config, "segmenter")[0],
    "phases": phases(config),
    "provenance": {
      **provenance(),
      "training_goodput": goodput.read(layout.goodput),
      "baseline_goodput": goodput.read(baseline.goodput),
    },
  }


def describe_baseline(config: ConfigDict, baseline: ConfigDict) -> str:
  """What a run's baseline is, a clause that follows 'the baseline is'."""
  steps = [
    stop - start
    for start, stop in (
      configs.span(c, "segmenter") for c in (config, baseline)
    )
  ]
  method = baseline.fairness.method
  augment = [c.data.augment for c in (config, baseline)]
  same = f"the same augmentation ({augment[1]})"
  other = f"another augmentation ({augment[1]} instead of {augment[0]})"
  length = f"{steps[1]} steps" + (
    " as in the run"
    if steps[0] == steps[1]
    else f", not the {steps[0]} of the run"
  )
  return (
    f"the same segmenter, trained on {STRATEGIES[baseline.fairness.strategy]},"
    f" for {length}, with {same if augment[0] == augment[1] else other} and"
    f" {'no fairness method' if method == 'erm' else method}"
  )


def provenance() -> dict[str, Any]:
  """Where and when figures are made.

  Returns:
    `date` (UTC), `version` of this package, `commit` (None if unknown), `jax`,
    `devices`, `command`.
  """
  import jax  # only where it is there anyway: it is slow

  kinds = [device.device_kind for device in jax.devices()]
  devices = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
  now = datetime.datetime.now(datetime.UTC)
  package = sys.modules[__name__.partition(".")[0]]
  return {
    "date": now.isoformat(timespec="seconds"),
    "version": package.__version__,
    "commit": _commit(),
    "jax": jax.__version__,
    "devices": ", ".join(f"{n} x {kind}" for kind, n in devices.items()),
    "command": shlex.join(sys.argv),
  }


def _commit() -> str | None:
  """That of the checkout that this code lies in; '-dirty' if it was changed."""
  root = Path(__file__).resolve().parents[2]
  if not (root / ".git").exists():
    return None
  describe = ["describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"]
  try:
    done = subprocess.run(
      ["git", "-C", str(root), *describe],
      capture_output=True,
      text=True,
      timeout=10,
      check=True,
    )
  except (OSError, subprocess.SubprocessError):
    return None
  return done.stdout.strip() or None
