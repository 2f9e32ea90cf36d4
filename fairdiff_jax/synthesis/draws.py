"""Drawing cases until they are fit to be shared, each within a budget.

What is refused is drawn again from other noise, counted and listed. A case is
a function of (averaged parameters, seed, its number, its group, its draw), and
so can be made again alone.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from fairdiff_jax.data.domain import Domain
from fairdiff_jax.synthesis.generate import Generated, join

EXPORT = 3  # tells the noise of further draws from that of other cases
BUDGET = 20  # draws of a case
Range = tuple[float, float]


class Gate(Protocol):
  """What synthetic cases must pass before they are shared."""

  def check(
    self, image: np.ndarray, mask: np.ndarray, group: np.ndarray
  ) -> list[str]:
    """Why each case is refused; '' for one that passes."""

  def measure(
    self, image: np.ndarray, mask: np.ndarray, group: np.ndarray
  ) -> dict[str, Any]:
    """Figures of the cases that passed, for their data card."""


class Drawn(NamedTuple):
  """Cases that were accepted.

  Attributes:
    cases: they.
    draw: which draw each is [n], from 0 on.
    refused: why each earlier draw was refused [n].
  """

  cases: Generated
  draw: np.ndarray
  refused: list[list[str]]


def seed_of(seed: int, draw: int) -> int | tuple[int, ...]:
  """That of a draw's noise."""
  return (seed, draw, EXPORT) if draw else seed


def draw_accepted(
  make: Callable[[int | tuple[int, ...], np.ndarray, np.ndarray], Generated],
  seed: int,
  number: np.ndarray,
  group: np.ndarray,
  *,
  gate: Gate | None = None,
  budget: int = BUDGET,
) -> Drawn:
  """Cases of given numbers, drawn until they are sound and pass the gate.

  Args:
    make: (seed, number [k], group [k]) -> cases.
    seed: of all noise.
    number: of the cases [n].
    group: their groups [n].
    gate: what they must pass.
    budget: draws of a case.

  Raises:
    ValueError: some cases used their budget up.
  """
  cases: list[Generated] = [None] * len(number)
  draws, refused = np.zeros(len(number), int), [[] for _ in number]
  pending = np.arange(len(number))
  for draw in range(budget):
    made = make(seed_of(seed, draw), number[pending], group[pending])
    why = made.fault.tolist()
    sound = np.flatnonzero(made.sound)
    if gate and len(sound):
      rows = made.take(sound)
      checked = gate.check(rows.image, rows.mask, group[pending][sound])
      for i, reason in zip(sound, checked, strict=True):
        why[i] = reason
    for row, (i, reason) in enumerate(zip(pending, why, strict=True)):
      cases[i], draws[i] = made.take(slice(row, row + 1)), draw
      if reason:
        refused[i].append(reason)
    pending = pending[[bool(reason) for reason in why]]
    if not len(pending):
      break
  if len(pending):
    faults = Counter(reason for i in pending for reason in refused[i])
    listed = ", ".join(f"{why}: {n}" for why, n in faults.most_common())
    raise ValueError(
      f"{len(pending)} of {len(number)} cases were refused in all of their"
      f" {budget} draws ({listed}): train the generators longer, ask for less"
      " extreme ratios, or give more draws (--budget)"
    )
  size, channels = cases[0].mask.shape[1:], cases[0].image[0, 0, 0].size
  return Drawn(join(cases, size, channels), draws, refused)


def parse_ratios(texts: Sequence[str], domain: Domain) -> dict[str, Range]:
  """Reads ['cup to disc=0.3:0.6'] as {ratio: (low, high)}.

  Raises:
    ValueError: not of that form, or no ratio of the domain.
  """
  found = {}
  known = {name.replace(" ", "-"): name for name in domain.ratios}
  for text in texts:
    name, _, ends = (part.strip() for part in text.partition("="))
    name = known.get(name.replace(" ", "-").replace("_", "-"))
    if name is None:
      names = ", ".join(map(repr, domain.ratios)) or "none"
      raise ValueError(
        f"{text!r} is of no ratio of the domain, which has {names}"
      )
    try:
      low, high = map(float, ends.split(":"))
    except ValueError:
      low, high = 1.0, 0.0
    if not 0 <= low <= high:
      raise ValueError(
        f"{text!r} is not RATIO=LOW:HIGH, such as '{name}=0.3:0.6'"
      )
    found[name] = low, high
  return found


def out_of_range(
  ratios: Mapping[str, Range], domain: Domain
) -> Callable[[np.ndarray], str]:
  """mask [H, W] -> which ratio of areas is out of its range, or ''."""

  def fault(mask: np.ndarray) -> str:
    found = measure_ratios(mask, domain)
    for name, (low, high) in ratios.items():
      value = found[name]
      if value is None or not low <= value <= high:
        return f"{name} not in {low:g} to {high:g}"
    return ""

  return fault


def measure_ratios(mask: np.ndarray, domain: Domain) -> dict[str, float | None]:
  """The domain's ratios of areas of a mask; None where one is undefined."""
  return domain.ratios_of(domain.areas(mask))
