"""Measures against hand-made examples and independent formulas."""

import csv
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fairdiff_jax.evaluation import segmentation
from fairdiff_jax.fairness import metrics

LABEL = np.array([[[0, 1, 1, 0], [1, 2, 2, 1], [0, 1, 1, 0]]])
PREDICTION = np.array([[[0, 1, 1, 0], [1, 1, 2, 2], [0, 0, 1, 0]]])
CLASSES = (metrics.RIM, metrics.CUP, metrics.DISC)
MEASURES = (metrics.dice, metrics.iou, metrics.hd95, metrics.boundary_dice)

sides = st.integers(1, 9)
# A label [2, H, W] and a prediction.
pairs = hnp.arrays(
  np.uint8,
  st.tuples(st.just(2), st.just(2), sides, sides),
  elements=st.integers(0, 2),
)


def brute_force_distances(a, b):
  """Surface distances, pooled, with loops and all pairwise distances."""

  def surface(mask):
    padded = np.pad(mask, 1)
    return np.array(
      [
        (r, c)
        for r, c in np.argwhere(mask)
        if not (
          padded[r, c + 1]
          and padded[r + 2, c + 1]
          and padded[r + 1, c]
          and padded[r + 1, c + 2]
        )
      ]
    )

  p, q = surface(a), surface(b)
  pairs = np.hypot(*(p[:, None] - q[None]).transpose(2, 0, 1))
  return np.concatenate([pairs.min(1), pairs.min(0)])


@pytest.mark.parametrize(
  ("cls", "both", "a", "b"),
  [(1, 4, 6, 5), (2, 1, 2, 2), ((1, 2), 7, 8, 7)],
)
def test_overlap_by_hand(cls, both, a, b):
  assert metrics.dice(LABEL, PREDICTION, cls) == pytest.approx(
    [2 * both / (a + b)]
  )
  assert metrics.iou(LABEL, PREDICTION, cls) == pytest.approx(
    [both / (a + b - both)]
  )


def test_cup_to_disc_error_by_hand():
  error = metrics.cup_to_disc_error(LABEL, PREDICTION)
  assert error == pytest.approx([abs(2 / 8 - 2 / 7)])
  empty = np.zeros_like(LABEL)
  assert np.isnan(metrics.cup_to_disc_error(LABEL, empty)).all()
  assert np.isnan(metrics.cup_to_disc_error(empty, LABEL)).all()
  with pytest.raises(ValueError, match="diagonal"):
    metrics.cup_to_disc_error(LABEL, LABEL, kind="diagonal")


def test_vertical_cup_to_disc_error_by_hand():
  columns = [
    [0, 1, 2, 1, 1],  # 1 / 4
    [1, 2, 1, 2, 0],  # 3 / 4: a gap counts
    [1, 1, 0, 0, 0],  # 0 / 2
  ]
  masks = np.zeros((3, 5, 4), int)
  masks[:, :, 2] = columns
  error = metrics.cup_to_disc_error(masks, masks[[1, 2, 0]], kind="vertical")
  assert error == pytest.approx([0.5, 0.75, 0.25])
  empty = np.zeros_like(masks)
  for pair in ((masks, empty), (empty, masks)):
    assert np.isnan(metrics.cup_to_disc_error(*pair, kind="vertical")).all()


@settings(max_examples=60, deadline=None)
@given(pairs)
def test_vertical_cup_to_disc_error_is_that_of_the_rows(pair):
  def ratio(mask):
    rows = [np.flatnonzero((mask >= c).any(1)) for c in (2, 1)]
    cup, disc = (np.ptp(r) + 1 if len(r) else 0 for r in rows)
    return cup / disc if disc else np.nan

  expected = [abs(ratio(a) - ratio(b)) for a, b in zip(*pair, strict=True)]
  error = metrics.cup_to_disc_error(*pair, kind="vertical")
  np.testing.assert_allclose(error, expected)


