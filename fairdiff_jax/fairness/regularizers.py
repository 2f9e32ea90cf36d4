r"""Fairness methods: what is added to the segmenter's empirical risk.

A method adds lambda * Omega to the mean loss Rhat of a global batch. Groups
with no case in it take no part. Over the P groups present, with risks R_g and
mean risk Rbar = sum_g R_g / P:

    erm        0
    variance   sum_g (R_g - Rbar)^2 / P
    gap        max_g R_g - min_g R_g
    worst      tau log( sum_g exp(R_g / tau) / P ) - Rbar
    equity     Rbar ( sqrt(V + delta^2) - delta )
               V = sum_g (R_g - Rbar)^2 / (P - 1)
    mmd        sum_g |f_g - fbar|^2 / P, f_g the mean features of group g
    group_dro  sum_g q_g R_g - sum_g n_g R_g / n
    febs       Dice' - Dice
    adversarial  0 here; its adversary is a network of the joint objective

The first six are >= 0, and 0 where the groups are alike. `worst` is the
entropic form of the worst group's risk, which it becomes as tau -> 0. `equity`
is what equity scaling, performance / (1 + sd), adds to a risk that is
multiplied by (1 + sd), made smooth at equal risks. `mmd` is the maximum mean
discrepancy under a linear kernel.

With lambda = 1 the last ones are the published objectives:

* `group_dro` (Sagawa et al. 2020) minimises sum_g q_g R_g, where q is a
  distribution that each batch moves, before it weighs the batch, by
  q_g <- q_g exp(eta (R_g + C / sqrt(N_g))), N_g the training cases of group g.
* `febs` (Tian et al. 2024, FairSeg's Fair Error-Bound Scaling) multiplies the
  class scores of group g inside the Dice loss by
  tanh( (min_h L_h / L_g)^gamma ), L_g the group's Dice loss. As published
  ('febs_published') the Dice loss is summed over the batch, and a group that
  the batch lacks has L = 0, so that every other group is weighted 0. 'febs'
  takes its running average instead, and the mean of the Dice losses of cases.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fairdiff_jax.fairness.risk import (
  RunningRisk,
  global_sum,
  group_risk,
  group_sum,
  weighted_mean,
)

SMOOTH = 1e-5  # of Dice
FLAT = 1e-2  # delta of 'equity', in units of the loss


class DiceTerms(NamedTuple):
  """What the Dice loss of a case is made of, each [B, C].

  >>> terms = DiceTerms(*(jnp.ones((1, 3)) for _ in range(3)))
  >>> terms.loss().tolist()
  [0.0]

  Attributes:
    overlap: sum of p y over the pixels.
    score: sum of p^2.
    label: sum of y^2.
  """

  overlap: jax.Array
  score: jax.Array
  label: jax.Array

  def scaled(self, factor: jax.Array) -> "DiceTerms":
    """The terms with scores p multiplied by factor [B]."""
    factor = factor[:, None]
    return DiceTerms(self.overlap * factor, self.score * factor**2, self.label)

  def loss(self) -> jax.Array:
    """Mean Dice loss over the classes, of each row."""
    overlap, size = 2 * self.overlap, self.score + self.label
    return jnp.mean(1 - (overlap + SMOOTH) / (size + SMOOTH), axis=-1)


def dice_terms(logits: jax.Array, label: jax.Array) -> DiceTerms:
  """Sums over pixels from logits [B, H, W, C] and labels int32 [B, H, W].

  >>> import jax.numpy as jnp
  >>> logits = 9.0 * jnp.eye(2)[None, None]  # one row of two pixels
  >>> dice_terms(logits, jnp.array([[[0, 1]]])).loss().round(3)
  Array([0.], dtype=float32)
  """
  p = jax.nn.softmax(logits)
  y = jax.nn.one_hot(label, logits.shape[-1])
  return DiceTerms(*(jnp.sum(x, axis=(1, 2)) for x in (p * y, p**2, y**2)))


class Evidence(NamedTuple):
  """What the segmenter made of a batch.

  >>> seen = evidence(jnp.array([0.25, 0.75]), jnp.array([0, 0]), 2)
  >>> seen.risk.tolist(), seen.count.tolist()
  ([0.5, 0.0], [2.0, 0.0])

  Attributes:
    risk: [G], of the groups in `known`.
    known: bool [G], whether a group takes part: it has a case in the batch,
      or a running average stands in.
    count: cases of every group in the global batch [G].
    group: [B], -1 for unknown.
    weight: [B].
    dice: terms [B, C].
    features: pooled features [B, F].
    axis_name: mapped axis of the per-shard view, None for the global view.
  """

  risk: jax.Array
  known: jax.Array
  count: jax.Array  # type: ignore[assignment]
  group: jax.Array | None = None
  weight: jax.Array | None = None
  dice: DiceTerms | None = None
  features: jax.Array | None = None
  axis_name: str | None = None

  def require(self, name: str) -> Any:
    """A field that a method needs; raises ValueError where it is not given."""
    found = getattr(self, name)
    if found is None:
      raise ValueError(f"this method needs evidence(..., {name}=...)")
    return found


def evidence(
  losses: jax.Array,
  group: jax.Array,
  num_groups: int,
  weight: jax.Array | None = None,
  *,
  dice: DiceTerms | None = None,
  features: jax.Array | None = None,
  axis_name: str | None = None,
) -> Evidence:
  """What a method is to know of a batch.

  >>> import jax.numpy as jnp
  >>> seen = evidence(jnp.array([0.2, 0.4]), jnp.array([0, -1]), num_groups=2)
  >>> [round(float(r), 2) for r in seen.risk], seen.known.tolist()
  ([0.2, 0.0], [True, False])

  Args:
    losses: of every case [B].
    group: of every case int32 [B], -1 for unknown.
    num_groups: G.
    weight: of every case [B], 0 for padding; None for 1.
    dice: terms [B, C], which febs needs; see `dice_terms`.
    features: pooled features [B, F], which mmd needs.
    axis_name: mapped axis, where every device sees its own cases alone.
  """
  if weight is None:
    weight = jnp.ones_like(losses)
  risk, count = group_risk(losses, group, weight, num_groups, axis_name)
  return Evidence(
    risk, count > 0, count, group, weight, dice, features, axis_name
  )


class Regularizer(NamedTuple):
  """A fairness method.

  >>> highest = Regularizer(
  ...   init=lambda num_cases: (),
  ...   penalty=lambda seen, state: (seen.risk.max(), state),
  ... )
  >>> seen = evidence(jnp.array([0.0, 1.0]), jnp.arange(2), 2)
  >>> float(highest.penalty(seen, highest.init([1, 1]))[0])
  1.0

  Attributes:
    init: training cases of every group [G] -> state.
    penalty: (evidence, state) -> (scalar Omega, the next state).
  """

  init: Callable[[jax.Array], Any]
  penalty: Callable[[Evidence, Any], tuple[jax.Array, Any]]


def _mean(x, known):
  return jnp.sum(jnp.where(known, x, 0)) / jnp.maximum(known.sum(), 1)


def _variance(risk, known):
  return _mean((risk - _mean(risk, known)) ** 2, known)


def _gap(risk, known):
  highest = jnp.max(risk, where=known, initial=-jnp.inf)
  lowest = jnp.min(risk, where=known, initial=jnp.inf)
  return jnp.where(known.any(), highest - lowest, 0)


def _worst(risk, known, temperature):
  scaled = jnp.where(known, risk / temperature, -jnp.inf)
  # An empty batch would make every entry -inf and the gradient NaN.
  scaled = jnp.where(known.any(), scaled, 0)
  count = jnp.maximum(known.sum(), 1)
  soft = jax.nn.logsumexp(scaled) - jnp.log(count)
  soft = temperature * soft - _mean(risk, known)
  return jnp.where(known.any(), soft, 0)


def _equity(risk, known):
  count = known.sum()
  variance = _variance(risk, known) * count / jnp.maximum(count - 1, 1)
  return _mean(risk, known) * (jnp.sqrt(variance + FLAT**2) - FLAT)


def _on_risks(function) -> Regularizer:
  """A method that looks at the groups' risks and keeps nothing."""
  return Regularizer(
    init=lambda num_cases: (),
    penalty=lambda evidence, state: (
      function(evidence.risk, evidence.known),
      state,
    ),
  )


