"""Checkpoints of Stable Diffusion 1.x and of its ControlNets.

Three layouts are read: a pipeline's folder and a single network's, as the
library diffusers writes them, and the original's single file, with which
ControlNet and FairDiff began. U-Nets and ControlNets are written back as
folders that diffusers reads.

A parameter's path is its tensor's name in the folders, with every number joined
to the name before it: "down_blocks.0.resnets.1.norm1.weight" is
params['down_blocks_0']['resnets_1']['norm1']['scale']. So one converter serves
every network, both ways.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import traverse_util

from fairdiff_jax import files
from fairdiff_jax.models.autoencoder import AutoencoderKL
from fairdiff_jax.models.stable_diffusion import (
  StableDiffusionControlNet,
  StableDiffusionUNet,
)
from fairdiff_jax.models.text_encoder import TextEncoder
from fairdiff_jax.pretrained import graft

Network = tuple[nn.Module, dict[str, Any]]

# Attributes of a module that say how it runs, not what it is.
RUNTIME = ("parent", "name", "dtype", "remat")

# Top levels of the parameters that only one of the two networks has.
UNET_ONLY = ("up_blocks_", "conv_norm_out", "conv_out")
CONTROLNET_ONLY = "controlnet_"

PROMPTS = "prompts.safetensors"
SCHEDULER = "scheduler/scheduler_config.json"

# How Stable Diffusion 1.5 was trained, as a run's config says it.
SCHEDULE = {
  "prediction": "eps",
  "schedule": "scaled_linear",
  "num_steps": 1000,
  "beta_start": 0.00085,
  "beta_end": 0.012,
}
# What diffusers calls these.
_PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
_SCHEDULES = {
  "linear": "linear",
  "scaled_linear": "scaled_linear",
  "squaredcos_cap_v2": "cosine",
}
# What no run here can do otherwise. All else that a scheduler's configuration
# says is of one sampler, and a run's config names its own.
_SCHEDULER_REQUIRED = {
  "trained_betas": None,
  "rescale_betas_zero_snr": False,
  "clip_sample": False,
  "thresholding": False,
  "timestep_type": "discrete",
  "use_flow_sigmas": False,
}

AGAIN = "copy or download it again"

# Files that hold a network's tensors, besides their indices.
WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")


@dataclasses.dataclass(frozen=True)
class _Kind:
  """How one kind of network is stored in a folder.

  Attributes:
    module: the class that computes it here.
    class_name: that of its class in diffusers or transformers.
    folder: its place in a pipeline's folder.
    inputs: shapes of the inputs, given the module.
    required: configuration that the module cannot vary, given the module.
    ignored: regular expression of the configuration that changes no output.
    defaults: what the configuration means by a missing field, where that
      differs from the module's default.
    rename: newer name of a tensor.
  """

  module: type[nn.Module]
  class_name: str
  folder: str
  inputs: Callable[[nn.Module], tuple[jax.ShapeDtypeStruct, ...]]
  required: Callable[[nn.Module], dict[str, Any]]
  ignored: str
  defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  rename: Callable[[str], str] = str


def _encoder_config(module):
  """What U-Net and ControlNet have in common."""
  levels = len(module.block_out_channels)
  return {
    "act_fn": "silu",
    "down_block_types": ["CrossAttnDownBlock2D"] * (levels - 1)
    + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "transformer_layers_per_block": 1,
  }


def _unet_config(module):
  levels = len(module.block_out_channels)
  return _encoder_config(module) | {
    "attention_type": "default",
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (levels - 1),
  }


def _controlnet_config(module):
  return _encoder_config(module) | {
    "conditioning_channels": 3,
    "controlnet_conditioning_channel_order": "rgb",
  }


def _autoencoder_config(module):
  levels = len(module.block_out_channels)
  return {
    "act_fn": "silu",
    "down_block_types": ["DownEncoderBlock2D"] * levels,
    "mid_block_add_attention": True,
    "up_block_types": ["UpDecoderBlock2D"] * levels,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
  }


def _text_encoder_config(module):
  del module
  return {"hidden_act": "quick_gelu"}


def _floats(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def _integers(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.int32)


def _unet_inputs(module):
  size = 2 ** len(module.block_out_channels)
  return (
    _floats(1, size, size, module.in_channels),
    _integers(1),
    _floats(1, 1, module.cross_attention_dim),
  )


def _controlnet_inputs(module):
  latents, *conditions = _unet_inputs(module)
  scale = 2 ** (len(module.conditioning_embedding_out_channels) - 1)
  size = scale * latents.shape[1]
  return latents, *conditions, _floats(1, size, size, 3)


def _autoencoder_inputs(module):
  size = 2 ** len(module.block_out_channels)
  return (_floats(1, size, size, module.in_channels),)


def _text_encoder_inputs(module):
  return (_integers(1, module.max_position_embeddings),)


_ATTENTION = {
  "query": "to_q",
  "key": "to_k",
  "value": "to_v",
  "proj_attn": "to_out.0",
}


def _rename_attention(name):
  """Replaces the names that an autoencoder's attention had at first."""
  return re.sub(
    rf"(?<=\.attentions\.0\.)({'|'.join(_ATTENTION)})(?=\.)",
    lambda match: _ATTENTION[match[0]],
    name,
  )


