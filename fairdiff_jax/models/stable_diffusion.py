"""The U-Net of Stable Diffusion 1.5 and the ControlNet that steers it.

After Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion
Models" (CVPR 2022), and Zhang et al., "Adding Conditional Control to
Text-to-Image Diffusion Models" (ICCV 2023). The defaults are the released
checkpoints' sizes: 859,520,964 and 361,279,120 parameters.

Attributes bear the names of the configuration in the checkpoints' release for
the library diffusers, and parameters those of its tensors: a number is joined
to the name before it by '_', a dot is a level of nesting, so that
'down_blocks.0.resnets.1.conv1.weight' is
params['down_blocks_0']['resnets_1']['conv1']['kernel'].

Images are NHWC. Parameters are float32; `dtype` is that of the computation,
but for normalisations and softmax, which are float32.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fairdiff_jax.models.folded import FoldedConv
from fairdiff_jax.models.fused_attention import fused_attention
from fairdiff_jax.models.pointwise import Dense, PointwiseConv
from fairdiff_jax.models.unet import (
  space_to_depth,
  timestep_embedding,
  upsample,
)

Dtype = Any
Residuals = tuple[tuple[jax.Array, ...], jax.Array]


def _conv(channels, dtype, **options):
  """3 x 3, with the same padding at both ends, also where it strides."""
  return nn.Conv(channels, (3, 3), padding=1, dtype=dtype, **options)


@partial(nn.remat, static_argnums=(2, 3, 4, 5))
def _norm_silu_conv(module, x, norm, conv, channels, groups):
  """Group normalisation, silu and a convolution; x alone is kept.

  What lies between x and the convolution is computed again in the backward
  pass: twice x in float32, and the convolution's input.
  """
  normalise = nn.GroupNorm(groups, epsilon=1e-5, dtype=jnp.float32, name=norm)
  return _conv(channels, module.dtype, name=conv)(nn.silu(normalise(x)))


def _layer_norm(name):
  return nn.LayerNorm(epsilon=1e-5, dtype=jnp.float32, name=name)


class TimestepEmbedding(nn.Module):
  """Two dense layers on a step's sinusoids: [B, C] -> [B, dim]."""

  dim: int
  dtype: Dtype

  @nn.compact
  def __call__(self, x):
    x = Dense(self.dim, dtype=self.dtype, name="linear_1")(x)
    return Dense(self.dim, dtype=self.dtype, name="linear_2")(nn.silu(x))


class ResnetBlock(nn.Module):
  """Two 3 x 3 convolutions, shifted by the step's embedding in between."""

  channels: int
  groups: int
  dtype: Dtype

  @nn.compact
  def __call__(self, x, embedding):
    sizes = self.channels, self.groups
    h = _norm_silu_conv(self, x, "norm1", "conv1", *sizes)
    shift = Dense(self.channels, dtype=self.dtype, name="time_emb_proj")
    h += shift(nn.silu(embedding))[:, None, None]
    h = _norm_silu_conv(self, h, "norm2", "conv2", *sizes)
    if x.shape[-1] != self.channels:
      x = PointwiseConv(self.channels, self.dtype, name="conv_shortcut")(x)
    return x + h


class Attention(nn.Module):
  """Attention of tokens [B, N, C] to tokens [B, M, K]."""

  num_heads: int
  dtype: Dtype

  @nn.compact
  def __call__(self, x, context):
    channels = x.shape[-1]
    head_size = channels // self.num_heads

    def heads(tokens, name):
      y = Dense(channels, use_bias=False, dtype=self.dtype, name=name)(tokens)
      return y.reshape(*y.shape[:2], self.num_heads, head_size)

    y = fused_attention(
      heads(x, "to_q"), heads(context, "to_k"), heads(context, "to_v")
    )
    return Dense(channels, dtype=self.dtype, name="to_out_0")(
      y.reshape(x.shape)
    )


@jax.checkpoint  # the backward pass has x alone and computes the rest again
def _gated_gelu(x):
  value, gate = jnp.split(x, 2, axis=-1)
  return value * nn.gelu(gate, approximate=False)


