"""What was found in a directory of patients: counted, and in words."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

SHOWN = 8  # cases that a line names


@dataclasses.dataclass(frozen=True)
class Report:
  """What was found in a directory of npz files.

  Attributes:
    settings: what the data was prepared from and how.
    dialects: cases by dialect.
    sizes: cases by native size, "H x W".
    counts: split -> attribute -> group name -> cases.
    set_aside: (file, reason) of every case that is not used.
    notes: other findings, one sentence each.
    left_out: cases that the csv leaves out on purpose, by its word.
    round_trip: structure -> mean and least Dice of the masks with what their
      clouds give back; disc, cup and rim for a fundus.
    worst: (file, Dice of each) of the cases that fare worst there.
    digests: split -> SHA-256 of its prepared cases.
    domain: as `domain.to_json` gives it; {} for fundus.
    vocabulary: words of every attribute; {} for those of Harvard-FairSeg.
  """

  settings: dict[str, Any]
  dialects: dict[str, int]
  sizes: dict[str, int]
  counts: dict[str, dict[str, dict[str, int]]]
  set_aside: list[tuple[str, str]]
  notes: list[str]
  left_out: dict[str, int] = dataclasses.field(default_factory=dict)
  round_trip: dict[str, dict[str, float]] = dataclasses.field(
    default_factory=dict
  )
  worst: list[tuple[Any, ...]] = dataclasses.field(default_factory=list)
  digests: dict[str, str] = dataclasses.field(default_factory=dict)
  domain: dict[str, Any] = dataclasses.field(default_factory=dict)
  vocabulary: dict[str, list[str]] = dataclasses.field(default_factory=dict)

  @property
  def usable(self) -> int:
    """Number of cases that are neither set aside nor left out."""
    return sum(self.dialects.values())

  def __str__(self) -> str:
    settings = {k: plain(v) for k, v in self.settings.items()}
    settings["dialects"] = _tally(self.dialects)
    settings["sizes"] = _tally(self.sizes)
    lines = [f"{k:<12}{v}" for k, v in settings.items()]
    lines += self._count_lines() + self._round_trip_lines() + ["", *self.notes]
    if self.left_out:
      lines.append(
        f"{sum(self.left_out.values())} cases are left out, as their use says"
        f" ({_tally(self.left_out)})."
      )
    lines.append(
      f"{self.usable} cases usable, {len(self.set_aside)} set aside"
      + (":" if self.set_aside else ".")
    )
    files: dict[str, list[str]] = {}
    for file, reason in self.set_aside:
      files.setdefault(reason, []).append(file)
    lines += [f"  {named(found)}  {why}" for why, found in files.items()]
    return "\n".join(lines)

  def _count_lines(self) -> list[str]:
    """A table of cases by split and group."""
    splits = list(self.counts)
    if not splits:
      return []
    lines = ["", f"{'':<29}" + "".join(f"{s:>8}" for s in splits)]
    for attribute, groups in self.counts[splits[0]].items():
      for i, group in enumerate(groups):
        label = f"{attribute if i == 0 else '':<14} {group:<14}"
        numbers = (self.counts[s][attribute][group] for s in splits)
        lines.append(label + "".join(f"{n:>8}" for n in numbers))
    return lines

  def _round_trip_lines(self) -> list[str]:
    """A table of Dice, and of the cases with the least."""
    if not self.round_trip:
      return []
    rows = [
      (row, *(self.round_trip[s][row] for s in self.round_trip))
      for row in ("mean", "least")
    ]
    points = self.settings.get("num_points", "all")
    widths = [max(8, len(s) + 2) for s in self.round_trip]
    title = f"masks from {points} points, Dice"
    lines = [
      "",
      f"{title:<29}"
      + "".join(
        f"{s:>{w}}" for s, w in zip(self.round_trip, widths, strict=True)
      ),
    ]
    for label, *scores in rows + self.worst:
      cells = (f"{x:>{w}.4f}" for x, w in zip(scores, widths, strict=True))
      lines.append(f"{label:<29}" + "".join(cells))
    return lines


def named(cases: Sequence[str]) -> str:
  """The first of some cases, and how many more there are."""
  more = len(cases) - SHOWN
  return ", ".join(cases[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def plain(value: Any) -> str:
  """A setting as text, such as '256 x 256'."""
  if isinstance(value, list | tuple):
    return " x ".join(str(v) for v in value)
  return str(value)


def _tally(counts: Mapping[str, int]) -> str:
  return ", ".join(f"{name}: {n}" for name, n in counts.items()) or "none"
