"""Diffusion of latents, from weights on disk to synthetic images."""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from test_stable_diffusion import _assert_close, _nhwc, _tree

from configs.phantom import get_config
from fairdiff_jax.diffusion.process import min_snr_weight
from fairdiff_jax.diffusion.samplers import example_keys, example_normal
from fairdiff_jax.diffusion.schedule import make_schedule
from fairdiff_jax.models.stable_diffusion import (
  StableDiffusionControlNet,
  StableDiffusionUNet,
)
from fairdiff_jax.models.text_encoder import TextEncoder
from fairdiff_jax.objectives.image import image_task
from fairdiff_jax.objectives.latent_space import encode_image, make_autoencoder
from fairdiff_jax.pretrained import importing, stable_diffusion
from fairdiff_jax.training.latents import cached_shape
from fairdiff_jax.training.setup import setup
from fairdiff_jax.training.start import start_from_weights

SIZE, GROUPS = 16, 3
KEYS = jax.random.key(2), jnp.arange(4)
SCHEDULE = dict(
  beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
)


def tiny_config(**changes):
  config = get_config("smoke").unlock()
  config.data.size = (SIZE, SIZE)
  config.image.network = "stable_diffusion"
  config.image.prediction = "eps"
  config.image.schedule = "scaled_linear"
  config.image.beta_start, config.image.beta_end = 0.00085, 0.012
  config.image.guidance = 2.0
  config.image.stable_diffusion = dict(
    block_out_channels=(8, 16),
    layers_per_block=1,
    attention_head_dim=2,
    cross_attention_dim=8,
    norm_num_groups=4,
    hint_channels=(4, 8),
    latent_channels=4,
    autoencoder_channels=(8, 8),
    autoencoder_layers=1,
  )
  config.update_from_flattened_dict(changes)
  return config


def make_variables(task):
  """Random variables of which no part is silent."""
  initial = jax.eval_shape(task.init, jax.random.key(0))
  rng = np.random.default_rng(0)
  variables = jax.tree.map(
    lambda x: rng.normal(scale=0.1, size=x.shape), initial
  )
  variables.frozen["scaling_factor"] = 0.18215
  return jax.tree.map(np.float32, variables)


def make_batch():
  rng = np.random.default_rng(1)
  return {
    "image": rng.uniform(-1, 1, (4, SIZE, SIZE, 1)).astype(np.float32),
    "mask": rng.integers(0, 3, (4, SIZE, SIZE)).astype(np.int32),
    "group": np.array([0, 1, 2, -1], np.int32),
  }


@pytest.fixture(scope="module")
def task():
  return image_task(tiny_config().image, GROUPS)


@pytest.fixture(scope="module")
def variables(task):
  return make_variables(task)


@pytest.fixture(scope="module")
def risk(task):
  keys = example_keys(*KEYS)

  @jax.jit
  def run(variables, batch):
    def mean(params):
      losses, aux = task.risk(
        variables._replace(params=params), batch, keys, True
      )
      return losses.mean(), (losses, aux)

    grads, (losses, aux) = jax.grad(mean, has_aux=True)(variables.params)
    return losses, aux, grads

  return run


def test_risk_is_per_case_and_teaches_both_networks(risk, variables):
  losses, aux, grads = risk(variables, make_batch())
  assert losses.shape == (4,) and np.isfinite(losses).all()
  assert aux["x0"]().shape == (4, SIZE, SIZE, 1)
  silent = [
    jax.tree_util.keystr(path)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads)
    if not np.abs(leaf).max()
  ]
  assert not silent


def test_a_case_knows_nothing_of_the_others(risk, variables):
  batch = make_batch()
  losses, *_ = risk(variables, batch)
  batch["image"][1] = 0
  changed, *_ = risk(variables, batch)
  others = np.array([0, 2, 3])
  assert changed[1] != losses[1]
  np.testing.assert_allclose(changed[others], losses[others], rtol=1e-6)


def test_latents_may_be_encoded_before(risk, variables):
  batch = make_batch()
  expected, *_ = risk(variables, batch)
  image = batch.pop("image")
  autoencoder = make_autoencoder(tiny_config().image)
  batch["latent"] = encode_image(
    autoencoder, variables.frozen["autoencoder"], image
  )
  found, *_ = risk(variables, batch)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(
  ("unet", "learnt"),
  [
    ("locked", set()),
    ("decoder", {"up_blocks_0", "up_blocks_1", "conv_norm_out", "conv_out"}),
    ("unlocked", None),
  ],
)
def test_what_of_the_unet_learns(unet, learnt):
  config = tiny_config(**{"image.unet": unet}).image
  initial = jax.eval_shape(image_task(config, GROUPS).init, jax.random.key(0))
  found = initial.params["unet"].keys()
  kept = initial.frozen["unet"].keys()
  assert not found & kept
  if learnt is None:
    assert not kept
  else:
    assert found == learnt and {"conv_in", "mid_block"} <= kept


