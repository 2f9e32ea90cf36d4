r"""Segmentation risk.

    l = w_ce CE + w_dice Dice
    Dice = mean_c 1 - (2 sum p_c y_c + s) / (sum p_c^2 + sum y_c^2 + s)

with sums over the pixels of one case, p the softmax, y the one-hot label and
s = 1e-5. The public FairDiff code sums over the batch as well, which gives no
loss per case and so no risk per group. Where a network's logits are coarser
than the image, labels are taken at their resolution.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fairdiff_jax.data.domain import FUNDUS, Domain
from fairdiff_jax.fairness.regularizers import dice_terms
from fairdiff_jax.models import samed
from fairdiff_jax.models.small_unet import SmallUNet
from fairdiff_jax.models.transunet import PATCH, TransUNet
from fairdiff_jax.objectives.task import Task, Variables
from fairdiff_jax.pretrained import fairdiff, graft, segment_anything, vit


class Network(NamedTuple):
  """A segmentation network.

  Attributes:
    init: as `Task.init`.
    apply: (variables, images [B, H, W, C] in [-1, 1], weight [B], keys [B],
      train) -> logits [B, h, w, C], features [B, F], batch statistics.
    num_features: F.
    load: as `Task.load`.
  """

  init: Callable[[jax.Array], Variables]
  apply: Callable[..., tuple[jax.Array, jax.Array, Any]]
  num_features: int
  load: Callable[[], Variables] | None = None


def cross_entropy(logits: jax.Array, label: jax.Array) -> jax.Array:
  """Mean over pixels [B] from logits [B, H, W, C], labels int32 [B, H, W]."""
  y = jax.nn.one_hot(label, logits.shape[-1])
  log_p = jax.nn.log_softmax(logits)
  return -jnp.mean(jnp.sum(y * log_p, axis=-1), axis=(1, 2))


def _small_unet(config, axis_name, domain) -> Network:
  """`config`: 'channels', 'patch'."""
  del axis_name
  module = SmallUNet(
    tuple(config.channels), num_classes=domain.num_classes, patch=config.patch
  )
  size = config.patch * 2 ** (len(config.channels) - 1)

  def init(key):
    image = jnp.zeros((1, size, size, domain.channels))
    return Variables(module.init(key, image)["params"], {}, {})

  def apply(variables, image, weight, keys, train):
    del weight, keys
    height, width = image.shape[1:3]
    # Deeper levels halve the image; sizes that do not divide are padded.
    pad = ((0, 0), (0, -height % size), (0, -width % size), (0, 0))
    logits, sown = module.apply(
      {"params": variables.params},
      jnp.pad(image, pad, "edge"),
      train,
      mutable="intermediates",
    )
    (features,) = sown["intermediates"]["features"]
    return logits[:, :height, :width], features, {}

  return Network(init, apply, config.channels[-1])


def _samed(config, axis_name, domain) -> Network:
  """`config`: 'image_size', 'weights', 'samed' (sizes)."""
  del axis_name
  module = samed.SAMed(
    num_classes=domain.num_classes - 1,
    image_size=config.image_size,
    **config.samed,
  )

  def assemble(variables):
    learnt, kept = samed.split(variables["params"])
    frozen = {"params": kept, "constants": variables["constants"]}
    return Variables(learnt, {}, frozen)

  def init(key):
    return assemble(module.init(key, _image(config, domain)))

  def apply(variables, image, weight, keys, train):
    del weight, keys, train
    params = {**variables.params, **variables.frozen["params"]}
    logits, features = module.apply(
      {"params": params, "constants": variables.frozen["constants"]},
      _check_size(image, config) / 2 + 0.5,
      method="segment",
    )
    return logits, features, {}

  def load():
    found, variables = segment_anything.load(
      config.weights,
      image_size=config.image_size,
      num_classes=domain.num_classes - 1,
      rank=module.rank,
    )
    size = vit.describe(found.embed_dim, found.depth)
    names = set(config.samed)
    if len(found.global_blocks) == found.depth:
      # Tables as large as the grid do not tell windows from none.
      names -= {"window", "global_blocks"}
    _require_sizes(config, size, found, module, names)
    return assemble(variables)

  return Network(init, apply, module.decoder_dim, load)


def _transunet(config, axis_name, domain) -> Network:
  """`config`: 'image_size', 'weights', 'transunet' (sizes)."""
  module = TransUNet(
    num_classes=domain.num_classes, axis_name=axis_name, **config.transunet
  )

  def init(key):
    variables = module.init(key, _image(config, domain))
    return Variables(variables["params"], variables["batch_stats"], {})

  def apply(variables, image, weight, keys, train):
    logits, updates = module.apply(
      {"params": variables.params, "batch_stats": variables.batch_stats},
      _check_size(image, config) / 2 + 0.5,
      train,
      weight,
      rngs=None if keys is None else {"dropout": keys[0]},
      mutable=["intermediates", "batch_stats"],
    )
    (features,) = updates["intermediates"]["features"]
    return logits, features, updates["batch_stats"]

  def load():
    if config.weights.endswith(".npz"):
      found, variables = vit.load(
        config.weights,
        image_size=config.image_size,
        num_classes=domain.num_classes,
        decoder_channels=module.decoder_channels,
      )
    else:
      arrays = graft.read(config.weights)
      with graft.naming(config.weights):
        found, variables = fairdiff.load_transunet(arrays, module.num_heads)
    size = vit.describe(found.hidden_dim, found.num_layers)
    names = set(config.transunet) - {"dropout_rate"}
    if not found.stages:
      names -= {"width"}
    _require_sizes(config, size, found, module, names)
    grid = variables["params"]["encoder"]["position_embedding"].shape[1]
    graft.require_sizes(
      f"{config.weights} does not fit segmenter.transunet",
      {"image_size": PATCH * math.isqrt(grid)},
      config,
      {"image_size": "segmenter.image_size"},
    )
    return Variables(variables["params"], variables["batch_stats"], {})

  return Network(init, apply, module.hidden_dim, load)


_NETWORKS = {
  "small_unet": _small_unet,
  "samed": _samed,
  "transunet": _transunet,
}


def _image(config, domain):
  side = config.image_size
  return jnp.zeros((1, side, side, domain.channels))


def _check_size(image, config):
  side = config.image_size
  if image.shape[1:3] != (side, side):
    raise ValueError(
      f"segmenter.network={config.network!r} takes images of {side} x {side},"
      f" not {image.shape[1]} x {image.shape[2]}; set data.size or"
      " segmenter.image_size"
    )
  return image


def _require_sizes(config, size, found, module, fields):
  """Refuses weights of another module than the config's.

  Args:
    config: `network` and `weights`.
    size: what the weights are, in words.
    found: the weights' module.
    module: the config's.
    fields: of the config, which set the module's attributes of these names.
  """
  names = [f.name for f in dataclasses.fields(found)]
  names = [name for name in names if name in {"num_classes", *fields}]
  graft.require_sizes(
    f"{config.weights} does not fit segmenter.{config.network}: it is {size}",
    {name: getattr(found, name) for name in names},
    {name: getattr(module, name) for name in names},
    {name: f"segmenter.{config.network}.{name}" for name in fields},
  )


def make_network(
  config, axis_name: str | None = None, domain: Domain = FUNDUS
) -> Network:
  """The network that `config.network` names.

  Raises:
    ValueError: if it is unknown; its `load`, if the weights are damaged or do
      not fit its sizes.
  """
  if config.network not in _NETWORKS:
    raise ValueError(
      f"unknown segmenter.network {config.network!r}; use one of"
      f" {', '.join(_NETWORKS)}"
    )
  network = _NETWORKS[config.network](config, axis_name, domain)
  if not config.weights or network.load is None:
    return network._replace(load=None)

  def load():
    found = network.load()
    try:
      graft.require_shapes(
        found._asdict(),
        jax.eval_shape(network.init, jax.random.key(0))._asdict(),
      )
    except ValueError as error:
      raise ValueError(
        f"{config.weights} does not fit segmenter.{config.network}: {error}"
      ) from error
    return found

  return network._replace(load=load)


def segmentation_task(
  config, axis_name: str | None = None, domain: Domain = FUNDUS
) -> Task:
  """The segmenter `theta`.

  Args:
    config: `network` and what it takes, `weights` to start from,
      `cross_entropy_weight`, `dice_weight`.
    axis_name: mapped axis that batch normalisation spans under `pmap`.
    domain: its classes and channels.

  Returns:
    A task whose `risk` aux holds 'dice' terms [B, classes], pooled 'features'
    [B, F]; whose `logits` maps (variables, images [B, H, W, C]) to float32
    [B, H, W, classes], `sample` to labels int32 [B, H, W], and `features` to
    the pooled features alone.
  """
  network = make_network(config, axis_name, domain)

  def risk(variables, batch, keys, train):
    logits, features, batch_stats = network.apply(
      variables, batch["image"], batch["weight"], keys, train
    )
    logits = logits.astype(jnp.float32)
    label = jax.image.resize(batch["mask"], logits.shape[:3], "nearest")
    dice = dice_terms(logits, label)
    losses = config.dice_weight * dice.loss()
    losses += config.cross_entropy_weight * cross_entropy(logits, label)
    aux = {"batch_stats": batch_stats, "dice": dice, "features": features}
    return losses, aux

  def logits(variables, image):
    coarse, *_ = network.apply(variables, image, None, None, False)
    shape = (*image.shape[:3], domain.num_classes)
    return jax.image.resize(coarse.astype(jnp.float32), shape, "bilinear")

  def sample(variables, image):
    return jnp.argmax(logits(variables, image), axis=-1)

  def features(variables, image):
    _, pooled, _ = network.apply(variables, image, None, None, False)
    return pooled.astype(jnp.float32)

  return Task(network.init, risk, sample, network.load, logits, features)
