"""From patients' files to prepared arrays.

A source's cases (`fairseg`: npz files, `table`: a csv, `phantom`: made up) are
checked, brought to one size (`examine`) and written (`storage`), once. A case
that cannot be used is set aside and listed with its reason in the `Report`,
which is stored with the data; no case is dropped silently.
"""

import collections
import concurrent.futures
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tqdm

from fairdiff_jax import files
from fairdiff_jax.data import (
  attributes,
  fairseg,
  groups,
  phantom,
  splits,
  storage,
  table,
  wanted,
)
from fairdiff_jax.data import domain as domains
from fairdiff_jax.data.cases import NotAsDeclared, Source
from fairdiff_jax.data.domain import FUNDUS
from fairdiff_jax.data.examine import Found, examine, report_on
from fairdiff_jax.data.npz import SUMMARY
from fairdiff_jax.data.report import Report


def build(
  source: str | os.PathLike,
  directory: str | os.PathLike,
  *,
  size: tuple[int, int],
  num_points: int,
  split: str = "use",
  crop: tuple[int, ...] = (),
  validation: float = 0,
  attribute: str = "race",
  allow_synthetic: bool = False,
  progress: bool = True,
) -> Report:
  """Prepares a directory of npz files, once.

  A directory that was prepared with the same settings is left as it is; this
  holds even where the source is gone.

  Args:
    source: directory of npz files, with data_summary.csv in it or in its
      folder ReadMe (optional with a list file).
    directory: where to write the prepared data.
    size: (H, W) of the prepared images, in pixels.
    num_points: N, points of a case's contours.
    split: "use" for the csv's column, or the path of a list of the training
      cases, one file name or stem a line; all others are test cases.
    crop: (H, W) of the centre of the native images that is resized, in pixels;
      () for all of them.
    validation: share of the training cases that become validation cases, by
      patient and of every group alike; for sources that have none.
    attribute: which tells these groups apart.
    allow_synthetic: whether training cases may be made up.
    progress: show a progress bar.

  Returns:
    The report, also stored with the data.

  Raises:
    FileNotFoundError: no such source, csv or list.
    FileExistsError: `directory` was prepared with other settings, or from
      other files.
    OSError: it cannot be written.
    ValueError: bad settings, csv or list, a path that cannot be read again, no
      usable case, or none to train on; or a case is synthetic that may not be.
  """
  files.require_plain(directory, "data.directory")
  source = Path(source)
  settings = wanted.of_source(
    source,
    source,
    size=size,
    num_points=num_points,
    split=split,
    crop=crop,
    validation=validation,
    allow_synthetic=allow_synthetic,
  )
  return _reuse(directory, settings) or _write(
    *(fairseg.open_directory(source, split), directory, settings, attribute),
    progress=progress,
  )


def prepare(config: Any, directory: str | os.PathLike) -> Report:
  """Prepares the data that a run's `config.data` asks for.

  Args:
    config: fields source ("phantom", a table, or a directory of npz files),
      domain, size, num_points, split, crop, attribute, allow_synthetic, and
      phantom, the arguments of `phantom.write`.
    directory: where to write the prepared data; phantoms are first written to
      a folder in it as npz files.

  Returns, raises: see `build`; ValueError also for an unknown attribute.
  """
  if not config.source:
    raise ValueError(
      "data.source is empty; give --config.data.source=cases.csv, "
      "=NPZ_DIRECTORY, or =phantom for made-up patients."
    )
  from_table = domains.is_table(config.source)
  if not from_table:
    if domains.of(config.domain) != FUNDUS:
      raise ValueError(
        f"data.domain={config.domain!r} is not fundus, which is what the npz "
        "files show; give a table (.csv) of your patients as data.source."
      )
    groups.group_names(
      config.attribute, (), attributes.ATTRIBUTES | {"age": ("0",)}
    )
  if not from_table and config.source != "phantom":
    return build(
      config.source,
      directory,
      attribute=config.attribute,
      **wanted.arguments(config),
    )
  files.require_plain(directory, "data.directory")
  settings = wanted.of_config(config)
  stored = _reuse(directory, settings)
  if stored:
    return stored
  if from_table:
    source = table.open_table(
      config.source, domains.of(config.domain, config.source)
    )
    groups.recorded(config.attribute, source.vocabulary)
    return _write(source, directory, settings, config.attribute)
  size, made = tuple(config.size), wanted.phantom_arguments(config)
  name = "-".join(
    ("phantom", *(f"{k}_{v}" for k, v in made.items()), *map(str, size))
  )
  source = Path(directory) / name
  if not source.exists():
    with files.new_directory(source) as incomplete:
      phantom.write(incomplete, shape=size, **made)
  opened = fairseg.open_directory(source, config.split)
  return _write(opened, directory, settings, config.attribute)


