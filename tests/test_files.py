"""Files are complete or absent, and what cannot be read is named."""

import csv
import errno
import io
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairdiff_jax import array_files, files

ROOT = Path(__file__).parents[1]


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
  path = tmp_path / "a.txt"
  files.write(path, "old")

  def full(self, data):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(Path, "write_bytes", full)
  with pytest.raises(
    OSError, match=re.escape(f"No space left on device: '{path}'")
  ):
    files.write(path, "new")
  assert path.read_text() == "old"
  assert list(tmp_path.iterdir()) == [path]


def test_a_directory_is_complete_or_absent(tmp_path):
  path = tmp_path / "deep" / "made"
  with pytest.raises(KeyError), files.new_directory(path) as directory:
    (directory / "half").touch()
    raise KeyError
  assert not list(path.parent.iterdir())
  for _ in range(2):  # the second is slower, and keeps the first's
    with files.new_directory(path) as directory:
      (directory / "whole").touch()
  assert [p.name for p in path.iterdir()] == ["whole"]


def leftover(directory, name, process, host=None):
  """What a process that fills `name` has made so far."""
  with files.new_directory(directory / name) as made:
    head, _ = made.name.rsplit("_", 1)
  (directory / name).rmdir()
  if host:
    head = f"{files.LEFTOVER}{name}_{host}"
  path = directory / f"{head}_{process}"
  path.mkdir()
  (path / "half").touch()
  return path


def test_sweep_keeps_what_a_living_process_fills(tmp_path):
  child = subprocess.Popen(
    [sys.executable, "-c", "input()"], stdin=subprocess.PIPE
  )
  try:
    filled = leftover(tmp_path, "a_b", child.pid)
    ended = leftover(tmp_path, "c", os.getpid())  # an earlier one's number
    files.sweep(tmp_path)
    assert filled.exists() and not ended.exists()
  finally:
    child.communicate()
  files.sweep(tmp_path, "b")
  assert filled.exists()
  files.sweep(tmp_path, "a_b")
  assert not filled.exists()


def test_sweep_waits_a_day_for_other_hosts(tmp_path):
  path = leftover(tmp_path, "a", 1, host="elsewhere")
  files.sweep(tmp_path)
  assert path.exists()
  yesterday = time.time() - 25 * 3600
  for touched in (path / "half", path):
    os.utime(touched, (yesterday, yesterday))
  files.sweep(tmp_path)
  assert not path.exists()


def test_the_next_start_clears_what_a_killed_one_left(tmp_path):
  code = """
import os, sys
from fairdiff_jax import array_files, files
with files.new_directory(sys.argv[1]) as directory:
  (directory / "half").touch()
  os.kill(os.getpid(), 9)
"""
  path = tmp_path / "made"
  subprocess.run([sys.executable, "-c", code, str(path)])
  assert [p.name for p in tmp_path.glob("*/*")] == ["half"]
  with files.new_directory(path) as directory:
    assert list(tmp_path.iterdir()) == [directory]
  assert list(tmp_path.iterdir()) == [path]


