"""Draws labelled synthetic patients from a run's newest checkpoint.

  python launch/sample.py --workdir runs/quickstart \
    --counts Asian=64,Black=64 --out synthetic

Writes npz files of the current FairSeg release, data_summary.csv,
manifest.jsonl and a contact sheet. The same command goes on where it stopped.
"""

import cli
from absl import flags
from ml_collections import config_flags

from fairdiff_jax import config as configs
from fairdiff_jax.synthesis import export

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "If given, must be the run's config."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
COUNTS = flags.DEFINE_list("counts", None, "Cases of each group: Asian=64,...")
OUT = flags.DEFINE_string("out", None, "Directory to write to.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of the cases.")
flags.mark_flags_as_required(["workdir", "counts", "out"])


def main(_):
  configs.require(WORKDIR.value, CONFIG.value)
  export.export(WORKDIR.value, OUT.value, COUNTS.value, seed=SEED.value)
  print(f"contact sheet: {OUT.value}/contact_sheet.png")


if __name__ == "__main__":
  cli.run(main)
