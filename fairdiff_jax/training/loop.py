"""The loop: one for joint, staged and plain segmentation training.

At every step: stop if asked to, save if due, mix the segmenter's cases anew if
due, take the batch, step, log. Everything a step needs is a function of
(config, data, step, state, bank), so that a run stopped at any moment goes on
from its last checkpoint to the very same parameters.
"""

import json
import time
from collections import Counter
from collections.abc import Callable
from concurrent import futures
from functools import partial
from pathlib import Path

import jax
import numpy as np

from fairdiff_jax import config as configs
from fairdiff_jax import files
from fairdiff_jax.data.fairseg import Cases
from fairdiff_jax.data.loader import Prefetcher
from fairdiff_jax.training import schedule
from fairdiff_jax.training.banks import (
  Synthetic,
  bank_directory,
  bank_facts,
  check_bank,
  prune,
  read_bank,
)
from fairdiff_jax.training.checkpoint import Checkpoints, fingerprint, join
from fairdiff_jax.training.compiling import Compiler
from fairdiff_jax.training.forecast import Forecast
from fairdiff_jax.training.journal import Journal
from fairdiff_jax.training.latents import cached_latents, cached_shape
from fairdiff_jax.training.mesh import all_hosts, to_host
from fairdiff_jax.training.pools import Pools
from fairdiff_jax.training.schedule import active_networks, due
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

REFILL, SAVE = "the generators of synthetic cases", "checkpoint"


class _Asked(Exception):
  """The run was asked to stop; its state is that before the step."""


