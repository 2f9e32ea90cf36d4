"""Who is trained on: the csv's column, lists, cases that are there twice."""

import codecs

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from patients import BUILD, patient, write_csv, write_source

from fairdiff_jax.data import prepare, splits, storage


@pytest.fixture
def source(tmp_path):
  return write_source(tmp_path / "source")


def names(directory, parts=("train", "test")):
  return {
    part: storage.load(directory, part, progress=False).name for part in parts
  }


def test_faults_of_the_csv_set_cases_aside(source, tmp_path):
  write_csv(
    source,
    {"data_00001": "training", "data_00002": "maybe", "data_00009": "test"},
  )
  report = prepare.build(source, tmp_path / "data", **BUILD)
  assert report.usable == 1
  reasons = dict(report.set_aside)
  assert reasons["data_00002.npz"] == (
    "its use in data_summary.csv is 'maybe'; write training or train or 1,"
    " validation or val, test or 0, or, to leave it out, unused."
  )
  assert "has no row in data_summary.csv" in reasons["data_00003.npz"]
  assert report.notes == [
    "1 of 3 names in data_summary.csv have no file.",
  ]


def test_cases_are_left_out_on_purpose(source, tmp_path):
  np.savez(source / "data_00004.npz", **patient())
  uses = ("Training", "validation", "test", "unused")
  rows = {f"data_0000{i}": use for i, use in enumerate(uses, 1)}
  write_csv(source, rows)
  report = prepare.build(source, tmp_path / "data", **BUILD)
  assert (report.usable, report.set_aside) == (3, [])
  assert report.left_out == {"unused": 1}
  line = "1 cases are left out, as their use says (unused: 1)."
  assert line in str(report)
  parts = ("train", "validation", "test")
  assert names(tmp_path / "data", parts) == {
    "train": ["data_00001"],
    "validation": ["data_00002"],
    "test": ["data_00003"],
  }
  report = prepare.build(source, tmp_path / "b", validation=0.2, **BUILD)
  assert report.notes[-1].endswith("data.validation=0.2 holds no others out.")
  assert names(tmp_path / "b", parts) == names(tmp_path / "data", parts)


def test_values_that_cannot_be_read_are_noted(source, tmp_path):
  np.savez(source / "data_00003.npz", **patient(gender="x", race="Martian"))
  row = {"use": "training", "ethnicity": "klingon", "race": "Black"}
  rows = dict.fromkeys(("data_00001", "data_00002"), row)
  write_csv(source, rows | {"data_00003": row | {"use": "test"}})
  report = prepare.build(source, tmp_path / "data", **BUILD)
  assert report.set_aside == []
  assert report.notes[1:] == [
    "ethnicity: 'klingon' in 3 cases cannot be read and count as unknown; read"
    " are the codes of the file's dialect and the words non-hispanic, hispanic,"
    " non hispanic, not hispanic or unknown.",
    "gender: 'x' in 1 cases cannot be read and count as unknown; read are the"
    " codes of the file's dialect and the words female, male, f, m or unknown.",
  ]
  assert report.counts["train"]["ethnicity"]["Unknown"] == 2
  assert report.counts["test"]["gender"]["Unknown"] == 1
  assert report.counts["test"]["race"]["Black"] == 1  # the csv knows


def test_split_by_the_column_train(source, tmp_path):
  (source / "data_summary.csv").write_text(
    "filename,train,race\ndata_00001.npz,1,White\ndata_00002.npz,0,Asian\n"
  )
  report = prepare.build(source, tmp_path / "data", **BUILD)
  assert report.counts["train"]["gender"]["Female"] == 1
  assert report.counts["test"]["gender"]["Female"] == 1


@pytest.mark.parametrize(
  "data",
  [
    "ethnicity\n".encode("utf-16-le"),
    "filename,use\ndata_00001,trainé\n".encode("latin-1"),
    b'"' + b"a" * 200_000,
    b"name,use\n",
  ],
)
def test_a_csv_that_cannot_be_read_is_named(source, tmp_path, data):
  path = source / "data_summary.csv"
  path.write_bytes(data)
  with pytest.raises(ValueError, match=r"data_summary\.csv"):
    prepare.build(source, tmp_path / "data", **BUILD)
  report = prepare.check(source, progress=False)
  assert report.usable == 3
  assert report.notes[-1].startswith(f"There is no split to show: {path}")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_split_by_list(source, tmp_path, encoding):
  (source / "data_summary.csv").unlink()
  split = tmp_path / "train.txt"
  split.write_text("data_000002.npz\r\ndata_00003\n\n", encoding=encoding)
  report = prepare.build(source, tmp_path / "data", split=split, **BUILD)
  assert report.settings["split"].startswith("train.txt (sha256 ")
  assert names(tmp_path / "data") == {
    "train": ["data_00002", "data_00003"],
    "test": ["data_00001"],
  }
  split.write_text("data_00001")
  with pytest.raises(FileExistsError, match="split"):
    prepare.build(source, tmp_path / "data", split=split, **BUILD)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    (
      "data_00002\ndata_0003x\nnobody\n",
      r"train.txt: the line 'data_0003x' names no file in .*source \(did you"
      r" mean data_00003.npz\?\), one of 2 such lines; correct or remove them",
    ),
    (
      "data_00002\nlists/data_000002.npz\n",
      "train.txt names one case twice, as 'data_00002' and"
      r" 'lists/data_000002.npz'; remove one of the lines",
    ),
  ],
)
def test_lines_of_a_list_that_do_not_name_one_case(
  source, tmp_path, text, message
):
  split = tmp_path / "train.txt"
  split.write_text(text)
  with pytest.raises(ValueError, match=message):
    prepare.build(source, tmp_path / "data", split=split, **BUILD)
  assert not (tmp_path / "data").exists()


