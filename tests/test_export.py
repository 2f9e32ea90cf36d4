"""Exports of synthetic cases: files, provenance, going on, refusals."""

import csv
import errno
import hashlib
import json
import shutil
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest

from configs.phantom import get_config
from fairdiff_jax import config as configs
from fairdiff_jax.data import npz, prepare, statistics, storage
from fairdiff_jax.data.attributes import ATTRIBUTES
from fairdiff_jax.synthesis import export
from fairdiff_jax.synthesis.generate import make_generator
from fairdiff_jax.training.checkpoint import Checkpoints
from fairdiff_jax.training.setup import setup
from fairdiff_jax.training.trained import restore

COUNTS = ["White=6", "asian=5"]  # with batches of 8, the second is part full
FILES = [f"data_{i:05d}.npz" for i in range(1, 12)]


def save_initial(config, workdir, cases):
  """Makes a run of one step that learned nothing, on one device."""
  configs.claim(workdir, config)
  run = setup(config, jax.devices()[:1])
  stats = statistics.compute(
    cases,
    cases.attributes["race"],
    3,
    intensity_prior=config.image.intensity_prior,
  )
  stats = {name: stats[name] for name in run.objective.tasks}
  state = run.init(stats, np.ones(3, np.float32))
  checkpoints = Checkpoints(workdir)
  checkpoints.save(state, facts={})
  checkpoints.close()


@pytest.fixture(scope="module")
def config():
  config = get_config("smoke").unlock()
  config.bank.harmonics = 1  # curves of an untrained model are too ragged
  config.bank.min_solidity = 0.9
  return config.lock()


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run")
  prepare.prepare(config.data, workdir / "data")
  cases = storage.load(workdir / "data", "train", progress=False)
  save_initial(config, workdir, cases)
  return restore(workdir)


@pytest.fixture(scope="module")
def calls(trained):
  """Compiles the generators once; lists the numbers of each chunk made."""
  calls = []
  generate = make_generator(trained.setup)

  def counted(inference, seed, number, group):
    calls.append(number.tolist())
    return generate(inference, seed, number, group)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(export, "make_generator", lambda run: counted)
    yield calls


@pytest.fixture(scope="module")
def exported(trained, calls, tmp_path_factory):
  out = tmp_path_factory.mktemp("exported") / "new" / "out"
  export.export(trained, out, COUNTS, seed=3)
  return out


def digests(directory):
  return {
    path.name: hashlib.sha256(path.read_bytes()).hexdigest()
    for path in directory.iterdir()
  }


