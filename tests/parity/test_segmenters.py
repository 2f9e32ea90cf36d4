"""SAMed and TransUNet in the joint step, from weights to a report."""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy

from configs import fairseg, phantom
from fairdiff_jax.experiment import run as run_experiment
from fairdiff_jax.fairness import metrics
from fairdiff_jax.objectives.segmentation import make_network
from fairdiff_jax.pretrained import segment_anything
from fairdiff_jax.run import Run
from fairdiff_jax.training.optimizer import make_optimizer
from fairdiff_jax.training.setup import setup

SIZE = 32
SMALL_SAMED = dict(
  rank=2,
  embed_dim=16,
  depth=1,
  num_heads=2,
  global_blocks=(0,),
  window=1,
  decoder_dim=32,
  decoder_depth=1,
  decoder_mlp_dim=32,
)
SMALL_TRANSUNET = dict(
  stages=(1, 1, 1),
  width=32,
  hidden_dim=16,
  mlp_dim=32,
  num_heads=2,
  num_layers=1,
  decoder_channels=(16, 16, 8, 8, 8),
)


def small_config(network):
  """The network's recipe on phantoms, at a size that trains in seconds."""
  config = phantom.get_config("smoke").unlock()
  recipe = fairseg.get_config(network)
  config.data.size = (SIZE, SIZE)
  config.segmenter = recipe.segmenter.copy_and_resolve_references().unlock()
  config.segmenter.image_size = SIZE
  config.segmenter.samed.update(SMALL_SAMED)
  config.segmenter.transunet.update(SMALL_TRANSUNET)
  config.optimizer = recipe.optimizer.copy_and_resolve_references().unlock()
  config.optimizer.segmenter.warmup_steps = 2
  config.fairness = recipe.fairness
  config.baseline = False
  config.train.points = config.train.image = (0, 0)
  config.train.steps = 20
  config.train.segmenter = (0, 20)
  config.checkpoint.every = 15
  return config


def write_sam(config, path):
  """A SAM of the config's sizes with random weights."""
  network = make_network(config.segmenter)
  initial = jax.jit(network.init)(jax.random.key(3))
  params = {**initial.params, **initial.frozen["params"]}
  params.pop("lora")
  variables = {"params": params, "constants": initial.frozen["constants"]}
  safetensors.numpy.save_file(segment_anything.state_dict(variables), path)


@pytest.mark.parametrize("network", ["samed", "transunet"])
def test_recipe_trains_resumes_and_evaluates(network, tmp_path):
  config = small_config(network)
  if network == "samed":
    write_sam(config, tmp_path / "sam.safetensors")
    config.segmenter.weights = str(tmp_path / "sam.safetensors")
  config.lock()
  workdir = tmp_path / "run"
  assert run_experiment(config, workdir)

  def log():
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]

  first = log()
  losses = [x["loss/segmenter"] for x in first if "loss/segmenter" in x]
  assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
  report = json.loads((workdir / "report" / "summary.json").read_text())
  assert report["n"] == 6

  assert report["definitions"] == {
    "empty": "exclude",
    "equity": "fairdiff_std",
  }

  config.evaluation.empty = "published"
  config.evaluation.equity = "fairseg_sum"
  published = Run(workdir, config).evaluate(out=tmp_path / "published")
  assert published["definitions"] == {
    "empty": "published",
    "equity": "fairseg_sum",
  }
  (before,), (after,) = (
    [model["disc"]["dice"] for model in found["models"].values()]
    for found in (report, published)
  )
  assert after["groups"] == before["groups"]
  means = [group["mean"] for group in after["groups"].values()]
  for figures, definition in (
    (before, "fairdiff_std"),
    (after, "fairseg_sum"),
  ):
    assert figures["es"] == pytest.approx(
      metrics.equity_scaled(means, figures["overall"], definition)
    )

  shutil.rmtree(workdir / "checkpoints" / "20")
  shutil.rmtree(workdir / "report")
  assert run_experiment(config, workdir)
  assert log()[-1]["params_sha256"] == first[-1]["params_sha256"]


