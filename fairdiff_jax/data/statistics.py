"""Constants of the training set that the networks carry as frozen variables.

They travel in the checkpoint: sampling needs no data.
"""

import numpy as np

from fairdiff_jax.data.fairseg import Cases

NUM_CLASSES = 3


def shapes(num_groups: int) -> dict:
  """The statistics of no data: same structure and shapes, float32 zeros."""
  return {
    "points": {
      "mean": np.zeros(3, np.float32),
      "std": np.zeros((), np.float32),
    },
    "image": {
      "intensity": np.zeros((num_groups + 1, NUM_CLASSES), np.float32),
      "scale": np.zeros((), np.float32),
    },
    "segmenter": {},
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
    deviation for all coordinates); image 'intensity' [G + 1, 3], whose last
    row and rows of absent groups are the means over all cases, and 'scale'
    [], the residual's standard deviation.
  """
  result = shapes(num_groups)
  flat = cases.points.reshape(-1, 3)
  mean = flat.mean(0, dtype=np.float64)
  result["points"] = {
    "mean": mean.astype(np.float32),
    "std": np.float32(np.sqrt(((flat - mean) ** 2).mean(dtype=np.float64))),
  }
  if not intensity_prior:
    result["image"]["scale"] = np.float32(1)
    return result
  classes = np.arange(NUM_CLASSES)
  total = np.zeros((len(group), NUM_CLASSES))
  count = np.zeros((len(group), NUM_CLASSES))
  square = 0.0
  for i, (image, mask) in enumerate(zip(cases.image, cases.mask, strict=True)):
    image = image / 127.5 - 1
    count[i] = np.bincount(mask.ravel(), minlength=NUM_CLASSES)
    total[i] = np.bincount(mask.ravel(), image.ravel(), NUM_CLASSES)
    square += np.sum(image**2)
  intensity = np.empty((num_groups + 1, NUM_CLASSES))
  intensity[:] = total.sum(0) / count.sum(0)
  for g in range(num_groups):
    member = group == g
    if member.any():
      intensity[g] = total[member].sum(0) / count[member].sum(0)
  # sum (x - a)^2 = sum x^2 - 2 a sum x + a^2 n, class by class
  a = intensity[np.where(group < 0, num_groups, group)][:, classes]
  residual = square - np.sum(2 * a * total) + np.sum(a**2 * count)
  result["image"] = {
    "intensity": intensity.astype(np.float32),
    "scale": np.float32(np.sqrt(residual / count.sum())),
  }
  return result
