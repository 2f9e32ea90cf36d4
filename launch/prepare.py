r"""Prepares a data set, or checks a directory of npz files.

  python launch/prepare.py --config configs/fairseg.py --workdir runs/first \
    --config.data.source=/data/FairSeg
  python launch/prepare.py --check /data/FairSeg
"""

import os

import cli
from absl import flags
from ml_collections import config_flags

from fairdiff_jax.data import fairseg

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
  config = _CONFIG.value.data
  if not (config.directory or _WORKDIR.value):
    raise ValueError("Give --workdir, or --config.data.directory.")
  directory = config.directory or os.path.join(_WORKDIR.value, "data")
  print(fairseg.prepare(config, directory))
  print(f"Prepared in {directory}")
  return 0


if __name__ == "__main__":
  cli.run(main)