def _rename_text_model(name):
  """Adds the level that transformers 5 leaves out."""
  return name if name.startswith("text_model.") else f"text_model.{name}"


KINDS = {
  "unet": _Kind(
    module=StableDiffusionUNet,
    class_name="UNet2DConditionModel",
    folder="unet",
    inputs=_unet_inputs,
    required=_unet_config,
    ignored="_.*|sample_size|addition_embed_type_num_heads",
  ),
  "controlnet": _Kind(
    module=StableDiffusionControlNet,
    class_name="ControlNetModel",
    folder="controlnet",
    inputs=_controlnet_inputs,
    required=_controlnet_config,
    ignored="_.*|addition_embed_type_num_heads",
  ),
  "autoencoder": _Kind(
    module=AutoencoderKL,
    class_name="AutoencoderKL",
    folder="vae",
    inputs=_autoencoder_inputs,
    required=_autoencoder_config,
    ignored="_.*|sample_size|force_upcast",
    rename=_rename_attention,
  ),
  "text_encoder": _Kind(
    module=TextEncoder,
    class_name="CLIPTextModel",
    folder="text_encoder",
    inputs=_text_encoder_inputs,
    required=_text_encoder_config,
    ignored=".*",
    defaults={"num_attention_heads": 8},
    rename=_rename_text_model,
  ),
}

# Tensors that no parameter needs.
EXCUSED = (r"text_model\.embeddings\.position_ids",)

# Where the original's single file keeps each network.
PREFIXES = {
  "unet": "model.diffusion_model.",
  "controlnet": "control_model.",
  "autoencoder": "first_stage_model.",
  "text_encoder": "cond_stage_model.transformer.",
}

# What else is in it: schedules, averages of weights, the loss's networks.
EXCUSED_IN_SINGLE_FILE = (
  r"(log_one_minus_|sqrt_|sqrt_one_minus_|sqrt_recip_|sqrt_recipm1_)?"
  r"alphas_cumprod(_prev)?",
  r"betas|logvar|lvlb_weights|scale_factor",
  r"posterior_(variance|log_variance_clipped|mean_coef[12])",
  r"model_ema\..*",
  r"first_stage_model\.loss\..*",
)


