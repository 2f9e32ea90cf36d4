"""Draws labelled synthetic patients from a run's best checkpoint.

  fairdiff sample --workdir runs/quickstart \\
    --counts Asian=64,Black=64 --out synthetic

Writes npz files of the current FairSeg release and data_summary.csv, or, of
patients in a table, PNG files and cases.csv; manifest.jsonl; a contact sheet.
The same command goes on where it stopped.
"""

from absl import flags
from fairdiff_jax.launch import cli

WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
CHECKPOINT = flags.DEFINE_string(*cli.CHECKPOINT)
COUNTS = flags.DEFINE_list(
  "counts", None, "Cases of each group, such as Asian=64,Black=64."
)
OUT = flags.DEFINE_string("out", None, "Directory to write to.")
SEED = flags.DEFINE_integer(
  "seed", 0, "Seed of the cases.", lower_bound=0, upper_bound=2**32 - 1
)
flags.mark_flags_as_required(["workdir", "counts", "out"])


def main(_):
  from fairdiff_jax.synthesis.export import export
  from fairdiff_jax.training.trained import restore

  trained = restore(WORKDIR.value, CHECKPOINT.value)
  print(f"checkpoint: {trained}")
  export(trained, OUT.value, COUNTS.value, seed=SEED.value)
  print(f"contact sheet: {OUT.value}/contact_sheet.png")


def start():
  cli.run(main)


if __name__ == "__main__":
  start()
