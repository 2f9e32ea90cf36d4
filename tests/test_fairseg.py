"""Reading, checking, preparing and loading npz files."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from patients import BUILD, H0, W0, eye, patient, write_csv, write_source

from fairdiff_jax.data import attributes, contours, prepare, storage

ROOT = Path(__file__).parents[1]


@pytest.fixture
def source(tmp_path):
  return write_source(tmp_path / "source")


def test_build_and_load(source, tmp_path):
  report = prepare.build(source, tmp_path / "data", **BUILD)
  assert report.dialects == {"current": 3}
  assert report.sizes == {"60 x 76": 3}
  assert report.counts["train"]["race"] == {
    "Asian": 1,
    "Black": 1,
    "White": 0,
    "Unknown": 0,
  }
  assert report.set_aside == []
  assert "maritalstatus  Married" in str(report)

  cases = storage.load(tmp_path / "data", "train", progress=False)
  assert cases.name == ["data_00001", "data_00002"]
  assert cases.image.shape == cases.mask.shape == (2, 40, 48)
  assert cases.image.dtype == cases.mask.dtype == np.uint8
  assert cases.points.shape == (2, 64, 3)
  assert cases.points.dtype == np.float32
  assert set(np.unique(cases.mask)) == {0, 1, 2}
  assert set(cases.attributes) == {*attributes.ATTRIBUTES, "age"}
  np.testing.assert_array_equal(cases.attributes["race"], [0, 1])
  np.testing.assert_array_equal(cases.attributes["ethnicity"], [-1, -1])
  assert cases.attributes["race"].dtype == np.int32
  test = storage.load(tmp_path / "data", "test", progress=False)
  assert test.name == ["data_00003"]
  with pytest.raises(ValueError, match="no split 'val'; it has"):
    storage.load(tmp_path / "data", "val")


def dice(a, b):
  return 2 * (a & b).sum() / (a.sum() + b.sum())


@pytest.mark.parametrize("size", [(40, 48), (60, 76), (90, 100)])
def test_points_and_mask_agree_at_the_prepared_size(source, tmp_path, size):
  prepare.build(source, tmp_path / "data", **BUILD | {"size": size})
  cases = storage.load(tmp_path / "data", "test", progress=False)
  mask = contours.points_to_mask(cases.points[0], size)
  for least in (1, 2):
    assert dice(mask >= least, cases.mask[0] >= least) > 0.95


def test_native_size_is_kept_exactly(source, tmp_path):
  prepare.build(source, tmp_path / "data", **BUILD | {"size": (H0, W0)})
  cases = storage.load(tmp_path / "data", "test", progress=False)
  image, mask = eye()
  np.testing.assert_array_equal(cases.image[0], image)
  np.testing.assert_array_equal(cases.mask[0], -mask)


def test_thin_rim_survives_shrinking(source, tmp_path):
  image, mask = eye(shape=(200, 200), cup=0.98)
  np.savez(
    source / "data_00003.npz", slo_fundus=image, disc_cup_mask=mask, race=0
  )
  prepare.build(source, tmp_path / "data", **BUILD | {"size": (50, 50)})
  small = storage.load(tmp_path / "data", "test", progress=False).mask[0]
  for least in (1, 2):
    area = (-mask >= least).mean()
    assert (small >= least).mean() == pytest.approx(area, rel=0.01)
  assert (small == 1).mean() == pytest.approx((mask == -1).mean(), rel=0.3)


@pytest.mark.parametrize("crop", [(44, 50), (45, 51), (60, 50)])
def test_crop_is_the_centre(source, tmp_path, crop):
  """At the crop's own size, pixels are the native ones."""
  options = BUILD | {"size": crop, "crop": crop}
  report = prepare.build(source, tmp_path / "data", **options)
  assert report.settings["crop"] == list(crop)
  assert report.sizes == {"60 x 76": 3}
  assert report.notes == []
  cases = storage.load(tmp_path / "data", "test", progress=False)
  image, mask = eye()
  top, left = H0 // 2 - crop[0] // 2, W0 // 2 - crop[1] // 2
  centre = np.s_[top : top + crop[0], left : left + crop[1]]
  np.testing.assert_array_equal(cases.image[0], image[centre])
  np.testing.assert_array_equal(cases.mask[0], -mask[centre])
  whole = contours.mask_to_points((-mask).astype(np.uint8), 64)
  moved = whole - np.array([top, left, 0], np.float32)
  np.testing.assert_allclose(cases.points[0], moved, atol=1e-4)