@pytest.mark.parametrize("measure", [metrics.dice, metrics.iou])
def test_empty_policies(measure):
  full, empty = np.ones((4, 4)), np.zeros((4, 4))
  label = np.stack([full, full, empty, empty])
  prediction = np.stack([full, empty, full, empty])
  np.testing.assert_array_equal(
    measure(label, prediction, 1), [1, 0, 0, np.nan]
  )
  np.testing.assert_array_equal(
    measure(label, prediction, 1, empty="published"), [1, 0, 1, 0]
  )
  with pytest.raises(ValueError, match="sane"):
    measure(label, prediction, 1, empty="sane")


def test_empty_policies_of_the_distance():
  full, empty = np.ones((4, 4)), np.zeros((4, 4))
  label = np.stack([full, full, empty, empty])
  prediction = np.stack([np.eye(4), empty, full, empty])
  distances = metrics.hd95(label, prediction, 1)
  assert distances[0] > 0 and np.isnan(distances[1:]).all()
  np.testing.assert_array_equal(
    metrics.hd95(label, prediction, 1, empty="published"),
    [distances[0], 0, 0, 0],
  )
  with pytest.raises(ValueError, match="sane"):
    metrics.hd95(label, prediction, 1, empty="sane")


def test_unknown_definitions_are_refused():
  with pytest.raises(ValueError, match="empty must be one of 'exclude', 'pub"):
    metrics.Definitions(empty="sane")
  with pytest.raises(ValueError, match="equity must be one of .* 'fairest'"):
    metrics.Definitions(equity="fairest")


@pytest.mark.parametrize("measure", MEASURES)
def test_shapes_are_checked(measure):
  with pytest.raises(ValueError, match=r"\[n, H, W\]"):
    measure(LABEL, PREDICTION[:, :2], 1)
  with pytest.raises(ValueError, match=r"\[n, H, W\]"):
    measure(LABEL[0], PREDICTION[0], 1)


@pytest.mark.parametrize("measure", MEASURES)
def test_no_cases(measure):
  assert measure(LABEL[:0], PREDICTION[:0], 1).shape == (0,)
  assert metrics.cup_to_disc_error(LABEL[:0], PREDICTION[:0]).shape == (0,)


@settings(max_examples=60, deadline=None)
@given(pairs)
def test_properties(pair):
  label, prediction = pair
  for cls in CLASSES:
    dice = metrics.dice(label, prediction, cls)
    iou = metrics.iou(label, prediction, cls)
    np.testing.assert_allclose(dice, 2 * iou / (1 + iou))
    for measure in MEASURES:
      value = measure(label, prediction, cls)
      np.testing.assert_array_equal(value, measure(prediction, label, cls))
      turned = measure(label[::-1, ::-1], prediction[::-1, ::-1], cls)
      np.testing.assert_allclose(value, turned[::-1])
    present = np.isin(label, cls).any((1, 2))
    assert (metrics.dice(label, label, cls)[present] == 1).all()
    assert (metrics.hd95(label, label, cls)[present] == 0).all()
    assert (metrics.boundary_dice(label, label, cls, 0)[present] == 1).all()


@settings(max_examples=60, deadline=None)
@given(pairs, st.floats(0, 12))
def test_surface_measures_are_the_brute_force_ones(pair, tolerance):
  for cls in CLASSES:
    hd95 = metrics.hd95(*pair, cls)
    boundary_dice = metrics.boundary_dice(*pair, cls, tolerance)
    for i, (a, b) in enumerate(zip(*np.isin(pair, cls), strict=True)):
      if a.any() and b.any():
        distances = brute_force_distances(a, b)
        assert hd95[i] == pytest.approx(np.percentile(distances, 95))
        assert boundary_dice[i] == pytest.approx(
          (distances <= tolerance).mean()
        )
      else:
        assert math.isnan(hd95[i])


@settings(max_examples=60, deadline=None)
@given(pairs)
def test_boundary_dice_grows_with_the_tolerance(pair):
  present = (pair > 0).any((2, 3)).all(0)
  values = [
    metrics.boundary_dice(*pair, metrics.DISC, t) for t in (0, 1, 2, 12)
  ]
  assert (np.diff(values, axis=0)[:, present] >= 0).all()
  assert (values[-1][present] == 1).all()


