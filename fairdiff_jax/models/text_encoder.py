"""The text encoder of Stable Diffusion: that of CLIP.

After Radford et al., "Learning Transferable Visual Models From Natural
Language Supervision" (ICML 2021): a causal transformer with its normalisations
before the attention and the feed-forward layers, and one at the end.

Parameters are float32 and carry the names of the published checkpoints, with
every number joined to the name before it.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from fairdiff_jax.models.pointwise import Dense


def quick_gelu(x: jax.Array) -> jax.Array:
  """x sigmoid(1.702 x), CLIP's approximation of the GELU."""
  return x * nn.sigmoid(1.702 * x)


def _layer_norm(epsilon, name):
  return nn.LayerNorm(
    epsilon, dtype=jnp.float32, use_fast_variance=False, name=name
  )


class SelfAttention(nn.Module):
  """Attention of each token to itself and those before it."""

  num_heads: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    b, n, d = x.shape
    q, k, v = (
      Dense(d, dtype=self.dtype, name=name)(x).reshape(
        b, n, self.num_heads, d // self.num_heads
      )
      for name in ("q_proj", "k_proj", "v_proj")
    )
    y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    return Dense(d, dtype=self.dtype, name="out_proj")(y.reshape(b, n, d))


class FeedForward(nn.Module):
  """Two dense layers with the GELU's approximation between them."""

  width: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    h = Dense(self.width, dtype=self.dtype, name="fc1")(x)
    return Dense(x.shape[-1], dtype=self.dtype, name="fc2")(quick_gelu(h))


class Layer(nn.Module):
  """Attention, then the feed-forward layers, each added to its input."""

  num_heads: int
  width: int
  epsilon: float
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = _layer_norm(self.epsilon, "layer_norm1")(x)
    x += SelfAttention(self.num_heads, self.dtype, name="self_attn")(y)
    y = _layer_norm(self.epsilon, "layer_norm2")(x)
    return x + FeedForward(self.width, self.dtype, name="mlp")(y)


class Embeddings(nn.Module):
  """Sum of a token's embedding and its position's."""

  vocab_size: int
  positions: int
  dim: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, ids: jax.Array) -> jax.Array:
    token = nn.Embed(
      self.vocab_size, self.dim, dtype=self.dtype, name="token_embedding"
    )
    position = nn.Embed(
      self.positions, self.dim, dtype=self.dtype, name="position_embedding"
    )
    return token(ids) + position(jnp.arange(ids.shape[1]))


class Encoder(nn.Module):
  """The layers, one after the other."""

  num_layers: int
  num_heads: int
  width: int
  epsilon: float
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    layer = (self.num_heads, self.width, self.epsilon, self.dtype)
    for i in range(self.num_layers):
      x = Layer(*layer, name=f"layers_{i}")(x)
    return x


class TextModel(nn.Module):
  """Embeddings, layers and the last normalisation."""

  embeddings: Callable[..., Embeddings]
  encoder: Callable[..., Encoder]
  epsilon: float

  @nn.compact
  def __call__(self, ids: jax.Array) -> jax.Array:
    x = self.embeddings(name="embeddings")(ids)
    x = self.encoder(name="encoder")(x)
    return _layer_norm(self.epsilon, "final_layer_norm")(x)


class TextEncoder(nn.Module):
  """CLIP's text model without its projection.

  The defaults are those of CLIP ViT-L/14, which conditions Stable Diffusion
  1.5: 123,060,480 parameters.

  Attributes:
    vocab_size: number of tokens.
    hidden_size: D, a multiple of `num_attention_heads`.
    intermediate_size: width of the feed-forward layers.
    num_hidden_layers: attention and feed-forward layers.
    num_attention_heads: of each attention.
    max_position_embeddings: the longest sequence.
    layer_norm_eps: added to variances.
    dtype: of the computation; normalisation and softmax are float32.
  """

  vocab_size: int = 49408
  hidden_size: int = 768
  intermediate_size: int = 3072
  num_hidden_layers: int = 12
  num_attention_heads: int = 12
  max_position_embeddings: int = 77
  layer_norm_eps: float = 1e-5
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, ids: jax.Array) -> jax.Array:
    """Embeds tokens in their context.

    Args:
      ids: [B, N] token numbers; N is 77 for Stable Diffusion, padding included.

    Returns:
      [B, N, D], the last layer's output, normalised.

    Raises:
      ValueError: the sequence is longer than there are positions.
    """
    if ids.shape[1] > self.max_position_embeddings:
      raise ValueError(
        f"{ids.shape[1]} tokens, but only {self.max_position_embeddings} "
        "positions"
      )
    embeddings = functools.partial(
      Embeddings,
      self.vocab_size,
      self.max_position_embeddings,
      self.hidden_size,
      self.dtype,
    )
    encoder = functools.partial(
      Encoder,
      self.num_hidden_layers,
      self.num_attention_heads,
      self.intermediate_size,
      self.layer_norm_eps,
      self.dtype,
    )
    return TextModel(
      embeddings, encoder, self.layer_norm_eps, name="text_model"
    )(ids)
