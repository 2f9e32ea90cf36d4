"""Augmentation of an image, its mask and its points.

A recipe is one of

    none     nothing
    light    as FairDiff's segmenters: half the time a quarter turn and a flip,
             else, half the time, a rotation by up to 20 degrees
    strong   geometry (any rotation and flip, scale, shift, a smooth elastic
             field) and intensity (gamma, contrast, brightness, blur, noise),
             each by chance; never inverted contrast

Generators draw what they see, so whatever the recipe they see no more than
`UPRIGHT`: half the time mirrored, half the time turned by up to 15 degrees.

Geometry is one map from pixels u of the result to pixels v of the source,

    v = c + A^-1 (u - c - t) + e(u),

A a 2 x 2 matrix about the image's centre c, t a shift and e the elastic field,
by which image (cubic), mask (nearest) and points (its inverse) move alike;
what lies beyond the border is mirrored. Lengths are those of a 64-pixel image
and grow with min(H, W) / 64.
"""

from typing import NamedTuple

import cv2
import numpy as np

RECIPES = ("none", "light", "strong")
UPRIGHT = "upright"

_GEOMETRY_CHANCE = 0.7
_SCALE = (0.8, 1.25)
_SHIFT = 4.0  # pixels of a 64-pixel image, as are all lengths
_ELASTIC = 1.5  # standard deviation of the field's 4 x 4 knots

_TONE_CHANCE = 0.7  # of gamma, contrast and brightness each
_GAMMA = (0.5, 2.0)
_CONTRAST = (0.4, 1.6)
_BRIGHTNESS = 0.3  # share of the full range, as is noise
_GRAIN_CHANCE = 0.3  # of blur and noise each
_BLUR = (0.2, 1.0)
_NOISE = 0.06


class Geometry(NamedTuple):
  """A map of the image plane; (row, column) throughout.

  Attributes:
    matrix: A [2, 2], about the image's centre.
    shift: t [2], in pixels.
    knots: the elastic field's values float32 [4, 4, 2] in pixels, spread
      evenly over the image; None for none.
  """

  matrix: np.ndarray
  shift: np.ndarray
  knots: np.ndarray | None = None

  @property
  def turns_and_flips(self) -> bool:
    """Whether pixels go to pixels: nothing need be interpolated."""
    whole = np.isin(self.matrix, (-1, 0, 1)).all()
    return self.knots is None and not self.shift.any() and bool(whole)


def generators_recipe(recipe: str) -> str:
  """What generators see where segmenters see a recipe.

  Raises:
    ValueError: no such recipe.
  """
  _check(recipe)
  return "none" if recipe == "none" else UPRIGHT


