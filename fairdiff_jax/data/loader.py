"""Batches as a pure function of (seed, step).

Positions step * B ... step * B + B - 1 of an endless sequence of shuffled
epochs say which cases a step sees; a host materialises only its slice. There
is no iterator state, so that any step can be computed at any time.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from fairdiff_jax.data.augment import augment


class Joined:
  """Arrays [n_i, ...] one after another, of which rows are taken; no copy.

  Their rows have one shape and one type.
  """

  def __init__(self, *parts: np.ndarray):
    self._parts = parts
    self._starts = np.cumsum([0, *map(len, parts)])

  def __len__(self) -> int:
    return int(self._starts[-1])

  def __getitem__(self, index: np.ndarray) -> np.ndarray:
    """Rows [m, ...] of the indices [m]."""
    first = self._parts[0]
    rows = np.empty((len(index), *first.shape[1:]), first.dtype)
    of = np.searchsorted(self._starts, index, side="right") - 1
    for i, part in enumerate(self._parts):
      rows[of == i] = part[index[of == i] - self._starts[i]]
    return rows


class Pool(NamedTuple):
  """Cases to draw from, and which of them make an epoch.

  Attributes:
    name: case names [n].
    image: uint8 [n, H, W], or RGB [n, H, W, 3], an array or some joined.
    mask: uint8 [n, H, W], likewise.
    group: int32 [n], -1 for unknown.
    points: float32 [n, N, 3]; N is 0 in pools without, and a case that lacks a
      structure has a cloud of zeros.
    epoch: indices [M] into the cases.
    latent: float32 [n, h, w, 2 C], which batches hold in place of images; None
      for pools without.
  """

  name: list[str]
  image: np.ndarray | Joined
  mask: np.ndarray | Joined
  group: np.ndarray
  points: np.ndarray
  epoch: np.ndarray
  latent: np.ndarray | None = None


@lru_cache(maxsize=8)
def _shuffled(seed: int, stream: int, epoch: int, size: int) -> np.ndarray:
  return np.random.default_rng([seed, stream, epoch]).permutation(size)


def draw(
  epoch: np.ndarray, *, seed: int, stream: int, step: int, size: int
) -> np.ndarray:
  """Case indices [size] of a step's global batch."""
  position = step * size + np.arange(size)
  number, offset = np.divmod(position, len(epoch))
  order = [
    _shuffled(seed, stream, int(e), len(epoch))[o]
    for e, o in zip(number, offset, strict=True)
  ]
  return epoch[np.asarray(order)]


def normalize(image: np.ndarray) -> np.ndarray:
  """Grey [n, H, W] or RGB [n, H, W, 3] as float32 [n, H, W, C] in [-1, 1]."""
  return _normalized(image.astype(np.float32))


def _normalized(image: np.ndarray) -> np.ndarray:
  """As `normalize`; float32 images are changed in place."""
  image /= 127.5
  image -= 1
  return image if image.ndim == 4 else image[..., None]


def make_batch(
  pool: Pool,
  *,
  seed: int,
  stream: int,
  step: int,
  size: int,
  rows: slice,
  recipe: str,
) -> dict[str, np.ndarray]:
  """This host's rows of a step's global batch.

  Args:
    pool: what to draw from.
    seed: the run's seed.
    stream: tells apart the batches of one step.
    step: the step.
    size: global batch size B.
    rows: which of the B rows this host builds.
    recipe: how cases are augmented, as for `augment`, each from a generator
      of its own, seeded by (seed, stream, step, row). Cases with latents never
      are: their masks would no longer be those of the encoded images.

  Returns:
    image [b, H, W, C], or latent [b, h, w, 2 C] where the pool has them, mask
    [b, H, W], points [b, N, 3], group [b] and weight [b].
  """
  index = draw(pool.epoch, seed=seed, stream=stream, step=step, size=size)
  index = index[rows]
  mask, points = pool.mask[index], pool.points[index]
  if pool.latent is None:
    native = pool.image[index]
    image = np.empty(native.shape, np.float32)
    for i, row in enumerate(range(size)[rows]):
      rng = np.random.default_rng([seed, stream, step, row])
      case = native[i], mask[i], points[i]
      image[i], mask[i], points[i] = augment(recipe, rng, *case)
    shown = {"image": _normalized(image)}
  else:
    shown = {"latent": pool.latent[index]}
  return shown | {
    "mask": mask.astype(np.int32),
    "points": points,
    "group": pool.group[index].astype(np.int32),
    "weight": np.ones(len(index), np.float32),
  }


class Prefetcher:
  """Builds the next step's batch while the devices are busy with this one."""

  def __init__(self, build):
    self._build = build
    self._executor = ThreadPoolExecutor(max_workers=1)
    self._next = None

  def __call__(self, step: int, *, following: int | None):
    """The batch of `step`; starts on that of `following`, if any."""
    if self._next is not None and self._next[0] == step:
      batch = self._next[1].result()
    else:
      batch = self._build(step)
    self._next = None
    if following is not None:
      self._next = following, self._executor.submit(self._build, following)
    return batch

  def close(self):
    self._executor.shutdown(wait=True, cancel_futures=True)
