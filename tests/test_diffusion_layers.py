"""Layers of Stable Diffusion: a product for a convolution, what is kept."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fairdiff_jax.models.stable_diffusion import (
  GatedGELU,
  HintStem,
  PointwiseConv,
  ResnetBlock,
)


def test_a_pointwise_convolution_is_a_1_x_1_convolution():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 3, 5, 4)).astype(np.float32)
  plain, module = nn.Conv(6, (1, 1)), PointwiseConv(6, jnp.float32)
  variables = module.init(jax.random.key(0), x)
  described = jax.eval_shape(plain.init, jax.random.key(0), x)
  assert jax.tree.map(jnp.shape, variables) == jax.tree.map(
    lambda leaf: leaf.shape, described
  )
  variables["params"]["bias"] = rng.normal(size=6).astype(np.float32)
  np.testing.assert_allclose(
    module.apply(variables, x), plain.apply(variables, x), atol=1e-6
  )


def kept(module, *shapes):
  """Shapes and types that the backward pass has, weights and vectors apart."""
  arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
  variables = jax.eval_shape(module.init, jax.random.key(0), *arguments)
  backward = jax.eval_shape(
    lambda *inputs: jax.vjp(module.apply, *inputs)[1], variables, *arguments
  )
  batch = shapes[0][0]
  return sorted(
    (leaf.shape, leaf.dtype.name)
    for leaf in jax.tree.leaves(backward)
    if leaf.ndim > 2 and leaf.shape[0] == batch
  )


def test_a_residual_block_keeps_what_is_normalised():
  block = ResnetBlock(24, 8, jnp.bfloat16)
  found = kept(block, (7, 8, 8, 24), (7, 32))
  assert found == [((7, 8, 8, 24), "bfloat16")] * 2


def test_a_feed_forward_network_keeps_its_products():
  assert kept(GatedGELU(16, jnp.bfloat16), (7, 9, 4)) == [
    ((7, 9, 4), "bfloat16"),
    ((7, 9, 32), "bfloat16"),
  ]


def test_the_hint_s_stem_keeps_the_convolutions_inputs():
  stem = HintStem((4, 8), 16, jnp.bfloat16)
  assert kept(stem, (7, 12, 12, 3)) == sorted(
    [
      ((7, 6, 6, 2 * 2 * 3), "bfloat16"),  # the hint, folded
      ((7, 6, 6, 2 * 2 * 4), "bfloat16"),  # conv_in
      ((7, 6, 6, 2 * 2 * 4), "bfloat16"),  # blocks_0
      ((7, 6, 6, 8), "bfloat16"),  # blocks_1
      ((7, 6, 6, 8), "bfloat16"),  # its silu, which conv_out takes
    ]
  )
