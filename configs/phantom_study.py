"""The methods of the phantom study, as changes of `configs/phantom.py`."""

# Data strategies of a segmenter that learns alone.
_ALONE = {
  "train.steps": 300,
  "train.points": (0, 0),
  "train.image": (0, 0),
  "train.segmenter": (0, 300),
  "fairness.method": "erm",
  "fairness.strategy": "none",
}
_GENERATORS = {"train.points": (0, 1450), "train.image": (600, 1450)}
# Generators first, then one bank, then the segmenter.
_STAGED = _GENERATORS | {
  "train.steps": 1750,
  "train.segmenter": (1450, 1750),
  "bank.every": 300,
  "checkpoint.every": 1450,
  "fairness.method": "erm",
  "fairness.strategy": "equal_scale",
}
_JOINT = _GENERATORS | {
  "train.steps": 1450,
  "train.segmenter": (1150, 1450),
  "fairness.real_share": 0.5,
}

REFERENCE, CEILING = "ERM", "balanced real data"
METHODS = {
  REFERENCE: _ALONE,
  "Repeat Sample": _ALONE | {"fairness.strategy": "repeat_sample"},
  "GroupDRO": _ALONE | {"fairness.method": "group_dro"},
  "FEBS": _ALONE | {"fairness.method": "febs"},
  "adversarial": _ALONE | {"fairness.method": "adversarial"},
  "Equal Scale, published": _STAGED | {"fairness.real_share": 0.0},
  "Equal Scale, half real": _STAGED | {"fairness.real_share": 0.5},
  "joint, risk-tilted": _JOINT | {"fairness.tilt": 1.0},
  CEILING: _ALONE | {"data.phantom.train": 900, "data.phantom.balanced": True},
}
# The methods whose generators, up to the step of their only bank, are the
# same, so that they are trained once.
SHARED = {"Equal Scale, half real": ("Equal Scale, published", 1450)}

# What is chosen by ES-Dice, mean of cup and rim, on validation phantoms.
CHOICES = {
  "GroupDRO": ("fairness.step_size", (0.01, 0.1, 1.0)),
  "FEBS": ("fairness.gamma", (0.5, 1.0, 2.0)),
  "adversarial": ("fairness.weight", (0.01, 0.1, 1.0)),
}
