"""What a directory of Stable Diffusion's weights says is used or refused."""

import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from configs import phantom
from fairdiff_jax import files
from fairdiff_jax.data.cases import Cases
from fairdiff_jax.diffusion.samplers import example_keys
from fairdiff_jax.models.text_encoder import TextEncoder
from fairdiff_jax.objectives import latent_space
from fairdiff_jax.pretrained import importing, stable_diffusion
from fairdiff_jax.training import latents
from fairdiff_jax.training.mesh import make_mesh

SIZE, GROUPS = 8, 2


def tiny(directory, **changes):
  config = phantom.get_config("smoke").unlock()
  config.data.size = (SIZE, SIZE)
  config.image.update(stable_diffusion.SCHEDULE)
  config.image.network = "stable_diffusion"
  config.image.weights = str(directory)
  config.image.stable_diffusion = dict(
    block_out_channels=(8,),
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


def draw(shapes):
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: rng.normal(scale=0.1, size=x.shape).astype(np.float32), shapes
  )


@pytest.fixture(scope="module")
def networks():
  """Modules with random variables."""
  config = tiny("").image
  variables = draw(
    jax.eval_shape(
      latent_space.latent_space(config, GROUPS).init, jax.random.key(0)
    )
  )
  sizes = dict(config.stable_diffusion)
  params = variables.params | {"autoencoder": variables.frozen["autoencoder"]}
  modules = {"autoencoder": latent_space.make_autoencoder(config)}
  for name in ("unet", "controlnet"):
    kind = stable_diffusion.KINDS[name].module
    more = dict(
      sizes, conditioning_embedding_out_channels=sizes["hint_channels"]
    )
    known = stable_diffusion.sizes_of(kind())
    modules[name] = kind(**{k: v for k, v in more.items() if k in known})
  return {k: (module, {"params": params[k]}) for k, module in modules.items()}


@pytest.fixture(scope="module")
def written(networks, tmp_path_factory):
  """As imports have written it that knew neither scale nor schedule."""
  directory = tmp_path_factory.mktemp("written")
  stable_diffusion.save(directory, **networks)
  set_field(directory, "vae", "scaling_factor", None)
  safetensors.numpy.save_file(
    {
      "positive": np.zeros((1, 77, 8), np.float32),
      "negative": np.zeros((77, 8), np.float32),
    },
    directory / stable_diffusion.PROMPTS,
  )
  return directory


@pytest.fixture
def directory(written, tmp_path):
  """A copy, to be changed."""
  return shutil.copytree(written, tmp_path / "weights")


def set_field(directory, folder, field, value):
  path = directory / folder / "config.json"
  config = json.loads(path.read_text()) | {field: value}
  if value is None:
    del config[field]
  path.write_text(json.dumps(config))


def load(directory, **changes):
  space = latent_space.latent_space(tiny(directory, **changes).image, GROUPS)
  return space, space.load()


def test_latents_are_scaled_by_the_weights_factor(directory):
  """An image's, and likewise what was encoded before; decoding undoes it."""
  rng = np.random.default_rng(1)
  batch = {
    "image": rng.uniform(-1, 1, (2, SIZE, SIZE, 1)).astype(np.float32),
    "mask": np.zeros((2, SIZE, SIZE), np.int32),
  }
  cached = {
    "latent": rng.normal(size=(2, 4, 4, 8)).astype(np.float32),
    "mask": batch["mask"],
  }
  keys = example_keys(jax.random.key(0), jnp.arange(2))
  space, variables = load(directory)
  encode = jax.jit(lambda v, batch: space.encode(v, batch, keys)[0])
  decode = jax.jit(lambda v, x: space.decode(v, x, None))

  def run(variables):
    encoded = [encode(variables, x) for x in (batch, cached)]
    return *encoded, decode(variables, encoded[0])

  plain = run(variables)
  set_field(directory, "vae", "scaling_factor", 0.18215)
  for found, expected in zip(run(load(directory)[1]), plain, strict=True):
    np.testing.assert_array_equal(found, expected)
  set_field(directory, "vae", "scaling_factor", 0.5)
  *scaled, image = run(load(directory)[1])
  for found, expected in zip(scaled, plain[:2], strict=True):
    assert np.abs(expected).min() > 0
    np.testing.assert_allclose(found / expected, 0.5 / 0.18215, rtol=1e-5)
  assert np.ptp(plain[2]) > 0.01
  np.testing.assert_allclose(image, plain[2], atol=1e-5)


