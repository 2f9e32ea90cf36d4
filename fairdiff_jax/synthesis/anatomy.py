"""Real anatomy for synthetic patients: masks, and images warped onto masks.

A warped image shows a real patient's eye in another shape: something to learn
from, nothing to hand on. It needs the training cases, which lie in no
checkpoint, so that banks alone can hold what is made from it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from scipy import ndimage

from fairdiff_jax.data.audit import signed_distance
from fairdiff_jax.data.statistics import UNLIT

TURN = 15.0  # degrees that a real case is turned by at most, either way
GRID = 96  # longer side, in pixels, at which displacements are found
NEAR = 2.0  # pixels of that grid within which an edge draws its surroundings
SMOOTH = 1.0  # and the standard deviation that smooths a displacement
ITERATIONS = 40
LEAST = 0.02  # share of an image that is beyond its field of view, if any is
MARGIN = 1.2  # of the foreground's reach, within which all is scaled alike,
BORDER = 0.8  # but no more than this share of the way to the border


class Anatomy(NamedTuple):
  """Real cases that synthetic ones may start from.

  Attributes:
    image: uint8 [n, H, W], or RGB [n, H, W, 3].
    mask: uint8 [n, H, W].
    group: int [n], -1 for unknown.
  """

  image: np.ndarray
  mask: np.ndarray
  group: np.ndarray

  def draw_masks(
    self, seed: int | Sequence[int], number: np.ndarray
  ) -> np.ndarray:
    """Masks of patients of any group, flipped and turned a little.

    Args:
      seed: of all randomness.
      number: of the synthetic cases [m]; each depends on its own alone.

    Returns:
      uint8 [m, H, W].
    """
    masks = np.empty((len(number), *self.mask.shape[1:]), np.uint8)
    for row, rng in enumerate(_generators(seed, number, 0)):
      masks[row] = _turned(rng, self.mask[rng.integers(len(self.mask))])[0]
    return masks

  def draw_images(
    self,
    seed: int | Sequence[int],
    number: np.ndarray,
    group: np.ndarray,
    mask: np.ndarray,
  ) -> np.ndarray:
    """Images of patients of given groups, warped onto masks.

    Args:
      seed: of all randomness.
      number: of the synthetic cases [m]; each depends on its own alone.
      group: [m]; of one without a real case, patients of any are taken.
      mask: uint8 [m, H, W].

    Returns:
      uint8 [m, H, W], or RGB [m, H, W, 3].
    """
    images = np.empty((len(mask), *self.image.shape[1:]), np.uint8)
    for row, rng in enumerate(_generators(seed, number, 1)):
      own = np.flatnonzero(self.group == group[row])
      case = rng.choice(own if len(own) else len(self.group))
      known, image = _turned(rng, self.mask[case], self.image[case])
      images[row] = in_field(
        warp(image, known, mask[row]), beyond_field(self.image[case])
      )
    return images


def _generators(seed, number, purpose: int):
  for n in number:
    yield np.random.default_rng([*np.atleast_1d(seed), int(n), purpose])


def _turned(rng, mask, image=None):
  """A case flipped and turned, about the image's centre."""
  height, width = mask.shape
  matrix = cv2.getRotationMatrix2D(
    ((width - 1) / 2, (height - 1) / 2), rng.uniform(-TURN, TURN), 1
  )
  if rng.random() < 0.5:
    matrix[:, 2] += matrix[:, 0] * (width - 1)
    matrix[:, 0] *= -1

  def turn(values):
    return cv2.warpAffine(
      values,
      matrix,
      (width, height),
      flags=cv2.INTER_CUBIC,
      borderMode=cv2.BORDER_REFLECT_101,
    )

  # Distances to the edges turn into smooth edges, classes into jagged ones.
  classes = np.unique(mask)
  depth = [turn(_distance(mask == c)) for c in classes]
  mask = classes[np.argmax(depth, 0)]
  return mask, None if image is None else turn(image)


