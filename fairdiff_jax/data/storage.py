"""Prepared cases on disk.

They are array_record files, written through TensorFlow Datasets (without
TensorFlow), images and masks as PNG. What is in them is unpacked once, into
arrays beside them that are memory-mapped: processes of a host share the pages,
and data may be larger than memory.
"""

import contextlib
import dataclasses
import hashlib
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
import tqdm
from tensorflow_datasets.core import shuffle

from fairdiff_jax import array_files, files
from fairdiff_jax.data import attributes, groups, statistics
from fairdiff_jax.data import domain as domains
from fairdiff_jax.data.cases import Cases
from fairdiff_jax.data.domain import FUNDUS, Domain
from fairdiff_jax.data.report import Report

ARRAYS = "arrays_1"  # the folder of what is unpacked; changes with its content
_MAPPED = ("image", "mask", "points", "intensity")


def load(
  directory: str | os.PathLike, split: str, *, progress: bool = True
) -> Cases:
  """A split of prepared data, memory-mapped.

  It is unpacked at the first time, into a folder beside the records, or, where
  nothing may be written, into one that lasts as long as the arrays.

  Args:
    directory: as given to `prepare`.
    split: "train", "validation" or "test".
    progress: show a progress bar.

  Raises:
    FileNotFoundError: the directory is not prepared.
    ValueError: the prepared data has no such split, or is damaged.
  """
  report = require(directory)
  with _reading(directory):
    builder = tfds.builder_from_directory(_data_path(directory))
    found = list(builder.info.splits)
  if split not in found:
    raise ValueError(
      f"{directory} has no split {split!r}; it has {', '.join(found)}."
    )
  digest = report.digests.get(split)  # data of the first versions has none
  folder = Path(directory) / ARRAYS / f"{split}_{(digest or '')[:16]}"
  if digest and folder.is_dir():
    with contextlib.suppress(OSError, ValueError):
      cases = _mapped(folder, report)
      if _digest(cases) == digest:
        return cases._replace(split=split)
    shutil.rmtree(folder, ignore_errors=True)
  with _reading(directory):
    cases, what = None, (builder.as_data_source(split), report)
    if digest:
      with contextlib.suppress(OSError):  # nobody may write there
        with files.new_directory(folder) as new:
          _unpack(*what, new, f"load {split}", progress)
        cases = _mapped(folder, report)
    if cases is None:
      with tempfile.TemporaryDirectory() as temporary:
        _unpack(*what, temporary, f"load {split}", progress)
        cases = _mapped(temporary, report)
    if digest not in (None, _digest(cases)):
      shutil.rmtree(folder, ignore_errors=True)
      raise ValueError("its cases are not those that were prepared")
  return cases._replace(split=split)


def num_cases(directory: str | os.PathLike, split: str) -> int:
  """Cases of a split of prepared data; 0 where there is no such split.

  Raises:
    FileNotFoundError: the directory is not prepared.
  """
  counts = require(directory).counts.get(split, {})
  return sum(next(iter(counts.values()), {}).values())


def digest(directory: str | os.PathLike) -> str:
  """SHA-256 of the prepared cases: names, pixels, points, attributes, splits.

  It is stored with the data; for data prepared by earlier versions it is
  computed from all cases.

  Raises: see `load`.
  """
  report = require(directory)
  digests = report.digests or {
    split: _digest(load(directory, split, progress=False))
    for split, groups in report.counts.items()
    if any(sum(counts.values()) for counts in groups.values())
  }
  text = "".join(f"{split} {digests[split]}\n" for split in sorted(digests))
  return hashlib.sha256(text.encode()).hexdigest()