def test_crop_comes_before_the_resize(source, tmp_path):
  options = BUILD | {"size": (22, 25), "crop": (44, 50)}
  prepare.build(source, tmp_path / "data", **options)
  cases = storage.load(tmp_path / "data", "test", progress=False)
  image, mask = (x[8:52, 13:63] for x in eye())
  expected = image.reshape(22, 2, 25, 2).mean((1, 3))
  assert np.abs(cases.image[0] - expected).max() <= 0.5
  share = (mask < 0).reshape(22, 2, 25, 2).mean((1, 3))
  np.testing.assert_array_equal(cases.mask[0] > 0, share >= 0.5)
  mask = contours.points_to_mask(cases.points[0], (22, 25))
  for least in (1, 2):
    assert dice(mask >= least, cases.mask[0] >= least) > 0.95


def off_centre(row):
  """A patient whose disc lies around (row, 42)."""
  _, mask = eye()
  return patient(disc_cup_mask=np.roll(mask, row - 27, axis=0))


def test_crop_that_cuts_the_disc_is_noted(source, tmp_path):
  """The disc reaches 18 pixels up, the cup 9; the crop begins at row 8."""
  np.savez(source / "data_00002.npz", **off_centre(20))
  options = BUILD | {"size": (44, 50), "crop": (44, 50)}
  report = prepare.build(source, tmp_path / "data", **options)
  assert report.set_aside == []
  assert report.notes == [
    "The crop cuts the disc of 1 cases, which are kept: data_00002.npz.",
    "1 masks would be refused as 'outside' if they were made up"
    " (bank.min_solidity=0.9), and are kept: data_00002.npz.",
  ]
  cases = storage.load(tmp_path / "data", "train", progress=False)
  expected = -off_centre(20)["disc_cup_mask"][8:52, 13:63]
  np.testing.assert_array_equal(cases.mask[1], expected)
  assert (cases.mask[1][0] == 1).any() and (cases.mask[1] == 2).any()


def test_crop_that_does_not_fit_sets_the_case_aside(source, tmp_path):
  lost = off_centre(1)
  lost["disc_cup_mask"][8:] = lost["disc_cup_mask"][8:].clip(-1)
  np.savez(source / "data_00002.npz", **lost)
  small = {k: x[:40] if x.ndim else x for k, x in patient().items()}
  np.savez(source / "data_00003.npz", **small)
  options = BUILD | {"crop": (44, 50)}
  report = prepare.build(source, tmp_path / "data", **options)
  assert report.set_aside == [
    (
      "data_00002.npz",
      "the crop 44 x 50 of 60 x 76 shows no cup; choose a larger crop.",
    ),
    (
      "data_00003.npz",
      "the image (40 x 76) is smaller than the crop 44 x 50; choose a smaller"
      " crop.",
    ),
  ]
  assert report.notes == []


@pytest.mark.parametrize("crop", [(44,), (4, 50)])
def test_malformed_crop_is_refused(source, tmp_path, crop):
  with pytest.raises(ValueError, match=r"crop must be \(H, W\) .* 8 pixels"):
    prepare.build(source, tmp_path / "data", **BUILD, crop=crop)


def test_npz_wins_and_csv_fills(source, tmp_path):
  row = {"use": "training", "race": "White", "ethnicity": "hispanic"}
  write_csv(source, {"data_00001": row, "data_00002": row | {"race": "black"}})
  report = prepare.build(source, tmp_path / "data", **BUILD)
  train = storage.load(tmp_path / "data", "train", progress=False)
  np.testing.assert_array_equal(train.attributes["race"], [0, 1])
  np.testing.assert_array_equal(train.attributes["ethnicity"], [1, 1])
  assert report.notes == [
    "race: data_summary.csv differs from the npz in 1 cases; npz kept."
  ]


