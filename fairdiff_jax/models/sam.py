"""The Segment Anything Model (SAM), without prompts.

Kirillov et al., "Segment Anything" (ICCV 2023). A vision transformer encodes
the image; a small two-way transformer lets one token per mask and the image's
embedding attend to each other; each token then weighs the upscaled embedding's
channels into the logits of its mask. Without points, boxes or masks as prompts
the prompt encoder contributes a learnt constant, and the positional encoding.

Images are NHWC. The modules carry the names of the original's, with the index
of a list after an underscore, so that a checkpoint maps to the parameters by
one rule.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fairdiff_jax.models import pointwise
from fairdiff_jax.models.attention import attend

PATCH = 16  # Pixels along a side of what becomes one position of the grid.

_dense_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
Dense = functools.partial(pointwise.Dense, kernel_init=_dense_init)
LayerNorm = functools.partial(nn.LayerNorm, use_fast_variance=False)
gelu = functools.partial(nn.gelu, approximate=False)


def _table(rows, dim, name):
  """A table of embeddings as a whole, [rows, dim]."""
  init = nn.initializers.normal(1.0)
  return nn.Embed(rows, dim, embedding_init=init, name=name)(jnp.arange(rows))


def to_windows(x: jax.Array, size: int, fill: Any = 0.0) -> jax.Array:
  """Cuts maps into windows, after padding at the bottom and on the right.

  Args:
    x: [B, H, W, C].
    size: of a window.
    fill: of the padding, [C] or one value.

  Returns:
    [B * windows, size, size, C].
  """
  b, h, w, c = x.shape
  rows, columns = -(-h // size), -(-w // size)
  fill = jnp.asarray(fill, x.dtype)
  padded = jnp.broadcast_to(fill, (b, rows * size, columns * size, c))
  x = padded.at[:, :h, :w].set(x)
  x = x.reshape(b, rows, size, columns, size, c)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, size, size, c)


def from_windows(windows: jax.Array, height: int, width: int) -> jax.Array:
  """Inverse of `to_windows`: maps [B, height, width, C]."""
  size, c = windows.shape[-2:]
  rows, columns = -(-height // size), -(-width // size)
  x = windows.reshape(-1, rows, columns, size, size, c)
  x = x.transpose(0, 1, 3, 2, 4, 5)
  x = x.reshape(-1, rows * size, columns * size, c)
  return x[:, :height, :width]


def _relative(query, table, axis):
  """Products of queries with the rows of a table for each key's distance.

  Args:
    query: [B, N, H, W, D].
    table: [2 * size - 1, D] by distance along the axis, which has that size.
    axis: 2 or 3.

  Returns:
    [B, N, H, W, size], float32.
  """
  position = np.arange(query.shape[axis])
  table = table.astype(query.dtype)
  table = table[position[:, None] - position[None] + len(position) - 1]
  # With the axis in front, a batch of plain matrix products; see `attend`.
  product = jnp.einsum(
    "hbnwd,hkd->hbnwk",
    jnp.moveaxis(query, axis, 0),
    table,
    preferred_element_type=jnp.float32,
  )
  return jnp.moveaxis(product, 0, axis)


class EncoderAttention(nn.Module):
  """Self-attention over a map with decomposed relative positions.

  To the logit of query and key is added the product of the (unscaled) query
  with a row of a table, chosen by their vertical distance, and with a row of
  another table, by their horizontal distance (Li et al. 2022, MViTv2).

  Attributes:
    num_heads: of the C channels.
    window: side of the windows, in positions; 0 for attention over all.
    dtype: of the computation.
  """

  num_heads: int
  window: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, lora=None):
    _, h, w, c = x.shape
    heads, dim = self.num_heads, c // self.num_heads
    x = x.astype(self.dtype)
    project = Dense(3 * c, dtype=self.dtype, name="qkv")
    q, k, v = jnp.split(project(x), 3, -1)
    if lora is not None:
      lora = jax.tree.map(lambda m: m.astype(self.dtype), lora)
      q += x @ lora["q_a"] @ lora["q_b"]
      v += x @ lora["v_a"] @ lora["v_b"]
    if self.window:
      # Padding is of zeros before the projection, and takes part unmasked.
      fill = jnp.split(project(jnp.zeros(c, self.dtype)), 3)
      q, k, v = (
        to_windows(y, self.window, f)
        for y, f in zip((q, k, v), fill, strict=True)
      )
    maps, rows, columns, _ = q.shape
    q, k, v = (
      y.reshape(maps, rows * columns, heads, dim).swapaxes(1, 2)
      for y in (q, k, v)
    )

    zeros = nn.initializers.zeros
    vertical = self.param("rel_pos_h", zeros, (2 * rows - 1, dim))
    horizontal = self.param("rel_pos_w", zeros, (2 * columns - 1, dim))
    query = q.reshape(maps, heads, rows, columns, dim)
    bias = _relative(query, vertical, 2)[..., :, None]
    bias += _relative(query, horizontal, 3)[..., None, :]
    bias = bias.reshape(maps, heads, rows * columns, rows * columns)

    x = attend(q, k, v, bias)
    x = x.swapaxes(1, 2).reshape(maps, rows, columns, c)
    if self.window:
      x = from_windows(x, h, w)
    return Dense(c, dtype=self.dtype, name="proj")(x)


class Mlp(nn.Module):
  """Two dense layers."""

  width: int
  activation: Any
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    h = Dense(self.width, dtype=self.dtype, name="lin1")(x)
    h = self.activation(h)
    return Dense(x.shape[-1], dtype=self.dtype, name="lin2")(h)


class EncoderBlock(nn.Module):
  """Attention, within windows or (`window` 0) global, then a perceptron."""

  num_heads: int
  window: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, lora=None):
    norm = functools.partial(LayerNorm, epsilon=1e-6, dtype=self.dtype)
    attention = EncoderAttention(
      self.num_heads, self.window, self.dtype, name="attn"
    )
    x += attention(norm(name="norm1")(x), lora)
    mlp = Mlp(4 * x.shape[-1], gelu, self.dtype, name="mlp")
    return x + mlp(norm(name="norm2")(x))


class ImageEncoder(nn.Module):
  """Vision transformer: images -> embeddings at 1/16 of the resolution.

  The parameters fit one image size, by that of the positional tables.

  Attributes:
    embed_dim: width; ViT-B, L, H: 768, 1024, 1280.
    depth: blocks; 12, 24, 32.
    num_heads: 12, 16, 16.
    global_blocks: indices of the blocks that attend to all positions; each
      quarter's last.
    window: side of the windows, in positions, of the other blocks.
    out_dim: channels of the embedding.
    dtype: of the computation.
  """

  embed_dim: int = 768
  depth: int = 12
  num_heads: int = 12
  global_blocks: Sequence[int] = (2, 5, 8, 11)
  window: int = 14
  out_dim: int = 256
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, image: jax.Array, lora: dict[str, jax.Array] | None = None
  ) -> jax.Array:
    """Embeds images.

    Args:
      image: [B, H, W, 3], normalised; H and W multiples of 16.
      lora: low-rank changes of the queries ('q_a' [depth, embed_dim, rank] and
        'q_b' [depth, rank, embed_dim]) and of the values ('v_a', 'v_b'), or
        None.

    Returns:
      [B, H / 16, W / 16, out_dim].

    Raises:
      ValueError: H or W is no multiple of 16.
    """
    if any(size % PATCH for size in image.shape[1:3]):
      raise ValueError(
        f"image height and width must be multiples of {PATCH}, got shape"
        f" {image.shape}"
      )
    x = nn.Conv(
      self.embed_dim,
      (PATCH, PATCH),
      strides=PATCH,
      padding="VALID",
      dtype=self.dtype,
      name="patch_embed_proj",
    )(image)
    shape = (1, *x.shape[1:])
    position = self.param("pos_embed", nn.initializers.zeros, shape)
    x += position.astype(self.dtype)
    for i in range(self.depth):
      window = 0 if i in self.global_blocks else self.window
      block = EncoderBlock(
        self.num_heads, window, self.dtype, name=f"blocks_{i}"
      )
      x = block(x, jax.tree.map(lambda m, i=i: m[i], lora))
    norm = functools.partial(LayerNorm, epsilon=1e-6, dtype=self.dtype)
    sizes = {"features": self.out_dim, "use_bias": False, "dtype": self.dtype}
    x = norm(name="neck_1")(pointwise.PointwiseConv(**sizes, name="neck_0")(x))
    x = nn.Conv(**sizes, kernel_size=(3, 3), name="neck_2")(x)
    return norm(name="neck_3")(x)


class RandomFourier(nn.Module):
  """Positional encoding with random frequencies, drawn once and never learnt.

  Tancik et al., "Fourier Features Let Networks Learn High Frequency Functions
  in Low Dimensional Domains" (NeurIPS 2020). The frequencies are in the
  collection 'constants'.
  """

  dim: int

  @nn.compact
  def __call__(self, height: int, width: int) -> jax.Array:
    """Encoding [height, width, dim] of the centres of a grid's cells."""
    frequencies = self.variable(
      "constants",
      "positional_encoding_gaussian_matrix",
      lambda: jax.random.normal(self.make_rng("params"), (2, self.dim // 2)),
    ).value
    y = 2 * (np.arange(height) + 0.5) / height - 1
    x = 2 * (np.arange(width) + 0.5) / width - 1
    points = np.stack(np.meshgrid(x, y), axis=-1).astype(np.float32)
    angle = jnp.dot(points, frequencies, precision=jax.lax.Precision.HIGHEST)
    angle *= 2 * math.pi
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


class PromptEncoder(nn.Module):
  """Encoding of the empty prompt.

  The parameters of points, boxes and masks take no part, but exist: they belong
  to the model's checkpoints and to its size.
  """

  dim: int = 256

  @nn.compact
  def __call__(self, height: int, width: int) -> tuple[jax.Array, jax.Array]:
    """Encodes the absence of a prompt.

    Args:
      height: of the image's embedding.
      width: likewise.

    Returns:
      What to add to each position of the embedding, [dim], and the positional
      encoding, [height, width, dim].
    """
    if self.is_initializing():
      self._unused()
    (dense,) = _table(1, self.dim, "no_mask_embed")
    return dense, RandomFourier(self.dim, name="pe_layer")(height, width)

  def _unused(self):
    for i in range(4):
      _table(1, self.dim, f"point_embeddings_{i}")
    _table(1, self.dim, "not_a_point_embed")
    x = jnp.zeros((1, 4, 4, 1))
    for i, channels in ((0, 4), (3, 16)):
      name = f"mask_downscaling_{i}"
      x = nn.Conv(channels, (2, 2), 2, padding="VALID", name=name)(x)
      x = LayerNorm(name=f"mask_downscaling_{i + 1}")(x)
    nn.Conv(self.dim, (1, 1), name="mask_downscaling_6")(x)


class DecoderAttention(nn.Module):
  """Attention q [B, N, C], k and v [B, M, C] -> [B, N, C]."""

  num_heads: int
  width: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, q, k, v):
    dense = functools.partial(Dense, dtype=self.dtype)

    def heads(x, name):
      x = dense(self.width, name=name)(x)
      return x.reshape(*x.shape[:2], self.num_heads, -1).swapaxes(1, 2)

    x = attend(heads(q, "q_proj"), heads(k, "k_proj"), heads(v, "v_proj"))
    x = x.swapaxes(1, 2).reshape(*q.shape[:2], self.width)
    return dense(q.shape[-1], name="out_proj")(x)


class TwoWayBlock(nn.Module):
  """Tokens attend to themselves and to the image, then the image to them."""

  num_heads: int
  mlp_dim: int
  first: bool
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, tokens, image, token_position, image_position):
    dim = tokens.shape[-1]
    norm = functools.partial(LayerNorm, epsilon=1e-5, dtype=self.dtype)
    attention = functools.partial(
      DecoderAttention, self.num_heads, dtype=self.dtype
    )

    attend = attention(dim, name="self_attn")
    if self.first:  # The tokens still are their own position.
      tokens = attend(tokens, tokens, tokens)
    else:
      q = tokens + token_position
      tokens += attend(q, q, tokens)
    tokens = norm(name="norm1")(tokens)

    attend = attention(dim // 2, name="cross_attn_token_to_image")
    tokens += attend(tokens + token_position, image + image_position, image)
    tokens = norm(name="norm2")(tokens)

    tokens += Mlp(self.mlp_dim, nn.relu, self.dtype, name="mlp")(tokens)
    tokens = norm(name="norm3")(tokens)

    attend = attention(dim // 2, name="cross_attn_image_to_token")
    image += attend(image + image_position, tokens + token_position, tokens)
    return tokens, norm(name="norm4")(image)


class TwoWayTransformer(nn.Module):
  """Lets tokens [B, N, C] and an image's positions [B, M, C] attend."""

  depth: int
  num_heads: int
  mlp_dim: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, tokens, image, image_position):
    token_position = tokens
    for i in range(self.depth):
      block = TwoWayBlock(
        self.num_heads, self.mlp_dim, i == 0, self.dtype, name=f"layers_{i}"
      )
      tokens, image = block(tokens, image, token_position, image_position)
    attend = DecoderAttention(
      self.num_heads,
      tokens.shape[-1] // 2,
      self.dtype,
      name="final_attn_token_to_image",
    )
    tokens += attend(tokens + token_position, image + image_position, image)
    norm = LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm_final_attn")
    return norm(tokens), image


class Perceptron(nn.Module):
  """Dense layers with ReLU in between."""

  widths: Sequence[int]
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    for i, width in enumerate(self.widths):
      x = nn.relu(x) if i else x
      x = Dense(width, dtype=self.dtype, name=f"layers_{i}")(x)
    return x


class Upscale(nn.Module):
  """Transposed 2 x 2 convolution of stride 2, whose outputs do not overlap.

  So it is a dense layer from each pixel to four, which XLA's CPU backend
  differentiates six times as fast; the parameters are `nn.ConvTranspose`'s.
  """

  features: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    b, h, w, c = x.shape
    shape = (2, 2, c, self.features)
    kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
    bias = self.param("bias", nn.initializers.zeros, shape[-1:])
    x, kernel, bias = (y.astype(self.dtype) for y in (x, kernel, bias))
    x = jnp.einsum("bhwc,ijcd->bhiwjd", x, kernel[::-1, ::-1])
    return x.reshape(b, 2 * h, 2 * w, self.features) + bias


class MaskDecoder(nn.Module):
  """Masks of an embedded image, and how good the model takes them to be.

  Attributes:
    num_masks: mask tokens. In SAM the first is the answer to an unambiguous
      prompt.
    depth: of the two-way transformer.
    num_heads: of its attention.
    mlp_dim: width of its perceptrons.
    dtype: of the computation.
  """

  num_masks: int = 4
  depth: int = 2
  num_heads: int = 8
  mlp_dim: int = 2048
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, embedding: jax.Array, prompt: jax.Array, position: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Decodes one mask per token.

    Args:
      embedding: of the images, [B, H, W, C].
      prompt: added to it, [C] or [B, H, W, C].
      position: the positional encoding, [H, W, C].

    Returns:
      Logits [B, 4 H, 4 W, num_masks] and the predicted intersection over union
      [B, num_masks], in `dtype`.
    """
    b, h, w, c = embedding.shape
    embedding = (embedding + prompt).astype(self.dtype).reshape(b, h * w, c)
    position = position.astype(self.dtype).reshape(1, h * w, c)
    tokens = jnp.concatenate(
      [_table(1, c, "iou_token"), _table(self.num_masks, c, "mask_tokens")]
    )
    tokens = jnp.broadcast_to(tokens.astype(self.dtype), (b, *tokens.shape))
    tokens, embedding = TwoWayTransformer(
      self.depth, self.num_heads, self.mlp_dim, self.dtype, name="transformer"
    )(tokens, embedding, position)

    upscale = functools.partial(Upscale, dtype=self.dtype)
    x = upscale(c // 4, name="output_upscaling_0")(
      embedding.reshape(b, h, w, c)
    )
    x = LayerNorm(epsilon=1e-6, dtype=self.dtype, name="output_upscaling_1")(x)
    x = upscale(c // 8, name="output_upscaling_3")(gelu(x))
    weights = []
    for i in range(self.num_masks):
      name = f"output_hypernetworks_mlps_{i}"
      hypernetwork = Perceptron((c, c, c // 8), self.dtype, name=name)
      weights.append(hypernetwork(tokens[:, 1 + i]))
    masks = jnp.einsum("bhwc,bmc->bhwm", gelu(x), jnp.stack(weights, axis=1))
    iou_head = Perceptron(
      (c, c, self.num_masks), self.dtype, name="iou_prediction_head"
    )
    return masks, iou_head(tokens[:, 0])
