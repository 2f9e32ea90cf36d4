"""TransUNet against PyTorch, on any sharding, and its checkpoints."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
import safetensors.numpy
from jax.sharding import NamedSharding
from peers import EMBEDDINGS, LAYERS, RESNET

from configs import fairseg
from fairdiff_jax.models import transunet
from fairdiff_jax.models.transunet import TransUNet, upsample
from fairdiff_jax.objectives.segmentation import make_network
from fairdiff_jax.pretrained import vit
from fairdiff_jax.pretrained.fairdiff import load_transunet
from fairdiff_jax.training.mesh import BATCH, make_mesh

SIZE, GRID = 48, 3
SMALL = TransUNet(
  num_classes=4,
  stages=(2, 1, 1),
  width=32,
  hidden_dim=24,
  mlp_dim=20,
  num_heads=3,
  num_layers=2,
  decoder_channels=(16, 12, 8, 8, 4),
)


def _state_dict(hybrid=True):
  """Random weights of SMALL under the original's names."""
  module = SMALL if hybrid else SMALL.copy(stages=())
  return peers.transunet_weights(module, SIZE)


@pytest.fixture(scope="module")
def original():
  """Module and variables of one checkpoint."""
  return load_transunet(_state_dict(), SMALL.num_heads)


@pytest.fixture
def reference():
  pytest.importorskip("torch")
  return peers.TransUNetPeer(_state_dict(), SMALL)


def _normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _assert_close(found, expected, tolerance=1e-4):
  """Relative to each array's largest value, or a thousandth of the tree's."""
  largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))

  def check(path, a, b):
    scale = max(np.abs(b).max(), 1e-3 * largest)
    error = np.abs(np.asarray(a, np.float32) - b).max() / scale
    assert error < tolerance, (jax.tree_util.keystr(path), error)

  jax.tree_util.tree_map_with_path(check, found, expected)


def _channels_first(x):
  return np.moveaxis(x, -1, 1)


def _check_block(module, variables, inputs, reference, function, subtree):
  """Values, and gradients in inputs and parameters, of one block.

  Args:
    module: with its `variables`; training changes the statistics.
    inputs: arrays, NHWC or [B, N, C].
    reference: with its `function` of the same inputs, channels first.
    subtree: of a loaded checkpoint -> that of the block.
  """
  torch = reference.torch
  is_image = inputs[0].ndim == 4
  swap = _channels_first if is_image else np.asarray
  tensors = [torch.tensor(swap(x), requires_grad=True) for x in inputs]
  expected = function(*tensors)
  cotangent = _normal(9, *np.moveaxis(expected.detach().numpy(), 1, -1).shape)
  if not is_image:
    cotangent = cotangent.swapaxes(1, 2)
  expected.backward(torch.tensor(swap(cotangent)))

  @jax.jit
  def run(params, inputs):
    def apply(params, inputs):
      return module.apply(
        {**variables, "params": params}, *inputs, mutable=["batch_stats"]
      )

    y, vjp, updated = jax.vjp(apply, params, inputs, has_aux=True)
    return y, *vjp(cotangent), updated

  y, params_grad, inputs_grad, updated = run(variables["params"], inputs)
  _assert_close(swap(y), expected.detach().numpy())
  inputs_expected = [tensor.grad.numpy() for tensor in tensors]
  _assert_close([swap(x) for x in inputs_grad], inputs_expected, 1e-3)
  _, gradients = load_transunet(reference.gradients(), SMALL.num_heads)
  _assert_close(params_grad, subtree(gradients["params"]), 1e-3)
  if updated:
    _, values = load_transunet(reference.values(), SMALL.num_heads)
    _assert_close(updated["batch_stats"], subtree(values["batch_stats"]))


