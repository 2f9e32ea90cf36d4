r"""Segmentation risk.

    l = w_ce CE + w_dice Dice
    Dice = mean_c 1 - (2 sum p_c y_c + s) / (sum p_c^2 + sum y_c^2 + s)

with sums over the pixels of one case, p the softmax, y the one-hot label and
s = 1e-5. The public FairDiff code sums over the batch as well, which gives no
loss per case and so no risk per group.
"""

import jax
import jax.numpy as jnp

from fairdiff_jax.models.small_unet import SmallUNet
from fairdiff_jax.objectives.task import Task

NUM_CLASSES = 3  # background, rim, cup


def segmentation_loss(
  logits: jax.Array,
  label: jax.Array,
  *,
  cross_entropy_weight: float,
  dice_weight: float,
) -> jax.Array:
  """Loss per case [B] from logits [B, H, W, C] and labels int32 [B, H, W]."""
  logits = logits.astype(jnp.float32)
  log_p = jax.nn.log_softmax(logits)
  y = jax.nn.one_hot(label, logits.shape[-1])
  cross_entropy = -jnp.mean(jnp.sum(y * log_p, axis=-1), axis=(1, 2))
  p = jnp.exp(log_p)
  smooth = 1e-5
  overlap = jnp.sum(p * y, axis=(1, 2))
  size = jnp.sum(p**2, axis=(1, 2)) + jnp.sum(y**2, axis=(1, 2))
  dice = jnp.mean(1 - (2 * overlap + smooth) / (size + smooth), axis=-1)
  return cross_entropy_weight * cross_entropy + dice_weight * dice


def segmentation_task(config) -> Task:
  """The segmenter `theta`.

  Args:
    config: `channels`, `patch`, `cross_entropy_weight`, `dice_weight`.

  Returns:
    A task whose `risk` aux holds 'logits' [B, H, W, 3], and whose `sample`
    maps (variables, images [B, H, W, 1]) to labels int32 [B, H, W].
  """
  module = SmallUNet(
    tuple(config.channels), num_classes=NUM_CLASSES, patch=config.patch
  )
  size = config.patch * 2 ** (len(config.channels) - 1)

  def apply(variables, image, train):
    height, width = image.shape[1:3]
    # Deeper levels halve the image; sizes that do not divide are padded.
    pad = ((0, 0), (0, -height % size), (0, -width % size), (0, 0))
    logits = module.apply(
      {"params": variables.params}, jnp.pad(image, pad, "edge"), train
    )
    return logits[:, :height, :width]

  def init(key):
    image = jnp.zeros((1, size, size, 1))
    return module.init(key, image)["params"], {}

  def risk(variables, batch, keys, train):
    del keys
    logits = apply(variables, batch["image"], train)
    losses = segmentation_loss(
      logits,
      batch["mask"],
      cross_entropy_weight=config.cross_entropy_weight,
      dice_weight=config.dice_weight,
    )
    return losses, {"batch_stats": {}, "logits": logits}

  def sample(variables, image):
    return jnp.argmax(apply(variables, image, False), axis=-1)

  return Task(init, risk, sample)
