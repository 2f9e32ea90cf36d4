"""Synthetic cases: point cloud -> mask -> image, in batches over the mesh.

A case is a function of (averaged parameters, seed, its number, its group)
alone, not of the cases beside it.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Self

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from fairdiff_jax.data.audit import mask_fault
from fairdiff_jax.data.contours import points_to_mask, smooth_contours
from fairdiff_jax.data.loader import normalize
from fairdiff_jax.diffusion.samplers import example_keys
from fairdiff_jax.synthesis.anatomy import Anatomy
from fairdiff_jax.training.checkpoint import Inference
from fairdiff_jax.training.mesh import BATCH, map_batch
from fairdiff_jax.training.pools import makers
from fairdiff_jax.training.setup import Setup


class Generated(NamedTuple):
  """Synthetic cases.

  Attributes:
    image: uint8 [n, H, W], or RGB [n, H, W, 3].
    mask: uint8 [n, H, W], classes.
    attempts: int [n], clouds drawn until the mask was sound.
    fault: str [n], what is wrong with a mask that never was; '' for the others.
      Such a case is of no use.
  """

  image: np.ndarray
  mask: np.ndarray
  attempts: np.ndarray
  fault: np.ndarray

  @property
  def sound(self) -> np.ndarray:
    """Which cases can be used, bool [n]."""
    return self.fault == ""

  def take(self, index: np.ndarray | slice) -> Self:
    """Some of the cases."""
    return type(self)(*(x[index] for x in self))

  def require_sound(self) -> Self:
    """The cases; raises ValueError if one is of no use."""
    require_sound(self.attempts, self.fault)
    return self


def require_sound(
  attempts: np.ndarray, fault: np.ndarray, what: str = "masks"
) -> None:
  """Raises ValueError if one of some cases is of no use.

  Args:
    attempts: as of `Generated`, [n].
    fault: likewise.
    what: names them in the message.
  """
  faults = Counter(fault[fault != ""].tolist())
  if faults:
    raise ValueError(
      f"{faults.total()} of {len(fault)} {what} are still unsound after"
      f" {attempts.max()} draws each ({dict(faults)}): the mask"
      " generator is not trained enough. Train it longer before the segmenter"
      " starts (train.segmenter), or lower bank.min_solidity"
    )


def join(
  chunks: Sequence[Generated], size: tuple[int, int], channels: int = 1
) -> Generated:
  """The cases of all chunks, whose images have a size (H, W)."""
  mask = np.empty((0, *size), np.uint8)
  image = mask if channels == 1 else np.empty((0, *size, channels), np.uint8)
  none = Generated(image, mask, np.empty(0, int), np.empty(0, "U1"))
  return Generated(*map(np.concatenate, zip(none, *chunks, strict=True)))


def batches(
  number: int, size: int, title: str, *, first: int = 0
) -> Iterator[slice]:
  """Batches of `number` cases under a progress bar, from batch `first` on."""
  yield from tqdm(
    [slice(i, i + size) for i in range(first * size, number, size)],
    desc=title,
    unit="batch",
    total=-(-number // size),
    initial=first,
    leave=False,
    disable=number <= size or jax.process_index() != 0,
  )


def make_generator(
  run: Setup, anatomy: Anatomy | None = None
) -> Callable[..., Generated]:
  """Compiles the generators, for batches of `bank.batch_size`.

  Args:
    run: set-up of the run.
    anatomy: real cases, which `bank.masks` and `bank.strength` may ask for;
      None makes cases of noise alone, whatever the config asks for.

  Returns:
    (inference, seed, number [n], group [n], title='cases', wanted=None) ->
    Generated, with `seed` that of all noise, an integer or several, and any n;
    `title` names its progress bar. `wanted` says of a sound mask [H, W] what
    else is wrong with it, or ''.
  """
  size = run.config.bank.batch_size
  domain = run.domain
  draw_masks = _make_mask_generator(run, anatomy)
  draw_images = make_image_generator(run, anatomy)

  def generate(
    inference, seed, number, group, title="cases", wanted=lambda mask: ""
  ):
    number, group = np.asarray(number), np.asarray(group)
    cases = []
    for rows in batches(len(number), size, title):
      which = number[rows], group[rows]
      masks, *rest = draw_masks(inference, seed, *which, wanted)
      images = draw_images(inference, seed, *which, masks)
      cases.append(Generated(images, masks, *rest))
    return join(cases, run.config.data.size, domain.channels)

  return generate


def _make_mask_generator(run: Setup, anatomy: Anatomy | None):
  """Compiles the drawing of masks: -> masks, attempts, fault.

  A mask is drawn until it is sound, or `bank.max_attempts` are used up; n is at
  most `bank.batch_size`.
  """
  config, shape = run.config.bank, tuple(run.config.data.size)
  domain = run.domain
  draw_points = None
  if not anatomy or "points" in makers(run.config):
    task = run.objective.tasks["points"]

    def points(variables, keys, group):
      return task.sample(variables, group, keys)

    draw_points = compile_network(run, "points", points, ())

  def draw(inference, seed, number, group, wanted):
    masks = np.zeros((len(number), *shape), np.uint8)
    attempts = np.zeros(len(number), int)
    faults = [""] * len(number)
    real = np.zeros(len(number), bool)
    if anatomy and config.masks != "generated":
      real = (config.masks == "real") | (number % 2 == 0)
      masks[real] = anatomy.draw_masks(seed, number[real], group[real])
    pending = np.flatnonzero(~real)
    for attempt in range(config.max_attempts):
      if not len(pending):
        break
      key = jax.random.fold_in(_key(seed), attempt)
      clouds = draw_points(inference, key, number[pending], group[pending])
      for i, cloud in zip(pending, clouds, strict=True):
        if config.harmonics:
          cloud = smooth_contours(cloud, config.harmonics, domain.parents)
        masks[i] = points_to_mask(cloud, shape, domain.parents)
        attempts[i] += 1
        fault = mask_fault(
          masks[i], min_solidity=config.min_solidity, domain=domain
        )
        faults[i] = fault or wanted(masks[i])
      pending = np.array([i for i in pending if faults[i]], int)
    return masks, attempts, np.array(faults, str)

  return draw


def make_image_generator(
  run: Setup, anatomy: Anatomy | None = None
) -> Callable[..., np.ndarray]:
  """Compiles the image generator, for batches of `bank.batch_size`.

  Args:
    run: set-up of the run.
    anatomy: as for `make_generator`.

  Returns:
    (inference, seed, number [n], group [n], mask [n, H, W]) -> images, uint8
    [n, H, W] or RGB [n, H, W, 3], for any n.
  """
  config = run.config.bank
  shape, channels = tuple(run.config.data.size), run.domain.channels
  strength = config.strength if anatomy else 1.0
  task = run.objective.tasks["image"]

  def images(variables, keys, group, mask, *warped):
    start = (normalize(warped[0]), strength) if warped else ()
    return task.sample(variables, mask, group, keys, *start)

  real = shape if channels == 1 else (*shape, channels)
  warped = (real,) if strength < 1 else ()
  draw_images = compile_network(run, "image", images, (), shape, *warped)

  def draw(inference, seed, number, group, mask):
    # Other noise than that of any attempt at a mask.
    key = jax.random.fold_in(_key(seed), config.max_attempts)
    found = np.empty((len(number), *shape, channels), np.uint8)
    for rows in batches(len(number), config.batch_size, "images"):
      case = number[rows], group[rows], mask[rows]
      start = ()
      if strength < 1:
        start = (anatomy.draw_images(seed, *case),)
      pixels = draw_images(inference, key, *case, *start)
      found[rows] = np.round((pixels + 1) * 127.5).astype(np.uint8)
    return found[..., 0] if channels == 1 else found

  return draw


def _key(seed: int | Sequence[int]) -> jax.Array:
  """A key of its own for every seed: no integer is cut to 32 bits."""
  words = np.random.SeedSequence(seed).generate_state(2)
  return jax.random.wrap_key_data(words, impl="threefry2x32")


def compile_network(run: Setup, name: str, sample, *shapes) -> Callable:
  """Compiles what a network does, for batches of `bank.batch_size`.

  Args:
    run: set-up of the run.
    name: of the network.
    sample: (variables, keys [B], *arrays) -> array [B, ...].
    shapes: of a row of every array, which holds integers.

  Returns:
    (inference, key, number [n], *arrays) -> numpy, n at most the batch size.
  """
  batch_size = run.config.bank.batch_size
  size = -(-batch_size // run.mesh.size) * run.mesh.size
  rows = NamedSharding(run.mesh, BATCH)
  replicated = NamedSharding(run.mesh, PartitionSpec())

  def keyed(variables, key, number, *arrays):
    keys = example_keys(jax.random.wrap_key_data(key), number)
    return sample(variables, keys, *arrays)

  integers = [
    jax.ShapeDtypeStruct((size, *s), np.int32, sharding=rows)
    for s in ((), *shapes)
  ]
  with jax.set_mesh(run.mesh):  # kernels ask for it
    compiled = (
      jax.jit(keyed, out_shardings=replicated)
      .lower(
        Inference.of(run.abstract).network(name),
        jax.ShapeDtypeStruct((2,), np.uint32, sharding=replicated),
        *integers,
      )
      .compile()
    )

  def call(inference, key, *arrays):
    variables = inference.network(name)
    key = np.asarray(jax.random.key_data(key))
    arrays = [np.asarray(x, np.int32) for x in arrays]
    return map_batch(
      lambda *batch: compiled(variables, key, *batch), arrays, run.mesh, size
    )

  return call
