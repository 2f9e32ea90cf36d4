"""What a bank's cases are chosen by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.phantom import get_config
from fairdiff_jax.objectives.task import Variables
from fairdiff_jax.synthesis import bank
from fairdiff_jax.synthesis.generate import Generated
from fairdiff_jax.training.checkpoint import Inference
from fairdiff_jax.training.setup import setup


@pytest.mark.parametrize("number", [3, 8])  # a batch is 8
@pytest.mark.parametrize("devices", [1, 8])
def test_the_risk_of_a_case_is_the_segmenter_s_loss(number, devices):
  run = setup(get_config("smoke"), jax.devices()[:devices])
  task = run.objective.tasks["segmenter"]
  params = task.init(jax.random.key(0)).params
  saved = [{"segmenter": x} for x in (params, {}, {}, {})]
  rng = np.random.default_rng(0)
  image = rng.integers(0, 256, (number, 32, 32), np.uint8)
  mask = rng.integers(0, 3, (number, 32, 32), np.uint8)
  cases = Generated(image, mask, np.ones(number), np.full(number, ""))
  found = bank._make_risk(run)(Inference(*saved), cases)
  batch = {
    "image": image[..., None] / np.float32(127.5) - 1,
    "mask": mask.astype(np.int32),
    "weight": jnp.ones(number),
  }
  expected = task.risk(Variables(params, {}, {}), batch, None, False)[0]
  assert found.shape == (number,) and found.std() > 0
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_which_cases_a_bank_keeps():
  risk = np.array([0.1, np.nan, 0.5, 0.5, 9, 0.2, 0.2, 0.2])
  group = np.array([0, 0, 0, 0, 1, 1, 1, 1])
  kept = [
    np.flatnonzero(bank.riskiest(risk, group, np.array(quota))).tolist()
    for quota in ((0, 0), (1, 2), (2, 3), (4, 4))
  ]
  assert kept == [[], [2, 4, 5], [2, 3, 4, 5, 6], [0, 2, 3, 4, 5, 6, 7]]
