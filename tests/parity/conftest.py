"""Lets torchvision be imported beside a PyTorch that it was not built for.

As beside PyTorch for the CPU alone: its compiled operators do not load, and two
that are missing then end its import. The peers need none of them.
"""

import torch

try:
  import torchvision  # noqa: F401
except RuntimeError:
  OPERATORS = torch.library.Library("torchvision", "DEF")  # while it is kept
  for name in ("nms", "qnms"):
    OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float at) -> Tensor")
