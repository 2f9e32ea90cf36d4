"""What is seen in made-up eyes, of which a mask says where disc and cup are.

Every finding is an array [H, W] of log brightness, to be added to others.
Lengths are pixels of a 64-pixel image.
"""

from typing import NamedTuple

import numpy as np
from scipy import ndimage

_EDGE = 0.35  # softness of the disc's edge where it is sharpest
_CUP_EDGE = (0.3, 0.7)
_LIGHT = 0.08  # standard deviation of the light's knots, log brightness,
_SLANT = 0.1  # and of its rise towards a side


class Anatomy(NamedTuple):
  """One group's eyes.

  Pairs are (mean, standard deviation) of what is normal, clipped at 2 standard
  deviations, or (low, high) of what is uniform. Contrasts are logarithms of
  ratios of brightness; lengths are pixels of a 64-pixel image.
  """

  disc_radius: tuple[float, float]  # normal
  cup_to_disc: tuple[float, float]  # normal, ratio of radii
  elongation: tuple[float, float]  # uniform, ratio of the disc's axes
  torsion: float  # standard deviation of the long axis's angle, radians
  brightness: tuple[float, float]  # normal, log grey level of the background
  rim: tuple[float, float]  # normal, rim over background
  cup: tuple[float, float]  # normal, cup over rim
  shadow: float  # chance of a cup darker than the rim instead
  cup_share: tuple[float, float]  # uniform, of that step at the cup's edge
  pallor_size: tuple[float, float]  # uniform, radius of pallor over the cup's
  pallor_shift: float  # standard deviation of its offset, disc radii
  cup_line: tuple[float, float]  # uniform, contrast of a lip at the cup's edge
  lamina: float  # chance of dark dots in the cup
  tilt: float  # standard deviation of shading across the disc
  beta: float  # chance of bright atrophy beside the disc
  beta_width: tuple[float, float]  # uniform
  alpha: float  # chance of a dark, mottled zone beside disc and atrophy
  grey: float  # chance of a dark crescent inside the disc's margin
  pale: float  # chance of a pale sector of the rim
  sheen: float  # chance of bright nerve fibres
  myelin: float  # chance of white, feathery ones, at each pole
  naevus: float  # chance of a dark patch beside the disc
  drusen: float  # chance of bright spots
  tessellation: tuple[float, float]  # uniform, contrast of the choroid
  vessels: int


class Eye(NamedTuple):
  """What a mask says of an eye."""

  unit: float  # pixels of this image to one of a 64-pixel image
  disc: np.ndarray  # depth [H, W] inside the disc's edge; < 0 outside
  cup: np.ndarray  # likewise
  radius: float  # of the disc
  cup_radius: float
  centre: np.ndarray  # of the disc, (row, column) in pixels of this image
  cup_centre: np.ndarray
  temporal: int  # side of the fovea, in columns: where the cup lies
  across: np.ndarray  # offsets [H, W] from the disc's centre to that side
  up: np.ndarray  # and upwards
  angle: np.ndarray  # [H, W] about it: 0 temporal, pi / 2 up, pi nasal
  axis: float  # angle of the disc's short axis, |axis| <= pi / 2


def measure(mask: np.ndarray) -> Eye:
  """What a mask [H, W] of 0 background, 1 rim, 2 cup says of an eye."""
  unit = min(mask.shape) / 64
  disc, cup = (np.argwhere(mask >= label) for label in (1, 2))
  centre = disc.mean(0) if len(disc) else (np.array(mask.shape) - 1) / 2
  cup_centre = cup.mean(0) if len(cup) else centre
  temporal = 1 if cup_centre[1] >= centre[1] else -1
  rows, columns = np.indices(mask.shape, np.float32)
  up = (np.float32(centre[0]) - rows) / np.float32(unit)
  across = temporal * (columns - np.float32(centre[1])) / np.float32(unit)
  axis = 0.0
  if len(disc) > 2:
    _, vectors = np.linalg.eigh(np.cov((disc - centre).T))
    row, column = vectors[:, 0]
    axis = np.arctan(-row / (temporal * column + 1e-9))
  return Eye(
    unit=unit,
    disc=_depth(mask >= 1) / np.float32(unit),
    cup=_depth(mask == 2) / np.float32(unit),
    radius=np.sqrt(len(disc) / np.pi) / unit,
    cup_radius=np.sqrt(len(cup) / np.pi) / unit,
    centre=centre,
    cup_centre=cup_centre,
    temporal=temporal,
    across=across,
    up=up,
    angle=np.arctan2(up, across),
    axis=axis,
  )


