"""A run goes on with what it was trained with, or differently when asked."""

import json
import shutil

import numpy as np
import pytest

from configs.phantom import get_config
from fairdiff_jax import config as configs
from fairdiff_jax.data.attributes import ATTRIBUTES
from fairdiff_jax.data.cases import Cases
from fairdiff_jax.layout import Layout
from fairdiff_jax.training.loop import train

RATE = "optimizer.segmenter.learning_rate"


def smoke(**changes):
  """A small segmenter alone, for four steps."""
  config = get_config("smoke")
  config.update_from_flattened_dict(
    {
      "checkpoint.every": 2,
      "fairness.strategy": "none",
      "train.image": (0, 0),
      "train.points": (0, 0),
      "train.segmenter": (0.0, 1.0),
      "train.steps": 4,
    }
    | changes
  )
  return config


@pytest.fixture(scope="module")
def cases():
  rng = np.random.default_rng(0)
  return Cases(
    name=[f"case_{i}" for i in range(8)],
    image=rng.integers(0, 256, (8, 32, 32), np.uint8),
    mask=rng.integers(0, 3, (8, 32, 32)).astype(np.uint8),
    points=np.ones((8, 32, 3), np.float32),
    attributes={a: np.arange(8, dtype=np.int32) % 2 for a in ATTRIBUTES},
  )


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cases):
  workdir = tmp_path_factory.mktemp("trained")
  assert train(smoke(), workdir, cases, data="abc") is not None
  return workdir


@pytest.fixture
def workdir(tmp_path, trained):
  return shutil.copytree(trained, tmp_path / "run")


def steps(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line)["step"] for line in lines]


def test_a_longer_training_goes_on_from_the_last_step(workdir, cases):
  longer = smoke(**{"train.steps": 6, RATE: 1e-4})
  with pytest.raises(ValueError) as error:
    train(longer, workdir, cases, data="abc")
  for line in (f"{RATE}: 0.002 before, 0.0001 now", "train.steps: 4 before, 6"):
    assert f"  {line}" in str(error.value)
  assert "--continue" in str(error.value)
  assert steps(workdir) == [1, 2, 3, 4, 4]

  state = train(longer, workdir, cases, data="abc", proceed=True)
  assert int(state.step) == 6
  assert steps(workdir) == [1, 2, 3, 4, 5, 6, 6]
  (change,) = configs.load_record(workdir).changes
  assert change["step"] == 4
  assert change["fields"][RATE] == [0.002, 0.0001]
  assert change["fields"]["train.segmenter"] == [[0, 4], [0, 6]]
  # From now on it is that run, also where its newest checkpoint is lost.
  shutil.rmtree(workdir / "checkpoints" / "6")
  again = train(longer, workdir, cases, data="abc")
  assert int(again.step) == 6
  for old, new in zip(
    *(leaves(s.params["segmenter"]) for s in (state, again)), strict=True
  ):
    np.testing.assert_array_equal(old, new)


def leaves(tree):
  import jax

  return jax.tree.leaves(jax.device_get(tree))


@pytest.mark.parametrize("lost", [False, True])
def test_other_settings_or_patients_are_refused(workdir, cases, lost):
  """Also where config.json is lost: checkpoints know what made them."""
  if lost:
    Layout(workdir).config.unlink()
  with pytest.raises(ValueError, match="seed: 0 before, 3 now"):
    train(smoke(seed=3), workdir, cases, data="abc")
  with pytest.raises(ValueError, match="prepared data: abc before, def now"):
    train(smoke(), workdir, cases, data="def")
  assert Layout(workdir).config.exists() != lost


def test_a_run_may_start_from_the_checkpoint_of_another(workdir, cases):
  Layout(workdir).config.unlink()
  train(smoke(**{"train.steps": 5}), workdir, cases, proceed=True)
  (change,) = configs.load_record(workdir).changes
  assert change["fields"]["train.steps"] == [4, 5]


def test_a_lost_config_is_written_again(workdir, cases):
  Layout(workdir).config.unlink()
  train(smoke(), workdir, cases, data="abc")
  assert configs.load_record(workdir).changes == ()


def test_other_shapes_cannot_go_on(workdir, cases):
  other = smoke(**{"segmenter.channels": (4,), "train.steps": 6})
  with pytest.raises(ValueError, match="other shapes with segmenter.channels"):
    train(other, workdir, cases, proceed=True)
  assert steps(workdir) == [1, 2, 3, 4, 4]


def test_fewer_steps_than_are_trained(workdir, cases):
  with pytest.raises(ValueError, match="trained to step 4 already, beyond"):
    train(smoke(**{"train.steps": 3}), workdir, cases, proceed=True)


def test_a_renamed_checkpoint_is_not_taken(workdir, cases, caplog):
  (workdir / "checkpoints" / "4").rename(workdir / "checkpoints" / "9")
  state = train(smoke(), workdir, cases, data="abc")
  assert int(state.step) == 4
  assert "its directory holds step 4: it was renamed" in caplog.text
