"""A run that is stopped at any moment ends like one that never was.

The runs are processes of their own, on one device, that kill themselves at a
chosen moment (or are killed from outside); all share one compilation cache.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import simulated

ROOT = Path(__file__).parents[1]

OVERRIDES = {
  "baseline": False,
  "checkpoint.every": 3,
  "fairness.method": "group_dro",  # remembers weights
  "fairness.tilt": 1.0,  # quotas follow what is remembered of risks
  "train.points": (0, 2),  # leaves less to compile; the others learn together
}

# What happens when `method` of `owner` is called for the n-th time.
FAULTS = """
import os, signal, threading, time
from pathlib import Path
from fairdiff_jax.training.checkpoint import Checkpoints
from fairdiff_jax.training.journal import Journal

def on_call(owner, method, n, act):
  original, calls = getattr(owner, method), []
  def patched(self, *args, **kwargs):
    calls.append(args)
    if len(calls) == n:
      return act(lambda: original(self, *args, **kwargs))
    return original(self, *args, **kwargs)
  setattr(owner, method, patched)

def die(_):
  os.kill(os.getpid(), signal.SIGKILL)

def terminate(call):
  os.kill(os.getpid(), signal.SIGTERM)
  return call()

def wait_for_checkpoint(step):
  while not (WORKDIR / "checkpoints" / str(step)).exists():
    time.sleep(0.01)

def die_before_bank_is_complete(checkpoint=None):
  rename = Path.rename
  def patched(self, target):
    if self.name.startswith("incomplete_step_"):
      if checkpoint:  # saved in the background
        wait_for_checkpoint(checkpoint)
      die(None)
    return rename(self, target)
  Path.rename = patched

def die_in_background_of(call):
  def watch():
    while not list((WORKDIR / "checkpoints").glob("*tmp*")):
      time.sleep(0.001)
    die(call)
  threading.Thread(target=watch, daemon=True).start()
  call()
  time.sleep(60)

def die_while_saving(step):
  original = Checkpoints.save
  def patched(self, state, *args, **kwargs):
    call = lambda: original(self, state, *args, **kwargs)
    return die_in_background_of(call) if int(state.step) == step else call()
  Checkpoints.save = patched
"""

TRAIN = """
import sys
from pathlib import Path
WORKDIR = Path(sys.argv[1])
sys.path.insert(0, "launch")
from configs.phantom import get_config
from fairdiff_jax.data.prepare import prepare
from fairdiff_jax.data.storage import load
from fairdiff_jax.synthesis.bank import make_refill
from fairdiff_jax.training.loop import train

def run(workdir, **changes):
  config = get_config("smoke")
  config.update_from_flattened_dict(OVERRIDES | changes)
  prepare(config.data, WORKDIR / "data")
  cases = load(WORKDIR / "data", "train", progress=False)
  return train(config, workdir, cases, make_refill=make_refill)

def sha(workdir):
  return (workdir / "metrics.jsonl").read_text().split('"')[-2]
"""


@pytest.fixture(scope="module")
def environment():
  """One device."""
  return os.environ | {
    "PYTHONPATH": str(ROOT),
    "XLA_FLAGS": simulated.flags(1),
  }


@pytest.fixture(scope="module")
def start(environment):
  """Starts a Python process that has `run`, `on_call` and the faults."""

  def start(workdir, code):
    script = f"OVERRIDES = {OVERRIDES!r}\n{TRAIN}\n{FAULTS}\n{code}"
    return subprocess.run(
      [sys.executable, "-c", script, str(workdir)],
      cwd=ROOT,
      env=environment,
      capture_output=True,
      text=True,
      timeout=300,
    )

  return start


@pytest.fixture(scope="module")
def reference(tmp_path_factory, start):
  """The work directory of a run that nothing interrupted."""
  workdir = tmp_path_factory.mktemp("reference")
  done = start(workdir, "run(WORKDIR)")
  assert done.returncode == 0, done.stderr
  return workdir


def journal(workdir):
  """Lines of metrics.jsonl without the throughput."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  timing = {"seconds_per_step", "cases_per_second"}
  return [
    {k: v for k, v in json.loads(line).items() if k not in timing}
    for line in lines
  ]


def banks(workdir):
  return {
    path.relative_to(workdir): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in workdir.glob("bank/*/*")
  }


def assert_same(workdir, reference):
  assert journal(workdir) == journal(reference)
  assert [line["step"] for line in journal(workdir)] == [*range(1, 9), 8]
  assert len(journal(workdir)[-1]["params_sha256"]) == 64
  found, expected = banks(workdir), banks(reference)
  assert found.items() <= expected.items()
  assert Path("bank/step_00000006/cases.npz") in found
  assert steps(workdir) == steps(reference) == {"6", "8"}


