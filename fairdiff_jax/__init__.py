"""Joint training of FairDiff's three networks in JAX, and what comes of it.

>>> import fairdiff_jax
>>> config = fairdiff_jax.recipe("phantom:smoke", {"seed": 1})
>>> run = fairdiff_jax.Run("runs/second", config)
>>> run
Run('runs/second')
>>> label, found = [[[0, 1], [2, 2]]], [[[0, 1], [1, 2]]]
>>> fairdiff_jax.dice(label, found, 2).round(2)
array([0.67])

`Run` does what the commands do; `fairness` has the methods for loops of your
own; metrics and their intervals are functions of arrays. Names are imported
when they are first used.
"""

import importlib as _importlib
from pathlib import Path as _Path

__version__ = "0.1.0"

_HOMES = {
  "recipes": ("recipe",),
  "run": ("Run",),
  "fairness": (),
  "fairness.metrics": (
    *("dice", "iou", "hd95", "boundary_dice", "ratio_error"),
    *("equity_scaled", "summarize"),
  ),
  "fairness.uncertainty": ("intervals", "compare"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", "fairness", *_HOME]

# Installed, configs/ and launch/ lie in the package; in a checkout, beside it.
_CHECKOUT = _Path(__file__).resolve().parents[1]
if (_CHECKOUT / "setup.py").is_file() and (_CHECKOUT / "launch").is_dir():
  __path__.append(str(_CHECKOUT))


def __getattr__(name: str):
  if name == "fairness":
    return _importlib.import_module(f"{__name__}.fairness")
  if name not in _HOME:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  home = _importlib.import_module(f"{__name__}.{_HOME[name]}")
  return getattr(home, name)


def __dir__():
  return sorted({*globals(), *__all__})
