"""Masks as point clouds and back.

A label of nested disc and cup is two closed curves. Sampled, they become a
cloud of N points p = (row, column, z), the height z = -5 naming the disc's
curve and z = +5 the cup's, which a point-cloud diffusion can generate:

    mask -> outer sub-pixel contours {m = 1/2} -> N points farthest apart
    cloud -> classes by sign(z) -> polygons by angle -> mask

Farthest-point sampling (Eldar et al., 1997) starts from p_0 and repeats
p_k = argmax_q min_{j<k} |q - p_j|, so points spread evenly over both curves.
On the way back each class is sorted by angle about its centroid, which
recovers any star-shaped curve from an unordered cloud, and a pixel belongs to
the polygon when its centre does (even-odd rule). Coordinates are in pixels
with pixel centres at integers.

Cloud format after Li et al., "FairDiff: Fair Segmentation with Point-Image
Diffusion", MICCAI 2024.
"""

import cv2
import numpy as np

DISC_Z = -5.0
CUP_Z = 5.0
# Least Dice of disc and of cup that a mask's cloud must give back. Real eyes
# reach .99 with 128 points, and eyes of 16 pixels .9 with 32; a mask of two
# discs has .67, a cup beside its disc 0.
LEAST_DICE = 0.8


def mask_to_points(
  mask: np.ndarray, num_points: int | None = 512
) -> np.ndarray:
  """Samples the outer contours of disc and cup.

  Of several components the one that encloses most is kept; holes are ignored.
  Contours with too few vertices are subdivided, so any mask that shows both
  structures gives a full cloud.

  Args:
    mask: [H, W], 0 background, 1 rim, 2 cup; the disc is rim and cup.
    num_points: N, points of both contours together; None for all there are.

  Returns:
    [N, 3] float32 (row, column, z), in pixels; z is -5 on the disc's contour
    and +5 on the cup's.

  Raises:
    ValueError: the mask is not [H, W] with values 0, 1 and 2, or it shows no
      disc or no cup.
  """
  mask = np.asarray(mask)
  if mask.ndim != 2:
    raise ValueError(
      f"mask must be one [H, W] image, not of shape {mask.shape};"
      " pass masks one at a time"
    )
  if num_points is not None and num_points < 2:
    raise ValueError(f"num_points must be at least 2, not {num_points}")
  if mask.size and (mask.min() < 0 or mask.max() > 2):
    raise ValueError(
      f"mask values must be 0 background, 1 rim, 2 cup, not from {mask.min()}"
      f" to {mask.max()}; convert the mask first (files store 0, -1, -2)"
    )
  for name, inside in (("disc", mask > 0), ("cup", mask == 2)):
    if not inside.any():
      raise ValueError(
        f"the mask shows no {name}, so it has no {name} contour to sample;"
        " leave this case out, or check how the mask's values are read"
      )
  rows, columns = (np.flatnonzero((mask > 0).any(axis=k)) for k in (1, 0))
  # The margin closes every contour, also at the image's border.
  box = np.pad(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], 1)
  curves = [
    (_outer_contour(box > 0), DISC_Z),
    (_outer_contour(box == 2), CUP_Z),
  ]
  if num_points is None:
    parts = 1
  else:
    parts = -(-num_points // sum(len(curve) for curve, _ in curves))
  cloud = np.concatenate(
    [np.insert(_subdivide(curve, parts), 2, z, axis=1) for curve, z in curves]
  )
  if num_points is not None:
    cloud = _farthest_points(cloud, num_points)
  corner = np.array([rows[0] - 1, columns[0] - 1, 0])
  return (cloud + corner).astype(np.float32)


def points_to_mask(points: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
  """Fills the contours of a cloud.

  The cup is painted only where the disc is. What lies outside the image is
  clipped, and a class of fewer than three points is empty, so any finite
  cloud gives a valid mask.

  Args:
    points: [N, 3] float32 (row, column, z), in pixels; z < 0 disc, z > 0 cup,
      z = 0 belongs to neither.
    shape: (H, W) of the mask.

  Returns:
    [H, W] uint8, 0 background, 1 rim, 2 cup.

  Raises:
    ValueError: the points are not [N, 3] or not finite.
  """
  points = np.asarray(points, np.float64)
  if points.ndim != 2 or points.shape[1] != 3:
    raise ValueError(
      f"points must be one [N, 3] cloud, not of shape {points.shape};"
      " pass clouds one at a time"
    )
  if not np.isfinite(points).all():
    bad = int((~np.isfinite(points).all(axis=1)).sum())
    raise ValueError(
      f"{bad} of {len(points)} points are not finite; the model that generated"
      " this cloud has diverged: use an earlier checkpoint, or drop the cloud"
    )
  mask = _fill(points[points[:, 2] < 0, :2], shape)
  mask += mask & _fill(points[points[:, 2] > 0, :2], shape)
  return mask


def round_trip(
  mask: np.ndarray, points: np.ndarray
) -> tuple[float, float, float]:
  """Dice of disc, cup and rim between a mask and what its cloud gives back.

  Args:
    mask: [H, W], 0 background, 1 rim, 2 cup.
    points: [N, 3] as `mask_to_points` gives them.
  """
  back = points_to_mask(points, mask.shape)
  pairs = ((mask > 0, back > 0), (mask == 2, back == 2), (mask == 1, back == 1))
  return tuple(_dice(a, b) for a, b in pairs)


def round_trip_fault(
  mask: np.ndarray, points: np.ndarray, dice: tuple[float, float, float]
) -> str | None:
  """Why a cloud does not stand for its mask, None where it does.

  Args:
    mask: [H, W], 0 background, 1 rim, 2 cup.
    points: [N, 3], its cloud.
    dice: `round_trip` of the two; disc and cup must reach LEAST_DICE.
  """
  disc, cup, _ = dice
  if min(disc, cup) >= LEAST_DICE:
    return None
  discs, cups = (
    cv2.connectedComponents(inside.astype(np.uint8), connectivity=8)[0] - 1
    for inside in (mask > 0, mask == 2)
  )
  if max(discs, cups) > 1:
    why = (
      "a cloud has one curve for the disc and one for the cup, and here are "
      f"discs: {discs}, cups: {cups}; keep one of each"
    )
  elif min(round_trip(mask, mask_to_points(mask, None))[:2]) >= LEAST_DICE:
    why = f"{len(points)} points are too few for it; raise data.num_points"
  else:
    why = (
      "a curve is drawn by angle about its centre, and here one turns back; "
      "correct the mask"
    )
  return (
    f"its points do not give its mask back (Dice of the disc {disc:.2f}, of the"
    f" cup {cup:.2f}; needed is {LEAST_DICE:.2f}): {why}."
  )


def smooth_contours(points: np.ndarray, harmonics: int) -> np.ndarray:
  """Draws each class of a noisy cloud onto a smooth closed curve.

  The radius about the class's centre becomes the Fourier series of the angle
  that fits best, r(a) = c_0 + sum_k c_k cos(k a) + s_k sin(k a): a generator
  that is a pixel or two off in each point still knows the curve.

  Args:
    points: [N, 3] finite (row, column, z), in pixels.
    harmonics: K; 2 for ellipses, more for finer shapes.

  Returns:
    [N, 3] float32; classes with too few points to fit are left as they are.
  """
  points = np.array(points, np.float32)
  for member in (points[:, 2] < 0, points[:, 2] > 0):
    if member.sum() < 4 * (2 * harmonics + 1):
      continue
    curve = points[member, :2].astype(np.float64)
    # The first harmonic is mostly an off-centre origin: move there, refit.
    center = curve.mean(axis=0)
    for _ in range(3):
      row, column = (curve - center).T
      angle = np.arctan2(row, column)
      waves = np.arange(1, harmonics + 1)[:, None] * angle
      basis = np.concatenate([np.ones((1, len(angle))), np.cos(waves)])
      basis = np.concatenate([basis, np.sin(waves)])
      fit = np.linalg.lstsq(basis.T, np.hypot(row, column), rcond=None)[0]
      center += [fit[1 + harmonics], fit[1]]
    radius = np.maximum(fit @ basis, 0)
    points[member, 0] = center[0] - fit[1 + harmonics] + radius * np.sin(angle)
    points[member, 1] = center[1] - fit[1] + radius * np.cos(angle)
  return points


def _dice(a: np.ndarray, b: np.ndarray) -> float:
  """Dice of two regions, 1 if both are empty."""
  total = np.count_nonzero(a) + np.count_nonzero(b)
  return 2 * np.count_nonzero(a & b) / total if total else 1.0


def _outer_contour(inside: np.ndarray) -> np.ndarray:
  """The half-level contour of [H, W] that encloses most: [M, 2], not closed.

  On a grid twice as fine, with pixel centres at even indices and the links
  between neighbours filled in, the region is grown by one step up, down, left
  and right. Its border pixels are then the half-way points to the background.
  """
  fine = inside.repeat(2, axis=0).repeat(2, axis=1)
  linked = fine[1:, 1:] & fine[1:, :-1] & fine[:-1, 1:] & fine[:-1, :-1]
  cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
  grown = cv2.dilate(linked.astype(np.uint8), cross)
  borders, _ = cv2.findContours(grown, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
  largest = max(borders, key=cv2.contourArea)
  return largest[:, 0, ::-1] / 2


def _subdivide(curve: np.ndarray, parts: int) -> np.ndarray:
  """Cuts each side of the closed polygon [M, 2] evenly: [M * parts, 2]."""
  t = np.arange(parts)[:, None] / parts
  sides = np.roll(curve, -1, axis=0) - curve
  return (curve[:, None] + t * sides[:, None]).reshape(-1, 2)


def _farthest_points(cloud: np.ndarray, count: int) -> np.ndarray:
  """Farthest-point sample [count, D] of [M, D], from the first point on."""
  columns = np.ascontiguousarray(cloud.T)
  chosen = np.zeros(count, np.intp)
  nearest = np.full(len(cloud), np.inf)
  for k in range(1, count):
    difference = columns - columns[:, chosen[k - 1], None]
    np.minimum(
      nearest, np.einsum("dm,dm->m", difference, difference), out=nearest
    )
    chosen[k] = nearest.argmax()
  return cloud[chosen]


def _fill(points: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
  """Fills the polygon through [M, 2] points in order of angle: uint8 [H, W].

  Every side crosses some pixel rows; a crossing at column x flips all pixels
  from ceil(x) on, so the running parity of the flips is the filled polygon.
  """
  height, width = shape
  mask = np.zeros(shape, np.uint8)
  if len(points) < 3:
    return mask
  offset = points - points.mean(axis=0)
  r0, c0 = points[np.argsort(np.arctan2(*offset.T), kind="stable")].T
  r1, c1 = np.roll(r0, -1), np.roll(c0, -1)

  first = np.clip(np.ceil(np.minimum(r0, r1)), 0, height).astype(int)
  last = np.clip(np.ceil(np.maximum(r0, r1)), 0, height).astype(int)
  crossed = last - first
  if not crossed.any():
    return mask
  side = np.repeat(np.arange(len(r0)), crossed)
  start = np.cumsum(crossed) - crossed
  row = np.arange(len(side)) - start[side] + first[side]
  slope = (c1 - c0)[side] / (r1 - r0)[side]
  x = c0[side] + (row - r0[side]) * slope
  column = np.clip(np.ceil(x), 0, width).astype(int)

  top, left = row.min(), column.min()
  box = row.max() + 1 - top, column.max() + 1 - left
  flips = np.bincount(
    (row - top) * box[1] + column - left, minlength=box[0] * box[1]
  ).reshape(box)
  inside = np.cumsum(flips, axis=1, dtype=np.uint8)[:, :-1] & 1
  mask[top : top + box[0], left : left + box[1] - 1] = inside
  return mask
