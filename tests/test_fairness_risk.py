"""Group risks and regularizers, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairdiff_jax.fairness.regularizers import make_regularizer
from fairdiff_jax.fairness.risk import group_risk, weighted_mean

METHODS = ("none", "variance", "gap", "worst")
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


def penalty(method, risk, present=None, temperature=0.5):
  risk = jnp.asarray(risk)
  count = jnp.ones(len(risk)) if present is None else jnp.asarray(present)
  regularizer = make_regularizer(method, temperature)
  state = regularizer.init(len(risk))
  value, state = regularizer.penalty(risk, count, state)
  return value


@pytest.mark.parametrize(
  ("method", "value"),
  [
    ("none", 0),
    ("variance", 14 / 9),  # mean 7/3
    ("gap", 3),
    ("worst", 0.5 * np.log((np.e**2 + np.e**4 + np.e**8) / 3) - 7 / 3),
  ],
)
def test_penalties_by_hand(method, value):
  assert float(penalty(method, [1.0, 2, 4])) == pytest.approx(value, rel=1e-6)


def test_worst_tends_to_the_excess_of_the_worst_group():
  value = penalty("worst", [1.0, 2, 6], temperature=1e-3)
  assert float(value) == pytest.approx(3, abs=2e-3)


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0, 10), min_size=1, max_size=5))
def test_penalties_are_not_negative_and_zero_at_equality(method, risk):
  assert penalty(method, risk) >= -1e-6 * max(1, *risk)
  equal = [risk[0]] * len(risk)
  assert abs(float(penalty(method, equal))) <= 2e-6 * max(1, risk[0])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_gradients_match_finite_differences(method, temperature):
  with jax.enable_x64():
    risk = jnp.array([0.7, 0.2, 99.0, 1.1])
    present = jnp.array([1.0, 3, 0, 2])

    def function(risk):
      return penalty(method, risk, present, temperature)

    gradient = jax.grad(function)(risk)
    step = 1e-6
    for i, direction in enumerate(jnp.eye(4)):
      difference = function(risk + step * direction)
      difference -= function(risk - step * direction)
      expected = float(difference) / (2 * step)
      assert float(gradient[i]) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_absent_groups_take_no_part(method):
  value, gradient = jax.value_and_grad(
    lambda risk: penalty(method, risk, [2.0, 0, 1, 0])
  )(jnp.array([0.3, 77.0, 0.9, 0.0]))
  expected = jax.value_and_grad(lambda risk: penalty(method, risk))(
    jnp.array([0.3, 0.9])
  )
  np.testing.assert_allclose(value, expected[0], rtol=1e-6)
  np.testing.assert_allclose(gradient[::2], expected[1], rtol=1e-6)
  np.testing.assert_array_equal(gradient[1::2], [0, 0])


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_without_groups_has_no_penalty(method):
  value, gradient = jax.value_and_grad(
    lambda losses: penalty(
      method, *group_risk(losses, -jnp.ones(4, int), jnp.ones(4), GROUPS)
    )
  )(jnp.arange(4.0))
  assert value == 0
  np.testing.assert_array_equal(gradient, np.zeros(4))


def test_unknown_method():
  with pytest.raises(ValueError, match="unknown fairness method 'mean'"):
    make_regularizer("mean")
