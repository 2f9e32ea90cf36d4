"""The autoencoder of latent diffusion models.

After Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion
Models" (CVPR 2022). An image x has a latent z of a lower resolution:

  posterior  q(z | x) = N(mean(x), exp(logvar(x)))     `encode`
  decoder    x = D(z)                                  `decode`

Both halves are levels of residual blocks, with one head of attention over all
positions in the middle. Each level but the last halves the height and the
width, rounding down.

Images and latents are NHWC. Parameters are float32 and carry the names of the
published checkpoints, with every number joined to the name before it.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from fairdiff_jax.models.pointwise import Dense, PointwiseConv
from fairdiff_jax.models.unet import upsample

LOGVAR_RANGE = (-30.0, 20.0)


def _group_norm(groups, name=None):
  return nn.GroupNorm(
    groups,
    epsilon=1e-6,
    dtype=jnp.float32,
    use_fast_variance=False,
    name=name,
  )


class ResidualBlock(nn.Module):
  """Two 3 x 3 convolutions, each after a normalisation."""

  channels: int
  groups: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    h = nn.silu(_group_norm(self.groups, "norm1")(x))
    h = nn.Conv(self.channels, (3, 3), dtype=self.dtype, name="conv1")(h)
    h = nn.silu(_group_norm(self.groups, "norm2")(h))
    h = nn.Conv(self.channels, (3, 3), dtype=self.dtype, name="conv2")(h)
    if x.shape[-1] != self.channels:
      x = PointwiseConv(self.channels, self.dtype, name="conv_shortcut")(x)
    return x + h


class Attention(nn.Module):
  """One head of self-attention over all positions."""

  groups: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    b, h, w, c = x.shape
    y = _group_norm(self.groups, "group_norm")(x).reshape(b, h * w, 1, c)
    q, k, v = (
      Dense(c, dtype=self.dtype, name=name)(y)
      for name in ("to_q", "to_k", "to_v")
    )
    y = jax.nn.dot_product_attention(q, k, v).reshape(b, h, w, c)
    return x + Dense(c, dtype=self.dtype, name="to_out_0")(y)


class Middle(nn.Module):
  """A residual block on either side of the attention."""

  channels: int
  groups: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    block = (self.channels, self.groups, self.dtype)
    x = ResidualBlock(*block, name="resnets_0")(x)
    x = Attention(self.groups, self.dtype, name="attentions_0")(x)
    return ResidualBlock(*block, name="resnets_1")(x)


class Downsample(nn.Module):
  """Convolution of stride 2, padded at the bottom and the right alone."""

  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    padding = ((0, 1), (0, 1))
    return nn.Conv(
      x.shape[-1], (3, 3), 2, padding, dtype=self.dtype, name="conv"
    )(x)


class Upsample(nn.Module):
  """Nearest neighbours at twice the size, then a convolution."""

  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = upsample(x)
    return nn.Conv(x.shape[-1], (3, 3), dtype=self.dtype, name="conv")(x)


class Level(nn.Module):
  """Residual blocks of one resolution, then a change of resolution or none."""

  channels: int
  num_blocks: int
  groups: int
  downsample: bool = False
  upsample: bool = False
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for i in range(self.num_blocks):
      x = ResidualBlock(
        self.channels, self.groups, self.dtype, name=f"resnets_{i}"
      )(x)
    if self.downsample:
      x = Downsample(self.dtype, name="downsamplers_0")(x)
    if self.upsample:
      x = Upsample(self.dtype, name="upsamplers_0")(x)
    return x


class Encoder(nn.Module):
  """Image -> moments of the latent, before their last convolution."""

  block_out_channels: Sequence[int]
  num_blocks: int
  out_channels: int
  groups: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    channels = self.block_out_channels
    x = nn.Conv(channels[0], (3, 3), dtype=self.dtype, name="conv_in")(x)
    for i, width in enumerate(channels):
      x = Level(
        width,
        self.num_blocks,
        self.groups,
        downsample=i < len(channels) - 1,
        dtype=self.dtype,
        name=f"down_blocks_{i}",
      )(x)
    x = Middle(channels[-1], self.groups, self.dtype, name="mid_block")(x)
    x = nn.silu(_group_norm(self.groups, "conv_norm_out")(x))
    return nn.Conv(
      self.out_channels, (3, 3), dtype=self.dtype, name="conv_out"
    )(x)


class Decoder(nn.Module):
  """Latent, after its first convolution -> image."""

  block_out_channels: Sequence[int]
  num_blocks: int
  out_channels: int
  groups: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    channels = self.block_out_channels[::-1]
    x = nn.Conv(channels[0], (3, 3), dtype=self.dtype, name="conv_in")(x)
    x = Middle(channels[0], self.groups, self.dtype, name="mid_block")(x)
    for i, width in enumerate(channels):
      x = Level(
        width,
        self.num_blocks,
        self.groups,
        upsample=i < len(channels) - 1,
        dtype=self.dtype,
        name=f"up_blocks_{i}",
      )(x)
    x = nn.silu(_group_norm(self.groups, "conv_norm_out")(x))
    return nn.Conv(
      self.out_channels, (3, 3), dtype=self.dtype, name="conv_out"
    )(x)


class AutoencoderKL(nn.Module):
  """The posterior and the decoder, as one set of variables.

  Call the methods through `module.apply(variables, ..., method='encode')`. The
  defaults are those of Stable Diffusion 1.5: 83,653,863 parameters.

  Attributes:
    in_channels: of the images that are encoded.
    out_channels: of the images that are decoded.
    latent_channels: of the latents.
    block_out_channels: of each level, from the image's resolution down.
    layers_per_block: residual blocks of an encoder's level; a decoder's has one
      more.
    norm_num_groups: of every group normalisation.
    scaling_factor: what the diffusion model multiplies latents by. For whoever
      calls; `encode` and `decode` do not apply it.
    dtype: of the computation; normalisation and softmax are float32.
  """

  in_channels: int = 3
  out_channels: int = 3
  latent_channels: int = 4
  block_out_channels: Sequence[int] = (128, 256, 512, 512)
  layers_per_block: int = 2
  norm_num_groups: int = 32
  scaling_factor: float = 0.18215
  dtype: jnp.dtype = jnp.float32

  def setup(self):
    self.encoder = Encoder(
      self.block_out_channels,
      self.layers_per_block,
      2 * self.latent_channels,
      self.norm_num_groups,
      self.dtype,
    )
    self.quant_conv = PointwiseConv(2 * self.latent_channels, self.dtype)
    self.post_quant_conv = PointwiseConv(self.latent_channels, self.dtype)
    self.decoder = Decoder(
      self.block_out_channels,
      self.layers_per_block + 1,
      self.out_channels,
      self.norm_num_groups,
      self.dtype,
    )

  def __call__(self, image: jax.Array) -> jax.Array:
    """Reconstructs images [B, H, W, C] from the posterior's mean."""
    mean, _ = self.encode(image)
    return self.decode(mean)

  def encode(self, image: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Posterior of an image's latent.

    Args:
      image: [B, H, W, in_channels], from -1 to 1.

    Returns:
      Mean and log variance, each [B, h, w, latent_channels]; the log variance
      is clipped to `LOGVAR_RANGE`. With SD 1.5's four levels h = H // 8.
    """
    moments = self.quant_conv(self.encoder(image))
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(logvar, *LOGVAR_RANGE)

  def decode(self, latents: jax.Array) -> jax.Array:
    """Image of a latent.

    Args:
      latents: [B, h, w, latent_channels], without the scaling factor.

    Returns:
      [B, 8 h, 8 w, out_channels] with four levels, about -1 to 1, not clipped.
    """
    return self.decoder(self.post_quant_conv(latents))