@pytest.mark.parametrize("factor", [0, -1, "0.5", True])
def test_factors_that_scale_nothing_are_refused(directory, factor):
  set_field(directory, "vae", "scaling_factor", factor)
  with pytest.raises(ValueError, match="vae.*scaling_factor = .* not support"):
    load(directory)


@pytest.mark.parametrize(
  ("folder", "field", "value", "fields"),
  [
    ("vae", "norm_num_groups", 2, "norm_num_groups=2 (now 4)"),
    ("unet", "attention_head_dim", 4, "attention_head_dim=4 (now 2)"),
    ("controlnet", "norm_num_groups", 2, "norm_num_groups=2 (now 4)"),
  ],
)
def test_what_no_shape_shows_is_held_to_the_config(
  directory, folder, field, value, fields
):
  set_field(directory, folder, field, value)
  with pytest.raises(ValueError) as raised:
    load(directory)
  assert str(raised.value) == (
    f"{directory / folder} does not fit image.stable_diffusion: set"
    f" image.stable_diffusion.{fields}, or name other weights"
  )


def schedule(directory, **changes):
  path = directory / stable_diffusion.SCHEDULER
  path.parent.mkdir(exist_ok=True)
  known = dict(
    prediction_type="epsilon",
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    num_train_timesteps=1000,
  )
  path.write_text(json.dumps(known | changes))
  return path


@pytest.mark.parametrize(
  ("theirs", "value", "ours"),
  [
    ("prediction_type", "v_prediction", "image.prediction=v (now eps)"),
    ("beta_start", 0.001, "image.beta_start=0.001 (now 0.00085)"),
    ("beta_end", 0.02, "image.beta_end=0.02 (now 0.012)"),
    ("beta_schedule", "linear", "image.schedule=linear (now scaled_linear)"),
    ("num_train_timesteps", 500, "image.num_steps=500 (now 1000)"),
  ],
)
def test_a_run_is_held_to_how_the_weights_were_trained(
  directory, theirs, value, ours
):
  path = schedule(directory, **{theirs: value})
  message = (
    f"{path} does not fit the config: set {ours}, or change that file if the"
    " networks shall learn otherwise"
  )
  config = tiny(directory).image
  space = latent_space.latent_space(config, GROUPS)
  for read in (space.load, lambda: latent_space.load_autoencoder(config)):
    with pytest.raises(ValueError) as raised:
      read()
    assert str(raised.value) == message
  field, setting = ours.split(" ")[0].split("=")
  field = field.removeprefix("image.")
  config[field] = type(config[field])(setting)
  latent_space.require_schedule(config)


def test_weights_without_a_schedule_are_taken_for_1_5(directory):
  message = "has no scheduler.* set image.prediction=eps .now v.*put there"
  with pytest.raises(ValueError, match=message):
    load(directory, **{"image.prediction": "v"})


@pytest.mark.parametrize(
  ("tensors", "message"),
  [
    ({}, "no tensor 'positive'"),
    ({"positive": (77, 8), "negative": (77, 8)}, "'positive' has shape"),
    ({"positive": (1, 77, 8), "negative": (77, 8), "a": (1,)}, "unused"),
    ({"positive": (2, 77, 8), "negative": (77, 8)}, "has 2 prompts, not 1"),
  ],
)
def test_prompts_of_another_form_are_named(directory, tensors, message):
  path = directory / stable_diffusion.PROMPTS
  tensors = {k: np.zeros(v, np.float32) for k, v in tensors.items()}
  safetensors.numpy.save_file(tensors, path)
  with pytest.raises(ValueError, match=f"{path}.*{message}"):
    load(directory)
  path.unlink()
  with pytest.raises(
    FileNotFoundError, match="fairdiff import-weights makes it"
  ):
    load(directory)


