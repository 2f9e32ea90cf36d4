"""Evaluates a run from its newest checkpoint and writes its report.

  python launch/evaluate.py --workdir runs/quickstart

By other definitions than the run's own:

  python launch/evaluate.py --workdir runs/quickstart \\
    --config.evaluation.equity=fairseg_sum
"""

from absl import flags
from fairdiff_jax.launch import cli

from fairdiff_jax import config as configs

WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
OUT = flags.DEFINE_string("out", None, "Report; default <workdir>/report.")
flags.mark_flag_as_required("workdir")


def main(_):
  configs.load(WORKDIR.value)  # says it where there is no run
  config = cli.config()
  configs.require(WORKDIR.value, config)
  from fairdiff_jax.evaluation.evaluate import evaluate

  directory = OUT.value or f"{WORKDIR.value}/report"
  evaluate(WORKDIR.value, directory, config.evaluation)
  print(f"report: {directory}/index.html")


def start():
  cli.run(main, takes_config=True)


if __name__ == "__main__":
  start()
