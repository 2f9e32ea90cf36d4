"""What a run says of itself: JSON lines, TensorBoard events, a progress bar."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fairdiff_jax import files
from fairdiff_jax.layout import Layout

# tqdm's own guess of the time left takes all steps to be alike.
BAR = (
  "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
)


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
    from tensorboardX import SummaryWriter

    path = Layout(workdir).log
    records = files.read_json_lines(path) if path.exists() else []
    kept = [
      json.dumps(record) + "\n"
      for record in records
      if record.get("step", math.inf) <= start and "params_sha256" not in record
    ]
    files.write(path, "".join(kept))
    self._file = path.open("a", buffering=1)
    self._events = SummaryWriter(str(workdir), purge_step=start + 1)
    self._bar = tqdm(
      total=stop,
      initial=start,
      desc=name,
      unit="step",
      dynamic_ncols=True,
      mininterval=0.5 if sys.stderr.isatty() else 10,
      bar_format=BAR,
    )
    self._shown = {}  # what stands behind the bar, by topic
    self._last_step, self._last_time = start, time.monotonic()

  def step(self, left: str = ""):
    """Moves the progress bar on by one step.

    Args:
      left: the time that the run will still take.
    """
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
    shown = (self._shown.get(k) for k in ("wait", "left", "cases"))
    self._bar.set_postfix_str(", ".join(filter(None, shown)), refresh=False)

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
      self._show(cases=f"{cases / seconds:.0f} cases/s")
    self._file.write(json.dumps(record, allow_nan=False) + "\n")
    for key, value in record.items():
      if isinstance(value, int | float) and key != "step":
        self._events.add_scalar(key, value, step)

  def close(self):
    if self._enabled:
      self._bar.close()
      self._file.close()
      self._events.close()
