"""SAM, SAMed and TransUNet in PyTorch, to compare with.

SAM is the PyPI package `segment-anything`; TransUNet is written after the
original's checkpoints. Images are NCHW. Importing this file takes no PyTorch.
"""

import functools
import itertools
import sys
import types
from unittest import mock

import numpy as np

from fairdiff_jax.models.sam import PATCH

EMBEDDINGS, LAYERS = "transformer.embeddings", "transformer.encoder.layer"
RESNET = f"{EMBEDDINGS}.hybrid_model"


@functools.cache
def mend_torchvision():
  """Lets torchvision be imported beside a PyTorch that it was not built for.

  As beside PyTorch for the CPU alone: its compiled operators do not load, and
  two that are missing then end its import. The peers need none of them.

  Returns:
    what must be kept as long as they are missed; it is.
  """
  import torch

  try:
    import torchvision  # noqa: F401
  except RuntimeError:
    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
      operators.define(
        f"{name}(Tensor dets, Tensor scores, float at) -> Tensor"
      )
    return operators


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


def point_weights(module, seed=0):
  """Random weights of a `PointFlowVAE` under the original's names."""
  rng = np.random.default_rng(seed)
  state = {}

  def linear(name, inputs, outputs, *kernel, bias=True):
    limit = inputs**-0.5
    shape = (outputs, inputs, *kernel)
    state[f"{name}.weight"] = rng.uniform(-limit, limit, shape)
    if bias:
      state[f"{name}.bias"] = rng.uniform(-limit, limit, outputs)

  def norm(name, size):
    state[f"{name}.weight"] = np.ones(size)
    state[f"{name}.bias"] = np.zeros(size)
    state[f"{name}.running_mean"] = np.zeros(size)
    state[f"{name}.running_var"] = np.ones(size)

  latent = module.latent_dim
  for i, (a, b) in enumerate(itertools.pairwise((3, *module.encoder_widths))):
    linear(f"encoder.conv{i + 1}", a, b, 1)
    norm(f"encoder.bn{i + 1}", b)
  widths = (module.encoder_widths[-1], *module.head_widths, latent)
  for head in "mv":
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
      linear(f"encoder.fc{i + 1}_{head}", a, b)
      if i < len(module.head_widths):
        norm(f"encoder.fc_bn{i + 1}_{head}", b)
  widths = (latent // 2, module.flow_width, module.flow_width, latent)
  for layer in range(module.flow_depth):
    for i, (a, b) in enumerate(itertools.pairwise(widths)):
      linear(f"flow.chain.{layer}.net_s_t.{2 * i}", a, b)
  widths = (3, *module.decoder_widths, 3)
  for i, (a, b) in enumerate(itertools.pairwise(widths)):
    name = f"diffusion.net.layers.{i}"
    linear(f"{name}._layer", a, b)
    linear(f"{name}._hyper_gate", latent + 3, b)
    linear(f"{name}._hyper_bias", latent + 3, b, bias=False)
  return {name: value.astype(np.float32) for name, value in state.items()}


class PointPeer:
  """The flow VAE of Luo & Hu (2021) in PyTorch, from its tensors by name.

  Pointwise layers of the posterior are convolutions of size 1 over [B, C, N],
  those of the denoiser linear layers over [B, N, C].
  """

  def __init__(self, state_dict, num_steps=100, kl_weight=1e-4):
    """Takes tensors as of `point_weights`; beta rises from 1e-4 to 0.02."""
    import torch

    self.torch, self.functional = torch, torch.nn.functional
    self.state = {
      name: torch.tensor(value, requires_grad="running" not in name)
      for name, value in state_dict.items()
    }
    self.learnt = [t for t in self.state.values() if t.requires_grad]
    self.depth = len(self.names("flow.chain.{}.net_s_t.0.weight"))
    self.num_layers = len(self.names("diffusion.net.layers.{}._layer.weight"))
    self.num_steps, self.kl_weight = num_steps, kl_weight
    self.beta = torch.linspace(1e-4, 0.02, num_steps)
    self.alpha_bar = torch.cumprod(1 - self.beta, 0)

  def names(self, form):
    names = (form.format(i) for i in itertools.count())
    return list(itertools.takewhile(self.state.__contains__, names))

  def linear(self, name, x):
    weight, bias = self.state[f"{name}.weight"], self.state.get(f"{name}.bias")
    layer = (
      self.functional.conv1d if weight.ndim == 3 else (self.functional.linear)
    )
    return layer(x, weight, bias)

  def norm(self, name, x, train):
    keys = ("running_mean", "running_var", "weight", "bias")
    values = (self.state[f"{name}.{key}"] for key in keys)
    return self.functional.batch_norm(x, *values, training=train)

  def encode(self, points, train=True):
    """[B, N, 3] -> mean and log variance [B, D]."""
    x = points.transpose(1, 2)
    for i in range(1, 5):
      x = self.norm(f"encoder.bn{i}", self.linear(f"encoder.conv{i}", x), train)
      x = self.torch.relu(x) if i < 4 else x
    pooled = x.max(2).values

    def head(suffix):
      h = pooled
      for i in (1, 2):
        h = self.linear(f"encoder.fc{i}_{suffix}", h)
        h = self.torch.relu(self.norm(f"encoder.fc_bn{i}_{suffix}", h, train))
      return self.linear(f"encoder.fc3_{suffix}", h)

    return head("m"), head("v")

  def coupling(self, layer, kept):
    """Log scale and shift of the half that moves, from the other."""
    h = kept
    for i in (0, 2):
      h = self.torch.relu(self.linear(f"flow.chain.{layer}.net_s_t.{i}", h))
    h = self.linear(f"flow.chain.{layer}.net_s_t.4", h)
    scale, shift = h.chunk(2, 1)
    return self.functional.logsigmoid(scale + 2), shift

  def flow(self, z, inverse=False):
    """[B, D] -> [B, D] and log |det| [B] of the way forwards."""
    logdet = 0
    layers = range(self.depth)
    for layer in reversed(layers) if inverse else layers:
      first, second = z.chunk(2, 1)
      kept, moved = (second, first) if layer % 2 == 0 else (first, second)
      log_scale, shift = self.coupling(layer, kept)
      if inverse:
        moved = (moved - shift) * (-log_scale).exp()
      else:
        moved = moved * log_scale.exp() + shift
      pair = [moved, kept] if layer % 2 == 0 else [kept, moved]
      z = self.torch.cat(pair, 1)
      logdet = logdet + log_scale.sum(1)
    return z, logdet

  def denoise(self, points, beta, latent):
    """Noise [B, N, 3]."""
    time = self.torch.stack([beta, beta.sin(), beta.cos()], 1)
    context = self.torch.cat([time, latent], 1)[:, None]
    x = points
    for i in range(self.num_layers):
      name = f"diffusion.net.layers.{i}"
      gate = self.linear(f"{name}._hyper_gate", context).sigmoid()
      bias = self.linear(f"{name}._hyper_bias", context)
      x = self.linear(f"{name}._layer", x) * gate + bias
      if i < self.num_layers - 1:
        x = self.functional.leaky_relu(x, 0.01)
    return points + x

  def loss(self, points):
    """Mean loss of clouds [B, N, 3]."""
    torch, batch = self.torch, len(points)
    mean, logvar = self.encode(points)
    z = mean + (logvar / 2).exp() * torch.randn_like(mean)
    w, logdet = self.flow(z)
    log_2pi = np.log(2 * np.pi)
    log_prior = logdet - 0.5 * (w**2 + log_2pi).sum(1)
    entropy = 0.5 * (logvar + 1 + log_2pi).sum(1)
    t = torch.randint(self.num_steps, (batch,))
    signal = self.alpha_bar[t][:, None, None]
    noise = torch.randn_like(points)
    noisy = signal.sqrt() * points + (1 - signal).sqrt() * noise
    found = self.denoise(noisy, self.beta[t], z)
    error = ((found - noise) ** 2).mean((1, 2))
    return (error - self.kl_weight * (entropy + log_prior)).mean()

  def sample(self, batch, num_points):
    """Clouds [B, N, 3] by ancestral sampling, with the posterior's variance."""
    torch = self.torch
    with torch.inference_mode():
      latent = self.state["encoder.fc3_m.bias"].numel()
      z, _ = self.flow(torch.randn(batch, latent), inverse=True)
      x = torch.randn(batch, num_points, 3)
      for t in reversed(range(self.num_steps)):
        beta, signal = self.beta[t], self.alpha_bar[t]
        noise = self.denoise(x, beta.repeat(batch), z)
        x = (x - beta / (1 - signal).sqrt() * noise) / (1 - beta).sqrt()
        if t:
          before = self.alpha_bar[t - 1]
          sigma = ((1 - before) / (1 - signal) * beta).sqrt()
          x = x + sigma * torch.randn_like(x)
      return x


def small_unet(params, patch):
  """(forward, parameters) of a `SmallUNet` in PyTorch, from its parameters."""
  import torch

  functional = torch.nn.functional
  kernels = {k: v["kernel"] for k, v in params.items() if "kernel" in v}
  # Ours has a patch's pixels before the classes, PyTorch's shuffle after them.
  last = kernels["conv_out"]
  classes = last.shape[-1] // patch**2
  order = np.arange(last.shape[-1]).reshape(-1, classes).T.ravel()
  kernels["conv_out"] = last[..., order]
  state = {
    name: torch.tensor(kernel.transpose(3, 2, 0, 1), requires_grad=True)
    for name, kernel in kernels.items()
  }
  state |= {
    f"{name}_{key}": torch.tensor(value[key], requires_grad=True)
    for name, value in params.items()
    if "norm" in name
    for key in ("scale", "bias")
  }
  bias = torch.tensor(params["conv_out"]["bias"][order], requires_grad=True)
  levels = sum(name.startswith("down_") for name in params) // 4

  def block(x, name):
    for i in range(2):
      x = functional.conv2d(x, state[f"{name}_conv_{i}"], padding=1)
      norm = f"{name}_norm_{i}"
      scale, shift = state[f"{norm}_scale"], state[f"{norm}_bias"]
      groups = int(np.gcd(8, x.shape[1]))
      x = torch.relu(functional.group_norm(x, groups, scale, shift, eps=1e-6))
    return x

  def forward(image, train):
    del train
    x, skips = functional.pixel_unshuffle(image, patch), []
    for i in range(levels):
      x = functional.max_pool2d(x, 2) if i else x
      x = block(x, f"down_{i}")
      skips.append(x)
    for i in reversed(range(levels - 1)):
      x = functional.interpolate(x, scale_factor=2, mode="nearest")
      x = block(torch.cat([x, skips[i]], 1), f"up_{i}")
    x = functional.conv2d(x, state["conv_out"], bias)
    return functional.pixel_shuffle(x, patch)

  return forward, [*state.values(), bias]
