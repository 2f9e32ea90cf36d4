"""Processes of a cluster end together and name the one that was the cause."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fairdiff_jax.cluster import RESTART, Cluster

ROOT = Path(__file__).parents[1]
TIMEOUT = 0.5


class Store:
  """The coordinator's key-value store; a process can be cut off from it."""

  def __init__(self):
    self.values, self.lock = {}, threading.Lock()

  def client(self):
    return Client(self)


class Client:
  def __init__(self, store):
    self.store, self.reached = store, threading.Event()
    self.reached.set()

  def key_value_set(self, key, value, allow_overwrite=False):
    self.reached.wait()
    with self.store.lock:
      assert allow_overwrite or key not in self.store.values
      self.store.values[key] = value

  def key_value_dir_get(self, prefix):
    self.reached.wait()
    with self.store.lock:
      items = list(self.store.values.items())
    return [(key, value) for key, value in items if key.startswith(prefix)]


class Processes:
  """Three processes, as threads; `verdicts` has what each ended with."""

  def __init__(self):
    store, self.verdicts = Store(), {}
    self.clients = [store.client() for _ in range(3)]
    self.each = [
      Cluster(
        *(client, i, 3, TIMEOUT),
        leave=lambda verdict, i=i: self.verdicts.setdefault(i, verdict),
      )
      for i, client in enumerate(self.clients)
    ]

  def end(self, *which):
    """Waits for these to end; returns the one verdict."""
    deadline = time.monotonic() + 20 * TIMEOUT
    while not set(which) <= self.verdicts.keys():
      assert time.monotonic() < deadline, self.verdicts
      time.sleep(0.01)
    (verdict,) = {self.verdicts[i] for i in which}
    return verdict

  def close(self):
    for client in self.clients:
      client.reached.set()
    for process in self.each:
      process.close()


@pytest.fixture
def processes():
  found = Processes()
  yield found
  found.close()


def test_who_beats_or_has_done_is_not_silent(processes):
  processes.each[2].close()
  time.sleep(3 * TIMEOUT)
  assert not processes.verdicts


def test_a_silent_process_is_named_with_its_step(processes):
  processes.each[1].step = 7
  time.sleep(TIMEOUT)
  processes.clients[1].reached.clear()
  found = processes.end(0, 2)
  assert "process 1 has been silent for 0.5 s" in found
  assert "step 7 was under way there" in found


@pytest.mark.parametrize("process", [0, 2])
def test_an_error_is_told_at_once(processes, process):
  others = {0, 1, 2} - {process}
  processes.each[process].fail(KeyError("x"))
  found = processes.end(*others)
  assert found == f"process {process} ended by KeyError: 'x'"


def test_a_silent_coordinator_is_named(processes):
  time.sleep(TIMEOUT / 2)
  for client in processes.clients:
    client.reached.clear()
  assert "process 0, the coordinator" in processes.end(1, 2)


STEPS = """
import sys, time
from absl import flags
from fairdiff_jax import cluster
from fairdiff_jax.launch import cli

def main(arguments):
  import jax, numpy as np
  from jax.experimental import multihost_utils
  process, address, fault = int(arguments[0]), *arguments[1:]
  cluster.join(address, 2, process, timeout=4)
  for step in range(10_000):
    cluster.at(step)
    multihost_utils.process_allgather(np.float32(step))
    print(step, flush=True)
    if fault == "bug" and process and step == 2:
      raise KeyError("a fault")
    time.sleep(0.05)

cli.run(main, arguments="index, address and fault")
"""


@pytest.mark.parametrize("fault", ["SIGKILL", "SIGSTOP", "bug"])
def test_one_of_two_real_processes_fails(fault):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  first, second = (
    subprocess.Popen(
      [sys.executable, "-c", STEPS, str(i), address, fault],
      cwd=ROOT,
      env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  )
  try:
    # Gloo speaks first.
    assert any(line == "0\n" for line in first.stdout), first.communicate()
    if fault != "bug":
      second.send_signal(signal.Signals[fault])
    began = time.monotonic()
    _, said = first.communicate(timeout=60)
    assert time.monotonic() - began < 40
  finally:
    for process in (first, second):
      process.kill()
    second.wait()
  assert first.returncode == RESTART, said
  (line,) = (x for x in said.splitlines() if x.startswith("error: process 1"))
  if fault == "bug":
    assert line == "error: process 1 ended by KeyError: 'a fault'"
  else:
    assert "silent for 4 s" in line and "under way there" in line
  assert "most recent call first" in said  # stacks
