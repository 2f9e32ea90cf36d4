"""Eight simulated devices for every test, one compilation cache, one run.

Tests compile far longer than they run. So code is not optimised, but for
`trained_run`, which is trained as users train; and what one test process has
compiled the others read. Child processes inherit this.

Eight devices share few cores: one program at a time runs on them, and a device
that is late for a collective is waited for longer than the 40 s after which XLA
ends the process.
"""

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import simulated

ROOT = Path(__file__).parents[1]

# JAX reads these once, when its backend starts.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
  [
    os.environ.get("XLA_FLAGS", ""),
    f"{simulated.DEVICES}8",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_collective_call_terminate_timeout_seconds=300",
  ]
)


def pytest_configure(config):
  if not hasattr(config, "workerinput"):  # the process that starts the others
    cache = tempfile.mkdtemp(prefix="compiled_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    config.add_cleanup(lambda: shutil.rmtree(cache, ignore_errors=True))
  import jax  # not before the environment is complete

  jax.config.update("jax_cpu_enable_async_dispatch", False)


def pytest_collection_modifyitems(items):
  """What takes longest comes first: no process is left alone with it."""
  longest = (
    "test_installed.py",  # others wait for its `trained_run`
    "test_processes.py",
    "test_resume.py",
    "test_parallel.py",
    "test_run.py",
    "test_recipes.py",
    "test_domain.py",
    "test_objectives.py",
  )
  order = {name: place for place, name in enumerate(longest)}
  items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="session")
def command(tmp_path_factory):
  """Calls `fairdiff` of what is installed, in a folder, as users do."""
  site = _once(tmp_path_factory, "site", _install)
  quick = simulated.flags(1)

  def call(folder, *arguments, flags=quick):
    start = "from fairdiff_jax.launch.command import main; main()"
    return subprocess.run(
      [sys.executable, "-c", start, *map(str, arguments)],
      cwd=folder,
      env=os.environ | {"PYTHONPATH": str(site), "XLA_FLAGS": flags},
      capture_output=True,
      text=True,
      timeout=600,
    )

  call.site = site
  return call


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory, command):
  """A run of the smoke recipe with validations: to be copied, not changed."""

  def train(folder):
    asked = ("--config.data.validation=0.2", "--config.evaluation.every=2")
    done = command(
      *(folder.parent, "train", "--config", "phantom:smoke", *asked),
      *("--workdir", folder.name),
      flags="",
    )
    assert done.returncode == 0, done.stderr

  return _once(tmp_path_factory, "trained_run", train)


def _install(site):
  with tempfile.TemporaryDirectory() as work:
    build = [sys.executable, "setup.py", "-q", "build", "--build-base", work]
    subprocess.run([*build, "--build-lib", site], cwd=ROOT, check=True)


def _once(tmp_path_factory, name, make):
  """What `make(folder)` puts into a folder that all test processes share."""
  shared = tmp_path_factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    shared = shared.parent
  folder, done = shared / name, shared / f"{name}_is_done"
  with open(shared / f"{name}_lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not done.exists():
      make(folder)
      done.touch()
  return folder
