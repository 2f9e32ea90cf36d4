"""Risks of the three networks and their sum, against float64."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs.phantom import get_config
from fairdiff_jax.data import domain, statistics
from fairdiff_jax.data.cases import Cases
from fairdiff_jax.diffusion.samplers import example_keys
from fairdiff_jax.fairness.risk import RunningRisk
from fairdiff_jax.objectives.image_space import HINT_COLORS, hint_image
from fairdiff_jax.objectives.joint import joint_objective, make_objective
from fairdiff_jax.objectives.pixel_space import (
  LOG_BLACK,
  LOG_WHITE,
  blur,
  class_means,
  draw_intensity,
  log_brightness,
  pixel_space,
  prior_image,
  to_image,
)
from fairdiff_jax.objectives.segmentation import cross_entropy, dice_terms
from fairdiff_jax.objectives.task import Variables
from fairdiff_jax.training.optimizer import learning_rate, make_optimizer
from fairdiff_jax.training.step import init_state, train_step

NETWORKS = ("points", "image", "segmenter")
GROUPS = ("A", "B", "C")
BATCH, SIZE, POINTS = 6, 16, 10


def make_config(**changes):
  config = get_config("smoke").unlock()
  config.points.num_points, config.points.num_steps = POINTS, 4
  config.image.dropout = 0.5
  config.fairness.method, config.fairness.weight = "gap", 0.7
  config.objective.points, config.objective.image = 2.0, 3.0
  config.objective.segmenter, config.objective.agreement = 0.5, 0.25
  config.update_from_flattened_dict(changes)
  return config.lock()


def make_cases(seed=0, n=BATCH):
  rng = np.random.default_rng(seed)
  return Cases(
    name=[f"case_{i}" for i in range(n)],
    image=rng.integers(5, 256, (n, SIZE, SIZE)).astype(np.uint8),
    mask=rng.integers(0, 3, (n, SIZE, SIZE)).astype(np.uint8),
    points=rng.normal(8, 3, (n, POINTS, 3)).astype(np.float32),
    attributes={},
  )


GROUP = np.array([0, 2, -1, 2, 0, 0], np.int32)


def make_batch(seed=0):
  cases = make_cases(seed)
  part = {
    "image": (cases.image / 127.5 - 1).astype(np.float32)[..., None],
    "mask": cases.mask.astype(np.int32),
    "points": cases.points,
    "group": GROUP,
    "weight": np.array([1, 1, 1, 0, 1, 1], np.float32),
  }
  other = make_cases(seed + 1)
  image = (other.image / 127.5 - 1).astype(np.float32)[..., None]
  return {
    "generation": part,
    "segmentation": part | {"image": image, "mask": part["mask"][::-1]},
  }


@pytest.fixture(scope="module")
def objective():
  return make_objective(make_config(), GROUPS, NETWORKS)


@pytest.fixture(scope="module")
def optimizer():
  return make_optimizer(make_config().optimizer, dict.fromkeys(NETWORKS, 100))


@pytest.fixture(scope="module")
def state(objective, optimizer):
  stats = statistics.compute(make_cases(), GROUP, 3, intensity_prior=True)
  state = jax.jit(
    lambda: init_state(
      jax.random.key(0),
      stats,
      jnp.ones(3),
      objective=objective,
      optimizer=optimizer,
    )
  )()
  # Zero-initialised layers would hide what depends on the condition.
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: x + 0.05 * rng.normal(size=x.shape).astype(np.float32),
    state.params,
  )
  return state.replace(params=params)


def variables(state, name):
  return Variables(
    state.params[name], state.batch_stats[name], state.frozen[name]
  )


@pytest.fixture(scope="module")
def risks(objective, state):
  """name -> compiled (part, keys) -> (losses, aux)."""
  return {
    name: jax.jit(
      lambda part, keys, name=name: objective.tasks[name].risk(
        variables(state, name), part, keys, True
      )
    )
    for name in NETWORKS
  }


def keys_of(index, seed=1):
  return example_keys(jax.random.key(seed), jnp.asarray(index))


def test_segmentation_loss_matches_numpy():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(4, 5, 6, 3))
  label = rng.integers(0, 3, (4, 5, 6))
  label[3] = 0  # without rim and cup
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  y = np.eye(3)[label]
  expected_cross_entropy = -np.log((p * y).sum(-1)).mean((1, 2))
  intersection = (p * y).sum((1, 2))
  sizes = (p**2).sum((1, 2)) + (y**2).sum((1, 2))
  dice = (1 - (2 * intersection + 1e-5) / (sizes + 1e-5)).mean(-1)
  logits, label = jnp.asarray(logits, jnp.float32), jnp.asarray(label)
  found = losses(logits, label)
  np.testing.assert_allclose(found[0], expected_cross_entropy, rtol=1e-5)
  np.testing.assert_allclose(found[1], dice, rtol=1e-5)


@jax.jit
def losses(logits, label):
  return cross_entropy(logits, label), dice_terms(logits, label).loss()


def test_perfect_segmentation_costs_nothing():
  label = np.random.default_rng(0).integers(0, 3, (2, 8, 8))
  logits = 100 * np.eye(3, dtype=np.float32)[label]
  np.testing.assert_allclose(losses(logits, label), 0, atol=1e-5)


def test_hints_are_white_red_blue():
  mask = jnp.array([[[0, 1, 2]]])
  expected = [[[[1, 1, 1], [1, 0, 0], [0, 0, 1]]]]
  np.testing.assert_array_equal(hint_image(mask), expected)
  assert len(set(HINT_COLORS)) == len(HINT_COLORS) == domain.MOST + 1


def test_blur_is_binomial_and_keeps_constants():
  impulse = np.zeros((1, 9, 9, 1), np.float32)
  impulse[0, 4, 4, 0] = 1
  kernel = np.zeros(9)
  kernel[2:7] = np.array([1, 4, 6, 4, 1]) / 16
  found = jax.jit(blur)(impulse)[0, ..., 0]
  np.testing.assert_allclose(found, np.outer(kernel, kernel), atol=1e-7)
  flat = np.full((1, 4, 5, 2), 3, np.float32)
  np.testing.assert_allclose(jax.jit(blur)(flat), flat, rtol=1e-6)


def test_class_means_match_numpy_and_fall_back():
  image, mask = make_batch()["generation"]["image"], make_cases().mask.copy()
  mask[0][mask[0] == 2] = 1
  otherwise = jnp.full((BATCH, 3), 7.0)
  found = jax.jit(class_means)(image, np.int32(mask), otherwise)
  found = np.asarray(found)
  assert found[0, 2] == 7
  for i, c in itertools.product(range(BATCH), range(3)):
    if (i, c) != (0, 2):
      expected = image[i, ..., 0][mask[i] == c].mean()
      assert found[i, c] == pytest.approx(expected, abs=1e-5)


def test_the_prior_image_shows_every_class_its_intensity():
  mask = np.broadcast_to(np.arange(3)[:, None, None], (3, 5, 5))
  intensity = np.arange(9, dtype=np.float32).reshape(3, 3)
  found = jax.jit(prior_image)(mask, intensity)
  assert found.shape == (3, 5, 5, 1)
  np.testing.assert_allclose(found[:, 2, 2, 0], [0, 4, 8], rtol=1e-6)


def test_log_brightness_is_undone():
  image = jnp.linspace(-1, 1, 256)
  y = log_brightness(image)
  np.testing.assert_allclose(to_image(y), image, atol=1e-6)
  np.testing.assert_allclose(
    y[jnp.array([0, -1])], (LOG_BLACK, LOG_WHITE), 1e-5
  )


def test_drawn_intensities_have_the_group_s_mean_and_covariance():
  n, rng = 20_000, np.random.default_rng(0)
  mean = rng.uniform(-1.2, -0.3, (4, 3)).astype(np.float32)
  root = 0.1 * rng.normal(size=(4, 3, 3)).astype(np.float32)
  spread = root + root.swapaxes(1, 2)
  known = {"intensity": jnp.asarray(mean), "spread": jnp.asarray(spread)}
  draw = jax.jit(draw_intensity)
  for group, row in ((0, 0), (2, 2), (-1, 3)):
    found = np.asarray(draw(known, np.full(n, group), keys_of(range(n))))
    np.testing.assert_allclose(found.mean(0), mean[row], atol=0.01)
    covariance = spread[row] @ spread[row]
    np.testing.assert_allclose(np.cov(found.T), covariance, atol=0.004)
  wild = {"intensity": jnp.zeros((4, 3)), "spread": 50 * jnp.ones((4, 3, 3))}
  found = draw(wild, np.zeros(9, int), keys_of(range(9)))
  assert found.min() >= LOG_BLACK and found.max() <= LOG_WHITE


def test_a_case_is_its_prior_and_its_residual(state):
  space = pixel_space(make_config().image, 3)
  known, part = variables(state, "image"), make_batch()["generation"]
  x_0, prior = jax.jit(space.encode)(known, part, keys_of(range(BATCH)))
  np.testing.assert_allclose(
    jax.jit(space.decode)(known, x_0, prior), part["image"], atol=1e-5
  )
  # Its own intensities are measured, those of a new case are drawn.
  assert abs(float(x_0.mean())) < 0.1
  draw = jax.jit(space.draw)
  new = draw(known, part["mask"], GROUP, keys_of(range(BATCH)))
  assert not np.isclose(new.mean, prior.mean).any()
  np.testing.assert_array_equal(new.scale, prior.scale)


def by_case(cases):
  """Mean logarithm of brightness of each case's classes, NaN without any."""
  assert not ((cases.image <= 4) & (cases.mask == 0)).any()  # all is lit
  y = np.log(cases.image / 127.5 + 0.1)
  return np.array(
    [
      [np.mean(y[i][m == c]) if (m == c).any() else np.nan for c in range(3)]
      for i, m in enumerate(cases.mask)
    ]
  ), y


