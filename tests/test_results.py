"""What summary.json holds: its keys, a run's epoch, baseline and provenance."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from configs.phantom import get_config
from fairdiff_jax import array_files, files
from fairdiff_jax import config as configs
from fairdiff_jax.evaluation import report, results, verdict
from fairdiff_jax.experiment import baseline_config
from fairdiff_jax.fairness import uncertainty
from fairdiff_jax.layout import Layout

ROOT = Path(__file__).parents[1]
NAMES = ("A", "B")
GROUP = np.repeat([0, 1, -1], (3, 10, 2))


def smoke(**changes):
  config = get_config("smoke").unlock()
  config.update_from_flattened_dict(
    {k.replace("__", "."): v for k, v in changes.items()}
  )
  return config


def test_keys_are_stable():
  """Others read them: one may come, none may go without a new schema."""
  found = results.Results(title="t", models={}, reason="none").to_json()
  assert results.SCHEMA == 1
  assert set(found) >= {
    *("schema", "title", "verdict", "findings", "cautions", "notices", "n"),
    *("groups", "models", "difference", "realism", "agreement", "epoch"),
    *("training_cases", "phases", "facts", "provenance", "definitions"),
    *("domain", "tables"),
  }
  assert found["schema"] == 1


def test_docs_name_every_key_and_limit():
  text = (ROOT / "docs" / "report.md").read_text()
  found = results.Results(title="t", models={}, reason="none").to_json()
  for key in (*found, *verdict.Finding._fields, "sha256"):
    assert f"`{key}`" in text, key
  for word in (*verdict.CLAIM, verdict.SILENT):
    assert f"`{word}`" in text, word
  flat = " ".join(text.split())
  assert f"`schema` is {results.SCHEMA};" in flat
  for limit in (
    f"more than {100 * verdict.NOISE:g} points",
    f"more than {100 * verdict.HARM:g} points",
    f"below {100 * verdict.FLOOR:g},",
    f"p is below {verdict.SIGNIFICANT:g}",
    f"fewer than {uncertainty.MIN_CASES} test cases",
  ):
    assert limit in flat, limit


def test_a_report_of_a_newer_version_is_refused(tmp_path):
  made = {"title": "t", "models": {}, "reason": "none"}
  summary = report.write(tmp_path / "report", **made)
  assert report.read(tmp_path) == summary
  path = tmp_path / "report" / "summary.json"
  path.write_text(json.dumps(summary | {"schema": 2}))
  with pytest.raises(
    ValueError, match=r"schema 2, .* up to 1; .*fairdiff evaluate"
  ):
    report.read(tmp_path)
  path.write_text(json.dumps({k: summary[k] for k in summary if k != "schema"}))
  assert report.read(tmp_path)["title"] == "t"  # of before there was one


def epoch(synthetic=(0, 0), bank=None, **changes):
  found = results.epoch(smoke(**changes), NAMES, GROUP, synthetic, bank)
  return {name: tuple(row.values()) for name, row in found.items()}


def test_what_an_epoch_held(tmp_path):
  """(real, repeated, synthetic), as `mixture.training_pool` mixes it."""
  unknown = {"unknown": (2, 0, 0)}
  assert epoch(fairness__strategy="none") == unknown | {
    "A": (3, 0, 0),
    "B": (10, 0, 0),
  }
  assert epoch(fairness__strategy="repeat_sample") == unknown | {
    "A": (3, 7, 0),
    "B": (10, 0, 0),
  }
  assert epoch(
    fairness__strategy="repeat_sample", fairness__group_size=12
  ) == unknown | {"A": (3, 9, 0), "B": (10, 2, 0)}
  sizes = np.array([12, 8])  # as tilted to A
  files.write(tmp_path / "cases.npz", array_files.npz_bytes({"sizes": sizes}))
  assert epoch((6, 0), tmp_path, fairness__strategy="equal_scale") == (
    unknown | {"A": (3, 3, 6), "B": (8, 0, 0)}
  )


def test_an_epoch_that_cannot_be_told_is_left_out(tmp_path):
  assert epoch((6, 0), tmp_path) == {}  # no such bank
  (tmp_path / "cases.npz").write_bytes(b"PK")
  assert epoch((6, 0), tmp_path) == {}
  assert epoch(train__segmenter=(0, 0)) == {}


def test_what_the_baseline_is():
  config = smoke()
  text = results.describe_baseline(config, baseline_config(config))
  assert text == (
    "the same segmenter, trained on real cases alone, those of small groups"
    " repeated (Repeat Sample), for 6 steps as in the run, with the same"
    f" augmentation ({config.data.augment}) and no fairness method"
  )
  other = smoke(
    **{"train__segmenter": (0, 4), "fairness__strategy": "none"},
    **{"fairness__method": "gap", "data__augment": "none"},
  )
  text = results.describe_baseline(config, other)
  assert "each once an epoch, for 4 steps, not the 6 of the run, with" in text
  assert "another augmentation (none instead of " in text
  assert text.endswith(" and gap")


def test_what_a_run_tells(tmp_path):
  config = smoke()
  found = results.about_run(config, Layout(tmp_path))
  assert found["made_up"] and not found["baseline"]
  assert found["baseline_start"] == 2
  assert [tuple(p) for p in found["phases"]] == [
    (0, 2, ("points", "image")),
    (2, 8, ("points", "image", "segmenter")),
  ]
  configs.claim(tmp_path / "baseline", baseline_config(config))
  found = results.about_run(smoke(data__source="cases.csv"), Layout(tmp_path))
  assert not found["made_up"]
  assert found["baseline"].startswith("the same segmenter, trained on real")
  assert found["provenance"]["training_goodput"] is None
  line = '{"start": 0, "stop": 8, "seconds": {"step": 2.5}}\n'
  (tmp_path / "goodput.jsonl").write_text(2 * line)
  found = results.about_run(config, Layout(tmp_path))["provenance"]
  assert found["training_goodput"] == {"step": 5.0}
  assert found["baseline_goodput"] is None
  (tmp_path / "baseline" / "config.json").write_text("{")
  assert not results.about_run(config, Layout(tmp_path))["baseline"]


def test_provenance():
  found = results.provenance()
  assert list(found) == [
    *("date", "version", "commit", "jax", "devices", "command")
  ]
  assert found["devices"] == "8 x cpu"
  assert found["date"].endswith("+00:00")
  json.dumps(found)


def test_seconds_are_those_of_the_steps():
  records = [
    {"step": 2, "seconds_per_step": 3.0},
    {"step": 4, "seconds_per_step": 1.0},
    {"step": 4, "seconds_per_step": 0.5},  # after a restart
    {"step": 4, "params_sha256": ""},
    {"step": None, "seconds_per_step": 9.0},
  ]
  assert results.trained_seconds(records) == 7.0
  assert results.trained_seconds([{"step": 1}]) is None


def test_curves_are_averaged():
  records = [
    {"step": s, "loss/total": 1 / (1 + s), "risk/Asian": 0.5, "rate": 3}
    for s in range(200)
  ]
  records[3]["risk/Asian"] = float("nan")
  records[4]["risk/Asian"] = None
  records.append({"step": 199, "loss/total": 7.0})
  curves = results.curves(records)
  assert sorted(curves) == ["loss/total", "risk/Asian"]
  steps, values = curves["loss/total"]
  assert len(steps) == results.CURVE
  assert values[-1] == pytest.approx(np.mean([1 / 198, 1 / 199, 7]))
  assert np.isfinite(curves["risk/Asian"]).all()


def test_the_baselines_curve_lies_where_the_segmenter_learns(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1, "loss/segmenter": 2, "seconds_per_step": 3}\n')
  made = results.Results(
    **{"title": "t", "models": {}, "reason": "none"},
    **{"baseline_log": path, "baseline_start": 700},
  )
  np.testing.assert_array_equal(
    made.baseline_curves["loss/segmenter"], [[701], [2]]
  )
  found = made.to_json()["provenance"]
  assert found == {"training_seconds": None, "baseline_seconds": 3.0}
  path.write_bytes(b"\0\0")
  (remark,) = dataclasses.replace(made).remarks
  assert "No curves of the baseline: " in remark and "not text" in remark
  path.unlink()
  assert dataclasses.replace(made).remarks == []