def erm() -> Regularizer:
  """No method: the mean loss alone.

  >>> omega, _ = erm().penalty(evidence(jnp.ones(2), jnp.arange(2), 2), ())
  >>> float(omega)
  0.0
  """
  return _on_risks(lambda risk, known: jnp.zeros((), risk.dtype))


def variance() -> Regularizer:
  """The variance of the groups' risks.

  >>> seen = evidence(jnp.array([0.0, 1.0]), jnp.arange(2), 2)
  >>> float(variance().penalty(seen, ())[0])
  0.25
  """
  return _on_risks(_variance)


def gap() -> Regularizer:
  """The highest risk of a group less the lowest.

  >>> seen = evidence(jnp.array([0.0, 1.0]), jnp.arange(2), 2)
  >>> float(gap().penalty(seen, ())[0])
  1.0
  """
  return _on_risks(_gap)


def worst(temperature: float = 0.1) -> Regularizer:
  """The worst group's excess over the mean risk, smoothed.

  >>> seen = evidence(jnp.array([0.0, 1.0]), jnp.arange(2), 2)
  >>> float(worst(temperature=1e-3).penalty(seen, ())[0].round(2))
  0.5

  Args:
    temperature: tau, in units of the loss; 0 would be the maximum itself.
  """
  return _on_risks(partial(_worst, temperature=temperature))


