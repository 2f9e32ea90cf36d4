"""Synthetic cases: point cloud -> mask -> image, in batches over the mesh.

A case is a function of (averaged parameters, seed, its number, its group)
alone, not of the cases beside it.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fairdiff_jax.data.audit import mask_fault
from fairdiff_jax.data.contours import points_to_mask, smooth_contours
from fairdiff_jax.diffusion.samplers import example_keys
from fairdiff_jax.objectives.joint import Objective
from fairdiff_jax.training.checkpoint import network
from fairdiff_jax.training.loop import Setup
from fairdiff_jax.training.mesh import map_batch


class Generated(NamedTuple):
  """Synthetic cases.

  Attributes:
    image: uint8 [n, H, W].
    mask: uint8 [n, H, W], 0 background, 1 rim, 2 cup.
    attempts: int [n], clouds drawn until the mask was sound.
  """

  image: np.ndarray
  mask: np.ndarray
  attempts: np.ndarray


def make_generator(run: Setup) -> Callable[..., Generated]:
  """Compiles the generators, for batches of `bank.batch_size`.

  Args:
    run: set-up of the run.

  Returns:
    (inference, seed, number [n], group [n]) -> Generated, with `inference`
    the state's fields that `network` takes, `seed` that of all noise, and n
    at most `bank.batch_size`.
  """
  config = run.config.bank
  shape = tuple(run.config.data.size)
  draw_points, draw_images = _compiled(run.objective, run.mesh)

  def call(function, variables, key, number, *arrays):
    arrays = [np.asarray(x) for x in (number, *arrays)]
    function = partial(function, variables, key)
    return map_batch(function, arrays, run.mesh, config.batch_size)

  def draw_masks(variables, base, number, group):
    """A sound mask of every case, each drawn until it is one."""
    masks = np.zeros((len(number), *shape), np.uint8)
    attempts = np.zeros(len(number), int)
    pending = np.arange(len(number))
    faults = Counter()
    for attempt in range(config.max_attempts):
      key = jax.random.fold_in(base, attempt)
      clouds = call(
        draw_points, variables, key, number[pending], group[pending]
      )
      failed = []
      for i, cloud in zip(pending, clouds, strict=True):
        if config.harmonics:
          cloud = smooth_contours(cloud, config.harmonics)
        masks[i] = points_to_mask(cloud, shape)
        attempts[i] += 1
        fault = mask_fault(masks[i], min_solidity=config.min_solidity)
        if fault:
          faults[fault] += 1
          failed.append(i)
      pending = np.asarray(failed, int)
      if not len(pending):
        return masks, attempts
    raise ValueError(
      f"{len(pending)} of {len(number)} masks are still unsound after"
      f" {config.max_attempts} draws each ({dict(faults)}): the mask generator"
      " is not trained enough. Train it longer before the segmenter starts"
      " (train.segmenter), or lower bank.min_solidity"
    )

  def generate(inference, seed, number, group):
    number, group = np.asarray(number), np.asarray(group, np.int32)
    base = jax.random.key(seed)
    masks, attempts = draw_masks(
      network(inference, "points"), base, number, group
    )
    images = call(
      draw_images,
      network(inference, "image"),
      jax.random.fold_in(base, config.max_attempts),
      number,
      masks.astype(np.int32),
      group,
    )
    images = np.round((images[..., 0] + 1) * 127.5).astype(np.uint8)
    return Generated(images, masks, attempts)

  return generate


def _compiled(objective: Objective, mesh):
  replicated = NamedSharding(mesh, PartitionSpec())

  def draw_points(variables, key, number, group):
    keys = example_keys(key, number)
    return objective.tasks["points"].sample(variables, group, keys)

  def draw_images(variables, key, number, mask, group):
    keys = example_keys(key, number)
    return objective.tasks["image"].sample(variables, mask, group, keys)

  return (
    jax.jit(draw_points, out_shardings=replicated),
    jax.jit(draw_images, out_shardings=replicated),
  )