def test_a_case_in_two_files_is_set_aside(source):
  (source / "data_000001.npz").write_bytes(
    (source / "data_00001.npz").read_bytes()
  )
  report = prepare.check(source, progress=False)
  reason = "data_000001.npz, data_00001.npz are one case by their names;"
  assert report.set_aside == [
    ("data_000001.npz", f"{reason} keep one."),
    ("data_00001.npz", f"{reason} keep one."),
  ]
  assert report.usable == 2


def test_a_case_in_two_rows_is_set_aside(source):
  rows = {"data_00001": "training", "data_00002": "training"}
  write_csv(source, rows | {"data_00003": "test", "data_000002": "test"})
  report = prepare.check(source, progress=False)
  assert report.set_aside == [
    (
      "data_00002.npz",
      "has 2 rows in data_summary.csv (data_00002.npz, data_000002.npz); keep"
      " one.",
    )
  ]


def test_a_split_is_its_content(source, tmp_path):
  def listed(name, text):
    (tmp_path / name).write_bytes(text)
    return splits.describe(str(tmp_path / name))

  one = listed("a.txt", b"data_00001\ndata_00002.npz\n")
  other = listed("b.txt", codecs.BOM_UTF8 + b"data_2\r\n\r\ndata_000001")
  assert one.partition(" ")[0] == "a.txt"
  assert splits.same(one, other)
  assert not splits.same(one, listed("a.txt", b"data_00001"))
  (tmp_path / "a.txt").unlink()
  gone = splits.describe(str(tmp_path / "a.txt"))
  assert splits.same(one, gone)
  assert not splits.same(other, gone)
  by_column = splits.describe("use", source)
  assert not splits.same(one, by_column)
  assert splits.same(by_column, "use")
  write_csv(source, {"data_00001": "test", "data_00002": "train"})
  assert not splits.same(by_column, splits.describe("use", source))


def test_validation_cases_come_from_the_training_cases(tmp_path):
  source = tmp_path / "source"
  source.mkdir()
  uses = {}
  for i in range(1, 13):
    name = f"data_{i:05d}"
    np.savez(source / f"{name}.npz", **patient(race=i % 2))
    uses[name] = "test" if i > 10 else "training"
  write_csv(source, uses)
  whole, held = tmp_path / "whole", tmp_path / "held"
  prepare.build(source, whole, **BUILD)
  prepare.build(source, held, validation=0.2, **BUILD)
  parts = names(held, ("train", "validation", "test"))
  assert sorted(parts["train"] + parts["validation"]) == names(whole)["train"]
  assert parts["test"] == names(whole)["test"]
  validation = storage.load(held, "validation", progress=False)
  assert sorted(validation.attributes["race"]) == [0, 1]  # of every group
  assert storage.digest(held) != storage.digest(whole)
  with pytest.raises(FileExistsError, match=r"validation 0\.2 \(now none\)"):
    prepare.build(source, held, **BUILD)


@given(st.data())
@settings(max_examples=60, derandomize=True, deadline=None)
def test_patients_are_held_out_whole_and_of_every_group(data):
  n = data.draw(st.integers(1, 60))
  patient_of = data.draw(st.lists(st.integers(0, 19), min_size=n, max_size=n))
  patients = [f"p{i}" for i in patient_of]
  group = np.array([i % 4 - 1 for i in patient_of])  # a patient has one
  share = data.draw(st.sampled_from([0.0, 0.1, 0.25, 0.5]))
  chosen = splits.hold_out(group, patients, share)
  held = {p for p, c in zip(patients, chosen, strict=True) if c}
  assert held.isdisjoint(
    p for p, c in zip(patients, chosen, strict=True) if not c
  )
  for code in np.unique(group):
    of = group == code
    several = len({p for p, o in zip(patients, of, strict=True) if o}) > 1
    assert chosen[of].any() == (several and share > 0)
    assert not chosen[of].all()
  order = np.random.default_rng(0).permutation(n)
  shuffled = splits.hold_out(group[order], [patients[i] for i in order], share)
  np.testing.assert_array_equal(shuffled, chosen[order])