def _depth(region: np.ndarray) -> np.ndarray:
  """Pixels [H, W] inside a region's edge, smoothed; < 0 outside."""
  if not region.any():
    return np.full(region.shape, -1e4, np.float32)
  inner = ndimage.distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]
  outer = ndimage.distance_transform_edt(~region)
  depth = np.where(region, inner - 0.5, 0.5 - outer).astype(np.float32)
  return ndimage.gaussian_filter(depth, 0.6)


def draw_disc(rng, eye: Eye) -> np.ndarray:
  """Soft indicator [H, W] of the disc, softest on one, mostly nasal, side."""
  side = _lobe(eye.angle, np.pi + rng.normal(0, 0.7), rng.uniform(0.5, 2))
  return _soft(eye.disc, _EDGE + rng.uniform(0, 0.5) * side)


def draw_cup(rng, eye: Eye, anatomy: Anatomy) -> np.ndarray:
  """Brightness [H, W] of the cup: a step and a line at its edge, pallor."""
  share = rng.uniform(*anatomy.cup_share)
  shift = np.float32(eye.radius * rng.normal(0, anatomy.pallor_shift, 2))
  size = eye.cup_radius * rng.uniform(*anatomy.pallor_size)
  row, column = (eye.cup_centre - eye.centre) / eye.unit
  stretch = np.exp(rng.normal(0, 0.12))
  pallor = np.float32(size) - np.hypot(
    (eye.across - eye.temporal * column - shift[0]) * stretch,
    (eye.up + row - shift[1]) / stretch,
  )
  pale = _soft(pallor, rng.uniform(0.5, 1.5)) * _soft(eye.disc, _EDGE)
  step = normal(rng, anatomy.cup)
  if rng.random() < anatomy.shadow:
    step *= -rng.uniform(0.5, 1.2)
  cup = _soft(eye.cup, rng.uniform(*_CUP_EDGE))
  x = step * (share * cup + (1 - share) * pale)
  x += rng.uniform(*anatomy.cup_line) * np.exp(-(eye.cup**2) / 2)
  if rng.random() < anatomy.lamina:
    dots = texture(rng, cup.shape, eye.unit * rng.uniform(0.6, 0.9))
    x -= rng.uniform(0.15, 0.35) * np.clip(dots - 0.5, 0, 1.5) * cup
  return x


def draw_surface(rng, eye: Eye, anatomy: Anatomy, inside) -> np.ndarray:
  """Choroid that shines through [H, W], and shading across a tilted disc."""
  choroid = _ridges(rng, inside.shape, eye.unit * rng.uniform(1.2, 2.2))
  x = rng.uniform(*anatomy.tessellation) * choroid * (1 - inside)
  slope = np.cos(eye.angle - eye.axis - rng.normal(0, 0.5))
  outwards = np.clip(1 - eye.disc / max(eye.radius, 1), 0, 1)
  return x + rng.normal(0, anatomy.tilt) * slope * outwards * inside


def draw_fibres(rng, eye: Eye, anatomy: Anatomy, inside) -> np.ndarray:
  """Nerve fibres [H, W]: fans above and below that fade away or end."""
  x = np.zeros_like(inside)
  streaks = _streaks(rng, eye)
  if rng.random() < anatomy.sheen:
    far = np.exp(np.minimum(eye.disc, 0) / rng.uniform(5, 14))
    for pole in (1, -1):
      fan = _lobe(eye.angle, pole * rng.normal(1.4, 0.25), rng.uniform(2, 8))
      bright = rng.uniform(0.1, 0.5) * (1 + 0.4 * streaks)
      x += bright * fan * far * (1 - inside)
  for pole in (1, -1):
    if rng.random() < anatomy.myelin:
      fan = _lobe(eye.angle, pole * rng.normal(1.4, 0.4), rng.uniform(6, 20))
      reach = _soft(eye.disc + rng.uniform(3, 9) + 1.5 * streaks, 0.8)
      reach *= _soft(1.5 - eye.disc, 0.5)
      x += rng.uniform(0.4, 0.8) * fan * reach
  return x


def draw_atrophy(rng, eye: Eye, anatomy: Anatomy, inside) -> np.ndarray:
  """Zones beta and alpha [H, W] along the disc's short axis."""
  x = np.zeros_like(inside)
  outside = 1 - inside
  direction = eye.axis + rng.normal(0, 0.8)
  wide = x
  if rng.random() < anatomy.beta:
    wide = _crescent(rng, eye, direction, rng.uniform(*anatomy.beta_width))
    zone = _soft(eye.disc + wide, _EDGE) * outside * (wide > 0.5)
    grain = rng.uniform(0, 0.2) * _ridges(
      rng, x.shape, eye.unit * rng.uniform(0.8, 1.6)
    )
    x = zone * (rng.uniform(0.1, 0.9) + grain)
    line = rng.uniform(-0.4, 0.4) * np.exp(-((eye.disc + 0.5) ** 2) / 0.8)
    x += line * _soft(wide - 1, 0.3)
  if rng.random() < anatomy.alpha:
    more = _crescent(
      rng, eye, direction + rng.normal(0, 0.4), rng.uniform(1.5, 5)
    )
    zone = _soft(eye.disc + wide + more, 0.7) - _soft(eye.disc + wide, 0.7)
    mottle = 1 + 0.5 * texture(rng, x.shape, eye.unit * 0.8)
    x = x - rng.uniform(0.15, 0.5) * zone * outside * (more > 0.5) * mottle
  return x