def load(directory: str | Path) -> dict[str, Network]:
  """Reads a pipeline's folder, or that of one of its networks.

  Args:
    directory: holds some of unet/, controlnet/, vae/ and text_encoder/, or one
      network's config.json and *.safetensors.

  Returns:
    Those of 'unet', 'controlnet', 'autoencoder' and 'text_encoder' that are
    there, each a module and its variables {'params'}, in float32.

  Raises:
    FileNotFoundError: there is no network, or one lacks its weights.
    ValueError: a network's configuration is not supported; or a tensor is
      missing, left over or of an unexpected shape.
  """
  directory = files.find(directory)
  if not directory.is_dir():
    raise ValueError(
      f"{directory} is a file, not a folder as diffusers writes it; fairdiff"
      " import-weights makes one of it"
    )
  if (directory / "config.json").is_file():
    config = _read_config(directory)
    for name, kind in KINDS.items():
      if _class_name(config) == kind.class_name:
        return {name: _load_network(kind, directory, config)}
    raise ValueError(
      f"{directory} holds a {_class_name(config)}, none of "
      f"{[kind.class_name for kind in KINDS.values()]}"
    )
  networks = {}
  for name, kind in KINDS.items():
    folder = directory / kind.folder
    if folder.is_dir():
      config = _read_config(folder)
      if _class_name(config) != kind.class_name:
        raise ValueError(
          f"{folder} holds a {_class_name(config)}, not a {kind.class_name}"
        )
      networks[name] = _load_network(kind, folder, config)
  if not networks:
    folders = ", ".join(f"{kind.folder}/" for kind in KINDS.values())
    raise FileNotFoundError(
      f"{directory} has neither a config.json nor any of {folders}; name a"
      " folder as diffusers writes it"
    )
  return networks


def read_schedule(directory: str | Path) -> dict[str, Any]:
  """How a pipeline's networks were trained, as a run's config says it.

  Args:
    directory: a pipeline's folder; without scheduler/ it is taken for one of
      Stable Diffusion 1.5.

  Returns:
    Fields of `config.image` as in `SCHEDULE`, 'beta_start' and 'beta_end' only
    where the schedule has them.

  Raises:
    ValueError: the file is damaged, or says what is not supported.
  """
  path = files.find(directory) / SCHEDULER
  if not path.exists():
    return dict(SCHEDULE)
  config = files.read_json(files.require_whole(path), AGAIN)

  def refuse(field, remedy):
    value = config.get(field)
    return ValueError(f"{path}: {field} = {value!r} is not supported; {remedy}")

  for field, needed in _SCHEDULER_REQUIRED.items():
    if config.get(field, needed) != needed:
      raise refuse(field, f"set {needed!r} if the networks can do with that")
  found = {}
  for ours, theirs, names, default in (
    ("prediction", "prediction_type", _PREDICTIONS, "epsilon"),
    ("schedule", "beta_schedule", _SCHEDULES, None),
  ):
    name = config.get(theirs, default)
    if not isinstance(name, str) or name not in names:
      raise refuse(theirs, f"networks of {', '.join(names)} are")
    found[ours] = names[name]
  numbers = {"num_steps": "num_train_timesteps"}
  if found["schedule"] != "cosine":
    numbers |= {"beta_start": "beta_start", "beta_end": "beta_end"}
  for ours, theirs in numbers.items():
    found[ours] = config.get(theirs)
    if not _is_like(found[ours], SCHEDULE[ours]):
      raise refuse(theirs, "it must be a number above 0")
  return found


def save(
  directory: str | Path,
  *,
  unet: Network | None = None,
  controlnet: Network | None = None,
  autoencoder: Network | None = None,
) -> None:
  """Writes networks as folders that diffusers' `from_pretrained` reads.

  Nothing here fixes an image's size, so `sample_size` is left out, and a
  pipeline of diffusers has to be told a height and a width.

  Args:
    directory: gets unet/, controlnet/ and vae/; made where it does not exist.
    unet: module and variables {'params'}.
    controlnet: module and variables {'params'}.
    autoencoder: module and variables {'params'}.

  Raises:
    FileExistsError: one of the folders is there already; nothing is written.
    ValueError: variables are not those of their module; nothing is written.
  """
  given = {"unet": unet, "controlnet": controlnet, "autoencoder": autoencoder}
  given = {name: network for name, network in given.items() if network}
  for name, (module, variables) in given.items():
    folder = Path(directory) / KINDS[name].folder
    if folder.exists():
      raise FileExistsError(f"{folder} exists; it is not overwritten")
    graft.require_shapes(variables, _expected(KINDS[name], module))
  for name, (module, variables) in given.items():
    with files.new_directory(Path(directory) / KINDS[name].folder) as folder:
      _save_network(KINDS[name], folder, module, variables)