@pytest.mark.parametrize("prior", [True, False])
def test_statistics_match_numpy(prior):
  cases = make_cases()
  found = statistics.compute(cases, GROUP, 3, intensity_prior=prior)
  points = cases.points.astype(np.float64).reshape(-1, 3)
  mean = points.mean(0)
  np.testing.assert_allclose(found["points"]["mean"], mean, rtol=1e-6)
  std = np.sqrt(((points - mean) ** 2).mean())
  assert found["points"]["std"] == pytest.approx(std, rel=1e-6)
  image = found["image"]
  if not prior:
    np.testing.assert_array_equal(image["intensity"], np.zeros((4, 3)))
    np.testing.assert_array_equal(image["spread"], np.zeros((4, 3, 3)))
    np.testing.assert_array_equal(image["scale"], np.ones(4))
    return
  own, y = by_case(cases)
  # Group 1 has no case and takes all of them; unknown is the last row.
  members = (GROUP == 0, GROUP >= -1, GROUP == 2, GROUP >= -1)
  centred = own.copy()
  for g in (-1, 0, 2):
    centred[GROUP == g] -= (own if g < 0 else own[GROUP == g]).mean(0)
  pooled = centred.T @ centred / (BATCH - 3)
  for row, member in enumerate(members):
    n = member.sum()
    mean = own[member].mean(0)
    np.testing.assert_allclose(image["intensity"][row], mean, atol=1e-6)
    scatter = (own[member] - mean).T @ (own[member] - mean)
    covariance = (scatter + 8 * pooled) / (n - 1 + 8) * (1 + 1 / n)
    spread = image["spread"][row]
    np.testing.assert_allclose(spread @ spread, covariance, atol=1e-6)
    residual = [y[i] - own[i][cases.mask[i]] for i in np.flatnonzero(member)]
    assert image["scale"][row] == pytest.approx(np.std(residual), rel=1e-5)


