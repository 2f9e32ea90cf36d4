"""Arrays in files: npz and npy, read without trust, written piece by piece.

Errors are as of `files`.
"""

import contextlib
import io
import math
import os
import struct
import threading
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fairdiff_jax import files

_HEADER = 2**14  # bytes that hold any header that NumPy reads
# NumPy parses headers with `ast`, which fails now and then in threads of Python
# 3.11 (SystemError, CPython issue 106905).
_PARSING = threading.Lock()


def read_npz(
  path: str | os.PathLike,
  names: Collection[str] | None = None,
  *,
  limit: int | None = None,
  mapped: bool = False,
) -> dict[str, np.ndarray | None]:
  """Reads the arrays of an npz file; nothing that could run is read.

  Every header is looked at before its array is unpacked.

  Args:
    path: of the file.
    names: of the arrays to read, None for all; others are None.
    limit: most bytes of an array; None for no limit but the file's own.
    mapped: whether arrays that are not compressed are memory-mapped; their
      checksums are then not looked at.

  Raises:
    FileNotFoundError: no such file.
    ValueError: the file or an array cannot be read, or is larger.
  """
  path = Path(path)
  size = path.stat().st_size
  again = "download or copy it again"
  name = None
  try:
    with zipfile.ZipFile(path) as archive:
      arrays: dict[str, np.ndarray | None] = {}
      for member in archive.infolist():
        name = member.filename.removesuffix(".npy")
        arrays[name] = None
        if names is None or name in names:
          arrays[name] = _read_array(archive, member, limit, mapped)
      return arrays
  except _Refused as error:
    raise ValueError(f"{path}: array {name!r} {error}") from error
  except Exception as error:
    where = f"array {name!r} cannot" if name else f"cannot ({size} bytes)"
    raise ValueError(
      f"{path}: {where} be read ({type(error).__name__}: {error}); {again}"
    ) from error


class _Refused(Exception):
  """An array that is not read, and why."""


def _read_array(
  archive: zipfile.ZipFile,
  member: zipfile.ZipInfo,
  limit: int | None,
  mapped: bool,
) -> np.ndarray:
  form = np.lib.format
  readers = {
    (1, 0): form.read_array_header_1_0,
    (2, 0): form.read_array_header_2_0,
  }
  with archive.open(member) as file:
    head = io.BytesIO(file.read(_HEADER))
    with _PARSING:
      version = form.read_magic(head)
      if version not in readers:
        raise _Refused(f"has version {version} of NumPy's format; save it anew")
      shape, fortran, dtype = readers[version](head)
    if dtype.hasobject:
      raise _Refused(
        "holds pickled objects, which are refused because they can run code;"
        " save it as numbers"
      )
    claimed = math.prod(shape) * dtype.itemsize
    present = member.file_size - head.tell()
    if claimed != present:
      raise _Refused(
        f"claims {claimed} bytes and has {present}; download or copy it again"
      )
    if limit is not None and claimed > limit:
      raise _Refused(
        f"has {claimed / 1e6:.0f} MB, more than the {limit / 1e6:.0f} MB that"
        " such an array may have; is it the right file?"
      )
    order: Literal["F", "C"] = "F" if fortran else "C"
    if mapped and claimed and member.compress_type == zipfile.ZIP_STORED:
      start = _start_of(archive, member) + head.tell()
      return np.asarray(
        np.memmap(str(archive.filename), dtype, "r", start, shape, order)
      )
    content = bytearray(head.read())
    content += file.read()
    array = np.frombuffer(content, dtype)
  return array.reshape(shape, order=order)


def _start_of(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> int:
  """Where the bytes of a member begin, after its local header."""
  with open(str(archive.filename), "rb") as file:
    file.seek(member.header_offset + 26)
    lengths = struct.unpack("<2H", file.read(4))
    return file.tell() + sum(lengths)


@contextlib.contextmanager
def new_npz(
  path: str | os.PathLike,
) -> Iterator[Callable[..., None]]:
  """An npz file that `read_npz` can map, written array by array.

  It has another name until the block ends well, as with `write`.

  The block is given (name, number, row, dtype, chunks): `chunks` are arrays
  [k, *row] that have `number` rows in all, which need not be in memory
  together. The same arrays give the same bytes.

  Raises:
    OSError: it cannot be written; the message names it.
  """
  with (
    files.replacing(path) as temporary,
    zipfile.ZipFile(temporary, "w") as archive,
  ):

    def add(name, number, row, dtype, chunks):
      member = zipfile.ZipInfo(f"{name}.npy")
      with archive.open(member, "w", force_zip64=True) as file:
        append = _appender(file, path, number, tuple(row), dtype)
        for chunk in chunks:
          append(chunk)

    yield add


@contextlib.contextmanager
def new_array(
  path: str | os.PathLike, number: int, row: tuple[int, ...], dtype: Any
) -> Iterator[Callable[[np.ndarray], None]]:
  """An npy file to append rows to, which may be larger than memory.

  Args:
    path: of the file.
    number: of rows that there will be.
    row: shape of a row.
    dtype: of its values.

  Raises:
    OSError: it cannot be written; a full disk is told of, as it would not be
      of a memory-mapped file.
  """
  path = Path(path)
  with files.naming(path), path.open("wb") as file:
    yield _appender(file, path, number, row, dtype)


def _appender(file, path, number, row, dtype):
  """Writes the header of an array [number, *row]; what appends rows to it."""
  dtype = np.dtype(dtype)
  header = {
    "descr": np.lib.format.dtype_to_descr(dtype),
    "fortran_order": False,
    "shape": (number, *row),
  }
  np.lib.format.write_array_header_1_0(file, header)

  def append(values):
    values = np.ascontiguousarray(values, dtype)
    if values.shape[values.ndim - len(row) :] != row:
      raise ValueError(f"rows of {path} are {row}, not {values.shape}")
    file.write(values.reshape(-1).view(np.uint8).data)

  return append


def npz_bytes(arrays: Mapping[str, np.ndarray]) -> bytes:
  """The arrays as a compressed npz file; the same arrays, the same bytes."""
  data = io.BytesIO()
  np.savez_compressed(data, **arrays)  # type: ignore[arg-type]
  return data.getvalue()
