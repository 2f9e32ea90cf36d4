"""The flow VAE against NumPy, written from its description in float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fairdiff_jax.models.point_cloud import (
  PointFlowVAE,
  log_prior,
  posterior_entropy,
)
from fairdiff_jax.pretrained import graft
from fairdiff_jax.pretrained.fairdiff import load_point_flow_vae

LATENT, DEPTH, FLOW_WIDTH = 6, 3, 10
ENCODER, HEAD, DECODER = (5, 6, 7, 8), (9, 4), (5, 7, 9, 7, 5)
SMALL = PointFlowVAE(
  latent_dim=LATENT,
  encoder_widths=ENCODER,
  head_widths=HEAD,
  flow_depth=DEPTH,
  flow_width=FLOW_WIDTH,
  decoder_widths=DECODER,
)


def _state_dict(seed=0):
  """Random weights under the original's names."""
  rng = np.random.default_rng(seed)
  state = {}

  def linear(name, inputs, outputs, *kernel, bias=True):
    shape = (outputs, inputs, *kernel)
    state[f"{name}.weight"] = rng.normal(0, inputs**-0.5, shape)
    if bias:
      state[f"{name}.bias"] = rng.normal(0, 0.3, outputs)

  def norm(name, size):
    state[f"{name}.weight"] = rng.uniform(0.5, 1.5, size)
    state[f"{name}.bias"] = rng.normal(0, 0.3, size)
    state[f"{name}.running_mean"] = rng.normal(0, 0.3, size)
    state[f"{name}.running_var"] = rng.uniform(0.5, 1.5, size)
    state[f"{name}.num_batches_tracked"] = np.array(7)

  sizes = (3, *ENCODER)
  for i in range(1, 5):
    linear(f"encoder.conv{i}", sizes[i - 1], sizes[i], 1)
    norm(f"encoder.bn{i}", sizes[i])
  sizes = (ENCODER[-1], *HEAD, LATENT)
  for head in "mv":
    for i in range(1, 4):
      linear(f"encoder.fc{i}_{head}", sizes[i - 1], sizes[i])
    for i in range(1, 3):
      norm(f"encoder.fc_bn{i}_{head}", sizes[i])
  sizes = (LATENT // 2, FLOW_WIDTH, FLOW_WIDTH, LATENT)
  for layer in range(DEPTH):
    for i in range(3):
      name = f"flow.chain.{layer}.net_s_t.{2 * i}"
      linear(name, sizes[i], sizes[i + 1])
  sizes = (3, *DECODER, 3)
  for i in range(6):
    name = f"diffusion.net.layers.{i}"
    linear(f"{name}._layer", sizes[i], sizes[i + 1])
    linear(f"{name}._hyper_gate", LATENT + 3, sizes[i + 1])
    linear(f"{name}._hyper_bias", LATENT + 3, sizes[i + 1], bias=False)
  state["diffusion.var_sched.betas"] = np.linspace(0, 0.02, 11)
  return {name: value.astype(np.float32) for name, value in state.items()}


class Reference:
  """The original's networks in evaluation mode."""

  def __init__(self, state_dict):
    self.state = {k: v.astype(np.float64) for k, v in state_dict.items()}

  def linear(self, name, x):
    weight = self.state[f"{name}.weight"]
    bias = self.state.get(f"{name}.bias", 0)
    return x @ weight.reshape(weight.shape[:2]).T + bias

  def norm(self, name, x):
    weight, bias, mean, var = (
      self.state[f"{name}.{key}"]
      for key in ("weight", "bias", "running_mean", "running_var")
    )
    return (x - mean) / np.sqrt(var + 1e-5) * weight + bias

  def encode(self, x):
    for i in range(1, 5):
      x = self.norm(f"encoder.bn{i}", self.linear(f"encoder.conv{i}", x))
      x = np.maximum(x, 0) if i < 4 else x
    pooled = x.max(axis=1)

    def head(suffix):
      h = pooled
      for i in range(1, 3):
        h = self.linear(f"encoder.fc{i}_{suffix}", h)
        h = np.maximum(self.norm(f"encoder.fc_bn{i}_{suffix}", h), 0)
      return self.linear(f"encoder.fc3_{suffix}", h)

    return head("m"), head("v")

  def flow(self, z):
    half = z.shape[1] // 2
    logdet = np.zeros(z.shape[0])
    for layer in range(DEPTH):
      name = f"flow.chain.{layer}.net_s_t"
      if layer % 2 == 0:
        z = np.concatenate([z[:, half:], z[:, :half]], axis=1)
      h = np.maximum(self.linear(f"{name}.0", z[:, :half]), 0)
      h = self.linear(f"{name}.4", np.maximum(self.linear(f"{name}.2", h), 0))
      scale = 1 / (1 + np.exp(-h[:, :half] - 2))
      z = np.concatenate([z[:, :half], z[:, half:] * scale + h[:, half:]], 1)
      if layer % 2 == 0:
        z = np.concatenate([z[:, half:], z[:, :half]], axis=1)
      logdet += np.log(scale).sum(axis=1)
    return z, logdet

  def denoise(self, points, beta, latent):
    time = np.stack([beta, np.sin(beta), np.cos(beta)], axis=1)
    context = np.concatenate([time, latent], axis=1)[:, None]
    x = points
    for i in range(6):
      name = f"diffusion.net.layers.{i}"
      gate = 1 / (1 + np.exp(-self.linear(f"{name}._hyper_gate", context)))
      x = self.linear(f"{name}._layer", x) * gate
      x = x + self.linear(f"{name}._hyper_bias", context)
      x = np.where(x > 0, x, 0.01 * x) if i < 5 else x
    return points + x


@pytest.fixture(scope="module")
def original():
  """Module, variables and the NumPy reference of the same checkpoint."""
  state_dict = _state_dict()
  return *load_point_flow_vae(state_dict), Reference(state_dict)


def _normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _assert_close(found, expected):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    found,
    expected,
  )


