"""Stable Diffusion's U-Net and ControlNet against diffusers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fairdiff_jax.models.stable_diffusion import (
  StableDiffusionControlNet,
  StableDiffusionUNet,
)
from fairdiff_jax.pretrained.stable_diffusion import controlnet_from_unet

CONFIG = {
  "block_out_channels": (16, 32, 32),
  "layers_per_block": 1,
  "attention_head_dim": 4,
  "cross_attention_dim": 16,
  "norm_num_groups": 8,
}
STEM = (4, 8)
UNET = StableDiffusionUNet(**CONFIG)
CONTROLNET = StableDiffusionControlNet(
  **CONFIG, conditioning_embedding_out_channels=STEM
)
TINY = {**CONFIG, "block_out_channels": (8, 16), "norm_num_groups": 4}
TINY_UNET = StableDiffusionUNet(**TINY)
TINY_CONTROLNET = StableDiffusionControlNet(
  **TINY, conditioning_embedding_out_channels=STEM
)
EVEN, ODD = (8, 12), (9, 7)


def _inputs(size, seed=0):
  """Latents, steps, context and hint of a batch of two."""
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)

  h, w = size
  hint = rng.uniform(size=(2, 2 * h, 2 * w, 3)).astype(np.float32)
  return normal(2, h, w, 4), np.array([3, 950]), normal(2, 5, 16), hint


def _random(module, *inputs):
  """Parameters of which none is zero."""
  shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    scale = 0.3 if len(leaf.shape) == 1 else np.prod(leaf.shape[:-1]) ** -0.5
    values = rng.normal(0, scale, leaf.shape).astype(np.float32)
    return values + (path[-1].key == "scale")

  return jax.tree_util.tree_map_with_path(draw, shapes)


def _types(block, number):
  """Names of the blocks, of which only the lowest has no attention."""
  names = [f"CrossAttn{block}"] * (number - 1) + [block]
  return tuple(names if block == "DownBlock2D" else names[::-1])


def _reference(config, stem):
  """The networks of diffusers."""
  diffusers = pytest.importorskip("diffusers")
  number = len(config["block_out_channels"])
  down = {"down_block_types": _types("DownBlock2D", number)}
  up = {"up_block_types": _types("UpBlock2D", number)}
  unet = diffusers.UNet2DConditionModel(**config, **down, **up)
  controlnet = diffusers.ControlNetModel(
    **config, **down, conditioning_embedding_out_channels=stem
  )
  return unet.eval(), controlnet.eval()


def _tree(tensors):
  """Nests PyTorch's tensors by name and lays them out as JAX does."""
  tree = {}
  for name, tensor in tensors:
    *path, leaf = re.sub(r"\.(\d+)", r"_\1", name).split(".")
    if leaf == "weight":
      leaf = "scale" if tensor.ndim == 1 else "kernel"
    order = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[tensor.ndim]
    node = tree
    for part in path:
      node = node.setdefault(part, {})
    node[leaf] = tensor.permute(order)
  return tree


@pytest.fixture(scope="module")
def pair():
  """Both networks of diffusers with random weights, and their parameters."""
  torch = pytest.importorskip("torch")
  torch.manual_seed(0)
  networks = _reference(CONFIG, STEM)
  params = []
  for network in networks:
    for parameter in network.parameters():
      parameter.data += 0.1 * torch.randn(parameter.shape)
    tree = _tree(network.state_dict().items())
    params.append(jax.tree.map(lambda x: x.numpy(), tree))
  return *networks, *params


def _to_torch(size):
  torch = pytest.importorskip("torch")
  latents, steps, context, hint = map(torch.tensor, _inputs(size))
  nchw = (0, 3, 1, 2)
  return latents.permute(nchw), steps, context, hint.permute(nchw)


def _nhwc(x):
  return x.detach().numpy().transpose(0, 2, 3, 1)


def _assert_close(found, expected, tolerance):
  """Compares trees by the largest difference relative to each leaf's size."""

  def error(a, b):
    assert np.shape(a) == np.shape(b)
    return float(np.abs(a - b).max() / np.abs(b).max())

  errors = jax.tree.map(error, found, expected)
  leaves = jax.tree_util.tree_leaves_with_path(errors)
  path, worst = max(leaves, key=lambda leaf: leaf[1])
  print(f"largest relative error {worst:.1e} at {jax.tree_util.keystr(path)}")
  assert worst < tolerance


def test_unet_is_that_of_diffusers(pair):
  unet, _, params, _ = pair
  *inputs, _ = _inputs(EVEN)
  found = jax.jit(UNET.apply)({"params": params}, *inputs)
  expected = unet(*_to_torch(EVEN)[:3]).sample
  _assert_close(found, _nhwc(expected), 1e-4)


