"""Is a mask, made up or real, the mask of an eye?"""

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
