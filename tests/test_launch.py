"""What a command line gets wrong is said at once, and help helps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs import phantom
from fairdiff_jax import config as configs

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(
  path.stem
  for path in (ROOT / "launch").glob("*.py")
  if path.stem not in ("__init__", "cli", "command")
)
SMOKE = ("--config", "configs/phantom.py:smoke")


OPTIONAL = ("torch", "transformers", "diffusers", "segment_anything", "medpy")
HEAVY = ("jax", "flax", "optax", "orbax", "scipy", "matplotlib", "cv2")
HEAVY += ("safetensors", "tensorboardX", "tensorflow_datasets")
START = """
import runpy, sys
script, missing, *sys.argv[1:] = sys.argv[1:]
sys.modules |= dict.fromkeys(missing.split(","))
sys.argv[0] = script
sys.path.insert(0, "launch")
runpy.run_path(script, run_name="__main__")
"""


def launch(script, *arguments, missing=("none",)):
  """Runs a script where some packages cannot be imported."""
  path = f"launch/{script}.py"
  start = [sys.executable, "-c", START, path, ",".join(missing)]
  return subprocess.run(
    [*start, *map(str, arguments)],
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=120,
  )


def error_of(done):
  """What is said, less its 'error: '."""
  assert done.returncode == 1, done.stderr
  assert done.stderr.startswith("error: "), done.stderr
  assert "Traceback" not in done.stderr
  return done.stderr.removeprefix("error: ").rstrip("\n")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_needs_nothing(script):
  numpy = () if script.startswith("benchmark") else ("numpy",)
  done = launch(script, "--help", missing=(*OPTIONAL, *HEAVY, *numpy))
  assert (done.returncode, done.stderr) == (0, "")
  first, *lines = done.stdout.splitlines()
  assert first.endswith((".", ":"))
  assert "Flags:" in lines


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_typo_is_refused_at_once(script):
  done = launch(script, "--ruonds=1", missing=(*OPTIONAL, *HEAVY))
  assert "ruonds" in error_of(done)


def test_help_shows_fields_and_variants():
  text = launch("train", "--help").stdout
  for name, field in configs.all_fields().items():
    assert f"--config.{name}={field.default!r}\n      {field.doc}" in text
  assert "Variants: small, sd15, samed, transunet" in text
  assert "--config.train.steps=3000\n\nFlags:" in text  # its own line breaks


REQUIRED = {
  "benchmark": SMOKE,
  "compile": SMOKE,
  "evaluate": ("--workdir", "none"),
  "export": ("--workdir", "none", "--to", "none"),
  "import_weights": ("--source", "none", "--out", "none"),
  "predict": ("--workdir", "none", "--images", "none", "--out", "none"),
  "sample": ("--workdir", "none", "--counts", "Asian=2", "--out", "none"),
  "train": (*SMOKE, "--workdir", "none"),
}


TAKE_ARGUMENTS = ("check", "compare")


@pytest.mark.parametrize(
  "script", [s for s in SCRIPTS if s not in TAKE_ARGUMENTS]
)
def test_what_no_script_knows_is_refused(script):
  done = launch(script, *REQUIRED.get(script, ()), "Black=2")
  assert "nothing is known of 'Black=2'" in error_of(done)


@pytest.mark.parametrize(
  "argument", ["config.seed=3", "–config.seed=3", "—config.seed=3", "seed=3"]
)
def test_flags_with_other_dashes_are_no_flags(tmp_path, argument):
  done = launch("train", *SMOKE, "--workdir", tmp_path / "run", argument)
  assert f"nothing is known of {argument!r}" in error_of(done)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("--config.fairness.metod=gap",), 'no field .*Did you mean "method"'),
    (("--config.seed=a",), "--config.seed=a: invalid literal"),
    (("--config.seed=-1",), "seed must be a whole number from 0 to"),
    (("--config.evaluation.equity=fairest",), "equity must be .*'fairest'"),
    (("--config.image.attention=false",), "got ('false',)"),
    (
      ("--config.train.steps=4", "--config.train.segmenter=(2,8)"),
      "goes beyond train.steps=4",
    ),
  ],
)
def test_an_override_that_cannot_be_is_refused(tmp_path, arguments, message):
  done = launch("train", *SMOKE, "--workdir", tmp_path / "run", *arguments)
  error = error_of(done)
  for part in message.split(".*"):
    assert part in error
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("--workdir", "none"), "give --config NAME or FILE, or as --workdir the"),
    (("--workdir", "none", "--config.seed=3"), "changes a config: give"),
    (
      ("--workdir", "none", "--config", "no.py"),
      "there are fairseg, own, phantom",
    ),
    (("--workdir", "none", "--config", "configs"), "does not exist"),
    (("--workdir", "none", "--config", "configs/phantom.py:no"), "variant"),
    (("--workdir", "none", "--config", "launch/command.py"), "is no recipe"),
    ((*SMOKE, "--workdr", "none"), "Did you mean: workdir"),
    (SMOKE, "--workdir must have a value"),
  ],
)
def test_a_command_without_a_config_is_told(arguments, message):
  assert message in error_of(launch("train", *arguments))


def test_a_run_knows_its_config(tmp_path):
  """Overrides change only what they name, and are compared with the run's."""
  config = phantom.get_config("smoke")
  config.data.attribute = "gender"
  configs.claim(tmp_path, config)
  done = launch("train", "--workdir", tmp_path, "--config.seed=3")
  error = error_of(done)
  assert error.splitlines()[1] == "  seed: 0 before, 3 now"
  assert "attribute" not in error
  done = launch("train", "--workdir", tmp_path, *SMOKE)
  assert "data.attribute: gender before, race now" in error_of(done)
  done = launch("evaluate", "--workdir", tmp_path, "--config.seed=3")
  assert "seed: 0 before, 3 now" in error_of(done)
  equity = "--config.evaluation.equity=fairseg_sum"
  done = launch("evaluate", "--workdir", tmp_path, equity)
  assert "has no checkpoint yet" in error_of(done)


