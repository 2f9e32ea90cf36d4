"""Synthetic cases: point cloud -> mask -> image, in batches over the mesh.

A case is a function of (averaged parameters, seed, its number, its group)
alone, not of the cases beside it.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Self

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from fairdiff_jax.data import domain as domains
from fairdiff_jax.data.audit import mask_fault
from fairdiff_jax.data.contours import points_to_mask, smooth_contours
from fairdiff_jax.data.loader import normalize
from fairdiff_jax.diffusion.samplers import example_keys
from fairdiff_jax.synthesis.anatomy import Anatomy
from fairdiff_jax.training.checkpoint import INFERENCE, network
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
    (inference, seed, number [n], group [n], title='cases') -> Generated, with
    `inference` the state's fields that `network` takes, `seed` that of all
    noise, an integer or several, and any n; `title` names its progress bar.
  """
  config = run.config.bank
  shape = tuple(run.config.data.size)
  domain = domains.of(run.config.data.domain, run.config.data.source)
  size = -(-config.batch_size // run.mesh.size) * run.mesh.size
  strength = config.strength if anatomy else 1.0
  draws = not anatomy or "points" in makers(run.config)
  draw_points, draw_images = _compile(
    run, size, domain.channels, masks=draws, strength=strength
  )

  def call(function, variables, key, *arrays):
    key = np.asarray(jax.random.key_data(key))
    arrays = [np.asarray(x, np.int32) for x in arrays]
    return map_batch(
      lambda *batch: function(variables, key, *batch), arrays, run.mesh, size
    )

  def draw_masks(variables, base, seed, number, group):
    """Masks, each drawn until it is sound or `max_attempts` are used up."""
    masks = np.zeros((len(number), *shape), np.uint8)
    attempts = np.zeros(len(number), int)
    faults = [""] * len(number)
    real = np.zeros(len(number), bool)
    if anatomy and config.masks != "generated":
      real = (config.masks == "real") | (number % 2 == 0)
      masks[real] = anatomy.draw_masks(seed, number[real])
    pending = np.flatnonzero(~real)
    for attempt in range(config.max_attempts):
      if not len(pending):
        break
      key = jax.random.fold_in(base, attempt)
      clouds = call(
        draw_points, variables, key, number[pending], group[pending]
      )
      for i, cloud in zip(pending, clouds, strict=True):
        if config.harmonics:
          cloud = smooth_contours(cloud, config.harmonics, domain.parents)
        masks[i] = points_to_mask(cloud, shape, domain.parents)
        attempts[i] += 1
        fault = mask_fault(
          masks[i], min_solidity=config.min_solidity, domain=domain
        )
        faults[i] = fault or ""
      pending = np.array([i for i in pending if faults[i]], int)
    return masks, attempts, np.array(faults, str)

  def generate_batch(inference, seed, number, group):
    base = _key(seed)
    points = network(inference, "points") if draws else None
    masks, *rest = draw_masks(points, base, seed, number, group)
    warped = ()
    if strength < 1:
      warped = (anatomy.draw_images(seed, number, group, masks),)
    images = call(
      draw_images,
      network(inference, "image"),
      jax.random.fold_in(base, config.max_attempts),
      number,
      masks,
      group,
      *warped,
    )
    if domain.channels == 1:
      images = images[..., 0]
    images = np.round((images + 1) * 127.5).astype(np.uint8)
    return Generated(images, masks, *rest)

  def generate(inference, seed, number, group, title="cases"):
    number, group = np.asarray(number), np.asarray(group)
    rows = batches(len(number), config.batch_size, title)
    return join(
      [generate_batch(inference, seed, number[i], group[i]) for i in rows],
      shape,
      domain.channels,
    )

  return generate


def _key(seed: int | Sequence[int]) -> jax.Array:
  """A key of its own for every seed: no integer is cut to 32 bits."""
  words = np.random.SeedSequence(seed).generate_state(2)
  return jax.random.wrap_key_data(words, impl="threefry2x32")


def _compile(
  run: Setup, size: int, channels: int, *, masks: bool, strength: float
):
  """The two generators, of masks if asked for, for batches of `size`."""
  replicated = NamedSharding(run.mesh, PartitionSpec())
  rows = NamedSharding(run.mesh, BATCH)
  inference = {
    field: getattr(run.abstract, field) for field in (*INFERENCE, "imported")
  }

  def draw_points(variables, key, number, group):
    keys = example_keys(jax.random.wrap_key_data(key), number)
    return run.objective.tasks["points"].sample(variables, group, keys)

  def draw_images(variables, key, number, mask, group, *warped):
    keys = example_keys(jax.random.wrap_key_data(key), number)
    start = (normalize(warped[0]), strength) if warped else ()
    return run.objective.tasks["image"].sample(
      variables, mask, group, keys, *start
    )

  def compiled(function, name: str, *shapes) -> Any:
    integers = [
      jax.ShapeDtypeStruct((size, *s), np.int32, sharding=rows) for s in shapes
    ]
    key = jax.ShapeDtypeStruct((2,), np.uint32, sharding=replicated)
    jitted = jax.jit(function, out_shardings=replicated)
    with jax.set_mesh(run.mesh):  # kernels ask for it
      return jitted.lower(network(inference, name), key, *integers).compile()

  mask = image = tuple(run.config.data.size)
  if channels > 1:
    image = (*image, channels)
  warped = (image,) if strength < 1 else ()
  return (
    compiled(draw_points, "points", (), ()) if masks else None,
    compiled(draw_images, "image", (), mask, (), *warped),
  )
