"""Fairness methods: by hand, against numpy, on shards against one device."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from fairdiff_jax.config import defaults
from fairdiff_jax.fairness.regularizers import (
  METHODS,
  DiceTerms,
  Evidence,
  make_regularizer,
)
from fairdiff_jax.fairness.risk import group_risk
from fairdiff_jax.objectives.segmentation import dice_terms
from fairdiff_jax.training.mesh import BATCH, make_mesh

GROUPS = 3
NUM_CASES = np.array([9.0, 15.0, 76.0])
ON_RISKS = ("erm", "variance", "gap", "worst", "equity")

seeds = st.integers(0, 2**20)


def build(method, dice_weight=0.5, **options):
  config = defaults().fairness
  config.update(dict(method=method, step_size=0.5, adjustment=2.0) | options)
  return make_regularizer(config, dice_weight)


def make_batch(seed, size=16, dtype=np.float32):
  """Losses, features and Dice terms of a batch with groups and padding."""
  rng = np.random.default_rng(seed)
  score, label = rng.uniform(5, 20, (2, size, 3))
  batch = {
    "losses": rng.exponential(0.3, size),
    "features": rng.normal(size=(size, 4)),
    "overlap": rng.uniform(0.1, 0.9, (size, 3)) * np.minimum(score, label),
    "score": score,
    "label": label,
    "weight": rng.choice([0.0, 1, 1, 1], size),
  }
  batch = {key: value.astype(dtype) for key, value in batch.items()}
  return batch | {"group": rng.integers(-1, GROUPS, size).astype(np.int32)}


def evidence(batch, axis_name=None):
  group, weight = batch["group"], batch["weight"]
  risk, count = group_risk(batch["losses"], group, weight, GROUPS, axis_name)
  dice = DiceTerms(batch["overlap"], batch["score"], batch["label"])
  return Evidence(
    *(risk, count > 0, count, group, weight, dice, batch["features"], axis_name)
  )


def earlier_state(regularizer):
  """The state after one batch."""
  state = regularizer.init(jnp.asarray(NUM_CASES, jnp.float32))
  return regularizer.penalty(evidence(make_batch(99)), state)[1]


def on_risks(method, risk, count=None, **options):
  """Value of a method that needs the groups' risks alone."""
  risk = jnp.asarray(risk)
  count = jnp.ones(len(risk)) if count is None else jnp.asarray(count)
  regularizer = build(method, **options)
  state = regularizer.init(jnp.ones(len(risk)))
  return regularizer.penalty(Evidence(risk, count > 0, count), state)[0]


@pytest.mark.parametrize(
  ("method", "value"),
  [
    ("erm", 0),
    ("variance", 14 / 9),  # mean 7/3
    ("gap", 3),
    ("worst", 0.5 * np.log((np.e**2 + np.e**4 + np.e**8) / 3) - 7 / 3),
    ("equity", 7 / 3 * (np.sqrt(7 / 3 + 1e-4) - 0.01)),
  ],
)
def test_penalties_by_hand(method, value):
  found = float(on_risks(method, [1.0, 2, 4], temperature=0.5))
  assert found == pytest.approx(value, rel=1e-6)


def test_mmd_by_hand():
  batch = make_batch(0, size=4)
  batch["features"] = np.float32([[0, 0], [2, 4], [3, 0], [50, 50]])
  batch["group"] = np.int32([0, 0, 2, 1])
  batch["weight"] = np.float32([1, 1, 1, 0])
  # Means (1, 2) and (3, 0), centre (2, 1): both at squared distance 2.
  value, _ = build("mmd").penalty(evidence(batch), ())
  assert float(value) == pytest.approx(2)


def test_worst_tends_to_the_excess_of_the_worst_group():
  value = on_risks("worst", [1.0, 2, 6], temperature=1e-3)
  assert float(value) == pytest.approx(3, abs=2e-3)