def test_many_cases_have_their_own_spread_and_one_the_groups():
  """A group's covariance is its own when it has many, the pooled when one."""
  rng = np.random.default_rng(0)
  n, group = 400, np.repeat([0, 1], [400, 1])
  level = np.r_[rng.integers(50, 90, n), 200].astype(np.uint8)
  image = np.broadcast_to(level[:, None, None], (n + 1, SIZE, SIZE))
  mask = np.broadcast_to(rng.integers(0, 3, (SIZE, SIZE)), image.shape)
  cases = make_cases(n=1)._replace(image=image, mask=mask.astype(np.uint8))
  found = statistics.compute(cases, group, 2, intensity_prior=True)["image"]
  own, pooled = (found["spread"][g] @ found["spread"][g] for g in (0, 1))
  variance = np.log(level[:n] / 127.5 + 0.1).var(ddof=1)
  np.testing.assert_allclose(own, np.full((3, 3), variance), rtol=0.01)
  np.testing.assert_allclose(pooled, 2 * own, rtol=0.01)


def in_a_round_field(cases):
  """The same cases, with unlit corners of several greys."""
  rows, columns = np.indices((SIZE, SIZE)) - (SIZE - 1) / 2
  corner = np.hypot(rows, columns) > SIZE / 2
  unlit = (rows + columns).astype(int) % 5
  image, mask = cases.image.copy(), np.where(corner, 0, cases.mask)
  image[:, corner] = unlit[corner]
  return cases._replace(image=image, mask=mask.astype(np.uint8)), corner


