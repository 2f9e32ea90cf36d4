"""A study: methods x seeds, on phantoms or on data of one's own.

A seed is another draw of initial parameters and of noise, and of phantoms also
of training patients; the test patients are the same for all. Everything lies
under one directory, a run each, and what is complete is not done again.
"""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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


def _run(config: ConfigDict, workdir: Path, proceed: bool = False) -> Path:
  """Runs an experiment unless it has its report, complete and undamaged.

  Args:
    config: what to do.
    workdir: where.
    proceed: whether it may start from the checkpoint of another method.
  """
  configs.require(workdir, config)
  try:
    _scores(workdir)
  except (OSError, ValueError):
    print(f"study: {workdir}", flush=True)
    if not experiment.run(config, workdir, proceed=proceed):
      raise Stopped(f"stopped in {workdir}; the same command goes on") from None
  return workdir


def _scores(workdir: Path) -> dict[str, float | None]:
  """ES-Dice of a run by structure; None where it is undefined.

  Raises:
    FileNotFoundError: the run has no complete report.
    ValueError: its report is damaged.
  """
  summary = report.read(workdir)
  try:
    (figures,) = summary["models"].values()
    return {cls: figure["dice"]["es"] for cls, figure in figures.items()}
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


def choose(
  base: ConfigDict,
  directory: Path,
  methods: Mapping[str, Mapping[str, Any]],
  choices: Mapping[str, tuple[str, Sequence[float]]],
) -> dict[str, dict[str, float]]:
  """The settings with the best score on validation phantoms, by method.

  They, and every score, are written to `choices.json`.
  """
  seeds = dict.fromkeys(
    ("seed", "data.phantom.seed", "data.phantom.test_seed"), VALIDATION_SEED
  )
  chosen: dict[str, dict[str, float]] = {}
  scores: dict[str, dict[float, float | None]] = {}
  for name, (field, values) in choices.items():
    scores[name] = {}
    for value in values:
      config = configure(base, {**methods[name], **seeds, field: value})
      workdir = directory / "validation" / _slug(f"{name} {value}")
      scores[name][value] = _score(_run(config, workdir))
    known = {v: -math.inf if s is None else s for v, s in scores[name].items()}
    chosen[name] = {field: max(values, key=known.__getitem__)}
  text = json.dumps({"chosen": chosen, "scores": scores}, indent=2)
  directory.mkdir(parents=True, exist_ok=True)
  files.write(directory / "choices.json", text + "\n")
  return chosen


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

  Args:
    base: the config that methods change.
    directory: of the study.
    methods: name -> changes of the config.
    choices: name -> (field, values to choose from).
    shared: name -> (another method, step): up to this step both train alike,
      so that the other's checkpoint is taken over.
    seeds: how many seeds.
    reference: the method that others are tested against.
    ceiling: the method that could not be had in practice; None for none.

  Returns:
    The page that compares the methods.

  Raises:
    Stopped: if SIGTERM stopped a run.
    ValueError: if a directory holds a run of another config.
  """
  directory = Path(directory)
  chosen = choose(base, directory, methods, choices) if choices else {}
  drawn = ["seed"]
  if base.data.source == "phantom":
    drawn.append("data.phantom.seed")
  runs: dict[str, list[Path]] = {name: [] for name in methods}
  for seed in range(seeds):
    for name, changes in methods.items():
      workdir = directory / f"{_slug(name)}_{seed}"
      if name in shared and not workdir.exists():
        other, step = shared[name]
        source = Layout(directory / f"{_slug(other)}_{seed}").checkpoint(step)
        with files.new_directory(workdir) as temporary:
          shutil.copytree(source, Layout(temporary).checkpoint(step))
      changes = {**dict.fromkeys(drawn, seed), **changes}
      config = configure(base, changes | chosen.get(name, {}))
      runs[name].append(_run(config, workdir, proceed=name in shared))
  out = directory / "comparison"
  shutil.rmtree(out, ignore_errors=True)
  compare_runs(runs, out, reference=reference, ceiling=ceiling)
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
    reference=REPEAT_SAMPLE
    if REPEAT_SAMPLE in changes
    else next(iter(changes)),
    ceiling=None,
  )


def _slug(name: str) -> str:
  return name.lower().replace(",", "").replace(" ", "_")
