"""Eight simulated devices, on which every test runs."""

import os

# JAX reads these once, when its backend starts. Tests compile far longer than
# they run, so that code is optimised little; not at all would hide faults that
# only optimised code has.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
  [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=1",
  ]
)
