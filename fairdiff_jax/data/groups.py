"""Groups are words; codes exist only on the devices.

A *vocabulary* has the words of every attribute. A sensitive attribute is one
column, several joined by '+', whose groups are all combinations, or a column of
numbers with the bounds of its bands, as in 'age:50,65,80':

    'below 50', '50 to 65' (65 left out), '65 to 80', '80 and above'

Groups are named once, when a run starts, and recorded in it: `recorded` gives
the words that a `config.data` then keeps, `vocabulary_of` reads them back.
"""

import difflib
import itertools
import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from fairdiff_jax.data.attributes import ATTRIBUTES, UNKNOWN
from fairdiff_jax.data.domain import is_table

OTHER = "Other"  # the group of groups that have too few cases

Vocabulary = Mapping[str, tuple[str, ...]]


def group_names(
  attribute: str,
  pooled: Collection[str] = (),
  vocabulary: Vocabulary = ATTRIBUTES,
) -> tuple[str, ...]:
  """Names of the groups that an attribute tells apart, no name twice.

  Args:
    attribute: a key of the vocabulary, with bands or without, or several joined
      by '+', whose groups are all combinations, such as 'Asian Female' of
      'race+gender'.
    pooled: names of groups that become one, OTHER, which comes last. An
      attribute's own group of that name joins them.
    vocabulary: the words of every attribute.

  Raises:
    ValueError: no such attribute or group, with the nearest name, an attribute
      twice, or bands that are none.
  """
  parts = attribute.split("+")
  if len(set(parts)) < len(parts):
    raise ValueError(
      f"{attribute!r} names an attribute twice; name each of them once."
    )
  words = (_words(part, vocabulary) for part in parts)
  names = tuple(" ".join(p) for p in itertools.product(*words))
  for name in pooled:
    if name not in names:
      raise ValueError(
        f"{attribute} has no group {name!r} to pool.{did_you_mean(name, names)}"
      )
  if not pooled:
    return names
  return (*(n for n in names if n not in {*pooled, OTHER}), OTHER)


def group_codes(
  attribute: str,
  attributes: Mapping[str, np.ndarray],
  pooled: Collection[str] = (),
  vocabulary: Vocabulary = ATTRIBUTES,
) -> np.ndarray:
  """Each case's index into `group_names(attribute, pooled, vocabulary)`.

  Args:
    attribute: as for `group_names`.
    attributes: codes [n] by attribute, indices into its words.
    pooled: as for `group_names`.
    vocabulary: as for `group_names`.

  Returns:
    int32 [n], -1 where an attribute is unknown.
  """
  group = _group_of(attribute, pooled, vocabulary)
  columns = [
    _column(part, attributes, vocabulary) for part in attribute.split("+")
  ]
  unknown = np.any([column < 0 for column in columns], axis=0)
  known = tuple(np.maximum(column, 0) for column in columns)
  return np.where(unknown, UNKNOWN, group[known]).astype(np.int32)


def group_counts(group: np.ndarray, num_groups: int) -> np.ndarray:
  """Cases of every group [G]; those of unknown group count nowhere."""
  return np.bincount(group[group >= 0], minlength=num_groups)


def small_groups(
  attribute: str,
  attributes: Mapping[str, np.ndarray],
  min_cases: int,
  vocabulary: Vocabulary = ATTRIBUTES,
) -> tuple[str, ...]:
  """Names of the groups with fewer than `min_cases` cases; none if 0."""
  names = group_names(attribute, (), vocabulary)
  code = group_codes(attribute, attributes, (), vocabulary)
  counts = group_counts(code, len(names))
  return tuple(
    name for name, count in zip(names, counts, strict=True) if count < min_cases
  )


def group_code(
  attribute: str,
  name: str,
  pooled: Collection[str] = (),
  vocabulary: Vocabulary = ATTRIBUTES,
) -> int:
  """Index of a group's name, in any case, into `group_names`.

  Raises:
    ValueError: no such attribute or group; suggests the nearest name.
  """
  names = group_names(attribute, pooled, vocabulary)
  lower = [n.lower() for n in names]
  if name.lower() not in lower:
    raise ValueError(
      f"{attribute} has no group {name!r}.{did_you_mean(name, names)} "
      f"Its groups are {', '.join(names)}."
    )
  return lower.index(name.lower())


def attributes_of(
  attribute: str,
  name: str,
  pooled: Collection[str] = (),
  vocabulary: Vocabulary = ATTRIBUTES,
) -> dict[str, int]:
  """Codes, by attribute, that all cases of a group have.

  A group of `group_names(attribute, pooled)`, or OTHER, of which nothing is
  known where `pooled` does not say what it holds.
  """
  names = group_names(attribute, pooled, vocabulary)
  if name == OTHER and name not in names:
    return {}
  code = group_code(attribute, name, pooled, vocabulary)
  members = np.nonzero(_group_of(attribute, pooled, vocabulary) == code)
  return {
    part: int(codes[0])
    for part, codes in zip(attribute.split("+"), members, strict=True)
    if (codes == codes[0]).all()
  }


