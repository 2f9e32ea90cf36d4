"""From patients' files to prepared arrays.

`build` reads every npz file of a directory, in any dialect of
`attributes.DIALECTS`, `prepare` also the rows of a table (`data.table`). Each
case is checked, brought to one size and written to array_record
files through TensorFlow Datasets (without TensorFlow). `load` reads them back
into memory. A case that cannot be used is set aside and listed with its reason
in the `Report`, which is stored with the data; no case is dropped silently.

Rules, in one place:

* Crop: the centre of the image, mask and points at their native size. A case
  that is smaller, or whose cup lies outside, is set aside. One whose disc is
  cut is kept with what is left of it, as the published segmenters do (to leave
  it out would make the test set easier), and noted.
* Image: area interpolation when shrinking, cubic when enlarging.
* Mask: nested area vote. A pixel is disc where at least half of its area is
  disc, and cup where more than half is cup. Rim is disc without cup: one
  thinner than a pixel keeps its area, where a vote of three classes drops it.
  So it is with any structures: those that lie within none as the disc, others
  as the cup.
* Points: sampled from the mask at its native size, then moved to the prepared
  size with r' = (r + 0.5) H / H0 - 0.5. A case whose points do not give its
  mask back (`contours.LEAST_DICE`) is set aside.
* Of a table, a case that lacks a structure, or whose points do not give its
  mask back, is kept: it teaches image generator and segmenter, and has a cloud
  of zeros, which the mask generator leaves out.
* Attributes: the npz decides; data_summary.csv fills what is unknown there.
  What nobody can read is unknown, and noted.
* Split: `use`, a column of data_summary.csv (training / test; or `train`, 1 or
  0), or a list of the training cases. The two published ones disagree, so the
  choice is recorded with the data. A case is there once: two files or two rows
  of one name are set aside.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import os
import shlex
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import tensorflow_datasets as tfds
import tqdm

from fairdiff_jax import files
from fairdiff_jax.data import (
  attributes,
  contours,
  groups,
  npz,
  phantom,
  splits,
  table,
)
from fairdiff_jax.data import domain as domains
from fairdiff_jax.data.audit import mask_fault
from fairdiff_jax.data.domain import FUNDUS, Domain
from fairdiff_jax.data.npz import SUMMARY, Case, case_key
from fairdiff_jax.data.report import Report, named, plain

MIN_SOLIDITY = 0.9  # of masks, as `bank.min_solidity` is by default
_WORST = 3  # cases whose round trip is listed
_MOST_WORDS = 30  # of an attribute whose words are counted
_LONGEST = 40  # characters of a value that a note quotes
_MADE_UP = "phantom, "  # how the settings' source begins for phantoms


class Cases(NamedTuple):
  """Prepared patients in memory.

  Attributes:
    name: n case names (stems of the files).
    image: [n, H, W] uint8, or RGB [n, H, W, 3].
    mask: [n, H, W] uint8, classes of the domain.
    points: [n, N, 3] float32, (row, column) in pixels of H x W, and z; zeros
      for a case that the mask generator leaves out.
    attributes: [n] int32 for every attribute, -1 unknown.
    vocabulary: words of every attribute.
    domain: what masks and images show.
  """

  name: list[str]
  image: np.ndarray
  mask: np.ndarray
  points: np.ndarray
  attributes: dict[str, np.ndarray]
  vocabulary: groups.Vocabulary = attributes.ATTRIBUTES
  domain: Domain = FUNDUS


def build(
  source: str | os.PathLike,
  directory: str | os.PathLike,
  *,
  size: tuple[int, int],
  num_points: int,
  split: str = "use",
  crop: tuple[int, ...] = (),
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
    progress: show a progress bar.

  Returns:
    The report, also stored with the data.

  Raises:
    FileNotFoundError: no such source, csv or list.
    FileExistsError: `directory` was prepared with other settings, or from
      other files.
    OSError: it cannot be written.
    ValueError: bad settings, csv or list, a path that cannot be read again, no
      usable case, or none to train on.
  """
  files.require_plain(directory, "data.directory")
  source = Path(source)
  settings = _settings(
    source, source, size=size, num_points=num_points, split=split, crop=crop
  )
  return _reuse(directory, settings) or _build(
    source, Path(directory), settings, split, progress
  )


