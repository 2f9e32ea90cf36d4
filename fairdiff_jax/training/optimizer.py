"""One optimiser per network, as a single optax transformation."""

from collections.abc import Callable
from typing import Any

import jax
import optax

MOMENTUM = 0.9  # of 'sgd'
POWER = 0.9  # of decay 'poly'


def _schedule(config, num_updates: int):
  """Warm-up from 0, then the decay that `config.decay` names."""
  peak, warmup = config.learning_rate, config.warmup_steps
  rest = max(num_updates - warmup, 1)
  decays = {
    "cosine": lambda: optax.cosine_decay_schedule(peak, rest),
    "poly": lambda: optax.polynomial_schedule(peak, 0.0, POWER, rest),
    "constant": lambda: optax.constant_schedule(peak),
  }
  if config.decay not in decays:
    raise ValueError(
      f"unknown optimizer decay {config.decay!r}; use one of"
      f" {', '.join(decays)}"
    )
  decay = decays[config.decay]()
  if not warmup:
    return decay
  return optax.join_schedules(
    [optax.linear_schedule(0.0, peak, warmup), decay], [warmup]
  )


def _network_optimizer(config, num_updates: int):
  """AdamW, or SGD with momentum, clipping by global norm before."""
  schedule = _schedule(config, num_updates // config.accumulate)
  kinds = {
    "adamw": lambda: optax.adamw(schedule, weight_decay=config.weight_decay),
    # Decay enters the momentum, as in PyTorch's SGD.
    "sgd": lambda: optax.chain(
      optax.add_decayed_weights(config.weight_decay),
      optax.sgd(schedule, momentum=MOMENTUM),
    ),
  }
  if config.kind not in kinds:
    raise ValueError(
      f"unknown optimizer kind {config.kind!r}; use one of {', '.join(kinds)}"
    )
  optimizer = kinds[config.kind]()
  if config.clip_norm:
    optimizer = optax.chain(
      optax.clip_by_global_norm(config.clip_norm), optimizer
    )
  if config.accumulate > 1:
    steps = optax.MultiSteps(optimizer, config.accumulate)
    optimizer = steps.gradient_transformation()
  return optimizer


def learning_rate(
  config, num_updates: int
) -> Callable[[jax.Array], jax.Array | float]:
  """A network's learning rate, by the number of steps that it has learned.

  Args:
    config: of its optimiser.
    num_updates: how many steps it learns in the whole run.
  """
  schedule = _schedule(config, num_updates // config.accumulate)
  return lambda done: schedule(done // config.accumulate)


def make_optimizer(
  config, num_updates: dict[str, int]
) -> optax.GradientTransformation:
  """The networks' optimisers side by side.

  The state is a dict by network. `update` takes gradients of any subset of
  the networks: the others' state, with their step counts and moments, stays
  exactly as it is.

  Args:
    config: one entry per network with `kind`, `learning_rate`, `decay`,
      `warmup_steps`, `weight_decay`, `clip_norm` and `accumulate`.
    num_updates: how many steps each network learns in the whole run.

  Raises:
    ValueError: if a `kind` or `decay` is unknown.
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
