"""The text encoder against CLIP's text model of transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fairdiff_jax.models.text_encoder import TextEncoder

SMALL = TextEncoder(
  vocab_size=50,
  hidden_size=24,
  intermediate_size=40,
  num_hidden_layers=3,
  num_attention_heads=4,
  max_position_embeddings=13,
)


def _ids(seed, *shape):
  return np.random.default_rng(seed).integers(0, SMALL.vocab_size, shape)


def _relative_error(found, expected):
  return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.fixture(scope="module")
def initial():
  return jax.jit(SMALL.init)(jax.random.key(0), jnp.zeros((1, 13), int))


def test_default_is_the_size_of_the_original():
  ids = jax.ShapeDtypeStruct((1, 77), jnp.int32)
  variables = jax.eval_shape(TextEncoder().init, jax.random.key(0), ids)
  assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == 123_060_480


def test_tokens_see_none_that_follow(initial):
  ids = _ids(0, 2, 13)
  changed = ids.copy()
  changed[:, 7:] = (changed[:, 7:] + 1) % SMALL.vocab_size
  apply = jax.jit(SMALL.apply)
  found, other = apply(initial, ids), apply(initial, changed)
  np.testing.assert_allclose(found[:, :7], other[:, :7], rtol=1e-5, atol=1e-6)
  assert (np.abs(found - other)[:, 7:].max(-1) > 1e-3).all()


def test_too_long_a_sequence_is_refused(initial):
  with pytest.raises(ValueError, match="14 tokens, but only 13 positions"):
    SMALL.apply(initial, _ids(1, 2, 14))


def test_half_precision_keeps_parameters_in_float32():
  module = SMALL.copy(dtype=jnp.bfloat16)
  ids = _ids(2, 2, 13)
  variables = jax.jit(module.init)(jax.random.key(0), ids)
  leaves = jax.tree.leaves(variables)
  assert {leaf.dtype for leaf in leaves} == {np.dtype("float32")}
  half = jax.jit(module.apply)(variables, ids)
  full = jax.jit(SMALL.apply)(variables, ids)
  assert _relative_error(half.astype(np.float32), full) < 0.05


@pytest.mark.parametrize("length", [13, 8])
def test_last_hidden_state(length, tmp_path):
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  from fairdiff_jax.pretrained.stable_diffusion import load

  torch.manual_seed(0)
  config = transformers.CLIPTextConfig(
    vocab_size=50,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=13,
    bos_token_id=0,
    eos_token_id=49,
    pad_token_id=49,
  )
  reference = transformers.CLIPTextModel(config).eval()
  for parameter in reference.parameters():
    parameter.data += 0.2 * torch.randn_like(parameter)
  reference.save_pretrained(tmp_path)
  module, variables = load(tmp_path)["text_encoder"]
  assert module == SMALL

  ids = _ids(3, 2, length)
  with torch.no_grad():
    expected = reference(torch.from_numpy(ids)).last_hidden_state
  found = jax.jit(module.apply)(variables, ids)
  assert found.shape == (2, length, 24)
  assert _relative_error(found, expected.numpy()) < 1e-4
