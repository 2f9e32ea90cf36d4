r"""Penalties on unequal group risks.

A regularizer adds lambda * Omega(R_1..R_G) to the empirical risk. Groups with
no case in the batch take no part. Over the P groups present, with mean risk
Rbar = sum_g R_g / P:

    variance   sum_g (R_g - Rbar)^2 / P
    gap        max_g R_g - min_g R_g
    worst      tau log( sum_g exp(R_g / tau) / P ) - Rbar

Every penalty is >= 0, and 0 where the risks are equal.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Regularizer(NamedTuple):
  """`init(G) -> state`; `penalty(risk, count, state) -> (scalar, state)`."""

  init: Callable[[int], Any]
  penalty: Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


def _mean(x, present):
  return jnp.sum(jnp.where(present, x, 0)) / jnp.maximum(present.sum(), 1)


def _variance(risk, present):
  return _mean((risk - _mean(risk, present)) ** 2, present)


def _gap(risk, present):
  highest = jnp.max(risk, where=present, initial=-jnp.inf)
  lowest = jnp.min(risk, where=present, initial=jnp.inf)
  return jnp.where(present.any(), highest - lowest, 0)


def _worst(risk, present, temperature):
  scaled = jnp.where(present, risk / temperature, -jnp.inf)
  # An empty batch would make every entry -inf and the gradient NaN.
  scaled = jnp.where(present.any(), scaled, 0)
  count = jnp.maximum(present.sum(), 1)
  soft = jax.nn.logsumexp(scaled) - jnp.log(count)
  soft = temperature * soft - _mean(risk, present)
  return jnp.where(present.any(), soft, 0)


def make_regularizer(name: str, temperature: float = 0.1) -> Regularizer:
  """Looks up a regularizer.

  Args:
    name: 'none', 'variance', 'gap' or 'worst'.
    temperature: tau of 'worst', in units of the loss; towards 0 it becomes
      the worst group's excess over the mean.

  Raises:
    ValueError: if `name` is unknown.
  """
  penalties = {
    "none": lambda risk, present: jnp.zeros((), risk.dtype),
    "variance": _variance,
    "gap": _gap,
    "worst": lambda risk, present: _worst(risk, present, temperature),
  }
  if name not in penalties:
    raise ValueError(
      f"unknown fairness method {name!r}; use one of {', '.join(penalties)}"
    )
  penalty = penalties[name]
  return Regularizer(
    init=lambda num_groups: (),
    penalty=lambda risk, count, state: (penalty(risk, count > 0), state),
  )