@pytest.mark.parametrize("stride", [1, 2])
def test_standardized_conv_matches_pytorch(original, reference, stride):
  def subtree(tree):
    return tree["encoder"]["resnet"]["root"]

  module = transunet.StandardizedConv(SMALL.width, 7, stride)
  variables = {"params": subtree(original[1]["params"])}
  name = f"{RESNET}.root.conv"
  function = functools.partial(reference.standardized_conv, name, stride=stride)
  inputs = [_normal(1, 2, 9, 12, 3)]
  _check_block(module, variables, inputs, reference, function, subtree)


@pytest.mark.parametrize("stage, unit", [(0, 0), (0, 1), (1, 0)])
def test_bottleneck_matches_pytorch(original, reference, stage, unit):
  def subtree(tree):
    return tree["encoder"]["resnet"][f"stage_{stage}_unit_{unit}"]

  stride = stage + 1
  module = transunet.Bottleneck(SMALL.width * 2**stage, stride)
  variables = {"params": subtree(original[1]["params"])}
  name = f"{RESNET}.body.block{stage + 1}.unit{unit + 1}"
  function = functools.partial(reference.bottleneck, name, stride=stride)
  channels = variables["params"]["conv1"]["kernel"].shape[2]
  # Small, so that the epsilon of a normalisation counts.
  inputs = [0.01 * _normal(2, 2, 7, 5, channels)]
  _check_block(module, variables, inputs, reference, function, subtree)


def test_transformer_block_matches_pytorch(original, reference):
  def subtree(tree):
    return tree["encoder"]["layer_1"]

  module = transunet.TransformerBlock(SMALL.num_heads, SMALL.mlp_dim)
  variables = {"params": subtree(original[1]["params"])}
  function = functools.partial(reference.transformer_block, f"{LAYERS}.1")
  inputs = [0.01 * _normal(3, 2, 7, SMALL.hidden_dim)]
  _check_block(module, variables, inputs, reference, function, subtree)


@pytest.mark.parametrize("train", [False, True])
def test_decoder_block_matches_pytorch(original, reference, train):
  def subtree(tree):
    return tree["decoder"]["block_1"]

  class Block(transunet.DecoderBlock):
    def __call__(self, x, skip):
      return super().__call__(x, skip, None, train)

  variables = {name: subtree(tree) for name, tree in original[1].items()}
  function = functools.partial(
    reference.decoder_block, "decoder.blocks.1", train=train
  )
  inputs = [_normal(4, 2, 3, 5, 12), _normal(5, 2, 6, 10, 4 * SMALL.width)]
  module = Block(SMALL.decoder_channels[2])
  _check_block(module, variables, inputs, reference, function, subtree)


@pytest.mark.parametrize("hybrid", [True, False])
def test_network_matches_pytorch(hybrid):
  torch = pytest.importorskip("torch")
  state_dict = _state_dict(hybrid)
  module, variables = load_transunet(state_dict, SMALL.num_heads)
  image = _normal(6, 2, SIZE, SIZE, 1)
  found = jax.jit(module.apply)(variables, image)
  with torch.no_grad():
    tensor = torch.tensor(_channels_first(image))
    peer = peers.TransUNetPeer(state_dict, module)
    expected = peer.network(tensor, train=False)
  _assert_close(_channels_first(found), expected.numpy())


def test_upsampling_interpolates_between_the_corners():
  x = _normal(7, 2, 3, 5, 4)
  expected = np.empty((2, 6, 10, 4))
  for b, c in np.ndindex(2, 4):
    rows = [
      np.interp(np.linspace(0, 4, 10), range(5), row) for row in x[b, :, :, c]
    ]
    for j, column in enumerate(np.transpose(rows)):
      expected[b, :, j, c] = np.interp(np.linspace(0, 2, 6), range(3), column)
  _assert_close(upsample(jnp.asarray(x)), expected)


def _count(module):
  image = jax.ShapeDtypeStruct((1, 224, 224, 1), jnp.float32)
  params = jax.eval_shape(module.init, jax.random.key(0), image)["params"]
  return sum(leaf.size for leaf in jax.tree.leaves(params))


