"""Products over channels, for every position of [B, ..., C] alike.

The gradient of the kernel is a product over all positions. XLA's CPU backend
takes up to six times as long for it while the positions have several axes, for
it copies x transposed; on other platforms flattening may be what costs a copy.
So the gradient's form is the platform's, and all else is the plain product.
"""

import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax

from fairdiff_jax.models.platforms import with_kernel_gradient


def dot_general(
  x: jax.Array, kernel: jax.Array, dimension_numbers: Any, **options: Any
) -> jax.Array:
  """`jax.lax.dot_general` of a layer, with a fast gradient of the kernel.

  Args:
    x: [..., C1, ..., Cn].
    kernel: [C1, ..., Cn, ...].
    dimension_numbers: the contraction of these n axes, in order; no batch.
    options: of `jax.lax.dot_general`.
  """
  (contracted, _), _ = dimension_numbers
  kept = x.shape[: x.ndim - len(contracted)]
  features = math.prod(x.shape[len(kept) :])
  out = kernel.shape[len(contracted) :]
  # Kernels of several axes would be copied, transposed, for the gradient of x.
  x = x.reshape(*kept, features)
  kernel = kernel.reshape(features, -1)
  dot = partial(
    jax.lax.dot_general,
    dimension_numbers=(((len(kept),), (0,)), ((), ())),
    **options,
  )

  def on_rows(x, gradient):
    rows = x.reshape(-1, features)
    return rows.T @ gradient.reshape(len(rows), -1)

  if len(kept) > 1:
    dot = with_kernel_gradient(dot, on_rows)
  return dot(x, kernel).reshape(*kept, *out)


Dense = partial(nn.Dense, dot_general=dot_general)
DenseGeneral = partial(nn.DenseGeneral, dot_general=dot_general)


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """x [..., C] @ kernel [C, D]."""
  return dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


class PointwiseConv(nn.Module):
  """A 1 x 1 convolution, as the matrix product that it is.

  Attributes:
    features: channels of the output.
    dtype: of the computation, or None for that of input and parameters.
    kernel_init: of `kernel` [1, 1, C, features].
    use_bias: whether there is a bias.
  """

  features: int
  dtype: Any = None
  kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
  use_bias: bool = True

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[..., C] -> [..., features]."""
    shape = (1, 1, x.shape[-1], self.features)
    kernel = self.param("kernel", self.kernel_init, shape)
    bias = None
    if self.use_bias:
      bias = self.param("bias", nn.initializers.zeros, (self.features,))
    x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
    y = matmul(x, kernel[0, 0])
    return y if bias is None else y + bias
