"""Checkpoints of a run.

Every checkpoint has two parts: 'inference' (averaged parameters, statistics,
constants: all that sampling and evaluation need) and 'training' (the rest of
the state). Orbax writes into a temporary directory and renames it, so that a
checkpoint is complete or absent; a complete one that cannot be read is
reported and the one before it is taken.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint.experimental.v1 as ocp
from absl import logging

from fairdiff_jax.training.step import TrainState

INFERENCE = ("ema", "batch_stats", "frozen")


def split(state: TrainState) -> dict[str, dict[str, Any]]:
  """The two parts of a state, as dicts of its fields."""
  fields = {name: getattr(state, name) for name in state.__dataclass_fields__}
  inference = {name: fields.pop(name) for name in INFERENCE}
  return {"inference": inference, "training": fields}


def join(parts: dict[str, dict[str, Any]]) -> TrainState:
  """Inverse of `split`."""
  return TrainState(**parts["inference"], **parts["training"])


class Checkpoints:
  """The checkpoints under `<workdir>/checkpoints`."""

  def __init__(self, workdir: str | Path, keep: int = 2):
    policies = ocp.training.preservation_policies
    saves = ocp.training.save_decision_policies
    self._checkpointer = ocp.training.Checkpointer(
      Path(workdir).absolute() / "checkpoints",
      preservation_policy=policies.LatestN(keep),
      # The loop decides when to save.
      save_decision_policy=saves.FixedIntervalPolicy(1),
      cleanup_tmp_directories=True,
    )

  @property
  def steps(self) -> list[int]:
    """Steps of complete checkpoints, oldest first."""
    return [c.step for c in self._checkpointer.checkpoints]

  def save(self, state: TrainState, *, facts: dict[str, Any]):
    """Starts saving; `facts` is what else the run must remember (JSON).

    The copy to the host is done when this returns, so that the state may be
    donated to the next step; files are written in the background.
    """
    self._checkpointer.save_checkpointables_async(
      int(state.step), split(state), custom_metadata=facts, force=True
    )

  def facts(self, step: int) -> dict[str, Any]:
    """The facts saved with a step."""
    metadata = self._checkpointer.checkpointables_metadata(step)
    return metadata.custom_metadata

  def restore(
    self, abstract: TrainState, parts: tuple[str, ...] = ("inference",)
  ) -> tuple[int, dict[str, Any]] | None:
    """Restores the newest readable checkpoint.

    Args:
      abstract: the state as ShapeDtypeStructs with shardings: checkpoints can
        be restored onto any mesh.
      parts: 'inference', or ('inference', 'training').

    Returns:
      (step, parts by name), or None if there is no checkpoint at all.

    Raises:
      ValueError: if checkpoints exist and none can be read.
    """
    wanted = {name: split(abstract)[name] for name in parts}
    failures = []
    for step in reversed(self.steps):
      try:
        return step, self._checkpointer.load_checkpointables(step, wanted)
      except Exception as error:
        logging.warning("checkpoint of step %d is damaged: %s", step, error)
        failures.append(f"step {step}: {str(error).splitlines()[0]}")
    if failures:
      raise ValueError(
        f"no checkpoint in {self._checkpointer.directory} can be read"
        f" ({'; '.join(failures)}); was it written with another config, or"
        " damaged? Move it away to start again"
      )
    return None

  def close(self):
    """Waits for saves in progress."""
    self._checkpointer.close()


def describe(
  init: Callable[..., TrainState], shardings: Callable[[Any], Any]
) -> TrainState:
  """The state `init()` would build, as ShapeDtypeStructs with shardings."""
  shapes = jax.eval_shape(init)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    shardings(shapes),
  )
