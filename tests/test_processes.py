"""Two processes on one machine train as one process does."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import simulated

from fairdiff_jax.config import load
from fairdiff_jax.training.checkpoint import Checkpoints, join
from fairdiff_jax.training.mesh import to_host
from fairdiff_jax.training.setup import setup

ROOT = Path(__file__).parents[1]
TIMEOUT = 600  # seconds; a cluster that hangs fails the test
TOLERANCE = 1e-5
# One phase, four refills, checkpoints between; what is left is small.
OVERRIDES = {
  "data.size": "(16, 16)",
  "data.num_points": 12,
  "points.num_points": 12,
  "points.num_steps": 4,
  "data.validation": 0.2,
  "evaluation.every": 1,
  "image.sample_steps": 1,
  "objective.agreement": 0.1,
  "train.steps": 8,
  "train.points": "(0, 8)",
  "train.image": "(0, 8)",
  "train.segmenter": "(0, 8)",
  "bank.every": 2,
  "bank.max_attempts": 50,
  "checkpoint.every": 2,
  "fairness.method": "group_dro",
  "fairness.tilt": 1.0,
  "evaluation.synthetic_per_group": 1,
  "baseline": False,
  # The full learning rate at once: what could drift does.
  "optimizer.points.warmup_steps": 1,
  "optimizer.image.warmup_steps": 1,
  "optimizer.segmenter.warmup_steps": 1,
}


def command(workdir, processes=1, **overrides):
  """The command line of a run."""
  train = ["--config", "configs/phantom.py:smoke", "--workdir", str(workdir)]
  for key, value in (OVERRIDES | overrides).items():
    train.append(f"--config.{key}={value}")
  if processes == 1:
    return [sys.executable, "launch/train.py", *train]
  return ["launch/local_processes.sh", str(processes), *train]


def start(workdir, processes=1, devices=2, **overrides):
  """Starts a run, each process with its own simulated devices."""
  return subprocess.Popen(
    command(workdir, processes, **overrides),
    cwd=ROOT,
    env=os.environ
    | {
      "PYTHON": sys.executable,
      "PYTHONPATH": str(ROOT),
      "XLA_FLAGS": simulated.flags(devices),
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    start_new_session=True,
  )


def finish(process):
  """Waits for a run; kills all of it if it takes too long."""
  try:
    output, _ = process.communicate(timeout=TIMEOUT)
  except BaseException:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    raise
  return process.returncode, output


def read(workdir):
  """Metrics by line, and the final state."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  run = setup(load(workdir), jax.devices()[:1])
  checkpoints = Checkpoints(workdir)
  step, parts = checkpoints.restore(run.abstract, ("inference", "training"))
  checkpoints.close()
  assert step == OVERRIDES["train.steps"]
  return [json.loads(line) for line in lines], to_host(join(parts, {}))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  """The run of one process with four devices."""
  workdir = tmp_path_factory.mktemp("alone")
  code, output = finish(start(workdir, devices=4))
  assert code == 0, output
  return workdir


def assert_same_run(workdir, expected):
  metrics, state = read(workdir)
  expected_metrics, expected_state = read(expected)
  # A line a step, a line a validation, and the last.
  lines = 2 * OVERRIDES["train.steps"] + 1
  assert len(metrics) == len(expected_metrics) == lines
  for found, known in zip(metrics, expected_metrics, strict=True):
    assert found.keys() == known.keys()
    for key, value in known.items():
      if key.startswith(("loss/", "risk/", "grad_norm/", "step")):
        assert found[key] == pytest.approx(
          value, rel=TOLERANCE, abs=TOLERANCE
        ), key
  for field in ("params", "ema", "batch_stats", "frozen"):
    jax.tree.map(
      partial(np.testing.assert_allclose, rtol=0, atol=TOLERANCE),
      getattr(state, field),
      getattr(expected_state, field),
    )


def stop_at_bank(process, workdir, step):
  """Sends SIGTERM once there is the bank of a step; the last step done."""
  cases = workdir / "bank" / f"step_{step:08d}" / "cases.npz"
  try:
    deadline = time.monotonic() + TIMEOUT
    while not cases.exists():
      assert process.poll() is None, process.communicate()[0]
      assert time.monotonic() < deadline
      time.sleep(0.01)
    process.terminate()
  except BaseException:
    os.killpg(process.pid, signal.SIGKILL)
    raise
  code, output = finish(process)
  assert code == 0, output
  # Once: only the first process speaks.
  (stopped,) = re.findall(r"SIGTERM: stopped after step (\d)", output)
  assert step <= int(stopped) < OVERRIDES["train.steps"]
  return int(stopped)


def test_two_processes_then_one_then_two_train_as_one(alone, tmp_path):
  """SIGTERM stops all at one step; the same command goes on with others.

  All of them train, validate and draw synthetic cases as one.
  """
  first = stop_at_bank(start(tmp_path, processes=2), tmp_path, 2)
  then = start(tmp_path, devices=4)
  second = stop_at_bank(then, tmp_path, first // 2 * 2 + 2)
  assert second > first
  code, output = finish(start(tmp_path, processes=2))
  assert code == 0, output
  assert f"resuming from the checkpoint of step {second}" in output
  assert_same_run(tmp_path, alone)
  last = Path("bank", "step_00000006", "cases.npz")
  banks = [np.load(workdir / last)["mask"] for workdir in (tmp_path, alone)]
  np.testing.assert_array_equal(*banks)


METHODS_SCRIPT = """
import sys
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

process = int(sys.argv[1])
jax.distributed.initialize(sys.argv[2], 2, process)
from fairdiff_jax.training.mesh import make_mesh, put_batch, to_host
from tests.test_fairness_methods import (
  METHODS, assert_close, build, earlier_state, everything, make_batch,
)

with jax.default_device(jax.local_devices()[0]):
  states = {name: earlier_state(build(name)) for name in METHODS}
states = jax.tree.map(np.asarray, states)
mesh = make_mesh()
whole = NamedSharding(mesh, PartitionSpec())
compute = jax.jit(everything(), out_shardings=whole)
for seed in range(5):
  batch = make_batch(seed)
  batch["weight"][4 * seed % 16 :][:4] = 0  # shards without a case
  half = {k: v[8 * process :][:8] for k, v in batch.items()}
  found = to_host(compute(put_batch(half, mesh), states))
  with jax.default_device(jax.local_devices()[0]):
    assert_close(found, jax.jit(everything())(batch, states))
print("equal")
"""


def test_methods_of_two_processes_equal_one(tmp_path):
  """Values, states and gradients of every method."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  environment = os.environ | {
    "PYTHONPATH": str(ROOT),
    "XLA_FLAGS": simulated.flags(4),
  }
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", METHODS_SCRIPT, str(i), address],
      cwd=ROOT,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      start_new_session=True,
    )
    for i in range(2)
  ]
  for process in processes:
    code, output = finish(process)
    assert code == 0 and output.endswith("equal\n"), output


def test_one_failing_process_stops_the_others(tmp_path):
  process = start(tmp_path, processes=2, **{"data.attribute": "income"})
  code, output = finish(process)
  assert code != 0
  assert "No attribute 'income'" in output
