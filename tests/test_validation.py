"""Validations of a run: when, by what, what is kept, and when it ends."""

import json
import shutil
import signal
from functools import partial

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_loop import (  # noqa: F401
  TOTAL,
  asks,
  banks,
  checkpoints,
  journal,
  make_cases,
  make_config,
  make_state,
  world,
)

from fairdiff_jax import config as configs
from fairdiff_jax.evaluation import compare, evaluate
from fairdiff_jax.layout import Layout
from fairdiff_jax.synthesis import bank
from fairdiff_jax.training import checkpoint, loop, session
from fairdiff_jax.training.checkpoint import Checkpoints
from fairdiff_jax.training.schedule import (
  active_networks,
  learning_steps,
  validations,
)
from fairdiff_jax.training.trained import Trained, parse_checkpoint
from fairdiff_jax.training.validation import (
  SCORE,
  best,
  in_vain,
  parse,
  to_json,
)

nan = float("nan")
EVERY_3 = {"checkpoint.every": 3, "checkpoint.keep": 1}
SCORES = {2: 0.3, 3: 0.5, 4: 0.4, 5: 0.5, 6: 0.45}


@pytest.fixture
def validated(world):  # noqa: F811
  """The steps at which a run was validated; `scores` are what it finds."""
  world.scores, world.validated = dict(SCORES), []

  def make_validate(run):
    def validate(state):
      step = int(state.step)
      world.at.get(("validate", step), lambda: None)()
      world.validated.append(step)
      return {SCORE: world.scores[step], "validation/dice/cup/Asian": step / 10}

    return validate

  world.make_validate = make_validate
  return world


def run(world, workdir, **changes):  # noqa: F811
  return loop.train(
    make_config(**{"evaluation.every": 1} | changes),
    workdir,
    make_cases(),
    make_refill=bank.make_refill,
    make_validate=world.make_validate,
  )


def history(workdir):
  checkpoints = Checkpoints(workdir)
  found = checkpoints.history()
  checkpoints.close()
  return found


def lines(workdir):
  return [line for line in journal(workdir) if SCORE in line]


@given(
  st.lists(st.one_of(st.just(nan), st.floats(0, 1)), max_size=8),
  st.integers(1, 3),
)
def test_the_first_of_the_highest_is_the_best(scores, patience):
  found = [(10 * i, score) for i, score in enumerate(scores, 1)]
  known = [s for s in scores if s == s]
  if not known:
    assert best(found) is None and in_vain(found) == len(found)
    return
  step, score = best(found)
  assert score == max(known) and scores.index(score) == step // 10 - 1
  assert in_vain(found) == len(found) - step // 10
  stored = json.loads(json.dumps(to_json(found), allow_nan=False))
  np.testing.assert_equal(parse(stored), found)


@pytest.mark.parametrize("every", [1, 2, 3, 100])
@pytest.mark.parametrize(
  ("segmenter", "stop"),
  [((2, 6), 6), ((0, 4), 4), ((3, 60), 6), ((0, 0), 0), ((60, 70), 0)],
)
def test_validations_follow_the_segmenter_s_steps(every, segmenter, stop):
  config = make_config(
    **{"evaluation.every": every, "train.segmenter": segmenter}
  )
  start = learning_steps(config, "segmenter")[0]
  expected = [
    step
    for step in range(TOTAL + 1)
    if start < step <= stop
    and ((step - start) % every == 0 or step == stop)
    and "segmenter" in active_networks(config, step - 1)
  ]
  assert validations(config) == expected
  assert validations(config, 4) == [s for s in expected if s >= 4]
  config.evaluation.every = 0
  assert validations(config) == []


def test_the_best_is_kept_beside_the_newest(tmp_path, validated, capsys):
  validated.scores = {3: 0.5, 4: 0.4, 5: 0.5, 6: nan}
  changes = {"checkpoint.every": 1, "checkpoint.keep": 1}
  assert run(validated, tmp_path, **changes) is not None
  assert validated.validated == [3, 4, 5, 6]
  assert checkpoints(tmp_path) == [3, 6]
  np.testing.assert_equal(history(tmp_path), [*validated.scores.items()])
  found = [(line["step"], line[SCORE]) for line in lines(tmp_path)]
  assert found == [(3, 0.5), (4, 0.4), (5, 0.5), (6, None)]
  # The report of the best speaks of the bank that it was trained with.
  assert (tmp_path / "bank" / "step_00000002").is_dir()
  text = capsys.readouterr().err
  assert "validation   after step 3, then every 1 steps; the best" in text
  assert "best validation: step 3, ES-Dice 50.0" in text


def test_a_better_one_takes_the_place_of_the_best(tmp_path, validated):
  validated.scores = {3: 0.1, 4: 0.4, 5: 0.7, 6: 0.2}
  assert run(validated, tmp_path) is not None
  assert checkpoints(tmp_path) == [5, 6]  # the best, although every=0


