"""The journal."""

import io
import json
import sys
import types

import numpy as np
import pytest
from PIL import Image

from fairdiff_jax.training import goodput
from fairdiff_jax.training.goodput import Stopwatch
from fairdiff_jax.training.journal import Journal, sending


def lines(workdir):
  text = (workdir / "metrics.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def test_resume_cuts_back(tmp_path):
  journal = Journal(tmp_path, start=0, stop=8)
  for step in range(1, 6):
    journal.step()
    journal.log(step, {"loss/total": float(step)})
  journal.log(5, {"params_sha256": "old"})
  journal.close()
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 6, "loss/to')  # killed here
  Journal(tmp_path, start=3, stop=8).close()
  assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
  journal = Journal(tmp_path, start=3, stop=8)
  journal.log(4, {"loss/total": 4.0})
  journal.close()
  assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
  assert not list(tmp_path.glob("*.tmp"))


def test_a_half_written_line_is_dropped(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1}\n{"step": 2}\n{"st')
  Journal(tmp_path, start=2, stop=8).close()
  assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_what_is_not_finite_is_null(tmp_path):
  journal = Journal(tmp_path, start=0, stop=2)
  journal.log(1, {"risk/Asian": float("nan"), "x": float("inf"), "y": 0.5})
  journal.close()
  assert lines(tmp_path) == [
    {"step": 1, "risk/Asian": None, "x": None, "y": 0.5}
  ]


@pytest.fixture
def pass_time(monkeypatch):
  """Lets seconds go by on the clock of stopwatches, and none otherwise."""
  now = [0.0]
  clock = types.SimpleNamespace(monotonic=lambda: now[0])
  monkeypatch.setattr(goodput, "time", clock)

  def pass_time(seconds):
    now[0] += seconds

  return pass_time


def test_throughput(tmp_path, pass_time):
  """That of steps and their batches, whatever else takes time."""
  clock = Stopwatch()
  journal = Journal(tmp_path, start=0, stop=4, clock=clock)
  for done in (2, 4):
    with clock("step"):
      pass_time(0.02)
    with clock("refill"), clock("data"):
      pass_time(0.02)
    with clock("compile"):
      pass_time(0.2)
    journal.log(done, {}, cases=10)
  journal.close()
  for line in lines(tmp_path):
    assert 0.02 <= line["seconds_per_step"] < 0.1
    assert 100 < line["cases_per_second"] <= 500


def test_every_start_leaves_what_it_took(tmp_path, pass_time):
  path = tmp_path / "goodput.jsonl"
  for start in (0, 1):
    clock = Stopwatch()
    journal = Journal(tmp_path, start=start, stop=2, clock=clock)
    with clock("save"), clock("step"):
      pass_time(0.01)
    journal.step()
    journal.close()
  Journal(tmp_path, start=2, stop=2).close()  # which had nothing to do
  first, second = map(json.loads, path.read_text().splitlines())
  assert (first["start"], first["stop"]) == (0, 1)
  assert (second["start"], second["stop"]) == (1, 2)
  assert first["seconds"]["step"] >= 0.01 > first["seconds"]["save"]
  found = goodput.read(path)
  both = first["seconds"]["step"] + second["seconds"]["step"]
  assert found["step"] == pytest.approx(both)
  assert list(found) == ["step", "save", "other"]
  path.write_text('{"seconds": {"step": null, "x": 1}}\n{"seconds": 3}\n')
  assert goodput.read(path) == {}
  path.write_bytes(b"\0\0")
  assert goodput.read(path) is None
  assert goodput.read(tmp_path / "absent") is None


@pytest.mark.parametrize(
  ("seconds", "text"),
  [
    ({}, "of 0 s: "),
    ({"step": 570, "compile": 130, "save": 1}, "of 12 min: steps 81%, "),
    ({"init": 30, "step": 60.4}, "of 90 s: steps 67%, starting 33%"),
    ({"data": 7200, "step": 3600}, "of 3.0 h: waiting for batches 67%, "),
  ],
)
def test_times_in_words(seconds, text):
  assert goodput.told(seconds).startswith(text)


def test_events_are_written(tmp_path):
  journal = Journal(tmp_path, start=0, stop=2)
  journal.log(1, {"loss/total": 0.5, "params_sha256": "text is no scalar"})
  journal.close()
  (events,) = tmp_path.glob("events.*")
  content = events.read_bytes()
  assert b"loss/total" in content and b"params_sha256" not in content


def test_pictures_of_banks_are_shown_once(tmp_path):
  """Those filled from where the journal starts on, if they have one."""
  journal = None
  for step in (2, 4, 6):
    bank = tmp_path / "bank" / f"step_{step:08d}"
    bank.mkdir(parents=True)
    if step < 6:
      pixels = np.full((5, 7, 3), step, np.uint8)
      Image.fromarray(pixels).save(bank / "sheet.png")
    if journal is None:
      journal = Journal(tmp_path, start=3, stop=8)
    journal.log(step + 1, {"loss/total": 0.5})
    journal.log(step + 2, {"loss/total": 0.5})
  journal.close()
  (events,) = tmp_path.glob("events.*")
  assert events.read_bytes().count(b"\x89PNG") == 1


@pytest.fixture
def sent(monkeypatch):
  """What a stand-in for Weights & Biases was asked for."""
  calls = []

  def init(**run):
    calls.append(run)
    return types.SimpleNamespace(
      log=lambda numbers, step: calls.append((step, numbers)),
      finish=lambda: calls.append("finish"),
    )

  monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
  return calls


def test_numbers_alone_are_sent_where_it_is_asked_for(tmp_path, sent):
  bank = tmp_path / "bank" / "step_00000000"
  bank.mkdir(parents=True)
  Image.fromarray(np.zeros((5, 7, 3), np.uint8)).save(bank / "sheet.png")
  for start in (0, 2, 0):
    with sending("fair"):
      journal = Journal(tmp_path, start=start, stop=8, name="baseline")
    journal.log(start + 1, {"risk/Asian": float("nan"), "x": 0.5, "text": "t"})
    journal.close()
  first, again, anew = sent[::3]
  assert first["project"] == "fair" and first["resume"] == "allow"
  assert first["name"] == f"{tmp_path.name}, baseline"
  assert first["id"] == again["id"] != anew["id"]  # it went on, it began again
  assert sent[1:3] == [(1, {"x": 0.5}), "finish"]
  Journal(tmp_path, start=0, stop=8).close()
  with sending(""):
    Journal(tmp_path, start=0, stop=8).close()
  with sending("fair"):
    Journal(tmp_path, start=0, stop=8, enabled=False).close()
  assert len(sent) == 9


def test_a_missing_package_is_said_before_anything_runs(monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(ImportError, match=r"pip install 'fairdiff_jax\[wandb\]'"):
    with sending("fair"):
      pytest.fail("it began")


def test_one_bar_that_does_not_flood_a_file(tmp_path, monkeypatch):
  stream = io.StringIO()
  monkeypatch.setattr(sys, "stderr", stream)
  journal = Journal(tmp_path, start=10, stop=2010, name="baseline")
  for _ in range(2000):
    journal.step()
  journal.say("a message")
  journal.close()
  text = stream.getvalue()
  assert text.count("baseline:") <= 4 and "2010/2010" in text
  assert "a message\n" in text


def test_other_hosts_are_silent(tmp_path, capsys):
  journal = Journal(tmp_path, start=0, stop=2, enabled=False)
  journal.step()
  journal.say("a message")
  journal.log(1, {"loss/total": 1.0})
  journal.close()
  assert not list(tmp_path.iterdir())
  assert capsys.readouterr() == ("", "")
