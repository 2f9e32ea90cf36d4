"""The cases that a run's networks see, and the batches made of them."""

from collections.abc import Iterator

import numpy as np

from fairdiff_jax.data import groups
from fairdiff_jax.data.augment import generators_recipe
from fairdiff_jax.data.cases import Cases, require_training
from fairdiff_jax.data.loader import Joined, Pool, draw, make_batch
from fairdiff_jax.data.mixture import (
  group_sizes,
  powered_pool,
  synthetic_quota,
  training_pool,
)
from fairdiff_jax.training.banks import Synthetic
from fairdiff_jax.training.mesh import host_slice
from fairdiff_jax.training.schedule import (
  active_networks,
  learning_steps,
  mixture,
)

STREAMS = {"generation": 0, "segmentation": 1, "pools": 2}
GENERATORS = ("points", "image")


def case_groups(config, cases: Cases) -> np.ndarray:
  """Each case's group [n], -1 for unknown."""
  return groups.group_codes(
    config.data.attribute,
    cases.attributes,
    config.data.pooled,
    cases.vocabulary,
  )


def makers(config) -> tuple[str, ...]:
  """The networks that a bank's cases are made by."""
  return ("image",) if config.bank.masks == "real" else GENERATORS


class Pools:
  """The pools of a run and the batches they give.

  The segmenter's is there once it has been mixed: `ready` says whether what a
  step needs is.

  Attributes:
    group: of each training case [n], -1 for unknown.
    generation: what the generators learn from.
    filled: whether the segmenter's cases are mixed with a bank's.

  Raises:
    ValueError: at once, rather than when a network starts, if one of its
      batches or pools cannot be made, or the cases are no training cases.
  """

  def __init__(self, config, cases: Cases, group_names: tuple[str, ...]):
    require_training(cases, "training")
    self._config = config
    self._cases = cases
    self.group = case_groups(config, cases)
    self._group_names = group_names
    self._recipes = {
      "generation": generators_recipe(config.data.augment),
      "segmentation": config.data.augment,
    }
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
    self._segmentation = None
    self._mixed = None  # the step it was mixed at
    self._equal_scale = config.fairness.strategy == "equal_scale"
    self.filled = False
    if any(self._learns(name) for name in GENERATORS):
      host_slice(config.train.generation_batch)
    if self._learns("segmenter"):
      host_slice(config.train.segmentation_batch)
      sizes, quota = self.demand()
      self._epoch(np.empty(0, np.int32), sizes)
      self.filled = self._equal_scale and bool(
        quota.any() or config.fairness.tilt
      )
    if self._learns("points") and not cases.points.any():
      raise ValueError(
        "no training case can teach the mask generator: each lacks a structure,"
        " or its points do not give its mask back; see what fairdiff prepare"
        " says, raise data.num_points, or set train.points=(0, 0)"
      )
    for name in makers(config):
      if self.filled and not self._learns(name):
        raise ValueError(
          "fairness.strategy='equal_scale' needs generated cases, but"
          f" train.{name} has no steps; give it some, or set"
          " fairness.strategy='repeat_sample'"
        )

  def _learns(self, name):
    start, stop = learning_steps(self._config, name)
    return start < stop

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
      tilt=fairness.tilt if self._equal_scale else 0,
    )
    if not self._equal_scale:
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

  def ready(self, step: int) -> bool:
    """Whether the pools of a step's batch are there."""
    active = active_networks(self._config, step)
    return "segmenter" not in active or self._mixed == mixture(
      self._config, step
    )

  def mix(self, step: int, synthetic: Synthetic | None = None):
    """Makes the segmenter's pool of a step from real cases and its bank."""
    if synthetic is None:
      image, mask = self._cases.image[:0], self._cases.mask[:0]
      group = np.empty(0, np.int32)
      synthetic = Synthetic(image, mask, group, self.demand()[0])
    self._segmentation = Pool(
      self._cases.name
      + [f"synthetic_{i}" for i in range(len(synthetic.group))],
      Joined(self._cases.image, synthetic.image),
      Joined(self._cases.mask, synthetic.mask),
      np.concatenate([self.group, synthetic.group]),
      np.empty((len(self.group) + len(synthetic.group), 0, 3), np.float32),
      self._epoch(synthetic.group, synthetic.sizes),
    )
    self._mixed = mixture(self._config, step)

  def _parts(self, step: int) -> Iterator[tuple[str, Pool, int]]:
    config, active = self._config, active_networks(self._config, step)
    if not self.ready(step):
      raise RuntimeError(f"the segmenter's cases of step {step} are not mixed")
    if set(GENERATORS) & set(active):
      yield "generation", self.generation, config.train.generation_batch
    if "segmenter" in active:
      yield "segmentation", self._segmentation, config.train.segmentation_batch

  def batch(self, step: int) -> dict[str, dict[str, np.ndarray]]:
    """This host's slice of the batch of a step that is ready."""
    return {
      name: make_batch(
        pool,
        seed=self._config.seed,
        stream=STREAMS[name],
        step=step,
        size=size,
        rows=host_slice(size),
        recipe=self._recipes[name],
      )
      for name, pool, size in self._parts(step)
    }

  def ids(self, step: int) -> dict[str, list[str]]:
    """Names of the cases in the global batch of a step that is ready."""
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