def test_only_the_middle_may_steer(variables):
  config = tiny_config(**{"image.only_mid_control": True}).image
  task = image_task(config, GROUPS)
  keys = example_keys(*KEYS)
  risk = jax.jit(lambda *args: task.risk(*args, keys, True)[0])
  expected = risk(variables, make_batch())
  for name in ("down_blocks_0", "mid_block"):
    controlnet = dict(variables.params["controlnet"])
    name = f"controlnet_{name}"
    controlnet[name] = jax.tree.map(lambda x: x + 1, controlnet[name])
    params = {**variables.params, "controlnet": controlnet}
    found = risk(variables._replace(params=params), make_batch())
    assert np.array_equal(found, expected) == (name != "controlnet_mid_block")


def test_sampling_follows_mask_and_prompt(task, variables):
  keys = example_keys(jax.random.key(0), jnp.zeros(4, int))
  sample = jax.jit(task.sample)
  mask = make_batch()["mask"][[0, 0, 1, 1]]
  group = jnp.array([0, 1, 0, 0])
  images = sample(variables, mask, group, keys)
  assert images.shape == (4, SIZE, SIZE, 1)
  assert np.abs(images).max() <= 1
  assert len({np.asarray(x).tobytes() for x in images}) == 3
  np.testing.assert_array_equal(images[2], images[3])


def test_unknown_settings_are_named():
  for field, message in (
    ("image.network", "unknown image.network 'x'; use one of unet, stable"),
    ("image.unet", "unknown image.unet 'x'; use one of locked, decoder"),
  ):
    with pytest.raises(ValueError, match=message):
      image_task(tiny_config(**{field: "x"}).image, GROUPS)


def test_sizes_without_latents_are_named():
  config = tiny_config(**{"image.cache_latents": True, "data.size": (17, 16)})
  message = "images of 17 x 16 have no latents.*data.size to multiples of 2"
  with pytest.raises(ValueError, match=message):
    cached_shape(config)
  task = image_task(config.image, GROUPS)
  variables = jax.eval_shape(task.init, jax.random.key(0))
  keys = jax.random.split(jax.random.key(0), 2)
  masks = np.zeros((2, 17, 16), np.int32)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(task.sample, variables, masks, np.zeros(2, int), keys)


def test_frozen_weights_must_be_named():
  config = tiny_config(**{"train.points": (0, 0), "train.segmenter": (0, 0)})
  run = setup(config.lock(), jax.devices()[:1])
  with pytest.raises(ValueError, match=r"image\.weights is empty"):
    start_from_weights(run.abstract, run.objective, run.abstract)


def make_networks(variables):
  """Modules with their variables, as readers of weights return them."""
  sizes = tiny_config().image.stable_diffusion
  shared = dict(
    block_out_channels=tuple(sizes.block_out_channels),
    layers_per_block=1,
    attention_head_dim=2,
    cross_attention_dim=8,
    norm_num_groups=4,
  )
  stem = tuple(sizes.hint_channels)
  modules = {
    "unet": StableDiffusionUNet(**shared),
    "controlnet": StableDiffusionControlNet(
      **shared, conditioning_embedding_out_channels=stem
    ),
    "autoencoder": make_autoencoder(tiny_config().image),
  }
  params = {
    **variables.params,
    "autoencoder": variables.frozen["autoencoder"],
  }
  return {k: (module, {"params": params[k]}) for k, module in modules.items()}


@pytest.fixture(scope="module")
def peers(variables, tmp_path_factory):
  """The same networks in diffusers, by name."""
  diffusers = pytest.importorskip("diffusers")
  directory = tmp_path_factory.mktemp("peers")
  stable_diffusion.save(directory, **make_networks(variables))
  return {
    kind: getattr(diffusers, kind).from_pretrained(directory / folder).eval()
    for kind, folder in (
      ("UNet2DConditionModel", "unet"),
      ("ControlNetModel", "controlnet"),
      ("AutoencoderKL", "vae"),
    )
  }


