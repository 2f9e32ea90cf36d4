"""Files: written whole or not at all, read without trust.

Whatever a reader here cannot read is a ValueError that names the file, what is
wrong with it and what to do; never an error of the format's own library.
"""

import contextlib
import csv
import hashlib
import io
import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import (
  Iterable,
  Iterator,
  Sequence,
)
from pathlib import Path
from typing import Any

LEFTOVER = "incomplete_"  # how a directory is called while it is filled
OWNER = "owner.json"  # who writes to a directory
SILENT = 120  # seconds after which the owner on another host is taken for dead
_HOST = re.sub(r"\W|_", "-", socket.gethostname())
_OWNED = re.compile(rf"{LEFTOVER}(?P<name>.+)_(?P<host>[^_]+)_(?P<process>\d+)")
_ABANDONED = 24 * 3600  # seconds after which another host's is no longer filled
# What a spreadsheet takes for the start of a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
# Characters that the libraries below take for patterns or separators.
_PATTERN = "[]*?{}\\"
# How the file starts that stands for one which Git LFS has not fetched.
_POINTER = b"version https://git-lfs"


class InUse(ValueError):
  """Another process writes to a directory."""


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
  """Gives an OSError that names no file, such as of a full disk, its path."""
  try:
    yield
  except OSError as error:
    if error.filename is not None or error.errno is None:
      raise
    raise OSError(error.errno, error.strerror, str(path)) from error


def write(path: str | os.PathLike, data: bytes | str) -> None:
  """Writes a file, text as UTF-8, under another name and renames it.

  Raises:
    OSError: it cannot be written; the message names it.
  """
  if isinstance(data, str):
    data = data.encode()
  with replacing(path) as temporary:
    temporary.write_bytes(data)


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
  """A name to write a file under, which is `path` when the block ends well."""
  path = Path(path)
  temporary = path.with_name(f"{LEFTOVER}{path.name}")
  with naming(path):
    try:
      yield temporary
      temporary.replace(path)
    finally:
      temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_directory(path: str | os.PathLike) -> Iterator[Path]:
  """A directory to fill, which is renamed to `path` when the block ends well.

  What is left of one that was never ended is removed, as `sweep` does it. Where
  another process has been faster, its directory is kept.

  Raises:
    OSError: it cannot be written; the message names it.
  """
  path = Path(path)
  owner = f"{_HOST}_{os.getpid()}"  # by which `sweep` knows it
  temporary = path.with_name(f"{LEFTOVER}{path.name}_{owner}")
  with naming(path):
    sweep(path.parent, path.name)
    temporary.mkdir(parents=True)
    try:
      yield temporary
      try:
        temporary.rename(path)
      except OSError:
        if not path.is_dir():
          raise
    finally:
      shutil.rmtree(temporary, ignore_errors=True)


def sweep(directory: str | os.PathLike, name: str | None = None) -> None:
  """Removes what processes that were killed have left half written.

  A directory that a living process fills is kept; one of another host, whose
  processes cannot be seen, unless nothing was written to it for a day.

  Args:
    directory: where they lie. Files tell no owner: without `name` it must be
      one in which no other process writes files.
    name: removes only directories that were to be called so.
  """
  for path in Path(directory).glob(f"{LEFTOVER}*"):
    owner = _OWNED.fullmatch(path.name)
    if name is not None and (owner is None or owner["name"] != name):
      continue
    if not path.is_dir():
      with contextlib.suppress(OSError):  # as of a directory: another user's
        path.unlink()
    elif owner is None or not _is_filled(path, owner):
      shutil.rmtree(path, ignore_errors=True)


def _is_filled(path: Path, owner: re.Match) -> bool:
  """Whether a directory's process may still be at work."""
  if owner["host"] != _HOST:
    try:
      touched = max(p.lstat().st_mtime for p in (path, *path.rglob("*")))
    except OSError:  # it has just been completed
      return True
    return time.time() - touched < _ABANDONED
  process = int(owner["process"])
  # This process's own number may be one that was used before.
  return process != os.getpid() and _started(process) is not None


