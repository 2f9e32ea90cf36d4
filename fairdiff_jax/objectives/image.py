r"""Risk of the image generator: diffusion of an image given its mask.

    l = omega(t) mean (target - output(x_t, t, condition(m, g)))^2

in a space of its own: pixels, or an autoencoder's latents. omega is 1, or
Min-SNR's weight.

The mask enters as FairDiff's hint: an RGB image in [0, 1] with white
background, red rim and blue cup, and further colours for further classes.
"""

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from fairdiff_jax.diffusion.process import (
  add_noise,
  min_snr_weight,
  signal_and_noise,
  target,
  to_x0_and_eps,
)
from fairdiff_jax.diffusion.samplers import check_solver, example_normal
from fairdiff_jax.diffusion.samplers import sample as reverse
from fairdiff_jax.diffusion.schedule import make_schedule
from fairdiff_jax.objectives.image_space import Space
from fairdiff_jax.objectives.latent_space import latent_space
from fairdiff_jax.objectives.pixel_space import pixel_space
from fairdiff_jax.objectives.task import Task

SPACES = {"unet": pixel_space, "stable_diffusion": latent_space}


def image_task(config, num_groups: int, image_channels: int = 1) -> Task:
  """The image generator `psi`.

  Args:
    config: `network` ('unet' in pixel space or 'stable_diffusion' in latent
      space) and what that takes; `dropout` of the condition, schedule,
      `prediction`, `min_snr`, and the sampler's `sample_steps`, `solver`,
      `spacing`, `eta` and `guidance`.
    num_groups: G.
    image_channels: of images, C.

  Returns:
    A task whose `risk` aux holds 'x0', () -> the denoised images [B, H, W, C]
    in [-1, 1], decoded when called, and 'signal' [B] = abar_t, the share of
    x_t's variance that is data. Its `sample` maps (variables, masks
    [B, H, W], group [B], keys [B]) to images [B, H, W, C] in [-1, 1]; with
    `image` [B, H, W, C] it takes the last `strength` of the sampling steps
    only, from these images.

  Raises:
    ValueError: if `network`, `solver` or something that the network takes is
      unknown, or `sample_steps` out of range.
  """
  if config.network not in SPACES:
    raise ValueError(
      f"unknown image.network {config.network!r}; use one of"
      f" {', '.join(SPACES)}"
    )
  if not 1 <= config.sample_steps <= config.num_steps:
    raise ValueError(
      f"image.sample_steps={config.sample_steps} is not in 1 to"
      f" image.num_steps={config.num_steps}"
    )
  check_solver(config.solver)
  space: Space = SPACES[config.network](config, num_groups, image_channels)
  schedule = make_schedule(
    config.schedule, config.num_steps, config.beta_start, config.beta_end
  )

  def risk(variables, batch, keys, train):
    del train
    mask, group = batch["mask"], batch["group"]
    x_0, prior = space.encode(variables, batch, keys)
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
    condition = space.condition(variables, mask, group, prior, kept)
    x_t = add_noise(schedule, x_0, t, eps)
    output = space.predict(variables, x_t, t, condition)
    error = output - target(schedule, config.prediction, x_0, t, eps)
    losses = jnp.mean(error**2, axis=(1, 2, 3))
    if config.min_snr:
      losses *= min_snr_weight(schedule, config.prediction, t, config.min_snr)
    x0_hat, _ = to_x0_and_eps(schedule, config.prediction, output, x_t, t)
    signal, _ = signal_and_noise(schedule, t, 1)
    aux = {
      "batch_stats": {},
      "x0": Partial(space.decode, variables, x0_hat, prior),
      "signal": signal**2 * kept,
    }
    return losses, aux

  def sample(variables, mask, group, keys, image=None, strength=1.0):
    everyone = jnp.ones(len(mask), bool)
    # Other noise than the diffusion's, from the same keys.
    prior_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 0)
    prior = space.draw(variables, mask, group, prior_keys, image)
    condition = space.condition(variables, mask, group, prior, everyone)
    if config.guidance != 1:
      condition = jax.tree.map(
        lambda *both: jnp.concatenate(both),
        condition,
        space.condition(variables, mask, group, prior, ~everyone),
      )

    def denoise(x_t, t):
      if config.guidance == 1:
        return space.predict(variables, x_t, t, condition)
      both = space.predict(
        variables,
        jnp.concatenate([x_t, x_t]),
        jnp.concatenate([t, t]),
        condition,
      )
      conditional, unconditional = jnp.split(both, 2)
      return unconditional + config.guidance * (conditional - unconditional)

    start_keys, step_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    start = None
    if image is not None:
      real = {"image": image, "mask": mask, "group": group}
      start, _ = space.encode(variables, real, start_keys)
    x_0 = reverse(
      denoise,
      example_normal(start_keys, space.shape(mask.shape[1:])),
      step_keys,
      schedule=schedule,
      prediction=config.prediction,
      num_steps=config.sample_steps,
      solver=config.solver,
      spacing=config.spacing,
      eta=config.eta,
      x_0=start,
      strength=strength,
    )
    return jnp.clip(space.decode(variables, x_0, prior), -1, 1)

  return Task(space.init, risk, sample, space.load)
