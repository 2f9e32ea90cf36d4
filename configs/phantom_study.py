"""The methods of the phantom study, as changes of `configs/phantom.py`."""

PATIENTS = 100  # to train on
STEPS = 1000  # of every method's segmenter
GENERATION = 2200  # of the generators'

# Data strategies of a segmenter that learns alone.
_ALONE = {
  "train.steps": STEPS,
  "train.points": (0, 0),
  "train.image": (0, 0),
  "train.segmenter": (0, STEPS),
  "fairness.method": "erm",
  "fairness.strategy": "none",
}
_GENERATORS = {
  "train.points": (0, GENERATION),
  "train.image": (600, GENERATION),
}
_REPEATED = _ALONE | {"fairness.strategy": "repeat_sample"}
# Generators first, then one bank, then the segmenter.
_STAGED = _GENERATORS | {
  "train.steps": GENERATION + STEPS,
  "train.segmenter": (GENERATION, GENERATION + STEPS),
  "bank.every": STEPS,
  "bank.masks": "generated",
  "bank.strength": 1.0,
  "checkpoint.every": GENERATION,
  "fairness.method": "erm",
  "fairness.strategy": "equal_scale",
}
_JOINT = _GENERATORS | {
  "train.steps": GENERATION,
  "train.segmenter": (GENERATION - STEPS, GENERATION),
  "fairness.method": "erm",
  "fairness.real_share": 0.5,
}
# A bank of warped real patients, without what a network learns but the
# intensities of classes.
_WARPED = {
  "train.steps": STEPS,
  "train.points": (0, 0),
  "train.image": (0, STEPS),
  "train.segmenter": (0, STEPS),
  "bank.masks": "real",
  "bank.strength": 0.0,
  "objective.agreement": 0.0,
  "fairness.method": "erm",
  "fairness.strategy": "equal_scale",
  "fairness.real_share": 0.5,
}

REFERENCE, CEILING = "Repeat Sample", "balanced real data"
_CHANGES = {
  "ERM": _ALONE,
  REFERENCE: _REPEATED,
  "GroupDRO": _ALONE | {"fairness.method": "group_dro"},
  "FEBS": _ALONE | {"fairness.method": "febs"},
  "adversarial": _ALONE | {"fairness.method": "adversarial"},
  "anatomy warp": _WARPED,
  "Equal Scale, published": _STAGED | {"fairness.real_share": 0.0},
  "Equal Scale, half real": _STAGED | {"fairness.real_share": 0.5},
  "joint": _JOINT,
  # What more patients of the rare groups would be worth.
  **{
    f"{REFERENCE}, {added} more": _REPEATED | {"data.phantom.added": added}
    for added in (9, 27, 81)
  },
  CEILING: _ALONE | {"data.phantom.train": 900, "data.phantom.balanced": True},
}
METHODS = {
  name: {"data.phantom.train": PATIENTS} | changes
  for name, changes in _CHANGES.items()
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
