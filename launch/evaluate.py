"""Evaluates a run, from its best checkpoint, and writes its report.

  fairdiff evaluate --workdir runs/quickstart

By other definitions than the run's own, or on the test cases of another site,
by the groups found there, which `fairdiff prepare` has prepared:

  fairdiff evaluate --workdir runs/quickstart \\
    --config.evaluation.equity=fairseg_sum
  fairdiff evaluate --workdir runs/quickstart --data prepared/elsewhere
"""

from absl import flags
from fairdiff_jax.launch import cli

from fairdiff_jax import config as configs

WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
CHECKPOINT = flags.DEFINE_string(*cli.CHECKPOINT)
DATA = flags.DEFINE_string(
  "data", None, "Prepared directory of another site; default the run's own."
)
OUT = flags.DEFINE_string(
  "out",
  None,
  "Report; default <workdir>/report, of other data <workdir>/external/NAME.",
)
flags.mark_flag_as_required("workdir")


def main(_):
  configs.load(WORKDIR.value)  # says it where there is no run
  config = cli.config()
  configs.require(WORKDIR.value, config)
  from fairdiff_jax.run import Run

  run = Run(WORKDIR.value, config, checkpoint=CHECKPOINT.value)
  print(f"checkpoint: {run.trained}")
  run.evaluate(DATA.value, OUT.value)
  directory = OUT.value or run.report(DATA.value)
  print(f"report: {directory}/index.html")


def start():
  cli.run(main, takes_config=True)


if __name__ == "__main__":
  start()
