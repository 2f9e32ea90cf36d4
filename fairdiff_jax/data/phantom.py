"""Made-up patients: optic-nerve images with an honest fairness gap.

A mask is drawn, then the image of a patient who has it. With D, C, P and V
soft indicators in [0, 1] of disc, cup, pallor and vessels, brightness L is

    x(u) = r D + c (q C + (1 - q) P) + findings(u) - v V + light(u),
    L(u) = b (exp x(u) + veil),
    pixel = blur(255 (1 - exp(-L / 255))) + noise.

A group that is rare in training is segmented worse only if what is learned
from the others misleads and its own few cases do not tell all. Low contrast
would not do: it stays hard with balanced data too. So rims are brighter than
the background, noise is weak and levels are those of fundus photographs in
every group; groups differ in anatomy and in *findings*, each continuous in
place, size, contrast and texture, so that a handful of eyes covers few of
their combinations, however it is turned, scaled and recoloured:

    Asian   tilted, oval discs; wide atrophy beside them, from darker than the
            rim to brighter than the cup; white nerve fibres
    Black   large discs and cups, some in shadow; grey crescents *inside* the
            disc's margin and mottled zones outside; sheen of nerve fibres
    both    pallor that is not where the cup is, lips at the cup's edge
    White   round discs, pallor that fills the cup, few findings

Curves are star-shaped, |u - o| = R e(theta) w(theta), an ellipse e with a
low-order wobble w. Lengths are those of a 64-pixel image and grow with
min(H, W) / 64. `write` stores patients in the files of Harvard-FairSeg's
current release, so they take the same road as real ones.
"""

import pathlib
from typing import NamedTuple

import numpy as np
from scipy import ndimage
from tqdm import tqdm

from fairdiff_jax.data import npz
from fairdiff_jax.data.attributes import ATTRIBUTES


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


ANATOMY = {
  "Asian": Anatomy(
    disc_radius=(15.5, 1.4),
    cup_to_disc=(0.50, 0.09),
    elongation=(1.08, 1.4),
    torsion=0.5,
    brightness=(4.25, 0.3),
    rim=(0.34, 0.06),
    cup=(0.34, 0.07),
    shadow=0.0,
    cup_share=(0.35, 1.0),
    pallor_size=(0.7, 1.5),
    pallor_shift=0.12,
    cup_line=(-0.3, 0.3),
    lamina=0.2,
    tilt=0.18,
    beta=0.9,
    beta_width=(2.0, 9.0),
    alpha=0.25,
    grey=0.05,
    pale=0.3,
    sheen=0.05,
    myelin=0.2,
    naevus=0.05,
    drusen=0.05,
    tessellation=(0.01, 0.06),
    vessels=7,
  ),
  "Black": Anatomy(
    disc_radius=(16.5, 1.4),
    cup_to_disc=(0.60, 0.09),
    elongation=(1.02, 1.2),
    torsion=0.25,
    brightness=(3.95, 0.25),
    rim=(0.36, 0.06),
    cup=(0.34, 0.07),
    shadow=0.2,
    cup_share=(0.35, 1.0),
    pallor_size=(0.4, 1.1),
    pallor_shift=0.12,
    cup_line=(-0.3, 0.3),
    lamina=0.6,
    tilt=0.05,
    beta=0.1,
    beta_width=(1.0, 3.0),
    alpha=0.5,
    grey=0.6,
    pale=0.3,
    sheen=0.6,
    myelin=0.05,
    naevus=0.1,
    drusen=0.05,
    tessellation=(0.0, 0.03),
    vessels=9,
  ),
  "White": Anatomy(
    disc_radius=(15.0, 1.3),
    cup_to_disc=(0.52, 0.08),
    elongation=(1.02, 1.2),
    torsion=0.25,
    brightness=(4.25, 0.3),
    rim=(0.34, 0.06),
    cup=(0.36, 0.07),
    shadow=0.0,
    cup_share=(0.9, 1.0),
    pallor_size=(0.9, 1.1),
    pallor_shift=0.03,
    cup_line=(0.0, 0.0),
    lamina=0.05,
    tilt=0.05,
    beta=0.08,
    beta_width=(1.0, 3.0),
    alpha=0.03,
    grey=0.02,
    pale=0.02,
    sheen=0.1,
    myelin=0.01,
    naevus=0.02,
    drusen=0.25,
    tessellation=(0.0, 0.04),
    vessels=7,
  ),
}

