"""TransUNet (Chen et al. 2021): a vision transformer inside a U-Net.

The encoder is the hybrid R50 + ViT-B/16 of Dosovitskiy et al. (2021), whose
weights Google publishes: a ResNet with standardised weights and group
normalisation (Kolesnikov et al. 2020) down to stride 16, then a transformer
over its pixels. The decoder doubles the resolution four times and takes the
ResNet's activations at strides 8, 4 and 2 as skips. Without stages of the
ResNet the transformer reads 16 x 16 patches and there are no skips: ViT-B/16.

Where the published PyTorch code differs from Google's, this follows the former,
since its checkpoints do: the max pooling has no padding (its result is one
pixel short, made up for by zeros in the skip), an upsampling aligns corners,
and the position embedding has no class token.

Images are NHWC. Parameters, normalisations and softmax are float32.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fairdiff_jax.models.attention import attend
from fairdiff_jax.models.batch_norm import BatchNorm
from fairdiff_jax.models.convolution import Conv
from fairdiff_jax.models.pointwise import (
  Dense,
  DenseGeneral,
  PointwiseConv,
  matmul,
)

PATCH = 16  # pixels of the image per position of the transformer


class StandardizedConv(nn.Module):
  """Convolution, without bias, of a kernel w made (w - mean) / std.

  Mean and variance are over height, width and inputs; 1e-5 is added to the
  variance. Padding is (k - 1) / 2 on either side.

  Attributes:
    features: output channels.
    size: k, odd.
    stride: in both directions.
    dtype: of the convolution.
  """

  features: int
  size: int
  stride: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = self.param(
      "kernel",
      nn.initializers.lecun_normal(),
      (self.size, self.size, x.shape[-1], self.features),
    )
    mean = jnp.mean(kernel, axis=(0, 1, 2))
    var = jnp.mean(jnp.square(kernel - mean), axis=(0, 1, 2))
    kernel = (kernel - mean) * jax.lax.rsqrt(var + 1e-5)
    if self.size == 1:
      x = x[:, :: self.stride, :: self.stride].astype(self.dtype)
      return matmul(x, kernel[0, 0].astype(self.dtype))
    pad = self.size // 2
    return jax.lax.conv_general_dilated(
      x.astype(self.dtype),
      kernel.astype(self.dtype),
      (self.stride, self.stride),
      ((pad, pad), (pad, pad)),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _group_norm(groups, dtype, name, epsilon=1e-6):
  return nn.GroupNorm(
    groups, epsilon=epsilon, use_fast_variance=False, dtype=dtype, name=name
  )


class Bottleneck(nn.Module):
  """Residual unit 1 x 1, 3 x 3, 1 x 1 with 4 * width outputs.

  The shortcut is projected where the stride or the channels change; its
  normalisation has a group for every channel.
  """

  width: int
  stride: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    features, dtype = 4 * self.width, self.dtype
    y = StandardizedConv(self.width, 1, dtype=dtype, name="conv1")(x)
    y = nn.relu(_group_norm(32, dtype, "norm1")(y))
    y = StandardizedConv(self.width, 3, self.stride, dtype, name="conv2")(y)
    y = nn.relu(_group_norm(32, dtype, "norm2")(y))
    y = StandardizedConv(features, 1, dtype=dtype, name="conv3")(y)
    y = _group_norm(32, dtype, "norm3")(y)
    if self.stride != 1 or x.shape[-1] != features:
      x = StandardizedConv(features, 1, self.stride, dtype, name="shortcut")(x)
      x = _group_norm(features, dtype, "shortcut_norm", epsilon=1e-5)(x)
    return nn.relu(x + y)


class ResNet(nn.Module):
  """Images [B, H, W, 3] -> [B, H/16, W/16, C] and skips, deepest first.

  Attributes:
    stages: residual units of each of the three stages.
    width: of the first convolution, a multiple of 32; stage i has
      2^(i + 2) * width channels.
  """

  stages: Sequence[int]
  width: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, image: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
    _, height, width, _ = image.shape
    x = StandardizedConv(self.width, 7, 2, self.dtype, name="root")(image)
    x = nn.relu(_group_norm(32, self.dtype, "root_norm")(x))
    skips = [x]
    x = nn.max_pool(x, (3, 3), strides=(2, 2))
    for i, num_units in enumerate(self.stages):
      for j in range(num_units):
        stride = 2 if i and not j else 1
        name = f"stage_{i}_unit_{j}"
        x = Bottleneck(self.width * 2**i, stride, self.dtype, name=name)(x)
      total = 4 * 2**i
      pad = (height // total - x.shape[1], width // total - x.shape[2])
      skips.append(jnp.pad(x, ((0, 0), (0, pad[0]), (0, pad[1]), (0, 0))))
    return x, skips[-2::-1]  # The last stage's output is no skip.


class TransformerBlock(nn.Module):
  """Self-attention and a feed-forward layer, each normalised before.

  Attributes:
    num_heads: must divide the channels.
    mlp_dim: hidden size of the feed-forward layer.
    dropout_rate: after both of its matrices, in training.
  """

  num_heads: int
  mlp_dim: int
  dropout_rate: float = 0.0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Tokens [B, N, C] -> [B, N, C]."""
    channels = x.shape[-1]
    heads = (self.num_heads, channels // self.num_heads)
    y = _layer_norm(self.dtype, "norm1")(x)
    query, key, value = (
      DenseGeneral(heads, dtype=self.dtype, name=name)(y).swapaxes(1, 2)
      for name in ("query", "key", "value")
    )
    y = attend(query, key, value).swapaxes(1, 2)
    x += DenseGeneral(channels, (-2, -1), dtype=self.dtype, name="out")(y)

    dropout = nn.Dropout(self.dropout_rate, deterministic=not train)
    y = _layer_norm(self.dtype, "norm2")(x)
    y = Dense(self.mlp_dim, dtype=self.dtype, name="expand")(y)
    y = dropout(nn.gelu(y, approximate=False))
    y = Dense(channels, dtype=self.dtype, name="contract")(y)
    return x + dropout(y)


def _layer_norm(dtype, name):
  return nn.LayerNorm(
    epsilon=1e-6, use_fast_variance=False, dtype=dtype, name=name
  )


class Encoder(nn.Module):
  """Images [B, H, W, 3] -> positions [B, H/16, W/16, D] and skips."""

  stages: Sequence[int]
  width: int
  hidden_dim: int
  mlp_dim: int
  num_heads: int
  num_layers: int
  dropout_rate: float = 0.0
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, image: jax.Array, train: bool = False
  ) -> tuple[jax.Array, list[jax.Array]]:
    skips, name = [], "patch_embedding"
    if self.stages:
      resnet = ResNet(self.stages, self.width, self.dtype, name="resnet")
      x, skips = resnet(image)
      x = PointwiseConv(self.hidden_dim, self.dtype, name=name)(x)
    else:
      x = nn.Conv(
        self.hidden_dim,
        (PATCH, PATCH),
        strides=PATCH,
        padding="VALID",
        dtype=self.dtype,
        name=name,
      )(image)
    grid = x.shape
    x = x.reshape(grid[0], -1, self.hidden_dim)
    position = self.param(
      "position_embedding", nn.initializers.normal(0.02), (1, *x.shape[1:])
    )
    x += position.astype(self.dtype)
    x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
    for i in range(self.num_layers):
      x = TransformerBlock(
        self.num_heads,
        self.mlp_dim,
        self.dropout_rate,
        self.dtype,
        name=f"layer_{i}",
      )(x, train)
    return _layer_norm(self.dtype, "norm")(x).reshape(grid), skips


