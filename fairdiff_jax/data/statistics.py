"""Constants of the training set that the networks carry as frozen variables.

They travel in the checkpoint: sampling needs no data.
"""

import numpy as np

from fairdiff_jax.data.domain import FUNDUS, Domain
from fairdiff_jax.data.fairseg import Cases

GREY_LEVEL = 1 / 127.5  # of uint8 images in [-1, 1]


def shapes(num_groups: int, domain: Domain = FUNDUS) -> dict:
  """The statistics of no data: same structure and shapes, float32 zeros."""
  intensity = (num_groups + 1, domain.num_classes)
  if domain.channels > 1:
    intensity += (domain.channels,)
  return {
    "points": {
      "mean": np.zeros(3, np.float32),
      "std": np.zeros((), np.float32),
    },
    "image": {
      "intensity": np.zeros(intensity, np.float32),
      "scale": np.zeros(num_groups + 1, np.float32),
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
    intensity_prior: whether images are generated as residuals to their
      group's mean intensity per class; otherwise intensity 0 and scale 1.

  Returns:
    By network: points 'mean' [3] and 'std' [] ("global unit": one standard
    deviation for all coordinates), of clouds that are not all zeros, 0
    and 1 if all are; image
    'intensity' [G + 1, classes], of RGB images [G + 1, classes, 3], whose last
    row and rows of absent groups are the means over all cases, and 'scale'
    [G + 1], the residual's standard deviation likewise, one grey level at the
    least. A class without a pixel has intensity 0.
  """
  result = shapes(num_groups, cases.domain)
  drawn = cases.points.any(axis=(1, 2))
  flat = cases.points[drawn].reshape(-1, 3)
  if len(flat):
    mean = flat.mean(0, dtype=np.float64)
    std = np.sqrt(((flat - mean) ** 2).mean(dtype=np.float64))
  else:
    mean, std = np.zeros(3), 1
  result["points"] = {
    "mean": mean.astype(np.float32),
    "std": np.float32(std),
  }
  if not intensity_prior:
    result["image"]["scale"] += 1
    return result
  # Sums by case and class suffice: sum (x - a)^2 = sum x^2 - 2 a sum x + a^2 n
  number, channels = cases.domain.num_classes, cases.domain.channels
  shape = (channels, len(group), number)
  count, total, square = np.zeros(shape), np.zeros(shape), np.zeros(shape)
  for i, (image, mask) in enumerate(zip(cases.image, cases.mask, strict=True)):
    label = mask.ravel()
    for c, x in enumerate(image.reshape(-1, channels).T / 127.5 - 1):
      count[c, i] = np.bincount(label, minlength=number)
      total[c, i] = np.bincount(label, x, number)
      square[c, i] = np.bincount(label, x**2, number)
  for g in range(num_groups + 1):
    member = group == g
    if not member.any():
      member = np.ones(len(group), bool)
    n, first, second = (x[:, member].sum(1) for x in (count, total, square))
    mean = first / np.maximum(n, 1)
    variance = np.sum(second - 2 * mean * first + mean**2 * n) / n.sum()
    result["image"]["intensity"][g] = mean.T if channels > 1 else mean[0]
    result["image"]["scale"][g] = max(np.sqrt(max(variance, 0)), GREY_LEVEL)
  return result