@pytest.mark.parametrize("strategy", ["none", "repeat_sample", "equal_scale"])
@pytest.mark.parametrize(
  "spans",
  [
    ((0, 6), (0, 6), (0, 6)),
    ((0, 2), (2, 4), (4, 6)),
    ((0, 2), (0, 2), (3, 5)),
    ((0, 6), (0, 6), (2, 3)),
  ],
)
def test_any_strategy_with_any_phases(tmp_path, validated, strategy, spans):
  validated.scores = dict.fromkeys(range(TOTAL + 1), 0.5)
  networks = ("points", "image", "segmenter")
  changes = {f"train.{n}": s for n, s in zip(networks, spans, strict=True)}
  run(
    *(validated, tmp_path),
    **changes,
    **{"fairness.strategy": strategy, "evaluation.every": 2},
  )
  start, stop = spans[2]
  expected = [*range(start + 2, stop, 2), stop]
  assert validated.validated == expected
  assert checkpoints(tmp_path) == sorted({expected[0], TOTAL})


@pytest.fixture
def reference(tmp_path_factory, validated):
  workdir = tmp_path_factory.mktemp("reference")
  run(validated, workdir, **EVERY_3)
  validated.steps.clear()
  validated.generated.clear()
  validated.validated.clear()
  return workdir


@pytest.mark.parametrize(
  ("event", "stopped"),
  [
    (("step", 2), 3),  # at step 3 it is stopped before its validation
    (("validate", 4), 4),  # and here in it: the batch of step 5 is not begun
    (("step", 4), 5),
    (("validate", 6), 6),
    (("batch", 2), 2),  # in a refill
  ],
)
def test_a_run_that_goes_on_has_the_same_history(
  tmp_path, validated, reference, event, stopped
):
  validated.at[event] = asks(signal.SIGTERM)
  assert run(validated, tmp_path, **EVERY_3) is None
  newest = checkpoints(tmp_path)[-1]
  assert newest in (stopped, stopped + 1)
  validated.at.clear()
  assert run(validated, tmp_path, **EVERY_3) is not None
  assert journal(tmp_path) == journal(reference)
  assert history(tmp_path) == history(reference) == [*SCORES.items()][1:]
  assert checkpoints(tmp_path) == checkpoints(reference) == [3, 6]
  assert validated.validated == [3, 4, 5, 6]
  assert banks(tmp_path).items() <= banks(reference).items()


def test_a_validation_that_was_lost_is_made_again(
  tmp_path, validated, reference
):
  """The run dies after it has written a line, before it has saved."""

  def die():
    raise KeyboardInterrupt

  validated.at["step", 4] = die
  with pytest.raises(KeyboardInterrupt):
    run(validated, tmp_path, **EVERY_3)
  assert [line["step"] for line in lines(tmp_path)] == [3, 4]
  validated.at.clear()
  run(validated, tmp_path, **EVERY_3)
  assert validated.validated == [3, 4, 4, 5, 6]
  assert journal(tmp_path) == journal(reference)
  # Saved without the validation of its step, whose line is there: made again.
  facts = tmp_path / "checkpoints" / "6" / "_CHECKPOINT_METADATA"
  content = json.loads(facts.read_text())
  content["custom_metadata"]["validation"]["history"].pop()
  facts.write_text(json.dumps(content))
  run(validated, tmp_path, **EVERY_3)
  assert journal(tmp_path) == journal(reference)
  assert history(tmp_path) == history(reference)


def test_a_complete_run_is_not_validated_again(tmp_path, validated):
  run(validated, tmp_path, **{"evaluation.every": 0})
  assert history(tmp_path) == [] and not lines(tmp_path)
  run(validated, tmp_path)  # switched on: its last step is
  run(validated, tmp_path)
  assert validated.validated == [6]
  assert history(tmp_path) == [(6, 0.45)] and len(lines(tmp_path)) == 1


@pytest.mark.parametrize("change", [{"data": "other"}, {"empty": "published"}])
def test_scores_of_other_cases_or_definitions_do_not_count(
  tmp_path, validated, change
):
  validated.scores = {3: 0.9, 4: 0.4, 5: 0.5, 6: 0.6}
  validated.at["step", 3] = asks(signal.SIGTERM)
  config = make_config(**{"evaluation.every": 1})
  train = {
    "make_refill": bank.make_refill,
    "make_validate": validated.make_validate,
  }
  loop.train(config, tmp_path, make_cases(), data="one", **train)
  validated.at.clear()
  config.evaluation.empty = change.get("empty", "exclude")
  data = change.get("data", "one")
  loop.train(config, tmp_path, make_cases(), data=data, proceed=True, **train)
  assert history(tmp_path) == [(4, 0.4), (5, 0.5), (6, 0.6)]
  assert checkpoints(tmp_path)[-1:] == [6]
  assert [line["step"] for line in lines(tmp_path)] == [4, 5, 6]


