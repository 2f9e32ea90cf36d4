r"""Risk of the adversary, which tells groups apart by the segmenter's features.

    l = -log p(a_i | f_i)

The features enter through `reverse`, so that one gradient step teaches the
adversary to recognise the group and the segmenter to hide it (Ganin et al.
2016).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from fairdiff_jax.objectives.task import Task, Variables


def reverse(x: jax.Array, strength: float) -> jax.Array:
  """x, whose gradient is multiplied by -strength."""
  return (1 + strength) * jax.lax.stop_gradient(x) - strength * x


class Adversary(nn.Module):
  """Features [B, F] -> logits over groups [B, num_groups]."""

  width: int
  num_groups: int

  @nn.compact
  def __call__(self, features: jax.Array) -> jax.Array:
    x = nn.relu(nn.Dense(self.width, name="dense_0")(features))
    return nn.Dense(self.num_groups, name="dense_1")(x)


def adversary_task(width: int, num_features: int, num_groups: int) -> Task:
  """The adversary of method 'adversarial'.

  Its batches hold 'features' [B, F] and 'group' [B]; cases of unknown group
  have risk 0.
  """
  module = Adversary(width, num_groups)

  def init(key):
    variables = module.init(key, jnp.zeros((1, num_features)))
    return Variables(variables["params"], {}, {})

  def risk(variables, batch, keys, train):
    del keys, train
    group = batch["group"]
    logits = module.apply({"params": variables.params}, batch["features"])
    losses = optax.softmax_cross_entropy_with_integer_labels(
      logits, jnp.maximum(group, 0)
    )
    return jnp.where(group < 0, 0, losses), {"batch_stats": {}}

  return Task(init, risk)
