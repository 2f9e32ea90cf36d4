"""What layers do differently by the platform and the devices they run on."""

import math
from collections.abc import Callable

import jax


def with_kernel_gradient(
  layer: Callable[[jax.Array, jax.Array], jax.Array],
  on_cpu: Callable[[jax.Array, jax.Array], jax.Array],
) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """A layer whose kernel has a gradient of another form on CPUs.

  The form is chosen when a program is lowered for a platform; values, the
  gradient in the input, and other platforms have the layer's own.

  Args:
    layer: (x, kernel) -> y, linear in both.
    on_cpu: (x, gradient in y) -> the gradient in the kernel, of any type and
      shape that have its numbers in order.
  """

  @jax.custom_vjp
  def apply(x, kernel):
    return layer(x, kernel)

  def forward(x, kernel):
    return layer(x, kernel), (x, kernel)

  def backward(residuals, gradient):
    x, kernel = residuals

    def plain(x, gradient):
      _, transpose = jax.vjp(lambda kernel: layer(x, kernel), kernel)
      return transpose(gradient)[0]

    def other(x, gradient):
      return on_cpu(x, gradient).reshape(kernel.shape).astype(kernel.dtype)

    _, transpose = jax.vjp(lambda x: layer(x, kernel), x)
    of_kernel = jax.lax.platform_dependent(
      x, gradient, cpu=other, default=plain
    )
    return *transpose(gradient), of_kernel

  apply.defvjp(forward, backward)
  return apply


def at_a_time(length: int, most: int) -> int:
  """The largest divisor of a length that is not above `most`, at least 1."""
  return max(
    n for n in range(1, length + 1) if not length % n and n <= max(most, 1)
  )


def devices_in_context() -> int:
  """Devices that share a batch: those of the mesh in context, 1 without."""
  mesh = jax.sharding.get_abstract_mesh()
  return math.prod(mesh.shape[name] for name in mesh.auto_axes)
