"""TransUNet against PyTorch, on any sharding, and its checkpoints."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from fairdiff_jax.models import transunet
from fairdiff_jax.models.transunet import TransUNet, upsample
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
EMBEDDINGS, LAYERS = "transformer.embeddings", "transformer.encoder.layer"
RESNET = f"{EMBEDDINGS}.hybrid_model"


def _state_dict(seed=0, hybrid=True):
  """Random weights of SMALL under the original's names."""
  rng = np.random.default_rng(seed)
  state = {}

  def weight(name, *shape, bias=True):
    fan_in = np.prod(shape[1:])
    state[f"{name}.weight"] = rng.normal(0, fan_in**-0.5, shape)
    if bias:
      state[f"{name}.bias"] = rng.normal(0, 0.3, shape[0])

  def norm(name, size):
    state[f"{name}.weight"] = rng.uniform(0.5, 1.5, size)
    state[f"{name}.bias"] = rng.normal(0, 0.3, size)

  def batch_norm(name, size):
    norm(name, size)
    state[f"{name}.running_mean"] = rng.normal(0, 0.3, size)
    state[f"{name}.running_var"] = rng.uniform(0.5, 1.5, size)
    state[f"{name}.num_batches_tracked"] = np.array(7)

  dim, channels, patch, skips = SMALL.hidden_dim, 3, 16, (0, 0, 0, 0)
  if hybrid:
    weight(f"{RESNET}.root.conv", SMALL.width, 3, 7, 7, bias=False)
    norm(f"{RESNET}.root.gn", SMALL.width)
    channels = SMALL.width
    for i, num_units in enumerate(SMALL.stages):
      middle = SMALL.width * 2**i
      for j in range(num_units):
        name = f"{RESNET}.body.block{i + 1}.unit{j + 1}"
        weight(f"{name}.conv1", middle, channels, 1, 1, bias=False)
        weight(f"{name}.conv2", middle, middle, 3, 3, bias=False)
        weight(f"{name}.conv3", 4 * middle, middle, 1, 1, bias=False)
        norm(f"{name}.gn1", middle)
        norm(f"{name}.gn2", middle)
        norm(f"{name}.gn3", 4 * middle)
        if not j:
          weight(f"{name}.downsample", 4 * middle, channels, 1, 1, bias=False)
          norm(f"{name}.gn_proj", 4 * middle)
        channels = 4 * middle
    patch, skips = 1, (8 * SMALL.width, 4 * SMALL.width, SMALL.width, 0)

  weight(f"{EMBEDDINGS}.patch_embeddings", dim, channels, patch, patch)
  position = rng.normal(0, 0.5, (1, GRID**2, dim))
  state[f"{EMBEDDINGS}.position_embeddings"] = position
  for i in range(SMALL.num_layers):
    norm(f"{LAYERS}.{i}.attention_norm", dim)
    norm(f"{LAYERS}.{i}.ffn_norm", dim)
    for key in ("query", "key", "value", "out"):
      weight(f"{LAYERS}.{i}.attn.{key}", dim, dim)
    weight(f"{LAYERS}.{i}.ffn.fc1", SMALL.mlp_dim, dim)
    weight(f"{LAYERS}.{i}.ffn.fc2", dim, SMALL.mlp_dim)
  norm("transformer.encoder.encoder_norm", dim)

  first, *widths = SMALL.decoder_channels
  weight("decoder.conv_more.0", first, dim, 3, 3, bias=False)
  batch_norm("decoder.conv_more.1", first)
  for i, (width, skip) in enumerate(zip(widths, skips, strict=True)):
    name = f"decoder.blocks.{i}"
    inputs = SMALL.decoder_channels[i] + skip
    weight(f"{name}.conv1.0", width, inputs, 3, 3, bias=False)
    batch_norm(f"{name}.conv1.1", width)
    weight(f"{name}.conv2.0", width, width, 3, 3, bias=False)
    batch_norm(f"{name}.conv2.1", width)
  weight("segmentation_head.0", SMALL.num_classes, widths[-1], 3, 3)
  return {name: value.astype(np.float32) for name, value in state.items()}


