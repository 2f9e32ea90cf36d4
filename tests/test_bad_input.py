"""What a user gets wrong is said in one line that helps."""

import re
from pathlib import Path

import numpy as np
import pytest

from configs import phantom
from fairdiff_jax import config as configs
from fairdiff_jax.data.attributes import ATTRIBUTES
from fairdiff_jax.data.augment import generators_recipe
from fairdiff_jax.data.cases import Cases
from fairdiff_jax.data.mixture import training_pool
from fairdiff_jax.data.storage import load
from fairdiff_jax.diffusion.samplers import check_solver, sampling_times
from fairdiff_jax.diffusion.schedule import make_schedule
from fairdiff_jax.evaluation.evaluate import definitions_of
from fairdiff_jax.fairness.regularizers import make_regularizer
from fairdiff_jax.objectives.image import image_task
from fairdiff_jax.objectives.latent_space import latent_space
from fairdiff_jax.objectives.segmentation import segmentation_task
from fairdiff_jax.training import mesh
from fairdiff_jax.training.loop import train
from fairdiff_jax.training.optimizer import make_optimizer
from fairdiff_jax.training.setup import setup
from fairdiff_jax.training.trained import restore

ROOT = Path(__file__).parents[1]


def smoke(**changes):
  config = phantom.get_config("smoke")
  config.update_from_flattened_dict(changes)
  return config


def make_cases(groups=(0, 1, 2)):
  """Blank cases, one of each given group."""
  n = len(groups)
  return Cases(
    name=[f"case_{i}" for i in range(n)],
    image=np.zeros((n, 32, 32), np.uint8),
    mask=np.zeros((n, 32, 32), np.uint8),
    points=np.ones((n, 32, 3), np.float32),
    attributes={a: np.array(groups, np.int32) for a in ATTRIBUTES},
  )


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("data.attribute", "rase", "No attribute 'rase'. Did you mean 'race'"),
    ("fairness.method", "varience", "fairness.method must be .*'variance'"),
    ("image.sample_steps", 1001, "image.sample_steps=1001 is not in 1 to"),
    ("parallel.fsdp", 3, "parallel.fsdp=3 does not divide the 8 devices"),
  ],
)
def test_setup_refuses(field, value, message):
  with pytest.raises(ValueError, match=message):
    setup(smoke(**{field: value}))


def names_in(field):
  return re.findall("'(.*?)'", configs.all_fields()[field].allowed)


@pytest.mark.parametrize(
  ("field", "use"),
  [
    ("data.augment", lambda c: generators_recipe(c.data.augment)),
    ("fairness.method", lambda c: make_regularizer(c.fairness)),
    ("image.schedule", lambda c: make_schedule(c.image.schedule, 10)),
    ("image.spacing", lambda c: sampling_times(10, 5, c.image.spacing)),
    ("image.solver", lambda c: check_solver(c.image.solver)),
    ("image.network", lambda c: image_task(c.image, 3)),
    ("image.conditioning", lambda c: image_task(c.image, 3)),
    ("image.unet", lambda c: latent_space(c.image, 3)),
    ("segmenter.network", lambda c: segmentation_task(c.segmenter)),
    (
      "optimizer.image.kind",
      lambda c: make_optimizer(c.optimizer, {"image": 2}),
    ),
    (
      "optimizer.image.decay",
      lambda c: make_optimizer(c.optimizer, {"image": 2}),
    ),
    (
      "fairness.strategy",
      lambda c: training_pool(
        *(np.random.default_rng(0), c.fairness.strategy),
        *(np.array([0]), np.array([0]), ["a"], np.array([2])),
      ),
    ),
    ("evaluation.empty", lambda c: definitions_of(c.evaluation)),
    ("evaluation.equity", lambda c: definitions_of(c.evaluation)),
  ],
)
def test_what_the_config_allows_is_known_where_it_is_used(field, use):
  """And what it does not allow is not."""
  names = names_in(field)
  assert len(names) > 1
  for name in names:
    use(smoke(**{field: name}))
  with pytest.raises(ValueError, match="another"):
    use(smoke(**{field: "another"}))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"fairness.real_share": 2.0}, "fairness.real_share must be .*0 to 1"),
    ({"train.segmentation_batch": 12}, "=12 cannot be split over 8 devices"),
    ({"train.points": (0, 0)}, "'equal_scale' needs generated cases, but"),
  ],
)
def test_train_refuses_before_it_starts(tmp_path, changes, message):
  """Not hours later, when the segmenter's turn comes."""
  with pytest.raises(ValueError, match=message):
    train(smoke(**changes), tmp_path, make_cases([0, 1, 2, 2, 2, 2]))
  assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("strategy", ["equal_scale", "repeat_sample"])
def test_a_group_without_cases_is_named(tmp_path, strategy):
  config = smoke(**{"fairness.strategy": strategy})
  with pytest.raises(ValueError, match="group Black has no training case"):
    train(config, tmp_path, make_cases([0, 0, 2]))


def test_batch_is_not_divisible_by_devices():
  with pytest.raises(ValueError, match="12 cannot be split over 8 devices"):
    mesh.host_slice(12)


def test_directory_of_another_config(tmp_path):
  configs.claim(tmp_path, smoke())
  other = smoke(**{"seed": 3, "fairness.method": "gap"})
  with pytest.raises(ValueError) as error:
    train(other, tmp_path, make_cases())
  message = str(error.value)
  assert "fairness.method: erm before, gap now" in message
  assert "seed: 0 before, 3 now" in message
  assert "another --workdir" in message
  with pytest.raises(ValueError, match="seed: 0 before, 3 now"):
    configs.require(tmp_path, other)


def test_no_prepared_data(tmp_path):
  with pytest.raises(FileNotFoundError, match="fairdiff prepare --config"):
    load(tmp_path, "train")


def test_no_run(tmp_path):
  with pytest.raises(FileNotFoundError, match="not the work directory of a"):
    restore(tmp_path)


def test_no_checkpoint(tmp_path):
  configs.claim(tmp_path, smoke())
  with pytest.raises(FileNotFoundError, match="has no checkpoint yet"):
    restore(tmp_path)


@pytest.mark.parametrize("kind", [FloatingPointError, ImportError])
def test_what_a_user_can_mend_is_an_error_of_theirs(kind, monkeypatch, capsys):
  from fairdiff_jax.launch import cli

  def main(_):
    raise kind("step 2 is not finite;\n  lower it")

  monkeypatch.setattr(cli.app, "run", lambda guarded, **_: guarded([""]))
  monkeypatch.setattr(cli.sys, "argv", ["script"])
  flag = type("Flag", (), {"present": 1, "value": False})
  monkeypatch.setattr(
    cli.flags, "FLAGS", {"verbosity": flag, "compilation_cache": flag}
  )
  cli.run(main)
  said = "error: step 2 is not finite;\n  lower it\n"
  assert capsys.readouterr().err == said