def draw_rim(rng, eye: Eye, anatomy: Anatomy, inside) -> np.ndarray:
  """A grey crescent and a pale sector of the rim [H, W]."""
  x = np.zeros_like(inside)
  rim = inside * (1 - _soft(eye.cup, _EDGE))
  if rng.random() < anatomy.grey:
    deep = _crescent(rng, eye, rng.normal(-0.4, 1.2), rng.uniform(1.5, 4))
    zone = _soft(deep - eye.disc, 0.5) * rim * (deep > 0.5)
    x -= rng.uniform(0.3, 0.8) * zone
  if rng.random() < anatomy.pale:
    sector = _lobe(eye.angle, rng.normal(0, 1.5), rng.uniform(1, 8))
    sector = _soft(sector - 0.4, 0.05)
    x += rng.uniform(0.15, 0.5) * sector * rim
  return x


def draw_spots(rng, eye: Eye, anatomy: Anatomy, inside) -> np.ndarray:
  """A naevus and drusen [H, W]."""
  x = np.zeros_like(inside)
  if rng.random() < anatomy.naevus:
    around = rng.uniform(0, 2 * np.pi)
    away = eye.radius + rng.uniform(0, 8)
    spot = rng.uniform(3, 7) - np.hypot(
      eye.across - away * np.cos(around), eye.up - away * np.sin(around)
    )
    x -= rng.uniform(0.2, 0.5) * _soft(spot, 0.8) * (1 - inside)
  if rng.random() < anatomy.drusen:
    spots = np.zeros_like(inside)
    number = rng.integers(3, 20)
    spots[tuple(rng.integers(0, spots.shape, (number, 2)).T)] = 1
    size = eye.unit * rng.uniform(0.6, 1.1)
    spots = ndimage.gaussian_filter(spots, size) * 2 * np.pi * size**2
    x += rng.uniform(0.1, 0.3) * spots * (1 - inside)
  return x


def _crescent(rng, eye: Eye, direction, width) -> np.ndarray:
  """Width [H, W] of a zone along the disc's edge, by the angle about it.

  From a thin crescent to nearly a ring.
  """
  sharpness = np.exp(rng.uniform(np.log(0.15), np.log(5)))
  profile = width * _lobe(eye.angle, direction, sharpness)
  for order in (2, 3, 5):
    size = rng.normal(0, 0.12)
    profile *= 1 + size * np.cos(order * eye.angle + rng.uniform(0, 2 * np.pi))
  return profile


FINDINGS = (draw_surface, draw_fibres, draw_atrophy, draw_rim, draw_spots)


def draw_vessels(rng, eye: Eye, number: int) -> np.ndarray:
  """Vessels from the cup along the upper and lower arcades: [H, W] in [0, 1].

  Each is a curve of slowly changing direction with a Gaussian profile that
  thins out along it; a pixel takes the profile of the curve point nearest.
  """
  shape = eye.disc.shape
  step = 0.5 * eye.unit
  steps = np.arange(110, dtype=np.float32)
  points, widths = [], []
  trunk = eye.cup_centre + eye.unit * rng.normal(0, 0.8, 2)
  trunk[1] -= eye.temporal * eye.unit * 0.4 * eye.cup_radius

  def trace(start, up, angle, calibre):
    bend = rng.normal(0.018, 0.012) * np.exp(-steps / 45)
    sway = 0.25 * np.sin(
      steps * rng.uniform(0.06, 0.15) + rng.uniform(0, 2 * np.pi)
    )
    heading = angle + np.cumsum(bend) + sway
    ahead = np.stack(
      [-up * np.sin(heading), -eye.temporal * np.cos(heading)], -1
    )
    path = start + step * np.cumsum(ahead, 0)
    points.append(path)
    widths.append(calibre * (1 - 0.005 * steps))
    return path, heading

  for i in range(number):
    up = 1 if i % 2 else -1
    # Angle from the nasal side over the vertical to the temporal side.
    main = i < 4
    angle = np.pi / 2 + rng.normal(-0.1, 0.35 if main else 0.8)
    calibre = eye.unit * (
      rng.uniform(0.7, 1.1) if main else rng.uniform(0.4, 0.7)
    )
    start = trunk + eye.unit * rng.normal(0, 1.0, 2)
    path, heading = trace(start, up, angle, calibre)
    if main:
      fork = rng.integers(15, 60)
      turn = rng.choice([-1, 1]) * rng.uniform(0.4, 0.9)
      trace(path[fork], up, heading[fork] + turn, 0.7 * calibre)
  points = np.concatenate(points).astype(np.float32)
  widths = np.concatenate(widths).astype(np.float32)

  pixel = np.rint(points).astype(int)
  within = ((pixel >= 0) & (pixel < shape)).all(axis=1)
  points, widths, pixel = points[within], widths[within], pixel[within]
  if not len(points):
    return np.zeros(shape, np.float32)
  owner = np.full(shape, -1, np.int32)
  owner[tuple(pixel.T)] = np.arange(len(points))
  seed = ndimage.distance_transform_edt(
    owner < 0, return_distances=False, return_indices=True
  )
  nearest = owner[tuple(seed)]
  grid = np.indices(shape, np.float32)
  square = sum((grid[k] - points[nearest, k]) ** 2 for k in (0, 1))
  return np.exp(-square / (2 * widths[nearest] ** 2))


