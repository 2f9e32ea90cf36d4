"""Convolutions of few channels, computed on pixels folded into channels.

Accelerators work on tiles of 128 channels: a convolution of 16 of them at
512 x 512 pixels leaves most of a tile empty. On f x f pixels folded into
channels the same numbers come from a convolution of f^2 times as many, whose
kernel is mostly zeros. A CPU has no tiles to fill and would multiply the zeros,
so there the pixels are unfolded for a plain convolution.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fairdiff_jax.models.unet import depth_to_space, space_to_depth

DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def _taps(fold: int, strides: int) -> np.ndarray:
  """Which tap joins which pixel to which, along one axis.

  Returns:
    0 or 1 [cells, fold, 3, fold / strides]: the cell, from the one before,
    the pixel in it, the tap, and the output's pixel.
  """
  taps = np.zeros((4 - strides, fold, 3, fold // strides), np.float32)
  for pixel in range(fold // strides):
    for tap in range(3):
      cell, row = divmod(strides * pixel + tap - 1, fold)
      taps[cell + 1, row, tap, pixel] = 1
  return taps


def _folded(x, kernel, *, fold, strides):
  taps = _taps(fold, strides).astype(x.dtype)
  cells, features = len(taps), (fold // strides) ** 2 * kernel.shape[-1]
  return jax.lax.conv_general_dilated(
    x,
    jnp.einsum("artp,bsuq,tuio->abrsipqo", taps, taps, kernel).reshape(
      cells, cells, x.shape[-1], features
    ),
    window_strides=(1, 1),
    padding=((1, cells - 2),) * 2,
    dimension_numbers=DIMENSIONS,
  )


def _unfolded(x, kernel, *, fold, strides):
  y = jax.lax.conv_general_dilated(
    depth_to_space(x, fold),
    kernel,
    window_strides=(strides, strides),
    padding=((1, 1), (1, 1)),
    dimension_numbers=DIMENSIONS,
  )
  return space_to_depth(y, fold // strides)


class FoldedConv(nn.Module):
  """A 3 x 3 convolution with padding 1 on folded pixels.

  `kernel` [3, 3, K, channels] and `bias` are those of the convolution as it is
  on unfolded pixels.

  Attributes:
    channels: of the unfolded output.
    fold: pixels in a cell's row, a multiple of `strides`.
    strides: 1 or 2.
    dtype: of the computation.
  """

  channels: int
  fold: int
  strides: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[B, h, w, fold^2 K] -> [B, h, w, (fold / strides)^2 channels].

    Both in the order of `space_to_depth`.
    """
    kernel = self.param(
      "kernel",
      nn.initializers.lecun_normal(),
      (3, 3, x.shape[-1] // self.fold**2, self.channels),
    )
    bias = self.param("bias", nn.initializers.zeros, (self.channels,))
    x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
    sizes = {"fold": self.fold, "strides": self.strides}
    y = jax.lax.platform_dependent(
      x,
      kernel,
      # What one form keeps for the backward pass, the other keeps as zeros:
      # let it be the input alone.
      cpu=jax.checkpoint(partial(_unfolded, **sizes)),
      default=partial(_folded, **sizes),
    )
    return y + jnp.tile(bias, (self.fold // self.strides) ** 2)
