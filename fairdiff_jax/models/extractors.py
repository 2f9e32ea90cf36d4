"""Published networks that see images, for distances between sets of them.

Inception is the one of FID: Inception-v3 (Szegedy et al. 2016) as its 2015
TensorFlow graph computes it. Means near the border count no padding, the last
block takes a maximum where the others take a mean, and images are resized as
TensorFlow 1 did. ResNet is that of He et al. (2016), with the stride in the
3 x 3 convolution as torchvision has it.

Layers are called as the tensors of the published files are. Weights are fixed,
so batch normalisation is by running statistics alone.
"""

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fairdiff_jax.models.batch_norm import BatchNorm

MEAN, SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's

# Convolutions (channels, kernel) one after another; a pair of them takes the
# same and joins what they give.
Chain = tuple[tuple, ...]


def _rgb(image: jax.Array) -> jax.Array:
  """uint8 [B, H, W] or [B, H, W, 3] -> float32 [B, H, W, 3], 0 to 255."""
  x = image.astype(jnp.float32)
  return jnp.repeat(x[..., None], 3, axis=-1) if x.ndim == 3 else x


def resize_like_tensorflow(x: jax.Array, size: int) -> jax.Array:
  """Bilinear as TensorFlow 1: output i of n pixels lies at i n / size.

  So the first pixel stays put, the last ones repeat, and nothing is smoothed
  where an image shrinks.

  Args:
    x: [B, H, W, C].
    size: side of the result.
  """

  def weights(length):
    """[size, length]: each output's weights, a hat around its position."""
    position = np.arange(size, dtype=np.float32) * np.float32(length / size)
    distance = np.minimum(position, length - 1)[:, None] - np.arange(length)
    return jnp.asarray(np.maximum(1 - np.abs(distance), 0), x.dtype)

  _, height, width, _ = x.shape
  multiply = partial(jnp.einsum, precision="highest")
  x = multiply("ph,bhwc->bpwc", weights(height), x)
  return multiply("qw,bpwc->bpqc", weights(width), x)


# Figures compare across devices: no fewer bits than float32 has.
_conv = partial(nn.Conv, use_bias=False, precision="highest")


class ConvNormReLU(nn.Module):
  """Convolution, normalisation, ReLU."""

  channels: int
  kernel: int | tuple[int, int] = 1
  strides: int = 1
  padding: str = "SAME"

  @nn.compact
  def __call__(self, x):
    kernel = np.broadcast_to(self.kernel, 2).tolist()
    x = _conv(
      self.channels, kernel, self.strides, padding=self.padding, name="conv"
    )(x)
    return nn.relu(BatchNorm(epsilon=1e-3, name="bn")(x, None, False))


class Mixed(nn.Module):
  """Chains of convolutions side by side, and a pooled one.

  Attributes:
    chains: (name, chain) each; '_pool' starts from what is pooled.
    pool: 'mean' or 'max', over 3 x 3.
    halve: whether the last convolution of every chain has stride 2, and what is
      pooled likewise joins them without one.
  """

  chains: tuple[tuple[str, Chain], ...]
  pool: str = "mean"
  halve: bool = False

  @nn.compact
  def __call__(self, x):
    if self.halve:
      pooled = nn.max_pool(x, (3, 3), (2, 2))
    elif self.pool == "max":
      pooled = nn.max_pool(x, (3, 3), padding="SAME")
    else:
      pooled = nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)
    found = []
    for name, chain in self.chains:
      y = pooled if name == "_pool" else x
      for i, of in enumerate(chain, 1):
        place = f"branch{name}_{i}" if len(chain) > 1 else f"branch{name}"
        if isinstance(of[0], tuple):
          pair = zip("ab", of, strict=True)
          sides = [ConvNormReLU(*o, name=f"{place}{side}") for side, o in pair]
          y = jnp.concatenate([side(y) for side in sides], axis=-1)
        elif self.halve and i == len(chain):
          y = ConvNormReLU(*of, 2, "VALID", name=place)(y)
        else:
          y = ConvNormReLU(*of, name=place)(y)
      found.append(y)
    return jnp.concatenate([*found, *[pooled] * self.halve], axis=-1)


def _mixed_5(pool):
  return (
    ("1x1", ((64, 1),)),
    ("5x5", ((48, 1), (64, 5))),
    ("3x3dbl", ((64, 1), (96, 3), (96, 3))),
    ("_pool", ((pool, 1),)),
  )


def _mixed_6(n):
  row, column = (1, 7), (7, 1)
  return (
    ("1x1", ((192, 1),)),
    ("7x7", ((n, 1), (n, row), (192, column))),
    ("7x7dbl", ((n, 1), (n, column), (n, row), (n, column), (192, row))),
    ("_pool", ((192, 1),)),
  )


