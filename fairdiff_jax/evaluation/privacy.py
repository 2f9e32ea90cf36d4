"""Whether synthetic patients are near copies of real ones.

Images are aligned at their first structure's centroid and standardised, so
that neither place nor brightness hides a copy; every training image is also
looked at in its mirror. Distances are root mean squares over pixels, or over
features in units of the training cases' spread. All are held against how near
real training patients are to each other:

* the share of synthetic cases that are closer than the real 1% quantile, which
  would be 1% of independent ones;
* the ratio of the nearest distance to that of the second nearest patient, near
  0 for a copy;
* a membership attack: that training patients have nearer synthetic cases than
  held-out ones, as an AUC (DeLong et al. 1988), by group, .5 where nothing
  gives members away.

A real image that was turned or warped is far in these distances: nothing that
starts from one may be shared, whatever they say.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fairdiff_jax.data.cases import Cases, require_training
from fairdiff_jax.data.domain import Domain
from fairdiff_jax.evaluation.matched import WIDTH
from fairdiff_jax.evaluation.realism import LEVEL, auc

SIDE = 64  # pixels of an image's longer side, at most, where it is compared
QUANTILE = 0.01
FEWEST = 3  # training patients: one's own, the nearest, and a second
BATCH = 64  # images at a time
PIXELS, FEATURES = "pixels", "features"


class Near(NamedTuple):
  """The nearest real patients of some cases.

  Attributes:
    distance: to the nearest [m].
    case: which training case that is [m].
    second: distance to the nearest case of another patient [m].
  """

  distance: np.ndarray
  case: np.ndarray
  second: np.ndarray


class Space(NamedTuple):
  """Training cases in one space.

  Attributes:
    views: every case, then its mirror [2 n, D].
    patient: number of whose they are [2 n].
    real: of every training case, the nearest of other patients.
    center: taken away from vectors, [D] or 0.
    scale: what they are then divided by, [D] or 1.
  """

  views: np.ndarray
  patient: np.ndarray
  real: Near
  center: Any
  scale: Any

  @property
  def threshold(self) -> float:
    """The distance that 1% of real patients' nearest are below."""
    return float(np.quantile(self.real.distance, QUANTILE))

  def nearest(self, vectors: np.ndarray) -> Near:
    """The nearest real patients of vectors [m, D] in this space's units."""
    other = np.full(len(vectors), -1)
    return nearest(vectors, self.views, self.patient, other)


def aligned(image: np.ndarray, mask: np.ndarray, domain: Domain) -> np.ndarray:
  """Images as vectors: the first structure in the middle, of length 1.

  Args:
    image: uint8 [n, H, W], or RGB [n, H, W, 3].
    mask: [n, H, W] of classes.
    domain: what they show; a mask without the structure is left in its place.

  Returns:
    float32 [n, D].
  """
  classes = next(iter(domain.regions.values()))
  height, width = mask.shape[1:]
  factor = min(1.0, SIDE / max(height, width))
  size = max(round(height * factor), 1), max(round(width * factor), 1)
  found = []
  for i in range(0, len(image), BATCH):
    rows = slice(i, i + BATCH)
    region = np.isin(mask[rows], classes)
    pad = BATCH - len(region)
    pixels = np.pad(image[rows], ((0, pad), *((0, 0),) * (image.ndim - 1)))
    region = np.pad(region, ((0, pad), (0, 0), (0, 0)))
    found.append(np.asarray(_aligned(pixels, region, size))[: BATCH - pad])
  depth = size[0] * size[1] * (image.shape[3] if image.ndim == 4 else 1)
  return np.concatenate([np.empty((0, depth), np.float32), *found])


@partial(jax.jit, static_argnames="size")
def _aligned(image, region, size):
  height, width = region.shape[1:]
  weight = jnp.maximum(region.sum((1, 2)), 1)

  def one(pixels, inside, count):
    shift = []
    for axis, length in ((1, height), (0, width)):
      middle = (length - 1) / 2
      at = (inside.sum(axis) * jnp.arange(length)).sum() / count
      shift.append(jnp.where(inside.any(), jnp.round(at - middle), 0))
    rows = jnp.clip(jnp.arange(height) + shift[0], 0, height - 1)
    columns = jnp.clip(jnp.arange(width) + shift[1], 0, width - 1)
    moved = pixels[rows.astype(int)][:, columns.astype(int)]
    shape = (*size, *pixels.shape[2:])
    return jax.image.resize(moved.astype(jnp.float32), shape, "linear")

  found = jax.vmap(one)(image, region, weight).reshape(len(image), -1)
  found -= found.mean(1, keepdims=True)
  return found / jnp.maximum(jnp.linalg.norm(found, axis=1, keepdims=True), 1)


