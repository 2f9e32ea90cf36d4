"""The autoencoder against that of diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fairdiff_jax.models.autoencoder import LOGVAR_RANGE, AutoencoderKL

SMALL = AutoencoderKL(
  latent_channels=3,
  block_out_channels=(8, 12, 16),
  layers_per_block=1,
  norm_num_groups=4,
)
IMAGE, LATENTS = (2, 23, 18, 3), (2, 5, 3, 3)
APPLY = jax.jit(SMALL.apply, static_argnames="method")


def _normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _relative_error(found, expected):
  return np.abs(found - expected).max() / np.abs(expected).max()


def test_default_is_the_size_of_the_original():
  image = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
  variables = jax.eval_shape(AutoencoderKL().init, jax.random.key(0), image)
  assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == 83_653_863


def test_half_precision_keeps_parameters_in_float32():
  module = SMALL.copy(dtype=jnp.bfloat16)
  variables = jax.jit(module.init)(jax.random.key(0), jnp.zeros(IMAGE))
  leaves = jax.tree.leaves(variables)
  assert {leaf.dtype for leaf in leaves} == {np.dtype("float32")}

  @jax.jit
  def reconstruct(variables, image):
    return module.apply(variables, image), SMALL.apply(variables, image)

  half, full = reconstruct(variables, _normal(0, *IMAGE))
  assert half.dtype == jnp.bfloat16
  assert _relative_error(half.astype(np.float32), full) < 0.05


@pytest.fixture(scope="module")
def reference():
  """diffusers' autoencoder with random weights."""
  pytest.importorskip("diffusers")
  torch = pytest.importorskip("torch")
  from diffusers import AutoencoderKL as Reference

  torch.manual_seed(0)
  model = Reference(
    latent_channels=3,
    block_out_channels=(8, 12, 16),
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    layers_per_block=1,
    norm_num_groups=4,
  )
  for parameter in model.parameters():
    parameter.data += 0.1 * torch.randn_like(parameter)
  return model


@pytest.fixture(scope="module")
def variables(reference, tmp_path_factory):
  return _read(reference, tmp_path_factory.mktemp("autoencoder"))


def _read(reference, folder):
  from fairdiff_jax.pretrained.stable_diffusion import load

  reference.save_pretrained(folder)
  module, variables = load(folder)["autoencoder"]
  assert module == SMALL
  return variables


def _torch(array):
  import torch

  return torch.from_numpy(array.transpose(0, 3, 1, 2).copy())


def _numpy(tensor):
  return tensor.detach().numpy().transpose(0, 2, 3, 1)


def test_encode(reference, variables):
  image = _normal(1, *IMAGE)
  posterior = reference.encode(_torch(image)).latent_dist
  mean, logvar = APPLY(variables, image, method="encode")
  assert mean.shape == (2, 5, 4, 3)
  assert _relative_error(mean, _numpy(posterior.mean)) < 1e-4
  assert _relative_error(logvar, _numpy(posterior.logvar)) < 1e-4


def test_decode(reference, variables):
  latents = _normal(2, *LATENTS)
  image = APPLY(variables, latents, method="decode")
  assert image.shape == (2, 20, 12, 3)
  expected = reference.decode(_torch(latents)).sample
  assert _relative_error(image, _numpy(expected)) < 1e-4


def test_log_variance_is_clipped(reference, variables):
  image = 1e4 * _normal(3, *IMAGE)
  quant_conv = jax.tree.map(
    lambda leaf: 1e3 * leaf, variables["params"]["quant_conv"]
  )
  params = {**variables["params"], "quant_conv": quant_conv}
  _, logvar = APPLY({"params": params}, image, method="encode")
  assert (logvar.min(), logvar.max()) == LOGVAR_RANGE


def test_gradients(reference, tmp_path):
  """Of a weighted sum of every output, in the weights and in the inputs."""
  import torch

  variables = _read(reference, tmp_path / "weights")
  image, latents = _normal(4, *IMAGE), _normal(5, *LATENTS)
  weights = [_normal(6, 2, 5, 4, 3), _normal(7, 2, 5, 4, 3)]
  weights.append(_normal(8, 2, 20, 12, 3))

  @jax.jit
  @jax.grad
  def gradient(arguments):
    variables, image, latents = arguments
    outputs = SMALL.apply(variables, image, method="encode")
    decoded = SMALL.apply(variables, latents, method="decode")
    return sum(
      jnp.sum(weight * output)
      for weight, output in zip(weights, (*outputs, decoded), strict=True)
    )

  found = gradient((variables, image, latents))

  inputs = [_torch(image).requires_grad_(), _torch(latents).requires_grad_()]
  reference.zero_grad()
  posterior = reference.encode(inputs[0]).latent_dist
  outputs = (
    posterior.mean,
    posterior.logvar,
    reference.decode(inputs[1]).sample,
  )
  total = sum(
    (_torch(weight) * output).sum()
    for weight, output in zip(weights, outputs, strict=True)
  )
  total.backward()
  kept = {k: v.clone() for k, v in reference.state_dict().items()}
  with torch.no_grad():
    for parameter in reference.parameters():
      parameter.copy_(parameter.grad)
  expected = _read(reference, tmp_path / "gradients")
  reference.load_state_dict(kept)

  assert _relative_error(found[1], _numpy(inputs[0].grad)) < 1e-3
  assert _relative_error(found[2], _numpy(inputs[1].grad)) < 1e-3
  # A key's bias shifts all logits alike, so its gradient is 0 but for rounding.
  errors = jax.tree_util.tree_map_with_path(
    lambda path, a, b: (
      np.abs(a).max()
      if "to_k']['bias" in jax.tree_util.keystr(path)
      else _relative_error(a, b)
    ),
    found[0],
    expected,
  )
  assert max(jax.tree.leaves(errors)) < 1e-3
