"""Phases, the bank's calendar and saves, and what is said of time."""

import pytest

from configs.phantom import get_config
from fairdiff_jax.training.forecast import Forecast
from fairdiff_jax.training.schedule import (
  Phase,
  bank_step,
  due,
  learning_steps,
  mixture,
  phases,
  refills,
  saves,
)


def make_config(**changes):
  config = get_config("smoke")
  config.update_from_flattened_dict(changes)
  return config


def test_phases_cover_a_run_once():
  config = make_config(
    **{
      "train.steps": 10,
      "train.points": (1, 4),
      "train.image": (3, 4),
      "train.segmenter": (6, 20),
      "fairness.method": "adversarial",
    }
  )
  assert learning_steps(config, "adversary") == (6, 20)
  assert phases(config) == [
    Phase(0, 1, ()),
    Phase(1, 3, ("points",)),
    Phase(3, 4, ("points", "image")),
    Phase(4, 6, ()),
    Phase(6, 10, ("segmenter", "adversary")),
  ]


def test_a_span_without_steps_cuts_no_phase():
  config = make_config(**{"train.steps": 4, "train.image": (2, 2)})
  config.train.points = config.train.segmenter = (0, 4)
  assert phases(config) == [Phase(0, 4, ("points", "segmenter"))]
  config.train.steps = 0
  assert phases(config) == []


@pytest.mark.parametrize(
  ("every", "stop", "expected"),
  [
    (2, 8, [None, None, 2, 2, 4, 4, 6, 6, 6]),  # the last is not at step 8
    (2, 5, [None, None, 2, 2, 4, 4, 4, 4, 4]),
    (4, 8, [None, None, 2, 2, 2, 2, 6, 6, 6]),
    (0, 8, [None, None, 2, 2, 2, 2, 2, 2, 2]),
    (2, 2, [None] * 9),
  ],
)
def test_the_bank_in_use(every, stop, expected):
  config = make_config(**{"bank.every": every, "train.segmenter": (2, stop)})
  assert [bank_step(config, s) for s in range(9)] == expected
  assert refills(config) == sorted(set(expected) - {None})
  config.fairness.strategy = "none"
  assert [bank_step(config, s) for s in range(9)] == [None] * 9
  first = None if stop == 2 else 2
  assert [mixture(config, s) for s in range(9)] == [None] * 2 + [first] * 7


def test_saves():
  config = make_config(**{"checkpoint.every": 3})
  assert saves(config) == [3, 6, 8]
  assert saves(config, 3) == [6, 8]
  assert saves(config, 8) == []
  config.checkpoint.every = 0
  assert saves(config) == [8]
  assert [s for s in range(1, 8) if due(s, 3)] == [3, 6]
  assert not any(due(s, 0) for s in range(8))


def test_dearer_phases_are_not_taken_for_cheap_ones():
  forecast = Forecast({"points": 600, "joint": 300, "refill": 2})
  assert str(forecast) == "time left unknown"
  for seconds in (None, 0.1, 0.1, 9.0):  # once something else took long
    forecast.did("points", seconds)
  assert str(forecast) == "at least 1:00 left"
  for _ in range(596):
    forecast.did("points", 0.1)
  assert str(forecast) == "time left unknown"  # nothing that was seen is left
  forecast.did("joint", 10.0)
  assert str(forecast) == "at least 49:50 left"
  forecast.did("refill", 1000.0)
  assert str(forecast) == "1:06:30 left"
  forecast.did("refill", 1000.0)
  for _ in range(299):
    forecast.did("joint", 10.0)
  assert str(forecast) == ""
