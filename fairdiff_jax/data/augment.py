"""Augmentation of images with their masks, as FairDiff's segmenters use it.

Half the time a random quarter turn and flip; else, half the time, a rotation
by up to 20 degrees, cubic for the image and nearest for the mask.
"""

import cv2
import numpy as np


def augment(
  rng: np.random.Generator,
  image: np.ndarray,
  mask: np.ndarray,
  points: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Augments one case; the shapes stay.

  Args:
    rng: all randomness comes from here.
    image: uint8 [H, W].
    mask: uint8 [H, W].
    points: float32 [N, 3], (row, column, z) in pixels; N may be 0.

  Returns:
    (image, mask, points), turned alike. Images that are not square turn by
    180 degrees, not by 90.
  """
  choice = rng.random()
  height, width = image.shape
  if choice < 0.5:
    turns = rng.integers(4) if height == width else 2 * rng.integers(2)
    axis = rng.integers(2)
    image, mask = (np.flip(np.rot90(x, turns), axis) for x in (image, mask))
    row, column, z = points.T
    for _ in range(turns):
      row, column = width - 1 - column, row
      height, width = width, height
    if axis == 0:
      row = height - 1 - row
    else:
      column = width - 1 - column
    return image, mask, np.stack([row, column, z], axis=-1)
  if choice < 0.75:
    center = ((width - 1) / 2, (height - 1) / 2)
    matrix = cv2.getRotationMatrix2D(center, rng.uniform(-20, 20), 1)
    image, mask = (
      cv2.warpAffine(
        x, matrix, (width, height), flags=flags, borderMode=cv2.BORDER_REFLECT
      )
      for x, flags in ((image, cv2.INTER_CUBIC), (mask, cv2.INTER_NEAREST))
    )
    xy = points[:, 1::-1] @ matrix[:, :2].T + matrix[:, 2]
    points = np.concatenate([xy[:, ::-1], points[:, 2:]], axis=-1)
  return image, mask, points.astype(np.float32)
