"""From a checkpoint to a report, whatever the run has and lacks."""

import json
import re
import shutil

import jax
import numpy as np
import pytest

from configs.phantom import get_config
from fairdiff_jax import array_files, files
from fairdiff_jax import config as configs
from fairdiff_jax.data import prepare, storage
from fairdiff_jax.data.cases import Cases
from fairdiff_jax.evaluation import evaluate as evaluation
from fairdiff_jax.evaluation import features, report, trust
from fairdiff_jax.layout import Layout
from fairdiff_jax.synthesis.bank import BANK
from fairdiff_jax.synthesis.generate import Generated, _key
from fairdiff_jax.training.banks import Synthetic
from fairdiff_jax.training.checkpoint import Checkpoints
from fairdiff_jax.training.pools import case_groups
from fairdiff_jax.training.setup import initial_state, setup
from fairdiff_jax.training.trained import restore
from tests.test_features import write_small_resnet

NAMES = ("A", "B", "C")


def smoke(**changes):
  config = get_config("smoke")
  config.update_from_flattened_dict(
    {"evaluation.synthetic_per_group": 2, "image.conditioning": "concat"}
    | changes
  )
  return config


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  directory = tmp_path_factory.mktemp("data") / "prepared"
  prepare.prepare(smoke().data, directory)
  return directory


@pytest.fixture(scope="module")
def save(data):
  """Makes a run that seems to be trained: (workdir, config's changes)."""

  def save(workdir, **changes):
    config = smoke(**{"data.directory": str(data)} | changes)
    configs.claim(workdir, config)
    run = setup(config, jax.devices()[:1])
    cases = storage.load(config.data.directory, "train", progress=False)
    checkpoints = Checkpoints(workdir)
    state = initial_state(run, cases, case_groups(config, cases))
    state = state.replace(step=state.step + config.train.steps)
    checkpoints.save(state, facts={})
    checkpoints.close()
    return workdir

  return save


def test_masks_that_cannot_be_drawn_cost_no_report(tmp_path, save, monkeypatch):
  def make_generator(run, anatomy):
    shape = run.config.data.size

    def generate(inference, seed, number, group, title):
      image = np.zeros((len(group), *shape), np.uint8)
      fault = np.where(
        group == 0, "no cup", np.where(number == 5, "ragged", "")
      )
      return Generated(image, image, np.full(len(group), 10), fault)

    return generate

  monkeypatch.setattr(evaluation, "make_generator", make_generator)
  workdir = save(tmp_path / "run")
  (workdir / "baseline" / "checkpoints").mkdir(parents=True)
  result = evaluation.evaluate(restore(workdir))
  assert report.read(workdir) == result
  assert result["title"] == "Fair segmentation of run"
  assert list(result["models"]) == ["FairDiff, joint"]
  baseline, asian, white, log = result["notices"]
  drawn = "synthetic patients of {} could not be drawn: no sound mask in 10"
  assert f"2 of 2 {drawn.format('Asian')} draws each (no cup: 2)." == asian
  assert f"1 of 2 {drawn.format('White')} draws each (ragged: 1)." == white
  assert "The baseline is left out: " in baseline
  assert "metrics.jsonl does not exist" in log
  agreement = result["agreement"]["FairDiff, joint"]["Asian"]["cup"]
  assert agreement["synthetic"] is agreement["ratio"] is None
  text = (workdir / "report" / "index.html").read_text()
  assert text.count("Synthetic case, ") == 3


def test_generators_alone_give_a_report(tmp_path, data, save, monkeypatch):
  """With features of a published network, of real cases but once."""
  workdir = save(
    tmp_path / "run",
    **{
      "train.segmenter": (0, 0),
      "bank.harmonics": 1,
      "evaluation.features": "resnet50",
      "evaluation.features_weights": str(
        write_small_resnet(tmp_path / "a.safetensors", monkeypatch)
      ),
    },
  )
  (workdir / "metrics.jsonl").write_text('{"step": 1, "loss/points": 1}\n{"s')
  result = evaluation.evaluate(restore(workdir))
  assert result["models"] == result["agreement"] == {}
  assert result["title"] == "run, without segmentation figures"
  assert "the run trains no segmenter" in result["verdict"]
  assert result["notices"] == []
  assert result["facts"]["test cases"] == 6
  words = result["realism"]["all"]["features"]["extractor"]
  assert words.startswith("ResNet-50 (a.safetensors, sha256 ")
  assert result["facts"]["features of realism"] == words
  (kept,) = (data / features.FOLDER).iterdir()
  assert array_files.read_npz(kept)["features"].shape == (6, 32)
  text = (workdir / "report" / "index.html").read_text()
  assert text.count("Synthetic case, ") == text.count("Real case, ") == 6
  assert "Loss: points" in text and "Worst cases" not in text


