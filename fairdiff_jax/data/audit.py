"""What masks show: whether one is the mask of an eye, how deep pixels lie."""

import cv2
import numpy as np

CUP = 2


def mask_fault(mask: np.ndarray, *, min_solidity: float) -> str | None:
  """What is wrong with a mask, or None.

  Args:
    mask: uint8 [H, W], 0 background, 1 rim, 2 cup.
    min_solidity: least area of disc and of cup as a share of their convex
      hulls' areas.

  Returns:
    'no disc', 'no cup', 'no rim', 'outside' (the disc touches the border),
    'ragged disc' or 'ragged cup'; None for a sound mask.
  """
  disc, cup = mask > 0, mask == CUP
  if not disc.any():
    return "no disc"
  if not cup.any():
    return "no cup"
  if np.array_equal(disc, cup):
    return "no rim"
  if disc[[0, -1]].any() or disc[:, [0, -1]].any():
    return "outside"
  for name, region in (("disc", disc), ("cup", cup)):
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
