"""Privacy: copies are caught by every measure, independent cases are not."""

import json

import numpy as np
import pytest

from fairdiff_jax.data import phantom
from fairdiff_jax.data.cases import Cases
from fairdiff_jax.evaluation import privacy, results, segmentation, trust
from fairdiff_jax.evaluation import synthetic_sections as sections
from fairdiff_jax.evaluation.features import Extractor
from fairdiff_jax.synthesis.generate import Generated


def draw(seed, number, split="train"):
  pairs = [
    phantom.generate(np.random.default_rng([seed, i]), i % 3, (32, 32))
    for i in range(number)
  ]
  image, mask = map(np.stack, zip(*pairs, strict=True))
  names = [f"{split}_{i}" for i in range(number)]
  points = np.zeros((number, 0, 3), np.float32)
  race = np.arange(number) % 3
  return Cases(names, image, mask, points, {"race": race}, split=split)


def see(image):
  """Features: means of blocks."""
  small = image.reshape(len(image), 8, 4, 8, 4).mean((2, 4))
  return small.reshape(len(image), -1).astype(np.float32)


@pytest.fixture(scope="module")
def people():
  return draw(0, 90), draw(1, 60, "test")


@pytest.fixture(scope="module")
def real(people):
  return privacy.Privacy(people[0], see)


def measure(real, people, image, mask):
  train, test = people
  found, near = real.measure(
    *(image, mask, test, train.attributes["race"], test.attributes["race"])
  )
  json.dumps(segmentation.json_ready(found))
  for name, of in real.near(image, mask).items():
    np.testing.assert_array_equal(of, near[name])
  return found["spaces"]


def test_a_copied_training_set_is_caught_by_every_measure(real, people):
  train, _ = people
  for name, found in measure(real, people, train.image, train.mask).items():
    assert found["nearest"] == found["ratio"] == 0, name
    assert found["closer"] == found["ratio_below"] == 1, name
    assert found["attack"] == found["attack_interval"][1] == 1, name
    assert found["closer_interval"][0] > 0.9, name
  assert all(real.too_near(train.image, train.mask))


@pytest.mark.parametrize(
  "change",
  [
    lambda x: x[:, :, ::-1],
    lambda x: x[:, np.arange(2, 34).clip(0, 31)][:, :, [0, 0, *range(30)]],
    lambda x: (x * 0.8 + 12).astype(x.dtype) if x.max() > 2 else x,
  ],
  ids=["mirrored", "moved", "darker"],
)
def test_a_changed_copy_is_a_copy_in_pixels(real, people, change):
  train, _ = people
  image, mask = (change(x[:20]) for x in (train.image, train.mask))
  near = real.near(image, mask)[privacy.PIXELS]
  assert (near.case == np.arange(20)).mean() > 0.9
  assert np.mean([x != "" for x in real.too_near(image, mask)]) > 0.8


def test_independent_cases_are_not(real, people):
  fresh = draw(2, 120)
  for name, found in measure(real, people, fresh.image, fresh.mask).items():
    assert found["closer"] < 0.1, name
    assert found["closer_interval"][0] < 0.05, name
    low, high = found["attack_interval"]
    assert low < 0.5 < high, name
    assert abs(found["ratio"] - found["ratio_real"]) < 0.1, name
  assert (
    np.mean([x != "" for x in real.too_near(fresh.image, fresh.mask)]) < 0.15
  )


