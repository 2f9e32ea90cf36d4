"""SAMed against the reference's SAM with low-rank changes, in PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from peers import samed_logits, tensors, to_torch
from test_sam import (
  ENCODER,
  ODD,
  reference_sam,
  relative_error,
  uniform,
  write,
)

from fairdiff_jax.models import samed
from fairdiff_jax.models.samed import SAMed
from fairdiff_jax.pretrained import segment_anything
from fairdiff_jax.pretrained.fairdiff import load_samed_lora, save_samed_lora

RANK = 3
SMALL = SAMed(
  image_size=64,
  rank=RANK,
  embed_dim=16,
  depth=3,
  num_heads=2,
  global_blocks=(1,),
  window=3,
  decoder_dim=16,
  decoder_depth=1,
  decoder_heads=2,
  decoder_mlp_dim=20,
)


def _count(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _changed(variables, seed=0):
  """The variables with random low-rank factors, as after training."""
  rng = np.random.default_rng(seed)
  lora = {
    name: rng.normal(0, 0.3, leaf.shape).astype(np.float32)
    for name, leaf in variables["params"]["lora"].items()
  }
  return {**variables, "params": {**variables["params"], "lora": lora}}


@pytest.fixture(scope="module")
def small():
  """Variables of SMALL with low-rank changes."""
  image = jnp.zeros((1, 64, 64, 1))
  variables = jax.jit(SMALL.init)(jax.random.key(0), image)
  return _changed(jax.tree.map(np.asarray, variables))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
  """The reference, and module and variables of its checkpoint."""
  model = reference_sam()
  path = write(
    tmp_path_factory.mktemp("samed") / "sam.safetensors", tensors(model)
  )
  return model, *segment_anything.load(path, image_size=ODD, rank=RANK)


def _reference_logits(model, image, factors=None):
  """Logits [B, h, w, masks] of images [B, H, W, 3]."""
  tensor = to_torch(image.transpose(0, 3, 1, 2))
  return samed_logits(model, tensor, factors).permute(0, 2, 3, 1)


def test_sizes_are_those_of_the_original():
  image = jax.ShapeDtypeStruct((1, 512, 512, 1), jnp.float32)
  variables = jax.eval_shape(SAMed().init, jax.random.key(0), image)
  trainable, frozen = samed.split(variables["params"])
  assert _count(trainable) == 4_071_695
  assert _count(variables["params"]) == 91_350_543
  assert {**trainable, **frozen} == variables["params"]
  logits = jax.eval_shape(SAMed().apply, variables, image)
  assert logits.shape == (1, 128, 128, 3)


def test_low_rank_changes_are_the_identity_at_first(original):
  model, module, variables = original
  image = uniform(1, 2, ODD, ODD, 3)
  found = jax.jit(module.apply)(variables, image)
  expected = _reference_logits(model, image).detach()
  assert relative_error(found, expected) < 1e-4


def test_low_rank_changes_and_gradients(original):
  model, module, variables = original
  variables = _changed(variables)
  image = uniform(2, 2, ODD, ODD, 3)
  weight = uniform(3, 2, ODD // 4, ODD // 4, 3) - 0.5
  trainable, frozen = samed.split(variables["params"])

  @jax.jit
  def compute(trainable):
    def loss(trainable):
      params = {**trainable, **frozen}
      logits = module.apply({**variables, "params": params}, image, True)
      return jnp.sum(weight * logits), logits

    return jax.grad(loss, has_aux=True)(trainable)

  gradient, logits = compute(trainable)
  factors = {
    name: to_torch(array).requires_grad_()
    for name, array in save_samed_lora(variables).items()
    if name.startswith("w_")
  }
  expected = _reference_logits(model, image, factors)
  (to_torch(weight) * expected).sum().backward()
  assert relative_error(logits, expected.detach()) < 1e-4

  found = save_samed_lora(
    {"params": {**gradient, "image_encoder": {}}, "constants": {}}
  )
  wanted = factors | {
    name: parameter
    for name, parameter in model.named_parameters()
    if not name.startswith("image_encoder")
  }
  assert found.keys() == wanted.keys()
  largest = max(np.abs(array).max() for array in found.values())
  for name, parameter in wanted.items():
    if parameter.grad is None:  # of other prompts, or of the quality
      assert not found[name].any(), name
    elif name.endswith("k_proj.bias"):  # cancelled by the softmax
      assert np.abs(found[name]).max() < 1e-5 * largest, name
    else:
      assert relative_error(found[name], parameter.grad) < 1e-3, name


def test_gradients_stop_at_the_image_encoder(small):
  image = uniform(4, 2, 64, 64, 1)

  def loss(params):
    return jnp.sum(SMALL.apply({**small, "params": params}, image) ** 2)

  gradient = jax.jit(jax.grad(loss))(small["params"])
  frozen = gradient.pop("image_encoder")
  assert not any(leaf.any() for leaf in jax.tree.leaves(frozen))
  for leaf in jax.tree.leaves(gradient["lora"]):
    assert (np.abs(leaf).max(axis=(1, 2)) > 0).all()


def test_merged_changes_give_the_same_output(small):
  image = uniform(5, 2, 64, 64, 1)
  merged = {**small, "params": samed.merge_lora(small["params"])}
  apply = jax.jit(SMALL.apply)
  expected = apply(small, image)
  assert relative_error(apply(merged, image), expected) < 1e-5
  lora = merged["params"]["lora"]
  assert not lora["q_b"].any() and not lora["v_b"].any()
  untouched = jax.tree.map(jnp.zeros_like, small["params"]["lora"])
  params = {**small["params"], "lora": untouched}
  without = apply({**small, "params": params}, image)
  assert relative_error(without, expected) > 1e-3


def test_grey_images_are_repeated(small):
  image = uniform(6, 2, 64, 64, 1)
  apply = jax.jit(SMALL.apply)
  found = apply(small, image)
  assert found.shape == (2, 16, 16, 3)
  repeated = apply(small, image.repeat(3, axis=-1))
  # Two programs, which may round otherwise.
  assert relative_error(found, repeated) < 1e-6


@pytest.mark.parametrize("shape", [(1, 64, 48, 3), (1, 64, 64, 2), (64, 64, 3)])
def test_other_images_are_refused(small, shape):
  with pytest.raises(ValueError, match=r"\[B, 64, 64, 1 or 3\], got"):
    SMALL.apply(small, jnp.zeros(shape))


def test_every_parameter_has_one_label(small):
  labels = traverse_util.flatten_dict(samed.labels(small["params"]), sep="/")
  assert {
    path.split("/")[0] for path, x in labels.items() if x == "frozen"
  } == {"image_encoder"}
  with pytest.raises(ValueError, match=r"\['head/kernel'\]"):
    samed.labels({**small["params"], "head": {"kernel": jnp.zeros(1)}})
  with pytest.raises(ValueError, match=r"\['head/kernel'\]"):
    samed.split({**small["params"], "head": {"kernel": jnp.zeros(1)}})


def test_file_of_what_is_learnt(original):
  model, _, variables = original
  changed = _changed(variables)
  state_dict = save_samed_lora(changed)
  depth = ENCODER["depth"]
  factors = {f"w_{ab}_{i:03d}" for ab in "ab" for i in range(2 * depth)}
  kept = {k for k in tensors(model) if not k.startswith("image_encoder")}
  assert state_dict.keys() == factors | kept
  assert state_dict["w_a_001"].shape == (RANK, ENCODER["embed_dim"])
  assert state_dict["w_b_001"].shape == (ENCODER["embed_dim"], RANK)
  np.testing.assert_array_equal(
    state_dict["w_b_003"].T, changed["params"]["lora"]["v_b"][1]
  )

  others = jax.tree.map(np.ones_like, changed)
  found = load_samed_lora(state_dict, others)
  expected = {**changed, "params": dict(changed["params"])}
  expected["params"]["image_encoder"] = others["params"]["image_encoder"]
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_file_must_match(small):
  state_dict = save_samed_lora(small)
  missing = {k: v for k, v in state_dict.items() if k != "w_b_004"}
  with pytest.raises(ValueError, match="no tensor 'w_b_004'"):
    load_samed_lora(missing, small)
  extra = {**state_dict, "w_a_006": np.zeros((RANK, 16))}
  with pytest.raises(ValueError, match=r"unused.*\['w_a_006'\]"):
    load_samed_lora(extra, small)
  wrong = {
    k: np.zeros((5, 16)) if k.startswith("w_a") else v
    for k, v in state_dict.items()
  }
  with pytest.raises(ValueError, match=r"params/lora/q_a: \(3, 16, 5\), not"):
    load_samed_lora(wrong, small)
