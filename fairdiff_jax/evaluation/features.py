"""What sees the images of which a report measures the realism.

The run's segmenter, or a published network that `evaluation.features` names.
Features of real cases that a published one has seen are kept beside the data,
in files that are called after what they are of: the network, its weights and
the images.
"""

import contextlib
import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fairdiff_jax import array_files, files
from fairdiff_jax.pretrained import extractors
from fairdiff_jax.training.mesh import (
  from_first_host,
  in_batches,
  map_batch,
  replicate,
)

SEGMENTER = "segmenter"  # of the run, as `evaluation.features` has it
FOLDER = "features_1"  # changes with what a network makes of images


class Extractor:
  """Images -> features, which are computed once for the same images.

  Args:
    network: as `evaluation.features` has it.
    words: what it is, for readers.
    see: uint8 [n, H, W] or [n, H, W, 3] -> float32 [n, F], n at least 1.
    kept: start of the path of files of features; None to keep none.
  """

  def __init__(
    self,
    network: str,
    words: str,
    see: Callable[[np.ndarray], np.ndarray],
    kept: Path | None = None,
  ):
    self.network, self.words = network, words
    self._see, self._kept = see, kept
    self._seen: dict[str, np.ndarray] = {}

  def __call__(self, images: np.ndarray, *, real: bool = False) -> np.ndarray:
    """Features [n, F].

    Args:
      images: uint8 [n, H, W], or RGB [n, H, W, 3], n at least 1.
      real: whether they are of the data, and their features to be kept there.

    Raises:
      ValueError: a file of features is damaged.
    """
    key = _digest(images)
    if key not in self._seen:
      if real and self._kept:
        path = self._kept.with_name(f"{self._kept.name}_{key[:16]}.npz")
        self._seen[key] = _keep(path, self._see, images)
      else:
        self._seen[key] = self._see(images)
    return self._seen[key]


def _digest(images: np.ndarray) -> str:
  """SHA-256, an image at a time: they may be larger than memory."""
  digest = hashlib.sha256(str(images.shape).encode())
  for image in images:
    digest.update(np.ascontiguousarray(image))
  return digest.hexdigest()


def _keep(
  path: Path, see: Callable[[np.ndarray], np.ndarray], images: np.ndarray
) -> np.ndarray:
  """Features that lie in a file, or are computed and then put there."""
  if from_first_host(path.exists()):  # so that all hosts do the same
    try:
      return array_files.read_npz(path)["features"]
    except (KeyError, ValueError) as error:
      raise ValueError(
        f"{path} is damaged ({error}); remove it, and the same command computes"
        " it again"
      ) from error
  features = see(images)
  if jax.process_index() == 0:
    with contextlib.suppress(OSError):  # nobody may write there
      path.parent.mkdir(exist_ok=True)
      files.write(path, array_files.npz_bytes({"features": features}))
  return features


def require(evaluation) -> None:
  """Raises as `extractors.load` if the network that is named cannot be read."""
  if evaluation.features != SEGMENTER:
    extractors.load(evaluation.features_weights, evaluation.features)


def published(evaluation, mesh: Mesh, data: str | Path) -> Extractor | None:
  """The published network that a config names.

  Args:
    evaluation: `config.evaluation`.
    mesh: devices that see.
    data: directory of the prepared data.

  Returns:
    It; None where the config names the run's segmenter.

  Raises: as `extractors.load`.
  """
  network, size = evaluation.features, evaluation.batch_size
  if network == SEGMENTER:
    return None
  path = files.find(evaluation.features_weights)
  module, variables = extractors.load(path, network)
  whole = NamedSharding(mesh, PartitionSpec())
  apply = partial(
    jax.jit(module.apply, out_shardings=whole), replicate(variables, mesh)
  )

  def see(images):
    return in_batches(
      lambda x: map_batch(apply, [x], mesh, size),
      *(images, size, f"features of {len(images)} images"),
    )

  digest = files.sha256(path)
  words = extractors.NETWORKS[network].words
  return Extractor(
    network,
    f"{words} ({path.name}, sha256 {digest[:12]})",
    see,
    Path(data) / FOLDER / f"{network}_{digest[:16]}",
  )
