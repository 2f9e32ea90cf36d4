"""Checkpoints of the original's networks (wenyi-li/FairDiff), from PyTorch.

Of point clouds it has one model per group, so the module here is unconditional.
"""

import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from fairdiff_jax.models.point_cloud import PointFlowVAE
from fairdiff_jax.models.transunet import PATCH, TransUNet
from fairdiff_jax.pretrained import graft, segment_anything
from fairdiff_jax.pretrained.vit import encoder_sizes

COUNTERS = r".*\.num_batches_tracked"
BUFFERS = (r"diffusion\.var_sched\..*", COUNTERS)


def load_point_flow_vae(
  state_dict: Mapping[str, Any],
) -> tuple[PointFlowVAE, dict[str, Any]]:
  """Reads a flow VAE, with or without spectral normalisation of its flow.

  Args:
    state_dict: the original's tensors by name, as anything that `np.asarray`
      reads. Sizes are taken from their shapes; the noise schedule's buffers are
      left unread.

  Returns:
    The module and its variables, {'params', 'batch_stats'}, in float32.

  Raises:
    ValueError: a tensor is missing, left over or of an unexpected shape.
  """
  source = graft.Source(state_dict)
  posterior, posterior_stats = _posterior(source)
  coupling = [
    _coupling(source, f"flow.chain.{i}.net_s_t")
    for i in _numbers(source, "flow.chain.{}.net_s_t.0.bias", 0)
  ]
  gated = [
    _gated(source, f"diffusion.net.layers.{i}")
    for i in _numbers(source, "diffusion.net.layers.{}._layer.weight", 0)
  ]
  source.finish(excused=BUFFERS)

  variables = {
    "params": {
      "posterior": posterior,
      **{f"coupling_{i}": params for i, params in enumerate(coupling)},
      "denoiser": {f"gated_{i}": params for i, params in enumerate(gated)},
    },
    "batch_stats": {"posterior": posterior_stats},
  }
  *head_widths, latent_dim = _widths(posterior["mean"])
  module = PointFlowVAE(
    latent_dim=latent_dim,
    encoder_widths=_widths(posterior),
    head_widths=tuple(head_widths),
    flow_depth=len(coupling),
    flow_width=_widths(coupling[0])[0],
    decoder_widths=tuple(p["layer"]["bias"].size for p in gated[:-1]),
  )
  init = functools.partial(module.init, points=np.zeros((1, 1, 3), np.float32))
  graft.require_shapes(variables, jax.eval_shape(init, jax.random.key(0)))
  return module, variables


def load_transunet(
  state_dict: Mapping[str, Any], num_heads: int = 12
) -> tuple[TransUNet, dict[str, Any]]:
  """Reads a TransUNet, with a ResNet in its encoder or without.

  Args:
    state_dict: the original's tensors by name, as anything that `np.asarray`
      reads. All sizes but one are taken from their shapes.
    num_heads: of the transformer.

  Returns:
    The module and its variables, {'params', 'batch_stats'}, in float32.

  Raises:
    ValueError: a tensor is missing, left over or of an unexpected shape, or
      `num_heads` does not divide the transformer's channels.
  """
  source = graft.Source(state_dict)
  encoder = _transunet_encoder(source, num_heads)
  decoder, decoder_stats = _transunet_decoder(source)
  source.finish(excused=[COUNTERS])

  blocks = itertools.takewhile(
    decoder.__contains__, (f"block_{i}" for i in itertools.count())
  )
  convolutions = [decoder["conv_in"], *(decoder[b]["conv2"] for b in blocks)]
  module = TransUNet(
    num_classes=decoder["conv_out"]["bias"].size,
    decoder_channels=tuple(c["norm"]["bias"].size for c in convolutions),
    **encoder_sizes(encoder),
  )
  variables = {
    "params": {"encoder": encoder, "decoder": decoder},
    "batch_stats": {"decoder": decoder_stats},
  }
  size = PATCH * math.isqrt(encoder["position_embedding"].shape[1])
  image = np.zeros((1, size, size, 3), np.float32)
  expected = jax.eval_shape(module.init, jax.random.key(0), image)
  graft.require_shapes(variables, expected)
  return module, variables


