"""Group risks, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fairdiff_jax.fairness.risk import RunningRisk, group_risk, weighted_mean

GROUPS = 3


def batch(seed, size=12):
  rng = np.random.default_rng(seed)
  losses = rng.exponential(size=size).astype(np.float32)
  group = rng.integers(-1, GROUPS, size)
  weight = rng.integers(0, 3, size).astype(np.float32)
  return losses, group, weight


def expected_risk(losses, group, weight):
  risk, count = np.zeros(GROUPS), np.zeros(GROUPS)
  for loss, g, w in zip(losses.astype(np.float64), group, weight, strict=True):
    if g >= 0:
      risk[g] += w * loss
      count[g] += w
  return risk / np.where(count > 0, count, 1), count


seeds = st.integers(0, 2**20)


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_group_risk_is_the_mean_of_each_group(seed):
  risk, count = group_risk(*batch(seed), GROUPS)
  expected = expected_risk(*batch(seed))
  np.testing.assert_allclose(risk, expected[0], rtol=2e-6)
  np.testing.assert_array_equal(count, expected[1])


def test_absent_groups_have_no_risk():
  risk, count = group_risk(
    jnp.array([1.0, 3, 5, 100]),
    jnp.array([2, 2, 0, 0]),
    jnp.array([1.0, 1, 1, 0]),
    GROUPS,
  )
  np.testing.assert_array_equal(risk, [5, 0, 2])
  np.testing.assert_array_equal(count, [1, 0, 2])


def test_unknown_groups_belong_to_none():
  losses = jnp.array([1.0, 50, 70])
  group, weight = jnp.array([0, -1, GROUPS]), jnp.ones(3)
  risk, count = group_risk(losses, group, weight, GROUPS)
  np.testing.assert_array_equal(risk, [1, 0, 0])
  np.testing.assert_array_equal(count, [1, 0, 0])
  gradient = jax.grad(lambda x: group_risk(x, group, weight, GROUPS)[0].sum())(
    losses
  )
  np.testing.assert_array_equal(gradient, [1, 0, 0])


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_group_risk_ignores_order_repetition_and_padding(seed):
  losses, group, weight = batch(seed)
  risk, _ = group_risk(losses, group, weight, GROUPS)
  order = np.random.default_rng(seed).permutation(len(losses))
  shuffled, _ = group_risk(losses[order], group[order], weight[order], GROUPS)
  twice, _ = group_risk(
    *(np.concatenate([x, x]) for x in (losses, group, weight)), GROUPS
  )
  garbage = np.where(weight > 0, losses, 1e6).astype(np.float32)
  padded, _ = group_risk(garbage, group, weight, GROUPS)
  for other in (shuffled, twice, padded):
    np.testing.assert_allclose(other, risk, rtol=2e-6)


@settings(max_examples=20, deadline=None)
@given(seeds, st.sampled_from([1, 2, 4, 6]))
def test_shards_give_the_global_view(seed, shards):
  arrays = batch(seed)
  pieces = [x.reshape(shards, -1) for x in arrays]

  def shard(losses, group, weight):
    return (
      *group_risk(losses, group, weight, GROUPS, "shard"),
      weighted_mean(losses, weight, "shard"),
    )

  found = jax.vmap(shard, axis_name="shard", out_axes=None)(*pieces)
  risk, count = group_risk(*arrays, GROUPS)
  np.testing.assert_allclose(found[0], risk, rtol=2e-6)
  np.testing.assert_array_equal(found[1], count)
  mean = weighted_mean(arrays[0], arrays[2])
  np.testing.assert_allclose(found[2], mean, rtol=2e-6)


def test_weighted_mean():
  losses = jnp.array([1.0, 2, 60])
  assert weighted_mean(losses, jnp.array([3.0, 1, 0])) == 1.25
  assert weighted_mean(losses, jnp.zeros(3)) == 0


def test_running_risk_is_debiased_and_skips_absent_groups():
  running = RunningRisk.start(3)
  running = running.update(jnp.array([2.0, 9, 0]), jnp.array([1.0, 0, 0]), 0.9)
  np.testing.assert_allclose(running.risk, [2, 0, 0], rtol=1e-6)
  np.testing.assert_array_equal(running.seen, [True, False, False])
  running = running.update(jnp.array([4.0, 5, 0]), jnp.array([3.0, 1, 0]), 0.9)
  mean = (0.9 * 0.1 * 2 + 0.1 * 4) / (0.9 * 0.1 + 0.1)
  np.testing.assert_allclose(running.risk, [mean, 5, 0], rtol=1e-6)
  filled, known = running.fill(jnp.array([1.0, 0, 0]), jnp.array([2, 0, 0]))
  np.testing.assert_allclose(filled, [1, 5, 0], rtol=1e-6)
  np.testing.assert_array_equal(known, [True, True, False])


def test_no_gradient_flows_through_the_past():
  def function(risk, earlier):
    count = jnp.array([1.0, 0])
    running = RunningRisk.start(2).update(earlier, jnp.ones(2), 0.5)
    return running.fill(risk, count)[0].sum()

  gradients = jax.grad(function, argnums=(0, 1))(jnp.ones(2), jnp.ones(2))
  np.testing.assert_array_equal(gradients[0], [1, 0])
  np.testing.assert_array_equal(gradients[1], [0, 0])
