"""Pictures of cases: outlines of their structures, contact sheets."""

from collections.abc import Mapping, Sequence

import cv2
import numpy as np

from fairdiff_jax.data.domain import FUNDUS, Domain

SHOWN = 8  # cases of a row
TILE = 160  # least side of a case, in pixels
LARGEST = 320  # longest side of one
# Of structures' outlines, BGR.
COLOURS = (
  *((0, 159, 230), (233, 180, 86), (115, 158, 0), (167, 121, 204)),
  *((178, 114, 0), (66, 228, 240), (0, 94, 213)),
)
MARGIN = 2  # pixels around a case


def outlined(
  image: np.ndarray, mask: np.ndarray, domain: Domain = FUNDUS
) -> np.ndarray:
  """An image with its structures' outlines.

  Args:
    image: uint8 [H, W], or RGB [H, W, 3].
    mask: classes [h, w], of the same proportions.
    domain: what the mask shows.

  Returns:
    RGB uint8 [H, W, 3].
  """
  height, width = image.shape[:2]
  drawn = np.ascontiguousarray(_rgb(image))
  for i, region in enumerate(domain.split(mask).values()):
    region = cv2.resize(region.astype(np.float32), (width, height)) > 0.5
    contours, _ = cv2.findContours(
      region.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE
    )
    colour = COLOURS[i % len(COLOURS)][::-1]
    cv2.drawContours(drawn, contours, -1, colour, 1, cv2.LINE_AA)
  return drawn


def contact_sheet(
  rows: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]],
  domain: Domain = FUNDUS,
) -> bytes:
  """Draws (image, mask) pairs by title as PNG, plain over with outlines.

  Args:
    rows: at most `SHOWN` pairs of each title are drawn; sizes may differ.
    domain: what masks show.
  """
  tiles = {
    title: [_tile(*case, domain) for case in cases[:SHOWN]]
    for title, cases in rows.items()
  }
  height, width = np.max(
    [tile.shape[:2] for row in tiles.values() for tile in row], axis=0
  )
  sheet = []
  for title, row in tiles.items():
    strip = np.full((28, SHOWN * width, 3), 255, np.uint8)
    cv2.putText(
      *(strip, title, (6, 20), cv2.FONT_HERSHEY_SIMPLEX),
      *(0.55, (0, 0, 0), 1, cv2.LINE_AA),
    )
    picture = np.full((height, SHOWN * width, 3), 255, np.uint8)
    for i, tile in enumerate(row):
      rows_, columns = tile.shape[:2]
      picture[:rows_, i * width : i * width + columns] = tile
    sheet += [strip, picture]
  found = cv2.cvtColor(np.concatenate(sheet), cv2.COLOR_RGB2BGR)
  return cv2.imencode(".png", found)[1].tobytes()


def _tile(image: np.ndarray, mask: np.ndarray, domain: Domain) -> np.ndarray:
  """A case at the sheet's size, RGB: plain, over it with its outlines."""
  longest = max(image.shape[:2])
  scale = (
    max(1, -(-TILE // longest)) if longest < LARGEST else LARGEST / longest
  )
  size = tuple(max(1, round(scale * side)) for side in image.shape[1::-1])
  method = cv2.INTER_CUBIC if scale >= 1 else cv2.INTER_AREA
  plain = cv2.resize(image, size, interpolation=method)
  return np.concatenate(
    [
      cv2.copyMakeBorder(
        *(picture, *(MARGIN,) * 4, cv2.BORDER_CONSTANT), value=(255,) * 3
      )
      for picture in (_rgb(plain), outlined(plain, mask, domain))
    ]
  )


def _rgb(image: np.ndarray) -> np.ndarray:
  return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB) if image.ndim == 2 else image
