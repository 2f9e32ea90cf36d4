"""Real anatomy for synthetic patients: masks, and images warped onto masks.

A warped image shows a real patient's eye in another shape, a blend of two some
of each: something to learn from, nothing to hand on. It needs the training
cases, which lie in no checkpoint, so that banks alone can hold what is made
from it.
"""

import dataclasses
import functools
from collections.abc import Sequence

import cv2
import numpy as np
from scipy import ndimage, special

from fairdiff_jax.data.audit import signed_distance
from fairdiff_jax.data.statistics import DARK, LOG_LEVELS, UNLIT

TURN = 15.0  # degrees that a real case is turned by at most, either way
GRID = 96  # longer side, in pixels, at which displacements are found
NEAR = 2.0  # pixels of that grid within which an edge draws its surroundings
SMOOTH = 1.0  # and the standard deviation that smooths a displacement
ITERATIONS = 40
LEAST = 0.02  # share of an image that is beyond its field of view, if any is
MARGIN = 1.2  # of the foreground's reach, within which all is scaled alike,
BORDER = 0.8  # but no more than this share of the way to the border
POOLED = 2.0  # cases at the mean of all that a group's mean counts besides its
OTHERS = 0.5  # chance that the second patient of a blend is of any group
PATCH = 8.0  # pixels of a 64-pixel image, standard deviation that smooths where
SHARP = 4.0  # a blend shows whom, how soon one passes into the other,
TIPPED = 0.7  # and how much more of an image one may have
LIGHT = 12.0  # and that of how an eye is lit, which is the first's everywhere