def _transunet_encoder(source, num_heads):
  embeddings, encoder = "transformer.embeddings", "transformer.encoder"
  params = {
    "patch_embedding": _conv(source, f"{embeddings}.patch_embeddings"),
    "position_embedding": source.take(f"{embeddings}.position_embeddings", 3),
    "norm": _affine(source, f"{encoder}.encoder_norm"),
  }
  layer = encoder + ".layer.{}"
  for i in _numbers(source, layer + ".attention_norm.weight", 0):
    params[f"layer_{i}"] = _transformer_block(
      source, layer.format(i), num_heads
    )
  resnet = f"{embeddings}.hybrid_model"
  if any(name.startswith(resnet) for name in source.arrays):
    params["resnet"] = _resnet(source, resnet)
  return params


def _transformer_block(source, name, num_heads):
  params = {
    "norm1": _affine(source, f"{name}.attention_norm"),
    "norm2": _affine(source, f"{name}.ffn_norm"),
    "expand": _dense(source, f"{name}.ffn.fc1"),
    "contract": _dense(source, f"{name}.ffn.fc2"),
  }
  for key in ("query", "key", "value"):
    dense = _dense(source, f"{name}.attn.{key}")
    params[key] = {
      k: _split_heads(f"{name}.attn.{key}", v, num_heads, axis=-1)
      for k, v in dense.items()
    }
  out = _dense(source, f"{name}.attn.out")
  kernel = _split_heads(f"{name}.attn.out", out["kernel"], num_heads, axis=0)
  params["out"] = {**out, "kernel": kernel}
  return params


