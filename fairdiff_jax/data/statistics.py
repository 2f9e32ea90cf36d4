"""Constants of the training set that the networks carry as frozen variables.

They travel in the checkpoint: sampling needs no data.
"""

import numpy as np

from fairdiff_jax.data.cases import Cases
from fairdiff_jax.data.domain import FUNDUS, Domain

GREY_LEVEL = 1 / 127.5  # of uint8 images in [-1, 1]
DARK = 0.1  # added to brightness in [0, 2], so that black has a logarithm
LOG_LEVELS = np.log(np.arange(256) / 127.5 + DARK)  # of uint8 images
UNLIT = 4  # grey level; background no brighter is outside the field of view
POOLED = 8  # cases of its own that weigh as much as the groups' pooled spread


def shapes(num_groups: int, domain: Domain = FUNDUS) -> dict:
  """The statistics of no data: same structure and shapes, float32 zeros."""
  numbers = domain.num_classes * domain.channels
  rows = num_groups + 1
  return {
    "points": {
      "mean": np.zeros(3, np.float32),
      "std": np.zeros((), np.float32),
    },
    "image": {
      "intensity": np.zeros((rows, numbers), np.float32),
      "spread": np.zeros((rows, numbers, numbers), np.float32),
      "scale": np.zeros(rows, np.float32),
    },
    "segmenter": {},
    "adversary": {},
  }


def compute(
  cases: Cases, group: np.ndarray, num_groups: int, *, intensity_prior: bool
) -> dict:
  """Statistics of the training cases.

  Args:
    cases: training cases.
    group: group index [n], -1 for unknown.
    num_groups: G.
    intensity_prior: whether images are generated as residuals to intensities
      per class; otherwise intensity and spread are 0 and the scale is 1.

  Returns:
    By network: points 'mean' [3] and 'std' [] ("global unit": one standard
    deviation for all coordinates), of clouds that are not all zeros, 0 and 1
    if all are; image 'intensity' [G + 1, I], the mean over a group's cases of
    their mean intensity in every class and channel, I = classes x channels,
    'spread' [G + 1, I, I], the symmetric root of the covariance of a new
    case's, and 'scale' [G + 1], the root mean square of what is left of an
    image, one grey level at the least. Intensities are logarithms,
    log(image + 1 + DARK); what is unlit is left out. The last row and those of
    absent groups are of all cases. Of a class without a pixel a case has its
    group's mean, a group that of all cases, and all cases 0.
  """
  result = shapes(num_groups, cases.domain)
  clouds = [p for p in cases.points if p.any()]
  mean, std = np.zeros(3), 1.0
  if clouds:
    mean = np.mean([p.mean(0, dtype=np.float64) for p in clouds], axis=0)
    std = np.sqrt(np.mean([np.mean((p - mean) ** 2) for p in clouds]))
  result["points"] = {
    "mean": mean.astype(np.float32),
    "std": np.float32(std),
  }
  if not intensity_prior:
    result["image"]["scale"] += 1
    return result
  measured = cases.intensity
  if measured is None:
    pairs = zip(cases.image, cases.mask, strict=True)
    measured = np.array([by_class(*pair, cases.domain) for pair in pairs])
  means, count, square = np.moveaxis(measured, 1, 0)
  everyone = np.ones(len(group), bool)
  members = [group == g for g in range(num_groups)]
  members = [m if m.any() else everyone for m in members] + [everyone]
  overall = _mean(means[everyone], 0.0)
  rows = [_mean(means[member], overall) for member in members]
  # Deviations from one's own group; where it is unknown, from all cases.
  deviation = np.nan_to_num(means - np.stack(rows)[group])
  groups = len(np.unique(group))
  pooled = deviation.T @ deviation / max(len(group) - groups, 1)
  for row, (member, mean) in enumerate(zip(members, rows, strict=True)):
    n = member.sum()
    own = np.nan_to_num(means[member] - mean)
    covariance = own.T @ own + POOLED * pooled
    # The mean is uncertain too, by 1 / n of the spread.
    covariance *= (1 + 1 / n) / (n - 1 + POOLED)
    variance = square[member].sum() / count[member].sum()
    result["image"]["intensity"][row] = mean
    result["image"]["spread"][row] = _root(covariance)
    result["image"]["scale"][row] = max(np.sqrt(variance), GREY_LEVEL)
  return result


def shape(domain: Domain) -> tuple[int, int]:
  """Of what `by_class` gives, (3, I)."""
  return 3, domain.num_classes * domain.channels


def by_class(image: np.ndarray, mask: np.ndarray, domain: Domain) -> np.ndarray:
  """What `compute` takes from a case [3, I], by class and channel.

  Mean of log(image + 1 + DARK), NaN without a pixel, number of pixels, and sum
  of their squared distances from that mean. Background that is unlit is left
  out: what surrounds a round field of view would outweigh what is seen in it.
  """
  classes, channels = domain.num_classes, domain.channels
  result = np.empty((3, classes, channels))
  image = np.atleast_3d(image)
  lit = (mask > 0) | (image.max(-1) > UNLIT)
  of = mask[lit].astype(np.intp) * 256
  for c, values in enumerate(np.moveaxis(image[lit], -1, 0)):
    found = np.bincount(of + values, minlength=classes * 256)
    found = found.reshape(classes, 256)
    count = found.sum(1)
    mean = found @ LOG_LEVELS / np.maximum(count, 1)
    square = (found * (LOG_LEVELS - mean[:, None]) ** 2).sum(1)
    result[..., c] = np.where(count > 0, mean, np.nan), count, square
  return result.reshape(shape(domain))


def _mean(values, fallback):
  """Mean over cases [n, C] of what is not NaN; the fallback where all is."""
  known = np.isfinite(values)
  total = np.where(known, values, 0).sum(0)
  number = known.sum(0)
  return np.where(number > 0, total / np.maximum(number, 1), fallback)


def _root(covariance):
  """Symmetric square root of a positive semidefinite matrix."""
  value, vector = np.linalg.eigh(covariance)
  return vector * np.sqrt(np.maximum(value, 0)) @ vector.T