def test_what_surrounds_a_field_of_view_is_no_background(state):
  """It changes no statistics, and a start keeps it, at any intensity."""
  cases, corner = in_a_round_field(make_cases())
  found, y = by_case(cases._replace(image=cases.image + np.uint8(5) * corner))
  for i in range(BATCH):
    found[i, 0] = y[i][(cases.mask[i] == 0) & ~corner].mean()
  compute = partial(statistics.compute, num_groups=3, intensity_prior=True)
  image = compute(cases, GROUP)["image"]
  np.testing.assert_allclose(image["intensity"][3], found.mean(0), atol=1e-6)
  residual = np.stack([y[i] - found[i][m] for i, m in enumerate(cases.mask)])
  expected = residual[:, ~corner].std()
  assert image["scale"][3] == pytest.approx(expected, rel=1e-5)

  space = pixel_space(make_config().image, 3)
  known = variables(state, "image")
  part = make_batch()["generation"] | {
    "image": np.float32(cases.image[..., None] / 127.5 - 1),
    "mask": np.int32(cases.mask),
  }
  x_0, prior = jax.jit(space.encode)(known, part, keys_of(range(BATCH)))
  new = jax.jit(space.draw)(
    known, part["mask"], GROUP, keys_of(range(BATCH)), part["image"]
  )
  for mean in (prior.mean, new.mean):
    np.testing.assert_array_equal(mean[:, corner], np.float32(LOG_BLACK))
    assert (mean[:, ~corner] > LOG_BLACK).all()
  again = jax.jit(space.decode)(known, x_0, new)
  np.testing.assert_allclose(
    again[:, corner], part["image"][:, corner], atol=1e-5
  )


def test_statistics_of_one_flat_image_without_a_cup_are_finite():
  cases = make_cases(n=1)
  flat = cases._replace(
    image=np.full_like(cases.image, 9), mask=np.minimum(cases.mask, 1)
  )
  found = statistics.compute(flat, GROUP[:1], 3, intensity_prior=True)["image"]
  np.testing.assert_array_equal(found["intensity"][:, 2], 0)
  np.testing.assert_allclose(
    found["intensity"][:, :2], np.log(9 / 127.5 + 0.1), rtol=1e-6
  )
  np.testing.assert_array_equal(found["spread"], 0)
  np.testing.assert_allclose(found["scale"], 1 / 127.5)


