"""Checkpoints of the Segment Anything Model, for SAMed.

`sam_vit_b_01ec64.pth` and its like (facebookresearch/segment-anything), or
safetensors with the same names. What does not fit is treated as SAMed's own
loading does it (hitachinsk/SAMed): positional tables are resized, and the parts
of the mask decoder that depend on the number of masks start afresh.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from fairdiff_jax.models import sam
from fairdiff_jax.models.samed import SAMed
from fairdiff_jax.pretrained import graft

# Parts of the mask decoder that depend on the number of masks.
PER_MASK = (
  r"mask_decoder\.mask_tokens\..*",
  r"mask_decoder\.output_hypernetworks_mlps\..*",
  r"mask_decoder\.iou_prediction_head\..*",
)
LORA = (r"lora\..*",)


def load(
  path: str | Path,
  *,
  image_size: int = 512,
  num_classes: int = 2,
  rank: int = 4,
  seed: int = 0,
) -> tuple[SAMed, dict[str, Any]]:
  """Reads a SAM as the start of a SAMed.

  Sizes are taken from the tensors' shapes, except that the mask decoder has the
  8 heads that every SAM has. Where `image_size` is not the checkpoint's, the
  absolute positions (bilinearly) and the relative positions of the global
  blocks (linearly) are resized. Unless both `image_size` and the number of
  masks, `num_classes` + 1, are the checkpoint's, the mask tokens, all their
  networks and the head that predicts the masks' quality are drawn anew, even
  those whose shapes agree, in place of the checkpoint's.

  Args:
    path: as `graft.read` takes it.
    image_size: in pixels, a multiple of 16.
    num_classes: besides the background.
    rank: of the low-rank changes, which start as the identity.
    seed: of what is drawn.

  Returns:
    The module and its variables, {'params', 'constants'}, in float32.

  Raises:
    FileNotFoundError: no such file.
    ValueError: the file is damaged; a tensor is missing, left over or of an
      unexpected shape; or the image size is no multiple of 16.
    ImportError: the file is PyTorch's, and PyTorch is not installed.
  """
  if image_size % sam.PATCH:
    raise ValueError(
      f"image_size must be a multiple of {sam.PATCH}, got {image_size}"
    )
  source = graft.Source(graft.read(path))
  with graft.naming(path):
    original = SAMed(rank=rank, **_sizes(source))
    expected = _shapes(original)
    expected["params"].pop("lora")
    variables = read_variables(source, expected)
    source.finish()
    graft.require_shapes(variables, expected)

  module = original.copy(num_classes=num_classes, image_size=image_size)
  grid = image_size // sam.PATCH
  _resize(variables["params"]["image_encoder"], grid, module.global_blocks)
  drawn = LORA if module == original else (*LORA, *PER_MASK)
  draw = jax.jit(
    lambda key: _select(module.init(key, _image(module)), drawn)[0]
  )
  _, kept = _select(variables, drawn)
  variables = traverse_util.unflatten_dict(
    kept | jax.device_get(draw(jax.random.key(seed))), sep="/"
  )
  graft.require_shapes(variables, _shapes(module))
  return module, variables


def read_variables(
  source: graft.Source, expected: Mapping[str, Any]
) -> dict[str, Any]:
  """Takes tensors for a tree of variables.

  Args:
    source: the checkpoint.
    expected: the variables or their shapes, collections first; only the paths
      matter.

  Returns:
    The tree.

  Raises:
    ValueError: a tensor is missing.
  """
  paths = traverse_util.flatten_dict(expected, sep="/")
  return traverse_util.unflatten_dict(
    {path: _to_jax(path, source.take(tensor_name(path))) for path in paths},
    sep="/",
  )


def state_dict(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Inverse of `read_variables`: tensors by the original's names."""
  flat = traverse_util.flatten_dict(variables, sep="/")
  return {
    tensor_name(path): np.ascontiguousarray(_to_torch(path, np.asarray(leaf)))
    for path, leaf in flat.items()
  }


