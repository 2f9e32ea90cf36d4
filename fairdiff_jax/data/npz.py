"""Files of Harvard-FairSeg: one npz file per case, and data_summary.csv.

`read_case` takes every dialect of `attributes.DIALECTS`; `write_case` and
`write_summary` write the current release's. Files appear complete or not at
all.
"""

import csv
import io
import os
import re
import threading
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fairdiff_jax.data import attributes

# NumPy parses headers with `ast`, which fails now and then in threads of Python
# 3.11 (SystemError, CPython issue 106905).
_PARSING = threading.Lock()
MASK_CODES = {0: 0, -1: 1, -2: 2}  # file -> background, rim, cup
SUMMARY = "data_summary.csv"
COLUMNS = (
  "filename",
  "age",
  "gender",
  "race",
  "ethnicity",
  "language",
  "maritalstatus",
  "use",
)
# The csv's words, where they are not the names in ATTRIBUTES.
WORDS = {
  "Married": "married or partnered",
  "Separated": "legally separated",
}


class Case(NamedTuple):
  """One patient at native size.

  Attributes:
    image: [H, W] uint8.
    mask: [H, W] uint8, 0 background, 1 rim, 2 cup.
    attributes: canonical code of every key of ATTRIBUTES (-1 unknown), and
      `age` in years (-1 unknown).
    dialect: key of DIALECTS.
  """

  image: np.ndarray
  mask: np.ndarray
  attributes: dict[str, float]
  dialect: str


def read_case(path: str | os.PathLike) -> Case:
  """Reads and checks one npz file.

  Raises:
    ValueError: the file cannot be used; the message names it, says what is
      wrong with it and what to do.
  """
  path = Path(path)
  file = path.name
  arrays = _read_arrays(path)
  dialect = attributes.detect_dialect(
    arrays, race=arrays.get("race"), age=arrays.get("age"), file=file
  )
  keys = attributes.DIALECTS[dialect]
  image = _check_image(arrays[keys.image], f"{file}: {keys.image}")
  mask = _check_mask(arrays[keys.mask], f"{file}: {keys.mask}")
  if image.shape != mask.shape:
    raise ValueError(
      f"{file}: image {_by(image.shape)} and mask {_by(mask.shape)} "
      "differ in size; they must be two views of the same pixels."
    )

  def value(attribute):
    found = (k for k in attributes.KEYS[attribute] if k in arrays)
    return arrays.get(next(found, ""))

  where = {"dialect": dialect, "file": file}
  codes = {
    a: attributes.parse_attribute(a, value(a), **where)
    for a in attributes.ATTRIBUTES
  }
  codes["age"] = attributes.parse_age(value("age"), **where)
  return Case(image, mask, codes, dialect)


def write_case(
  path: str | os.PathLike,
  image: np.ndarray,
  mask: np.ndarray,
  codes: Mapping[str, int],
  **extra: int,
) -> None:
  """Writes one npz file; the same case gives the same bytes.

  Args:
    path: of the file.
    image: uint8 [H, W].
    mask: uint8 [H, W], 0 background, 1 rim, 2 cup.
    codes: canonical codes of attributes, and `age` in years; what is missing
      is unknown.
    **extra: further whole numbers to store.
  """
  form = attributes.DIALECTS["current"]
  stored = {key: codes.get(key, attributes.UNKNOWN) for key in attributes.KEYS}
  data = io.BytesIO()
  np.savez_compressed(
    data,
    **{form.image: image, form.mask: np.array(list(MASK_CODES), float)[mask]},
    **{key: np.int64(value) for key, value in (stored | extra).items()},
  )
  write_atomically(path, data.getvalue())


def write_summary(
  directory: str | os.PathLike, rows: Sequence[Mapping[str, Any]]
) -> None:
  """Writes data_summary.csv.

  Args:
    directory: where.
    rows: one per case: `filename`, `use`, canonical codes as in
      `write_case`, and the same further columns in every row.
  """
  first = next(iter(rows), {})
  further = [key for key in first if key not in COLUMNS]
  table = io.StringIO()
  writer = csv.DictWriter(table, [*COLUMNS, *further], lineterminator="\n")
  writer.writeheader()
  for row in rows:
    names = {
      a: attributes.group_name(a, row.get(a, attributes.UNKNOWN))
      for a in attributes.ATTRIBUTES
    }
    words = {a: WORDS.get(name, name.lower()) for a, name in names.items()}
    age = row.get("age", attributes.UNKNOWN)
    words["age"] = "unknown" if age == attributes.UNKNOWN else age
    writer.writerow({**row, **words})
  write_atomically(Path(directory) / SUMMARY, table.getvalue().encode())


def write_atomically(path: str | os.PathLike, data: bytes) -> None:
  """Writes a file under a temporary name and renames it."""
  temporary = Path(f"{path}.tmp")
  temporary.write_bytes(data)
  temporary.replace(path)