def test_a_case_without_a_class_counts_as_its_group_s_average():
  cases = make_cases()
  mask = cases.mask.copy()
  mask[0][mask[0] == 2] = 0  # of group 0, which has two others
  mask[1][mask[1] == 2] = 0  # of group 2, which has one other
  mask[3][mask[3] == 2] = 0  # the other
  cases = cases._replace(mask=mask)
  own, _ = by_case(cases)
  found = statistics.compute(cases, GROUP, 3, intensity_prior=True)["image"]
  cups = found["intensity"][:, 2]
  np.testing.assert_allclose(cups[0], own[4:6, 2].mean(), atol=1e-6)
  np.testing.assert_allclose(cups[1:], np.nanmean(own[:, 2]), atol=1e-6)
  assert np.isfinite(found["spread"]).all()


def test_statistics_have_the_announced_shapes():
  found = statistics.compute(make_cases(), GROUP, 3, intensity_prior=True)
  shapes = jax.tree.map(np.shape, statistics.shapes(3))
  assert jax.tree.map(np.shape, found) == shapes


@pytest.mark.parametrize("name", NETWORKS)
def test_risks_are_per_example(risks, name):
  """Permuting cases with their keys permutes their losses."""
  part = make_batch()["generation"]
  losses, _ = risks[name](part, keys_of(range(BATCH)))
  assert losses.shape == (BATCH,) and np.isfinite(losses).all()
  assert len(set(np.asarray(losses).tolist())) == BATCH
  order = np.array([3, 0, 5, 1, 4, 2])
  permuted, _ = risks[name](
    {k: v[order] for k, v in part.items()}, keys_of(order)
  )
  np.testing.assert_allclose(permuted, losses[order], rtol=2e-5)


