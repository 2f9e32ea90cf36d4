"""Layers are flax's, and so are their gradients."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fairdiff_jax.models import pointwise
from fairdiff_jax.models.convolution import Conv, conv_general_dilated
from fairdiff_jax.models.point_cloud import Dense, GatedDense
from fairdiff_jax.models.transunet import StandardizedConv
from fairdiff_jax.training.mesh import BATCH, make_mesh


def _normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


class PlainGatedDense(nn.Module):
  """The gate after the layer, as published."""

  features: int

  @nn.compact
  def __call__(self, x, context):
    init = Dense.keywords["kernel_init"]
    gate = nn.Dense(self.features, kernel_init=init, name="gate")(context)
    bias = nn.Dense(
      self.features, use_bias=False, kernel_init=init, name="bias"
    )(context)
    layer = nn.Dense(self.features, kernel_init=init, name="layer")
    return layer(x) * nn.sigmoid(gate) + bias


class PlainStandardizedConv(nn.Module):
  """A 1 x 1 convolution of a standardised kernel, as a convolution."""

  features: int
  stride: int

  @nn.compact
  def __call__(self, x):
    shape = (1, 1, x.shape[-1], self.features)
    kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
    mean, var = kernel.mean((0, 1, 2)), kernel.var((0, 1, 2))
    return jax.lax.conv_general_dilated(
      x,
      (kernel - mean) / jnp.sqrt(var + 1e-5),
      (self.stride, self.stride),
      "VALID",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


LAYERS = {
  "one row": (pointwise.Dense(4), nn.Dense(4), [(6, 5)]),
  "dense": (pointwise.Dense(4), nn.Dense(4), [(3, 6, 5)]),
  "into heads": (
    pointwise.DenseGeneral((2, 3)),
    nn.DenseGeneral((2, 3)),
    [(3, 6, 5)],
  ),
  "out of heads": (
    pointwise.DenseGeneral(4, (-2, -1)),
    nn.DenseGeneral(4, (-2, -1)),
    [(3, 6, 2, 5)],
  ),
  "convolution": (
    pointwise.PointwiseConv(4),
    nn.Conv(4, (1, 1)),
    [(2, 3, 4, 5)],
  ),
  "convolution without bias": (
    pointwise.PointwiseConv(4, use_bias=False),
    nn.Conv(4, (1, 1), use_bias=False),
    [(2, 3, 4, 5)],
  ),
  "standardised": (
    StandardizedConv(4, 1),
    PlainStandardizedConv(4, 1),
    [(2, 3, 4, 5)],
  ),
  "standardised, strided": (
    StandardizedConv(4, 1, stride=2),
    PlainStandardizedConv(4, 2),
    [(2, 5, 4, 5)],
  ),
  # Wide enough for several turns of rows.
  "3 x 3, to fewer channels": (
    Conv(2, (3, 3)),
    nn.Conv(2, (3, 3)),
    [(2, 40, 32, 3)],
  ),
  "3 x 3, to more channels": (
    Conv(4, (3, 3)),
    nn.Conv(4, (3, 3)),
    [(2, 40, 32, 3)],
  ),
  "5 x 3, strided": (
    Conv(2, (5, 3), strides=(2, 3), padding=((2, 1), (0, 1))),
    nn.Conv(2, (5, 3), strides=(2, 3), padding=((2, 1), (0, 1))),
    [(8, 80, 33, 3)],
  ),
  "gated": (GatedDense(4), PlainGatedDense(4), [(3, 6, 5), (3, 1, 7)]),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_the_plain_one(name):
  layer, plain, shapes = LAYERS[name]
  inputs = [_normal(*shape, seed=i) for i, shape in enumerate(shapes)]
  variables = plain.init(jax.random.key(1), *inputs)
  jax.tree.map(
    np.testing.assert_array_equal,
    layer.init(jax.random.key(1), *inputs),
    variables,
  )
  # Initial biases are zeros, which would hide their part.
  variables = jax.tree.map(lambda p: p + _normal(*p.shape) / 4, variables)
  weight = _normal(*plain.apply(variables, *inputs).shape, seed=9)

  def gradients(module):
    def total(variables, *inputs):
      y = module.apply(variables, *inputs)
      return jnp.sum(y * weight), y

    each = tuple(range(1 + len(inputs)))
    return jax.jit(jax.grad(total, each, has_aux=True))(variables, *inputs)

  for a, b in zip(
    jax.tree.leaves(gradients(layer)),
    jax.tree.leaves(gradients(plain)),
    strict=True,
  ):
    assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(b)


def test_the_gradient_has_the_form_that_the_platform_is_fast_at():
  x, kernel = _normal(4, 6, 5), _normal(5, 3)

  def total(kernel):
    return jnp.sum(pointwise.matmul(x, kernel) ** 2)

  traced = jax.jit(jax.grad(total)).trace(kernel)

  def rows(platform):
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    return "tensor<24x5xf32>" in text

  assert rows("cpu") and not rows("tpu")


def test_devices_add_up_a_kernel_s_gradient_once():
  x, kernel = _normal(8, 64, 32, 3), _normal(3, 3, 3, 2)

  def total(kernel, x):
    y = conv_general_dilated(x, kernel, (1, 1), "SAME")
    return jnp.sum(jnp.sin(y))

  mesh = make_mesh(1, jax.devices())
  spread = NamedSharding(mesh, BATCH)
  whole = NamedSharding(mesh, PartitionSpec())
  gradient = jax.jit(
    jax.grad(total), in_shardings=(whole, spread), out_shardings=whole
  )
  with jax.set_mesh(mesh):
    program = gradient.lower(kernel, x).compile()
  text = program.as_text()
  assert " while(" in text and text.count(" all-reduce(") == 1
  np.testing.assert_allclose(
    program(kernel, jax.device_put(x, spread)),
    jax.jit(jax.grad(total))(kernel, x),
    rtol=1e-4,
    atol=1e-3,
  )


def test_half_precision_keeps_the_types():
  x, kernel = (
    a.astype(jnp.bfloat16) for a in (_normal(4, 6, 5), _normal(5, 3))
  )

  def total(x, kernel):
    y = pointwise.matmul(x, kernel)
    assert y.dtype == jnp.bfloat16
    return jnp.sum(y.astype(jnp.float32))

  found = jax.grad(total, (0, 1))(x, kernel)
  assert {g.dtype for g in found} == {jnp.dtype(jnp.bfloat16)}
