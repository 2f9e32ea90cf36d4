"""Prepares a data set, or checks a table or a directory of npz files.

  fairdiff prepare --config fairseg --workdir runs/first \\
    --config.data.source=/data/FairSeg
  fairdiff prepare --check /data/FairSeg

A run in --workdir knows its config from then on: `fairdiff train --workdir` is
all it takes. With image.cache_latents=True and image.weights the training
images are encoded too, which training would else do when it starts.
"""

from absl import flags
from fairdiff_jax.launch import cli

from fairdiff_jax import config as configs

WORKDIR = flags.DEFINE_string(
  "workdir", None, "Work directory; holds the data if config.data.directory=''."
)
CHECK = flags.DEFINE_string(
  "check",
  None,
  "Only report on this table or directory of npz files; writes nothing.",
)


def main(_):
  if CHECK.value is None:
    config = cli.config()
    if not (config.data.directory or WORKDIR.value):
      raise ValueError("give --workdir, or --config.data.directory")
  from fairdiff_jax.data import prepare, storage
  from fairdiff_jax.training import latents
  from fairdiff_jax.training.mesh import make_mesh

  if CHECK.value is not None:
    report = prepare.check(CHECK.value)
    print(report)
    return 0 if report.usable else 1
  directory = configs.data_directory(config, WORKDIR.value or "")
  print(prepare.prepare(config.data, directory))
  print(f"Prepared in {directory}")
  if WORKDIR.value:
    configs.plan(WORKDIR.value, config)
    print(f"Next: fairdiff train --workdir {WORKDIR.value}")
  if latents.cached_shape(config) and config.image.weights:
    cases = storage.load(directory, "train")
    latents.cached_latents(config, make_mesh(), cases, directory)
  return 0


def start():
  cli.run(main, takes_config=True)


if __name__ == "__main__":
  start()
