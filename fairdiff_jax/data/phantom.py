"""Made-up patients: optic-nerve images with an honest fairness gap.

A group that is rare in training is segmented worse only if what is learned
from the others misleads. Low contrast would not do: it stays hard with
balanced data too. So here the *cues conflict* between the groups, while cups
are of similar size in pixels. With disc D, cup C, crescent K and vessels V as
soft indicators in [0, 1], the image of a patient of group g is

    x(u) = b + D r + C c + K (1 - D) k - v V (1 - f D) + light(u),
    y(u) = blur((x + 1) (1 + s n(u)) - 1),       pixel = 127.5 (y + 1)

where background b, rim contrast r, cup contrast c, crescent gain k and vessel
depth v come from the group's `Anatomy`: a rim is brighter than its
surroundings in White and Black patients and darker in Asian ones, and the
crescent beside the disc, mostly absent in White patients, is bright in one
minority and dark in the other. Vessels lose a share f of their depth inside
the disc; n is grainy unit noise (speckle).

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
  """One group's look: (mean, standard deviation) unless said otherwise."""

  disc_radius: tuple[float, float]  # pixels of a 64-pixel image
  cup_to_disc: tuple[float, float]  # ratio of radii
  background: tuple[float, float]  # intensity in [-1, 1]
  rim_contrast: tuple[float, float]  # rim minus background
  cup_contrast: tuple[float, float]  # cup minus rim
  vessels: int
  vessel_depth: float
  crescent_chance: float
  crescent_gain: float


