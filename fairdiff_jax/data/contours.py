"""Masks as point clouds and back.

The contours of a label's structures are closed curves. Sampled, they become a
cloud of N points p = (row, column, z), which a point-cloud diffusion can
generate; the height z names the structure, from -5 for the first to +5 for the
last, evenly spread (the disc -5, the cup +5), and the nearest height counts:

    mask -> outer sub-pixel contours {m = 1/2} -> N points farthest apart
    cloud -> classes by sign(z) -> polygons by angle -> mask

Farthest-point sampling (Eldar et al., 1997) starts from p_0 and repeats
p_k = argmax_q min_{j<k} |q - p_j|, so points spread evenly over both curves.
On the way back each class is sorted by angle about its centroid, which
recovers any star-shaped curve from an unordered cloud, and a pixel belongs to
the polygon when its centre does (even-odd rule). Coordinates are in pixels
with pixel centres at integers.

That is the rule of a disc and a cup in it (parents (None, 0)). Any other
structures may be concave, hollow, in pieces or cut by the border: all their
curves are sampled evenly by arc length, and drawn by linking near points first,
so that every point gets two neighbours; 2-opt undoes crossings. Curves within
curves are holes, by the even-odd rule.

A mask of structures holds classes: 0 background, i + 1 what structure i has
painted last. `parents` gives, for each structure in painting order, the earlier
one that it lies within or None; its region is its class and those within it.

Cloud format after Li et al., "FairDiff: Fair Segmentation with Point-Image
Diffusion", MICCAI 2024.
"""

import cv2
import numpy as np
from scipy import spatial

Parents = tuple[int | None, ...]

FUNDUS: Parents = (None, 0)
DISC_Z = -5.0
CUP_Z = 5.0
# Points that every curve gets where there are enough, links tried per point,
# and the longest link that a curve starts from, in usual gaps.
_FEWEST = 8
_LINKS = 10
_REACH = 3.0
# Least Dice of disc and of cup that a mask's cloud must give back. Real eyes
# reach .99 with 128 points, and eyes of 16 pixels .9 with 32; a mask of two
# discs has .67, a cup beside its disc 0.
LEAST_DICE = 0.8


def heights(parents: Parents) -> np.ndarray:
  """z of every structure's points, [S]; 0 for a single one."""
  count = len(parents)
  return np.linspace(DISC_Z, CUP_Z, count) if count > 1 else np.zeros(count)


def regions(mask: np.ndarray, parents: Parents = FUNDUS) -> list[np.ndarray]:
  """Every structure's pixels and those of all within it: S of bool [H, W]."""
  own = [mask == i + 1 for i in range(len(parents))]
  # Children come after their parents, so the last pass theirs on first.
  for i in range(len(parents) - 1, -1, -1):
    if parents[i] is not None:
      own[parents[i]] = own[parents[i]] | own[i]
  return own


def complete(mask: np.ndarray, parents: Parents = FUNDUS) -> bool:
  """Whether a mask shows every structure, as the mask generator needs."""
  return all(inside.any() for inside in regions(mask, parents))


def mask_to_points(
  mask: np.ndarray,
  num_points: int | None = 512,
  parents: Parents = FUNDUS,
  *,
  missing_ok: bool = False,
) -> np.ndarray:
  """Samples the contours of all structures.

  Of disc and cup, the component that encloses most is kept, and holes are
  ignored; of other structures all curves are sampled, each by its length, the
  longest first where the points do not suffice for three each.

  Args:
    mask: [H, W], classes; of a fundus 0 background, 1 rim, 2 cup.
    num_points: N, points of all contours together; None for all there are.
    parents: of every structure, the one that it lies within, or None.
    missing_ok: structures may be missing: the others share all points, and an
      empty mask gives copies of the image's centre, which enclose nothing.

  Returns:
    [N, 3] float32 (row, column, z), in pixels; z is the structure's of
    `heights`.

  Raises:
    ValueError: the mask is not [H, W] with a class in each pixel, or it lacks
      a structure that may not be missing.
  """
  mask = np.asarray(mask)
  if mask.ndim != 2:
    raise ValueError(
      f"mask must be one [H, W] image, not of shape {mask.shape};"
      " pass masks one at a time"
    )
  if num_points is not None and num_points < 2:
    raise ValueError(f"num_points must be at least 2, not {num_points}")
  fundus = parents == FUNDUS
  if mask.size and (mask.min() < 0 or mask.max() > len(parents)):
    known = "0 background, 1 rim, 2 cup" if fundus else f"0 to {len(parents)}"
    raise ValueError(
      f"mask values must be {known}, not from {mask.min()}"
      f" to {mask.max()}; convert the mask first (files store 0, -1, -2)"
    )
  every = regions(mask, parents)
  missing = [i for i, inside in enumerate(every) if not inside.any()]
  if missing and not missing_ok:
    name = ("disc", "cup")[missing[0]] if fundus else f"class {missing[0] + 1}"
    raise ValueError(
      f"the mask shows no {name}, so it has no {name} contour to sample;"
      " leave this case out, or check how the mask's values are read"
    )
  if not fundus or missing:
    return _sample_all(every, num_points, heights(parents))
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


