"""The space in which images are diffused, as a record of pure functions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fairdiff_jax.objectives.task import Variables

# Of a mask's classes; the first three are the published ones.
HINT_COLORS = (
  *((1.0, 1.0, 1.0), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (0.0, 1.0, 0.0)),
  *((0.0, 0.0, 0.0), (1.0, 1.0, 0.0), (1.0, 0.0, 1.0), (0.0, 1.0, 1.0)),
  *((0.5, 0.0, 0.0), (0.0, 0.0, 0.5), (0.0, 0.5, 0.0), (0.5, 0.5, 0.5)),
  *((0.5, 0.5, 0.0), (0.5, 0.0, 0.5), (0.0, 0.5, 0.5), (1.0, 0.5, 0.0)),
)


def hint_image(mask: jax.Array) -> jax.Array:
  """Masks int32 [B, H, W] as RGB hints [B, H, W, 3] in [0, 1]."""
  return jnp.asarray(HINT_COLORS)[mask]


class Space(NamedTuple):
  """A space and its networks.

  Attributes:
    init: as `Task.init`.
    shape: (H, W) of an image -> shape of its x_0.
    encode: (variables, batch, keys [B]) -> x_0 [B, ...], and the prior of
      these cases: what is not diffused, a tree of arrays [B, ...].
    draw: (variables, mask [B, H, W], group [B], keys [B], image=None) -> the
      prior of new cases; `image` [B, H, W, C] is what they start from, if
      anything.
    condition: (variables, mask, group, prior, kept [B]) -> what `predict` is
      conditioned on, a tree of arrays [B, ...]; where not kept, what stands
      for no condition.
    predict: (variables, x_t [B, ...], t [B], condition) -> the network's
      output [B, ...].
    decode: (variables, x_0 [B, ...], prior) -> images [B, H, W, C].
    load: as `Task.load`.
  """

  init: Callable[[jax.Array], Variables]
  shape: Callable[[tuple[int, int]], tuple[int, ...]]
  encode: Callable[..., tuple[jax.Array, Any]]
  draw: Callable[..., Any]
  condition: Callable[..., Any]
  predict: Callable[..., jax.Array]
  decode: Callable[..., jax.Array]
  load: Callable[[], Variables] | None = None
