"""The order of a run: phases, refills, saves and stops. Nothing is compiled.

Networks are a counter, and synthetic cases blank: what is looked at is which
steps are asked for what, and what a run that was stopped goes on with.
"""

import gzip
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.phantom import get_config
from fairdiff_jax import files
from fairdiff_jax.data.attributes import ATTRIBUTES
from fairdiff_jax.data.cases import Cases
from fairdiff_jax.fairness.risk import RunningRisk
from fairdiff_jax.objectives.joint import FairnessState
from fairdiff_jax.synthesis import bank
from fairdiff_jax.synthesis.generate import Generated
from fairdiff_jax.training import (
  checkpoint,
  goodput,
  loop,
  session,
  termination,
)
from fairdiff_jax.training.checkpoint import Checkpoints
from fairdiff_jax.training.schedule import active_networks
from fairdiff_jax.training.setup import Setup
from fairdiff_jax.training.step import TrainState

ROOT = Path(__file__).parents[1]
GROUPS = ("Asian", "Black", "White")
TOTAL = 6


def make_config(**changes):
  config = get_config("smoke")
  config.update_from_flattened_dict(
    {
      "data.size": (8, 8),
      "data.augment": "none",
      "train.steps": TOTAL,
      "train.points": (0, TOTAL),
      "train.image": (0, TOTAL),
      "train.segmenter": (2, TOTAL),
      "bank.every": 2,
      "bank.batch_size": 1,
      "checkpoint.every": 0,
      "baseline": False,
      "fairness.method": "erm",
    }
    | changes
  )
  return config


def make_cases():
  group = np.repeat([0, 1, 2], [1, 2, 5]).astype(np.int32)
  n = len(group)
  return Cases(
    name=[f"case_{i}" for i in range(n)],
    image=np.zeros((n, 8, 8), np.uint8),
    mask=np.zeros((n, 8, 8), np.uint8),
    points=np.ones((n, 32, 3), np.float32),
    attributes={a: group for a in ATTRIBUTES},
  )


def make_state():
  return TrainState(
    step=jnp.int32(0),
    updates={"segmenter": jnp.int32(0)},
    params={"network": jnp.zeros(3)},
    ema={"network": jnp.zeros(3)},
    batch_stats={},
    frozen={},
    imported={},
    opt_state={},
    fairness=FairnessState(RunningRisk.start(3), ()),
  )


@pytest.fixture(autouse=True)
def world(monkeypatch):
  """A run without networks; what it did, and what is to happen when."""
  count = session.make_step
  world = SimpleNamespace(steps=[], generated=[], at={}, faults={}, losses={})
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = checkpoint.describe(
    make_state, lambda tree: jax.tree.map(lambda _: device, tree)
  )

  def setup(config):
    objective = SimpleNamespace(group_names=GROUPS, tasks={})
    return Setup(config, objective, None, None, abstract, make_state)

  def make_step(run, active):
    if not active:
      return count(run, active)
    world.at.get(("compile", active), lambda: None)()

    def step(state, batch):
      number = int(state.step)
      world.at.get(("step", number), lambda: None)()
      parts = set()
      parts |= {"generation"} if {"points", "image"} & set(active) else set()
      parts |= {"segmentation"} if "segmenter" in active else set()
      assert set(batch) == parts
      world.steps.append((number, active))
      params = {"network": state.params["network"] + number}
      updates = {"segmenter": jnp.int32("segmenter" in active) * (number + 1)}
      state = state.replace(step=state.step + 1, params=params, ema=params)
      return state.replace(updates=updates), {
        "loss/total": jnp.float32(world.losses.get(number, 1))
      }

    return step

  def make_generator(run, anatomy):
    def generate(inference, seed, number, group):
      world.at.get(("batch", len(world.generated)), lambda: None)()
      world.generated.append((seed, *number))
      image = np.full((len(number), 8, 8), 7, np.uint8)
      image[:, 0, 0], image[:, 0, 1] = number, inference.ema["network"][0]
      fault = np.array([world.faults.get(int(n), "") for n in number])
      return Generated(image, image % 3, np.ones(len(number), int), fault)

    return generate

  monkeypatch.setattr(session, "setup", setup)
  monkeypatch.setattr(session, "make_step", make_step)
  monkeypatch.setattr(session, "initial_state", lambda *_: make_state())

  def make_risk(run):
    return lambda inference, cases: cases.image[:, 0, 0] % 3

  monkeypatch.setattr(bank, "make_generator", make_generator)
  monkeypatch.setattr(bank, "_make_risk", make_risk)
  return world


