"""What masks show: is it what their domain shows, how deep do pixels lie?"""

import cv2
import numpy as np

from fairdiff_jax.data.domain import FUNDUS, Domain


def mask_fault(
  mask: np.ndarray, *, min_solidity: float, domain: Domain = FUNDUS
) -> str | None:
  """What is wrong with a mask, or None.

  Args:
    mask: uint8 [H, W], classes.
    min_solidity: least area of every structure as a share of its convex hull's.
    domain: its structures.

  Returns:
    Of a fundus 'no disc', 'no cup', 'no rim', 'outside' (the disc touches the
    border), 'ragged disc' or 'ragged cup', and so on for other structures;
    None for a sound mask.
  """
  regions, parents = domain.split(mask), domain.parents
  for name, region in regions.items():
    if not region.any():
      return f"no {name}"
  alone = {of: name for name, of in domain.reported_classes.items()}
  for i, name in enumerate(domain.names):
    if i in parents and not (mask == i + 1).any():
      return f"no {alone.get((i + 1,), f'{name} alone')}"
  for region in regions.values() if domain.whole else ():
    if region[[0, -1]].any() or region[:, [0, -1]].any():
      return "outside"
  for name, region in regions.items():
    if _solidity(region) < min_solidity:
      return f"ragged {name}"
  return None


def _solidity(region: np.ndarray) -> float:
  """Area over the convex hull's area, both counted in pixels."""
  rows = np.flatnonzero(region.any(axis=1))
  region, rows = region[rows[0] : rows[-1] + 1], rows - rows[0]
  first = region[rows].argmax(axis=1)
  last = region.shape[1] - 1 - region[rows, ::-1].argmax(axis=1)
  ends = np.concatenate([np.stack([x, rows], 1) for x in (first, last)])
  filled = np.zeros(region.shape, np.uint8)
  cv2.fillConvexPoly(filled, cv2.convexHull(ends.astype(np.int32)), 1)
  return np.count_nonzero(region) / np.count_nonzero(filled)


def signed_distance(region: np.ndarray) -> np.ndarray:
  """Pixels inside a region's edge, < 0 outside it: float32 [H, W].

  Args:
    region: bool [H, W]; the image's border is no edge.
  """
  inside, outside = (
    cv2.distanceTransform(
      side.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE
    )
    for side in (region, ~region)
  )
  return np.where(region, inside - 0.5, 0.5 - outside)