def controlnet_from_unet(
  unet_params: Mapping[str, Any], controlnet_params: Mapping[str, Any]
) -> dict[str, Any]:
  """Starts a ControlNet from a U-Net, as Zhang et al. train theirs.

  Args:
    unet_params: 'params' of a `StableDiffusionUNet`.
    controlnet_params: 'params' of a `StableDiffusionControlNet` of the same
      sizes, for the layers that the U-Net lacks.

  Returns:
    New 'params' of the ControlNet. What comes from the U-Net is copied, so
    that one step may donate both networks' buffers.

  Raises:
    ValueError: the networks' encoders are not the same; the message lists the
      differences.
  """
  encoder = {
    name: value
    for name, value in unet_params.items()
    if not name.startswith(UNET_ONLY)
  }
  own = {
    name: value
    for name, value in controlnet_params.items()
    if name.startswith(CONTROLNET_ONLY)
  }
  replaced = {k: v for k, v in controlnet_params.items() if k not in own}
  try:
    graft.require_shapes(encoder, replaced)
  except ValueError as error:
    raise ValueError(
      f"the U-Net does not fit the ControlNet: {error}"
    ) from error
  return {**jax.tree.map(jnp.copy, encoder), **own}


def new_controlnet(unet: Network, seed: int = 0) -> Network:
  """A ControlNet that starts from a U-Net and changes nothing yet."""
  module, variables = unet
  sizes = sizes_of(module)
  del sizes["out_channels"]
  controlnet = StableDiffusionControlNet(**sizes)
  inputs = KINDS["controlnet"].inputs(controlnet)

  def draw(key):
    zeros = (jnp.zeros(x.shape, x.dtype) for x in inputs)
    return controlnet.init(key, *zeros)["params"]

  def draw_own(key):  # to draw the rest too would take long to compile
    params = draw(key)
    return {k: v for k, v in params.items() if k.startswith(CONTROLNET_ONLY)}

  key = jax.random.key(seed)
  own = jax.jit(draw_own)(key)
  params = controlnet_from_unet(
    variables["params"], {**jax.eval_shape(draw, key), **own}
  )
  return controlnet, {"params": params}


def load_single_file(path: str | Path) -> dict[str, Network]:
  """Reads the original's layout, in which one file holds every network.

  Sizes are read off the tensors, and so is the latents' scaling factor where it
  is among them. What they do not show is taken to be Stable Diffusion 1.x's: 8
  heads in the U-Net and the ControlNet, heads of 64 channels in the text
  encoder, 32 groups in every group normalisation, noise that is predicted.

  Args:
    path: as `graft.read` takes it.

  Returns:
    As `load`.

  Raises:
    FileNotFoundError: no such file.
    ImportError: PyTorch is needed and not installed.
    ValueError: the file is damaged, holds none of the networks, other things
      than tensors, or betas of another schedule; or a tensor is missing, left
      over or of an unexpected shape.
  """
  arrays = graft.read(path)
  networks, used = {}, set()
  for name, prefix in PREFIXES.items():
    part = {
      key.removeprefix(prefix): value
      for key, value in arrays.items()
      if key.startswith(prefix) and not _is_excused(key)
    }
    if part:
      used |= {prefix + key for key in part}
      with graft.naming(f"{path}, {prefix}*"):
        config, renamed = _ORIGINALS[name](graft.Source(part))
        if name == "autoencoder" and "scale_factor" in arrays:
          scale = graft.Source(arrays).take("scale_factor", 0)
          config["scaling_factor"] = float(scale)
        networks[name] = _assemble(KINDS[name], config, renamed)
  unused = [key for key in arrays if key not in used and not _is_excused(key)]
  if unused:
    raise ValueError(f"{path}: unknown tensors: {files.some(sorted(unused))}")
  if not networks:
    raise ValueError(f"{path}: no names start with {[*PREFIXES.values()]}")
  if "betas" in arrays and not _are_known(arrays["betas"]):
    raise ValueError(
      f"{path}: its betas are not those of Stable Diffusion 1.x; convert it to"
      f" a folder as diffusers writes it, whose {SCHEDULER} says what they are"
    )
  return networks


def _are_known(betas):
  """Whether they are those of `SCHEDULE`."""
  ends = SCHEDULE["beta_start"], SCHEDULE["beta_end"]
  known = np.linspace(*np.sqrt(ends), SCHEDULE["num_steps"]) ** 2
  return betas.shape == known.shape and np.allclose(betas, known, rtol=1e-4)