def prepare(config: Any, directory: str | os.PathLike) -> Report:
  """Prepares the data that a run's `config.data` asks for.

  Args:
    config: fields source ("phantom", a table, or a directory of npz files),
      domain, size, num_points, split, crop, attribute, and phantom, the
      arguments of `phantom.write`.
    directory: where to write the prepared data; phantoms are first written to
      a folder in it as npz files.

  Returns, raises: see `build`; ValueError also for an unknown attribute.
  """
  if not config.source:
    raise ValueError(
      "data.source is empty; give --config.data.source=cases.csv, "
      "=NPZ_DIRECTORY, or =phantom for made-up patients."
    )
  if _is_table(config.source):
    return _prepare_table(config, directory)
  if domains.of(config.domain) != FUNDUS:
    raise ValueError(
      f"data.domain={config.domain!r} is not fundus, which is what the npz "
      "files show; give a table (.csv) of your patients as data.source."
    )
  groups.group_names(
    config.attribute, (), attributes.ATTRIBUTES | {"age": ("0",)}
  )
  if config.source != "phantom":
    return build(
      config.source,
      directory,
      size=config.size,
      num_points=config.num_points,
      split=config.split,
      crop=config.crop,
    )
  files.require_plain(directory, "data.directory")
  settings = _settings_of(config)
  stored = _reuse(directory, settings)
  if stored:
    return stored
  size, made = tuple(config.size), config.phantom.to_dict()
  name = "-".join(
    ("phantom", *(f"{k}_{v}" for k, v in made.items()), *map(str, size))
  )
  source = Path(directory) / name
  if not source.exists():
    with files.new_directory(source) as incomplete:
      phantom.write(incomplete, shape=size, **made)
  return _build(source, Path(directory), settings, config.split, True)


def check(source: str | os.PathLike, *, progress: bool = True) -> Report:
  """Reports on a table, npz files or prepared data; writes nothing.

  Raises:
    FileNotFoundError: no such directory, or no npz file in it.
    ValueError: the prepared data is damaged.
  """
  if _is_prepared(source):
    return _stored_report(source)
  source = Path(source)
  if _is_table(source):
    seen = domains.of("", str(source))
    found = table.read(source, seen)
    settings = {"source": str(source)}
    return _collect_table(source, found, seen, settings, progress)[1]
  paths = _require_files(source)
  rows, split, notes = {}, None, []
  try:
    rows, split = npz.read_summary(source, required=True), "use"
  except FileNotFoundError:
    notes.append(f"There is no {SUMMARY}, so no split to show.")
  except (ValueError, OSError) as error:
    notes.append(f"There is no split to show: {error}")
  _, report = _collect(paths, {"source": str(source)}, split, rows, progress)
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
  stored = _require(directory, config.source).settings
  wanted = _settings_of(config)
  differing = _differing(stored, wanted)
  differing.pop("files", None)
  origins = (s.get("source", "") for s in (stored, wanted))
  made_up = any(origin.startswith(_MADE_UP) for origin in origins)
  known = made_up or ("files" in stored and "files" in wanted)
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


def load(
  directory: str | os.PathLike, split: str, *, progress: bool = True
) -> Cases:
  """Reads a split of prepared data into memory.

  Args:
    directory: as given to `build` or `prepare`.
    split: "train" or "test".
    progress: show a progress bar.

  Raises:
    FileNotFoundError: the directory is not prepared.
    ValueError: the prepared data has no such split, or is damaged.
  """
  report = _require(directory)
  with _reading(directory):
    builder = tfds.builder_from_directory(_data_path(directory))
    found = list(builder.info.splits)
  if split not in found:
    raise ValueError(
      f"{directory} has no split {split!r}; it has {', '.join(found)}."
    )
  with _reading(directory):
    cases = _read_split(builder, report, split, progress)
    if report.digests.get(split, _digest(cases)) != _digest(cases):
      raise ValueError("its cases are not those that were prepared")
  return cases


def num_cases(directory: str | os.PathLike, split: str) -> int:
  """Cases of a split of prepared data; 0 where there is no such split.

  Raises:
    FileNotFoundError: the directory is not prepared.
  """
  counts = _require(directory).counts.get(split, {})
  return sum(next(iter(counts.values()), {}).values())


def digest(directory: str | os.PathLike) -> str:
  """SHA-256 of the prepared cases: names, pixels, points, attributes, splits.

  It is stored with the data; for data prepared by earlier versions it is
  computed from all cases.

  Raises: see `load`.
  """
  report = _require(directory)
  digests = report.digests or {
    split: _digest(load(directory, split, progress=False))
    for split, groups in report.counts.items()
    if any(sum(counts.values()) for counts in groups.values())
  }
  text = "".join(f"{split} {digests[split]}\n" for split in sorted(digests))
  return hashlib.sha256(text.encode()).hexdigest()


