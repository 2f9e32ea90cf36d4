"""A run's config on disk: what was asked for, held against what is asked now.

Configs are built by the functions in `configs/`; this module only writes,
reads, compares and fingerprints them.
"""

import hashlib
import json
from pathlib import Path

from ml_collections import ConfigDict

# Fields that may change when a run is resumed: they do not alter its result.
HARMLESS = ("checkpoint", "log", "parallel", "evaluation", "baseline")


def _flatten(node, prefix=""):
  for key, value in node.items():
    if isinstance(value, dict):
      yield from _flatten(value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}", value


def to_json(config: ConfigDict) -> str:
  """The config as JSON, keys sorted; tuples become lists."""
  return json.dumps(config.to_dict(), indent=2, sort_keys=True)


def config_hash(config: ConfigDict) -> str:
  """SHA-256 of every field that a run's result depends on."""
  fields = json.loads(to_json(config))
  fields = {k: v for k, v in fields.items() if k not in HARMLESS}
  return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
  """Lines such as 'image.patch: 4 before, 2 now', harmless fields left out."""
  before = dict(_flatten(json.loads(to_json(old))))
  after = dict(_flatten(json.loads(to_json(new))))
  absent = "absent"
  return [
    f"{key}: {before.get(key, absent)} before, {after.get(key, absent)} now"
    for key in sorted(before.keys() | after.keys())
    if key.split(".")[0] not in HARMLESS
    and before.get(key, absent) != after.get(key, absent)
  ]


def load(workdir: str | Path) -> ConfigDict:
  """Reads the config of an existing run.

  Raises:
    FileNotFoundError: if `workdir` holds no run.
  """
  path = Path(workdir) / "config.json"
  if not path.exists():
    raise FileNotFoundError(
      f"{path} does not exist: {workdir} is not the work directory of a run;"
      " train first, or correct --workdir"
    )
  return ConfigDict(json.loads(path.read_text())).lock()


def claim(workdir: str | Path, config: ConfigDict, *, write: bool = True):
  """Makes `workdir` the work directory of `config`, or checks that it is.

  Args:
    workdir: the run's directory; made if need be.
    config: the run's config.
    write: whether this process writes (the first host does).

  Raises:
    ValueError: if the directory belongs to a run of another config.
  """
  path = Path(workdir) / "config.json"
  if path.exists():
    require(workdir, config)
  if write:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(to_json(config) + "\n")
    temporary.replace(path)


def require(workdir: str | Path, config: ConfigDict | None):
  """Raises ValueError unless `config`, if any, is that of the run."""
  changed = differences(load(workdir), config) if config else []
  if changed:
    raise ValueError(
      f"{workdir} holds a run of another config:\n  "
      + "\n  ".join(changed)
      + "\nChange these fields back to use it, or give another --workdir"
    )


def data_directory(config: ConfigDict, workdir: str | Path) -> Path:
  """Where a run's prepared data lies."""
  return Path(config.data.directory or Path(workdir) / "data")