def manifest(directory):
  lines = (directory / "manifest.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_files_are_those_of_the_current_release(exported):
  assert sorted(path.name for path in exported.iterdir()) == [
    "contact_sheet.png",
    *FILES,
    "data_summary.csv",
    "manifest.jsonl",
    "request.json",
  ]
  for i, name in enumerate(FILES):
    case = npz.read_case(exported / name)
    assert case.dialect == "current"
    assert case.image.shape == case.mask.shape == (32, 32)
    assert case.attributes == dict.fromkeys((*ATTRIBUTES, "age"), -1) | {
      "race": 0 if i < 5 else 2
    }
    with np.load(exported / name) as arrays:
      assert arrays["synthetic"].shape == ()
      assert arrays["synthetic"] == 1


def test_cases_differ(exported):
  images = {npz.read_case(exported / name).image.tobytes() for name in FILES}
  assert len(images) == len(FILES)


def test_summary_agrees_with_the_files(exported):
  with open(exported / "data_summary.csv", newline="") as file:
    rows = list(csv.DictReader(file))
  assert [row["filename"] for row in rows] == FILES
  assert [row["race"] for row in rows] == ["asian"] * 5 + ["white"] * 6
  for row in rows:
    assert (row["use"], row["synthetic"]) == ("training", "1")
    assert row["age"] == row["gender"] == "unknown"


def test_manifest_says_where_each_case_is_from(exported, config):
  request = json.loads((exported / "request.json").read_text())
  lines, found = manifest(exported), digests(exported)
  assert [line["file"] for line in lines] == FILES
  assert [line["number"] for line in lines] == list(range(11))
  assert [line["group"] for line in lines] == ["Asian"] * 5 + ["White"] * 6
  for line in lines:
    with np.load(exported / line["file"]) as arrays:
      assert line["attempts"] == arrays["attempts"] >= 1
    assert line["sha256"] == found[line["file"]]
    assert line["synthetic"] is True
    assert line["seed"] == 3
    assert line["checkpoint_step"] == 0
    assert line["checkpoint_sha256"] == request["checkpoint_sha256"]
    assert line["config_sha256"] == configs.config_hash(config)
    assert line["sampler"] == {
      "points": {"num_steps": 10},
      "image": {
        "sample_steps": 2,
        "solver": "ddim",
        "eta": 1.0,
        "guidance": 1.0,
      },
    }


def test_contact_sheet_draws_contours_in_colour(exported):
  sheet = cv2.imread(str(exported / "contact_sheet.png"))
  assert min(sheet.shape[:2]) > 2 * 160
  assert (np.ptp(sheet, axis=2) > 60).sum() > 100


def test_an_export_can_be_prepared(exported, tmp_path):
  report = prepare.check(exported, progress=False)
  assert (report.usable, report.set_aside) == (11, [])
  report = prepare.build(
    exported,
    tmp_path,
    size=(32, 32),
    num_points=64,
    allow_synthetic=True,
    progress=False,
  )
  assert report.counts["train"]["race"] == {
    "Asian": 5,
    "Black": 0,
    "White": 6,
    "Unknown": 0,
  }


def test_goes_on_after_files_were_lost(exported, trained, calls, tmp_path):
  before = digests(exported)
  for lost, made in (
    ([FILES[9], "contact_sheet.png"], [[8, 9, 10]]),  # whole chunks, no other
    (["data_summary.csv"], []),
    # Nobody knows then what was written: all is made, and compared.
    (["manifest.jsonl"], [[*range(8)], [8, 9, 10]]),
  ):
    for name in lost:
      (exported / name).unlink()
    calls.clear()
    export.export(trained, exported, list(reversed(COUNTS)), seed=3)
    assert calls == made
    assert digests(exported) == before


@pytest.mark.parametrize("name", [FILES[2], "data_summary.csv"])
def test_an_exchanged_file_is_named(exported, trained, calls, tmp_path, name):
  out = Path(shutil.copytree(exported, tmp_path / "out"))
  shutil.copyfile(out / FILES[9], out / name)
  before = digests(out)
  calls.clear()
  message = f"{out / name} is not .*; move it away, and the same command"
  with pytest.raises(ValueError, match=message):
    export.export(trained, out, COUNTS, seed=3)
  assert calls == [] and digests(out) == before
  (out / name).unlink()
  export.export(trained, out, COUNTS, seed=3)
  assert digests(out) == digests(exported)


def test_a_file_that_nobody_has_recorded_is_not_overwritten(
  exported, trained, calls, tmp_path
):
  out = Path(shutil.copytree(exported, tmp_path / "out"))
  lines = (out / "manifest.jsonl").read_text().splitlines(keepends=True)
  (out / "manifest.jsonl").write_text("".join(lines[:8]) + lines[8][:40])
  shutil.copyfile(out / FILES[0], out / FILES[9])
  before = digests(out)
  calls.clear()
  message = f"{out / FILES[9]} is not what this request makes here; move it"
  with pytest.raises(ValueError, match=message):
    export.export(trained, out, COUNTS, seed=3)
  assert calls == [[8, 9, 10]] and digests(out) == before


def test_a_damaged_request_is_named(exported, trained, calls, tmp_path):
  out = Path(shutil.copytree(exported, tmp_path / "out"))
  (out / "request.json").write_text('{"seed": 3')
  message = f"{out / 'request.json'} is damaged .*another directory .--out"
  with pytest.raises(ValueError, match=message):
    export.export(trained, out, COUNTS, seed=3)


def test_a_full_disk_is_named(trained, calls, tmp_path, monkeypatch):
  def full(self, data):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(Path, "write_bytes", full)
  with pytest.raises(OSError, match="No space left on device: .*request.json"):
    export.export(trained, tmp_path / "out", COUNTS, seed=3)
  assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("written", [0, 3, 9])
def test_goes_on_after_a_kill(
  exported, trained, calls, tmp_path, monkeypatch, written
):
  left, write_case = written, npz.write_case

  def killed(*args, **kwargs):
    nonlocal left
    if not left:
      raise KeyboardInterrupt
    left -= 1
    write_case(*args, **kwargs)

  monkeypatch.setattr(npz, "write_case", killed)
  with pytest.raises(KeyboardInterrupt):
    export.export(trained, tmp_path, COUNTS, seed=3)
  assert len(list(tmp_path.glob("*.npz"))) == written
  monkeypatch.setattr(npz, "write_case", write_case)
  calls.clear()
  export.export(trained, tmp_path, COUNTS, seed=3)
  assert len(calls) == (1 if written > 8 else 2)
  assert digests(tmp_path) == digests(exported)


def test_another_request_is_refused(exported, trained, calls):
  before = digests(exported)
  calls.clear()
  with pytest.raises(FileExistsError, match=r"seed 3 \(now 4\); name another"):
    export.export(trained, exported, COUNTS, seed=4)
  with pytest.raises(FileExistsError, match=r"'White': 6} \(now {'Asian': 1}"):
    export.export(trained, exported, ["Asian=1"], seed=3)
  assert digests(exported) == before
  assert calls == []


def test_another_checkpoint_is_refused(exported, trained, monkeypatch):
  monkeypatch.setattr(export, "fingerprint", lambda tree: "other")
  with pytest.raises(
    FileExistsError, match=r"another request: checkpoint_sha256 \w+ \(now other"
  ):
    export.export(trained, exported, COUNTS, seed=3)


def test_a_directory_in_use_is_refused(trained, tmp_path):
  file = tmp_path / "notes.txt"
  file.write_text("mine")
  for out in (tmp_path, file):
    with pytest.raises(FileExistsError, match=f"{out} is in use.*--out"):
      export.export(trained, out, COUNTS)
  assert list(tmp_path.iterdir()) == [file]
  assert file.read_text() == "mine"


@pytest.mark.parametrize(
  ("counts", "message"),
  [
    ([], "counts ask for 0 cases"),
    (["Asian=0"], "counts ask for 0 cases of Asian"),
    (["Asian=2", "Black=-3"], "counts ask for -3 cases of Black"),
    (["Asian"], "'Asian', which is not GROUP=CASES"),
    (["Asian=many"], "'Asian=many', which is not GROUP=CASES"),
    (["Asien=1"], "has no group 'Asien'. Did you mean 'Asian'?"),
    (["Asian=1", "asian=2"], "counts name asian twice"),
  ],
)
def test_bad_counts(trained, tmp_path, counts, message):
  with pytest.raises(ValueError) as error:
    export.export(trained, tmp_path / "out", counts)
  assert message in str(error.value)
  assert not (tmp_path / "out").exists()


def test_a_run_without_generators(config, trained, tmp_path):
  plain = config.copy_and_resolve_references().unlock()
  plain.train.points = plain.train.image = (0, 0)
  other = trained._replace(setup=setup(plain))
  with pytest.raises(ValueError, match="no generators .* trains segmenter"):
    export.export(other, tmp_path / "out", COUNTS)
  assert not Path(tmp_path / "out").exists()


def test_a_run_without_checkpoint(config, tmp_path):
  configs.plan(tmp_path, config)
  message = "prepared but has no checkpoint yet; .*: fairdiff train --workdir"
  with pytest.raises(FileNotFoundError, match=message):
    restore(tmp_path)
  configs.claim(tmp_path, config)
  with pytest.raises(FileNotFoundError, match="has no checkpoint yet; let"):
    restore(tmp_path)
