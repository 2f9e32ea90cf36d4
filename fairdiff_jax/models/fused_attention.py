"""Attention by a kernel of the platform, where one fits the layer."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from fairdiff_jax.models.attention import attend
from fairdiff_jax.models.platforms import at_a_time, devices_in_context

SPLASH_BLOCK = 1024  # tokens at a time of the TPU's attention
WEIGHTS = 2**18  # of a CPU's attention at a time


def attention_implementation(head_size: int, dtype: Any) -> str:
  """Which of `jax.nn.dot_product_attention`'s implementations a layer takes.

  Args:
    head_size: channels per head.
    dtype: of queries, keys and values; cuDNN's have 16 bits.

  Returns:
    'cudnn' where cuDNN's fused attention takes the layer on every GPU that has
    it, otherwise 'xla'.
  """
  fused = (
    jax.default_backend() == "gpu"
    and jnp.dtype(dtype).itemsize == 2
    and head_size <= 128
    and head_size % 8 == 0
  )
  return "cudnn" if fused else "xla"


def _splash_attention(query, key, value):
  """Attention on TPUs that never writes the [N, M] weights to memory.

  The compiler cannot split a kernel over devices: each runs it on its share of
  the batch, over the axes of the mesh in context (`jax.set_mesh`).
  """
  # Imported late: a second that only a TPU has use for.
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
  )

  _, tokens, num_heads, head_size = query.shape
  block = math.gcd(tokens, SPLASH_BLOCK)
  mask = splash_attention_mask.FullMask((tokens, tokens))
  kernel = splash_attention_kernel.make_splash_mha_single_device(
    splash_attention_mask.MultiHeadMask([mask] * num_heads),
    block_sizes=splash_attention_kernel.BlockSizes(
      block_q=block,
      block_kv=block,
      block_q_dkv=block,
      block_kv_dkv=block,
      use_fused_bwd_kernel=True,
    ),
  )
  shard = PartitionSpec(jax.sharding.get_abstract_mesh().auto_axes)

  @partial(jax.shard_map, in_specs=shard, out_specs=shard, check_vma=False)
  def on_shard(query, key, value):
    query *= jnp.asarray(head_size**-0.5, query.dtype)
    heads_first = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    return jnp.swapaxes(jax.vmap(kernel)(*heads_first), 1, 2)

  return on_shard(query, key, value)


def _splash_fits(query, key) -> bool:
  """Whether there are many tokens, and a mesh in context splits the batch."""
  return (
    bool(jax.sharding.get_abstract_mesh().auto_axes)
    and len(query) % devices_in_context() == 0
    and query.shape == key.shape
    and query.shape[1] >= SPLASH_BLOCK
    and math.gcd(query.shape[1], SPLASH_BLOCK) >= 256
  )


def _attention_by_heads(query, key, value):
  """Some queries of one head at a time, whose weights stay in a CPU's cache.

  The backward pass computes the weights again: that is cheaper than to fetch
  them from memory.
  """
  batch, tokens, _, head_size = query.shape
  number = at_a_time(tokens, WEIGHTS // (batch * key.shape[1]))

  def attend_head(head):
    query, key, value = (x[:, None] for x in head)

    def attend_some(some):
      return jax.checkpoint(attend)(some, key, value)

    blocks = query.reshape(batch, 1, -1, number, head_size)
    y = jax.lax.map(attend_some, jnp.moveaxis(blocks, 2, 0))
    return jnp.moveaxis(y, 0, 2).reshape(batch, tokens, -1)

  heads = [jnp.moveaxis(x, 2, 0) for x in (query, key, value)]
  return jnp.moveaxis(jax.lax.map(attend_head, heads), 0, 2)


def fused_attention(
  query: jax.Array, key: jax.Array, value: jax.Array
) -> jax.Array:
  """Attention of [B, N, H, D] to [B, M, H, D], fused where a kernel fits.

  On GPUs by cuDNN, on TPUs by a Pallas kernel, each chosen by the layer's size
  when the program is lowered for a platform; on CPUs some queries of a
  head at a time; otherwise the compiler's own.
  """
  plain = partial(jax.nn.dot_product_attention, implementation="xla")
  kernels = {"cpu": _attention_by_heads}
  if attention_implementation(query.shape[-1], query.dtype) == "cudnn":
    kernels["cuda"] = partial(
      jax.nn.dot_product_attention, implementation="cudnn"
    )
  if _splash_fits(query, key):
    kernels["tpu"] = _splash_attention
  return jax.lax.platform_dependent(query, key, value, default=plain, **kernels)
