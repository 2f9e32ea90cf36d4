r"""Diffusion of pixels, as the residual to a mask-conditional intensity prior.

    x_0 = (image - mu(m, g)) / s[g],    mu(m, g) = sum_c A[g, c] blur(1[m = c])

where A[g, c] is the training set's mean intensity of class c in group g and
s[g] the residual's standard deviation. The prior carries what a few cases
of a group can teach, their brightness and contrast; the network adds the
rest. With A = 0 and s = 1 it is plain diffusion.
"""

import jax
import jax.numpy as jnp

from fairdiff_jax.models.unet import ControlNet, UNet
from fairdiff_jax.objectives.image_space import Space, hint_image
from fairdiff_jax.objectives.task import Variables


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


def intensity_prior(
  mask: jax.Array, group: jax.Array, statistics: dict[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
  """What is known of an image before it is seen.

  Args:
    mask: [B, H, W].
    group: [B], -1 for unknown.
    statistics: 'intensity' A [G + 1, classes], of RGB images
      [G + 1, classes, 3], and 'scale' s [G + 1]; the last row serves unknown
      groups.

  Returns:
    mu(m, g) [B, H, W, C] and s [B, 1, 1, 1].
  """
  intensity, scale = statistics["intensity"], statistics["scale"]
  row = jnp.where(group < 0, len(intensity) - 1, group)
  one_hot = blur(jax.nn.one_hot(mask, intensity.shape[1]))
  if intensity.ndim == 2:
    mean = jnp.einsum("bhwc,bc->bhw", one_hot, intensity[row])[..., None]
  else:
    mean = jnp.einsum("bhwc,bck->bhwk", one_hot, intensity[row])
  return mean, scale[row][:, None, None, None]


def pixel_space(config, num_groups: int, image_channels: int = 1) -> Space:
  """A U-Net, with a ControlNet or with the hint as input channels.

  Args:
    config: network sizes and `conditioning` ('controlnet' or 'concat').
    num_groups: G.
    image_channels: of images.

  Returns:
    A space whose frozen variables are {'intensity', 'scale'}, see
    `intensity_prior`.

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
  unet = UNet(
    **sizes, head_channels=config.head_channels, out_channels=image_channels
  )
  controlnet = ControlNet(**sizes, hint_channels=tuple(config.hint_channels))

  def init(key):
    size = config.patch * 2 ** (len(config.channels) - 1)
    x = jnp.zeros((1, size, size, image_channels))
    hint = jnp.zeros((1, size, size, 3))
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

  def encode(variables, batch, keys):
    del keys
    prior, scale = intensity_prior(
      batch["mask"], batch["group"], variables.frozen
    )
    return (batch["image"] - prior) / scale

  def condition(variables, mask, group, kept):
    del variables
    hint = hint_image(mask) * kept[:, None, None, None]
    return jnp.where(kept, group, -1), hint

  def predict(variables, x_t, t, condition):
    params, (group, hint) = variables.params, condition
    if controlled:
      residuals = controlnet.apply(
        {"params": params["controlnet"]}, x_t, t, group, hint
      )
      return unet.apply({"params": params["unet"]}, x_t, t, group, residuals)
    x_t = jnp.concatenate([x_t, hint], axis=-1)
    return unet.apply({"params": params["unet"]}, x_t, t, group)

  def decode(variables, x_0, mask, group):
    prior, scale = intensity_prior(mask, group, variables.frozen)
    return x_0 * scale + prior

  return Space(
    init,
    lambda size: (*size, image_channels),
    encode,
    condition,
    predict,
    decode,
  )