@pytest.mark.parametrize("method", ON_RISKS)
@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0, 10), min_size=1, max_size=5))
def test_penalties_are_not_negative_and_zero_at_equality(method, risk):
  assert on_risks(method, risk) >= -1e-6 * max(1, *risk)
  equal = [risk[0]] * len(risk)
  assert abs(float(on_risks(method, equal))) <= 2e-6 * max(1, risk[0])


def test_mmd_is_zero_for_equal_groups():
  batch = make_batch(0)
  batch["features"] = np.ones_like(batch["features"])
  assert build("mmd").penalty(evidence(batch), ())[0] == 0


@pytest.mark.parametrize("method", ON_RISKS)
def test_absent_groups_take_no_part(method):
  value, gradient = jax.value_and_grad(
    lambda risk: on_risks(method, risk, [2.0, 0, 1, 0])
  )(jnp.array([0.3, 77.0, 0.9, 0.0]))
  expected = jax.value_and_grad(lambda risk: on_risks(method, risk))(
    jnp.array([0.3, 0.9])
  )
  np.testing.assert_allclose(value, expected[0], rtol=1e-6)
  np.testing.assert_allclose(gradient[::2], expected[1], rtol=1e-6)
  np.testing.assert_array_equal(gradient[1::2], [0, 0])


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_without_known_groups_has_no_penalty(method):
  batch = make_batch(1) | {"group": np.full(16, -1, np.int32)}
  regularizer = build(method)
  state = regularizer.init(jnp.asarray(NUM_CASES))

  def function(losses):
    return regularizer.penalty(evidence(batch | {"losses": losses}), state)[0]

  value, gradient = jax.value_and_grad(function)(batch["losses"])
  if not method.startswith("febs"):  # scales every case by at most tanh(1)
    assert value == 0
  np.testing.assert_array_equal(gradient, np.zeros(16))


@pytest.mark.parametrize("method", ON_RISKS)
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_gradients_in_risks_match_finite_differences(method, temperature):
  with jax.enable_x64():
    risk = jnp.array([0.7, 0.2, 99.0, 1.1])

    def function(risk):
      count = jnp.array([1.0, 3, 0, 2])
      return on_risks(method, risk, count, temperature=temperature)

    assert_gradient(function, risk)


def assert_gradient(function, x, step=1e-6):
  function = jax.jit(function)
  gradient = np.asarray(jax.grad(function)(x))
  for index in np.ndindex(x.shape):
    direction = np.zeros(x.shape)
    direction[index] = step
    difference = function(x + direction) - function(x - direction)
    expected = float(difference) / (2 * step)
    assert gradient[index] == pytest.approx(expected, abs=1e-7)


def test_gradient_of_mmd_matches_finite_differences():
  with jax.enable_x64():
    batch = make_batch(4, size=6, dtype=np.float64)

    def function(features):
      known = evidence(batch | {"features": features})
      return build("mmd").penalty(known, ())[0]

    assert_gradient(function, jnp.asarray(batch["features"]))


def test_gradient_of_group_dro_is_its_weights_less_the_shares():
  batch = make_batch(5)
  regularizer = build("group_dro")
  state = regularizer.init(jnp.asarray(NUM_CASES))
  known = evidence(batch)

  def function(risk):
    return regularizer.penalty(known._replace(risk=risk), state)

  gradient, state = jax.grad(function, has_aux=True)(known.risk)
  share = known.count / known.count.sum()
  np.testing.assert_allclose(gradient, state["q"] - share, rtol=1e-5)


