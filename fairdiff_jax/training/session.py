"""A run under way: what the loop's steps are made of."""

import json
import math
import time
from collections.abc import Callable
from concurrent import futures
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fairdiff_jax import cluster, files
from fairdiff_jax import config as configs
from fairdiff_jax.data.cases import Cases
from fairdiff_jax.layout import Layout
from fairdiff_jax.training import schedule
from fairdiff_jax.training.banks import (
  bank_facts,
  check_bank,
  prune,
  read_bank,
  remembered,
)
from fairdiff_jax.training.checkpoint import (
  Checkpoints,
  fingerprint,
  history_of,
  join,
)
from fairdiff_jax.training.compiling import Compiler
from fairdiff_jax.training.forecast import Forecast
from fairdiff_jax.training.goodput import Stopwatch, timed
from fairdiff_jax.training.journal import Journal
from fairdiff_jax.training.latents import cached_latents, cached_shape
from fairdiff_jax.training.mesh import all_hosts, to_host
from fairdiff_jax.training.pools import Pools
from fairdiff_jax.training.profile import Profile
from fairdiff_jax.training.schedule import REFILL, SAVE, VALIDATE
from fairdiff_jax.training.setup import (
  Setup,
  initial_state,
  make_step,
  setup,
  state_shapes,
)
from fairdiff_jax.training.start import import_weights
from fairdiff_jax.training.step import TrainState
from fairdiff_jax.training.termination import Termination
from fairdiff_jax.training.validation import (
  SCORE,
  Score,
  best,
  in_vain,
  to_json,
)


class Asked(Exception):
  """The run was asked to stop; its state is that before the step."""


