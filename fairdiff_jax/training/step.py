"""The train step: one pure function of (state, batch), compiled once a phase.

    key = fold_in(key(seed), state.step)

`jit` sees the global batch and lets the compiler place collectives; `pmap`
sees one shard and names its axis. Both compute the same sums and counts.
"""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fairdiff_jax.objectives.joint import (
  NETWORKS,
  FairnessState,
  Objective,
  init_fairness,
  joint_objective,
)
from fairdiff_jax.training.mesh import BATCH, put_batch

AXIS = "batch"  # the mapped axis under pmap


class TrainState(flax.struct.PyTreeNode):
  """Everything a run is, apart from its config and its bank.

  Attributes:
    step: int32 [], steps done.
    updates: int32 [] by network, updates done.
    params: by network.
    ema: exponential moving average of `params`.
    batch_stats: by network.
    frozen: statistics of the training data, by network.
    imported: frozen weights, by network; read again rather than saved.
    opt_state: by network.
    fairness: what is remembered of the groups.
  """

  step: jax.Array
  updates: dict[str, jax.Array]
  params: dict[str, Any]
  ema: dict[str, Any]
  batch_stats: dict[str, Any]
  frozen: dict[str, Any]
  imported: dict[str, Any]
  opt_state: Any
  fairness: FairnessState


def init_state(
  key: jax.Array,
  frozen: dict[str, Any],
  num_cases: jax.Array,
  *,
  objective: Objective,
  optimizer: optax.GradientTransformation,
) -> TrainState:
  """The state before the first step; pure, so that it can be described.

  Networks that start from weights are all zeros in it.
  """
  params, batch_stats, imported = {}, {}, {}
  for name, task in objective.tasks.items():
    network_key = jax.random.fold_in(key, NETWORKS.index(name))
    drawn = (
      task.init(network_key)
      if task.load is None
      # Its weights are read: drawing others takes long to compile.
      else jax.tree.map(jnp.zeros_like, jax.eval_shape(task.init, network_key))
    )
    params[name], batch_stats[name], imported[name] = drawn
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    updates={name: jnp.zeros((), jnp.int32) for name in params},
    params=params,
    ema=jax.tree.map(jnp.copy, params),
    batch_stats=batch_stats,
    frozen=jax.tree.map(jnp.asarray, frozen),
    imported=imported,
    opt_state=optimizer.init(params),
    fairness=init_fairness(objective, num_cases),
  )


def train_step(
  state: TrainState,
  batch: dict[str, Any],
  *,
  objective: Objective,
  optimizer: optax.GradientTransformation,
  seed: int,
  ema_decay: float,
  active: Collection[str],
  axis_name: str | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One update of the active networks; returns the new state and metrics."""
  key = jax.random.fold_in(jax.random.key(seed), state.step)
  trained = {name: state.params[name] for name in active}
  (_, aux), grads = jax.value_and_grad(joint_objective, has_aux=True)(
    trained,
    state.batch_stats,
    {name: {**state.frozen[name], **state.imported[name]} for name in active},
    state.fairness,
    batch,
    key,
    objective=objective,
    active=active,
    axis_name=axis_name,
  )
  if axis_name is not None:
    # The objective's own psum sums each shard's cotangent over all shards,
    # so the mean over shards is the gradient of the global objective.
    grads = jax.lax.pmean(grads, axis_name)
  updates, opt_state = optimizer.update(grads, state.opt_state, trained)
  params = {**state.params, **optax.apply_updates(trained, updates)}
  counts, ema = dict(state.updates), dict(state.ema)
  metrics = aux["metrics"]
  for name in active:
    counts[name] += 1
    # A young average leans on recent parameters, not on the initial ones.
    decay = jnp.minimum(ema_decay, counts[name] / (9.0 + counts[name]))
    ema[name] = optax.incremental_update(params[name], ema[name], 1 - decay)
    metrics[f"grad_norm/{name}"] = optax.tree.norm(grads[name])
    metrics[f"param_norm/{name}"] = optax.tree.norm(params[name])
  state = state.replace(
    step=state.step + 1,
    updates=counts,
    params=params,
    ema=ema,
    batch_stats={**state.batch_stats, **aux["batch_stats"]},
    opt_state=opt_state,
    fairness=aux["fairness"],
  )
  return state, metrics


def lower_step(
  step: Callable[..., tuple[TrainState, dict[str, jax.Array]]],
  *,
  mesh: Mesh,
  state: TrainState,
  batch: Any,
) -> jax.stages.Lowered:
  """A step under `jit`, ready to be compiled; the state is donated.

  Args:
    step: (state, batch) -> (state, metrics).
    mesh: device mesh; its devices need not be here.
    state: ShapeDtypeStructs with shardings.
    batch: ShapeDtypeStructs of the global batch.
  """
  shardings = jax.tree.map(lambda x: x.sharding, state)
  jitted = jax.jit(
    step,
    in_shardings=(shardings, NamedSharding(mesh, BATCH)),
    out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
    donate_argnums=0,
  )
  with jax.set_mesh(mesh):  # kernels ask for it
    return jitted.lower(state, batch)


def compile_step(
  step: Callable[..., tuple[TrainState, dict[str, jax.Array]]],
  *,
  mesh: Mesh,
  state: TrainState,
  batch: Any,
  mode: str,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]:
  """Compiles a step for all devices; the state is donated.

  Args:
    step: (state, batch) and, under 'pmap', `axis_name`.
    mesh: device mesh.
    state: ShapeDtypeStructs with shardings.
    batch: ShapeDtypeStructs of the global batch.
    mode: 'jit', or 'pmap' with all state replicated (compiled when called).

  Returns:
    A function of (state, this host's slice of the batch).

  Raises:
    ValueError: if `mode` is unknown, or 'pmap' meets a sharded state or more
      than one process.
  """
  if mode == "jit":
    compiled = lower_step(step, mesh=mesh, state=state, batch=batch).compile()
    return lambda state, batch: compiled(state, put_batch(batch, mesh))
  if mode != "pmap":
    raise ValueError(f"unknown parallel.compile {mode!r}; use 'jit' or 'pmap'")
  if mesh.shape["fsdp"] != 1:
    raise ValueError("parallel.compile='pmap' replicates; set parallel.fsdp=1")
  if jax.process_count() > 1:
    raise ValueError("parallel.compile='pmap' is for one process; use 'jit'")
  mapped = jax.pmap(
    partial(step, axis_name=AXIS),
    axis_name=AXIS,
    in_axes=(None, 0),
    out_axes=(None, None),
    devices=list(mesh.devices.flat),
    donate_argnums=0,
  )
  count = len(mesh.local_devices)

  def run(state, batch):
    shards = jax.tree.map(
      lambda x: np.reshape(x, (count, len(x) // count, *x.shape[1:])), batch
    )
    return mapped(state, shards)

  return run
