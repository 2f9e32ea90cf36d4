"""A run that has a checkpoint: what it was made with, and its averages."""

from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from fairdiff_jax import config as configs
from fairdiff_jax.data import domain as domains
from fairdiff_jax.layout import Layout
from fairdiff_jax.training.checkpoint import Inference, restore_inference
from fairdiff_jax.training.setup import Setup, setup


class Trained(NamedTuple):
  """A run at its newest checkpoint.

  Attributes:
    layout: of its directory.
    record: its config, its data's digest, and what was changed on the way.
    setup: what the config fixes.
    step: of the checkpoint.
    inference: what it holds for sampling and predicting.
  """

  layout: Layout
  record: configs.Record
  setup: Setup
  step: int
  inference: Inference

  @property
  def config(self) -> ConfigDict:
    return self.record.config

  @property
  def domain(self) -> domains.Domain:
    return self.setup.domain


def restore(workdir: str | Path) -> Trained:
  """A run at its newest checkpoint.

  Raises:
    FileNotFoundError: no such run, or it has no checkpoint yet.
    ValueError: its checkpoints cannot be read, or imported weights are not
      those that it was trained with.
  """
  record = configs.load_record(workdir)
  if not record.started:
    raise FileNotFoundError(
      f"{workdir} is prepared but has no checkpoint yet; train it first:"
      f" fairdiff train --workdir {workdir}"
    )
  run = setup(record.config)
  restored = restore_inference(workdir, run.objective, run.abstract)
  return Trained(Layout(workdir), record, run, *restored)
