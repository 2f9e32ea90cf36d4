"""Stable Diffusion's way through a run: import, latents, steps, patients."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util
from test_latent_space import tiny_config

from configs import fairseg as recipes
from configs.phantom import get_config
from fairdiff_jax import config as configs
from fairdiff_jax.data import npz, storage
from fairdiff_jax.data.loader import Pool, make_batch
from fairdiff_jax.diffusion.samplers import example_keys
from fairdiff_jax.models.stable_diffusion import (
  StableDiffusionControlNet,
  StableDiffusionUNet,
)
from fairdiff_jax.objectives.image import image_task
from fairdiff_jax.objectives.latent_space import make_autoencoder
from fairdiff_jax.pretrained import stable_diffusion
from fairdiff_jax.synthesis.bank import make_refill
from fairdiff_jax.synthesis.export import export
from fairdiff_jax.training import latents
from fairdiff_jax.training.loop import train
from fairdiff_jax.training.mesh import make_mesh

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
GROUPS = 3
PROMPTS = ["eye a", "eye b", "eye w", "eye"]  # one a group, then unknown


def small_config(**changes):
  """All three networks at once, as little to compile as there can be."""
  return tiny_config(
    **{
      "image.cache_latents": True,
      "image.stable_diffusion.block_out_channels": (8,),
      "points.encoder_widths": (16,),
      "points.head_widths": (16,),
      "points.flow_depth": 1,
      "points.decoder_widths": (16,),
      "points.num_steps": 4,
      "bank.harmonics": 1,
      "bank.every": 2,
      "objective.agreement": 0.0,
      "fairness.method": "erm",
      "train.steps": 4,
      "train.points": (0, 4),
      "train.image": (0, 4),
      "train.segmenter": (0, 4),
      "checkpoint.every": 2,
    }
    | changes
  )


def draw(module, *inputs, seed=0):
  """Random variables of which no part is silent."""
  shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: rng.normal(scale=0.1, size=x.shape).astype(np.float32), shapes
  )


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
  """A pipeline's folder as diffusers writes it, of tiny networks."""
  directory = tmp_path_factory.mktemp("pipeline")
  image = small_config().image
  sizes = image.stable_diffusion
  shared = dict(
    block_out_channels=tuple(sizes.block_out_channels),
    layers_per_block=sizes.layers_per_block,
    attention_head_dim=sizes.attention_head_dim,
    cross_attention_dim=sizes.cross_attention_dim,
    norm_num_groups=sizes.norm_num_groups,
  )
  unet = StableDiffusionUNet(**shared)
  controlnet = StableDiffusionControlNet(
    **shared, conditioning_embedding_out_channels=tuple(sizes.hint_channels)
  )
  tokens = jnp.zeros((1, 77, sizes.cross_attention_dim))
  inputs = jnp.zeros((1, 8, 8, 4)), jnp.zeros(1, int), tokens
  hint = jnp.zeros((1, 16, 16, 3))
  autoencoder = make_autoencoder(image)
  stable_diffusion.save(
    directory,
    unet=(unet, draw(unet, *inputs)),
    autoencoder=(autoencoder, draw(autoencoder, hint)),
  )
  stable_diffusion.save(
    directory / "other",
    controlnet=(controlnet, draw(controlnet, *inputs, hint)),
  )
  # Letters, each also as a word's end, and a pair that is merged.
  letters = [chr(i) for i in range(33, 127)]
  words = [*letters, *(x + "</w>" for x in letters), "ey", "eye</w>"]
  words += ["<|startoftext|>", "<|endoftext|>"]
  folder = directory / "tokenizer"
  folder.mkdir()
  vocabulary = {word: i for i, word in enumerate(words)}
  (folder / "vocab.json").write_text(json.dumps(vocabulary))
  (folder / "merges.txt").write_text("#version: 0.2\ne y\ney e</w>\n")
  text_encoder = transformers.CLIPTextModel(
    transformers.CLIPTextConfig(
      vocab_size=len(words),
      hidden_size=sizes.cross_attention_dim,
      intermediate_size=16,
      num_hidden_layers=1,
      num_attention_heads=2,
      bos_token_id=len(words) - 2,
      eos_token_id=len(words) - 1,
      pad_token_id=len(words) - 1,
    )
  )
  text_encoder.save_pretrained(directory / "text_encoder")
  return directory


def launch(script, *flags):
  return subprocess.run(
    [sys.executable, f"launch/{script}.py", *map(str, flags)],
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
  )


def import_weights(source, out, *flags):
  return launch("import_weights", "--source", source, "--out", out, *flags)


