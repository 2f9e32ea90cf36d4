"""A study: methods x seeds, on phantoms or on data of one's own.

A seed is another draw of initial parameters and of noise, and of phantoms also
of training patients; the test patients are the same for all. Everything lies
under one directory, a run each, and what is complete is not done again. Several
starts of a study share its runs.
"""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from fairdiff_jax import config as configs
from fairdiff_jax import experiment, files
from fairdiff_jax.data import prepare
from fairdiff_jax.evaluation import report
from fairdiff_jax.evaluation.compare import compare_runs
from fairdiff_jax.fields import flatten
from fairdiff_jax.layout import Layout


class Stopped(Exception):
  """SIGTERM stopped a run, which the same command goes on with."""


class Busy(Exception):
  """Other starts of the study are at work on all that is left of it."""


VALIDATION_SEED = 1000  # of training and test phantoms that choose settings
CHOSEN_BY = ("cup", "rim")  # whose ES-Dice chooses them
JOINT, REPEAT_SAMPLE = "joint", "repeat_sample"
SWEPT = ("erm", REPEAT_SAMPLE, "group_dro", "febs", JOINT)


def configure(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
  """The config of a run of the study: without baseline, its report short.

  All train on all training cases, up to the last step, so that methods differ
  in nothing else; settings are chosen on patients of their own (`choose`).
  """
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.baseline = False
    config.data.validation = config.evaluation.every = 0
    config.evaluation.patience = 0
    config.evaluation.synthetic_per_group = 1
    config.update_from_flattened_dict(dict(changes))
  return config


def _run(config: ConfigDict, workdir: Path, proceed: bool = False) -> bool:
  """Runs an experiment unless it has its report, complete and undamaged.

  Args:
    config: what to do.
    workdir: where.
    proceed: whether it may start from the checkpoint of another method.

  Returns:
    True if it is complete, False if another start is at work on it.
  """
  configs.require(workdir, config)
  if _is_complete(workdir):
    return True
  print(f"study: {workdir}", flush=True)
  try:
    if not experiment.run(config, workdir, proceed=proceed):
      raise Stopped(f"stopped in {workdir}; the same command goes on")
  except files.InUse:
    print(f"study: {workdir} is another start's", flush=True)
    return False
  return True


def _is_complete(workdir: Path) -> bool:
  """Whether a run has its report, undamaged."""
  try:
    _scores(workdir)
  except (OSError, ValueError):
    return False
  return True


def _scores(workdir: Path) -> dict[str, float | None]:
  """ES-Dice of a run by structure; None where it is undefined.

  Raises:
    FileNotFoundError: the run has no complete report.
    ValueError: its report is damaged.
  """
  summary = report.read(workdir)
  try:
    (figures,) = summary["models"].values()
    return {
      cls: figure["dice"]["es"]
      for cls, figure in figures.items()
      if "error" not in figure  # as a ratio of structures has
    }
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    path = Layout(workdir).report / report.SUMMARY
    raise ValueError(
      f"{path} has no figures of one model ({error!r}); make it with: fairdiff"
      f" evaluate --workdir {workdir}"
    ) from error


def _score(workdir: Path) -> float | None:
  """Mean of the structures that settings are chosen by, if all are defined."""
  scores = _scores(workdir)
  found = [score for cls in CHOSEN_BY if (score := scores[cls]) is not None]
  return sum(found) / len(found) if len(found) == len(CHOSEN_BY) else None


class Choice(NamedTuple):
  """Settings that were chosen, as far as other starts are not at work on them.

  Attributes:
    chosen: name -> {field: value}.
    scores: name -> value -> score.
    left: runs that others are at work on.
  """

  chosen: dict[str, dict[str, float]]
  scores: dict[str, dict[float, float | None]]
  left: list[Path]


def choose(
  base: ConfigDict,
  directory: Path,
  methods: Mapping[str, Mapping[str, Any]],
  choices: Mapping[str, tuple[str, Sequence[float]]],
) -> Choice:
  """The settings with the best score on validation phantoms, by method."""
  seeds = dict.fromkeys(
    ("seed", "data.phantom.seed", "data.phantom.test_seed"), VALIDATION_SEED
  )
  found = Choice({}, {}, [])
  for name, (field, values) in choices.items():
    runs = {
      value: directory / "validation" / _slug(f"{name} {value}")
      for value in values
    }
    left = [
      workdir
      for value, workdir in runs.items()
      if not _run(
        configure(base, {**methods[name], **seeds, field: value}), workdir
      )
    ]
    found.left.extend(left)
    if not left:
      scores = {value: _score(workdir) for value, workdir in runs.items()}
      known = {v: -math.inf if s is None else s for v, s in scores.items()}
      found.scores[name] = scores
      found.chosen[name] = {field: max(values, key=known.__getitem__)}
  return found


def run(
  base: ConfigDict,
  directory: str | Path,
  *,
  methods: Mapping[str, Mapping[str, Any]],
  choices: Mapping[str, tuple[str, Sequence[float]]],
  shared: Mapping[str, tuple[str, int]],
  seeds: int,
  reference: str,
  ceiling: str | None,
) -> Path:
  """Runs a study, or goes on with it.

  Several starts of one study share its runs: each passes by those that another
  is at work on, and the last one compares.

  Args:
    base: the config that methods change.
    directory: of the study.
    methods: name -> changes of the config.
    choices: name -> (field, values to choose from); they, and every score, are
      written to `choices.json`.
    shared: name -> (another method, step): up to this step both train alike,
      so that the other's checkpoint is taken over.
    seeds: how many seeds.
    reference: the method that others are tested against; the first where it is
      not among the methods.
    ceiling: the method that could not be had in practice; None for none.

  Choices and sharing of what is not among the methods are passed by.

  Returns:
    The page that compares the methods.

  Raises:
    Stopped: if SIGTERM stopped a run.
    Busy: if other starts are at work on all that is left.
    ValueError: if a directory holds a run of another config.
  """
  directory = Path(directory)
  choices = {name: of for name, of in choices.items() if name in methods}
  runs = {
    name: [directory / f"{_slug(name)}_{seed}" for seed in range(seeds)]
    for name in methods
  }
  drawn = ["seed"]
  if base.data.source == "phantom":
    drawn.append("data.phantom.seed")

  def make(name: str, seed: int, chosen: Mapping[str, Any]) -> bool:
    """Whether a run is complete now, not another start's or in wait of one."""
    if name in choices and name not in chosen:
      return False
    workdir = runs[name][seed]
    other, step = shared.get(name, ("", 0))
    if other in methods and not workdir.exists():
      source = runs[other][seed]
      if not _is_complete(source):
        return False
      with files.new_directory(workdir) as temporary:
        shutil.copytree(
          Layout(source).checkpoint(step), Layout(temporary).checkpoint(step)
        )
    changes = {**dict.fromkeys(drawn, seed), **methods[name]}
    config = configure(base, changes | chosen.get(name, {}))
    return _run(config, workdir, proceed=name in shared)

  before = None
  while True:
    choice = choose(base, directory, methods, choices)
    left = choice.left + [
      runs[name][seed]
      for seed in range(seeds)
      for name in methods
      if not make(name, seed, choice.chosen)
    ]
    if not left:
      break
    if left == before:
      raise Busy(
        "all that is left is another start's, or waits for one:"
        f" {files.some(left)}"
      )
    before = left  # some may have become free meanwhile
  out = directory / "comparison"
  try:
    with files.owned(directory):
      if choices:
        text = json.dumps(
          {"chosen": choice.chosen, "scores": choice.scores}, indent=2
        )
        files.write(directory / "choices.json", text + "\n")
      shutil.rmtree(out, ignore_errors=True)
      compare_runs(
        runs,
        out,
        reference=reference if reference in methods else next(iter(methods)),
        ceiling=ceiling if ceiling in methods else None,
      )
  except files.InUse:
    raise Busy("all is complete; another start compares") from None
  return out / "index.html"


def changes_of(config: ConfigDict, method: str) -> dict[str, Any]:
  """What of a config makes a method of it.

  Args:
    config: of a joint run.
    method: 'joint', the config as it is; 'repeat_sample', its baseline; or a
      fairness method, on the segmenter alone and on every real case once.

  Raises:
    ValueError: there is no such method.
  """
  if method == JOINT:
    return {}
  known = configs.all_fields()["fairness.method"]
  if method != REPEAT_SAMPLE and not known.holds(method):
    raise ValueError(
      f"there is no method {method!r}; give {JOINT!r}, {REPEAT_SAMPLE!r} or"
      f" {known.allowed}"
    )
  alone = experiment.baseline_config(config)
  if method != REPEAT_SAMPLE:
    with alone.unlocked():
      alone.fairness.method, alone.fairness.strategy = method, "none"
  before = dict(flatten(config.to_dict()))
  after = dict(flatten(alone.to_dict()))
  return {field: v for field, v in after.items() if v != before[field]}


def sweep(
  config: ConfigDict,
  directory: str | Path,
  *,
  methods: Sequence[str] = SWEPT,
  seeds: int = 3,
) -> Path:
  """Compares methods over seeds on the data that a config names.

  The data is prepared once, for all runs; settings are the config's. Methods
  are compared with 'repeat_sample' if it is among them, else with the first.

  Args:
    config: of a joint run.
    directory: of the study.
    methods: as for `changes_of`.
    seeds: how many seeds.

  Returns, raises: as `run`; ValueError also for an unknown method, or data that
  cannot be used.
  """
  configs.check(config)
  changes = {name: changes_of(config, name) for name in methods}
  for change in changes.values():
    configs.check(configure(config, change))
  if config.data.source != "phantom":  # whose patients every seed draws
    config = config.copy_and_resolve_references()
    with config.unlocked():
      config.data.directory = str(configs.data_directory(config, directory))
    if config.data.source:
      prepare.prepare(config.data, config.data.directory)
  return run(
    config,
    directory,
    methods=changes,
    choices={},
    shared={},
    seeds=seeds,
    reference=REPEAT_SAMPLE,
    ceiling=None,
  )


def pick(methods: Mapping[str, Any], slugs: Sequence[str]) -> dict[str, Any]:
  """Some of the methods, by what their runs are called without the seed.

  Raises:
    ValueError: there is no such method.
  """
  names = {_slug(name): name for name in methods}
  unknown = [slug for slug in slugs if slug not in names]
  if unknown:
    raise ValueError(
      f"there is no method {unknown[0]!r}; give some of {', '.join(names)}"
    )
  return {names[slug]: methods[names[slug]] for slug in slugs}


def _slug(name: str) -> str:
  return name.lower().replace(",", "").replace(" ", "_")