def test_sizes_are_read_off_the_checkpoint(original):
  module, variables, _ = original
  assert module == SMALL
  leaves = jax.tree.leaves(variables)
  assert {leaf.dtype for leaf in leaves} == {np.dtype("float32")}


def test_posterior(original):
  module, variables, reference = original
  points = _normal(1, 4, 20, 3)
  found = module.apply(variables, points, method="encode")
  _assert_close(found, reference.encode(points))


def test_flow(original):
  module, variables, reference = original
  latent = _normal(2, 4, LATENT)
  found = module.apply(variables, latent, method="flow")
  _assert_close(found, reference.flow(latent))


def test_flow_logdet_is_that_of_its_jacobian(original):
  module, variables, _ = original
  latent = _normal(3, 4, LATENT)

  def flow(z):
    return module.apply(variables, z[None], method="flow")[0][0]

  jacobian = jax.jit(jax.vmap(jax.jacfwd(flow)))(latent)
  _, logdet = module.apply(variables, latent, method="flow")
  _assert_close(logdet, np.linalg.slogdet(jacobian).logabsdet)


def test_inverse_flow_undoes_flow(original):
  module, variables, _ = original
  latent = _normal(4, 4, LATENT)
  w, _ = module.apply(variables, latent, method="flow")
  assert np.abs(w - latent).max() > 0.1
  found = module.apply(variables, w, method="inverse_flow")
  _assert_close(found, latent)


def test_denoiser(original):
  module, variables, reference = original
  points, latent = _normal(5, 4, 20, 3), _normal(6, 4, LATENT)
  beta = np.array([1e-4, 0.005, 0.01, 0.02], np.float32)
  found = module.apply(variables, points, beta, latent, method="denoise")
  _assert_close(found, reference.denoise(points, beta, latent))


def test_loss_terms_match_their_densities():
  logvar, w, logdet = _normal(7, 3, 5), _normal(8, 3, 5), _normal(9, 3)
  entropy = np.log(np.sqrt(2 * np.pi * np.e * np.exp(logvar))).sum(1)
  _assert_close(posterior_entropy(logvar), entropy)
  density = np.exp(-(w**2) / 2) / np.sqrt(2 * np.pi)
  _assert_close(log_prior(w, logdet), np.log(density).sum(1) + logdet)


def test_default_is_the_size_of_the_original():
  points = jax.ShapeDtypeStruct((1, 512, 3), jnp.float32)
  variables = jax.eval_shape(PointFlowVAE().init, jax.random.key(0), points)
  sizes = [leaf.size for leaf in jax.tree.leaves(variables["params"])]
  assert sum(sizes) == 3_879_832


def test_odd_latent_is_refused():
  with pytest.raises(ValueError, match="latent_dim must be even, got 5"):
    SMALL.copy(latent_dim=5).init(jax.random.key(0), jnp.zeros((1, 4, 3)))


def test_padding_changes_nothing_in_training(original):
  module, variables, _ = original
  points = _normal(10, 6, 20, 3)
  weight = jnp.array([1.0, 1, 1, 1, 0, 0])

  @jax.jit
  def encode(points, weight):
    return module.apply(
      variables, points, weight, True, method="encode", mutable=["batch_stats"]
    )

  (mean, logvar), stats = encode(points, weight)
  (short_mean, short_logvar), short_stats = encode(points[:4], None)
  _assert_close(mean[:4], short_mean)
  _assert_close(logvar[:4], short_logvar)
  _assert_close(stats, short_stats)


