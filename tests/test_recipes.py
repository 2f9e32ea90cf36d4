"""Every recipe and variant can run, at its full size."""

import importlib
from pathlib import Path

import jax
import pytest

from configs import fairseg, own, phantom
from fairdiff_jax import config as configs
from fairdiff_jax.data import domain
from fairdiff_jax.training.checkpoint import Inference
from fairdiff_jax.training.schedule import phases
from fairdiff_jax.training.setup import describe_batch, setup, step_function

ROOT = Path(__file__).parents[1]
RECIPES = [
  (module, variant)
  for module in (fairseg, phantom, own)
  for variant in module.VARIANTS
]


def recipe_id(recipe):
  return f"{recipe[0].__name__}:{recipe[1]}"


def test_every_recipe_is_known_here():
  found = {
    f"configs.{path.stem}"
    for path in (ROOT / "configs").glob("*.py")
    if hasattr(importlib.import_module(f"configs.{path.stem}"), "get_config")
  }
  assert found == {module.__name__ for module, _ in RECIPES}


def wide_domain():
  """Colours, and one structure more than eyes have."""
  content = domain.to_json(domain.FUNDUS) | {"channels": 3}
  content["structures"] += [{"name": "fovea", "values": [3]}]
  return domain.parse(content)


# Networks of `own` are those of `fairseg` and `phantom`.
@pytest.mark.parametrize(
  "recipe", [r for r in RECIPES if r[0] is not own], ids=recipe_id
)
def test_every_recipe_can_run(recipe):
  """Its networks are built, and its step is traced, at their full size.

  Those for photographs see colours and all classes. Of Stable Diffusion's
  alike blocks there is one per level: it takes long to trace.
  """
  module, variant = recipe
  config = module.get_config(variant).unlock()
  config.image.stable_diffusion.layers_per_block = 1
  config.image.stable_diffusion.autoencoder_layers = 1
  seen = wide_domain() if module is fairseg else domain.FUNDUS
  config.data.domain = domain.text(seen)
  configs.check(config)
  run = setup(config, jax.devices()[:1])
  most = max((p.active for p in phases(config)), key=len)
  batch = describe_batch(config, most)
  assert batch["segmentation"]["image"].shape[-1] == seen.channels
  state, metrics = jax.eval_shape(step_function(run, most), run.abstract, batch)
  assert jax.tree.structure(state) == jax.tree.structure(run.abstract)
  assert metrics["loss/total"].shape == ()
  _, aux = jax.eval_shape(
    lambda *x: run.objective.tasks["segmenter"].risk(*x, None, False),
    Inference.of(run.abstract).network("segmenter"),
    batch["segmentation"],
  )
  assert aux["dice"][0].shape[-1] == seen.num_classes


@pytest.mark.parametrize("variant", own.VARIANTS)
def test_own_data_meets_the_networks_of_other_recipes(variant):
  config = own.get_config(variant).unlock()
  like = (phantom if variant == "smoke" else fairseg).get_config(variant)
  for part in ("points", "image", "segmenter", "optimizer", "objective"):
    assert config[part].to_json() == like[part].to_json(), part
  config.data.words = (("Female", "Male"),)  # as a run finds them
  configs.check(config)
