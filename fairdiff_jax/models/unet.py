"""The denoising U-Net and the ControlNet that steers it.

Both follow Stable Diffusion's plan: a convolution in, levels of residual
blocks (with a transformer block after each where the level attends), a
middle, and, in the U-Net, the mirror image of the levels with a skip
connection from every block. A ControlNet (Zhang et al. 2023) is a second
encoder that also sees a hint; zero-initialised convolutions turn its
activations into residuals that are added to the U-Net's skips and middle.

Images are NHWC. `patch` > 1 folds patches into channels first
(space-to-depth), which moves the arithmetic to low resolution; the last
convolution sees the input once more, so that no detail has to pass through
the levels.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fairdiff_jax.models.pointwise import Dense, DenseGeneral, PointwiseConv


def space_to_depth(x: jax.Array, size: int) -> jax.Array:
  """[B, H, W, C] -> [B, H / size, W / size, size * size * C]."""
  b, h, w, c = x.shape
  x = x.reshape(b, h // size, size, w // size, size, c)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(
    b, h // size, w // size, size * size * c
  )


def depth_to_space(x: jax.Array, size: int) -> jax.Array:
  """Inverse of `space_to_depth`."""
  b, h, w, c = x.shape
  x = x.reshape(b, h, w, size, size, c // size**2)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(
    b, h * size, w * size, c // size**2
  )


def upsample(x: jax.Array) -> jax.Array:
  """Every pixel of [B, H, W, C] as 2 x 2 of them."""
  return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


def timestep_embedding(t: jax.Array, dim: int) -> jax.Array:
  """Sinusoids [B, dim] of t [B] (Vaswani et al. 2017), cosines first."""
  frequency = np.exp(-np.log(10000) * np.arange(dim // 2) / (dim // 2))
  angle = t.astype(jnp.float32)[:, None] * frequency[None]
  return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def _group_norm(x: jax.Array, name: str) -> jax.Array:
  groups = int(np.gcd(32, x.shape[-1]))
  if groups == x.shape[-1]:
    # Groups of one channel would cancel biases and the conditioning's shift.
    groups //= 2
  # The mean square less the squared mean would cost a digit.
  norm = nn.GroupNorm(groups, epsilon=1e-5, use_fast_variance=False, name=name)
  return norm(x)


class ResidualBlock(nn.Module):
  """Two 3 x 3 convolutions, scaled and shifted in between by the embedding."""

  channels: int

  @nn.compact
  def __call__(self, x: jax.Array, embedding: jax.Array) -> jax.Array:
    h = nn.silu(_group_norm(x, "norm1"))
    h = nn.Conv(self.channels, (3, 3), name="conv1")(h)
    embedding = Dense(2 * self.channels, name="embedding")(nn.silu(embedding))
    scale, shift = jnp.split(embedding[:, None, None], 2, axis=-1)
    h = nn.silu(_group_norm(h, "norm2") * (1 + scale) + shift)
    h = nn.Conv(self.channels, (3, 3), name="conv2")(h)
    if x.shape[-1] != self.channels:
      x = PointwiseConv(self.channels, name="shortcut")(x)
    return x + h


class TransformerBlock(nn.Module):
  """Self-attention over all positions, then a feed-forward layer."""

  num_heads: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    b, h, w, c = x.shape
    tokens = x.reshape(b, h * w, c)
    y = nn.LayerNorm(name="norm1")(tokens)
    qkv = DenseGeneral(
      (3, self.num_heads, c // self.num_heads), use_bias=False, name="qkv"
    )(y)
    q, k, v = (qkv[:, :, i] for i in range(3))
    y = jax.nn.dot_product_attention(q, k, v)
    tokens += DenseGeneral(c, axis=(-2, -1), name="out")(y)
    y = nn.LayerNorm(name="norm2")(tokens)
    y = nn.gelu(Dense(2 * c, name="expand")(y))
    tokens += Dense(c, name="contract")(y)
    return tokens.reshape(b, h, w, c)


class Level(nn.Module):
  """Residual blocks of one resolution; returns every block's output."""

  channels: int
  num_blocks: int
  num_heads: int  # 0 = no attention

  @nn.compact
  def __call__(self, x, embedding, skips=()):
    outputs = []
    for i in range(self.num_blocks):
      if skips:
        x = jnp.concatenate([x, skips[-1 - i]], axis=-1)
      x = ResidualBlock(self.channels, name=f"block_{i}")(x, embedding)
      if self.num_heads:
        x = TransformerBlock(self.num_heads, name=f"attention_{i}")(x)
      outputs.append(x)
    return outputs