def to_torch(x):
  """A tensor, NHWC as NCHW."""
  torch = pytest.importorskip("torch")
  x = torch.tensor(np.asarray(x))
  return x.permute(0, 3, 1, 2) if x.ndim == 4 else x


def prompt_of(variables, group, kept):
  prompts = variables.frozen["prompts"]
  positive = prompts["positive"][np.where(group < 0, GROUPS, group)]
  return np.where(kept[:, None, None], positive, prompts["negative"])


def test_training_loss_and_gradients_are_those_of_diffusers(
  risk, variables, peers
):
  """Noise and steps are drawn as the library does; the rest is theirs."""
  diffusers = pytest.importorskip("diffusers")
  batch = make_batch()
  found, _, grads = risk(variables, batch)

  keys, shape = example_keys(*KEYS), (SIZE // 2, SIZE // 2, 4)
  spread = jax.vmap(jax.random.fold_in, (0, None))(keys, 0)
  split = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(keys)
  step = jax.vmap(lambda key: jax.random.randint(key, (), 1, 1001))(split[0])
  noise = to_torch(example_normal(split[1], shape))
  kept = np.array([jax.random.uniform(key) >= 0.1 for key in split[2]])

  unet, controlnet, autoencoder = peers.values()
  image = to_torch(batch["image"]).repeat(1, 3, 1, 1)
  posterior = autoencoder.encode(image).latent_dist
  spread = posterior.std * to_torch(example_normal(spread, shape))
  latents = 0.18215 * (posterior.mean + spread).detach()
  timesteps = to_torch(step).long() - 1
  scheduler = diffusers.DDPMScheduler(1000, **SCHEDULE)
  noisy = scheduler.add_noise(latents, noise, timesteps)
  tokens = to_torch(prompt_of(variables, batch["group"], kept))
  colors = np.array([[1, 1, 1], [1, 0, 0], [0, 0, 1]], np.float32)
  hint = to_torch(colors[batch["mask"]])
  down, middle = controlnet(
    noisy, timesteps, tokens, controlnet_cond=hint, return_dict=False
  )
  output = unet(
    noisy,
    timesteps,
    tokens,
    down_block_additional_residuals=down,
    mid_block_additional_residual=middle,
  ).sample
  expected = ((output - noise) ** 2).mean((1, 2, 3))
  expected.mean().backward()
  np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-5)
  for name, network in (("unet", unet), ("controlnet", controlnet)):
    known = _tree((n, p.grad) for n, p in network.named_parameters())
    known = jax.tree.map(lambda x: x.numpy(), known)
    _assert_close(grads[name], known, 1e-3)


