"""A run's segmenter as a function of images, compiled once."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import cv2
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from scipy.special import softmax

from fairdiff_jax.data.examine import centre_of, resize
from fairdiff_jax.data.loader import normalize
from fairdiff_jax.data.table import to_uint8
from fairdiff_jax.objectives.task import Variables
from fairdiff_jax.training.checkpoint import Inference
from fairdiff_jax.training.mesh import BATCH, in_batches, map_batch
from fairdiff_jax.training.setup import Setup
from fairdiff_jax.training.trained import Trained


def label(
  scores: Callable[[np.ndarray], np.ndarray],
  images: np.ndarray,
  batch_size: int,
) -> np.ndarray:
  """Classes uint8 [n, H, W] of prepared images uint8 [n, H, W(, 3)]."""
  if not len(images):
    return np.empty(images.shape[:3], np.uint8)
  return in_batches(
    lambda x: scores(x).argmax(-1).astype(np.uint8), images, batch_size
  )


class Fitted(NamedTuple):
  """An image as the network takes it.

  Attributes:
    image: uint8 of the prepared size.
    shape: of the image that was given, (H, W).
    centre: where in it lies what the network sees.
  """

  image: np.ndarray
  shape: tuple[int, int]
  centre: tuple[slice, slice]


def compile_segmenter(
  run: Setup, batch_size: int
) -> Callable[[Variables, np.ndarray], np.ndarray]:
  """Compiles a run's segmenter.

  Args:
    run: set-up of the run.
    batch_size: images at a time. Every batch is padded to it, so that there is
      one program, and figures do not depend on how many images there are.

  Returns:
    (variables, prepared images uint8 [b, H, W(, 3)]) -> scores float32 [b, H,
    W, classes], on every host, b at most the batch size.
  """
  mesh, size = run.mesh, -(-batch_size // run.mesh.size) * run.mesh.size
  shape = (size, *run.config.data.size, run.domain.channels)
  rows, whole = (NamedSharding(mesh, s) for s in (BATCH, PartitionSpec()))
  with jax.set_mesh(mesh):  # kernels ask for it
    compiled = (
      jax.jit(run.objective.tasks["segmenter"].logits, out_shardings=whole)
      .lower(
        Inference.of(run.abstract).network("segmenter"),
        jax.ShapeDtypeStruct(shape, np.float32, sharding=rows),
      )
      .compile()
    )

  def scores(variables, images):
    function = partial(compiled, variables)
    return map_batch(function, [normalize(images)], mesh, batch_size)

  return scores


class Predictor:
  """A run's segmenter, for batches of one size.

  Args:
    trained: the run.
    batch_size: images at a time; None for the run's `evaluation.batch_size`.

  Raises:
    ValueError: the run trains no segmenter.
  """

  def __init__(self, trained: Trained, batch_size: int | None = None):
    config, run = trained.config, trained.setup
    if "segmenter" not in run.objective.tasks:
      raise ValueError(
        f"the run in {trained.layout.workdir} trains no segmenter"
        " (train.segmenter is empty); take a run that does"
      )
    self._data = config.data
    self._channels = trained.domain.channels
    self.batch_size = batch_size or config.evaluation.batch_size
    # Scores float32 [b, H, W, classes] of at most a batch.
    self._logits = partial(
      compile_segmenter(run, self.batch_size),
      trained.inference.network("segmenter"),
    )
    self._pooled = partial(
      jax.jit(
        run.objective.tasks["segmenter"].features,
        out_shardings=NamedSharding(run.mesh, PartitionSpec()),
      ),
      trained.inference.network("segmenter"),
    )
    self._mesh = run.mesh

  def __call__(self, images: np.ndarray) -> np.ndarray:
    """Classes uint8 [n, H, W] of prepared images uint8 [n, H, W(, 3)]."""
    return label(self._logits, images, self.batch_size)

  def features(self, images: np.ndarray) -> np.ndarray:
    """What the network sees in prepared images, pooled: float32 [n, F]."""
    return in_batches(
      lambda x: map_batch(
        self._pooled, [normalize(x)], self._mesh, self.batch_size
      ),
      *(images, self.batch_size),
    )

  def segment(
    self, images: Sequence[np.ndarray], *, probabilities: bool = False
  ) -> Iterator[np.ndarray]:
    """The masks of images of any sizes, each at its own.

    An image is prepared as the training images were: its centre of `data.crop`
    is resized to `data.size`; what lies beyond is background. One that is of
    that size is taken as it is.

    Args:
      images: each [H, W] or [H, W, 3]: uint8, floats from 0 to 1, or other
        numbers, which are scaled as those of files are (`data.table`).
      probabilities: yield float32 [H, W, classes] instead.

    Yields:
      Classes uint8 [H, W], in the order of the images.

    Raises:
      ValueError: one is no image, or smaller than the crop; all are looked at
        before the first is segmented.
    """
    fitted = [self.fit(image, f"image {i}") for i, image in enumerate(images)]
    return self.segment_fitted(fitted, probabilities)

  def segment_fitted(
    self, fitted: Sequence[Fitted], probabilities: bool = False
  ) -> Iterator[np.ndarray]:
    """As `segment`, of what `fit` returns."""
    for i in range(0, len(fitted), self.batch_size):
      batch = fitted[i : i + self.batch_size]
      scores = self._logits(np.stack([of.image for of in batch]))
      for of, score in zip(batch, scores, strict=True):
        yield self._place(of, score, probabilities)

  def fit(self, image: np.ndarray, what: str) -> Fitted:
    """An image as the network takes it; `what` names it in messages.

    Raises: see `segment`.
    """
    pixels = np.asarray(image)
    if pixels.dtype.kind not in "uif":
      raise ValueError(f"{what} holds {pixels.dtype}, which are no numbers")
    floats = pixels.dtype.kind == "f" and pixels.size
    if floats and pixels.min() >= 0 and pixels.max() <= 1:
      pixels = np.rint(255 * pixels).astype(np.uint8)
    pixels = to_uint8(pixels, self._channels, what)
    shape, size = pixels.shape[:2], tuple(self._data.size)
    centre = centre_of(shape, ())
    if shape != size:
      crop = tuple(self._data.crop)
      if crop and any(new > old for new, old in zip(crop, shape, strict=True)):
        raise ValueError(
          f"{what} is {shape[0]} x {shape[1]}, smaller than the run's crop of"
          f" {crop[0]} x {crop[1]}; give it whole, or prepared at {size[0]} x"
          f" {size[1]}"
        )
      centre = centre_of(shape, crop)
      pixels = resize(pixels[centre], size)
    return Fitted(pixels, shape, centre)

  def _place(self, of: Fitted, scores: np.ndarray, probabilities: bool):
    """What was found, in the image that was given."""
    height, width = (s.stop - s.start for s in of.centre)
    if scores.shape[:2] != (height, width):
      scores = cv2.resize(scores, (width, height))
    if not probabilities:
      mask = np.zeros(of.shape, np.uint8)
      mask[of.centre] = scores.argmax(-1)
      return mask
    found = np.zeros((*of.shape, scores.shape[-1]), np.float32)
    found[..., 0] = 1
    found[of.centre] = softmax(scores, axis=-1)
    return found