# Race and gender as among Harvard-FairSeg's training cases. The other shares
# are only plausible; what is missing to 1 is unknown.
_TRAINING_COUNTS = {"Asian": 752, "Black": 1161, "White": 6087}
_SHARES = {
  "gender": {"Female": 0.586, "Male": 0.414},
  "ethnicity": {"Non-Hispanic": 0.91, "Hispanic": 0.04},
  "language": {"English": 0.93, "Spanish": 0.015, "Other": 0.01},
  "maritalstatus": {
    "Married": 0.58,
    "Single": 0.27,
    "Divorced": 0.07,
    "Widowed": 0.05,
    "Separated": 0.01,
  },
}

_CENTRE_JITTER = 5.0  # pixels of a 64-pixel image, as are all lengths
_EDGE = 0.35  # softness of the disc's edge where it is sharpest
_CUP_EDGE = (0.3, 0.7)
_BLUR = (0.3, 0.6)
_NOISE = (0.4, 1.2)  # grey levels
_VEIL = (0.0, 0.1)  # stray light, share of the background's brightness
_LIGHT = 0.08  # standard deviation of the light's knots, log brightness,
_SLANT = 0.1  # and of its rise towards a side
_VESSEL = (0.2, 0.35)  # contrast; a share of it is lost inside the disc
_VESSEL_FADE = 0.3


def generate(
  rng: np.random.Generator, group: int, shape: tuple[int, int] = (64, 64)
) -> tuple[np.ndarray, np.ndarray]:
  """Draws one patient: a mask by `draw_mask`, then its image by `render`.

  Args:
    rng: source of all randomness.
    group: index into `ATTRIBUTES['race']`.
    shape: (H, W) of the image.

  Returns:
    image [H, W] uint8 and mask [H, W] uint8 (0 background, 1 rim, 2 cup).

  Raises:
    ValueError: no such group.
  """
  mask = draw_mask(rng, group, shape)
  return render(rng, group, mask), mask


def draw_mask(
  rng: np.random.Generator, group: int, shape: tuple[int, int] = (64, 64)
) -> np.ndarray:
  """Draws the disc and cup of one patient; see `generate`.

  Returns:
    mask [H, W] uint8.
  """
  anatomy = _anatomy(group)
  unit = min(shape) / 64
  grid = np.indices(shape, np.float32)
  centre = (np.array(shape) - 1) / 2 + unit * rng.uniform(
    -_CENTRE_JITTER, _CENTRE_JITTER, 2
  )
  temporal = rng.choice([-1, 1])  # side of the fovea, in columns
  radius = unit * _normal(rng, anatomy.disc_radius)
  elongation = rng.uniform(*anatomy.elongation)
  torsion = rng.normal(0, anatomy.torsion)
  disc = _margin(rng, grid, centre, radius, elongation, torsion, 0.025)

  ratio = np.clip(_normal(rng, anatomy.cup_to_disc), 0.25, 0.8)
  offset = radius * (1 - ratio) * np.clip(rng.normal(0, 0.12, 2), -0.25, 0.25)
  offset[1] += temporal * 0.1 * radius * (1 - ratio)
  cup = _margin(
    rng,
    grid,
    centre + offset,
    radius * ratio,
    rng.uniform(0.95, 1.15),
    torsion + rng.normal(0, 0.3),
    0.03,
  )
  # A rim is never thinner than a twelfth of the disc's radius.
  cup = np.minimum(cup, disc - radius / 12)
  return (disc > 0).astype(np.uint8) + (cup > 0)


def render(
  rng: np.random.Generator, group: int, mask: np.ndarray
) -> np.ndarray:
  """Draws the image of a patient who has the given mask.

  With masks of `draw_mask`, images and masks are distributed as those of
  `generate`: perfect synthetic patients.

  Args:
    rng: source of all randomness.
    group: index into `ATTRIBUTES['race']`.
    mask: [H, W] of 0 background, 1 rim, 2 cup.

  Returns:
    image [H, W] uint8.

  Raises:
    ValueError: no such group.
  """
  anatomy = _anatomy(group)
  eye = _measure(mask)
  inside = _disc(rng, eye)
  x = _normal(rng, anatomy.rim) * inside
  x += _cup(rng, eye, anatomy)
  for finding in (_surface, _fibres, _atrophy, _rim, _spots):
    x += finding(rng, eye, anatomy, inside)
  vessels = _vessels(rng, eye, anatomy.vessels)
  x -= rng.uniform(*_VESSEL) * vessels * (1 - _VESSEL_FADE * inside)
  x += _light(rng, mask.shape)
  level = np.exp(_normal(rng, anatomy.brightness))
  y = level * (np.exp(x) + rng.uniform(*_VEIL))
  y = 255 * (1 - np.exp(-y / 255))  # bright parts do not burn out
  y = ndimage.gaussian_filter(y, eye.unit * rng.uniform(*_BLUR), mode="nearest")
  y += rng.uniform(*_NOISE) * _texture(rng, mask.shape, 0.4 * eye.unit)
  return np.clip(np.rint(y), 0, 255).astype(np.uint8)


