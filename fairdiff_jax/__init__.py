"""Joint training of FairDiff's three networks in JAX."""

from pathlib import Path as _Path

__version__ = "0.1.0"
__all__ = ["__version__"]

# Installed, configs/ and launch/ lie in the package; in a checkout, beside it.
_CHECKOUT = _Path(__file__).resolve().parents[1]
if (_CHECKOUT / "setup.py").is_file() and (_CHECKOUT / "launch").is_dir():
  __path__.append(str(_CHECKOUT))
