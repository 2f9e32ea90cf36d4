"""Strict reading of foreign checkpoints.

Every tensor of a checkpoint is used or excused by name, every parameter of the
network is filled, and no shape is adjusted in silence.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy


def read(path: str | Path) -> dict[str, np.ndarray]:
  """A file's tensors by name; floating-point ones of a .pth as float32.

  Args:
    path: .safetensors, or PyTorch's .pth or .ckpt, which needs PyTorch and is
      read without running any code that is in it.

  Raises:
    ImportError: PyTorch is needed and not installed.
    ValueError: the file holds other things than tensors.
  """
  path = Path(path)
  if path.suffix == ".safetensors":
    return safetensors.numpy.load_file(path)
  try:
    import torch
  except ImportError as error:
    raise ImportError(
      f"reading {path} needs PyTorch; install it, or convert the file to"
      " .safetensors"
    ) from error
  try:
    content = torch.load(path, map_location="cpu", weights_only=True)
  except Exception as error:
    raise ValueError(
      f"{path} cannot be read as tensors alone; save its state dict alone, or "
      f"as .safetensors: {error}"
    ) from error
  tensors = content.get("state_dict", content)
  odd = [k for k, v in tensors.items() if not isinstance(v, torch.Tensor)]
  if odd:
    raise ValueError(f"{path}: not tensors: {sorted(odd)}")
  # NumPy has no bfloat16.
  return {
    k: (v.float() if v.is_floating_point() else v).numpy()
    for k, v in tensors.items()
  }


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

  def take(self, name: str) -> np.ndarray:
    """Returns a tensor as float32 and records its use.

    Raises:
      ValueError: the checkpoint has no such tensor.
    """
    if name not in self.arrays:
      near = difflib.get_close_matches(name, self.arrays, n=1, cutoff=0)
      hint = f"; the nearest name is {near[0]!r}" if near else ""
      raise ValueError(f"the checkpoint has no tensor {name!r}{hint}")
    self._used.add(name)
    return np.asarray(self.arrays[name]).astype(np.float32)

  def finish(self, excused: Sequence[str] = ()) -> None:
    """Checks that every tensor was taken.

    Args:
      excused: regular expressions of whole names that may be left.

    Raises:
      ValueError: tensors are left over; the message lists them.
    """
    unused = [
      name
      for name in self.arrays
      if name not in self._used
      and not any(re.fullmatch(pattern, name) for pattern in excused)
    ]
    if unused:
      raise ValueError(f"unused tensors in the checkpoint: {sorted(unused)}")


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
      lists them.
  """
  found, wanted = _shapes(tree), _shapes(expected)
  wrong = [
    f"{path}: {found.get(path, 'missing')}, not {wanted.get(path, 'expected')}"
    for path in sorted(found.keys() | wanted.keys())
    if found.get(path) != wanted.get(path)
  ]
  if wrong:
    raise ValueError("wrong shapes:\n  " + "\n  ".join(wrong))


def _shapes(tree):
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): np.shape(leaf)
    for path, leaf in leaves
  }
