"""Attention with the heads before the positions."""

import jax
import jax.numpy as jnp


def attend(
  q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None
) -> jax.Array:
  """softmax(q k' / sqrt(D) + bias) v, the softmax in float32.

  With the heads in front, both products are batches of plain matrix products.
  `jax.nn.dot_product_attention` has them after the positions, for which XLA's
  CPU backend takes about twice as long.

  Args:
    q: queries [B, N, T, D] of N heads.
    k: keys [B, N, S, D].
    v: values [B, N, S, D].
    bias: [B, N, T, S], float32, or None.

  Returns:
    [B, N, T, D] in the type of v.
  """
  q = q * q.shape[-1] ** -0.5
  logits = jnp.einsum(
    "bntd,bnsd->bnts", q, k, preferred_element_type=jnp.float32
  )
  if bias is not None:
    logits += bias
  highest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
  weights = jnp.exp(logits - highest)
  total = jnp.sum(weights, axis=-1, keepdims=True)
  y = jnp.einsum("bnts,bnsd->bntd", weights.astype(v.dtype), v)
  return (y / total).astype(v.dtype)
