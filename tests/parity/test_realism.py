"""FID, KID, precision and recall on given features, against torch-fidelity."""

import numpy as np
import pytest
import torch
from torch_fidelity import metric_fid, metric_kid, metric_prc

from fairdiff_jax.evaluation import matched, realism


@pytest.fixture(scope="module", params=[(90, 70, 12), (60, 60, 128)])
def features(request):
  n, m, d = request.param
  rng = np.random.default_rng(n)
  spread = rng.uniform(0.3, 2, d)
  return rng.normal(0, spread, (n, d)), rng.normal(0.2, 0.9 * spread, (m, d))


def tensors(features):
  return [torch.from_numpy(x) for x in features]


def test_frechet_distance(features):
  found = [metric_fid.fid_features_to_statistics(x) for x in tensors(features)]
  theirs = metric_fid.fid_statistics_to_metric(*found, False)
  theirs = theirs["frechet_inception_distance"]
  assert realism.frechet_distance(*features) == pytest.approx(theirs, rel=1e-6)


def test_kernel_distance(features):
  n = min(map(len, features))
  same = [x[:n] for x in features]
  theirs = metric_kid.kid_features_to_metric(
    *tensors(same), kid_subsets=1, kid_subset_size=n, verbose=False
  )["kernel_inception_distance_mean"]
  assert realism.kernel_distance(*same) == pytest.approx(theirs, rel=1e-6)
  ours = matched.kernel_distance_interval(*same)[0]
  assert ours == pytest.approx(theirs, rel=1e-6)


def test_precision_and_recall(features):
  real, synthetic = features
  theirs = metric_prc.prc_features_to_metric(
    *tensors((synthetic, real)), verbose=False
  )
  ours = realism.precision_recall(real, synthetic)
  assert ours == pytest.approx(
    (theirs["precision"], theirs["recall"]), rel=1e-6
  )
