"""Prepared data: held against what a run asks, fingerprinted, and damaged."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from patients import BUILD, patient, write_csv, write_source

from fairdiff_jax.data import prepare, storage


@pytest.fixture
def source(tmp_path):
  return write_source(tmp_path / "source")


def data_config(**changes):
  config = ConfigDict(
    {
      "source": "",
      "domain": "",
      "size": (40, 48),
      "num_points": 64,
      "split": "use",
      "crop": (),
      "validation": 0.0,
      "allow_synthetic": False,
      "attribute": "race",
      "phantom": {
        "train": 9,
        "test": 1,
        "seed": 0,
        "test_seed": 0,
        "balanced": False,
        "added": 0,
      },
    }
  )
  config.update_from_flattened_dict(changes)
  return config


def write_list(path, *numbers):
  path.parent.mkdir(exist_ok=True)
  path.write_text("".join(f"data_0000{i}.npz\n" for i in numbers))
  return str(path)


def test_data_prepared_otherwise_is_refused(source, tmp_path):
  data = tmp_path / "data"
  split = write_list(tmp_path / "a" / "train.txt", 1, 2)
  config = data_config(source=str(source), split=split)
  prepare.prepare(config, data)
  prepare.require_prepared(config, data)
  other = write_list(tmp_path / "b" / "train.txt", 2, 3)
  for field, value, message in (
    ("split", other, r"split train.txt \(sha.*\), but data.split is train.txt"),
    ("split", "use", r"split train.txt \(.*\), but data.split is use \(sha256"),
    ("split", "gone.txt", r"but data.split is gone.txt\. Change data.split"),
    ("crop", (44, 50), "crop none, but data.crop is 44 x 50"),
    ("size", (40, 40), "size 40 x 48, but data.size is 40 x 40"),
    ("num_points", 32, "num_points 64, but data.num_points is 32"),
    ("source", "phantom", "source .*source, but data.source is phantom, bal"),
  ):
    with pytest.raises(ValueError, match=message):
      prepare.require_prepared(
        data_config(**{"source": str(source), "split": split, field: value}),
        data,
      )
  with pytest.raises(
    ValueError, match=r"Change data\.size, data\.num_points, "
  ):
    prepare.require_prepared(
      data_config(source=str(source), split=split, size=(32, 32), num_points=8),
      data,
    )


def test_directories_and_lists_may_be_moved(source, tmp_path):
  data = tmp_path / "data"
  split = write_list(tmp_path / "train.txt", 1, 2)
  config = data_config(source=str(source), split=split)
  report = prepare.prepare(config, data)
  moved = tmp_path / "moved"
  moved.mkdir()
  for path in (source, data, tmp_path / "train.txt"):
    shutil.move(path, moved / path.name)
  prepare.require_prepared(config, moved / "data")
  config.source = str(moved / "source")
  config.split = write_list(tmp_path / "copy.txt", 2, 1)
  prepare.require_prepared(config, moved / "data")
  assert prepare.prepare(config, moved / "data") == report
  config.source = ""
  prepare.require_prepared(config, moved / "data")


def test_other_patients_are_refused(source, tmp_path):
  data = tmp_path / "data"
  prepare.prepare(data_config(source=str(source)), data)
  other = shutil.copytree(source, tmp_path / "other")
  prepare.require_prepared(data_config(source=str(other)), data)
  np.savez(other / "data_00009.npz", **patient())
  with pytest.raises(ValueError, match="source .*source, but data.source is "):
    prepare.require_prepared(data_config(source=str(other)), data)
  # Where files were added later, what was prepared is what was asked for; but
  # asked to prepare it again, one wants the new ones.
  np.savez(source / "data_00009.npz", **patient())
  prepare.require_prepared(data_config(source=str(source)), data)
  with pytest.raises(FileExistsError, match=r"files 3 \(.*now 4 \("):
    prepare.prepare(data_config(source=str(source)), data)


def test_another_use_of_the_csv_is_refused(source, tmp_path):
  data, config = tmp_path / "data", data_config(source=str(source))
  prepare.prepare(config, data)
  uses = {"data_00001": "test", "data_00002": "train", "data_00003": "test"}
  write_csv(source, uses)
  message = r"split use \(sha256 .*\), but data.split is use \(sha256 .*\)\."
  with pytest.raises(ValueError, match=message):
    prepare.require_prepared(config, data)


def test_other_phantoms_are_refused(tmp_path):
  config = data_config(source="phantom", size=(32, 32), num_points=32)
  prepare.prepare(config, tmp_path)
  prepare.require_prepared(config, tmp_path)
  # As before there was `added`.
  made = "phantom, balanced False, seed 0, test 1, test_seed 0, train 9"
  assert storage.require(tmp_path).settings["source"] == made
  for field in ("train", "test", "seed", "test_seed", "balanced", "added"):
    other = config.copy_and_resolve_references()
    value = other.phantom[field] = type(other.phantom[field])(12)
    asked = f"source phantom.*source is phantom.* {field} {value}"
    with pytest.raises(ValueError, match=asked):
      prepare.require_prepared(other, tmp_path)
  other = data_config(source="/gone", size=(32, 32), num_points=32)
  with pytest.raises(ValueError, match=r"but data\.source is /gone"):
    prepare.require_prepared(other, tmp_path)


def test_what_is_missing_is_asked_for_and_nothing_else(source, tmp_path):
  data = tmp_path / "not yet"
  command = "fairdiff prepare --config CONFIG --config.data.source="
  where = f"--config.data.directory='{data}'"
  with pytest.raises(FileNotFoundError) as error:
    prepare.require_prepared(data_config(source=str(source)), data)
  assert f"{command}{source} {where}" in str(error.value)
  with pytest.raises(FileNotFoundError) as error:
    storage.load(data, "train")
  assert f"{command}NPZ_DIRECTORY {where}" in str(error.value)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"attribute": "rase"}, "No attribute 'rase'. Did you mean 'race'"),
    ({"source": ""}, "data.source is empty; give --config.data.source="),
  ],
)
def test_prepare_refuses_before_it_reads(source, tmp_path, changes, message):
  config = data_config(**{"source": str(source)} | changes)
  with pytest.raises(ValueError, match=message):
    prepare.prepare(config, tmp_path / "data")
  assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("name", ["a[1]", "b\\c"])
@pytest.mark.parametrize("made_up", [True, False])
def test_paths_that_cannot_be_read_again_are_refused(
  source, tmp_path, name, made_up
):
  config = data_config(source="phantom" if made_up else str(source))
  with pytest.raises(ValueError, match="could not be read again, because of"):
    prepare.prepare(config, tmp_path / name)
  assert not (tmp_path / name).exists()
  source.rename(tmp_path / name)  # patients may lie anywhere
  assert prepare.check(tmp_path / name, progress=False).usable == 3
  config.source = str(tmp_path / name)
  assert prepare.prepare(config, tmp_path / "data").usable == 3


def test_data_in_a_path_that_cannot_be_read_says_so(source, tmp_path):
  prepare.build(source, tmp_path / "data", **BUILD)
  odd = (tmp_path / "data").rename(tmp_path / "data[1]")
  for read in (prepare.check, storage.digest, read_all):
    with pytest.raises(ValueError, match="could not be read again, because of"):
      read(odd)


def test_digest_is_that_of_the_cases(source, tmp_path):
  def digest(name, **options):
    prepare.build(source, tmp_path / name, **BUILD | options)
    return storage.digest(tmp_path / name)

  first = digest("first")
  assert len(first) == 64
  assert digest("same") == first
  assert digest("points", num_points=32) != first
  assert digest("size", size=(40, 40)) != first
  found = [first]
  for i, changes in enumerate(({"race": 0}, {"slo_fundus": patient()})):
    if i:
      changes = {"slo_fundus": np.flipud(patient()["slo_fundus"])}
    np.savez(source / "data_00003.npz", **patient(**changes))
    found.append(digest(f"case {i}"))
  write_csv(source, {f"data_0000{i}": "training" for i in (1, 2, 3)})
  found.append(digest("split"))
  (source / "data_00003.npz").rename(source / "data_00004.npz")
  write_csv(source, {f"data_0000{i}": "training" for i in (1, 2, 4)})
  found.append(digest("name"))
  assert len(set(found)) == len(found)


def test_digest_of_data_that_has_none(source, tmp_path):
  """Earlier versions stored fewer facts."""
  data = tmp_path / "data"
  prepare.build(source, data, **BUILD)
  digest = storage.digest(data)
  (path,) = data.glob("fair_seg/*/metadata.json")
  facts = json.loads(path.read_text())
  for key in ("digests", "left_out", "round_trip", "worst"):
    del facts[key]
  facts["settings"] |= {"split": "use", "source": "/elsewhere"}
  del facts["settings"]["files"]
  path.write_text(json.dumps(facts))
  assert storage.digest(data) == digest
  prepare.require_prepared(data_config(source=str(source)), data)
  assert "3 cases usable" in str(prepare.check(data))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  root = tmp_path_factory.mktemp("prepared")
  prepare.build(write_source(root / "source"), root / "data", **BUILD)
  files = sorted((root / "data").glob("fair_seg/*/*"))
  return root, {path: path.read_bytes() for path in files}


def read_all(directory):
  """Reads the records, not what has been unpacked of them."""
  shutil.rmtree(directory / storage.ARRAYS, ignore_errors=True)
  return [storage.load(directory, s, progress=False) for s in ("train", "test")]


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("damage", ["missing", "empty", "text", "cut"])
def test_damaged_prepared_data_is_named(prepared, number, damage):
  root, contents = prepared
  path, content = list(contents.items())[number]
  if damage == "missing":
    path.unlink()
  else:
    cut = content[: len(content) // 2]
    path.write_bytes({"empty": b"", "text": b"text", "cut": cut}[damage])
  build = [root / "source", root / "data"]
  try:
    remedy = r"the prepared data cannot be read .*; .*delete .*1\.0\.0 and pre"
    with pytest.raises(ValueError, match=remedy) as error:
      read_all(root / "data")
    assert str(root / "data") in str(error.value)
    if path.suffix == ".json":  # nor is it taken for prepared
      with pytest.raises(ValueError, match=remedy):
        prepare.build(*build, **BUILD)
  finally:
    path.write_bytes(content)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(st.data())
def test_changed_bytes_are_noticed_or_harmless(prepared, data):
  root, contents = prepared
  path, content = data.draw(st.sampled_from(list(contents.items())))
  changed = bytearray(content)
  last = min(len(content), 20_000) - 1  # shards are filled up with zeros
  for _ in range(data.draw(st.integers(1, 3))):
    changed[data.draw(st.integers(0, last))] = data.draw(st.integers(0, 255))
  path.write_bytes(changed)
  try:
    found = read_all(root / "data")
  except ValueError as error:
    assert str(root / "data") in str(error)
    return
  finally:
    path.write_bytes(content)
  for cases, expected in zip(found, read_all(root / "data"), strict=True):
    assert cases.name == expected.name
    np.testing.assert_array_equal(cases.image, expected.image)
    np.testing.assert_array_equal(cases.points, expected.points)


def test_cases_that_were_not_prepared_are_noticed(prepared):
  """Sound files, of other cases."""
  root, contents = prepared
  test, train = (p for p in contents if "array_record" in p.name)
  test.write_bytes(contents[train])
  try:
    with pytest.raises(ValueError, match="not those that were prepared"):
      read_all(root / "data")
  finally:
    test.write_bytes(contents[test])


@pytest.mark.parametrize("name", ["image.npy", "points.npy", "rest.npz"])
def test_damaged_arrays_are_unpacked_again(prepared, name):
  root, _ = prepared
  whole = storage.load(root / "data", "train", progress=False)
  (path,) = (root / "data" / storage.ARRAYS).glob(f"train_*/{name}")
  content = path.read_bytes()
  path.unlink()  # what is mapped stays
  path.write_bytes(content[:-40] + bytes(40))
  again = storage.load(root / "data", "train", progress=False)
  assert path.read_bytes() == content
  np.testing.assert_array_equal(again.image, whole.image)
  assert not again.image.flags.writeable
  path.unlink()
  path.write_bytes(content[:-40])
  storage.load(root / "data", "train", progress=False)
  assert path.read_bytes() == content


def test_data_that_nobody_may_write_to_is_read(prepared, monkeypatch):
  root, _ = prepared
  whole, _ = read_all(root / "data")
  shutil.rmtree(root / "data" / storage.ARRAYS)

  def refuse(path):
    raise PermissionError(13, "Permission denied", str(path))

  monkeypatch.setattr(storage.files, "new_directory", refuse)
  found = storage.load(root / "data", "train", progress=False)
  assert not (root / "data" / storage.ARRAYS).exists()
  np.testing.assert_array_equal(found.image, whole.image)
  np.testing.assert_array_equal(found.intensity, whole.intensity)


def test_a_full_disk_is_named(source, tmp_path, monkeypatch):
  def full(*args, **kwargs):
    raise RuntimeError("write() failed: No space left on device")

  monkeypatch.setattr(storage.Prepared, "download_and_prepare", full)
  with pytest.raises(OSError, match=r"data: .*No space left .*; make room"):
    prepare.build(source, tmp_path / "data", **BUILD)


def test_the_cases_of_a_split_are_counted(source, tmp_path):
  directory = tmp_path / "data"
  prepare.build(source, directory, **BUILD)
  train = storage.load(directory, "train", progress=False)
  assert storage.num_cases(directory, "train") == len(train.name) > 0
  assert storage.num_cases(directory, "another") == 0


def test_data_beyond_a_gigabyte_needs_no_tensorflow(tmp_path, monkeypatch):
  monkeypatch.setattr(storage.shuffle, "MAX_MEM_BUFFER_SIZE", 100)
  prepare.build(write_source(tmp_path / "source"), tmp_path / "data", **BUILD)
  names = [cases.name for cases in read_all(tmp_path / "data")]
  assert names == [["data_00003"], ["data_00001", "data_00002"]][::-1]
