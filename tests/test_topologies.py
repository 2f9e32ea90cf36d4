"""A run goes on where there are fewer devices, or more, or split otherwise."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs.phantom import get_config
from fairdiff_jax.training.checkpoint import Checkpoints, join
from fairdiff_jax.training.mesh import put_batch, to_host
from fairdiff_jax.training.setup import setup, step_function
from tests.test_parallel import on

MESHES = [  # devices, and how many of them share one copy of the parameters
  (count, fsdp)
  for count in (1, 2, 4, 8)
  for fsdp in (1, 2, 4)
  if count % fsdp == 0
]
STEP, BATCH, SIZE = 3, 8, 16


def on_mesh(count, fsdp):
  """A segmenter alone, which compiles fast, with all that its state can be."""
  config = get_config("smoke").unlock()
  config.data.size = (SIZE, SIZE)
  config.train.points = config.train.image = (0, 0)
  config.train.segmentation_batch = BATCH
  config.fairness.strategy = "repeat_sample"
  config.fairness.method = "group_dro"
  config.parallel.fsdp = fsdp
  return setup(config.lock(), jax.devices()[:count])


@pytest.fixture(scope="module")
def runs():
  return {mesh: on_mesh(*mesh) for mesh in MESHES}


@pytest.fixture(scope="module")
def state(runs):
  """A state on the host in which no array is like another."""
  rng = np.random.default_rng(0)

  def drawn(like):
    if np.issubdtype(like.dtype, np.integer):
      return np.full(like.shape, STEP, like.dtype)
    return rng.uniform(0.01, 0.3, like.shape).astype(like.dtype)

  return jax.tree.map(drawn, runs[1, 1].abstract)


def restored(workdir, run):
  checkpoints = Checkpoints(workdir)
  step, parts = checkpoints.restore(run.abstract, ("inference", "training"))
  checkpoints.close()
  assert step == STEP
  return join(parts, run.abstract.imported)


@pytest.fixture(scope="module")
def workdirs(runs, state, tmp_path_factory):
  """Runs saved on meshes of every number of parts."""
  found = {}
  for mesh in ((1, 1), (4, 4), (8, 2)):
    found[mesh] = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(found[mesh], 1)
    checkpoints.save(on(runs[mesh], state), facts={})
    checkpoints.close()
  return found


@pytest.mark.parametrize("mesh", MESHES)
def test_a_state_is_the_same_on_every_mesh(mesh, runs, state, workdirs):
  """To the bit, and split as this mesh splits it."""
  run = runs[mesh]
  for workdir in workdirs.values():
    found = restored(workdir, run)
    jax.tree.map(np.testing.assert_array_equal, to_host(found), state)
    for x, like in zip(
      jax.tree.leaves(found), jax.tree.leaves(run.abstract), strict=True
    ):
      assert x.sharding == like.sharding and x.dtype == like.dtype
  parts = {
    x.size // x.addressable_shards[0].data.size
    for x in jax.tree.leaves(found.opt_state)
  }
  assert parts == {1, mesh[1]}


def next_loss(run, state):
  """The loss of the next step; what only its update needs is not compiled."""
  step = step_function(run, ("segmenter",))
  rng = np.random.default_rng(1)
  batch = {
    "image": rng.uniform(-1, 1, (BATCH, SIZE, SIZE, 1)).astype(np.float32),
    "mask": rng.integers(0, 3, (BATCH, SIZE, SIZE)).astype(np.int32),
    "points": np.zeros((BATCH, 0, 3), np.float32),
    "group": np.int32([0, 1, -1, 2, 2, 0, 2, 1]),
    "weight": np.float32([1, 1, 1, 1, 0, 1, 1, 1]),
  }
  loss = jax.jit(
    lambda state, batch: step(state, batch)[1]["loss/total"],
    out_shardings=NamedSharding(run.mesh, PartitionSpec()),
  )
  with jax.set_mesh(run.mesh):
    return float(loss(state, put_batch({"segmentation": batch}, run.mesh)))


@pytest.fixture(scope="module")
def loss_before(runs, state):
  return next_loss(runs[1, 1], on(runs[1, 1], state))


@pytest.mark.parametrize("mesh", [(2, 2), (4, 4), (8, 1), (8, 2)])
def test_the_next_step_has_the_same_loss(mesh, runs, workdirs, loss_before):
  """Up to float32's rounding (6e-8) of sums taken in another order."""
  found = next_loss(runs[mesh], restored(workdirs[4, 4], runs[mesh]))
  assert found == pytest.approx(loss_before, rel=1e-6)