@pytest.mark.parametrize("method", ["febs", "febs_published"])
def test_gradient_of_febs_takes_its_scales_as_constants(method):
  """Against finite differences of the Dice under the scales at hand."""
  with jax.enable_x64():
    batch = make_batch(6, size=6, dtype=np.float64)
    batch["group"] = np.int32([0, 1, 2, 2, -1, 0])
    batch["weight"] = np.array([1.0, 1, 1, 1, 1, 0])
    regularizer = build(method, gamma=1.5)
    state = regularizer.init(jnp.asarray(NUM_CASES))

    def penalty(overlap):
      known = evidence(batch | {"overlap": overlap})
      return regularizer.penalty(known, state)[0]

    scale, _ = reference_febs(batch, 1.5, method)

    def frozen(overlap):
      return reference_febs(batch | {"overlap": overlap}, 1.5, method, scale)[1]

    overlap = batch["overlap"]
    gradient = np.asarray(jax.jit(jax.grad(penalty))(jnp.asarray(overlap)))
    for index in np.ndindex(overlap.shape):
      step = np.zeros(overlap.shape)
      step[index] = 1e-6
      difference = (frozen(overlap + step) - frozen(overlap - step)) / 2e-6
      assert gradient[index] == pytest.approx(0.5 * difference, abs=1e-7)


def numpy_dice(overlap, score, label):
  return np.mean(1 - (2 * overlap + 1e-5) / (score + label + 1e-5), axis=-1)


def reference_febs(batch, gamma, method, scale=None):
  """(scales by group, Dice' - Dice) with loops, every group present."""
  terms = [batch[k] for k in ("overlap", "score", "label")]
  group, weight = batch["group"], batch["weight"]
  plain = np.sum(weight * numpy_dice(*terms)) / weight.sum()
  summed = method == "febs_published"
  loss = np.zeros(GROUPS)
  for g in range(GROUPS):
    member = (group == g) & (weight > 0)
    if summed:
      loss[g] = numpy_dice(*(x[member].sum(0) for x in terms))
    elif member.any():
      loss[g] = numpy_dice(*(x[member] for x in terms)).mean()
  if scale is None:
    scale = np.tanh((loss.min() / np.where(loss > 0, loss, 1)) ** gamma)
    if not summed:
      scale = np.tanh(((loss.min() + 1e-5) / (loss + 1e-5)) ** gamma)
    scale = np.append(scale, np.tanh(1))  # unknown groups are -1
  factor = scale[group][:, None]
  fair = terms[0] * factor, terms[1] * factor**2, terms[2]
  if summed:
    fair = numpy_dice(*((x * weight[:, None]).sum(0) for x in fair))
  else:
    fair = np.sum(weight * numpy_dice(*fair)) / weight.sum()
  return scale, fair - plain


def test_published_febs_is_the_original_s_formula():
  """From logits, with the Dice loss of FairSeg: sums over the whole batch."""
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(6, 4, 5, 3)).astype(np.float32)
  label = rng.integers(0, 3, (6, 4, 5))
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  y = np.eye(3)[label]

  def batch_dice(p, y):
    overlap, size = (p * y).sum((0, 1, 2)), (p**2 + y**2).sum((0, 1, 2))
    return 1 - (2 * overlap + 1e-5) / (size + 1e-5)

  for group in ([0, 1, 2, 2, 0, 1], [0, 2, 2, 2, 0, 0]):  # all, then two
    group = np.array(group)
    loss = np.zeros(GROUPS)
    for g in set(group):
      loss[g] = batch_dice(p[group == g], y[group == g]).sum()
    with np.errstate(invalid="ignore"):
      scale = np.tanh((loss.min() / loss) ** 2.0)[group]
    expected = batch_dice(p * scale[:, None, None, None], y).mean()
    assert (scale == 0).all() == (len(set(group)) < GROUPS)

    dice, weight = dice_terms(jnp.asarray(logits), label), jnp.ones(6)
    risk, count = group_risk(dice.loss(), group, weight, GROUPS)
    known = Evidence(risk, count > 0, count, group, weight, dice)
    regularizer = build("febs_published", dice_weight=1.0, gamma=2.0)
    found, _ = regularizer.penalty(known, ())
    found += dice.loss().mean()
    assert float(found) == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def febs():
  """First state of FEBS, and (overlap, batch, state) -> gradient, state."""
  regularizer = build("febs", gamma=2.0)

  def total(overlap, batch, state):
    known = evidence(batch | {"overlap": overlap})
    value, following = regularizer.penalty(known, state)
    plain = jnp.mean(known.dice.loss() * batch["weight"])
    return value + 0.5 * plain * 16 / batch["weight"].sum(), following

  state = regularizer.init(jnp.asarray(NUM_CASES))
  return state, jax.jit(jax.grad(total, has_aux=True))


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_febs_never_silences_a_group(febs, seed):
  """Whatever is absent, the Dice of every case keeps a gradient."""
  rng = np.random.default_rng(seed)
  state, total_gradient = febs
  for i in range(3):
    batch = make_batch(seed + i)
    batch["group"] = np.where(
      batch["group"] == rng.integers(GROUPS), -1, batch["group"]
    ).astype(np.int32)
    gradient, state = total_gradient(batch.pop("overlap"), batch, state)
    assert (np.asarray(gradient)[batch["weight"] > 0] < 0).all()


