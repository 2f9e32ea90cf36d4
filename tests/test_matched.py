"""Features and clouds at equal numbers: known answers, honest intervals."""

import json

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from fairdiff_jax.data import phantom
from fairdiff_jax.data.domain import FUNDUS
from fairdiff_jax.evaluation import matched, realism, segmentation


def normal(seed, n=48, d=6, shift=0.0):
  return np.random.default_rng(seed).normal(shift, 1, (n, d))


def test_the_kernel_distance_is_the_published_one():
  a, b = normal(0), normal(1, 30, shift=0.3)
  value, low, high = matched.kernel_distance_interval(a, b)
  assert value == pytest.approx(realism.kernel_distance(a, b), rel=1e-12)
  assert low < value < high


def test_the_jackknife_leaves_out_a_patient_at_a_time():
  a, b = normal(0, 12, 3), normal(1, 10, 3)
  who = np.repeat(np.arange(6), 2)

  def distance(x, of, y):
    k = (x @ x.T / 3 + 1) ** 3
    pairs = of[:, None] != of
    other = (y @ y.T / 3 + 1) ** 3
    apart = ~np.eye(len(y), dtype=bool)
    across = (x @ y.T / 3 + 1) ** 3
    return k[pairs].mean() + other[apart].mean() - 2 * across.mean()

  value, low, high = matched.kernel_distance_interval(a, b, who)
  assert value == pytest.approx(distance(a, who, b), rel=1e-9)
  sides = [
    [distance(a[who != p], who[who != p], b) for p in range(6)],
    [distance(a, who, np.delete(b, i, 0)) for i in range(10)],
  ]
  variance = sum((len(x) - 1) * np.var(x) for x in sides)
  assert (high - low) / 2 == pytest.approx(1.96 * np.sqrt(variance), rel=1e-9)
  assert (low + high) / 2 == pytest.approx(value)


def test_the_kernel_distances_interval_holds_what_it_should():
  """0 of one distribution; of two, that of very many cases."""
  draws = [
    matched.kernel_distance_interval(normal([i, 0], 30), normal([i, 1], 20))
    for i in range(100)
  ]
  assert np.mean([low < 0 < high for _, low, high in draws]) >= 0.95
  truth = realism.kernel_distance(normal(0, 3000), normal(1, 3000, shift=0.6))
  draws = [
    matched.kernel_distance_interval(
      normal([i, 0], 40), normal([i, 1], 30, shift=0.6)
    )
    for i in range(100)
  ]
  assert np.mean([low < truth < high for _, low, high in draws]) >= 0.9


def test_one_distribution_is_as_good_as_real():
  found = matched.of_features(normal(0, 60), normal(1, 40))
  json.dumps(segmentation.json_ready(found))
  assert found["n"] == 20
  low, high = found["kid_interval"]
  assert low < 0 < high
  low, high = found["kid_real_interval"]
  assert low < 0 < high
  for name, row in found["measures"].items():
    assert row["low"] <= row["value"] <= row["high"], name
    assert row["low"] < row["real_high"] and row["high"] > row["real_low"], name


def test_another_distribution_is_worse_by_every_measure():
  found = matched.of_features(normal(0, 60), normal(1, 40, shift=3.0))
  assert found["kid_interval"][0] > 0
  rows = found["measures"]
  for name in ("FID", "MMD", "MMD, published"):
    assert rows[name]["low"] > rows[name]["real_high"], name
  for name in ("precision", "recall", "COV"):
    assert rows[name]["high"] < rows[name]["real_low"], name


def test_halves_are_of_different_patients_and_of_equal_size():
  seen = []
  patient = np.repeat(np.arange(12), 3)

  def measure(a, b):
    seen.append((a, b))
    return {"x": 0.0}

  n, _ = matched.halves(measure, np.arange(36), np.arange(36, 60), patient)
  assert n == 12
  for a, b in seen:
    assert len(a) == len(b) == n == len(set(a)) == len(set(b))
    if b.max() < 36:
      assert not set(patient[a]) & set(patient[b])


def test_few_cases_have_no_figures():
  found = matched.of_features(normal(0, 60), normal(1, 10))
  assert found["n"] == 0 and found["measures"] == {}
  assert np.isnan(found["kid"])


def test_chamfer_distance_by_its_formula():
  clouds = np.random.default_rng(0).normal(size=(4, 9, 3)).astype(np.float32)
  found = matched.chamfer(clouds)
  for i, a in enumerate(clouds):
    for j, b in enumerate(clouds):
      square = cdist(a, b, "sqeuclidean")
      expected = square.min(0).mean() + square.min(1).mean()
      assert found[i, j] == pytest.approx(expected, abs=1e-5)


def test_nearest_neighbours_tell_sets_apart_or_do_not():
  x = np.array([0.0, 1.0, 2.0, 10.0, 11.0, 12.0])[:, None]
  distance, rows = cdist(x, x), np.arange(6)
  accuracy = matched.nearest_neighbour_accuracy
  assert accuracy(distance, rows[:3], rows[3:]) == 1
  assert accuracy(distance, rows[::2], rows[1::2]) == 0


def test_masks_of_other_shapes_are_told_apart():
  rng = np.random.default_rng(0)
  masks = np.stack([phantom.draw_mask(rng, i % 3) for i in range(72)])
  same = matched.of_clouds(masks[:40], masks[40:], FUNDUS)["measures"]
  assert same["1-NNA"]["low"] < 0.5 < same["1-NNA"]["high"] + 0.1
  wide = np.stack([np.kron(m[16:48, 16:48], np.ones((2, 2))) for m in masks])
  other = matched.of_clouds(masks[:40], wide[40:].astype(np.uint8), FUNDUS)
  assert other["measures"]["1-NNA"]["value"] > 0.9
  assert other["measures"]["MMD"]["low"] > same["MMD"]["real_high"]
