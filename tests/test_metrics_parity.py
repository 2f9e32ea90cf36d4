"""Measures against the published MedPy and FairMedFM packages."""

import numpy as np
import pytest
from scipy import ndimage

from fairdiff_jax.fairness import metrics

CLASSES = (metrics.RIM, metrics.CUP, metrics.DISC)


def random_pair(seed):
  """Label and prediction `[n, H, W]`: blobs that the border may cut."""
  rng = np.random.default_rng(seed)
  noise = rng.normal(size=(2, 12, 40, 48))
  noise[1] = 0.8 * noise[0] + 0.6 * noise[1]
  smooth = ndimage.gaussian_filter(noise, (0, 0, 3, 3))
  # Speckle in one half of the cases.
  smooth[:, ::2] += 0.04 * rng.normal(size=smooth[:, ::2].shape)
  return np.digitize(smooth, [0.02, 0.08]).astype(np.uint8)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("seed", range(3))
def test_medpy(seed, cls):
  binary = pytest.importorskip("medpy.metric.binary")
  label, prediction = random_pair(seed)
  functions = {
    metrics.dice: binary.dc,
    metrics.iou: binary.jc,
    metrics.hd95: binary.hd95,
  }
  for measure, function in functions.items():
    expected = [
      function(np.isin(b, cls), np.isin(a, cls))
      for a, b in zip(label, prediction, strict=True)
    ]
    np.testing.assert_allclose(
      measure(label, prediction, cls), expected, rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("cls", (metrics.RIM, metrics.CUP))
@pytest.mark.parametrize("seed", range(3))
def test_fairmedfm(seed, cls):
  fairmedfm = pytest.importorskip("fairmedfm.evaluation")
  label, prediction = random_pair(seed)
  label[0] = 0
  names = ["A", "B", "C"]
  group = np.arange(len(label)) ** 2 % 3
  group[-2:] = 2
  report = fairmedfm.evaluate_segmentation(
    {"group": [names[g] for g in group]},
    pred_masks=prediction,
    true_masks=label,
    label=cls,
  )
  expected = report.summary.iloc[0]
  result = metrics.summarize(
    metrics.dice(label, prediction, cls),
    group,
    names,
    definition="population_std",
  )
  means = {k: figures["mean"] for k, figures in result["groups"].items()}
  assert means == pytest.approx(
    report.by_group.loc["group"].mean_dice.to_dict()
  )
  assert result["overall"] == pytest.approx(expected["mean_dice"])
  assert means[result["worst"]] == pytest.approx(expected["min_dice"])
  assert result["gap"] == pytest.approx(expected["delta_dice"])
  assert result["ratio"] == pytest.approx(
    expected["min_dice"] / expected["max_dice"]
  )
  assert result["std"] * np.sqrt(2 / 3) == pytest.approx(expected["std_dice"])
  assert result["es"] == pytest.approx(expected["es_dice"])
