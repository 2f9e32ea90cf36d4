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

import numpy as np
from scipy import ndimage
from tqdm import tqdm

from fairdiff_jax.data import findings, npz
from fairdiff_jax.data.attributes import ATTRIBUTES
from fairdiff_jax.data.findings import Anatomy

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
_BLUR = (0.3, 0.6)
_NOISE = (0.4, 1.2)  # grey levels
_VEIL = (0.0, 0.1)  # stray light, share of the background's brightness
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
  radius = unit * findings.normal(rng, anatomy.disc_radius)
  elongation = rng.uniform(*anatomy.elongation)
  torsion = rng.normal(0, anatomy.torsion)
  disc = findings.margin(rng, grid, centre, radius, elongation, torsion, 0.025)

  ratio = np.clip(findings.normal(rng, anatomy.cup_to_disc), 0.25, 0.8)
  offset = radius * (1 - ratio) * np.clip(rng.normal(0, 0.12, 2), -0.25, 0.25)
  offset[1] += temporal * 0.1 * radius * (1 - ratio)
  cup = findings.margin(
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
  eye = findings.measure(mask)
  inside = findings.draw_disc(rng, eye)
  x = findings.normal(rng, anatomy.rim) * inside
  x += findings.draw_cup(rng, eye, anatomy)
  for finding in findings.FINDINGS:
    x += finding(rng, eye, anatomy, inside)
  vessels = findings.draw_vessels(rng, eye, anatomy.vessels)
  x -= rng.uniform(*_VESSEL) * vessels * (1 - _VESSEL_FADE * inside)
  x += findings.draw_light(rng, mask.shape)
  level = np.exp(findings.normal(rng, anatomy.brightness))
  y = level * (np.exp(x) + rng.uniform(*_VEIL))
  y = 255 * (1 - np.exp(-y / 255))  # bright parts do not burn out
  y = ndimage.gaussian_filter(y, eye.unit * rng.uniform(*_BLUR), mode="nearest")
  y += rng.uniform(*_NOISE) * findings.texture(rng, mask.shape, 0.4 * eye.unit)
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
  added: int = 0,
  seed: int = 0,
  test_seed: int = 0,
  progress: bool = True,
) -> None:
  """Writes made-up patients as files of Harvard-FairSeg's current release.

  `data_00001.npz` and on, test cases first, added ones last and groups in
  order, with keys `slo_fundus` [H, W] uint8, `disc_cup_mask` [H, W] float64 (0
  background, -1 rim, -2 cup) and attributes as 0-d int64 (age in years), then
  `data_summary.csv`. Case i is drawn from `default_rng([seed, i])`, so that
  test cases are the same whatever the training cases, and those whatever is
  added.

  Args:
    directory: where to write; created if missing, must be empty.
    train: training cases in total.
    test: test cases of *each* race.
    shape: (H, W) of the images.
    balanced: whether training cases are split over race equally, or by
      `group_counts`.
    added: so many more training cases of each group that has fewer than the
      largest.
    seed: of the training cases, at least 0.
    test_seed: of the test cases, at least 0.
    progress: whether to show a progress bar.

  Raises:
    FileExistsError: `directory` is not empty.
    ValueError: a negative number of cases, or one that cannot be balanced.
  """
  directory = pathlib.Path(directory)
  number = len(ATTRIBUTES["race"])
  if min(test, added) < 0:
    raise ValueError(
      f"the number of cases must be at least 0, not {min(test, added)}"
    )
  if balanced and train % number:
    raise ValueError(
      f"{train} training cases cannot be split equally over {number} groups"
    )
  training = [train // number] * number if balanced else group_counts(train)
  more = [added * (count < max(training)) for count in training]
  parts = (
    ("test", [test] * number),
    ("training", training),
    ("training", more),
  )
  cases = [
    (group, use)
    for use, counts in parts
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


def _anatomy(group: int) -> Anatomy:
  races = ATTRIBUTES["race"]
  if not 0 <= group < len(races):
    raise ValueError(f"group must index {races}, not {group}")
  return ANATOMY[races[group]]


def _choose(rng, key: str) -> int:
  """Random code of an attribute, or -1 for unknown."""
  shares = [_SHARES[key][word] for word in ATTRIBUTES[key]]
  codes = [*range(len(shares)), -1]
  return int(rng.choice(codes, p=[*shares, max(0.0, 1 - sum(shares))]))
