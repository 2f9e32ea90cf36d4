"""Banks of synthetic cases, as they lie in a run's directory.

A bank is a directory, named by the step at which it was filled, complete or
absent: its cases, a manifest with a line for each, and a record of what it was
made from. A checkpoint remembers which one was in use.
"""

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fairdiff_jax import array_files, files
from fairdiff_jax.data.domain import FUNDUS, Domain
from fairdiff_jax.layout import Layout

CASES, MANIFEST, RECORD = "cases.npz", "manifest.jsonl", "bank.json"
SHEET = "sheet.png"  # some of its cases beside real ones


class Synthetic(NamedTuple):
  """Synthetic cases, and the mixture that they were made for.

  Attributes:
    image: uint8 [m, H, W], or RGB [m, H, W, 3].
    mask: uint8 [m, H, W], classes.
    group: int32 [m].
    sizes: cases of every group in an epoch [G].
  """

  image: np.ndarray
  mask: np.ndarray
  group: np.ndarray
  sizes: np.ndarray


def bank_facts(directory: Path) -> dict[str, str]:
  """What a checkpoint remembers of a bank that is there."""
  return {
    "name": directory.name,
    "sha256": files.sha256(directory / CASES),
  }


def remembered(facts: Mapping[str, Any]) -> dict[str, str] | None:
  """The bank that was in use when a checkpoint was saved, of its facts.

  Checkpoints of the first versions know its name only.
  """
  bank = facts.get("bank")
  return {"name": bank} if isinstance(bank, str) else bank


def check_bank(workdir: str | Path, facts: Mapping[str, Any]) -> None:
  """Raises ValueError unless the bank of a checkpoint's facts is there."""
  bank = remembered(facts)
  if bank is None:
    return
  path = Layout(workdir).banks / bank["name"] / CASES
  if not path.exists():
    raise ValueError(f"its bank {path} is missing")
  if "sha256" in bank and files.sha256(path) != bank["sha256"]:
    raise ValueError(f"its bank {path} is not the one it was saved with")


def remedy(directory: Path) -> str:
  """What to do about a bank that cannot be used."""
  return f"remove {directory}, and the same command makes it anew"


def read_record(directory: Path) -> dict[str, Any]:
  """What a bank was made from.

  Raises:
    ValueError: if it or the bank's cases are not as they were written.
  """
  for name in (RECORD, CASES):
    if not (directory / name).is_file():
      raise ValueError(f"{directory / name} is missing; {remedy(directory)}")
  record = files.read_json(directory / RECORD, remedy(directory))
  if files.sha256(directory / CASES) != record.get("sha256"):
    raise ValueError(
      f"{directory / CASES} is not the file that was written;"
      f" {remedy(directory)}"
    )
  return record


def read_bank(
  directory: Path,
  size: tuple[int, int],
  num_groups: int,
  domain: Domain = FUNDUS,
) -> Synthetic:
  """Reads a bank.

  Args:
    directory: of the bank.
    size: of its images, (H, W).
    num_groups: G.
    domain: its classes and channels.

  Raises:
    ValueError: if it is damaged, or not one of this run.
  """
  read_record(directory)
  path = directory / CASES
  arrays = array_files.read_npz(path, Synthetic._fields, mapped=True)
  absent = [name for name in Synthetic._fields if arrays.get(name) is None]
  if absent:
    raise ValueError(f"{path} has no array {absent[0]!r}; {remedy(directory)}")
  bank = Synthetic(*(arrays[name] for name in Synthetic._fields))
  number = bank.group.size
  mask = (number, *size)
  image = mask if domain.channels == 1 else (*mask, domain.channels)
  wanted = Synthetic(image, mask, (number,), (num_groups,))
  for name, array, shape in zip(bank._fields, bank, wanted, strict=True):
    if array.shape != tuple(shape):
      raise ValueError(
        f"{path}: {name!r} has shape {array.shape}, not {tuple(shape)};"
        f" {remedy(directory)}"
      )
  for name, limit in (("mask", domain.num_classes), ("group", num_groups)):
    array = getattr(bank, name)
    if array.size and not 0 <= array.min() <= array.max() < limit:
      raise ValueError(
        f"{path}: {name!r} has values outside 0..{limit - 1};"
        f" {remedy(directory)}"
      )
  return bank


def prune(workdir: str | Path, kept: Collection[str]) -> None:
  """Removes all banks but those of some names."""
  for directory in Layout(workdir).filled_banks:
    if directory.name not in kept:
      shutil.rmtree(directory)