def test_a_patients_own_cases_are_no_neighbours(people):
  train, _ = people
  doubled = train._replace(
    name=[f"{n}_{i}" for n in train.name for i in (0, 1)],
    image=train.image.repeat(2, 0),
    mask=train.mask.repeat(2, 0),
    points=train.points.repeat(2, 0),
    patient=tuple(n for n in train.name for _ in (0, 1)),
  )
  found = privacy.Privacy(doubled).spaces[privacy.PIXELS].real
  assert found.distance.min() > 0.05 and (found.second > 0.05).all()
  assert (found.case // 2 != np.arange(len(doubled.name)) // 2).all()


def test_nearest_by_hand():
  views = np.array([[0.0], [3.0], [0.5], [9.0]], np.float32)
  vectors = np.array([[0.4], [3.0]], np.float32)
  owner = np.array([0, 1, 0, 1])
  found = privacy.nearest(vectors, views, owner, np.array([-1, 1]))
  np.testing.assert_allclose(found.distance, [0.1, 2.5], atol=1e-6)
  assert found.case.tolist() == [0, 0]  # the third view is of the first case
  np.testing.assert_allclose(found.second, [2.6, np.nan], atol=1e-6)


def test_membership_by_hand_and_by_group():
  distance = np.array([1.0, 2.0, 5.0, 6.0]), np.array([3.0, 4.0, 7.0, 8.0])
  who = [*"abcd"], [*"efgh"]
  one, two = np.zeros(4, int), np.array([0, 0, 1, 1])
  # Of 16 pairs 12 are ordered; within groups all are.
  assert privacy.membership(*distance, *who, one, one)[0] == 0.75
  assert privacy.membership(*distance, *who, two, two) == (1, 1, 1)
  # Two cases of a patient count once.
  split = privacy.membership(
    *(np.array([1.0, 9.0, 2.0]), np.array([3.0, 4.0])),
    *(["a", "a", "b"], ["c", "d"], np.zeros(3, int), np.zeros(2, int)),
  )
  assert split[0] == 0.5
  none = privacy.membership(*distance, *who, two, two + 5)
  assert np.isnan(none).all()


def test_test_cases_are_no_members(people):
  with pytest.raises(ValueError, match="was given the test cases"):
    privacy.Privacy(people[1])


def generated(cases):
  n = len(cases.name)
  return Generated(cases.image, cases.mask, np.ones(n, int), np.full(n, ""))


def test_a_report_shows_the_nearest_pairs(people):
  train, test = people
  group = train.attributes["race"], test.attributes["race"]
  sources = {"as in the bank": generated(train), "as exported": generated(test)}
  private, pairs = trust.privacy_of(sources, train, test, group, see)
  assert private["as in the bank"]["spaces"]["pixels"]["closer"] == 1
  assert [pair.distance for pair in pairs["as in the bank"]] == [0] * 6
  made = results.Results(
    title="t", models={}, reason="none", privacy=private, pairs=pairs
  )
  stored = made.to_json()["privacy"]["as exported"]["pairs"]
  assert [p["real"] for p in stored] == [p.name for p in pairs["as exported"]]
  json.dumps(made.to_json())
  section = sections.privacy(made)
  assert section.body.count("half of a nearest pair") == 2 * 12
  assert "Against 90 training patients, with 60 held out" in section.note
  few = {"as in the bank": generated(train).take(slice(3))}
  assert trust.privacy_of(few, train, test, group, see) == ({}, {})


def test_a_report_shows_distances_of_features_and_masks(people):
  train, test = people
  names = ("A", "B", "C")
  synthetic = {
    "image": train.image,
    "mask": train.mask,
    "group": np.array(names)[train.attributes["race"]],
  }
  real = np.array(names)[test.attributes["race"]]
  sizes = []

  def counted(image):
    sizes.append(len(image))
    return see(image)

  extractor = Extractor("segmenter", "the baseline", counted)
  found = trust.realism_of(test, real, synthetic, names, extractor)
  assert found.keys() == {*names, "all"}
  features = found["all"]["features"]
  assert features["extractor"] == "the baseline"
  assert features["network"] == "segmenter"
  low, high = features["kid_interval"]
  assert low < 0 < high
  made = results.Results(title="t", models={}, reason="none", realism=found)
  body = sections.realism(made).body
  for text in (
    "the baseline, pooled, and not Inception",
    "KID",
    "1-NNA",
    "COV, published",
  ):
    assert text in body
  without = trust.realism_of(test, real, synthetic, names, None)
  assert "features" not in without["all"] and "clouds" in without["all"]
  group = train.attributes["race"], test.attributes["race"]
  made = {"as in the bank": generated(train)}
  trust.privacy_of(made, train, test, group, extractor)
  assert sizes == [60, 90, 90]  # test and training cases, and these in mirrors
