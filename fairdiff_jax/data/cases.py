"""Cases: one at native size, many that are prepared, and some not read yet."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from fairdiff_jax.data import attributes, groups
from fairdiff_jax.data.domain import FUNDUS, Domain


class Case(NamedTuple):
  """One patient at native size.

  Attributes:
    image: uint8 [H, W], or RGB [H, W, 3].
    mask: uint8 [H, W], classes of the domain.
    attributes: code by attribute, -1 unknown; of FairSeg's also `age` in years.
    dialect: the form that its file had.
    unread: (attribute, value) of what the file says and nobody can read; it
      is unknown.
    patient: whose case it is; '' for a patient of its own.
    synthetic: whether its file, or a manifest beside it, says so.
  """

  image: np.ndarray
  mask: np.ndarray
  attributes: dict[str, float]
  dialect: str
  unread: tuple[tuple[str, str], ...] = ()
  patient: str = ""
  synthetic: bool = False


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
    patient: n names of patients, who may have several cases; () where every
      case is one.
    intensity: [n, 3, I] float64, as `statistics.by_class` measures it; None
      where nobody has.
    split: "train", "validation" or "test".
  """

  name: list[str]
  image: np.ndarray
  mask: np.ndarray
  points: np.ndarray
  attributes: dict[str, np.ndarray]
  vocabulary: groups.Vocabulary = attributes.ATTRIBUTES
  domain: Domain = FUNDUS
  patient: Sequence[str] = ()
  intensity: np.ndarray | None = None
  split: str = "train"

  @property
  def whose(self) -> Sequence[str]:
    """Names of the n cases' patients; of a patient's only case, its own."""
    return self.patient or self.name

  def none(self, split: str) -> Self:
    """No case, of a split, but otherwise as these."""
    rows = {key: getattr(self, key)[:0] for key in ("image", "mask", "points")}
    return self._replace(
      **rows,
      name=[],
      attributes={key: codes[:0] for key, codes in self.attributes.items()},
      patient=(),
      intensity=None,
      split=split,
    )


def require_training(cases: Cases, what: str) -> None:
  """Raises ValueError unless cases are training cases; `what` takes them."""
  if cases.split != "train":
    raise ValueError(
      f"{what} was given the {cases.split} cases: what learns, or is made from"
      " what was learned, may see none of them; give it the training cases"
    )


class Source(NamedTuple):
  """Patients who are not read yet.

  Attributes:
    name: of where they are from.
    items: what `read` takes, one for every file or row.
    names: of the items.
    read: item -> (part, case, differing): the split that it belongs to; None
      for a case that the source leaves out, in the part that says why; and
      attributes in which the source contradicts itself. It raises ValueError
      or OSError for a case to set aside, NotAsDeclared for all.
    parts: the splits that are written.
    strict: whether a case that lacks a structure, or whose points do not give
      its mask back, is set aside; it is else kept, with a cloud of zeros.
    domain: what masks and images show.
    vocabulary: words of every attribute; {} for FairSeg's.
    notes: used cases by name -> what else there is to say of them, one
      sentence each.
  """

  name: str
  items: Sequence[Any]
  names: Sequence[str]
  read: Callable[[Any], tuple[str, Case | None, Sequence[str]]]
  parts: tuple[str, ...]
  strict: bool
  domain: Domain
  vocabulary: groups.Vocabulary
  notes: Callable[[Mapping[str, Any]], list[str]] = lambda used: []


class NotAsDeclared(ValueError):
  """A case is not what the domain says, and others will not be either."""