def test_febs_remembers_a_group_that_the_batch_lacks():
  regularizer = build("febs")
  first = make_batch(7) | {"group": np.int32([0, 1, 2, 2] * 4)}
  first["weight"] = np.ones(16, np.float32)
  state = regularizer.init(jnp.asarray(NUM_CASES))
  _, state = regularizer.penalty(evidence(first), state)
  # The best group, remembered, keeps scaling the others down.
  terms = [first[k] for k in ("overlap", "score", "label")]
  loss = [numpy_dice(*terms)[first["group"] == g].mean() for g in range(3)]
  best = int(np.argmin(loss))
  second = first | {"weight": (first["group"] != best).astype(np.float32)}
  found, _ = regularizer.penalty(evidence(second), state)
  scale = np.tanh((min(loss) + 1e-5) / (np.array(loss) + 1e-5))
  factor = scale[first["group"]][:, None]
  scaled = numpy_dice(terms[0] * factor, terms[1] * factor**2, terms[2])
  expected = (scaled - numpy_dice(*terms))[first["group"] != best].mean()
  assert float(found) == pytest.approx(0.5 * expected, rel=1e-5)


def test_group_dro_is_the_published_update():
  regularizer = build("group_dro", step_size=0.7, adjustment=3.0)
  state = regularizer.init(jnp.asarray(NUM_CASES))
  q = np.full(3, 1 / 3)
  for seed in range(4):
    batch = make_batch(seed, size=32)
    known = evidence(batch)
    assert known.known.all()
    found, state = regularizer.penalty(known, state)
    risk, count = np.float64(known.risk), np.float64(known.count)
    q *= np.exp(0.7 * (risk + 3 / np.sqrt(NUM_CASES)))
    q /= q.sum()
    expected = q @ risk - count @ risk / count.sum()
    assert float(found) == pytest.approx(expected, abs=1e-6)
    np.testing.assert_allclose(state["q"], q, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(seeds, st.floats(0, 100))
def test_group_dro_s_weights_stay_a_distribution(seed, step_size):
  regularizer = build("group_dro", step_size=step_size)
  state = regularizer.init(jnp.array([5.0, 0, 7]))
  np.testing.assert_array_equal(state["q"], [0.5, 0, 0.5])
  state = regularizer.init(jnp.asarray(NUM_CASES))
  for i in range(3):
    batch = make_batch(seed + i, size=3)
    known = evidence(batch)
    _, following = regularizer.penalty(known, state)
    q = np.asarray(following["q"])
    assert (q >= 0).all() and q.sum() == pytest.approx(1, abs=1e-5)
    absent = ~np.asarray(known.known)
    np.testing.assert_array_equal(q[absent], state["q"][absent])
    state = following


def value_and_gradients(method, axis_name=None):
  """(batch, state) -> (value, state, gradients in what the model makes)."""
  regularizer = build(method)

  def function(learned, fixed, state):
    return regularizer.penalty(evidence(learned | fixed, axis_name), state)

  def call(batch, state):
    fixed = {k: batch[k] for k in ("group", "weight")}
    learned = {k: v for k, v in batch.items() if k not in fixed}
    found = jax.value_and_grad(function, has_aux=True)(learned, fixed, state)
    return *found[0], found[1]

  return call


def everything(axis_name=None):
  """All methods at once: (batch, states) -> results by method."""
  return lambda batch, states: {
    method: value_and_gradients(method, axis_name)(batch, states[method])
    for method in METHODS
  }


@pytest.fixture(scope="module")
def states():
  return {method: earlier_state(build(method)) for method in METHODS}


@pytest.fixture(scope="module")
def single(states):
  return partial(jax.jit(everything()), states=states)


@pytest.fixture(scope="module")
def sharded(states):
  mesh = make_mesh(2)
  batch = NamedSharding(mesh, BATCH)
  whole = NamedSharding(mesh, PartitionSpec())
  compiled = jax.jit(everything(), in_shardings=(batch, whole))
  return lambda b: compiled(b, jax.device_put(states, whole))


@pytest.fixture(scope="module")
def mapped(states):
  compiled = jax.pmap(everything("batch"), axis_name="batch", in_axes=(0, None))

  def call(batch):
    shards = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), batch)
    found = jax.device_get(compiled(shards, states))
    result = {}
    for method, (value, state, gradients) in found.items():
      first = jax.tree.map(lambda x: x[0], (value, state))
      # Eight devices return the value, and each of them counts.
      gradients = jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[2:]) / 8, gradients
      )
      result[method] = (*first, gradients)
    return result

  return call


