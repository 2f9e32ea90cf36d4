"""A study's bookkeeping, with runs that only write what a run leaves."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tables

from configs import phantom, phantom_study
from fairdiff_jax import config as configs
from fairdiff_jax import experiment, files, recipe, study
from fairdiff_jax.evaluation import report, segmentation
from fairdiff_jax.training.schedule import active_networks

METHODS = {
  "ERM": {"fairness.method": "erm"},
  "worst, tuned": {"fairness.method": "worst"},
  "staged": {"fairness.real_share": 0.0},
  "staged, shared": {"fairness.real_share": 0.5},
}
CHOICES = {"worst, tuned": ("fairness.temperature", (0.1, 0.2, 0.3))}
SHARED = {"staged, shared": ("staged", 7)}
ROOT = Path(__file__).parents[1]


def complete(workdir, figure):
  figures = {cls: {"dice": {"es": figure}} for cls in ("cup", "rim")}
  (workdir / "report").mkdir(parents=True, exist_ok=True)
  (workdir / "report" / "summary.json").write_text(
    json.dumps({"definitions": {}, "models": {"model": figures}})
  )
  (workdir / "checkpoints" / "7").mkdir(parents=True, exist_ok=True)


@pytest.fixture
def done(monkeypatch):
  """The runs that were made: (directory's name, config)."""
  done = []

  def run(config, workdir, *, proceed):
    # Only what takes another's checkpoint over may go on from it.
    taken = {
      f"{study._slug(name)}_{seed}" for name in SHARED for seed in (0, 1)
    }
    assert proceed == (workdir.name in taken)
    with files.owned(workdir):
      done.append((workdir.name, config))
      complete(workdir, 1 - abs(config.fairness.temperature - 0.2))
    return True

  monkeypatch.setattr(experiment, "run", run)
  return done


@pytest.fixture
def compared(monkeypatch):
  calls = []

  def compare_runs(runs, out, *, reference, ceiling):
    calls.append((runs, reference, ceiling))
    out.mkdir()

  monkeypatch.setattr(study, "compare_runs", compare_runs)
  return calls


def call(directory, methods=METHODS):
  return study.run(
    phantom.get_config("smoke"),
    directory,
    methods=methods,
    choices=CHOICES,
    shared=SHARED,
    seeds=2,
    reference="ERM",
    ceiling="staged",
  )


def test_a_study_chooses_runs_shares_and_compares(tmp_path, done, compared):
  page = call(tmp_path)
  assert page == tmp_path / "comparison" / "index.html"
  names = [name for name, _ in done]
  assert names[:3] == [f"worst_tuned_{t}" for t in (0.1, 0.2, 0.3)]
  for _, config in done[:3]:  # patients that the study itself never sees
    assert config.data.phantom.seed == config.data.phantom.test_seed == 1000
  configs = dict(done[3:])
  assert len(configs) == len(METHODS) * 2
  for seed in (0, 1):
    assert configs[f"worst_tuned_{seed}"].fairness.temperature == 0.2
    assert configs[f"staged_{seed}"].data.phantom.seed == seed
    assert configs[f"staged_{seed}"].data.phantom.test_seed == 0
    assert (tmp_path / f"staged_shared_{seed}" / "checkpoints" / "7").is_dir()
    assert not (tmp_path / f"erm_{seed}" / "checkpoints" / "8").exists()
  choices = json.loads((tmp_path / "choices.json").read_text())
  assert choices["chosen"] == {"worst, tuned": {"fairness.temperature": 0.2}}
  (runs, reference, ceiling) = compared[0]
  assert (reference, ceiling) == ("ERM", "staged")
  assert runs["staged"] == [tmp_path / "staged_0", tmp_path / "staged_1"]

  count = len(done)
  call(tmp_path)  # everything is there
  assert len(done) == count and len(compared) == 2


def test_a_real_report_has_scores(tmp_path):
  label = np.zeros((6, 16, 16), np.uint8)
  label[:, 2:14, 2:14] = 1
  label[:, 5:11, 5:11] = 2
  group = np.arange(6) % 2
  found = label.copy()
  found[group == 1] = np.roll(label[group == 1], 2, axis=2)
  names = [f"case {i}" for i in range(6)]
  columns = segmentation.per_case(label, found, names, group, ("a", "b"))
  summary = report.write(
    tmp_path / "report", title="a run", models={"Segmenter": columns}
  )
  (figures,) = summary["models"].values()
  assert study._is_complete(tmp_path)
  es = [figures[cls]["dice"]["es"] for cls in ("cup", "rim")]
  assert study._score(tmp_path) == pytest.approx(sum(es) / 2) and min(es) > 0


HOLD = """
import contextlib, sys
from fairdiff_jax import files
with contextlib.ExitStack() as stack:
  for directory in sys.argv[1:]:
    stack.enter_context(files.owned(directory))
  print("held", flush=True)
  sys.stdin.read()
"""


@contextlib.contextmanager
def another_start(*directories):
  """Another process that is at work in the directories."""
  command = [sys.executable, "-c", HOLD, *map(str, directories)]
  pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
  with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
    assert process.stdout.readline() == b"held\n"
    yield
    process.stdin.close()


def test_starts_share_the_runs(tmp_path, done, compared):
  """What another is at work on is passed by, and what needs it waits."""
  held = ("validation/worst_tuned_0.2", "staged_0", "erm_1")
  with another_start(*(tmp_path / name for name in held)):
    with pytest.raises(study.Busy, match="waits for one: .*staged_0, "):
      call(tmp_path)
    assert [name for name, _ in done] == [
      *("worst_tuned_0.1", "worst_tuned_0.3"),
      *("erm_0", "staged_1", "staged_shared_1"),
    ]
    assert not compared and not (tmp_path / "choices.json").exists()
    complete(tmp_path / held[0], 1.0)  # the others' work
    complete(tmp_path / held[1], 1.0)
  call(tmp_path)
  assert [name for name, _ in done[5:]] == [
    *("worst_tuned_0", "staged_shared_0", "erm_1", "worst_tuned_1")
  ]
  assert len(compared) == 1


def test_what_becomes_free_meanwhile_is_done(tmp_path, monkeypatch, compared):
  """By the one who has passed it by: the other may have ended for good."""
  made = []

  def run(config, workdir, *, proceed):
    if workdir.name == "staged_0" and "erm_1" not in made:
      raise files.InUse("another's, for a while")
    made.append(workdir.name)
    complete(workdir, 1.0)
    return True

  monkeypatch.setattr(experiment, "run", run)
  call(tmp_path)
  assert made[-2:] == ["staged_0", "staged_shared_0"] and len(compared) == 1


def test_one_start_compares(tmp_path, done, compared):
  with another_start(tmp_path), pytest.raises(study.Busy, match="compares"):
    call(tmp_path)
  assert not compared


def test_some_methods_of_a_study_are_picked(tmp_path, done, compared):
  methods = study.pick(METHODS, ["staged_shared", "erm"])
  assert methods == {name: METHODS[name] for name in ("staged, shared", "ERM")}
  with pytest.raises(ValueError, match="'dro'; give some of erm, worst_tuned"):
    study.pick(METHODS, ["erm", "dro"])
  call(tmp_path, methods)
  assert not (tmp_path / "choices.json").exists()
  (runs, reference, ceiling) = compared[0]
  assert [*runs] == [*methods] and (reference, ceiling) == ("ERM", None)
  assert len(done) == 4


@pytest.mark.parametrize(
  "content",
  [
    None,
    "",
    '{"definitions": {}, "models": {"mod',
    '{"definitions": {}, "models": {}}',
    '{"definitions": {}, "models": {"model": {"cup": 1}}}',
    '{"definitions": {}, "models": [], "sha256": {}}',
    '{"definitions": {}, "models": {}, "sha256": {"cases.csv": ""}}',
  ],
)
def test_a_damaged_report_is_not_trusted(tmp_path, done, compared, content):
  call(tmp_path)
  done.clear()
  path = tmp_path / "erm_1" / "report" / "summary.json"
  path.unlink() if content is None else path.write_text(content)
  call(tmp_path)
  assert [name for name, _ in done] == ["erm_1"]


def test_a_run_of_another_config_is_not_taken_for_the_study_s(
  tmp_path, done, compared
):
  call(tmp_path)
  configs.claim(tmp_path / "erm_1", phantom.get_config("smoke"))
  with pytest.raises(ValueError, match="erm_1 holds a run of another config"):
    call(tmp_path)


def swept(tmp_path, **changes):
  source = tables.lungs(tmp_path / "source", 6)
  return recipe("own:smoke", {"data.source": str(source), **changes})


def test_a_sweep_of_own_data_prepares_it_once(tmp_path, monkeypatch, compared):
  done = {}

  def run(config, workdir, *, proceed):
    done[workdir.name] = config
    assert not proceed and not config.baseline
    (workdir / "report").mkdir(parents=True)
    figures = {"left lung": {"dice": {"es": None}}}  # of structures like theirs
    (workdir / "report" / "summary.json").write_text(
      json.dumps({"definitions": {}, "models": {"model": figures}})
    )
    return True

  monkeypatch.setattr(experiment, "run", run)
  out = tmp_path / "study"
  methods = ("joint", "repeat_sample", "group_dro")
  config = swept(tmp_path)
  for _ in range(2):  # the second finds everything there
    study.sweep(config, out, methods=methods, seeds=2)
    assert len(done) == 6
  assert compared[0] == (
    {name: [out / f"{name}_{seed}" for seed in (0, 1)] for name in methods},
    "repeat_sample",
    None,
  )
  for seed in (0, 1):
    joint, repeated, dro = (done[f"{name}_{seed}"] for name in methods)
    assert {c.seed for c in (joint, repeated, dro)} == {seed}
    assert {c.data.directory for c in done.values()} == {str(out / "data")}
    assert joint.fairness == config.fairness and joint.train == config.train
    alone = experiment.baseline_config(config)
    assert repeated.train == dro.train == alone.train
    assert repeated.fairness == alone.fairness
    assert (dro.fairness.method, dro.fairness.strategy) == ("group_dro", "none")


def test_a_sweep_is_checked_before_anything_is_done(tmp_path):
  with pytest.raises(
    ValueError, match="no method 'dro'; give 'joint', 'repeat"
  ):
    study.sweep(swept(tmp_path), tmp_path / "out", methods=("erm", "dro"))
  assert not (tmp_path / "out").exists()


def test_a_setting_without_a_score_is_not_chosen(tmp_path, monkeypatch):
  scores = iter([None, 0.2, 0.3])
  monkeypatch.setattr(study, "_run", lambda config, workdir: workdir)
  monkeypatch.setattr(study, "_score", lambda workdir: next(scores))
  base = phantom.get_config("smoke")
  choice = study.choose(base, tmp_path / "new", METHODS, CHOICES)
  assert choice.chosen == {"worst, tuned": {"fairness.temperature": 0.3}}


def test_a_stopped_study_says_so(tmp_path, monkeypatch):
  monkeypatch.setattr(experiment, "run", lambda *_, **__: False)
  with pytest.raises(study.Stopped, match="the same command goes on"):
    call(tmp_path)


@pytest.mark.parametrize("small", [False, True])
def test_the_phantom_study_s_methods_fit_the_config(small):
  methods = phantom_study.SMALL if small else phantom_study.METHODS
  steps = set()
  for name, changes in methods.items():
    config = study.configure(phantom.get_config(), changes)
    configs.check(config)
    segmenter = config.train.segmenter
    steps.add(segmenter[1] - segmenter[0])
    assert "segmenter" in active_networks(config, config.train.steps - 1)
    for field, _ in filter(None, [phantom_study.CHOICES.get(name)]):
      assert study.configure(config, {field: 1.0})
  assert len(steps) == 1 and phantom_study.REFERENCE in methods


def test_the_phantom_study_shares_what_is_the_same():
  for name, (other, step) in phantom_study.SHARED.items():
    first, second = phantom_study.METHODS[name], phantom_study.METHODS[other]
    differing = {k for k in first if first[k] != second.get(k)}
    assert differing == {"fairness.real_share"}
    assert step == first["checkpoint.every"] == first["train.segmenter"][0]
