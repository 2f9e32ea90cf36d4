"""The journal, and configs on disk."""

import io
import json
import sys

import pytest
from ml_collections import ConfigDict

from configs.base import base_config
from fairdiff_jax import config as configs
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


def test_config_round_trip(tmp_path):
  config = base_config()
  configs.claim(tmp_path, config)
  loaded = configs.load(tmp_path)
  assert isinstance(loaded, ConfigDict)
  assert configs.differences(config, loaded) == []
  assert configs.config_hash(loaded) == configs.config_hash(config)
  assert list(loaded.image.channels) == [64, 96]
  assert loaded.parallel.rules[0][1] == "fsdp"
  configs.claim(tmp_path, loaded)  # a run may be claimed again
  assert not list(tmp_path.glob("*.tmp"))


def test_differences_name_the_fields():
  old, new = base_config(), base_config()
  new.image.patch = 8
  new.fairness.method = "gap"
  new.points.encoder_widths = (1, 2)
  assert configs.differences(old, new) == [
    "fairness.method: erm before, gap now",
    "image.patch: 4 before, 8 now",
    "points.encoder_widths: [128, 128, 256, 512] before, [1, 2] now",
  ]
  del new.image["patch"]
  assert "image.patch: 4 before, absent now" in configs.differences(old, new)


@pytest.mark.parametrize("field", configs.HARMLESS)
def test_harmless_fields_do_not_count(field):
  old, new = base_config(), base_config()
  if field == "baseline":
    new.baseline = False
  else:
    key = sorted(new[field])[0]
    with new.unlocked():
      new[field][key] = "changed" if isinstance(new[field][key], str) else 3
  assert configs.to_json(old) != configs.to_json(new)
  assert configs.differences(old, new) == []
  assert configs.config_hash(old) == configs.config_hash(new)


def test_another_config_is_refused_and_nothing_is_overwritten(tmp_path):
  config = base_config()
  configs.claim(tmp_path, config)
  before = (tmp_path / "config.json").read_text()
  config.seed = 7
  with pytest.raises(ValueError, match=r"another config:\n  seed: 0 before, 7"):
    configs.claim(tmp_path, config)
  assert (tmp_path / "config.json").read_text() == before
