"""The methods of the phantom study, as changes of `configs/phantom.py`."""

from collections.abc import Mapping
from typing import Any

PATIENTS = 100  # to train on
STEPS = 2000  # of every method's segmenter
GENERATION = 2200  # of the generators', where all of an image is theirs,
FINISHING = 1200  # and where they finish what real patients begin

REFERENCE, CEILING = "Repeat Sample", "balanced real data"


def methods(
  steps: int, generation: int, finishing: int
) -> dict[str, Mapping[str, Any]]:
  """The methods by name.

  Args:
    steps: of every method's segmenter.
    generation: of the generators, where they make images from noise.
    finishing: of the generators, where they finish warped real ones.
  """
  # Data strategies of a segmenter that learns alone.
  alone = {
    "train.steps": steps,
    "train.points": (0, 0),
    "train.image": (0, 0),
    "train.segmenter": (0, steps),
    "fairness.method": "erm",
    "fairness.strategy": "none",
  }
  repeated = alone | {"fairness.strategy": "repeat_sample"}
  # Generators first, then one bank, then the segmenter.
  staged = {
    "train.points": (0, generation),
    "train.image": (3 * generation // 11, generation),
    "train.steps": generation + steps,
    "train.segmenter": (generation, generation + steps),
    "bank.every": steps,
    "bank.masks": "generated",
    "bank.strength": 1.0,
    "bank.candidates": 1,
    "checkpoint.every": generation,
    "fairness.method": "erm",
    "fairness.strategy": "equal_scale",
  }
  start, every = finishing // 3, steps // 10
  joint = {
    "train.points": (0, finishing),
    "train.image": (finishing // 4, finishing),
    "train.segmenter": (start, start + steps),
    "train.steps": start + steps,
    "bank.every": every,
    "bank.masks": "both",
    "bank.strength": 0.1,
    "fairness.method": "erm",
    "fairness.real_share": 0.5,
  }
  # A bank of warped real patients, without what a network learns: the image
  # generator's only step brings the intensities of classes.
  warped = {
    "train.steps": steps,
    "train.points": (0, 0),
    "train.image": (0, 1),
    "bank.every": every,
    "bank.patients": 1,
    "bank.candidates": 1,
    "train.segmenter": (0, steps),
    "bank.masks": "real",
    "bank.strength": 0.0,
    "objective.agreement": 0.0,
    "fairness.method": "erm",
    "fairness.strategy": "equal_scale",
    "fairness.real_share": 0.5,
  }
  changes = {
    "ERM": alone,
    REFERENCE: repeated,
    "GroupDRO": alone | {"fairness.method": "group_dro"},
    "FEBS": alone | {"fairness.method": "febs"},
    "adversarial": alone | {"fairness.method": "adversarial"},
    "anatomy warp": warped,
    "anatomy warp, by risk": warped | {"bank.candidates": 3},
    "anatomy blend": warped | {"bank.patients": 2},
    "anatomy blend, by risk": warped
    | {"bank.patients": 2, "bank.candidates": 3},
    "Equal Scale, published": staged | {"fairness.real_share": 0.0},
    "Equal Scale, half real": staged | {"fairness.real_share": 0.5},
    "joint": joint,
    # What more patients of the rare groups would be worth.
    **{
      f"{REFERENCE}, {added} more": repeated | {"data.phantom.added": added}
      for added in (9, 27, 81)
    },
    CEILING: alone | {"data.phantom.train": 900, "data.phantom.balanced": True},
  }
  patients = {"data.phantom.train": PATIENTS}
  return {name: patients | of for name, of in changes.items()}


METHODS = methods(STEPS, GENERATION, FINISHING)
_FEWER = methods(200, 600, 300)  # steps, for a look
SMALL = {
  name: _FEWER[name]
  for name in (
    REFERENCE,
    "anatomy blend, by risk",
    "joint",
    f"{REFERENCE}, 27 more",
  )
}
# The methods whose generators, up to the step of their only bank, are the
# same, so that they are trained once.
SHARED = {"Equal Scale, half real": ("Equal Scale, published", GENERATION)}

# What is chosen by ES-Dice, mean of cup and rim, on validation phantoms.
CHOICES = {
  "GroupDRO": ("fairness.step_size", (0.01, 0.1, 1.0)),
  "FEBS": ("fairness.gamma", (0.5, 1.0, 2.0)),
  "adversarial": ("fairness.weight", (0.01, 0.1, 1.0)),
}
