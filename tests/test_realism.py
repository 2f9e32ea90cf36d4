"""Realism: known answers, independent formulas, and what betrays a case."""

import json

import numpy as np
import pytest
from scipy import linalg, ndimage

from fairdiff_jax.data import phantom
from fairdiff_jax.data.domain import FUNDUS
from fairdiff_jax.evaluation import realism, segmentation

GROUPS = ("Asian", "Black", "White")
STRUCTURES = FUNDUS.regions


def patients(seed, number, group=2):
  cases = [
    phantom.generate(np.random.default_rng([seed, i]), group)
    for i in range(number)
  ]
  image, mask = (np.stack(x) for x in zip(*cases, strict=True))
  return {"image": image, "mask": mask, "group": [GROUPS[group]] * number}


@pytest.fixture(scope="module")
def real():
  return patients(1, 40)


@pytest.fixture(scope="module")
def fresh():
  return patients(2, 40)


def compared(real, synthetic):
  result = realism.compare(real, synthetic, STRUCTURES, GROUPS[2:])["White"]
  json.dumps(segmentation.json_ready(result))
  return result


def test_real_against_real_is_chance(real, fresh):
  found = compared(real, fresh)
  low, high = found["auc_interval"]
  assert low < 0.5 < high and low < found["auc"] < high
  for name, row in found["statistics"].items():
    assert row["low"] < 1.05 and row["high"] > 0.95, name
    assert 0.5 < row["ratio"] < 1.6, name
  again = compared(real, fresh)
  assert again == found


