"""Evaluates a run from its newest checkpoint and writes its report.

python launch/evaluate.py --workdir runs/quickstart
"""

import cli
from absl import flags
from ml_collections import config_flags

from fairdiff_jax import config as configs
from fairdiff_jax.evaluation.evaluate import evaluate

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "If given, must be the run's config."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
OUT = flags.DEFINE_string("out", None, "Report; default <workdir>/report.")
flags.mark_flag_as_required("workdir")


def main(_):
  configs.require(WORKDIR.value, CONFIG.value)
  directory = OUT.value or f"{WORKDIR.value}/report"
  evaluate(WORKDIR.value, directory)
  print(f"report: {directory}/index.html")


if __name__ == "__main__":
  cli.run(main)
