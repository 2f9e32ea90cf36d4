"""The gate: who may be shared, on real and made-up cases."""

import numpy as np
import pytest

from fairdiff_jax.evaluation import gate as gates
from fairdiff_jax.synthesis import card as cards
from tests.test_privacy import draw, see

GROUPS = ("Asian", "Black", "White")


class Oracle:
  """Finds the masks of images that it knows, and of others nothing."""

  features = staticmethod(see)

  def __init__(self, *known):
    self.masks = {
      image.tobytes(): mask
      for cases in known
      for image, mask in zip(cases.image, cases.mask, strict=True)
    }

  def __call__(self, image):
    none = np.zeros(image.shape[1:3], np.uint8)
    return np.stack([self.masks.get(x.tobytes(), none) for x in image])


@pytest.fixture(scope="module")
def people():
  return draw(0, 90), draw(1, 60, "test"), draw(2, 60)


@pytest.fixture(scope="module")
def gate(people):
  train, test, fresh = people
  group = tuple(c.attributes["race"] for c in (train, train, test))
  predict = Oracle(train, fresh)
  return gates.TrustGate(train, train, test, GROUPS, group, predict)


def test_a_copied_training_set_is_refused_whole(people, gate):
  train, *_ = people
  found = gate.check(train.image, train.mask, train.attributes["race"])
  assert set(found) == {"too near a real patient in pixels"}


def test_independent_cases_with_their_masks_pass(people, gate):
  *_, fresh = people
  found = gate.check(fresh.image, fresh.mask, fresh.attributes["race"])
  assert np.mean([why == "" for why in found]) > 0.8
  assert not any("mask" in why for why in found)


def test_an_image_that_does_not_show_its_mask_is_refused(people, gate):
  *_, fresh = people
  noise = np.random.default_rng(0).integers(0, 256, fresh.image.shape)
  group = fresh.attributes["race"]
  found = gate.check(noise.astype(np.uint8), fresh.mask, group)
  assert all(found)
  assert "the image does not show its mask" in found
  other = gate.check(fresh.image, np.roll(fresh.mask, 9, 1), group)
  assert all(other)


def test_figures_fit_the_data_card(people, gate):
  *_, fresh = people
  found = gate.measure(fresh.image, fresh.mask, fresh.attributes["race"])
  schema = cards.SCHEMA["properties"]
  for name in ("privacy", "agreement"):
    assert not [*cards.faults(found[name], schema[name])]
  assert found["agreement"]["Asian"] == {"mean": 1, "threshold": 1}
