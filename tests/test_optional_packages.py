"""Scripts answer before anything heavy or optional is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPTIONAL = ("torch", "transformers", "diffusers", "segment_anything", "medpy")
HEAVY = ("jax", "flax", "scipy", "cv2", "safetensors", "fairdiff_jax")
SCRIPTS = {
  "import_weights": "--controlnet",
  "benchmark": "--rounds",
  "benchmark_intervals": "--trials",
  "benchmark_metrics": "--medpy_cases",
  "benchmark_segmenters": "--[no]full",
}
START = """
import runpy, sys
script, missing, *sys.argv[1:] = sys.argv[1:]
sys.modules |= dict.fromkeys(missing.split(","))
sys.argv[0] = script
sys.path.insert(0, "launch")
runpy.run_path(script, run_name="__main__")
"""


def launch(script, *arguments, missing=OPTIONAL):
  path = f"launch/{script}.py"
  return subprocess.run(
    [sys.executable, "-c", START, path, ",".join(missing), *arguments],
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
  )


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_needs_nothing(script):
  done = launch(script, "--help", missing=(*OPTIONAL, *HEAVY))
  assert SCRIPTS[script] in done.stdout, done.stderr
  assert "Traceback" not in done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_typo_is_refused_at_once(script):
  done = launch(script, "--ruonds=1", missing=(*OPTIONAL, *HEAVY))
  assert done.returncode == 1
  assert "ruonds" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
  ("script", "arguments", "package"),
  [
    ("import_weights", ("--source=.", "--out=none"), "transformers"),
    ("benchmark_metrics", (), "medpy"),
    ("benchmark_segmenters", (), "torch"),
  ],
)
def test_a_missing_package_is_named(script, arguments, package):
  done = launch(script, *arguments)
  message = f"error: this command needs {package}: pip install {package}\n"
  assert (done.returncode, done.stderr) == (1, message)


@pytest.mark.parametrize(
  ("script", "arguments", "message"),
  [
    (
      "benchmark_segmenters",
      ("--networks=sam",),
      "--networks has sam; use sam",
    ),
    (
      "benchmark_intervals",
      ("--equity=es",),
      "--equity=es is unknown; use one",
    ),
    (
      "benchmark",
      ("--config=configs/phantom.py:smoke", "--field=image.ptch"),
      "--field=image.ptch is no field of the config",
    ),
    (
      "benchmark",
      (
        *("--config=configs/phantom.py:smoke", "--field=fairness.weight"),
        "--values=0.1,much",
      ),
      "--values: fairness.weight cannot be much",
    ),
  ],
)
def test_values_are_checked_before_anything_runs(script, arguments, message):
  done = launch(script, *arguments)
  assert done.returncode == 1
  assert done.stderr.startswith(f"error: {message}"), done.stderr
  assert done.stderr.count("\n") == 1
