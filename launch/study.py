"""Compares methods over seeds, on one page; the same command resumes.

  fairdiff study --config own:small --workdir study \\
    --config.data.source=cases.csv --config.data.attribute=sex \\
    --methods repeat_sample,group_dro,joint --seeds 3

Methods are `joint`, the config as it is; `repeat_sample`, what one would do
without generators; and every fairness.method, on the segmenter alone. Their
settings are the config's. Without a config it is the study on phantoms, with
settings chosen on others, which takes hours, or a look at some of it:

  fairdiff study --workdir runs/study
  fairdiff study --workdir runs/look --small

Several starts share the runs, on cores or GPUs of their own; the last one
compares:

  for gpu in 0 1 2 3; do
    CUDA_VISIBLE_DEVICES=$gpu fairdiff study --workdir runs/study &
  done; wait
"""

from absl import flags
from fairdiff_jax.launch import cli

WORKDIR = flags.DEFINE_string(
  "workdir", "runs/study", "Directory of the study."
)
SEEDS = flags.DEFINE_integer(
  "seeds", None, "Number of seeds; default 3, of --small 2.", lower_bound=1
)
SMALL = flags.DEFINE_bool(
  "small", False, "Of the phantom study four rows of few steps, a look."
)
METHODS = flags.DEFINE_list(
  "methods",
  None,
  "With a config erm,repeat_sample,group_dro,febs,joint, or others; without,"
  " all of the phantom study, or some by the names of their runs.",
)


def main(_):
  config = cli.config(optional=True)
  if config is not None and SMALL.value:
    raise ValueError("--small is of the study on phantoms: leave --config out")

  from fairdiff_jax import study

  seeds = SEEDS.value or (2 if SMALL.value else 3)
  try:
    if config is None:
      page = _phantoms(study, seeds)
    else:
      methods = METHODS.value or study.SWEPT
      page = study.sweep(config, WORKDIR.value, methods=methods, seeds=seeds)
  except (study.Stopped, study.Busy) as left:
    print(left)
  else:
    print(f"comparison: {page}")


def _phantoms(study, seeds):
  from fairdiff_jax.configs import phantom, phantom_study

  methods = phantom_study.SMALL if SMALL.value else phantom_study.METHODS
  if METHODS.value:
    methods = study.pick(methods, METHODS.value)
  return study.run(
    phantom.get_config(),
    WORKDIR.value,
    methods=methods,
    choices=phantom_study.CHOICES,
    shared=phantom_study.SHARED,
    seeds=seeds,
    reference=phantom_study.REFERENCE,
    ceiling=phantom_study.CEILING,
  )


def start():
  cli.run(main, takes_config=True)


if __name__ == "__main__":
  start()
