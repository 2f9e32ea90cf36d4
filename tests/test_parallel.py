"""Eight devices, `jit` or `pmap`, sharded or not, compute what one computes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs.phantom import get_config
from fairdiff_jax.data.attributes import ATTRIBUTES
from fairdiff_jax.data.cases import Cases
from fairdiff_jax.evaluation.validation import make_validate
from fairdiff_jax.fairness.regularizers import Regularizer, make_regularizer
from fairdiff_jax.objectives.joint import NETWORKS, init_fairness
from fairdiff_jax.synthesis.generate import make_generator
from fairdiff_jax.training.checkpoint import Inference
from fairdiff_jax.training.mesh import (
  host_slice,
  make_mesh,
  map_batch,
  to_host,
  tree_shardings,
)
from fairdiff_jax.training.setup import make_step, setup
from fairdiff_jax.training.step import compile_step
from fairdiff_jax.training.validation import SCORE

METHODS = ("erm", "variance", "worst", "mmd", "group_dro", "febs")
STEPS, BATCH, SIZE, GROUPS = 5, 16, 16, 3
TOLERANCE = 1e-5


def tiny_config(**changes):
  config = get_config("smoke").unlock()
  config.data.size = (SIZE, SIZE)
  config.train.generation_batch = config.train.segmentation_batch = BATCH
  config.points.num_points = config.data.num_points = 12
  config.points.num_steps = 4
  for name in NETWORKS:
    # The full learning rate at once: what could drift does.
    config.optimizer[name].warmup_steps = 1
  config.update_from_flattened_dict(changes)
  return config.lock()


def selecting_regularizer(config):
  """Some methods in one compiled step; the state, one-hot, picks one."""
  methods = {}
  for name in METHODS:
    config = config.copy_and_resolve_references().unlock()
    config.fairness.method = name
    methods[name] = make_regularizer(config.fairness, dice_weight=0.5)

  def init(num_cases):
    states = {name: method.init(num_cases) for name, method in methods.items()}
    return {"choice": jnp.zeros(len(METHODS)), "states": states}

  def penalty(evidence, state):
    values, states = [], {}
    for name, method in methods.items():
      value, states[name] = method.penalty(evidence, state["states"][name])
      values.append(value)
    return jnp.stack(values) @ state["choice"], state | {"states": states}

  return Regularizer(init, penalty)


def make_run(count, **parallel):
  """The tiny run on the first `count` devices, with several methods.

  An adversary is always there: how strongly it is fought is the same for all.
  """
  config = tiny_config(
    **{f"parallel.{k}": v for k, v in parallel.items()},
    **{"fairness.method": "adversarial", "fairness.step_size": 0.5},
  )
  run = setup(config, jax.devices()[:count])
  objective = run.objective._replace(regularizer=selecting_regularizer(config))
  whole = NamedSharding(run.mesh, PartitionSpec())
  fairness = jax.eval_shape(
    partial(init_fairness, objective), jnp.zeros(GROUPS)
  )
  fairness = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), fairness
  )
  return run._replace(
    objective=objective, abstract=run.abstract.replace(fairness=fairness)
  )


LAYOUTS = {
  "one": partial(make_run, 1),
  "jit": partial(make_run, 8, fsdp=2),
  "pmap": partial(make_run, 8, compile="pmap"),
}


@pytest.fixture(scope="module")
def runs():
  return {name: make() for name, make in LAYOUTS.items()}


@pytest.fixture(scope="module")
def steps(runs):
  return {name: make_step(run, NETWORKS) for name, run in runs.items()}


@pytest.fixture(scope="module")
def initial(runs):
  """The initial state, on the host."""
  rng = np.random.default_rng(0)
  statistics = {
    "points": {"mean": np.float32([8, 8, 0]), "std": np.float32(4)},
    "image": {
      "intensity": rng.uniform(-0.5, 0.5, (GROUPS + 1, 3)).astype(np.float32),
      "spread": rng.uniform(0, 0.1, (GROUPS + 1, 3, 3)).astype(np.float32),
      "scale": rng.uniform(0.2, 0.8, GROUPS + 1).astype(np.float32),
    },
    "segmenter": {},
    "adversary": {},
  }
  state = to_host(runs["one"].init(statistics, np.float32([9, 15, 76])))
  # Behind layers that start at zero, gradients would be rounding noise.
  params = jax.tree.map(
    lambda x: x + 0.02 * rng.normal(size=x.shape).astype(np.float32),
    state.params,
  )
  return state.replace(
    params=params,
    ema=jax.tree.map(np.copy, params),
    fairness=to_host(
      init_fairness(runs["one"].objective, np.float32([9, 15, 76]))
    ),
  )


def choose(state, method):
  choice = np.eye(len(METHODS), dtype=np.float32)[METHODS.index(method)]
  fairness = state.fairness
  method = fairness.method | {"choice": choice}
  return state.replace(fairness=fairness.replace(method=method))


def on(run, state):
  """The state as it lies on a run's devices."""
  return jax.tree.map(
    lambda x, like: jax.device_put(x, like.sharding), state, run.abstract
  )