@pytest.mark.parametrize("name", ["image", "segmenter"])
def test_a_case_does_not_see_the_others(risks, name):
  part = make_batch()["generation"]
  losses, _ = risks[name](part, keys_of(range(BATCH)))
  other = {k: np.concatenate([v[:1], v[:0:-1]]) for k, v in part.items()}
  found, _ = risks[name](other, keys_of(range(BATCH)))
  np.testing.assert_allclose(found[0], losses[0], rtol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_dropout_hides_the_mask(state, dropout):
  # Without a prior, which would tell masks apart.
  changes = {"image.dropout": dropout, "image.intensity_prior": False}
  config = make_config(**changes)
  task = make_objective(config, GROUPS, ("image",)).tasks["image"]
  known = Variables(state.params["image"], {}, state.frozen["image"])
  part = make_batch()["generation"]
  other = part | {"mask": part["mask"][::-1], "group": GROUP[::-1]}
  risk = jax.jit(lambda part: task.risk(known, part, keys_of(range(6)), True))
  same = np.isclose(risk(part)[0], risk(other)[0], rtol=1e-6)
  assert same.all() if dropout else not same.any()
  np.testing.assert_array_equal(risk(part)[1]["signal"] == 0, dropout == 1)


def test_unknown_conditioning():
  config = make_config(**{"image.conditioning": "film"})
  with pytest.raises(ValueError, match="unknown image conditioning 'film'"):
    make_objective(config, GROUPS, NETWORKS)


def test_an_image_depends_on_its_own_key_alone(objective, state):
  """Not on the cases beside it, the padding, or the number of devices."""
  mask = jnp.asarray(np.resize(make_cases().mask, (8, SIZE, SIZE)), jnp.int32)
  group, keys = jnp.resize(GROUP, 8), keys_of(range(8))
  known, draw = variables(state, "image"), objective.tasks["image"].sample
  one = jax.jit(draw)(known, mask, group, keys)
  mesh = jax.sharding.Mesh(np.array(jax.devices()), "data")
  rows = NamedSharding(mesh, PartitionSpec("data"))
  whole = NamedSharding(mesh, PartitionSpec())
  spread = jax.jit(draw, in_shardings=(whole, rows, rows, rows))
  order = np.array([3, 0, 5, 1, 3, 3, 3, 3])
  for found, expected in (
    (spread(known, mask, group, keys), one),
    (jax.jit(draw)(known, mask[order], group[order], keys[order]), one[order]),
  ):
    np.testing.assert_allclose(found, expected, atol=1e-4)
  assert len({float(x.mean()) for x in one}) == 8


@pytest.mark.parametrize("asked, taken", [(3, 3), (20, 4)])
def test_clouds_take_as_many_steps_as_asked(state, asked, taken):
  config = make_config(**{"points.sample_steps": asked})
  sample = make_objective(config, GROUPS, ("points",)).tasks["points"].sample
  program = jax.make_jaxpr(sample)(
    variables(state, "points"), jnp.array([0, -1]), keys_of(range(2))
  )
  assert f"length={taken}\n" in str(program)


def test_samples_have_the_data_s_shape_and_range(objective, state):
  keys, group = keys_of(range(2)), jnp.array([0, -1])
  clouds = jax.jit(objective.tasks["points"].sample)(
    variables(state, "points"), group, keys
  )
  assert clouds.shape == (2, POINTS, 3) and np.isfinite(clouds).all()
  mask = jnp.asarray(make_cases().mask[:2].astype(np.int32))
  images = jax.jit(objective.tasks["image"].sample)(
    variables(state, "image"), mask, group, keys
  )
  assert images.shape == (2, SIZE, SIZE, 1)
  assert np.abs(images).max() <= 1
  labels = jax.jit(objective.tasks["segmenter"].sample)(
    variables(state, "segmenter"), images[:, :, :-3]
  )
  assert labels.shape == (2, SIZE, SIZE - 3)
  assert set(np.unique(labels)) <= {0, 1, 2}


def test_without_a_step_a_start_is_recoloured(objective, state):
  """Its class intensities are drawn, its detail stays."""
  cases = make_cases()
  mask, group = np.int32(cases.mask[:4]), np.zeros(4, np.int32)
  image = np.float32(cases.image[:4, ..., None] / 127.5 - 1)

  @jax.jit
  def recolour(mask, image):
    found = objective.tasks["image"].sample(
      variables(state, "image"), mask, group, keys_of(range(4)), image, 0.0
    )
    step = log_brightness(found) - log_brightness(image)
    return found, step, blur(jax.nn.one_hot(mask, 3)).max(-1) > 0.999

  found, step, flat = map(np.asarray, recolour(mask, image))
  step = np.where(np.abs(found) < 0.95, step, np.nan)  # neither black nor white
  for case in range(4):
    for label in range(3):
      same = step[case, ..., 0][flat[case] & (mask[case] == label)]
      if np.isfinite(same).any():
        assert np.nanstd(same) < 1e-3


@pytest.fixture(scope="module")
def joint(objective, state):
  """Compiled gradient of the objective with every network active."""

  def function(params, batch):
    return joint_objective(
      params,
      state.batch_stats,
      state.frozen,
      state.fairness,
      batch,
      jax.random.key(5),
      objective=objective,
      active=NETWORKS,
    )

  return jax.jit(jax.value_and_grad(function, has_aux=True))


def test_the_objective_is_the_documented_sum(joint, objective, state, risks):
  batch = make_batch()
  (total, aux), _ = joint(state.params, batch)
  metrics = {k: float(v) for k, v in aux["metrics"].items()}
  weight = batch["generation"]["weight"].astype(np.float64)

  def losses(name, part):
    key = jax.random.fold_in(jax.random.key(5), NETWORKS.index(name))
    return risks[name](part, example_keys(key, jnp.arange(BATCH)))

  def mean(x):
    return float(np.sum(np.asarray(x, np.float64) * weight) / weight.sum())

  points, _ = losses("points", batch["generation"])
  image, image_aux = losses("image", batch["generation"])
  segmenter, _ = losses("segmenter", batch["segmentation"])
  segmenter = np.asarray(segmenter, np.float64)
  denoised = batch["generation"] | {"image": image_aux["x0"]()}
  shown = losses("segmenter", denoised)[0] * image_aux["signal"]
  present = [np.mean(segmenter[(GROUP == g) & (weight > 0)]) for g in (0, 2)]
  gap = max(present) - min(present)

  expected = {
    "loss/points": mean(points),
    "loss/image": mean(image),
    "loss/segmenter": mean(segmenter),
    "loss/agreement": mean(shown),
    "loss/fairness": gap,
    "risk/A": present[0],
    "risk/C": present[1],
  }
  for key, value in expected.items():
    assert metrics[key] == pytest.approx(value, rel=1e-5), key
  assert np.isnan(metrics["risk/B"])
  sum_ = 2 * mean(points) + 3 * mean(image) + 0.5 * mean(segmenter)
  sum_ += 0.7 * gap + 0.25 * mean(shown)
  assert float(total) == pytest.approx(sum_, rel=1e-5)
  assert metrics["loss/total"] == float(total)


def test_the_adversary_is_fought_by_the_segmenter_alone(state):
  """Its own gradient descends, the segmenter's ascends with weight lambda."""
  names, batch, grads = ("segmenter", "adversary"), make_batch(), {}
  for weight in (0.0, 0.5, 2.0):
    config = make_config(
      **{"fairness.method": "adversarial", "fairness.weight": weight}
    )
    objective = make_objective(config, GROUPS, names)
    params, *_ = objective.tasks["adversary"].init(jax.random.key(1))
    params = {"segmenter": state.params["segmenter"], "adversary": params}

    def function(params, objective=objective):
      return joint_objective(
        params,
        {name: {} for name in names},
        {name: {} for name in names},
        state.fairness,
        batch,
        jax.random.key(5),
        objective=objective,
        active=names,
      )

    grads[weight], aux = jax.jit(jax.grad(function, has_aux=True))(params)
    assert 0.5 < float(aux["metrics"]["loss/adversary"]) < 3  # about log 3
  close = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6)
  jax.tree.map(close, grads[0.0]["adversary"], grads[2.0]["adversary"])
  change = {
    w: jax.tree.map(jnp.subtract, g["segmenter"], grads[0.0]["segmenter"])
    for w, g in grads.items()
  }
  jax.tree.map(lambda a, b: close(4 * a, b), change[0.5], change[2.0])
  assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(change[2.0])) > 0


