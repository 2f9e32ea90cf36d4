"""Strict reading of foreign checkpoints.

Every tensor of a checkpoint is used or excused by name, every parameter of the
network is filled, and no shape is adjusted in silence.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np


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