@pytest.mark.parametrize(
  ("scheduler", "solver", "spacing"),
  [
    ("DDIMScheduler", "ddim", "leading"),
    ("DPMSolverMultistepScheduler", "dpm++2m", "linspace"),
  ],
)
def test_images_are_those_of_diffusers_pipeline(
  variables, peers, scheduler, solver, spacing
):
  """From noise to pixels, guidance and ControlNet included."""
  diffusers = pytest.importorskip("diffusers")
  unet, controlnet, autoencoder = peers.values()
  more = {}
  if solver == "ddim":
    more = dict(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
  scheduler = getattr(diffusers, scheduler)(1000, **SCHEDULE, **more)
  pipeline = diffusers.StableDiffusionControlNetPipeline(
    autoencoder,
    None,
    None,
    unet,
    controlnet,
    scheduler,
    safety_checker=None,
    feature_extractor=None,
    requires_safety_checker=False,
  )
  pipeline.set_progress_bar_config(disable=True)
  config = tiny_config(
    **{
      "image.sample_steps": 4,
      "image.solver": solver,
      "image.spacing": spacing,
      "image.eta": 0.0,
      "image.guidance": 9.0,
    }
  )
  keys, batch = example_keys(*KEYS), make_batch()
  mask, group = batch["mask"], batch["group"]
  task = image_task(config.image, GROUPS)
  found = jax.jit(task.sample)(variables, mask, group, keys)

  start, _ = jax.vmap(jax.random.split, out_axes=1)(keys)
  everyone = np.ones(4, bool)
  colors = np.array([[1, 1, 1], [1, 0, 0], [0, 0, 1]], np.float32)
  latents = pipeline(
    prompt_embeds=to_torch(prompt_of(variables, group, everyone)),
    negative_prompt_embeds=to_torch(prompt_of(variables, group, ~everyone)),
    image=to_torch(colors[mask]),
    latents=to_torch(example_normal(start, (SIZE // 2, SIZE // 2, 4))),
    height=SIZE,
    width=SIZE,
    num_inference_steps=4,
    guidance_scale=9.0,
    output_type="latent",
  ).images
  rgb = autoencoder.decode(latents / 0.18215).sample
  expected = np.clip(_nhwc(rgb).mean(-1, keepdims=True), -1, 1)
  assert np.ptp(expected) > 0.01
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_weights_are_those_of_the_directory(variables, tmp_path):
  config = tiny_config(**{"image.weights": str(tmp_path)})
  prompts = variables.frozen["prompts"]
  file = tmp_path / stable_diffusion.PROMPTS
  with pytest.raises(FileNotFoundError, match=f"{file} does not exist; fair"):
    image_task(config.image, GROUPS).load()
  safetensors.numpy.save_file(
    {**prompts, "positive": prompts["positive"][:1]}, file
  )
  for name, network in make_networks(variables).items():
    with pytest.raises(FileNotFoundError if name == "unet" else ValueError):
      image_task(config.image, GROUPS).load()
    stable_diffusion.save(tmp_path, **{name: network})
  loaded = image_task(config.image, GROUPS).load()
  jax.tree.map(np.testing.assert_array_equal, loaded.params, variables.params)
  for row in loaded.frozen["prompts"]["positive"]:
    np.testing.assert_array_equal(row, prompts["positive"][0])
  config.image.stable_diffusion.layers_per_block = 2
  with pytest.raises(ValueError, match="does not fit image.stable_diffusion"):
    image_task(config.image, GROUPS).load()


def test_min_snr_bounds_the_weight_of_little_noise():
  schedule = make_schedule("cosine", 100)
  t = jnp.arange(1, 100)
  abar = np.float64(schedule.alpha_bar)[1:100]
  snr = abar / (1 - abar)
  for prediction, expected in (
    ("x0", np.minimum(snr, 5)),
    ("eps", np.minimum(snr, 5) / snr),
    ("v", np.minimum(snr, 5) / (snr + 1)),
  ):
    found = min_snr_weight(schedule, prediction, t, 5.0)
    np.testing.assert_allclose(found, expected, rtol=2e-4)


@pytest.fixture(scope="module")
def networks(variables):
  text_encoder = TextEncoder(
    vocab_size=20,
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
  )
  ids = jnp.zeros((1, 77), int)
  initial = jax.jit(text_encoder.init)(jax.random.key(0), ids)
  return {
    **make_networks(variables),
    "text_encoder": (text_encoder, initial),
  }


def write(out, networks):
  ids = np.random.default_rng(0).integers(0, 20, (2, 77))
  importing.write(
    out, networks, positive=ids[:1], negative=ids[1], facts={"prompts": "?"}
  )
  return ids


def test_import_is_complete_or_refused(networks, tmp_path):
  out = tmp_path / "weights"
  partial = {k: v for k, v in networks.items() if k != "autoencoder"}
  with pytest.raises(ValueError, match=r"missing: \['autoencoder'\]"):
    write(out, partial)
  assert not list(tmp_path.iterdir())
  ids = write(out, networks)
  with pytest.raises(FileExistsError, match="it is not overwritten"):
    write(out, networks)
  module, variables = networks["text_encoder"]
  prompts = safetensors.numpy.load_file(out / stable_diffusion.PROMPTS)
  expected = module.apply(variables, ids)
  np.testing.assert_allclose(prompts["positive"][0], expected[0], atol=1e-5)
  np.testing.assert_allclose(prompts["negative"], expected[1], atol=1e-5)
  record = json.loads((out / "import.json").read_text())
  assert record["prompts"] == "?"
  digest = hashlib.sha256((out / "unet/config.json").read_bytes())
  assert record["sha256"]["unet/config.json"] == digest.hexdigest()
  assert len(record["sha256"]) == 7


def test_new_controlnet_changes_nothing_yet(networks):
  module, variables = stable_diffusion.new_controlnet(networks["unet"])
  inputs = jnp.ones((1, 2, 2, 4)), jnp.ones(1, int), jnp.ones((1, 3, 8))
  hint = jnp.ones((1, 16, 16, 3))
  down, middle = jax.jit(module.apply)(variables, *inputs, hint)
  assert not any(np.abs(x).max() for x in (*down, middle))
  np.testing.assert_array_equal(
    variables["params"]["conv_in"]["kernel"],
    networks["unet"][1]["params"]["conv_in"]["kernel"],
  )
