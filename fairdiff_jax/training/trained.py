"""A run that has a checkpoint: what it was made with, and its averages."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from ml_collections import ConfigDict

from fairdiff_jax import config as configs
from fairdiff_jax.data import domain as domains
from fairdiff_jax.layout import Layout
from fairdiff_jax.training.checkpoint import Inference, restore_inference
from fairdiff_jax.training.setup import Setup, setup
from fairdiff_jax.training.validation import (
  BEST,
  GIVEN,
  LAST,
  Score,
  best,
  in_vain,
)


class Trained(NamedTuple):
  """A run at one of its checkpoints.

  Attributes:
    layout: of its directory.
    record: its config, its data's digest, and what was changed on the way.
    setup: what the config fixes.
    step: of the checkpoint.
    inference: what it holds for sampling and predicting.
    chosen: which checkpoint it is: BEST, LAST, or GIVEN, by its step.
    last: step of the newest checkpoint.
    history: (step, score) of the run's validations, oldest first.
  """

  layout: Layout
  record: configs.Record
  setup: Setup
  step: int
  inference: Inference
  chosen: str = LAST
  last: int = 0
  history: Sequence[Score] = ()

  @property
  def config(self) -> ConfigDict:
    return self.record.config

  @property
  def domain(self) -> domains.Domain:
    return self.setup.domain

  @property
  def score(self) -> float | None:
    """Its validation score: mean ES-Dice of the parts; None without one."""
    score = dict(self.history).get(self.step, math.nan)
    return score if math.isfinite(score) else None

  @property
  def stopped_early(self) -> bool:
    """Whether validations ended the run before its last step."""
    patience = self.config.evaluation.patience
    ended = bool(patience) and in_vain(self.history) >= patience
    return ended and self.last < self.config.train.steps

  def checkpoint(self) -> dict[str, Any]:
    """What a report says of it: `chosen`, `step`, `score`, `validations`."""
    return {
      "chosen": self.chosen,
      "step": self.step,
      "score": self.score,
      "validations": len(self.history),
      "last_step": self.last,
      "stopped_early": self.stopped_early,
    }

  def __str__(self) -> str:
    return told(self.checkpoint())

  def baseline(self) -> Self:
    """The baseline of this run, at the checkpoint chosen in the same way.

    Raises: see `restore`.
    """
    wanted = None if self.chosen == GIVEN else self.chosen
    return restore(self.layout.baseline.workdir, wanted)


def told(checkpoint: Mapping[str, Any]) -> str:
  """A checkpoint in words, of what `Trained.checkpoint` gives.

  >>> told({"chosen": "best", "step": 900, "score": 0.714, "validations": 6})
  'best of 6 validations, step 900, validation ES-Dice 71.4'
  """
  chosen, number = checkpoint["chosen"], checkpoint["validations"]
  if chosen == BEST:
    chosen += f" of {number} validation{'s' * (number > 1)}"
  score = "not validated"
  if checkpoint["score"] is not None:
    score = f"validation ES-Dice {100 * checkpoint['score']:.1f}"
  return f"{chosen}, step {checkpoint['step']}, {score}"


def parse_checkpoint(text: str | int | None) -> str | int | None:
  """Reads 'best', 'last' or a step; None and '' are left to the run.

  Raises:
    ValueError: it is none of these.
  """
  if text in (None, ""):
    return None
  if text in (BEST, LAST):
    return text
  if isinstance(text, str) and text.isdecimal():
    return int(text)
  if isinstance(text, int) and not isinstance(text, bool) and text >= 0:
    return text
  raise ValueError(
    f"--checkpoint {text} is no checkpoint: give best, last, or a step, such as"
    " --checkpoint 900"
  )


def restore(
  workdir: str | Path, checkpoint: str | int | None = None
) -> Trained:
  """A run at one of its checkpoints.

  Args:
    workdir: the run's directory.
    checkpoint: 'best', by the run's validations; 'last'; a step; None for the
      best where there is one, else the last.

  Raises:
    FileNotFoundError: no such run, or it has no checkpoint yet.
    ValueError: its checkpoints cannot be read, there is none that is asked
      for, or imported weights are not those that it was trained with.
  """
  wanted = parse_checkpoint(checkpoint)
  record = configs.load_record(workdir)
  if not record.started:
    raise FileNotFoundError(
      f"{workdir} is prepared but has no checkpoint yet; train it first:"
      f" fairdiff train --workdir {workdir}"
    )
  run = setup(record.config)
  restored = restore_inference(workdir, run.objective, run.abstract, wanted)
  step, inference, last, history = restored
  chosen = GIVEN if isinstance(wanted, int) else wanted
  if chosen is None:
    found = best(history)
    chosen = BEST if found and found[0] == step else LAST
  return Trained(
    Layout(workdir), record, run, step, inference, chosen, last, history
  )
