"""Flags of XLA for so many simulated devices, as of the other tests."""

import os

DEVICES = "--xla_force_host_platform_device_count="


def flags(devices: int) -> str:
  """Of a child process; the last number of devices counts."""
  return f"{os.environ['XLA_FLAGS']} {DEVICES}{devices}"