def nearest(
  vectors: np.ndarray,
  views: np.ndarray,
  patient: np.ndarray,
  own: np.ndarray,
) -> Near:
  """The nearest of two views of cases.

  Args:
    vectors: [m, D].
    views: [2 n, D].
    patient: whose the views are [2 n].
    own: the patient [m] whose views are not looked at; -1 for none.
  """
  against = jnp.asarray(views), jnp.asarray(patient)
  found = []
  for i in range(0, len(vectors), BATCH):
    rows = vectors[i : i + BATCH]
    pad = BATCH - len(rows)
    given = (
      np.pad(rows, ((0, pad), (0, 0))),
      np.pad(own[i : i + BATCH], (0, pad)),
    )
    out = [np.asarray(x)[: len(rows)] for x in _nearest(*given, *against)]
    found.append(out)
  if not found:
    return Near(np.empty(0), np.empty(0, int), np.empty(0))
  distance, index, second = map(np.concatenate, zip(*found, strict=True))
  return Near(distance, index % (len(views) // 2), second)


@jax.jit
def _nearest(vectors, own, views, patient):
  square = (vectors**2).sum(1)[:, None] + (views**2).sum(1)
  square = square - 2 * jnp.dot(vectors, views.T, precision="highest")
  square = jnp.where(own[:, None] == patient, jnp.inf, square)
  index = square.argmin(1)
  others = jnp.where(patient[index][:, None] == patient, jnp.inf, square)
  second = others.argmin(1)

  def exact(at):  # a difference of squares is not 0 of a copy
    return jnp.sqrt(((vectors - views[at]) ** 2).sum(1))

  lacking = jnp.isinf(others.min(1))
  return exact(index), index, jnp.where(lacking, jnp.nan, exact(second))


class Privacy:
  """Training patients, to whom nothing that is shared may be near.

  Args:
    train: the training cases.
    see: images uint8 -> features [n, F]; None to compare pixels alone.

  Raises:
    ValueError: they are no training cases, or of fewer than `FEWEST` patients.
  """

  def __init__(self, train: Cases, see=None):
    require_training(train, "the comparison with real patients")
    self.train, self._see = train, see
    names = np.array(train.whose)
    patient = np.unique(names, return_inverse=True)[1]
    if len(np.unique(names)) < FEWEST:
      raise ValueError(
        f"privacy is measured against at least {FEWEST} training patients, not"
        f" {len(np.unique(names))}"
      )
    mirrored = train.image[:, :, ::-1]
    both = np.concatenate([patient, patient])
    views = {
      PIXELS: (
        aligned(train.image, train.mask, train.domain),
        aligned(mirrored, train.mask[:, :, ::-1], train.domain),
      )
    }
    if see is not None:
      views[FEATURES] = see(train.image), see(mirrored)
    self.spaces: dict[str, Space] = {}
    for name, (plain, mirror) in views.items():
      center, scale = 0.0, 1.0
      if name == FEATURES:
        center = plain.mean(0)
        scale = (plain.std(0) + 1e-6) * np.sqrt(plain.shape[1])
      plain, mirror = (((x - center) / scale) for x in (plain, mirror))
      pair = np.concatenate([plain, mirror]).astype(np.float32)
      real = nearest(pair[: len(patient)], pair, both, patient)
      self.spaces[name] = Space(pair, both, real, center, scale)

  def vectors(
    self, image: np.ndarray, mask: np.ndarray
  ) -> dict[str, np.ndarray]:
    """Cases in every space."""
    found = {PIXELS: aligned(image, mask, self.train.domain)}
    if FEATURES in self.spaces:
      space = self.spaces[FEATURES]
      if not len(image):
        return found | {FEATURES: space.views[:0]}
      seen = (self._see(image) - space.center) / space.scale
      found[FEATURES] = seen.astype(np.float32)
    return found

  def near(self, image: np.ndarray, mask: np.ndarray) -> dict[str, Near]:
    """The nearest real patients of cases, in every space."""
    vectors = self.vectors(image, mask)
    return {name: self.spaces[name].nearest(v) for name, v in vectors.items()}

  def too_near(self, image: np.ndarray, mask: np.ndarray) -> list[str]:
    """Of every case, the first space in which it is too near; '' if none."""
    found = [""] * len(image)
    for name, near in self.near(image, mask).items():
      for i in np.flatnonzero(near.distance < self.spaces[name].threshold):
        found[i] = found[i] or name
    return found

  def measure(
    self,
    image: np.ndarray,
    mask: np.ndarray,
    held_out: Cases,
    train_group: np.ndarray,
    held_out_group: np.ndarray,
  ) -> tuple[dict[str, Any], dict[str, Near]]:
    """All figures of some synthetic cases, and what is nearest to each.

    Args:
      image: uint8 [m, H, W], or RGB [m, H, W, 3].
      mask: [m, H, W].
      held_out: real cases that nothing has learned from.
      train_group: of the training cases [n].
      held_out_group: of those held out.

    Returns:
      {`synthetic`, `members` and `held_out` (patients), `spaces`: 'pixels' and,
      where there are features, 'features' -> {`nearest`, `nearest_real`
      (medians), `threshold`, `closer` (share), `closer_interval`, `ratio`,
      `ratio_real` (medians), `ratio_below` (share below the real 1% quantile),
      `attack`, `attack_interval`}}; and what `near` gives.
    """
    vectors = self.vectors(image, mask)
    others = self.vectors(held_out.image, held_out.mask)
    people = [np.array(c.whose) for c in (self.train, held_out)]
    spaces, found = {}, {}
    for name, made in vectors.items():
      space = self.spaces[name]
      near, real = space.nearest(made), space.real
      found[name] = near
      n = len(self.train.name)
      # Synthetic cases and their twins stand for the views.
      twice, who = np.concatenate([made, made]), np.arange(len(made))
      who = np.concatenate([who, who])
      scores = [
        nearest(rows, twice, who, np.full(len(rows), -1)).distance
        if len(made)
        else np.full(len(rows), np.nan)
        for rows in (space.views[:n], others[name])
      ]
      count = int((near.distance < space.threshold).sum())
      ratios = [_ratio(x) for x in (near, real)]
      area, *ends = membership(
        *scores, *people, np.asarray(train_group), np.asarray(held_out_group)
      )
      spaces[name] = {
        "nearest": _median(near.distance),
        "nearest_real": _median(real.distance),
        "threshold": space.threshold,
        "closer": count / len(made) if len(made) else np.nan,
        "closer_interval": _share_interval(count, len(made)),
        "ratio": _median(ratios[0]),
        "ratio_real": _median(ratios[1]),
        "ratio_below": _mean(ratios[0] < _quantile(ratios[1])),
        "attack": area,
        "attack_interval": tuple(ends),
      }
    return {
      "synthetic": len(image),
      "members": len(np.unique(people[0])),
      "held_out": len(np.unique(people[1])),
      "spaces": spaces,
    }, found


def membership(
  members: np.ndarray,
  others: np.ndarray,
  member_patient: Sequence[Any],
  other_patient: Sequence[Any],
  member_group: np.ndarray,
  other_group: np.ndarray,
) -> tuple[float, float, float]:
  """AUC of telling members by how near the nearest synthetic case is.

  A patient is the mean of his cases, and compared within his group, so that
  groups of other sizes on the two sides tell nothing.

  Args:
    members: distances of the training cases [n].
    others: of held-out ones [m].
    member_patient: whose they are [n].
    other_patient: likewise [m].
    member_group: their groups [n].
    other_group: likewise [m].

  Returns:
    The AUC, and its interval of 95%; NaN with fewer than 2 patients a side of
    every group.
  """

  def scores(distance, patient, group, of):
    rows = group == of
    who = np.unique(np.asarray(patient)[rows], return_inverse=True)[1]
    return -np.bincount(who, distance[rows]) / np.maximum(np.bincount(who), 1)

  total = value = variance = 0.0
  for of in np.unique(member_group):
    a = scores(members, member_patient, member_group, of)
    b = scores(others, other_patient, other_group, of)
    if min(len(a), len(b)) < 2 or not np.isfinite([*a, *b]).all():
      continue
    weight = len(a) * len(b) / (len(a) + len(b))
    above = np.sign(a[:, None] - b) / 2 + 0.5
    error = above.mean(1).var(ddof=1) / len(a)
    error += above.mean(0).var(ddof=1) / len(b)
    total += weight
    value += weight * auc(b, a)
    variance += weight**2 * error
  if not total:
    return (np.nan,) * 3
  value, half = value / total, WIDTH * np.sqrt(variance) / total
  return float(value), float(max(value - half, 0)), float(min(value + half, 1))


def _ratio(near: Near) -> np.ndarray:
  return near.distance / np.maximum(near.second, 1e-12)


def _median(values) -> float:
  known = values[np.isfinite(values)]
  return float(np.median(known)) if len(known) else np.nan


def _mean(values) -> float:
  return float(np.mean(values)) if len(values) else np.nan


def _quantile(values) -> float:
  known = values[np.isfinite(values)]
  return float(np.quantile(known, QUANTILE)) if len(known) else np.nan


def _share_interval(count: int, n: int) -> tuple[float, float]:
  """That of Clopper & Pearson (1934) for a share; NaN of nothing."""
  if not n:
    return np.nan, np.nan
  from scipy import stats  # takes long to import

  tail = (1 - LEVEL / 100) / 2
  low = stats.beta.ppf(tail, count, n - count + 1) if count else 0.0
  high = stats.beta.ppf(1 - tail, count + 1, n - count) if count < n else 1.0
  return float(low), float(high)


def closest(
  near: Mapping[str, Near], most: int
) -> list[tuple[int, int, float]]:
  """The nearest pairs in pixels: (synthetic case, training case, distance)."""
  found = near[PIXELS]
  order = np.argsort(found.distance, kind="stable")[:most]
  return [(int(i), int(found.case[i]), float(found.distance[i])) for i in order]
