"""Perfect synthetic patients of rare groups are worth having: the study's
question, asked of a small segmenter."""

import jax
import numpy as np
import optax
import pytest

from configs.phantom import get_config
from fairdiff_jax.data import phantom
from fairdiff_jax.data.attributes import ATTRIBUTES
from fairdiff_jax.data.loader import Pool, make_batch
from fairdiff_jax.data.mixture import training_pool
from fairdiff_jax.fairness.metrics import DISC, dice
from fairdiff_jax.objectives.segmentation import segmentation_task
from fairdiff_jax.objectives.task import Variables

RACES = ATTRIBUTES["race"]
STEPS, BATCH = 120, 16


def draw(seed, *numbers):
  """Image, mask and group of so many fresh phantoms of each group."""
  group = np.repeat(np.arange(len(RACES), dtype=np.int32), numbers)
  cases = [
    phantom.generate(np.random.default_rng([seed, i]), g, (32, 32))
    for i, g in enumerate(group)
  ]
  image, mask = (
    np.reshape(x, (-1, 32, 32)).astype(np.uint8)
    for x in (zip(*cases, strict=True) if cases else ((), ()))
  )
  return image, mask, group


@pytest.fixture(scope="module")
def score():
  """(synthetic cases, strategy) -> Dice of the disc by group, tested on 60."""
  task = segmentation_task(get_config().segmenter)
  optimizer = optax.adam(4e-3)
  real, test = draw(1, 2, 3, 16), draw(2, 20, 20, 20)

  @jax.jit
  def start():
    params = task.init(jax.random.key(0)).params
    return params, optimizer.init(params)

  @jax.jit
  def segment(params, images):
    return task.sample(Variables(params, {}, {}), images)

  @jax.jit
  def step(params, state, batch):
    def loss(params):
      return task.risk(Variables(params, {}, {}), batch, None, True)[0].mean()

    updates, state = optimizer.update(jax.grad(loss)(params), state)
    return optax.apply_updates(params, updates), state

  def score(synthetic, strategy):
    image, mask, group = map(np.concatenate, zip(real, synthetic, strict=True))
    sizes = np.full(len(RACES), 16)
    rng = np.random.default_rng(0)
    epoch = training_pool(rng, strategy, real[2], synthetic[2], RACES, sizes)
    names, no_points = [""] * len(group), np.empty((len(group), 0, 3))
    pool = Pool(names, image, mask, group, no_points, epoch)
    params, state = start()
    options = dict(seed=0, stream=1, size=BATCH, rows=slice(0, BATCH))
    for i in range(STEPS):
      batch = make_batch(pool, step=i, recipe="strong", **options)
      batch = {k: batch[k] for k in ("image", "mask", "weight", "group")}
      params, state = step(params, state, batch)
    images = test[0][..., None] / np.float32(127.5) - 1
    found = np.asarray(segment(params, images))
    values = dice(test[1], found, DISC)
    return [np.nanmean(values[test[2] == g]) for g in range(len(RACES))]

  return score


def test_perfect_synthetic_patients_are_never_worse_than_none(score):
  none = score(draw(3, 0, 0, 0), "repeat_sample")
  perfect = score(draw(3, 60, 60, 0), "equal_scale")
  assert min(none) > 0.7  # both have learned something
  assert np.mean(perfect[:2]) > np.mean(none[:2])
  assert min(perfect) >= min(none)
