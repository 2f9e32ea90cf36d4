"""The loop: one for joint, staged and plain segmentation training.

At every step: save if due, refill the bank if due, take the batch, step, log.
Everything a step needs is a function of (config, data, step, state, bank), so
that a run stopped at any moment goes on from its last checkpoint to the very
same parameters.
"""

import json
import shutil
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from fairdiff_jax.config import claim, config_hash, data_directory
from fairdiff_jax.data import attributes, statistics
from fairdiff_jax.data.fairseg import Cases
from fairdiff_jax.data.loader import Pool, Prefetcher, draw, make_batch
from fairdiff_jax.data.mixture import (
  group_sizes,
  powered_pool,
  synthetic_quota,
  training_pool,
)
from fairdiff_jax.objectives.joint import NETWORKS, Objective, make_objective
from fairdiff_jax.training.checkpoint import (
  Checkpoints,
  describe,
  fingerprint,
  join,
)
from fairdiff_jax.training.journal import Journal
from fairdiff_jax.training.latents import cached_latents, cached_shape
from fairdiff_jax.training.mesh import (
  host_slice,
  make_mesh,
  to_host,
  tree_shardings,
)
from fairdiff_jax.training.optimizer import make_optimizer
from fairdiff_jax.training.start import import_weights, start_from_weights
from fairdiff_jax.training.step import (
  AXIS,
  TrainState,
  compile_step,
  init_state,
  train_step,
)

STREAMS = {"generation": 0, "segmentation": 1, "pools": 2}


class Synthetic(NamedTuple):
  """Synthetic cases, and the mixture that they were made for.

  Attributes:
    image: uint8 [m, H, W].
    mask: uint8 [m, H, W].
    group: int32 [m].
    sizes: cases of every group in an epoch [G].
  """

  image: np.ndarray
  mask: np.ndarray
  group: np.ndarray
  sizes: np.ndarray


class Setup(NamedTuple):
  """What a config fixes before any data is seen."""

  config: Any
  objective: Objective
  optimizer: optax.GradientTransformation
  mesh: Mesh
  abstract: TrainState  # shapes and shardings of the state
  # (statistics, training cases of every group [G]) -> the initial state
  init: Callable[[Any, np.ndarray], TrainState]


def case_groups(config, cases: Cases) -> np.ndarray:
  """Each case's group [n], -1 for unknown."""
  return attributes.group_codes(
    config.data.attribute, cases.attributes, config.data.pooled
  )


def learning_steps(config, name: str) -> tuple[int, int]:
  """The steps (from, to) in which a network learns."""
  if name == "adversary":
    used = config.fairness.method == "adversarial"
    return config.train.segmenter if used else (0, 0)
  return config.train[name]


def active_networks(config, step: int) -> tuple[str, ...]:
  """The networks that learn at a step."""
  spans = {name: learning_steps(config, name) for name in NETWORKS}
  return tuple(n for n, (start, stop) in spans.items() if start <= step < stop)


def bank_step(config, step: int) -> int | None:
  """The step whose bank is in use at `step`; None where there is none."""
  start = config.train.segmenter[0]
  if config.fairness.strategy != "equal_scale" or step < start:
    return None
  return start + (step - start) // config.bank.every * config.bank.every


