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
from fairdiff_jax.synthesis import card as cards
from fairdiff_jax.synthesis import draws, export, making
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

  def counted(inference, seed, number, group, **more):
    calls.append(number.tolist())
    return generate(inference, seed, number, group, **more)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(making, "make_generator", lambda run: counted)
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
    "DATA_CARD.md",
    "contact_sheet.png",
    *FILES,
    "data_card.json",
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


class Refuse:
  """Refuses the images that it is given."""

  def __init__(self, images):
    self.images = {image.tobytes() for image in images}

  def check(self, image, mask, group):
    return ["seen before" if x.tobytes() in self.images else "" for x in image]

  def measure(self, image, mask, group):
    return {
      "privacy": None,
      "agreement": {"Asian": {"mean": float(len(image)), "threshold": None}},
    }


@pytest.fixture(scope="module")
def gated(exported, trained, calls, tmp_path_factory):
  """The same cases, but that the fourth is refused at first."""
  out = tmp_path_factory.mktemp("gated")
  seen = npz.read_case(exported / FILES[3]).image
  export.export(trained, out, COUNTS, seed=3, gate=Refuse([seen]))
  return out


def test_what_the_gate_refuses_is_drawn_again_counted_and_listed(
  exported, gated
):
  lines = manifest(gated)
  assert [line["draw"] for line in lines] == [0, 0, 0, 1] + [0] * 7
  assert lines[3]["refused"] == ["seen before"]
  for i, name in enumerate(FILES):
    same = (
      npz.read_case(gated / name).image == npz.read_case(exported / name).image
    ).all()
    assert same == (i != 3)
  found = json.loads((gated / "data_card.json").read_text())
  assert found["gate"] == {"checked": True, "refused": {"seen before": 1}}
  assert found["agreement"]["Asian"]["mean"] == 11
  assert "seen before: 1" in (gated / "DATA_CARD.md").read_text()


def test_what_the_gate_always_refuses_is_not_exported(trained, calls, tmp_path):
  class Never(Refuse):
    def check(self, image, mask, group):
      return ["too near a real patient in pixels"] * len(image)

  message = (
    r"2 of 2 cases were refused in all of their 3 draws \(too near a real"
    r" patient in pixels: 6\).*--budget"
  )
  with pytest.raises(ValueError, match=message):
    export.export(trained, tmp_path, ["Asian=2"], gate=Never([]), budget=3)
  assert not list(tmp_path.glob("*.npz"))


def test_a_case_is_made_again_from_its_line(gated, trained, calls, tmp_path):
  calls.clear()
  made = making.again(trained, gated / "manifest.jsonl", tmp_path, [9, 3])
  assert calls == [[9], [3]]
  assert [path.name for path in made] == [FILES[9], FILES[3]]
  for path in made:
    assert path.read_bytes() == (gated / path.name).read_bytes()
  with pytest.raises(
    ValueError, match="has no case 11; its numbers are 0 to 10"
  ):
    making.again(trained, gated / "manifest.jsonl", tmp_path, [11])


def test_a_case_of_another_checkpoint_is_not_made_again(
  gated, trained, tmp_path, monkeypatch
):
  monkeypatch.setattr(making, "fingerprint", lambda tree: "other")
  message = "case 2 was made with checkpoint_sha256 .* has other; give the run"
  with pytest.raises(ValueError, match=message):
    making.again(trained, gated / "manifest.jsonl", tmp_path, [2])


def test_files_say_what_they_were_made_from(gated, config):
  line = manifest(gated)[3]
  with np.load(gated / FILES[3], allow_pickle=False) as arrays:
    told = json.loads(str(arrays["provenance"]))
  assert told["synthetic"] is True and told["starts_from"] == "noise"
  assert (told["seed"], told["number"], told["draw"]) == (3, 3, 1)
  for key in ("model", "checkpoint_sha256", "config_sha256", "sampler"):
    assert told[key] == line[key]


def test_a_data_card_follows_its_schema(exported, gated):
  for directory in (exported, gated):
    found = json.loads((directory / "data_card.json").read_text())
    cards.check(found)
    assert found["groups"] == {"Asian": 5, "White": 6}
    text = (directory / "DATA_CARD.md").read_text()
    assert found["licence"] in text and "all synthetic" in text
  assert "passed no gate" in (exported / "DATA_CARD.md").read_text()
  for change, message in (
    ({"cases": "11"}, "card.cases is str, not integer"),
    ({"more": 1}, "card has 'more', which is unknown"),
    ({"synthetic": False}, "card.synthetic is False, not True"),
    ({"privacy": {"synthetic": 3}}, "card.privacy"),
  ):
    with pytest.raises(ValueError, match=message):
      cards.check(found | change)
  found.pop("licence")
  with pytest.raises(ValueError, match="card lacks 'licence'"):
    cards.check(found)


