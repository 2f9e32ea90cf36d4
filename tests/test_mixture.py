"""Mixtures, and batches as pure functions of (seed, step)."""

from collections import Counter

import jax
import numpy as np
import pytest

from fairdiff_jax.data import loader, mixture
from fairdiff_jax.training.mesh import host_slice

GROUP = np.array([0] * 2 + [1] * 6 + [2] * 3 + [-1])
NAMES = ("A", "B", "C")


def rng(seed=0):
  return np.random.default_rng(seed)


def sizes(pool, group):
  return Counter(group[pool].tolist())


def test_repeat_to_spreads_evenly():
  found = Counter(mixture.repeat_to(rng(), np.array([4, 7, 9]), 8).tolist())
  assert sorted(found) == [4, 7, 9] and sorted(found.values()) == [2, 3, 3]
  assert len(mixture.repeat_to(rng(), np.array([4, 7]), 0)) == 0
  with pytest.raises(ValueError, match="cannot draw 2 cases from none"):
    mixture.repeat_to(rng(), np.empty(0, int), 2)


@pytest.mark.parametrize(
  ("size", "share", "quota"),
  [
    (0, 0.0, [4, 0, 3]),
    (0, 0.5, [3, 0, 3]),
    (0, 1.0, [0, 0, 0]),
    (10, 0.0, [8, 4, 7]),
    (10, 0.5, [5, 4, 5]),
    (1, 0.0, [0, 0, 0]),
  ],
)
def test_synthetic_quota_by_hand(size, share, quota):
  found = mixture.synthetic_quota(
    GROUP, mixture.group_sizes(GROUP, 3, size=size), share
  )
  np.testing.assert_array_equal(found, quota)


def test_real_share_is_checked():
  with pytest.raises(ValueError, match=r"real_share=1\.5"):
    mixture.synthetic_quota(GROUP, np.full(3, 6), real_share=1.5)


def test_sizes_tilt_to_high_risk():
  risk = np.array([0.4, 0.1, 0.2])
  found = mixture.group_sizes(GROUP, 3, size=70, risk=risk, tilt=1)
  np.testing.assert_array_equal(found, [120, 30, 60])
  np.testing.assert_array_equal(
    mixture.synthetic_quota(GROUP, found, 0.5), [60, 15, 30]
  )
  unknown = np.array([0.4, 0, 0.2])
  for known, tilt in ((None, 1), (risk, 0), (unknown, 1)):
    found = mixture.group_sizes(GROUP, 3, risk=known, tilt=tilt)
    np.testing.assert_array_equal(found, [6, 6, 6])


def test_training_pools_by_hand():
  synthetic = np.array([0] * 3 + [2] * 3)

  def pool(strategy, synthetic, size=6):
    return mixture.training_pool(
      rng(), strategy, GROUP, synthetic, NAMES, np.full(3, size)
    )

  np.testing.assert_array_equal(pool("none", synthetic), np.arange(12))

  repeated = pool("repeat_sample", synthetic)
  assert sizes(repeated, GROUP) == {0: 6, 1: 6, 2: 6, -1: 1}
  assert Counter(repeated.tolist())[0] == 3

  both = np.concatenate([GROUP, synthetic])
  mixed = pool("equal_scale", synthetic)
  assert sizes(mixed, both) == {0: 6, 1: 6, 2: 6, -1: 1}
  assert set(range(12, 18)) <= set(mixed.tolist())
  assert (np.bincount(mixed)[:2] >= 1).all()  # 3 of group 0 are real

  empty = np.empty(0, int)
  assert sizes(pool("equal_scale", empty), GROUP) == sizes(repeated, GROUP)
  subset = pool("equal_scale", empty, size=4)
  assert sizes(subset, GROUP) == {0: 4, 1: 4, 2: 4, -1: 1}
  assert len({i for i in subset.tolist() if GROUP[i] == 1}) == 4


def test_training_pool_errors():
  with pytest.raises(ValueError, match="unknown data strategy 'smote'"):
    mixture.training_pool(rng(), "smote", GROUP, GROUP[:0], NAMES, [6] * 3)
  with pytest.raises(ValueError, match="group D has no training case"):
    names = (*NAMES, "D")
    mixture.training_pool(
      rng(), "repeat_sample", GROUP, GROUP[:0], names, [6] * 4
    )


def test_powered_pool_between_as_is_and_balanced():
  group = np.repeat([0, 1], [4, 64])
  for power, expected in ((0, 4), (0.5, 16), (1, 64)):
    pool = mixture.powered_pool(rng(), group, power)
    assert sizes(pool, group) == {0: expected, 1: 64}
    assert set(pool.tolist()) == set(range(68))


