"""Real anatomy: masks of real patients, and images warped onto masks."""

import dataclasses

import cv2
import numpy as np
import pytest

from fairdiff_jax.data import phantom
from fairdiff_jax.data.statistics import UNLIT
from fairdiff_jax.synthesis.anatomy import (
  Anatomy,
  beyond_field,
  blend,
  warp,
)


@pytest.fixture(scope="module")
def anatomy():
  group = np.arange(12) % 3 - (np.arange(12) == 11)
  cases = [
    phantom.generate(np.random.default_rng([5, i]), max(g, 0))
    for i, g in enumerate(group)
  ]
  image, mask = (np.stack(x) for x in zip(*cases, strict=True))
  return Anatomy(image, mask, group)


def flat(anatomy):
  """Every patient's image of one level [12] of its own."""
  level = (20 * np.arange(12)).astype(np.uint8)
  image = np.broadcast_to(level[:, None, None], anatomy.image.shape)
  return level, dataclasses.replace(anatomy, image=np.ascontiguousarray(image))


def dice(a, b):
  return 2 * (a & b).sum() / (a.sum() + b.sum())


@pytest.mark.parametrize("shape", [(64, 64), (128, 96)])
def test_what_is_warped_follows_the_mask(shape):
  found = []
  for seed in range(12):
    rng = np.random.default_rng(seed)
    mask, target = (
      phantom.draw_mask(rng, (seed + i) % 3, shape) for i in (0, 1)
    )
    for label in (1, 2):
      moved = warp(255 * (mask >= label).astype(np.uint8), mask, target) > 127
      found.append(dice(moved, target >= label))
  assert np.mean(found) > 0.97 and min(found) > 0.85


def test_an_image_warped_onto_its_own_mask_stays(anatomy):
  for image, mask in zip(anatomy.image, anatomy.mask, strict=True):
    difference = warp(image, mask, mask).astype(float) - image
    assert np.abs(difference).mean() < 0.5


@pytest.mark.parametrize("shape", [(64, 64), (96, 64)])
def test_no_place_is_shown_twice(shape):
  """Rows and columns stay in order up to the border: nothing is mirrored."""
  rows = np.round(np.linspace(0, 255, shape[0])).astype(np.uint8)
  columns = np.round(np.linspace(0, 255, shape[1])).astype(np.uint8)
  for seed in range(12):
    rng = np.random.default_rng(seed)
    mask, target = (phantom.draw_mask(rng, g, shape) for g in (1, seed % 3))
    for axis, level in ((0, rows[:, None]), (1, columns)):
      image = np.ascontiguousarray(np.broadcast_to(level, shape))
      step = np.diff(warp(image, mask, target).astype(int), axis=axis)
      assert (step < 0).mean() < 0.02  # lookup ripples


def test_a_round_field_of_view_stays_round(anatomy):
  """Whatever is turned and warped, it is lit, and black beyond."""
  for case in zip(anatomy.image, anatomy.mask, strict=True):
    assert not beyond_field(*case).any()
  rows, columns = np.indices((64, 64)) - 31.5
  beyond = np.hypot(rows, columns) > 33
  image = np.where(beyond, np.uint8(3), np.maximum(anatomy.image, 20))
  found = beyond_field(image[0], anatomy.mask[0])
  np.testing.assert_array_equal(found, beyond)
  for mask in anatomy.mask:  # a dark background is seen, and warped with
    assert not beyond_field(200 * (mask > 0).astype(np.uint8), mask).any()
  number = np.arange(24)
  for colour in (image, np.repeat(image[..., None], 3, axis=-1)):
    eyes = dataclasses.replace(anatomy, image=colour)
    masks = eyes.draw_masks(0, number, number % 3)
    for found in eyes.draw_images(0, number, number % 3, masks):
      np.testing.assert_array_equal(found[beyond], 0)
      assert (found[~beyond] <= UNLIT).mean() < 0.002  # lookup ripples


def test_structures_side_by_side_and_rings():
  """Any classes: two discs apart, one in a ring."""
  rows, columns = np.indices((64, 64))

  def draw(shift, radius):
    first = np.hypot(rows - 32, columns - 18 - shift) < radius
    ring = np.hypot(rows - 30, columns - 46) < radius + 3
    hole = np.hypot(rows - 30, columns - 46) < radius - 2
    return np.select([first, hole, ring], [1, 3, 2], 0).astype(np.uint8)

  mask, target = draw(0, 9), draw(-2, 11)
  for label in (1, 2, 3):
    moved = warp(255 * (mask == label).astype(np.uint8), mask, target) > 127
    assert dice(moved, target == label) > 0.85