class Prepared(tfds.core.GeneratorBasedBuilder):
  """Writes checked and resized cases as array_record files."""

  name = "fair_seg"
  VERSION = tfds.core.Version("1.0.0")
  # TFDS would look for a list of downloads beside this file, and needs the
  # package importlib_resources to look, which it does not require.
  url_infos = None

  def __init__(
    self,
    *,
    data_dir: str | os.PathLike,
    records: Mapping[str, Iterable[Mapping[str, Any]]],
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
        "codes": tfds.features.Tensor(shape=(len(words),), dtype=np.int32),
        "patient": tfds.features.Text(),
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


def write(
  directory: str | os.PathLike,
  records: Mapping[str, Iterable[Mapping[str, Any]]],
  report: Report,
) -> None:
  """Writes prepared records by split, and the report.

  Raises:
    FileExistsError: another process was faster.
    OSError: they cannot be written.
  """
  tfds.disable_progress_bar()
  # Beyond it records would go to files that TFDS writes with TensorFlow.
  shuffle.MAX_MEM_BUFFER_SIZE = sys.maxsize
  builder = Prepared(data_dir=directory, records=records, report=report)
  try:
    with (
      tempfile.TemporaryDirectory() as downloads,
      contextlib.redirect_stdout(None),  # TFDS talks of downloads
    ):
      builder.download_and_prepare(
        download_dir=downloads,
        download_config=tfds.download.DownloadConfig(try_download_gcs=False),
      )
  except RuntimeError as error:  # of a full disk
    raise OSError(
      f"{directory}: the prepared data cannot be written ({error}); make room, "
      "or name another directory with --config.data.directory."
    ) from error


def _data_path(directory: str | os.PathLike) -> Path:
  return Path(directory) / Prepared.name / str(Prepared.VERSION)


def is_prepared(directory: str | os.PathLike) -> bool:
  # TFDS writes to incomplete.XXXXXX_1.0.0 and renames it at the end.
  return _data_path(directory).exists()


def require(directory: str | os.PathLike, source: str = "") -> Report:
  """The report of a prepared directory."""
  if not is_prepared(directory):
    source = shlex.quote(source) if source else "NPZ_DIRECTORY"
    raise FileNotFoundError(
      f"{directory} holds no prepared data. Prepare it with the same config: "
      f"fairdiff prepare --config CONFIG --config.data.source={source} "
      f"--config.data.directory={shlex.quote(str(directory))}"
    )
  return stored_report(directory)


def stored_report(directory: str | os.PathLike) -> Report:
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
      "it again with `fairdiff prepare`"
    ) from error


def _domain_of(report: Report) -> Domain:
  return domains.parse(report.domain) if report.domain else FUNDUS


def _unpack(
  records: Sequence[Mapping[str, Any]],
  report: Report,
  folder: str | os.PathLike,
  title: str,
  progress: bool,
) -> None:
  """Writes the arrays of a split's records to a folder."""
  domain = _domain_of(report)
  size = tuple(report.settings["size"])
  shapes = {
    "image": (size if domain.channels == 1 else (*size, 3), np.uint8),
    "mask": (size, np.uint8),
    "points": ((report.settings["num_points"], 3), np.float32),
    "intensity": (statistics.shape(domain), np.float64),
  }
  rest = []
  with contextlib.ExitStack() as stack:
    append = {
      name: stack.enter_context(
        array_files.new_array(Path(folder, f"{name}.npy"), len(records), *row)
      )
      for name, row in shapes.items()
    }
    for i in tqdm.trange(len(records), desc=title, disable=not progress):
      case = dict(records[i])
      case["mask"] = case["mask"][..., 0]
      case["image"] = case["image"].reshape(shapes["image"][0])
      case["intensity"] = statistics.by_class(
        case["image"], case["mask"], domain
      )
      for name in _MAPPED:
        append[name](case.pop(name))
      rest.append(case)
  columns = {k: np.array([r[k] for r in rest]) for k in rest[0]}
  for name in {"name", "patient"} & columns.keys():
    columns[name] = np.char.decode(columns[name].astype(bytes), "utf-8")
  files.write(Path(folder) / "rest.npz", array_files.npz_bytes(columns))


def _mapped(folder: str | os.PathLike, report: Report) -> Cases:
  """The cases whose arrays a folder holds."""
  arrays = {
    name: np.asarray(
      np.load(Path(folder, f"{name}.npy"), mmap_mode="r", allow_pickle=False)
    )
    for name in _MAPPED
  }
  rest = array_files.read_npz(Path(folder) / "rest.npz")
  if report.vocabulary:
    words = {name: tuple(of) for name, of in report.vocabulary.items()}
    codes = dict(zip(words, rest["codes"].T, strict=True))
    names = zip(rest["patient"], rest["name"], strict=True)
    patient = tuple(str(p) or str(name) for p, name in names)
  else:
    patient = ()
    codes = {a: rest[a].astype(np.int32) for a in attributes.ATTRIBUTES}
    words, codes = groups.with_ages(codes, rest["age"])
  return Cases(
    name=rest["name"].tolist(),
    attributes=codes,
    vocabulary=words,
    domain=_domain_of(report),
    patient=patient,
    **arrays,
  )


def _digest(cases: Cases) -> str:
  """SHA-256 of all that a case is, and of their order."""
  return combine(
    case_digest(
      cases.name[i],
      cases.image[i],
      cases.mask[i],
      cases.points[i],
      told(cases.vocabulary, {a: c[i] for a, c in cases.attributes.items()}),
    )
    for i in range(len(cases.name))
  )


def case_digest(
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


def told(
  vocabulary: groups.Vocabulary, codes: Mapping[str, float]
) -> list[int | str]:
  """What a case's digest says of its attributes: FairSeg's codes, or words."""
  if attributes.ATTRIBUTES.items() <= vocabulary.items():
    return [int(codes[a]) for a in attributes.ATTRIBUTES]
  return [
    f"{name}: {(*words, '')[int(codes[name])]}"
    for name, words in vocabulary.items()
  ]


def combine(digests: Iterator[bytes]) -> str:
  return hashlib.sha256(b"".join(digests)).hexdigest()