def is_made_up(directory: str | os.PathLike) -> bool:
  """Whether the patients of prepared data are phantoms.

  Raises:
    FileNotFoundError: the directory is not prepared.
  """
  source = storage.require(directory).settings["source"]
  return source.startswith(wanted.MADE_UP)


def check(source: str | os.PathLike, *, progress: bool = True) -> Report:
  """Reports on a table, npz files or prepared data; writes nothing.

  Raises:
    FileNotFoundError: no such directory, or no npz file in it.
    ValueError: the prepared data is damaged.
  """
  if storage.is_prepared(source):
    return storage.stored_report(source)
  source = Path(source)
  settings, notes = {"source": str(source)}, []
  if domains.is_table(source):
    opened = table.open_table(source, domains.of("", str(source)))
  else:
    try:
      opened = fairseg.open_directory(source, "use")
    except FileNotFoundError:
      opened = fairseg.open_directory(source, None)
      notes.append(f"There is no {SUMMARY}, so no split to show.")
    except (ValueError, OSError) as error:
      opened = fairseg.open_directory(source, None)
      notes.append(f"There is no split to show: {error}")
  report = _collect(opened, settings, None, progress)[1]
  report.notes.extend(notes)
  return report


def require_prepared(config: Any, directory: str | os.PathLike) -> None:
  """Raises ValueError unless data was prepared as a `config.data` asks.

  Fields are compared by content: directories and lists may be moved. What is
  no longer there, a source or a list, is not read again; a list that is gone
  is known by its name.

  Args:
    config: fields as for `prepare`.
    directory: of the prepared data.

  Raises:
    FileNotFoundError: the directory is not prepared.
    ValueError: it was prepared with other fields, or is damaged.
  """
  stored = storage.require(directory, config.source).settings
  asked = wanted.of_config(config)
  differing = wanted.differing(stored, asked)
  differing.pop("files", None)
  origins = (s.get("source", "") for s in (stored, asked))
  made_up = any(origin.startswith(wanted.MADE_UP) for origin in origins)
  known = made_up or ("files" in stored and "files" in asked)
  if not (config.source and known):
    differing.pop("source", None)
  if differing:
    found = " and ".join(
      f"{key} {old}, but data.{key} is {new}"
      for key, (old, new) in differing.items()
    )
    raise ValueError(
      f"{directory} was prepared with {found}. Change "
      f"{', '.join(f'data.{key}' for key in differing)}, or prepare another "
      "directory (fairdiff prepare)."
    )


def _reuse(
  directory: str | os.PathLike, settings: dict[str, Any]
) -> Report | None:
  """Returns the report of a directory prepared with the same settings."""
  if not storage.is_prepared(directory):
    return None
  report = storage.stored_report(directory)
  differing = wanted.differing(report.settings, settings)
  if differing:
    listed = ", ".join(
      f"{key} {old} (now {new})" for key, (old, new) in differing.items()
    )
    raise FileExistsError(
      f"{directory} was prepared with {listed}. Name another directory with "
      "--config.data.directory, or delete this one."
    )
  return report


def _write(
  source: Source,
  directory: str | os.PathLike,
  settings: dict[str, Any],
  attribute: str,
  progress: bool = True,
) -> Report:
  """Reads, checks and writes all cases; returns the report that is stored."""
  directory = Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryFile(dir=directory) as spool:
    by_part, report = _collect(source, settings, spool, progress, attribute)
    if not report.usable and report.set_aside:
      name, reason = report.set_aside[0]
      raise ValueError(
        f"{settings['source']}: not one of the {len(report.set_aside)} cases "
        f"can be used. The first is {name}: {reason}"
      )
    if not by_part["train"]:
      other = "the test" if source.strict else "another"
      raise ValueError(
        f"{settings['source']}: no usable case is in the training split by "
        f"{settings['split']!r}; {report.usable} are in {other} split, "
        f"{len(report.set_aside)} are set aside and "
        f"{sum(report.left_out.values())} are left out."
      )
    records = {
      part: _unspooled(spool, found) for part, found in by_part.items() if found
    }
    try:
      storage.write(directory, records, report)
    except FileExistsError:  # another process was faster
      return _reuse(directory, settings)
  return report


