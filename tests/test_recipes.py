"""Every recipe and variant can run, at its full size."""

import importlib
from pathlib import Path

import jax
import pytest

from configs import fairseg, own, phantom
from fairdiff_jax import config as configs
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


@pytest.mark.parametrize("recipe", RECIPES, ids=recipe_id)
def test_every_recipe_can_run(recipe):
  """Its networks are built, and its step is traced, at their full size."""
  module, variant = recipe
  config = module.get_config(variant)
  if module is own:
    with config.unlocked():  # as a run finds them
      config.data.words = (("Female", "Male"),)
  configs.check(config)
  run = setup(config, jax.devices()[:1])
  most = max((p.active for p in phases(config)), key=len)
  state, metrics = jax.eval_shape(
    step_function(run, most), run.abstract, describe_batch(config, most)
  )
  assert jax.tree.structure(state) == jax.tree.structure(run.abstract)
  assert metrics["loss/total"].shape == ()
