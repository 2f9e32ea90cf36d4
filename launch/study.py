"""Runs the phantom study: methods x seeds, one table; the same command resumes.

fairdiff study --workdir runs/study
"""

from absl import flags
from fairdiff_jax.launch import cli

WORKDIR = flags.DEFINE_string(
  "workdir", "runs/study", "Directory of the study."
)
SEEDS = flags.DEFINE_integer("seeds", 3, "Number of seeds.", lower_bound=1)


def main(_):
  from fairdiff_jax.configs import phantom, phantom_study

  from fairdiff_jax import study

  try:
    page = study.run(
      phantom.get_config(),
      WORKDIR.value,
      methods=phantom_study.METHODS,
      choices=phantom_study.CHOICES,
      shared=phantom_study.SHARED,
      seeds=SEEDS.value,
      reference=phantom_study.REFERENCE,
      ceiling=phantom_study.CEILING,
    )
  except study.Stopped as stopped:
    print(stopped)
  else:
    print(f"comparison: {page}")


def start():
  cli.run(main)


if __name__ == "__main__":
  start()