def run(workdir, **changes):
  return loop.train(
    make_config(**changes), workdir, make_cases(), make_refill=bank.make_refill
  )


def journal(workdir):
  timing = {"seconds_per_step", "cases_per_second"}
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [
    {k: v for k, v in json.loads(line).items() if k not in timing}
    for line in lines
  ]


def banks(workdir):
  paths = (p for p in (workdir / "bank").rglob("*") if p.is_file())
  return {
    str(p.relative_to(workdir)): hashlib.sha256(p.read_bytes()).hexdigest()
    for p in paths
  }


def assert_same(workdir, reference):
  assert journal(workdir) == journal(reference)
  found = banks(workdir)
  assert found.items() <= banks(reference).items()
  assert "bank/step_00000004/cases.npz" in found


def checkpoints(workdir):
  names = (path.name for path in (workdir / "checkpoints").iterdir())
  return sorted(int(name) for name in names if name.isdigit())


def asks(number):
  return lambda: os.kill(os.getpid(), number)


# points, image, segmenter
LAYOUTS = {
  "joint": ((0, 6), (0, 6), (0, 6)),
  "staged": ((0, 2), (2, 4), (4, 6)),
  "a gap between": ((0, 2), (0, 2), (4, 6)),
  "gaps at both ends": ((1, 3), (1, 3), (2, 5)),
  "the segmenter stops first": ((0, 6), (0, 6), (2, 3)),
  "the segmenter starts first": ((3, 6), (3, 6), (0, 4)),
  "the segmenter alone": ((0, 0), (0, 0), (1, 6)),
  "no image generator": ((0, 4), (0, 0), (2, 4)),
  "points alone": ((0, 6), (0, 0), (0, 0)),
  "nothing": ((0, 0), (0, 0), (0, 0)),
  "longer than the run": ((0, 60), (0, 60), (3, 60)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
  ("strategy", "every"),
  [("none", 2), ("repeat_sample", 2)]
  + [("equal_scale", every) for every in (0, 1, 2)],
)
def test_any_strategy_with_any_phases(tmp_path, world, strategy, layout, every):
  points, image, segmenter = LAYOUTS[layout]
  changes = {
    "fairness.strategy": strategy,
    "bank.every": every,
    "train.points": points,
    "train.image": image,
    "train.segmenter": segmenter,
  }
  learns = segmenter[0] < segmenter[1]
  if strategy == "equal_scale" and learns and image == (0, 0):
    with pytest.raises(ValueError, match=r"train\.\w+ has no steps"):
      run(tmp_path, **changes)
    return
  state = run(tmp_path, **changes)
  config = make_config(**changes)
  expected = [(s, active_networks(config, s)) for s in range(TOTAL)]
  expected = [(s, active) for s, active in expected if active]
  assert world.steps == expected
  assert int(state.step) == TOTAL and checkpoints(tmp_path) == [TOTAL]
  *lines, last = journal(tmp_path)
  assert [line["step"] for line in lines] == [s + 1 for s, _ in expected]
  assert all(line["loss/total"] == 1 for line in lines)
  assert last.keys() == {"step", "params_sha256"}
  filled = {seed[1] for seed, *_ in world.generated}
  if strategy != "equal_scale" or not learns:
    assert not filled and not (tmp_path / "bank").exists()
    return
  start, stop = segmenter[0], min(segmenter[1], TOTAL)
  assert filled == set(range(start, stop, every or TOTAL))
  # What the last step of the segmenter used is there for the report.
  directory = tmp_path / "bank" / f"step_{max(filled):08d}"
  assert (directory / "cases.npz").is_file()


def test_zero_is_off(tmp_path, world):
  run(tmp_path, **{"log.every": 0, "bank.every": 0, "checkpoint.every": 0})
  assert [line["step"] for line in journal(tmp_path)] == [TOTAL, TOTAL]
  assert {seed[1] for seed, *_ in world.generated} == {2}
  assert checkpoints(tmp_path) == [TOTAL]


def test_the_last_line_is_of_the_last_step_that_learns(tmp_path):
  learning = {f"train.{n}": (0, 3) for n in ("points", "image", "segmenter")}
  run(tmp_path, **{"log.every": 0}, **learning)
  assert [line["step"] for line in journal(tmp_path)] == [3, TOTAL]


def test_a_gap_is_gone_through_after_a_restart(tmp_path, world):
  gap = {"train.points": (0, 1), "train.image": (0, 1)}
  changes = gap | {"train.segmenter": (4, 6), "checkpoint.every": 1}
  world.at["step", 4] = asks(signal.SIGTERM)
  assert run(tmp_path, **changes) is None
  world.at.clear()
  shutil.rmtree(tmp_path / "checkpoints" / "5")  # goes on from step 4
  state = run(tmp_path, **changes)
  assert [s for s, _ in world.steps] == [0, 4, 4, 5]
  assert float(state.params["network"][0]) == 0 + 4 + 5


@pytest.fixture
def reference(tmp_path_factory, world):
  """A run that nothing interrupted."""
  workdir = tmp_path_factory.mktemp("reference")
  run(workdir, **{"checkpoint.every": 3})
  world.steps.clear()
  world.generated.clear()
  return workdir


def test_a_profile_of_the_steps_that_are_asked_for(tmp_path, world):
  """Of those that a start does; the next goes on with a trace of its own."""
  world.at["step", 3] = asks(signal.SIGTERM)
  traced = []
  for workdir in (tmp_path / "first", tmp_path / "second"):
    run(workdir, **{"log.profile": (2, 5)})
    (path,) = workdir.glob("profile/plugins/profile/*/*.trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    steps = [e["args"]["step_num"] for e in events if e.get("name") == "train"]
    traced.append(sorted(map(int, steps)))
    world.at.clear()
    if len(traced) == 1:
      kept = shutil.ignore_patterns("profile")
      shutil.copytree(workdir, tmp_path / "second", ignore=kept)
  assert traced == [[2, 3], [4]]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_saves_and_the_same_command_resumes(
  tmp_path, world, reference, name, capsys, request
):
  number = getattr(signal, name)
  before = signal.default_int_handler  # even where the tests ignore signals
  request.addfinalizer(partial(signal.signal, number, signal.getsignal(number)))
  signal.signal(number, before)
  world.at["step", 3] = asks(number)
  assert run(tmp_path, **{"checkpoint.every": 3}) is None
  assert signal.getsignal(number) is before
  stopped = f"{name}: stopped after step 4, saved; the same command resumes"
  assert stopped in capsys.readouterr().err
  assert checkpoints(tmp_path) == [3, 4]  # not a moment later
  world.at.clear()
  assert run(tmp_path, **{"checkpoint.every": 3}) is not None
  assert_same(tmp_path, reference)
  assert [s for s, _ in world.steps] == list(range(TOTAL))


def test_it_is_told_where_the_time_went(tmp_path, world, capsys):
  """And what is no step does not slow the steps down that are logged."""
  for moment in (
    ("compile", ("points", "image")),
    ("step", 1),
    ("batch", 0),
  ):
    world.at[moment] = partial(time.sleep, 0.3)
  world.at["step", 3] = asks(signal.SIGTERM)
  began = time.monotonic()
  assert run(tmp_path) is None
  whole = time.monotonic() - began
  assert run(tmp_path) is not None
  first, second = files.read_json_lines(tmp_path / "goodput.jsonl")
  assert [first["start"], first["stop"]] == [0, 4]
  assert [second["start"], second["stop"]] == [4, 6]
  assert first["seconds"].keys() == goodput.KINDS.keys()
  for kind in ("compile", "step", "refill"):
    assert first["seconds"][kind] >= 0.29, kind
  assert 0.9 < sum(first["seconds"].values()) < whole + 0.01
  lines = files.read_json_lines(tmp_path / "metrics.jsonl")
  seconds = {line["step"]: line.get("seconds_per_step") for line in lines[:-1]}
  assert seconds[2] >= 0.29
  spent = [line["seconds"] for line in (first, second)]
  of_steps = sum(line["step"] + line["data"] for line in spent)
  assert sum(seconds.values()) <= of_steps + 0.01
  said = capsys.readouterr().err
  assert len(re.findall(r"of \d+ s: ", said)) == 2
  assert re.search(r"of \d s: .*steps \d+%", said)


@pytest.mark.parametrize("stopped", [1, 5])  # in the first refill, the second
def test_a_refill_goes_on_after_its_last_batch(
  tmp_path, world, reference, stopped, capsys
):
  run(tmp_path / "whole")
  whole = world.generated[:]
  world.generated.clear()
  assert len(whole) > stopped + 1
  world.at["batch", stopped] = asks(signal.SIGTERM)
  assert run(tmp_path) is None
  assert len(world.generated) == stopped + 1  # the batch is ended, no other
  step = world.generated[-1][0][1]
  assert f"SIGTERM: stopped after step {step}, saved" in capsys.readouterr().err
  assert checkpoints(tmp_path) == [step]
  world.at.clear()
  assert run(tmp_path) is not None
  assert world.generated == whole
  assert_same(tmp_path, reference)
  assert not (tmp_path / "bank" / "unfinished").exists()


def test_batches_of_another_state_are_not_used(tmp_path, world):
  world.at["batch", 1] = asks(signal.SIGTERM)
  assert run(tmp_path) is None
  (folder,) = (tmp_path / "bank" / "unfinished").iterdir()
  folder.rename(folder.with_name("step_00000002_" + 16 * "0"))
  world.at.clear()
  world.generated.clear()
  assert run(tmp_path) is not None
  assert world.generated[0][1:] == (0,)  # from the first batch


def test_a_compilation_is_not_waited_for(tmp_path, world, capsys):
  compiled = threading.Event()
  joint = ("points", "image", "segmenter")
  world.at["compile", joint] = compiled.wait
  timer = threading.Timer(1, asks(signal.SIGTERM))
  timer.start()
  start = time.monotonic()
  try:
    assert run(tmp_path, **{"bank.every": 0}) is None
    assert time.monotonic() - start < 30
  finally:
    compiled.set()
  assert "stopped after step 2, saved" in capsys.readouterr().err
  assert checkpoints(tmp_path) == [2]
  assert run(tmp_path, **{"bank.every": 0}) is not None
  assert [s for s, _ in world.steps] == list(range(TOTAL))


def test_before_the_first_step_there_is_nothing_to_save(
  tmp_path, world, capsys
):
  world.at["compile", ("points", "image")] = asks(signal.SIGTERM)
  assert run(tmp_path) is None
  assert "SIGTERM: stopped before the first step" in capsys.readouterr().err
  assert not checkpoints(tmp_path)


def test_ignored_signals_stay_ignored(tmp_path, world):
  """As under nohup."""
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    world.at["step", 3] = asks(signal.SIGHUP)
    assert run(tmp_path) is not None
  finally:
    signal.signal(signal.SIGHUP, before)


def test_hosts_meet_about_every_second(monkeypatch):
  clock, asked = SimpleNamespace(now=0.0), []
  elsewhere = False

  def all_hosts(value):
    asked.append(clock.now)
    return value and not elsewhere

  monkeypatch.setattr(termination.time, "monotonic", lambda: clock.now)
  monkeypatch.setattr(termination.jax, "process_count", lambda: 2)
  monkeypatch.setattr(termination, "all_hosts", all_hosts)
  monkeypatch.setattr(termination, "from_first_host", lambda value: value)
  stop = termination.Termination()
  try:
    for seconds, met in ((0.2, 20), (0.01, 5), (4.0, 100)):
      asked.clear()
      stop()  # as while a phase is compiled
      for _ in range(100):
        clock.now += seconds
        assert not stop.at_step()
      assert met <= len(asked) <= met + 3
    elsewhere = True  # another host was asked
    assert stop.at_step()
  finally:
    stop.close()


def test_a_signal_while_hosts_meet_is_heard_the_next_time(monkeypatch):
  asked = []

  def all_hosts(value):
    asked.append(value)
    if len(asked) == 1:
      os.kill(os.getpid(), signal.SIGTERM)
    return value

  monkeypatch.setattr(termination, "all_hosts", all_hosts)
  stop = termination.Termination()
  try:
    assert [stop(), stop(), stop()] == [False, True, True]
  finally:
    stop.close()


PROCESS = """
import os, signal, sys, time
import jax, jax.numpy as jnp
from fairdiff_jax.training.compiling import Compiler
from fairdiff_jax.training.termination import Termination
"""


def process(code):
  start = time.monotonic()
  done = subprocess.run(
    [sys.executable, "-c", PROCESS + code],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
  )
  return done, time.monotonic() - start


def test_a_process_ends_while_something_is_compiled():
  code = """
def long(x):
  for i in range(3000):
    x = jnp.sort(jnp.sin(x @ x) + i, axis=i % 2)
  return x

square = jnp.ones((8, 8))
compiler = Compiler({"long": lambda: jax.jit(long).lower(square).compile()})
time.sleep(1)
compiler.close(int(sys.argv[1]))
print("saved")
"""
  for status in (0, 1):
    done, seconds = process(f"sys.argv = ['', '{status}']\n{code}")
    assert (done.returncode, done.stdout) == (status, "saved\n"), done.stderr
    assert seconds < 60


def test_a_second_interrupt_ends_the_process():
  code = """
signal.signal(signal.SIGINT, signal.default_int_handler)  # even if ignored
stop = Termination()
os.kill(os.getpid(), signal.SIGINT)
print(stop(), flush=True)
os.kill(os.getpid(), signal.SIGINT)
time.sleep(60)
"""
  done, _ = process(code)
  assert done.returncode == -signal.SIGINT
  assert done.stdout == "True\n"
  assert "SIGINT: about to save and stop; once more: ends at" in done.stderr


def test_a_closed_terminal_does_not_end_a_run():
  """What is written to it fails from then on."""
  code = """
reader, writer = os.pipe()
os.dup2(writer, 2)
os.close(writer)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # even under nohup
stop = Termination()
os.close(reader)
os.kill(os.getpid(), signal.SIGHUP)
print("a line", file=sys.stderr, flush=True)
print(stop())
"""
  done, _ = process(code)
  assert (done.returncode, done.stdout) == (0, "True\n")


def test_complete_is_said_of_what_is_complete(tmp_path, monkeypatch):
  """The disk is full when the last checkpoint is written."""
  wait = Checkpoints.wait

  def full(self):
    if self._saving and self._saving[0] == TOTAL:
      self._saving[1].result()
      self._saving = None
      shutil.rmtree(tmp_path / "checkpoints" / str(TOTAL))
      raise OSError("no space left on device")
    wait(self)

  monkeypatch.setattr(Checkpoints, "wait", full)
  with pytest.raises(OSError, match="no space left"):
    run(tmp_path)
  assert not any("params_sha256" in line for line in journal(tmp_path))
  monkeypatch.undo()


def test_leftovers_of_a_kill_are_removed(tmp_path):
  with (
    pytest.raises(KeyboardInterrupt),
    files.new_directory(tmp_path / "bank" / "step_00000002") as mine,
  ):
    raise KeyboardInterrupt
  dead = mine.name.replace(str(os.getpid()), str(2**22 + 1))
  leftovers = [
    tmp_path / "bank" / dead,
    tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp",
  ]
  for directory in leftovers:
    directory.mkdir(parents=True)
    (directory / "file").write_text("half")
  run(tmp_path)
  assert not any(directory.exists() for directory in leftovers)


def exchange(directory):
  """All masks background, in a bank that is otherwise well-formed."""
  path = directory / "cases.npz"
  with np.load(path) as arrays:
    arrays = dict(arrays)
  arrays["mask"] = np.zeros_like(arrays["mask"])
  np.savez_compressed(path, **arrays)


def test_a_bank_that_was_exchanged_is_noticed(tmp_path, world, reference):
  world.at["step", 4] = asks(signal.SIGTERM)
  assert run(tmp_path, **{"checkpoint.every": 4}) is None
  world.at.clear()
  assert checkpoints(tmp_path) == [4, 5]
  directory = tmp_path / "bank" / "step_00000004"
  exchange(directory)
  # Step 5 goes with the bank; from step 4, it can be made anew.
  with pytest.raises(ValueError, match=rf"remove {directory}, and the same"):
    run(tmp_path, **{"checkpoint.every": 4})
  shutil.rmtree(directory)
  assert run(tmp_path, **{"checkpoint.every": 4}) is not None
  assert_same(tmp_path, reference)


def test_a_bank_alone_is_no_checkpoint_s(tmp_path, world, caplog):
  world.at["step", 4] = asks(signal.SIGTERM)
  assert run(tmp_path) is None
  exchange(tmp_path / "bank" / "step_00000004")
  with pytest.raises(ValueError, match=r"cases\.npz is not the one it was"):
    run(tmp_path)
  shutil.rmtree(tmp_path / "bank")
  with pytest.raises(ValueError, match=r"cases\.npz is missing"):
    run(tmp_path)


def test_the_bank_of_a_state_that_never_came_back_is_made_anew(tmp_path, world):
  world.at["step", 2] = asks(signal.SIGTERM)
  assert run(tmp_path, **{"checkpoint.every": 2}) is None
  shutil.rmtree(tmp_path / "checkpoints" / "3")
  path = tmp_path / "bank" / "step_00000002" / "bank.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {"source": "else"}))
  world.at.clear()
  world.generated.clear()
  assert run(tmp_path, **{"checkpoint.every": 2}) is not None
  assert {seed[1] for seed, *_ in world.generated} == {2, 4}


def test_unsound_masks_are_left_out_and_counted(tmp_path, world, capsys):
  # Half of each group is real: Asian lacks 2 of 5, Black 2.
  world.faults = {1: "no cup"}
  assert run(tmp_path, **{"bank.every": 0}) is not None
  directory = tmp_path / "bank" / "step_00000002"
  record = json.loads((directory / "bank.json").read_text())
  assert record["unsound"] == {"Asian": {"no cup": 1}}
  with np.load(directory / "cases.npz") as cases:
    assert cases["group"].tolist() == [0, 1, 1]
    assert cases["image"][:, 0, 0].tolist() == [0, 2, 3]
  lines = (directory / "manifest.jsonl").read_text().splitlines()
  assert [json.loads(line)["number"] for line in lines] == [0, 2, 3]
  (notice,) = [
    line for line in capsys.readouterr().err.splitlines() if "unsound" in line
  ]
  assert "1 of 4 masks are still unsound" in notice
  assert "{'Asian': {'no cup': 1}}" in notice


@pytest.mark.parametrize("stopped", [None, 9])
def test_of_candidates_those_of_high_risk_are_kept(tmp_path, world, stopped):
  """Also where a refill goes on."""
  # Asian lacks 2 of 5, Black 2: numbers 0 to 5 and 6 to 11, of risk n % 3.
  world.faults = {5: "no cup", 8: "no cup"}
  changes = {"bank.candidates": 3}
  if stopped:
    world.at["batch", stopped] = asks(signal.SIGTERM)
    assert run(tmp_path, **changes) is None
    world.at.clear()
  assert run(tmp_path, **changes) is not None
  directory = tmp_path / "bank" / "step_00000004"
  lines = files.read_json_lines(directory / "manifest.jsonl")
  assert [line["number"] for line in lines] == [1, 2, 7, 11]
  assert [line["risk"] for line in lines] == [1, 2, 1, 2]
  with np.load(directory / "cases.npz") as cases:
    assert cases["image"][:, 0, 0].tolist() == [1, 2, 7, 11]
    assert cases["group"].tolist() == [0, 0, 1, 1]


def test_a_segmenter_that_has_learned_nothing_has_no_risk(tmp_path, world):
  assert run(tmp_path, **{"bank.candidates": 3, "bank.every": 0}) is not None
  assert [number for _, number in world.generated] == [0, 1, 2, 3]


def test_a_mask_generator_that_cannot_draw_is_an_error(tmp_path, world):
  world.faults = {2: "no disc", 3: "ragged cup"}
  message = r"2 of 2 masks of Black are still unsound.*Train it longer"
  with pytest.raises(ValueError, match=message):
    run(tmp_path)
  assert not list((tmp_path / "bank").iterdir())


def test_seeds_and_steps_of_banks_are_in_their_noise(tmp_path, world):
  for seed in (7, 2**32 - 1):
    run(tmp_path / str(seed), seed=seed)
  seeds = dict.fromkeys(seed for seed, *_ in world.generated)
  assert list(seeds) == [
    (seed, step, 1) for seed in (7, 2**32 - 1) for step in (2, 4)
  ]
  record = tmp_path / "7" / "bank" / "step_00000004" / "bank.json"
  assert json.loads(record.read_text())["seed"] == [7, 4, 1]


def test_a_step_that_is_not_finite_stops_the_run(tmp_path, world):
  world.losses[3] = np.nan
  with pytest.raises(FloatingPointError, match="is not finite") as error:
    run(tmp_path, **{"checkpoint.every": 1})
  (dump,) = tmp_path.glob("nonfinite_step_*.json")
  assert str(dump) in str(error.value)
  content = json.loads(dump.read_text())
  assert content["step"] == 3
  assert len(content["cases"]["generation"]) == 8
  assert content["metrics"] == {"loss/total": "nan"}
  assert checkpoints(tmp_path) == [2, 3]  # the states before it


def test_the_time_left_knows_what_was_seen(tmp_path, monkeypatch):
  shown = []
  monkeypatch.setattr(
    session.Journal, "step", lambda self, left: shown.append(left)
  )
  run(tmp_path, **{"checkpoint.every": 3})
  assert shown[0] == "time left unknown"  # no step has been timed
  assert shown[-1].endswith(" left") and "at least" not in shown[-1]
  shown.clear()
  run(tmp_path / "b", **{"checkpoint.every": 3, "baseline": True})
  assert shown[-2].startswith("at least ")  # the baseline is still to come


def test_the_plan_comes_first(tmp_path, capsys):
  run(tmp_path, **{"train.points": (0, 1), "train.image": (0, 1)})
  text = capsys.readouterr().err
  plan = """plan of 6 steps:
  0 to 1       points, image
  1 to 2       nothing learns
  2 to 6       segmenter
  bank         filled at step 2, then every 2 steps
  checkpoints  at the end, the newest 2 are kept
"""
  assert plan in text
  assert "compiled the step of points, image in 0 s" in text
  assert "compiled the generators of synthetic cases in 0 s" in text