def test_default_is_the_size_of_the_original():
  assert _count(TransUNet()) == 105_276_211


@pytest.mark.parametrize("shape", [(3, 32, 48, 1), (2, 48, 16, 3)])
@pytest.mark.parametrize("stages", [(1, 1, 1), ()])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_shapes_and_types(shape, stages, dtype):
  module = SMALL.copy(stages=stages, dtype=dtype)
  image = jax.ShapeDtypeStruct(shape, jnp.float32)
  init = functools.partial(module.init_with_output, mutable=True)
  logits, variables = jax.eval_shape(init, jax.random.key(0), image)
  assert logits.shape == (*shape[:3], SMALL.num_classes)
  assert logits.dtype == jnp.float32
  (features,) = variables.pop("intermediates")["features"]
  assert features.shape == (shape[0], SMALL.hidden_dim)
  leaves = jax.tree.leaves(variables)
  assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}


def test_half_precision_is_close(original):
  module, variables = original
  image = _normal(8, 2, SIZE, SIZE, 1)
  whole = jax.jit(module.apply)(variables, image)
  half = jax.jit(module.copy(dtype=jnp.bfloat16).apply)(variables, image)
  _assert_close(half, whole, 0.1)
  assert np.abs(half - whole).max() > 0


def test_dropout_is_for_training_alone():
  module = transunet.TransformerBlock(2, 6, dropout_rate=0.5)
  x = _normal(10, 2, 5, 4)
  variables = module.init(jax.random.key(0), x)
  plain = module.apply(variables, x)
  rngs = {"dropout": jax.random.key(1)}
  assert np.abs(module.apply(variables, x, True, rngs=rngs) - plain).max() > 0
  still = module.copy(dropout_rate=0.0).apply(variables, x, True)
  np.testing.assert_array_equal(still, plain)


@pytest.mark.parametrize(
  "changes, shape, message",
  [
    ({}, (1, 40, 32, 1), "multiples of 16, got 40 x 32"),
    ({}, (1, 32, 32, 2), "1 or 3 channels, got 2"),
    ({"stages": (1, 1)}, (1, 32, 32, 1), "stages"),
    ({"decoder_channels": (8, 4)}, (1, 32, 32, 1), "decoder_channels"),
    ({"num_heads": 5}, (1, 32, 32, 1), "num_heads=5 does not divide"),
  ],
)
def test_sizes_that_do_not_fit_are_refused(changes, shape, message):
  image = jax.ShapeDtypeStruct(shape, jnp.float32)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(SMALL.copy(**changes).init, jax.random.key(0), image)


def _train_step(module, variables, image, weight):
  """Gradients of a sum over the batch, logits and new statistics."""

  def loss(params):
    logits, updated = module.apply(
      {**variables, "params": params},
      image,
      True,
      weight,
      mutable=["batch_stats"],
    )
    total = jnp.sum(weight[:, None, None, None] * jnp.sin(logits))
    return total, (logits, updated["batch_stats"])

  grads, aux = jax.grad(loss, has_aux=True)(variables["params"])
  if module.axis_name is not None:
    grads = jax.lax.psum(grads, module.axis_name)
  return grads, *aux


@pytest.fixture(scope="module")
def one_device(original):
  """A batch with padding, and one step on one device."""
  module, variables = original
  image = _normal(11, 8, SIZE, SIZE, 1)
  weight = np.array([1, 1, 1, 1, 1, 1, 0, 0], np.float32)
  step = jax.jit(functools.partial(_train_step, module))
  return image, weight, step(variables, image, weight)