def _collect(
  source: Source,
  settings: dict[str, Any],
  spool: BinaryIO | None,
  progress: bool,
  attribute: str = "",
) -> tuple[dict[str, list[Found]], Report]:
  """Reads every case of a source.

  Args:
    source: of the cases.
    settings: crop, size and num_points; without a size nothing is resized,
      without num_points clouds are whole contours.
    spool: where pixels are kept, which would fill the memory.
    progress: show a progress bar.
    attribute: which tells apart the groups of which validation cases are held
      out, where the settings ask for some.

  Returns:
    {split: what was found, in the order of the source} and the report.
  """

  def read(item, name):
    try:
      part, case, differing = source.read(item)
      if case is None:
        return part
      if case.synthetic and "size" in settings:
        _require_allowed(name, part, settings)
      found = examine(case, name.removesuffix(".npz"), settings, source)
      return found._replace(part=part, differing=differing)
    except NotAsDeclared:
      raise
    except (ValueError, OSError) as error:
      return error

  used, left_out, set_aside = {}, collections.Counter(), []
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    results = tqdm.tqdm(
      pool.map(read, source.items, source.names),
      desc=f"read {source.name}",
      total=len(source.items),
      disable=not progress,
    )
    for name, result in zip(source.names, results, strict=True):
      if isinstance(result, Exception):
        set_aside.append((name, str(result)))
      elif isinstance(result, str):
        left_out[result] += 1
      else:
        used[name] = _spooled(spool, result) if spool else result
  notes, share = [], settings.get("validation")
  if share and any(found.part == "validation" for found in used.values()):
    notes.append(
      f"{source.name} has validation cases of its own: data.validation={share}"
      " holds no others out."
    )
  elif share:
    used = _held_out(used, share, attribute, source)
  held = {f.part for f in used.values()}
  by_part = {
    part: [f for f in used.values() if f.part == part]
    for part in source.parts
    if part in held or part != "validation"
  }
  report = report_on(used, by_part, set_aside, left_out, settings, source)
  report.notes.extend(notes)
  return by_part, report


def _require_allowed(name: str, part: str, settings: Mapping[str, Any]):
  """Raises NotAsDeclared where a case may not be synthetic."""
  if not settings.get("allow_synthetic"):
    raise NotAsDeclared(
      f"{settings['source']}: {name} is synthetic; to train on synthetic cases"
      " set --config.data.allow_synthetic=True, or leave them out"
    )
  if part != "train":
    raise NotAsDeclared(
      f"{settings['source']}: {name} is synthetic and a {part} case; figures"
      " are of real patients only: make it a training case, or leave it out"
    )


def _held_out(
  used: Mapping[str, Found], share: float, attribute: str, source: Source
) -> dict[str, Found]:
  """Makes some of the training cases validation cases."""
  names = [
    name
    for name, found in used.items()
    if found.part == "train" and not found.case.synthetic
  ]
  cases = [used[name].case for name in names]
  words = source.vocabulary
  codes = {
    a: np.array([c.attributes[a] for c in cases], int)
    for a in words or attributes.ATTRIBUTES
  }
  if not words:
    ages = np.array([c.attributes["age"] for c in cases])
    words, codes = groups.with_ages(codes, ages)
  group = groups.group_codes(attribute, codes, (), words)
  patient = [c.patient or name for c, name in zip(cases, names, strict=True)]
  chosen = splits.hold_out(group, patient, share)
  moved = {name for name, is_held in zip(names, chosen, strict=True) if is_held}
  return {
    name: found._replace(part="validation") if name in moved else found
    for name, found in used.items()
  }


def _spooled(spool: BinaryIO, found: Found) -> Found:
  """Moves a record's bytes to a file; in their place are (start, length)."""
  record = dict(found.record)
  for name in ("image", "mask"):
    record[name] = spool.tell(), spool.write(record[name])
  return found._replace(record=record)


def _unspooled(
  spool: BinaryIO, found: Sequence[Found]
) -> Iterator[dict[str, Any]]:
  """The records of what was found."""
  for case in found:
    record = dict(case.record)
    for name in ("image", "mask"):
      start, length = record[name]
      spool.seek(start)
      record[name] = spool.read(length)
    yield record
