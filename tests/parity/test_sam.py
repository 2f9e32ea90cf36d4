"""SAM's networks and checkpoints against the reference, in PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
import safetensors.numpy
from peers import tensors, to_torch

from fairdiff_jax.models import sam
from fairdiff_jax.pretrained import segment_anything

WINDOW = 4
ENCODER = {"embed_dim": 32, "depth": 4, "num_heads": 2}
GLOBAL = (1, 3)
DIM, MLP_DIM = 32, 40
ODD, EVEN = 7 * sam.PATCH, 8 * sam.PATCH  # 4 does not divide 7 positions.


def reference_sam(image_size=ODD, num_masks=3, window=WINDOW):
  """A small SAM of the reference with random weights."""
  pytest.importorskip("torch")
  return peers.sam(
    image_size,
    global_blocks=GLOBAL,
    window=window,
    decoder_dim=DIM,
    decoder_mlp_dim=MLP_DIM,
    num_masks=num_masks,
    **ENCODER,
  )


def relative_error(found, expected):
  found, expected = np.asarray(found), np.asarray(expected)
  assert found.shape == expected.shape
  return np.abs(found - expected).max() / np.abs(expected).max()


def uniform(seed, *shape):
  return np.random.default_rng(seed).random(shape, np.float32)


def write(path, arrays):
  safetensors.numpy.save_file(
    {name: np.ascontiguousarray(array) for name, array in arrays.items()}, path
  )
  return path


@pytest.fixture(scope="module", params=[ODD, EVEN])
def pair(request, tmp_path_factory):
  """The reference, and module and variables of its checkpoint."""
  model = reference_sam(request.param)
  path = write(
    tmp_path_factory.mktemp("sam") / "sam.safetensors", tensors(model)
  )
  module, variables = segment_anything.load(
    path, image_size=request.param, num_classes=2
  )
  return model, module, variables


@pytest.fixture(scope="module")
def checkpoint():
  """Tensors of a checkpoint with four masks."""
  return tensors(reference_sam(EVEN, num_masks=4))


def _part(variables, name):
  """One network's variables."""
  return {k: v[name] for k, v in variables.items() if name in v}


def _encoder(dtype=jnp.float32):
  return sam.ImageEncoder(
    global_blocks=GLOBAL, window=WINDOW, out_dim=DIM, dtype=dtype, **ENCODER
  )


def test_image_encoder(pair):
  model, module, variables = pair
  image = uniform(1, 2, module.image_size, module.image_size, 3) - 0.5
  expected = model.image_encoder(to_torch(image.transpose(0, 3, 1, 2)))
  expected = expected.detach().numpy().transpose(0, 2, 3, 1)
  part = _part(variables, "image_encoder")
  found = jax.jit(_encoder().apply)(part, image)
  assert relative_error(found, expected) < 1e-4
  low = jax.jit(_encoder(jnp.bfloat16).apply)(part, image)
  assert low.dtype == jnp.bfloat16
  assert 1e-4 < relative_error(low.astype(np.float32), expected) < 0.1


@pytest.mark.parametrize("size", [512, 1024])
def test_published_image_sizes(tmp_path, size):
  """From image to masks, with the published windows of 14 positions."""
  model = reference_sam(size, window=14)
  path = write(tmp_path / "sam.safetensors", tensors(model))
  module, variables = segment_anything.load(
    path, image_size=size, num_classes=2
  )
  assert module.window == 14
  image = uniform(4, 1, size, size, 1)
  found = jax.jit(module.apply)(variables, image)
  rgb = np.broadcast_to(image.transpose(0, 3, 1, 2), (1, 3, size, size))
  expected = peers.samed_logits(model, to_torch(rgb.copy()))
  expected = expected.detach().numpy().transpose(0, 2, 3, 1)
  assert relative_error(found, expected) < 1e-4


def test_empty_prompt(pair):
  model, module, variables = pair
  grid = module.image_size // sam.PATCH
  sparse, dense = model.prompt_encoder(None, None, None)
  prompt, position = sam.PromptEncoder(DIM).apply(
    _part(variables, "prompt_encoder"), grid, grid
  )
  assert sparse.shape[1] == 0
  expected = dense.detach().numpy().transpose(0, 2, 3, 1)
  found = np.broadcast_to(prompt, (1, grid, grid, DIM))
  np.testing.assert_array_equal(found, expected)
  expected = model.prompt_encoder.get_dense_pe()[0].numpy().transpose(1, 2, 0)
  assert relative_error(position, expected) < 1e-4