def test_training_matches_pytorch(original, reference, one_device):
  torch = reference.torch
  image, weight, (grads, logits, stats) = one_device
  keep = weight > 0
  tensor = torch.tensor(_channels_first(image[keep]))
  expected = reference.network(tensor, train=True)
  torch.sin(expected).sum().backward()
  found = _channels_first(logits[keep])
  _assert_close(found, expected.detach().numpy())
  _, values = load_transunet(reference.values(), SMALL.num_heads)
  _assert_close(stats, values["batch_stats"])
  _, gradients = load_transunet(reference.gradients(), SMALL.num_heads)
  _assert_close(grads, gradients["params"], 1e-3)


def test_eight_devices_equal_one(original, one_device):
  module, variables = original
  image, weight, expected = one_device
  sharding = NamedSharding(make_mesh(), BATCH)
  image, weight = jax.device_put((image, weight), sharding)
  step = jax.jit(functools.partial(_train_step, module))
  found = step(variables, image, weight)
  assert len(found[1].sharding.device_set) == 8
  _assert_close(found, expected)


def test_named_shards_equal_the_whole_batch(original, one_device):
  module, variables = original
  image, weight, expected = one_device
  module = module.copy(axis_name="shard")
  step = jax.pmap(
    functools.partial(_train_step, module, variables), axis_name="shard"
  )
  grads, logits, stats = step(image[:, None], weight[:, None])
  first = jax.tree.map(lambda x: x[0], (grads, stats))
  _assert_close((first[0], logits[:, 0], first[1]), expected)


def test_sizes_are_read_off_the_checkpoint(original):
  module, variables = original
  assert module == SMALL
  leaves = jax.tree.leaves(variables)
  assert {leaf.dtype for leaf in leaves} == {np.dtype("float32")}
  module, _ = load_transunet(_state_dict(hybrid=False), SMALL.num_heads)
  assert module == SMALL.copy(stages=(), width=TransUNet.width)


@pytest.mark.parametrize(
  "name",
  [
    f"{RESNET}.root.conv.weight",
    f"{RESNET}.body.block3.unit1.gn_proj.bias",
    f"{LAYERS}.0.attn.key.bias",
    "decoder.blocks.2.conv2.1.running_var",
  ],
)
def test_missing_tensor_is_named(name):
  state_dict = _state_dict()
  del state_dict[name]
  with pytest.raises(ValueError, match=f"no tensor '{re.escape(name)}'"):
    load_transunet(state_dict, SMALL.num_heads)


def test_unused_tensors_are_listed():
  state_dict = _state_dict() | {"decoder.extra": np.zeros(1)}
  with pytest.raises(ValueError, match=r"unused.*\['decoder.extra'\]"):
    load_transunet(state_dict, SMALL.num_heads)


def test_wrong_shapes_are_named():
  state_dict = _state_dict()
  state_dict[f"{RESNET}.body.block1.unit2.gn1.weight"] = np.zeros(5)
  state_dict["decoder.blocks.0.conv1.1.running_mean"] = np.zeros(7)
  message = (
    r"batch_stats/decoder/block_0/conv1/norm/mean: \(7,\), not \(12,\)\n"
    r".*resnet/stage_0_unit_1/norm1/scale: \(5,\), not \(32,\)"
  )
  with pytest.raises(ValueError, match=message):
    load_transunet(state_dict, SMALL.num_heads)


def test_heads_that_do_not_divide_are_refused():
  with pytest.raises(ValueError, match="query: 5 heads do not divide 24"):
    load_transunet(_state_dict(), num_heads=5)