def draw_light(rng, shape: tuple[int, int]) -> np.ndarray:
  """Uneven illumination [H, W]: a 4 x 4 grid of knots on a slant, smoothed."""
  knots = _LIGHT * rng.standard_normal((4, 4), np.float32)
  down, right = np.float32(rng.normal(0, _SLANT, 2))
  ramp = np.linspace(-1, 1, 4, dtype=np.float32)
  knots += down * ramp[:, None] + right * ramp
  rows, columns = (_knot_weights(length) for length in shape)
  return rows @ knots @ columns.T


def _knot_weights(length: int) -> np.ndarray:
  """Weights [length, 4] of four evenly spread knots; each row sums to 1."""
  t = np.linspace(0, 3, length, dtype=np.float32)
  weights = np.exp(-((t[:, None] - np.arange(4, dtype=np.float32)) ** 2) / 0.7)
  return weights / weights.sum(axis=1, keepdims=True)


def normal(rng, mean_sd: tuple[float, float]) -> float:
  """Normal draw, clipped at 2 standard deviations."""
  mean, sd = mean_sd
  return mean + sd * np.clip(rng.standard_normal(), -2, 2)


def margin(rng, grid, centre, radius, elongation, tilt, wobble) -> np.ndarray:
  """Pixels inside a wobbly ellipse [H, W], about a distance; < 0 outside.

  `elongation` is the ratio of axes, the long one `tilt` radians from vertical,
  `radius` their geometric mean.
  """
  r = grid[0] - np.float32(centre[0])
  c = grid[1] - np.float32(centre[1])
  cos, sin = np.float32(np.cos(tilt)), np.float32(np.sin(tilt))
  stretch = np.float32(np.sqrt(elongation))
  a = (cos * r + sin * c) / stretch
  b = (cos * c - sin * r) * stretch
  theta = np.arctan2(b, a)
  edge = np.ones_like(theta)
  for order in (2, 3, 4):
    phase = np.float32(rng.uniform(0, 2 * np.pi))
    size = np.float32(wobble * rng.normal() * 2 / order)
    edge += size * np.cos(order * theta + phase)
  return np.float32(radius) * edge - np.hypot(a, b)


def _soft(depth: np.ndarray, width) -> np.ndarray:
  """Soft indicator of depth > 0, rising over `width` pixels."""
  return 0.5 + 0.5 * np.tanh(depth / np.float32(2) / width)


def _lobe(angle: np.ndarray, centre: float, sharpness: float) -> np.ndarray:
  """Smooth bump of the angle, 1 at `centre`; even at sharpness 0."""
  return np.exp(
    np.float32(sharpness) * (np.cos(angle - np.float32(centre)) - 1)
  )


def texture(rng, shape: tuple[int, int], size: float) -> np.ndarray:
  """Smooth noise [H, W] of unit variance, grains of `size` pixels."""
  noise = rng.standard_normal(shape, np.float32)
  noise = ndimage.gaussian_filter(noise, size, mode="wrap")
  return noise / noise.std()


def _ridges(rng, shape: tuple[int, int], size: float) -> np.ndarray:
  """Bright network on dark [H, W], like the choroid's vessels; mean 0."""
  ridges = -np.abs(texture(rng, shape, size))
  return (ridges - ridges.mean()) / ridges.std()


def _streaks(rng, eye: Eye) -> np.ndarray:
  """Fine rays [H, W] from the disc, about unit variance."""
  rays = np.zeros_like(eye.angle)
  drift = eye.disc / 20
  for order in rng.integers(9, 32, 5):
    rays += np.cos(
      order * (eye.angle + rng.normal(0, 0.1) * drift)
      + rng.uniform(0, 2 * np.pi)
    )
  return rays * np.sqrt(np.float32(2 / 5))