def test_missing_inputs(source, tmp_path):
  data = tmp_path / "data"
  with pytest.raises(FileNotFoundError, match="neither 'use' nor a file"):
    prepare.build(source, data, split="nope.txt", **BUILD)
  with pytest.raises(ValueError, match=r"size must be \(H, W\)"):
    prepare.build(source, data, size=(4, 40), num_points=64)
  with pytest.raises(ValueError, match="num_points must be at least 8, not 0"):
    prepare.build(source, data, size=(40, 40), num_points=0)
  with pytest.raises(FileNotFoundError, match="is not a directory"):
    prepare.build(tmp_path / "nope", data, **BUILD)
  with pytest.raises(FileNotFoundError, match=r"holds no \.npz files"):
    prepare.build(tmp_path, data, **BUILD)
  with pytest.raises(FileNotFoundError, match="fairdiff prepare --config"):
    storage.load(data, "train")
  table = source / "data_summary.csv"
  table.write_text("name,use\n")
  with pytest.raises(ValueError, match="no column 'filename'; its columns"):
    prepare.build(source, data, **BUILD)
  table.write_text("filename,race\n")
  with pytest.raises(ValueError, match="no column 'use'"):
    prepare.build(source, data, **BUILD)
  table.unlink()
  with pytest.raises(FileNotFoundError, match=r"has no data_summary\.csv"):
    prepare.build(source, data, **BUILD)
  assert not data.exists()


def test_the_report_names_the_worst_clouds(source, tmp_path):
  for i, cup in ((1, 0.5), (2, 0.2), (3, 0.5)):
    _, mask = eye(cup=cup)
    np.savez(source / f"data_0000{i}.npz", **patient(disc_cup_mask=mask))
  report = prepare.build(source, tmp_path / "data", **BUILD)
  for structure in ("disc", "cup"):
    trip = report.round_trip[structure]
    assert 0.9 < trip["least"] < trip["mean"] <= 1
  assert report.worst[0][0] == "data_00002.npz"
  assert report.worst[0][2] == report.round_trip["cup"]["least"]
  lines = str(report).splitlines()
  (start,) = (
    i for i, x in enumerate(lines) if x.startswith("masks from 64 po")
  )
  assert lines[start].split()[-3:] == ["disc", "cup", "rim"]
  assert lines[start + 3].split() == [
    "data_00002.npz",
    *(f"{dice:.4f}" for dice in report.worst[0][1:]),
  ]
  assert prepare.check(tmp_path / "data") == report


def test_the_report_says_one_reason_once(source):
  for i in range(4, 20):
    np.savez(
      source / f"data_{i:05d}.npz", **patient(disc_cup_mask=0 * eye()[1])
    )
  write_csv(source, {f"data_{i:05d}": "training" for i in range(1, 20)})
  report = prepare.check(source, progress=False)
  assert len(report.set_aside) == 16
  *_, last = str(report).splitlines()
  assert last.startswith("  data_00004.npz, data_00005.npz, ")
  assert "data_00011.npz and 8 more  disc_cup_mask shows no disc" in last


def test_nothing_usable(source, tmp_path):
  write_csv(source, {f"data_0000{i}": "test" for i in (1, 2, 3)})
  with pytest.raises(ValueError, match="no usable case is in the training"):
    prepare.build(source, tmp_path / "data", **BUILD)
  for path in source.glob("*.npz"):
    path.write_bytes(b"")
  with pytest.raises(ValueError, match=r"not one of the 3 .* data_00001\.npz:"):
    prepare.build(source, tmp_path / "data", **BUILD)
  assert prepare.check(source, progress=False).usable == 0


def test_reuses_the_same_and_refuses_other_settings(source, tmp_path):
  data = tmp_path / "data"
  report = prepare.build(source, data, **BUILD)
  for path in source.iterdir():
    path.unlink()
  assert prepare.build(source, data, **BUILD) == report
  assert prepare.check(data) == report
  with pytest.raises(FileExistsError, match=r"size 40 x 48 \(now 32 x 32\)"):
    prepare.build(source, data, **BUILD | {"size": (32, 32)})
  with pytest.raises(FileExistsError, match=r"crop none \(now 44 x 50\)"):
    prepare.build(source, data, **BUILD, crop=(44, 50))
  with pytest.raises(FileExistsError, match=r"source .*source \(now .*other"):
    prepare.build(tmp_path / "other", data, **BUILD)


