"""Compares runs by method; runs that differ only in their seed are one method.

  python launch/compare.py runs/baseline_0 runs/baseline_1 runs/variance_0 \
    runs/variance_1 --names baseline,variance --out comparison

Tests are against the method of the first run. The runs must have reports
(launch/evaluate.py) on the same test cases, by the same definitions; their
baselines are left out.
"""

import cli
from absl import flags

from fairdiff_jax.evaluation.compare import compare_runs, group_runs

OUT = flags.DEFINE_string("out", "comparison", "Directory to write.")
NAMES = flags.DEFINE_list("names", None, "Of the methods, by their first runs.")


def main(argv):
  compare_runs(group_runs(argv[1:], NAMES.value), OUT.value)
  print(f"comparison: {OUT.value}/index.html")


if __name__ == "__main__":
  cli.run(main)
