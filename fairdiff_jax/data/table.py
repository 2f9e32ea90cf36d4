"""Patients in a table: a csv file that names an image and a mask a row.

Columns: `image` and `mask`, paths from the csv on; `split`, which is training,
validation or test; `patient`, if there is one, who may be in one split only.
Every other column is an attribute, but `synthetic`, which is 1 for one who is
made up; a PNG file may say so too, and `manifest.jsonl` beside the csv.

A mask is a label image with the values of the domain's structures, or one file
per structure, separated by ';' in the domain's order, with an empty place for a
structure that the patient lacks; there, what is not 0 is the structure.

Images are PNG, JPEG, TIFF, NPY or DICOM (with pydicom, the extra `dicom`), grey
or colour, as the domain's channels say: colour becomes grey by its luma, grey
is repeated. 8 bits are taken as they are. Of 16 bits, and other numbers, there
is no common scale: from the 0.5th to the 99.5th percentile of an image its
values become 0 to 255.
"""

import functools
import io
import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fairdiff_jax import files
from fairdiff_jax.data.attributes import UNKNOWN, UNKNOWN_WORDS
from fairdiff_jax.data.cases import Case, NotAsDeclared, Source
from fairdiff_jax.data.domain import Domain

REQUIRED = ("image", "mask", "split")
SYNTHETIC = "synthetic"  # the column, and the text of a PNG file
MANIFEST = "manifest.jsonl"  # of synthetic cases: a line each, with its file
SPLITS = {
  "training": "train",
  "train": "train",
  "validation": "validation",
  "val": "validation",
  "test": "test",
}
ENDS = (0.5, 99.5)  # percentiles that become black and white


class Row(NamedTuple):
  """A patient who is not read yet.

  Attributes:
    name: of the case.
    image: path.
    masks: paths, None for a structure that is absent.
    split: "train", "validation" or "test".
    codes: indices into the words of every attribute, -1 unknown.
    patient: '' where the table does not say.
    synthetic: whether the table, or a manifest beside it, says so.
  """

  name: str
  image: Path
  masks: tuple[Path | None, ...]
  split: str
  codes: dict[str, int]
  patient: str = ""
  synthetic: bool = False


class Table(NamedTuple):
  """Patients who are not read yet, and their attributes' words."""

  rows: list[Row]
  vocabulary: dict[str, tuple[str, ...]]


def read(path: str | os.PathLike, domain: Domain) -> Table:
  """Reads a table and looks whether its files are there.

  Raises:
    FileNotFoundError: no such table, or a file that it names.
    ValueError: it lacks a column or rows, or says what cannot be; the message
      names what.
  """
  path = Path(path)
  columns, lines = files.read_csv(path)
  for column in REQUIRED:
    if column not in columns:
      raise ValueError(
        f"{path} has no column {column!r}; it needs {', '.join(REQUIRED)}, and"
        f" its columns are {', '.join(columns) or '(none)'}"
      )
  if not lines:
    raise ValueError(f"{path} holds no case")
  others = (*REQUIRED, "patient", SYNTHETIC)
  names = [c for c in columns if c not in others]
  if not names:
    raise ValueError(
      f"{path} has no attribute: every column besides image, mask, split,"
      " patient and synthetic is one; add some, such as sex"
    )
  vocabulary = {name: _words([line[name] for line in lines]) for name in names}
  codes = {
    name: {word: i for i, word in enumerate(words)}
    for name, words in vocabulary.items()
  }
  made_up = synthetic_files(path.parent)
  rows = []
  for name, number, line in zip(
    _case_names(path, lines), range(2, len(lines) + 2), lines, strict=True
  ):
    split = SPLITS.get(line["split"].strip().lower())
    if split is None:
      raise ValueError(
        f"{path}, line {number}: split is {line['split']!r}; write training,"
        " validation or test"
      )
    found = {a: codes[a].get(line[a].strip(), UNKNOWN) for a in names}
    masks = _masks(line["mask"], path, number, domain)
    patient = line.get("patient", "").strip()
    image = _beside(path, line["image"])
    synthetic = image.name in made_up or is_yes(line.get(SYNTHETIC, ""))
    rows.append(Row(name, image, masks, split, found, patient, synthetic))
  _check_patients(path, rows)
  _check_files(path, rows)
  return Table(rows, vocabulary)


def open_table(path: str | os.PathLike, domain: Domain) -> Source:
  """The cases of a table; raises as `read`."""
  found = read(path, domain)
  return Source(
    name=Path(path).name,
    items=found.rows,
    names=[row.name for row in found.rows],
    read=lambda row: (row.split, read_case(row, domain), ()),
    parts=("train", "validation", "test"),
    strict=False,
    domain=domain,
    vocabulary=found.vocabulary,
  )


def read_case(row: Row, domain: Domain) -> Case:
  """Reads a patient.

  Returns:
    A case with image uint8 [H, W], or [H, W, 3] where the domain has three
    channels, and a mask of classes.

  Raises:
    NotAsDeclared: the mask holds a value that no structure has.
    ValueError: a file cannot be read, or mask and image differ in size.
  """
  image, kind = read_image(row.image, domain.channels)
  mask = _read_mask(row, domain, image.shape[:2])
  synthetic = row.synthetic or _says_synthetic(row.image)
  return Case(
    *(image, mask, row.codes, kind),
    patient=row.patient,
    synthetic=synthetic,
  )