class FairSeg(tfds.core.GeneratorBasedBuilder):
  """Writes checked and resized cases as array_record files."""

  VERSION = tfds.core.Version("1.0.0")
  # TFDS would look for a list of downloads beside this file, and needs the
  # package importlib_resources to look, which it does not require.
  url_infos = None

  def __init__(
    self,
    *,
    data_dir: str | os.PathLike,
    records: Mapping[str, Sequence[dict[str, Any]]],
    report: Report,
  ):
    """Takes {split: records}, each record one value for every feature."""
    self._records = records
    self._report = report
    super().__init__(data_dir=data_dir, file_format="array_record")

  def _info(self) -> tfds.core.DatasetInfo:
    height, width = self._report.settings["size"]
    image, mask = (
      tfds.features.Image(
        shape=(height, width, channels), dtype=np.uint8, encoding_format="png"
      )
      for channels in (_domain_of(self._report).channels, 1)
    )
    words = self._report.vocabulary
    if words:
      codes = {
        "codes": tfds.features.Tensor(shape=(len(words),), dtype=np.int32)
      }
    else:
      codes = {"age": tfds.features.Scalar(np.float32)}
      for name in attributes.ATTRIBUTES:
        codes[name] = tfds.features.Scalar(np.int32)
    points = tfds.features.Tensor(
      shape=(self._report.settings["num_points"], 3), dtype=np.float32
    )
    return tfds.core.DatasetInfo(
      builder=self,
      description="Images with masks, prepared by fairdiff_jax.",
      features=tfds.features.FeaturesDict(
        {
          "name": tfds.features.Text(),
          "image": image,
          "mask": mask,
          "points": points,
        }
        | codes
      ),
      metadata=tfds.core.MetadataDict(dataclasses.asdict(self._report)),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager) -> dict[str, Iterator]:
    del dl_manager
    return {
      split: self._generate_examples(records)
      for split, records in self._records.items()
    }

  def _generate_examples(self, records) -> Iterator[tuple[int, dict]]:
    yield from enumerate(records)


def _settings_of(config: Any) -> dict[str, Any]:
  """The settings that a `config.data` asks for."""
  if _is_table(config.source):
    return _table_settings(config)
  made = None
  if config.source == "phantom":
    made = [f"{k} {plain(v)}" for k, v in config.phantom.to_dict().items()]
  return _settings(
    _MADE_UP + ", ".join(made) if made else config.source,
    Path(config.source) if config.source and not made else None,
    size=config.size,
    num_points=config.num_points,
    split=config.split,
    crop=config.crop,
  )


