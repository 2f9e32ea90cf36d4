"""Augmentation: image, mask and points move alike, within the recipe."""

import cv2
import numpy as np
import pytest

from fairdiff_jax.data.augment import RECIPES, augment, generators_recipe
from fairdiff_jax.data.contours import mask_to_points, points_to_mask
from fairdiff_jax.data.phantom import generate

NO_POINTS = np.empty((0, 3), np.float32)
SHAPES = [(64, 64), (48, 80), (160, 128)]


def rng(seed=0):
  return np.random.default_rng(seed)


def centred_mask(shape):
  """A disc and a cup beside its centre."""
  unit = min(shape) / 64
  row, column = np.indices(shape) - (np.array(shape).reshape(2, 1, 1) - 1) / 2
  disc = np.hypot(row - unit, 1.2 * column) < 14 * unit
  cup = np.hypot(row + unit, column - 2 * unit) < 7 * unit
  return disc.astype(np.uint8) + (disc & cup)


def dice(a, b):
  return 2 * (a & b).sum() / (a.sum() + b.sum())


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_types(recipe, shape):
  image, mask = generate(rng(1), 0, shape)
  before = image.copy(), mask.copy()
  for seed in range(6):
    found = augment(recipe, rng(seed), image, mask, NO_POINTS)
    again = augment(recipe, rng(seed), image, mask, NO_POINTS)
    for a, b in zip(found, again, strict=True):
      np.testing.assert_array_equal(a, b)
    assert found[0].shape == found[1].shape == shape
    assert found[0].dtype == np.float32 and found[1].dtype == np.uint8
    assert set(np.unique(found[1])) <= {0, 1, 2}
    assert found[2].shape == (0, 3)
  np.testing.assert_array_equal((image, mask), before)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_image_mask_and_points_move_together(recipe, shape):
  mask = centred_mask(shape)
  points = mask_to_points(mask, 256)
  worst, kinds = 1.0, set()
  for seed in range(40):
    for label in (1, 2):
      image = np.where(mask >= label, 255, 0).astype(np.uint8)
      found, moved, cloud = augment(recipe, rng(seed), image, mask, points)
      assert cloud.shape == points.shape and cloud.dtype == np.float32
      np.testing.assert_array_equal(cloud[:, 2], points[:, 2])
      kinds.add(bytes(moved))
      # Whatever became of the tones, there is a middle between the two.
      shown = moved >= label
      drawn = points_to_mask(cloud, shape) >= label
      # A mirrored border may show parts of the disc again.
      near = cv2.dilate(drawn.view(np.uint8), np.ones((7, 7))) > 0
      middle = (found[shown].mean() + found[~shown].mean()) / 2
      worst = min(
        worst,
        dice(found > middle, shown),
        dice(drawn, shown & near),
      )
  assert worst > 0.88
  assert len(kinds) > 5 or recipe == "none"


def test_none_is_the_identity():
  image, mask = generate(rng(3), 1)
  points = mask_to_points(mask, 64)
  found = augment("none", rng(), image, mask, points)
  for a, b in zip(found, (image, mask, points), strict=True):
    np.testing.assert_array_equal(a, b)


def test_light_moves_pixels_and_keeps_tones():
  image, mask = generate(rng(3), 1)
  exact = 0
  for seed in range(40):
    found, moved, _ = augment("light", rng(seed), image, mask, NO_POINTS)
    area = (moved > 0).sum() / (mask > 0).sum()
    assert area == pytest.approx(1, abs=0.03)
    assert found.mean() == pytest.approx(image.mean(), abs=1.5)
    exact += np.array_equal(np.sort(found, None), np.sort(image, None))
  # Quarter turns, flips and nothing interpolate no pixel: 3 times of 4.
  assert 24 < exact < 36


def test_strong_scales_within_bounds():
  grid = np.indices((64, 64)) - 31.5
  mask = (np.hypot(*grid) < 12).astype(np.uint8)
  areas, offsets = [], []
  for seed in range(300):
    _, moved, _ = augment("strong", rng(seed), mask, mask, NO_POINTS)
    areas.append(moved.sum() / mask.sum())
    offsets.append(np.argwhere(moved).mean(0) - 31.5)
  areas, offsets = np.array(areas), np.array(offsets)
  still = areas == 1
  assert 0.2 < still.mean() < 0.4
  # Scale squared, and some more by the elastic field.
  assert 0.8**2 * 0.75 < areas.min() < 0.75
  assert 1.4 < areas.max() < 1.25**2 * 1.25
  assert np.abs(offsets[~still].mean(0)).max() < 0.6
  assert (np.abs(offsets) < 4 + 3 * 1.5).all()
  assert offsets.std(0).min() > 1.5


def test_strong_varies_tones_and_never_inverts_them():
  ramp = np.tile(np.arange(64, 192, 2, dtype=np.uint8), (64, 1))
  means, slopes, rough = [], [], []
  for seed in range(300):
    generator = rng(seed)
    found, mask, _ = augment("strong", generator, ramp, ramp, NO_POINTS)
    # The mask went the same way, so that it says what a pixel was.
    slope, level = np.polyfit(mask.ravel(), found.ravel(), 1)
    means.append(level + slope * 128)
    slopes.append(slope)
    rough.append(np.std(found - np.polyval((slope, level), mask)))
  means, slopes = np.array(means), np.array(slopes)
  assert slopes.min() > 0.4 * 0.5
  assert slopes.max() < 1.6 * 1.6
  assert np.median(slopes) == pytest.approx(1, abs=0.1)
  assert slopes.std() > 0.25
  # Gamma 2 moves grey 128 by 64 levels, brightness by 77.
  assert np.abs(means - 128).max() < 64 + 77 + 10
  assert means.mean() == pytest.approx(128, abs=10)
  assert means.std() > 35
  assert 0.1 < np.mean(np.array(rough) > 5) < 0.5


@pytest.mark.parametrize("recipe", ["light", "strong"])
def test_no_border_is_made_up(recipe):
  """A mirrored border: a bright image stays bright up to its corners."""
  image = np.full((64, 64), 200, np.uint8)
  for seed in range(40):
    found, _, _ = augment(recipe, rng(seed), image, image, NO_POINTS)
    assert np.ptp(found) < 0.06 * 255 * 12  # what noise makes at most
    edge = np.concatenate([found[0], found[-1], found[:, 0], found[:, -1]])
    assert edge.mean() == pytest.approx(found.mean(), abs=4)


def test_what_generators_see_is_not_distorted():
  seen = [generators_recipe(r) for r in RECIPES]
  assert seen == ["none", "upright", "upright"]
  column = np.zeros((64, 64), np.uint8)
  column[:, 40] = 255
  exact = []
  for seed in range(40):
    found, mask, _ = augment("upright", rng(seed), column, column, NO_POINTS)
    rows, columns = np.nonzero(mask)
    lean = np.polyfit(rows, columns, 1)[0]  # never lying
    assert abs(lean) < np.tan(np.deg2rad(16))
    exact.append(sorted(np.unique(found)) == [0, 255])
  assert 10 < sum(exact) < 30  # nothing interpolated where it is not turned


def test_unknown_recipes_are_refused():
  for call in (
    lambda: augment("storng", rng(), *[np.zeros((8, 8), np.uint8)] * 2, 0),
    lambda: generators_recipe(True),
  ):
    with pytest.raises(ValueError, match="use one of none, light, strong"):
      call()