def augment(
  recipe: str,
  rng: np.random.Generator,
  image: np.ndarray,
  mask: np.ndarray,
  points: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Augments one case; the shapes stay, the arguments are left alone.

  Args:
    recipe: one of `RECIPES`, or `UPRIGHT`.
    rng: all randomness comes from here.
    image: uint8 [H, W], or RGB [H, W, 3].
    mask: uint8 [H, W].
    points: float32 [N, 3], (row, column, z) in pixels; N may be 0.

  Returns:
    image float32 [H, W] in grey levels, which 'strong' takes beyond 0..255 as
    clipping would lose what it only shifts; mask uint8 [H, W]; points float32
    [N, 3]. Images that are not square turn by 180 degrees, not by 90, in
    'light'.

  Raises:
    ValueError: no such recipe.
  """
  if recipe == UPRIGHT:
    geometry = _upright(rng)
  elif _check(recipe) == "light":
    geometry = _light(rng, image.shape[:2])
  elif recipe == "strong":
    geometry = _strong(rng, image.shape[:2])
  else:
    geometry = None
  if geometry is not None:
    image, mask = _warp(geometry, image, mask)
    points = _move(geometry, points, image.shape[:2])
  if recipe == "strong":
    image = _intensity(rng, image)
  return image.astype(np.float32, copy=False), mask, points


def _check(recipe: str) -> str:
  if recipe not in RECIPES:
    raise ValueError(
      f"unknown data.augment={recipe!r}; use one of {', '.join(RECIPES)}"
    )
  return recipe


def _upright(rng) -> Geometry:
  turned = rng.random() < 0.5
  matrix = _rotation(np.deg2rad(rng.uniform(-15, 15) * turned))
  matrix[:, 1] *= rng.choice([-1, 1])
  return Geometry(matrix, np.zeros(2))


def _light(rng, shape: tuple[int, int]) -> Geometry | None:
  choice = rng.random()
  if choice < 0.5:
    square = shape[0] == shape[1]
    turns = rng.integers(4) if square else 2 * rng.integers(2)
    # Whole numbers, so that no pixel is interpolated.
    matrix = np.rint(_rotation(np.pi / 2 * turns))
    matrix[rng.integers(2)] *= -1
    return Geometry(matrix, np.zeros(2))
  if choice < 0.75:
    return Geometry(_rotation(np.deg2rad(rng.uniform(-20, 20))), np.zeros(2))
  return None


def _strong(rng, shape: tuple[int, int]) -> Geometry | None:
  if rng.random() >= _GEOMETRY_CHANCE:
    return None
  unit = min(shape) / 64
  matrix = _rotation(rng.uniform(0, 2 * np.pi))
  matrix[0] *= rng.choice([-1, 1])
  matrix *= np.exp(rng.uniform(*np.log(_SCALE)))
  shift = unit * rng.uniform(-_SHIFT, _SHIFT, 2)
  knots = unit * _ELASTIC * rng.standard_normal((4, 4, 2), np.float32)
  return Geometry(matrix, shift, knots)


def _rotation(angle: float) -> np.ndarray:
  cos, sin = np.cos(angle), np.sin(angle)
  return np.array([[cos, -sin], [sin, cos]])


def _warp(geometry: Geometry, image, mask) -> tuple[np.ndarray, np.ndarray]:
  """Image [H, W] or [H, W, 3] and mask [H, W] looked up at v(u)."""
  height, width = shape = image.shape[:2]
  inverse = np.linalg.inv(geometry.matrix)
  if geometry.turns_and_flips:
    return _turn(inverse, image), _turn(inverse, mask)
  center = (np.array(shape) - 1) / 2
  offset = center - inverse @ (center + geometry.shift)
  rows = np.arange(height, dtype=np.float32)[:, None]
  columns = np.arange(width, dtype=np.float32)
  source = [
    np.float32(a) * rows + (np.float32(b) * columns + np.float32(o))
    for (a, b), o in zip(inverse, offset, strict=True)
  ]
  if geometry.knots is not None:
    for axis, field in enumerate(cv2.split(geometry.knots)):
      source[axis] += cv2.resize(
        field, (width, height), interpolation=cv2.INTER_CUBIC
      )
  return tuple(
    cv2.remap(x, source[1], source[0], method, None, cv2.BORDER_REFLECT_101)
    for x, method in ((image, cv2.INTER_CUBIC), (mask, cv2.INTER_NEAREST))
  )


def _turn(inverse: np.ndarray, x: np.ndarray) -> np.ndarray:
  """[H, W, ...] looked up at v(u), for turns by 90 degrees and flips."""
  if inverse[0, 0]:
    row, column = inverse[0, 0], inverse[1, 1]
  else:
    x, row, column = x.swapaxes(0, 1), inverse[1, 0], inverse[0, 1]
  return np.ascontiguousarray(x[:: int(row), :: int(column)])


def _move(geometry: Geometry, points, shape) -> np.ndarray:
  """Points [N, 3] taken from v to u."""
  if not points.any():  # none, or the zeros that stand for none
    return points
  center = (np.array(shape) - 1) / 2
  source = points[:, :2] - center

  def target(elastic):
    return (source - elastic) @ geometry.matrix.T + center + geometry.shift

  moved = target(0.0)
  if geometry.knots is not None:
    field = cv2.resize(
      geometry.knots, shape[::-1], interpolation=cv2.INTER_CUBIC
    )
    for _ in range(8):  # u = target(e(u)), a contraction as e is smooth
      row, column = moved.T.astype(np.float32)
      elastic = cv2.remap(
        field, column, row, cv2.INTER_LINEAR, None, cv2.BORDER_REPLICATE
      )
      moved = target(elastic.reshape(-1, 2))
  return np.concatenate([moved, points[:, 2:]], axis=-1).astype(np.float32)


def _intensity(rng, image: np.ndarray) -> np.ndarray:
  """uint8 -> float32 of the same shape, in levels."""
  tone = np.arange(256) / 255
  if rng.random() < _TONE_CHANCE:
    gamma = np.exp(rng.uniform(*np.log(_GAMMA)))
    brightens = rng.random() < 0.5
    tone = 1 - (1 - tone) ** gamma if brightens else tone**gamma
  x = (255 * tone).astype(np.float32)[image]
  if rng.random() < _TONE_CHANCE:
    mean = x.mean()
    x = (x - mean) * np.float32(rng.uniform(*_CONTRAST)) + mean
  if rng.random() < _TONE_CHANCE:
    x += np.float32(255 * rng.uniform(-_BRIGHTNESS, _BRIGHTNESS))
  if rng.random() < _GRAIN_CHANCE:
    sigma = min(image.shape[:2]) / 64 * rng.uniform(*_BLUR)
    x = cv2.GaussianBlur(x, (0, 0), sigma, borderType=cv2.BORDER_REFLECT_101)
  if rng.random() < _GRAIN_CHANCE:
    noise = rng.standard_normal(image.shape, np.float32)
    x += np.float32(255 * rng.uniform(0, _NOISE)) * noise
  return x