def group_counts(total: int) -> tuple[int, ...]:
  """Splits training cases over race as Harvard-FairSeg's are.

  Largest remainders (Hamilton), so the counts add up to `total`.

  Args:
    total: number of training cases, at least 0.

  Returns:
    Cases of each group, in the order of `ATTRIBUTES['race']`.

  Raises:
    ValueError: `total` is negative.
  """
  if total < 0:
    raise ValueError(f"the number of cases must be at least 0, not {total}")
  weights = np.array([_TRAINING_COUNTS[race] for race in ATTRIBUTES["race"]])
  counts, remainders = np.divmod(total * weights, weights.sum())
  counts[np.argsort(-remainders, kind="stable")[: total - counts.sum()]] += 1
  return tuple(counts.tolist())


def write(
  directory,
  *,
  train: int,
  test: int,
  shape: tuple[int, int] = (64, 64),
  balanced: bool = False,
  seed: int = 0,
  test_seed: int = 0,
  progress: bool = True,
) -> None:
  """Writes made-up patients as files of Harvard-FairSeg's current release.

  `data_00001.npz` and on, test cases first and groups in order, with keys
  `slo_fundus` [H, W] uint8, `disc_cup_mask` [H, W] float64 (0 background, -1
  rim, -2 cup) and attributes as 0-d int64 (age in years), then
  `data_summary.csv`. Case i is drawn from `default_rng([seed, i])`, so that
  test cases are the same whatever the training cases.

  Args:
    directory: where to write; created if missing, must be empty.
    train: training cases in total.
    test: test cases of *each* race.
    shape: (H, W) of the images.
    balanced: whether training cases are split over race equally, or by
      `group_counts`.
    seed: of the training cases, at least 0.
    test_seed: of the test cases, at least 0.
    progress: whether to show a progress bar.

  Raises:
    FileExistsError: `directory` is not empty.
    ValueError: a negative number of cases, or one that cannot be balanced.
  """
  directory = pathlib.Path(directory)
  number = len(ATTRIBUTES["race"])
  if test < 0:
    raise ValueError(f"the number of cases must be at least 0, not {test}")
  if balanced and train % number:
    raise ValueError(
      f"{train} training cases cannot be split equally over {number} groups"
    )
  training = [train // number] * number if balanced else group_counts(train)
  cases = [
    (group, use)
    for use, counts in (("test", [test] * number), ("training", training))
    for group, count in enumerate(counts)
    for _ in range(count)
  ]
  directory.mkdir(parents=True, exist_ok=True)
  if any(directory.iterdir()):
    raise FileExistsError(
      f"{directory} is not empty; name a new directory, or delete this one"
      " first"
    )
  rows = []
  bar = tqdm(cases, desc="phantoms", unit="case", disable=not progress)
  for i, (group, use) in enumerate(bar, start=1):
    rng = np.random.default_rng([test_seed if use == "test" else seed, i])
    image, mask = generate(rng, group, shape)
    codes = {"race": group} | {
      key: _choose(rng, key) for key in ATTRIBUTES if key != "race"
    }
    codes["age"] = int(np.clip(rng.normal(61, 16), 18, 95))
    name = f"data_{i:05d}.npz"
    npz.write_case(directory / name, image, mask, codes)
    rows.append({"filename": name, "use": use} | codes)
  npz.write_summary(directory, rows)


class _Eye(NamedTuple):
  """What a mask says of an eye; lengths in pixels of a 64-pixel image."""

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


def _measure(mask: np.ndarray) -> _Eye:
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
  return _Eye(
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


def _disc(rng, eye: _Eye) -> np.ndarray:
  """Soft indicator [H, W] of the disc, softest on one, mostly nasal, side."""
  side = _lobe(eye.angle, np.pi + rng.normal(0, 0.7), rng.uniform(0.5, 2))
  return _soft(eye.disc, _EDGE + rng.uniform(0, 0.5) * side)


def _cup(rng, eye: _Eye, anatomy: Anatomy) -> np.ndarray:
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
  step = _normal(rng, anatomy.cup)
  if rng.random() < anatomy.shadow:
    step *= -rng.uniform(0.5, 1.2)
  cup = _soft(eye.cup, rng.uniform(*_CUP_EDGE))
  x = step * (share * cup + (1 - share) * pale)
  x += rng.uniform(*anatomy.cup_line) * np.exp(-(eye.cup**2) / 2)
  if rng.random() < anatomy.lamina:
    dots = _texture(rng, cup.shape, eye.unit * rng.uniform(0.6, 0.9))
    x -= rng.uniform(0.15, 0.35) * np.clip(dots - 0.5, 0, 1.5) * cup
  return x


def _surface(rng, eye: _Eye, anatomy: Anatomy, inside) -> np.ndarray:
  """Choroid that shines through [H, W], and shading across a tilted disc."""
  choroid = _ridges(rng, inside.shape, eye.unit * rng.uniform(1.2, 2.2))
  x = rng.uniform(*anatomy.tessellation) * choroid * (1 - inside)
  slope = np.cos(eye.angle - eye.axis - rng.normal(0, 0.5))
  outwards = np.clip(1 - eye.disc / max(eye.radius, 1), 0, 1)
  return x + rng.normal(0, anatomy.tilt) * slope * outwards * inside


def _fibres(rng, eye: _Eye, anatomy: Anatomy, inside) -> np.ndarray:
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


def _atrophy(rng, eye: _Eye, anatomy: Anatomy, inside) -> np.ndarray:
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
    mottle = 1 + 0.5 * _texture(rng, x.shape, eye.unit * 0.8)
    x = x - rng.uniform(0.15, 0.5) * zone * outside * (more > 0.5) * mottle
  return x


def _rim(rng, eye: _Eye, anatomy: Anatomy, inside) -> np.ndarray:
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


def _spots(rng, eye: _Eye, anatomy: Anatomy, inside) -> np.ndarray:
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


def _crescent(rng, eye: _Eye, direction, width) -> np.ndarray:
  """Width [H, W] of a zone along the disc's edge, by the angle about it.

  From a thin crescent to nearly a ring.
  """
  sharpness = np.exp(rng.uniform(np.log(0.15), np.log(5)))
  profile = width * _lobe(eye.angle, direction, sharpness)
  for order in (2, 3, 5):
    size = rng.normal(0, 0.12)
    profile *= 1 + size * np.cos(order * eye.angle + rng.uniform(0, 2 * np.pi))
  return profile


def _normal(rng, mean_sd: tuple[float, float]) -> float:
  """Normal draw, clipped at 2 standard deviations."""
  mean, sd = mean_sd
  return mean + sd * np.clip(rng.standard_normal(), -2, 2)


def _anatomy(group: int) -> Anatomy:
  races = ATTRIBUTES["race"]
  if not 0 <= group < len(races):
    raise ValueError(f"group must index {races}, not {group}")
  return ANATOMY[races[group]]


def _margin(rng, grid, centre, radius, elongation, tilt, wobble) -> np.ndarray:
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


def _texture(rng, shape: tuple[int, int], size: float) -> np.ndarray:
  """Smooth noise [H, W] of unit variance, grains of `size` pixels."""
  noise = rng.standard_normal(shape, np.float32)
  noise = ndimage.gaussian_filter(noise, size, mode="wrap")
  return noise / noise.std()


def _ridges(rng, shape: tuple[int, int], size: float) -> np.ndarray:
  """Bright network on dark [H, W], like the choroid's vessels; mean 0."""
  ridges = -np.abs(_texture(rng, shape, size))
  return (ridges - ridges.mean()) / ridges.std()


def _streaks(rng, eye: _Eye) -> np.ndarray:
  """Fine rays [H, W] from the disc, about unit variance."""
  rays = np.zeros_like(eye.angle)
  drift = eye.disc / 20
  for order in rng.integers(9, 32, 5):
    rays += np.cos(
      order * (eye.angle + rng.normal(0, 0.1) * drift)
      + rng.uniform(0, 2 * np.pi)
    )
  return rays * np.sqrt(np.float32(2 / 5))


def _vessels(rng, eye: _Eye, number: int) -> np.ndarray:
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


def _light(rng, shape: tuple[int, int]) -> np.ndarray:
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


def _choose(rng, key: str) -> int:
  """Random code of an attribute, or -1 for unknown."""
  shares = [_SHARES[key][word] for word in ATTRIBUTES[key]]
  codes = [*range(len(shares)), -1]
  return int(rng.choice(codes, p=[*shares, max(0.0, 1 - sum(shares))]))
