"""Trains a run and reports on it; the same command resumes it.

  fairdiff train --config phantom --workdir runs/quickstart

A run knows its config: to go on, --workdir is enough. To go on differently
from its newest checkpoint, say so; what was changed is recorded:

  fairdiff train --workdir runs/quickstart --continue \\
    --config.train.steps=3000
"""

from absl import flags
from fairdiff_jax.launch import cli

from fairdiff_jax import cluster

WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
CONTINUE = flags.DEFINE_bool(
  "continue", False, "Go on with another config than the run had so far."
)
WANDB = flags.DEFINE_string(
  "wandb", "", "Project of Weights & Biases to send the numbers to as well."
)
DISTRIBUTED = flags.DEFINE_bool(
  "distributed", False, "One of many processes; on a cluster, found by itself."
)
COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "host:port of process 0, where it cannot be found."
)
PROCESSES = flags.DEFINE_integer("processes", None, "Number of processes.")
PROCESS = flags.DEFINE_integer("process", None, "Index of this process.")
SILENCE = flags.DEFINE_float(
  "silence",
  cluster.TIMEOUT,
  "Seconds after which a silent process ends them all.",
  lower_bound=1,
)
flags.mark_flag_as_required("workdir")


def main(_):
  config = cli.config()
  import jax

  from fairdiff_jax.run import Run

  if DISTRIBUTED.value:
    cluster.join(
      *(COORDINATOR.value, PROCESSES.value, PROCESS.value),
      timeout=SILENCE.value,
    )
  complete = Run(WORKDIR.value, config).train(
    proceed=CONTINUE.value, wandb=WANDB.value
  )
  if complete and jax.process_index() == 0:
    print(f"report: {WORKDIR.value}/report/index.html")


def start():
  cli.run(main, takes_config=True)


if __name__ == "__main__":
  start()
