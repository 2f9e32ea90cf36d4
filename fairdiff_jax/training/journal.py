"""What a run says of itself: JSON lines, TensorBoard events, a progress bar.

TensorBoard also gets a picture of every bank. Weights & Biases, where `sending`
asks for it, gets numbers alone: patients, and what is made of them, stay here.
"""

import contextlib
import contextvars
import io
import json
import math
import sys
import uuid
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from fairdiff_jax import files
from fairdiff_jax.layout import Layout
from fairdiff_jax.training import goodput
from fairdiff_jax.training.banks import SHEET
from fairdiff_jax.training.goodput import Stopwatch
from fairdiff_jax.training.validation import SCORE

# tqdm's own guess of the time left takes all steps to be alike.
BAR = (
  "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
)

_PROJECT = contextvars.ContextVar("project", default="")


@contextlib.contextmanager
def sending(project: str) -> Iterator[None]:
  """Sends the numbers of runs in the block to Weights & Biases too.

  Args:
    project: of Weights & Biases; '' sends nothing.

  Raises:
    ImportError: the package wandb is missing.
  """
  if project:
    try:
      import wandb  # noqa: F401
    except ImportError as error:
      raise ImportError(
        "sending to Weights & Biases needs wandb: pip install"
        " 'fairdiff_jax[wandb]'"
      ) from error
  token = _PROJECT.set(project)
  try:
    yield
  finally:
    _PROJECT.reset(token)


class _TensorBoard:
  """Events in the run's directory: numbers, and a picture of every bank."""

  def __init__(self, layout: Layout, start: int):
    from tensorboardX import SummaryWriter  # takes long to import

    self._layout = layout
    self._writer = SummaryWriter(str(layout.workdir), purge_step=start + 1)
    self._shown = {
      bank for bank in layout.filled_banks if _step_of(bank) < start
    }

  def log(self, step: int, numbers: Mapping[str, float]):
    for name, value in numbers.items():
      self._writer.add_scalar(name, value, step)
    for bank in self._layout.filled_banks:
      if bank not in self._shown and (bank / SHEET).exists():
        with Image.open(io.BytesIO((bank / SHEET).read_bytes())) as picture:
          pixels = np.asarray(picture.convert("RGB"))
        self._writer.add_image(
          "bank", pixels, _step_of(bank), dataformats="HWC"
        )
        self._shown.add(bank)

  def close(self):
    self._writer.close()


def _step_of(bank: Path) -> int:
  return int(bank.name.removeprefix("step_"))


class _WeightsAndBiases:
  """The same run of Weights & Biases as before, where one goes on."""

  def __init__(self, layout: Layout, start: int, project: str, name: str):
    import wandb

    if not start or not layout.wandb.exists():
      layout.workdir.mkdir(parents=True, exist_ok=True)
      files.write(layout.wandb, uuid.uuid4().hex)
    self._run = wandb.init(
      project=project,
      id=files.read_text(layout.wandb).strip(),
      name=f"{layout.workdir.resolve().name}, {name}",
      dir=str(layout.workdir),
      resume="allow",
    )

  def log(self, step: int, numbers: Mapping[str, float]):
    self._run.log(dict(numbers), step=step)

  def close(self):
    self._run.finish()


class Journal:
  """Writes `metrics.jsonl` and events; silent on hosts other than the first.

  A resumed run cuts `metrics.jsonl` back to the step it resumes from, and to
  the validations that it remembers, so that the file reads like that of a run
  that was never interrupted. `goodput.jsonl` keeps a line for every start that
  had steps to do and was not killed: the steps (from, to), and the seconds that
  went by until it ended, by kind (see `goodput`).

  Attributes:
    clock: by which time is told; the run times by it what it does.
  """

  def __init__(
    self,
    workdir: Path,
    *,
    start: int,
    stop: int,
    enabled: bool = True,
    name: str = "train",
    validated: Collection[int] = (),
    clock: Stopwatch | None = None,
  ):
    self.clock = clock or Stopwatch()
    self._start, self._stop, self._done = start, stop, start
    self._enabled = enabled
    if not enabled:
      return
    self._layout = layout = Layout(workdir)
    path = layout.log
    records = files.read_json_lines(path) if path.exists() else []
    kept = [
      json.dumps(record) + "\n"
      for record in records
      if record.get("step", math.inf) <= start
      and "params_sha256" not in record
      and (SCORE not in record or record["step"] in validated)
    ]
    files.write(path, "".join(kept))
    self._file = path.open("a", buffering=1)
    self._sinks: list[Any] = [_TensorBoard(layout, start)]
    if project := _PROJECT.get():
      self._sinks.append(_WeightsAndBiases(layout, start, project, name))
    self._bar = tqdm(
      total=stop,
      initial=start,
      desc=name,
      unit="step",
      dynamic_ncols=True,
      mininterval=0.5 if sys.stderr.isatty() else 10,
      bar_format=BAR,
    )
    self._shown: dict[str, str] = {}  # what stands behind the bar, by topic
    self._last_step, self._last_time = start, self.clock.of_steps()

  def step(self, left: str = ""):
    """Moves the progress bar on by one step.

    Args:
      left: the time that the run will still take.
    """
    self._done += 1
    if self._enabled:
      self._show(left=left)
      self._bar.update()

  def wait(self, what: str):
    """Shows on the progress bar what is being waited for; '' for nothing."""
    if self._enabled:
      self._show(wait=what)
      if sys.stderr.isatty():
        self._bar.refresh()

  def _show(self, **texts: str):
    self._shown |= texts
    shown = map(self._shown.get, ("wait", "left", "validation", "cases"))
    self._bar.set_postfix_str(", ".join(filter(None, shown)), refresh=False)

  def say(self, message: str):
    """Prints a line above the progress bar."""
    if self._enabled:
      self._bar.write(message, file=sys.stderr)

  def validation(self, step: int, metrics: dict[str, float], best: float):
    """Writes what a validation found, and shows its score and the best."""
    self.log(step, metrics)
    if self._enabled:
      text = f"validation {100 * metrics[SCORE]:.1f} (best {100 * best:.1f})"
      self._show(validation=text)

  def log(self, step: int, metrics: dict[str, Any], cases: int = 0):
    """Writes metrics; `cases` per step gives the throughput.

    That counts the time of steps and their batches alone: neither compiling nor
    banks, checkpoints and validations. Numbers that are not finite are written
    as null.
    """
    if not self._enabled:
      return
    record: dict[str, Any] = {"step": step}
    for key, value in metrics.items():
      if isinstance(value, float) and not math.isfinite(value):
        value = None
      record[key] = value
    if cases:
      now = self.clock.of_steps()
      seconds = (now - self._last_time) / max(step - self._last_step, 1)
      seconds = max(seconds, 1e-6)
      self._last_step, self._last_time = step, now
      record["seconds_per_step"] = round(seconds, 4)
      record["cases_per_second"] = round(cases / seconds, 2)
      self._show(cases=f"{cases / seconds:.0f} cases/s")
    self._file.write(json.dumps(record, allow_nan=False) + "\n")
    numbers = {
      key: value
      for key, value in record.items()
      if isinstance(value, int | float) and key != "step"
    }
    for sink in self._sinks:
      sink.log(step, numbers)

  def close(self):
    if self._enabled:
      if self._start < self._stop:
        self._tell_time()
      self._bar.close()
      self._file.close()
      for sink in self._sinks:
        sink.close()

  def _tell_time(self):
    seconds = self.clock.seconds()
    goodput.add(self._layout.goodput, self._start, self._done, seconds)
    self.say(goodput.told(seconds))