def test_boundary_dice_without_the_class():
  label = np.array([[[1]], [[1]], [[0]], [[0]]])
  np.testing.assert_array_equal(
    metrics.boundary_dice(label, label[[0, 2, 0, 2]], 1, 9), [1, 0, 0, np.nan]
  )
  with pytest.raises(ValueError, match="tolerance"):
    metrics.boundary_dice(label, label, 1, -1)


def test_surface_measures_of_shifted_squares():
  label, prediction = np.zeros((2, 1, 40, 40), int)
  label[0, 5:15, 5:15] = 1
  prediction[0, 5:15, 9:19] = 1
  assert metrics.hd95(label, prediction, 1) == [4]
  # 36 surface pixels each. At 0, 6 columns of the two horizontal edges agree;
  # at 2, 8 columns, and 2 pixels at both ends of the vertical edge within.
  for tolerance, agree in ((0, 12), (2, 20), (4, 36)):
    assert metrics.boundary_dice(
      label, prediction, 1, tolerance
    ) == pytest.approx([agree / 36])


def test_equity_scaling_by_hand():
  means, overall = [0.8, 0.9, 0.7], 0.82
  scaled = {
    d: metrics.equity_scaled(means, overall, d)
    for d in ("fairseg_sum", "fairdiff_std", "population_std")
  }
  assert scaled == pytest.approx(
    {
      "fairseg_sum": 0.82 / (1 + 0.02 + 0.08 + 0.12),
      "fairdiff_std": 0.82 / (1 + 0.1),
      "population_std": 0.82 / (1 + math.sqrt(0.02 / 3)),
    }
  )
  assert metrics.equity_scaled(means, overall) == scaled["fairdiff_std"]
  assert metrics.equity_scaled([0.8, np.nan], 0.8) == 0.8
  with pytest.raises(ValueError, match="fairest"):
    metrics.equity_scaled(means, overall, "fairest")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=5), st.floats(0, 1))
def test_equity_scaling_never_gains(means, overall):
  for definition in ("fairseg_sum", "fairdiff_std", "population_std"):
    assert metrics.equity_scaled(means, overall, definition) <= overall
    same = metrics.equity_scaled([overall] * 3, overall, definition)
    assert same == pytest.approx(overall)


def test_summarize():
  values = np.array([0.5, 0.7, 0.9, np.nan, 0.1])
  group = np.array([0, 0, 1, 1, -1])
  result = metrics.summarize(values, group, ["A", "B", "C"])
  assert result["overall"] == pytest.approx((0.5 + 0.7 + 0.9 + 0.1) / 4)
  assert result["n"] == 4
  assert result["groups"]["A"] == pytest.approx({"mean": 0.6, "n": 2})
  assert result["groups"]["B"] == pytest.approx({"mean": 0.9, "n": 1})
  assert result["groups"]["C"]["n"] == 0
  assert math.isnan(result["groups"]["C"]["mean"])
  assert result["gap"] == pytest.approx(0.3)
  assert result["ratio"] == pytest.approx(0.6 / 0.9)
  assert result["std"] == pytest.approx(0.3 / math.sqrt(2))
  assert result["worst"] == "A"
  assert result["es"] == pytest.approx(
    metrics.equity_scaled([0.6, 0.9], result["overall"])
  )
  order = np.random.default_rng(0).permutation(5)
  shuffled = metrics.summarize(values[order], group[order], ["A", "B", "C"])
  assert shuffled["es"] == pytest.approx(result["es"])
  by_sum = metrics.summarize(
    values, group, ["A", "B", "C"], definition="fairseg_sum"
  )
  assert by_sum["es"] == pytest.approx(0.55 / (1 + 0.05 + 0.35))


def test_summarize_where_less_is_better():
  result = metrics.summarize(
    np.array([1.0, 4.0]), np.array([0, 1]), ["A", "B"], lower_is_better=True
  )
  assert result["worst"] == "B"
  assert result["gap"] == 3
  assert result["ratio"] == 0.25
  assert result["std"] == pytest.approx(3 / math.sqrt(2))
  assert "es" not in result


