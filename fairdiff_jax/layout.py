"""What lies where in a run's directory; nobody else knows."""

import dataclasses
import os
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Layout:
  """Paths in a run's directory, whether they are there or not.

  Attributes:
    workdir: the run's directory.
  """

  workdir: Path

  def __init__(self, workdir: str | os.PathLike):
    object.__setattr__(self, "workdir", Path(workdir))

  @property
  def config(self) -> Path:
    """What was asked for, and what was changed on the way."""
    return self.workdir / "config.json"

  @property
  def data(self) -> Path:
    """Prepared data, where the config names no other directory."""
    return self.workdir / "data"

  @property
  def checkpoints(self) -> Path:
    return self.workdir / "checkpoints"

  def checkpoint(self, step: int) -> Path:
    """The checkpoint of a step."""
    return self.checkpoints / str(step)

  @property
  def banks(self) -> Path:
    return self.workdir / "bank"

  def bank(self, step: int) -> Path:
    """The bank that is filled at a step."""
    return self.banks / f"step_{step:08d}"

  @property
  def filled_banks(self) -> list[Path]:
    """The banks that are there, oldest first."""
    return sorted(self.banks.glob("step_*"))

  @property
  def log(self) -> Path:
    """Metrics as JSON lines; TensorBoard's events lie beside it."""
    return self.workdir / "metrics.jsonl"

  @property
  def goodput(self) -> Path:
    """Where the time of every start went, as JSON lines."""
    return self.workdir / "goodput.jsonl"

  @property
  def profile(self) -> Path:
    """A trace of the steps of `log.profile`."""
    return self.workdir / "profile"

  @property
  def wandb(self) -> Path:
    """What Weights & Biases calls the run, where it is sent there."""
    return self.workdir / "wandb_id"

  def nonfinite(self, step: int) -> Path:
    """What a step saw that was not finite."""
    return self.workdir / f"nonfinite_step_{step}.json"

  @property
  def baseline(self) -> "Layout":
    """The run that a baseline is."""
    return Layout(self.workdir / "baseline")

  @property
  def report(self) -> Path:
    return self.workdir / "report"

  def external_report(self, name: str) -> Path:
    """The report on other data."""
    return self.workdir / "external" / name