_FORK = ((384, (1, 3)), (384, (3, 1)))
_MIXED_7 = (
  ("1x1", ((320, 1),)),
  ("3x3", ((384, 1), _FORK)),
  ("3x3dbl", ((448, 1), (384, 3), _FORK)),
  ("_pool", ((192, 1),)),
)
BLOCKS = {
  "Mixed_5b": dict(chains=_mixed_5(32)),
  "Mixed_5c": dict(chains=_mixed_5(64)),
  "Mixed_5d": dict(chains=_mixed_5(64)),
  "Mixed_6a": dict(
    chains=(("3x3", ((384, 3),)), ("3x3dbl", ((64, 1), (96, 3), (96, 3)))),
    halve=True,
  ),
  "Mixed_6b": dict(chains=_mixed_6(128)),
  "Mixed_6c": dict(chains=_mixed_6(160)),
  "Mixed_6d": dict(chains=_mixed_6(160)),
  "Mixed_6e": dict(chains=_mixed_6(192)),
  "Mixed_7a": dict(
    chains=(
      ("3x3", ((192, 1), (320, 3))),
      ("7x7x3", ((192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3))),
    ),
    halve=True,
  ),
  "Mixed_7b": dict(chains=_MIXED_7),
  "Mixed_7c": dict(chains=_MIXED_7, pool="max"),
}


class Inception(nn.Module):
  """The Inception-v3 of FID, up to its last pooling."""

  @nn.compact
  def __call__(self, image: jax.Array) -> jax.Array:
    """uint8 [B, H, W] or RGB [B, H, W, 3] -> float32 [B, 2048]."""
    x = (resize_like_tensorflow(_rgb(image), 299) - 128) / 128
    x = ConvNormReLU(32, 3, 2, "VALID", name="Conv2d_1a_3x3")(x)
    x = ConvNormReLU(32, 3, 1, "VALID", name="Conv2d_2a_3x3")(x)
    x = ConvNormReLU(64, 3, name="Conv2d_2b_3x3")(x)
    x = nn.max_pool(x, (3, 3), (2, 2))
    x = ConvNormReLU(80, 1, name="Conv2d_3b_1x1")(x)
    x = ConvNormReLU(192, 3, 1, "VALID", name="Conv2d_4a_3x3")(x)
    x = nn.max_pool(x, (3, 3), (2, 2))
    for name, of in BLOCKS.items():
      x = Mixed(**of, name=name)(x)
    return x.mean((1, 2))


class Bottleneck(nn.Module):
  """Residual block of three convolutions."""

  channels: int
  strides: int
  project: bool

  @nn.compact
  def __call__(self, x):
    norm = partial(BatchNorm, epsilon=1e-5)
    y = _conv(self.channels, (1, 1), name="conv1")(x)
    y = nn.relu(norm(name="bn1")(y, None, False))
    y = _conv(self.channels, (3, 3), self.strides, padding=1, name="conv2")(y)
    y = nn.relu(norm(name="bn2")(y, None, False))
    y = _conv(4 * self.channels, (1, 1), name="conv3")(y)
    y = norm(name="bn3")(y, None, False)
    if self.project:
      x = _conv(y.shape[-1], (1, 1), self.strides, name="downsample.0")(x)
      x = norm(name="downsample.1")(x, None, False)
    return nn.relu(x + y)


class ResNet(nn.Module):
  """A ResNet up to its last pooling; by default ResNet-50.

  Attributes:
    stages: residual blocks of each.
    width: channels of the first convolution.
  """

  stages: Sequence[int] = (3, 4, 6, 3)
  width: int = 64

  @nn.compact
  def __call__(self, image: jax.Array) -> jax.Array:
    """uint8 [B, H, W] or RGB [B, H, W, 3] -> float32 [B, F], F 32 widths.

    Images are resized to 224 x 224, smoothed where they shrink.
    """
    x = _rgb(image)
    x = jax.image.resize(x, (len(x), 224, 224, 3), "linear") / 255
    x = (x - np.float32(MEAN)) / np.float32(SPREAD)
    x = _conv(self.width, (7, 7), 2, padding=3, name="conv1")(x)
    x = nn.relu(BatchNorm(epsilon=1e-5, name="bn1")(x, None, False))
    x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
    for i, blocks in enumerate(self.stages):
      for j in range(blocks):
        x = Bottleneck(
          self.width * 2**i,
          strides=2 if i and not j else 1,
          project=not j,
          name=f"layer{i + 1}.{j}",
        )(x)
    return x.mean((1, 2))
