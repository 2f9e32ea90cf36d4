"""Batch normalisation: PyTorch's numbers, masked, the same on any sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fairdiff_jax.models.batch_norm import BatchNorm

EPSILON = 1e-5


def _batch(seed=0, shape=(8, 5, 3)):
  rng = np.random.default_rng(seed)
  return rng.normal(4.0, 2.0, shape).astype(np.float32)


def _variables(features, seed=1):
  rng = np.random.default_rng(seed)

  def draw(low, high):
    return jnp.asarray(rng.uniform(low, high, features), jnp.float32)

  return {
    "params": {"scale": draw(0.5, 2), "bias": draw(-1, 1)},
    "batch_stats": {"mean": draw(-1, 1), "var": draw(0.5, 2)},
  }


def _train(variables, x, weight=None, **attributes):
  return BatchNorm(**attributes).apply(
    variables, x, weight, True, mutable=["batch_stats"]
  )


def _split(a, shards=4):
  return jnp.reshape(a, (shards, -1, *a.shape[1:]))


def _reference(variables, x, keep):
  """Output and running statistics in float64; `keep` picks the real rows."""
  variables = jax.tree.map(lambda v: np.asarray(v, np.float64), variables)
  params, stats = variables["params"], variables["batch_stats"]
  x = np.asarray(x, np.float64)
  rows = x[keep].reshape(-1, x.shape[-1])
  mean, var = rows.mean(0), rows.var(0)
  y = (x - mean) / np.sqrt(var + EPSILON) * params["scale"] + params["bias"]
  return y, {
    "mean": 0.9 * stats["mean"] + 0.1 * mean,
    "var": 0.9 * stats["var"] + 0.1 * rows.var(0, ddof=1),
  }


def _assert_close(found, expected, rtol=1e-5):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-5),
    found,
    expected,
  )


@pytest.mark.parametrize("shape", [(8, 3), (8, 5, 3), (4, 3, 2, 3)])
def test_training_matches_numpy(shape):
  x, variables = _batch(shape=shape), _variables(3)
  y, updated = _train(variables, x)
  expected, stats = _reference(variables, x, slice(None))
  _assert_close(y, expected)
  _assert_close(updated["batch_stats"], stats)


def test_evaluation_uses_the_running_statistics():
  x, variables = _batch(), _variables(3)
  y = BatchNorm().apply(variables, x, None, False)
  params, stats = variables["params"], variables["batch_stats"]
  normal = (x - stats["mean"]) / np.sqrt(stats["var"] + EPSILON)
  _assert_close(y, normal * params["scale"] + params["bias"])


def test_padding_takes_no_part():
  x, variables = _batch(), _variables(3)
  keep = np.array([1, 1, 0, 1, 0, 1, 1, 0], bool)
  weight = jnp.asarray(keep, jnp.float32)
  y, updated = _train(variables, x, weight)
  expected, stats = _reference(variables, x, keep)
  _assert_close(y[keep], expected[keep])
  _assert_close(updated["batch_stats"], stats)

  other = np.where(keep[:, None, None], x, 1e4).astype(np.float32)
  z, updated_other = _train(variables, other, weight)
  np.testing.assert_array_equal(y[keep], z[keep])
  _assert_close(updated_other, updated, rtol=0)


def test_permuting_the_batch_permutes_the_output():
  x, variables = _batch(), _variables(3)
  weight = jnp.array([1.0, 1, 0, 1, 0, 1, 1, 0])
  order = np.random.default_rng(2).permutation(8)
  y, updated = _train(variables, x, weight)
  z, updated_permuted = _train(variables, x[order], weight[order])
  _assert_close(z, y[order])
  _assert_close(updated_permuted, updated)


def test_large_mean_keeps_the_variance():
  x, variables = _batch() + np.float32(3000), _variables(3)
  y, updated = _train(variables, x)
  expected, stats = _reference(variables, x, slice(None))
  np.testing.assert_allclose(y, expected, atol=2e-3)
  _assert_close(updated["batch_stats"], stats, rtol=1e-4)


def test_shards_with_uneven_weights_equal_the_global_batch():
  x, variables = _batch(), _variables(3)
  weight = jnp.array([1.0, 1, 1, 1, 1, 0, 0, 0])

  def loss(params, x, weight, axis_name):
    y, updated = _train(
      {**variables, "params": params}, x, weight, axis_name=axis_name
    )
    return jnp.sum(weight[:, None, None] * jnp.sin(y)), (y, updated)

  def shard(x, weight):
    grads, aux = jax.grad(loss, has_aux=True)(
      variables["params"], x, weight, "shard"
    )
    return jax.lax.psum(grads, "shard"), aux

  whole, (y, updated) = jax.grad(loss, has_aux=True)(
    variables["params"], x, weight, None
  )
  grads, (z, updated_shards) = jax.vmap(shard, axis_name="shard")(
    _split(x), _split(weight)
  )
  _assert_close(z.reshape(y.shape), y)
  for i in range(4):
    _assert_close(jax.tree.map(lambda a, i=i: a[i], updated_shards), updated)
    _assert_close(jax.tree.map(lambda a, i=i: a[i], grads), whole)


@pytest.mark.parametrize("highest", [False, True])
def test_gradient_in_x_is_the_same_on_shards(highest):
  x, variables = _batch(), _variables(3)
  weight = jnp.array([1.0, 1, 1, 0, 1, 0, 0, 0])

  def loss(x, weight, axis_name):
    options = dict(axis_name=axis_name, highest=highest)
    y, _ = _train(variables, x, weight, **options)
    by_case = weight.reshape(-1, *(1,) * (y.ndim - 1))
    total = jnp.sum(by_case * jnp.sin(y))
    return total if axis_name is None else jax.lax.psum(total, axis_name)

  def over_shards(x):
    shard = jax.vmap(
      lambda x, w: loss(x, w, "shard"), axis_name="shard", out_axes=None
    )
    return shard(_split(x), _split(weight))

  whole = jax.grad(lambda x: loss(x, weight, None))(x)
  _assert_close(jax.grad(over_shards)(x), whole)


@pytest.mark.parametrize("shape", [(8, 3), (8, 5, 3), (8, 3, 2, 3)])
def test_gradients_are_those_of_automatic_differentiation(shape):
  x, variables = _batch(shape=shape), _variables(3)
  weight = jnp.array([1.0, 1, 0, 2, 0, 1, 1, 0])
  cotangent = np.random.default_rng(3).normal(size=shape).astype(np.float32)

  def plain(params, x):
    axes = tuple(range(x.ndim - 1))
    share = weight.reshape(-1, *(1,) * (x.ndim - 1)) * x.shape[-1] / x[0].size
    share /= jnp.sum(weight)
    mean = jnp.sum(share * x, axes)
    var = jnp.sum(share * (x - mean) ** 2, axes)
    y = (x - mean) / jnp.sqrt(var + EPSILON)
    return jnp.sum(cotangent * (y * params["scale"] + params["bias"]))

  def ours(params, x):
    y, _ = _train({**variables, "params": params}, x, weight)
    return jnp.sum(cotangent * y)

  found, want = (
    jax.grad(f, (0, 1))(variables["params"], x) for f in (ours, plain)
  )
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
    assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(b)


def test_a_batch_of_padding_is_harmless():
  x, variables = _batch(), _variables(3)

  def total(variables, x):
    y, updated = _train(variables, x, jnp.zeros(8))
    return jnp.sum(y), updated

  (value, updated), grads = jax.value_and_grad(total, (0, 1), has_aux=True)(
    variables, x
  )
  assert np.isfinite(value)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
  np.testing.assert_array_equal(
    updated["batch_stats"]["mean"], variables["batch_stats"]["mean"]
  )
  np.testing.assert_array_equal(
    updated["batch_stats"]["var"], variables["batch_stats"]["var"]
  )


def test_one_value_a_channel_leaves_finite_statistics():
  _, updated = _train(_variables(3), _batch(shape=(1, 3)))
  assert all(np.isfinite(v).all() for v in jax.tree.leaves(updated))


def test_initialisation_needs_no_mapped_axis():
  variables = BatchNorm(axis_name="shard").init(
    jax.random.key(0), _batch(), None, True
  )
  np.testing.assert_array_equal(variables["batch_stats"]["mean"], np.zeros(3))
  np.testing.assert_array_equal(variables["batch_stats"]["var"], np.ones(3))


def test_half_precision_has_float32_statistics():
  x = jnp.asarray(_batch(), jnp.bfloat16)
  y, updated = _train(_variables(3), x)
  assert y.dtype == jnp.bfloat16
  assert {v.dtype for v in jax.tree.leaves(updated)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("train", [True, False])
def test_the_highest_is_the_maximum_of_what_is_normalised(train):
  x, variables = _batch(), _variables(3)
  scale = variables["params"]["scale"] * np.array([1, -1, 1])
  variables["params"]["scale"] = scale.astype(np.float32)
  weight = jnp.array([1.0, 1, 0, 2, 0, 1, 1, 0])
  cotangent = np.random.default_rng(3).normal(size=(8, 3)).astype(np.float32)

  def apply(params, x, highest):
    module = BatchNorm(highest=highest)
    y, updated = module.apply(
      {**variables, "params": params}, x, weight, train, mutable=["batch_stats"]
    )
    y = y if highest else jnp.max(y, axis=1)
    return jnp.sum(cotangent * y), (y, updated)

  found, want = (
    jax.value_and_grad(apply, (0, 1), has_aux=True)(
      variables["params"], x, highest
    )
    for highest in (True, False)
  )
  _assert_close(found, want)


def test_of_equal_maxima_one_has_the_gradient():
  x, variables = np.ones((2, 5, 3), np.float32), _variables(3)

  def total(x):
    return jnp.sum(BatchNorm(highest=True).apply(variables, x, None, False))

  grad = jax.grad(total)(x)
  np.testing.assert_array_equal((grad != 0).sum(1), 1)
