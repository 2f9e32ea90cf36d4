"""Weights of the published networks that see images: `models.extractors`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util

from fairdiff_jax.models.extractors import Inception, ResNet
from fairdiff_jax.pretrained import graft
from fairdiff_jax.pretrained.fairdiff import COUNTERS

_LEAVES = {
  "kernel": "weight",
  "scale": "weight",
  "bias": "bias",
  "mean": "running_mean",
  "var": "running_var",
}


class Published(NamedTuple):
  """A published network.

  Attributes:
    make: makes the module.
    words: what it is.
    source: the file that has its weights.
    classes: rows of the classifier `fc.weight`, which is left unread; None for
      any number, or no classifier.
  """

  make: Callable[[], nn.Module]
  words: str
  source: str
  classes: int | None = None


NETWORKS = {
  "inception": Published(
    Inception,
    "FID's Inception-v3",
    "pt_inception-2015-12-05-6726825d.pth of pytorch-fid, or torch-fidelity's"
    " weights-inception-2015-12-05-6726825d.pth",
    1008,  # torchvision's Inception-v3 is another, with names and shapes alike
  ),
  "resnet50": Published(
    ResNet,
    "ResNet-50",
    "a ResNet-50 of torchvision, such as resnet50-11ad3fa6.pth",
  ),
}


def load(path: str | Path, network: str) -> tuple[nn.Module, dict[str, Any]]:
  """Reads a network.

  Args:
    path: as `graft.read` takes it; its classifier is left unread.
    network: one of `NETWORKS`.

  Returns:
    The module, (variables, uint8 [B, H, W] or [B, H, W, 3]) -> features
    float32 [B, F], and its variables, {'params', 'batch_stats'}, in float32.

  Raises:
    FileNotFoundError: no such file.
    ValueError: the file is damaged; or a tensor is missing, left over or of an
      unexpected shape.
    ImportError: the file is PyTorch's, and PyTorch is not installed.
  """
  arrays = graft.read(path)
  try:
    return _fill(NETWORKS[network], arrays)
  except ValueError as error:
    of = NETWORKS[network]
    raise ValueError(
      f"{path} holds no {of.words}: {error}; name {of.source}"
    ) from error


def _fill(of: Published, arrays: Mapping[str, np.ndarray]):
  module, source = of.make(), graft.Source(arrays)
  image = np.zeros((1, 32, 32), np.uint8)
  expected = jax.eval_shape(module.init, jax.random.key(0), image)
  paths = traverse_util.flatten_dict(expected)
  variables = traverse_util.unflatten_dict(
    {path: _take(source, path, leaf.ndim) for path, leaf in paths.items()}
  )
  source.finish(excused=[COUNTERS, r"fc\.(weight|bias)"])
  graft.require_shapes(variables, expected)
  if of.classes and len(source.take("fc.weight", 2)) != of.classes:
    raise ValueError(
      f"its classifier has {len(arrays['fc.weight'])} classes, not {of.classes}"
    )
  return module, variables


def _take(source: graft.Source, path: tuple[str, ...], ndim: int):
  """The tensor of a variable; layers are called as they are in the file."""
  _, *layers, leaf = path
  array = source.take(".".join([*layers, _LEAVES[leaf]]), ndim)
  return graft.conv(array) if leaf == "kernel" else array