class Session:
  """A run from its newest checkpoint on.

  Arguments and errors are those of `train`.

  Attributes:
    clock: tells how long what took.
    start: the step it goes on from.
    state: before the next step.
    pools: what batches are made of.
  """

  def __init__(
    self,
    config,
    workdir: Path,
    cases: Cases,
    data: str,
    make_refill: Callable[[Setup, Cases], Callable[..., Any]] | None,
    make_validate: Callable[[Setup], Callable[[TrainState], dict[str, float]]]
    | None,
    name: str,
    proceed: bool,
    clock: Stopwatch,
  ):
    self.clock = clock
    self._config, self._workdir = config, workdir
    self._layout = Layout(workdir)
    self._first_host = jax.process_index() == 0
    if not proceed:
      configs.require(workdir, config)
    self._run = run = setup(config)
    self.pools = pools = Pools(config, cases, run.objective.group_names)
    if pools.filled and make_refill is None:
      raise ValueError("fairness.strategy='equal_scale' needs make_refill")
    if schedule.validations(config) and make_validate is None:
      raise ValueError("evaluation.every needs make_validate; set it to 0")
    cached = cached_shape(config)
    # Only now: a config that cannot run must not claim the directory.
    if self._first_host:
      files.sweep(workdir)
      files.sweep(self._layout.banks)
    self._checkpoints = Checkpoints(workdir, config.checkpoint.keep)
    newest = next(iter(self._checkpoints.all_facts()), {})
    self._measured_by = {
      "data": data,
      **{k: config.evaluation[k] for k in ("empty", "equity")},
    }
    claim = partial(
      *(configs.claim, workdir, config),
      data=data,
      trained_with=newest.get("trained_with"),
      proceed=proceed,
    )
    claim(write=False)
    if proceed:
      _require_same_shapes(run, workdir)
    self.start, self.state = self._restore(cases)
    total = config.train.steps
    if self.start > total:
      raise ValueError(
        f"{workdir} is trained to step {self.start} already, beyond"
        f" train.steps={total}; set it to more, or give another --workdir"
      )
    self._trained_with, changes = claim(step=self.start, write=self._first_host)
    if cached and self.start < total:
      directory = configs.data_directory(config, workdir)
      latent = cached_latents(config, run.mesh, cases, directory)
      pools.generation = pools.generation._replace(latent=latent)
    self._history = self._remembered_history()
    self._journal = Journal(
      workdir,
      start=self.start,
      stop=total,
      enabled=self._first_host,
      name=name,
      validated=dict(self._history),
      clock=clock,
    )
    if self.start:
      self._journal.say(f"resuming from the checkpoint of step {self.start}")
    if self.start < total:
      self._journal.say(schedule.plan(config, pools.filled))
    self._profile = Profile(self._layout.profile, config.log.profile)
    self._refills = schedule.refills(config, self.start) if pools.filled else []
    if pools.filled and changes and self._lacks_bank():
      self._refills.insert(0, self.start)
    self._validations = {*schedule.validations(config, self.start)} - dict(
      self._history
    ).keys()
    ahead = self._refills, sorted(self._validations)
    self._forecast = Forecast(schedule.work(config, self.start, *ahead))
    self._last = schedule.last_step(config)
    self._saved = self.start or None
    self._pending = None  # step under way, and its metrics
    # Step and facts of the bank in use.
    self._bank = remembered(self._facts_of_start())
    self._filled = self._bank and schedule.bank_step(config, self.start)
    self._status = 1  # of the process, if it ends while something is compiled
    self._stop = Termination()
    self._compiled = {}
    makers = {
      REFILL: lambda: make_refill(run, cases),
      VALIDATE: lambda: make_validate(run),
    }
    self._compiler = Compiler(
      {
        key: makers.get(key, partial(make_step, run, key))
        for key in schedule.needs(config, self.start, *ahead)
        if not self.exhausted
      }
    )

  def _restore(self, cases) -> tuple[int, TrainState]:
    """The newest checkpoint's step and state, or those of a new run."""
    run = self._run
    restored = self._checkpoints.restore(
      run.abstract,
      ("inference", "training"),
      partial(check_bank, self._workdir),
    )
    if restored is None:
      return 0, initial_state(run, cases, self.pools.group)
    step, parts = restored
    imported = import_weights(run.objective, run.abstract)
    self._checkpoints.check_imported(step, imported)
    return step, join(parts, imported)

  def _facts_of_start(self) -> dict[str, Any]:
    """What the checkpoint that it goes on from remembers; {} without one."""
    return self._checkpoints.facts(self.start) if self.start else {}

  def _remembered_history(self) -> list[Score]:
    """The validations before the step it goes on from, if they still count.

    Those of other cases, or by other definitions, do not.
    """
    facts = self._facts_of_start()
    by = facts.get("validation", {}).get("by")
    return history_of(facts) if by == self._measured_by else []

  def _lacks_bank(self) -> bool:
    """Whether the bank in use where the run goes on was never filled.

    So it is if the run goes on with another calendar of banks.
    """
    step = schedule.bank_step(self._config, self.start)
    learning = schedule.active_networks(self._config, self.start)
    if step in (None, self.start) or "segmenter" not in learning:
      return False
    return not self._layout.bank(step).exists()

  @timed("step")  # hosts that meet wait for the step under way
  def stop_if_asked(self):
    """Raises Asked if the run was asked to stop before a step."""
    if self._stop.at_step():
      raise Asked

  @timed("compile")
  def compiled(self, key: tuple[str, ...] | str) -> Callable[..., Any]:
    """The step of a phase, or the refill; waits until it is compiled."""
    if key not in self._compiled:
      result = self._compiler.results[key]
      what = key
      if key not in (REFILL, VALIDATE):
        what = f"the step of {', '.join(key) or 'none'}"
      self._settle()
      began = time.monotonic()
      while not all_hosts(result.done()):
        if self._stop():
          raise Asked
        waited = time.monotonic() - began
        self._journal.wait(f"compiling {what}, {waited:.0f} s")
        futures.wait([result], timeout=0.2)
      self._compiled[key] = result.result()
      self._journal.wait("")
      seconds = self._compiler.seconds[key]
      if key:
        self._journal.say(f"compiled {what} in {seconds:.0f} s")
    return self._compiled[key]

  @timed("step")
  def _settle(self):
    """Waits for the step under way and checks it."""
    if self._pending is not None:
      _check_finite(self._workdir, self.pools, *self._pending)
      self._pending = None

  @timed("save")
  def save(self):
    """Saves a checkpoint in the background, unless it is there."""
    self._settle()
    began = time.monotonic()
    config, step = self._config, int(self.state.step)
    if self._saved == step:
      return
    facts = {
      "trained_with": self._trained_with,
      "bank": None,
      "validation": {
        "by": self._measured_by,
        "history": to_json(self._history),
      },
    }
    # Where the bank is due to be refilled, the one before is of no use.
    if schedule.bank_step(config, step) == self._filled:
      facts["bank"] = self._bank
    # A checkpoint is removed when the next is complete; its bank after that.
    used = map(remembered, (facts, *self._checkpoints.all_facts()))
    names = {bank["name"] for bank in used if bank}
    found = best(self._history)
    if found:  # whose report looks at the bank that it was trained with
      before = schedule.bank_step(config, found[0] - 1)
      names |= set() if before is None else {self._layout.bank(before).name}
    if self._first_host:
      prune(self._workdir, names)
    self._checkpoints.save(self.state, facts=facts)
    self._saved = step
    self._forecast.did(SAVE, time.monotonic() - began)

  @timed("evaluation")
  def validate(self, step: int):
    """Validates the averages before a step, if that is due.

    The best so far are saved.
    """
    if step not in self._validations:
      return
    self._settle()
    validate = self.compiled(VALIDATE)
    began = time.monotonic()
    metrics = validate(self.state)
    self._forecast.did(VALIDATE, time.monotonic() - began)
    self._validations.remove(step)
    self._history.append((step, metrics[SCORE]))
    found = best(self._history)
    self._journal.validation(step, metrics, found[1] if found else math.nan)
    self._saved = None  # it would not remember this
    if found and found[0] == step:
      self.save()

  @property
  def exhausted(self) -> bool:
    """Whether too many validations were in vain for the run to go on."""
    patience = self._config.evaluation.patience
    return bool(patience) and in_vain(self._history) >= patience

  @timed("refill")
  def mix(self, step: int):
    """Mixes the segmenter's cases of a step, with those of a bank if any."""
    self._settle()
    config, synthetic = self._config, None
    self._filled, self._bank = schedule.bank_step(config, step), None
    if self.pools.filled:
      directory = self._layout.bank(self._filled)
      if step in self._refills:
        synthetic = self._refill(directory)
      else:
        number = len(self._run.objective.group_names)
        synthetic = read_bank(
          directory, config.data.size, number, self._run.domain
        )
      self._bank = bank_facts(directory)
    self.pools.mix(step, synthetic)

  def _refill(self, directory):
    refill = self.compiled(REFILL)
    began = time.monotonic()
    risk = to_host(self.state.fairness.running.risk)
    sizes, quota = self.pools.demand(risk)
    synthetic = refill(
      *(self.state, self._filled, sizes, quota, directory),
      stop=self._stop,
      say=self._journal.say,
    )
    if synthetic is None:
      raise Asked
    self._forecast.did(REFILL, time.monotonic() - began)
    return synthetic

  def profile(self, step: int):
    """Starts or stops the trace before a step, if that is due."""
    self._profile.at(step, self._settle)

  def advance(self, step: int, state: TrainState, metrics: dict[str, Any]):
    """Takes what a step gave, and waits for the step before."""
    cluster.at(step)
    self.state = state
    self._settle()
    self._pending = step, metrics

  def tick(self, active: tuple[str, ...], seconds: float | None):
    """Moves the progress bar on by a step, and what is said of the rest."""
    self._forecast.did(active, seconds)
    self._journal.step(str(self._forecast))

  def log(self, step: int, batch: dict[str, dict[str, np.ndarray]]):
    """Logs a step's metrics if it is due and has some."""
    done, metrics = step + 1, self._pending[1]
    if not metrics:
      return
    if schedule.due(done, self._config.log.every) or done == self._last:
      rows = sum(len(part["weight"]) for part in batch.values())
      numbers = {k: float(v) for k, v in sorted(metrics.items())}
      self._journal.log(done, numbers, cases=rows * jax.process_count())

  def complete(self) -> TrainState:
    """Saves the final state and says that the run is complete."""
    self._settle()
    self._profile.close()
    step, total = int(self.state.step), self._config.train.steps
    self.save()
    with self.clock("save"):
      self._checkpoints.wait()
    found = best(self._history)
    if found:
      self._journal.say(
        f"best validation: step {found[0]}, ES-Dice {100 * found[1]:.1f}"
      )
    if step < total:
      patience = self._config.evaluation.patience
      self._journal.say(
        f"stopped early, after step {step} of {total}: {patience} validations"
        " without a better one (evaluation.patience)"
      )
    digest = fingerprint(self.state.params)
    self._journal.log(step, {"params_sha256": digest})
    if self._stop():  # what would follow: baseline and report
      raise Asked
    self._status = 0
    return self.state

  def leave(self) -> None:
    """Saves and says so."""
    step, reason = int(self.state.step), self._stop.reason
    if step:
      self.save()
    with self.clock("save"):
      self._checkpoints.wait()
    self._journal.say(
      f"{reason}: stopped after step {step}, saved; the same command resumes"
      if step
      else f"{reason}: stopped before the first step; the same command starts"
    )
    self._status = 0

  def close(self):
    self._profile.close()
    self._compiler.close(self._status)
    try:
      self._checkpoints.close()
    finally:
      self._journal.close()
      self._stop.close()