@pytest.fixture(scope="module")
def text_encoder():
  module = TextEncoder(
    vocab_size=9,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
  )
  shapes = jax.eval_shape(
    module.init, jax.random.key(0), jnp.zeros((1, 77), int)
  )
  return module, draw(shapes)


def imports(networks, text_encoder, out, token=8, **more):
  ids = np.full((2, 77), token)
  importing.write(
    out,
    networks | {"text_encoder": text_encoder},
    positive=ids[:1],
    negative=ids[1],
    facts={},
    **more,
  )


def test_scale_and_schedule_travel(networks, text_encoder, tmp_path):
  """From a pipeline's folder into what a run starts from."""
  module, variables = networks["autoencoder"]
  scaled = module.copy(scaling_factor=0.5), variables
  source, out = tmp_path / "source", tmp_path / "out"
  stable_diffusion.save(source, **(networks | {"autoencoder": scaled}))
  path = schedule(source, prediction_type="v_prediction", steps_offset=1)
  imports(
    importing.read(source),
    text_encoder,
    out,
    scheduler=importing.read_scheduler(source),
  )
  written = json.loads((out / stable_diffusion.SCHEDULER).read_text())
  assert written == json.loads(path.read_text())
  _, variables = load(out, **{"image.prediction": "v"})
  assert variables.frozen["scaling_factor"] == np.float32(0.5)
  record = json.loads((out / "import.json").read_text())
  digest = files.sha256(out / stable_diffusion.SCHEDULER)
  assert record["sha256"][stable_diffusion.SCHEDULER] == digest


def test_tokens_of_another_vocabulary(networks, text_encoder, tmp_path):
  with pytest.raises(
    ValueError, match="token 9 is none of .* encoder's 9; the"
  ):
    imports(networks, text_encoder, tmp_path / "out", token=9)
  assert not list(tmp_path.iterdir())


def cases():
  return Cases(
    name=["a", "b"],
    image=np.arange(2 * SIZE**2, dtype=np.uint8).reshape(2, SIZE, SIZE),
    mask=np.zeros((2, SIZE, SIZE), np.uint8),
    points=np.zeros((2, 4, 3), np.float32),
    attributes={},
  )


def test_cached_latents_are_of_one_autoencoder(directory, tmp_path):
  """Not of another scale, nor of what a killed process has left."""
  data = tmp_path / "data"

  def read():
    mesh = make_mesh(devices=jax.devices()[:1])
    return latents.cached_latents(tiny(directory), mesh, cases(), data)

  killed = "import os, sys; from fairdiff_jax import files\n"
  killed += "with files.new_directory(sys.argv[1]): os.kill(os.getpid(), 9)"
  subprocess.run([sys.executable, "-c", killed, str(data / "latents" / "old")])
  (left,) = (data / "latents").iterdir()
  assert left.name.startswith(files.LEFTOVER)
  first = read()
  assert not left.exists()
  (folder,) = (data / "latents").iterdir()
  stored = np.load(folder / latents.FILE, allow_pickle=False)
  np.testing.assert_array_equal(stored, first)
  assert stored.shape == (2, 4, 4, 8)
  set_field(directory, "vae", "scaling_factor", 0.5)
  np.testing.assert_array_equal(read(), first)  # they are not scaled yet
  assert len(list((data / "latents").iterdir())) == 2
  shutil.rmtree(data)


def test_a_home_directory_is_found(directory, monkeypatch):
  monkeypatch.setenv("HOME", str(directory.parent))
  config = tiny(os.path.join("~", directory.name)).image
  latent_space.load_autoencoder(config)
  (directory / "vae" / "config.json").unlink()
  with pytest.raises(FileNotFoundError, match="vae has neither a config.json"):
    latent_space.load_autoencoder(config)
