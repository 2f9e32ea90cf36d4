"""Checkpoints of a run.

Every checkpoint has two parts: 'inference' (averaged parameters and statistics:
all that sampling and evaluation need) and 'training' (the rest of the state).
Frozen weights that were imported are in neither: they are read again, and must
be the same. Orbax writes into a temporary directory and renames it, so that a
checkpoint is complete or absent; a complete one that cannot be read, whose
arrays are not those that were saved, or whose directory was renamed, is
reported and the one before it is taken.

Every checkpoint remembers the validations before it. The best of these is kept
beside the newest checkpoints, and is what sampling and evaluation take where
nobody asks for another.
"""

import contextlib
import hashlib
import textwrap
from collections.abc import Callable, Mapping, Sequence
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
from fairdiff_jax.training.validation import BEST, LAST, Score, best, parse


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


class _KeepBest:
  """Orbax's policy of preservation: the best validated step is kept.

  Not its `BestN`, which knows the scores that were saved, not those that count:
  after other validation cases or definitions, a run's history starts anew.
  """

  step: int | None = None

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    del context
    return [checkpoint.step == self.step for checkpoint in checkpoints]


class Checkpoints:
  """The checkpoints of a run.

  Args:
    workdir: a run's directory.
    keep: newest checkpoints to keep, beside the best; None for one who only
      reads, perhaps while the run goes on.
  """

  def __init__(self, workdir: str | Path, keep: int | None = None):
    self._imported = None  # fingerprint of weights that never change
    self._reads = keep is None
    self._facts = {}  # by step, of those that were looked at
    self._saving = None  # (step, what Orbax says of it)
    self._keep_best = _KeepBest()
    policies = ocp.training.preservation_policies
    saves = ocp.training.save_decision_policies
    kept = None
    if keep:
      kept = [policies.LatestN(keep), self._keep_best]
      kept = policies.AnyPreservationPolicy(kept)
    self._checkpointer = ocp.training.Checkpointer(
      Layout(workdir).checkpoints.absolute(),
      preservation_policy=kept,
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

    The best of the validations in them is kept from then on.

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
    found = best(history_of(facts))
    self._keep_best.step = found[0] if found else None
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

  def history(self) -> list[Score]:
    """The validations that the newest readable checkpoint remembers."""
    return history_of(next(iter(self.all_facts()), {}))

  def _order(self, wanted: str | int | None) -> list[int]:
    """The steps to try, for `restore`'s `wanted`."""
    newest = self.steps[::-1]
    if isinstance(wanted, int):
      if newest and wanted not in newest:
        there = ", ".join(map(str, newest[::-1]))
        raise ValueError(
          f"{self._checkpointer.directory} has no checkpoint of step {wanted};"
          f" there are {there}"
        )
      return [wanted] if newest else []
    if wanted == LAST or not newest:
      return newest
    found = best(self.history())
    chosen = [found[0]] if found and found[0] in newest else []
    if wanted == BEST and not chosen:
      raise ValueError(
        f"{self._checkpointer.directory} has no best checkpoint: the run was"
        " not validated. Take the last (--checkpoint last), or train with"
        " evaluation.every"
      )
    return chosen if wanted == BEST else list(dict.fromkeys(chosen + newest))

  def restore(
    self,
    abstract: TrainState,
    parts: tuple[str, ...] = ("inference",),
    check: Callable[[dict[str, Any]], None] = lambda facts: None,
    wanted: str | int | None = LAST,
  ) -> tuple[int, dict[str, Any]] | None:
    """Restores the newest readable checkpoint, or the one that is wanted.

    Args:
      abstract: the state as ShapeDtypeStructs with shardings: checkpoints can
        be restored onto any mesh.
      parts: ('inference',), or ('inference', 'training').
      check: raises ValueError if what the facts name is not there.
      wanted: LAST; BEST, by the validations; a step; or None: the best where
        there is one that can be read, else the last.

    Returns:
      (step, parts by name), or None if there is no checkpoint at all.

    Raises:
      ValueError: if checkpoints exist and none can be read, or there is none
        that is wanted.
    """
    fields = {name: split(abstract)[name] for name in parts}
    failures, tried = [], None
    while tried != (tried := self._order(wanted)):
      failures = []
      for step in tried:
        try:
          check(self.facts(step))
          return step, self._load(step, fields)
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


def history_of(facts: Mapping[str, Any]) -> list[Score]:
  """The validations that a checkpoint's facts remember."""
  return parse(facts.get("validation", {}).get("history", ()))


class Restored(NamedTuple):
  """A checkpoint that was taken, for inference.

  Attributes:
    step: of the checkpoint.
    inference: what it holds for sampling and predicting.
    last: step of the newest checkpoint.
    history: validations up to there.
  """

  step: int
  inference: Inference
  last: int
  history: Sequence[Score]


def restore_inference(
  workdir: str | Path,
  objective: Objective,
  abstract: TrainState,
  wanted: str | int | None = None,
) -> Restored:
  """A run's checkpoint for inference; `wanted` is as for `restore`.

  Raises:
    FileNotFoundError: if the run has no checkpoint yet.
    ValueError: if imported weights are not those of the run, or there is no
      such checkpoint.
  """
  checkpoints = Checkpoints(workdir)
  try:
    restored = checkpoints.restore(abstract, wanted=wanted)
    if restored is None:
      raise FileNotFoundError(
        f"{workdir} has no checkpoint yet; let the run train further"
      )
    step, parts = restored
    imported = import_weights(objective, abstract)
    checkpoints.check_imported(step, imported)
    inference = Inference(**parts["inference"], imported=imported)
    return Restored(
      step, inference, checkpoints.steps[-1], checkpoints.history()
    )
  finally:
    checkpoints.close()


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