def _require_same_shapes(run: Setup, workdir: Path):
  """Raises ValueError if the run's checkpoints are of other shapes."""
  record = configs.find_record(workdir)
  if record is None or not record.started:
    return
  changed = configs.differences(
    configs.compared(record.config), configs.compared(run.config)
  )

  def shapes(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(k): (x.shape, x.dtype) for k, x in leaves}

  if changed and shapes(state_shapes(record.config)) != shapes(run.abstract):
    raise ValueError(
      f"{workdir} cannot go on so: networks, optimisers or groups have other"
      f" shapes with {', '.join(changed)} changed; change back what shapes them"
      " or give another --workdir"
    )


def _check_finite(workdir, pools, step, metrics):
  """Raises with a dump if objective, gradients or parameters are not finite."""
  guarded = {
    k: float(v)
    for k, v in metrics.items()
    if k == "loss/total" or k.startswith(("grad_norm/", "param_norm/"))
  }
  if all(np.isfinite(v) for v in guarded.values()):
    return
  path = Layout(workdir).nonfinite(step)
  if jax.process_index() == 0:
    numbers = {k: str(float(v)) for k, v in metrics.items()}
    dump = {"step": step, "cases": pools.ids(step), "metrics": numbers}
    files.write(path, json.dumps(dump, indent=2))
  raise FloatingPointError(
    f"step {step} is not finite ({guarded}); its cases and norms are in"
    f" {path}. Look at these cases, or lower the learning rate and go on from"
    " the last checkpoint, which is intact, with --continue"
  )