@contextlib.contextmanager
def owned(directory: str | os.PathLike) -> Iterator[None]:
  """Makes this process the only one that writes to a directory, meanwhile.

  Readers need not ask. Of an owner that was killed on this host, or whose host
  has shown no sign of life for `SILENT` seconds, the directory is taken over.

  Raises:
    InUse: another process owns it.
  """
  path = Path(directory) / OWNER
  path.parent.mkdir(parents=True, exist_ok=True)
  mine = {"host": socket.gethostname(), "process": os.getpid()}
  text = json.dumps(mine | {"started": _started(os.getpid())}) + "\n"
  for _ in range(2):  # the second time, where there was an owner who is gone
    try:
      with naming(path), path.open("x") as file:
        file.write(text)
      break
    except FileExistsError:
      _require_gone(path)
      path.unlink(missing_ok=True)
  else:
    _require_gone(path)  # another was faster
  ended = threading.Event()

  def beat():
    while not ended.wait(SILENT / 6):
      with contextlib.suppress(OSError):
        path.touch()

  threading.Thread(target=beat, daemon=True).start()
  try:
    yield
  finally:
    ended.set()
    with contextlib.suppress(OSError, ValueError):
      if path.read_text() == text:
        path.unlink()


def _require_gone(path: Path) -> None:
  """Raises InUse if a directory's owner may be alive."""
  try:
    owner = read_json(path)
    host, process = owner["host"], owner["process"]
    silent = time.time() - path.stat().st_mtime
  except FileNotFoundError:
    return
  except (KeyError, ValueError):  # killed while it wrote
    host, process, silent = "unknown", 0, time.time() - path.stat().st_mtime
    owner = {}
  if host == socket.gethostname():
    alive = _started(process) == owner.get("started") is not None
  else:
    alive = silent < SILENT
  if alive:
    raise InUse(
      f"{path.parent} is in use by process {process} on {host}, as {path} says;"
      " wait for it or stop it, or give another directory"
    )


def _started(process: int) -> str | None:
  """When a process of this host started; None if there is none such."""
  try:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2]
    return fields.split()[19]
  except (OSError, IndexError):
    pass
  try:  # where there is no /proc
    os.kill(process, 0)
  except (ProcessLookupError, OverflowError):
    return None
  except OSError:  # such as another user's
    pass
  return "unknown"