ANATOMY = {
  "Asian": Anatomy(
    disc_radius=(13.0, 1.4),
    cup_to_disc=(0.50, 0.09),
    background=(0.22, 0.14),
    rim_contrast=(-0.22, 0.12),
    cup_contrast=(0.36, 0.08),
    vessels=6,
    vessel_depth=0.35,
    crescent_chance=0.85,
    crescent_gain=0.34,
  ),
  "Black": Anatomy(
    disc_radius=(14.0, 1.4),
    cup_to_disc=(0.55, 0.09),
    background=(-0.55, 0.10),
    rim_contrast=(0.24, 0.08),
    cup_contrast=(0.27, 0.06),
    vessels=9,
    vessel_depth=0.28,
    crescent_chance=0.80,
    crescent_gain=-0.25,
  ),
  "White": Anatomy(
    disc_radius=(12.5, 1.2),
    cup_to_disc=(0.49, 0.08),
    background=(-0.15, 0.10),
    rim_contrast=(0.40, 0.06),
    cup_contrast=(0.42, 0.06),
    vessels=6,
    vessel_depth=0.35,
    crescent_chance=0.15,
    crescent_gain=0.25,
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

_SPECKLE = 0.13  # standard deviation of the multiplicative noise
_GRAIN = 0.6  # pixels of a 64-pixel image, as are all lengths below
_BLUR = 0.55
_DISC_EDGE = 0.6
_CUP_EDGE = 0.9
_CENTRE_JITTER = 5.0
_VESSEL_FADE = 0.5  # share of a vessel's depth lost inside the disc
_LIGHT = 0.09  # standard deviation of the light's knots, intensity


def generate(
  rng: np.random.Generator, group: int, shape: tuple[int, int] = (64, 64)
) -> tuple[np.ndarray, np.ndarray]:
  """Draws one patient.

  Args:
    rng: source of all randomness.
    group: index into `ATTRIBUTES['race']`.
    shape: (H, W) of the image.

  Returns:
    image [H, W] uint8 and mask [H, W] uint8 (0 background, 1 rim, 2 cup).

  Raises:
    ValueError: no such group.
  """
  races = ATTRIBUTES["race"]
  if not 0 <= group < len(races):
    raise ValueError(f"group must index {races}, not {group}")
  anatomy = ANATOMY[races[group]]
  scale = min(shape) / 64
  grid = np.indices(shape, np.float32)
  centre = (np.array(shape) - 1) / 2 + scale * rng.uniform(
    -_CENTRE_JITTER, _CENTRE_JITTER, 2
  )
  temporal = 1 if rng.random() < 0.5 else -1  # side of the fovea, in columns

  radius = scale * _draw(rng, anatomy.disc_radius)
  elongation = rng.uniform(1.04, 1.2)
  tilt = rng.normal(0, 0.25)
  disc = _margin(rng, grid, centre, radius, elongation, tilt, 0.025)

  ratio = np.clip(_draw(rng, anatomy.cup_to_disc), 0.25, 0.8)
  offset = radius * (1 - ratio) * np.clip(rng.normal(0, 0.12, 2), -0.25, 0.25)
  offset[1] += temporal * 0.06 * radius * (1 - ratio)
  cup = _margin(
    rng,
    grid,
    centre + offset,
    radius * ratio,
    rng.uniform(0.95, 1.15),
    tilt + rng.normal(0, 0.3),
    0.03,
  )
  # A rim is never thinner than a twelfth of the disc's radius.
  cup = np.minimum(cup, disc - radius / 12)
  mask = (disc > 0).astype(np.uint8) + (cup > 0)

  background = _draw(rng, anatomy.background)
  rim = _draw(rng, anatomy.rim_contrast)
  pallor = _draw(rng, anatomy.cup_contrast)
  soft_disc = _soft(disc, scale * _DISC_EDGE)
  x = background + rim * soft_disc + pallor * _soft(cup, scale * _CUP_EDGE)
  if rng.random() < anatomy.crescent_chance:
    shift = scale * rng.uniform(1.8, 3.4)
    angle = rng.normal(0.35, 0.5)  # below the temporal side
    crescent = _margin(
      rng,
      grid,
      centre + shift * np.array([np.sin(angle), temporal * np.cos(angle)]),
      radius + scale * rng.uniform(1.0, 2.2),
      elongation,
      tilt,
      0.04,
    )
    gain = anatomy.crescent_gain * rng.uniform(0.8, 1.2)
    x += gain * _soft(crescent, scale * _DISC_EDGE) * (1 - soft_disc)
  vessels = _vessels(
    rng, grid, centre + offset, temporal, scale, anatomy.vessels
  )
  x -= anatomy.vessel_depth * vessels * (1 - _VESSEL_FADE * soft_disc)
  x += _light(rng, shape)

  grain = ndimage.gaussian_filter(
    rng.standard_normal(shape, np.float32), scale * _GRAIN, mode="wrap"
  )
  x = (x + 1) * (1 + _SPECKLE * grain / grain.std())
  x = ndimage.gaussian_filter(x, scale * _BLUR, mode="nearest")
  return np.clip(np.rint(127.5 * x), 0, 255).astype(np.uint8), mask


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


def _draw(rng, mean_sd: tuple[float, float]) -> float:
  """Normal draw, clipped at 2 standard deviations."""
  mean, sd = mean_sd
  return mean + sd * np.clip(rng.standard_normal(), -2, 2)


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


def _soft(margin: np.ndarray, width: float) -> np.ndarray:
  """Soft indicator of margin > 0, rising over `width` pixels."""
  return 0.5 + 0.5 * np.tanh(margin / np.float32(2 * width))


def _vessels(rng, grid, origin, temporal, scale, number) -> np.ndarray:
  """Vessels from the cup along the upper and lower arcades: [H, W] in [0, 1].

  Each is a curve of slowly changing direction with a Gaussian profile that
  thins out along it; a pixel takes the profile of the curve point nearest.
  """
  step = 0.5 * scale
  steps = np.arange(100, dtype=np.float32)
  points, widths = [], []
  for i in range(number):
    up = 1 if i % 2 else -1
    # Angle from the nasal side over the vertical to the temporal side.
    angle = np.pi / 2 + rng.normal(-0.1, 0.5)
    bend = rng.normal(0.02, 0.014) * np.exp(-steps / 45)
    sway = 0.28 * np.sin(
      steps * rng.uniform(0.09, 0.18) + rng.uniform(0, 2 * np.pi)
    )
    heading = angle + np.cumsum(bend) + sway
    start = scale * rng.normal(0, 1.2, 2) + origin
    start[1] -= temporal * 1.5 * scale
    points.append(
      start
      + step
      * np.cumsum(
        np.stack([up * np.sin(heading), -temporal * np.cos(heading)], -1), 0
      )
    )
    calibre = scale * rng.uniform(0.55, 1.0)
    widths.append(calibre * (1 - 0.006 * steps))
  points = np.concatenate(points).astype(np.float32)
  widths = np.concatenate(widths).astype(np.float32)

  shape = grid.shape[1:]
  pixel = np.rint(points).astype(int)
  inside = ((pixel >= 0) & (pixel < shape)).all(axis=1)
  points, widths, pixel = points[inside], widths[inside], pixel[inside]
  owner = np.full(shape, -1, np.int32)
  owner[tuple(pixel.T)] = np.arange(len(points))
  seed = ndimage.distance_transform_edt(
    owner < 0, return_distances=False, return_indices=True
  )
  nearest = owner[tuple(seed)]
  square = sum((grid[k] - points[nearest, k]) ** 2 for k in (0, 1))
  return np.exp(-square / (2 * widths[nearest] ** 2))


def _light(rng, shape: tuple[int, int]) -> np.ndarray:
  """Uneven illumination [H, W]: a 4 x 4 grid of random knots, smoothed."""
  knots = _LIGHT * rng.standard_normal((4, 4), np.float32)
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
