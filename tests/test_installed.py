"""Installed without the checkout: a wheel's command, recipes and version."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def command(tmp_path_factory):
  """Calls `fairdiff` of the unpacked wheel, in an empty folder."""
  where = tmp_path_factory.mktemp("wheel")
  build = [sys.executable, "-m", "pip", "wheel", ROOT, "-q", "--no-deps"]
  subprocess.run([*build, "--no-build-isolation", "-w", where], check=True)
  (wheel,) = where.glob("*.whl")
  zipfile.ZipFile(wheel).extractall(where / "site")
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


def test_a_wheel_has_one_package(command):
  folders = {p.name for p in command.site.iterdir() if p.suffix == ""}
  assert folders == {"fairdiff_jax"}
  assert (command.site / "fairdiff_jax" / "py.typed").is_file()


def test_a_recipe_is_known_by_its_name(command):
  done = command("prepare", "--config", "phantom:smoke")
  assert "give --workdir" in done.stderr
  assert "--config.seed=" in command("train", "--help").stdout
  assert "there are prepare" in command("trian").stderr