def _is_excused(key):
  return any(re.fullmatch(pattern, key) for pattern in EXCUSED_IN_SINGLE_FILE)


def _class_name(config):
  """Class of a network, from diffusers' configuration or transformers'."""
  names = config.get("_class_name") or config.get("architectures")
  if not names:
    return "network without a class"
  return ", ".join(map(str, names if isinstance(names, list) else [names]))


def _read_config(folder):
  path = folder / "config.json"
  if not path.exists():
    raise FileNotFoundError(
      f"{folder} has no config.json; copy it from where the weights come from"
    )
  return files.read_json(files.require_whole(path), AGAIN)


def _load_network(kind, folder, config):
  arrays = _read_folder(folder)
  with graft.naming(folder):
    return _assemble(kind, config, arrays)


def _read_folder(folder):
  """A network's tensors by name, from one file or from those of an index."""
  for name in WEIGHTS:
    if (folder / name).is_file():
      return graft.read(folder / name)
    index = folder / f"{name}.index.json"
    if index.is_file():
      return _read_shards(index)
  raise FileNotFoundError(
    f"{folder} has neither {' nor '.join(WEIGHTS)}, nor an index of them;"
    f" {AGAIN}"
  )


def _read_shards(index):
  """The tensors in all files that an index names."""
  content = files.read_json(files.require_whole(index), AGAIN)
  shards = content.get("weight_map")
  if not isinstance(shards, dict) or not all(map(_is_name, shards.values())):
    raise ValueError(
      f"{index} is damaged (no weight_map with names of files); {AGAIN}"
    )
  names = sorted(set(shards.values()))
  absent = [name for name in names if not (index.parent / name).exists()]
  if absent:
    raise FileNotFoundError(
      f"{index} names {len(absent)} files that are not there"
      f" ({files.some(absent)}); copy or download them"
    )
  arrays = {}
  for name in names:
    arrays |= graft.read(index.parent / name)
  return arrays


def _is_name(value):
  """Whether it names a file in the same folder."""
  return isinstance(value, str) and Path(value).name == value


def _assemble(kind, config, arrays):
  """The module that a configuration describes, with its variables."""
  module = _module(kind, config)
  expected = _expected(kind, module)
  source = graft.Source({kind.rename(k): v for k, v in arrays.items()})
  params = {}
  for path in traverse_util.flatten_dict(expected["params"]):
    array = source.take(_tensor_name(path))
    if path[-1] == "kernel":
      array = graft.conv(array) if array.ndim == 4 else graft.dense(array)
    params[path] = array
  source.finish(excused=EXCUSED)
  variables = {"params": traverse_util.unflatten_dict(params)}
  graft.require_shapes(variables, expected)
  return module, variables


def _module(kind, config):
  """The module that a configuration describes.

  Raises:
    ValueError: the configuration asks for what the module cannot do.
  """
  known = sizes_of(kind.module())
  attributes = {}
  for field, value in {**kind.defaults, **config}.items():
    if field in known:
      if not _is_like(value, known[field]):
        raise _unsupported(field, value)
      attributes[field] = tuple(value) if isinstance(value, list) else value
  module = kind.module(**attributes)
  required = kind.required(module)
  for field, value in config.items():
    if field in required:
      if value != required[field]:
        raise _unsupported(field, value)
    elif field not in known and value and not re.fullmatch(kind.ignored, field):
      raise _unsupported(field, value)
  return module


def _is_like(value, default):
  """Whether it can stand for a default: a number above 0, or some of them."""
  if isinstance(default, tuple):
    return isinstance(value, list | tuple) and (
      bool(value) and all(_is_like(x, default[0]) for x in value)
    )
  numbers = int | float if isinstance(default, float) else int
  return (
    isinstance(value, numbers)
    and not isinstance(value, bool)
    and 0 < value < math.inf
  )


def _unsupported(field, value):
  return ValueError(f"configuration {field} = {value!r} is not supported")


