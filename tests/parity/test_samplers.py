"""Samplers, against diffusers' schedulers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fairdiff_jax.diffusion.samplers import example_keys, sample
from fairdiff_jax.diffusion.schedule import make_schedule

diffusers = pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")


@pytest.mark.parametrize("num_steps", [1, 2, 5, 20])
@pytest.mark.parametrize(
  ("scheduler", "solver", "spacing"),
  [
    ("DDIMScheduler", "ddim", "leading"),
    ("DPMSolverMultistepScheduler", "dpm++2m", "linspace"),
  ],
)
def test_samplers_equal_diffusers_s(scheduler, solver, spacing, num_steps):
  """Stable Diffusion's settings, with guidance between two outputs."""
  settings = dict(
    num_train_timesteps=1000,
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
  )
  more = {}
  if solver == "ddim":
    more = dict(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
  peer = getattr(diffusers, scheduler)(**settings, **more)
  peer.set_timesteps(num_steps)

  def network(x, t):
    conditional = 0.8 * x + 0.1 * t / 1000
    unconditional = 0.9 * x - 0.05
    return unconditional + 3.0 * (conditional - unconditional)

  x = np.random.default_rng(4).normal(size=(3, 5)).astype(np.float32)
  expected = torch.tensor(x)
  for t in peer.timesteps:
    output = network(expected, float(t))
    expected = peer.step(output, t, expected).prev_sample
  found = sample(
    lambda x_t, t: network(x_t, (t[:, None] - 1.0)),
    jnp.asarray(x),
    example_keys(jax.random.key(0), jnp.arange(3)),
    schedule=make_schedule("scaled_linear", 1000, 0.00085, 0.012),
    prediction="eps",
    num_steps=num_steps,
    solver=solver,
    spacing=spacing,
    eta=0.0,
  )
  scale = np.abs(expected.numpy()).max()
  np.testing.assert_allclose(found, expected.numpy(), atol=1e-5 * scale)
