r"""Risk of the image generator: diffusion of an image given its mask.

    l = mean (target - output(x_t, t, g, hint(m)))^2

on the residual to a mask-conditional intensity prior,

    x_0 = (image - mu(m, g)) / s[g],    mu(m, g) = sum_c A[g, c] blur(1[m = c])

where A[g, c] is the training set's mean intensity of class c in group g and
s[g] the residual's standard deviation. The prior carries what a few cases
of a group can teach, their brightness and contrast; the network adds the
rest. With A = 0 and s = 1 it is plain diffusion.

The mask enters as FairDiff's hint: an RGB image in [0, 1] with white
background, red rim and blue cup.
"""

import jax
import jax.numpy as jnp

from fairdiff_jax.diffusion.process import (
  add_noise,
  signal_and_noise,
  target,
  to_x0_and_eps,
)
from fairdiff_jax.diffusion.samplers import check_solver, example_normal
from fairdiff_jax.diffusion.samplers import sample as reverse
from fairdiff_jax.diffusion.schedule import make_schedule
from fairdiff_jax.models.unet import ControlNet, UNet
from fairdiff_jax.objectives.task import Task

HINT_COLORS = ((1.0, 1.0, 1.0), (1.0, 0.0, 0.0), (0.0, 0.0, 1.0))


def hint_image(mask: jax.Array) -> jax.Array:
  """Masks int32 [B, H, W] as RGB hints [B, H, W, 3] in [0, 1]."""
  return jnp.asarray(HINT_COLORS)[mask]


def blur(x: jax.Array) -> jax.Array:
  """Binomial blur (1 4 6 4 1) / 16 along both image axes of [B, H, W, C]."""
  weights = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)
  for axis in (1, 2):
    size = x.shape[axis]
    pad = [(0, 0)] * x.ndim
    pad[axis] = (2, 2)
    padded = jnp.pad(x, pad, "edge")
    x = sum(
      w * jax.lax.slice_in_dim(padded, i, i + size, axis=axis)
      for i, w in enumerate(weights)
    )
  return x


