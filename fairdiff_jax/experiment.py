"""A whole experiment: data, joint training, baseline, report."""

import sys
from pathlib import Path

import jax
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from fairdiff_jax.config import data_directory
from fairdiff_jax.data.attributes import OTHER, small_groups
from fairdiff_jax.data.fairseg import Cases, load, prepare, require_prepared
from fairdiff_jax.evaluation.evaluate import definitions_of, evaluate
from fairdiff_jax.synthesis.bank import make_refill
from fairdiff_jax.training.loop import train


def baseline_config(config: ConfigDict) -> ConfigDict:
  """The same segmenter and steps on real data alone, without regularizer."""
  baseline = config.copy_and_resolve_references()
  with baseline.unlocked():
    start, stop = config.train.segmenter
    baseline.train.steps = stop - start
    baseline.train.segmenter = (0, stop - start)
    baseline.train.points = baseline.train.image = (0, 0)
    baseline.fairness.method = "erm"
    baseline.fairness.strategy = "none"
    baseline.baseline = False
  return baseline


def pool_small_groups(config: ConfigDict, cases: Cases) -> ConfigDict:
  """Names the groups that have too few training cases in `data.pooled`."""
  pooled = small_groups(
    config.data.attribute, cases.attributes, config.data.min_cases
  )
  if not pooled:
    return config
  if jax.process_index() == 0:
    print(
      f"groups with fewer than {config.data.min_cases} training cases, pooled"
      f" as {OTHER}: {', '.join(pooled)}",
      file=sys.stderr,
    )
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.data.pooled = pooled
  return config


def _meet(name: str):
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def run(config: ConfigDict, workdir: str | Path) -> bool:
  """Runs an experiment, or goes on with it.

  Args:
    config: what to do.
    workdir: the run's directory; the report is in its `report`.

  Returns:
    True if it is complete, False if SIGTERM stopped it.
  """
  workdir = Path(workdir)
  definitions_of(config.evaluation)  # known only at the end otherwise
  directory = data_directory(config, workdir)
  if config.data.source == "phantom":
    # Gloo gives up after 30 s when processes first meet, but not later.
    _meet("start")
    if jax.process_index() == 0:
      prepare(config.data, directory)
    _meet("data")
  require_prepared(config.data, directory)
  cases = load(directory, "train")
  config = pool_small_groups(config, cases)
  if train(config, workdir, cases, make_refill=make_refill) is None:
    return False
  if config.baseline:
    state = train(
      baseline_config(config), workdir / "baseline", cases, name="baseline"
    )
    if state is None:
      return False
  evaluate(workdir)
  return True
