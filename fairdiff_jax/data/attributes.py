"""Patient attributes, and the dialects in which the npz files write them.

Harvard-FairSeg has been published in several forms that differ in the names
of their arrays and in the codes of their groups. `DIALECTS` holds all of them;
everything after this module sees one vocabulary, `ATTRIBUTES`, whose indices
are the codes of the current release, with -1 for unknown.

Sources: the README and the loaders of Harvard-FairSeg (Tian et al., ICLR 2024),
and those of FairDomain, FairDiff and FairMedFM.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

ATTRIBUTES: dict[str, tuple[str, ...]] = {
  "race": ("Asian", "Black", "White"),
  "gender": ("Female", "Male"),
  "ethnicity": ("Non-Hispanic", "Hispanic"),
  "language": ("English", "Spanish", "Other"),
  "maritalstatus": (
    "Married",
    "Single",
    "Divorced",
    "Widowed",
    "Separated",
  ),
}

UNKNOWN = -1
OLDEST_AGE = 130  # years; a larger number is an age in days

RACE_012 = {0: 0, 1: 1, 2: 2}
RACE_237 = {2: 0, 3: 1, 7: 2}


class Dialect(NamedTuple):
  """How one release writes a patient.

  Attributes:
    image: key of the SLO fundus image, [H, W].
    mask: key of the mask, [H, W] in {0 background, -1 rim, -2 cup}.
    markers: further keys that a file of this dialect must hold.
    race: the file's race codes -> indices into ATTRIBUTES["race"].
    age: unit of `age`, "years" or "days".
  """

  image: str
  mask: str
  markers: tuple[str, ...]
  race: Mapping[int, int]
  age: str


# The first entry that fits a file is its dialect; entries with the same keys
# are told apart by the values (see `detect_dialect`).
DIALECTS: dict[str, Dialect] = {
  "current": Dialect("slo_fundus", "disc_cup_mask", (), RACE_012, "years"),
  "fairdomain": Dialect(
    "fundus_slo", "slo_disc_cup", ("pid",), RACE_237, "days"
  ),
  "older": Dialect("fundus_slo", "disc_cup", ("pid",), RACE_012, "years"),
  "older-237": Dialect("fundus_slo", "disc_cup", ("pid",), RACE_237, "days"),
  "older-borders": Dialect(
    "fundus_slo", "disc_cup_borders", ("pid",), RACE_012, "years"
  ),
  "older-borders-237": Dialect(
    "fundus_slo", "disc_cup_borders", ("pid",), RACE_237, "days"
  ),
  "fairdiff": Dialect("fundus", "disc_cup_borders", (), RACE_237, "days"),
}

# Keys under which a file, of any dialect, may hold an attribute.
KEYS: dict[str, tuple[str, ...]] = {
  "race": ("race",),
  "gender": ("gender",),
  "ethnicity": ("ethnicity", "hispanic"),
  "language": ("language",),
  "maritalstatus": ("maritalstatus", "marriagestatus"),
  "age": ("age",),
}

# Words of the csv files, in lower case, besides the names in ATTRIBUTES.
WORDS: dict[str, dict[str, int]] = {
  "race": {"black or african american": 1, "white or caucasian": 2},
  "gender": {"f": 0, "m": 1},
  "ethnicity": {"non hispanic": 0, "not hispanic": 0},
  "language": {"others": 2},
  "maritalstatus": {"married or partnered": 0, "legally separated": 4},
}
UNKNOWN_WORDS = frozenset({"", "unknown", "unavailable", "null", "nan", "-1"})


def detect_dialect(
  keys: Collection[str],
  *,
  race: Any = None,
  age: Any = None,
  file: str = "file",
) -> str:
  """Finds the dialect of a file.

  The older FairSeg files come with races 0/1/2 and ages in years or with
  races 2/3/7 and ages in days, under the same keys. Races 0, 1, 3 and 7 decide
  that; race 2, which is White in one and Asian in the other, is decided by
  the age.

  Args:
    keys: names of the arrays in the file.
    race: the file's value of race, if it has one.
    age: the file's value of age, if it has one.
    file: name to use in messages.

  Returns:
    A key of DIALECTS.

  Raises:
    ValueError: no dialect has these keys, or the race cannot be told.
  """
  found = [
    name
    for name, dialect in DIALECTS.items()
    if {dialect.image, dialect.mask, *dialect.markers} <= set(keys)
  ]
  if not found:
    accepted = {
      " + ".join((d.image, d.mask, *d.markers)): None for d in DIALECTS.values()
    }
    raise ValueError(
      f"{file}: not a known form of Harvard-FairSeg. It holds the arrays "
      f"{', '.join(sorted(keys)) or '(none)'}; one of these sets is needed: "
      f"{'; '.join(accepted)}."
    )
  fitting = [name for name in found if _same_keys(name, found[0])]
  if len(fitting) == 1:
    return found[0]

  code, years = _or_none(_number, race), _or_none(_years, age)
  coded = [name for name in fitting if code in DIALECTS[name].race]
  if len(coded) == 1:
    return coded[0]
  if years is not None and years > 0:
    unit = "days" if years > OLDEST_AGE else "years"
    return next(name for name in fitting if DIALECTS[name].age == unit)
  if len(coded) > 1:
    raise ValueError(
      f"{file}: race {code} is {_race_names(coded, code)}, and the file has no "
      "age to tell which. Add an `age` (in years, or in days where the races "
      "are 2/3/7)."
    )
  return fitting[0]


def parse_attribute(
  attribute: str,
  value: Any,
  *,
  dialect: str = "current",
  file: str = "file",
) -> int:
  """Turns a file's code, or a csv's word, into the canonical code.

  Args:
    attribute: a key of ATTRIBUTES.
    value: a number or 0-d array in the dialect's code, or a word.
    dialect: a key of DIALECTS; words do not depend on it.
    file: name to use in messages.

  Returns:
    An index into ATTRIBUTES[attribute], or -1 for unknown.

  Raises:
    ValueError: the value is outside the vocabulary.
  """
  word = text(value)
  if word is not None:
    code = _words(attribute).get(word.lower())
    if code is None:
      raise ValueError(
        f"{file}: {attribute} {word!r} is not one of {_known_words(attribute)}."
      )
    return code

  codes = (
    DIALECTS[dialect].race
    if attribute == "race"
    else {i: i for i in range(len(ATTRIBUTES[attribute]))}
  )
  code = _number(value, f"{file}: {attribute}")
  if code is None or code == UNKNOWN:
    return UNKNOWN
  if code not in codes:
    names = ", ".join(
      f"{c} {group_name(attribute, i)}" for c, i in codes.items()
    )
    raise ValueError(
      f"{file}: {attribute} {code:g} is not one of {names}, -1 unknown "
      f"(dialect {dialect})."
    )
  return codes[int(code)]


def parse_age(
  value: Any, *, dialect: str = "current", file: str = "file"
) -> float:
  """Returns the age in years, or -1 for unknown; that of `90+` is 90.

  Raises:
    ValueError: the age is not a number, or above 130 years.
  """
  age = _years(value, f"{file}: age")
  if age is None or age < 0:
    return float(UNKNOWN)
  if DIALECTS[dialect].age == "days" and age > OLDEST_AGE:
    age = age / 365.25
  if age > OLDEST_AGE:
    raise ValueError(
      f"{file}: age {value} is above {OLDEST_AGE} years; files of the dialect "
      f"{dialect} hold it in {DIALECTS[dialect].age}."
    )
  return float(age)


def group_name(attribute: str, code: int) -> str:
  """Returns the name of a canonical code, `Unknown` for -1.

  Raises:
    ValueError: no such attribute or code.
  """
  names = _names(attribute)
  if code == UNKNOWN:
    return "Unknown"
  if not 0 <= code < len(names):
    raise ValueError(
      f"{attribute} has the codes 0 to {len(names) - 1} and -1 for unknown, "
      f"not {code}."
    )
  return names[code]


def accepted(attribute: str) -> str:
  """Which values of an attribute, or of `age`, can be read, for messages."""
  if attribute == "age":
    return f"read are 0 to {OLDEST_AGE} years, such as 61 or 90+, and unknown"
  return (
    "read are the codes of the file's dialect and the words "
    f"{_known_words(attribute)}"
  )


def _known_words(attribute: str) -> str:
  known = [w for w, c in _words(attribute).items() if c != UNKNOWN]
  return f"{', '.join(known)} or unknown"


def _names(attribute: str) -> tuple[str, ...]:
  if attribute not in ATTRIBUTES:
    raise ValueError(
      f"No attribute {attribute!r} in Harvard-FairSeg's files; they have "
      f"{', '.join(ATTRIBUTES)}."
    )
  return ATTRIBUTES[attribute]


def _words(attribute: str) -> dict[str, int]:
  names = {n.lower(): i for i, n in enumerate(_names(attribute))}
  return names | WORDS[attribute] | dict.fromkeys(UNKNOWN_WORDS, UNKNOWN)


def _same_keys(a: str, b: str) -> bool:
  return DIALECTS[a][:3] == DIALECTS[b][:3]


def _race_names(dialects: list[str], code: float) -> str:
  return " or ".join(
    f"{group_name('race', DIALECTS[d].race[int(code)])} (dialect {d})"
    for d in dialects
  )


def _or_none(parse: Callable[[Any], float | None], value: Any) -> float | None:
  try:
    return parse(value)
  except ValueError:
    return None


def text(value: Any) -> str | None:
  """A word of a file or csv, None for what is no text."""
  value = np.asarray(value)
  if value.dtype.kind == "S":
    value = np.char.decode(value, "utf-8", "replace")
  return str(value).strip() if value.dtype.kind == "U" else None


def _years(value: Any, what: str = "age") -> float | None:
  """Returns an age as float, in whatever unit; None for unknown."""
  word = text(value)
  if word is None:
    return _number(value, what)
  if word.lower() in UNKNOWN_WORDS:
    return None
  return _number(word.removesuffix("+"), what)


def _number(value: Any, what: str = "value") -> float | None:
  """Returns a scalar as float; None for absent and NaN."""
  if value is None:
    return None
  try:
    number = float(np.asarray(value).item())
  except (TypeError, ValueError, OverflowError):
    raise ValueError(f"{what} {value!r} is not one number.") from None
  return None if np.isnan(number) else number