def recorded(
  attribute: str, vocabulary: Vocabulary
) -> tuple[tuple[str, ...], ...]:
  """The words of each of an attribute's parts, as `data.words` keeps them.

  Raises:
    ValueError: as `group_names`, or there is one group alone.
  """
  names = group_names(attribute, (), vocabulary)
  if len(names) < 2:
    raise ValueError(
      f"data.attribute={attribute!r} has the one group"
      f" {', '.join(names) or '(none)'}, so that nothing can be said of"
      " fairness; choose another attribute"
    )
  return tuple(_words(part, vocabulary) for part in attribute.split("+"))


def vocabulary_of(config: Any) -> Vocabulary:
  """The words that a `config.data` knows: its own, or FairSeg's."""
  if not config.words and is_table(config.source):
    raise ValueError(
      f"the groups of data.attribute={config.attribute!r} are in the table; a"
      " run finds them when it starts, here they must be given as data.words,"
      " such as (('F', 'M'),)"
    )
  if not config.words:
    return ATTRIBUTES
  parts = config.attribute.split("+")
  return dict(zip(parts, map(tuple, config.words), strict=True))


def with_ages(
  codes: Mapping[str, np.ndarray], ages: np.ndarray
) -> tuple[Vocabulary, dict[str, np.ndarray]]:
  """FairSeg's vocabulary and codes, with the ages [n] as an attribute.

  Ages are words, so that they can be told apart by bands; -1 is unknown.
  """
  ages = np.asarray(ages, np.float64)
  known = np.unique(ages[ages >= 0])
  index = np.where(ages < 0, UNKNOWN, np.searchsorted(known, ages))
  return (
    ATTRIBUTES | {"age": tuple(f"{x:g}" for x in known)},
    dict(codes) | {"age": index.astype(np.int32)},
  )


def did_you_mean(name: str, names: Collection[str]) -> str:
  """A sentence with the name that is nearest, if any."""
  lower = {n.lower(): n for n in names}
  near = difflib.get_close_matches(name.lower(), lower, n=1)
  return f" Did you mean {lower[near[0]]!r}?" if near else ""


def _group_of(
  attribute: str, pooled: Collection[str], vocabulary: Vocabulary
) -> np.ndarray:
  """Group index, by the code of every attribute of a combination."""
  names = group_names(attribute, pooled, vocabulary)
  index = [
    names.index(name if name in names else OTHER)
    for name in group_names(attribute, (), vocabulary)
  ]
  sizes = [len(_words(part, vocabulary)) for part in attribute.split("+")]
  return np.reshape(index, sizes)


def _words(part: str, vocabulary: Vocabulary) -> tuple[str, ...]:
  """The words of a column, or the names of its bands."""
  if part in vocabulary:
    return vocabulary[part]
  name = part.partition(":")[0]
  if name not in vocabulary:
    raise ValueError(
      f"No attribute {name!r}.{did_you_mean(name, vocabulary)} "
      f"The attributes are {', '.join(vocabulary)}."
    )
  bounds = _bounds(part)
  for word in vocabulary[name]:
    _number(name, word)
  pairs = itertools.pairwise(bounds)
  return (
    f"below {bounds[0]:g}",
    *(f"{low:g} to {high:g}" for low, high in pairs),
    f"{bounds[-1]:g} and above",
  )


def _bounds(part: str) -> list[float]:
  """The numbers of 'age:50,65,80'."""
  try:
    bounds = [float(word) for word in part.partition(":")[2].split(",")]
  except ValueError:
    bounds = []
  finite = all(map(math.isfinite, bounds))
  if not bounds or not finite or sorted(set(bounds)) != bounds:
    raise ValueError(
      f"{part!r} is not an attribute with the bounds of its bands, rising"
      " numbers, such as 'age:50,65,80'"
    )
  return bounds


def _column(
  part: str, attributes: Mapping[str, np.ndarray], vocabulary: Vocabulary
) -> np.ndarray:
  """Codes [n] of a column, or of its bands."""
  if part in attributes:
    return attributes[part]
  name = part.partition(":")[0]
  values = [_number(name, word) for word in vocabulary[name]]
  bands = np.searchsorted(_bounds(part), values, side="right")
  codes = attributes[name]
  return np.where(codes < 0, UNKNOWN, np.append(bands, 0)[codes])


def _number(attribute: str, word: str) -> float:
  try:
    return float(word)
  except ValueError:
    raise ValueError(
      f"{attribute} {word!r} is not a number, so that it lies in no band;"
      f" correct it, or leave the bounds of {attribute} out"
    ) from None
