"""Checkpoints of a run.

Every checkpoint has two parts: 'inference' (averaged parameters and statistics:
all that sampling and evaluation need) and 'training' (the rest of the state).
Frozen weights that were imported are in neither: they are read again, and must
be the same. Orbax writes into a temporary directory and renames it, so that a
checkpoint is complete or absent; a complete one that cannot be read, whose
arrays are not those that were saved, or whose directory was renamed, is
reported and the one before it is taken.
"""

import contextlib
import hashlib
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from absl import logging

from fairdiff_jax.layout import Layout
from fairdiff_jax.objectives.joint import Objective
from fairdiff_jax.objectives.task import Variables
from fairdiff_jax.training.mesh import to_host
from fairdiff_jax.training.start import import_weights
from fairdiff_jax.training.step import TrainState


class Inference(NamedTuple):
  """What sampling and predicting need of a state, by network.

  Attributes:
    ema: averaged parameters.
    batch_stats: running statistics of batch normalisation.
    frozen: statistics of the training data.
    imported: frozen weights that were imported.
  """

  ema: dict[str, Any]
  batch_stats: dict[str, Any]
  frozen: dict[str, Any]
  imported: dict[str, Any]

  @classmethod
  def of(cls, state: TrainState) -> Self:
    """The part of a state, or of its description."""
    return cls(*(getattr(state, name) for name in cls._fields))

  def network(self, name: str) -> Variables:
    """A network's averaged variables."""
    frozen = {**self.frozen[name], **self.imported[name]}
    return Variables(self.ema[name], self.batch_stats[name], frozen)


def split(state: TrainState) -> dict[str, dict[str, Any]]:
  """The two parts of a state, as dicts of its fields, less 'imported'."""
  fields = {name: getattr(state, name) for name in state.__dataclass_fields__}
  del fields["imported"]
  saved = (name for name in Inference._fields if name in fields)
  inference = {name: fields.pop(name) for name in [*saved]}
  return {"inference": inference, "training": fields}


def join(
  parts: dict[str, dict[str, Any]], imported: dict[str, Any]
) -> TrainState:
  """Inverse of `split`."""
  return TrainState(
    **parts["inference"], **parts["training"], imported=imported
  )


def fingerprint(tree: Any) -> str:
  """SHA-256 over paths, types and bytes of all arrays, in a fixed order."""
  digest = hashlib.sha256()
  leaves = jax.tree_util.tree_leaves_with_path(to_host(tree))
  for path, leaf in sorted(leaves, key=lambda x: jax.tree_util.keystr(x[0])):
    digest.update(jax.tree_util.keystr(path).encode())
    digest.update(f"{leaf.dtype}{leaf.shape}".encode())
    digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))
  return digest.hexdigest()