@pytest.fixture(scope="module")
def steered(pair):
  """Residuals, prediction and gradients of the joint network, on odd sizes.

  First those found, then those of diffusers.
  """
  unet, controlnet, *params = pair
  *inputs, hint = _inputs(ODD)
  weight = np.random.default_rng(9).normal(size=inputs[0].shape)
  weight = weight.astype(np.float32)

  def loss(params):
    residuals = CONTROLNET.apply({"params": params[1]}, *inputs, hint)
    prediction = UNET.apply({"params": params[0]}, *inputs, residuals)
    return jnp.sum(weight * prediction**2), (residuals, prediction)

  gradients, (residuals, prediction) = jax.jit(jax.grad(loss, has_aux=True))(
    params
  )
  found = residuals, prediction, gradients

  *tensors, hint = _to_torch(ODD)
  down, middle = controlnet(*tensors, controlnet_cond=hint, return_dict=False)
  prediction = unet(
    *tensors,
    down_block_additional_residuals=down,
    mid_block_additional_residual=middle,
  ).sample
  nhwc = prediction.permute(0, 2, 3, 1)
  (nhwc.new_tensor(weight) * nhwc**2).sum().backward()
  gradients = [
    jax.tree.map(
      lambda x: x.numpy(),
      _tree((n, p.grad) for n, p in network.named_parameters()),
    )
    for network in (unet, controlnet)
  ]
  residuals = tuple(map(_nhwc, down)), _nhwc(middle)
  return found, (residuals, _nhwc(prediction), gradients)


def test_residuals_are_those_of_diffusers(steered):
  (found, *_), (expected, *_) = steered
  _assert_close(found, expected, 1e-4)


def test_steered_unet_is_that_of_diffusers(steered):
  (_, found, _), (_, expected, _) = steered
  _assert_close(found, expected, 1e-4)


def test_gradients_are_those_of_diffusers(steered):
  (*_, found), (*_, expected) = steered
  _assert_close(found, expected, 1e-3)


def _full_size():
  """Shapes of both networks' parameters at their defaults."""
  latents = jnp.zeros((1, 8, 8, 4))
  steps, context = jnp.zeros(1), jnp.zeros((1, 77, 768))
  hint = jnp.zeros((1, 64, 64, 3))
  key = jax.random.key(0)
  unet = jax.eval_shape(
    StableDiffusionUNet().init, key, latents, steps, context
  )
  controlnet = jax.eval_shape(
    StableDiffusionControlNet().init, key, latents, steps, context, hint
  )
  return unet["params"], controlnet["params"]


def test_defaults_have_the_released_numbers_of_parameters():
  sizes = [
    sum(leaf.size for leaf in jax.tree.leaves(params))
    for params in _full_size()
  ]
  assert sizes == [859_520_964, 361_279_120]


def test_defaults_have_the_names_and_shapes_of_diffusers():
  torch = pytest.importorskip("torch")
  config = {
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
    "norm_num_groups": 32,
  }
  with torch.device("meta"):
    networks = _reference(config, (16, 32, 96, 256))
  for network, params in zip(networks, _full_size(), strict=True):
    expected = jax.tree.map(
      lambda x: tuple(x.shape), _tree(network.state_dict().items())
    )
    assert jax.tree.map(lambda x: x.shape, params) == expected


def test_residuals_are_zero_at_initialisation():
  inputs = _inputs(EVEN)
  # This generator's code compiles in a fraction of the default one's time.
  key = jax.random.key(0, impl="unsafe_rbg")
  params = jax.jit(TINY_CONTROLNET.init)(key, *inputs)
  down, middle = jax.jit(TINY_CONTROLNET.apply)(params, *inputs)
  assert [x.shape for x in down] == [
    *[(2, 8, 12, 8)] * 2,
    *[(2, 4, 6, 8), (2, 4, 6, 16)],
  ]
  assert middle.shape == (2, 4, 6, 16)
  assert not any(x.any() for x in (*down, middle))


@pytest.fixture(scope="module")
def tiny():
  """Random parameters of both networks."""
  *inputs, hint = _inputs(EVEN)
  controlnet = _random(TINY_CONTROLNET, *inputs, hint)
  return _random(TINY_UNET, *inputs), controlnet


def test_controlnet_starts_from_the_unet(tiny):
  unet, controlnet = tiny
  started = controlnet_from_unet(unet, controlnet)
  assert started.keys() == controlnet.keys()
  for name, subtree in started.items():
    source = controlnet if name.startswith("controlnet_") else unet
    jax.tree.map(np.testing.assert_array_equal, subtree, source[name])
  assert sum(name in unet for name in started) == 5