def test_samed_needs_the_weights_it_was_trained_with(tmp_path):
  config = small_config("samed")
  path = tmp_path / "sam.safetensors"
  config.segmenter.weights = str(path)
  write_sam(config, path)
  config.segmenter.samed.depth = 2
  with pytest.raises(ValueError, match=r"does not fit segmenter\.samed"):
    make_network(config.segmenter).load()


@pytest.mark.parametrize(
  ("variant", "learnt"),
  [("samed", 4_071_695), ("transunet", 105_276_211)],
)
def test_full_size_recipes(variant, learnt):
  run = setup(fairseg.get_config(variant), jax.devices()[:1])
  state = run.abstract
  sizes = [x.size for x in jax.tree.leaves(state.params["segmenter"])]
  assert sum(sizes) == learnt
  frozen = sum(x.size for x in jax.tree.leaves(state.imported["segmenter"]))
  assert (frozen > 87_000_000) == (variant == "samed")
  moments = [x.size for x in jax.tree.leaves(state.opt_state)]
  assert sum(moments) < 2 * learnt + 10


def test_full_size_stable_diffusion():
  run = setup(fairseg.get_config("sd15"), jax.devices()[:1])
  count = {
    name: sum(x.size for x in jax.tree.leaves(tree))
    for name, tree in run.abstract.params["image"].items()
  }
  assert count == {"unet": 859_520_964, "controlnet": 361_279_120}
  imported = run.abstract.imported["image"]["autoencoder"]
  assert sum(x.size for x in jax.tree.leaves(imported)) == 83_653_863


def test_images_of_another_size_are_refused():
  config = small_config("transunet").segmenter
  network = make_network(config)
  initial = jax.eval_shape(network.init, jax.random.key(0))
  image = np.zeros((1, 48, 32, 1), np.float32)
  with pytest.raises(ValueError, match="takes images of 32 x 32, not 48 x 32"):
    network.apply(initial, image, None, None, False)
  config.network = "unet"
  with pytest.raises(ValueError, match=r"unknown segmenter\.network 'unet'"):
    make_network(config)


def optimizer_config(**changes):
  config = fairseg.get_config("transunet").optimizer
  config = config.copy_and_resolve_references().unlock()
  config.segmenter.update(changes)
  return config


def updates_of(config, gradients):
  """Parameters after each of some gradients, from 1."""
  optimizer = make_optimizer(config, {"segmenter": len(gradients)})
  params = {"segmenter": np.float32(1)}
  state, found = optimizer.init(params), []
  for gradient in gradients:
    updates, state = optimizer.update(
      {"segmenter": np.float32(gradient)}, state, params
    )
    params = jax.tree.map(np.add, params, updates)
    found.append(float(params["segmenter"]))
  return found


def test_sgd_is_pytorch_s_with_poly_decay():
  """v = 0.9 v + g + wd p, p -= lr (1 - i / n)^0.9 v."""
  gradients = [0.5, -1.0, 2.0, 0.3]
  p, v, expected = 1.0, 0.0, []
  for i, gradient in enumerate(gradients):
    v = 0.9 * v + gradient + 1e-4 * p
    p -= 0.01 * (1 - i / 4) ** 0.9 * v
    expected.append(p)
  found = updates_of(optimizer_config(), gradients)
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_accumulated_gradients_make_one_update():
  config = optimizer_config(decay="constant")
  expected = updates_of(config, [1.0, -2.0])
  config.segmenter.accumulate = 2
  found = updates_of(config, [0.5, 1.5, -3.0, -1.0])
  np.testing.assert_allclose(found[1::2], expected, rtol=1e-6)
  assert found[0] == 1 and found[2] == found[1]


def test_unknown_optimizers_are_named():
  for field in ("kind", "decay"):
    with pytest.raises(ValueError, match=f"unknown optimizer {field} 'x'"):
      updates_of(optimizer_config(**{field: "x"}), [1.0])