def _google(state_dict, side=GRID):
  """The encoder of a state dict under Google's names, for a grid of `side`."""
  arrays = {"cls": np.zeros((1, 1, SMALL.hidden_dim), np.float32)}
  arrays["head/kernel"] = np.zeros((SMALL.hidden_dim, 10), np.float32)
  arrays["pre_logits/bias"] = np.zeros(SMALL.hidden_dim, np.float32)
  rules = [
    (rf"{EMBEDDINGS}\.patch_embeddings", "embedding"),
    (r"transformer\.encoder\.encoder_norm", "Transformer/encoder_norm"),
    (rf"{LAYERS}\.(\d+)", r"Transformer/encoderblock_\1"),
    (r"\.attention_norm", "/LayerNorm_0"),
    (r"\.ffn_norm", "/LayerNorm_2"),
    (r"\.attn\.", "/MultiHeadDotProductAttention_1/"),
    (r"\.ffn\.fc1", "/MlpBlock_3/Dense_0"),
    (r"\.ffn\.fc2", "/MlpBlock_3/Dense_1"),
    (rf"{RESNET}\.root\.(conv|gn)", r"\1_root"),
    (rf"{RESNET}\.body\.(block\d)\.(unit\d)\.", r"\1/\2/"),
    (r"downsample", "conv_proj"),
    (r"\.bias$", "/bias"),
  ]
  heads = (SMALL.num_heads, SMALL.hidden_dim // SMALL.num_heads)
  for name, value in state_dict.items():
    if not name.startswith("transformer") or "position" in name:
      continue
    for pattern, replacement in rules:
      name = re.sub(pattern, replacement, name)
    if value.ndim > 1:
      name = name.replace(".weight", "/kernel")
      value = value.transpose(*range(2, value.ndim), 1, 0)
    name = name.replace(".weight", "/scale")
    if re.search("query|key|value", name):
      value = value.reshape(*value.shape[:-1], *heads)
    elif "out/kernel" in name:
      value = value.reshape(*heads, -1)
    elif re.search(r"gn\d|gn_", name):
      value = value.reshape(1, 1, 1, -1)
    arrays[name] = value
  arrays["Transformer/posembed_input/pos_embedding"] = _normal(
    12, 1, 1 + side**2, SMALL.hidden_dim
  )
  return arrays


@pytest.fixture
def save(tmp_path):
  def save(arrays):
    np.savez(tmp_path / "vit.npz", **arrays)
    return str(tmp_path / "vit.npz")

  return save


@pytest.mark.parametrize("hybrid", [True, False])
def test_google_encoder_is_read(save, hybrid):
  state_dict = _state_dict(hybrid=hybrid)
  arrays = _google(state_dict)
  position = arrays["Transformer/posembed_input/pos_embedding"][:, 1:]
  state_dict[f"{EMBEDDINGS}.position_embeddings"] = position
  original, expected = load_transunet(state_dict, SMALL.num_heads)

  module, variables = vit.load(save(arrays), image_size=SIZE, num_classes=4)
  channels = TransUNet.decoder_channels
  assert module == original.copy(decoder_channels=channels)
  jax.tree.map(
    np.testing.assert_array_equal,
    variables["params"]["encoder"],
    expected["params"]["encoder"],
  )
  leaves = jax.tree.leaves(variables)
  assert {leaf.dtype for leaf in leaves} == {np.dtype("float32")}
  logits = jax.eval_shape(
    module.apply, variables, np.zeros((2, SIZE, SIZE, 1), np.float32)
  )
  assert logits.shape == (2, SIZE, SIZE, 4)


def test_seed_draws_the_decoder(save):
  path = save(_google(_state_dict(hybrid=False)))
  first, again, other = (
    vit.load(path, image_size=SIZE, seed=seed)[1]["params"]
    for seed in (0, 0, 1)
  )
  jax.tree.map(np.testing.assert_array_equal, first, again)
  kernels = [tree["decoder"]["conv_out"]["kernel"] for tree in (first, other)]
  assert np.abs(kernels[0] - kernels[1]).max() > 0


def test_position_embedding_is_interpolated_between_the_corners():
  embedding = _normal(13, 1, 1 + 9, 2)
  found = vit.resize_position_embedding(embedding, 5)
  table = embedding[0, 1:].reshape(3, 3, 2)
  expected = np.empty((5, 5, 2))
  at = np.linspace(0, 2, 5)
  for c in range(2):
    rows = [np.interp(at, range(3), row) for row in table[:, :, c]]
    for j, column in enumerate(np.transpose(rows)):
      expected[:, j, c] = np.interp(at, range(3), column)
  assert found.dtype == np.float32
  _assert_close(found, expected.reshape(1, 25, 2))


def test_position_embedding_fits_the_image(save):
  path = save(_google(_state_dict(hybrid=False), side=2))
  _, variables = vit.load(path, image_size=64)
  embedding = variables["params"]["encoder"]["position_embedding"]
  assert embedding.shape == (1, 16, SMALL.hidden_dim)
  with pytest.raises(ValueError, match="8 tokens"):
    vit.resize_position_embedding(_normal(14, 1, 8, 2), 3)


@pytest.mark.parametrize(
  "name",
  [
    "block2/unit1/gn_proj/scale",
    "Transformer/encoderblock_0/MultiHeadDotProductAttention_1/out/bias",
    "Transformer/encoder_norm/bias",
    "embedding/kernel",
  ],
)
def test_missing_array_is_named(save, name):
  arrays = _google(_state_dict())
  del arrays[name]
  with pytest.raises(ValueError, match=f"no tensor '{name}'"):
    vit.load(save(arrays), image_size=SIZE)


def test_unused_arrays_are_listed(save):
  arrays = _google(_state_dict())
  # Without its first convolution, what is left of the ResNet is not excused.
  del arrays["conv_root/kernel"]
  with pytest.raises(ValueError, match="unused.*'block1/unit1/conv1/kernel'"):
    vit.load(save(arrays), image_size=SIZE)


def test_misshapen_array_is_named(save):
  arrays = _google(_state_dict())
  arrays["block1/unit2/gn2/bias"] = np.zeros((1, 1, 1, 5), np.float32)
  message = r"resnet/stage_0_unit_1/norm2/bias: \(5,\), not \(32,\)"
  with pytest.raises(ValueError, match=message):
    vit.load(save(arrays), image_size=SIZE)


def _config(path, **changes):
  """The recipe's, with the sizes of SMALL."""
  config = fairseg.get_config("transunet").unlock().segmenter
  sizes = {name: getattr(SMALL, name) for name in config.transunet}
  config.transunet.update(sizes)
  config.image_size = SIZE
  config.weights = str(path)
  config.update_from_flattened_dict(changes)
  return config


def test_another_transunet_says_which_fields_to_set(tmp_path):
  path = tmp_path / "a.safetensors"
  weights = peers.transunet_weights(SMALL.copy(num_classes=3), SIZE)
  safetensors.numpy.save_file(weights, path)
  start = f"{path} does not fit segmenter.transunet"
  for changes, message in (
    (
      {"transunet.num_layers": 12, "transunet.mlp_dim": 9},
      ": it is a ViT (24 channels, 2 blocks): set"
      " segmenter.transunet.mlp_dim=20 (now 9),"
      " segmenter.transunet.num_layers=2 (now 12), or name other",
    ),
    ({"image_size": 64}, ": set segmenter.image_size=48 (now 64), or name"),
  ):
    with pytest.raises(ValueError) as raised:
      make_network(_config(path, **changes)).load()
    assert str(raised.value).startswith(start + message)
  safetensors.numpy.save_file(_state_dict(), path)
  message = "its num_classes is 4, and 3 is needed; name other weights"
  with pytest.raises(ValueError, match=message):
    make_network(_config(path)).load()


def test_a_transformer_leaves_the_decoder_to_the_config(save):
  """And the width of a ResNet that there is none of."""
  path = save(_google(_state_dict(hybrid=False)))
  changes = {"transunet.stages": (), "transunet.width": 96}
  variables = make_network(_config(path, **changes)).load()
  found = variables.params["decoder"]["conv_in"]["conv"]["kernel"].shape[-1]
  assert found == SMALL.decoder_channels[0]