def points_to_mask(
  points: np.ndarray, shape: tuple[int, int], parents: Parents = FUNDUS
) -> np.ndarray:
  """Fills the contours of a cloud.

  A structure is painted only where its parent is. What lies outside the image
  is clipped, and a class of fewer than three points is empty, so any finite
  cloud gives a valid mask.

  Args:
    points: [N, 3] float32 (row, column, z), in pixels; the structure is the
      nearest by `heights`, and half-way between two of them it is none.
    shape: (H, W) of the mask.
    parents: of every structure, the one that it lies within, or None.

  Returns:
    [H, W] uint8 classes; of a fundus 0 background, 1 rim, 2 cup.

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
  mask = np.zeros(shape, np.uint8)
  painted = []
  for i, member in enumerate(_members(points, parents)):
    curve = points[member, :2]
    loops = [_by_angle(curve)] if parents == FUNDUS else _loops(curve)
    inside = _fill([curve[order] for order in loops], shape).astype(bool)
    if parents[i] is not None:
      inside &= painted[parents[i]]
    painted.append(inside)
    mask[inside] = i + 1
  return mask


def round_trip(
  mask: np.ndarray, points: np.ndarray, parents: Parents = FUNDUS
) -> tuple[float, ...]:
  """Dice between a mask and what its cloud gives back.

  Args:
    mask: [H, W], classes.
    points: [N, 3] as `mask_to_points` gives them.
    parents: of every structure, the one that it lies within, or None.

  Returns:
    First of every structure's region, then of the own class of every structure
    that others lie within; of a fundus: disc, cup and rim. What neither shows
    has 1.
  """
  back = points_to_mask(points, mask.shape, parents)
  pairs = list(zip(regions(mask, parents), regions(back, parents), strict=True))
  pairs += [
    (mask == i + 1, back == i + 1) for i in range(len(parents)) if i in parents
  ]
  return tuple(_dice(a, b) for a, b in pairs)


def round_trip_fault(
  mask: np.ndarray,
  points: np.ndarray,
  dice: tuple[float, ...],
  parents: Parents = FUNDUS,
  names: tuple[str, ...] = ("disc", "cup"),
) -> str | None:
  """Why a cloud does not stand for its mask, None where it does.

  Args:
    mask: [H, W], classes.
    points: [N, 3], its cloud.
    dice: `round_trip` of the two; every structure must reach LEAST_DICE.
    parents: of every structure, the one that it lies within, or None.
    names: of the structures.
  """
  if parents != FUNDUS:
    least = int(np.argmin(dice[: len(parents)]))
    if dice[least] >= LEAST_DICE:
      return None
    return (
      f"its points do not give its mask back (Dice of the {names[least]}"
      f" {dice[least]:.2f}; needed is {LEAST_DICE:.2f}): {len(points)} points"
      " are too few for its curves; raise data.num_points, or remove specks"
      " from the mask."
    )
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


def smooth_contours(
  points: np.ndarray, harmonics: int, parents: Parents = FUNDUS
) -> np.ndarray:
  """Draws each class of a noisy cloud onto a smooth closed curve.

  The radius about the class's centre becomes the Fourier series of the angle
  that fits best, r(a) = c_0 + sum_k c_k cos(k a) + s_k sin(k a): a generator
  that is a pixel or two off in each point still knows the curve. Where curves
  need not be star-shaped, row and column are such series of the arc length.

  Args:
    points: [N, 3] finite (row, column, z), in pixels.
    harmonics: K; 2 for ellipses, more for finer shapes.
    parents: of every structure, the one that it lies within, or None.

  Returns:
    [N, 3] float32; classes with too few points to fit are left as they are.
  """
  points = np.array(points, np.float32)
  for member in _members(points, parents):
    if parents != FUNDUS:
      points[member, :2] = _smooth_loops(points[member, :2], harmonics)
      continue
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


def _smooth_loops(points: np.ndarray, harmonics: int) -> np.ndarray:
  """[M, 2] points, each curve a Fourier series of its arc length."""
  points = points.astype(np.float64)
  for order in _loops(points):
    curve = points[order]
    steps = np.linalg.norm(np.roll(curve, -1, axis=0) - curve, axis=1)
    if len(order) < 4 * (2 * harmonics + 1) or not steps.any():
      continue
    angle = 2 * np.pi * (np.cumsum(steps) - steps) / steps.sum()
    waves = angle[:, None] * np.arange(1, harmonics + 1)
    basis = np.hstack([np.ones((len(order), 1)), np.cos(waves), np.sin(waves)])
    points[order] = basis @ np.linalg.lstsq(basis, curve, rcond=None)[0]
  return points


def _members(points: np.ndarray, parents: Parents) -> list[np.ndarray]:
  """Which of [N, 3] points are each structure's: S of bool [N]."""
  levels = heights(parents)
  middle = (levels[1:] + levels[:-1]) / 2
  low = np.concatenate([[-np.inf], middle])
  high = np.concatenate([middle, [np.inf]])
  z = points[:, 2]
  return [(z > a) & (z < b) for a, b in zip(low, high, strict=True)]


