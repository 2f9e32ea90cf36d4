"""Masks of a directory's images, as files.

`masks/NAME.png` are label images with the domain's values, at the image's own
size; `overlays/NAME.png` show their outlines in the image; `areas.csv` has
every mask's areas in pixels, and the domain's ratios; `unreadable.csv` lists
what could not be read, and why. What is there and whole is kept, so that the
same call goes on where it was stopped, and takes new images in; what is there
and is not what was written is named: nothing is overwritten.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from fairdiff_jax import array_files, files
from fairdiff_jax import config as configs
from fairdiff_jax.data import npz, table
from fairdiff_jax.data.attributes import DIALECTS
from fairdiff_jax.data.domain import Domain
from fairdiff_jax.evaluation.predictor import Predictor
from fairdiff_jax.evaluation.segmentation import key
from fairdiff_jax.synthesis.export import MANIFEST, REQUEST, require_request
from fairdiff_jax.synthesis.making import AGAIN, made_beside
from fairdiff_jax.synthesis.sheet import SHOWN, contact_sheet, outlined
from fairdiff_jax.training.checkpoint import fingerprint
from fairdiff_jax.training.trained import Trained

MASKS, OVERLAYS = "masks", "overlays"
AREAS, UNREADABLE, SHEET = "areas.csv", "unreadable.csv", "contact_sheet.png"


class Summary(NamedTuple):
  """What came of a directory.

  Attributes:
    segmented: images that have a mask now.
    kept: of these, those that had one before.
    unreadable: path in the directory, and why, of every file without a mask.
  """

  segmented: int
  kept: int
  unreadable: list[tuple[Path, str]]


def predict(
  trained: Trained, predictor: Predictor, images: str | Path, out: str | Path
) -> Summary:
  """Segments a directory's images, those in its folders too.

  Args:
    trained: the run.
    predictor: its segmenter.
    images: directory of files that `table.read_image` reads, or npz files in
      FairSeg's form; what is hidden is left out.
    out: where to write; new, empty, or of the same run and checkpoint.

  Raises:
    FileNotFoundError: no such directory, or no file in it.
    FileExistsError: `out` holds something else.
    ValueError: a file in `out` is not what was written there.
  """
  images, out, domain = Path(images), Path(out), trained.domain
  names = _names(images, out)
  request = {
    "command": "predict",
    "checkpoint_step": trained.step,
    "checkpoint_sha256": fingerprint(trained.inference._asdict()),
    "config_sha256": configs.config_hash(trained.config),
  }
  require_request(out, request)
  lines = _read_lines(images, out, names)
  kept, missing = len(lines), [path for path in names if path not in lines]
  for folder in {out, *((out / k / n).parent for k, n in _places(names))}:
    folder.mkdir(parents=True, exist_ok=True)
    files.sweep(folder)
  if not (out / REQUEST).exists():
    files.write(out / REQUEST, json.dumps(request, indent=2) + "\n")
  unreadable = []

  def read(path: Path):
    try:
      image = _read(images / path, domain.channels)
      return image, predictor.fit(image, str(images / path))
    except (ValueError, OSError, ImportError) as error:
      return str(error)

  with (
    ThreadPoolExecutor() as pool,
    tqdm(total=len(missing), desc="predict", unit="image") as bar,
  ):
    for i in range(0, len(missing), predictor.batch_size):
      chunk = missing[i : i + predictor.batch_size]
      found = dict(zip(chunk, pool.map(read, chunk), strict=True))
      unreadable += [(p, x) for p, x in found.items() if isinstance(x, str)]
      found = {p: x for p, x in found.items() if not isinstance(x, str)}
      masks = predictor.segment_fitted([fitted for _, fitted in found.values()])
      for (path, (image, _)), mask in zip(found.items(), masks, strict=True):
        place = out / MASKS / names[path]
        with made_beside(place) as made:
          table.write_png(made, domain.label(mask))
        with made_beside(out / OVERLAYS / names[path]) as made:
          table.write_png(made, outlined(image, mask, domain))
        lines[path] = {
          "image": str(path),
          "image_sha256": files.sha256(images / path),
          "mask": names[path],
          "mask_sha256": files.sha256(place),
          **_measure(mask, domain),
        }
      bar.update(len(chunk))
      known = [lines[path] for path in names if path in lines]
      text = "".join(json.dumps(line) + "\n" for line in known)
      files.write(out / MANIFEST, text)
  lines = {path: lines[path] for path in names if path in lines}
  _write_tables(out, lines.values(), unreadable)
  if lines:
    files.write(out / SHEET, _sheet(images, out, lines, trained))
  return Summary(len(lines), kept, unreadable)


def _names(images: Path, out: Path) -> dict[Path, str]:
  """Every image's path in its directory, and what its mask is called."""
  if not images.is_dir():
    raise FileNotFoundError(f"--images {images} is not a directory")
  made = out.resolve()
  inside = images.resolve() in made.parents  # what was made is no image
  found = [
    path.relative_to(images)
    for path in sorted(images.rglob("*"))
    if path.is_file() and not (inside and path.resolve().is_relative_to(made))
  ]
  found = [p for p in found if not any(x.startswith(".") for x in p.parts)]
  if not found:
    raise FileNotFoundError(f"--images {images} holds no file")
  plain = Counter(path.with_suffix(".png") for path in found)
  return {
    path: str(path.with_suffix(".png"))
    if plain[path.with_suffix(".png")] == 1
    else f"{path}.png"
    for path in found
  }


