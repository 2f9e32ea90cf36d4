"""Who may see whom: test patients no generator, synthetic cases no test."""

import json

import jax
import numpy as np
import pytest

from configs.phantom import get_config
from fairdiff_jax.data import domain as domains
from fairdiff_jax.data import npz, prepare, storage, table
from fairdiff_jax.data.cases import Cases, require_training
from fairdiff_jax.synthesis.bank import make_refill
from fairdiff_jax.training.pools import Pools
from fairdiff_jax.training.setup import initial_state, setup
from tests import patients, tables

ALLOW = {**patients.BUILD, "allow_synthetic": True}


@pytest.fixture(scope="module")
def run():
  return setup(get_config("smoke"), jax.devices()[:1])


@pytest.mark.parametrize("split", ["test", "validation"])
def test_what_learns_sees_training_cases_alone(run, split):
  n = 4
  image = np.zeros((n, 32, 32), np.uint8)
  points = np.zeros((n, 32, 3), np.float32)
  cases = Cases([*"abcd"], image, image, points, {"race": np.zeros(n, int)})
  require_training(cases, "it")
  cases, group = cases._replace(split=split), np.zeros(n, int)
  for call in (
    lambda: Pools(run.config, cases, run.objective.group_names),
    lambda: initial_state(run, cases, group),
    lambda: make_refill(run, cases),
  ):
    with pytest.raises(ValueError, match=f"was given the {split} cases"):
      call()


def test_loaded_cases_say_what_they_are(tmp_path):
  source = patients.write_source(tmp_path / "source")
  prepare.build(source, tmp_path / "data", **patients.BUILD)
  for _ in range(2):  # unpacked, and from its arrays
    for split in ("train", "test"):
      cases = storage.load(tmp_path / "data", split, progress=False)
      assert cases.split == split


def mark_file(directory):
  case = npz.read_case(directory / "data_00002.npz")
  npz.write_case(
    directory / "data_00002.npz",
    case.image,
    case.mask,
    {"race": 1},
    synthetic=1,
  )


def mark_summary(directory):
  path = directory / npz.SUMMARY
  first, *rows = path.read_text().splitlines()
  rows = [f"{row},{int('00002' in row)}" for row in rows]
  path.write_text("\n".join([f"{first},synthetic", *rows]) + "\n")


def mark_manifest(directory):
  line = {"file": "data_00002.npz", "synthetic": True}
  (directory / "manifest.jsonl").write_text(json.dumps(line) + "\n")


@pytest.mark.parametrize("mark", [mark_file, mark_summary, mark_manifest])
def test_a_synthetic_file_is_recognised(tmp_path, mark):
  source = patients.write_source(tmp_path / "source")
  mark(source)
  message = "data_00002.npz is synthetic; .*--config.data.allow_synthetic=True"
  with pytest.raises(ValueError, match=message):
    prepare.build(source, tmp_path / "data", **patients.BUILD)
  assert not storage.is_prepared(tmp_path / "data")
  report = prepare.build(source, tmp_path / "data", **ALLOW)
  assert report.usable == 3
  assert "1 cases are synthetic, not real patients" in " ".join(report.notes)
  # What was prepared with them is not taken for real ones.
  with pytest.raises(FileExistsError, match="allow_synthetic True .now none"):
    prepare.build(source, tmp_path / "data", **patients.BUILD)


def test_a_synthetic_case_is_never_a_test_case(tmp_path):
  source = patients.write_source(tmp_path / "source")
  patients.write_csv(
    source,
    {"data_00001": "training", "data_00002": "test", "data_00003": "test"},
  )
  mark_file(source)
  with pytest.raises(ValueError, match="is synthetic and a test case; figures"):
    prepare.build(source, tmp_path / "data", **ALLOW)


def test_a_synthetic_case_is_never_held_out(tmp_path):
  source = tmp_path / "source"
  source.mkdir()
  rows = {}
  for i in range(12):
    name = f"data_{i:05d}"
    extra = {"synthetic": 1} if i % 2 else {}
    np.savez(source / f"{name}.npz", **patients.patient(race=0, **extra))
    rows[name] = "training"
  patients.write_csv(source, rows)
  prepare.build(source, tmp_path / "data", validation=0.4, **ALLOW)
  held = storage.load(tmp_path / "data", "validation", progress=False).name
  assert held and all(int(name[-5:]) % 2 == 0 for name in held)


def test_a_synthetic_png_says_so_wherever_it_lies(tmp_path):
  source = tables.lungs(tmp_path / "source", 6)
  domain = domains.of("", str(source))
  row = table.read(source, domain).rows[1]
  plain = table.read_case(row, domain)
  table.write_png(row.image, plain.image, synthetic="1", model="m")
  case = table.read_case(row, domain)
  assert case.synthetic and not plain.synthetic
  np.testing.assert_array_equal(case.image, plain.image)
  config = get_config("smoke").unlock()
  config.data.source, config.data.attribute = str(source), "sex"
  with pytest.raises(ValueError, match="image_1 is synthetic; to train on"):
    prepare.prepare(config.data, tmp_path / "data")
  config.data.allow_synthetic = True
  assert prepare.prepare(config.data, tmp_path / "data").usable == 6


def test_a_column_says_who_is_synthetic_and_is_no_attribute(tmp_path):
  source = tables.lungs(tmp_path / "source", 6)
  lines = source.read_text().splitlines()
  cells = ["synthetic", "0", "1", "", "no", "yes", "0"]
  source.write_text(
    "\n".join(f"{a},{b}" for a, b in zip(lines, cells, strict=True)) + "\n"
  )
  found = table.read(source, domains.of("", str(source)))
  assert [row.synthetic for row in found.rows] == [0, 1, 0, 0, 1, 0]
  assert "synthetic" not in found.vocabulary
