"""Harvard-FairSeg: from a directory of npz files to prepared arrays.

`build` reads every npz file of a directory, in any dialect of
`attributes.DIALECTS`, checks it, brings it to one size and writes array_record
files through TensorFlow Datasets (without TensorFlow). `load` reads them back
into memory. A case that cannot be used is set aside and listed with its reason
in the `Report`, which is stored with the data; no case is dropped silently.

Rules, in one place:

* Crop: the centre of the image, mask and points at their native size. A case
  that is smaller, or whose cup lies outside, is set aside. One whose disc is
  cut is kept with what is left of it, as the published segmenters do (to leave
  it out would make the test set easier), and noted.
* Image: area interpolation when shrinking, cubic when enlarging. Floating-point
  images within [0, 1] are multiplied by 255; within [0, 255] they are rounded.
* Mask: nested area vote. A pixel is disc where at least half of its area is
  disc, and cup where more than half is cup. Rim is disc without cup: one
  thinner than a pixel keeps its area, where a vote of three classes drops it.
* Points: sampled from the mask at its native size, then moved to the prepared
  size with r' = (r + 0.5) H / H0 - 0.5.
* Attributes: the npz decides; data_summary.csv fills what is unknown there.
* Split: `use`, a column of data_summary.csv (training / test; or `train`, 1 or
  0), or a list of the training cases. The two published ones disagree, so the
  choice is recorded with the data.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import tensorflow_datasets as tfds
import tqdm

from fairdiff_jax.data import attributes, contours, phantom
from fairdiff_jax.data.npz import (
  SUMMARY,
  Case,
  case_key,
  find_summary,
  read_case,
  read_summary,
)

SHOWN = 8  # cases that a note names
SPLITS = {
  "training": "train",
  "train": "train",
  "1": "train",
  "test": "test",
  "0": "test",
}


class Cases(NamedTuple):
  """Prepared patients in memory.

  Attributes:
    name: n case names (stems of the files).
    image: [n, H, W] uint8.
    mask: [n, H, W] uint8, 0 background, 1 rim, 2 cup.
    points: [n, N, 3] float32, (row, column) in pixels of H x W, and z.
    attributes: [n] int32 for every key of ATTRIBUTES, -1 unknown.
  """

  name: list[str]
  image: np.ndarray
  mask: np.ndarray
  points: np.ndarray
  attributes: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Report:
  """What was found in a directory of npz files.

  Attributes:
    settings: what the data was prepared from and how.
    dialects: cases by dialect.
    sizes: cases by native size, "H x W".
    counts: split -> attribute -> group name -> cases.
    set_aside: (file, reason) of every case that is not used.
    notes: other findings, one sentence each.
  """

  settings: dict[str, Any]
  dialects: dict[str, int]
  sizes: dict[str, int]
  counts: dict[str, dict[str, dict[str, int]]]
  set_aside: list[tuple[str, str]]
  notes: list[str]

  @property
  def usable(self) -> int:
    """Number of cases that are not set aside."""
    return sum(self.dialects.values())

  def __str__(self) -> str:
    lines = [f"{k:<12}{_plain(v)}" for k, v in self.settings.items()]
    lines.append(f"{'dialects':<12}{_tally(self.dialects)}")
    lines.append(f"{'sizes':<12}{_tally(self.sizes)}")
    splits = list(self.counts)
    if splits:
      lines.append("")
      lines.append(f"{'':<29}" + "".join(f"{s:>8}" for s in splits))
    for attribute, groups in self.counts[splits[0]].items() if splits else ():
      for i, group in enumerate(groups):
        label = f"{attribute if i == 0 else '':<14} {group:<14}"
        numbers = (self.counts[s][attribute][group] for s in splits)
        lines.append(label + "".join(f"{n:>8}" for n in numbers))
    lines.append("")
    lines.extend(self.notes)
    lines.append(
      f"{self.usable} cases usable, {len(self.set_aside)} set aside"
      + (":" if self.set_aside else ".")
    )
    lines.extend(f"  {file}  {reason}" for file, reason in self.set_aside)
    return "\n".join(lines)


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
    FileExistsError: `directory` was prepared with other settings.
    ValueError: bad settings, or no usable case, or none to train on.
  """
  settings = _settings(
    str(Path(source).resolve()), size, num_points, split, crop
  )
  return _reuse(directory, settings) or _build(
    Path(source), Path(directory), settings, split, progress
  )


