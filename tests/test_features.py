"""Published networks that see images: files, shapes, what is kept of them."""

import re
from functools import partial

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

from configs.phantom import get_config
from fairdiff_jax import experiment
from fairdiff_jax.evaluation import features
from fairdiff_jax.models.extractors import (
  Inception,
  ResNet,
  resize_like_tensorflow,
)
from fairdiff_jax.pretrained import extractors
from fairdiff_jax.training.mesh import make_mesh

SMALL = partial(ResNet, stages=(1,), width=8)


def shapes(module):
  image = np.zeros((2, 32, 40), np.uint8)
  return jax.eval_shape(module.init_with_output, jax.random.key(0), image)


def small_resnet_tensors(monkeypatch):
  """Those of a small ResNet, which then stands for ResNet-50."""
  of = extractors.NETWORKS["resnet50"]._replace(make=SMALL)
  monkeypatch.setitem(extractors.NETWORKS, "resnet50", of)
  rng = np.random.default_rng(0)
  found = {"fc.weight": np.zeros((5, 32)), "bn1.num_batches_tracked": 7}
  for path, like in traverse_util.flatten_dict(shapes(SMALL())[1]).items():
    layers, leaf = path[1:-1], extractors._LEAVES[path[-1]]
    array = rng.uniform(0.2, 1, like.shape)
    axes = (3, 2, 0, 1) if like.ndim == 4 else (0,)
    found[".".join([*layers, leaf])] = array.transpose(axes)
  return {k: np.array(v, np.float32, order="C") for k, v in found.items()}


def write_small_resnet(path, monkeypatch):
  """A file of them; its path."""
  safetensors.numpy.save_file(small_resnet_tensors(monkeypatch), path)
  return path


@pytest.fixture
def small_resnet(tmp_path, monkeypatch):
  return write_small_resnet(tmp_path / "weights.safetensors", monkeypatch)


@pytest.mark.parametrize(
  ("network", "parameters"), [(Inception, 21_785_568), (ResNet, 23_508_032)]
)
def test_the_published_sizes(network, parameters):
  """As many parameters as there are below the classifiers."""
  output, variables = shapes(network())
  assert output.shape == (2, 2048) and output.dtype == np.float32
  sizes = [x.size for x in jax.tree.leaves(variables["params"])]
  assert sum(sizes) == parameters


@pytest.mark.parametrize("size", [5, 9, 20])
def test_images_are_resized_as_by_tensorflow(size):
  image = np.random.default_rng(0).uniform(size=(6, 9))
  expected = np.empty((size, size))
  for i in range(size):
    for j in range(size):
      y, x = i * 6 / size, j * 9 / size
      top, left = int(y), int(x)
      bottom, right = min(top + 1, 5), min(left + 1, 8)
      near = image[[top, top, bottom, bottom], [left, right, left, right]]
      a, b = y - top, x - left
      weights = [(1 - a) * (1 - b), (1 - a) * b, a * (1 - b), a * b]
      expected[i, j] = near @ weights
  found = resize_like_tensorflow(image[None, :, :, None].astype("f4"), size)
  np.testing.assert_allclose(found[0, :, :, 0], expected, atol=1e-6)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"conv1.weight": None}, "no tensor 'conv1.weight'"),
    (
      {"layer1.0.bn3.running_var": None},
      "no tensor 'layer1.0.bn3.running_var'",
    ),
    ({"bn1.bias": (9,)}, r"bn1/bias: \(9,\), not \(8,\)"),
    ({"bn1.bias": ()}, "'bn1.bias' has shape .*, not 1 axes"),
    (
      {"layer1.1.conv1.weight": (1,)},
      "unused tensors .*'layer1.1.conv1.weight",
    ),
  ],
)
def test_what_a_file_lacks_is_named(tmp_path, monkeypatch, change, message):
  path = tmp_path / "a.safetensors"
  tensors = small_resnet_tensors(monkeypatch)
  tensors |= {k: np.zeros(v, "f4") for k, v in change.items() if v is not None}
  for name in (k for k, v in change.items() if v is None):
    del tensors[name]
  safetensors.numpy.save_file(tensors, path)
  with pytest.raises(ValueError) as raised:
    extractors.load(path, "resnet50")
  text = str(raised.value)
  assert text.startswith(f"{path} holds no ResNet-50: ")
  assert text.endswith(
    "; name a ResNet-50 of torchvision, such as resnet50-11ad3fa6.pth"
  )
  assert re.search(message, text)


def test_another_network_is_known_by_its_classes(small_resnet, monkeypatch):
  of = extractors.NETWORKS["resnet50"]._replace(classes=1008)
  monkeypatch.setitem(extractors.NETWORKS, "inception", of)
  with pytest.raises(ValueError, match="classifier has 5 classes, not 1008"):
    extractors.load(small_resnet, "inception")


def test_a_run_does_not_start_without_its_extractor(tmp_path, small_resnet):
  workdir, config = tmp_path / "run", get_config("smoke")
  config.evaluation.features = "resnet50"
  config.evaluation.features_weights = str(tmp_path / "none.safetensors")
  with pytest.raises(
    FileNotFoundError, match="none.safetensors does not exist"
  ):
    experiment.run(config, workdir)
  small_resnet.write_bytes(small_resnet.read_bytes()[:-1])
  config.evaluation.features_weights = str(small_resnet)
  with pytest.raises(ValueError, match="damaged or cut short .* download or"):
    experiment.run(config, workdir)
  assert not workdir.exists()


def test_features_are_those_of_the_network_and_kept(tmp_path, small_resnet):
  """On all devices, in batches that do not divide, grey as RGB."""
  evaluation = get_config("smoke").evaluation
  assert features.published(evaluation, make_mesh(), tmp_path) is None
  evaluation.features = "resnet50"
  evaluation.features_weights = str(small_resnet)
  evaluation.batch_size = 8
  images = np.random.default_rng(0).integers(0, 256, (11, 20, 30), np.uint8)
  see = features.published(evaluation, make_mesh(), tmp_path)
  found = see(images, real=True)
  module, variables = extractors.load(small_resnet, "resnet50")
  rgb = images[..., None].repeat(3, axis=-1)
  expected = jax.jit(module.apply)(variables, rgb)
  np.testing.assert_allclose(found, expected, rtol=1e-4)
  assert found.shape == (11, 32) and found.std(0).min() > 0

  (path,) = (tmp_path / features.FOLDER).iterdir()
  again = features.published(evaluation, make_mesh(), tmp_path)
  again._see = None  # nothing is computed
  np.testing.assert_array_equal(again(images, real=True), found)
  path.write_bytes(path.read_bytes()[:-9])
  damaged = features.published(evaluation, make_mesh(), tmp_path)
  with pytest.raises(ValueError, match=f"{path} is damaged .* remove it"):
    damaged(images, real=True)


def test_features_of_other_images_and_weights_are_others(tmp_path):
  images = np.arange(48, dtype=np.uint8).reshape(3, 4, 4)

  def extractor(weights):
    def see(x):
      return np.full((len(x), 2), weights) + x[:, :1, 0]

    return features.Extractor("a", "a", see, tmp_path / "kept" / f"a_{weights}")

  for weights in (1, 2):
    for x in (images, images[:2], images[::-1], images.reshape(3, 2, 8)):
      found = extractor(weights)(x, real=True)
      np.testing.assert_array_equal(found, weights + x[:, 0, :1] + [[0, 0]])
  assert len([*(tmp_path / "kept").iterdir()]) == 8
  extractor(3)(images)  # of synthetic cases nothing is kept
  assert len([*(tmp_path / "kept").iterdir()]) == 8