def sizes_of(module: nn.Module) -> dict[str, Any]:
  """What a module is, by name; not how it runs."""
  return {
    field.name: getattr(module, field.name)
    for field in dataclasses.fields(module)
    if field.name not in RUNTIME
  }


def _expected(kind, module):
  """Shapes of a module's variables."""
  return jax.eval_shape(module.init, jax.random.key(0), *kind.inputs(module))


def _tensor_name(path):
  """Name of a parameter's tensor; a step's dense layers keep their '_'."""
  *modules, leaf = path
  names = [
    name if name.startswith("linear_") else re.sub(r"_(\d+)$", r".\1", name)
    for name in modules
  ]
  return ".".join([*names, "bias" if leaf == "bias" else "weight"])


def _save_network(kind, folder, module, variables):
  config = {
    "_class_name": kind.class_name,
    **sizes_of(module),
    **kind.required(module),
  }
  tensors = {}
  for path, value in traverse_util.flatten_dict(variables["params"]).items():
    array = np.asarray(value, np.float32)
    if path[-1] == "kernel":
      array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
    tensors[_tensor_name(path)] = np.ascontiguousarray(array)
  safetensors.numpy.save_file(
    tensors, folder / WEIGHTS[0], metadata={"format": "pt"}
  )
  text = json.dumps(config, indent=2, sort_keys=True) + "\n"
  files.write(folder / "config.json", text)


