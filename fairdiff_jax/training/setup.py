"""What a config fixes before any data is seen, and the state to start from."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from fairdiff_jax.config import check
from fairdiff_jax.data import domain, groups, statistics
from fairdiff_jax.data.cases import Cases, require_training
from fairdiff_jax.objectives.joint import NETWORKS, Objective, make_objective
from fairdiff_jax.training.checkpoint import describe
from fairdiff_jax.training.latents import cached_shape
from fairdiff_jax.training.mesh import make_mesh, tree_shardings
from fairdiff_jax.training.optimizer import learning_rate, make_optimizer
from fairdiff_jax.training.schedule import learning_steps
from fairdiff_jax.training.start import start_from_weights
from fairdiff_jax.training.step import (
  AXIS,
  TrainState,
  compile_step,
  init_state,
  train_step,
)


class Setup(NamedTuple):
  """What a config fixes before any data is seen."""

  config: Any
  objective: Objective
  optimizer: optax.GradientTransformation
  mesh: Mesh
  abstract: TrainState  # shapes and shardings of the state
  # (statistics, training cases of every group [G]) -> the initial state
  init: Callable[[Any, np.ndarray], TrainState]

  @property
  def domain(self) -> domain.Domain:
    """What masks and images show."""
    return domain.of(self.config.data.domain, self.config.data.source)


def setup(config, devices: Sequence[jax.Device] | None = None) -> Setup:
  """Builds objective, optimiser and mesh, and describes the state.

  Networks that never learn are left out.

  Args:
    config: the run's config.
    devices: the mesh's devices; None for all of all hosts.

  Raises:
    ValueError: the config cannot run, or not on so many devices.
  """
  check(config, jax.device_count() if devices is None else len(devices))
  objective, optimizer, init = _build(config)
  mesh = make_mesh(config.parallel.fsdp, devices)
  abstract = describe(
    partial(init, *_no_data(config, objective)),
    lambda tree: tree_shardings(tree, mesh, config.parallel.rules),
  )
  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  return Setup(
    config,
    objective,
    optimizer,
    mesh,
    abstract,
    # Compiled once for one use: optimising it takes longer than running it.
    jax.jit(
      init,
      out_shardings=shardings,
      compiler_options={"xla_backend_optimization_level": 0},
    ),
  )


def state_shapes(config) -> Any:
  """Shapes and types of the state of a run, whatever its devices."""
  objective, _, init = _build(config)
  return jax.eval_shape(partial(init, *_no_data(config, objective)))


def _build(config):
  """Objective, optimiser and (statistics, cases [G]) -> the initial state."""
  names = groups.group_names(
    config.data.attribute,
    config.data.pooled,
    groups.vocabulary_of(config.data),
  )
  axis_name = AXIS if config.parallel.compile == "pmap" else None
  num_updates = _num_updates(config)
  objective = make_objective(config, names, tuple(num_updates), axis_name)
  optimizer = make_optimizer(config.optimizer, num_updates)
  key = jax.random.key(config.seed)
  init = partial(init_state, key, objective=objective, optimizer=optimizer)
  # Traced once, to describe the state and to compute it.
  return objective, optimizer, jax.jit(init)


def _num_updates(config) -> dict[str, int]:
  """How many steps every network learns that learns at all."""
  spans = {name: learning_steps(config, name) for name in NETWORKS}
  return {name: b - a for name, (a, b) in spans.items() if b > a}


def _no_data(config, objective):
  """Statistics and group sizes of the right shapes."""
  number = len(objective.group_names)
  seen = domain.of(config.data.domain, config.data.source)
  return (
    _constants(statistics.shapes(number, seen), objective),
    np.zeros(number, np.float32),
  )


def _constants(stats: dict[str, Any], objective: Objective) -> dict[str, Any]:
  return {name: stats[name] for name in objective.tasks}


def initial_state(run: Setup, cases: Cases, group: np.ndarray) -> TrainState:
  """The state before the first step.

  Args:
    run: set-up of the run.
    cases: training cases.
    group: of each case [n], -1 for unknown.

  Raises:
    ValueError: they are no training cases.
  """
  require_training(cases, "the initial state")
  number = len(run.objective.group_names)
  stats = statistics.compute(
    cases, group, number, intensity_prior=run.config.image.intensity_prior
  )
  counts = groups.group_counts(group, number).astype(np.float32)
  return start_from_weights(
    run.init(_constants(stats, run.objective), counts),
    run.objective,
    run.abstract,
  )


def make_step(
  run: Setup, active: tuple[str, ...]
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]:
  """Compiles the train step of a phase: (state, host's batch) -> the next."""
  if not active:
    return partial(_count, run.abstract.step)
  return compile_step(
    step_function(run, active),
    mesh=run.mesh,
    state=run.abstract,
    batch=describe_batch(run.config, active),
    mode=run.config.parallel.compile,
  )


def _count(like: jax.ShapeDtypeStruct, state: TrainState, _):
  """A step in which no network learns; it has no metrics."""
  step = np.asarray(int(state.step) + 1, like.dtype)
  step = jax.make_array_from_callback((), like.sharding, lambda _: step)
  return state.replace(step=step), {}


def step_function(
  run: Setup, active: tuple[str, ...]
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
  """The train step of a phase, not compiled; it also tells learning rates."""
  steps = _num_updates(run.config)
  rates = {
    name: learning_rate(run.config.optimizer[name], steps[name])
    for name in active
  }

  def step(state, batch, axis_name=None):
    known = {
      f"learning_rate/{name}": jnp.float32(rate(state.updates[name]))
      for name, rate in rates.items()
    }
    state, metrics = train_step(
      state,
      batch,
      objective=run.objective,
      optimizer=run.optimizer,
      seed=run.config.seed,
      ema_decay=run.config.train.ema_decay,
      active=active,
      axis_name=axis_name,
    )
    return state, {**metrics, **known}

  return step


def describe_batch(
  config, active: tuple[str, ...]
) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
  """Shapes and types of a phase's global batch."""
  floats = partial(jax.ShapeDtypeStruct, dtype=np.float32)
  integers = partial(jax.ShapeDtypeStruct, dtype=np.int32)
  channels = domain.of(config.data.domain, config.data.source).channels

  def part(size, num_points, latent=None):
    shown = {"image": floats((size, *config.data.size, channels))}
    if latent:
      shown = {"latent": floats((size, *latent))}
    return shown | {
      "mask": integers((size, *config.data.size)),
      "points": floats((size, num_points, 3)),
      "group": integers((size,)),
      "weight": floats((size,)),
    }

  batch = {}
  if {"points", "image"} & set(active):
    batch["generation"] = part(
      config.train.generation_batch,
      config.data.num_points,
      cached_shape(config),
    )
  if "segmenter" in active:
    batch["segmentation"] = part(config.train.segmentation_batch, 0)
  return batch