def make_batch(seed, garbage=0):
  """A batch whose shards lack groups and, in places, any case at all."""
  weight = np.ones(BATCH, np.float32)
  weight[[1, 6, 7, 12, 15]] = 0  # rows 6 and 7 are a whole shard
  group = np.repeat([0, 1, -1, 0, 2, 2, -1, 0], 2).astype(np.int32)

  def part(rng, noise, num_points):
    found = {
      "image": rng.uniform(-1, 1, (BATCH, SIZE, SIZE, 1)).astype(np.float32),
      "mask": rng.integers(0, 3, (BATCH, SIZE, SIZE)).astype(np.int32),
      "points": rng.normal(8, 4, (BATCH, num_points, 3)).astype(np.float32),
    }
    padding = weight == 0
    for key, value in found.items():
      shape = value[padding].shape
      if key == "mask":
        value[padding] = noise.integers(0, 3, shape)
      else:
        value[padding] = 30 * noise.normal(size=shape)
    found["group"] = np.where(
      padding, noise.integers(-1, GROUPS, BATCH), group
    ).astype(np.int32)
    return found | {"weight": weight}

  rng, noise = np.random.default_rng(seed), np.random.default_rng(garbage)
  return {
    "generation": part(rng, noise, 12),
    "segmentation": part(rng, noise, 0),
  }


def train(step, state, batches):
  metrics = []
  for batch in batches:
    state, found = step(state, batch)
    metrics.append({k: float(v) for k, v in found.items()})
  return to_host(state), metrics


@pytest.fixture(scope="module")
def results(runs, steps, initial):
  """(layout, method) -> state and metrics after a few steps; computed once."""
  known = {}

  def result(layout, method):
    if (layout, method) not in known:
      state = on(runs[layout], choose(initial, method))
      batches = [make_batch(i) for i in range(STEPS)]
      known[layout, method] = train(steps[layout], state, batches)
    return known[layout, method]

  return result


def largest_difference(a, b):
  differences = jax.tree.map(lambda x, y: np.abs(x - y).max(initial=0), a, b)
  path, value = max(
    jax.tree_util.tree_leaves_with_path(differences), key=lambda x: x[1]
  )
  return value, jax.tree_util.keystr(path)


@pytest.mark.parametrize("layout", ["jit", "pmap"])
@pytest.mark.parametrize("method", METHODS)
def test_eight_devices_compute_what_one_does(results, initial, method, layout):
  state, metrics = results(layout, method)
  expected, expected_metrics = results("one", method)
  for found, known in zip(metrics, expected_metrics, strict=True):
    assert found.keys() == known.keys()
    for key, value in known.items():
      assert found[key] == pytest.approx(
        value, rel=TOLERANCE, abs=TOLERANCE, nan_ok=key.startswith("risk/")
      ), key
  for field in ("params", "ema", "batch_stats", "fairness"):
    worst = largest_difference(getattr(state, field), getattr(expected, field))
    assert worst[0] < TOLERANCE, worst
  moved = largest_difference(expected.params, initial.params)
  assert moved[0] > 100 * TOLERANCE


def test_methods_differ(results):
  found = [results("one", m)[1][-1]["loss/fairness"] for m in METHODS]
  assert found[0] == 0 and min(map(abs, found[1:])) > 1e-5
  assert len(set(found)) == len(METHODS)


def test_every_parameter_learns(results, initial):
  """None stands still or lives on rounding noise."""
  state, _ = results("one", "variance")
  cancelled = ("dense_0']['bias", "dense_1']['bias", "norm_1']['bias")
  still = [
    jax.tree_util.keystr(path)
    for (path, x), y in zip(
      jax.tree_util.tree_leaves_with_path(state.params),
      jax.tree.leaves(initial.params),
      strict=True,
    )
    if np.array_equal(x, y)
  ]
  assert all(
    "['posterior']" in name and any(c in name for c in cancelled)
    for name in still
  ), still


def test_padding_changes_nothing(runs, steps, initial):
  found = [
    train(
      steps["one"],
      on(runs["one"], choose(initial, "variance")),
      [make_batch(i, garbage) for i in range(2)],
    )
    for garbage in (0, 99)
  ]
  (state, metrics), (other, other_metrics) = found
  np.testing.assert_equal(metrics, other_metrics)
  jax.tree.map(np.testing.assert_array_equal, state, other)