def _sample_all(
  every: list[np.ndarray], num_points: int | None, levels: np.ndarray
) -> np.ndarray:
  """Points [N, 3] of all curves of S regions, evenly by arc length."""
  curves = [
    np.insert(curve - 1, 2, z, axis=1)
    for inside, z in zip(every, levels, strict=True)
    for curve in _contours(np.pad(inside, 1), cv2.RETR_CCOMP)
  ]
  if not curves:
    center = [*((np.array(every[0].shape) - 1) / 2), 0]
    return np.tile(np.float32(center), (num_points or 0, 1))
  if num_points is None:
    return np.concatenate(curves).astype(np.float32)
  sides = [
    np.linalg.norm(np.roll(curve, -1, axis=0) - curve, axis=1)
    for curve in curves
  ]
  length = np.array([side.sum() for side in sides])
  kept = np.argsort(-length, kind="stable")[: max(1, num_points // 3)]
  fewest = min(_FEWEST, num_points // len(kept))
  share = (num_points - fewest * len(kept)) * length[kept] / length[kept].sum()
  count = fewest + share.astype(int)
  # What rounding leaves goes to the longest.
  count[: num_points - count.sum()] += 1
  cloud = []
  for k, n in zip(kept, count, strict=True):
    closed = np.concatenate([curves[k], curves[k][:1]])
    along = np.concatenate([[0], np.cumsum(sides[k])])
    t = np.arange(n) * along[-1] / n
    cloud.append(np.stack([np.interp(t, along, x) for x in closed.T], axis=1))
  return np.concatenate(cloud).astype(np.float32)


def _by_angle(points: np.ndarray) -> np.ndarray:
  """Order of [M, 2] points by angle about their centre."""
  if not len(points):
    return np.zeros(0, np.intp)
  offset = points - points.mean(axis=0)
  return np.argsort(np.arctan2(*offset.T), kind="stable")


def _loops(points: np.ndarray) -> list[np.ndarray]:
  """Closed curves through unordered [M, 2] points: the order along each.

  The shortest links come first, until each point has two; what stays open is
  closed end to nearest end. Points far from all others belong to no curve.
  """
  count = len(points)
  if count < 3:
    return []
  distance, near = spatial.KDTree(points).query(points, min(_LINKS, count))
  reach = _REACH * np.median(distance[:, 2])
  first = np.repeat(np.arange(count), near.shape[1])
  pairs = np.stack([first, near.ravel()], axis=1)
  use = (pairs[:, 0] < pairs[:, 1]) & (distance.ravel() <= reach)
  pairs = pairs[use][np.argsort(distance.ravel()[use], kind="stable")]
  links = [[] for _ in range(count)]
  part = list(range(count))  # of every point, its chain
  chain = [[i] for i in range(count)]

  def link(pairs, smallest):
    for a, b in pairs.tolist():
      if len(links[a]) == 2 or len(links[b]) == 2:
        continue
      p, q = part[a], part[b]
      if p == q:
        if len(chain[p]) < smallest:
          continue
      else:
        if len(chain[p]) < len(chain[q]):
          p, q = q, p
        for k in chain[q]:
          part[k] = p
        chain[p] += chain[q]
      links[a].append(b)
      links[b].append(a)

  link(pairs, min(5, count))
  ends = np.array([i for i in range(count) if len(links[i]) == 1], np.intp)
  a, b = np.triu_indices(len(ends), 1)
  pairs = np.stack([ends[a], ends[b]], axis=1)
  gap = np.linalg.norm(points[pairs[:, 0]] - points[pairs[:, 1]], axis=1)
  link(pairs[np.argsort(gap, kind="stable")], 3)

  loops, seen = [], set()
  for start in range(count):
    if start in seen or len(links[start]) < 2:
      continue
    order, last, here = [], None, start
    while here is not None and here not in seen:
      order.append(here)
      seen.add(here)
      step = [k for k in links[here] if k != last]
      last, here = here, step[0] if step else None
    if len(order) > 2:
      loops.append(_uncrossed(points, np.array(order)))
  return loops


def _uncrossed(points: np.ndarray, order: np.ndarray) -> np.ndarray:
  """A closed tour shortened by 2-opt: best exchange first, a few at most."""
  for _ in range(min(20, len(order) - 3)):
    here = points[order]
    after = np.roll(here, -1, axis=0)
    step = np.linalg.norm(after - here, axis=1)
    # Exchanges that matter start at links longer than usual.
    odd = np.argsort(-step, kind="stable")[:32]
    odd = odd[step[odd] > 1.5 * np.median(step)]
    if not len(odd):
      break
    gain = (
      step[odd, None]
      + step
      - np.linalg.norm(here[odd, None] - here, axis=-1)
      - np.linalg.norm(after[odd, None] - after, axis=-1)
    )
    k = gain.argmax()
    if gain.flat[k] < 1e-9:
      break
    i, j = sorted((odd[k // len(order)], k % len(order)))
    order[i + 1 : j + 1] = order[i + 1 : j + 1][::-1].copy()
  return order


def _dice(a: np.ndarray, b: np.ndarray) -> float:
  """Dice of two regions, 1 if both are empty."""
  total = np.count_nonzero(a) + np.count_nonzero(b)
  return 2 * np.count_nonzero(a & b) / total if total else 1.0


def _outer_contour(inside: np.ndarray) -> np.ndarray:
  """The half-level contour of [H, W] that encloses most: [M, 2], not closed."""
  return max(
    _contours(inside, cv2.RETR_EXTERNAL),
    key=lambda curve: cv2.contourArea((2 * curve).astype(np.int32)),
  )


def _contours(inside: np.ndarray, mode: int) -> list[np.ndarray]:
  """The half-level contours of [H, W], each [M, 2], not closed.

  On a grid twice as fine, with pixel centres at even indices and the links
  between neighbours filled in, the region is grown by one step up, down, left
  and right. Its border pixels are then the half-way points to the background.
  """
  fine = inside.repeat(2, axis=0).repeat(2, axis=1)
  linked = fine[1:, 1:] & fine[1:, :-1] & fine[:-1, 1:] & fine[:-1, :-1]
  cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
  grown = cv2.dilate(linked.astype(np.uint8), cross)
  borders, _ = cv2.findContours(grown, mode, cv2.CHAIN_APPROX_NONE)
  return [border[:, 0, ::-1] / 2 for border in borders]


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


def _fill(loops: list[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
  """Fills the polygons, each [M, 2], by the even-odd rule: uint8 [H, W].

  Every side crosses some pixel rows; a crossing at column x flips all pixels
  from ceil(x) on, so the running parity of the flips is the filled polygon.
  """
  height, width = shape
  mask = np.zeros(shape, np.uint8)
  loops = [loop for loop in loops if len(loop) >= 3]
  if not loops:
    return mask
  r0, c0 = np.concatenate(loops).T
  r1, c1 = np.concatenate([np.roll(loop, -1, axis=0) for loop in loops]).T

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
