"""Trains a run and reports on it; the same command resumes it.

python launch/train.py --config configs/phantom.py --workdir runs/quickstart
"""

import cli
import jax
from absl import flags
from ml_collections import config_flags

from fairdiff_jax import experiment

CONFIG = config_flags.DEFINE_config_file("config", None, "Run config.")
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
DISTRIBUTED = flags.DEFINE_bool(
  "distributed", False, "One of many processes; on a cluster, found by itself."
)
COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "host:port of process 0, where it cannot be found."
)
PROCESSES = flags.DEFINE_integer("processes", None, "Number of processes.")
PROCESS = flags.DEFINE_integer("process", None, "Index of this process.")
flags.mark_flags_as_required(["config", "workdir"])


def main(_):
  if DISTRIBUTED.value:
    jax.distributed.initialize(
      COORDINATOR.value, PROCESSES.value, PROCESS.value
    )
  if experiment.run(CONFIG.value, WORKDIR.value) and jax.process_index() == 0:
    print(f"report: {WORKDIR.value}/report/index.html")


if __name__ == "__main__":
  cli.run(main)
