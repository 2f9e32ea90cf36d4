"""Harvard-FairSeg: a directory of npz files, in any of their dialects.

* Attributes: the npz decides; data_summary.csv fills what is unknown there.
  What nobody can read is unknown, and noted.
* Split: `use`, a column of data_summary.csv (training / validation / test; or
  `train`, 1 or 0), or a list of the training cases. The two published ones
  disagree, so the choice is recorded with the data. A case is there once: two
  files or two rows of one name are set aside.
"""

import collections
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fairdiff_jax import files
from fairdiff_jax.data import attributes, npz, splits
from fairdiff_jax.data.cases import Case, Source
from fairdiff_jax.data.domain import FUNDUS
from fairdiff_jax.data.npz import SUMMARY, case_key
from fairdiff_jax.data.report import named
from fairdiff_jax.data.table import SYNTHETIC, is_yes, synthetic_files

_LONGEST = 40  # characters of a value that a note quotes


def open_directory(directory: Path, split: str | None) -> Source:
  """The cases of a directory of npz files.

  Args:
    directory: of the files, with data_summary.csv in it or in its folder
      ReadMe (optional with a list file).
    split: "use", the path of a list of the training cases, or None for no
      split: all are of the part "all".

  Raises:
    FileNotFoundError: no such directory or list, no csv that is needed, or no
      file in it.
    ValueError: the csv or the list cannot be read.
  """
  paths = _require_files(directory)
  rows = {}
  if split is not None:
    rows = npz.read_summary(directory, required=split == "use")
  present = collections.defaultdict(list)
  for path in paths:
    present[case_key(path.name)].append(path.name)
  made_up = synthetic_files(directory)
  listed = None
  if split not in ("use", None):
    if not Path(split).is_file():
      raise FileNotFoundError(
        f"split {split!r} is neither 'use' nor a file that lists the training "
        "cases, one a line."
      )
    names = {key: found[0] for key, found in present.items()}
    listed = splits.read_list(split, names, directory)

  def part_of(key: str) -> str:
    if split is None:
      return "all"
    if listed is not None:
      return "train" if key in listed else "test"
    return splits.part_of(key, rows)

  def read(path: Path) -> tuple[str, Case | None, Sequence[str]]:
    key = case_key(path.name)
    row = rows.get(key, ())
    try:
      _require_one(path, present[key], row)
      part = part_of(key)
      if part in splits.LEFT_OUT:
        return part, None, ()
      case, differing = _fill(npz.read_case(path), *row)
      if path.name in made_up or any(
        is_yes(line.get(SYNTHETIC, "")) for line in row
      ):
        case = case._replace(synthetic=True)
      return part, case, differing
    except ValueError as error:
      raise ValueError(str(error).removeprefix(f"{path}: ")) from error

  return Source(
    name=directory.name,
    items=paths,
    names=[p.name.encode(errors="backslashreplace").decode() for p in paths],
    read=read,
    parts=("all",) if split is None else ("train", "validation", "test"),
    strict=True,
    domain=FUNDUS,
    vocabulary={},
    notes=lambda used: _notes(used, rows, present),
  )


def npz_files(source: Path) -> list[Path]:
  """Whatever is called like an npz file, by name; [] for no directory."""
  if not source.is_dir():
    return []
  return sorted(p for p in source.iterdir() if p.suffix.lower() == ".npz")


def _require_files(source: Path) -> list[Path]:
  """The files of a directory that must have some."""
  if not source.is_dir():
    raise FileNotFoundError(f"{source} is not a directory.")
  paths = npz_files(source)
  if not paths:
    raise FileNotFoundError(f"{source} holds no .npz files.")
  return paths


def _require_one(
  path: Path, twins: Sequence[str], rows: Sequence[Mapping[str, str]]
) -> None:
  """Raises ValueError unless a path is a file, and a case of its own."""
  if path.name.startswith(files.LEFTOVER):
    raise ValueError("was left half written when its writer ended; delete it.")
  try:
    path.name.encode()
  except UnicodeEncodeError:
    raise ValueError("its name is not UTF-8 text; rename it.") from None
  if not path.is_file():
    link = (
      f"a link to {os.readlink(path)}, which is" if path.is_symlink() else ""
    )
    raise ValueError(f"is {link or 'not a file and'} not there; restore it.")
  if path.suffix != ".npz":
    raise ValueError(f"ends in {path.suffix}; rename it to end in .npz.")
  if len(twins) > 1:
    raise ValueError(f"{named(twins)} are one case by their names; keep one.")
  if len(rows) > 1:
    spelled = named([row["filename"] for row in rows])
    raise ValueError(
      f"has {len(rows)} rows in {SUMMARY} ({spelled}); keep one."
    )


def _fill(
  case: Case, row: Mapping[str, str] | None = None
) -> tuple[Case, list[str]]:
  """Fills unknown attributes from a row of the csv.

  Returns:
    The case, and the attributes in which a known value of the csv differs.
  """
  codes, unread, differing = dict(case.attributes), list(case.unread), []
  for attribute in attributes.KEYS if row else ():
    word = row.get(attribute, "")
    code, known = npz.parse(attribute, word)
    if codes[attribute] == attributes.UNKNOWN:
      codes[attribute] = code
      if not known:
        unread.append((attribute, word))
    elif code not in (attributes.UNKNOWN, codes[attribute]):
      differing += [attribute] * (attribute in attributes.ATTRIBUTES)
  unread = [pair for pair in unread if codes[pair[0]] == attributes.UNKNOWN]
  return case._replace(attributes=codes, unread=tuple(unread)), differing


def _notes(
  used: Mapping[str, Any], rows: Mapping[str, Any], present: Mapping[str, Any]
) -> list[str]:
  """What is worth saying about cases that are used, one sentence each."""
  notes = []
  lost = len(rows.keys() - present.keys())
  if lost:
    notes.append(f"{lost} of {len(rows)} names in {SUMMARY} have no file.")
  differing = collections.Counter(a for f in used.values() for a in f.differing)
  notes += [
    f"{attribute}: {SUMMARY} differs from the npz in {n} cases; npz kept."
    for attribute, n in differing.items()
  ]
  unread = collections.defaultdict(collections.Counter)
  for found in used.values():
    for attribute, value in found.case.unread:
      unread[attribute][value] += 1
  for attribute, counts in unread.items():
    listed = [
      f"{value[:_LONGEST]!r} in {n} cases" for value, n in counts.most_common()
    ]
    notes.append(
      f"{attribute}: {named(listed)} cannot be read and count as unknown; "
      f"{attributes.accepted(attribute)}."
    )
  return notes
