"""Folded convolutions are the convolutions that they stand for."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from fairdiff_jax.models import folded as forms
from fairdiff_jax.models.folded import FoldedConv
from fairdiff_jax.models.unet import depth_to_space, space_to_depth


@pytest.mark.parametrize(
  "fold, strides", [(1, 1), (2, 1), (4, 1), (2, 2), (4, 2)]
)
@pytest.mark.parametrize("cells", [(1, 1), (1, 3), (5, 2)])
@pytest.mark.parametrize("form", [forms._folded, forms._unfolded])
def test_a_folded_convolution_is_the_plain_one(
  monkeypatch, form, fold, strides, cells
):
  for name in ("_folded", "_unfolded"):  # whatever the platform is
    monkeypatch.setattr(forms, name, form)
  rng = np.random.default_rng(0)
  height, width = (fold * n for n in cells)
  x = rng.normal(size=(2, height, width, 3)).astype(np.float32)
  weight = rng.normal(size=(2, height // strides, width // strides, 5)).astype(
    np.float32
  )
  plain = nn.Conv(5, (3, 3), strides=strides, padding=1)
  folded = FoldedConv(5, fold, strides)
  variables = plain.init(jax.random.key(1), x)
  variables["params"]["bias"] = rng.normal(size=5).astype(np.float32)
  described = jax.eval_shape(
    folded.init, jax.random.key(1), space_to_depth(x, fold)
  )
  assert jax.tree.map(np.shape, variables) == jax.tree.map(
    lambda p: p.shape, described
  )

  def plainly(variables, x):
    y = plain.apply(variables, x)
    return (y * weight).sum(), y

  def by_folding(variables, x):
    y = folded.apply(variables, space_to_depth(x, fold))
    y = depth_to_space(y, fold // strides)
    return (y * weight).sum(), y

  want, found = (
    jax.jit(jax.grad(f, argnums=(0, 1), has_aux=True))(variables, x)
    for f in (plainly, by_folding)
  )
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
    assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(b)


def test_a_cpu_multiplies_no_zeros():
  folded = FoldedConv(5, 4)
  x = jax.ShapeDtypeStruct((1, 2, 2, 48), np.float32)
  variables = jax.eval_shape(folded.init, jax.random.key(0), x)
  traced = jax.jit(folded.apply).trace(variables, x)

  def multiplies_zeros(platform):
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    return "tensor<3x3x48x80xf32>" in text

  assert multiplies_zeros("tpu") and not multiplies_zeros("cpu")