def test_positional_encoding_of_a_rectangle(pair):
  model, _, variables = pair
  _, position = sam.PromptEncoder(DIM).apply(
    _part(variables, "prompt_encoder"), 3, 5
  )
  expected = model.prompt_encoder.pe_layer((3, 5)).numpy().transpose(1, 2, 0)
  assert relative_error(position, expected) < 1e-4


def test_mask_decoder(pair):
  model, module, variables = pair
  grid = module.image_size // sam.PATCH
  embedding = uniform(2, 3, grid, grid, DIM) - 0.5
  prompt, position = sam.PromptEncoder(DIM).apply(
    _part(variables, "prompt_encoder"), grid, grid
  )
  decoder = sam.MaskDecoder(num_masks=3, mlp_dim=MLP_DIM)
  masks, iou = jax.jit(decoder.apply)(
    _part(variables, "mask_decoder"), embedding, prompt, position
  )
  sparse, dense = model.prompt_encoder(None, None, None)
  expected, expected_iou = model.mask_decoder.predict_masks(
    to_torch(embedding.transpose(0, 3, 1, 2)),
    model.prompt_encoder.get_dense_pe(),
    sparse,
    dense,
  )
  expected = expected.detach().numpy().transpose(0, 2, 3, 1)
  assert relative_error(masks, expected) < 1e-4
  assert relative_error(iou, expected_iou.detach()) < 1e-4


