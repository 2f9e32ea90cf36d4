"""Diffusion of an autoencoder's latents: ControlNet on Stable Diffusion.

    x_0 = s z,    z ~ N(mean(image), exp(logvar(image)))

s is the autoencoder's scaling factor, which is read with its weights. The mask
steers the U-Net through the ControlNet, whose hint is never left out. What
guidance amplifies is the prompt: prompts are constants, one for all groups or
one for each, as the text encoder's tokens, and where the condition is dropped
the negative prompt stands. Autoencoder and prompts never change.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fairdiff_jax import files
from fairdiff_jax.diffusion.samplers import example_normal
from fairdiff_jax.models.autoencoder import AutoencoderKL
from fairdiff_jax.models.stable_diffusion import (
  StableDiffusionControlNet,
  StableDiffusionUNet,
)
from fairdiff_jax.objectives.image_space import Space, hint_image
from fairdiff_jax.objectives.task import Variables
from fairdiff_jax.pretrained import graft, stable_diffusion

TOKENS = 77
DECODED_AT_ONCE = 4

# Where the config has the sizes of each network's module.
_FIELDS = {
  "unet": {
    name: f"image.stable_diffusion.{name}"
    for name in (
      "block_out_channels",
      "layers_per_block",
      "attention_head_dim",
      "cross_attention_dim",
      "norm_num_groups",
    )
  },
  "autoencoder": {
    "latent_channels": "image.stable_diffusion.latent_channels",
    "block_out_channels": "image.stable_diffusion.autoencoder_channels",
    "layers_per_block": "image.stable_diffusion.autoencoder_layers",
    "norm_num_groups": "image.stable_diffusion.norm_num_groups",
  },
}
_FIELDS["controlnet"] = _FIELDS["unet"] | {
  "conditioning_embedding_out_channels": "image.stable_diffusion.hint_channels"
}

# Which of the U-Net's top-level parameters learn, by `config.unet`.
LEARNT = {
  "locked": (),
  "decoder": stable_diffusion.UNET_ONLY,
  "unlocked": ("",),
}


def make_autoencoder(config) -> AutoencoderKL:
  """The autoencoder that `config.stable_diffusion` describes, in float32."""
  sizes = config.stable_diffusion
  return AutoencoderKL(
    latent_channels=sizes.latent_channels,
    block_out_channels=tuple(sizes.autoencoder_channels),
    layers_per_block=sizes.autoencoder_layers,
    norm_num_groups=sizes.norm_num_groups,
  )


def make_networks(
  config,
) -> tuple[StableDiffusionUNet, StableDiffusionControlNet]:
  """The networks that `config.stable_diffusion` describes."""
  sizes = config.stable_diffusion
  shared = dict(
    in_channels=sizes.latent_channels,
    block_out_channels=tuple(sizes.block_out_channels),
    layers_per_block=sizes.layers_per_block,
    attention_head_dim=sizes.attention_head_dim,
    cross_attention_dim=sizes.cross_attention_dim,
    norm_num_groups=sizes.norm_num_groups,
    dtype=jnp.dtype(config.dtype),
    remat=config.remat,
  )
  return (
    StableDiffusionUNet(**shared, out_channels=sizes.latent_channels),
    StableDiffusionControlNet(
      **shared, conditioning_embedding_out_channels=tuple(sizes.hint_channels)
    ),
  )


def load_autoencoder(config) -> tuple[AutoencoderKL, Any]:
  """The autoencoder in `config.weights` alone, and its parameters.

  Raises:
    FileNotFoundError: there are no such weights.
    ValueError: no weights are named; they are damaged; or they are of other
      sizes than `config.stable_diffusion` has, or trained otherwise than
      `config` says.
  """
  if not config.weights:
    raise ValueError(
      "image.weights is empty; name the directory of Stable Diffusion's weights"
    )
  require_schedule(config)
  folder = Path(config.weights) / stable_diffusion.KINDS["autoencoder"].folder
  networks = stable_diffusion.load(folder)
  _require_sizes(config, networks, {"autoencoder": make_autoencoder(config)})
  module, variables = networks["autoencoder"]
  return module, variables["params"]


def require_schedule(config) -> None:
  """Raises ValueError unless `config.weights` were trained as `config` says."""
  directory = config.weights
  found = stable_diffusion.read_schedule(directory)
  path = files.find(directory) / stable_diffusion.SCHEDULER
  what = f"{path} does not fit the config"
  remedy = "change that file if the networks shall learn otherwise"
  if not path.exists():
    what = (
      f"{directory} has no {stable_diffusion.SCHEDULER}, so its networks are"
      " taken for trained as Stable Diffusion 1.5's, which does not fit the"
      " config"
    )
    remedy = "put there what belongs to the networks"
  fields = {name: f"image.{name}" for name in found}
  graft.require_sizes(what, found, config, fields, remedy)


def _require_sizes(config, networks, modules):
  """Refuses networks that are other modules than those of the config."""
  for name, module in modules.items():
    found = stable_diffusion.sizes_of(networks[name][0])
    found.pop("scaling_factor", None)  # which is used as it is
    folder = Path(config.weights) / stable_diffusion.KINDS[name].folder
    graft.require_sizes(
      f"{folder} does not fit image.stable_diffusion",
      found,
      stable_diffusion.sizes_of(module),
      _FIELDS[name],
    )


def downsampling(config) -> int:
  """Pixels of an image's side per position of its latent's."""
  return 2 ** (len(config.stable_diffusion.autoencoder_channels) - 1)


def latent_size(config, size: tuple[int, int]) -> tuple[int, int]:
  """Height and width of the latents of images of `size`.

  Raises:
    ValueError: if the autoencoder cannot divide it.
  """
  factor = downsampling(config)
  height, width = size
  if height % factor or width % factor:
    raise ValueError(
      f"images of {height} x {width} have no latents, which are {factor} times"
      f" smaller; set data.size to multiples of {factor}"
    )
  return height // factor, width // factor


def encode_image(
  autoencoder: AutoencoderKL, params, image: jax.Array
) -> jax.Array:
  """Posterior [B, h, w, 2 C], means and log-variances, of images."""
  rgb = jnp.broadcast_to(image, (*image.shape[:3], 3))
  return jnp.concatenate(
    autoencoder.apply({"params": params}, rgb, method="encode"), axis=-1
  )


def _read_prompts(directory, num_groups):
  """Tokens of the prompts, 'positive' [G + 1, 77, D], 'negative' [77, D]."""
  path = directory / stable_diffusion.PROMPTS
  if not path.exists():
    raise FileNotFoundError(
      f"{path} does not exist; fairdiff import-weights makes it"
    )
  source = graft.Source(graft.read(path))
  with graft.naming(path):
    prompts = {
      "positive": source.take("positive", 3),
      "negative": source.take("negative", 2),
    }
    source.finish()
  positive, wanted = prompts["positive"], num_groups + 1
  if len(positive) not in (1, wanted):
    raise ValueError(
      f"{path} has {len(positive)} prompts, not 1 for all or {wanted}: one for"
      f" each of the {num_groups} groups and one for unknown groups"
    )
  if len(positive) == 1:
    prompts["positive"] = np.repeat(positive, wanted, axis=0)
  return prompts


def latent_space(config, num_groups: int, image_channels: int = 1) -> Space:
  """Stable Diffusion's U-Net with a ControlNet.

  Args:
    config: `stable_diffusion` (sizes), `unet` ('locked', 'decoder' or
      'unlocked': what of it learns), `only_mid_control`, `dtype` of the
      computation, `remat`, `weights`, a pipeline's folder as diffusers writes
      it, with `prompts.safetensors` ('positive' [1 or G + 1, 77, D],
      'negative' [77, D]) in it.
    num_groups: G.
    image_channels: of images; one is the mean of those that are decoded.

  Returns:
    A space whose frozen variables are {'autoencoder', 'prompts',
    'scaling_factor' (float32, of the latents), 'unet'}; the last holds what of
    the U-Net does not learn. A batch holds 'latent' [B, h, w, 2 C], the
    posterior's mean and log-variance, or else 'image'.

  Raises:
    ValueError: if `unet` is unknown.
  """
  if config.unet not in LEARNT:
    raise ValueError(
      f"unknown image.unet {config.unet!r}; use one of {', '.join(LEARNT)}"
    )
  sizes = config.stable_diffusion
  unet, controlnet = make_networks(config)
  autoencoder = make_autoencoder(config)
  factor = downsampling(config)

  def learns(name):
    return name.startswith(LEARNT[config.unet])

  def assemble(
    unet_params, controlnet_params, autoencoder_params, prompts, scaling_factor
  ):
    learnt = {k: v for k, v in unet_params.items() if learns(k)}
    kept = {k: v for k, v in unet_params.items() if not learns(k)}
    return Variables(
      {"unet": learnt, "controlnet": controlnet_params},
      {},
      {
        "autoencoder": autoencoder_params,
        "prompts": prompts,
        "scaling_factor": scaling_factor,
        "unet": kept,
      },
    )

  def init(key):
    side = 2 ** (len(sizes.block_out_channels) - 1)
    latents = jnp.zeros((1, side, side, sizes.latent_channels))
    hint = jnp.zeros((1, factor * side, factor * side, 3))
    t = jnp.zeros(1, jnp.int32)
    tokens = jnp.zeros((TOKENS, sizes.cross_attention_dim))
    unet_key, control_key, autoencoder_key = jax.random.split(key, 3)
    return assemble(
      unet.init(unet_key, latents, t, tokens[None])["params"],
      controlnet.init(control_key, latents, t, tokens[None], hint)["params"],
      autoencoder.init(autoencoder_key, hint)["params"],
      {
        "positive": jnp.zeros((num_groups + 1, *tokens.shape)),
        "negative": tokens,
      },
      jnp.float32(autoencoder.scaling_factor),
    )

  def load():
    require_schedule(config)
    directory = files.find(config.weights)
    prompts = _read_prompts(directory, num_groups)
    networks = stable_diffusion.load(directory)
    modules = {
      "unet": unet,
      "controlnet": controlnet,
      "autoencoder": autoencoder,
    }
    missing = modules.keys() - networks.keys()
    if missing:
      raise ValueError(
        f"{directory} lacks {', '.join(sorted(missing))}; fairdiff"
        " import-weights makes a directory that has all"
      )
    _require_sizes(config, networks, modules)
    found = assemble(
      *(networks[name][1]["params"] for name in modules),
      prompts,
      np.float32(networks["autoencoder"][0].scaling_factor),
    )
    with graft.naming(f"{directory} does not fit image.stable_diffusion"):
      graft.require_shapes(found, jax.eval_shape(init, jax.random.key(0)))
    return found

  def encode(variables, batch, keys):
    latent_size(config, batch["mask"].shape[1:])  # refuses what has none
    latent = batch.get("latent")
    if latent is None:
      latent = encode_image(
        autoencoder, variables.frozen["autoencoder"], batch["image"]
      )
    mean, logvar = jnp.split(latent, 2, axis=-1)
    # Other noise than the diffusion's, from the same keys.
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 0)
    noise = example_normal(keys, mean.shape[1:])
    scale = variables.frozen["scaling_factor"]
    return scale * (mean + jnp.exp(logvar / 2) * noise), None

  def draw(variables, mask, group, keys, image=None):
    del variables, mask, group, keys, image

  def condition(variables, mask, group, prior, kept):
    del prior
    prompts = variables.frozen["prompts"]
    row = jnp.where(group < 0, num_groups, group)
    tokens = jnp.where(
      kept[:, None, None], prompts["positive"][row], prompts["negative"]
    )
    return tokens, hint_image(mask)

  def predict(variables, x_t, t, condition):
    tokens, hint = condition
    params, step = variables.params, t - 1  # their steps count from 0
    down, middle = controlnet.apply(
      {"params": params["controlnet"]}, x_t, step, tokens, hint
    )
    if config.only_mid_control:
      down = jax.tree.map(jnp.zeros_like, down)
    return unet.apply(
      {"params": {**params["unet"], **variables.frozen["unet"]}},
      x_t,
      step,
      tokens,
      (down, middle),
    )

  def decode(variables, x_0, prior):
    del prior
    scale = variables.frozen["scaling_factor"]

    def one(latent):
      rgb = autoencoder.apply(
        {"params": variables.frozen["autoencoder"]},
        latent[None] / scale,
        method="decode",
      )
      grey = jnp.mean(rgb[0], axis=-1, keepdims=True)
      return grey if image_channels == 1 else rgb[0]

    return jax.lax.map(one, x_0, batch_size=DECODED_AT_ONCE)

  def shape(size):
    return (*latent_size(config, size), sizes.latent_channels)

  return Space(
    init,
    shape,
    encode,
    draw,
    condition,
    predict,
    decode,
    load if config.weights else None,
  )
