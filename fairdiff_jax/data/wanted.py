"""The settings that data is prepared with, in the form that is stored with it.

They tell whether prepared data is what a config asks for. Directories and lists
are known by their content, so that they may be moved.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fairdiff_jax import files
from fairdiff_jax.data import domain as domains
from fairdiff_jax.data import fairseg, splits, table
from fairdiff_jax.data.report import plain

MADE_UP = "phantom, "  # how the source's name begins for phantoms


def of_config(config: Any) -> dict[str, Any]:
  """The settings that a `config.data` asks for.

  Args:
    config: fields as for `prepare.prepare`.

  Returns:
    name -> value, as JSON has them.

  Raises:
    ValueError: a bad setting, list or table.
  """
  if domains.is_table(config.source):
    return _of_table(config)
  made = None
  if config.source == "phantom":
    made = [f"{k} {plain(v)}" for k, v in phantom_arguments(config).items()]
  return of_source(
    MADE_UP + ", ".join(made) if made else config.source,
    Path(config.source) if config.source and not made else None,
    **arguments(config),
  )


def of_source(
  origin: str | os.PathLike,
  source: Path | None,
  *,
  size: Sequence[int],
  num_points: int,
  split: str,
  crop: Sequence[int],
  validation: float,
  allow_synthetic: bool,
) -> dict[str, Any]:
  """Checks the settings and puts them in the form that is stored.

  Args:
    origin: where the patients are from, in words.
    source: their directory, which is fingerprinted if it is there: file names
      and sizes, and the split. None if there is none.
    size: as for `prepare.build`, as are num_points, split, crop, validation
      and allow_synthetic.

  Raises:
    ValueError: a bad setting or list.
  """
  sides = [int(side) for side in size]
  if len(sides) != 2 or min(sides) < 8:
    raise ValueError(
      f"size must be (H, W) with at least 8 pixels a side, not {tuple(size)}."
    )
  if crop and (len(crop) != 2 or min(crop) < 8):
    raise ValueError(
      "crop must be (H, W) with at least 8 pixels a side, or () for none, not "
      f"{tuple(crop)}."
    )
  if num_points < 8:
    raise ValueError(f"num_points must be at least 8, not {num_points}.")
  settings = {"source": str(source.resolve() if source else origin)}
  paths = fairseg.npz_files(source) if source else []
  if paths:
    listed = (
      f"{path.name} {path.stat().st_size if path.exists() else 0}"
      for path in paths
    )
    settings["files"] = f"{len(paths)} {splits.fingerprint(listed)}"
  settings |= {
    "size": sides,
    "num_points": int(num_points),
    "split": splits.describe(split, source),
  }
  if crop:
    settings["crop"] = [int(side) for side in crop]
  if validation:
    settings["validation"] = float(validation)
  if allow_synthetic:
    settings["allow_synthetic"] = True
  return settings


def arguments(config: Any) -> dict[str, Any]:
  """The arguments of `of_source` that are fields of a `config.data`."""
  names = "size num_points split crop validation allow_synthetic".split()
  return {name: config[name] for name in names}


def differing(
  stored: Mapping[str, Any], wanted: Mapping[str, Any]
) -> dict[str, tuple[str, str]]:
  """Settings that are not the same in content, as {key: (stored, wanted)}.

  A moved source is the same if its files are, and so is what nobody knows.
  """
  found = {}
  for key in stored | wanted:
    old, new = stored.get(key), wanted.get(key)
    if key in ("files", "split", "domain"):
      same = None in (old, new) or splits.same(old, new)
    else:
      same = old == new
    if not same:
      found[key] = plain(old or "none"), plain(new or "none")
  if "files" in stored and "files" in wanted and "files" not in found:
    found.pop("source", None)
  return found


def phantom_arguments(config: Any) -> dict[str, Any]:
  """The arguments of `phantom.write`.

  `added` is among them only if something is: data that were prepared before
  there was such a field are still what is asked for.
  """
  made = config.phantom.to_dict()
  return {k: v for k, v in made.items() if k != "added" or v}


def _of_table(config: Any) -> dict[str, Any]:
  """The settings of a table, in the form that is stored."""
  path = Path(config.source)
  if config.split != "use":
    raise ValueError(
      f"data.split={config.split!r} is for npz files; a table has its column"
      " split"
    )
  settings = of_source(path.resolve(), None, **arguments(config))
  settings["split"] = "column split"
  if not path.is_file():
    return settings
  domain = domains.of(config.domain, config.source)
  found = table.read(path, domain)
  named = {p for row in found.rows for p in (row.image, *row.masks) if p}
  listed = [
    f"{os.path.relpath(p, path.parent)} {p.stat().st_size}" for p in named
  ]
  listed += [files.read_text(path)]
  settings["files"] = f"{len(named)} {splits.fingerprint(listed)}"
  settings["domain"] = domains.text(domain)
  return settings