def test_killed_build_is_not_taken_for_complete(source, tmp_path, monkeypatch):
  data = tmp_path / "data"
  unfinished = []

  def killed(self, records):
    yield from enumerate(records)
    unfinished.extend(data.glob("fair_seg/*"))
    raise KeyboardInterrupt

  monkeypatch.setattr(storage.Prepared, "_generate_examples", killed)
  with pytest.raises(KeyboardInterrupt):
    prepare.build(source, data, **BUILD)
  assert ["incomplete" in path.name for path in unfinished] == [True]
  unfinished[0].mkdir()  # what a kill would leave
  with pytest.raises(FileNotFoundError):
    storage.load(data, "train")
  monkeypatch.undo()
  assert prepare.build(source, data, **BUILD).usable == 3


def test_prepare_phantoms(tmp_path):
  config = ConfigDict(
    {
      "source": "phantom",
      "size": (32, 40),
      "num_points": 32,
      "split": "use",
      "crop": (),
      "attribute": "race",
      "domain": "",
      "validation": 0.0,
      "allow_synthetic": False,
      "phantom": {
        "train": 9,
        "test": 1,
        "seed": 0,
        "test_seed": 0,
        "balanced": False,
      },
    }
  )
  report = prepare.prepare(config, tmp_path)
  assert report.set_aside == []
  assert sum(report.counts["train"]["race"].values()) == 9
  assert sum(report.counts["test"]["race"].values()) == 3
  assert prepare.prepare(config, tmp_path) == report
  config.phantom.seed = 1
  with pytest.raises(FileExistsError, match=r" seed 0.*now .* seed 1"):
    prepare.prepare(config, tmp_path)


def launch(*arguments):
  return subprocess.run(
    [sys.executable, "launch/prepare.py", *map(str, arguments)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    env={"PYTHONPATH": str(ROOT)},
  )


def test_launch_prepares(source, tmp_path):
  config = "configs/phantom.py:smoke"
  options = ("--config", config, "--workdir", tmp_path / "run")
  result = launch(*options, f"--config.data.source={source}")
  assert result.returncode == 0, result.stderr
  assert "3 cases usable, 0 set aside." in result.stdout
  assert "Unknown size" not in result.stdout
  cases = storage.load(tmp_path / "run/data", "train", progress=False)
  assert cases.image.shape == (2, 32, 32)

  result = launch(*options, "--config.data.sise=(64,64)")
  assert result.returncode == 1
  assert result.stderr == (
    "error: the config has no field 'sise' Did you mean \"size\" instead of "
    '"sise"?\n'
  )


def test_launch_checks(source, tmp_path):
  (source / "data_00002.npz").write_bytes(b"")
  before = sorted(tmp_path.rglob("*"))
  result = launch("--check", source)
  assert result.returncode == 0, result.stderr
  assert "2 cases usable, 1 set aside:" in result.stdout
  assert sorted(tmp_path.rglob("*")) == before
  for path in source.glob("*.npz"):
    path.write_bytes(b"")
  result = launch("--check", source)
  assert result.returncode == 1
  assert "0 cases usable, 3 set aside:" in result.stdout
  result = launch("--check", tmp_path / "nope")
  assert result.returncode == 1
  assert result.stderr == f"error: {tmp_path / 'nope'} is not a directory.\n"


def test_tensorflow_is_not_imported(source, tmp_path):
  code = (
    "import sys; from fairdiff_jax.data import prepare, storage; "
    f"prepare.build({str(source)!r}, {str(tmp_path / 'data')!r}, size=(32, 32),"
    " num_points=32, progress=False); "
    f"storage.load({str(tmp_path / 'data')!r}, 'train', progress=False); "
    "assert not {'tensorflow', 'torch'} & set(sys.modules)"
  )
  subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