def _places(names: Mapping[Path, str]) -> Iterator[tuple[str, str]]:
  for folder in (MASKS, OVERLAYS):
    for name in names.values():
      yield folder, name


def _read_lines(
  images: Path, out: Path, names: Mapping[Path, str]
) -> dict[Path, dict[str, Any]]:
  """Lines of the manifest, by image, whose masks are there as written.

  Raises:
    ValueError: a mask is there and is another than was written, or the image
      has changed since.
  """
  manifest = out / MANIFEST
  stored = files.read_json_lines(manifest) if manifest.exists() else []
  by_image = {line.get("image"): line for line in stored}
  lines = {}
  for path, name in names.items():
    line, mask = by_image.get(str(path)), out / MASKS / name
    if line is None or line.get("mask") != name or not mask.exists():
      continue
    if files.sha256(mask) != line.get("mask_sha256"):
      raise ValueError(
        f"{mask} is not the file that was written there: its SHA-256 is not"
        f" that of {manifest}; {AGAIN}"
      )
    if files.sha256(images / path) != line.get("image_sha256"):
      raise ValueError(
        f"{images / path} is not the image that {mask} was made from; move the"
        " mask and its overlay away, and the same command makes them anew"
      )
    if (out / OVERLAYS / name).exists():
      lines[path] = line
  return lines


def _read(path: Path, channels: int) -> np.ndarray:
  """An image as uint8 [H, W] or [H, W, 3]."""
  if path.suffix.lower() != ".npz":
    return table.read_image(path, channels)[0]
  known = {form.image for form in DIALECTS.values()}
  arrays = array_files.read_npz(path, known, limit=npz.MOST_PIXELS)
  found = [array for array in arrays.values() if array is not None]
  if not found:
    raise ValueError(
      f"{path} has no image: its arrays are {', '.join(arrays)}, none of them"
      f" {', '.join(sorted(known))}"
    )
  return table.to_uint8(found[0], channels, str(path))


def _measure(mask: np.ndarray, domain: Domain) -> dict[str, Any]:
  """Areas in pixels, and ratios of them; None where one is undefined."""
  areas = domain.areas(mask)
  ratios = {key(name): of for name, of in domain.ratios_of(areas).items()}
  measured = {f"{key(name)}_pixels": area for name, area in areas.items()}
  return {"height": mask.shape[0], "width": mask.shape[1], **measured, **ratios}


def _write_tables(out: Path, lines, unreadable) -> None:
  lines = list(lines)
  columns = [k for k in lines[0] if not k.endswith("sha256")] if lines else []
  if lines:
    rows = [
      ["" if line[k] is None else line[k] for k in columns] for line in lines
    ]
    files.write_csv(out / AREAS, columns, rows)
  if unreadable:
    rows = [(str(path), reason) for path, reason in unreadable]
    files.write_csv(out / UNREADABLE, ("image", "reason"), rows)
  else:
    (out / UNREADABLE).unlink(missing_ok=True)


def _sheet(
  images: Path, out: Path, lines: Mapping[Path, Any], trained: Trained
) -> bytes:
  """The first images, with what was found in them."""
  domain, classes = trained.domain, trained.domain.value_classes

  def case(path: Path) -> tuple[np.ndarray, np.ndarray]:
    label = np.asarray(Image.open(out / MASKS / lines[path]["mask"]))
    mask = np.zeros(label.shape, np.uint8)
    for value, found in classes.items():
      mask[label == value] = found
    return _read(images / path, domain.channels), mask

  shown: Sequence[Path] = [*lines][:SHOWN]
  title = f"Predicted by {trained.layout.workdir.name}, step {trained.step}"
  return contact_sheet({title: [case(path) for path in shown]}, domain)
