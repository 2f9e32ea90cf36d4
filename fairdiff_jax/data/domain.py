"""What is segmented, in what images: a domain is data, not code.

`FUNDUS` is built in; a json file describes any other:

    {"channels": 3,
     "structures": [{"name": "disc", "values": [1, 2]},
                    {"name": "cup", "values": [2], "within": "disc"}],
     "reported": {"cup": [2], "rim": [1], "disc": [1, 2]},
     "ratios": {"cup to disc": ["cup", "disc"]},
     "headline": "cup"}

Values are those of the label images, in which 0, unless declared, is
background. Structures are given in painting order. Prepared masks hold classes:
0 background, i + 1 what structure i has painted last, so that a structure is
its own class and those of all that lies within it.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fairdiff_jax import files

FILE = "domain.json"
MOST = 15  # structures: classes that a hint has colours for
_KEYS = {"channels", "structures", "reported", "ratios", "headline", "whole"}


class Structure(NamedTuple):
  """Something that masks show.

  Attributes:
    name: of the structure.
    values: of label images, where it is.
    within: name of the structure, painted before, that it lies within.
  """

  name: str
  values: tuple[int, ...]
  within: str | None = None


class Domain(NamedTuple):
  """What there is to see and to report.

  Attributes:
    channels: of images, 1 or 3.
    structures: in painting order.
    reported: name -> values of label images.
    ratios: name -> two reported names, whose areas are divided.
    headline: the reported name that a report speaks of first.
    whole: whether images show structures whole: a made-up mask that the border
      cuts is not sound.
  """

  channels: int
  structures: tuple[Structure, ...]
  reported: dict[str, tuple[int, ...]]
  ratios: dict[str, tuple[str, str]]
  headline: str
  whole: bool = False

  @property
  def num_classes(self) -> int:
    return len(self.structures) + 1

  @property
  def names(self) -> tuple[str, ...]:
    """Names of the structures."""
    return tuple(s.name for s in self.structures)

  @property
  def parents(self) -> tuple[int | None, ...]:
    """Of every structure, the index of the one that it lies within."""
    return tuple(
      None if s.within is None else self.names.index(s.within)
      for s in self.structures
    )

  @property
  def value_classes(self) -> dict[int, int]:
    """Value of a label image -> class, background included."""
    painted = {
      value: i + 1 for i, s in enumerate(self.structures) for value in s.values
    }
    return {0: 0} | painted

  @property
  def regions(self) -> dict[str, tuple[int, ...]]:
    """Structure -> its classes: its own, and those of what lies in it."""
    parents = self.parents

    def chain(i):
      while i is not None:
        yield i
        i = parents[i]

    numbers = range(len(parents))
    return {
      name: tuple(i + 1 for i in numbers if j in chain(i))
      for j, name in enumerate(self.names)
    }

  @property
  def reported_classes(self) -> dict[str, tuple[int, ...]]:
    """Reported name -> the classes that it is made of."""
    classes = self.value_classes
    return {
      name: tuple(sorted({classes[v] for v in values}))
      for name, values in self.reported.items()
    }

  @property
  def parts(self) -> tuple[str, ...]:
    """Reported names but those that others, taken together, make up."""
    of = {name: set(classes) for name, classes in self.reported_classes.items()}
    return tuple(
      name
      for name, classes in of.items()
      if classes != set().union(*(c for c in of.values() if c < classes))
    )

  def split(self, mask: np.ndarray) -> dict[str, np.ndarray]:
    """Structure -> its pixels, bool of the shape of a mask of classes."""
    return {
      name: np.isin(mask, classes) for name, classes in self.regions.items()
    }

  def paint(self, regions: Mapping[str, np.ndarray]) -> np.ndarray:
    """The mask of classes, uint8, of structures' pixels by name."""
    mask = np.zeros(next(iter(regions.values())).shape, np.uint8)
    for i, name in enumerate(self.names):
      mask[regions[name]] = i + 1
    return mask

  def areas(self, mask: np.ndarray) -> dict[str, int]:
    """Pixels of what is reported, in a mask [H, W] of classes."""
    return {
      name: int(np.isin(mask, classes).sum())
      for name, classes in self.reported_classes.items()
    }

  def ratios_of(self, areas: Mapping[str, int]) -> dict[str, float | None]:
    """The ratios of areas; None where one is undefined."""
    return {
      name: areas[part] / areas[whole] if areas[whole] else None
      for name, (part, whole) in self.ratios.items()
    }

  def label(self, mask: np.ndarray) -> np.ndarray:
    """A label image, uint8 or uint16, of a mask of classes."""
    values = {c: v for v, c in reversed(self.value_classes.items())}
    table = np.array([values.get(c, 0) for c in range(self.num_classes)])
    table[0] = 0
    kind = np.uint8 if table.max() < 256 else np.uint16
    return table.astype(kind)[mask]


FUNDUS = Domain(
  channels=1,
  structures=(
    Structure("disc", (1, 2)),
    Structure("cup", (2,), "disc"),
  ),
  reported={"cup": (2,), "rim": (1,), "disc": (1, 2)},
  ratios={"cup to disc": ("cup", "disc")},
  headline="cup",
  whole=True,
)


