"""Checkpoints of the original's point-cloud network (wenyi-li/FairDiff).

They are PyTorch's, one model per group, so the module here is unconditional.
"""

import functools
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from fairdiff_jax.models.point_cloud import PointFlowVAE
from fairdiff_jax.pretrained import graft

BUFFERS = (r"diffusion\.var_sched\..*", r".*\.num_batches_tracked")


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
  if weight.ndim == 3:  # A convolution over points, of size 1.
    weight = weight.squeeze(2)
  return {"kernel": graft.dense(weight), "bias": source.take(f"{name}.bias")}


def _weight(source, name):
  """A weight, divided by its spectral norm sigma = u^T W v where it has one."""
  if f"{name}_orig" not in source:
    return source.take(name)
  weight = source.take(f"{name}_orig")
  u, v = source.take(f"{name}_u"), source.take(f"{name}_v")
  return weight / (u @ weight @ v)


def _norm(source, name):
  params = {
    "scale": source.take(f"{name}.weight"),
    "bias": source.take(f"{name}.bias"),
  }
  stats = {
    "mean": source.take(f"{name}.running_mean"),
    "var": source.take(f"{name}.running_var"),
  }
  return params, stats


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