def test_controlnet_does_not_start_from_another_unet(tiny):
  unet, controlnet = tiny
  missing = {k: v for k, v in unet.items() if k != "mid_block"}
  with pytest.raises(ValueError, match=r"mid_block/.*: missing, not \(16,\)"):
    controlnet_from_unet(missing, controlnet)
  more = {**unet, "down_blocks_2": unet["down_blocks_1"]}
  message = r"down_blocks_2/.*: \(16,\), not expected"
  with pytest.raises(ValueError, match=message):
    controlnet_from_unet(more, controlnet)
  wider = {**unet, "conv_in": {"kernel": np.zeros((3, 3, 9, 8))}}
  message = r"kernel: \(3, 3, 9, 8\), not \(3, 3, 4, 8\)"
  with pytest.raises(ValueError, match=message):
    controlnet_from_unet(wider, controlnet)


def _loss_and_gradients(params, **attributes):
  """Of the small U-Net with other attributes."""
  *inputs, _ = _inputs(ODD)

  @jax.jit
  @jax.value_and_grad
  def run(params):
    unet = TINY_UNET.copy(**attributes)
    found = unet.apply({"params": params}, *inputs)
    return jnp.mean(found**2)

  return run(params)


def test_rematerialisation_changes_no_gradient(tiny):
  expected = _loss_and_gradients(tiny[0])
  found = _loss_and_gradients(tiny[0], remat=True)
  _assert_close(found, expected, 1e-4)


def test_rematerialisation_computes_blocks_again(tiny):
  def count(**attributes):
    jaxpr = jax.make_jaxpr(
      lambda params: _loss_and_gradients(params, **attributes)
    )(tiny[0])
    return str(jaxpr).count("conv_general_dilated[")

  assert count(remat=True) > count()


def test_bfloat16_is_near_float32(tiny):
  *inputs, _ = _inputs(ODD)

  @jax.jit
  def both(params):
    modules = TINY_UNET, TINY_UNET.copy(dtype=jnp.bfloat16)
    return [module.apply({"params": params}, *inputs) for module in modules]

  expected, found = both(tiny[0])
  assert found.dtype == jnp.float32
  assert np.abs(found - expected).max() > 0
  _assert_close(found, expected, 0.05)


def test_bfloat16_products_but_for_the_logits(tiny):
  *inputs, hint = _inputs(EVEN)
  unet, controlnet = (
    module.copy(dtype=jnp.bfloat16) for module in (TINY_UNET, TINY_CONTROLNET)
  )

  def predict(params):
    residuals = controlnet.apply({"params": params[1]}, *inputs, hint)
    return unet.apply({"params": params[0]}, *inputs, residuals)

  products = re.findall(
    r":(\w+)\[([\d,]*)\] = (conv_general_dilated|dot_general)\b",
    str(jax.make_jaxpr(predict)(tiny)),
  )
  # Logits alone: of queries and keys, which are positions of either level or
  # tokens of the context, by the forms of two platforms.
  wide = [(name, shape) for dtype, shape, name in products if dtype != "bf16"]
  assert [name for name, _ in wide] == ["dot_general"] * 16
  most, tokens = EVEN[0] * EVEN[1], inputs[2].shape[1]
  for _, shape in wide:
    sizes = [int(n) for n in shape.split(",")]
    assert sizes[-1] in (most, most // 4, tokens), shape
    assert {most, most // 4} & set(sizes[:-1]), shape
  assert len(products) > 100


def test_other_channels_are_refused():
  latents, steps, context, hint = _inputs(EVEN)
  key = jax.random.key(0)
  with pytest.raises(ValueError, match="latents must have 4 channels"):
    UNET.init(key, latents[..., :3], steps, context)
  with pytest.raises(ValueError, match="context must have tokens of size 16"):
    UNET.init(key, latents, steps, context[..., :8])
  with pytest.raises(ValueError, match=r"hint must be \[B, 16, 24, 3\]"):
    CONTROLNET.init(key, latents, steps, context, hint[:, :8, :8])


def test_missing_residual_is_refused(tiny):
  *inputs, hint = _inputs(EVEN)
  unet, controlnet = ({"params": params} for params in tiny)
  residuals = jax.eval_shape(TINY_CONTROLNET.apply, controlnet, *inputs, hint)
  down, middle = residuals
  found = jax.eval_shape(TINY_UNET.apply, unet, *inputs, residuals)
  assert found.shape == inputs[0].shape
  with pytest.raises(ValueError, match="shorter"):
    jax.eval_shape(TINY_UNET.apply, unet, *inputs, (down[:-1], middle))
