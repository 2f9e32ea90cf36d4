"""SAMed: the Segment Anything Model adapted to segmentation by class.

Zhang & Liu, "Customized Segment Anything Model for Medical Image Segmentation"
(2023), as FairSeg uses it (Tian et al., ICLR 2024). SAM's image encoder is
frozen; each of its blocks gets a low-rank change (LoRA, Hu et al. 2022) of the
queries and of the values, x W + x A B, which is learnt together with the prompt
encoder and the mask decoder. The decoder has a mask per class and one for the
background, and the logits stay at a quarter of the image's resolution.

At 512 pixels and two classes, 4,071,695 of 91,350,543 parameters are learnt.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from fairdiff_jax.models import sam

TRAINABLE = (r"lora/.*", r"prompt_encoder/.*", r"mask_decoder/.*")
FROZEN = (r"image_encoder/.*",)


class LoRA(nn.Module):
  """Low-rank factors of every block; their products are 0 at first."""

  depth: int
  dim: int
  rank: int

  @nn.compact
  def __call__(self) -> dict[str, jax.Array]:
    """Factors 'q_a', 'v_a' [depth, dim, rank], 'q_b', 'v_b' [.., rank, dim]."""
    into, out = (self.depth, self.dim, self.rank), (self.depth, self.rank)
    uniform = nn.initializers.variance_scaling(
      1 / 3, "fan_in", "uniform", batch_axis=0
    )
    zeros = nn.initializers.zeros
    return {
      "q_a": self.param("q_a", uniform, into),
      "q_b": self.param("q_b", zeros, (*out, self.dim)),
      "v_a": self.param("v_a", uniform, into),
      "v_b": self.param("v_b", zeros, (*out, self.dim)),
    }


class SAMed(nn.Module):
  """SAM with LoRA, one mask per class; gradients stop at the image encoder.

  Its variables are 'params' (of which `split` tells what is learnt) and
  'constants', the frequencies of the positional encoding.

  Attributes:
    num_classes: besides the background.
    image_size: height and width, in pixels.
    rank: of the changes to queries and values.
    embed_dim: of the image encoder, as all up to `window`; the defaults are
      those of ViT-B, see `sam.ImageEncoder` for L and H.
    depth: its blocks.
    num_heads: its heads.
    global_blocks: its blocks that attend to all positions.
    window: side of its windows, in positions.
    decoder_dim: channels of the embedding and of the mask decoder.
    decoder_depth: blocks of the mask decoder.
    decoder_heads: their heads.
    decoder_mlp_dim: width of their perceptrons.
    dtype: of the computation; parameters are float32.
  """

  num_classes: int = 2
  image_size: int = 512
  rank: int = 4
  embed_dim: int = 768
  depth: int = 12
  num_heads: int = 12
  global_blocks: Sequence[int] = (2, 5, 8, 11)
  window: int = 14
  decoder_dim: int = 256
  decoder_depth: int = 2
  decoder_heads: int = 8
  decoder_mlp_dim: int = 2048
  dtype: Any = jnp.float32

  def setup(self):
    # Gradients of the frozen parameters are 0, and cost nothing.
    encoder = nn.map_variables(
      sam.ImageEncoder,
      "params",
      trans_in_fn=jax.lax.stop_gradient,
      init=True,
      mutable=True,
    )
    self.lora = LoRA(self.depth, self.embed_dim, self.rank)
    self.image_encoder = encoder(
      self.embed_dim,
      self.depth,
      self.num_heads,
      self.global_blocks,
      self.window,
      self.decoder_dim,
      self.dtype,
    )
    self.prompt_encoder = sam.PromptEncoder(self.decoder_dim)
    self.mask_decoder = sam.MaskDecoder(
      self.num_classes + 1,
      self.decoder_depth,
      self.decoder_heads,
      self.decoder_mlp_dim,
      self.dtype,
    )

  def __call__(self, image: jax.Array, train: bool = False) -> jax.Array:
    """Segments images.

    Args:
      image: [B, image_size, image_size, 1 or 3], from 0 to 1. SAMed leaves out
        SAM's normalisation by channel.
      train: without effect, as the network has neither dropout nor batch
        statistics.

    Returns:
      Logits [B, image_size / 4, image_size / 4, 1 + num_classes], in `dtype`;
      the first is the background's.

    Raises:
      ValueError: the image has another shape.
    """
    del train
    return self.segment(image)[0]

  def segment(self, image: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits as `__call__`, and the embedding's mean [B, decoder_dim]."""
    if (
      image.ndim != 4
      or image.shape[1:3] != (self.image_size, self.image_size)
      or image.shape[3] not in (1, 3)
    ):
      raise ValueError(
        f"images must be [B, {self.image_size}, {self.image_size}, 1 or 3], got"
        f" {list(image.shape)}"
      )
    image = jnp.broadcast_to(image, (*image.shape[:3], 3))
    embedding = self.image_encoder(image, self.lora())
    prompt, position = self.prompt_encoder(*embedding.shape[1:3])
    logits = self.mask_decoder(embedding, prompt, position)[0]
    return logits, jnp.mean(embedding, axis=(1, 2))


def labels(params: Mapping[str, Any]) -> dict[str, Any]:
  """Says of each parameter whether it is learnt.

  Args:
    params: tree of parameters.

  Returns:
    The same tree of 'trainable' and 'frozen', as `optax.multi_transform` takes.

  Raises:
    ValueError: a path is neither or both; the message lists them.
  """
  found = {
    path: [
      label
      for label, patterns in (("trainable", TRAINABLE), ("frozen", FROZEN))
      if any(re.fullmatch(pattern, path) for pattern in patterns)
    ]
    for path in traverse_util.flatten_dict(params, sep="/")
  }
  wrong = sorted(path for path, label in found.items() if len(label) != 1)
  if wrong:
    raise ValueError(f"neither or both of trainable and frozen: {wrong}")
  return traverse_util.unflatten_dict(
    {path: label for path, (label,) in found.items()}, sep="/"
  )


def split(
  params: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Splits parameters into those learnt and those frozen.

  Args:
    params: tree of parameters.

  Returns:
    Two trees; `{**trainable, **frozen}` is the whole.

  Raises:
    ValueError: as `labels`.
  """
  flat = traverse_util.flatten_dict(params, sep="/")
  label = traverse_util.flatten_dict(labels(params), sep="/")
  trainable, frozen = (
    traverse_util.unflatten_dict(
      {path: leaf for path, leaf in flat.items() if label[path] == wanted},
      sep="/",
    )
    for wanted in ("trainable", "frozen")
  )
  return trainable, frozen


def merge_lora(params: Mapping[str, Any]) -> dict[str, Any]:
  """Folds the low-rank changes into the image encoder's weights.

  Args:
    params: of a `SAMed`.

  Returns:
    Parameters of the same module with the same output, where the changes are 0:
    their second factors are.
  """
  lora = params["lora"]
  product = jax.vmap(
    lambda a, b: jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST)
  )
  q, v = (product(lora[f"{name}_a"], lora[f"{name}_b"]) for name in "qv")
  change = jnp.concatenate([q, jnp.zeros_like(q), v], axis=-1)
  flat = traverse_util.flatten_dict(params, sep="/")
  for i in range(len(change)):
    flat[f"image_encoder/blocks_{i}/attn/qkv/kernel"] += change[i]
  for name in ("lora/q_b", "lora/v_b"):
    flat[name] = jnp.zeros_like(flat[name])
  return traverse_util.unflatten_dict(flat, sep="/")