class Embedding(nn.Module):
  """Time and group [B] -> conditioning vector [B, 4 * channels]."""

  channels: int
  num_groups: int

  @nn.compact
  def __call__(self, t: jax.Array, group: jax.Array) -> jax.Array:
    dim = 4 * self.channels
    x = Dense(dim, name="time1")(timestep_embedding(t, self.channels))
    x = Dense(dim, name="time2")(nn.silu(x))
    unknown = self.num_groups
    row = jnp.where(group < 0, unknown, group)
    return x + nn.Embed(self.num_groups + 1, dim, name="group")(row)


class Encoder(nn.Module):
  """Contracting half and middle: every skip, then the middle."""

  channels: Sequence[int]
  num_blocks: int
  attention: Sequence[bool]
  num_heads: int

  @nn.compact
  def __call__(self, x, embedding, hint=None):
    x = nn.Conv(self.channels[0], (3, 3), name="conv_in")(x)
    if hint is not None:
      x += hint
    outputs = []
    for i, channels in enumerate(self.channels):
      if i:
        x = nn.Conv(channels, (3, 3), strides=2, name=f"downsample_{i}")(x)
      heads = self.num_heads if self.attention[i] else 0
      level = Level(channels, self.num_blocks, heads, name=f"down_{i}")
      outputs += level(x, embedding)
      x = outputs[-1]
    middle = Level(self.channels[-1], 1, heads, name="middle")
    return outputs + middle(x, embedding)


class ControlNet(nn.Module):
  """Residuals for a U-Net of the same sizes, from a hint image."""

  channels: Sequence[int] = (64, 96)
  num_blocks: int = 1
  attention: Sequence[bool] = (False, True)
  num_heads: int = 4
  num_groups: int = 0
  patch: int = 1
  hint_channels: Sequence[int] = (32,)

  @nn.compact
  def __call__(
    self, x: jax.Array, t: jax.Array, group: jax.Array, hint: jax.Array
  ) -> list[jax.Array]:
    """Residuals for every skip and the middle.

    Args:
      x: noisy images [B, H, W, C].
      t: steps [B].
      group: group index [B], -1 for unknown.
      hint: conditioning images [B, H, W, K].
    """
    embedding = Embedding(self.channels[0], self.num_groups)(t, group)
    hint = space_to_depth(hint, self.patch)
    for i, channels in enumerate(self.hint_channels):
      hint = nn.silu(nn.Conv(channels, (3, 3), name=f"hint_{i}")(hint))
    hint = nn.Conv(
      self.channels[0],
      (3, 3),
      kernel_init=nn.initializers.zeros,
      name="hint_out",
    )(hint)
    outputs = Encoder(
      self.channels, self.num_blocks, self.attention, self.num_heads
    )(space_to_depth(x, self.patch), embedding, hint)
    return [
      PointwiseConv(
        y.shape[-1], kernel_init=nn.initializers.zeros, name=f"zero_{i}"
      )(y)
      for i, y in enumerate(outputs)
    ]


class UNet(nn.Module):
  """Denoiser of images, conditioned on step and group."""

  channels: Sequence[int] = (64, 96)
  num_blocks: int = 1
  attention: Sequence[bool] = (False, True)
  num_heads: int = 4
  num_groups: int = 0
  patch: int = 1
  out_channels: int = 1

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    t: jax.Array,
    group: jax.Array,
    residuals: list[jax.Array] | None = None,
  ) -> jax.Array:
    """The network's prediction [B, H, W, out_channels].

    Args:
      x: noisy images [B, H, W, C], further conditions in further channels.
      t: steps [B].
      group: group index [B], -1 for unknown.
      residuals: a ControlNet's output, or None.
    """
    embedding = Embedding(self.channels[0], self.num_groups)(t, group)
    x = space_to_depth(x, self.patch)
    outputs = Encoder(
      self.channels, self.num_blocks, self.attention, self.num_heads
    )(x, embedding)
    if residuals is not None:
      outputs = [a + b for a, b in zip(outputs, residuals, strict=True)]
    *skips, h = outputs
    for i in reversed(range(len(self.channels))):
      heads = self.num_heads if self.attention[i] else 0
      level = Level(self.channels[i], self.num_blocks, heads, name=f"up_{i}")
      h = level(h, embedding, skips[-self.num_blocks :])[-1]
      del skips[-self.num_blocks :]
      if i:  # at the low resolution, where it costs a quarter
        h = nn.Conv(self.channels[i - 1], (3, 3), name=f"upsample_{i}")(h)
        h = upsample(h)
    h = nn.silu(_group_norm(h, "norm_out"))
    # How much of x is signal depends on the step.
    gate = Dense(x.shape[-1], name="gate")(nn.silu(embedding))
    x *= gate[:, None, None]
    h = nn.Conv(
      self.out_channels * self.patch**2,
      (3, 3),
      kernel_init=nn.initializers.zeros,
      name="conv_out",
    )(jnp.concatenate([h, x], axis=-1))
    return depth_to_space(h, self.patch)