def is_yes(cell: str) -> bool:
  """Whether a cell of the column `synthetic` says that a case is."""
  return cell.strip().lower() not in ("", "0", "no", "false")


def synthetic_files(directory: Path) -> set[str]:
  """Names of the files that a manifest in a directory calls synthetic.

  Raises:
    ValueError: it is damaged.
  """
  path = directory / MANIFEST
  if not path.is_file():
    return set()
  lines = files.read_json_lines(path)
  return {str(line.get("file")) for line in lines if line.get(SYNTHETIC)}


def _says_synthetic(path: Path) -> bool:
  if path.suffix.lower() != ".png":
    return False
  with Image.open(path) as image:
    image.load()  # a text may follow the pixels
    return is_yes(str(image.info.get(SYNTHETIC, "")))


def read_image(path: Path, channels: int) -> tuple[np.ndarray, str]:
  """An image as uint8 [H, W] or [H, W, 3], and its format in words."""
  pixels = _pixels(path, label=False)
  kind = f"{path.suffix[1:].lower()}, {pixels.dtype}"
  return to_uint8(pixels, channels, str(path)), kind


def to_uint8(pixels: np.ndarray, channels: int, what: str) -> np.ndarray:
  """An image's pixels as uint8 [H, W], or RGB [H, W, 3].

  Args:
    pixels: [H, W], [H, W, C], of any numbers; scaled unless they are uint8.
    channels: 1 or 3.
    what: names the image in messages.

  Raises:
    ValueError: it is no image, has NaN, or shows nothing.
  """
  if pixels.ndim == 3 and pixels.shape[-1] in (2, 4):  # the last is opacity
    pixels = pixels[..., :-1]
  if pixels.ndim == 3 and pixels.shape[-1] == 1:
    pixels = pixels[..., 0]
  colour = pixels.ndim == 3 and pixels.shape[-1] == 3
  if not pixels.size or not (colour or pixels.ndim == 2):
    raise ValueError(
      f"{what} has shape {pixels.shape}; needed is one image, grey [H, W] or"
      " colour [H, W, 3]"
    )
  if not np.isfinite(pixels).all():
    raise ValueError(f"{what} has pixels that are NaN or infinite")
  if pixels.min() == pixels.max():
    raise ValueError(f"{what} shows nothing: every pixel is {pixels.min()}")
  if pixels.dtype != np.uint8:
    low, high = np.percentile(pixels, ENDS)
    if low == high:
      low, high = pixels.min(), pixels.max()
    scaled = (pixels.astype(np.float64) - low) / (float(high) - float(low))
    pixels = np.rint(255 * scaled).clip(0, 255).astype(np.uint8)
  if channels == 1 and colour:
    pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
  if channels == 3 and not colour:
    pixels = np.repeat(pixels[..., None], 3, axis=-1)
  return np.ascontiguousarray(pixels)


def write_png(
  path: str | os.PathLike, pixels: np.ndarray, **texts: str
) -> None:
  """Writes uint8 or uint16 [H, W], or RGB [H, W, 3], with texts by keyword."""
  if texts:
    told = PngInfo()
    for keyword, text in texts.items():
      told.add_text(keyword, text)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "png", pnginfo=told)
    files.write(path, data.getvalue())
    return
  if pixels.ndim == 3:
    pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
  files.write(path, cv2.imencode(".png", pixels)[1].tobytes())


def _read_mask(row: Row, domain: Domain, shape: tuple[int, ...]) -> np.ndarray:
  def pixels(path):
    found = _pixels(path, label=True)
    if found.ndim == 3 and (found == found[..., :1]).all():  # grey as colour
      found = found[..., 0]
    if found.ndim != 2:
      raise ValueError(
        f"{path} has shape {found.shape}; needed is a label image [H, W]"
      )
    if found.shape != tuple(shape):
      raise ValueError(
        f"{path} is {found.shape[0]} x {found.shape[1]} and its image"
        f" {shape[0]} x {shape[1]}; they must be two views of the same pixels"
      )
    return found

  if len(row.masks) > 1:
    regions = {
      name: np.zeros(shape, bool) if path is None else pixels(path) != 0
      for name, path in zip(domain.names, row.masks, strict=True)
    }
    return domain.paint(regions)
  path = row.masks[0]
  if path is None:
    return np.zeros(shape, np.uint8)
  return _classes(pixels(path), domain, path)


def read_label(path: Path, domain: Domain) -> np.ndarray:
  """A label image as classes uint8 [H, W].

  Raises:
    NotAsDeclared: it holds a value that no structure has.
    ValueError: it cannot be read, or is none.
  """
  label = _pixels(path, label=True)
  if label.ndim == 3 and (label == label[..., :1]).all():
    label = label[..., 0]
  if label.ndim != 2:
    raise ValueError(
      f"{path} has shape {label.shape}; needed is a label image [H, W]"
    )
  return _classes(label, domain, path)