def test_a_blend_of_one_eye_with_itself_is_that_eye(anatomy):
  """But for the variance that it keeps as if they were two."""
  for image, mask in zip(anatomy.image, anatomy.mask, strict=True):
    found = blend(np.random.default_rng(0), image, image, mask)
    y = np.log(np.stack([image, found]) / 127.5 + 0.1)
    (one, two), of = y, mask == 0
    assert np.corrcoef(one[of], two[of])[0, 1] > 0.9
    assert two[of].mean() == pytest.approx(one[of].mean(), abs=0.05)
  flat = np.full((64, 64), 90, np.uint8)
  np.testing.assert_array_equal(
    blend(np.random.default_rng(0), flat, flat, anatomy.mask[0]), flat
  )


def test_a_blend_keeps_levels_and_grain(anatomy):
  """Levels are the first's; noise of both has the variance of either."""
  rng = np.random.default_rng(0)
  mask = anatomy.mask[0]
  level = np.array([60, 110, 170])[mask]
  one = np.clip(rng.normal(level, 6), 0, 255).astype(np.uint8)
  two = np.clip(rng.normal(level / 2, 3), 0, 255).astype(np.uint8)
  for colour in (lambda x: x, lambda x: np.repeat(x[..., None], 3, axis=-1)):
    found = np.stack(
      [blend(rng, colour(one), colour(two), mask) for _ in range(40)]
    ).astype(float)
    for label in (0, 1, 2):
      region = found[:, mask == label]
      expected = one[mask == label].astype(float)
      assert region.mean() == pytest.approx(expected.mean(), rel=0.03)
    grain = (found - found.mean(0))[:, mask == 0].std()
    assert found[:, mask == 0].std() == pytest.approx(6, rel=0.2)
    assert grain > 2  # every one is another


def test_a_blend_is_lit_as_the_first(anatomy):
  """Where one eye passes into the other no light ends."""
  mask = anatomy.mask[0]
  across = np.linspace(-0.5, 0.5, 64)
  one, two = (
    np.round(np.exp(np.log(80) + light)).astype(np.uint8)
    for light in (np.tile(across, (64, 1)), np.tile(-across, (64, 1)))
  )
  for seed in range(8):
    found = blend(np.random.default_rng(seed), one, two, mask)
    error = np.abs(np.log(found[mask == 0] / one[mask == 0]))
    apart = np.abs(np.log(two[mask == 0] / one[mask == 0]))
    assert np.sqrt((error**2).mean()) < 0.3 * np.sqrt((apart**2).mean())


def test_a_blend_has_the_field_of_view_of_the_first(anatomy):
  rows, columns = np.indices((64, 64)) - 31.5
  wide, narrow = (np.hypot(rows, columns) > radius for radius in (33, 29))
  image = np.maximum(anatomy.image[:2], 20)
  one, two = (
    np.where(b, 2, i) for b, i in zip((wide, narrow), image, strict=True)
  )
  mask = anatomy.mask[0]
  mask = np.where(narrow, 0, mask).astype(np.uint8)
  for a, b, beyond in ((one, two, wide), (two, one, narrow)):
    for seed in range(5):
      found = blend(np.random.default_rng(seed), np.uint8(a), np.uint8(b), mask)
      np.testing.assert_array_equal(found[beyond], 0)
      assert (found[~beyond] <= UNLIT).mean() < 0.002


def test_blends_are_of_two_the_first_of_the_group(anatomy):
  known = dataclasses.replace(anatomy, patients=2)
  number, group = np.arange(60), np.arange(60) % 3
  patients = known.draw_patients(0, number, group)
  assert patients.shape == (60, 2)
  np.testing.assert_array_equal(known.group[patients[:, 0]], group)
  assert (patients[:, 0] != patients[:, 1]).all()
  same = known.group[patients[:, 1]] == group
  assert 0.4 < same.mean() < 0.9
  masks = known.draw_masks(0, number, group)
  images = known.draw_images(0, number, group, masks)
  one = anatomy.draw_images(0, number, group, masks)
  assert np.abs(images.astype(float) - one).mean() > 1
  alone = Anatomy(
    anatomy.image[:1], anatomy.mask[:1], anatomy.group[:1], patients=2
  )
  assert alone.draw_patients(0, number[:2], group[:2]).tolist() == [[0, 0]] * 2
  few = Anatomy(
    anatomy.image[:3], anatomy.mask[:3], anatomy.group[:3], patients=2
  )
  patients = few.draw_patients(0, number, group)  # one of each group
  assert (patients[:, 0] != patients[:, 1]).all()


