"""Installed without the checkout: the command, recipes and version."""

import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def command(tmp_path_factory):
  """Calls `fairdiff` of what is installed, in an empty folder."""
  where = tmp_path_factory.mktemp("built")
  build = [sys.executable, "setup.py", "-q", "build"]
  folders = ["--build-base", where / "work", "--build-lib", where / "site"]
  subprocess.run([*build, *folders], cwd=ROOT, check=True)
  empty = tmp_path_factory.mktemp("empty")

  def call(*arguments):
    start = "from fairdiff_jax.launch.command import main; main()"
    return subprocess.run(
      [sys.executable, "-c", start, *arguments],
      cwd=empty,
      env=os.environ | {"PYTHONPATH": str(where / "site")},
      capture_output=True,
      text=True,
      timeout=600,
    )

  call.empty = empty
  call.site = where / "site"
  return call


def test_one_package_is_installed(command):
  folders = {p.name for p in command.site.iterdir() if p.suffix == ""}
  assert folders == {"fairdiff_jax"}
  assert (command.site / "fairdiff_jax" / "py.typed").is_file()


def test_a_recipe_is_known_by_its_name(command):
  done = command("prepare", "--config", "phantom:smoke")
  assert "give --workdir" in done.stderr
  assert "--config.seed=" in command("train", "--help").stdout
  assert "there are prepare" in command("trian").stderr


def test_a_run_from_its_recipe_to_what_others_can_use(command):
  """Every command that a run is made for, in an empty folder."""

  def call(*arguments):
    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout

  call("train", "--config", "phantom:smoke", "--workdir", "r")
  said = call("evaluate", "--workdir", "r", "--checkpoint", "last")
  assert "checkpoint: last, step 8, not validated" in said
  assert "report: r/report/index.html" in said
  photographs = command.empty / "photographs"
  photographs.mkdir()
  rng = np.random.default_rng(0)
  for i, shape in enumerate([(40, 50), (64, 32)]):
    pixels = rng.integers(0, 256, shape, np.uint8)
    cv2.imwrite(str(photographs / f"{i}.png"), pixels)
  call("predict", "--workdir", "r", "--images", "photographs", "--out", "o")
  mask = cv2.imread(str(command.empty / "o/masks/0.png"), -1)
  assert mask.shape == (40, 50)
  # A run that has learned nothing need not pass the gate.
  sample = ("sample", "--workdir", "r", "--out")
  call(*sample, "s", "--counts", "Asian=2", "--nogate")
  assert len([*(command.empty / "s").glob("*.npz")]) == 2
  call(*sample, "t", "--again", "s/manifest.jsonl", "--only", "1")
  (again,) = (command.empty / "t").glob("*.npz")
  assert again.read_bytes() == (command.empty / "s" / again.name).read_bytes()
  call("export", "--workdir", "r", "--to", "x")
  assert (command.empty / "x" / "MODEL_CARD.md").is_file()
  assert (command.empty / "x/segmenter/segmenter.stablehlo").is_file()


def test_what_is_prepared_is_trained_without_naming_it_again(command):
  """The config is kept, and data can be looked at before."""
  change = "--config.data.phantom.train=20"
  recipe = ("--config", "phantom:smoke", change, "--workdir", "p")
  assert "fairdiff train --workdir p" in command("prepare", *recipe).stdout
  assert "26 cases usable" in command("check", "p/data").stdout
  for name in ("evaluate", "export"):
    more = ("--to", "y") if name == "export" else ()
    done = command(name, "--workdir", "p", *more)
    assert "has no checkpoint yet; train it first" in done.stderr
  done = command("train", "--workdir", "p", "--config.train.points=(4,2)")
  assert "train.points must be" in done.stderr