def test_running_risks_stand_in_for_absent_groups(state):
  """With group B remembered at a high risk, the gap reaches to it."""
  found = {}
  for fill in (False, True):
    config = make_config(**{"fairness.fill_absent": fill})
    objective = make_objective(config, GROUPS, ("segmenter",))
    running = RunningRisk.start(3).update(jnp.full(3, 9.0), jnp.ones(3), 0.9)
    compute = partial(
      joint_objective, objective=objective, active=("segmenter",)
    )
    _, aux = jax.jit(compute)(
      state.params,
      state.batch_stats,
      state.frozen,
      state.fairness.replace(running=running),
      make_batch(),
      jax.random.key(5),
    )
    metrics = aux["metrics"]
    found[fill] = float(metrics["loss/fairness"])
    lowest = min(float(metrics["risk/A"]), float(metrics["risk/C"]))
    assert aux["fairness"].running.risk[1] == pytest.approx(9)
    assert (aux["fairness"].running.risk[::2] < 9).all()
  assert found[True] == pytest.approx(9 - lowest, rel=1e-5)
  assert found[False] < 9 - lowest


def test_agreement_teaches_only_the_image_generator(state):
  """The segmenter's gradient is the same with and without agreement."""
  batch, grads = make_batch(), {}
  for weight in (0.0, 5.0):
    config = make_config(**{"objective.agreement": weight})
    objective = make_objective(config, GROUPS, ("image", "segmenter"))
    active = ("image", "segmenter")

    def function(params, objective=objective, active=active):
      return joint_objective(
        params,
        state.batch_stats,
        state.frozen,
        state.fairness,
        batch,
        jax.random.key(5),
        objective=objective,
        active=active,
      )[0]

    params = {name: state.params[name] for name in active}
    grads[weight] = jax.jit(jax.grad(function))(params)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7),
    grads[0.0]["segmenter"],
    grads[5.0]["segmenter"],
  )
  change = jax.tree.map(
    lambda a, b: float(jnp.abs(a - b).max()),
    grads[0.0]["image"],
    grads[5.0]["image"],
  )
  assert max(jax.tree.leaves(change)) > 1e-4


