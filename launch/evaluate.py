r"""Evaluates a run from its newest checkpoint and writes its report.

  python launch/evaluate.py --workdir runs/quickstart

With the run's config, by other definitions than the run's own:

  python launch/evaluate.py --workdir runs/quickstart \
    --config configs/phantom.py --config.evaluation.equity=fairseg_sum
"""

import cli
from absl import flags
from ml_collections import config_flags

from fairdiff_jax import config as configs
from fairdiff_jax.evaluation.evaluate import evaluate

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "The run's config, to evaluate otherwise."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
OUT = flags.DEFINE_string("out", None, "Report; default <workdir>/report.")
flags.mark_flag_as_required("workdir")


def main(_):
  configs.require(WORKDIR.value, CONFIG.value)
  directory = OUT.value or f"{WORKDIR.value}/report"
  evaluation = CONFIG.value and CONFIG.value.evaluation
  evaluate(WORKDIR.value, directory, evaluation)
  print(f"report: {directory}/index.html")


if __name__ == "__main__":
  cli.run(main)
