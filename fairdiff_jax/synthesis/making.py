"""Making cases of a request, and their files.

Every file says that it is synthetic and what it was made from: npz files in the
arrays `synthetic` and `provenance` (JSON), PNG files in texts of these names.
"""

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fairdiff_jax import config as configs
from fairdiff_jax import files
from fairdiff_jax.data import domain as domains
from fairdiff_jax.data import npz, table
from fairdiff_jax.data.attributes import ATTRIBUTES
from fairdiff_jax.data.examine import resize_mask
from fairdiff_jax.data.groups import attributes_of, vocabulary_of
from fairdiff_jax.synthesis import draws
from fairdiff_jax.synthesis.generate import (
  Generated,
  make_generator,
  make_image_generator,
)
from fairdiff_jax.training.checkpoint import fingerprint
from fairdiff_jax.training.trained import Trained

OWN = ("file", "sha256", "refused")  # of a line: what its file does not say
AGAIN = "move it away, and the same command makes it anew"
IMAGES, LABELS = "images", "masks"


@contextlib.contextmanager
def made_beside(path: Path) -> Iterator[Path]:
  """A path of the same name to write to, which then becomes `path`.

  Raises:
    ValueError: there is another file already.
  """
  with tempfile.TemporaryDirectory(
    prefix=files.LEFTOVER, dir=path.parent
  ) as directory:
    made = Path(directory) / path.name
    yield made
    if not path.exists():
      made.rename(path)
    elif files.sha256(made) != files.sha256(path):
      raise ValueError(f"{path} is not what this request makes here; {AGAIN}")


class Given(NamedTuple):
  """Masks that a user has.

  Attributes:
    name: of their files, in order.
    sha256: of the files.
    mask: classes [n, H, W], of the run's size.
  """

  name: list[str]
  sha256: list[str]
  mask: np.ndarray


def read_masks(trained: Trained, directory: str | Path) -> Given:
  """The label images of a directory, by name, at the run's size.

  Raises:
    FileNotFoundError: no such directory, or no file in it.
    ValueError: one cannot be read, or shows nothing.
  """
  directory, domain = Path(directory), trained.domain
  if not directory.is_dir():
    raise FileNotFoundError(f"--masks {directory} is not a directory")
  paths = sorted(p for p in directory.iterdir() if p.is_file())
  paths = [p for p in paths if not p.name.startswith(".")]
  if not paths:
    raise FileNotFoundError(f"--masks {directory} holds no file")
  size, masks = tuple(trained.config.data.size), []
  for path in paths:
    mask = table.read_label(path, domain)
    if mask.shape != size:
      mask = resize_mask(mask, size, domain)
    absent = [name for name, of in domain.split(mask).items() if not of.any()]
    strict = not domains.is_table(trained.config.data.source)
    if (strict and absent) or len(absent) == len(domain.names):
      raise ValueError(
        f"{path} shows no {' and no '.join(absent)} at {size[0]} x {size[1]}"
      )
    masks.append(mask)
  return Given(
    [p.name for p in paths], [files.sha256(p) for p in paths], np.stack(masks)
  )


