"""What the joint step needs on devices that are not here.

Compiling for a TPU topology needs the package libtpu, not a TPU.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jax.experimental import topologies

from fairdiff_jax.training.schedule import phases
from fairdiff_jax.training.setup import describe_batch, setup, step_function
from fairdiff_jax.training.step import lower_step

# bf16 operations a second and chip, as the vendor states them.
PEAK = {"v4": 275e12, "v5e": 197e12, "v5p": 459e12, "v6e": 918e12}
# Bytes a second that a chip sends to others of its pod, all links together:
# the vendor's 1600, 4800 and 3200 Gbps (cloud.google.com/tpu/docs, v5e, v5p,
# v6e). 256 chips are a whole pod of v5e and v6e.
LINKS = {"v5e": 200e9, "v5p": 600e9, "v6e": 400e9}
SWEEP = (
  *("v5e:2x4", "v5e:8x8", "v5e:16x16"),
  *("v5p:2x2x2", "v5p:4x4x4", "v5p:8x8x16"),
  *("v6e:2x4", "v6e:8x8", "v6e:16x16"),
)
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


class Collective(NamedTuple):
  """A collective operation of a compiled program.

  Attributes:
    kind: one of `COLLECTIVES`.
    size: bytes of its results, on one chip.
    group: chips that it goes over.
  """

  kind: str
  size: int
  group: int


def collectives(text: str, devices: int) -> list[Collective]:
  """The collective operations of a compiled program.

  Args:
    text: the program's HLO. An operation in a loop is one, and so is one that
      several computations share by its channel.
    devices: that the program is for.
  """
  found, channels = [], set()
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
    size = sum(
      int(bits) // 8 * int(np.prod([int(n) for n in dims.split(",") if n]))
      for _, bits, dims in shapes
    )
    found.append(Collective(match[2], size, _group(line, devices)))
  return found


def _group(line: str, devices: int) -> int:
  """Devices that an operation goes over: the size of its replica groups."""
  short = re.search(r"replica_groups=\[\d+,(\d+)\]<=", line)
  if short:
    return int(short[1])
  listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
  return len(listed[1].split(",")) if listed else devices


def by_kind(found: Iterable[Collective]) -> dict[str, dict[str, int]]:
  """'count' and 'bytes' of each kind of collective."""
  result = defaultdict(lambda: {"count": 0, "bytes": 0})
  for operation in found:
    result[operation.kind]["count"] += 1
    result[operation.kind]["bytes"] += operation.size
  return dict(result)


def wire_bytes(found: Iterable[Collective]) -> float:
  """Bytes that each chip sends for collectives.

  By rings, over n chips, of results of B bytes on each: an all-reduce sends
  2 B (n - 1) / n, an all-gather and an all-to-all B (n - 1) / n, a
  reduce-scatter B (n - 1), a permutation B (Patarasuk & Yuan 2009,
  doi:10.1016/j.jpdc.2008.09.002).
  """
  total = 0.0
  for kind, size, n in found:
    share = (n - 1) / n
    total += size * {
      "all-reduce": 2 * share,
      "all-gather": share,
      "all-to-all": share,
      "reduce-scatter": n - 1,
      "collective-permute": 1,
    }.get(kind, 0)
  return total


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
    'wire_bytes' that these send, 'kernels', calls of hand-written ones, and,
    where the compiler estimates it, 'seconds' and 'utilisation'. The compiler
    knows nothing of kernels: 'flops', 'bytes' and 'seconds' leave out what
    happens in them.
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
  found = collectives(text, len(devices))
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
    "collectives": by_kind(found),
    "wire_bytes": wire_bytes(found),
    "kernels": text.count('custom_call_target="tpu_custom_call"'),
    "seconds": estimate(cost, text, peak),
  }
  if result["seconds"]:
    result["utilisation"] = result["flops"] / result["seconds"] / peak
  return result


def scaling(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
  """What a step takes on more and more chips, with as many cases on each.

  Args:
    rows: what `analyse` gives, with the 'topology' of each.

  Yields:
    The rows, with 'compute_seconds' (operations at the chip's peak),
    'collective_seconds' (`wire_bytes` at the speed of its links, which leaves
    out how long a message is under way), 'step_seconds' and 'growth'. A step is
    the compiler's estimate, or else the operations at peak, and the collectives
    after that: none are hidden behind computing. Growth is that over the
    generation's first row, less 1.
  """
  first: dict[str, float] = {}
  for row in rows:
    generation = row["topology"].partition(":")[0]
    compute = row["flops"] / PEAK[generation]
    talk = row["wire_bytes"] / LINKS[generation]
    step = (row["seconds"] or compute) + talk
    first.setdefault(generation, step)
    yield {
      **row,
      "compute_seconds": compute,
      "collective_seconds": talk,
      "step_seconds": step,
      "growth": step / first[generation] - 1,
    }