def prepare(config: Any, directory: str | os.PathLike) -> Report:
  """Prepares the data that a run's `config.data` asks for.

  Args:
    config: fields source ("phantom" or a directory of npz files), size,
      num_points, split, crop, and phantom, the arguments of `phantom.write`.
    directory: where to write the prepared data; phantoms are first written to
      a folder in it as npz files.

  Returns, raises: see `build`.
  """
  size, num_points = tuple(config.size), config.num_points
  if config.source != "phantom":
    return build(
      config.source,
      directory,
      size=size,
      num_points=num_points,
      split=config.split,
      crop=config.crop,
    )
  made = config.phantom.to_dict()
  origin = "phantom, " + ", ".join(f"{k} {_plain(v)}" for k, v in made.items())
  settings = _settings(origin, size, num_points, config.split, config.crop)
  stored = _reuse(directory, settings)
  if stored:
    return stored
  name = "-".join(
    ("phantom", *(f"{k}_{v}" for k, v in made.items()), *map(str, size))
  )
  source = Path(directory) / name
  if not source.exists():
    Path(directory).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as incomplete:
      phantom.write(Path(incomplete) / name, shape=size, **made)
      try:
        (Path(incomplete) / name).rename(source)
      except OSError:
        if not source.exists():
          raise  # else another process was faster, with the same phantoms
  return _build(source, Path(directory), settings, config.split, True)


def check(source: str | os.PathLike, *, progress: bool = True) -> Report:
  """Reports on a directory of npz files, or on a prepared one; writes nothing.

  Raises:
    FileNotFoundError: no such directory, or no npz file in it.
  """
  if _is_prepared(source):
    return _stored_report(source)
  source = Path(source)
  split = "use" if find_summary(source) else None
  _, report = _collect(
    source, {"source": str(source)}, split, lambda case: None, progress
  )
  if split is None:
    report.notes.append(f"There is no {SUMMARY}, so no split to show.")
  return report


