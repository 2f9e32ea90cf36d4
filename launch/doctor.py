"""Says whether the devices at hand compute what they should; run it first.

  fairdiff doctor --json doctor.json

Of every network, at a small size, value and gradients in float32 and bfloat16
against the CPU's; the platform's attention kernels, collectives over the mesh,
a checkpoint saved and restored; cases a second of forward and backward pass.
Takes about two minutes. Exit status 0 says that all that could be checked is
right; what could not be is named.
"""

import json
import os

from absl import flags
from fairdiff_jax.launch import cli

JSON = flags.DEFINE_string("json", "", "File to write the findings to.")
NETWORKS = flags.DEFINE_list("networks", None, "Which are checked; all if not.")


def main(_):
  if JSON.value and os.path.exists(JSON.value):
    raise FileExistsError(f"--json {JSON.value} exists; it is not overwritten")
  from fairdiff_jax import doctor

  unknown = set(NETWORKS.value or ()) - doctor.NETWORKS.keys()
  if unknown:
    raise ValueError(
      f"--networks has {', '.join(sorted(unknown))}; use"
      f" {', '.join(doctor.NETWORKS)}"
    )
  machine = doctor.describe()
  memory = machine["memory_bytes"]
  print(", ".join(f"{k} {v}" for k, v in machine["versions"].items()))
  print(
    f"{machine['devices']} x {machine['device']} ({machine['platform']}),"
    f" {machine['processes']} processes, mesh {machine['mesh']}, memory"
    f" {f'{memory / 2**30:.1f} GiB each' if memory else 'unknown'}\n"
  )
  findings = []
  for finding in doctor.examine(NETWORKS.value):
    findings.append(finding)
    rate = finding.cases_per_second
    print(
      f"{finding.verdict:<12} {finding.name:<40} {finding.detail}"
      + (f"; {rate:.1f} cases/s" if rate else ""),
      flush=True,
    )
  wrong = [f.name for f in findings if f.verdict == doctor.WRONG]
  left = [f.name for f in findings if f.verdict == doctor.UNCHECKED]
  if left:
    print(f"\nnot checked: {', '.join(left)}")
  print(f"\nwrong: {', '.join(wrong)}" if wrong else "\nall else is right")
  if JSON.value:
    found = {
      "trustworthy": not wrong,
      **machine,
      "findings": [finding._asdict() for finding in findings],
    }
    with open(JSON.value, "x") as file:
      json.dump(found, file, indent=2)
  return 1 if wrong else 0


def start():
  cli.run(main)


if __name__ == "__main__":
  start()