def test_a_work_directory_that_could_not_be_read_again(tmp_path):
  done = launch("train", *SMOKE, "--workdir", tmp_path / "run[1]")
  assert "choose a path without" in error_of(done)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("script", "arguments", "package"),
  [
    ("import_weights", ("--source=.", "--out=none"), "transformers"),
    ("benchmark_metrics", (), "medpy"),
    ("benchmark_peers", (), "torch"),
  ],
)
def test_a_missing_package_is_named(script, arguments, package):
  done = launch(script, *arguments, missing=OPTIONAL)
  message = f"error: this command needs {package}: pip install {package}\n"
  assert (done.returncode, done.stderr) == (1, message)


@pytest.mark.parametrize(
  ("script", "arguments", "message"),
  [
    (
      "benchmark_peers",
      ("--networks=sam",),
      "--networks has sam; use point, controlnet, transunet, samed, small_unet",
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


@pytest.mark.parametrize("given", [{}, {"JAX_COMPILATION_CACHE_DIR": "/own"}])
def test_what_is_compiled_is_kept_for_the_user_alone(
  tmp_path, monkeypatch, given
):
  from fairdiff_jax.launch import cli

  environment = {"XDG_CACHE_HOME": str(tmp_path)} | given
  monkeypatch.setattr(cli.os, "environ", environment)
  directory = tmp_path / "fairdiff_jax"
  cli.keep_compiled()
  if given:
    assert environment["JAX_COMPILATION_CACHE_DIR"] == "/own"
    assert not directory.exists()
    return
  assert environment["JAX_COMPILATION_CACHE_DIR"] == str(directory)
  assert directory.stat().st_mode & 0o777 == 0o700
  directory.chmod(0o777)
  environment.pop("JAX_COMPILATION_CACHE_DIR")
  cli.keep_compiled()
  assert directory.stat().st_mode & 0o777 == 0o700


def test_without_a_home_nothing_is_kept(tmp_path, monkeypatch):
  from fairdiff_jax.launch import cli

  (tmp_path / "file").touch()
  environment = {"XDG_CACHE_HOME": str(tmp_path / "file")}
  monkeypatch.setattr(cli.os, "environ", environment)
  cli.keep_compiled()
  assert environment == {"XDG_CACHE_HOME": str(tmp_path / "file")}
