"""What a run's validations say: which was the best, and whether to go on.

A history is (step, score) of every validation, oldest first. It is kept with
each checkpoint, so that a run goes on with it from there; a score is NaN where
nothing could be measured.
"""

import math
from collections.abc import Sequence

Score = tuple[int, float]
SCORE = "validation/score"  # what is chosen by: the higher, the better
BEST, LAST, GIVEN = "best", "last", "given"  # how a checkpoint is chosen


def best(history: Sequence[Score]) -> Score | None:
  """The first of the highest scores; None without one.

  >>> best([(2, 0.5), (4, 0.75), (6, float("nan")), (8, 0.75)])
  (4, 0.75)
  """
  known = [(step, score) for step, score in history if math.isfinite(score)]
  return max(known, key=lambda of: of[1], default=None)


def in_vain(history: Sequence[Score]) -> int:
  """How many validations there were since the best, or in all without one.

  >>> in_vain([(2, 0.5), (4, 0.75), (6, float("nan")), (8, 0.75)])
  2
  """
  found = best(history)
  return sum(1 for step, _ in history if found is None or step > found[0])


def to_json(history: Sequence[Score]) -> list[list[float | None]]:
  """A history in JSON's types."""
  return [[s, score if math.isfinite(score) else None] for s, score in history]


def parse(stored: Sequence[Sequence[float | None]]) -> list[Score]:
  """Inverse of `to_json`."""
  return [
    (int(step or 0), math.nan if score is None else float(score))
    for step, score in stored
  ]