def upsample(x: jax.Array) -> jax.Array:
  """Doubles H and W of [B, H, W, C] linearly; the corner pixels stay put."""

  def weights(size):
    """[2 size, size]: each output's weights, a hat around its position."""
    position = np.linspace(0, size - 1, 2 * size)
    distance = np.abs(position[:, None] - np.arange(size))
    return jnp.asarray(np.maximum(1 - distance, 0), x.dtype)

  _, height, width, _ = x.shape
  x = jnp.einsum("ph,bhwc->bpwc", weights(height), x)
  return jnp.einsum("qw,bpwc->bpqc", weights(width), x)


class ConvNormReLU(nn.Module):
  """3 x 3 convolution, batch normalisation, ReLU."""

  features: int
  axis_name: str | None = None
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, weight, train):
    x = Conv(
      self.features, (3, 3), use_bias=False, dtype=self.dtype, name="conv"
    )(x)
    return nn.relu(BatchNorm(self.axis_name, name="norm")(x, weight, train))


class DecoderBlock(nn.Module):
  """Doubles the resolution, joins a skip, and convolves twice."""

  features: int
  axis_name: str | None = None
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    skip: jax.Array | None = None,
    weight: jax.Array | None = None,
    train: bool = False,
  ) -> jax.Array:
    """[B, H, W, C] and a skip [B, 2H, 2W, K] -> [B, 2H, 2W, features]."""
    x = upsample(x)
    if skip is not None:
      x = jnp.concatenate([x, skip], axis=-1)
    for name in ("conv1", "conv2"):
      layer = ConvNormReLU(self.features, self.axis_name, self.dtype, name=name)
      x = layer(x, weight, train)
    return x


