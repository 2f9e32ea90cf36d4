"""Compares runs by method; runs that differ only in their seed are one method.

  fairdiff compare runs/study/erm_* runs/study/febs_* \\
    --reference erm --out comparison

What a seed changes, its number, the training patients and where they lie, makes
no other method. Methods are called as their runs' directories, or by the fields
in which they differ. The runs must have reports (fairdiff evaluate) on the
same test cases, by the same definitions; their baselines are left out.
"""

from absl import flags
from fairdiff_jax.launch import cli

OUT = flags.DEFINE_string("out", "comparison", "Directory to write.")
NAMES = flags.DEFINE_list("names", None, "Of the methods, by their first runs.")
REFERENCE = flags.DEFINE_string(
  "reference", None, "Method to test the others against; default the first."
)
CEILING = flags.DEFINE_string(
  "ceiling", None, "Method that is the best to hope for, for shares of the way."
)


def main(runs):
  from fairdiff_jax.evaluation.compare import compare_runs, group_runs

  compare_runs(
    group_runs(runs, NAMES.value),
    OUT.value,
    reference=REFERENCE.value,
    ceiling=CEILING.value,
  )
  print(f"comparison: {OUT.value}/index.html")


def start():
  cli.run(main, arguments="directories of the runs")


if __name__ == "__main__":
  start()
