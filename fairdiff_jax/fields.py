"""The fields of a config: what each is, its default, and what it must be.

Every choice that a run has stands here once, with what it means. What fields
mean together is `config.check`'s to say.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple


class Field(NamedTuple):
  """One field of a config.

  Attributes:
    default: its value where a recipe gives none.
    allowed: what it must be, in words that follow 'must be'.
    holds: whether a value is that.
    doc: what the field is.
  """

  default: Any
  allowed: str
  holds: Callable[[Any], bool]
  doc: str


def _is_whole(value):
  return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value):
  number = isinstance(value, int | float) and not isinstance(value, bool)
  return number and math.isfinite(value)


def _bounded(kind: str, is_kind, default, doc, low, high) -> Field:
  allowed = f"{kind} of at least {low:g}"
  if high is not None:
    allowed = f"{kind} from {low} to {high}"
  most = math.inf if high is None else high
  return Field(default, allowed, lambda x: is_kind(x) and low <= x <= most, doc)


def _whole(default: int, doc: str, low: int = 1, high: int | None = None):
  return _bounded("a whole number", _is_whole, default, doc, low, high)


def _seed(default: int, doc: str):
  return _whole(default, doc, 0, 2**32 - 1)


def _real(default: float, doc: str, low: float = 0, high: float | None = None):
  return _bounded("a number", _is_real, default, doc, low, high)


def _positive(default: float, doc: str):
  return Field(
    default, "a number above 0", lambda x: _is_real(x) and x > 0, doc
  )


def _choice(default: str, doc: str, *others: str):
  names = (default, *others)
  allowed = f"one of {', '.join(map(repr, names))}"
  return Field(default, allowed, lambda x: x in names, doc)


def _flag(default: bool, doc: str):
  return Field(default, "True or False", lambda x: isinstance(x, bool), doc)


def _text(default: str, doc: str):
  return Field(default, "text", lambda x: isinstance(x, str), doc)


def _wholes(default: Sequence[int], doc: str, least: int = 1):
  """Any number of whole numbers of at least 1, but no fewer than `least`."""
  allowed = "whole numbers of at least 1, such as (64, 96)"

  def holds(x):
    return len(x) >= least and all(_is_whole(n) and n > 0 for n in x)

  return Field(default, allowed, lambda x: _is_several(x) and holds(x), doc)


def _is_several(value):
  return isinstance(value, tuple | list)


def _size(default: Sequence[int], doc: str, *, may_be_empty: bool = False):
  allowed = "(rows, columns), at least 8 of each"
  if may_be_empty:
    allowed += ", or ()"

  def holds(x):
    if not _is_several(x):
      return False
    sides = len(x) == 2 and all(_is_whole(n) and n >= 8 for n in x)
    return sides or (may_be_empty and not len(x))

  return Field(default, allowed, holds, doc)


def _flags(default: Sequence[bool], doc: str):
  return Field(
    default,
    "True or False for each level, such as (False, True)",
    lambda x: _is_several(x) and all(isinstance(b, bool) for b in x),
    doc,
  )


def _names(default: Sequence[str], doc: str):
  return Field(
    default,
    "names",
    lambda x: _is_several(x) and all(isinstance(n, str) for n in x),
    doc,
  )


def _span(doc: str):
  def holds(x):
    if not _is_several(x) or len(x) != 2 or not all(map(_is_real, x)):
      return False
    if any(isinstance(n, float) for n in x):
      return 0 <= x[0] <= x[1] <= 1
    return 0 <= x[0] <= x[1]

  return Field(
    (0.0, 1.0),
    "(from, to): whole steps, or shares of train.steps such as (0.5, 1.0); 'to'"
    " not before 'from'; (0, 0) for never",
    holds,
    doc,
  )


def _steps(doc: str):
  def holds(x):
    pair = _is_several(x) and len(x) == 2 and all(map(_is_whole, x))
    return pair and 0 <= x[0] <= x[1]

  return Field(
    (0, 0),
    "(from, to): whole steps, such as (100, 105); 'to' not before 'from';"
    " (0, 0) for none",
    holds,
    doc,
  )


def _rules(default, doc):
  def holds(x):
    try:
      return all(re.compile(p) and r in ("fsdp", "replicate") for p, r in x)
    except (TypeError, ValueError, re.error):
      return False

  return Field(
    default, "pairs (pattern, rule), the rule 'fsdp' or 'replicate'", holds, doc
  )


def _optimizer(learning_rate: float):
  return dict(
    kind=_choice("adamw", "with momentum 0.9 for sgd", "sgd"),
    learning_rate=_positive(learning_rate, "peak"),
    decay=_choice("cosine", "to 0; poly has power 0.9", "poly", "constant"),
    warmup_steps=_whole(50, "linear, from 0", 0),
    weight_decay=_real(1e-4, "decoupled for adamw"),
    clip_norm=_real(1.0, "of the network's gradient; 0 = none"),
    accumulate=_whole(1, "steps whose gradients make one update"),
  )


FIELDS: dict[str, Any] = dict(
  seed=_seed(0, "of parameters, noise, shuffling and synthetic cases"),
  data=dict(
    source=_text("", "a table (.csv), a directory of npz files, or 'phantom'"),
    directory=_text("", "prepared data; '' = <workdir>/data"),
    validation=_real(
      0.0,
      "share of training cases held out, by patient, where the source has no"
      " validation cases",
      0,
      0.5,
    ),
    crop=_size((), "of the centre to use; () = all of it", may_be_empty=True),
    size=_size((256, 256), "that it is resized to"),
    num_points=_whole(512, "points per cloud", 8),
    split=_text("use", "the csv's column, or a file listing training cases"),
    domain=_text(
      "",
      "what is segmented: a json file; '' = domain.json beside the csv, or"
      " fundus",
    ),
    attribute=_text(
      "race", "sensitive attribute, several: 'race+gender', bands: 'age:50,65'"
    ),
    words=Field(
      (),
      "words by part of data.attribute",
      lambda x: _is_several(x) and all(map(_is_several, x)),
      "its groups' words; found when the run starts, not given",
    ),
    min_cases=_whole(
      0, "groups with fewer training cases become one, 'Other'", 0
    ),
    pooled=_names((), "those groups; found when the run starts, not given"),
    augment=_choice(
      "strong",
      "of the segmenter's cases: shapes, tones and noise, or lightly shapes"
      " alone; generators see upright ones",
      *("none", "light"),
    ),
    allow_synthetic=_flag(
      False, "training cases may be synthetic ones, of an export"
    ),
    phantom=dict(
      train=_whole(100, "training cases, in Harvard-FairSeg's proportions"),
      balanced=_flag(False, "as many of every group instead"),
      added=_whole(0, "more training cases of every group but the largest", 0),
      test=_whole(150, "test cases of every group"),
      seed=_seed(0, "of the training phantoms"),
      test_seed=_seed(0, "of the test phantoms"),
    ),
  ),
  points=dict(
    num_points=_whole(512, "points per generated cloud", 8),
    latent_dim=_whole(256, "size of the shape latent", 2),
    encoder_widths=_wholes((128, 128, 256, 512), "shared per-point layers"),
    head_widths=_wholes((256, 128), "posterior's mean and variance heads"),
    flow_depth=_whole(14, "coupling layers of the prior", 0),
    flow_width=_whole(256, "width of a coupling net"),
    decoder_widths=_wholes((128, 256, 512, 256, 128), "pointwise denoiser"),
    num_steps=_whole(100, "diffusion steps T"),
    sample_steps=_whole(20, "sampling steps; T where that is less"),
    beta_start=_positive(1e-4, "linear schedule"),
    beta_end=_positive(0.02, "linear schedule"),
    kl_weight=_real(1e-4, "of the posterior against the prior"),
  ),
  image=dict(
    network=_choice(
      "unet", "in pixel space, or in latents", "stable_diffusion"
    ),
    weights=_text("", "directory of stable_diffusion's networks and prompts"),
    stable_diffusion=dict(  # the defaults are version 1.5's
      block_out_channels=_wholes((320, 640, 1280, 1280), "per level"),
      layers_per_block=_whole(2, "residual blocks per level"),
      attention_head_dim=_whole(8, "heads of every attention"),
      cross_attention_dim=_whole(768, "of the prompt's tokens"),
      norm_num_groups=_whole(32, "of group normalisations"),
      hint_channels=_wholes((16, 32, 96, 256), "of the ControlNet's hint stem"),
      latent_channels=_whole(4, "of the autoencoder"),
      autoencoder_channels=_wholes((128, 256, 512, 512), "per level"),
      autoencoder_layers=_whole(2, "residual blocks per level"),
    ),
    unet=_choice("unlocked", "what of it learns", "decoder", "locked"),
    cache_latents=_flag(False, "encode training images once, not augmented"),
    only_mid_control=_flag(False, "the ControlNet steers the middle alone"),
    dtype=_choice("float32", "of stable_diffusion's computation", "bfloat16"),
    remat=_flag(False, "compute its blocks again in the backward pass"),
    conditioning=_choice(
      "concat", "the hint as input channels, or as a ControlNet", "controlnet"
    ),
    channels=_wholes((32, 48, 64), "per level"),
    num_blocks=_whole(1, "residual blocks per level"),
    attention=_flags((False, False, True), "which levels attend"),
    num_heads=_whole(4, "of attention"),
    patch=_whole(2, "space-to-depth factor at the input"),
    hint_channels=_wholes((32,), "of the ControlNet's hint stem", 0),
    intensity_prior=_flag(True, "diffuse log brightness less intensities"),
    schedule=_choice("cosine", "of the noise", "linear", "scaled_linear"),
    num_steps=_whole(1000, "diffusion steps T"),
    beta_start=_positive(1e-4, "of linear schedules"),
    beta_end=_positive(0.02, "of linear schedules"),
    prediction=_choice("v", "what the network predicts", "eps", "x0"),
    min_snr=_real(0.0, "gamma of Min-SNR's weight; 0 = none"),
    dropout=_real(0.1, "of the condition, for guidance", 0, 1),
    sample_steps=_whole(20, "sampling steps"),
    solver=_choice("ddim", "dpm++2m has no eta", "dpm++2m"),
    spacing=_choice("even", "of sampling times", "leading", "linspace"),
    eta=_real(1.0, "1 = ancestral, 0 = DDIM", 0, 1),
    guidance=_real(1.0, "classifier-free guidance; 1 = none"),
  ),
  segmenter=dict(
    network=_choice("small_unet", "the architecture", "samed", "transunet"),
    weights=_text("", "to start from: a SAM, a ViT (.npz) or TransUNet (.pth)"),
    channels=_wholes((16, 32, 48), "per level of the small U-Net"),
    patch=_whole(2, "space-to-depth factor at its input"),
    image_size=_whole(512, "side of the images of the other two", 16),
    samed=dict(  # the defaults are ViT-B's
      rank=_whole(4, "of the changes to queries and values"),
      embed_dim=_whole(768, "channels of the image encoder"),
      depth=_whole(12, "its blocks"),
      num_heads=_whole(12, "of its attention"),
      global_blocks=Field(
        (2, 5, 8, 11),
        "numbers of blocks",
        lambda x: _is_several(x) and all(_is_whole(i) and i >= 0 for i in x),
        "blocks that attend to all positions",
      ),
      window=_whole(14, "side of the others' windows"),
      decoder_dim=_whole(256, "channels of the mask decoder"),
      decoder_depth=_whole(2, "its blocks"),
      decoder_heads=_whole(8, "of its attention"),
      decoder_mlp_dim=_whole(2048, "of its blocks"),
    ),
    transunet=dict(  # the defaults are ViT-B's
      stages=_wholes((3, 4, 9), "units of the ResNet's stages; () = none", 0),
      width=_whole(64, "of its first convolution"),
      hidden_dim=_whole(768, "channels of the transformer"),
      mlp_dim=_whole(3072, "of its blocks"),
      num_heads=_whole(12, "of its attention"),
      num_layers=_whole(12, "its blocks"),
      decoder_channels=_wholes((512, 256, 128, 64, 16), "per block"),
      dropout_rate=_real(0.0, "in the transformer", 0, 1),
    ),
    cross_entropy_weight=_real(0.5, "of the risk"),
    dice_weight=_real(0.5, "of the risk"),
  ),
  objective=dict(
    points=_real(1.0, "weight of the mask generator's risk"),
    image=_real(1.0, "weight of the image generator's risk"),
    segmenter=_real(1.0, "weight of the segmenter's empirical risk"),
    agreement=_real(0.0, "weight of: the denoised image must show its mask"),
  ),
  fairness=dict(
    method=_choice(
      "erm",
      "what is added to the segmenter's risk",
      *("variance", "gap", "worst", "equity", "mmd", "group_dro", "febs"),
      *("febs_published", "adversarial"),
    ),
    weight=_real(1.0, "lambda"),
    temperature=_positive(0.1, "tau of 'worst'"),
    step_size=_real(0.01, "eta of 'group_dro'"),
    adjustment=_real(0.0, "C of 'group_dro'"),
    gamma=_real(1.0, "exponent of 'febs'"),
    adversary_width=_whole(64, "hidden units of 'adversarial'"),
    decay=_real(0.9, "of the groups' running risks", 0, 1),
    fill_absent=_flag(False, "running risks stand in for absent groups"),
    strategy=_choice(
      "equal_scale", "what an epoch holds", "repeat_sample", "none"
    ),
    real_share=_real(0.5, "least real share of a group; 0 = published", 0, 1),
    tilt=_real(0.0, "of quotas to groups of high risk: share ~ risk^tilt"),
    group_size=_whole(0, "N, cases per group; 0 = as many as the largest", 0),
  ),
  bank=dict(
    every=_whole(500, "steps between refills; 0 = filled once", 0),
    masks=_choice(
      "generated", "or real ones like the group's, or half each", "real", "both"
    ),
    strength=_real(
      1.0,
      "share of the sampling steps; below 1 from warped real images of the"
      " group",
      *(0, 1),
    ),
    patients=_whole(1, "real ones in such an image; 2 are blended", 1, 2),
    candidates=_whole(
      1,
      "drawn for each case that is kept, those of the segmenter's highest risk",
    ),
    batch_size=_whole(64, "cases generated at a time"),
    harmonics=_whole(
      0, "of the smooth curve fitted to each contour; 0 = as drawn", 0
    ),
    min_solidity=_real(
      0.9, "masks less convex than this are drawn again", 0, 1
    ),
    max_attempts=_whole(10, "draws of a mask before giving up"),
  ),
  train=dict(
    steps=_whole(10_000, "in all"),
    generation_batch=_whole(16, "real cases that teach the generators"),
    segmentation_batch=_whole(16, "cases of the mixture for the segmenter"),
    generation_power=_real(0.75, "generators see group g as n_g^-power"),
    points=_span("when phi, the mask generator, learns"),
    image=_span("when psi, the image generator, learns"),
    segmenter=_span("when theta, the segmenter, learns"),
    ema_decay=_real(0.995, "of the parameters that sample and predict", 0, 1),
  ),
  optimizer=dict(
    points=_optimizer(2e-3),
    image=_optimizer(2e-3),
    segmenter=_optimizer(2e-3),
    adversary=_optimizer(2e-3),
  ),
  parallel=dict(
    compile=_choice("jit", "or the compatibility switch", "pmap"),
    fsdp=_whole(1, "devices that share one copy of the parameters"),
    rules=_rules(
      (("(params|ema|opt_state)/.*", "fsdp"),), "what is split: first match"
    ),
  ),
  checkpoint=dict(
    every=_whole(500, "steps between checkpoints; 0 = one at the end", 0),
    keep=_whole(2, "newest checkpoints kept"),
  ),
  log=dict(
    every=_whole(20, "steps between log lines; 0 = one at the end", 0),
    profile=_steps("steps that are traced, in the run's directory profile/"),
  ),
  baseline=_flag(True, "also train the segmenter alone, on real data (ERM)"),
  evaluation=dict(
    every=_whole(
      0,
      "steps of the segmenter between validations, whose best checkpoint is"
      " kept; 0 = never",
      0,
    ),
    patience=_whole(
      0, "validations without a better one that end the run; 0 = never", 0
    ),
    batch_size=_whole(64, "cases predicted at a time"),
    empty=_choice("exclude", "what an absent structure counts", "published"),
    equity=_choice(
      "fairdiff_std",
      "definition of equity scaling",
      *("fairseg_sum", "population_std"),
    ),
    synthetic_per_group=_whole(64, "synthetic cases in the report", 0),
    features=_choice(
      "segmenter",
      "whose features the report compares: the run's, or published networks",
      *("inception", "resnet50"),
    ),
    features_weights=_text("", "file of inception's or resnet50's weights"),
  ),
)


def flatten(node: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
  """The values of nested mappings, by dotted name."""
  for key, value in node.items():
    if isinstance(value, Mapping):
      yield from flatten(value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}", value


BY_NAME: dict[str, Field] = dict(flatten(FIELDS))