def test_without_test_cases_or_synthetic_ones(tmp_path, data, save):
  """`synthetic_per_group=0` is off."""
  listed = tmp_path / "training.txt"
  listed.write_text("".join(f"data_{i:05d}\n" for i in range(1, 31)))
  directory = tmp_path / "prepared"
  prepare.prepare(smoke(**{"data.split": str(listed)}).data, directory)
  workdir = save(
    tmp_path / "run",
    **{
      "data.directory": str(directory),
      "train.points": (0, 0),
      "train.image": (0, 0),
      "fairness.strategy": "none",
      "evaluation.synthetic_per_group": 0,
    },
  )
  result = evaluation.evaluate(restore(workdir))
  assert f"there is no test case in {directory}" in result["verdict"]
  assert result["models"] == result["agreement"] == {}
  assert result["training_cases"]["White"]["real"] > 2
  assert "Synthetic case" not in (workdir / "report/index.html").read_text()


def cases_of(group, mask):
  n = len(group)
  image = np.zeros((n, 4, 4), np.uint8)
  points = np.zeros((n, 0, 3), np.float32)
  return Cases(list(map(str, range(n))), image, image + mask, points, {})


def test_agreement_where_a_ratio_is_undefined():
  """A is found in synthetic cases alone, B in real ones, C in none."""
  group = np.array([0, 0, 1])
  test = cases_of(group, 2)
  image, mask = test.image[:2], test.mask[:2]
  generated = Generated(image, mask, np.ones(2, int), np.array(["", ""]))
  result = trust.agreement(
    {
      "synthetic": mask * [[[1]], [[0]]],
      "real": test.mask * (group == 1)[:, None, None],
    },
    generated,
    np.array([0, 1]),
    test,
    group,
    NAMES,
    "exclude",
  )
  found = {
    name: [classes["cup"][key] for key in ("synthetic", "real", "ratio")]
    for name, classes in result.items()
  }
  np.testing.assert_equal(
    found,
    {
      "A": [1, 0, np.nan],
      "B": [0, 1, 0],
      "C": [np.nan] * 3,
      "all": [0.5, 0.5, 1],
    },
  )
  np.testing.assert_equal(list(result["all"]["rim"].values()), [np.nan] * 4)


def test_images_below_nearly_all_real_ones_are_counted():
  """Of 4 synthetic cases one is found as badly as no real one."""
  real, made = np.zeros(100, int), np.zeros(4, int)
  test, other = cases_of(real, 2), cases_of(made, 2)
  found = test.mask.copy()
  found[:, 0, 0] = 0
  generated = Generated(
    other.image, other.mask, np.ones(4, int), np.full(4, "")
  )
  seen = other.mask.copy()
  seen[0, :3] = 0
  result = trust.agreement(
    {"synthetic": seen, "real": found},
    *(generated, made, test, real, NAMES, "exclude"),
  )
  assert result["A"]["cup"]["below"] == 0.25


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1, 2**31, 2**32 - 1])
def test_synthetic_cases_are_in_no_bank(seed):
  def words(of):
    return tuple(jax.random.key_data(_key(of)).tolist())

  banks = {words((seed, step, BANK)) for step in range(300)}
  assert words((seed, 0, evaluation.REPORT)) not in banks | {words(seed)}


def fill(workdir, step, group):
  """Writes a bank of blank cases."""
  directory = Layout(workdir).bank(step)
  blank = np.zeros((len(group), 32, 32), np.uint8)
  bank = Synthetic(blank, blank, np.array(group, np.int32), np.zeros(3, int))
  with files.new_directory(directory) as temporary:
    files.write(temporary / "cases.npz", array_files.npz_bytes(bank._asdict()))
    digest = files.sha256(temporary / "cases.npz")
    files.write(temporary / "bank.json", json.dumps({"sha256": digest}))
  return directory


def test_the_bank_that_was_used_is_counted(tmp_path):
  """That of steps 6 and 7; a run that has none says so."""

  def read(step=8, **changes):
    config = smoke(**changes)
    name, counts, notices = evaluation._read_bank(
      config, Layout(tmp_path), step, NAMES
    )
    return name, [counts[name]["synthetic"] for name in NAMES], notices

  assert read() == ("none", [0, 0, 0], [])
  fill(tmp_path, 2, [0] * 5)
  newest = fill(tmp_path, 6, [0, 2, 2])
  fill(tmp_path, 9, [1])
  assert read() == ("step_00000006", [1, 0, 2], [])
  assert read(6) == ("step_00000002", [5, 0, 0], [])
  assert read(2) == ("none", [0, 0, 0], [])
  assert read(**{"fairness.strategy": "none"}) == ("none", [0, 0, 0], [])
  assert read(**{"train.segmenter": (0, 0)}) == ("none", [0, 0, 0], [])
  (newest / "cases.npz").write_bytes(b"PK")
  name, counts, (notice,) = read()
  assert (name, counts) == ("step_00000006", [0, 0, 0])
  assert re.search(r"are not counted: .*step_00000006/cases.npz is not", notice)
  shutil.rmtree(newest)
  assert "step_00000006" in read()[2][0]