def test_what_no_file_is_behind_is_named(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.chdir(tmp_path)
  (tmp_path / "empty").touch()
  (tmp_path / "pointer").write_text(
    "version https://git-lfs.github.com/spec/v1"
  )
  (tmp_path / "directory").mkdir()
  for i in range(7):
    (tmp_path / "directory" / f"{i}.npz").write_text("version 1")
  for name, error, message in (
    ("none", FileNotFoundError, f"none does not exist in {tmp_path}"),
    ("~/none", FileNotFoundError, f"{tmp_path}/none does not exist; correct"),
    ("empty", ValueError, "empty is empty; download"),
    ("~/pointer", ValueError, f"{tmp_path}/pointer is Git LFS's .* lfs pull`"),
    ("directory", ValueError, r"0.npz, .*, 4.npz, ... and 2 more\)"),
    ("https://x.org/a", ValueError, "https://x.org/a is an address; download"),
    (Path("gs://x/a"), ValueError, "gs:/x/a is an address; download"),
  ):
    with pytest.raises(error, match=message):
      files.require_whole(name)
  whole = files.require_whole("~/directory/0.npz")
  assert whole == tmp_path / "directory" / "0.npz"


def test_sweep_leaves_what_is_complete(tmp_path):
  (tmp_path / f"{files.LEFTOVER}a" / "b").mkdir(parents=True)
  (tmp_path / f"{files.LEFTOVER}c").touch()
  (tmp_path / "kept").touch()
  files.sweep(tmp_path)
  assert [p.name for p in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize("name", ["a[1]", "a]", "back\\slash", "a*", "{a}"])
def test_paths_that_are_patterns_are_refused(tmp_path, name):
  with pytest.raises(ValueError, match="--workdir .* choose a path without"):
    files.require_plain(tmp_path / name, "--workdir")
  files.require_plain(tmp_path / "spaces and ümlauts (1)", "--workdir")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_texts_of_spreadsheets_are_read(tmp_path, encoding):
  path = tmp_path / "a.csv"
  path.write_text("filename,ü\r\na,1\r\n", encoding=encoding)
  assert files.read_csv(path) == (
    ["filename", "ü"],
    [{"filename": "a", "ü": "1"}],
  )


@pytest.mark.parametrize(
  ("data", "message"),
  [
    ("é".encode("latin-1"), "is not UTF-8 text .* save it as UTF-8"),
    (b"a\0b", "zero bytes"),
    (b'"' + b"a" * 200_000, "is not a csv table"),
  ],
)
def test_other_bytes_are_no_table(tmp_path, data, message):
  path = tmp_path / "a.csv"
  path.write_bytes(data)
  with pytest.raises(ValueError, match=message) as error:
    files.read_csv(path)
  assert str(path) in str(error.value)


@given(st.lists(st.text(alphabet="=+-@'\t\n,\"a1", max_size=4), min_size=1))
def test_csv_round_trip_runs_nothing(tmp_path_factory, row):
  path = tmp_path_factory.mktemp("csv") / "a.csv"
  columns = [f"c{i}" for i in range(len(row))]
  files.write_csv(path, columns, [row, row])
  found, rows = files.read_csv(path)
  assert found == columns
  if any(row) or len(row) > 1:
    assert [list(r.values()) for r in rows] == [row, row]
  with path.open(newline="") as file:
    for cell in itertools.chain(*csv.reader(file)):
      assert not cell.startswith(("=", "@", "\t"))


def test_numbers_stay_numbers(tmp_path):
  files.write_csv(tmp_path / "a.csv", ["x"], [[-1.5], ["-2"], ["=1+1"]])
  text = (tmp_path / "a.csv").read_text()
  assert text == "x\n-1.5\n-2\n'=1+1\n"


@pytest.mark.parametrize(
  "data", [b"", b"{", b"[1]", b"\xff", b"null", b"[" * 100_000]
)
def test_damaged_json_is_named(tmp_path, data):
  path = tmp_path / "a.json"
  path.write_bytes(data)
  with pytest.raises(ValueError, match="put it back") as error:
    files.read_json(path, "put it back")
  assert str(path) in str(error.value)


def test_json_lines_end_where_they_are_cut(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
  assert files.read_json_lines(path) == [{"a": 1}, {"a": 2}]


def npz(path, **arrays):
  path.write_bytes(array_files.npz_bytes(arrays))
  return path


def test_arrays_are_read_as_they_were(tmp_path):
  arrays = {
    "a": np.arange(6.0).reshape(2, 3),
    "b": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "c": np.array(3, np.int64),
    "d": np.empty((0, 4), np.uint8),
  }
  path = npz(tmp_path / "a.npz", **arrays)
  found = array_files.read_npz(path)
  for name, array in arrays.items():
    assert found[name].dtype == array.dtype
    np.testing.assert_array_equal(found[name], array)
  assert array_files.read_npz(path, ["a"])["b"] is None


def test_what_runs_or_is_too_large_is_refused(tmp_path):
  path = tmp_path / "a.npz"
  np.savez(path, a=np.array([{}], object))
  with pytest.raises(ValueError, match=r"a.npz: array 'a' holds pickled"):
    array_files.read_npz(path)
  path = npz(path, a=np.zeros(10**6, np.uint8))
  with pytest.raises(ValueError, match="array 'a' has 1 MB, more than"):
    array_files.read_npz(path, limit=10**5)


def test_a_header_that_lies_is_refused_before_it_is_believed(tmp_path):
  header = io.BytesIO()
  np.lib.format.write_array_header_1_0(
    header, {"descr": "|u1", "fortran_order": False, "shape": (10**13,)}
  )
  path = tmp_path / "a.npz"
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("a.npy", header.getvalue() + b"12")
  with pytest.raises(ValueError, match="claims 10000000000000 bytes and has 2"):
    array_files.read_npz(path)


@given(st.data())
def test_a_damaged_file_is_named_or_read(tmp_path_factory, data):
  path = npz(tmp_path_factory.mktemp("npz") / "a.npz", a=np.arange(40))
  content = bytearray(path.read_bytes())
  for _ in range(data.draw(st.integers(1, 4))):
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] = data.draw(st.integers(0, 255))
  path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
  try:
    array_files.read_npz(path)
  except ValueError as error:
    assert str(path) in str(error)


def test_digest(tmp_path):
  path = tmp_path / "a.json"
  files.write(path, json.dumps({}))
  empty = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
  assert files.sha256(path) == empty


HOLD = """
import sys, time
from fairdiff_jax import array_files, files
with files.owned(sys.argv[1]):
  print("held", flush=True)
  time.sleep(60)
"""


def test_a_directory_has_one_owner(tmp_path):
  command = [sys.executable, "-c", HOLD, str(tmp_path)]
  with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as other:
    assert other.stdout.readline() == b"held\n"
    message = f"in use by process {other.pid} on {socket.gethostname()}"
    with pytest.raises(ValueError, match=message), files.owned(tmp_path):
      pass
    other.kill()
  for _ in range(2):  # a dead owner's, then one that was given back
    with files.owned(tmp_path):
      assert json.loads((tmp_path / files.OWNER).read_text())["process"]
    assert not list(tmp_path.iterdir())


def test_an_owner_on_another_host_is_believed_while_it_breathes(tmp_path):
  path = tmp_path / files.OWNER
  path.write_text(json.dumps({"host": "elsewhere", "process": 1}))
  with pytest.raises(ValueError, match="process 1 on elsewhere"):
    files.owned(tmp_path).__enter__()
  silent = time.time() - files.SILENT - 1
  os.utime(path, (silent, silent))
  with files.owned(tmp_path):
    assert "elsewhere" not in path.read_text()


def test_arrays_larger_than_memory_are_written_and_mapped(tmp_path):
  path = tmp_path / "some.npz"
  rows = np.arange(24, dtype=np.int16).reshape(6, 2, 2)
  words = np.array(["", "ragged"])
  with array_files.new_npz(path) as add:
    add("rows", 6, (2, 2), np.int16, (rows[i : i + 2] for i in (0, 2, 4)))
    add("words", 2, (), words.dtype, [words])
    add("none", 0, (3,), np.uint8, [])
  found = array_files.read_npz(path, mapped=True)
  np.testing.assert_array_equal(found["rows"], rows)
  np.testing.assert_array_equal(found["words"], words)
  assert found["none"].shape == (0, 3)
  assert isinstance(found["rows"].base, np.memmap)
  with np.load(path) as archive:  # any reader's file
    np.testing.assert_array_equal(archive["rows"], rows)
  path.write_bytes(path.read_bytes()[:150])
  with pytest.raises(ValueError, match=r"some\.npz.*copy it again"):
    array_files.read_npz(path, mapped=True)
  with (
    pytest.raises(ValueError, match=r"are \(2,\), not \(2, 3\)"),
    array_files.new_array(tmp_path / "rows.npy", 2, (2,), np.uint8) as append,
  ):
    append(np.zeros((2, 3)))
