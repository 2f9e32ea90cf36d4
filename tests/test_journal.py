"""The journal."""

import io
import json
import sys

from fairdiff_jax.training.journal import Journal


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


def test_throughput(tmp_path):
  journal = Journal(tmp_path, start=0, stop=2)
  journal.log(2, {}, cases=10)
  journal.close()
  (line,) = lines(tmp_path)
  assert line["seconds_per_step"] >= 0 and line["cases_per_second"] > 0


def test_events_are_written(tmp_path):
  journal = Journal(tmp_path, start=0, stop=2)
  journal.log(1, {"loss/total": 0.5, "params_sha256": "text is no scalar"})
  journal.close()
  (events,) = tmp_path.glob("events.*")
  content = events.read_bytes()
  assert b"loss/total" in content and b"params_sha256" not in content


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