def find_summary(source: Path) -> Path | None:
  places = (source, source / "ReadMe", source.parent / "ReadMe")
  return next((p / SUMMARY for p in places if (p / SUMMARY).is_file()), None)


def read_summary(source: Path, *, required: bool) -> dict[str, dict[str, str]]:
  """Reads data_summary.csv as {case: row}; {} where there is none."""
  path = find_summary(source)
  if path is None:
    if required:
      raise FileNotFoundError(
        f"{source} has no {SUMMARY}, neither in itself nor in a folder ReadMe, "
        "and the split 'use' is read from it. Add it, or give a list of the "
        "training cases as --config.data.split."
      )
    return {}
  with path.open(newline="", encoding="utf-8-sig") as lines:
    reader = csv.DictReader(lines, restval="")
    columns = reader.fieldnames or []
    rows = list(reader)
  if "filename" not in columns:
    raise ValueError(
      f"{path} has no column 'filename'; its columns are "
      f"{', '.join(columns) or '(none)'}."
    )
  if required and not {"use", "train"} & set(columns):
    raise ValueError(
      f"{path} has no column 'use' (training or test) or 'train' (1 or 0); its "
      f"columns are {', '.join(columns)}."
    )
  return {case_key(row["filename"]): row for row in rows}


def case_key(name: str) -> str:
  """Makes data_00012.npz, data_000012 and lists/data_00012.npz one name."""
  stem = name.strip().replace("\\", "/").rsplit("/", 1)[-1]
  stem = stem.removesuffix(".npz")
  return re.sub(r"^data_0*(?=\d)", "data_", stem)


def _read_arrays(path: Path) -> dict[str, np.ndarray | None]:
  """Reads an npz file's arrays, None for those that no dialect needs."""
  if not zipfile.is_zipfile(path):
    raise ValueError(
      f"{path.name}: not a complete npz file ({path.stat().st_size} bytes); "
      "download or copy it again."
    )
  wanted = {k for d in attributes.DIALECTS.values() for k in (d.image, d.mask)}
  wanted.update(*attributes.KEYS.values())
  arrays, key = {}, None
  try:
    with _PARSING, np.load(path, allow_pickle=False) as npz:
      for key in npz.files:
        arrays[key] = npz[key] if key in wanted else None
  except (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    OSError,
    RuntimeError,  # a damaged header may ask for encryption or a new version
  ) as error:
    raise ValueError(
      f"{path.name}: cannot be read ({type(error).__name__}: {error}); "
      "download or copy it again."
    ) from error
  except ValueError as error:
    raise ValueError(
      f"{path.name}: array {key!r} cannot be read ({error}); pickled objects "
      "are refused because they can run code: save it as numbers."
    ) from error
  return arrays


def _check_image(image: np.ndarray, where: str) -> np.ndarray:
  """Returns a grey image as [H, W] uint8."""
  if image.ndim != 2 or image.dtype.kind not in "uif":
    raise ValueError(
      f"{where} has shape {image.shape} and type {image.dtype}; needed is one "
      "grey image [H, W] of numbers."
    )
  if image.dtype == np.uint8:
    return image
  if not np.isfinite(image).all():
    raise ValueError(
      f"{where} has {int((~np.isfinite(image)).sum())} pixels that are NaN or "
      "infinite; export it again."
    )
  low, high = image.min(), image.max()
  if low < 0 or high > 255:
    raise ValueError(
      f"{where} goes from {low:g} to {high:g}; needed is 0 to 255, or 0 to 1 "
      "in floating point."
    )
  if image.dtype.kind == "f" and high <= 1:
    image = image * 255
  return np.round(image).astype(np.uint8)


def _check_mask(mask: np.ndarray, where: str) -> np.ndarray:
  """Returns a mask in a file's codes as [H, W] uint8 {0, 1, 2}."""
  if mask.ndim != 2 or mask.dtype.kind not in "uif":
    raise ValueError(
      f"{where} has shape {mask.shape} and type {mask.dtype}; needed is one "
      "mask [H, W] of numbers."
    )
  unknown = sorted(set(np.unique(mask).tolist()) - set(MASK_CODES))
  if unknown:
    listed = ", ".join(f"{v:g}" for v in unknown[:8])
    more = ", ..." if len(unknown) > 8 else ""
    raise ValueError(
      f"{where} holds the values {listed}{more}; a mask has 0 background, "
      "-1 rim and -2 cup."
    )
  mask = (-mask.astype(np.int8)).astype(np.uint8)
  if not mask.any():
    raise ValueError(f"{where} shows no disc: every pixel is 0.")
  if not (mask == 2).any():
    raise ValueError(f"{where} shows no cup: no pixel is -2.")
  return mask


def _by(shape: Sequence[int]) -> str:
  return " x ".join(map(str, shape))
