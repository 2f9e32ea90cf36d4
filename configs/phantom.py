"""Made-up patients with Harvard-FairSeg's imbalance: runs anywhere, at once.

  fairdiff train --config phantom --workdir runs/quickstart

Variants: '' (the quickstart), 'smoke' (seconds; for tests).
"""

from ml_collections import ConfigDict

from fairdiff_jax.config import defaults

VARIANTS = ("", "smoke")


def get_config(variant: str = ""):
  if variant not in VARIANTS:
    raise ValueError(f"unknown variant {variant!r} of phantom; use '' or smoke")
  config = defaults()
  config.data.source = "phantom"
  config.data.size = (64, 64)
  config.data.phantom.train = 125
  config.data.validation = 0.2  # which leaves 100
  shrink_points(config)

  config.train.steps = 1_000
  config.train.points = (0.0, 0.5)
  config.train.image = (0.15, 0.5)
  config.train.segmenter = (0.25, 1.0)
  config.bank.every = 150
  blend_by_risk(config)
  config.checkpoint.every = 300
  config.evaluation.every = 100
  config.evaluation.synthetic_per_group = 32
  config.objective.agreement = 0.1
  if variant == "smoke":
    config.data.size = (32, 32)
    config.data.phantom.train = 24
    config.data.validation = 0.0  # no more than tests need
    config.evaluation.every = 0
    config.data.phantom.test = 2
    config.points.num_steps = 10
    config.image.channels = (8,)
    config.image.attention = (False,)
    config.image.hint_channels = (8,)
    config.image.sample_steps = 2
    config.segmenter.channels = (8,)
    config.data.num_points = config.points.num_points = 32
    config.points.encoder_widths = config.points.head_widths = (16,)
    config.points.latent_dim = 8
    config.points.flow_depth = 1
    config.points.flow_width = 16
    config.points.decoder_widths = (16,)
    config.train.steps = 8
    config.train.points = (0.0, 1.0)
    config.train.image = (0.0, 1.0)
    config.train.segmenter = (0.25, 1.0)
    config.train.generation_batch = config.train.segmentation_batch = 8
    config.bank.every = 4
    config.bank.masks = "both"  # so that every network is asked
    config.bank.strength = 0.1
    config.bank.batch_size = 8
    config.bank.min_solidity = 0.0
    config.checkpoint.every = 3
    config.log.every = 1
    config.evaluation.batch_size = 8
    config.evaluation.synthetic_per_group = 4
  return config.lock()


def blend_by_risk(config: ConfigDict):
  """Banks of real eyes in new shapes, those that the segmenter gets wrong."""
  config.bank.masks = "real"
  config.bank.strength = 0.0  # what a small generator adds gains nothing
  config.bank.patients = 2
  config.bank.candidates = 3


def shrink_points(config: ConfigDict):
  """A mask generator that learns in a thousand steps on a CPU."""
  config.data.num_points = config.points.num_points = 128
  config.points.latent_dim = 32
  config.points.encoder_widths = (64, 64, 128, 128)
  config.points.head_widths = (64, 64)
  config.points.flow_depth = 6
  config.points.flow_width = 64
  config.points.decoder_widths = (64, 128, 128, 64)
  config.points.kl_weight = 2e-3  # so that few steps fit the prior
  config.optimizer.points.learning_rate = 4e-3
  config.bank.harmonics = 2
