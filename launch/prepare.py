r"""Prepares a data set, or checks a directory of npz files.

  python launch/prepare.py --config configs/fairseg.py --workdir runs/first \
    --config.data.source=/data/FairSeg
  python launch/prepare.py --check /data/FairSeg

With image.cache_latents=True and image.weights it also encodes the training
images, which training would else do when it starts.
"""

import os

import cli
from absl import flags
from ml_collections import config_flags

from fairdiff_jax.data import fairseg
from fairdiff_jax.training import latents
from fairdiff_jax.training.mesh import make_mesh

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file.")
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Work directory; holds the data if config.data.directory=''."
)
_CHECK = flags.DEFINE_string(
  "check", None, "Only report on this directory of npz files; writes nothing."
)


def main(argv):
  if len(argv) > 1:
    raise ValueError(f"Unknown arguments: {' '.join(argv[1:])}")
  if _CHECK.value is not None:
    report = fairseg.check(_CHECK.value)
    print(report)
    return 0 if report.usable else 1
  if _CONFIG.value is None:
    raise ValueError("Give --config FILE, or --check DIRECTORY.")
  config = _CONFIG.value
  if not (config.data.directory or _WORKDIR.value):
    raise ValueError("Give --workdir, or --config.data.directory.")
  directory = config.data.directory or os.path.join(_WORKDIR.value, "data")
  print(fairseg.prepare(config.data, directory))
  print(f"Prepared in {directory}")
  if latents.cached_shape(config) and config.image.weights:
    cases = fairseg.load(directory, "train")
    latents.cached_latents(config, make_mesh(), cases, directory)
  return 0


if __name__ == "__main__":
  cli.run(main)
