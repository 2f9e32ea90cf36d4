"""Validation of a run under way: its averaged segmenter on validation cases.

    score = mean over parts of ES-Dice(part)

Parts are what the domain reports, but for what others make up together.
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from fairdiff_jax.data.cases import Cases
from fairdiff_jax.evaluation.predictor import compile_segmenter, label
from fairdiff_jax.fairness import metrics
from fairdiff_jax.training.checkpoint import Inference
from fairdiff_jax.training.pools import case_groups
from fairdiff_jax.training.setup import Setup
from fairdiff_jax.training.step import TrainState
from fairdiff_jax.training.validation import SCORE


def make_validate(
  run: Setup, cases: Cases
) -> Callable[[TrainState], dict[str, float]]:
  """Compiles the segmenter of a run, to measure it on validation cases.

  Args:
    run: set-up of the run.
    cases: validation cases.

  Returns:
    state -> what the state's averages reach, the same on every host, in [0, 1]:
    SCORE, `validation/es_dice/STRUCTURE` and `validation/dice/STRUCTURE/GROUP`
    for all that is reported; NaN where no case tells.
  """
  config = run.config
  batch_size = config.evaluation.batch_size
  scores = compile_segmenter(run, batch_size)
  group = case_groups(config, cases)

  def validate(state: TrainState) -> dict[str, float]:
    variables = Inference.of(state).network("segmenter")
    found = label(partial(scores, variables), cases.image, batch_size)
    return measure(run, cases, group, found)

  return validate


def measure(
  run: Setup, cases: Cases, group: np.ndarray, found: np.ndarray
) -> dict[str, float]:
  """What a validation says, as `make_validate` describes it.

  Args:
    run: set-up of the run.
    cases: validation cases.
    group: of each case [n], -1 for unknown.
    found: masks [n, H, W].
  """
  evaluation, domain = run.config.evaluation, run.domain
  names = run.objective.group_names
  scaled, numbers = {}, {}
  for part, classes in domain.reported_classes.items():
    figures = metrics.summarize(
      metrics.dice(cases.mask, found, classes, evaluation.empty),
      *(group, names),
      definition=evaluation.equity,
    )
    scaled[part] = numbers[f"validation/es_dice/{part}"] = figures["es"]
    for name in names:
      mean = figures["groups"][name]["mean"]
      numbers[f"validation/dice/{part}/{name}"] = mean
  known = [scaled[p] for p in domain.parts if np.isfinite(scaled[p])]
  score = float(np.mean(known)) if known else float("nan")
  return {SCORE: score} | numbers
