"""One network as a record of pure functions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

PyTree = Any


class Variables(NamedTuple):
  """What a network is made of.

  Attributes:
    params: what learns.
    batch_stats: running statistics of batch normalisation.
    frozen: constants: statistics of the training data, imported weights.
  """

  params: PyTree
  batch_stats: PyTree
  frozen: PyTree


class Task(NamedTuple):
  """A network's part in the joint objective.

  Attributes:
    init: key -> Variables drawn at random; `frozen` holds no statistics yet,
      only stand-ins of the weights that must be imported.
    risk: (variables, batch, keys [B], train) -> (losses [B], aux); `aux` is a
      dict that holds 'batch_stats', 'weight' [B] where it is not the batch's,
      and what other terms need.
    sample: draws from the network; its signature is the network's own.
    load: () -> Variables to start from, as numpy arrays, in place of those of
      `init`; None where the config names no weights.
    logits: (variables, images [B, H, W, C]) -> scores of classes float32
      [B, H, W, classes]; None for networks that tell none apart.
    features: (variables, images [B, H, W, C]) -> what the network sees in each,
      pooled, float32 [B, F]; None likewise.
  """

  init: Callable[[jax.Array], Variables]
  risk: Callable[..., tuple[jax.Array, dict[str, Any]]]
  sample: Callable[..., jax.Array] | None = None
  load: Callable[[], Variables] | None = None
  logits: Callable[..., jax.Array] | None = None
  features: Callable[..., jax.Array] | None = None