def test_parameters_are_sharded(runs, initial):
  state = on(runs["jit"], initial)
  kernel = state.params["image"]["unet"]["conv_out"]["kernel"]
  assert kernel.addressable_shards[0].data.size == kernel.size // 2
  leaves = jax.tree.leaves((state.params, state.ema, state.opt_state))
  held = sum(x.addressable_shards[0].data.nbytes for x in leaves)
  assert held < 0.6 * sum(x.nbytes for x in leaves)


def test_generation_depends_neither_on_devices_nor_on_company(runs, initial):
  """Masks are equal, images up to rounding to the next of 256 levels."""
  number = np.arange(10, 18)
  group = np.array([0, 1, 2, -1, 0, 1, 2, 0], np.int32)

  def generator(layout):
    run = runs[layout]
    config = run.config.copy_and_resolve_references().unlock()
    config.bank.max_attempts = 50  # the network is not trained
    state = on(run, initial)
    inference = Inference.of(state)
    return partial(make_generator(run._replace(config=config)), inference, 7)

  one = generator("one")
  expected = one(number, group)
  some = np.array([6, 2, 5])
  for found, index in (
    (one(number[some], group[some]), some),
    (generator("jit")(number, group), slice(None)),
  ):
    np.testing.assert_array_equal(found.mask, expected.mask[index])
    np.testing.assert_array_equal(found.attempts, expected.attempts[index])
    difference = found.image.astype(int) - expected.image[index]
    assert np.abs(difference).max() <= 1
  assert len({x.tobytes() for x in expected.image}) == len(number)
  # More than a batch of them, the last one part full.
  more = one(np.arange(10, 29), np.resize(group, 19))
  for found, first in zip(more, expected, strict=True):
    assert len(found) == 19
    np.testing.assert_array_equal(found[:8], first)
  assert len(one([], []).image) == 0


def test_validation_does_not_depend_on_devices(runs, steps, initial):
  """Of a state as a step leaves it, on 11 cases in batches of 8."""
  rng = np.random.default_rng(0)
  number = 11
  cases = Cases(
    [f"case {i}" for i in range(number)],
    rng.integers(0, 256, (number, SIZE, SIZE), np.uint8),
    rng.integers(0, 3, (number, SIZE, SIZE), np.uint8),
    np.zeros((number, 12, 3), np.float32),
    {name: np.arange(number) % 4 - 1 for name in ATTRIBUTES},
  )
  found = {}
  for layout, run in runs.items():
    state = on(run, choose(initial, "erm"))
    state, _ = steps[layout](state, make_batch(0))
    found[layout] = make_validate(run, cases)(state)
  expected = found["one"]
  assert 0 < expected[SCORE] < 1
  assert found["jit"] == found["pmap"] == pytest.approx(expected, abs=1e-3)


def test_pmap_is_for_one_process(monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(ValueError, match="is for one process; use 'jit'"):
    compile_step(
      lambda *x: x, mesh=make_mesh(), state=None, batch=None, mode="pmap"
    )


def test_meshes_and_rules_are_checked():
  assert dict(make_mesh(4).shape) == {"data": 2, "fsdp": 4}
  with pytest.raises(ValueError, match="fsdp=3 does not divide the 8 devices"):
    make_mesh(3)
  with pytest.raises(ValueError, match="unknown sharding rule 'split'"):
    tree_shardings({}, make_mesh(), [(".*", "split")])
  with pytest.raises(ValueError, match="a batch of 12 cannot be split over 8"):
    host_slice(12)
  assert host_slice(16) == slice(0, 16)
  compiled = partial(compile_step, lambda *x: x, state=None, batch=None)
  with pytest.raises(ValueError, match=r"unknown parallel\.compile 'xmap'"):
    compiled(mesh=make_mesh(), mode="xmap")
  with pytest.raises(ValueError, match=r"set parallel\.fsdp=1"):
    compiled(mesh=make_mesh(2), mode="pmap")


def test_batches_are_mapped_with_the_mesh_in_context():
  mesh = make_mesh(2)

  @partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()))
  def double(x):
    assert jax.sharding.get_abstract_mesh().axis_names == ("data", "fsdp")
    return 2 * x

  x = np.arange(6.0, dtype=np.float32).reshape(3, 2)
  np.testing.assert_array_equal(map_batch(double, [x], mesh, 5), 2 * x)


def test_rules_decide_how_arrays_lie():
  mesh = make_mesh(2)
  tree = {"params": {"kernel": np.zeros((3, 6, 4)), "bias": np.zeros(5)}}
  rules = [("bias", "replicate"), ("params/", "fsdp")]
  found = tree_shardings({**tree, "step": np.zeros(2)}, mesh, rules)
  assert found["params"]["kernel"].spec == PartitionSpec(None, "fsdp")
  assert found["params"]["bias"].spec == PartitionSpec()
  assert found["step"].spec == PartitionSpec()