def make_pool(n=10, size=8, epoch=None):
  draw = rng(1)
  return loader.Pool(
    [f"case_{i}" for i in range(n)],
    draw.integers(0, 256, (n, size, size)).astype(np.uint8),
    draw.integers(0, 3, (n, size, size)).astype(np.uint8),
    np.arange(n) % 3 - 1,
    draw.normal(size=(n, 5, 3)).astype(np.float32),
    np.arange(n) if epoch is None else epoch,
  )


def batch(pool, step=0, rows=slice(0, 8), size=8, seed=3, recipe="strong"):
  return loader.make_batch(
    pool,
    seed=seed,
    stream=1,
    step=step,
    size=size,
    rows=rows,
    recipe=recipe,
  )


def test_every_case_once_an_epoch():
  epoch = np.array([3, 3, 5, 8, 1, 0, 7])
  drawn = np.concatenate(
    [loader.draw(epoch, seed=0, stream=0, step=s, size=4) for s in range(7)]
  )
  epochs = drawn.reshape(4, 7)
  for once in epochs:
    assert Counter(once.tolist()) == Counter(epoch.tolist())
  assert len({tuple(once) for once in epochs.tolist()}) > 1


def test_an_epoch_shorter_than_a_batch():
  drawn = loader.draw(np.array([5, 6]), seed=0, stream=0, step=3, size=8)
  assert Counter(drawn.tolist()) == {5: 4, 6: 4}


def test_a_batch_is_a_function_of_seed_and_step():
  pool = make_pool()
  first = batch(pool, step=4)
  batch(pool, step=1)
  again = batch(make_pool(), step=4)
  for key in first:
    np.testing.assert_array_equal(first[key], again[key])
  for other in (batch(pool, step=5), batch(pool, step=4, seed=9)):
    assert not np.array_equal(first["image"], other["image"])


@pytest.mark.parametrize("processes", range(1, 9))
def test_any_number_of_processes_draws_the_same_cases(monkeypatch, processes):
  pool, size = make_pool(), 4 * processes
  whole = batch(pool, step=2, rows=slice(0, size), size=size)
  monkeypatch.setattr(jax, "process_count", lambda: processes)
  monkeypatch.setattr(jax, "device_count", lambda: 2 * processes)
  parts = []
  for i in range(processes):
    monkeypatch.setattr(jax, "process_index", lambda i=i: i)
    parts.append(batch(pool, step=2, rows=host_slice(size), size=size))
  for key, value in whole.items():
    joined = np.concatenate([part[key] for part in parts])
    np.testing.assert_array_equal(joined, value)


def test_batch_contents_and_types():
  pool = make_pool()
  before = [x.copy() for x in pool[1:5]]
  found = batch(pool, recipe="none")
  index = loader.draw(pool.epoch, seed=3, stream=1, step=0, size=8)
  expected = pool.image[index].astype(np.float64) / 127.5 - 1
  np.testing.assert_allclose(found["image"][..., 0], expected, atol=1e-6)
  np.testing.assert_array_equal(found["mask"], pool.mask[index])
  np.testing.assert_array_equal(found["points"], pool.points[index])
  np.testing.assert_array_equal(found["group"], pool.group[index])
  np.testing.assert_array_equal(found["weight"], np.ones(8))
  assert {k: v.dtype.name for k, v in found.items()} == {
    "image": "float32",
    "mask": "int32",
    "points": "float32",
    "group": "int32",
    "weight": "float32",
  }
  batch(pool)
  for old, new in zip(before, pool[1:5], strict=True):
    np.testing.assert_array_equal(old, new)  # augmentation works on copies


def test_prefetcher_builds_each_batch_once():
  built = []
  prefetch = loader.Prefetcher(lambda step: built.append(step) or step)
  assert prefetch(0, following=1) == 0
  assert prefetch(1, following=None) == 1
  assert built == [0, 1]
  assert prefetch(2, following=3) == 2
  assert prefetch(7, following=None) == 7  # not what was announced
  prefetch.close()


@pytest.mark.parametrize("recipe", ["none", "strong"])
def test_joined_arrays_give_the_batches_of_one(recipe):
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (9, 16, 16)).astype(np.uint8)
  mask = rng.integers(0, 3, (9, 16, 16)).astype(np.uint8)
  one = loader.Pool(
    [str(i) for i in range(9)],
    image,
    mask,
    np.arange(9, dtype=np.int32),
    np.zeros((9, 0, 3), np.float32),
    np.arange(9),
  )
  parts = [loader.Joined(x[:4], x[4:4], x[4:]) for x in (image, mask)]
  joined = one._replace(image=parts[0], mask=parts[1])
  assert len(joined.image) == 9
  arguments = dict(seed=0, stream=1, step=2, size=6, rows=slice(1, 5))
  first, second = (
    loader.make_batch(pool, recipe=recipe, **arguments)
    for pool in (one, joined)
  )
  for name, expected in first.items():
    np.testing.assert_array_equal(second[name], expected)