def train(
  config,
  workdir: str | Path,
  cases: Cases,
  *,
  data: str = "",
  make_refill: Callable[[Setup], Callable[..., Synthetic | None]] | None = None,
  name: str = "train",
  proceed: bool = False,
) -> TrainState | None:
  """Trains, or goes on training, a run.

  Args:
    config: the run's config.
    workdir: the run's directory, shared by all hosts.
    cases: training cases.
    data: digest of the prepared data; a run goes on with the same ones. '' for
      any.
    make_refill: setup -> ((state, step, sizes [G], quota [G], directory, stop=,
      say=) -> Synthetic), which fills a bank, or gives None if `stop()`; None
      for runs without a bank.
    name: what the progress bar calls the run.
    proceed: whether the run may go on with another config or other data than it
      had, as far as its networks and optimisers keep their shapes.

  Returns:
    The final state, or None if the run was asked to stop: by SIGTERM, SIGINT
    or SIGHUP, upon which it saves.

  Raises:
    ValueError: if the config cannot run, the work directory belongs to another
      one, or a group has no case.
    OSError: if a checkpoint cannot be written.
    FloatingPointError: if a step's loss, gradients or new parameters are not
      finite.
  """
  workdir = Path(workdir)
  first_host = jax.process_index() == 0
  if not proceed:
    configs.require(workdir, config)
  run = setup(config)
  pools = Pools(config, cases, run.objective.group_names)
  if pools.filled and make_refill is None:
    raise ValueError("fairness.strategy='equal_scale' needs make_refill")
  cached = cached_shape(config)
  # Only now: a config that cannot run must not claim the directory.
  if first_host:
    files.sweep(workdir)
    files.sweep(workdir / "bank")
  checkpoints = Checkpoints(workdir, config.checkpoint.keep)
  trained_with = next(iter(checkpoints.all_facts()), {}).get("trained_with")
  claim = partial(
    *(configs.claim, workdir, config),
    data=data,
    trained_with=trained_with,
    proceed=proceed,
  )
  claim(write=False)
  if proceed:
    _require_same_shapes(run, workdir)
  start, state = _restore(run, workdir, cases, pools.group, checkpoints)
  total = config.train.steps
  if start > total:
    raise ValueError(
      f"{workdir} is trained to step {start} already, beyond train.steps="
      f"{total}; set it to more, or give another --workdir"
    )
  asked, changes = claim(step=start, write=first_host)
  facts = {"trained_with": asked}
  if cached and start < total:
    directory = configs.data_directory(config, workdir)
    latent = cached_latents(config, run.mesh, cases, directory)
    pools.generation = pools.generation._replace(latent=latent)
  journal = Journal(
    workdir, start=start, stop=total, enabled=first_host, name=name
  )
  if start:
    journal.say(f"resuming from the checkpoint of step {start}")
  if start < total:
    journal.say(schedule.plan(config, pools.filled))
  last = max((p.stop for p in schedule.phases(config) if p.active), default=0)
  refills = [s for s in schedule.refills(config) if s >= start]
  if changes and _lacks_bank(config, workdir, start):
    refills.insert(0, start)
  if not pools.filled:
    refills = []
  stop = Termination()
  prefetch = Prefetcher(pools.batch)
  forecast = Forecast(_work(config, start, len(refills)))
  compiler = Compiler(_jobs(run, start, refills, make_refill))
  compiled = {(): partial(_pass, run)}
  saved, pending = start or None, None
  filled, bank = None, None  # the step of the bank in use, and its facts
  status = 1  # of the process, if it ends while something is compiled

  def settle():
    """Waits for the step under way and checks it."""
    nonlocal pending
    if pending is not None:
      _check_finite(workdir, pools, *pending)
      pending = None

  def get(key):
    """What is compiled in the background."""
    if key in compiled:
      return compiled[key]
    result = compiler.results[key]
    what = key if key == REFILL else f"the step of {', '.join(key)}"
    settle()
    began = time.monotonic()
    while not all_hosts(result.done()):
      if stop():
        raise _Asked
      journal.wait(f"compiling {what}, {time.monotonic() - began:.0f} s")
      futures.wait([result], timeout=0.2)
    compiled[key] = result.result()
    journal.wait("")
    journal.say(f"compiled {what} in {compiler.seconds[key]:.0f} s")
    return compiled[key]

  def save():
    nonlocal saved
    settle()
    began = time.monotonic()
    step = int(state.step)
    # Where the bank is due to be refilled, the one before is of no use.
    in_use = schedule.bank_step(config, step) == filled
    now = facts | {"bank": bank if in_use else None}
    # A checkpoint is removed when the next is complete; its bank after that.
    needed = [f["bank"] for f in (now, *checkpoints.all_facts()) if f["bank"]]
    if first_host:
      prune(workdir, {bank["name"] for bank in needed})
    checkpoints.save(state, facts=now)
    saved = step
    forecast.did(SAVE, time.monotonic() - began)

  def mix(step):
    """Mixes the segmenter's cases anew, with those of a bank if there is."""
    nonlocal filled, bank
    settle()
    filled, bank = schedule.bank_step(config, step), None
    synthetic = None
    if pools.filled:
      directory = bank_directory(workdir, filled)
      if step in refills:
        refill = get(REFILL)
        began = time.monotonic()
        demand = pools.demand(to_host(state.fairness.running.risk))
        synthetic = refill(
          *(state, filled, *demand, directory), stop=stop, say=journal.say
        )
        if synthetic is None:
          raise _Asked
        forecast.did(REFILL, time.monotonic() - began)
      else:
        synthetic = read_bank(
          directory, config.data.size, len(run.objective.group_names)
        )
      bank = bank_facts(directory)
    pools.mix(step, synthetic)

  try:
    for step in range(start, total):
      if stop():
        raise _Asked
      if step > start and due(step, config.checkpoint.every):
        save()
      if not pools.ready(step):
        mix(step)
      active = active_networks(config, step)
      advance = get(active)
      began = time.monotonic()
      following = step + 1
      known = following < total and pools.ready(following)
      batch = prefetch(step, following=following if known else None)
      state, metrics = advance(state, batch)
      # What was waited for is the step before, of this phase or another.
      alike = step > start and active == active_networks(config, step - 1)
      settle()
      pending = step, metrics
      forecast.did(active, time.monotonic() - began if alike else None)
      journal.step(str(forecast))
      if metrics and (due(following, config.log.every) or following == last):
        rows = sum(len(part["weight"]) for part in batch.values())
        numbers = {k: float(v) for k, v in sorted(metrics.items())}
        journal.log(following, numbers, cases=rows * jax.process_count())
    settle()
    if start < total:
      save()
      checkpoints.wait()  # what follows says that the run is complete
    journal.log(total, {"params_sha256": fingerprint(state.params)})
    if stop():
      raise _Asked
    status = 0
    return state
  except _Asked:
    step = int(state.step)
    if step and saved != step:
      save()
    checkpoints.wait()
    journal.say(_stopped(stop.reason, step))
    status = 0
    return None
  finally:
    compiler.close(status)
    prefetch.close()
    try:
      checkpoints.close()
    finally:
      journal.close()
      stop.close()