def test_without_a_foreground_nothing_is_warped(anatomy):
  empty = np.zeros((64, 64), np.uint8)
  for mask, target in ((empty, anatomy.mask[0]), (anatomy.mask[0], empty)):
    image = warp(anatomy.image[0], mask, target)
    np.testing.assert_array_equal(image, anatomy.image[0])


def test_a_case_depends_on_its_number_alone(anatomy):
  number, group = np.array([4, 9, 2]), np.array([0, 1, 2])
  masks = anatomy.draw_masks((7, 3), number, group)
  images = anatomy.draw_images((7, 3), number, group, masks)
  for i in range(3):
    one = slice(i, i + 1)
    mask = anatomy.draw_masks((7, 3), number[one], group[one])
    np.testing.assert_array_equal(mask, masks[one])
    image = anatomy.draw_images((7, 3), number[one], group[one], mask)
    np.testing.assert_array_equal(image, images[one])
  other = anatomy.draw_masks((7, 4), number, group)
  assert (other != masks).any()


def test_images_are_those_of_the_group(anatomy):
  level, known = flat(anatomy)
  number = np.arange(40)
  masks = known.draw_masks(0, number, number % 3)
  for group in range(3):
    images = known.draw_images(0, number, np.full(40, group), masks)
    assert set(np.unique(images)) == set(level[known.group == group])
  absent = known.draw_images(0, number, np.full(40, 3), masks)
  assert len(np.unique(absent)) > 6  # of anyone


def test_masks_are_real_ones_flipped_and_turned(anatomy):
  masks = anatomy.draw_masks(1, np.arange(30), np.arange(30) % 3)
  areas = np.sort([(mask > 0).sum() for mask in anatomy.mask])
  for mask in masks:
    assert set(np.unique(mask)) == {0, 1, 2}
    nearest = np.abs(areas - (mask > 0).sum()).min()
    assert nearest < 0.1 * areas.mean()


def test_a_turned_edge_stays_smooth():
  rows, columns = np.indices((64, 64))
  ellipse = ((rows - 30) / 18) ** 2 + ((columns - 33) / 12) ** 2 < 1
  mask = ellipse.astype(np.uint8)
  known = Anatomy(mask[None], mask[None], np.zeros(1, int))

  def outline(mask):
    contours, _ = cv2.findContours(
      mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE
    )
    (found,) = contours
    return cv2.arcLength(found, closed=True)

  turned = known.draw_masks(0, np.arange(40), np.zeros(40, int))
  assert np.mean([outline(m) for m in turned]) < 1.02 * outline(mask)


def test_masks_of_all_serve_a_group_as_often_as_it_has_such():
  group = np.repeat([0, 1, 2], [9, 15, 76])
  cases = [
    phantom.generate(np.random.default_rng([2, i]), g)
    for i, g in enumerate(group)
  ]
  image, mask = (np.stack(x) for x in zip(*cases, strict=True))
  anatomy = Anatomy(image, mask, group)
  ratio = np.sqrt((mask == 2).sum((1, 2)) / (mask > 0).sum((1, 2)))
  size = np.sqrt((mask > 0).sum((1, 2)))
  for g, own in ((0, 9), (1, 15), (2, 76)):
    share = anatomy.share_of_masks(g)
    assert share.sum() == pytest.approx(1)
    assert 1 / (share**2).sum() > 1.5 * min(own, 40)  # more than the group's
    for of in (ratio, size):
      real = of[group == g]
      mean = share @ of
      assert mean == pytest.approx(real.mean(), rel=0.06)
      spread = np.sqrt(share @ (of - mean) ** 2)
      assert spread == pytest.approx(real.std(), rel=0.25)
  np.testing.assert_allclose(anatomy.share_of_masks(3), 0.01)
  empty = dataclasses.replace(anatomy, mask=np.zeros_like(mask))
  np.testing.assert_allclose(empty.share_of_masks(0), 0.01)


def test_patients_are_those_whose_images_are_warped(anatomy):
  level, known = flat(anatomy)
  number, group = np.arange(20), np.arange(20) % 4
  masks = known.draw_masks(0, number, group)
  images = known.draw_images(0, number, group, masks)
  patients = known.draw_patients(0, number, group)
  np.testing.assert_array_equal(images.max((1, 2)), level[patients[:, 0]])
