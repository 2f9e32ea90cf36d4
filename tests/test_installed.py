"""Installed without the checkout: the command, recipes and version."""

import os
import subprocess
import sys
from pathlib import Path

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
      timeout=120,
    )

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
