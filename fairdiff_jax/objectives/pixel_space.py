r"""Diffusion of pixels, as the residual to class intensities of a case.

    x_0 = (y - mu(m, a)) / s[g],    y = log(image + 1 + DARK)
    mu(m, a) = sum_c a_c blur(1[m = c]),    a ~ N(A[g], S[g] S[g]^T)

where a is a case's own mean of y in each class and channel, I numbers: measured
in training, drawn for a new case. A[g] and S[g] S[g]^T are their mean and
covariance in group g, and s[g] is the residual's scale. So what a few cases of
a group can teach, its patients' brightness and contrast and how these vary, is
taken from statistics; the network adds the rest, and sees mu. In logarithms,
vessels, shadows and speckle have the same depth at any brightness. Where the
background is unlit, as around a round field of view, mu is black, and neither
a nor s[g] knows of it. Without the prior x_0 = image: plain diffusion.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fairdiff_jax.data.statistics import DARK, UNLIT
from fairdiff_jax.diffusion.samplers import example_normal
from fairdiff_jax.models.unet import ControlNet, UNet
from fairdiff_jax.objectives.image_space import Space, hint_image
from fairdiff_jax.objectives.task import Variables

LOG_BLACK, LOG_WHITE = np.log(DARK), np.log(2 + DARK)


def blur(x: jax.Array) -> jax.Array:
  """Binomial blur (1 4 6 4 1) / 16 along both image axes of [B, H, W, C]."""
  weights = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)
  for axis in (1, 2):
    size = x.shape[axis]
    pad = [(0, 0)] * x.ndim
    pad[axis] = (2, 2)
    padded = jnp.pad(x, pad, "edge")
    x = sum(
      w * jax.lax.slice_in_dim(padded, i, i + size, axis=axis)
      for i, w in enumerate(weights)
    )
  return x


class Prior(NamedTuple):
  """What of images is not diffused: mu [B, H, W, C] and s [B, 1, 1, 1]."""

  mean: jax.Array
  scale: jax.Array


def _no_prior(mask, channels):
  mean = jnp.zeros((*mask.shape, channels))
  return Prior(mean, jnp.ones((len(mask), 1, 1, 1)))


def log_brightness(image: jax.Array) -> jax.Array:
  """y of images in [-1, 1]."""
  return jnp.log(image + (1 + DARK))


def to_image(y: jax.Array) -> jax.Array:
  """Inverse of `log_brightness`."""
  return jnp.exp(y) - (1 + DARK)


def class_means(
  y: jax.Array, mask: jax.Array, otherwise: jax.Array
) -> jax.Array:
  """Mean [B, I] over each class, in every channel.

  Args:
    y: [B, H, W, C].
    mask: [B, H, W]; -1 is no class.
    otherwise: [B, I], for classes without a pixel.
  """
  classes = otherwise.shape[-1] // y.shape[-1]
  one_hot = jax.nn.one_hot(mask, classes)
  count = jnp.repeat(one_hot.sum((1, 2)), y.shape[-1], axis=-1)
  total = jnp.einsum("bhwc,bhwk->bck", one_hot, y).reshape(otherwise.shape)
  return jnp.where(count > 0, total / jnp.maximum(count, 1), otherwise)


def draw_intensity(
  statistics: dict[str, jax.Array], group: jax.Array, keys: jax.Array
) -> jax.Array:
  """Class intensities [B, I] of new cases, not beyond black and white.

  Args:
    statistics: 'intensity' A [G + 1, I] and 'spread' S [G + 1, I, I]; the last
      row serves unknown groups.
    group: [B], -1 for unknown.
    keys: one per example [B].
  """
  mean, spread = (
    _of_group(statistics[k], group) for k in ("intensity", "spread")
  )
  noise = example_normal(keys, mean.shape[1:])
  drawn = mean + jnp.einsum("bij,bj->bi", spread, noise)
  return jnp.clip(drawn, LOG_BLACK, LOG_WHITE)


def is_unlit(image: jax.Array, mask: jax.Array) -> jax.Array:
  """Background [B, H, W] of images [B, H, W, C] that is as good as black."""
  return (mask == 0) & (image.max(-1) < (UNLIT + 0.5) / 127.5 - 1)


def prior_image(
  mask: jax.Array, intensity: jax.Array, channels: int = 1
) -> jax.Array:
  """mu [B, H, W, C] of masks [B, H, W] with class intensities [B, I]."""
  intensity = intensity.reshape(len(intensity), -1, channels)
  one_hot = blur(jax.nn.one_hot(mask, intensity.shape[1]))
  return jnp.einsum("bhwc,bck->bhwk", one_hot, intensity)


def _of_group(rows: jax.Array, group: jax.Array) -> jax.Array:
  """The groups' rows of [G + 1, ...]; the last serves unknown ones, -1."""
  return rows[jnp.where(group < 0, len(rows) - 1, group)]