def test_a_card_is_valid_by_another_reader(gated):
  jsonschema = pytest.importorskip("jsonschema")
  found = json.loads((gated / "data_card.json").read_text())
  jsonschema.validate(found, cards.SCHEMA)
  with pytest.raises(jsonschema.ValidationError):
    jsonschema.validate(found | {"cases": None}, cards.SCHEMA)


def test_ratios_are_met_within_the_budget(exported, trained, calls, tmp_path):
  found = [
    draws.measure_ratios(npz.read_case(exported / name).mask, trained.domain)
    for name in FILES
  ]
  middle = float(np.median([row["cup to disc"] for row in found]))
  request = {"ratios": [f"cup-to-disc={middle}:1"], "budget": 50}
  export.export(trained, tmp_path / "out", ["White=8"], **request)
  for path in sorted((tmp_path / "out").glob("*.npz")):
    mask = npz.read_case(path).mask
    assert (mask == 2).sum() / (mask > 0).sum() >= middle
  again = making.again(
    trained, tmp_path / "out" / "manifest.jsonl", tmp_path / "again", [6]
  )
  assert again[0].read_bytes() == (tmp_path / "out" / FILES[6]).read_bytes()
  message = "8 of 8 cases were refused .*cup to disc not in 0.999 to 1"
  with pytest.raises(ValueError, match=message):
    export.export(
      trained,
      tmp_path / "x",
      ["White=8"],
      ratios=["cup to disc=.999:1"],
      budget=1,
    )


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("cup to rim=0:1", "of no ratio of the domain, which has 'cup to disc'"),
    ("cup to disc=1", "is not RATIO=LOW:HIGH, such as 'cup to disc=0.3:0.6'"),
    ("cup to disc=0.6:0.3", "is not RATIO=LOW:HIGH"),
  ],
)
def test_bad_ratios(trained, tmp_path, text, message):
  with pytest.raises(ValueError, match=message):
    export.export(trained, tmp_path / "out", ["Asian=2"], ratios=[text])


def test_images_of_a_users_masks(trained, tmp_path):
  folder = tmp_path / "masks"
  folder.mkdir()
  for i in range(3):
    label = np.zeros((64, 64), np.uint8)
    cv2.circle(label, (30 + i, 32), 14, 1, -1)
    cv2.circle(label, (30 + i, 32), 7, 2, -1)
    cv2.imwrite(str(folder / f"{'cab'[i]}.png"), label)
  request = {"masks": folder, "group_name": "Black", "seed": 5}
  export.export(trained, tmp_path / "out", **request)
  lines = manifest(tmp_path / "out")
  assert [line["mask"] for line in lines] == ["a.png", "b.png", "c.png"]
  assert {line["group"] for line in lines} == {"Black"}
  columns = []
  for line in lines:
    mask = npz.read_case(tmp_path / "out" / line["file"]).mask
    assert mask.shape == (32, 32) and set(np.unique(mask)) == {0, 1, 2}
    columns.append(np.argwhere(mask).mean(0)[1])
  assert columns[2] < columns[0] < columns[1]  # c was drawn first
  found = json.loads((tmp_path / "out" / "data_card.json").read_text())
  assert found["starts_from"] == "given masks"
  (made,) = making.again(
    *(trained, tmp_path / "out" / "manifest.jsonl", tmp_path / "again", [1]),
    masks=folder,
  )
  assert made.read_bytes() == (tmp_path / "out" / made.name).read_bytes()
  with pytest.raises(ValueError, match="was made for the mask b.png, which is"):
    making.again(
      trained, tmp_path / "out" / "manifest.jsonl", tmp_path / "x", [1]
    )
  with pytest.raises(ValueError, match="neither counts nor ratios"):
    export.export(trained, tmp_path / "x", ["Black=1"], masks=folder)
  with pytest.raises(FileNotFoundError, match="is not a directory"):
    missing = {"masks": tmp_path / "none", "group_name": "Black"}
    export.export(trained, tmp_path / "x", **missing)


def test_an_export_knows_no_real_patient(trained, calls, monkeypatch, tmp_path):
  """Whatever a bank starts from, an export's generators are given none."""
  given = []

  def make(run, anatomy=None):
    given.append(anatomy)
    return lambda *args, **more: (_ for _ in ()).throw(KeyboardInterrupt)

  monkeypatch.setattr(making, "make_generator", make)
  assert trained.config.bank.strength < 1
  with pytest.raises(KeyboardInterrupt):
    export.export(trained, tmp_path / "out", ["Asian=1"])
  assert given == [None]


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
