"""Attention against JAX's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fairdiff_jax.models.attention import attend


def reference(q, k, v, bias):
  swap = [x.swapaxes(1, 2) for x in (q, k, v)]
  return jax.nn.dot_product_attention(*swap, bias=bias).swapaxes(1, 2)


def normal(seed, *shape, scale=1.0):
  values = np.random.default_rng(seed).normal(scale=scale, size=shape)
  return values.astype(np.float32)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_values_and_gradients(scale):
  q, k = normal(0, 2, 3, 5, 4, scale=scale), normal(1, 2, 3, 7, 4)
  inputs = q, k, normal(2, 2, 3, 7, 4), normal(3, 2, 3, 5, 7)
  cotangent = normal(4, 2, 3, 5, 4)

  def compute(function):
    y, vjp = jax.vjp(function, *inputs)
    return y, vjp(cotangent)

  found, expected = compute(attend), compute(reference)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    found,
    expected,
  )


def test_types_stay():
  inputs = [normal(i, 1, 2, 6, 4).astype(jnp.bfloat16) for i in range(3)]
  found = attend(*inputs)
  assert found.dtype == jnp.bfloat16
  expected = attend(*(x.astype(np.float32) for x in inputs))
  np.testing.assert_allclose(found.astype(np.float32), expected, atol=0.03)
