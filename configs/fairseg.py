"""Harvard-FairSeg, or any directory of files of its form, in pixel space.

  python launch/prepare.py --config configs/fairseg.py --workdir runs/fairseg \
    --config.data.source=/data/FairSeg
  python launch/train.py --config configs/fairseg.py --workdir runs/fairseg \
    --config.data.source=/data/FairSeg

Variants: '' (256 x 256, for accelerators), 'small' (128 x 128, so that a few
dozen cases train on a CPU in some minutes).
"""

from configs.base import base_config, shrink_points


def get_config(variant: str = ""):
  if variant not in ("", "small"):
    raise ValueError(f"unknown variant {variant!r} of fairseg; use '' or small")
  config = base_config()
  config.image.channels = (64, 128, 256)
  config.image.attention = (False, True, True)
  config.image.num_blocks = 2
  config.segmenter.channels = (32, 64, 128, 256)
  config.objective.agreement = 0.1
  config.fairness.method = "variance"
  config.train.steps = 30_000
  config.train.points = (0, 30_000)
  config.train.image = (5_000, 30_000)
  config.train.segmenter = (15_000, 30_000)
  config.train.generation_batch = config.train.segmentation_batch = 32
  config.bank.every = 5_000
  config.checkpoint.every = 1_000
  if variant == "small":
    config.data.size = (128, 128)
    shrink_points(config)
    config.image.channels = (48, 64)
    config.image.attention = (False, True)
    config.image.num_blocks = 1
    config.image.patch = 8
    config.segmenter.channels = (16, 32, 48)
    config.segmenter.patch = 4
    config.train.steps = 1_700
    config.train.points = (0, 1_700)
    config.train.image = (700, 1_700)
    config.train.segmenter = (1_100, 1_700)
    config.train.generation_batch = config.train.segmentation_batch = 16
    config.bank.every = 300
    config.checkpoint.every = 300
  return config.lock()