def test_patience_ends_a_run_in_order(tmp_path, validated, capsys, monkeypatch):
  monkeypatch.setattr(session, "_require_same_shapes", lambda *_: None)
  validated.scores = {3: 0.5, 4: 0.4, 5: 0.45, 6: 0.9}
  patient = {"evaluation.patience": 2}
  state = run(validated, tmp_path, **patient)
  assert int(state.step) == 5 and checkpoints(tmp_path) == [3, 5]
  said = "stopped early, after step 5 of 6: 2 validations without a better one"
  assert said in capsys.readouterr().err
  before = journal(tmp_path)
  assert before[-1].keys() == {"step", "params_sha256"}
  # The same command finds it complete, and says so.
  validated.steps.clear()
  assert int(run(validated, tmp_path, **patient).step) == 5
  assert not validated.steps and journal(tmp_path) == before
  assert said in capsys.readouterr().err
  with pytest.raises(ValueError, match=r"evaluation\.patience: 2 before, 0"):
    run(validated, tmp_path)
  config = make_config(**{"evaluation.every": 1})
  state = loop.train(
    *(config, tmp_path, make_cases()),
    make_refill=bank.make_refill,
    make_validate=validated.make_validate,
    proceed=True,
  )
  assert int(state.step) == TOTAL and best(history(tmp_path)) == (6, 0.9)


def test_patience_needs_validations(tmp_path, validated):
  with pytest.raises(ValueError, match=r"set evaluation\.every too"):
    configs.check(make_config(**{"evaluation.patience": 2}))
  with pytest.raises(ValueError, match="needs make_validate"):
    loop.train(
      make_config(**{"evaluation.every": 1}),
      *(tmp_path, make_cases()),
      make_refill=bank.make_refill,
    )
  assert not (tmp_path / "config.json").exists()


def restore(workdir, wanted):
  """The step of the checkpoint that is taken."""
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = checkpoint.describe(
    make_state, lambda tree: jax.tree.map(lambda _: device, tree)
  )
  found = Checkpoints(workdir)
  try:
    return found.restore(abstract, wanted=wanted)[0]
  finally:
    found.close()


def test_a_damaged_best_gives_way_to_the_last(tmp_path, validated):
  run(validated, tmp_path)
  assert checkpoints(tmp_path) == [3, 6]
  restored = partial(restore, tmp_path)
  assert [restored(w) for w in (None, "best", "last", 3, 6)] == [3, 3, 6, 3, 6]
  with pytest.raises(ValueError, match="no checkpoint of step 4; there are 3,"):
    restored(4)
  shutil.rmtree(tmp_path / "checkpoints" / "3" / "inference")
  assert restored(None) == restored("last") == 6
  with pytest.raises(ValueError, match="no checkpoint in .* can be read"):
    restored("best")


def test_there_may_be_no_best(tmp_path, validated):
  run(validated, tmp_path, **{"evaluation.every": 0})
  assert restore(tmp_path, None) == TOTAL
  with pytest.raises(ValueError, match=r"not validated.*--checkpoint last"):
    restore(tmp_path, "best")


def trained(history, step, last, chosen="best", **changes):
  config = make_config(**{"evaluation.every": 1} | changes)
  return Trained(
    *(Layout("run"), configs.Record(config), None, step, None),
    *(chosen, last, history),
  )


def test_a_report_says_what_was_taken_and_that_a_run_stopped_early():
  history = [(3, 0.5), (4, 0.4), (5, 0.45)]
  found = trained(history, 3, 5, **{"evaluation.patience": 2})
  assert str(found) == "best of 3 validations, step 3, validation ES-Dice 50.0"
  assert found.checkpoint() == {
    **{"chosen": "best", "step": 3, "score": 0.5, "validations": 3},
    **{"last_step": 5, "stopped_early": True},
  }
  assert evaluate._early("FairDiff", found) == [
    "FairDiff stopped early, after step 5 of 6: 2 validations without a better"
    " one (evaluation.patience)."
  ]
  for other in (
    trained(history, 3, 5),
    trained(history, 3, 5, **{"evaluation.patience": 3}),
    trained([*history, (6, nan)], 3, 6, **{"evaluation.patience": 2}),
  ):
    assert not other.stopped_early and evaluate._early("FairDiff", other) == []
  last = trained([*history, (6, nan)], 6, 6, "last")
  assert (last.score, str(last)) == (None, "last, step 6, not validated")
  assert str(trained([], 2, 6, "given")) == "given, step 2, not validated"


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    *((None, None), ("", None), ("best", "best"), ("last", "last")),
    *(("12", 12), (12, 12)),
  ],
)
def test_how_a_checkpoint_is_named(text, expected):
  assert parse_checkpoint(text) == expected
  for wrong in ("newest", "-1", "1.5", -1, True):
    with pytest.raises(ValueError, match="give best, last, or a step"):
      parse_checkpoint(wrong)


def test_checkpoints_chosen_differently_are_not_compared():
  best = {"checkpoints": {"Segmenter": {"chosen": "best"}}}
  compare._check_chosen({"a": {}, "b": {"checkpoints": {}}})
  compare._check_chosen({"a": best, "b": best})
  message = r"a was evaluated at its last checkpoint, b at its best .*--checkp"
  with pytest.raises(ValueError, match=message):
    compare._check_chosen({"a": {}, "b": best})
