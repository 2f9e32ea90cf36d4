"""Which kernel attends where, and that it computes attention."""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from fairdiff_jax.models import fused_attention
from fairdiff_jax.training.mesh import make_mesh


def _heads(*shape):
  rng = np.random.default_rng(0)
  return [rng.normal(size=shape).astype(np.float32) for _ in range(3)]


def _lowered(platform, mesh, batch, tokens, context):
  query, key = (
    jax.ShapeDtypeStruct((batch, n, 2, 40), jnp.bfloat16)
    for n in (tokens, context)
  )
  with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
    traced = jax.jit(fused_attention.fused_attention).trace(query, key, key)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
  "platform, meshed, batch, tokens, context, kernel",
  [
    ("tpu", True, 8, 2048, 2048, True),
    ("tpu", True, 8, 2304, 2304, True),  # 48 x 48, in blocks of 256
    ("cpu", True, 8, 2048, 2048, False),
    ("tpu", False, 8, 2048, 2048, False),  # who shares the batch is unknown
    ("tpu", True, 1, 2048, 2048, False),  # 8 devices cannot share one case
    ("tpu", True, 8, 256, 256, False),
    ("tpu", True, 8, 2048, 77, False),  # the prompt's tokens
    ("tpu", True, 8, 1056, 1056, False),  # blocks would be small
  ],
)
def test_the_kernel_is_taken_where_it_fits(
  platform, meshed, batch, tokens, context, kernel
):
  mesh = make_mesh() if meshed else None
  text = _lowered(platform, mesh, batch, tokens, context)
  assert ("tpu_custom_call" in text) == kernel


def test_cudnn_is_taken_where_it_fits(monkeypatch):
  implementation = fused_attention.attention_implementation
  assert implementation(40, jnp.bfloat16) == "xla"
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  for dtype in (jnp.bfloat16, jnp.float16):
    for head_size in (40, 80, 128):
      assert implementation(head_size, dtype) == "cudnn"
    for head_size in (160, 20):
      assert implementation(head_size, dtype) == "xla"
  assert implementation(40, jnp.float32) == "xla"


def test_the_kernel_attends():
  query, key, value = _heads(1, 1024, 1, 40)
  weight = _heads(1, 1024, 1, 40)[0]

  def total(attend, *heads):
    y = attend(*heads)
    return jnp.sum(y * weight), y

  def run(attend):
    gradient = jax.grad(total, argnums=(1, 2, 3), has_aux=True)
    return jax.jit(gradient, static_argnums=0)(attend, query, key, value)

  with jax.default_matmul_precision("highest"):
    want = run(jax.nn.dot_product_attention)
    mesh = make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh), pltpu.force_tpu_interpret_mode():
      found = run(fused_attention._splash_attention)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
    assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(b)


@pytest.mark.parametrize("tokens, context", [(9, 9), (33, 7), (1, 5)])
def test_head_by_head_is_attention(tokens, context):
  rng = np.random.default_rng(0)
  query, key, value, weight = (
    rng.normal(size=(3, n, 2, 5)).astype(np.float32)
    for n in (tokens, context, context, tokens)
  )

  @partial(jax.jit, static_argnums=0)
  def compute(attend):
    y, vjp = jax.vjp(attend, query, key, value)
    return y, vjp(weight)

  found = compute(fused_attention._attention_by_heads)
  want = compute(jax.nn.dot_product_attention)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
    assert np.linalg.norm(a - b) <= 1e-6 * max(np.linalg.norm(b), 1)


def test_a_cpu_attends_head_by_head():
  texts = {p: _lowered(p, None, 8, 64, 77) for p in ("cpu", "tpu", "cuda")}
  weights = "8x2x64x77x"  # of all heads at once
  assert {p for p, text in texts.items() if weights in text} == {"tpu", "cuda"}