def assert_close(found, expected, rows=slice(None)):
  for method in METHODS:
    value, state, gradients = found[method]
    known = expected[method]
    np.testing.assert_allclose(value, known[0], atol=1e-6, err_msg=method)
    jax.tree.map(
      partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), state, known[1]
    )
    for key, gradient in known[2].items():
      np.testing.assert_allclose(
        gradients[key][rows], gradient, atol=1e-6, err_msg=f"{method} {key}"
      )


@settings(max_examples=15, deadline=None)
@given(seeds)
def test_shards_compute_what_one_device_does(single, sharded, mapped, seed):
  """Any assignment of cases to shards, some shards without a case."""
  rng = np.random.default_rng(seed)
  batch = make_batch(seed)
  batch["weight"][rng.permutation(8)[:2, None] * 2 + [0, 1]] = 0
  expected = single(batch)
  for compute in (sharded, mapped):
    assert_close(compute(batch), expected)
    order = rng.permutation(16)
    permuted = compute({k: v[order] for k, v in batch.items()})
    assert_close(permuted, expected, rows=np.argsort(order))


@settings(max_examples=15, deadline=None)
@given(seeds)
def test_repetition_and_padding_change_nothing(single, states, seed):
  batch = make_batch(seed)
  expected = single(batch)
  garbage = make_batch(seed + 1)
  padding = {k: v if k != "weight" else 0 * v for k, v in garbage.items()}

  def joined(other):
    return {k: np.concatenate([v, other[k]]) for k, v in batch.items()}

  assert_close(single(joined(padding)), expected, rows=slice(16))
  twice = single(joined(batch))
  for method in METHODS:
    np.testing.assert_allclose(twice[method][0], expected[method][0], atol=1e-6)
  states_ = [x[1] for m in METHODS for x in (twice[m], expected[m])]
  for a, b in zip(states_[::2], states_[1::2], strict=True):
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), a, b)


def test_unknown_method():
  with pytest.raises(ValueError, match="unknown fairness method 'mean'"):
    build("mean")