@pytest.mark.parametrize("shape", [(2, 7, 9, 3), (1, 8, 4, 2), (2, 3, 2, 1)])
def test_windows(shape):
  x = uniform(3, *shape)
  windows = sam.to_windows(x, 4)
  rows, columns = -(-shape[1] // 4), -(-shape[2] // 4)
  assert windows.shape == (shape[0] * rows * columns, 4, 4, shape[3])
  np.testing.assert_array_equal(windows[0, :3, :2], x[0, :3, :2][:4, :4])
  np.testing.assert_allclose(windows.sum(), x.sum(), rtol=1e-5)
  np.testing.assert_array_equal(sam.from_windows(windows, *shape[1:3]), x)


@pytest.mark.parametrize(
  "size, sizes, count",
  [
    (1024, {}, 89_670_912),
    (512, {}, 87_278_848),
    (1024, (1024, 24, 16, (5, 11, 17, 23)), 308_278_272),
    (1024, (1280, 32, 16, (7, 15, 23, 31)), 637_026_048),
  ],
  ids=["B", "B at 512", "L", "H"],
)
def test_sizes_are_those_of_the_original(size, sizes, count):
  image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  encoder = sam.ImageEncoder(*sizes)
  variables = jax.eval_shape(encoder.init, jax.random.key(0), image)
  assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == count


def test_image_of_a_fraction_of_a_patch_is_refused():
  with pytest.raises(ValueError, match=r"multiples of 16.*\(1, 32, 40, 3\)"):
    sam.ImageEncoder().init(jax.random.key(0), jnp.zeros((1, 32, 40, 3)))


def test_sizes_are_read_off_the_checkpoint(pair):
  _, module, variables = pair
  assert (module.global_blocks, module.window) == (GLOBAL, WINDOW)
  assert {k: getattr(module, k) for k in ENCODER} == ENCODER
  assert (module.decoder_dim, module.decoder_mlp_dim) == (DIM, MLP_DIM)
  leaves = jax.tree.leaves(variables)
  assert {leaf.dtype for leaf in leaves} == {np.dtype("float32")}


def test_every_tensor_returns(pair):
  model, _, variables = pair
  params = {k: v for k, v in variables["params"].items() if k != "lora"}
  found = segment_anything.state_dict({**variables, "params": params})
  expected = tensors(model)
  assert found.keys() == expected.keys()
  for name, array in found.items():
    np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_pytorch_file(tmp_path, checkpoint):
  import torch

  arrays = write(tmp_path / "sam.safetensors", checkpoint)
  torch.save(
    {name: to_torch(array) for name, array in checkpoint.items()},
    tmp_path / "sam.pth",
  )
  sizes = {"image_size": 64, "num_classes": 1}
  expected, found = (
    segment_anything.load(path, **sizes)
    for path in (arrays, tmp_path / "sam.pth")
  )
  assert found[0] == expected[0]
  jax.tree.map(np.testing.assert_array_equal, found[1], expected[1])


@pytest.mark.parametrize("size", [ODD, 10 * sam.PATCH])
def test_positions_are_resized(tmp_path, checkpoint, size):
  from torch.nn.functional import interpolate

  path = write(tmp_path / "sam.safetensors", checkpoint)
  _, variables = segment_anything.load(path, image_size=size, num_classes=3)
  encoder, grid = variables["params"]["image_encoder"], size // sam.PATCH
  expected = interpolate(
    to_torch(checkpoint["image_encoder.pos_embed"]).permute(0, 3, 1, 2),
    (grid, grid),
    mode="bilinear",
  ).permute(0, 2, 3, 1)
  assert relative_error(encoder["pos_embed"], expected) < 1e-5
  for i in range(ENCODER["depth"]):
    for name in ("rel_pos_h", "rel_pos_w"):
      expected = checkpoint[f"image_encoder.blocks.{i}.attn.{name}"]
      if i in GLOBAL:
        shape = (2 * grid - 1, expected.shape[1])
        expected = interpolate(
          to_torch(expected)[None, None], shape, mode="bilinear"
        )[0, 0]
      found = encoder[f"blocks_{i}"]["attn"][name]
      assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize(
  "size, num_classes, kept",
  [(EVEN, 3, True), (EVEN, 2, False), (ODD, 3, False)],
)
def test_parts_per_mask_are_kept_only_if_all_fits(
  tmp_path, checkpoint, size, num_classes, kept
):
  path = write(tmp_path / "sam.safetensors", checkpoint)
  first, second = (
    segment_anything.load(
      path, image_size=size, num_classes=num_classes, seed=seed
    )[1]["params"]["mask_decoder"]
    for seed in (0, 1)
  )
  tokens = first["mask_tokens"]["embedding"]
  assert tokens.shape == (num_classes + 1, DIM)
  expected = checkpoint["mask_decoder.mask_tokens.weight"]
  assert np.array_equal(tokens[:1], expected[:1]) == kept
  for name, part in first.items():
    same = [
      np.array_equal(a, b)
      for a, b in zip(
        jax.tree.leaves(part), jax.tree.leaves(second[name]), strict=True
      )
    ]
    per_mask = name.startswith(
      ("mask_tokens", "output_hypernetworks", "iou_prediction")
    )
    assert all(same) == (kept or not per_mask), name


def test_missing_tensor_is_named(tmp_path, checkpoint):
  arrays = dict(checkpoint)
  name = "image_encoder.blocks.2.attn.rel_pos_w"
  del arrays[name]
  path = write(tmp_path / "sam.safetensors", arrays)
  with pytest.raises(ValueError, match=f"no tensor '{name}'"):
    segment_anything.load(path)


def test_unused_tensors_are_listed(tmp_path, checkpoint):
  arrays = checkpoint | {"mask_decoder.extra.weight": np.zeros(1, np.float32)}
  path = write(tmp_path / "sam.safetensors", arrays)
  message = r"unused.*\['mask_decoder.extra.weight'\]"
  with pytest.raises(ValueError, match=message):
    segment_anything.load(path)


@pytest.mark.parametrize(
  "name, path",
  [
    (
      "image_encoder.blocks.1.attn.rel_pos_w",
      "params/image_encoder/blocks_1/attn/rel_pos_w",
    ),
    (
      "mask_decoder.mask_tokens.weight",
      "params/mask_decoder/mask_tokens/embedding",
    ),
  ],
)
def test_wrong_shape_is_named(tmp_path, checkpoint, name, path):
  arrays = checkpoint | {name: checkpoint[name][:, :-1]}
  file = write(tmp_path / "sam.safetensors", arrays)
  with pytest.raises(ValueError, match=path):
    segment_anything.load(file)


def test_image_size_must_be_whole_patches(tmp_path):
  with pytest.raises(ValueError, match="multiple of 16, got 500"):
    segment_anything.load(tmp_path / "sam.safetensors", image_size=500)