# Names of the original's layers, as patterns, and those of diffusers.
_UNET_LAYERS = (
  (r"^time_embed\.0\.", "time_embedding.linear_1."),
  (r"^time_embed\.2\.", "time_embedding.linear_2."),
  (r"^middle_block\.0\.", "mid_block.resnets.0."),
  (r"^middle_block\.1\.", "mid_block.attentions.0."),
  (r"^middle_block\.2\.", "mid_block.resnets.1."),
  (r"^out\.0\.", "conv_norm_out."),
  (r"^out\.2\.", "conv_out."),
  (r"^zero_convs\.(\d+)\.0\.", r"controlnet_down_blocks.\1."),
  (r"^middle_block_out\.0\.", "controlnet_mid_block."),
  (r"\.in_layers\.0\.", ".norm1."),
  (r"\.in_layers\.2\.", ".conv1."),
  (r"\.emb_layers\.1\.", ".time_emb_proj."),
  (r"\.out_layers\.0\.", ".norm2."),
  (r"\.out_layers\.3\.", ".conv2."),
  (r"\.skip_connection\.", ".conv_shortcut."),
)
_AUTOENCODER_LAYERS = (
  (r"^encoder\.down\.", "encoder.down_blocks."),
  (r"\.block\.", ".resnets."),
  (r"\.(down|up)sample\.", r".\1samplers.0."),
  (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
  (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
  (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
  (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
  (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
  (r"\.nin_shortcut\.", ".conv_shortcut."),
  (r"\.norm_out\.", ".conv_norm_out."),
)


def _rename(arrays, layers):
  renamed = {}
  for name, array in arrays.items():
    for pattern, replacement in layers:
      name = re.sub(pattern, replacement, name)
    renamed[name] = array
  return renamed


def _numbers(arrays, pattern):
  """The numbers that a pattern's group has among the names, in order."""
  matches = (re.match(pattern, name) for name in arrays)
  return sorted({int(match[1]) for match in matches if match})


def _original_encoder(source):
  """Configuration, and the layers' names, of a U-Net's encoder.

  The original numbers a network's blocks from end to end: the first
  convolution, then for each level its residual blocks and the downsampling.
  """
  stem = source.take("input_blocks.0.0.weight", 4)
  keys = source.take("middle_block.1.transformer_blocks.0.attn2.to_k.weight", 2)
  size = 1 + _numbers(source.arrays, r"input_blocks\.(\d+)\.")[-1]
  ends = _numbers(source.arrays, r"input_blocks\.(\d+)\.0\.op\.")
  period = ends[0] if ends else size
  config = {
    "in_channels": stem.shape[1],
    "block_out_channels": [
      source.take(f"input_blocks.{start}.0.out_layers.3.weight", 4).shape[0]
      for start in range(1, size, period)
    ],
    "layers_per_block": period - 1,
    "cross_attention_dim": keys.shape[1],
  }

  def place(template, first):
    return lambda match: template.format(*divmod(int(match[1]) - first, period))

  layers = (
    (r"^input_blocks\.0\.0\.", "conv_in."),
    (
      r"^input_blocks\.(\d+)\.0\.op\.",
      place("down_blocks.{}.downsamplers.0.conv.", 1),
    ),
    (r"^input_blocks\.(\d+)\.0\.", place("down_blocks.{}.resnets.{}.", 1)),
    (r"^input_blocks\.(\d+)\.1\.", place("down_blocks.{}.attentions.{}.", 1)),
    (
      r"^output_blocks\.(\d+)\.[12]\.conv\.",
      place("up_blocks.{}.upsamplers.0.conv.", 0),
    ),
    (r"^output_blocks\.(\d+)\.0\.", place("up_blocks.{}.resnets.{}.", 0)),
    (r"^output_blocks\.(\d+)\.1\.", place("up_blocks.{}.attentions.{}.", 0)),
    *_UNET_LAYERS,
  )
  return config, layers


def _original_unet(source):
  config, layers = _original_encoder(source)
  config["out_channels"] = source.take("out.2.weight", 4).shape[0]
  return config, _rename(source.arrays, layers)


def _original_controlnet(source):
  config, layers = _original_encoder(source)
  # Convolutions are the even layers; every second one of them is wider.
  numbers = _numbers(source.arrays, r"input_hint_block\.(\d+)\.")
  if len(numbers) < 2:
    raise ValueError("the ControlNet lacks layers of its input_hint_block")
  first, *between, last = numbers
  config["conditioning_embedding_out_channels"] = [
    source.take(f"input_hint_block.{number}.weight", 4).shape[0]
    for number in (first, *between[1::2])
  ]
  hint = {
    first: "conv_in",
    last: "conv_out",
    **{number: f"blocks.{i}" for i, number in enumerate(between)},
  }
  stem = (
    r"^input_hint_block\.(\d+)\.",
    lambda match: f"controlnet_cond_embedding.{hint[int(match[1])]}.",
  )
  return config, _rename(source.arrays, (stem, *layers))


def _original_autoencoder(source):
  arrays = source.arrays
  levels = _numbers(arrays, r"encoder\.down\.(\d+)\.")
  config = {
    "in_channels": source.take("encoder.conv_in.weight", 4).shape[1],
    "out_channels": source.take("decoder.conv_out.weight", 4).shape[0],
    "latent_channels": source.take("post_quant_conv.weight", 4).shape[0],
    "block_out_channels": [
      source.take(f"encoder.down.{i}.block.0.conv1.weight", 4).shape[0]
      for i in levels
    ],
    "layers_per_block": len(
      _numbers(arrays, r"encoder\.down\.0\.block\.(\d+)\.")
    ),
  }
  up = (  # numbered from the image's resolution, though run last
    r"^decoder\.up\.(\d+)\.",
    lambda match: f"decoder.up_blocks.{len(levels) - 1 - int(match[1])}.",
  )
  renamed = _rename(arrays, (up, *_AUTOENCODER_LAYERS))
  for name, array in renamed.items():
    if ".attentions." in name and array.shape[2:] == (1, 1):  # convolutions
      renamed[name] = array.squeeze((2, 3))
  return config, renamed


def _original_text_encoder(source):
  table = source.take("text_model.embeddings.token_embedding.weight", 2)
  positions = source.take("text_model.embeddings.position_embedding.weight", 2)
  hidden = source.take("text_model.encoder.layers.0.mlp.fc1.weight", 2)
  layers = _numbers(source.arrays, r"text_model\.encoder\.layers\.(\d+)\.")
  config = {
    "vocab_size": table.shape[0],
    "hidden_size": table.shape[1],
    "intermediate_size": hidden.shape[0],
    "num_hidden_layers": len(layers),
    "num_attention_heads": table.shape[1] // 64,
    "max_position_embeddings": positions.shape[0],
  }
  return config, source.arrays


_ORIGINALS = {
  "unet": _original_unet,
  "controlnet": _original_controlnet,
  "autoencoder": _original_autoencoder,
  "text_encoder": _original_text_encoder,
}