def require_prepared(config: Any, directory: str | os.PathLike) -> None:
  """Raises ValueError unless data was prepared with a `config.data`'s pixels.

  What it was prepared from is not compared: prepared data may be moved.

  Raises:
    FileNotFoundError: the directory is not prepared.
    ValueError: it was prepared with another size or crop.
  """
  settings = _require(directory).settings
  for key in ("size", "crop"):
    found, wanted = tuple(settings.get(key, ())), tuple(config[key])
    if found != wanted:
      raise ValueError(
        f"{directory} was prepared with {key} {_plain(found) or 'none'}, but "
        f"data.{key} is {_plain(wanted) or 'none'}. Change data.{key}, or "
        "prepare another directory (launch/prepare.py)."
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
    ValueError: the prepared data has no such split.
  """
  _require(directory)
  builder = tfds.builder_from_directory(_data_path(directory))
  if split not in builder.info.splits:
    raise ValueError(
      f"{directory} has no split {split!r}; it has "
      f"{', '.join(builder.info.splits)}."
    )
  records = builder.as_data_source(split)
  shape = (len(records), *builder.info.features["image"].shape[:2])
  image, mask = np.empty(shape, np.uint8), np.empty(shape, np.uint8)
  rest = []
  for i in tqdm.trange(
    len(records), desc=f"load {split}", disable=not progress
  ):
    record = records[i]
    image[i] = record.pop("image")[..., 0]
    mask[i] = record.pop("mask")[..., 0]
    rest.append(record)
  return Cases(
    name=[r["name"].decode() for r in rest],
    image=image,
    mask=mask,
    points=np.stack([r["points"] for r in rest]),
    attributes={
      a: np.array([r[a] for r in rest], np.int32) for a in attributes.ATTRIBUTES
    },
  )


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
    pixels = tfds.features.Image(
      shape=(height, width, 1), dtype=np.uint8, encoding_format="png"
    )
    points = tfds.features.Tensor(
      shape=(self._report.settings["num_points"], 3), dtype=np.float32
    )
    return tfds.core.DatasetInfo(
      builder=self,
      description="Fundus images with disc and cup, prepared by fairdiff_jax.",
      features=tfds.features.FeaturesDict(
        {
          "name": tfds.features.Text(),
          "image": pixels,
          "mask": pixels,
          "points": points,
          "age": tfds.features.Scalar(np.float32),
        }
        | {a: tfds.features.Scalar(np.int32) for a in attributes.ATTRIBUTES}
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


def _settings(
  source: str,
  size: Sequence[int],
  num_points: int,
  split: str,
  crop: Sequence[int],
) -> dict[str, Any]:
  """Checks the settings and puts them in the form that is stored."""
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
  if split != "use":
    path = Path(split)
    if not path.is_file():
      raise FileNotFoundError(
        f"split {split!r} is neither 'use' nor a file that lists the training "
        "cases, one a line."
      )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    split = f"{path.name} (sha256 {digest[:12]})"
  settings = {
    "source": source,
    "size": sides,
    "num_points": int(num_points),
    "split": split,
  }
  return settings | ({"crop": [int(side) for side in crop]} if crop else {})


def _data_path(directory: str | os.PathLike) -> Path:
  return Path(directory) / FairSeg.name / str(FairSeg.VERSION)


def _is_prepared(directory: str | os.PathLike) -> bool:
  # TFDS writes to incomplete.XXXXXX_1.0.0 and renames it at the end.
  return (_data_path(directory) / "dataset_info.json").is_file()


def _require(directory: str | os.PathLike) -> Report:
  """The report of a prepared directory."""
  if not _is_prepared(directory):
    raise FileNotFoundError(
      f"{directory} holds no prepared data. Prepare it with: python "
      "launch/prepare.py --config CONFIG --config.data.source=NPZ_DIRECTORY "
      f"--config.data.directory={directory}"
    )
  return _stored_report(directory)


def _stored_report(directory: str | os.PathLike) -> Report:
  info = tfds.builder_from_directory(_data_path(directory)).info
  report = Report(**dict(info.metadata))
  return dataclasses.replace(
    report, set_aside=[tuple(pair) for pair in report.set_aside]
  )


def _reuse(
  directory: str | os.PathLike, settings: dict[str, Any]
) -> Report | None:
  """Returns the report of a directory prepared with the same settings."""
  if not _is_prepared(directory):
    return None
  report = _stored_report(directory)
  differing = [
    f"{key} {_plain(old)} (now {_plain(new)})"
    for key in report.settings | settings
    for old, new in [[d.get(key, "none") for d in (report.settings, settings)]]
    if old != new
  ]
  if differing:
    raise FileExistsError(
      f"{directory} was prepared with {', '.join(differing)}. Name another "
      "directory with --config.data.directory, or delete this one."
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

  def resize(case: Case) -> dict[str, Any]:
    return _to_record(case, settings["size"], settings["num_points"])

  records, report = _collect(source, settings, split, resize, progress)
  if not report.usable:
    file, reason = report.set_aside[0]
    raise ValueError(
      f"{source}: not one of the {len(report.set_aside)} cases can be used. "
      f"The first is {file}: {reason}"
    )
  if not records["train"]:
    raise ValueError(
      f"{source}: no usable case is in the training split by {split!r}; "
      f"{report.usable} are in the test split and {len(report.set_aside)} are "
      "set aside."
    )
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
    return _reuse(directory, settings)
  return report


def _collect(
  source: Path,
  settings: dict[str, Any],
  split: str | None,
  convert: Callable[[Case], Any],
  progress: bool,
) -> tuple[dict[str, list[Any]], Report]:
  """Reads every npz file of `source`.

  Returns:
    {split: converted cases, in the order of their names} and the report.
  """
  if not source.is_dir():
    raise FileNotFoundError(f"{source} is not a directory.")
  paths = sorted(source.glob("*.npz"))
  if not paths:
    raise FileNotFoundError(f"{source} holds no .npz files.")
  rows = read_summary(source, required=split == "use")
  listed = _read_list(split) if split not in ("use", None) else None

  def split_of(path: Path) -> str:
    key = case_key(path.name)
    if split is None:
      return "all"
    if listed is not None:
      return "train" if key in listed else "test"
    if key not in rows:
      raise ValueError(
        f"{path.name}: has no row in {SUMMARY}; add one, or give a list of "
        "the training cases as the split."
      )
    row = rows[key]
    use = row["use" if "use" in row else "train"].strip()
    if use.lower() not in SPLITS:
      raise ValueError(
        f"{path.name}: its use in {SUMMARY} is {use!r}, neither training nor "
        "test."
      )
    return SPLITS[use.lower()]

  def read(path: Path):
    try:
      part = split_of(path)
      case = read_case(path)
      case, differing = _fill(case, rows.get(case_key(path.name), {}), path)
      seen = _crop(case, settings.get("crop", ()))
      cut = np.count_nonzero(seen.mask) < np.count_nonzero(case.mask)
      return part, convert(seen), case.image.shape, case[2:], differing, cut
    except ValueError as error:
      return str(error).removeprefix(f"{path.name}: ")

  parts = ("all",) if split is None else ("train", "test")
  records = {part: [] for part in parts}
  groups = {
    part: collections.defaultdict(collections.Counter) for part in parts
  }
  dialects, sizes = collections.Counter(), collections.Counter()
  conflicts, set_aside, cut = collections.Counter(), [], []
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    results = tqdm.tqdm(
      pool.map(read, paths),
      desc=f"read {source.name}",
      total=len(paths),
      disable=not progress,
    )
    for path, result in zip(paths, results, strict=True):
      if isinstance(result, str):
        set_aside.append((path.name, result))
        continue
      part, record, shape, (codes, dialect), differing, is_cut = result
      records[part].append(record and record | {"name": path.stem})
      dialects[dialect] += 1
      sizes[_plain(shape)] += 1
      conflicts.update(differing)
      if is_cut:
        cut.append(path.name)
      for attribute in attributes.ATTRIBUTES:
        groups[part][attribute][codes[attribute]] += 1

  present = {case_key(path.name) for path in paths}
  notes = [
    f"{len(names - present)} of {len(names)} names in {where} have no file."
    for where, names in ((SUMMARY, set(rows)), (split, listed or set()))
    if names - present
  ] + [
    f"{attribute}: {SUMMARY} differs from the npz in {n} cases; npz kept."
    for attribute, n in conflicts.items()
  ]
  if cut:
    notes.append(
      f"The crop cuts the disc of {len(cut)} cases, which are kept: "
      f"{', '.join(cut[:SHOWN])}{', ...' * (len(cut) > SHOWN)}."
    )
  counts = {
    part: {
      attribute: {
        attributes.group_name(attribute, code): by_code[attribute][code]
        for code in (*range(len(names)), attributes.UNKNOWN)
      }
      for attribute, names in attributes.ATTRIBUTES.items()
    }
    for part, by_code in groups.items()
  }
  report = Report(
    settings, dict(dialects), dict(sizes), counts, set_aside, notes
  )
  return records, report


def _crop(case: Case, crop: Sequence[int]) -> Case:
  """The centre [H, W] of a case; all of it for a crop ()."""
  if not crop:
    return case
  shape = case.image.shape
  if any(new > old for new, old in zip(crop, shape, strict=True)):
    raise ValueError(
      f"the image ({_plain(shape)}) is smaller than the crop {_plain(crop)}; "
      "choose a smaller crop."
    )
  starts = (old // 2 - new // 2 for new, old in zip(crop, shape, strict=True))
  centre = tuple(slice(i, i + n) for i, n in zip(starts, crop, strict=True))
  if not (case.mask[centre] == 2).any():
    raise ValueError(
      f"the crop {_plain(crop)} of {_plain(shape)} shows no cup; choose a "
      "larger crop."
    )
  return case._replace(image=case.image[centre], mask=case.mask[centre])


def _to_record(
  case: Case, size: Sequence[int], num_points: int
) -> dict[str, Any]:
  """Brings a case to its prepared size and encodes it."""
  points = contours.mask_to_points(case.mask, num_points).astype(np.float32)
  scale = np.divide(size, case.mask.shape)
  points[:, :2] = (points[:, :2] + 0.5) * scale - 0.5
  return {
    "image": _png(_resize(case.image, size)),
    "mask": _png(_resize_mask(case.mask, size)),
    "points": points,
    **case.attributes,
  }


def _resize(image: np.ndarray, size: Sequence[int]) -> np.ndarray:
  shrinking = all(
    new <= old for new, old in zip(size, image.shape, strict=True)
  )
  method = cv2.INTER_AREA if shrinking else cv2.INTER_CUBIC
  return cv2.resize(image, (size[1], size[0]), interpolation=method)


def _resize_mask(mask: np.ndarray, size: Sequence[int]) -> np.ndarray:
  """Resizes a mask [H0, W0] to [H, W] by nested area vote."""
  disc = _resize((mask > 0).astype(np.float32), size) >= 0.5
  cup = disc & (_resize((mask == 2).astype(np.float32), size) > 0.5)
  if not cup.any():
    raise ValueError(
      f"the cup ({int((mask == 2).sum())} pixels of {_plain(mask.shape)}) is "
      f"lost at {_plain(size)}; choose a larger size."
    )
  return disc.astype(np.uint8) + cup


def _png(pixels: np.ndarray) -> bytes:
  return cv2.imencode(".png", pixels)[1].tobytes()


def _fill(
  case: Case, row: Mapping[str, str], path: Path
) -> tuple[Case, list[str]]:
  """Fills unknown attributes from a row of the csv.

  Returns:
    The case, and the attributes in which a known value of the csv differs.
  """
  codes, differing = dict(case.attributes), []
  for attribute in attributes.ATTRIBUTES:
    word = row.get(attribute, "")
    if codes[attribute] == attributes.UNKNOWN:
      codes[attribute] = attributes.parse_attribute(
        attribute, word, file=f"{path.name}: in {SUMMARY}"
      )
      continue
    try:
      code = attributes.parse_attribute(attribute, word)
    except ValueError:
      continue
    if code not in (attributes.UNKNOWN, codes[attribute]):
      differing.append(attribute)
  if codes["age"] == attributes.UNKNOWN:
    codes["age"] = attributes.parse_age(
      row.get("age", ""), file=f"{path.name}: in {SUMMARY}"
    )
  return case._replace(attributes=codes), differing


def _read_list(path: str | os.PathLike) -> set[str]:
  lines = Path(path).read_text(encoding="utf-8").splitlines()
  return {case_key(line) for line in lines if line.strip()}


def _plain(value: Any) -> str:
  if isinstance(value, list | tuple):
    return " x ".join(str(v) for v in value)
  return str(value)


def _tally(counts: Mapping[str, int]) -> str:
  return ", ".join(f"{name}: {n}" for name, n in counts.items()) or "none"