def setup(config, devices: Sequence[jax.Device] | None = None) -> Setup:
  """Builds objective, optimiser and mesh, and describes the state.

  Networks that never learn are left out.

  Args:
    config: the run's config.
    devices: the mesh's devices; None for all of all hosts.
  """
  names = attributes.group_names(config.data.attribute, config.data.pooled)
  axis_name = AXIS if config.parallel.compile == "pmap" else None
  spans = {name: learning_steps(config, name) for name in NETWORKS}
  num_updates = {n: b - a for n, (a, b) in spans.items() if b > a}
  objective = make_objective(config, names, tuple(num_updates), axis_name)
  optimizer = make_optimizer(config.optimizer, num_updates)
  mesh = make_mesh(config.parallel.fsdp, devices)
  init = partial(
    init_state,
    jax.random.key(config.seed),
    objective=objective,
    optimizer=optimizer,
  )
  abstract = describe(
    partial(
      init,
      _constants(statistics.shapes(len(names)), objective),
      np.zeros(len(names), np.float32),
    ),
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


def _constants(stats: dict[str, Any], objective: Objective) -> dict[str, Any]:
  return {name: stats[name] for name in objective.tasks}


def make_step(
  run: Setup, active: tuple[str, ...]
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]:
  """Compiles the train step of a phase: (state, host's batch) -> the next."""
  return compile_step(
    step_function(run, active),
    mesh=run.mesh,
    state=run.abstract,
    batch=describe_batch(run.config, active),
    mode=run.config.parallel.compile,
  )


def step_function(
  run: Setup, active: tuple[str, ...]
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
  """The train step of a phase, not compiled."""
  return partial(
    train_step,
    objective=run.objective,
    optimizer=run.optimizer,
    seed=run.config.seed,
    ema_decay=run.config.train.ema_decay,
    active=active,
  )


def describe_batch(
  config, active: tuple[str, ...]
) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
  """Shapes and types of a phase's global batch."""
  floats = partial(jax.ShapeDtypeStruct, dtype=np.float32)
  integers = partial(jax.ShapeDtypeStruct, dtype=np.int32)

  def part(size, num_points, latent=None):
    shown = {"image": floats((size, *config.data.size, 1))}
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


class _Pools:
  """The pools of a run and the batches they give.

  Raises:
    ValueError: at once, rather than when the segmenter starts, if one of its
      batches or pools cannot be made.
  """

  def __init__(self, config, cases: Cases, group_names: tuple[str, ...]):
    self._config = config
    self._cases = cases
    self.group = case_groups(config, cases)
    self._group_names = group_names
    self._rng = lambda n: np.random.default_rng(
      [config.seed, STREAMS["pools"], n]
    )
    self.generation = Pool(
      cases.name,
      cases.image,
      cases.mask,
      self.group,
      cases.points,
      powered_pool(self._rng(0), self.group, config.train.generation_power),
    )
    self.segmentation = None
    self._synthetic = config.fairness.strategy == "equal_scale"
    if config.train.segmenter[0] < config.train.segmenter[1]:
      host_slice(config.train.segmentation_batch)
      self._epoch(np.empty(0, np.int32), self.demand()[0])

  def demand(self, risk: np.ndarray | None = None):
    """Cases of every group in an epoch, and how many of them are synthetic.

    Args:
      risk: running risk of the groups [G].

    Returns:
      (sizes [G], quota [G]).
    """
    fairness, number = self._config.fairness, len(self._group_names)
    sizes = group_sizes(
      self.group,
      number,
      size=fairness.group_size,
      risk=risk,
      tilt=fairness.tilt if self._synthetic else 0,
    )
    if not self._synthetic:
      return sizes, np.zeros(number, int)
    return sizes, synthetic_quota(self.group, sizes, fairness.real_share)

  def _epoch(self, synthetic_group, sizes):
    return training_pool(
      self._rng(1),
      self._config.fairness.strategy,
      self.group,
      synthetic_group,
      self._group_names,
      sizes,
    )

  def mix(self, synthetic: Synthetic | None):
    """Makes the segmenter's pool from real cases and the bank."""
    if synthetic is None:
      empty = np.empty((0, *self._cases.image.shape[1:]), np.uint8)
      group = np.empty(0, np.int32)
      synthetic = Synthetic(empty, empty, group, self.demand()[0])
    self.segmentation = Pool(
      self._cases.name
      + [f"synthetic_{i}" for i in range(len(synthetic.group))],
      np.concatenate([self._cases.image, synthetic.image]),
      np.concatenate([self._cases.mask, synthetic.mask]),
      np.concatenate([self.group, synthetic.group]),
      np.empty((len(self.group) + len(synthetic.group), 0, 3), np.float32),
      self._epoch(synthetic.group, synthetic.sizes),
    )

  def _parts(self, step):
    config, active = self._config, active_networks(self._config, step)
    if {"points", "image"} & set(active):
      yield "generation", self.generation, config.train.generation_batch
    if "segmenter" in active:
      yield "segmentation", self.segmentation, config.train.segmentation_batch

  def batch(self, step: int) -> dict[str, dict[str, np.ndarray]]:
    """This host's slice of the step's batch."""
    return {
      name: make_batch(
        pool,
        seed=self._config.seed,
        stream=STREAMS[name],
        step=step,
        size=size,
        rows=host_slice(size),
        augmented=self._config.data.augment,
      )
      for name, pool, size in self._parts(step)
    }

  def ids(self, step: int) -> dict[str, list[str]]:
    """Names of the cases in the step's global batch."""
    result = {}
    for name, pool, size in self._parts(step):
      index = draw(
        pool.epoch,
        seed=self._config.seed,
        stream=STREAMS[name],
        step=step,
        size=size,
      )
      result[name] = [pool.name[i] for i in index]
    return result


class _Termination:
  """Whether the run was asked to stop (SIGTERM), on any host."""

  def __init__(self):
    self._asked = False
    self._alone = jax.process_count() == 1
    if self._alone:
      self._previous = signal.signal(signal.SIGTERM, self._ask)

  def _ask(self, *_):
    self._asked = True

  def __call__(self, step: int) -> bool:
    if self._alone:
      return self._asked
    return multihost_utils.reached_preemption_sync_point(step)

  def close(self):
    if self._alone:
      signal.signal(signal.SIGTERM, self._previous)


def _prune(root: Path, kept: set[str]):
  """Removes banks that no checkpoint needs."""
  for directory in root.glob("step_*"):
    if directory.name not in kept:
      shutil.rmtree(directory)


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
    path.write_text(
      json.dumps(
        {"step": step, "cases": pools.ids(step), "metrics": numbers}, indent=2
      )
    )
  raise FloatingPointError(
    f"step {step} is not finite ({guarded}); its cases and norms are in"
    f" {path}. Lower the learning rate or look at these cases; the last"
    " checkpoint is intact"
  )


def train(
  config,
  workdir: str | Path,
  cases: Cases,
  *,
  make_refill: Callable[[Setup], Callable[..., Synthetic]] | None = None,
  name: str = "train",
) -> TrainState | None:
  """Trains, or goes on training, a run.

  Args:
    config: the run's config.
    workdir: the run's directory, shared by all hosts.
    cases: training cases.
    make_refill: setup -> ((state, step, sizes [G], quota [G], directory) ->
      Synthetic), which generates a bank or reads it back; None for runs
      without a bank.
    name: what the progress bar calls the run.

  Returns:
    The final state, or None if SIGTERM stopped the run early.

  Raises:
    ValueError: if the work directory belongs to another config, a group has
      no case, or devices do not divide a batch.
    FloatingPointError: if a step's loss, gradients or new parameters are not
      finite.
  """
  workdir = Path(workdir)
  first_host = jax.process_index() == 0
  run = setup(config)
  pools = _Pools(config, cases, run.objective.group_names)
  cached = cached_shape(config)
  # Only now: a config that cannot run must not claim the directory.
  claim(workdir, config, write=first_host)
  checkpoints = Checkpoints(workdir, config.checkpoint.keep)
  restored = checkpoints.restore(run.abstract, ("inference", "training"))
  if restored is None:
    start = 0
    number = len(run.objective.group_names)
    stats = statistics.compute(
      cases, pools.group, number, intensity_prior=config.image.intensity_prior
    )
    counts = attributes.group_counts(pools.group, number)
    state = start_from_weights(
      run.init(_constants(stats, run.objective), counts.astype(np.float32)),
      run.objective,
      run.abstract,
    )
  else:
    start, parts = restored
    imported = import_weights(run.objective, run.abstract)
    checkpoints.check_imported(start, imported)
    state = join(parts, imported)
  total = config.train.steps
  if cached and start < total:
    directory = data_directory(config, workdir)
    latent = cached_latents(config, run.mesh, cases, directory)
    pools.generation = pools.generation._replace(latent=latent)
  journal = Journal(
    workdir, start=start, stop=total, enabled=first_host, name=name
  )
  if start:
    journal.say(f"resuming from the checkpoint of step {start}")
  termination = _Termination()
  prefetch = Prefetcher(pools.batch)
  facts = {"config_sha256": config_hash(config)}
  bank, pending = None, None
  stopped = "SIGTERM: stopped after step {}, saved; the same command resumes"
  refill = make_refill(run) if make_refill else None
  # A phase is compiled while the one before it trains.
  compiler = ThreadPoolExecutor(max_workers=1)
  phases = dict.fromkeys(
    active_networks(config, s) for s in range(start, total)
  )
  compiled = {p: compiler.submit(make_step, run, p) for p in phases}

  def settle():
    """Waits for the step under way and checks it."""
    nonlocal pending
    if pending is not None:
      _check_finite(workdir, pools, *pending)
      pending = None

  def save(step):
    settle()
    bank = bank_step(config, step)
    named = None if bank is None else bank_name(bank)
    # A checkpoint is removed when the next is complete; its bank after that.
    needed = {bank_step(config, s) for s in [*checkpoints.steps, step]}
    if first_host:
      _prune(workdir / "bank", {bank_name(b) for b in needed if b is not None})
    checkpoints.save(state, facts=facts | {"bank": named})

  try:
    for step in range(start, total):
      if termination(step):
        if step > start:
          save(step)
        journal.say(stopped.format(step))
        return None
      if step > start and step % config.checkpoint.every == 0:
        save(step)
      active = active_networks(config, step)
      if "segmenter" in active and (
        pools.segmentation is None or bank != bank_step(config, step)
      ):
        settle()
        bank = bank_step(config, step)
        synthetic = None
        if bank is not None:
          sizes, quota = pools.demand(to_host(state.fairness.running.risk))
          if quota.any() or config.fairness.tilt:
            directory = workdir / "bank" / bank_name(bank)
            if step != bank and not directory.exists():
              raise FileNotFoundError(
                f"{directory}, named by the checkpoint of step {step}, is"
                " missing; put it back or remove that checkpoint"
              )
            synthetic = refill(state, bank, sizes, quota, directory)
        pools.mix(synthetic)
      following = step + 1
      # The batches after a refill are not known before it.
      if following == total or bank_step(config, following) != bank:
        following = None
      batch = prefetch(step, following=following)
      rows = sum(len(part["weight"]) for part in batch.values())
      state, metrics = compiled[active].result()(state, batch)
      settle()
      pending = step, metrics
      done = step + 1
      journal.step()
      if done % config.log.every == 0 or done == total:
        numbers = {k: float(v) for k, v in sorted(metrics.items())}
        journal.log(done, numbers, cases=rows * jax.process_count())
    settle()
    if start < total:
      save(total)
    journal.log(total, {"params_sha256": fingerprint(state.params)})
    if termination(total):
      journal.say(stopped.format(total))
      return None
    return state
  finally:
    compiler.shutdown(cancel_futures=True)
    prefetch.close()
    checkpoints.close()
    journal.close()
    termination.close()


def bank_name(step: int) -> str:
  """Directory of the bank filled at a step."""
  return f"step_{step:08d}"