class Checkpoints:
  """The checkpoints of a run.

  Args:
    workdir: a run's directory.
    keep: newest checkpoints to keep; None for one who only reads, perhaps
      while the run goes on.
  """

  def __init__(self, workdir: str | Path, keep: int | None = None):
    self._imported = None  # fingerprint of weights that never change
    self._reads = keep is None
    self._facts = {}  # by step, of those that were looked at
    self._saving = None  # (step, what Orbax says of it)
    policies = ocp.training.preservation_policies
    saves = ocp.training.save_decision_policies
    self._checkpointer = ocp.training.Checkpointer(
      Layout(workdir).checkpoints.absolute(),
      preservation_policy=policies.LatestN(keep) if keep else None,
      # The loop decides when to save.
      save_decision_policy=saves.FixedIntervalPolicy(1),
      cleanup_tmp_directories=keep is not None,
    )

  @property
  def steps(self) -> list[int]:
    """Steps of complete checkpoints, oldest first; waits for a save."""
    self.wait()
    return [c.step for c in self._checkpointer.checkpoints]

  def save(self, state: TrainState, *, facts: dict[str, Any]):
    """Starts saving; `facts` is what else the run must remember (JSON).

    The copy to the host is done when this returns, so that the state may be
    donated to the next step; files are written in the background. A damaged
    checkpoint of the same step is replaced.

    Raises:
      OSError: if the checkpoint before could not be written.
    """
    self.wait()
    parts = split(state)
    digests = {name: fingerprint(part) for name, part in parts.items()}
    if self._imported is None:
      self._imported = fingerprint(state.imported)
    digests["imported"] = self._imported
    step = int(state.step)
    self._facts.pop(step, None)
    response = self._checkpointer.save_checkpointables_async(
      step,
      parts,
      custom_metadata=facts | {"step": step, "sha256": digests},
      force=True,
      overwrite=True,
    )
    self._saving = step, response

  def wait(self):
    """Waits until the last save is complete.

    Raises:
      OSError: if it could not be written.
    """
    if self._saving is None:
      return
    (step, response), self._saving = self._saving, None
    try:
      response.result()  # also frees its thread and its handles
    except Exception as error:
      reason = textwrap.shorten(str(error) or repr(error), 200)
      raise OSError(
        f"the checkpoint of step {step} could not be written to"
        f" {self._checkpointer.directory} ({reason}); make room on the disk,"
        " and the same command goes on from the one before"
      ) from error

  def facts(self, step: int) -> dict[str, Any]:
    """The facts saved with a step, also if it has been removed since."""
    if step not in self._facts:
      metadata = self._checkpointer.checkpointables_metadata(step)
      self._facts[step] = metadata.custom_metadata
    return self._facts[step]

  def all_facts(self) -> list[dict[str, Any]]:
    """The facts of all checkpoints that have readable ones, newest first."""
    found = []
    for step in reversed(self.steps):
      with contextlib.suppress(Exception):  # `restore` names what is damaged
        found.append(self.facts(step))
    return found

  def restore(
    self,
    abstract: TrainState,
    parts: tuple[str, ...] = ("inference",),
    check: Callable[[dict[str, Any]], None] = lambda facts: None,
  ) -> tuple[int, dict[str, Any]] | None:
    """Restores the newest readable checkpoint.

    Args:
      abstract: the state as ShapeDtypeStructs with shardings: checkpoints can
        be restored onto any mesh.
      parts: ('inference',), or ('inference', 'training').
      check: raises ValueError if what the facts name is not there.

    Returns:
      (step, parts by name), or None if there is no checkpoint at all.

    Raises:
      ValueError: if checkpoints exist and none can be read.
    """
    wanted = {name: split(abstract)[name] for name in parts}
    failures, tried = [], None
    while tried != (tried := self.steps):
      failures = []
      for step in reversed(tried):
        try:
          check(self.facts(step))
          return step, self._load(step, wanted)
        except Exception as error:
          # Orbax prints whole trees.
          reason = textwrap.shorten(str(error) or repr(error), 200)
          failures.append(f"step {step}: {reason}")
          logging.warning("checkpoint of step %d is damaged: %s", step, reason)
      if self._reads:  # beside a training, which may have saved newer ones
        self._checkpointer.reload()
    if failures:
      raise ValueError(
        f"no checkpoint in {self._checkpointer.directory} can be read"
        f" ({'; '.join(failures)}); was it written with another config, or"
        " damaged? Move it away to start again"
      )
    return None

  def check_imported(self, step: int, imported: dict[str, Any]):
    """Raises ValueError unless a step was saved with these weights."""
    saved = self.facts(step)["sha256"]["imported"]
    self._imported = fingerprint(imported)
    if saved != self._imported:
      raise ValueError(
        f"{self._checkpointer.directory}: the imported weights are not those"
        " that the run was trained with; put those back"
      )

  def _load(self, step, wanted):
    facts = self.facts(step)
    saved = facts.get("step", step)  # older ones do not say
    if saved != step:
      raise ValueError(f"its directory holds step {saved}: it was renamed")
    parts = self._checkpointer.load_checkpointables(step, wanted)
    for name, part in parts.items():
      if fingerprint(part) != facts["sha256"][name]:
        raise ValueError(f"arrays of {name!r} are not those that were saved")
    if "training" in parts and int(parts["training"]["step"]) != step:
      raise ValueError("its arrays are those of another step")
    return parts

  def close(self):
    """Waits for saves in progress; their failure is `wait`'s to raise."""
    try:
      self.wait()
    finally:
      self._checkpointer.close()


def restore_inference(
  workdir: str | Path, objective: Objective, abstract: TrainState
) -> tuple[int, Inference]:
  """Step and inference part of a run's newest checkpoint.

  Raises:
    FileNotFoundError: if the run has no checkpoint yet.
    ValueError: if imported weights are not those of the run.
  """
  checkpoints = Checkpoints(workdir)
  restored = checkpoints.restore(abstract)
  if restored is None:
    checkpoints.close()
    raise FileNotFoundError(
      f"{workdir} has no checkpoint yet; let the run train further"
    )
  step, parts = restored
  imported = import_weights(objective, abstract)
  checkpoints.check_imported(step, imported)
  checkpoints.close()
  return step, Inference(**parts["inference"], imported=imported)


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