@pytest.fixture(scope="module")
def weights(pipeline, tmp_path_factory):
  """What the command makes of it, with one prompt per group."""
  out = tmp_path_factory.mktemp("weights") / "new"
  flags = [f"--prompt={prompt}" for prompt in PROMPTS]
  flags.append(f"--controlnet={pipeline / 'other'}")
  done = import_weights(pipeline, out, *flags, "--negative_prompt=low")
  assert done.returncode == 0, done.stderr
  assert f"--config.image.weights={out}" in done.stdout
  return out


@pytest.fixture(scope="module")
def config(weights):
  return small_config(**{"image.weights": str(weights)}).lock()


@pytest.fixture(scope="module")
def data(config, tmp_path_factory):
  """What the command prepares."""
  directory = tmp_path_factory.mktemp("data")
  smoke = traverse_util.flatten_dict(get_config("smoke").to_dict(), sep=".")
  small = traverse_util.flatten_dict(config.to_dict(), sep=".")
  changes = [
    f"--config.{field}={value}"
    for field, value in small.items()
    if value != smoke[field]
  ]
  done = launch(
    "prepare",
    *("--config", "configs/phantom.py:smoke"),
    *(*changes, f"--config.data.directory={directory}"),
  )
  assert done.returncode == 0, done.stderr
  return directory


@pytest.fixture(scope="module")
def cases(data):
  return storage.load(data, "train", progress=False)


def test_import_is_of_the_prompts_given(pipeline, weights):
  import torch

  tokenizer = transformers.CLIPTokenizer.from_pretrained(pipeline / "tokenizer")
  ids = tokenizer(
    [*PROMPTS, "low"], padding="max_length", max_length=77, return_tensors="pt"
  ).input_ids
  reference = transformers.CLIPTextModel.from_pretrained(
    pipeline / "text_encoder"
  )
  with torch.no_grad():
    expected = reference.eval()(ids).last_hidden_state.numpy()
  prompts = safetensors.numpy.load_file(weights / stable_diffusion.PROMPTS)
  np.testing.assert_allclose(prompts["positive"], expected[:-1], atol=1e-5)
  np.testing.assert_allclose(prompts["negative"], expected[-1], atol=1e-5)
  assert np.ptp(prompts["positive"], axis=0).max() > 0.01
  record = json.loads((weights / "import.json").read_text())
  assert record["prompts"] == PROMPTS
  assert record["negative_prompt"] == "low"
  assert "unet/config.json" in record["sources"][str(pipeline)]


def test_import_refuses_in_one_line(pipeline, weights, tmp_path):
  lacking = tmp_path / "lacking"
  for source, out, flags, message in (
    (lacking, weights, [], f"error: {weights} exists; it is not overwritten"),
    (
      lacking,
      tmp_path / "new",
      [],
      f"error: {lacking} does not exist; correct",
    ),
    (
      weights,
      tmp_path / "new",
      [],
      f"error: {weights}/tokenizer has no vocab.json; correct --tokenizer",
    ),
    (
      pipeline,
      tmp_path / "new",
      [f"--prompt={75 * 'eye '}e"],
      "has 78 tokens with start and end; at most 77 are read",
    ),
  ):
    done = import_weights(source, out, *flags)
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]
    assert not (tmp_path / "new").exists()


def test_number_of_prompts_must_fit(config):
  with pytest.raises(ValueError, match="has 4 prompts, not 1 for all or 3: on"):
    image_task(config.image, 2).load()


def test_the_whole_way(config, data, cases, tmp_path, monkeypatch):
  """Joint steps with a bank, a resume, and patients that are read back."""
  monkeypatch.setattr(latents, "_encode", refuse)  # they were prepared
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.data.directory = str(data)
  workdir = tmp_path / "run"

  def run():
    assert train(config, workdir, cases, make_refill=make_refill) is not None
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]

  first = run()
  assert {"loss/points", "loss/image", "loss/segmenter"} <= first[0].keys()
  bank = workdir / "bank" / "step_00000002" / "cases.npz"
  with np.load(bank, allow_pickle=False) as made:
    assert len(made["image"]) > 0
  shutil.rmtree(workdir / "checkpoints" / "4")
  again = run()
  assert again[-1]["params_sha256"] == first[-1]["params_sha256"]

  export(workdir, tmp_path / "made_up", ["Asian=2", "White=1"])
  for number in (1, 2, 3):
    case = npz.read_case(tmp_path / "made_up" / f"data_{number:05d}.npz")
    assert case.image.shape == case.mask.shape == tuple(config.data.size)
    assert case.attributes["race"] == (0 if number < 3 else 2)


def read(config, cases, directory):
  return latents.cached_latents(config, make_mesh(), cases, directory)


def test_published_size_of_latents():
  config = recipes.get_config("sd15")
  assert latents.cached_shape(config) == (64, 64, 8)


