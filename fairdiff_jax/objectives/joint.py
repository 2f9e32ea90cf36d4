r"""The joint objective.

    J(phi, psi, theta) = w_p mean L_points(phi)          generation cases
                       + w_i mean L_image(psi)           generation cases
                       + w_s mean l_i(theta)             segmentation cases
                       + lambda Omega(R_1..R_G)          fairness, on theta
                       + gamma mean s_i l_i(stop(theta); x0_hat(psi))

A batch has two parts: 'generation', real cases that teach the generators, and
'segmentation', the mixture of real and synthetic cases that teaches the
segmenter. The last term is agreement: the image generator's denoised image
must show its mask to the segmenter; s_i, the signal's share of x_t, leaves
out steps at which there is nothing yet to see. Under the fairness method
'adversarial' a fourth network adds its risk, the segmenter's features entering
with a gradient of -lambda.

Which networks are active is static. An inactive network is neither evaluated
nor changed, so staged training, joint training and training a segmenter alone
are the same function.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from fairdiff_jax.data import domain as domains
from fairdiff_jax.diffusion.samplers import example_keys
from fairdiff_jax.fairness.regularizers import (
  Evidence,
  Regularizer,
  make_regularizer,
)
from fairdiff_jax.fairness.risk import RunningRisk, group_risk, weighted_mean
from fairdiff_jax.objectives.adversary import adversary_task, reverse
from fairdiff_jax.objectives.image import image_task
from fairdiff_jax.objectives.points import points_task
from fairdiff_jax.objectives.segmentation import (
  make_network,
  segmentation_task,
)
from fairdiff_jax.objectives.task import Task, Variables

NETWORKS = ("points", "image", "segmenter", "adversary")


class Objective(NamedTuple):
  """Everything static about the joint objective.

  Attributes:
    tasks: task of every network, by name.
    regularizer: fairness method.
    weights: 'points', 'image', 'segmenter', 'fairness', 'agreement'.
    decay: of the groups' running risks.
    fill_absent: whether running risks stand in for groups that a batch lacks.
    group_names: names of the G groups.
  """

  tasks: dict[str, Task]
  regularizer: Regularizer
  weights: dict[str, float]
  decay: float
  fill_absent: bool
  group_names: tuple[str, ...]


class FairnessState(flax.struct.PyTreeNode):
  """What a run remembers of its groups.

  Attributes:
    running: the segmenter's running risk by group.
    method: the regularizer's state.
  """

  running: RunningRisk
  method: Any


def init_fairness(objective: Objective, num_cases: jax.Array) -> FairnessState:
  """The state before the first step, from training cases by group [G]."""
  return FairnessState(
    RunningRisk.start(len(num_cases)),
    objective.regularizer.init(jnp.asarray(num_cases)),
  )


def make_objective(
  config,
  group_names: tuple[str, ...],
  networks: tuple[str, ...],
  axis_name: str | None = None,
) -> Objective:
  """Assembles the objective of a run's config, with some of its networks."""
  num_groups = len(group_names)
  domain = domains.of(config.data.domain, config.data.source)
  makers = {
    "points": lambda: points_task(config.points, num_groups, axis_name),
    "image": lambda: image_task(config.image, num_groups, domain.channels),
    "segmenter": lambda: segmentation_task(config.segmenter, axis_name, domain),
    "adversary": lambda: adversary_task(
      config.fairness.adversary_width,
      make_network(config.segmenter).num_features,
      num_groups,
    ),
  }
  return Objective(
    tasks={name: makers[name]() for name in networks},
    regularizer=make_regularizer(config.fairness, config.segmenter.dice_weight),
    weights={
      "points": config.objective.points,
      "image": config.objective.image,
      "segmenter": config.objective.segmenter,
      "fairness": config.fairness.weight,
      "agreement": config.objective.agreement,
    },
    decay=config.fairness.decay,
    fill_absent=config.fairness.fill_absent,
    group_names=group_names,
  )


def _batch_keys(key, batch, axis_name):
  """Keys by index in the global batch, the same however it is sharded."""
  size = len(batch["weight"])
  start = 0 if axis_name is None else jax.lax.axis_index(axis_name) * size
  return example_keys(key, start + jnp.arange(size))


def _blank_padding(part):
  """Zeros for examples of weight 0: whatever they hold, even NaN, is gone."""

  def blank(x):
    present = part["weight"] > 0
    return jnp.where(present.reshape(-1, *(1,) * (x.ndim - 1)), x, 0)

  return jax.tree.map(blank, part)