class Decoder(nn.Module):
  """Positions [B, H/16, W/16, D] and skips -> logits [B, H, W, classes]."""

  channels: Sequence[int]
  num_classes: int
  axis_name: str | None = None
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, skips, weight, train):
    first, *channels = self.channels
    x = ConvNormReLU(first, self.axis_name, self.dtype, name="conv_in")(
      x, weight, train
    )
    for i, features in enumerate(channels):
      skip = skips[i] if i < len(skips) else None
      block = DecoderBlock(
        features, self.axis_name, self.dtype, name=f"block_{i}"
      )
      x = block(x, skip, weight, train)
    head = Conv(self.num_classes, (3, 3), dtype=self.dtype, name="conv_out")
    return head(x)


class TransUNet(nn.Module):
  """Images to logits; the defaults are the published R50 + ViT-B/16.

  The position embedding fits the image size of `init` and no other. The mean
  [B, hidden_dim] of the transformer's output is sown as intermediate
  'features'.

  Attributes:
    num_classes: with the background.
    stages: residual units of the ResNet's three stages; () for ViT-B/16.
    width: of its first convolution, a multiple of 32.
    hidden_dim: D, the transformer's channels.
    mlp_dim: hidden size of its feed-forward layers.
    num_heads: must divide D.
    num_layers: transformer blocks.
    decoder_channels: of the first convolution and the four upsampling blocks.
    dropout_rate: on the embedding and in the feed-forward layers, in training;
      above 0 it needs an RNG 'dropout'. The original trains with 0.1.
    axis_name: mapped axis that holds the shards of the batch, or None.
    dtype: of the computation.
  """

  num_classes: int = 3
  stages: Sequence[int] = (3, 4, 9)
  width: int = 64
  hidden_dim: int = 768
  mlp_dim: int = 3072
  num_heads: int = 12
  num_layers: int = 12
  decoder_channels: Sequence[int] = (512, 256, 128, 64, 16)
  dropout_rate: float = 0.0
  axis_name: str | None = None
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    image: jax.Array,
    train: bool = False,
    weight: jax.Array | None = None,
  ) -> jax.Array:
    """Logits of every pixel.

    Args:
      image: [B, H, W, 1] or [B, H, W, 3]; one channel is repeated to three. H
        and W are multiples of 16.
      train: normalise by the batch, update 'batch_stats', drop out.
      weight: [B], 0 for padding, or None; matters to batch statistics alone.

    Returns:
      [B, H, W, num_classes], float32.

    Raises:
      ValueError: the image or the network has a size that does not fit.
    """
    height, width, channels = image.shape[1:]
    if height % PATCH or width % PATCH:
      raise ValueError(
        f"height and width must be multiples of {PATCH}, got {height} x {width}"
      )
    if channels not in (1, 3):
      raise ValueError(f"images must have 1 or 3 channels, got {channels}")
    if len(self.stages) not in (0, 3):
      raise ValueError(f"stages must be three numbers or (), got {self.stages}")
    if len(self.decoder_channels) != 5:
      raise ValueError(
        f"decoder_channels must be five, got {self.decoder_channels}"
      )
    if self.hidden_dim % self.num_heads:
      raise ValueError(
        f"num_heads={self.num_heads} does not divide"
        f" hidden_dim={self.hidden_dim}"
      )

    if channels == 1:
      image = jnp.repeat(image, 3, axis=-1)
    encoder = Encoder(
      self.stages,
      self.width,
      self.hidden_dim,
      self.mlp_dim,
      self.num_heads,
      self.num_layers,
      self.dropout_rate,
      self.dtype,
      name="encoder",
    )
    x, skips = encoder(image, train)
    self.sow("intermediates", "features", jnp.mean(x, axis=(1, 2)))
    decoder = Decoder(
      self.decoder_channels,
      self.num_classes,
      self.axis_name,
      self.dtype,
      name="decoder",
    )
    return decoder(x, skips, weight, train).astype(jnp.float32)