def steps(workdir):
  """Names of complete checkpoints."""
  paths = (workdir / "checkpoints").glob("*")
  return {path.name for path in paths if path.name.isdigit()}


def copy(reference, workdir):
  return Path(shutil.copytree(reference, workdir))


def test_killed_again_and_again(tmp_path, environment, start, reference):
  """By others and by itself; the launch script goes on and ends the run."""
  command = [
    *(sys.executable, "launch/train.py"),
    *("--config", "configs/phantom.py:smoke", "--workdir", str(tmp_path)),
    *(f"--config.{k}={v}" for k, v in OVERRIDES.items()),
  ]
  process = subprocess.Popen(
    command,
    cwd=ROOT,
    env=environment,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  deadline = time.monotonic() + 300
  while not list((tmp_path / "checkpoints").glob("3*tmp*")):
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.002)
  process.kill()
  process.wait()
  killed = {
    "while the checkpoint of step 6 is written, 3 is the only one": (
      "die_while_saving(6)\nrun(WORKDIR, **{'checkpoint.keep': 1})",
      {"3"},
    ),
    "in the refill of step 6": (
      "die_before_bank_is_complete(6)\nrun(WORKDIR)",
      {"3", "6"},
    ),
  }
  for moment, (code, complete) in killed.items():
    done = start(tmp_path, code)
    assert done.returncode == -signal.SIGKILL, (moment, done.stderr)
    assert steps(tmp_path) == complete, moment
  done = subprocess.run(
    command, cwd=ROOT, env=environment, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  assert "resuming from the checkpoint of step 6" in done.stderr
  assert done.stdout.startswith("report: ")
  assert_same(tmp_path, reference)
  # Nothing but progress and our own lines: no INFO of the libraries.
  assert " I1" not in done.stderr and "\nI" not in done.stderr
  assert done.stderr.count("\r") < 60


def test_sigterm_saves_and_the_same_command_resumes(tmp_path, start, reference):
  code = """
from fairdiff_jax.synthesis import generate
on_call(generate, "mask_fault", 1, terminate)  # in the first refill
assert run(WORKDIR) is None
"""
  done = start(tmp_path, code)
  assert done.returncode == 0, done.stderr
  assert (
    "SIGTERM: stopped after step 2, saved; the same command resumes"
    in done.stderr
  )
  assert steps(tmp_path) == {"2"}
  assert len(list(tmp_path.glob("bank/unfinished/*/*.npz"))) == 1
  assert [line["step"] for line in journal(tmp_path)] == [1, 2]
  # At the last step it stops what would follow: baseline and report.
  code = """
on_call(Journal, "step", 6, terminate)
assert run(WORKDIR) is None
"""
  done = start(tmp_path, code)
  assert done.returncode == 0, done.stderr
  assert "SIGTERM: stopped after step 8" in done.stderr
  assert_same(tmp_path, reference)


def test_damage_and_completed_run(tmp_path, start, reference):
  """One process goes through what may lie in the directory at a start."""
  completed = copy(reference, tmp_path / "completed")
  truncated = copy(reference, tmp_path / "truncated")
  for path in (truncated / "checkpoints" / "8").rglob("*"):
    if path.is_file() and path.parent.name == "d":
      path.write_bytes(path.read_bytes()[:100])
  flipped = copy(reference, tmp_path / "flipped")
  largest = max(
    (flipped / "checkpoints" / "8" / "training").rglob("d/*"),
    key=lambda path: path.stat().st_size,
  )
  content = bytearray(largest.read_bytes())
  content[len(content) // 3] ^= 1
  largest.write_bytes(content)
  code = """
from absl import logging
logging.set_verbosity(logging.WARNING)
steps = []
original = Journal.step
Journal.step = lambda self, *args: (steps.append(0), original(self, *args))
for name, expected in (("completed", 0), ("truncated", 2), ("flipped", 2)):
  print(name, file=sys.stderr)
  assert run(WORKDIR / name) is not None
  assert len(steps) == expected, (name, steps)
  steps.clear()
"""
  shutil.copytree(reference / "data", tmp_path / "data")
  done = start(tmp_path, code)
  assert done.returncode == 0, done.stderr
  assert done.stderr.count("checkpoint of step 8 is damaged") == 2
  assert done.stderr.count("resuming from the checkpoint of step 6") == 2
  for workdir in (completed, truncated, flipped):
    assert_same(workdir, reference)
