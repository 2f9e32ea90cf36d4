r"""Risk of the mask generator: a flow VAE over point clouds.

    l = mean (eps - eps_hat)^2 + kl ( -H[q(z|x)] - log p(z|g) )

(Luo & Hu 2021, eq. 12), with the noisy cloud x_t at a uniform step t, z drawn
from the posterior and p(z|g) a normalising flow. Clouds enter in pixels and
are normalised by the training set's mean and one common standard deviation. A
cloud of zeros stands for none: such a case has weight 0 here.

Clouds are drawn by ancestral sampling with fewer steps than T: at a fifth of
them, Chamfer MMD and coverage and the sizes of masks are those of all steps, up
to what another seed makes of them.
"""

import jax
import jax.numpy as jnp

from fairdiff_jax.diffusion.process import add_noise
from fairdiff_jax.diffusion.samplers import example_normal
from fairdiff_jax.diffusion.samplers import sample as reverse
from fairdiff_jax.diffusion.schedule import make_schedule
from fairdiff_jax.models.point_cloud import (
  PointFlowVAE,
  log_prior,
  posterior_entropy,
)
from fairdiff_jax.objectives.task import Task, Variables


def points_task(config, num_groups: int, axis_name: str | None = None) -> Task:
  """The mask generator `phi`.

  Args:
    config: network sizes, `num_points`, `num_steps`, `sample_steps`,
      `beta_start`, `beta_end`, `kl_weight`.
    num_groups: G.
    axis_name: mapped axis that batch normalisation spans under `pmap`.

  Returns:
    A task whose frozen variables are {'mean' [3], 'std' []}, and whose
    `sample` maps (variables, group [B], keys [B]) to clouds [B, N, 3] in
    pixels.
  """
  module = PointFlowVAE(
    latent_dim=config.latent_dim,
    encoder_widths=tuple(config.encoder_widths),
    head_widths=tuple(config.head_widths),
    flow_depth=config.flow_depth,
    flow_width=config.flow_width,
    decoder_widths=tuple(config.decoder_widths),
    num_groups=num_groups,
    axis_name=axis_name,
  )
  schedule = make_schedule(
    "linear", config.num_steps, config.beta_start, config.beta_end
  )

  def apply(variables, *args, **kwargs):
    return module.apply(
      {"params": variables.params, "batch_stats": variables.batch_stats},
      *args,
      **kwargs,
    )

  def init(key):
    variables = module.init(key, jnp.zeros((2, config.num_points, 3)))
    return Variables(variables["params"], variables["batch_stats"], {})

  def risk(variables, batch, keys, train):
    drawn = jnp.any(batch["points"] != 0, axis=(1, 2))
    x_0 = batch["points"] - variables.frozen["mean"]
    x_0 /= variables.frozen["std"]
    weight = batch["weight"] * drawn
    (mean, logvar), updates = apply(
      variables,
      x_0,
      weight,
      train,
      method="encode",
      mutable=["batch_stats"],
    )
    step_keys, latent_keys, noise_keys = jax.vmap(
      lambda key: jax.random.split(key, 3), out_axes=1
    )(keys)
    z = mean + jnp.exp(logvar / 2) * example_normal(latent_keys, mean.shape[1:])
    w, logdet = apply(variables, z, batch["group"], method="flow")
    t = jax.vmap(
      lambda key: jax.random.randint(key, (), 1, config.num_steps + 1)
    )(step_keys)
    eps = example_normal(noise_keys, x_0.shape[1:])
    x_t = add_noise(schedule, x_0, t, eps)
    eps_hat = apply(
      variables, x_t, jnp.asarray(schedule.beta)[t], z, method="denoise"
    )
    reconstruction = jnp.mean((eps - eps_hat) ** 2, axis=(1, 2))
    kl = -posterior_entropy(logvar) - log_prior(w, logdet)
    aux = {"batch_stats": updates["batch_stats"], "weight": weight}
    return reconstruction + config.kl_weight * kl, aux

  def sample(variables, group, keys):
    start_keys, latent_keys, step_keys = jax.vmap(
      lambda key: jax.random.split(key, 3), out_axes=1
    )(keys)
    w = example_normal(latent_keys, (config.latent_dim,))
    z = apply(variables, w, group, method="inverse_flow")
    beta = jnp.asarray(schedule.beta)
    cloud = reverse(
      lambda x_t, t: apply(variables, x_t, beta[t], z, method="denoise"),
      example_normal(start_keys, (config.num_points, 3)),
      step_keys,
      schedule=schedule,
      prediction="eps",
      num_steps=min(config.sample_steps, config.num_steps),
    )
    return cloud * variables.frozen["std"] + variables.frozen["mean"]

  return Task(init, risk, sample)