class Reference:
  """The original's blocks in PyTorch, NCHW, from its tensors by name."""

  def __init__(self, torch, state_dict):
    self.torch, self.functional = torch, torch.nn.functional
    self.state = {
      name: torch.tensor(value, requires_grad="running" not in name)
      for name, value in state_dict.items()
      if "num_batches" not in name
    }

  def parameters(self, name):
    return self.state[f"{name}.weight"], self.state[f"{name}.bias"]

  def standardized_conv(self, name, x, stride):
    w = self.state[f"{name}.weight"]
    rows = w.flatten(1)
    mean, std = rows.mean(1), (rows.var(1, correction=0) + 1e-5).sqrt()
    w = (w - mean[:, None, None, None]) / std[:, None, None, None]
    pad = w.shape[-1] // 2
    return self.functional.conv2d(x, w, stride=stride, padding=pad)

  def bottleneck(self, name, x, stride):
    torch, group_norm = self.torch, self.functional.group_norm
    y = x
    for i in (1, 2, 3):
      y = self.standardized_conv(f"{name}.conv{i}", y, stride if i == 2 else 1)
      y = group_norm(y, 32, *self.parameters(f"{name}.gn{i}"), eps=1e-6)
      y = torch.relu(y) if i < 3 else y
    if f"{name}.downsample.weight" in self.state:
      x = self.standardized_conv(f"{name}.downsample", x, stride)
      groups = x.shape[1]
      x = group_norm(x, groups, *self.parameters(f"{name}.gn_proj"), eps=1e-5)
    return torch.relu(x + y)

  def layer_norm(self, name, x):
    return self.functional.layer_norm(
      x, x.shape[-1:], *self.parameters(name), eps=1e-6
    )

  def transformer_block(self, name, x):
    batch, tokens, dim = x.shape
    linear = self.functional.linear
    h = self.layer_norm(f"{name}.attention_norm", x)
    q, k, v = (
      linear(h, *self.parameters(f"{name}.attn.{key}"))
      .reshape(batch, tokens, SMALL.num_heads, -1)
      .transpose(1, 2)
      for key in ("query", "key", "value")
    )
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    h = scores.softmax(-1) @ v
    h = h.transpose(1, 2).reshape(batch, tokens, dim)
    x = x + linear(h, *self.parameters(f"{name}.attn.out"))
    h = self.layer_norm(f"{name}.ffn_norm", x)
    h = self.functional.gelu(linear(h, *self.parameters(f"{name}.ffn.fc1")))
    return x + linear(h, *self.parameters(f"{name}.ffn.fc2"))

  def conv_norm_relu(self, name, x, train):
    x = self.functional.conv2d(x, self.state[f"{name}.0.weight"], padding=1)
    mean = self.state[f"{name}.1.running_mean"]
    var = self.state[f"{name}.1.running_var"]
    x = self.functional.batch_norm(
      x, mean, var, *self.parameters(f"{name}.1"), train
    )
    return self.torch.relu(x)

  def decoder_block(self, name, x, skip, train):
    x = self.functional.interpolate(
      x, scale_factor=2, mode="bilinear", align_corners=True
    )
    if skip is not None:
      x = self.torch.cat([x, skip], 1)
    x = self.conv_norm_relu(f"{name}.conv1", x, train)
    return self.conv_norm_relu(f"{name}.conv2", x, train)

  def resnet(self, x):
    x = self.standardized_conv(f"{RESNET}.root.conv", x, 2)
    scale_and_bias = self.parameters(f"{RESNET}.root.gn")
    group_norm = self.functional.group_norm
    x = self.torch.relu(group_norm(x, 32, *scale_and_bias, eps=1e-6))
    skips = [x]
    x = self.functional.max_pool2d(x, 3, 2)
    for i, num_units in enumerate(SMALL.stages):
      for j in range(num_units):
        name = f"{RESNET}.body.block{i + 1}.unit{j + 1}"
        x = self.bottleneck(name, x, 2 if i and not j else 1)
      pad = SIZE // (4 * 2**i) - x.shape[2]
      skips.insert(0, self.functional.pad(x, (0, pad, 0, pad)))
    return x, skips[1:]

  def network(self, x, train):
    conv2d = self.functional.conv2d
    x, skips = x.repeat(1, 3, 1, 1), []
    patch = 16
    if f"{RESNET}.root.conv.weight" in self.state:
      x, skips = self.resnet(x)
      patch = 1
    parameters = self.parameters(f"{EMBEDDINGS}.patch_embeddings")
    x = conv2d(x, *parameters, stride=patch).flatten(2).transpose(1, 2)
    x = x + self.state[f"{EMBEDDINGS}.position_embeddings"]
    for i in range(SMALL.num_layers):
      x = self.transformer_block(f"{LAYERS}.{i}", x)
    x = self.layer_norm("transformer.encoder.encoder_norm", x)
    x = x.transpose(1, 2).reshape(len(x), -1, GRID, GRID)
    x = self.conv_norm_relu("decoder.conv_more", x, train)
    for i in range(4):
      skip = skips[i] if i < len(skips) else None
      x = self.decoder_block(f"decoder.blocks.{i}", x, skip, train)
    return conv2d(x, *self.parameters("segmentation_head.0"), padding=1)

  def gradients(self):
    """By name, through the loader: it only permutes and so is linear."""
    zeros = self.torch.zeros_like
    return {
      name: (zeros(value) if value.grad is None else value.grad).numpy()
      for name, value in self.state.items()
    }

  def values(self):
    return {name: value.detach().numpy() for name, value in self.state.items()}


@pytest.fixture(scope="module")
def original():
  """Module and variables of one checkpoint."""
  return load_transunet(_state_dict(), SMALL.num_heads)


@pytest.fixture
def reference():
  return Reference(pytest.importorskip("torch"), _state_dict())


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
  state_dict = _state_dict(hybrid=hybrid)
  module, variables = load_transunet(state_dict, SMALL.num_heads)
  image = _normal(6, 2, SIZE, SIZE, 1)
  found = jax.jit(module.apply)(variables, image)
  with torch.no_grad():
    tensor = torch.tensor(_channels_first(image))
    expected = Reference(torch, state_dict).network(tensor, train=False)
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