def _classes(label: np.ndarray, domain: Domain, path: Path) -> np.ndarray:
  classes = domain.value_classes
  mask = np.zeros(label.shape, np.uint8)
  for value in np.unique(label):
    if value not in classes:
      raise NotAsDeclared(
        f"{path} holds the value {value:g}, which is no structure's; the"
        f" domain declares {', '.join(map(str, sorted(classes)))}: add it to"
        " the structures in domain.json, or correct the mask"
      )
    mask[label == value] = classes[int(value)]
  return mask


def _pixels(path: Path, *, label: bool) -> np.ndarray:
  """A file's pixels [H, W] or [H, W, C], colours in the order RGB."""
  suffix = path.suffix.lower()
  try:
    if suffix in _READERS:
      return _READERS[suffix](path)
    with Image.open(path) as image:
      if getattr(image, "n_frames", 1) > 1:
        raise ValueError(f"it has {image.n_frames} pages; keep one")
      if not label and image.format in ("PNG", "TIFF"):
        return _decode(path)  # Pillow makes 8 bits of a colour's 16
      if image.mode == "1":
        image = image.convert("L")
      if image.mode in ("L", "LA", "P", "RGB", "RGBA", "I;16", "I", "F"):
        return np.asarray(image)
      if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16)
      return np.asarray(image.convert("RGB"))
  except ImportError:
    raise
  except Exception as error:
    why = " ".join(str(error).split())
    raise ValueError(
      f"{path} cannot be read as an image ({why}); export it again as PNG"
    ) from error


def _decode(path: Path) -> np.ndarray:
  found = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
  if found is None:
    raise ValueError("OpenCV cannot decode it")
  order = [2, 1, 0, 3]
  return found[..., order[: found.shape[-1]]] if found.ndim == 3 else found


def _dicom(path: Path) -> np.ndarray:
  try:
    import pydicom
  except ImportError as error:
    raise ImportError(
      f"{path} is DICOM, which the package pydicom reads: pip install"
      " 'fairdiff_jax[dicom]', or export it as PNG"
    ) from error
  data = pydicom.dcmread(path)
  pixels = data.pixel_array
  if data.get("PhotometricInterpretation") == "MONOCHROME1":  # white is 0
    pixels = pixels.max() - pixels
  return pixels


# What reads files that Pillow does not, by ending: path -> pixels [H, W] or
# [H, W, C].
_READERS: dict[str, Callable[[Path], np.ndarray]] = {
  ".npy": functools.partial(np.load, allow_pickle=False),
  ".dcm": _dicom,
  ".dicom": _dicom,
}


def _words(cells: list[str]) -> tuple[str, ...]:
  """The words of a column, in order; numbers by size."""
  words = {cell.strip() for cell in cells}
  words = {word for word in words if word.lower() not in UNKNOWN_WORDS}

  def key(word):
    try:
      return 0, float(word), word
    except ValueError:
      return 1, 0.0, word

  return tuple(sorted(words, key=key))


def _case_names(path: Path, lines: list[Mapping[str, str]]) -> list[str]:
  """The images' stems, or their paths where two stems are one."""
  paths = [line["image"].strip().replace("\\", "/") for line in lines]
  twice = [p for p, count in Counter(paths).items() if count > 1]
  if twice:
    raise ValueError(f"{path} has {twice[0]} in two rows; keep one")
  stems = [Path(p).stem for p in paths]
  return stems if len(set(stems)) == len(stems) else paths


def _beside(path: Path, name: str) -> Path:
  return path.parent / name.strip().replace("\\", "/")


def _masks(
  cell: str, path: Path, number: int, domain: Domain
) -> tuple[Path | None, ...]:
  parts = [part.strip() for part in cell.split(";")]
  if len(parts) not in (1, len(domain.structures)):
    raise ValueError(
      f"{path}, line {number}: mask names {len(parts)} files; give one label"
      f" image, or one file for each of {', '.join(domain.names)}"
    )
  return tuple(_beside(path, part) if part else None for part in parts)


def _check_patients(path, rows):
  """Raises ValueError if a patient is in two splits."""
  splits: dict[str, set[str]] = {}
  for row in rows:
    if row.patient:
      splits.setdefault(row.patient, set()).add(row.split)
  torn = [patient for patient, of in splits.items() if len(of) > 1]
  if torn:
    more = f" and {len(torn) - 5} more" if len(torn) > 5 else ""
    raise ValueError(
      f"{path}: in two splits are the patients {', '.join(torn[:5])}{more};"
      " put all cases of a patient into one split"
    )


def _check_files(path, rows):
  """Raises FileNotFoundError if a file that rows name is not there."""
  named = [p for row in rows for p in (row.image, *row.masks) if p]
  lost = [p for p in named if not p.is_file()]
  if lost:
    more = f", and {len(lost) - 1} other files are not" if lost[1:] else ""
    raise FileNotFoundError(
      f"{path} names {lost[0]}, which is not there{more}; correct the table,"
      " or restore the files"
    )