def joint_objective(
  params: dict[str, Any],
  batch_stats: dict[str, Any],
  frozen: dict[str, Any],
  fairness: FairnessState,
  batch: dict[str, dict[str, jax.Array]],
  key: jax.Array,
  *,
  objective: Objective,
  active: Collection[str],
  axis_name: str | None = None,
) -> tuple[jax.Array, dict[str, Any]]:
  """J on one global batch.

  Args:
    params: by network; only active networks need be there.
    batch_stats: by network.
    frozen: by network.
    fairness: what is remembered of the groups.
    batch: 'generation' and 'segmentation' cases, each a dict of image
      [B, H, W, C], mask [B, H, W], group [B], weight [B] (and points
      [B, N, 3] for generation, where latent [B, h, w, 2 C] may stand for
      image).
    key: the step's key.
    objective: tasks, regularizer and weights.
    active: names of the networks that take part.
    axis_name: mapped axis of the per-shard view, None for the global view.

  Returns:
    (J, aux) with aux 'batch_stats' by active network, 'fairness' state and
    'metrics', a flat dict of scalars.
  """
  tasks, weights = objective.tasks, objective.weights
  batch = {name: _blank_padding(part) for name, part in batch.items()}
  total = jnp.zeros(())
  metrics, aux = {}, {}

  def evaluate(name, part, params):
    variables = Variables(params, batch_stats[name], frozen[name])
    network_key = jax.random.fold_in(key, NETWORKS.index(name))
    keys = _batch_keys(network_key, part, axis_name)
    return tasks[name].risk(variables, part, keys, True)

  for name in ("points", "image"):
    if name not in active:
      continue
    part = batch["generation"]
    losses, aux[name] = evaluate(name, part, params[name])
    weight = aux[name].get("weight", part["weight"])
    metrics[f"loss/{name}"] = weighted_mean(losses, weight, axis_name)
    total += weights[name] * metrics[f"loss/{name}"]

  if "segmenter" in active:
    part = batch["segmentation"]
    losses, aux["segmenter"] = evaluate("segmenter", part, params["segmenter"])
    mean = weighted_mean(losses, part["weight"], axis_name)
    risk, count = group_risk(
      losses,
      part["group"],
      part["weight"],
      len(objective.group_names),
      axis_name,
    )
    for g, group_name in enumerate(objective.group_names):
      # An absent group has no risk: NaN is written as null, never averaged.
      metrics[f"risk/{group_name}"] = jnp.where(count[g] > 0, risk[g], jnp.nan)
    known = count > 0
    if objective.fill_absent:
      risk, known = fairness.running.fill(risk, count)
    penalty, method = objective.regularizer.penalty(
      Evidence(
        risk,
        known,
        count,
        part["group"],
        part["weight"],
        aux["segmenter"]["dice"],
        aux["segmenter"]["features"],
        axis_name,
      ),
      fairness.method,
    )
    total += weights["segmenter"] * mean + weights["fairness"] * penalty
    metrics |= {"loss/segmenter": mean, "loss/fairness": penalty}
    running = fairness.running.update(risk, count, objective.decay)
    fairness = FairnessState(running, method)

  if "adversary" in active:
    features = reverse(aux["segmenter"]["features"], weights["fairness"])
    part = {**batch["segmentation"], "features": features}
    losses, aux["adversary"] = evaluate("adversary", part, params["adversary"])
    known = part["weight"] * (part["group"] >= 0)
    metrics["loss/adversary"] = weighted_mean(losses, known, axis_name)
    total += metrics["loss/adversary"]

  if {"image", "segmenter"} <= set(active) and weights["agreement"]:
    part = {**batch["generation"], "image": aux["image"]["x0"]()}
    losses, _ = evaluate(
      "segmenter", part, jax.lax.stop_gradient(params["segmenter"])
    )
    agreement = weighted_mean(
      losses * aux["image"]["signal"], part["weight"], axis_name
    )
    metrics["loss/agreement"] = agreement
    total += weights["agreement"] * agreement

  metrics["loss/total"] = total
  return total, {
    "batch_stats": {name: aux[name]["batch_stats"] for name in aux},
    "fairness": jax.lax.stop_gradient(fairness),
    "metrics": metrics,
  }