@pytest.mark.parametrize("decay", ["cosine", "poly", "constant"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_learning_rate_told_is_the_one_used(decay, accumulate):
  """SGD's step, by its momentum, which is summed up here."""
  config = get_config("smoke").optimizer.copy_and_resolve_references().unlock()
  config.points.kind, config.points.decay = "sgd", decay
  config.points.warmup_steps, config.points.accumulate = 2, accumulate
  config.points.weight_decay = config.points.clip_norm = 0.0
  optimizer = make_optimizer(config, {"points": 12})
  rate = learning_rate(config.points, 12)
  params = {"points": jnp.zeros(())}
  state, momentum = optimizer.init(params), 0.0
  update = jax.jit(optimizer.update)
  for done in range(12):
    updates, state = update({"points": jnp.ones(())}, state, params)
    if (done + 1) % accumulate:
      assert updates["points"] == 0
      continue
    momentum = 1 + 0.9 * momentum
    expected = -rate(jnp.int32(done)) * momentum
    np.testing.assert_allclose(updates["points"], expected, rtol=1e-5)


@pytest.mark.parametrize("active", [("segmenter",), ("points",)])
def test_inactive_networks_are_untouched(objective, optimizer, state, active):
  step = jax.jit(
    lambda state, batch: train_step(
      state,
      batch,
      objective=objective,
      optimizer=optimizer,
      seed=0,
      ema_decay=0.9,
      active=active,
    )
  )
  parts = {"segmenter": "segmentation", "points": "generation"}
  part = parts[active[0]]
  found, metrics = step(state, {part: make_batch()[part]})
  found, metrics = step(found, {part: make_batch(7)[part]})
  assert int(found.step) == 2
  for name in NETWORKS:
    fields = ("updates", "params", "ema", "batch_stats", "opt_state")
    old, new = (
      [getattr(s, field)[name] for field in fields] for s in (state, found)
    )
    changed = [
      not np.array_equal(a, b)
      for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
    ]
    assert any(changed) == (name in active)
    assert (f"loss/{name}" in metrics) == (name in active)
    assert int(found.updates[name]) == (2 if name in active else 0)


def test_the_average_follows_the_parameters(objective, optimizer, state):
  config = dict(objective=objective, optimizer=optimizer, seed=0)
  step = jax.jit(
    lambda state, batch: train_step(
      state, batch, **config, ema_decay=0.3, active=("segmenter",)
    )
  )
  part = {"segmentation": make_batch()["segmentation"]}
  average = jax.tree.map(np.float64, state.ema["segmenter"])
  current = state
  for count in range(1, 8):
    current, _ = step(current, part)
    decay = min(0.3, count / (9 + count))
    average = jax.tree.map(
      lambda a, p, d=decay: d * a + (1 - d) * np.float64(p),
      average,
      current.params["segmenter"],
    )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
    current.ema["segmenter"],
    average,
  )