def _settings(
  origin: str | os.PathLike,
  source: Path | None,
  *,
  size: Sequence[int],
  num_points: int,
  split: str,
  crop: Sequence[int],
) -> dict[str, Any]:
  """Checks the settings and puts them in the form that is stored.

  Args:
    origin: where the patients are from, in words.
    source: their directory, which is fingerprinted if it is there: file names
      and sizes, and the split. None if there is none.
    size: as for `build`, as are num_points, split and crop.
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
  paths = _npz_files(source) if source else []
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
  return settings | ({"crop": [int(side) for side in crop]} if crop else {})


def _differing(
  stored: Mapping[str, Any], wanted: Mapping[str, Any]
) -> dict[str, tuple[str, str]]:
  """Settings that are not the same in content, as {key: (stored, wanted)}.

  A moved source is the same if its files are, and so is what nobody knows.
  """
  differing = {}
  for key in stored | wanted:
    old, new = stored.get(key), wanted.get(key)
    if key in ("files", "split", "domain"):
      same = None in (old, new) or splits.same(old, new)
    else:
      same = old == new
    if not same:
      differing[key] = plain(old or "none"), plain(new or "none")
  if "files" in stored and "files" in wanted and "files" not in differing:
    differing.pop("source", None)
  return differing


def _data_path(directory: str | os.PathLike) -> Path:
  return Path(directory) / FairSeg.name / str(FairSeg.VERSION)


def _is_prepared(directory: str | os.PathLike) -> bool:
  # TFDS writes to incomplete.XXXXXX_1.0.0 and renames it at the end.
  return _data_path(directory).exists()


def _require(directory: str | os.PathLike, source: str = "") -> Report:
  """The report of a prepared directory."""
  if not _is_prepared(directory):
    source = shlex.quote(source) if source else "NPZ_DIRECTORY"
    raise FileNotFoundError(
      f"{directory} holds no prepared data. Prepare it with the same config: "
      f"fairdiff prepare --config CONFIG --config.data.source={source} "
      f"--config.data.directory={shlex.quote(str(directory))}"
    )
  return _stored_report(directory)


def _stored_report(directory: str | os.PathLike) -> Report:
  files.require_plain(directory, "data.directory")
  with _reading(directory):
    info = tfds.builder_from_directory(_data_path(directory)).info
    report = Report(**dict(info.metadata))
    return dataclasses.replace(
      report,
      set_aside=[tuple(pair) for pair in report.set_aside],
      worst=[tuple(case) for case in report.worst],
    )


@contextlib.contextmanager
def _reading(directory: str | os.PathLike) -> Iterator[None]:
  """Whatever the libraries raise about damaged data is one ValueError."""
  try:
    yield
  except Exception as error:
    what = " ".join(str(error).split())[:200]
    raise ValueError(
      f"{directory}: the prepared data cannot be read ({type(error).__name__}: "
      f"{what}); if it is damaged, delete {_data_path(directory)} and prepare "
      "it again with fairdiff prepare"
    ) from error


def _domain_of(report: Report) -> Domain:
  return domains.parse(report.domain) if report.domain else FUNDUS


def _read_split(builder, report: Report, split: str, progress: bool) -> Cases:
  records, domain = builder.as_data_source(split), _domain_of(report)
  shape = (len(records), *builder.info.features["mask"].shape[:2])
  mask = np.empty(shape, np.uint8)
  if domain.channels > 1:
    shape = (*shape, domain.channels)
  image = np.empty(shape, np.uint8)
  rest = []
  for i in tqdm.trange(
    len(records), desc=f"load {split}", disable=not progress
  ):
    record = records[i]
    image[i] = record.pop("image").reshape(shape[1:])
    mask[i] = record.pop("mask")[..., 0]
    rest.append(record)
  if report.vocabulary:
    words = {name: tuple(of) for name, of in report.vocabulary.items()}
    columns = np.stack([r["codes"] for r in rest]).T
    codes = dict(zip(words, columns, strict=True))
  else:
    ages = np.array([r["age"] for r in rest], np.float64)
    known = np.unique(ages[ages >= 0])
    words = attributes.ATTRIBUTES | {"age": tuple(f"{x:g}" for x in known)}
    codes = {
      a: np.array([r[a] for r in rest], np.int32) for a in attributes.ATTRIBUTES
    }
    index = np.searchsorted(known, ages)
    codes["age"] = np.where(ages < 0, attributes.UNKNOWN, index).astype(
      np.int32
    )
  return Cases(
    name=[r["name"].decode() for r in rest],
    image=image,
    mask=mask,
    points=np.stack([r["points"] for r in rest]),
    attributes=codes,
    vocabulary=words,
    domain=domain,
  )


def _digest(cases: Cases) -> str:
  """SHA-256 of all that a case is, and of their order."""
  return _combine(
    _case_digest(
      cases.name[i],
      cases.image[i],
      cases.mask[i],
      cases.points[i],
      _told(cases.vocabulary, {a: c[i] for a, c in cases.attributes.items()}),
    )
    for i in range(len(cases.name))
  )


def _case_digest(
  name: str,
  image: np.ndarray,
  mask: np.ndarray,
  points: np.ndarray,
  values: Sequence[int | str],
) -> bytes:
  whole = hashlib.sha256(f"{name} {values} {image.shape}".encode())
  for array in (image, mask, points.astype("<f4", copy=False)):
    whole.update(np.ascontiguousarray(array))
  return whole.digest()


def _told(
  vocabulary: groups.Vocabulary, codes: Mapping[str, float]
) -> list[int | str]:
  """What a case's digest says of its attributes: FairSeg's codes, or words."""
  if attributes.ATTRIBUTES.items() <= vocabulary.items():
    return [int(codes[a]) for a in attributes.ATTRIBUTES]
  return [
    f"{name}: {(*words, '')[int(codes[name])]}"
    for name, words in vocabulary.items()
  ]


def _combine(digests: Iterator[bytes]) -> str:
  return hashlib.sha256(b"".join(digests)).hexdigest()


def _reuse(
  directory: str | os.PathLike, settings: dict[str, Any]
) -> Report | None:
  """Returns the report of a directory prepared with the same settings."""
  if not _is_prepared(directory):
    return None
  report = _stored_report(directory)
  differing = _differing(report.settings, settings)
  if differing:
    listed = ", ".join(
      f"{key} {old} (now {new})" for key, (old, new) in differing.items()
    )
    raise FileExistsError(
      f"{directory} was prepared with {listed}. Name another directory with "
      "--config.data.directory, or delete this one."
    )
  return report


def _build(
  source: Path,
  directory: Path,
  settings: dict[str, Any],
  split: str,
  progress: bool,
) -> Report:
  """Reads, checks and writes; see `build`."""
  paths = _require_files(source)
  rows = npz.read_summary(source, required=split == "use")
  records, report = _collect(paths, settings, split, rows, progress)
  if not report.usable and report.set_aside:
    file, reason = report.set_aside[0]
    raise ValueError(
      f"{source}: not one of the {len(report.set_aside)} cases can be used. "
      f"The first is {file}: {reason}"
    )
  if not records["train"]:
    raise ValueError(
      f"{source}: no usable case is in the training split by {split!r}; "
      f"{report.usable} are in the test split, {len(report.set_aside)} are set "
      f"aside and {sum(report.left_out.values())} are left out."
    )
  return _write(directory, records, report)


def _write(
  directory: Path, records: Mapping[str, Sequence[Any]], report: Report
) -> Report:
  """Writes prepared records by split; returns the report that is stored."""
  tfds.disable_progress_bar()
  builder = FairSeg(
    data_dir=directory,
    records={name: found for name, found in records.items() if found},
    report=report,
  )
  try:
    with (
      tempfile.TemporaryDirectory() as downloads,
      contextlib.redirect_stdout(None),  # TFDS talks of downloads
    ):
      builder.download_and_prepare(
        download_dir=downloads,
        download_config=tfds.download.DownloadConfig(try_download_gcs=False),
      )
  except FileExistsError:  # another process was faster
    return _reuse(directory, report.settings)
  except RuntimeError as error:  # of a full disk
    raise OSError(
      f"{directory}: the prepared data cannot be written ({error}); make room, "
      "or name another directory with --config.data.directory."
    ) from error
  return report


def _is_table(source: str | os.PathLike) -> bool:
  return str(source).lower().endswith(".csv")


def _table_settings(config: Any) -> dict[str, Any]:
  """The settings of a table, in the form that is stored."""
  path = Path(config.source)
  if config.split != "use":
    raise ValueError(
      f"data.split={config.split!r} is for npz files; a table has its column"
      " split"
    )
  settings = _settings(
    path.resolve(),
    None,
    size=config.size,
    num_points=config.num_points,
    split="use",
    crop=config.crop,
  )
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


def _prepare_table(config: Any, directory: str | os.PathLike) -> Report:
  """`prepare` of a table."""
  files.require_plain(directory, "data.directory")
  settings = _table_settings(config)
  stored = _reuse(directory, settings)
  if stored:
    return stored
  source = Path(config.source)
  domain = domains.of(config.domain, config.source)
  found = table.read(source, domain)
  groups.recorded(config.attribute, found.vocabulary)
  records, report = _collect_table(source, found, domain, settings, True)
  if not records["train"]:
    first = "".join(f"; {n}: {why}" for n, why in report.set_aside[:1])
    raise ValueError(
      f"{source}: no usable case has the split training; {report.usable} cases "
      f"have another, {len(report.set_aside)} are set aside{first}"
    )
  return _write(
    Path(directory),
    {name: of for name, of in records.items() if of},
    report,
  )


def _collect_table(
  source: Path,
  found: table.Table,
  domain: Domain,
  settings: dict[str, Any],
  progress: bool,
) -> tuple[dict[str, list[Any]], Report]:
  """Reads every case of a table; as `_collect`."""

  def read(row: table.Row) -> _Found | str:
    try:
      case = table.read_case(row, domain)
      result = _examine(
        case, row.name, settings, domain, found.vocabulary, strict=False
      )
      return result._replace(part=row.split)
    except table.NotAsDeclared:
      raise
    except (ValueError, OSError) as error:
      return str(error)

  used, set_aside = {}, []
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    results = tqdm.tqdm(
      pool.map(read, found.rows),
      desc=f"read {source.name}",
      total=len(found.rows),
      disable=not progress,
    )
    for row, result in zip(found.rows, results, strict=True):
      if isinstance(result, str):
        set_aside.append((row.name, result))
      else:
        used[row.name] = result
  held = {f.part for f in used.values()} & {"validation"}
  parts = ("train", *held, "test")
  by_part = {p: [f for f in used.values() if f.part == p] for p in parts}
  report = _report(used, by_part, settings, set_aside, domain, found.vocabulary)
  return {p: [f.record for f in of] for p, of in by_part.items()}, report


def _npz_files(source: Path) -> list[Path]:
  """Whatever is called like an npz file, by name; [] for no directory."""
  if not source.is_dir():
    return []
  return sorted(p for p in source.iterdir() if p.suffix.lower() == ".npz")


def _require_files(source: Path) -> list[Path]:
  """The files of a directory that must have some."""
  if not source.is_dir():
    raise FileNotFoundError(f"{source} is not a directory.")
  paths = _npz_files(source)
  if not paths:
    raise FileNotFoundError(f"{source} holds no .npz files.")
  return paths


class _Found(NamedTuple):
  """What reading one file has come to.

  Attributes:
    part: "train", "test" or "all"; a word of `splits.LEFT_OUT` for a case that
      is left out, of which nothing else is known.
    case: without its pixels.
    shape: of its pixels.
    record: to be written; {} where nothing is.
    digest: of the record.
    dice: see `contours.round_trip`; () without a cloud.
    absent: structures that the mask lacks.
    unlike: why its cloud does not stand for its mask, or None.
    fault: why the mask would be refused if it were made up, or None.
    differing: attributes in which the csv contradicts the file.
    cut: whether the crop cuts the disc.
  """

  part: str
  case: Case | None = None
  shape: tuple[int, ...] = ()
  record: Mapping[str, Any] = {}
  digest: bytes = b""
  dice: tuple[float, ...] = ()
  absent: tuple[str, ...] = ()
  unlike: str | None = None
  fault: str | None = None
  differing: Sequence[str] = ()
  cut: bool = False


def _collect(
  paths: Sequence[Path],
  settings: dict[str, Any],
  split: str | None,
  rows: Mapping[str, Sequence[Mapping[str, str]]],
  progress: bool,
) -> tuple[dict[str, list[Any]], Report]:
  """Reads every npz file of a directory.

  Args:
    paths: of the files, by name.
    settings: crop, size and num_points; without a size nothing is resized,
      without num_points clouds are whole contours.
    split: "use", the path of a list, or None for no split.
    rows: of the csv, by case.
    progress: show a progress bar.

  Returns:
    {split: records, in the order of their names} and the report.
  """
  source = paths[0].parent
  present = collections.defaultdict(list)
  for path in paths:
    present[case_key(path.name)].append(path.name)
  listed = None
  if split not in ("use", None):
    if not Path(split).is_file():
      raise FileNotFoundError(
        f"split {split!r} is neither 'use' nor a file that lists the training "
        "cases, one a line."
      )
    names = {key: found[0] for key, found in present.items()}
    listed = splits.read_list(split, names, source)

  def part_of(key: str) -> str:
    if split is None:
      return "all"
    if listed is not None:
      return "train" if key in listed else "test"
    return splits.part_of(key, rows)

  def read(path: Path) -> _Found | str:
    key = case_key(path.name)
    row = rows.get(key, ())
    try:
      _require_one(path, present[key], row)
      part = part_of(key)
      if part in splits.LEFT_OUT:
        return _Found(part)
      case, differing = _fill(npz.read_case(path), *row)
      found = _examine(
        case, path.stem, settings, FUNDUS, attributes.ATTRIBUTES, strict=True
      )
      return found._replace(part=part, differing=differing)
    except (ValueError, OSError) as error:
      return str(error).removeprefix(f"{path}: ")

  used, left_out, set_aside = {}, collections.Counter(), []
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    results = tqdm.tqdm(
      pool.map(read, paths),
      desc=f"read {source.name}",
      total=len(paths),
      disable=not progress,
    )
    for path, result in zip(paths, results, strict=True):
      name = path.name.encode(errors="backslashreplace").decode()
      if isinstance(result, str):
        set_aside.append((name, result))
      elif result.part in splits.LEFT_OUT:
        left_out[result.part] += 1
      else:
        used[name] = result

  parts = ("all",) if split is None else ("train", "test")
  by_part = {p: [f for f in used.values() if f.part == p] for p in parts}
  report = _report(used, by_part, settings, set_aside, FUNDUS, {})
  report.left_out.update(left_out)
  report.notes[:0] = _notes(used, rows, present)
  return {p: [f.record for f in found] for p, found in by_part.items()}, report


def _report(
  used: Mapping[str, _Found],
  by_part: Mapping[str, Sequence[_Found]],
  settings: dict[str, Any],
  set_aside: list[tuple[str, str]],
  domain: Domain,
  vocabulary: groups.Vocabulary,
) -> Report:
  """What was found in cases that can be used, by name and by part."""
  drawn = {name: f for name, f in used.items() if f.dice}
  measured = _measured(domain)
  dice = np.reshape([f.dice for f in drawn.values()], (-1, len(measured)))
  worst = [name for name in drawn if min(drawn[name].dice) < 1]
  worst = sorted(worst, key=lambda name: min(drawn[name].dice))[:_WORST]
  return Report(
    settings=settings,
    dialects=_counted(f.case.dialect for f in used.values()),
    sizes=_counted(plain(f.shape) for f in used.values()),
    counts={
      part: _groups(found, vocabulary) for part, found in by_part.items()
    },
    set_aside=set_aside,
    notes=_structure_notes(used, domain),
    round_trip={
      structure: {"mean": float(column.mean()), "least": float(column.min())}
      for structure, column in zip(measured, dice.T, strict=True)
      if drawn
    },
    worst=[(name, *drawn[name].dice) for name in worst],
    digests={
      part: _combine(f.digest for f in found)
      for part, found in by_part.items()
      if found and "size" in settings
    },
    domain={} if domain == FUNDUS else domains.to_json(domain),
    vocabulary={name: list(words) for name, words in vocabulary.items()},
  )


def _measured(domain: Domain) -> list[str]:
  """What `contours.round_trip` measures, by name."""
  names = {of: name for name, of in domain.reported_classes.items()}
  own = [
    names.get((i + 1,), f"{name} alone")
    for i, name in enumerate(domain.names)
    if i in domain.parents
  ]
  return [*domain.names, *own]


def _structure_notes(used: Mapping[str, _Found], domain: Domain) -> list[str]:
  """What is worth saying of masks, one sentence each."""
  notes = []
  for structure in domain.names:
    lacking = [name for name, f in used.items() if structure in f.absent]
    if lacking:
      notes.append(
        f"{len(lacking)} cases show no {structure}; the mask generator leaves "
        f"them out: {named(lacking)}."
      )
  unlike = [name for name, f in used.items() if f.unlike]
  if unlike:
    notes.append(
      f"{len(unlike)} cases are left out by the mask generator: {named(unlike)}"
      f". Of the first, {used[unlike[0]].unlike}"
    )
  cut = [name for name, found in used.items() if found.cut]
  if cut:
    what = "disc" if domain == FUNDUS else "structures"
    notes.append(
      f"The crop cuts the {what} of {len(cut)} cases, which are kept: "
      f"{named(cut)}."
    )
  unsound = collections.defaultdict(list)
  for name, found in used.items():
    if found.fault and domain == FUNDUS:
      unsound[found.fault].append(name)
  notes += [
    f"{len(names)} masks would be refused as {fault!r} if they were made up "
    f"(bank.min_solidity={MIN_SOLIDITY}), and are kept: {named(names)}."
    for fault, names in unsound.items()
  ]
  return notes


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


def _examine(
  case: Case,
  name: str,
  settings: Mapping[str, Any],
  domain: Domain,
  vocabulary: groups.Vocabulary,
  *,
  strict: bool,
) -> _Found:
  """Crops, samples and resizes a case; without a size it is not resized.

  A case that lacks a structure, or has a cloud that does not give its mask
  back, raises ValueError if `strict`, and else has a cloud of zeros.
  """
  parents, number = domain.parents, settings.get("num_points")
  shape, whole = case.image.shape[:2], np.count_nonzero(case.mask)
  case = _crop(case, settings.get("crop", ()), domain, strict)
  mask = case.mask
  absent = tuple(k for k, of in domain.split(mask).items() if not of.any())
  points, dice, unlike = np.zeros((number or 0, 3), np.float32), (), None
  if strict or not absent:
    points = contours.mask_to_points(mask, number, parents)
    dice = contours.round_trip(mask, points, parents)
    unlike = contours.round_trip_fault(
      mask, points, dice, parents, domain.names
    )
  if unlike and strict:
    raise ValueError(unlike)
  record, digest = {}, b""
  cut = np.count_nonzero(mask) < whole
  if "size" in settings:
    size = settings["size"]
    if unlike:
      points = np.zeros_like(points)
    elif not absent:
      points[:, :2] = (points[:, :2] + 0.5) * np.divide(size, mask.shape) - 0.5
    image, mask = resize(case.image, size), _resize_mask(mask, size, domain)
    if strict:
      _require_shown(case.mask, mask, domain)
    codes = case.attributes
    told = _told(vocabulary, codes)
    digest = _case_digest(name, image, mask, points, told)
    record = {"name": name, "image": _png(image), "mask": _png(mask)}
    record["points"] = points
    if vocabulary is not attributes.ATTRIBUTES:
      codes = {"codes": np.array([codes[a] for a in vocabulary], np.int32)}
    record |= codes
  return _Found(
    part="",
    case=case._replace(image=None, mask=None),
    shape=shape,
    record=record,
    digest=digest,
    dice=dice,
    absent=absent,
    unlike=unlike,
    fault=mask_fault(mask, min_solidity=MIN_SOLIDITY, domain=domain),
    cut=cut,
  )


def _counted(values: Iterable[str]) -> dict[str, int]:
  return dict(collections.Counter(values))


def _groups(
  found: Sequence[_Found], vocabulary: groups.Vocabulary
) -> dict[str, dict[str, int]]:
  """Cases by attribute and name of the group; of a table, by word."""
  counts = {}
  if vocabulary:
    counts["cases"] = {"all": len(found)}
  for name, words in vocabulary.items():
    of = collections.Counter(int(f.case.attributes[name]) for f in found)
    if len(words) <= _MOST_WORDS:
      counts[name] = {w: of[i] for i, w in enumerate(words)}
      counts[name] |= {"Unknown": of[attributes.UNKNOWN]}
  if vocabulary:
    return counts
  for attribute, names in attributes.ATTRIBUTES.items():
    by_code = collections.Counter(f.case.attributes[attribute] for f in found)
    counts[attribute] = {
      attributes.group_name(attribute, code): by_code[code]
      for code in (*range(len(names)), attributes.UNKNOWN)
    }
  return counts


def _notes(
  used: Mapping[str, _Found],
  rows: Mapping[str, Any],
  present: Mapping[str, Any],
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


def _crop(
  case: Case, crop: Sequence[int], domain: Domain, strict: bool
) -> Case:
  """The centre [H, W] of a case; all of it for a crop ()."""
  if not crop:
    return case
  shape = case.image.shape[:2]
  if any(new > old for new, old in zip(crop, shape, strict=True)):
    raise ValueError(
      f"the image ({plain(shape)}) is smaller than the crop {plain(crop)}; "
      "choose a smaller crop."
    )
  centre = centre_of(shape, crop)
  # What lies within others is asked first.
  for name, region in reversed(domain.split(case.mask[centre]).items()):
    if strict and not region.any():
      raise ValueError(
        f"the crop {plain(crop)} of {plain(shape)} shows no {name}; choose a "
        "larger crop."
      )
  return case._replace(image=case.image[centre], mask=case.mask[centre])


def centre_of(shape: Sequence[int], crop: Sequence[int]) -> tuple[slice, slice]:
  """Where the centre `crop` (H, W) of an image lies; all of it for ()."""
  crop = crop or shape
  starts = (old // 2 - new // 2 for new, old in zip(crop, shape, strict=True))
  rows, columns = (slice(i, i + n) for i, n in zip(starts, crop, strict=True))
  return rows, columns


def resize(image: np.ndarray, size: Sequence[int]) -> np.ndarray:
  """An image [H, W] or [H, W, C] at another size (H, W), as it is prepared."""
  shrinking = all(
    new <= old for new, old in zip(size, image.shape[:2], strict=True)
  )
  method = cv2.INTER_AREA if shrinking else cv2.INTER_CUBIC
  return cv2.resize(image, (size[1], size[0]), interpolation=method)


def _resize_mask(
  mask: np.ndarray, size: Sequence[int], domain: Domain = FUNDUS
) -> np.ndarray:
  """Resizes a mask [H0, W0] to [H, W] by nested area vote."""
  painted: dict[str, np.ndarray] = {}
  for structure, region in zip(
    domain.structures, domain.split(mask).values(), strict=True
  ):
    share = resize(region.astype(np.float32), size)
    if structure.within is None:
      painted[structure.name] = share >= 0.5
    else:
      painted[structure.name] = painted[structure.within] & (share > 0.5)
  return domain.paint(painted)


def _require_shown(
  native: np.ndarray, mask: np.ndarray, domain: Domain
) -> None:
  """Raises ValueError if a structure is lost where a mask is resized."""
  for name, region in reversed(domain.split(mask).items()):
    if not region.any():
      pixels = np.count_nonzero(domain.split(native)[name])
      raise ValueError(
        f"the {name} ({pixels} pixels of {plain(native.shape)}) is "
        f"lost at {plain(mask.shape)}; choose a larger size."
      )


def _png(pixels: np.ndarray) -> bytes:
  if pixels.ndim == 3:
    pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
  return cv2.imencode(".png", pixels)[1].tobytes()


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
