"""How long a run will still take, from what its steps and refills took."""

from collections import defaultdict, deque
from collections.abc import Hashable, Mapping
from statistics import median

RECENT = 50  # of a kind that count


class Forecast:
  """Time left, by kinds of work: what is of one kind takes about as long.

  Args:
    work: how often each kind is to be done.
  """

  def __init__(self, work: Mapping[Hashable, int]):
    self._left = dict(work)
    self._seconds = defaultdict(lambda: deque(maxlen=RECENT))

  def did(self, kind: Hashable, seconds: float | None = None):
    """One of a kind is done, and took so long if that was measured."""
    self._left[kind] = self._left.get(kind, 0) - 1
    if seconds is not None:
      self._seconds[kind].append(seconds)

  def left(self) -> tuple[float, bool]:
    """Seconds left of the kinds that were measured, and if these are all."""
    ahead = {kind: count for kind, count in self._left.items() if count > 0}
    known = [kind for kind in ahead if kind in self._seconds]
    seconds = sum(ahead[k] * median(self._seconds[k]) for k in known)
    return seconds, len(known) == len(ahead)

  def __str__(self) -> str:
    seconds, complete = self.left()
    if not any(count > 0 for count in self._left.values()):
      return ""
    if not complete and not seconds:
      return "time left unknown"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    clock = f"{minutes}:{seconds:02}"
    if hours:
      clock = f"{hours}:{minutes:02}:{seconds:02}"
    return f"{clock} left" if complete else f"at least {clock} left"