def pixel_space(config, num_groups: int, image_channels: int = 1) -> Space:
  """A U-Net, with a ControlNet or with the hint as input channels.

  Args:
    config: network sizes, `conditioning` ('controlnet' or 'concat') and
      `intensity_prior`.
    num_groups: G.
    image_channels: of images.

  Returns:
    A space whose frozen variables are {'intensity' [G + 1, I], 'spread'
    [G + 1, I, I], 'scale' [G + 1]}.

  Raises:
    ValueError: if `conditioning` is unknown.
  """
  if config.conditioning not in ("controlnet", "concat"):
    raise ValueError(
      f"unknown image conditioning {config.conditioning!r}; use"
      " 'controlnet' or 'concat'"
    )
  controlled = config.conditioning == "controlnet"
  sizes = dict(
    channels=tuple(config.channels),
    num_blocks=config.num_blocks,
    attention=tuple(config.attention),
    num_heads=config.num_heads,
    num_groups=num_groups,
    patch=config.patch,
  )
  unet = UNet(**sizes, out_channels=image_channels)
  controlnet = ControlNet(**sizes, hint_channels=tuple(config.hint_channels))

  def init(key):
    size = config.patch * 2 ** (len(config.channels) - 1)
    x = jnp.zeros((1, size, size, image_channels))
    hint = jnp.zeros((1, size, size, 3 + image_channels))
    t = group = jnp.zeros(1, jnp.int32)
    unet_key, control_key = jax.random.split(key)
    if not controlled:
      x = jnp.concatenate([x, hint], axis=-1)
    params = {"unet": unet.init(unet_key, x, t, group)["params"]}
    if controlled:
      params["controlnet"] = controlnet.init(control_key, x, t, group, hint)[
        "params"
      ]
    return Variables(params, {}, {})

  def prior_of(variables, mask, group, intensity, unlit=None):
    scale = _of_group(variables.frozen["scale"], group)
    mean = prior_image(mask, intensity, image_channels)
    if unlit is not None:
      mean = jnp.where(unlit[..., None], LOG_BLACK, mean)
    return Prior(mean, scale[:, None, None, None])

  def encode(variables, batch, keys):
    del keys
    image, mask, group = (batch[k] for k in ("image", "mask", "group"))
    if not config.intensity_prior:
      return image, _no_prior(mask, image_channels)
    y = log_brightness(image)
    average = _of_group(variables.frozen["intensity"], group)
    unlit = is_unlit(image, mask)
    intensity = class_means(y, jnp.where(unlit, -1, mask), average)
    prior = prior_of(variables, mask, group, intensity, unlit)
    return (y - prior.mean) / prior.scale, prior

  def draw(variables, mask, group, keys, image=None):
    if not config.intensity_prior:
      return _no_prior(mask, image_channels)
    intensity = draw_intensity(variables.frozen, group, keys)
    unlit = None if image is None else is_unlit(image, mask)
    return prior_of(variables, mask, group, intensity, unlit)

  def condition(variables, mask, group, prior, kept):
    del variables
    hint = jnp.concatenate([hint_image(mask), prior.mean], axis=-1)
    return jnp.where(kept, group, -1), hint * kept[:, None, None, None]

  def predict(variables, x_t, t, condition):
    params, (group, hint) = variables.params, condition
    if controlled:
      residuals = controlnet.apply(
        {"params": params["controlnet"]}, x_t, t, group, hint
      )
      return unet.apply({"params": params["unet"]}, x_t, t, group, residuals)
    x_t = jnp.concatenate([x_t, hint], axis=-1)
    return unet.apply({"params": params["unet"]}, x_t, t, group)

  def decode(variables, x_0, prior):
    del variables
    y = prior.mean + prior.scale * x_0
    # Nothing shines brighter than white, lest a bad guess overflow.
    return to_image(jnp.minimum(y, LOG_WHITE)) if config.intensity_prior else y

  return Space(
    init,
    lambda size: (*size, image_channels),
    encode,
    draw,
    condition,
    predict,
    decode,
  )