class Maker:
  """Makes the cases of a request, and writes them."""

  def __init__(
    self,
    trained: Trained,
    ratios: Mapping[str, draws.Range],
    given: Given | None,
  ):
    self._trained, self._given = trained, given
    self._ratios = ratios
    self._generate = None
    config = trained.config.data
    self.domain = trained.domain
    self.names = trained.setup.objective.group_names
    self.as_table = domains.is_table(config.source)
    self._words = vocabulary_of(config)

  def __call__(self, seed, number, group) -> Generated:
    inference = self._trained.inference
    if self._generate is None:  # it is compiled where it is needed
      make = make_image_generator if self._given else make_generator
      self._generate = make(self._trained.setup)
    if self._given:
      mask = self._given.mask[number]
      image = self._generate(inference, seed, number, group, mask)
      none = np.zeros(len(number), int), np.full(len(number), "")
      return Generated(image, mask, *none)
    extra = {}
    if self._ratios:
      extra["wanted"] = draws.out_of_range(self._ratios, self.domain)
    return self._generate(inference, seed, number, group, **extra)

  def attributes(self, name: str) -> dict[str, int]:
    """Codes of a group's attributes."""
    config = self._trained.config.data
    return attributes_of(config.attribute, name, config.pooled, self._words)

  def path(self, out: Path, name: str) -> Path:
    """Where the file of a case lies."""
    return out / IMAGES / name if self.as_table else out / name

  def write(self, out: Path, line: dict[str, Any], image, mask) -> str:
    """Writes a case of which a line of the manifest speaks; its SHA-256."""
    told = json.dumps({k: v for k, v in line.items() if k not in OWN})
    path = self.path(out, line["file"])
    if self.as_table:
      label = out / LABELS / path.name
      for place, pixels in ((label, self.domain.label(mask)), (path, image)):
        with made_beside(place) as made:
          table.write_png(made, pixels, synthetic="1", provenance=told)
    else:
      codes = self.attributes(line["group"])
      codes = {k: v for k, v in codes.items() if k in ATTRIBUTES}
      with made_beside(path) as made:
        npz.write_case(
          *(made, image, mask, codes),
          synthetic=1,
          attempts=line["attempts"],
          provenance=told,
        )
    return files.sha256(path)

  def read(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Image and mask of a file that was written."""
    if not self.as_table:
      return npz.read_case(path)[:2]
    masks = (path.parents[1] / LABELS / path.name,)
    row = table.Row(path.stem, path, masks, "train", {})
    return table.read_case(row, self.domain)[:2]


def again(
  trained: Trained,
  manifest: str | Path,
  out: str | Path,
  only: Sequence[int] = (),
  *,
  masks: str | Path | None = None,
) -> list[Path]:
  """Makes cases anew from their lines of a manifest, bit for bit.

  Args:
    trained: the run that made them.
    manifest: the file.
    out: where to write.
    only: their numbers; () for all.
    masks: the directory of masks, of cases that were made for such.

  Returns:
    The files.

  Raises:
    ValueError: no such line, another run or checkpoint, another mask, or other
      bytes than before, as another kind of device gives.
  """
  lines = {line.get("number"): line for line in files.read_json_lines(manifest)}
  absent = [str(n) for n in only if n not in lines]
  if absent:
    raise ValueError(
      f"{manifest} has no case {', '.join(absent)}; its numbers are 0 to"
      f" {len(lines) - 1}"
    )
  chosen = [lines[n] for n in only or lines]
  now = {
    "checkpoint_sha256": fingerprint(trained.inference._asdict()),
    "config_sha256": configs.config_hash(trained.config),
  }
  for line in chosen:
    for key, value in now.items():
      if line.get(key) != value:
        raise ValueError(
          f"case {line['number']} was made with {key} {line.get(key)}, but the"
          f" run in {trained.layout.workdir} has {value}; give the run and the"
          " checkpoint that made it"
        )
  given = read_masks(trained, masks) if masks is not None else None
  ratios = {k: tuple(v) for k, v in chosen[0].get("ratios", {}).items()}
  maker = Maker(trained, ratios, given)
  return [_again(maker, line, Path(out), given) for line in chosen]


def _again(maker: Maker, line, out: Path, given: Given | None) -> Path:
  number = line["number"]
  if name := line.get("mask"):
    digests = given.sha256[number : number + 1] if given else []
    if line["mask_sha256"] not in digests:
      raise ValueError(
        f"case {number} was made for the mask {name}, which is not there; give"
        " the directory of masks as it was (--masks)"
      )
  case = maker(
    draws.seed_of(line["seed"], line.get("draw", 0)),
    np.array([number]),
    np.array([maker.names.index(line["group"])], np.int32),
  )
  path = maker.path(out, line["file"])
  for directory in (path.parent, *((out / LABELS,) if maker.as_table else ())):
    directory.mkdir(parents=True, exist_ok=True)
  known = path.exists()
  if maker.write(out, line, case.image[0], case.mask[0]) != line["sha256"]:
    if not known:
      path.unlink()
    raise ValueError(
      f"case {number} was made again, but its bytes are not those that were"
      " written: devices of another kind or number"
    )
  return path
