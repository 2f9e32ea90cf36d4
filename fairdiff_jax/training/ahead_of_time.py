"""What the joint step needs on devices that are not here.

Compiling for a TPU topology needs the package libtpu, not a TPU.
"""

import math
import re
from collections import defaultdict
from typing import Any

import numpy as np
from jax.experimental import topologies

from fairdiff_jax.training.schedule import phases
from fairdiff_jax.training.setup import describe_batch, setup, step_function
from fairdiff_jax.training.step import lower_step

# bf16 operations a second and chip, as the vendor states them.
PEAK = {"v4": 275e12, "v5e": 197e12, "v5p": 459e12, "v6e": 918e12}
COLLECTIVES = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
)


def tpu_devices(topology: str) -> list[Any]:
  """Devices of a topology such as 'v5p:2x2x2'.

  Raises:
    ValueError: if the generation is unknown.
    RuntimeError: if libtpu is not installed or does not know the topology.
  """
  generation, _, _ = topology.partition(":")
  if generation not in PEAK:
    raise ValueError(
      f"unknown TPU {generation!r} in topology {topology!r}; use one of"
      f" {', '.join(PEAK)}, such as v5p:2x2x2"
    )
  description = topologies.get_topology_desc(
    platform="tpu", topology_name=topology
  )
  return list(description.devices)


def collectives(text: str) -> dict[str, dict[str, int]]:
  """Collective operations of a compiled program: 'count' and 'bytes' of each.

  Args:
    text: the program's HLO. Bytes are those of the results, on one chip, each
      counted once however often it runs in a loop; an operation that several
      computations share by its channel is one.
  """
  found = defaultdict(lambda: {"count": 0, "bytes": 0})
  channels = set()
  pattern = rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\("
  for line in text.splitlines():
    match = re.search(pattern, line)
    if not match:
      continue
    channel = re.search(r"channel_id=\d+", line)
    if channel:
      if (match[2], channel[0]) in channels:
        continue
      channels.add((match[2], channel[0]))
    shapes = re.findall(r"([a-z]+)(\d+)\w*\[([\d,]*)\]", match[1])
    if match[3]:  # operands come first, results next, tokens last
      shapes = [shape for shape in shapes if shape != ("u", "32", "")]
      shapes = shapes[len(shapes) // 2 :]
    found[match[2]]["count"] += 1
    found[match[2]]["bytes"] += sum(
      int(bits) // 8 * int(np.prod([int(n) for n in dims.split(",") if n]))
      for _, bits, dims in shapes
    )
  return dict(found)


def estimate(cost: dict[str, float], text: str, peak: float) -> float | None:
  """The compiler's estimate of a program's seconds, or None.

  For some generations it takes a whole second off for every custom call
  ('optimal_seconds' of -296.845 with 297 of them); what is left of the last
  one is the estimate, in float32: to .1 ms where a thousand are taken off.

  Args:
    cost: the program's cost analysis.
    text: its HLO.
    peak: operations a second of a device.

  Returns:
    None too where the calls do not explain the seconds taken off, or the
    operations would need more than `peak`.
  """
  seconds = cost.get("optimal_seconds", 0.0)
  taken = max(-math.floor(seconds), 0)
  seconds += taken
  if taken > text.count(" custom-call(") or seconds <= 0:
    return None
  return seconds if cost.get("flops", 0.0) <= seconds * peak else None


def analyse(config, devices, peak: float) -> dict[str, Any]:
  """Compiles the step of a run's last phase and reports what it takes.

  Args:
    config: the run's config.
    devices: of the mesh.
    peak: operations a second of a device, for estimate and utilisation.

  Returns:
    Per chip: 'arguments', 'temporaries' and 'memory' (both, and what of the
    results is not donated) in bytes, 'flops', 'bytes' moved, 'collectives',
    'kernels', calls of hand-written ones, and, where the compiler estimates it,
    'seconds' and 'utilisation'. The compiler knows nothing of kernels: 'flops',
    'bytes' and 'seconds' leave out what happens in them.
  """
  run = setup(config, devices)
  active = [p.active for p in phases(config) if p.active][-1]
  compiled = lower_step(
    step_function(run, active),
    mesh=run.mesh,
    state=run.abstract,
    batch=describe_batch(config, active),
  ).compile()
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
  text = compiled.as_text()
  result = {
    "devices": len(devices),
    "networks": list(active),
    "arguments": memory.argument_size_in_bytes,
    "temporaries": memory.temp_size_in_bytes,
    "memory": memory.argument_size_in_bytes
    + memory.temp_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes,
    "flops": cost.get("flops"),
    "bytes": cost.get("bytes accessed"),
    "collectives": collectives(text),
    "kernels": text.count('custom_call_target="tpu_custom_call"'),
    "seconds": estimate(cost, text, peak),
  }
  if result["seconds"]:
    result["utilisation"] = result["flops"] / result["seconds"] / peak
  return result