class GatedGELU(nn.Module):
  """a * gelu(b), both linear in x (Shazeer 2020)."""

  channels: int
  dtype: Dtype

  @nn.compact
  def __call__(self, x):
    x = Dense(2 * self.channels, dtype=self.dtype, name="proj")(x)
    return _gated_gelu(x)


class FeedForward(nn.Module):
  """Pointwise network with four times as many hidden channels."""

  dtype: Dtype

  @nn.compact
  def __call__(self, x):
    channels = x.shape[-1]
    h = GatedGELU(4 * channels, self.dtype, name="net_0")(x)
    return Dense(channels, dtype=self.dtype, name="net_2")(h)


class TransformerBlock(nn.Module):
  """Self-attention, attention to the context and a feed-forward network."""

  num_heads: int
  dtype: Dtype

  @nn.compact
  def __call__(self, x, context):
    y = _layer_norm("norm1")(x)
    x += Attention(self.num_heads, self.dtype, name="attn1")(y, y)
    y = _layer_norm("norm2")(x)
    x += Attention(self.num_heads, self.dtype, name="attn2")(y, context)
    y = _layer_norm("norm3")(x)
    return x + FeedForward(self.dtype, name="ff")(y)


class SpatialTransformer(nn.Module):
  """A transformer block over the positions of an image."""

  num_heads: int
  groups: int
  dtype: Dtype

  @nn.compact
  def __call__(self, x, context):
    b, h, w, c = x.shape
    norm = nn.GroupNorm(
      self.groups, epsilon=1e-6, dtype=jnp.float32, name="norm"
    )
    y = PointwiseConv(c, self.dtype, name="proj_in")(norm(x))
    block = TransformerBlock(
      self.num_heads, self.dtype, name="transformer_blocks_0"
    )
    y = block(y.reshape(b, h * w, c), context).reshape(b, h, w, c)
    return x + PointwiseConv(c, self.dtype, name="proj_out")(y)


class Downsample(nn.Module):
  """Halves height and width, rounding up."""

  dtype: Dtype

  @nn.compact
  def __call__(self, x):
    return _conv(x.shape[-1], self.dtype, name="conv", strides=2)(x)


class Upsample(nn.Module):
  """Doubles height and width, less a last row or column where `size` is odd."""

  dtype: Dtype

  @nn.compact
  def __call__(self, x, size):
    x = upsample(x)
    x = x[:, : size[0], : size[1]]
    return _conv(x.shape[-1], self.dtype, name="conv")(x)


class Level(nn.Module):
  """The layers of one resolution.

  Attributes:
    channels: of every layer's output.
    num_layers: residual blocks.
    num_heads: of the transformer after each residual block; 0 for none.
    groups: of the group normalisations.
    dtype: of the computation.
    remat: keep the layers' inputs alone for the backward pass.
  """

  channels: int
  num_layers: int
  num_heads: int
  groups: int
  dtype: Dtype
  remat: bool

  def resnet(self, index, x, embedding):
    block = nn.remat(ResnetBlock) if self.remat else ResnetBlock
    return block(
      self.channels, self.groups, self.dtype, name=f"resnets_{index}"
    )(x, embedding)

  def transformer(self, index, x, context):
    if not self.num_heads:
      return x
    block = nn.remat(SpatialTransformer) if self.remat else SpatialTransformer
    return block(
      self.num_heads, self.groups, self.dtype, name=f"attentions_{index}"
    )(x, context)


class DownLevel(Level):
  """Returns every layer's output; the last one is the next level's input."""

  downsample: bool

  @nn.compact
  def __call__(self, x, embedding, context):
    outputs = []
    for i in range(self.num_layers):
      x = self.resnet(i, x, embedding)
      x = self.transformer(i, x, context)
      outputs.append(x)
    if self.downsample:
      outputs.append(Downsample(self.dtype, name="downsamplers_0")(x))
    return outputs


class MiddleLevel(Level):
  """The lowest resolution: a transformer between residual blocks."""

  @nn.compact
  def __call__(self, x, embedding, context):
    x = self.resnet(0, x, embedding)
    for i in range(1, self.num_layers):
      x = self.transformer(i - 1, x, context)
      x = self.resnet(i, x, embedding)
    return x


