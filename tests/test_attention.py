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


@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_values_and_gradients(scale):
  """At scale 40, logits whose exponential is no float32."""
  q, k = normal(0, 2, 3, 5, 4, scale=scale), normal(1, 2, 3, 7, 4)
  inputs = q, k, normal(2, 2, 3, 7, 4), normal(3, 2, 3, 5, 7)
  cotangent = normal(4, 2, 3, 5, 4)

  def compute(function):
    y, vjp = jax.vjp(function, *inputs)
    return y, vjp(cotangent)

  found, expected = compute(attend), compute(reference)
  if scale > 1:
    assert jnp.einsum("bntd,bnsd->bnts", q, k).max() / 2 > 89
  for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
    assert np.abs(a - b).max() < 1e-5 * np.abs(b).max()


def test_types_stay():
  inputs = [normal(i, 1, 2, 6, 4).astype(jnp.bfloat16) for i in range(3)]
  found = attend(*inputs)
  assert found.dtype == jnp.bfloat16
  expected = attend(*(x.astype(np.float32) for x in inputs))
  np.testing.assert_allclose(found.astype(np.float32), expected, atol=0.03)
