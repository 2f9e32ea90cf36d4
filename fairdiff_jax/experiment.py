"""A whole experiment: data, joint training, baseline, report."""

import contextlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from fairdiff_jax import config as configs
from fairdiff_jax import files
from fairdiff_jax.data import domain, prepare, storage
from fairdiff_jax.data.cases import Cases
from fairdiff_jax.data.groups import OTHER, recorded, small_groups
from fairdiff_jax.evaluation import features
from fairdiff_jax.evaluation.evaluate import evaluate
from fairdiff_jax.evaluation.validation import make_validate
from fairdiff_jax.layout import Layout
from fairdiff_jax.synthesis.bank import make_refill
from fairdiff_jax.training.loop import train
from fairdiff_jax.training.schedule import validations
from fairdiff_jax.training.trained import restore


def baseline_config(config: ConfigDict) -> ConfigDict:
  """What one would do without generators, at the same steps.

  The same segmenter and augmentation on real cases alone, those of small groups
  drawn as often as those of large ones, without a regularizer.
  """
  baseline = config.copy_and_resolve_references()
  with baseline.unlocked():
    start, stop = configs.span(config, "segmenter")
    baseline.train.steps = stop - start
    baseline.train.segmenter = (0, stop - start)
    baseline.train.points = baseline.train.image = (0, 0)
    baseline.fairness.method = "erm"
    baseline.fairness.strategy = "repeat_sample"
    baseline.baseline = False
    baseline.log.profile = (0, 0)
  return baseline


def name_groups(config: ConfigDict, cases: Cases) -> ConfigDict:
  """Names in the config what the cases show: domain, groups, and those pooled.

  Groups with too few training cases are named in `data.pooled`.
  """
  words = recorded(config.data.attribute, cases.vocabulary)
  pooled = small_groups(
    config.data.attribute,
    cases.attributes,
    config.data.min_cases,
    cases.vocabulary,
  )
  if pooled:
    _say(
      f"groups with fewer than {config.data.min_cases} training cases, pooled"
      f" as {OTHER}: {', '.join(pooled)}"
    )
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.data.pooled, config.data.words = pooled, words
    config.data.domain = domain.text(cases.domain)
  return config


def _say(message: str):
  if jax.process_index() == 0:
    print(message, file=sys.stderr)


def _meet(name: str):
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def run(
  config: ConfigDict, workdir: str | Path, *, proceed: bool = False
) -> bool:
  """Runs an experiment, or goes on with it.

  Args:
    config: what to do.
    workdir: the run's directory; the report is in its `report`.
    proceed: whether an existing run may go on with another config than it had.

  Returns:
    True if it is complete, False if it was asked to stop.

  Raises:
    FileNotFoundError: `evaluation.features_weights` names no file.
    files.InUse: another process writes to the directory.
    ValueError: the config cannot run, or the directory belongs to a run of
      another config or data.
  """
  configs.check(config, jax.device_count())
  files.require_plain(workdir, "--workdir")
  if not proceed:
    configs.require(workdir, config)
  features.require(config.evaluation)
  with contextlib.ExitStack() as stack:
    if jax.process_index() == 0:
      stack.enter_context(files.owned(workdir))
    return _run(config, Path(workdir), proceed)


def _run(config: ConfigDict, workdir: Path, proceed: bool) -> bool:
  layout = Layout(workdir)
  directory = configs.data_directory(config, workdir)
  if config.data.source == "phantom":
    # Gloo gives up after 30 s when processes first meet, but not later.
    _meet("start")
    if jax.process_index() == 0:
      prepare.prepare(config.data, directory)
    _meet("data")
  prepare.require_prepared(config.data, directory)
  cases = storage.load(directory, "train")
  config = name_groups(config, cases)
  if not storage.num_cases(directory, "test"):
    _say(f"no test case is in {directory}: nothing will be said of fairness")
  shared = {
    "data": storage.digest(directory),
    "make_validate": _make_validate(config, directory),
    "proceed": proceed,
  }
  state = train(config, workdir, cases, make_refill=make_refill, **shared)
  if state is None:
    return False
  if config.baseline and "segmenter" in state.params:
    state = train(
      baseline_config(config),
      layout.baseline.workdir,
      cases,
      name="baseline",
      **shared,
    )
    if state is None:
      return False
  trained = restore(workdir)
  _say(f"checkpoint: {trained}")
  evaluate(trained)
  return True


def _make_validate(
  config: ConfigDict, directory: Path
) -> Callable[..., Any] | None:
  """Makes what validates a run; None if its config asks for no validation.

  Raises:
    ValueError: there is no validation case.
  """
  if not validations(config):
    return None
  if not storage.num_cases(directory, "validation"):
    raise ValueError(
      f"evaluation.every={config.evaluation.every} asks for validation cases,"
      f" and {directory} has none; mark some in the source, or prepare with"
      " data.validation=.2, which holds some of the training cases out, or set"
      " evaluation.every=0"
    )
  cases = storage.load(directory, "validation")
  return partial(make_validate, cases=cases)