def equity() -> Regularizer:
  """What equity scaling adds to the mean risk, made smooth.

  >>> seen = evidence(jnp.array([0.5, 0.5]), jnp.arange(2), 2)
  >>> float(equity().penalty(seen, ())[0])
  0.0
  """
  return _on_risks(_equity)


def mmd() -> Regularizer:
  """The distance of the groups' mean features from their centre.

  >>> seen = evidence(
  ...   jnp.ones(2), jnp.arange(2), 2, features=jnp.array([[0.0], [2.0]])
  ... )
  >>> float(mmd().penalty(seen, ())[0])
  1.0

  Its evidence needs `features`.
  """

  def penalty(evidence, state):
    total, count = group_sum(
      evidence.require("features"),
      evidence.group,
      evidence.weight,
      len(evidence.count),
      evidence.axis_name,
    )
    present = count > 0
    mean = total / jnp.where(present, count, 1)[:, None]
    centre = jnp.sum(mean, axis=0) / jnp.maximum(present.sum(), 1)
    distance = jnp.sum((mean - centre) ** 2, axis=-1)
    return _mean(distance, present), state

  return Regularizer(lambda num_cases: (), penalty)


def group_dro(step_size: float = 0.01, adjustment: float = 0.0) -> Regularizer:
  """GroupDRO (Sagawa et al. 2020): weights of groups that follow their risks.

  >>> method = group_dro(step_size=1.0)
  >>> seen = evidence(jnp.array([0.0, 1.0]), jnp.arange(2), 2)
  >>> _, state = method.penalty(seen, method.init([90, 10]))
  >>> [round(float(q), 2) for q in state["q"]]
  [0.27, 0.73]

  Args:
    step_size: eta.
    adjustment: C, of the margin C / sqrt(training cases of a group).
  """

  def init(num_cases):
    num_cases = jnp.asarray(num_cases)
    exists = num_cases > 0
    margin = adjustment / jnp.sqrt(jnp.where(exists, num_cases, 1))
    return {"q": exists / jnp.maximum(exists.sum(), 1), "margin": margin}

  def penalty(evidence, state):
    risk, known = evidence.risk, evidence.known
    # Weights of groups that are not known stay as they are.
    mass = jnp.sum(jnp.where(known, state["q"], 0))
    gain = step_size * jax.lax.stop_gradient(risk + state["margin"])
    gain -= jnp.max(gain, where=known, initial=-jnp.inf)
    moved = jnp.where(known, state["q"] * jnp.exp(gain), 0)
    moved *= mass / jnp.where(mass > 0, moved.sum(), 1)
    q = jnp.where(known, moved, state["q"])
    robust = jnp.sum(jnp.where(known, q * risk, 0))
    cases = jnp.maximum(evidence.count.sum(), 1)
    empirical = jnp.sum(evidence.count * risk) / cases
    return robust - empirical, {**state, "q": q}

  return Regularizer(init, penalty)


def _scale(loss, known, gamma):
  """tanh( (min_h L_h / L_g)^gamma ) [G], over the groups known."""
  loss = jax.lax.stop_gradient(loss)
  least = jnp.min(loss, where=known, initial=jnp.inf)
  ratio = (least + SMOOTH) / (loss + SMOOTH)
  return jnp.tanh(jnp.where(known, ratio, 1) ** gamma)


def _per_case(scale, group):
  """scale [G] of each case's group; the best group's where unknown [B]."""
  rows = jnp.append(scale, jnp.tanh(1.0))
  return rows[jnp.where(group < 0, len(scale), group)]


