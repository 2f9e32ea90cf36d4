"""Compiles the joint step for TPUs that are not here, and says what it takes.

  pip install libtpu
  fairdiff compile --config fairseg:sd15 \
    --topology v5p:2x2x2 --cases_per_chip 4 --config.parallel.fsdp=8

Or many pods in one table, with the time that their links need:

  fairdiff compile --config fairseg:transunet --sweep

Nothing is computed and no weights are made or read, but the compiler itself
takes much memory and time at full size. Its estimate knows what its own
operations need; the time spent in kernels is left out.
"""

import json
import os

from absl import flags
from fairdiff_jax.launch import cli

# libtpu asks what machine it runs on, and waits for answers that nobody gives.
NO_TPU = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5p-8",
  "TPU_WORKER_HOSTNAMES": "localhost",
}

TOPOLOGY = flags.DEFINE_string("topology", "v5p:2x2x2", "TPUs, all chips.")
CASES = flags.DEFINE_integer(
  "cases_per_chip",
  4,
  "Sets both batches: so many cases on every chip.",
  lower_bound=1,
)
JSON = flags.DEFINE_string("json", "", "File to write the figures to.")
SWEEP = flags.DEFINE_bool(
  "sweep", False, "Pods of v5e, v5p and v6e from 8 to 1,024 chips in a table."
)


def main(_):
  config = cli.config()
  if JSON.value and os.path.exists(JSON.value):
    raise FileExistsError(f"--json {JSON.value} exists; it is not overwritten")
  import jax

  from fairdiff_jax.training import ahead_of_time

  jax.config.update("jax_platforms", "cpu")  # where the keys are
  for name, value in NO_TPU.items():
    os.environ.setdefault(name, value)
  if SWEEP.value:
    rows = []
    analyses = (_analyse(config, t) for t in ahead_of_time.SWEEP)
    for row in ahead_of_time.scaling(analyses):
      print(_row(row) if rows else f"{HEAD}\n{_row(row)}", flush=True)
      rows.append(row)
    found = {"cases_per_chip": CASES.value, "sweep": rows}
  else:
    found = _analyse(config, TOPOLOGY.value)
    _say(found)
  if JSON.value:
    with open(JSON.value, "x") as file:
      json.dump(found, file, indent=2)


def _analyse(config, topology):
  from fairdiff_jax.training import ahead_of_time

  devices = ahead_of_time.tpu_devices(topology)
  with config.unlocked():
    batch = CASES.value * len(devices)
    config.train.generation_batch = config.train.segmentation_batch = batch
  peak = ahead_of_time.PEAK[topology.split(":")[0]]
  found = ahead_of_time.analyse(config, devices, peak)
  return {"topology": topology, **found}


HEAD = """\
| pod | chips | memory, GB | GFLOP | collectives, MB | at peak, ms | estimate, ms | links, ms | growth |
|---|---|---|---|---|---|---|---|---|"""  # noqa: E501


def _row(row):
  talk = ", ".join(
    f"{kind} {figures['bytes'] / 1e6:.2f} in {figures['count']}"
    for kind, figures in row["collectives"].items()
  )
  estimate = f"{1e3 * row['seconds']:.3g}" if row["seconds"] else ""
  cells = (
    *(row["topology"], row["devices"], f"{row['memory'] / 1e9:.3f}"),
    *(f"{row['flops'] / 1e9:.2f}", talk or "none"),
    *(f"{1e3 * row['compute_seconds']:.2g}", estimate),
    *(f"{1e3 * row['collective_seconds']:.2g}", f"{row['growth']:+.2%}"),
  )
  return f"| {' | '.join(map(str, cells))} |"


def _say(found):
  print(
    f"{found['topology']}, {found['devices']} chips, {CASES.value} cases a"
    f" chip, {' + '.join(found['networks'])}; per chip:"
  )
  for name in ("memory", "arguments", "temporaries", "bytes"):
    print(f"  {name:<14}{found[name] / 1e9:10.2f} GB")
  print(f"  {'flops':<14}{found['flops'] / 1e12:10.3f} T")
  if found["seconds"]:
    print(f"  {'estimated':<14}{1e3 * found['seconds']:10.1f} ms")
  else:
    print(f"  {'estimated':<14}{'nothing':>10}")
  if "utilisation" in found:
    print(f"  {'utilisation':<14}{100 * found['utilisation']:10.1f} %")
  if found["kernels"]:
    print(f"  {'kernels':<14}{found['kernels']:10d}, not in the estimate")
  for name, figures in found["collectives"].items():
    print(
      f"  {name:<14}{figures['bytes'] / 1e9:10.2f} GB in {figures['count']}"
    )


def start():
  cli.run(main, takes_config=True)


if __name__ == "__main__":
  start()
