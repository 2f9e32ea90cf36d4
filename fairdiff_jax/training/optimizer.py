"""One optimiser per network, as a single optax transformation."""

from typing import Any

import optax


def _network_optimizer(config, num_updates: int):
  """AdamW with warm-up, cosine decay to 0 and clipping by global norm."""
  schedule = optax.warmup_cosine_decay_schedule(
    init_value=0.0,
    peak_value=config.learning_rate,
    warmup_steps=config.warmup_steps,
    decay_steps=max(num_updates, config.warmup_steps + 1),
  )
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.adamw(schedule, weight_decay=config.weight_decay),
  )


def make_optimizer(
  config, num_updates: dict[str, int]
) -> optax.GradientTransformation:
  """The networks' optimisers side by side.

  The state is a dict by network. `update` takes gradients of any subset of
  the networks: the others' state, with their step counts and moments, stays
  exactly as it is.

  Args:
    config: one entry per network with `learning_rate`, `warmup_steps`,
      `weight_decay` and `clip_norm`.
    num_updates: how many updates each network gets in the whole run.
  """
  optimizers = {
    name: _network_optimizer(config[name], count)
    for name, count in num_updates.items()
  }

  def init(params: dict[str, Any]):
    return {name: optimizers[name].init(params[name]) for name in params}

  def update(grads: dict[str, Any], state, params):
    updates, state = {}, dict(state)
    for name in grads:
      updates[name], state[name] = optimizers[name].update(
        grads[name], state[name], params[name]
      )
    return updates, state

  return optax.GradientTransformation(init, update)
