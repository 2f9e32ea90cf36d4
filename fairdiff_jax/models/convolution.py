"""Convolutions whose kernels have a gradient that is fast on CPUs as well.

With taps t, strides s and padded x, the gradient of a kernel is

  K'[t] = sum_p x[s p + t]^T g[p]

over all positions p: one product of a matrix of all taps' columns with another
of plain rows. XLA's CPU backend takes a convolution with a window as large as
the image for it, which costs up to ten times as much, or all columns at once,
which do not fit in a cache. So on a CPU some rows of the image at a time are
taken, and of x and g the one with fewer channels makes the columns. All else,
and other platforms, have the plain convolution's.
"""

import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fairdiff_jax.models.platforms import (
  at_a_time,
  devices_in_context,
  with_kernel_gradient,
)

DIMENSIONS = ("NHWC", "HWIO", "NHWC")
POSITIONS = 1024  # at a time, whose columns stay in a cache


def conv_general_dilated(
  x: jax.Array,
  kernel: jax.Array,
  window_strides: Any,
  padding: Any,
  *,
  dimension_numbers: Any = DIMENSIONS,
  **options: Any,
) -> jax.Array:
  """`jax.lax.conv_general_dilated` of a layer, without dilation or groups.

  Args:
    x: [B, H, W, C].
    kernel: [h, w, C, D].
    window_strides: in both directions.
    padding: as there.
    dimension_numbers: `DIMENSIONS`, in any form.
    options: of `jax.lax.conv_general_dilated`.
  """
  if isinstance(padding, str):
    padding = jax.lax.padtype_to_pads(
      x.shape[1:3], kernel.shape[:2], window_strides, padding
    )
  padding = tuple((int(low), int(high)) for low, high in padding)
  strides = tuple(window_strides)
  convolve = partial(
    jax.lax.conv_general_dilated,
    window_strides=strides,
    padding=padding,
    dimension_numbers=dimension_numbers,
    **options,
  )

  by_rows = partial(
    _kernel_gradient, taps=kernel.shape[:2], strides=strides, padding=padding
  )
  return with_kernel_gradient(convolve, by_rows)(x, kernel)


def _kernel_gradient(x, g, taps, strides, padding):
  """[h, w, C, D] from x [B, H, W, C] and g of the output."""
  same = strides == (1, 1) and x.shape[1:3] == g.shape[1:3]
  if same and g.shape[-1] < x.shape[-1]:
    # x[p] meets g[p - t + low]: taps run backwards over padded g.
    around = [
      (size - 1 - low, size - 1 - high)
      for size, (low, high) in zip(taps, padding, strict=True)
    ]
    found = _products(x, _pad(g, around), taps, strides)
    return found[:, ::-1, ::-1].transpose(1, 2, 0, 3)
  found = _products(g, _pad(x, padding), taps, strides)
  return found.transpose(1, 2, 3, 0)


def _pad(x, padding):
  return jnp.pad(x, ((0, 0), *padding, (0, 0)))


def _products(rows, others, taps, strides):
  """Sums over positions p of rows[p]^T others[s p + t] for every tap t.

  Args:
    rows: [B, h, w, C].
    others: [B, H, W, D].
    taps: (height, width) of t.
    strides: s.

  Returns:
    [C, *taps, D], float32.
  """
  batch, height, width, channels = rows.shape
  # Devices that share a batch add up once, rather than at every turn.
  shares = devices_in_context()
  shares = shares if batch % shares == 0 else 1
  number = at_a_time(height, POSITIONS * shares // (batch * width))
  down, right = (
    (n - 1) * s + 1 for n, s in zip((number, width), strides, strict=True)
  )

  def turn(total, first):
    here = jax.lax.dynamic_slice_in_dim(rows, first, number, 1)
    there = jax.lax.dynamic_slice_in_dim(
      others, first * strides[0], down + taps[0] - 1, 1
    )
    columns = jnp.concatenate(
      [
        there[:, i : i + down : strides[0], j : j + right : strides[1]]
        for i in range(taps[0])
        for j in range(taps[1])
      ],
      axis=-1,
    )
    product = jnp.einsum(
      "spc,spd->scd",
      here.reshape(shares, -1, channels),
      columns.reshape(shares, -1, columns.shape[-1]),
      preferred_element_type=jnp.float32,
    )
    return total + product, None

  depth = math.prod(taps) * others.shape[-1]
  total = jnp.zeros((shares, channels, depth), jnp.float32)
  total, _ = jax.lax.scan(turn, total, jnp.arange(0, height, number))
  return total.sum(0).reshape(channels, *taps, -1)


Conv = partial(nn.Conv, conv_general_dilated=conv_general_dilated)
