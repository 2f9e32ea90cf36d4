"""SAM, SAMed and TransUNet in PyTorch, to compare with.

SAM is the PyPI package `segment-anything`; TransUNet is written after the
original's checkpoints. Images are NCHW. Importing this file takes no PyTorch.
"""

import functools
import sys
import types
from unittest import mock

import numpy as np

from fairdiff_jax.models.sam import PATCH

EMBEDDINGS, LAYERS = "transformer.embeddings", "transformer.encoder.layer"
RESNET = f"{EMBEDDINGS}.hybrid_model"


@functools.cache
def sam_package():
  """`segment_anything.modeling`, whose networks do without torchvision."""
  stubs = {
    name: types.ModuleType(name)
    for name in (
      "torchvision",
      "torchvision.ops",
      "torchvision.ops.boxes",
      "torchvision.transforms",
      "torchvision.transforms.functional",
    )
  }
  boxes = stubs["torchvision.ops.boxes"]
  boxes.batched_nms = boxes.box_area = None
  functional = stubs["torchvision.transforms.functional"]
  functional.resize = functional.to_pil_image = None
  with mock.patch.dict(sys.modules, stubs):
    from segment_anything import modeling
  return modeling


def sam(
  image_size,
  *,
  embed_dim,
  depth,
  num_heads,
  global_blocks,
  window,
  decoder_dim,
  decoder_mlp_dim,
  decoder_depth=2,
  decoder_heads=8,
  num_masks=3,
  seed=0,
  noise=0.2,
):
  """A SAM of the reference with random weights; sizes as `SAMed`'s."""
  modeling = sam_package()
  import torch

  torch.manual_seed(seed)
  grid = image_size // PATCH
  model = modeling.Sam(
    modeling.ImageEncoderViT(
      img_size=image_size,
      out_chans=decoder_dim,
      norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
      use_rel_pos=True,
      window_size=window,
      global_attn_indexes=global_blocks,
      embed_dim=embed_dim,
      depth=depth,
      num_heads=num_heads,
    ),
    modeling.PromptEncoder(
      decoder_dim, (grid, grid), (image_size, image_size), 16
    ),
    modeling.MaskDecoder(
      transformer_dim=decoder_dim,
      transformer=modeling.TwoWayTransformer(
        decoder_depth, decoder_dim, decoder_heads, decoder_mlp_dim
      ),
      num_multimask_outputs=num_masks - 1,
      iou_head_hidden_dim=decoder_dim,
    ),
  )
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(noise * torch.randn_like(parameter))
  return model


def tensors(model):
  """A model's tensors by name, in NumPy."""
  return {name: t.numpy() for name, t in model.state_dict().items()}


def to_torch(array):
  import torch

  return torch.from_numpy(np.array(array))


def samed_logits(model, image, factors=None):
  """Logits [B, masks, h, w] of images [B, 3, H, W] by a SAM.

  Args:
    model: of `sam`.
    image: tensor.
    factors: tensors w_a_000, w_b_000 and so on, under SAMed's names: low-rank
      changes of queries (even numbers) and values (odd) of every block.
  """
  handles = []
  for i, block in enumerate(model.image_encoder.blocks if factors else ()):

    def add(_, inputs, output, i=i):
      q, v = (
        inputs[0] @ factors[f"w_a_{j:03d}"].T @ factors[f"w_b_{j:03d}"].T
        for j in (2 * i, 2 * i + 1)
      )
      output[..., : q.shape[-1]] += q
      output[..., -v.shape[-1] :] += v
      return output

    handles.append(block.attn.qkv.register_forward_hook(add))
  sparse, dense = model.prompt_encoder(None, None, None)
  logits, _ = model.mask_decoder.predict_masks(
    model.image_encoder(image),
    model.prompt_encoder.get_dense_pe(),
    sparse,
    dense,
  )
  for handle in handles:
    handle.remove()
  return logits