def test_summarize_without_groups():
  result = metrics.summarize(np.array([0.4, 0.6]), np.array([-1, -1]), ["A"])
  assert result["overall"] == result["es"] == pytest.approx(0.5)
  assert result["worst"] is None
  for key in ("gap", "ratio", "std"):
    assert math.isnan(result[key])


def test_summarize_of_one_group_and_of_zeros():
  one = metrics.summarize(np.array([0.4, 0.6]), np.array([0, -1]), ["A"])
  assert (one["gap"], one["ratio"]) == (0, 1)
  assert math.isnan(one["std"])
  zeros = metrics.summarize(np.zeros(2), np.array([0, 1]), ["A", "B"])
  assert (zeros["gap"], zeros["ratio"], zeros["std"]) == (0, 1, 0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=6), st.booleans())
def test_spread_of_the_groups(values, lower_is_better):
  names = [str(g) for g in range(len(values))]
  result = metrics.summarize(
    np.array(values),
    np.arange(len(values)),
    names,
    lower_is_better=lower_is_better,
  )
  worst = values[names.index(result["worst"])]
  assert worst == (max(values) if lower_is_better else min(values))
  assert result["std"] <= result["gap"] + 1e-12
  assert 0 <= result["ratio"] <= 1
  assert result["ratio"] * max(values) == pytest.approx(min(values))


@pytest.mark.parametrize("group", [[0, 2], [-2, 0], [0]])
def test_summarize_refuses_wrong_groups(group):
  with pytest.raises(ValueError, match="group"):
    metrics.summarize(np.array([0.4, 0.6]), np.array(group), ["A", "B"])


def test_per_case_and_its_summary(tmp_path):
  rng = np.random.default_rng(1)
  labels = rng.integers(0, 3, (6, 8, 8))
  predictions = np.where(rng.random(labels.shape) < 0.8, labels, 0)
  predictions[4] = 0
  group = np.array([1, 0, 0, 1, 1, -1])
  names = [f"case, {i}" for i in range(6)]
  columns = segmentation.per_case(
    labels, predictions, names, group, ("Male", "Female")
  )
  assert list(columns["name"]) == names
  assert list(columns["group"]) == [
    *("Female", "Male", "Male", "Female", "Female"),
    segmentation.UNKNOWN,
  ]
  np.testing.assert_array_equal(
    columns["disc_iou"], metrics.iou(labels, predictions, (1, 2))
  )
  assert segmentation.groups(columns) == {"Female": 3, "Male": 2}

  summary = segmentation.summary(columns)
  dice = metrics.dice(labels, predictions, metrics.CUP)
  cup = summary["cup"]["dice"]
  assert cup["overall"] == pytest.approx(dice.mean())
  assert cup["groups"]["Male"]["mean"] == pytest.approx(dice[1:3].mean())
  assert cup["groups"]["Female"]["mean"] == pytest.approx(
    dice[[0, 3, 4]].mean()
  )
  assert summary["cup"]["hd95"]["groups"]["Female"]["n"] == 2
  assert summary["cup_to_disc"]["error"]["n"] == 5

  segmentation.write_csv(tmp_path / "cases.csv", columns)
  with open(tmp_path / "cases.csv", newline="") as file:
    rows = list(csv.DictReader(file))
  assert [row["name"] for row in rows] == names
  assert float(rows[2]["cup_dice"]) == pytest.approx(dice[2], rel=1e-5)
  assert rows[4]["cup_hd95"] == ""


def test_summary_has_no_nan():
  empty = np.zeros((2, 4, 4), int)
  columns = segmentation.per_case(empty, empty, "ab", np.array([0, 1]), "AB")
  dice = segmentation.summary(columns)["cup"]["dice"]
  assert dice["overall"] is dice["es"] is dice["gap"] is dice["worst"] is None
  assert dice["groups"] == {
    "A": {"mean": None, "n": 0},
    "B": {"mean": None, "n": 0},
  }


def test_per_case_checks_its_arguments():
  with pytest.raises(ValueError, match="2 names"):
    segmentation.per_case(LABEL, LABEL, "ab", np.array([0]), ["A"])
  with pytest.raises(ValueError, match="group"):
    segmentation.per_case(LABEL, LABEL, "a", np.array([1]), ["A"])