def intensity_prior(
  mask: jax.Array, group: jax.Array, statistics: dict[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
  """What is known of an image before it is seen.

  Args:
    mask: [B, H, W].
    group: [B], -1 for unknown.
    statistics: 'intensity' A [G + 1, C] and 'scale' s [G + 1]; the last row
      serves unknown groups.

  Returns:
    mu(m, g) [B, H, W, 1] and s [B, 1, 1, 1].
  """
  intensity, scale = statistics["intensity"], statistics["scale"]
  row = jnp.where(group < 0, len(intensity) - 1, group)
  one_hot = jax.nn.one_hot(mask, intensity.shape[-1])
  mean = jnp.einsum("bhwc,bc->bhw", blur(one_hot), intensity[row])
  return mean[..., None], scale[row][:, None, None, None]


def image_task(config, num_groups: int) -> Task:
  """The image generator `psi`.

  Args:
    config: network sizes, `conditioning` ('controlnet' or 'concat'),
      `dropout` of the condition, schedule, `prediction`, and the sampler's
      `sample_steps`, `solver`, `eta` and `guidance`.
    num_groups: G.

  Returns:
    A task whose frozen variables are {'intensity' [G + 1, 3], 'scale' [G + 1]}.
    Its `risk` aux holds 'x0' [B, H, W, 1], the denoised images in [-1, 1],
    and 'signal' [B] = abar_t, the share of x_t's variance that is data. Its
    `sample` maps (variables, masks [B, H, W], group [B], keys [B]) to images
    [B, H, W, 1] in [-1, 1].

  Raises:
    ValueError: if `conditioning` or `solver` is unknown, or `sample_steps` out
      of range.
  """
  if config.conditioning not in ("controlnet", "concat"):
    raise ValueError(
      f"unknown image conditioning {config.conditioning!r}; use"
      " 'controlnet' or 'concat'"
    )
  if not 1 <= config.sample_steps <= config.num_steps:
    raise ValueError(
      f"image.sample_steps={config.sample_steps} is not in 1 to"
      f" image.num_steps={config.num_steps}"
    )
  check_solver(config.solver)
  controlled = config.conditioning == "controlnet"
  sizes = dict(
    channels=tuple(config.channels),
    num_blocks=config.num_blocks,
    attention=tuple(config.attention),
    num_heads=config.num_heads,
    num_groups=num_groups,
    patch=config.patch,
  )
  unet = UNet(**sizes, head_channels=config.head_channels)
  controlnet = ControlNet(**sizes, hint_channels=tuple(config.hint_channels))
  schedule = make_schedule(
    config.schedule, config.num_steps, config.beta_start, config.beta_end
  )

  def predict(params, x_t, t, group, hint):
    if controlled:
      residuals = controlnet.apply(
        {"params": params["controlnet"]}, x_t, t, group, hint
      )
      return unet.apply({"params": params["unet"]}, x_t, t, group, residuals)
    x_t = jnp.concatenate([x_t, hint], axis=-1)
    return unet.apply({"params": params["unet"]}, x_t, t, group)

  def init(key):
    size = config.patch * 2 ** (len(config.channels) - 1)
    x = jnp.zeros((1, size, size, 1))
    hint = jnp.zeros((1, size, size, 3))
    t = group = jnp.zeros(1, jnp.int32)
    unet_key, control_key = jax.random.split(key)
    if not controlled:
      x = jnp.concatenate([x, hint], axis=-1)
    params = {"unet": unet.init(unet_key, x, t, group)["params"]}
    if controlled:
      params["controlnet"] = controlnet.init(control_key, x, t, group, hint)[
        "params"
      ]
    return params, {}

  def risk(variables, batch, keys, train):
    del train
    mask, group = batch["mask"], batch["group"]
    prior, scale = intensity_prior(mask, group, variables.frozen)
    x_0 = (batch["image"] - prior) / scale
    step_keys, noise_keys, drop_keys = jax.vmap(
      lambda key: jax.random.split(key, 3), out_axes=1
    )(keys)
    t = jax.vmap(
      lambda key: jax.random.randint(key, (), 1, config.num_steps + 1)
    )(step_keys)
    eps = example_normal(noise_keys, x_0.shape[1:])
    kept = jax.vmap(lambda key: jax.random.uniform(key) >= config.dropout)(
      drop_keys
    )
    hint = hint_image(mask) * kept[:, None, None, None]
    x_t = add_noise(schedule, x_0, t, eps)
    output = predict(variables.params, x_t, t, jnp.where(kept, group, -1), hint)
    error = output - target(schedule, config.prediction, x_0, t, eps)
    x0_hat, _ = to_x0_and_eps(schedule, config.prediction, output, x_t, t)
    signal, _ = signal_and_noise(schedule, t, 1)
    aux = {
      "batch_stats": {},
      "x0": x0_hat * scale + prior,
      "signal": signal**2 * kept,
    }
    return jnp.mean(error**2, axis=(1, 2, 3)), aux

  def sample(variables, mask, group, keys):
    prior, scale = intensity_prior(mask, group, variables.frozen)
    hint = hint_image(mask)

    def denoise(x_t, t):
      if config.guidance == 1:
        return predict(variables.params, x_t, t, group, hint)
      both = predict(
        variables.params,
        jnp.concatenate([x_t, x_t]),
        jnp.concatenate([t, t]),
        jnp.concatenate([group, jnp.full_like(group, -1)]),
        jnp.concatenate([hint, jnp.zeros_like(hint)]),
      )
      conditional, unconditional = jnp.split(both, 2)
      return unconditional + config.guidance * (conditional - unconditional)

    start_keys, step_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    x_0 = reverse(
      denoise,
      example_normal(start_keys, prior.shape[1:]),
      step_keys,
      schedule=schedule,
      prediction=config.prediction,
      num_steps=config.sample_steps,
      solver=config.solver,
      eta=config.eta,
    )
    return jnp.clip(x_0 * scale + prior, -1, 1)

  return Task(init, risk, sample)
