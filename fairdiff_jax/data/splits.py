"""Who is trained on: the csv's column `use`, or a list of training cases.

A split is compared by its content: where a list or a csv lies, in which order
it names cases, and how it spells them, changes nothing.
"""

import difflib
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from fairdiff_jax import files
from fairdiff_jax.data.npz import (
  SUMMARY,
  case_key,
  find_summary,
  read_summary,
)

USES = {
  "training": "train",
  "train": "train",
  "1": "train",
  "test": "test",
  "0": "test",
  "validation": "validation",
  "val": "validation",
}
LEFT_OUT = ("unused",)  # words of the column, too


def describe(split: str, source: Path | None = None) -> str:
  """A split's name, and a fingerprint of its content if it can be read.

  Args:
    split: "use", or the path of a list.
    source: the directory of npz files.

  Returns:
    Such as 'train.txt (sha256 0123456789ab)', or 'train.txt' alone.

  Raises:
    ValueError: the list or the csv cannot be read.
  """
  if split == "use":
    if source is None or find_summary(source) is None:
      return split
    rows = read_summary(source, required=True)
    content = (f"{key} {_word(row)}" for key in rows for row in rows[key])
    return f"{split} {fingerprint(content)}"
  path = Path(split)
  if not path.is_file():
    return path.name
  return f"{path.name} {fingerprint(key for key, _ in _lines(path))}"


def fingerprint(lines: Iterable[str]) -> str:
  """'(sha256 0123456789ab)' of lines in any order."""
  text = "\n".join(sorted(lines))
  digest = hashlib.sha256(text.encode(errors="surrogateescape"))
  return f"(sha256 {digest.hexdigest()[:12]})"


def same(a: str, b: str) -> bool:
  """Whether two descriptions are of one content, or one name if it is lost."""
  names, _, contents = zip(
    *(x.partition(" (sha256 ") for x in (a, b)), strict=True
  )
  pair = contents if all(contents) else names
  return pair[0] == pair[1]


def part_of(key: str, rows: Mapping[str, Sequence[Mapping[str, str]]]) -> str:
  """Part of a case by the csv: "train", "validation", "test" or of LEFT_OUT.

  Raises:
    ValueError: it has no row, or one that says neither.
  """
  if key not in rows:
    raise ValueError(
      f"has no row in {SUMMARY}; add one, or give a list of the training cases "
      "as the split."
    )
  (row,) = rows[key]
  word = _word(row)
  if word not in {*USES.values(), *LEFT_OUT}:
    raise ValueError(
      f"its use in {SUMMARY} is {word!r}; write training or train or 1, "
      "validation or val, test or 0, or, to leave it out, "
      f"{' or '.join(LEFT_OUT)}."
    )
  return word


def hold_out(
  group: np.ndarray, patient: Sequence[str], share: float
) -> np.ndarray:
  """Chooses the cases of some patients, a share of every group.

  A patient belongs to the group of the first of the cases. Which patients are
  chosen depends on their names, groups and the share alone.

  Args:
    group: [n], -1 for unknown.
    patient: n names.
    share: of the cases, 0 to 1.

  Returns:
    Which are chosen, bool [n]: of a group the nearest that whole patients give
    to the share without all of them, one at least where it has several.
  """
  chosen = np.zeros(len(group), bool)
  index: dict[str, list[int]] = {}
  for i, name in enumerate(patient):
    index.setdefault(name, []).append(i)
  order = sorted(index, key=lambda p: hashlib.sha256(p.encode()).digest())
  for code in np.unique(group):
    names = [p for p in order if group[index[p][0]] == code]
    wanted = share * sum(len(index[p]) for p in names)
    taken = 0
    for name in names[:-1] if share else ():
      size = len(index[name])
      if taken and abs(taken + size - wanted) >= abs(taken - wanted):
        break
      chosen[index[name]] = True
      taken += size
  return chosen


def read_list(
  path: str | os.PathLike, present: Mapping[str, str], source: Path
) -> set[str]:
  """Reads a list of training cases, one file name or stem a line.

  Args:
    path: of the list.
    present: file name by key of every case in `source`.
    source: the directory of npz files.

  Returns:
    The cases' keys.

  Raises:
    ValueError: a line names no file, or two name one.
  """
  listed = {}
  lost = []
  for key, line in _lines(path):
    if key in listed:
      raise ValueError(
        f"{path} names one case twice, as {listed[key]!r} and {line!r}; remove "
        "one of the lines."
      )
    listed[key] = line
    if key not in present:
      lost.append(line)
  if lost:
    near = difflib.get_close_matches(case_key(lost[0]), present, n=1)
    hint = f" (did you mean {present[near[0]]}?)" if near else ""
    more = f", one of {len(lost)} such lines" if len(lost) > 1 else ""
    raise ValueError(
      f"{path}: the line {lost[0]!r} names no file in {source}{hint}{more}; "
      f"correct or remove {'them' if more else 'it'}."
    )
  return set(listed)


def _lines(path: str | os.PathLike) -> list[tuple[str, str]]:
  """(case, line) of every line that is not blank."""
  lines = map(str.strip, files.read_text(path).splitlines())
  return [(case_key(line), line) for line in lines if line]


def _word(row: Mapping[str, str]) -> str:
  word = row["use" if "use" in row else "train"].strip().lower()
  return USES.get(word, word)