def _restore(run, workdir, cases, group, checkpoints) -> tuple[int, TrainState]:
  """The newest checkpoint's step and state, or those of a new run."""
  restored = checkpoints.restore(
    run.abstract, ("inference", "training"), partial(check_bank, workdir)
  )
  if restored is None:
    return 0, initial_state(run, cases, group)
  step, parts = restored
  imported = import_weights(run.objective, run.abstract)
  checkpoints.check_imported(step, imported)
  return step, join(parts, imported)


def _require_same_shapes(run: Setup, workdir: Path):
  """Raises ValueError if the run's checkpoints are of other shapes."""
  record = configs.find_record(workdir)
  if record is None:
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


def _lacks_bank(config, workdir, start) -> bool:
  """Whether the bank in use at a step was never filled.

  So it is where a run goes on with another calendar of banks.
  """
  step = schedule.bank_step(config, start)
  if step in (None, start) or "segmenter" not in active_networks(config, start):
    return False
  return not bank_directory(workdir, step).exists()


def _jobs(run, start, refills, make_refill):
  """What a run compiles, in the order in which it needs it."""
  needs = [
    (max(phase.start, start), 1, phase.active)
    for phase in schedule.phases(run.config)
    if phase.active and phase.stop > start
  ]
  needs += [(step, 0, REFILL) for step in refills]
  jobs = {}
  for *_, key in sorted(needs, key=lambda need: need[:2]):
    make = make_refill if key == REFILL else partial(make_step, active=key)
    jobs[key] = partial(make, run)
  return jobs


def _work(config, start, refills) -> Counter:
  """How often what is to be done from a step on, its baseline included."""
  work = Counter()
  for phase in schedule.phases(config):
    work[phase.active] += max(phase.stop - max(phase.start, start), 0)
  if config.baseline:
    first, last = schedule.learning_steps(config, "segmenter")
    work["segmenter",] += last - first
  work[REFILL] = refills
  work[SAVE] = len(schedule.saves(config, start))
  return work


def _pass(run, state, _):
  """A step in which no network learns: it is counted, and has no metrics."""
  like = run.abstract.step
  step = np.asarray(int(state.step) + 1, like.dtype)
  return state.replace(
    step=jax.make_array_from_callback((), like.sharding, lambda _: step)
  ), {}


def _stopped(reason: str, step: int) -> str:
  if not step:
    return f"{reason}: stopped before the first step; the same command starts"
  return f"{reason}: stopped after step {step}, saved; the same command resumes"


def _check_finite(workdir, pools, step, metrics):
  """Raises with a dump if objective, gradients or parameters are not finite."""
  guarded = {
    k: float(v)
    for k, v in metrics.items()
    if k == "loss/total" or k.startswith(("grad_norm/", "param_norm/"))
  }
  if all(np.isfinite(v) for v in guarded.values()):
    return
  path = workdir / f"nonfinite_step_{step}.json"
  if jax.process_index() == 0:
    numbers = {k: str(float(v)) for k, v in metrics.items()}
    dump = {"step": step, "cases": pools.ids(step), "metrics": numbers}
    files.write(path, json.dumps(dump, indent=2))
  raise FloatingPointError(
    f"step {step} is not finite ({guarded}); its cases and norms are in"
    f" {path}. Look at these cases, or lower the learning rate and go on from"
    " the last checkpoint, which is intact, with --continue"
  )
