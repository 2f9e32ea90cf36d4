"""Weights that a run starts from, and those it uses and never changes."""

from typing import Any

import jax
import numpy as np

from fairdiff_jax.objectives.joint import Objective
from fairdiff_jax.objectives.task import Variables
from fairdiff_jax.training.step import TrainState


def _place(tree: Any, abstract: Any) -> Any:
  """Numpy arrays, the same on every host, as the arrays that are described."""

  def put(x, like):
    return jax.make_array_from_callback(
      like.shape, like.sharding, lambda index: np.asarray(x[index], like.dtype)
    )

  return jax.tree.map(put, tree, abstract)


def import_weights(
  objective: Objective, abstract: TrainState
) -> dict[str, Any]:
  """Frozen weights by network, read from where the config says.

  Raises:
    FileNotFoundError: if there is nothing where the config says.
    ValueError: if a network needs weights and the config names none, or they
      are damaged or of another network.
  """
  imported = {}
  for name, wanted in abstract.imported.items():
    imported[name] = {}
    if wanted:
      loaded = _load_weights(objective, name)
      imported[name] = _place(loaded.frozen, wanted)
  return imported


def start_from_weights(
  state: TrainState, objective: Objective, abstract: TrainState
) -> TrainState:
  """An initial state, with the weights that the config names in place.

  Raises:
    FileNotFoundError: if there is nothing where the config says.
    ValueError: if a network needs weights and the config names none, or they
      are damaged or of another network.
  """
  fields = {
    field: dict(getattr(state, field))
    for field in ("params", "ema", "batch_stats", "imported")
  }
  for name, task in objective.tasks.items():
    if task.load is None and not abstract.imported[name]:
      continue
    loaded = _load_weights(objective, name)
    for field, tree in zip(
      fields,
      (loaded.params, loaded.params, loaded.batch_stats, loaded.frozen),
      strict=True,
    ):
      fields[field][name] = _place(tree, getattr(abstract, field)[name])
  return state.replace(**fields)


def _load_weights(objective, name) -> Variables:
  load = objective.tasks[name].load
  if load is None:
    raise ValueError(
      f"{name}.weights is empty, but this network has parts that are not"
      " trained; name its weights"
    )
  return load()
