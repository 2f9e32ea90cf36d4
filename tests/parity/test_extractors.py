"""Inception and ResNet-50 on random weights, against their PyTorch peers."""

from unittest import mock

import jax
import numpy as np
import pytest
import torch
import torchvision
from torch_fidelity import feature_extractor_inceptionv3 as fidelity
from torchvision.transforms.v2 import functional

from fairdiff_jax.pretrained import extractors

SHAPES = [(2, 64, 48), (2, 320, 400, 3)]  # grey and small, RGB and large


def scattered(model, path):
  """A model with weights and statistics at random, which are saved."""
  generator = torch.Generator().manual_seed(0)

  def draw(tensor, low, high):
    tensor.uniform_(low, high, generator=generator)

  with torch.no_grad():
    for layer in model.modules():
      if isinstance(layer, torch.nn.Conv2d):
        limit = (6 / layer.weight[0].numel()) ** 0.5
        draw(layer.weight, -limit, limit)
      elif isinstance(layer, torch.nn.BatchNorm2d):
        for tensor in (layer.weight, layer.running_var):
          draw(tensor, 0.7, 1.3)
        for tensor in (layer.bias, layer.running_mean):
          draw(tensor, -0.3, 0.3)
  torch.save(model.state_dict(), path)
  return model.eval()


def inception(path):
  kind = fidelity.FeatureExtractorInceptionV3
  with (
    mock.patch.object(fidelity, "load_state_dict_from_url"),
    mock.patch.object(kind, "load_state_dict"),
  ):
    model = scattered(kind("inception", ["2048"]), path)
  return lambda image: model(image)[0]


def resnet50(path):
  model = scattered(torchvision.models.resnet50(weights=None), path)
  model.fc = torch.nn.Identity()
  preset = torchvision.models.ResNet50_Weights.DEFAULT.transforms()

  def see(image):
    x = functional.resize(image / 255, [224, 224], antialias=True)
    return model(functional.normalize(x, preset.mean, preset.std))

  return see


@pytest.mark.parametrize("network", extractors.NETWORKS)
def test_features(network, tmp_path):
  path = tmp_path / "random.pth"
  peer = {"inception": inception, "resnet50": resnet50}[network](path)
  module, variables = extractors.load(path, network)
  see = jax.jit(module.apply)
  rng = np.random.default_rng(0)
  for shape in SHAPES:
    image = rng.integers(0, 256, shape, dtype=np.uint8)
    rgb = image if image.ndim == 4 else image[..., None].repeat(3, axis=-1)
    with torch.no_grad():
      theirs = peer(torch.from_numpy(rgb.transpose(0, 3, 1, 2))).numpy()
    ours = np.asarray(see(variables, image))
    assert ours.shape == theirs.shape == (len(image), 2048)
    assert theirs.std(1).min() > 0.1  # they say something
    assert np.abs(theirs[0] - theirs[1]).mean() > 1e-3  # of each image
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())