class UpLevel(Level):
  """Takes the last of the skips first; `size` is the next level's, or None."""

  @nn.compact
  def __call__(self, x, embedding, context, skips, size):
    for i in range(self.num_layers):
      x = jnp.concatenate([x, skips[-1 - i]], axis=-1)
      x = self.resnet(i, x, embedding)
      x = self.transformer(i, x, context)
    if size is not None:
      x = Upsample(self.dtype, name="upsamplers_0")(x, size)
    return x


@partial(nn.remat, static_argnums=(2, 3, 4, 5))
def _silu_folded_conv(stem, x, name, channels, strides, fold):
  """silu and a convolution on folded pixels; x alone is kept."""
  if fold > 1:
    conv = FoldedConv(channels, fold, strides, stem.dtype, name=name)
  else:
    conv = _conv(channels, stem.dtype, strides=strides, name=name)
  return conv(nn.silu(x))


class HintStem(nn.Module):
  """Hint [B, s h, s w, K] -> [B, h, w, out_channels], 0 at initialisation.

  The first layers have few channels: up to 4 x 4 pixels are folded into them.
  """

  channels: Sequence[int]
  out_channels: int
  dtype: Dtype

  @nn.compact
  def __call__(self, hint):
    fold = min(4, 2 ** (len(self.channels) - 1))
    x = FoldedConv(self.channels[0], fold, dtype=self.dtype, name="conv_in")(
      space_to_depth(hint, fold)
    )
    for i, channels in enumerate(self.channels[1:]):
      same, wider = f"blocks_{2 * i}", f"blocks_{2 * i + 1}"
      x = _silu_folded_conv(self, x, same, self.channels[i], 1, fold)
      x = _silu_folded_conv(self, x, wider, channels, 2, fold)
      fold = max(fold // 2, 1)
    zeros = nn.initializers.zeros
    conv = _conv(
      self.out_channels, self.dtype, name="conv_out", kernel_init=zeros
    )
    return conv(jax.checkpoint(nn.silu)(x))


class Encoder(nn.Module):
  """What the U-Net and the ControlNet share.

  Attributes:
    in_channels: of the latents.
    block_out_channels: of each level. All but the last attend to the context.
    layers_per_block: residual blocks of a level of the encoder; the decoder's
      have one more.
    attention_head_dim: number of heads of every attention; the misnomer is
      the configuration's.
    cross_attention_dim: D, size of the context's tokens.
    norm_num_groups: of the group normalisations.
    dtype: of the computation.
    remat: compute residual and transformer blocks again in the backward pass
      instead of keeping what is inside them.
  """

  in_channels: int = 4
  block_out_channels: Sequence[int] = (320, 640, 1280, 1280)
  layers_per_block: int = 2
  attention_head_dim: int = 8
  cross_attention_dim: int = 768
  norm_num_groups: int = 32
  dtype: Dtype = jnp.float32
  remat: bool = False

  def encode(self, latents, timesteps, context, hint=None):
    """Embedding of the steps, every skip and the middle's output."""
    if latents.shape[-1] != self.in_channels:
      raise ValueError(
        f"latents must have {self.in_channels} channels, got {latents.shape}"
      )
    if context.shape[-1] != self.cross_attention_dim:
      raise ValueError(
        f"context must have tokens of size {self.cross_attention_dim}, "
        f"got {context.shape}"
      )
    first, last = self.block_out_channels[0], self.block_out_channels[-1]
    sinusoids = timestep_embedding(timesteps, first)
    embedding = TimestepEmbedding(4 * first, self.dtype, name="time_embedding")(
      sinusoids
    )
    x = _conv(first, self.dtype, name="conv_in")(latents)
    if hint is not None:
      x += hint
    skips = [x]
    lowest = len(self.block_out_channels) - 1
    for i, channels in enumerate(self.block_out_channels):
      level = DownLevel(
        **self.level(channels, self.layers_per_block, attends=i < lowest),
        downsample=i < lowest,
        name=f"down_blocks_{i}",
      )
      skips += level(skips[-1], embedding, context)
    middle = MiddleLevel(**self.level(last, 2, attends=True), name="mid_block")
    return embedding, skips, middle(skips[-1], embedding, context)

  def level(self, channels, num_layers, *, attends):
    """Attributes of a `Level`."""
    return {
      "channels": channels,
      "num_layers": num_layers,
      "num_heads": self.attention_head_dim if attends else 0,
      "groups": self.norm_num_groups,
      "dtype": self.dtype,
      "remat": self.remat,
    }


class StableDiffusionUNet(Encoder):
  """Denoiser of latents, conditioned on step and text.

  Attributes, besides the encoder's:
    out_channels: of the prediction.
  """

  out_channels: int = 4

  @nn.compact
  def __call__(
    self,
    latents: jax.Array,
    timesteps: jax.Array,
    context: jax.Array,
    residuals: Residuals | None = None,
  ) -> jax.Array:
    """The network's prediction [B, h, w, out_channels], in float32.

    Args:
      latents: noisy latents [B, h, w, in_channels] of any height and width.
      timesteps: [B], from 0.
      context: the text encoder's tokens [B, M, cross_attention_dim].
      residuals: a ControlNet's output, or None.

    Raises:
      ValueError: channels are not those of the attributes, or there are not as
        many residuals as skips.
    """
    embedding, skips, x = self.encode(latents, timesteps, context)
    if residuals is not None:
      down, middle = residuals
      skips = [
        skip + residual.astype(self.dtype)
        for skip, residual in zip(skips, down, strict=True)
      ]
      x += middle.astype(self.dtype)
    num_layers = self.layers_per_block + 1
    for i, channels in enumerate(reversed(self.block_out_channels)):
      skips, taken = skips[:-num_layers], skips[-num_layers:]
      level = UpLevel(
        **self.level(channels, num_layers, attends=i > 0),
        name=f"up_blocks_{i}",
      )
      size = skips[-1].shape[1:3] if skips else None
      x = level(x, embedding, context, taken, size)
    sizes = self.out_channels, self.norm_num_groups
    x = _norm_silu_conv(self, x, "conv_norm_out", "conv_out", *sizes)
    return x.astype(jnp.float32)


class StableDiffusionControlNet(Encoder):
  """Residuals for a U-Net of the same sizes, from a hint image.

  Attributes, besides the encoder's:
    conditioning_embedding_out_channels: of the hint's convolutions; each but
      the first halves the hint's height and width.
  """

  conditioning_embedding_out_channels: Sequence[int] = (16, 32, 96, 256)

  @nn.compact
  def __call__(
    self,
    latents: jax.Array,
    timesteps: jax.Array,
    context: jax.Array,
    hint: jax.Array,
  ) -> Residuals:
    """Residuals of every skip, and of the middle; all 0 at initialisation.

    Args:
      latents: noisy latents [B, h, w, in_channels] of any height and width.
      timesteps: [B], from 0.
      context: the text encoder's tokens [B, M, cross_attention_dim].
      hint: image [B, s h, s w, 3] in [0, 1]; s is 8 for the default stem.

    Returns:
      (residuals of the skips, residual of the middle), in `dtype`.

    Raises:
      ValueError: channels are not those of the attributes, or the hint is not
        s times as high and wide as the latents.
    """
    widths = self.conditioning_embedding_out_channels
    scale = 2 ** (len(widths) - 1)
    height, width = (scale * n for n in latents.shape[1:3])
    if hint.shape[1:3] != (height, width):
      raise ValueError(
        f"hint must be [B, {height}, {width}, 3], got {hint.shape}"
      )
    stem = HintStem(
      widths,
      self.block_out_channels[0],
      self.dtype,
      name="controlnet_cond_embedding",
    )
    _, skips, x = self.encode(latents, timesteps, context, stem(hint))

    def zero(y, name):
      return PointwiseConv(
        y.shape[-1], self.dtype, nn.initializers.zeros, name=name
      )(y)

    down = tuple(
      zero(y, f"controlnet_down_blocks_{i}") for i, y in enumerate(skips)
    )
    return down, zero(x, "controlnet_mid_block")
