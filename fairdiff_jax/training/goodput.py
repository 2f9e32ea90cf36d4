"""Where the time of a run goes.

A host starts a step on its devices and goes on; it waits for the step before.
`step` is what the host waits for devices, starting steps included, and `data`
what it waits for batches, perhaps while a step is under way. Only their sum is
the time of the steps: nothing is synchronised for the sake of these figures.
`compile`, likewise, is what is waited for: what is compiled while steps run
costs nothing.
"""

import contextlib
import functools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fairdiff_jax import files

KINDS = {  # what they are called
  "step": "steps",
  "data": "waiting for batches",
  "compile": "compiling",
  "init": "starting",
  "refill": "filling banks",
  "evaluation": "validating",
  "save": "saving",
  "other": "other",
}


class Stopwatch:
  """Seconds by kind; a block within another one's does not count there.

  >>> clock = Stopwatch()
  >>> with clock("refill"), clock("compile"):
  ...   pass
  >>> sorted(clock.seconds())
  ['compile', 'other', 'refill']
  """

  def __init__(self):
    self._seconds = Counter()
    self._kinds = ["other"]
    self._since = time.monotonic()

  def _note(self):
    now = time.monotonic()
    self._seconds[self._kinds[-1]] += now - self._since
    self._since = now

  @contextlib.contextmanager
  def __call__(self, kind: str) -> Iterator[None]:
    """Times a block as one of `KINDS`."""
    self._note()
    self._kinds.append(kind)
    try:
      yield
    finally:
      self._note()
      self._kinds.pop()

  def seconds(self) -> dict[str, float]:
    """Seconds up to now, by kind."""
    self._note()
    return dict(self._seconds)

  def of_steps(self) -> float:
    """Seconds of steps and their batches up to now."""
    self._note()
    return self._seconds["step"] + self._seconds["data"]


def timed(kind: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
  """Decorates methods of what has a `clock`: their time is of a kind."""

  def decorate(method):
    @functools.wraps(method)
    def call(self, *args, **kwargs):
      with self.clock(kind):
        return method(self, *args, **kwargs)

    return call

  return decorate


def add(path: Path, start: int, stop: int, seconds: Mapping[str, float]):
  """Adds the line of a start that did the steps (from, to)."""
  records = files.read_json_lines(path) if path.exists() else []
  told = {kind: round(value, 3) for kind, value in seconds.items()}
  records.append({"start": start, "stop": stop, "seconds": told})
  files.write(path, "".join(json.dumps(record) + "\n" for record in records))


def read(path: Path) -> dict[str, float] | None:
  """Seconds by kind of all starts of a run; None if it has told of none.

  Args:
    path: the lines that its starts have left; others than those of this
      module are passed over.
  """
  try:
    records = files.read_json_lines(path)
  except (OSError, ValueError):
    return None
  total = Counter()
  for record in records:
    seconds = record.get("seconds")
    for kind in KINDS.keys() & (seconds if isinstance(seconds, dict) else {}):
      if isinstance(seconds[kind], int | float):
        total[kind] += seconds[kind]
  return {kind: round(total[kind], 3) for kind in KINDS if kind in total}


def told(seconds: Mapping[str, float]) -> str:
  """Seconds by kind in words, the largest first, without what is below 1%.

  >>> told({"step": 570.0, "compile": 130.0, "save": 1.0})
  'of 12 min: steps 81%, compiling 19%'
  """
  whole = sum(seconds.values())
  shares = {kind: value / max(whole, 1e-9) for kind, value in seconds.items()}
  texts = [
    f"{KINDS[kind]} {share:.0%}"
    for kind, share in sorted(shares.items(), key=lambda item: -item[1])
    if share >= 0.01
  ]
  length = f"{whole:.0f} s"
  if whole >= 5400:
    length = f"{whole / 3600:.1f} h"
  elif whole >= 120:
    length = f"{whole / 60:.0f} min"
  return f"of {length}: {', '.join(texts)}"
