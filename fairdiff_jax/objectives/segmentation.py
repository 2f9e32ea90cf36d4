r"""Segmentation risk.

    l = w_ce CE + w_dice Dice
    Dice = mean_c 1 - (2 sum p_c y_c + s) / (sum p_c^2 + sum y_c^2 + s)

with sums over the pixels of one case, p the softmax, y the one-hot label and
s = 1e-5. The public FairDiff code sums over the batch as well, which gives no
loss per case and so no risk per group.
"""

import jax
import jax.numpy as jnp

from fairdiff_jax.fairness.regularizers import DiceTerms
from fairdiff_jax.models.small_unet import SmallUNet
from fairdiff_jax.objectives.task import Task, Variables

NUM_CLASSES = 3  # background, rim, cup


def dice_terms(logits: jax.Array, label: jax.Array) -> DiceTerms:
  """Sums over pixels from logits [B, H, W, C] and labels int32 [B, H, W]."""
  p = jax.nn.softmax(logits)
  y = jax.nn.one_hot(label, logits.shape[-1])
  return DiceTerms(*(jnp.sum(x, axis=(1, 2)) for x in (p * y, p**2, y**2)))


def cross_entropy(logits: jax.Array, label: jax.Array) -> jax.Array:
  """Mean over pixels [B] from logits [B, H, W, C], labels int32 [B, H, W]."""
  y = jax.nn.one_hot(label, logits.shape[-1])
  log_p = jax.nn.log_softmax(logits)
  return -jnp.mean(jnp.sum(y * log_p, axis=-1), axis=(1, 2))


def segmentation_task(config) -> Task:
  """The segmenter `theta`.

  Args:
    config: `channels`, `patch`, `cross_entropy_weight`, `dice_weight`.

  Returns:
    A task whose `risk` aux holds 'dice' terms [B, 3] and pooled 'features'
    [B, F], and whose `sample` maps (variables, images [B, H, W, 1]) to labels
    int32 [B, H, W].
  """
  module = SmallUNet(
    tuple(config.channels), num_classes=NUM_CLASSES, patch=config.patch
  )
  size = config.patch * 2 ** (len(config.channels) - 1)

  def apply(variables, image, train):
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
    return logits[:, :height, :width].astype(jnp.float32), features

  def init(key):
    image = jnp.zeros((1, size, size, 1))
    return Variables(module.init(key, image)["params"], {}, {})

  def risk(variables, batch, keys, train):
    del keys
    logits, features = apply(variables, batch["image"], train)
    dice = dice_terms(logits, batch["mask"])
    losses = config.dice_weight * dice.loss()
    losses += config.cross_entropy_weight * cross_entropy(logits, batch["mask"])
    return losses, {"batch_stats": {}, "dice": dice, "features": features}

  def sample(variables, image):
    return jnp.argmax(apply(variables, image, False)[0], axis=-1)

  return Task(init, risk, sample)
