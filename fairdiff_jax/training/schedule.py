"""When what happens in a run: phases, refills, saves. Functions of the config.

Spans of steps are (from, to): the first, and the one after the last.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import pairwise
from typing import NamedTuple

from fairdiff_jax.config import span
from fairdiff_jax.objectives.joint import NETWORKS

# Kinds of work besides steps, whose kind is the networks that learn.
REFILL, SAVE = "the generators of synthetic cases", "checkpoint"
VALIDATE = "validation"


class Phase(NamedTuple):
  """Steps in which the same networks learn.

  Attributes:
    start: its first step.
    stop: the step after its last.
    active: the networks that learn, in the order of NETWORKS; () in a gap.
  """

  start: int
  stop: int
  active: tuple[str, ...]


def learning_steps(config, name: str) -> tuple[int, int]:
  """The steps (from, to) in which a network learns."""
  if name == "adversary":
    used = config.fairness.method == "adversarial"
    return learning_steps(config, "segmenter") if used else (0, 0)
  return span(config, name)


def active_networks(config, step: int) -> tuple[str, ...]:
  """The networks that learn at a step; () for none."""
  spans = {name: learning_steps(config, name) for name in NETWORKS}
  return tuple(n for n, (start, stop) in spans.items() if start <= step < stop)


def phases(config) -> list[Phase]:
  """The phases of a run, which follow one another from step 0 to its end."""
  total = config.train.steps
  spans = [learning_steps(config, name) for name in NETWORKS]
  cuts = {s for start, stop in spans if start < stop for s in (start, stop)}
  result = []
  for start, stop in pairwise(
    sorted({0, total} | {s for s in cuts if 0 < s < total})
  ):
    active = active_networks(config, start)
    if result and result[-1].active == active:
      start = result.pop().start
    result.append(Phase(start, stop, active))
  return result


def mixture(config, step: int) -> int | None:
  """The step at which the segmenter's cases in use at a step are mixed.

  None before it learns; after it has learned, that of its last step.
  """
  start, stop = learning_steps(config, "segmenter")
  stop = min(stop, config.train.steps)
  if stop <= start or step < start:
    return None
  every = config.bank.every
  if config.fairness.strategy != "equal_scale" or not every:
    return start
  return start + (min(step, stop - 1) - start) // every * every


def bank_step(config, step: int) -> int | None:
  """The step whose bank is in use at a step, as `mixture`; None without."""
  if config.fairness.strategy != "equal_scale":
    return None
  return mixture(config, step)


def refills(config, start: int = 0) -> list[int]:
  """The steps from `start` on at which a bank is filled, if one is needed."""
  last = bank_step(config, config.train.steps)
  if last is None:
    return []
  first = learning_steps(config, "segmenter")[0]
  steps = range(first, last + 1, config.bank.every or 1)
  return [step for step in steps if step >= start]


def validations(config, start: int = 0) -> list[int]:
  """The steps from `start` on after which the segmenter is validated.

  So it is at every `evaluation.every`-th of its steps, and after its last.
  """
  first, stop = learning_steps(config, "segmenter")
  stop, every = min(stop, config.train.steps), config.evaluation.every
  if not every or stop <= first:
    return []
  return [s for s in (*range(first + every, stop, every), stop) if s >= start]


def last_step(config) -> int:
  """The step after the last in which a network learns."""
  return max((p.stop for p in phases(config) if p.active), default=0)


def needs(
  config,
  start: int,
  refilled: Sequence[int] = (),
  validated: Sequence[int] = (),
) -> list[Hashable]:
  """What a run compiles from a step on, in the order in which it needs it.

  Args:
    config: the run's config.
    start: the step.
    refilled: the steps at which it fills a bank.
    validated: the steps after which it is validated.

  Returns:
    The active networks of each phase, REFILL and VALIDATE.
  """
  order = [
    (max(phase.start, start), 1, phase.active)
    for phase in phases(config)
    if phase.stop > start
  ]
  order += [(step, 0, REFILL) for step in refilled]
  order += [(step, -1, VALIDATE) for step in validated]
  order.sort(key=lambda need: need[:2])
  return list(dict.fromkeys(kind for *_, kind in order))


def work(
  config,
  start: int,
  refilled: Sequence[int] = (),
  validated: Sequence[int] = (),
) -> Counter[Hashable]:
  """How often a run does what from a step on, its baseline included."""
  counts = Counter()
  for phase in phases(config):
    counts[phase.active] += max(phase.stop - max(phase.start, start), 0)
  if config.baseline:
    first, last = learning_steps(config, "segmenter")
    counts["segmenter",] += last - first
  counts[REFILL] = len(refilled)
  counts[VALIDATE] = len(validated)
  counts[SAVE] = len(saves(config, start))
  return counts


def due(step: int, every: int) -> bool:
  """Whether what happens every so many steps does at this one; 0 is never."""
  return bool(every) and step % every == 0


def saves(config, start: int = 0) -> list[int]:
  """The steps after `start` at which a checkpoint is saved."""
  total, every = config.train.steps, config.checkpoint.every
  regular = {s for s in range(start + 1, total) if due(s, every)}
  return sorted(regular | ({total} if start < total else set()))


def plan(config, filled: bool) -> str:
  """What a run will do, for people: a line for each phase and for the rest.

  Args:
    config: the run's config.
    filled: whether its banks have cases.
  """
  names = {(): "nothing learns"}
  rows = [
    (f"{p.start} to {p.stop}", names.get(p.active, ", ".join(p.active)))
    for p in phases(config)
  ]
  steps = refills(config) if filled else []
  if steps:
    more = f", then every {config.bank.every} steps" if len(steps) > 1 else ""
    rows.append(("bank", f"filled at step {steps[0]}{more}"))
  every, keep = config.checkpoint.every, config.checkpoint.keep
  kept = f"the newest {keep} are kept" if keep else "all are kept"
  when = f"every {every} steps and at the end" if every else "at the end"
  rows.append(("checkpoints", f"{when}, {kept}"))
  steps = validations(config)
  if steps:
    text = f"after step {steps[0]}"
    if len(steps) > 1:
      text += f", then every {config.evaluation.every} steps"
    if config.evaluation.patience:
      text += f"; ends the run after {config.evaluation.patience} in vain"
    rows.append(("validation", f"{text}; the best is kept"))
  if config.baseline:
    start, stop = learning_steps(config, "segmenter")
    rows.append(("baseline", f"{stop - start} steps of the segmenter alone"))
  width = max(len(title) for title, _ in rows)
  lines = [f"  {title:<{width}}  {text}" for title, text in rows]
  return "\n".join([f"plan of {config.train.steps} steps:", *lines])
