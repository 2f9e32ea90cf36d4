"""Eight simulated devices for every test, and one compilation cache.

Tests compile far longer than they run. So code is optimised little (not at
all would hide faults that only optimised code has), and what one test process
has compiled the others read.

Eight devices share few cores: one program at a time runs on them, and a device
that is late for a collective is waited for longer than the 40 s after which XLA
ends the process.
"""

import os
import shutil
import tempfile

# JAX reads these once, when its backend starts; child processes inherit them.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
  [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=1",
    "--xla_cpu_collective_call_terminate_timeout_seconds=300",
  ]
)


def pytest_configure(config):
  if not hasattr(config, "workerinput"):  # the process that starts the others
    cache = tempfile.mkdtemp(prefix="compiled_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
    config.add_cleanup(lambda: shutil.rmtree(cache, ignore_errors=True))
  import jax  # not before the environment is complete

  jax.config.update("jax_cpu_enable_async_dispatch", False)
