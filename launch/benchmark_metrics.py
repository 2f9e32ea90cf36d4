"""Times the segmentation measures against MedPy's, called case by case.

  python launch/benchmark_metrics.py --cases 2000 --size 512

Both measure Dice, IoU and HD95 of rim, cup and disc. Ours find the pixels of a
class themselves and add the cup-to-disc error; MedPy is given the pixels. They
take turns in one process, chunk by chunk, so that their ratio holds on a noisy
machine. MedPy's cost is linear in the cases and long: it may be timed on the
first few of every chunk.
"""

import importlib.util
import time

import numpy as np
from absl import flags
from fairdiff_jax.launch import cli
from tqdm import tqdm

CHUNK = 50

CASES = flags.DEFINE_integer("cases", 2000, "Cases.", lower_bound=1)
SIZE = flags.DEFINE_integer("size", 512, "Side of a mask.", lower_bound=32)
MEDPY_CASES = flags.DEFINE_integer(
  "medpy_cases", 10, f"Cases of each {CHUNK} that MedPy measures.", 1, CHUNK
)


def random_mask(rng, centre, radius, size):
  """uint8 `[size, size]`: a tilted ellipse (1) with another (2) inside."""
  import cv2

  mask = np.zeros((size, size), np.uint8)
  cup_to_disc = rng.uniform(0.4, 0.7)
  for value, share in ((1, 1), (2, cup_to_disc)):
    axes = share * radius * rng.uniform(0.9, 1.1, 2)
    ellipse = (centre, 2 * axes, rng.uniform(0, 180))
    cv2.ellipse(mask, ellipse, value, cv2.FILLED)
  return mask


def random_pair(rng, size):
  """A label and a prediction whose place and size are a few percent off.

  The disc is a quarter to a third of the side across.
  """
  centre = rng.uniform(0.4, 0.6, 2) * size
  radius = rng.uniform(1 / 8, 1 / 6) * size
  moved = centre + rng.normal(scale=0.01 * size, size=2)
  resized = radius * rng.uniform(0.93, 1.07)
  return (
    random_mask(rng, centre, radius, size),
    random_mask(rng, moved, resized, size),
  )


def ours(labels, predictions):
  """Columns `<class>_<measure>` `[n]`."""
  from fairdiff_jax.evaluation import segmentation

  n = len(labels)
  return segmentation.per_case(
    labels, predictions, [""] * n, np.zeros(n, int), ["all"]
  )


def medpy(regions):
  """The same, without cup-to-disc, from the pixels of every class."""
  from medpy.metric import binary

  functions = {"dice": binary.dc, "iou": binary.jc, "hd95": binary.hd95}
  return {
    f"{cls}_{measure}": [function(b, a) for a, b in zip(*pair, strict=True)]
    for cls, pair in regions.items()
    for measure, function in functions.items()
  }


def main(_):
  if importlib.util.find_spec("medpy") is None:
    raise ImportError("this command needs medpy: pip install medpy")
  from fairdiff_jax.data.domain import FUNDUS

  rng = np.random.default_rng(0)
  seconds = {ours: [], medpy: []}
  difference, medpy_cases = 0.0, 0
  progress = tqdm(total=CASES.value, unit="case")
  while progress.n < CASES.value:
    n = min(CHUNK, CASES.value - progress.n)
    pairs = [random_pair(rng, SIZE.value) for _ in range(n)]
    labels, predictions = np.swapaxes(pairs, 0, 1)
    few = min(n, MEDPY_CASES.value)
    regions = {
      cls: np.isin((labels[:few], predictions[:few]), values)
      for cls, values in FUNDUS.reported_classes.items()
    }
    turns = [(ours, (labels, predictions), n), (medpy, (regions,), few)]
    # Alternating the order keeps a drift of the machine out of the ratios.
    if len(seconds[ours]) % 2:
      turns.reverse()
    columns = {}
    for function, arguments, cases in turns:
      start = time.perf_counter()
      columns[function] = function(*arguments)
      seconds[function].append((time.perf_counter() - start) / cases)
    for name, values in columns[medpy].items():
      error = np.abs(columns[ours][name][:few] - values).max()
      difference = max(difference, error)
    medpy_cases += few
    progress.update(n)
  progress.close()
  print(f"{'':<6}{'cases':>7}{'ms a case':>12}")
  for function, cases in ((ours, CASES.value), (medpy, medpy_cases)):
    middle = 1e3 * np.median(seconds[function])
    print(f"{function.__name__:<6}{cases:7}{middle:12.2f}")
  ratio = np.divide(seconds[medpy], seconds[ours])
  low, middle, high = np.percentile(ratio, [25, 50, 75])
  print(
    f"MedPy takes {middle:.1f} times as long a case (quartiles of "
    f"{len(ratio)} chunks: {low:.1f} to {high:.1f}; MedPy's cost is linear in "
    "the cases).\n"
    f"Largest difference of a measure: {difference:.1e}"
  )


def start():
  cli.run(main)


if __name__ == "__main__":
  start()
