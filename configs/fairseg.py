"""Harvard-FairSeg, or any directory of files of its form.

  fairdiff prepare --config fairseg --workdir runs/fairseg \
    --config.data.source=/data/FairSeg
  fairdiff train --config fairseg --workdir runs/fairseg \
    --config.data.source=/data/FairSeg

Variants: '' (256 x 256, for accelerators), 'small' (128 x 128, so that a few
dozen cases train on a CPU in some minutes), 'sd15' (images by Stable Diffusion
1.5 and a ControlNet, 512 x 512), 'samed' and 'transunet' (these segmenters
alone, on real cases, as published). The last three start from weights:
--config.image.weights=DIR, --config.segmenter.weights=FILE.
"""

from fairdiff_jax.configs.phantom import blend_by_risk, shrink_points

from fairdiff_jax.config import defaults


def get_config(variant: str = ""):
  if variant not in VARIANTS:
    raise ValueError(
      f"unknown variant {variant!r} of fairseg; use one of"
      f" {', '.join(map(repr, VARIANTS))}"
    )
  config = defaults()
  config.image.channels = (64, 128, 256)
  config.image.attention = (False, True, True)
  config.image.num_blocks = 2
  config.image.patch = 4
  config.segmenter.channels = (32, 64, 128, 256)
  config.objective.agreement = 0.1
  config.train.steps = 30_000
  config.train.image = (5 / 30, 1.0)
  config.train.segmenter = (0.5, 1.0)
  config.train.generation_batch = config.train.segmentation_batch = 32
  config.bank.every = 5_000
  config.checkpoint.every = 1_000
  VARIANTS[variant](config)
  return config.lock()


def _small(config):
  config.data.validation = 0.2
  config.evaluation.every = 100
  config.data.size = (128, 128)
  shrink_points(config)
  config.image.channels = (32, 48, 64)
  config.image.attention = (False, False, True)
  config.image.num_blocks = 1
  config.segmenter.channels = (16, 32, 48)
  config.segmenter.patch = 4
  config.train.steps = 5_000
  config.train.image = (0.2, 1.0)
  config.train.segmenter = (0.8, 1.0)
  config.train.generation_batch = config.train.segmentation_batch = 16
  config.bank.every = 250
  blend_by_risk(config)
  config.checkpoint.every = 500


def _sd15(config):
  config.data.size = (512, 512)  # plain resize
  config.image.network = "stable_diffusion"
  config.image.cache_latents = True
  config.image.dtype = "bfloat16"  # the paper: float32
  config.image.intensity_prior = False  # latents have none
  config.image.schedule = "scaled_linear"
  config.image.beta_start = 0.00085
  config.image.beta_end = 0.012
  config.image.prediction = "eps"
  config.image.dropout = 0.0  # one constant prompt
  config.image.sample_steps = 20
  config.image.spacing = "leading"
  config.image.eta = 0.0
  config.image.guidance = 9.0
  config.optimizer.image.learning_rate = 1e-5
  config.optimizer.image.decay = "constant"
  config.optimizer.image.warmup_steps = 0
  config.optimizer.image.weight_decay = 1e-2
  config.optimizer.image.clip_norm = 0.0
  config.objective.agreement = 0.0  # through the decoder, it costs most
  config.train.generation_batch = 4
  config.train.segmentation_batch = 16
  config.bank.batch_size = 16


def _segmenter_alone(config):
  config.fairness.method = "erm"
  config.fairness.strategy = "none"
  config.train.points = config.train.image = (0, 0)
  config.train.segmenter = (0.0, 1.0)
  config.baseline = False


def _samed(config):
  """As in FairDiff's scripts: the centre 512 x 512 at its native resolution.

  Logits of 128 x 128 are enlarged to 512 x 512, and measured there, as in
  print. FairDiff's figures: evaluation.empty=published; FairSeg's:
  evaluation.equity=fairseg_sum besides.
  """
  _segmenter_alone(config)
  config.data.augment = "light"
  config.data.crop = config.data.size = (512, 512)
  config.segmenter.network = "samed"
  config.segmenter.cross_entropy_weight = 0.2
  config.segmenter.dice_weight = 0.8
  config.optimizer.segmenter.learning_rate = 5e-3
  config.optimizer.segmenter.decay = "poly"
  config.optimizer.segmenter.warmup_steps = 250
  config.optimizer.segmenter.weight_decay = 0.1
  config.optimizer.segmenter.clip_norm = 0.0
  config.train.steps = 30_400  # 160 epochs of 8,000 cases
  config.train.segmentation_batch = 42


def _transunet(config):
  """As in FairDiff's scripts: the centre 512 x 512, resized to 224 x 224.

  Predictions are measured at 224 x 224, as in print (there against masks that
  are resized by nearest pixel, here by area); definitions as for SAMed.
  """
  _segmenter_alone(config)
  config.data.augment = "light"
  config.data.crop = (512, 512)
  config.data.size = (224, 224)
  config.segmenter.network = "transunet"
  config.segmenter.image_size = 224
  config.segmenter.transunet.dropout_rate = 0.1
  config.optimizer.segmenter.kind = "sgd"
  config.optimizer.segmenter.learning_rate = 0.01
  config.optimizer.segmenter.decay = "poly"
  config.optimizer.segmenter.warmup_steps = 0
  config.optimizer.segmenter.clip_norm = 0.0
  config.train.steps = 100_000  # 300 epochs of 8,000 cases
  config.train.segmentation_batch = 24


VARIANTS = {
  "": lambda config: None,
  "small": _small,
  "sd15": _sd15,
  "samed": _samed,
  "transunet": _transunet,
}
