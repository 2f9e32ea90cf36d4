"""Noise schedules, the forward process and samplers, against float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairdiff_jax.config import defaults
from fairdiff_jax.diffusion.process import add_noise, target, to_x0_and_eps
from fairdiff_jax.diffusion.samplers import (
  example_keys,
  example_normal,
  sample,
  sampling_times,
)
from fairdiff_jax.diffusion.schedule import make_schedule

PREDICTIONS = ("eps", "x0", "v")
SCHEDULES = ("linear", "scaled_linear", "cosine")


def draw(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def exact(schedule):
  return schedule.alpha_bar.astype(np.float64)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_starts_at_the_data_and_ends_in_noise(name):
  schedule = make_schedule(name, 1000)
  assert schedule.num_steps == 1000
  assert schedule.beta[0] == 0 and schedule.alpha_bar[0] == 1
  assert (np.diff(schedule.alpha_bar) < 0).all()
  assert 0 < schedule.alpha_bar[-1] < 0.01


def test_linear_schedule_in_closed_form():
  schedule = make_schedule("linear", 50, 1e-3, 0.05)
  beta = [1e-3 + (0.05 - 1e-3) * i / 49 for i in range(50)]
  np.testing.assert_allclose(schedule.beta[1:], beta, rtol=1e-6)
  log = np.cumsum(np.log1p(-np.asarray(beta)))
  np.testing.assert_allclose(schedule.alpha_bar[1:], np.exp(log), rtol=1e-6)


def test_scaled_linear_schedule_in_closed_form():
  schedule = make_schedule("scaled_linear", 1000, 0.00085, 0.012)
  roots = np.sqrt(schedule.beta[1:].astype(np.float64))
  step = (0.012**0.5 - 0.00085**0.5) / 999
  np.testing.assert_allclose(np.diff(roots), step, rtol=1e-3)
  assert schedule.beta[1] == pytest.approx(0.00085, rel=1e-6)
  assert schedule.beta[-1] == pytest.approx(0.012, rel=1e-6)


def test_cosine_schedule_in_closed_form():
  t = np.arange(101) / 100
  f = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
  # beta is clipped at 0.999, which only the last step reaches.
  found = make_schedule("cosine", 100).alpha_bar
  np.testing.assert_allclose(found[:-1], (f / f[0])[:-1], rtol=1e-5)
  assert found[-1] == pytest.approx(f[-2] / f[0] * 0.001, rel=1e-4)


def test_unknown_names():
  schedule, x = make_schedule("linear", 4), jnp.zeros((1, 2))
  with pytest.raises(ValueError, match="unknown schedule 'quadratic'"):
    make_schedule("quadratic", 4)
  t = jnp.ones(1, jnp.int32)
  with pytest.raises(ValueError, match="unknown prediction 'score'"):
    target(schedule, "score", x, t, x)
  with pytest.raises(ValueError, match="unknown prediction 'score'"):
    to_x0_and_eps(schedule, "score", x, x, t)


def test_noise_has_the_forward_moments():
  schedule, t = make_schedule("linear", 100), 60
  x_0, n = 1.7, 200_000
  eps = jax.random.normal(jax.random.key(0), (n, 1))
  x_t = add_noise(schedule, jnp.full((n, 1), x_0), jnp.full(n, t), eps)
  abar = exact(schedule)[t]
  error = 4 / np.sqrt(n)
  assert float(x_t.mean()) == pytest.approx(np.sqrt(abar) * x_0, abs=error)
  assert float(x_t.var()) == pytest.approx(1 - abar, abs=2 * error)


@settings(max_examples=30, deadline=None)
@given(
  prediction=st.sampled_from(PREDICTIONS),
  name=st.sampled_from(SCHEDULES),
  t=st.lists(st.integers(1, 100), min_size=3, max_size=3),
  seed=st.integers(0, 2**16),
)
def test_each_prediction_determines_x0_and_eps(prediction, name, t, seed):
  schedule, t = make_schedule(name, 100), np.asarray(t)
  x_0, eps = draw([seed, 0], 3, 4, 2), draw([seed, 1], 3, 4, 2)
  x_t = add_noise(schedule, x_0, t, eps)
  output = target(schedule, prediction, x_0, t, eps)
  found = to_x0_and_eps(schedule, prediction, output, x_t, t)
  # Dividing by the signal or the noise multiplies x_t's rounding.
  abar = exact(schedule)[t].reshape(3, 1, 1)
  tolerance = 2e-6 / np.sqrt(np.minimum(abar, 1 - abar))
  assert (np.abs(found[0] - x_0) <= tolerance).all()
  assert (np.abs(found[1] - eps) <= tolerance).all()


def test_ancestral_steps_are_the_ddpm_posterior():
  # One step from t = 2 of a schedule with T = 2 leads to x_1, which then
  # falls on x_0: an affine `denoise` shows mean and variance of each step.
  num_steps = 6
  schedule = make_schedule("linear", num_steps, 0.05, 0.4)
  beta = np.linspace(0.05, 0.4, num_steps)
  abar = np.concatenate([[1], np.cumprod(1 - beta)])
  keys = example_keys(jax.random.key(3), jnp.arange(5))
  x = draw(0, 5, 4)

  found = sample(
    lambda x_t, t: 0.3 * x_t + 0.1,
    jnp.asarray(x),
    keys,
    schedule=schedule,
    prediction="x0",
    num_steps=num_steps,
    eta=1.0,
  )
  x = x.astype(np.float64)
  for t in range(num_steps, 0, -1):
    z = example_normal(jax.vmap(jax.random.fold_in, (0, None))(keys, t), (4,))
    x_0 = 0.3 * x + 0.1
    # Ho et al. 2020, eq. 7
    mean = np.sqrt(abar[t - 1]) * beta[t - 1] / (1 - abar[t]) * x_0
    mean += np.sqrt(1 - beta[t - 1]) * (1 - abar[t - 1]) / (1 - abar[t]) * x
    variance = (1 - abar[t - 1]) / (1 - abar[t]) * beta[t - 1]
    x = mean + np.sqrt(variance) * np.asarray(z, np.float64)
  np.testing.assert_allclose(found, x, atol=3e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("num_steps", [1, 7, 50])
def test_an_oracle_recovers_the_data(prediction, num_steps):
  schedule = make_schedule("scaled_linear", 50, 0.001, 0.05)
  x_0, eps = draw(0, 3, 4), draw(1, 3, 4)
  x_T = add_noise(schedule, x_0, jnp.full(3, 50), eps)
  found = sample(
    lambda x_t, t: target(schedule, prediction, x_0, t, eps),
    x_T,
    example_keys(jax.random.key(0), jnp.arange(3)),
    schedule=schedule,
    prediction=prediction,
    num_steps=num_steps,
    eta=0.0,
  )
  np.testing.assert_allclose(found, x_0, atol=1e-5)


@pytest.mark.parametrize(("eta", "same"), [(0.0, True), (1.0, False)])
def test_only_ddim_ignores_the_keys(eta, same):
  schedule = make_schedule("linear", 10)
  x_T = draw(0, 2, 4)
  found = [
    sample(
      lambda x_t, t: 0.5 * x_t,
      x_T,
      example_keys(jax.random.key(seed), jnp.arange(2)),
      schedule=schedule,
      prediction="eps",
      num_steps=5,
      eta=eta,
    )
    for seed in (0, 1)
  ]
  assert np.array_equal(*found) == same


@pytest.mark.parametrize(
  ("strength", "start"), [(0.0, 0), (0.3, 15), (0.5, 25), (1.0, 50)]
)
def test_a_start_from_data_takes_the_last_steps(strength, start):
  """What is known of the data stays as far as no noise is added to it."""
  schedule = make_schedule("scaled_linear", 50, 0.001, 0.05)
  data, noise = draw(0, 2, 4), draw(1, 2, 4)
  options = dict(schedule=schedule, prediction="x0", num_steps=10, eta=1.0)
  keys = example_keys(jax.random.key(3), jnp.arange(2))

  def denoise(x_t, t):
    return 0.4 * x_t + 0.01 * t[:, None]

  found = sample(denoise, noise, keys, x_0=data, strength=strength, **options)
  if start == 0:
    np.testing.assert_array_equal(found, data)
    return
  # The same process whose schedule ends where it starts.
  shorter = type(schedule)(*(x[: start + 1] for x in schedule))
  steps = options | dict(schedule=shorter, num_steps=round(10 * strength))
  x_t = add_noise(schedule, data, jnp.full(2, start), noise)
  expected = sample(denoise, x_t, keys, **steps)
  np.testing.assert_allclose(found, expected, atol=1e-6)


def test_noise_depends_on_the_example_alone():
  key = jax.random.key(5)
  whole = example_normal(example_keys(key, jnp.arange(6)), (3,))
  part = example_normal(example_keys(key, jnp.array([4, 1])), (3,))
  np.testing.assert_array_equal(part, whole[jnp.array([4, 1])])


@pytest.mark.parametrize("num_steps", [0, 11])
def test_step_count_is_checked(num_steps):
  schedule = make_schedule("linear", 10)
  with pytest.raises(ValueError, match="use 1 to 10"):
    sample(
      lambda x_t, t: x_t,
      jnp.zeros((1, 2)),
      example_keys(jax.random.key(0), jnp.arange(1)),
      schedule=schedule,
      prediction="eps",
      num_steps=num_steps,
    )


def test_sampling_times_by_hand():
  assert sampling_times(10, 3).tolist() == [10, 7, 3, 0]
  assert sampling_times(10, 3, "leading").tolist() == [8, 5, 2, 1]
  assert sampling_times(10, 3, "linspace").tolist() == [10, 7, 4, 0]
  assert sampling_times(10, 10, "leading")[0] == 10
  with pytest.raises(ValueError, match="unknown spacing 'karras'"):
    sampling_times(10, 3, "karras")


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_dpm_solver_matches_float64(num_steps):
  schedule = make_schedule("scaled_linear", 50, 0.001, 0.05)
  x = draw(0, 3, 4)
  found = sample(
    lambda x_t, t: 0.3 * x_t + 0.1,
    jnp.asarray(x),
    example_keys(jax.random.key(0), jnp.arange(3)),
    schedule=schedule,
    prediction="x0",
    num_steps=num_steps,
    solver="dpm++2m",
  )
  abar, times = exact(schedule), sampling_times(50, num_steps)
  x, before, last = x.astype(np.float64), 0, np.inf
  for t, s in itertools.pairwise(times):
    x_0 = 0.3 * x + 0.1
    if s == 0:
      x = x_0
      break
    rise = 0.5 * np.log(abar[s] / (1 - abar[s]) * (1 - abar[t]) / abar[t])
    mixed = x_0 + rise / (2 * last) * (x_0 - before)
    x = np.sqrt((1 - abar[s]) / (1 - abar[t])) * x
    x += np.sqrt(abar[s]) * (1 - np.exp(-rise)) * mixed
    before, last = x_0, rise
  np.testing.assert_allclose(found, x, atol=3e-6)


def test_unknown_solver():
  with pytest.raises(ValueError, match="unknown solver 'heun'"):
    sample(
      lambda x_t, t: x_t,
      jnp.zeros((1, 2)),
      example_keys(jax.random.key(0), jnp.arange(1)),
      schedule=make_schedule("linear", 10),
      prediction="eps",
      num_steps=2,
      solver="heun",
    )


def test_clouds_of_the_steps_taken_are_as_good_as_those_of_all():
  """Points of two contours, by the denoiser that a network would learn."""
  config = defaults().points
  schedule = make_schedule(
    "linear", config.num_steps, config.beta_start, config.beta_end
  )
  angle = np.linspace(0, 2 * np.pi, 64, endpoint=False)
  ring = np.stack([np.cos(angle), np.sin(angle)], -1)
  rims = [np.insert(r * ring, 2, z, 1) for r, z in ((1.7, 1), (1, -1))]
  contour = np.concatenate(rims).astype(np.float32)

  def denoise(x, t):
    signal = jnp.asarray(schedule.alpha_bar)[t][:, None, None]
    to = jnp.sqrt(signal) * contour
    square = jnp.sum((x[:, :, None] - to[:, None]) ** 2, -1)
    weights = jax.nn.softmax(-square / (2 * (1 - signal)), -1)
    return (x - weights @ to) / jnp.sqrt(1 - signal)

  @functools.partial(jax.jit, static_argnums=0)
  def clouds(num_steps):
    start, steps = (
      example_keys(jax.random.key(i), np.arange(8)) for i in (0, 1)
    )
    return sample(
      denoise,
      example_normal(start, (128, 3)),
      steps,
      schedule=schedule,
      prediction="eps",
      num_steps=num_steps,
    )

  def missed(found):
    """Distance of a contour's point to the next of a cloud, on average."""
    between = np.linalg.norm(found[:, :, None] - contour, axis=-1)
    return between.min(1).mean()

  taken, whole = map(clouds, (config.sample_steps, config.num_steps))
  assert config.sample_steps * 5 <= config.num_steps
  assert missed(taken) < 1.15 * missed(whole)
  for found in (taken, whole):
    assert np.mean(found[..., 2] > 0) == pytest.approx(0.5, abs=0.05)
    for radius, z in ((1.7, 1), (1, -1)):
      drawn = np.linalg.norm(found[..., :2][found[..., 2] * z > 0], axis=-1)
      assert drawn.mean() == pytest.approx(radius, rel=3e-3)
      assert drawn.std() < 3e-3