def transunet_weights(module, image_size, seed=0):
  """Random weights of a `TransUNet` under the original's names."""
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

  dim, channels, patch = module.hidden_dim, 3, PATCH
  skips = (0, 0, 0, 0)
  if module.stages:
    weight(f"{RESNET}.root.conv", module.width, 3, 7, 7, bias=False)
    norm(f"{RESNET}.root.gn", module.width)
    channels = module.width
    for i, num_units in enumerate(module.stages):
      middle = module.width * 2**i
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
    patch, skips = 1, (8 * module.width, 4 * module.width, module.width, 0)

  weight(f"{EMBEDDINGS}.patch_embeddings", dim, channels, patch, patch)
  position = rng.normal(0, 0.5, (1, (image_size // PATCH) ** 2, dim))
  state[f"{EMBEDDINGS}.position_embeddings"] = position
  for i in range(module.num_layers):
    norm(f"{LAYERS}.{i}.attention_norm", dim)
    norm(f"{LAYERS}.{i}.ffn_norm", dim)
    for key in ("query", "key", "value", "out"):
      weight(f"{LAYERS}.{i}.attn.{key}", dim, dim)
    weight(f"{LAYERS}.{i}.ffn.fc1", module.mlp_dim, dim)
    weight(f"{LAYERS}.{i}.ffn.fc2", dim, module.mlp_dim)
  norm("transformer.encoder.encoder_norm", dim)

  first, *widths = module.decoder_channels
  weight("decoder.conv_more.0", first, dim, 3, 3, bias=False)
  batch_norm("decoder.conv_more.1", first)
  for i, (width, skip) in enumerate(zip(widths, skips, strict=True)):
    name = f"decoder.blocks.{i}"
    inputs = module.decoder_channels[i] + skip
    weight(f"{name}.conv1.0", width, inputs, 3, 3, bias=False)
    batch_norm(f"{name}.conv1.1", width)
    weight(f"{name}.conv2.0", width, width, 3, 3, bias=False)
    batch_norm(f"{name}.conv2.1", width)
  weight("segmentation_head.0", module.num_classes, widths[-1], 3, 3)
  return {name: value.astype(np.float32) for name, value in state.items()}


class TransUNetPeer:
  """The original's blocks in PyTorch, NCHW, from its tensors by name."""

  def __init__(self, state_dict, module):
    """Takes tensors as of `transunet_weights` and their `TransUNet`."""
    import torch

    self.torch, self.functional = torch, torch.nn.functional
    self.module = module
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
      .reshape(batch, tokens, self.module.num_heads, -1)
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
    size = x.shape[-1]
    x = self.standardized_conv(f"{RESNET}.root.conv", x, 2)
    scale_and_bias = self.parameters(f"{RESNET}.root.gn")
    group_norm = self.functional.group_norm
    x = self.torch.relu(group_norm(x, 32, *scale_and_bias, eps=1e-6))
    skips = [x]
    x = self.functional.max_pool2d(x, 3, 2)
    for i, num_units in enumerate(self.module.stages):
      for j in range(num_units):
        name = f"{RESNET}.body.block{i + 1}.unit{j + 1}"
        x = self.bottleneck(name, x, 2 if i and not j else 1)
      pad = size // (4 * 2**i) - x.shape[2]
      skips.insert(0, self.functional.pad(x, (0, pad, 0, pad)))
    return x, skips[1:]

  def network(self, x, train):
    conv2d = self.functional.conv2d
    x, skips = x.repeat(1, 3, 1, 1), []
    patch = PATCH
    if self.module.stages:
      x, skips = self.resnet(x)
      patch = 1
    parameters = self.parameters(f"{EMBEDDINGS}.patch_embeddings")
    x = conv2d(x, *parameters, stride=patch)
    shape = x.shape
    x = x.flatten(2).transpose(1, 2)
    x = x + self.state[f"{EMBEDDINGS}.position_embeddings"]
    for i in range(self.module.num_layers):
      x = self.transformer_block(f"{LAYERS}.{i}", x)
    x = self.layer_norm("transformer.encoder.encoder_norm", x)
    x = x.transpose(1, 2).reshape(shape)
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