def sha256(path: str | os.PathLike) -> str:
  """SHA-256 of a file's bytes."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def require_plain(path: str | os.PathLike, what: str) -> None:
  """Raises ValueError if a path's characters would be taken for a pattern.

  Args:
    path: to look at, made absolute.
    what: names it in the message, such as '--workdir'.
  """
  odd = sorted(set(_PATTERN) & set(os.path.abspath(path)))
  if odd:
    raise ValueError(
      f"{what} {path}: what is written there could not be read again, because"
      f" of {' '.join(odd)} in its path; choose a path without"
    )


def require_whole(path: str | os.PathLike) -> Path:
  """The path of a file to read, `~` expanded, once there is content in it.

  Raises:
    FileNotFoundError: no such file.
    ValueError: it is an address or a directory, empty, or Git LFS's pointer.
  """
  path = find(path)
  if path.is_dir():
    names = sorted(p.name for p in path.iterdir() if p.is_file())
    shown = f" (it holds {some(names)})" if names else ""
    raise ValueError(
      f"{path} is a directory; name the file that is meant{shown}"
    )
  with path.open("rb") as file:
    start = file.read(len(_POINTER))
  if not start:
    raise ValueError(f"{path} is empty; download or copy it again")
  if start == _POINTER:
    raise ValueError(
      f"{path} is Git LFS's pointer, not the file itself; run `git lfs pull`"
      " where it was cloned"
    )
  return path


def find(path: str | os.PathLike) -> Path:
  """A path that exists, `~` expanded.

  Raises:
    FileNotFoundError: there is nothing.
    ValueError: it is an address.
  """
  text = os.fspath(path)
  if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
    raise ValueError(
      f"{text} is an address; download what is there and name its path"
    )
  path = Path(os.path.expanduser(text))
  if not path.exists():
    where = "" if path.is_absolute() else f" in {Path.cwd()}"
    raise FileNotFoundError(
      f"{path} does not exist{where}; correct its path, or download it first"
    )
  return path


def some(items: Sequence[Any], separator: str = ", ", most: int = 5) -> str:
  """The first items as text, and how many more there are."""
  shown = [str(item) for item in items[:most]]
  if len(items) > most:
    shown.append(f"... and {len(items) - most} more")
  return separator.join(shown)


def read_text(path: str | os.PathLike) -> str:
  """Reads UTF-8, with a byte-order mark or without, or marked UTF-16.

  Raises:
    FileNotFoundError: no such file.
    ValueError: it is no text of these.
  """
  data = Path(path).read_bytes()
  marks = (b"\xff\xfe", b"\xfe\xff")
  encoding = "utf-16" if data.startswith(marks) else "utf-8-sig"
  try:
    text = data.decode(encoding)
  except UnicodeDecodeError as error:
    raise ValueError(
      f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8"
    ) from error
  if "\0" in text:
    raise ValueError(f"{path} is not text: it holds zero bytes; restore it")
  return text


def read_json(path: str | os.PathLike, remedy: str = "restore it") -> Any:
  """Reads a JSON object.

  Args:
    path: of the file.
    remedy: what to do about a damaged one.

  Raises:
    FileNotFoundError: no such file.
    ValueError: it is no JSON object.
  """
  try:
    content = json.loads(read_text(path))
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path} is damaged ({error}); {remedy}") from error
  if not isinstance(content, dict):
    raise ValueError(f"{path} is damaged (no JSON object); {remedy}")
  return content


def read_json_lines(path: str | os.PathLike) -> list[dict[str, Any]]:
  """Reads JSON objects, one a line, up to one that is cut.

  A process that is killed leaves half a line, and so does a full disk.

  Raises:
    FileNotFoundError: no such file.
    ValueError: it is no text.
  """
  records = []
  for line in read_text(path).splitlines():
    try:
      record = json.loads(line)
    except (ValueError, RecursionError):
      break
    if not isinstance(record, dict):
      break
    records.append(record)
  return records


def write_csv(
  path: str | os.PathLike,
  columns: Sequence[str],
  rows: Iterable[Sequence[Any]],
) -> None:
  """Writes a table with a header, so that spreadsheets run nothing in it.

  Text that starts like a formula is written after an apostrophe, which
  `read_csv` takes away.
  """

  def cell(value):
    return f"'{value}" if _is_formula(value) else value

  table = io.StringIO()
  writer = csv.writer(table, lineterminator="\n")
  writer.writerow(map(cell, columns))
  writer.writerows(map(cell, row) for row in rows)
  write(path, table.getvalue())


def _is_formula(value: Any) -> bool:
  """Whether it is text that runs, or would but for apostrophes before it."""
  if not isinstance(value, str):
    return False
  value = value.lstrip("'")
  if not value.startswith(_FORMULA):
    return False
  try:
    float(value)
  except ValueError:
    return True
  return value[0] not in "+-"  # a sign may start a number


def read_csv(
  path: str | os.PathLike,
) -> tuple[list[str], list[dict[str, str]]]:
  """Reads a table with a header as (columns, rows by column).

  Missing cells are empty, surplus ones are left out.

  Raises:
    FileNotFoundError: no such file.
    ValueError: it is no such table.
  """
  text = read_text(path)
  try:
    columns, *rows = list(csv.reader(io.StringIO(text, newline=""))) or [[]]
  except csv.Error as error:
    raise ValueError(
      f"{path} is not a csv table ({error}); save it as one"
    ) from error

  def cell(value):
    return value[1:] if value[:1] == "'" and _is_formula(value) else value

  columns = [cell(column) for column in columns]
  filled = [r + [""] * (len(columns) - len(r)) for r in rows if r]
  return columns, [
    dict(zip(columns, map(cell, row), strict=False)) for row in filled
  ]