FAULTS = {
  "edge of disc": lambda x, m, rng: ndimage.gaussian_filter(x, (0, 1.2, 1.2)),
  "grain": lambda x, m, rng: x + rng.normal(0, 8, x.shape),
  "contrast of disc": lambda x, m, rng: x - 14.0 * (m > 0),
  "brightness between patients": lambda x, m, rng: (
    x - x.mean((1, 2), keepdims=True) + 60
  ),
  "vessels": lambda x, m, rng: np.where(
    m == 0, ndimage.grey_closing(x, (1, 5, 5)), x
  ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named(real, fresh, name):
  rng = np.random.default_rng(0)
  changed = FAULTS[name](fresh["image"].astype(float), fresh["mask"], rng)
  changed = np.clip(np.rint(changed), 0, 255).astype(np.uint8)
  found = compared(real, fresh | {"image": changed})
  row = found["statistics"][name]
  assert not 0.85 < row["ratio"] < 1.15
  assert not row["low"] < 1 < row["high"]
  assert found["auc"] > 0.7


def test_a_mask_that_does_not_fit_is_betrayed_by_its_edges(real, fresh):
  found = compared(real, fresh | {"mask": np.roll(fresh["mask"], 7, (1, 2))})
  assert found["statistics"]["edge of disc"]["ratio"] < 0.8
  assert found["auc"] > 0.7


def test_sizes_and_ratios_by_hand():
  mask = np.zeros((2, 64, 64), np.uint8)
  mask[0, 20:40, 20:40] = 1
  mask[0, 25:35, 25:35] = 2
  image = np.full(mask.shape, 51, np.uint8)
  image[mask == 2] = 204
  found = realism.statistics(image, mask, STRUCTURES)
  np.testing.assert_allclose(found["size of disc"], [20, np.nan])
  np.testing.assert_allclose(found["cup to disc"], [0.5, np.nan])
  np.testing.assert_allclose(found["brightness"], 51 / 127.5 - 1, atol=1e-6)
  np.testing.assert_allclose(found["contrast of cup"], [1.2, np.nan], atol=1e-6)
  np.testing.assert_allclose(found["grain"], 0, atol=1e-6)
  assert "disc to cup" not in found


def test_lengths_are_those_of_a_64_pixel_image():
  rng = np.random.default_rng(0)
  _, mask = phantom.generate(rng, 1)
  small = {"image": phantom.render(rng, 1, mask)[None], "mask": mask[None]}
  large = {k: v.repeat(2, 1).repeat(2, 2) for k, v in small.items()}
  a, b = (
    realism.statistics(x["image"], x["mask"], STRUCTURES)
    for x in (small, large)
  )
  for name in ("brightness", "size of disc", "cup to disc", "contrast of cup"):
    np.testing.assert_allclose(a[name], b[name], rtol=1e-3)
  np.testing.assert_allclose(a["vessels"], b["vessels"], rtol=0.3)


def test_the_interval_of_an_auc_holds_chance_as_often_as_it_says():
  """Of 40 null draws 95% are 38; a bootstrap of the cases has 36."""
  ends = []
  for i in range(40):
    rng = np.random.default_rng([i, 1])
    ends.append(
      realism.two_sample_auc(rng.normal(size=(24, 4)), rng.normal(size=(20, 4)))
    )
  value, low, high = np.transpose(ends)
  assert np.mean((low < 0.5) & (high > 0.5)) >= 0.93
  assert abs(value.mean() - 0.5) < 0.05
  assert np.mean(high - low) < 0.6


def test_cases_of_a_patient_are_in_one_fold():
  """Twins teach a classifier nothing where both are held out."""
  rng = np.random.default_rng(0)
  real, synthetic = rng.normal(size=(2, 60, 8))
  twins = np.repeat(real[:30], 2, axis=0)
  patient = np.repeat(np.arange(30), 2)
  _, low, high = realism.two_sample_auc(twins, synthetic, patient=patient)
  assert low < 0.5 < high
  assert np.isnan(realism.two_sample_auc(twins, synthetic, patient=[0] * 60)[0])


def test_copies_of_few_patients_are_judged_by_others():
  """Nine patients, drawn again and again, look as real as they are."""
  rng = np.random.default_rng(0)
  real = rng.normal(size=(150, 12))
  source = np.arange(90) % 9
  copies = rng.normal(size=(9, 12))[source] + 0.2 * rng.normal(size=(90, 12))
  known = realism.two_sample_auc(real, copies)[0]
  judged = realism.two_sample_auc(real, copies, source=source)[0]
  assert known > 0.75
  assert judged < 0.65


def test_blends_are_judged_by_those_who_do_not_know_the_first():
  """Though there are patients who are nobody's first."""
  found = []
  for seed in range(4):
    rng = np.random.default_rng(seed)
    real = rng.normal(size=(150, 12))
    source = np.stack([np.arange(180) % 9, rng.integers(0, 40, 180)], axis=1)
    looks = rng.normal(size=(40, 12))
    blends = 0.95 * looks[source[:, 0]] + 0.3 * looks[source[:, 1]]
    known = realism.two_sample_auc(real, blends)[0]
    judged = realism.two_sample_auc(real, blends, source=source)[0]
    found.append((known, judged))
  known, judged = np.mean(found, axis=0)
  assert known > 0.8
  assert judged < 0.6


def test_all_together_have_the_synthetic_proportions():
  found = realism.comparable([*"AAABBBBBBC"], [*"AABD"], "ABCD")
  assert {k: len(v[0]) for k, v in found.items()} == {
    **{"A": 3, "B": 6, "C": 1, "D": 0},
    "all": 4,
  }
  real, synthetic = found["all"]
  assert real.tolist() == [0, 1, 2, 3] and synthetic.tolist() == [0, 1, 2]


def test_few_cases_have_no_auc(real, fresh):
  few = {k: v[:3] for k, v in fresh.items()}
  found = compared(real, few)
  assert np.isnan(found["auc"]) and found["synthetic"] == 3
  assert np.isfinite(found["statistics"]["grain"]["ratio"])
  none = {k: v[:0] for k, v in fresh.items()}
  found = compared(real, none)
  assert found["synthetic"] == 0
  assert np.isnan(found["statistics"]["grain"]["ratio"])


def test_absent_structures_are_left_out(real, fresh):
  empty = fresh["mask"].copy()
  empty[:10] = 0
  found = compared(real, fresh | {"mask": empty})
  assert np.isfinite(found["auc"])
  assert np.isfinite(found["statistics"]["edge of cup"]["ratio"])


def features(seed, n=60, d=5, shift=0.0):
  return np.random.default_rng(seed).normal(shift, 1, (n, d))


def test_frechet_distance_against_the_square_root_of_a_matrix():
  a, b = features(0), features(1, 50) @ np.diag([1, 2, 0.5, 1, 3]) + 0.3
  covariances = [np.cov(x.T) for x in (a, b)]
  root = linalg.sqrtm(covariances[0] @ covariances[1]).real
  expected = ((a.mean(0) - b.mean(0)) ** 2).sum()
  expected += np.trace(covariances[0] + covariances[1] - 2 * root)
  assert realism.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
  assert realism.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_fewer_cases_than_features():
  """By singular values, where covariances have no full rank."""
  a, b = features(0, 12, 20), features(1, 15, 20, 0.3)
  fewer = realism.frechet_distance(a, b)
  ca, cb = np.cov(a.T), np.cov(b.T)
  values = linalg.eigvals(ca @ cb).real
  expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb)
  expected -= 2 * np.sqrt(np.maximum(values, 0)).sum()
  assert fewer == pytest.approx(expected, rel=1e-6)


def test_kernel_distance_by_its_sums():
  a, b = features(2, 7, 3), features(3, 6, 3, 0.5)

  def k(x, y):
    return (np.dot(x, y) / 3 + 1) ** 3

  def mean(x, y, same):
    values = [
      k(u, v)
      for i, u in enumerate(x)
      for j, v in enumerate(y)
      if not (same and i == j)
    ]
    return np.mean(values)

  expected = mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False)
  assert realism.kernel_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_of_one_distribution_is_unbiased():
  values = [
    realism.kernel_distance(features(2 * i), features(2 * i + 1))
    for i in range(200)
  ]
  error = np.std(values) / np.sqrt(len(values))
  assert abs(np.mean(values)) < 3 * error
  assert realism.kernel_distance(features(0), features(1, shift=1.0)) > 1


def test_neighbours_by_hand():
  real = np.array([[0.0], [1.0], [10.0]])
  synthetic = np.array([[0.2], [0.1]])
  assert realism.minimum_matching_distance(real, synthetic) == pytest.approx(
    (0.1 + 0.8 + 9.8) / 3
  )
  assert realism.coverage(real, synthetic) == pytest.approx(1 / 3)
  swapped = dict(published=True)
  assert realism.minimum_matching_distance(
    real, synthetic, **swapped
  ) == pytest.approx((0.2 + 0.1) / 2)
  assert realism.coverage(real, synthetic, **swapped) == 1


def test_precision_and_recall_of_known_sets():
  a = features(0, 100)
  assert realism.precision_recall(a, a) == (1.0, 1.0)
  precision, recall = realism.precision_recall(a, features(1, 100, shift=50.0))
  assert precision == recall == 0
  narrow = realism.precision_recall(a, 0.1 * features(1, 100))
  assert narrow[0] == 1 and narrow[1] < 0.3


@pytest.mark.parametrize(
  "call",
  [
    realism.frechet_distance,
    realism.kernel_distance,
    realism.minimum_matching_distance,
    realism.coverage,
    realism.precision_recall,
  ],
)
def test_features_that_do_not_fit_are_refused(call):
  with pytest.raises(ValueError, match="features have shape"):
    call(features(0), features(1, d=4))
  with pytest.raises(ValueError, match="not finite"):
    call(features(0), features(1) * np.nan)
