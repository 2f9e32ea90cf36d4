"""Masks as point clouds and back: fidelity, geometry, refusals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fairdiff_jax.data import phantom
from fairdiff_jax.data.audit import mask_fault
from fairdiff_jax.data.contours import (
  LEAST_DICE,
  complete,
  heights,
  mask_to_points,
  points_to_mask,
  round_trip,
  round_trip_fault,
  smooth_contours,
)

FULL = (664, 798)


def dice_of(a, b):
  return 2 * (a & b).sum() / (a.sum() + b.sum())


def ellipses(shape=(96, 112), centre=(45, 50), disc=(24, 20), cup=(11, 9)):
  r, c = np.indices(shape)
  r, c = r - centre[0], c - centre[1]
  inside = [np.hypot(r / a, c / b) < 1 for a, b in (disc, cup)]
  return inside[0].astype(np.uint8) + (inside[0] & inside[1])


def farthest(cloud, other):
  """Largest distance from a point of one cloud to the other, per class."""
  worst = 0.0
  for z in (-5, 5):
    a, b = cloud[cloud[:, 2] == z, :2], other[other[:, 2] == z, :2]
    gaps = np.linalg.norm(a[:, None] - b[None], axis=-1)
    worst = max(worst, gaps.min(axis=1).max())
  return worst


def test_round_trip_at_full_size():
  scores = []
  for i in range(6):
    _, mask = phantom.generate(np.random.default_rng(i), i % 3, FULL)
    back = points_to_mask(mask_to_points(mask), FULL)
    assert back.dtype == np.uint8
    scores.append(
      [
        dice_of(mask > 0, back > 0),
        dice_of(mask == 2, back == 2),
        dice_of(mask == 1, back == 1),
      ]
    )
  disc, cup, rim = np.mean(scores, axis=0)
  assert disc >= 0.995
  assert cup >= 0.990
  assert rim >= 0.980


def test_round_trip_of_small_masks():
  for group in range(3):
    _, mask = phantom.generate(np.random.default_rng(group), group)
    back = points_to_mask(mask_to_points(mask, 128), mask.shape)
    assert dice_of(mask > 0, back > 0) > 0.98
    assert dice_of(mask == 2, back == 2) > 0.97


@pytest.mark.parametrize("num_points", [2, 7, 128, 512, 1500])
def test_cloud_has_exactly_the_points_asked_for(num_points):
  cloud = mask_to_points(ellipses(), num_points)
  assert cloud.shape == (num_points, 3)
  assert cloud.dtype == np.float32
  assert set(np.unique(cloud[:, 2])) <= {-5, 5}
  assert len(np.unique(cloud, axis=0)) == num_points


def test_the_smallest_mask_comes_back():
  mask = np.zeros((5, 6), np.uint8)
  mask[2, 3] = 2
  cloud = mask_to_points(mask, 64)
  assert cloud.shape == (64, 3)
  np.testing.assert_array_equal(points_to_mask(cloud, mask.shape), mask)


def test_a_mask_that_fills_the_image_comes_back():
  mask = np.ones((12, 9), np.uint8)
  mask[0:5, 3:9] = 2
  cloud = mask_to_points(mask, 256)
  np.testing.assert_array_equal(points_to_mask(cloud, mask.shape), mask)


def test_all_points_of_the_contours_give_the_mask_back():
  for i in range(6):
    _, mask = phantom.generate(np.random.default_rng(i), i % 3, (200, 240))
    assert round_trip(mask, mask_to_points(mask, None)) == (1, 1, 1)


@pytest.mark.parametrize("side", [16, 32, 64])
def test_small_clouds_of_small_eyes_are_far_from_the_bound(side):
  for i in range(30):
    _, mask = phantom.generate(np.random.default_rng(i), i % 3, (side, side))
    points = mask_to_points(mask, 32)
    dice = round_trip(mask, points)
    back = points_to_mask(points, mask.shape)
    assert dice[0] == pytest.approx(dice_of(mask > 0, back > 0))
    assert dice[1] == pytest.approx(dice_of(mask == 2, back == 2))
    assert min(dice[:2]) > LEAST_DICE + 0.05
    assert round_trip_fault(mask, points, dice) is None


def fault_of(mask, num_points=512):
  points = mask_to_points(mask, num_points)
  return round_trip_fault(mask, points, round_trip(mask, points))


def test_masks_that_no_cloud_gives_back_are_named():
  eye = ellipses()
  beside = np.zeros_like(eye)
  beside[40:60, 5:15] = 2
  beside[30:70, 40:80] = 1
  snake = np.zeros((60, 60), np.uint8)
  snake[10:50, 10:50] = 1
  snake[15:45, 15:45] = 0
  snake[15:45, 10:30] = 0
  snake[12:14, 12:48] = 2
  for mask, message in (
    (np.hstack([eye, eye]), r"disc 0\.67, .* discs: 2, cups: 2; keep one of"),
    (beside, r"of the cup 0\.00; .* discs: 2, cups: 1; keep one of each"),
    (snake, "about its centre, and here one turns back; correct the mask"),
  ):
    assert fault_of(mask) is not None
    with pytest.raises(ValueError, match=message):
      raise ValueError(fault_of(mask))
  assert fault_of(eye) is None
  assert "6 points are too few for it; raise data" in fault_of(eye, 6)


def test_the_audit_knows_unsound_masks():
  eye = ellipses()
  assert mask_fault(eye, min_solidity=0.9) is None
  assert mask_fault(0 * eye, min_solidity=0.9) == "no disc"
  assert mask_fault(eye.clip(0, 1), min_solidity=0.9) == "no cup"
  assert mask_fault(np.where(eye, 2, 0), min_solidity=0.9) == "no rim"
  assert mask_fault(eye[30:], min_solidity=0.9) == "outside"
  gaps = eye.copy()
  gaps[::3] = 0
  assert mask_fault(gaps, min_solidity=0.9) == "ragged disc"
  gaps = np.where((eye == 2) & (np.arange(len(eye)) % 3 == 0)[:, None], 1, eye)
  assert mask_fault(gaps, min_solidity=0.9) == "ragged cup"
  assert mask_fault(gaps, min_solidity=0.5) is None


def test_contours_are_sub_pixel():
  mask = ellipses()
  cloud = mask_to_points(mask)
  centred = cloud[:, :2] - (45, 50)
  for z, (a, b) in ((-5, (24, 20)), (5, (11, 9))):
    r, c = centred[cloud[:, 2] == z].T
    error = (np.hypot(r / a, c / b) - 1) * np.sqrt(a * b)
    assert abs(error.mean()) < 0.2
    assert abs(error).max() < 1.0


def test_points_are_spread_evenly():
  cloud = mask_to_points(ellipses((400, 400), (200, 200), (150, 150), (70, 70)))
  gaps = np.linalg.norm(cloud[:, None] - cloud[None], axis=-1)
  np.fill_diagonal(gaps, np.inf)
  nearest = gaps.min(axis=1)
  assert nearest.max() < 3 * nearest.min()


def test_points_move_with_the_mask():
  mask = ellipses()
  moved = np.roll(mask, (7, -11), axis=(0, 1))
  np.testing.assert_allclose(
    mask_to_points(moved), mask_to_points(mask) + np.array([7, -11, 0])
  )


def test_points_turn_with_the_mask():
  mask = ellipses()
  cloud = mask_to_points(mask)
  turned = mask_to_points(np.rot90(mask))
  r, c, z = cloud.T
  expected = np.stack([mask.shape[1] - 1 - c, r, z], axis=1)
  assert farthest(turned, expected) < 1.0
  assert farthest(expected, turned) < 1.0


def test_the_order_of_points_does_not_matter():
  mask = ellipses()
  cloud = mask_to_points(mask)
  shuffled = np.random.default_rng(0).permutation(cloud)
  np.testing.assert_array_equal(
    points_to_mask(shuffled, mask.shape), points_to_mask(cloud, mask.shape)
  )


def test_pixels_are_filled_by_their_centres():
  square = np.array([[1.5, 2.5], [1.5, 5.5], [4.5, 5.5], [4.5, 2.5]])
  expected = np.zeros((8, 8), np.uint8)
  expected[2:5, 3:6] = 1
  cloud = np.insert(square, 2, -1.0, axis=1)
  np.testing.assert_array_equal(points_to_mask(cloud, (8, 8)), expected)


def test_the_largest_component_is_kept_and_holes_are_filled():
  clean = ellipses()
  mask = clean.copy()
  mask[2:7, 100:106] = 1
  mask[90:93, 3:6] = 2
  mask[44:46, 49:51] = 0
  cloud, expected = mask_to_points(mask), mask_to_points(clean)
  assert farthest(cloud, expected) < 1.0
  assert farthest(expected, cloud) < 1.0


def test_what_lies_outside_the_image_is_clipped():
  cloud = mask_to_points(ellipses())
  cloud[:, :2] -= (45, 50)
  mask = points_to_mask(cloud, (96, 112))
  np.testing.assert_array_equal(mask[:51, :62], ellipses()[45:, 50:])
  cloud[:, 1] += 1e6
  assert not points_to_mask(cloud, (96, 112)).any()


@pytest.mark.parametrize("heights", [[], [-5], [-5, -5, 5, 5], [0] * 9])
def test_fewer_than_three_points_make_no_class(heights):
  cloud = np.random.default_rng(0).uniform(0, 20, (len(heights), 3))
  cloud[:, 2] = heights
  assert not points_to_mask(cloud, (20, 20)).any()


def test_a_cup_without_a_disc_is_not_painted():
  cloud = mask_to_points(ellipses())
  cup = cloud[cloud[:, 2] > 0]
  assert not points_to_mask(cup, (96, 112)).any()


coordinates = st.one_of(
  st.floats(-40, 80, width=32),
  st.integers(-5, 40).map(float),
  st.floats(width=32, allow_nan=False, allow_infinity=False),
)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(
  hnp.arrays(
    np.float32, st.tuples(st.integers(0, 40), st.just(3)), elements=coordinates
  )
)
def test_any_finite_cloud_gives_a_cup_inside_a_disc(cloud):
  mask = points_to_mask(cloud, (24, 32))
  assert mask.shape == (24, 32)
  assert mask.dtype == np.uint8
  assert set(np.unique(mask)) <= {0, 1, 2}
  disc = points_to_mask(cloud[cloud[:, 2] < 0], (24, 32))
  np.testing.assert_array_equal(mask > 0, disc > 0)


@pytest.mark.parametrize(
  ("mask", "message"),
  [
    (np.zeros((8, 8), np.uint8), "no disc.*leave this case out"),
    (np.eye(8, dtype=np.uint8), "no cup.*leave this case out"),
    (-np.eye(8), "convert the mask first"),
    (np.full((8, 8), 255), "convert the mask first"),
    (np.zeros((2, 8, 8)), "one at a time"),
  ],
)
def test_masks_that_cannot_be_sampled_are_refused(mask, message):
  with pytest.raises(ValueError, match=message):
    mask_to_points(mask)


def test_too_few_points_are_refused():
  with pytest.raises(ValueError, match="at least 2"):
    mask_to_points(ellipses(), 1)


def test_clouds_that_are_no_clouds_are_refused():
  cloud = mask_to_points(ellipses())
  with pytest.raises(ValueError, match="one at a time"):
    points_to_mask(cloud[None], (96, 112))
  cloud[3, 1] = np.nan
  cloud[5, 2] = np.inf
  with pytest.raises(ValueError, match="2 of 512 points are not finite"):
    points_to_mask(cloud, (96, 112))


def blob(shape, centre, radii, turn=0.0, wave=0.0, lobes=3):
  """A wavy ellipse; centre and radii are shares of the image."""
  r, c = np.indices(shape)
  r, c = r / shape[0] - centre[0], c / shape[1] - centre[1]
  r, c = (
    r * np.cos(turn) + c * np.sin(turn),
    c * np.cos(turn) - r * np.sin(turn),
  )
  r, c = r / radii[0], c / radii[1]
  return np.hypot(r, c) < 1 + wave * np.cos(lobes * np.arctan2(r, c))


def lungs(rng, shape):
  tilt, height = rng.uniform(-0.2, 0.2), rng.uniform(0.25, 0.38)
  mask = np.zeros(shape, np.uint8)
  for i, column in enumerate((0.27, 0.73)):
    side = blob(shape, (0.5, column), (height, 0.17), tilt, 0.08)
    mask[side] = i + 1
  return mask, (None, None)


def heart(rng, shape):
  """A ring, the ventricle within, and one more ventricle beside."""
  centre = rng.uniform(0.5, 0.62, 2)
  turn = rng.uniform(0, np.pi)
  mask = blob(shape, centre - (0, 0.32), (0.2, 0.18), turn) * np.uint8(3)
  mask[blob(shape, centre, (0.28, 0.26), turn)] = 1
  mask[blob(shape, centre, (0.17, 0.15), turn, 0.06)] = 2
  return mask, (None, 0, None)


def lesion(rng, shape):
  """A sickle, whose centre lies outside it."""
  turn = rng.uniform(0, 2 * np.pi)
  away = 0.14 * np.array([np.cos(turn), np.sin(turn)])
  whole = blob(shape, (0.5, 0.5), (0.4, 0.4), turn, 0.05)
  return (whole & ~blob(shape, 0.5 + away, (0.27, 0.27))).astype(np.uint8), (
    None,
  )


def pieces(rng, shape):
  """One structure in three pieces: hollow, cut by the border, small."""
  mask = blob(shape, (0.35, 0.35), (0.25, 0.25), rng.uniform(0, 3), 0.1)
  mask &= ~blob(shape, (0.35, 0.35), (0.1, 0.12))
  mask |= blob(shape, (0.7, 1.0), (0.2, 0.25))
  mask |= blob(shape, (0.85, 0.2), (0.08, 0.08))
  return mask.astype(np.uint8), (None,)


@pytest.mark.parametrize("side", [64, 128, 256])
@pytest.mark.parametrize(
  ("shapes", "least"),
  [(lungs, 0.985), (heart, 0.98), (lesion, 0.96), (pieces, 0.96)],
)
def test_any_structures_come_back_from_unordered_points(shapes, least, side):
  for seed in range(8):
    rng = np.random.default_rng(seed)
    mask, parents = shapes(rng, (side, side))
    cloud = mask_to_points(mask, 256, parents)
    assert cloud.shape == (256, 3)
    cloud = rng.permutation(cloud)
    assert min(round_trip(mask, cloud, parents)[: len(parents)]) >= least
    whole = rng.permutation(mask_to_points(mask, None, parents))
    assert min(round_trip(mask, whole, parents)) > 0.98


@pytest.mark.parametrize("shapes", [lungs, heart, lesion, pieces])
def test_a_little_noise_is_borne(shapes):
  for seed in range(8):
    rng = np.random.default_rng(seed)
    mask, parents = shapes(rng, (128, 128))
    cloud = mask_to_points(mask, 256, parents)
    cloud += 0.3 * rng.standard_normal(cloud.shape).astype(np.float32)
    assert min(round_trip(mask, cloud, parents)[: len(parents)]) > 0.9


def test_heights_are_spread_evenly():
  assert heights((None,)).tolist() == [0]
  assert heights((None, 0)).tolist() == [-5, 5]
  assert heights((None, 0, None)).tolist() == [-5, 0, 5]


def test_missing_structures_get_no_points():
  mask, parents = heart(np.random.default_rng(0), (64, 64))
  assert complete(mask, parents)
  mask[mask == 3] = 0
  assert not complete(mask, parents)
  with pytest.raises(ValueError, match="no class 3"):
    mask_to_points(mask, 64, parents)
  cloud = mask_to_points(mask, 64, parents, missing_ok=True)
  assert set(cloud[:, 2]) == {-5, 0}
  assert round_trip(mask, cloud, parents)[2] == 1
  for parents in ((None,), (None, 0), (None, 0, None)):
    empty = np.zeros((9, 12), np.uint8)
    cloud = mask_to_points(empty, 64, parents, missing_ok=True)
    assert cloud.shape == (64, 3)
    assert not points_to_mask(cloud, empty.shape, parents).any()


@settings(deadline=None, max_examples=100, derandomize=True)
@given(
  hnp.arrays(np.uint8, (12, 14), elements=st.integers(0, 3)),
  st.integers(2, 80),
)
def test_any_mask_of_any_structures_gives_a_cloud(mask, num_points):
  parents = (None, 0, None)
  cloud = mask_to_points(mask, num_points, parents, missing_ok=True)
  assert cloud.shape == (num_points, 3)
  back = points_to_mask(cloud, mask.shape, parents)
  assert back.max() <= 3


@settings(deadline=None, max_examples=150, derandomize=True)
@given(
  hnp.arrays(
    np.float32, st.tuples(st.integers(0, 40), st.just(3)), elements=coordinates
  )
)
def test_any_finite_cloud_gives_a_mask_of_any_structures(cloud):
  mask = points_to_mask(cloud, (24, 32), (None, 0, None))
  assert mask.dtype == np.uint8
  assert set(np.unique(mask)) <= {0, 1, 2, 3}


def test_curves_of_any_shape_are_smoothed():
  rng = np.random.default_rng(0)
  mask, parents = lesion(rng, (128, 128))
  cloud = mask_to_points(mask, 256, parents)
  noisy = cloud + 0.4 * rng.standard_normal(cloud.shape).astype(np.float32)
  smooth = smooth_contours(noisy, 12, parents)
  assert round_trip(mask, smooth, parents)[0] > 0.96