def _split_heads(name, array, num_heads, *, axis):
  """Splits an axis in two, (num_heads, the rest)."""
  shape = array.shape
  if shape[axis] % num_heads:
    raise ValueError(
      f"{name}: {num_heads} heads do not divide {shape[axis]} channels"
    )
  split = (num_heads, shape[axis] // num_heads)
  return array.reshape(*shape[:axis], *split, *shape[axis:][1:])


def _resnet(source, name):
  params = {
    "root": _kernel(source, f"{name}.root.conv"),
    "root_norm": _affine(source, f"{name}.root.gn"),
  }
  for i in range(3):
    unit = f"{name}.body.block{i + 1}.unit{{}}"
    for j in _numbers(source, unit + ".conv1.weight", 1):
      params[f"stage_{i}_unit_{j - 1}"] = _bottleneck(source, unit.format(j))
  return params


def _bottleneck(source, name):
  params = {}
  for i in (1, 2, 3):
    params[f"conv{i}"] = _kernel(source, f"{name}.conv{i}")
    params[f"norm{i}"] = _affine(source, f"{name}.gn{i}")
  if f"{name}.downsample.weight" in source:
    params["shortcut"] = _kernel(source, f"{name}.downsample")
    params["shortcut_norm"] = _affine(source, f"{name}.gn_proj")
  return params


def _transunet_decoder(source):
  params, stats = {}, {}
  params["conv_in"], stats["conv_in"] = _conv_norm(source, "decoder.conv_more")
  for i in _numbers(source, "decoder.blocks.{}.conv1.0.weight", 0):
    block, block_stats = {}, {}
    for name in ("conv1", "conv2"):
      block[name], block_stats[name] = _conv_norm(
        source, f"decoder.blocks.{i}.{name}"
      )
    params[f"block_{i}"], stats[f"block_{i}"] = block, block_stats
  params["conv_out"] = _conv(source, "segmentation_head.0")
  return params, stats


def _conv_norm(source, name):
  norm, stats = _norm(source, f"{name}.1")
  return {"conv": _kernel(source, f"{name}.0"), "norm": norm}, {"norm": stats}


def _conv(source, name):
  return {**_kernel(source, name), "bias": source.take(f"{name}.bias")}


def _kernel(source, name):
  return {"kernel": graft.conv(source.take(f"{name}.weight", 4))}


def _posterior(source):
  params, stats = {}, {}
  for i in _numbers(source, "encoder.conv{}.weight", 1):
    params[f"dense_{i - 1}"] = _dense(source, f"encoder.conv{i}")
    params[f"norm_{i - 1}"], stats[f"norm_{i - 1}"] = _norm(
      source, f"encoder.bn{i}"
    )
  params["mean"], stats["mean"] = _head(source, "m")
  params["logvar"], stats["logvar"] = _head(source, "v")
  return params, stats


def _head(source, suffix):
  params, stats = {}, {}
  for i in _numbers(source, "encoder.fc{}_" + suffix + ".weight", 1):
    params[f"dense_{i - 1}"] = _dense(source, f"encoder.fc{i}_{suffix}")
  for i in range(1, len(params)):
    params[f"norm_{i - 1}"], stats[f"norm_{i - 1}"] = _norm(
      source, f"encoder.fc_bn{i}_{suffix}"
    )
  return params, stats


def _coupling(source, name):
  return {f"dense_{i}": _dense(source, f"{name}.{2 * i}") for i in range(3)}


def _gated(source, name):
  return {
    "layer": _dense(source, f"{name}._layer"),
    "gate": _dense(source, f"{name}._hyper_gate"),
    "bias": {"kernel": graft.dense(source.take(f"{name}._hyper_bias.weight"))},
  }


def _dense(source, name):
  weight = _weight(source, f"{name}.weight")
  if weight.shape[2:] == (1,):  # A convolution over points, of size 1.
    weight = weight[..., 0]
  return {"kernel": graft.dense(weight), "bias": source.take(f"{name}.bias")}


def _weight(source, name):
  """A weight, divided by its spectral norm sigma = u^T W v where it has one."""
  if f"{name}_orig" not in source:
    return source.take(name)
  weight = source.take(f"{name}_orig")
  u, v = source.take(f"{name}_u"), source.take(f"{name}_v")
  return weight / (u @ weight @ v)


def _norm(source, name):
  stats = {
    "mean": source.take(f"{name}.running_mean"),
    "var": source.take(f"{name}.running_var"),
  }
  return _affine(source, name), stats


def _affine(source, name):
  """Scale and bias of a normalisation."""
  return {
    "scale": source.take(f"{name}.weight"),
    "bias": source.take(f"{name}.bias"),
  }


def _numbers(source, template, start):
  """The consecutive numbers from `start` on for which `template` names one."""
  numbers = list(
    itertools.takewhile(
      lambda i: template.format(i) in source, itertools.count(start)
    )
  )
  if not numbers:
    source.take(template.format(start))
  return numbers


def _widths(layers):
  """Output sizes of the layers dense_0, dense_1, ... of a subtree."""
  names = (f"dense_{i}" for i in itertools.count())
  present = itertools.takewhile(layers.__contains__, names)
  return tuple(layers[name]["bias"].size for name in present)


def load_samed_lora(
  state_dict: Mapping[str, Any], variables: Mapping[str, Any]
) -> dict[str, Any]:
  """Reads what a SAMed has learnt (FairSeg's `save_lora_parameters`).

  Args:
    state_dict: the original's tensors by name, as anything that `np.asarray`
      reads: `w_a_000`, `w_b_000` of block 0's queries, `w_a_001`, `w_b_001` of
      its values, and so on; all of `prompt_encoder` and `mask_decoder`.
    variables: of a `SAMed` of the same sizes, {'params', 'constants'}.

  Returns:
    The variables, with the image encoder's weights as they were and all others
    from the tensors, in float32.

  Raises:
    ValueError: a tensor is missing, left over or of an unexpected shape.
  """
  source = graft.Source(state_dict)
  params = dict(variables["params"])
  image_encoder, lora = params.pop("image_encoder"), params.pop("lora")
  found = segment_anything.read_variables(
    source, {**variables, "params": params}
  )
  found["params"]["image_encoder"] = image_encoder
  found["params"]["lora"] = {
    f"{key}_{factor}": np.stack(
      [
        graft.dense(source.take(f"w_{factor}_{2 * i + offset:03d}"))
        for i in range(len(lora[f"{key}_{factor}"]))
      ]
    )
    for offset, key in enumerate("qv")
    for factor in "ab"
  }
  source.finish()
  graft.require_shapes(found, variables)
  return found


def save_samed_lora(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Inverse of `load_samed_lora`: the tensors by the original's names."""
  params = dict(variables["params"])
  lora = params.pop("lora")
  del params["image_encoder"]
  tensors = segment_anything.state_dict({**variables, "params": params})
  for offset, key in enumerate("qv"):
    for factor in "ab":
      for i, matrix in enumerate(np.asarray(lora[f"{key}_{factor}"])):
        name = f"w_{factor}_{2 * i + offset:03d}"
        tensors[name] = np.ascontiguousarray(matrix.T)
  return tensors