def parse(content: Mapping[str, Any], where: str = FILE) -> Domain:
  """Reads a domain as `to_json` writes it.

  `reported` is by default every structure, `headline` the first of these.

  Args:
    content: of the file.
    where: names the file in messages.

  Raises:
    ValueError: it is no domain; the message says what is wrong.
  """

  def fault(what: str) -> ValueError:
    return ValueError(f"{where}: {what}")

  unknown = sorted(content.keys() - _KEYS)
  if unknown:
    raise fault(
      f"{unknown[0]!r} is no key of a domain; its keys are"
      f" {', '.join(sorted(_KEYS))}"
    )
  channels = content.get("channels", 1)
  if channels not in (1, 3):
    raise fault(f"channels must be 1 or 3, not {channels!r}")
  structures = content.get("structures")
  if not isinstance(structures, list) or not 1 <= len(structures) <= MOST:
    raise fault(f"structures must be a list of 1 to {MOST}")
  found: dict[str, Structure] = {}
  for entry in structures:
    if not isinstance(entry, dict) or not _is_name(entry.get("name")):
      raise fault(f"a structure needs a 'name', not {entry!r}")
    structure = Structure(
      entry["name"], _values(entry.get("values")), entry.get("within")
    )
    if structure.name in found:
      raise fault(f"two structures are called {structure.name!r}")
    if not structure.values:
      raise fault(
        f"values of {structure.name!r} must be whole numbers from 0 to 65535,"
        f" such as [1, 2], not {entry.get('values')!r}"
      )
    if structure.within is not None:
      outer = found.get(structure.within)
      if outer is None:
        raise fault(
          f"{structure.name!r} lies within {structure.within!r}, which must be"
          " a structure that is given before it"
        )
      if not set(structure.values) <= set(outer.values):
        raise fault(
          f"{structure.name!r} lies within {outer.name!r}, so that its values"
          f" {list(structure.values)} must be among {list(outer.values)}"
        )
    found[structure.name] = structure
  reported = content.get("reported") or {
    s.name: s.values for s in found.values()
  }
  if not isinstance(reported, dict):
    raise fault(f"reported must map names to values, not {reported!r}")
  reported = {name: _values(values) for name, values in reported.items()}
  domain = Domain(
    channels,
    tuple(found.values()),
    reported,
    {},
    content.get("headline") or next(iter(reported)),
    bool(content.get("whole", False)),
  )
  classes = domain.value_classes
  for name, values in reported.items():
    if not values or not set(values) <= classes.keys():
      raise fault(
        f"reported {name!r} must be values of structures, such as"
        f" {sorted(classes)[1:]}, not {list(values)}"
      )
    shared = {classes[v] for v in values}
    missing = [v for v, c in classes.items() if c in shared - {0}]
    missing = sorted(set(missing) - set(values))
    if missing or 0 in shared:
      raise fault(
        f"reported {name!r} has the values {list(values)}, but"
        + (
          f" {missing} are the same structure; name them too"
          if missing
          else " 0 is background"
        )
      )
  if domain.headline not in reported:
    raise fault(
      f"headline {domain.headline!r} is not reported; use one of"
      f" {', '.join(reported)}"
    )
  ratios = content.get("ratios") or {}
  for name, pair in ratios.items():
    if len(pair) != 2 or not set(pair) <= reported.keys():
      raise fault(
        f"the ratio {name!r} must be of two of {', '.join(reported)}, not"
        f" {pair!r}"
      )
  return domain._replace(ratios={k: tuple(pair) for k, pair in ratios.items()})


def to_json(domain: Domain) -> dict[str, Any]:
  """A domain as `parse` reads it, in JSON's types."""
  structures = [
    {"name": s.name, "values": list(s.values)}
    | ({"within": s.within} if s.within else {})
    for s in domain.structures
  ]
  return {
    "channels": domain.channels,
    "structures": structures,
    "reported": {k: list(v) for k, v in domain.reported.items()},
    "ratios": {k: list(v) for k, v in domain.ratios.items()},
    "headline": domain.headline,
    "whole": domain.whole,
  }


def of(name: str, source: str = "") -> Domain:
  """The domain that a `config.data` names.

  Args:
    name: of a json file, 'fundus', or a domain's JSON itself, as a run keeps
      it; '' for the file beside a table, and fundus where there is none.
    source: of the patients; a table's path.

  Raises:
    FileNotFoundError: no such file.
    ValueError: it is no domain.
  """
  if name.lstrip().startswith("{"):
    return parse(json.loads(name), "data.domain")
  if name == "fundus":
    return FUNDUS
  beside = Path(source).with_name(FILE) if is_table(source) else None
  path = Path(name) if name else beside
  if path is None or (not name and not path.is_file()):
    return FUNDUS
  if not path.is_file():
    raise FileNotFoundError(
      f"data.domain={name!r} is neither 'fundus' nor a file; correct the path"
    )
  return parse(files.read_json(path, "correct it"), str(path))


def is_table(source: str | os.PathLike) -> bool:
  """Whether patients come from a csv."""
  return str(source).lower().endswith(".csv")


def text(domain: Domain) -> str:
  """A domain as a run keeps it in `data.domain`."""
  return "fundus" if domain == FUNDUS else json.dumps(to_json(domain))


def _is_name(value: Any) -> bool:
  return isinstance(value, str) and bool(value.strip())


def _values(values: Any) -> tuple[int, ...]:
  """Whole numbers, () for anything else."""
  if not isinstance(values, list | tuple):
    return ()
  sound = all(type(v) is int and 0 <= v <= 65535 for v in values)
  return tuple(values) if sound else ()