def tensor_name(path: str) -> str:
  """The original's name of a variable.

  Args:
    path: joined by slashes, with the collection first.
  """
  _, *parents, leaf = path.split("/")
  parents = [re.sub(r"_(\d+)$", r".\1", name) for name in parents]
  if leaf in ("kernel", "scale", "embedding"):
    leaf = "weight"
  name = ".".join([*parents, leaf])
  return name.replace("patch_embed_proj", "patch_embed.proj")


def _image(module):
  return jnp.zeros((1, module.image_size, module.image_size, 3))


def _shapes(module):
  """Shapes of the module's variables."""
  return jax.eval_shape(
    lambda key: module.init(key, _image(module)), jax.random.key(0)
  )


def _select(variables, patterns):
  """Variables by path: those of which a pattern matches the name, the rest."""
  chosen, rest = {}, {}
  for path, leaf in traverse_util.flatten_dict(variables, sep="/").items():
    name = tensor_name(path)
    matches = any(re.fullmatch(pattern, name) for pattern in patterns)
    (chosen if matches else rest)[path] = leaf
  return chosen, rest


def _to_jax(path, array):
  if not path.endswith("/kernel"):
    return array
  if "output_upscaling" in path and array.ndim == 4:
    # A transposed convolution, [in, out, H, W], which Flax does not flip.
    return array.transpose(2, 3, 0, 1)[::-1, ::-1]
  return graft.conv(array) if array.ndim == 4 else graft.dense(array)


def _to_torch(path, array):
  if not path.endswith("/kernel"):
    return array
  if "output_upscaling" in path:
    return array[::-1, ::-1].transpose(2, 3, 0, 1)
  return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def _sizes(source):
  """Attributes of the module that the tensors' shapes tell."""
  position = source.take("image_encoder.pos_embed", 4)
  grid, embed_dim = position.shape[1], position.shape[-1]
  depth = _count(source, r"image_encoder\.blocks\.(\d+)\..*")
  tables = [
    source.take(f"image_encoder.blocks.{i}.attn.rel_pos_h", 2)
    for i in range(depth)
  ]
  sides = [(len(table) + 1) // 2 for table in tables]
  windows = [side for side in sides if side != grid]
  return {
    "num_classes": len(source.take("mask_decoder.mask_tokens.weight", 2)) - 1,
    "image_size": grid * sam.PATCH,
    "embed_dim": embed_dim,
    "depth": depth,
    "num_heads": embed_dim // tables[0].shape[1],
    "global_blocks": tuple(i for i, side in enumerate(sides) if side == grid),
    "window": windows[0] if windows else grid,
    "decoder_dim": len(source.take("image_encoder.neck.0.weight", 4)),
    "decoder_depth": _count(
      source, r"mask_decoder\.transformer\.layers\.(\d+)\..*"
    ),
    "decoder_mlp_dim": len(
      source.take("mask_decoder.transformer.layers.0.mlp.lin1.bias", 1)
    ),
  }


def _count(source, pattern):
  """One more than the largest number in the names that match."""
  matches = (re.fullmatch(pattern, name) for name in source.arrays)
  return 1 + max((int(match[1]) for match in matches if match), default=0)


def _resize(encoder, grid, global_blocks):
  """Resizes the positional tables in place, to a grid of another size."""
  encoder["pos_embed"] = _interpolate(encoder["pos_embed"], {1: grid, 2: grid})
  for i in global_blocks:
    attention = encoder[f"blocks_{i}"]["attn"]
    for name in ("rel_pos_h", "rel_pos_w"):
      attention[name] = _interpolate(attention[name], {0: 2 * grid - 1})


def _interpolate(array, sizes):
  """Linear interpolation along axes, from centre to centre, no smoothing."""
  shape = tuple(sizes.get(i, size) for i, size in enumerate(array.shape))
  if shape == array.shape:
    return array
  return np.asarray(
    jax.image.resize(jnp.asarray(array), shape, "linear", antialias=False)
  )