def refuse(*_):
  raise AssertionError("encoded again")


def test_cached_latents_give_the_losses_of_encoding(config, cases, data):
  latent = read(config, cases, data)
  assert latent.dtype == np.float32
  assert latent.shape == (len(cases.name), *latents.cached_shape(config))
  pool = Pool(
    cases.name,
    cases.image,
    cases.mask,
    cases.attributes["race"],
    cases.points,
    np.arange(len(cases.name)),
  )
  batches = [
    make_batch(
      p, seed=0, stream=0, step=1, size=8, rows=slice(2, 8), recipe=recipe
    )
    # What is encoded already stays as it is.
    for p, recipe in ((pool, "none"), (pool._replace(latent=latent), "light"))
  ]
  assert "latent" not in batches[0] and "image" not in batches[1]
  task = image_task(config.image, GROUPS)
  variables = task.load()
  keys = example_keys(jax.random.key(2), jnp.arange(2, 8))
  risk = jax.jit(lambda v, batch: task.risk(v, batch, keys, True)[0])
  encoded, kept = (risk(variables, batch) for batch in batches)
  np.testing.assert_allclose(kept, encoded, rtol=1e-5)


def test_latents_are_encoded_once(config, cases, data, monkeypatch):
  monkeypatch.setattr(latents, "_encode", refuse)
  read(config, cases, data)
  # Other images, or another autoencoder, have latents of their own.
  other = cases.image.copy()
  other[3, 5, 7] ^= 1
  with pytest.raises(AssertionError, match="encoded again"):
    read(config, cases._replace(image=other), data)


def test_another_autoencoder_is_noticed(config, cases, data, tmp_path):
  folder = shutil.copytree(config.image.weights, tmp_path / "weights") / "vae"
  file = folder / stable_diffusion.WEIGHTS[0]
  tensors = safetensors.numpy.load_file(file)
  tensors["encoder.conv_in.bias"][0] += 0.1
  safetensors.numpy.save_file(tensors, file)
  changed = config.copy_and_resolve_references()
  with changed.unlocked():
    changed.image.weights = str(tmp_path / "weights")
  shutil.copytree(data / "latents", tmp_path / "latents")
  found = read(changed, cases, tmp_path)
  assert np.abs(found - read(config, cases, tmp_path)).max() > 1e-3
  assert len(list((tmp_path / "latents").iterdir())) == 2


@pytest.mark.parametrize("damage", ["flipped", "truncated", "lost"])
def test_damage_is_noticed(config, cases, data, tmp_path, damage):
  shutil.copytree(data / "latents", tmp_path / "latents")
  (file,) = tmp_path.glob("latents/*/latent.npy")
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 1
  if damage == "lost":
    file.unlink()
  else:
    file.write_bytes(content[: len(content) // (2 - (damage == "flipped"))])
  with pytest.raises(
    ValueError, match=f"{file} is damaged; remove {file.parent}"
  ):
    read(config, cases, tmp_path)


def test_interrupted_writing_leaves_nothing(
  config, cases, tmp_path, monkeypatch
):
  def interrupt(_):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(latents.files, "sha256", interrupt)
    with pytest.raises(KeyboardInterrupt):
      read(config, cases, tmp_path)
  assert not list((tmp_path / "latents").iterdir())
  read(config, cases, tmp_path)


PROCESS = """
import sys
import jax
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[1]))
from fairdiff_jax import config
from fairdiff_jax.data.storage import load
from fairdiff_jax.training.latents import cached_latents
from fairdiff_jax.training.mesh import make_mesh
config = config.load(sys.argv[3])
cases = load(sys.argv[4], "train", progress=False)
latent = cached_latents(config, make_mesh(), cases, sys.argv[3])
print("latents", latent.sum(dtype=float))
"""


def test_two_processes_share_latents(config, data, cases, tmp_path):
  """The first writes; both read what one process would have written."""
  configs.claim(tmp_path, config)
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  processes = [
    subprocess.Popen(
      [
        *(sys.executable, "-c", PROCESS, str(i), address),
        *(str(tmp_path), str(data)),
      ],
      cwd=ROOT,
      env=os.environ
      | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
      },
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for i in range(2)
  ]
  outputs = [process.communicate()[0] for process in processes]
  for process, output in zip(processes, outputs, strict=True):
    assert process.returncode == 0, output
  sums = [output.splitlines()[-1] for output in outputs]
  assert sums[0].startswith("latents ") and sums[0] == sums[1]
  names = [p.name for p in (tmp_path / "latents").iterdir()]
  assert names == [p.name for p in (data / "latents").iterdir()]
  np.testing.assert_allclose(
    read(config, cases, tmp_path), read(config, cases, data), atol=1e-5
  )