def warp(image: np.ndarray, mask: np.ndarray, target: np.ndarray) -> np.ndarray:
  """An image whose mask becomes another one, as nearly as a smooth map can.

  Demons (Thirion 1998) between the signed distances to the edges of every
  class, from a shift and a scale that match the foregrounds.

  Args:
    image: uint8 [H, W], or RGB [H, W, 3].
    mask: uint8 [H, W], its classes; 0 is background.
    target: uint8 [H, W], those it shall have.

  Returns:
    uint8, of the image's shape; itself where a mask has no foreground.
  """
  if not (mask.any() and target.any()):
    return image
  height, width = mask.shape
  scale = min(1.0, GRID / max(height, width))
  size = (max(round(width * scale), 1), max(round(height * scale), 1))
  source, wanted = (
    cv2.resize(m, size, interpolation=cv2.INTER_NEAREST) for m in (mask, target)
  )
  classes = sorted(set(np.unique(source)) & set(np.unique(wanted)))
  where = _match(source > 0, wanted > 0)
  distances = [_distance(source == c) for c in classes]
  goals = [_distance(wanted == c) for c in classes]
  slopes = [np.gradient(d) for d in distances]
  near = [np.exp(-((goal / NEAR) ** 2)) for goal in goals]
  total = sum(near) + 1e-3
  for _ in range(ITERATIONS):
    force = np.zeros((2, *wanted.shape), np.float32)
    for distance, goal, slope, weight in zip(
      distances, goals, slopes, near, strict=True
    ):
      error = weight * (_take(distance, where) - goal) / total
      for axis in (0, 1):
        force[axis] -= error * _take(slope[axis], where)
    for axis in (0, 1):
      where[axis] += cv2.GaussianBlur(force[axis], (0, 0), SMOOTH)
  rows, columns = (
    cv2.resize(axis, (width, height), interpolation=cv2.INTER_LINEAR)
    for axis in where
  )
  # Centres of pixels, of the grid and of the image.
  rows = (rows + 0.5) * (height / size[1]) - 0.5
  columns = (columns + 0.5) * (width / size[0]) - 0.5
  return cv2.remap(
    image, columns, rows, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT_101
  )


def beyond_field(image: np.ndarray) -> np.ndarray:
  """What of an image lies outside of its field of view: bool [H, W].

  It is unlit and reaches the image's border; less of it than `LEAST` of the
  image is a shadow, and none.

  Args:
    image: uint8 [H, W], or RGB [H, W, 3].
  """
  unlit = (np.atleast_3d(image).max(-1) <= UNLIT).astype(np.uint8)
  _, label = cv2.connectedComponents(unlit)
  border = (label[0], label[-1], label[:, 0], label[:, -1])
  found = np.isin(label, np.unique(np.concatenate(border))) & (unlit > 0)
  return found if found.mean() >= LEAST else np.zeros_like(found)


def in_field(image: np.ndarray, beyond: np.ndarray) -> np.ndarray:
  """An image with the field of view of another one.

  What lies beyond is black, and what was beyond the image's own is continued
  from the nearest pixel that is not.

  Args:
    image: uint8 [H, W], or RGB [H, W, 3].
    beyond: as `beyond_field` gives it, bool [H, W].
  """
  if not beyond.any():
    return image
  edge = np.ones((5, 5), np.uint8)  # where interpolation mixes both
  own = cv2.dilate(beyond_field(image).astype(np.uint8), edge) > 0
  if not own.all():
    nearest = ndimage.distance_transform_edt(
      own, return_distances=False, return_indices=True
    )
    image = image[tuple(nearest)]
  image = image.copy()
  image[beyond] = 0
  return image


def _match(source, wanted) -> np.ndarray:
  """Where to look [2, H, W] so that foregrounds have one place and size.

  Along every ray from the foreground's centre positions grow in proportion as
  far as the foreground reaches and are stretched evenly from there to the
  border, which stays the border: nothing from beyond it is shown.
  """
  factor = np.sqrt(source.sum() / wanted.sum())
  from_, to = (np.argwhere(m).mean(0) for m in (source, wanted))
  offset = np.indices(wanted.shape, np.float32) - to[:, None, None]
  radius = np.maximum(np.hypot(*offset), 1e-3)
  ray = offset / radius
  end, begin = (_to_border(ray, c, wanted.shape) for c in (to, from_))
  reach = np.minimum(MARGIN * radius[wanted].max(), BORDER * end)
  near = np.minimum(factor * reach, BORDER * begin)
  beyond = near + (radius - reach) * (begin - near) / (end - reach)
  found = np.where(radius < reach, radius * near / reach, beyond)
  return (from_[:, None, None] + found * ray).astype(np.float32)


def _to_border(ray, centre, shape) -> np.ndarray:
  """Distance [H, W] along unit vectors from a centre to the image's border."""
  room = [
    np.where(r > 0, size - 0.5 - c, c + 0.5) / np.maximum(np.abs(r), 1e-6)
    for r, c, size in zip(ray, centre, shape, strict=True)
  ]
  return np.minimum(*room)


def _distance(region: np.ndarray) -> np.ndarray:
  """Signed distance [H, W], smoothed."""
  return cv2.GaussianBlur(signed_distance(region), (0, 0), 0.6)


def _take(values: np.ndarray, where: np.ndarray) -> np.ndarray:
  return cv2.remap(
    values,
    where[1],
    where[0],
    cv2.INTER_LINEAR,
    borderMode=cv2.BORDER_REPLICATE,
  )
