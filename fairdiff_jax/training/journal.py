"""What a run says of itself: JSON lines, TensorBoard events, a progress bar."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter
from tqdm import tqdm


class Journal:
  """Writes `metrics.jsonl` and events; silent on hosts other than the first.

  A resumed run cuts `metrics.jsonl` back to the step it resumes from, so that
  the file reads like that of a run that was never interrupted.
  """

  def __init__(
    self,
    workdir: Path,
    *,
    start: int,
    stop: int,
    enabled: bool = True,
    name: str = "train",
  ):
    self._enabled = enabled
    if not enabled:
      return
    path = workdir / "metrics.jsonl"
    kept = []
    if path.exists():
      for line in path.read_text().splitlines():
        try:
          record = json.loads(line)
        except json.JSONDecodeError:
          break  # the line during which an earlier run was killed
        if record["step"] <= start and "params_sha256" not in record:
          kept.append(line)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(line + "\n" for line in kept))
    temporary.replace(path)
    self._file = path.open("a", buffering=1)
    self._events = SummaryWriter(str(workdir), purge_step=start + 1)
    self._bar = tqdm(
      total=stop,
      initial=start,
      desc=name,
      unit="step",
      dynamic_ncols=True,
      mininterval=0.5 if sys.stderr.isatty() else 10,
    )
    self._last_step, self._last_time = start, time.monotonic()

  def step(self, message: dict[str, str] | None = None):
    """Moves the progress bar on by one step."""
    if self._enabled:
      if message:
        self._bar.set_postfix(message, refresh=False)
      self._bar.update()

  def say(self, message: str):
    """Prints a line above the progress bar."""
    if self._enabled:
      self._bar.write(message, file=sys.stderr)

  def log(self, step: int, metrics: dict[str, Any], cases: int = 0):
    """Writes metrics; `cases` per step gives the throughput.

    Numbers that are not finite are written as null.
    """
    if not self._enabled:
      return
    record: dict[str, Any] = {"step": step}
    for key, value in metrics.items():
      if isinstance(value, float) and not math.isfinite(value):
        value = None
      record[key] = value
    if cases:
      now = time.monotonic()
      seconds = (now - self._last_time) / max(step - self._last_step, 1)
      self._last_step, self._last_time = step, now
      record["seconds_per_step"] = round(seconds, 4)
      record["cases_per_second"] = round(cases / seconds, 2)
      self._bar.set_postfix(
        {"cases/s": f"{cases / seconds:.0f}"}, refresh=False
      )
    self._file.write(json.dumps(record, allow_nan=False) + "\n")
    for key, value in record.items():
      if isinstance(value, int | float) and key != "step":
        self._events.add_scalar(key, value, step)

  def close(self):
    if self._enabled:
      self._bar.close()
      self._file.close()
      self._events.close()
