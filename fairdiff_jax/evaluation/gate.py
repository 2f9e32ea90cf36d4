"""What synthetic cases must pass before they are shared.

No case may be nearer to a training patient than 1% of real patients are to
each other (`privacy`), and a segmenter that has seen no synthetic case must
find its mask: with a Dice not below the 1% quantile of real cases of its group.
The test cases take no part in what is refused.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fairdiff_jax import config as configs
from fairdiff_jax.data.cases import Cases
from fairdiff_jax.data.domain import Domain
from fairdiff_jax.data.storage import digest, load, num_cases
from fairdiff_jax.evaluation.predictor import Predictor
from fairdiff_jax.evaluation.privacy import QUANTILE, Privacy
from fairdiff_jax.evaluation.realism import MIN_CASES
from fairdiff_jax.evaluation.segmentation import json_ready
from fairdiff_jax.fairness.metrics import dice
from fairdiff_jax.training.pools import case_groups
from fairdiff_jax.training.trained import Trained, restore


def find_segmenter(trained: Trained) -> Predictor | None:
  """The baseline's segmenter, or the run's own; None where there is neither."""
  if trained.layout.baseline.checkpoints.exists():
    trained = restore(trained.layout.baseline.workdir)
  if "segmenter" not in trained.setup.objective.tasks:
    return None
  return Predictor(trained)


def agreement_of(
  predict: Predictor, image: np.ndarray, mask: np.ndarray, domain: Domain
) -> np.ndarray:
  """Dice [n] of what is found in images with their masks, mean over parts."""
  if not len(image):
    return np.empty(0)
  found = predict(image)
  scores = [
    dice(mask, found, domain.reported_classes[part], "exclude")
    for part in domain.parts
  ]
  known = np.isfinite(scores)
  total = np.where(known, scores, 0).sum(0) / np.maximum(known.sum(0), 1)
  return np.where(known.any(0), total, np.nan)


class TrustGate:
  """Compares with the training patients, and looks for the mask.

  Args:
    train: the training cases.
    judges: real cases of which the Dice is taken; validation cases where there
      are some, else the training cases, whom the segmenter knows: it then asks
      rather too much than too little.
    held_out: real cases that nothing has learned from.
    groups: names of the groups.
    group: of each case of `train`, `judges` and `held_out`.
    predict: the segmenter; None to compare pixels alone.
  """

  def __init__(
    self,
    train: Cases,
    judges: Cases,
    held_out: Cases,
    groups: tuple[str, ...],
    group: tuple[np.ndarray, np.ndarray, np.ndarray],
    predict: Predictor | None,
  ):
    self._privacy = Privacy(train, predict and predict.features)
    self._held_out, self._groups, self._group = held_out, groups, group
    self._predict, self._domain = predict, train.domain
    self.least = np.full(len(groups), np.nan)
    if predict:
      of = agreement_of(predict, judges.image, judges.mask, train.domain)
      for g in range(len(groups)):
        own = of[(group[1] == g) & np.isfinite(of)]
        if len(own) < MIN_CASES:
          own = of[np.isfinite(of)]
        if len(own):
          self.least[g] = np.quantile(own, QUANTILE)

  def check(
    self, image: np.ndarray, mask: np.ndarray, group: np.ndarray
  ) -> list[str]:
    """Why each case is refused; '' for one that passes."""
    found = [
      space and f"too near a real patient in {space}"
      for space in self._privacy.too_near(image, mask)
    ]
    if self._predict:
      scores = agreement_of(self._predict, image, mask, self._domain)
      for i in np.flatnonzero(scores < self.least[group]):
        found[i] = found[i] or "the image does not show its mask"
    return found

  def measure(
    self, image: np.ndarray, mask: np.ndarray, group: np.ndarray
  ) -> dict[str, Any]:
    """{`privacy`: as `Privacy.measure`, `agreement`: by group, or None}."""
    private, _ = self._privacy.measure(
      image, mask, self._held_out, self._group[0], self._group[2]
    )
    figures: dict[str, Any] = {"privacy": private, "agreement": None}
    if self._predict:
      scores = agreement_of(self._predict, image, mask, self._domain)
      figures["agreement"] = {
        name: {
          "mean": _mean(scores[group == g]),
          "threshold": float(self.least[g]),
        }
        for g, name in enumerate(self._groups)
        if (group == g).any()
      }
    return json_ready(figures)


def _mean(values: np.ndarray) -> float:
  known = values[np.isfinite(values)]
  return float(known.mean()) if len(known) else np.nan


def make_gate(trained: Trained) -> TrustGate:
  """The gate of a run, from the data that it was trained on.

  Raises:
    FileNotFoundError: the data is not there.
    ValueError: it holds other cases than the run was trained on.
  """
  config = trained.config
  data = configs.data_directory(config, trained.layout.workdir)
  if trained.record.data not in ("", found := digest(data)):
    raise ValueError(
      f"{data} holds other cases ({found[:12]}) than the run in"
      f" {trained.layout.workdir} was trained on ({trained.record.data[:12]});"
      " put those back"
    )
  cases: Mapping[str, Cases] = {
    split: load(data, split)
    for split in ("train", "validation", "test")
    if num_cases(data, split)
  }
  train = cases["train"]
  judges = cases.get("validation", train)
  held_out = cases.get("test", cases.get("validation", train.none("test")))
  return TrustGate(
    *(train, judges, held_out, trained.setup.objective.group_names),
    tuple(case_groups(config, c) for c in (train, judges, held_out)),
    find_segmenter(trained),
  )
