"""Installed without the checkout: the command, recipes and version."""

import shutil

import cv2
import numpy as np


def test_one_package_is_installed(command):
  folders = {p.name for p in command.site.iterdir() if p.suffix == ""}
  assert folders == {"fairdiff_jax"}
  assert (command.site / "fairdiff_jax" / "py.typed").is_file()


def test_a_recipe_is_known_by_its_name(command, tmp_path):
  done = command(tmp_path, "prepare", "--config", "phantom:smoke")
  assert "give --workdir" in done.stderr
  assert "--config.seed=" in command(tmp_path, "train", "--help").stdout
  assert "there are prepare" in command(tmp_path, "trian").stderr


def test_a_run_from_its_recipe_to_what_others_can_use(
  command, trained_run, tmp_path
):
  """Every command that a run is made for, in an empty folder.

  `trained_run` comes of the first: `fairdiff train --config phantom:smoke`.
  """
  shutil.copytree(trained_run, tmp_path / "r")

  def call(*arguments):
    done = command(tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout

  said = call("evaluate", "--workdir", "r", "--checkpoint", "last")
  assert "checkpoint: last, step 8" in said
  assert "report: r/report/index.html" in said
  photographs = tmp_path / "photographs"
  photographs.mkdir()
  rng = np.random.default_rng(0)
  for i, shape in enumerate([(40, 50), (64, 32)]):
    pixels = rng.integers(0, 256, shape, np.uint8)
    cv2.imwrite(str(photographs / f"{i}.png"), pixels)
  call("predict", "--workdir", "r", "--images", "photographs", "--out", "o")
  mask = cv2.imread(str(tmp_path / "o/masks/0.png"), -1)
  assert mask.shape == (40, 50)
  # A run that has learned nothing need not pass the gate.
  sample = ("sample", "--workdir", "r", "--out")
  call(*sample, "s", "--counts", "Asian=2", "--nogate")
  assert len([*(tmp_path / "s").glob("*.npz")]) == 2
  call(*sample, "t", "--again", "s/manifest.jsonl", "--only", "1")
  (again,) = (tmp_path / "t").glob("*.npz")
  assert again.read_bytes() == (tmp_path / "s" / again.name).read_bytes()
  call("export", "--workdir", "r", "--to", "x")
  assert (tmp_path / "x" / "MODEL_CARD.md").is_file()
  assert (tmp_path / "x/segmenter/segmenter.stablehlo").is_file()


def test_what_is_prepared_is_trained_without_naming_it_again(command, tmp_path):
  """The config is kept, and data can be looked at before."""

  def call(*arguments):
    return command(tmp_path, *arguments)

  change = "--config.data.phantom.train=20"
  recipe = ("--config", "phantom:smoke", change, "--workdir", "p")
  assert "fairdiff train --workdir p" in call("prepare", *recipe).stdout
  assert "26 cases usable" in call("check", "p/data").stdout
  for name in ("evaluate", "export"):
    more = ("--to", "y") if name == "export" else ()
    done = call(name, "--workdir", "p", *more)
    assert "has no checkpoint yet; train it first" in done.stderr
  done = call("train", "--workdir", "p", "--config.train.points=(4,2)")
  assert "train.points must be" in done.stderr
