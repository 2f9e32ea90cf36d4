"""Strict reading of foreign checkpoints.

Every tensor of a checkpoint is used or excused by name, every parameter of the
network is filled, and no shape is adjusted in silence.
"""

import contextlib
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from fairdiff_jax import array_files, files

PYTORCH = (".pth", ".pt", ".ckpt", ".bin")
# What PyTorch says of a file whose reading takes more than tensors.
_CODE = (
  r"(?:GLOBAL|class) ([\w.]+\.[\w.]+)|with (TorchScript archives|files .*tar)"
)


def read(path: str | Path) -> dict[str, np.ndarray]:
  """A file's tensors by name; floating-point ones of PyTorch's as float32.

  Args:
    path: .safetensors, .npz, or PyTorch's .pth, .pt, .ckpt or .bin, which need
      PyTorch; nothing that could run code is read.

  Raises:
    FileNotFoundError: no such file.
    ImportError: PyTorch is needed and not installed.
    ValueError: the file is damaged, or holds other things than tensors.
  """
  path = files.require_whole(path)
  if path.suffix == ".npz":
    return array_files.read_npz(path)
  if path.suffix == ".safetensors":
    try:
      return safetensors.numpy.load_file(path)
    except Exception as error:
      raise ValueError(
        f"{path} is damaged or cut short ({error}); download or copy it again"
      ) from error
  if path.suffix in PYTORCH:
    return _read_pytorch(path)
  raise ValueError(
    f"{path}: its name ends neither in .safetensors nor in .npz nor in"
    f" {', '.join(PYTORCH)} of PyTorch; name a file of weights"
  )


def _read_pytorch(path):
  try:
    import torch
  except ImportError as error:
    raise ImportError(
      f"reading {path} needs PyTorch: pip install torch, or convert the file to"
      " .safetensors"
    ) from error
  try:
    content = torch.load(path, map_location="cpu", weights_only=True)
  except Exception as error:
    # PyTorch's own words advise to run what is in the file.
    held = re.search(_CODE, str(error))
    if held:
      raise ValueError(
        f"{path} cannot be read as tensors alone: it holds"
        f" {held[1] or held[2]}, and what"
        " can run code is never loaded; get its state dict alone, or"
        " .safetensors"
      ) from error
    raise ValueError(
      f"{path} is damaged, cut short or not PyTorch's"
      f" ({type(error).__name__}); download or copy it again"
    ) from error
  tensors = content
  if isinstance(content, Mapping):
    tensors = content.get("state_dict", content)
  if not isinstance(tensors, Mapping):
    raise ValueError(
      f"{path} holds no tensors by name but {type(tensors).__name__}; save a"
      " state dict"
    )
  odd = [k for k, v in tensors.items() if not isinstance(v, torch.Tensor)]
  if odd:
    raise ValueError(
      f"{path}: not tensors: {files.some(sorted(map(repr, odd)))}; save its"
      " state dict alone"
    )
  arrays = {}
  for name, tensor in tensors.items():
    if tensor.is_floating_point():
      tensor = tensor.float()  # NumPy has no bfloat16
    try:
      arrays[str(name)] = tensor.detach().numpy()
    except (RuntimeError, TypeError) as error:
      raise ValueError(
        f"{path}: tensor {name!r} is no plain array ({tensor.layout},"
        f" {tensor.dtype}); save it as one"
      ) from error
  return arrays


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
  """Puts the file's path before what is wrong with it."""
  try:
    yield
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


class Source:
  """A checkpoint's arrays by name, and which of them have been used.

  Attributes:
    arrays: anything that `np.asarray` reads, such as PyTorch's CPU tensors.
  """

  def __init__(self, arrays: Mapping[str, Any]):
    self.arrays = arrays
    self._used = set()

  def __contains__(self, name: str) -> bool:
    return name in self.arrays

  def take(self, name: str, ndim: int | None = None) -> np.ndarray:
    """Returns a tensor as float32 and records its use.

    Raises:
      ValueError: the checkpoint has no such tensor, or it holds no numbers, or
        not as many axes as `ndim`.
    """
    if name not in self.arrays:
      near = difflib.get_close_matches(name, self.arrays, n=1, cutoff=0)
      hint = f"; the nearest name is {near[0]!r}" if near else ""
      raise ValueError(f"the checkpoint has no tensor {name!r}{hint}")
    self._used.add(name)
    array = np.asarray(self.arrays[name])
    if ndim is not None and array.ndim != ndim:
      raise ValueError(
        f"tensor {name!r} has shape {array.shape}, not {ndim} axes"
      )
    try:
      return array.astype(np.float32)
    except (TypeError, ValueError) as error:
      raise ValueError(
        f"tensor {name!r} holds {array.dtype}, not numbers"
      ) from error

  def finish(self, excused: Sequence[str] = ()) -> None:
    """Checks that every tensor was taken.

    Args:
      excused: regular expressions of whole names that may be left.

    Raises:
      ValueError: tensors are left over; the message names the first.
    """
    unused = sorted(
      repr(name)
      for name in self.arrays
      if name not in self._used
      and not any(re.fullmatch(pattern, name) for pattern in excused)
    )
    if unused:
      raise ValueError(
        f"unused tensors in the checkpoint: [{files.some(unused)}]"
      )


def dense(weight: np.ndarray) -> np.ndarray:
  """Kernel of a dense layer: [out, in] -> [in, out]."""
  return weight.T


def conv(weight: np.ndarray) -> np.ndarray:
  """Kernel of a 2-D convolution: [out, in, H, W] -> [H, W, in, out]."""
  return weight.transpose(2, 3, 1, 0)


def require_shapes(tree: Any, expected: Any) -> None:
  """Checks a tree of arrays against the shapes that a network has.

  Args:
    tree: arrays.
    expected: the network's variables, or their `jax.eval_shape`.

  Raises:
    ValueError: leaves are missing, too many or of another shape; the message
      names the first.
  """
  found, wanted = _shapes(tree), _shapes(expected)
  wrong = [
    f"{path}: {found.get(path, 'missing')}, not {wanted.get(path, 'expected')}"
    for path in sorted(found.keys() | wanted.keys())
    if found.get(path) != wanted.get(path)
  ]
  if wrong:
    raise ValueError("wrong shapes:\n  " + files.some(wrong, "\n  "))


def require_sizes(
  what: str,
  found: Mapping[str, Any],
  wanted: Mapping[str, Any],
  fields: Mapping[str, str],
  remedy: str = "name other weights",
) -> None:
  """Checks what weights are of against what the config asks for.

  Args:
    what: names the weights, and what they are not, in the message.
    found: the weights' sizes by name.
    wanted: the config's, among others perhaps.
    fields: names of the sizes -> fields of the config that set them.
    remedy: what may be done instead of setting them.

  Raises:
    ValueError: some differ; the message names the fields to set.
  """

  def plain(value):
    return tuple(value) if isinstance(value, list | tuple) else value

  settable, fixed = [], []
  for name, value in found.items():
    value, asked = plain(value), plain(wanted[name])
    if value == asked:
      continue
    if name in fields:
      settable.append(f"{fields[name]}={value} (now {asked})")
    else:
      fixed.append(f"its {name} is {value}, and {asked} is needed")
  if fixed:
    raise ValueError(
      f"{what}: {'; '.join([*fixed, *settable])}; name other weights"
    )
  if settable:
    raise ValueError(f"{what}: set {', '.join(settable)}, or {remedy}")


def _shapes(tree):
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): np.shape(leaf)
    for path, leaf in leaves
  }
