"""Google's vision transformers as the encoder of a TransUNet.

The files R50+ViT-B_16.npz and ViT-B_16.npz of Dosovitskiy et al. (2021) hold
Flax arrays, so kernels need no transposition.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from scipy import ndimage

from fairdiff_jax.models.transunet import PATCH, TransUNet
from fairdiff_jax.pretrained import graft

CLASSIFIER = (r"cls", r"(pre_logits|head)/.*")

_LAYER = {
  "norm1": "LayerNorm_0",
  "query": "MultiHeadDotProductAttention_1/query",
  "key": "MultiHeadDotProductAttention_1/key",
  "value": "MultiHeadDotProductAttention_1/value",
  "out": "MultiHeadDotProductAttention_1/out",
  "norm2": "LayerNorm_2",
  "expand": "MlpBlock_3/Dense_0",
  "contract": "MlpBlock_3/Dense_1",
}


# Channels and blocks of the published transformers.
NAMES = {
  (192, 12): "ViT-Ti",
  (384, 12): "ViT-S",
  (768, 12): "ViT-B",
  (1024, 24): "ViT-L",
  (1280, 32): "ViT-H",
}


def describe(channels: int, blocks: int) -> str:
  """Such as 'a ViT-L (1024 channels, 24 blocks)'."""
  name = NAMES.get((channels, blocks), "ViT")
  return f"a {name} ({channels} channels, {blocks} blocks)"


_AXES = dict.fromkeys(("query", "key", "value", "out"), 3)


def load(
  path: str | Path,
  *,
  image_size: int = 224,
  num_classes: int = 3,
  decoder_channels: Sequence[int] = TransUNet.decoder_channels,
  seed: int = 0,
) -> tuple[TransUNet, dict[str, Any]]:
  """Reads an encoder; the decoder is drawn anew.

  Args:
    path: .npz file; the classifier and its token are left unread. Without
      `conv_root/kernel` the encoder has no ResNet.
    image_size: side, in pixels, of the square images: a multiple of 16. The
      position embedding is resized to their grid.
    num_classes: with the background.
    decoder_channels: of the decoder, as the module's.
    seed: of the decoder.

  Returns:
    The module, the encoder's sizes taken from the arrays, and its variables,
    {'params', 'batch_stats'}, in float32.

  Raises:
    FileNotFoundError: no such file.
    ValueError: the file is damaged; or a tensor is missing, left over or of an
      unexpected shape.
  """
  source = graft.Source(graft.read(path))
  with graft.naming(path):
    encoder = _encoder(source, image_size // PATCH)
    source.finish(excused=CLASSIFIER)
    module = TransUNet(
      num_classes=num_classes,
      decoder_channels=tuple(decoder_channels),
      **encoder_sizes(encoder),
    )
    image = np.zeros((1, image_size, image_size, 3), np.float32)
    expected = jax.eval_shape(module.init, jax.random.key(0), image)
    graft.require_shapes(encoder, expected["params"]["encoder"])
  # Compiled, `init` draws the parameters and leaves out the forward pass.
  variables = jax.device_get(jax.jit(module.init)(jax.random.key(seed), image))
  params = {**variables["params"], "encoder": encoder}
  return module, {**variables, "params": params}


def encoder_sizes(encoder: Mapping[str, Any]) -> dict[str, Any]:
  """Attributes of a `TransUNet` from its encoder's parameters."""
  resnet = encoder.get("resnet", {})
  stages = (_count(resnet, f"stage_{i}_unit_{{}}") for i in itertools.count())
  sizes = {
    "stages": tuple(itertools.takewhile(bool, stages)),
    "hidden_dim": encoder["patch_embedding"]["bias"].size,
    "mlp_dim": encoder["layer_0"]["expand"]["bias"].size,
    "num_heads": encoder["layer_0"]["query"]["kernel"].shape[1],
    "num_layers": _count(encoder, "layer_{}"),
  }
  if resnet:
    sizes["width"] = resnet["root_norm"]["bias"].size
  return sizes


def _count(names, template, start=0):
  """How many of `template` with start, start + 1, ... are among the names."""
  present = (template.format(i) in names for i in itertools.count(start))
  return sum(itertools.takewhile(bool, present))


def _encoder(source, grid):
  position = source.take("Transformer/posembed_input/pos_embedding", 3)
  params = {
    "patch_embedding": _affine(source, "embedding", "kernel"),
    "position_embedding": resize_position_embedding(position, grid),
    "norm": _affine(source, "Transformer/encoder_norm", "scale"),
  }
  block = "Transformer/encoderblock_{}"
  # At least one, so that a file without any is told what it lacks.
  num_layers = max(1, _count(source, block + "/LayerNorm_0/scale"))
  for i in range(num_layers):
    params[f"layer_{i}"] = {
      name: _affine(
        source,
        f"{block.format(i)}/{theirs}",
        "scale" if name.startswith("norm") else "kernel",
        _AXES.get(name),
      )
      for name, theirs in _LAYER.items()
    }
  if "conv_root/kernel" in source:
    params["resnet"] = _resnet(source)
  return params


def _affine(source, name, multiplier, ndim=None):
  return {
    multiplier: source.take(f"{name}/{multiplier}", ndim),
    "bias": source.take(f"{name}/bias"),
  }


def _resnet(source):
  params = {
    "root": {"kernel": source.take("conv_root/kernel")},
    "root_norm": _group_norm(source, "gn_root"),
  }
  for i in range(3):
    unit = f"block{i + 1}/unit{{}}"
    num_units = max(1, _count(source, unit + "/conv1/kernel", start=1))
    for j in range(num_units):
      params[f"stage_{i}_unit_{j}"] = _unit(source, unit.format(j + 1))
  return params


def _unit(source, name):
  params = {}
  for i in (1, 2, 3):
    params[f"conv{i}"] = {"kernel": source.take(f"{name}/conv{i}/kernel")}
    params[f"norm{i}"] = _group_norm(source, f"{name}/gn{i}")
  if f"{name}/conv_proj/kernel" in source:
    params["shortcut"] = {"kernel": source.take(f"{name}/conv_proj/kernel")}
    params["shortcut_norm"] = _group_norm(source, f"{name}/gn_proj")
  return params


def _group_norm(source, name):
  """Scale and bias, stored as [1, 1, 1, C]."""
  params = _affine(source, name, "scale")
  return {key: value.reshape(-1) for key, value in params.items()}


def resize_position_embedding(embedding: np.ndarray, grid: int) -> np.ndarray:
  """Drops the class token and interpolates linearly, corners staying put.

  Args:
    embedding: [1, 1 + N, D], N a square.
    grid: positions along a side that are wanted.

  Returns:
    [1, grid * grid, D].

  Raises:
    ValueError: N is not a square.
  """
  _, num_tokens, dim = embedding.shape
  side = math.isqrt(num_tokens - 1)
  if side**2 != num_tokens - 1:
    raise ValueError(
      f"position embedding of {num_tokens} tokens: not a class token and a"
      " square grid"
    )
  table = embedding[0, 1:].reshape(side, side, dim)
  if side != grid:
    table = ndimage.zoom(table, (grid / side, grid / side, 1), order=1)
  return table.reshape(1, grid * grid, dim)
