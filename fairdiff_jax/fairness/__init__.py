"""Fairness methods, for any training loop that has a loss for every case.

A method adds Omega to the mean loss of a batch. Like an optimiser of optax it
is a pair of pure functions: `init` makes its state, `penalty` gives Omega and
the next state.

>>> import jax.numpy as jnp
>>> from fairdiff_jax import fairness
>>> method = fairness.group_dro(step_size=0.01)
>>> state = method.init([90, 10])  # training cases of every group
>>> losses, group = jnp.array([0.2, 0.4, 0.9]), jnp.array([0, 0, 1])
>>> seen = fairness.evidence(losses, group, num_groups=2)
>>> omega, state = method.penalty(seen, state)
>>> round(float(losses.mean() + omega), 3)  # to be minimised
0.601

Under `jit` over a mesh nothing more is needed; where every device sees its own
cases alone (`pmap`, `shard_map`), `evidence` takes the axis' name.
"""

import importlib as _importlib

_HOMES = {
  "regularizers": (
    *("erm", "variance", "gap", "worst", "equity", "mmd", "group_dro"),
    *("febs", "febs_published", "evidence", "dice_terms"),
    *("Evidence", "Regularizer", "DiceTerms"),
  ),
  "risk": ("group_risk", "RunningRisk"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [*_HOME]


def __getattr__(name: str):
  if name not in _HOME:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  home = _importlib.import_module(f"{__name__}.{_HOME[name]}")
  return getattr(home, name)


def __dir__():
  return sorted({*globals(), *__all__})