@pytest.fixture(scope="module")
def grouped():
  """A module of three groups and its variables."""
  module = SMALL.copy(num_groups=3, group_dim=4)
  return module, jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 4, 3)))


def _shapes(module):
  points = jnp.zeros((1, 4, 3))
  variables = jax.eval_shape(module.init, jax.random.key(0), points)
  leaves = jax.tree_util.tree_leaves_with_path(variables)
  return {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}


def test_groups_add_parameters_to_the_flow_alone(grouped):
  module, variables = grouped
  changed = set(_shapes(module).items()) ^ set(_shapes(SMALL).items())
  kernel = r"\['params'\]\['coupling_\d'\]\['dense_0'\]\['kernel'\]"
  table = r"\['params'\]\['group'\]\['embedding'\]"
  assert all(re.fullmatch(f"{kernel}|{table}", path) for path, _ in changed)
  assert variables["params"]["group"]["embedding"].shape == (4, 4)


def test_groups_and_unknown_have_priors_of_their_own(grouped):
  module, variables = grouped
  latent = jnp.tile(_normal(11, 1, LATENT), (4, 1))
  group = jnp.array([0, 1, 2, -1])
  w, _ = module.apply(variables, latent, group, method="flow")
  assert np.isfinite(w).all()
  distance = np.abs(w[:, None] - w[None]).max(-1)
  assert (distance[~np.eye(4, dtype=bool)] > 1e-4).all()


def test_no_group_means_unknown(grouped):
  module, variables = grouped
  latent = _normal(12, 4, LATENT)
  unknown = module.apply(variables, latent, jnp.full(4, -1), method="flow")
  _assert_close(module.apply(variables, latent, method="flow"), unknown)


def test_inverse_flow_of_a_group_undoes_its_flow(grouped):
  module, variables = grouped
  latent, group = _normal(13, 4, LATENT), jnp.array([0, 2, -1, 1])
  w, _ = module.apply(variables, latent, group, method="flow")
  found = module.apply(variables, w, group, method="inverse_flow")
  _assert_close(found, latent)


def test_missing_tensor_is_named_with_its_neighbour():
  state_dict = _state_dict()
  del state_dict["encoder.bn2.running_var"]
  message = r"no tensor 'encoder.bn2.running_var'.*'encoder.bn\d.running_var'"
  with pytest.raises(ValueError, match=message):
    load_point_flow_vae(state_dict)


@pytest.mark.parametrize(
  "name", ["encoder.conv1", "flow.chain.0.net_s_t.0", "diffusion.net.layers.0"]
)
def test_missing_network_is_named(name):
  state_dict = {
    k: v
    for k, v in _state_dict().items()
    if not k.startswith(name.split(".")[0])
  }
  with pytest.raises(ValueError, match=f"no tensor '{re.escape(name)}"):
    load_point_flow_vae(state_dict)


def test_unused_tensors_are_listed():
  state_dict = _state_dict()
  state_dict["flow.chain.0.extra"] = np.zeros(1)
  with pytest.raises(ValueError, match=r"unused.*\['flow.chain.0.extra'\]"):
    load_point_flow_vae(state_dict)


def test_wrong_shape_is_named():
  state_dict = _state_dict()
  state_dict["encoder.bn1.weight"] = np.zeros(99)
  message = r"params/posterior/norm_0/scale: \(99,\), not \(5,\)"
  with pytest.raises(ValueError, match=message):
    load_point_flow_vae(state_dict)


def test_spectral_norm_is_divided_out():
  plain = _state_dict()
  state_dict = dict(plain)
  for name in [n for n in plain if re.match(r"flow.*\.weight$", n)]:
    weight = state_dict.pop(name)
    u, sigma, v = np.linalg.svd(weight, full_matrices=False)
    state_dict[f"{name}_orig"] = weight
    state_dict[f"{name}_u"], state_dict[f"{name}_v"] = u[:, 0], v[0]
    plain[name] = weight / sigma[0]
  _assert_close(
    load_point_flow_vae(state_dict)[1], load_point_flow_vae(plain)[1]
  )


def test_convolution_kernels_are_read_as_height_width_in_out():
  image = _normal(14, 1, 5, 6, 2)
  weight = _normal(15, 4, 2, 3, 3)
  found = jax.lax.conv_general_dilated(
    image,
    graft.conv(weight),
    (1, 1),
    "VALID",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  windows = np.lib.stride_tricks.sliding_window_view(image, (3, 3), (1, 2))
  _assert_close(found, np.einsum("bhwiyx,oiyx->bhwo", windows, weight))
