"""Vocabulary, dialects and words."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairdiff_jax.data import attributes, groups

KEYS = {name: {*d[:2], *d.markers} for name, d in attributes.DIALECTS.items()}


@pytest.mark.parametrize(
  ("keys", "race", "age", "expected"),
  [
    (KEYS["current"], 2, 60, "current"),
    (KEYS["current"] | KEYS["older"], 2, 20000, "current"),
    (KEYS["older"], 0, 60, "older"),
    (KEYS["older"], 7, 20000, "older-237"),
    (KEYS["older"], 2, 60, "older"),
    (KEYS["older"], 2, 20000, "older-237"),
    (KEYS["older"], -1, 20000, "older-237"),
    (KEYS["older"], None, None, "older"),
    (KEYS["older-borders"], 1, None, "older-borders"),
    (KEYS["older-borders"], 3, None, "older-borders-237"),
    (KEYS["fairdiff"], 2, None, "fairdiff"),
    (KEYS["fairdomain"] | {"fundus_oct", "oct_disc_cup"}, 2, 60, "fairdomain"),
  ],
)
def test_detects_dialect(keys, race, age, expected):
  assert attributes.detect_dialect(keys, race=race, age=age) == expected


def test_race_2_without_age_is_not_guessed():
  with pytest.raises(ValueError, match=r"White \(dialect older\) or Asian"):
    attributes.detect_dialect(KEYS["older"], race=2, file="data_1.npz")


def test_no_dialect_names_file_found_and_accepted():
  with pytest.raises(ValueError) as error:
    attributes.detect_dialect(["image", "label"], file="data_1.npz")
  for part in (
    "data_1.npz",
    "image, label",
    "slo_fundus + disc_cup_mask",
    "fundus_slo + disc_cup + pid",
    "fundus + disc_cup_borders",
  ):
    assert part in str(error.value)


@pytest.mark.parametrize(
  ("dialect", "asian_black_white"),
  [("current", (0, 1, 2)), ("older-237", (2, 3, 7)), ("fairdiff", (2, 3, 7))],
)
def test_race_codes(dialect, asian_black_white):
  for canonical, code in enumerate(asian_black_white):
    value = np.array(float(code))
    parsed = attributes.parse_attribute("race", value, dialect=dialect)
    assert parsed == canonical


@pytest.mark.parametrize(
  ("attribute", "word", "group"),
  [
    ("race", "White", "White"),
    ("race", "black", "Black"),
    ("gender", " female ", "Female"),
    ("gender", "F", "Female"),
    ("gender", np.array(b"m"), "Male"),
    ("ethnicity", "non-hispanic", "Non-Hispanic"),
    ("language", "other", "Other"),
    ("maritalstatus", "married or partnered", "Married"),
    ("maritalstatus", "legally separated", "Separated"),
    ("race", "unknown", "Unknown"),
    ("race", "", "Unknown"),
  ],
)
def test_words(attribute, word, group):
  code = attributes.parse_attribute(attribute, word)
  assert attributes.group_name(attribute, code) == group


@pytest.mark.parametrize("value", [None, -1, np.nan, np.array(-1)])
def test_unknown(value):
  assert attributes.parse_attribute("gender", value) == -1


@pytest.mark.parametrize(
  ("value", "dialect", "message"),
  [
    (5, "current", "data_1.npz: race 5 is not one of 0 Asian, 1 Black, 2 Whi"),
    (0, "fairdiff", "race 0 is not one of 2 Asian, 3 Black, 7 White, -1 unkn"),
    (-2, "current", "race -2 is not one of"),
    (1.5, "current", "race 1.5 is not one of"),
    (
      "purple",
      "current",
      "race 'purple' is not one of asian, black, white, black or african"
      r" american, white or caucasian or unknown\.$",
    ),
    (10**400, "current", "race .* is not one number"),
    (np.zeros(3), "current", "data_1.npz: race .* is not one number"),
  ],
)
def test_out_of_vocabulary(value, dialect, message):
  with pytest.raises(ValueError, match=message):
    attributes.parse_attribute(
      "race", value, dialect=dialect, file="data_1.npz"
    )


def test_age():
  assert attributes.parse_age(61.5) == 61.5
  assert attributes.parse_age(20000, dialect="fairdiff") == pytest.approx(
    54.76, abs=0.01
  )
  assert attributes.parse_age("47") == 47
  assert attributes.parse_age("90+") == attributes.parse_age(b"90+") == 90
  assert attributes.parse_age("unknown") == attributes.parse_age(None) == -1
  with pytest.raises(ValueError, match=r"data_1\.npz: age 20000 is above 130"):
    attributes.parse_age(20000, file="data_1.npz")
  with pytest.raises(ValueError, match="age 'old' is not one number"):
    attributes.parse_age("old")


def test_names_and_codes_are_inverse():
  for attribute, names in attributes.ATTRIBUTES.items():
    for code, name in enumerate(names):
      assert attributes.group_name(attribute, code) == name
      assert groups.group_code(attribute, name.lower()) == code


def test_suggests_names():
  with pytest.raises(ValueError, match=r"Did you mean 'Asian'\?"):
    groups.group_code("race", "Asain")
  with pytest.raises(ValueError, match=r"Did you mean 'gender'\?"):
    groups.group_code("gendre", "Male")
  with pytest.raises(ValueError, match="Its groups are Asian, Black, White"):
    groups.group_code("race", "Zzz")
  with pytest.raises(ValueError, match="codes 0 to 2"):
    attributes.group_name("race", 7)


def test_combined_groups():
  names = groups.group_names("race+gender")
  assert names[:3] == ("Asian Female", "Asian Male", "Black Female")
  assert len(names) == 6
  columns = {
    "race": np.array([0, 1, 2, -1, 0]),
    "gender": np.array([1, 0, 1, 0, -1]),
  }
  found = groups.group_codes("race+gender", columns)
  np.testing.assert_array_equal(found, [1, 2, 5, -1, -1])
  for code, name in enumerate(names):
    assert groups.group_code("race+gender", name.upper()) == code
    codes = groups.attributes_of("race+gender", name)
    one = {key: np.array([value]) for key, value in codes.items()}
    assert groups.group_codes("race+gender", one) == [code]
  with pytest.raises(ValueError, match="No attribute 'gendre'"):
    groups.group_names("race+gendre")
  with pytest.raises(
    ValueError, match=r"'race\+race' names an attribute twice"
  ):
    groups.group_names("race+race")


def test_small_groups_are_pooled():
  columns = {"race": np.array([0, 1, 1, 2, 2, 2, -1])}
  assert groups.small_groups("race", columns, 0) == ()
  pooled = groups.small_groups("race", columns, 3)
  assert pooled == ("Asian", "Black")
  assert groups.group_names("race", pooled) == ("White", "Other")
  found = groups.group_codes("race", columns, pooled)
  np.testing.assert_array_equal(found, [1, 1, 1, 0, 0, 0, -1])
  assert groups.group_code("race", "other", pooled) == 1
  assert groups.attributes_of("race", "Other") == {}
  assert groups.attributes_of("language", "Other") == {"language": 2}
  with pytest.raises(ValueError, match="no group 'Asien' to pool"):
    groups.group_names("race", ("Asien",))


def test_pooled_groups_join_the_group_that_is_called_other():
  names = ("English", "Other")
  for pooled in (("Spanish",), ("Spanish", "Other")):
    assert groups.group_names("language", pooled) == names
    columns = {"language": np.array([0, 1, 2, -1])}
    found = groups.group_codes("language", columns, pooled)
    np.testing.assert_array_equal(found, [0, 1, 1, -1])
    assert groups.attributes_of("language", "Other", pooled) == {}
  pooled = ("Other",)  # too few, and nothing to join
  assert groups.group_names("language", pooled)[2] == "Other"
  assert groups.attributes_of("language", "Other", pooled) == {"language": 2}


def test_what_all_cases_of_other_have_is_known():
  pooled = ("Asian Female", "Black Female")
  found = groups.attributes_of("race+gender", "Other", pooled)
  assert found == {"gender": 0}


@st.composite
def groupings(draw):
  """An attribute or several, and some of its groups to pool."""
  parts = draw(
    st.lists(
      st.sampled_from(list(attributes.ATTRIBUTES)),
      min_size=1,
      max_size=3,
      unique=True,
    )
  )
  attribute = "+".join(parts)
  names = groups.group_names(attribute)
  return attribute, draw(st.lists(st.sampled_from(names), unique=True))


@settings(derandomize=True, deadline=None)
@given(groupings())
def test_names_and_codes_of_all_groupings_agree(grouping):
  attribute, pooled = grouping
  parts = attribute.split("+")
  own = groups.group_names(attribute)
  names = groups.group_names(attribute, pooled)
  assert len({name.lower() for name in names}) == len(names)
  assert set(names) - {groups.OTHER} <= set(own) - set(pooled)
  sizes = [len(attributes.ATTRIBUTES[part]) for part in parts]
  every = np.array(list(itertools.product(*map(range, sizes)))).T
  columns = dict(zip(parts, every, strict=True))
  codes = groups.group_codes(attribute, columns, pooled)
  assert set(codes) == set(range(len(names)))
  for i, name in enumerate(own):
    kept = name in names and name not in pooled
    assert names[codes[i]] == (name if kept else groups.OTHER)
  for code, name in enumerate(names):
    assert groups.group_code(attribute, name, pooled) == code
    members = every[:, codes == code]
    expected = {
      part: column[0]
      for part, column in zip(parts, members, strict=True)
      if len(set(column)) == 1
    }
    assert groups.attributes_of(attribute, name, pooled) == expected
  # Groups with one case each, those to pool with none, are too small below 1.
  left = np.isin(own, pooled, invert=True)
  columns = {part: column[left] for part, column in columns.items()}
  small = groups.small_groups(attribute, columns, 1)
  assert set(small) == set(pooled)
