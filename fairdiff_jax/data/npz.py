"""Files of Harvard-FairSeg: one npz file per case, and data_summary.csv.

`read_case` takes every dialect of `attributes.DIALECTS`; `write_case` and
`write_summary` write the current release's. Files appear complete or not at
all.

Grey levels, in one place: whole numbers and floating point from 0 to 255 are
levels, floating point from 0 to 1 is multiplied by 255; half a level beyond is
clipped. What could be either, and what shows nothing, is refused.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fairdiff_jax import array_files, files
from fairdiff_jax.data import attributes
from fairdiff_jax.data.cases import Case

MASK_CODES = {0: 0, -1: 1, -2: 2}  # file -> background, rim, cup
HALF_LEVEL = 0.5 / 255  # of grey, in an image from 0 to 1
LEAST_MAXIMUM = 16  # of an image in floating point from 0 to 255
MOST_PIXELS = 2**27  # bytes of an image or mask: 4096 x 4096 of float64
MOST_VALUE = 4096  # bytes of an attribute
SUMMARY = "data_summary.csv"
SYNTHETIC = "synthetic"  # the array, 1 in a file whose patient is made up
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


def read_case(path: str | os.PathLike) -> Case:
  """Reads and checks one npz file.

  Raises:
    OSError: there is no such file, or none that may be read.
    ValueError: the file cannot be used; the message names it, says what is
      wrong with it and what to do.
  """
  keys = {key for keys in attributes.KEYS.values() for key in keys}
  keys.add(SYNTHETIC)
  values = array_files.read_npz(path, keys, limit=MOST_VALUE)
  codes, dialect, unread = _read_attributes(values, path)
  form = attributes.DIALECTS[dialect]
  arrays = array_files.read_npz(
    path, (form.image, form.mask), limit=MOST_PIXELS
  )
  image = _check_image(arrays[form.image], f"{path}: {form.image}")
  mask = _check_mask(arrays[form.mask], f"{path}: {form.mask}")
  if image.shape != mask.shape:
    raise ValueError(
      f"{path}: image {_by(image.shape)} and mask {_by(mask.shape)} "
      "differ in size; they must be two views of the same pixels."
    )
  made_up = values.get(SYNTHETIC)
  synthetic = made_up is not None and bool(np.any(made_up))
  return Case(image, mask, codes, dialect, unread, synthetic=synthetic)


def parse(
  attribute: str, value: Any, *, dialect: str = "current"
) -> tuple[float, bool]:
  """Returns an attribute's code, or the age, and whether it could be read.

  What cannot be read is unknown, -1.
  """
  try:
    if attribute == "age":
      return attributes.parse_age(value, dialect=dialect), True
    code = attributes.parse_attribute(attribute, value, dialect=dialect)
    return code, True
  except ValueError:
    return attributes.UNKNOWN, False


def write_case(
  path: str | os.PathLike,
  image: np.ndarray,
  mask: np.ndarray,
  codes: Mapping[str, int],
  **extra: int | str,
) -> None:
  """Writes one npz file; the same case gives the same bytes.

  Args:
    path: of the file.
    image: uint8 [H, W].
    mask: uint8 [H, W], 0 background, 1 rim, 2 cup.
    codes: canonical codes of attributes, and `age` in years; what is missing
      is unknown.
    **extra: further whole numbers and texts to store.
  """
  form = attributes.DIALECTS["current"]
  stored = {key: codes.get(key, attributes.UNKNOWN) for key in attributes.KEYS}
  pixels = {
    form.image: image,
    form.mask: np.array(list(MASK_CODES), float)[mask],
  }
  values = {
    key: np.str_(value) if isinstance(value, str) else np.int64(value)
    for key, value in (stored | extra).items()
  }
  files.write(path, array_files.npz_bytes(pixels | values))


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
  columns = [*COLUMNS, *(key for key in first if key not in COLUMNS)]
  table = []
  for row in rows:
    names = {
      a: attributes.group_name(a, row.get(a, attributes.UNKNOWN))
      for a in attributes.ATTRIBUTES
    }
    words = {a: WORDS.get(name, name.lower()) for a, name in names.items()}
    age = row.get("age", attributes.UNKNOWN)
    words["age"] = "unknown" if age == attributes.UNKNOWN else age
    table.append([{**row, **words}[column] for column in columns])
  files.write_csv(Path(directory) / SUMMARY, columns, table)


def find_summary(source: Path) -> Path | None:
  places = (source, source / "ReadMe", source.parent / "ReadMe")
  return next((p / SUMMARY for p in places if (p / SUMMARY).is_file()), None)


def read_summary(
  source: Path, *, required: bool
) -> dict[str, list[dict[str, str]]]:
  """Reads data_summary.csv as {case: its rows}; {} where there is none.

  Raises:
    FileNotFoundError: there is none, and it is required.
    ValueError: it cannot be read, or lacks a column.
  """
  path = find_summary(source)
  if path is None:
    if required:
      raise FileNotFoundError(
        f"{source} has no {SUMMARY}, neither in itself nor in a folder ReadMe, "
        "and the split 'use' is read from it. Add it, or give a list of the "
        "training cases as --config.data.split."
      )
    return {}
  columns, table = files.read_csv(path)
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
  rows = {}
  for row in table:
    rows.setdefault(case_key(row["filename"]), []).append(row)
  return rows


def case_key(name: str) -> str:
  """Makes data_00012.npz, data_000012 and lists/Data_00012.NPZ one name."""
  stem = name.strip().replace("\\", "/").rsplit("/", 1)[-1].lower()
  return re.sub(r"^data_0*(?=\d)", "data_", stem.removesuffix(".npz"))


def _read_attributes(
  arrays: Mapping[str, np.ndarray | None], path: str | os.PathLike
) -> tuple[dict[str, float], str, tuple[tuple[str, str], ...]]:
  """Returns codes by attribute, the dialect, and what could not be read."""

  def value(attribute):
    found = (k for k in attributes.KEYS[attribute] if k in arrays)
    return arrays.get(next(found, ""))

  values = {attribute: value(attribute) for attribute in attributes.KEYS}
  unread = []
  try:
    dialect = attributes.detect_dialect(
      arrays, race=values["race"], age=values["age"]
    )
  except ValueError:
    dialect = attributes.detect_dialect(arrays, file=str(path))
    unread.append(("race", f"{values.pop('race')} without an age"))
    values["race"] = None
  codes = {}
  for attribute, found in values.items():
    codes[attribute], known = parse(attribute, found, dialect=dialect)
    if not known:
      shown = attributes.text(found) or str(found)
      unread.append((attribute, " ".join(shown.split())))
  return codes, dialect, tuple(unread)


def _check_image(image: np.ndarray, where: str) -> np.ndarray:
  """Returns a grey image as [H, W] uint8."""
  if image.ndim != 2 or not image.size or image.dtype.kind not in "uif":
    raise ValueError(
      f"{where} has shape {image.shape} and type {image.dtype}; needed is one "
      "grey image [H, W] of numbers."
    )
  if not np.isfinite(image).all():
    raise ValueError(
      f"{where} has {int((~np.isfinite(image)).sum())} pixels that are NaN or "
      "infinite; export it again."
    )
  low, high = image.min(), image.max()
  again = "export it again, as uint8 from 0 to 255."
  if low == high:
    raise ValueError(f"{where} shows nothing: every pixel is {low:g}; {again}")
  if low == 0 and high == 1 and (image == np.rint(image)).all():
    raise ValueError(
      f"{where} shows no grey levels: every pixel is 0 or 1, as in a mask, or "
      f"in an image from 0 to 1 that was rounded; {again}"
    )
  if image.dtype == np.uint8:
    return image
  if image.dtype.kind == "f" and 1 + HALF_LEVEL < high < LEAST_MAXIMUM:
    raise ValueError(
      f"{where} goes from {low:g} to {high:g}, which could be from 0 to 1 "
      f"with values beyond it, or a dark one from 0 to 255; {again}"
    )
  scale = 255 if image.dtype.kind == "f" and high <= 1 + HALF_LEVEL else 1
  if low * scale < -0.5 or high * scale > 255.5:
    raise ValueError(
      f"{where} goes from {low:g} to {high:g}; needed is 0 to 255, or 0 to 1 "
      "in floating point."
    )
  return np.rint(image * scale).clip(0, 255).astype(np.uint8)


def _check_mask(mask: np.ndarray, where: str) -> np.ndarray:
  """Returns a mask in a file's codes as [H, W] uint8 {0, 1, 2}."""
  if mask.ndim != 2 or not mask.size or mask.dtype.kind not in "uif":
    raise ValueError(
      f"{where} has shape {mask.shape} and type {mask.dtype}; needed is one "
      "mask [H, W] of whole numbers (int8): 0 background, -1 rim and -2 cup."
    )
  disc, cup = mask < 0, mask == -2
  if not ((mask == 0) | (mask == -1) | cup).all():
    raise ValueError(f"{where} {_other_codes(mask)}")
  if not disc.any():
    raise ValueError(f"{where} shows no disc: every pixel is 0.")
  if not cup.any():
    raise ValueError(f"{where} shows no cup: no pixel is -2.")
  return disc.astype(np.uint8) + cup


def _other_codes(mask: np.ndarray) -> str:
  """What is wrong with the values of a mask, and what to do."""
  unknown = sorted(set(np.unique(mask).tolist()) - set(MASK_CODES))
  listed = ", ".join(f"{v:.17g}" for v in unknown[:8])
  listed += ", ..." * (len(unknown) > 8)
  codes = "a mask has 0 background, -1 rim and -2 cup"
  if mask.dtype.kind == "u" and set(unknown) <= {
    np.iinfo(mask.dtype).max - k for k in (0, 1)
  }:
    return (
      f"holds the values {listed}, which are -1 and -2 if the type "
      f"{mask.dtype}, which has no negative numbers, changed them; {codes}: "
      "save it as int8."
    )
  if any(v % 1 for v in unknown if np.isfinite(v)):
    return (
      f"holds the values {listed}, which are not whole numbers; {codes}: "
      "round them, or resize masks without interpolation, and save them as "
      "int8."
    )
  return f"holds the values {listed}; {codes}."


def _by(shape: Sequence[int]) -> str:
  return " x ".join(map(str, shape))