def febs(
  gamma: float = 1.0, dice_weight: float = 1.0, decay: float = 0.9
) -> Regularizer:
  """FairSeg's Fair Error-Bound Scaling (Tian et al. 2024), with averages.

  >>> dice = DiceTerms(*(jnp.ones((2, 1)) for _ in range(3)))
  >>> method = febs()
  >>> seen = evidence(jnp.zeros(2), jnp.arange(2), 2, dice=dice)
  >>> omega, state = method.penalty(seen, method.init([90, 10]))
  >>> bool(omega > 0)
  True

  Its evidence needs `dice`.

  Args:
    gamma: exponent.
    dice_weight: weight of Dice in the loss.
    decay: of the groups' running losses.
  """

  def penalty(evidence, state):
    dice = evidence.require("dice")
    _, _, count, group, weight, _, _, axis_name = evidence
    plain = dice.loss()
    loss, _ = group_risk(plain, group, weight, len(count), axis_name)
    filled, known = state.fill(loss, count)
    scale = _scale(filled, known, gamma)
    fair = dice.scaled(_per_case(scale, group)).loss()
    difference = weighted_mean(fair - plain, weight, axis_name)
    return dice_weight * difference, state.update(loss, count, decay)

  return Regularizer(lambda cases: RunningRisk.start(len(cases)), penalty)


def febs_published(gamma: float = 1.0, dice_weight: float = 1.0) -> Regularizer:
  """Fair Error-Bound Scaling as published: an absent group silences all others.

  >>> dice = DiceTerms(*(jnp.ones((2, 1)) for _ in range(3)))
  >>> seen = evidence(jnp.zeros(2), jnp.arange(2), 2, dice=dice)
  >>> method = febs_published()
  >>> omega, _ = method.penalty(seen, method.init([90, 10]))
  >>> bool(omega > 0)
  True

  Its evidence needs `dice`.

  Args:
    gamma: exponent.
    dice_weight: weight of Dice in the loss.
  """

  def penalty(evidence, state):
    dice = evidence.require("dice")
    _, _, count, group, weight, _, _, axis_name = evidence

    def summed(terms):
      return DiceTerms(
        *(global_sum(x * weight[:, None], axis_name) for x in terms)
      )

    by_group = DiceTerms(
      *(group_sum(x, group, weight, len(count), axis_name)[0] for x in dice)
    )
    present = count > 0
    loss = jax.lax.stop_gradient(jnp.where(present, by_group.loss(), 0))
    ratio = jnp.min(loss) / jnp.where(loss > 0, loss, 1)
    scale = jnp.tanh(ratio**gamma)
    fair = summed(dice.scaled(_per_case(scale, group))).loss()
    plain = weighted_mean(dice.loss(), weight, axis_name)
    return dice_weight * (fair - plain), state

  return Regularizer(lambda cases: (), penalty)


# Regularizers by name, of the config and the weight of Dice in the loss.
_MAKERS = {
  "erm": lambda config, dice_weight: erm(),
  "variance": lambda config, dice_weight: variance(),
  "gap": lambda config, dice_weight: gap(),
  "worst": lambda config, dice_weight: worst(config.temperature),
  "equity": lambda config, dice_weight: equity(),
  "mmd": lambda config, dice_weight: mmd(),
  "group_dro": lambda config, dice_weight: group_dro(
    config.step_size, config.adjustment
  ),
  "febs": lambda config, dice_weight: febs(
    config.gamma, dice_weight, config.decay
  ),
  "febs_published": lambda config, dice_weight: febs_published(
    config.gamma, dice_weight
  ),
  "adversarial": lambda config, dice_weight: erm(),
}
METHODS = tuple(_MAKERS)


def make_regularizer(config, dice_weight: float = 1.0) -> Regularizer:
  """Builds the method that a config names.

  Args:
    config: `method`, and what the methods take: `temperature` (tau, in units
      of the loss), `step_size` (eta) and `adjustment` (C) of group_dro,
      `gamma` of febs, `decay` of running averages.
    dice_weight: weight of Dice in the segmenter's loss.

  Raises:
    ValueError: if the method is unknown.
  """
  # 'none' is another name of 'erm'.
  maker = _MAKERS.get("erm" if config.method == "none" else config.method)
  if maker is None:
    raise ValueError(
      f"unknown fairness method {config.method!r}; use one of"
      f" {', '.join(METHODS)}"
    )
  return maker(config, dice_weight)