@dataclasses.dataclass(frozen=True)
class Anatomy:
  """Real cases that synthetic ones may start from.

  Attributes:
    image: uint8 [n, H, W], or RGB [n, H, W, 3].
    mask: uint8 [n, H, W].
    group: int [n], -1 for unknown.
    patients: how many an image is made from: 1 is warped, 2 are and blended.
  """

  image: np.ndarray
  mask: np.ndarray
  group: np.ndarray
  patients: int = 1

  @functools.cached_property
  def _sizes(self) -> np.ndarray:
    """Logarithms of every class's area: [n, classes]."""
    counts = [np.bincount(mask.ravel(), minlength=256) for mask in self.mask]
    areas = np.stack(counts)[:, 1:]
    return np.log1p(areas[:, areas.any(0)])

  @functools.cached_property
  def _shares(self) -> dict[int, np.ndarray]:
    """`share_of_masks` of every group that has a case."""
    number, centre = len(self._sizes), self._sizes.mean(0)
    spread = np.zeros((len(centre), len(centre)))
    means, prior = {}, {}
    for g in np.unique(self.group):
      own = self._sizes[self.group == g]
      prior[g] = len(own) / number
      means[g] = (own.sum(0) + POOLED * centre) / (len(own) + POOLED)
      spread += prior[g] * np.cov(own.T, bias=True)
    inverse = np.linalg.inv(spread + 1e-3 * np.eye(len(centre)))
    logs = {}
    for g, mean in means.items():
      x = self._sizes - mean
      logs[g] = -0.5 * np.einsum("ni,ij,nj->n", x, inverse, x)
    highest = functools.reduce(np.maximum, logs.values())
    density = {g: np.exp(log - highest) for g, log in logs.items()}
    mixture = sum(prior[g] * density[g] for g in density)
    odds = {g: of / mixture for g, of in density.items()}
    return {g: of / of.sum() for g, of in odds.items()}

  def share_of_masks(self, group: int) -> np.ndarray:
    """Chance of every case's mask to be drawn for a group: [n], of sum 1.

    Masks of all groups serve, as often as the group has such. With logarithms x
    of the classes' areas normal in every group h, of n_h of n cases and with
    one covariance, it is in proportion to

      N(x; m_g, S) / sum_h n_h / n N(x; m_h, S).

    Of a group without a case all are as likely.

    Args:
      group: its index.
    """
    if group in self._shares:
      return self._shares[group]
    return np.full(len(self.mask), 1 / len(self.mask))

  def draw_masks(
    self, seed: int | Sequence[int], number: np.ndarray, group: np.ndarray
  ) -> np.ndarray:
    """Masks as a group has them, of any patient, flipped and turned a little.

    Args:
      seed: of all randomness.
      number: of the synthetic cases [m]; each depends on its own alone.
      group: [m].

    Returns:
      uint8 [m, H, W].
    """
    masks = np.empty((len(number), *self.mask.shape[1:]), np.uint8)
    for row, rng in enumerate(_generators(seed, number, 0)):
      share = self.share_of_masks(group[row])
      case = rng.choice(len(self.mask), p=share)
      masks[row] = _turned(self.mask[case], _turn(rng, masks[row].shape))
    return masks

  def draw_patients(
    self, seed: int | Sequence[int], number: np.ndarray, group: np.ndarray
  ) -> np.ndarray:
    """Whom `draw_images` shows: indices of cases [m, patients]; see there."""
    drawn = [
      self._patients(rng, g)
      for rng, g in zip(_generators(seed, number, 1), group, strict=True)
    ]
    return np.array(drawn, int).reshape(-1, self.patients)

  def _patients(self, rng, group) -> list[int]:
    everyone = np.arange(len(self.group))
    own = np.flatnonzero(self.group == group)
    first = rng.choice(own if len(own) else everyone)
    if self.patients == 1:
      return [first]
    among = everyone if rng.random() < OTHERS else own
    others = among[among != first]
    if not len(others):  # nobody else is of the group
      others = everyone[everyone != first]
    return [first, rng.choice(others) if len(others) else first]

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
      group: [m]; of one without a real case, patients of any are taken. The
        second patient is another one, with chance `OTHERS` of any group.
      mask: uint8 [m, H, W].

    Returns:
      uint8 [m, H, W], or RGB [m, H, W, 3].
    """
    images = np.empty((len(mask), *self.image.shape[1:]), np.uint8)
    for row, rng in enumerate(_generators(seed, number, 1)):
      cases = self._patients(rng, group[row])
      seen = [
        (self.image[c], self.mask[c], mask[row], _turn(rng, mask[row].shape))
        for c in cases
      ]
      images[row] = warp(*seen[0])
      if len(seen) > 1:
        images[row] = blend(rng, images[row], warp(*seen[1]), mask[row])
    return images


def _generators(seed, number, purpose: int):
  for n in number:
    yield np.random.default_rng([*np.atleast_1d(seed), int(n), purpose])


def _turn(rng, shape) -> np.ndarray:
  """Takes x and y to those of an image flipped and turned about its centre."""
  height, width = shape
  matrix = cv2.getRotationMatrix2D(
    ((width - 1) / 2, (height - 1) / 2), rng.uniform(-TURN, TURN), 1
  )
  if rng.random() < 0.5:
    matrix[:, 2] += matrix[:, 0] * (width - 1)
    matrix[:, 0] *= -1
  return matrix


def _turned(mask: np.ndarray, matrix: np.ndarray) -> np.ndarray:
  """A mask after `_turn`."""
  # Distances to the edges turn into smooth edges, classes into jagged ones.
  classes = np.unique(mask)
  depth = [
    cv2.warpAffine(
      _distance(mask == c),
      matrix,
      mask.shape[::-1],
      flags=cv2.INTER_CUBIC,
      borderMode=cv2.BORDER_REFLECT_101,
    )
    for c in classes
  ]
  return classes[np.argmax(depth, 0)]


def warp(
  image: np.ndarray,
  mask: np.ndarray,
  target: np.ndarray,
  turn: np.ndarray | None = None,
) -> np.ndarray:
  """An image whose mask becomes another one, as nearly as a smooth map can.

  Demons (Thirion 1998) between the signed distances to the edges of every
  class, from a shift and a scale that match the foregrounds. The image is
  interpolated once, for that costs grain and sharp edges. It keeps its field of
  view: what lies beyond is black, and what was beyond but is no longer is
  continued from the nearest pixel that was not.

  Args:
    image: uint8 [H, W], or RGB [H, W, 3].
    mask: uint8 [H, W], its classes; 0 is background.
    target: uint8 [H, W], those it shall have.
    turn: affine map [2, 3] of x and y that comes before; None for none.

  Returns:
    uint8, of the image's shape; where a mask has no foreground, only turned.
  """
  turn = np.eye(2, 3) if turn is None else turn
  rows, columns = _correspondence(_turned(mask, turn), target)
  (a, b, c), (d, e, f) = cv2.invertAffineTransform(turn)
  from_ = (
    (a * columns + b * rows + c).astype(np.float32),
    (d * columns + e * rows + f).astype(np.float32),
  )
  border = cv2.BORDER_REFLECT_101
  found = cv2.remap(image, *from_, cv2.INTER_LANCZOS4, borderMode=border)
  beyond = beyond_field(image, mask)
  if not beyond.any():
    return found
  edge = np.ones((9, 9), np.uint8)  # where interpolation mixes both
  mixed = cv2.dilate(beyond.astype(np.uint8), edge)
  mixed = cv2.remap(mixed, *from_, cv2.INTER_NEAREST, borderMode=border) > 0
  if not mixed.all():
    nearest = ndimage.distance_transform_edt(
      mixed, return_distances=False, return_indices=True
    )
    found = found[tuple(nearest)]
  found[beyond] = 0
  return found


def blend(
  rng: np.random.Generator,
  first: np.ndarray,
  second: np.ndarray,
  mask: np.ndarray,
) -> np.ndarray:
  r"""An eye that looks here as one and there as another one of the same mask.

      y = mu_1 + (w r_1 + (1 - w) r_2) / sqrt(w^2 + (1 - w)^2)

  with r = y - mu what an eye's logarithm of brightness, log(image + 1 + DARK),
  has beyond mu, its mean in every class and what is slow in its background, the
  light; w is a smooth random field in [0, 1]. The variance is kept (Heitz &
  Neyret 2018): grain, vessels and edges do not fade where both are seen.

  Args:
    rng: of the field.
    first: uint8 [H, W], or RGB [H, W, 3]; its levels, its light and its field
      of view stay.
    second: uint8, of the same shape.
    mask: uint8 [H, W], of both.

  Returns:
    uint8, of that shape.
  """
  unit = min(mask.shape) / 64
  share = ndimage.gaussian_filter(rng.standard_normal(mask.shape), PATCH * unit)
  share = (share - share.mean()) / max(share.std(), 1e-6)
  share = special.expit(SHARP * (share + TIPPED * rng.standard_normal()))
  beyond = [beyond_field(image, mask) for image in (first, second)]
  share[beyond[1]] = 1
  means, rest = zip(
    *(
      _means_and_rest(image, mask, unlit, LIGHT * unit)
      for image, unlit in zip((first, second), beyond, strict=True)
    ),
    strict=True,
  )
  w = share[..., None]
  y = means[0] + (w * rest[0] + (1 - w) * rest[1]) / np.hypot(w, 1 - w)
  bright = (np.exp(y) - DARK) * 127.5
  bright[beyond[0]] = 0
  return np.clip(np.rint(bright), 0, 255).astype(np.uint8).reshape(first.shape)


def _means_and_rest(image, mask, unlit, slow: float):
  """mu and r [H, W, C] of `blend`, of what is lit; `slow` in pixels."""
  y = LOG_LEVELS[np.atleast_3d(image)]
  mean = np.zeros_like(y)
  for label in np.unique(mask):
    region = (mask == label) & ~unlit
    if region.any():
      soft = cv2.GaussianBlur((mask == label).astype(float), (0, 0), 1)
      mean += soft[..., None] * y[region].mean(0)
  seen = ((mask == 0) & ~unlit).astype(float)
  weight = cv2.GaussianBlur(seen, (0, 0), slow)[..., None]
  light = cv2.GaussianBlur(seen[..., None] * (y - mean), (0, 0), slow)
  mean += light.reshape(y.shape) / np.maximum(weight, 1e-3)
  return mean, y - mean


def _correspondence(
  mask: np.ndarray, target: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Rows and columns [H, W] of a mask for every pixel of another one."""
  height, width = mask.shape
  if not (mask.any() and target.any()):
    return tuple(np.indices(mask.shape, np.float32))
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
  return rows, columns


def beyond_field(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """What of an image lies outside of its field of view: bool [H, W].

  It is unlit and reaches the image's border. Less of it than `LEAST` of the
  image is a shadow, and what touches the foreground is a dark background.

  Args:
    image: uint8 [H, W], or RGB [H, W, 3].
    mask: uint8 [H, W], its classes; 0 is background.
  """
  unlit = (np.atleast_3d(image).max(-1) <= UNLIT).astype(np.uint8)
  _, label = cv2.connectedComponents(unlit)
  border = (label[0], label[-1], label[:, 0], label[:, -1])
  found = np.isin(label, np.unique(np.concatenate(border))) & (unlit > 0)
  beside = cv2.dilate(found.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
  if found.mean() < LEAST or (beside & (mask > 0)).any():
    return np.zeros_like(found)
  return found


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
