"""Comparison of methods: figures, seeds, pairing, and what it refuses."""

import csv
import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from configs.phantom import get_config
from fairdiff_jax import config as configs
from fairdiff_jax import files
from fairdiff_jax.evaluation import compare, report, segmentation
from fairdiff_jax.fairness import uncertainty

ROOT = Path(__file__).parents[1]
GROUPS = np.repeat(["Asian", "Black", "White", "unknown"], (12, 32, 40, 3))
KNOWN = ("Asian", "Black", "White")
SUM = {"equity": "fairseg_sum"}
EVIL = '<b>"x"|&'


def table(rng, shift=0.0):
  """Columns of a table of cases; Asian cases are the worst."""
  columns = {"name": [f"data_{i:05d}" for i in range(len(GROUPS))]}
  columns["group"] = GROUPS
  for key in map("_".join, segmentation.scores()):
    values = rng.uniform(0.5, 0.8, len(GROUPS)) + shift
    columns[key] = values - 0.1 * (GROUPS == "Asian")
  columns["cup_dice"][40] = np.nan
  return columns


def make_run(directory, columns=None, definitions=None, facts=None, **changes):
  (directory / "report").mkdir(parents=True)
  config = get_config("smoke")
  config.update_from_flattened_dict(
    {k.replace("__", "."): v for k, v in changes.items()}
  )
  configs.claim(directory, config)
  if columns:
    path = directory / "report" / "cases.csv"
    segmentation.write_csv(path, columns)
    summary = {"definitions": definitions or {}, "facts": facts or {}}
    (directory / "report" / "summary.json").write_text(json.dumps(summary))
  return directory


def stored(columns, key):
  """The column as the table's six digits hold it."""
  return np.array([float(f"{value:.6g}") for value in columns[key]])


def expected(values):
  """Figures of a `[n]` measure, computed afresh."""
  means = [np.nanmean(values[GROUPS == g]) for g in KNOWN]
  overall = np.nanmean(values)
  return {
    ("overall", ""): overall,
    ("es", ""): overall / (1 + np.std(means, ddof=1)),
    ("gap", ""): max(means) - min(means),
    **{("group", g): m for g, m in zip(KNOWN, means, strict=True)},
  }


@pytest.fixture(scope="module")
def study(tmp_path_factory):
  """Two methods of two seeds and a third that is 0.05 above the first."""
  root, rng = tmp_path_factory.mktemp("study"), np.random.default_rng(0)
  columns = {(m, s): table(rng, m * 0.02) for m in (0, 1) for s in (0, 1)}
  columns |= {
    (2, s): columns[0, s]
    | {"cup_dice": columns[0, s]["cup_dice"] + 0.05}
    | {"rim_dice": columns[0, s]["rim_dice"] - 0.05}
    for s in (0, 1)
  }
  names = ("reference", EVIL, "ceiling")
  methods = {
    name: [make_run(root / f"{m}_{s}", columns[m, s], seed=s) for s in (0, 1)]
    for m, name in enumerate(names)
  }
  out = root / "out"
  rows = compare.compare_runs(methods, out, ceiling="ceiling")
  keyed = {tuple(row[k] for k in compare.KEYS): row for row in rows}
  return columns, keyed, out


def test_values_equal_direct_computation(study):
  columns, rows, _ = study
  for m, method in enumerate(("reference", EVIL, "ceiling")):
    for cls, measure in segmentation.scores():
      key = f"{cls}_{measure}"
      seeds = [expected(stored(columns[m, s], key)) for s in (0, 1)]
      for figure in seeds[0]:
        if figure[0] == "es" and measure in ("hd95", "error"):
          assert (method, cls, measure, *figure) not in rows
          continue
        row = rows[method, cls, measure, *figure]
        values = [seed[figure] for seed in seeds]
        assert row["value"] == pytest.approx(np.mean(values))
        assert row["sd"] == pytest.approx(np.std(values, ddof=1))
        assert row["n_seeds"] == 2
  worst = rows["reference", "cup", "dice", "worst", "Asian"]
  group = rows["reference", "cup", "dice", "group", "Asian"]
  assert worst == group | {"figure": "worst"}
  assert group["n"] == 12
  assert rows["reference", "cup", "dice", "overall", ""]["n"] == 86


def test_intervals_and_tests_are_of_the_mean_over_seeds(study):
  columns, rows, _ = study
  a, b = (
    np.mean([stored(columns[m, s], "cup_dice") for s in (0, 1)], 0)
    for m in (0, 1)
  )
  group = np.array([(*KNOWN, "unknown").index(g) for g in GROUPS])
  group[group == 3] = -1
  intervals = uncertainty.intervals(b, group, KNOWN)
  tests = uncertainty.compare(a, b, group, KNOWN)
  for figure in ("overall", "es", "gap"):
    row = rows[EVIL, "cup", "dice", figure, ""]
    assert (row["low"], row["high"]) == pytest.approx(intervals[figure])
    test = tests[figure]
    assert row["difference"] == pytest.approx(test["difference"])
    assert row["difference"] == pytest.approx(
      expected(b)[figure, ""] - expected(a)[figure, ""]
    )
    assert row["difference_low"] == pytest.approx(test["low"])
    assert row["difference_high"] == pytest.approx(test["high"])
    assert row["p"] == pytest.approx(test["p"])
  for name in KNOWN:
    row, test = rows[EVIL, "cup", "dice", "group", name], tests["groups"][name]
    assert (row["low"], row["high"]) == pytest.approx(intervals["groups"][name])
    assert row["p"] == pytest.approx(test["p_bootstrap"])
    assert row["p_holm"] == pytest.approx(test["p_bootstrap_holm"])
    assert row["p_wilcoxon"] == pytest.approx(test["p_wilcoxon"])
    assert row["p_wilcoxon_holm"] == pytest.approx(test["p_wilcoxon_holm"])


def test_a_constant_difference_has_no_width(study):
  _, rows, _ = study
  row = rows["ceiling", "cup", "dice", "overall", ""]
  for key in ("difference", "difference_low", "difference_high"):
    assert row[key] == pytest.approx(0.05, abs=1e-5)
  assert row["p"] < 0.01
  gap = rows["ceiling", "cup", "dice", "gap", ""]
  assert gap["difference"] == pytest.approx(0, abs=1e-5)
  assert np.isnan(rows["reference", "cup", "dice", "gap", ""]["difference"])


def test_share_of_the_distance_to_the_ceiling(study):
  _, rows, _ = study

  def es(method, cls):
    return rows[method, cls, "dice", "es", ""]

  low, middle, high = (es(m, "cup") for m in ("reference", EVIL, "ceiling"))
  assert (low["share"], high["share"]) == (0, 1)
  assert middle["share"] == pytest.approx(
    (middle["value"] - low["value"]) / (high["value"] - low["value"])
  )
  assert np.isnan(es(EVIL, "rim")["share"])  # the ceiling is below


def test_csv_holds_the_rows(study):
  _, rows, out = study
  with open(out / "comparison.csv", newline="", encoding="utf-8") as file:
    lines = list(csv.DictReader(file))
  assert len(lines) == len(rows)
  for line in lines:
    row = rows[tuple(line[key] for key in compare.KEYS)]
    for key in compare.VALUES:
      value = float(line[key] or "nan")
      assert value == pytest.approx(row[key], rel=1e-5, nan_ok=True)


def test_markdown_shows_the_figures(study):
  columns, rows, out = study
  text = (out / "comparison.md").read_text()
  seeds = [expected(stored(columns[1, s], "cup_dice")) for s in (0, 1)]
  line = next(
    line for line in text.splitlines() if line.startswith('| <b>"x"\\|& | 2 ')
  )
  cells = line.replace("\\|", "").split("|")[3:-1]
  figures = [("overall", ""), *(("group", g) for g in KNOWN)]
  figures += [("es", ""), ("gap", "")]
  for cell, key in zip(cells[:-1], figures, strict=True):
    values = [100 * seed[key] for seed in seeds]
    row = rows[EVIL, "cup", "dice", *key]
    assert cell.strip() == (
      f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f} "
      f"({100 * row['low']:.1f} to {100 * row['high']:.1f})"
    )
  assert cells[-1].strip().startswith("Asian ")
  # The least p: of 2,000 exchanges and none, of all 2^12; Holm's factors 3, 2.
  first, *groups = (
    f"+5.0 (+5.0 to +5.0; p {p})" for p in ("< 0.001", *["= 0.001"] * 3)
  )
  assert f"| ceiling | {first} | {' | '.join(groups)} |" in text
  assert text.count("\n## ") == 7
  assert "Warning: fewer than 30 test cases of Asian;" in text
  assert "87 test cases (Asian 12, Black 32, White 40, unknown 3)" in text
  assert "nan" not in text


def page_of(out):
  """The page without the figures that can be taken away."""
  return re.sub(r'"data:[^"]*"', '""', (out / "index.html").read_text())


def test_page_stands_alone(study):
  text = page_of(study[2])
  assert not re.search(r"https?:|@import|url\((?!#)|<script|src=", text)
  for address in re.findall(r'href="([^#"]+)"', text):
    assert (study[2] / address).is_file()
  anchors = re.findall(r'<h2 id="(.*?)"', text)
  assert re.findall(r'href="#([^"]*)">[^<]', text)[: len(anchors)] == anchors
  assert "nan" not in text
  assert text.count("<svg ") == text.count('role="img"') == 3
  for name in ("reference", "&lt;b&gt;&#34;x&#34;|&amp;", "ceiling"):
    assert name in text
  assert EVIL not in text
  assert "Warning: fewer than 30" in text


def test_runs_are_grouped_by_config_without_seed(tmp_path):
  runs = [
    make_run(tmp_path / name, seed=seed, fairness__method=method)
    for name, seed, method in (
      ("plain_seed0", 0, "erm"),
      ("fair_3", 0, "variance"),
      ("plain_seed1", 1, "erm"),
      ("other", 4, "variance"),
    )
  ]
  assert compare.group_runs(runs) == {
    "plain": [runs[0], runs[2]],
    "fairness.method=variance": [runs[1], runs[3]],
  }
  assert list(compare.group_runs(runs, ["a", "b"])) == ["a", "b"]
  for names in (["a"], ["a", "a"]):
    with pytest.raises(ValueError, match=r"2 methods \(plain; .*--names"):
      compare.group_runs(runs, names)
  again = make_run(tmp_path / "again", seed=1, fairness__method="erm")
  with pytest.raises(ValueError, match=r"plain_seed1 and .*again have one"):
    compare.group_runs([*runs, again])


@pytest.mark.parametrize(
  "changed",
  [
    {"data__phantom__seed": 1},
    {"data__source": "/data/1", "data__split": "lists/1.txt"},
    {"data__directory": "/prepared/1"},
    {"data__phantom__test_seed": 3, "data__pooled": ("Asian",)},
    {"image__weights": "/elsewhere/sd"},
    {"log__every": 7, "checkpoint__keep": 3, "parallel__fsdp": 2},
    {"baseline": False, "evaluation__batch_size": 3},
    {"train__segmenter": (2, 8)},  # the same in steps as the recipe's shares
  ],
)
def test_what_a_seed_or_a_place_changes_is_no_method(tmp_path, changed):
  common = {"data__min_cases": 2, "image__weights": "/here/sd"}
  runs = [
    make_run(tmp_path / "erm_0", **common),
    make_run(tmp_path / "erm_1", seed=1, **(common | changed)),
  ]
  assert compare.group_runs(runs) == {"erm": runs}


def test_runs_on_other_patients_may_have_one_seed(tmp_path):
  runs = [
    make_run(tmp_path / f"erm_{i}", data__directory=f"/prepared/{i}")
    for i in (0, 1)
  ]
  assert compare.group_runs(runs) == {"erm": runs}


def test_methods_are_named_by_the_fields_in_which_they_differ(tmp_path):
  """Where their directories do not tell them apart."""
  changes = (
    {"fairness__weight": 0.5},
    {"fairness__weight": 0.5, "seed": 1},
    {"fairness__weight": 2.0, "segmenter__weights": "/a/sam.pth"},
  )
  runs = [
    make_run(tmp_path / str(i) / "run", **change)
    for i, change in enumerate(changes)
  ]
  assert compare.group_runs(runs) == {
    "run, fairness.weight=0.5, segmenter.weights=": runs[:2],
    "run, fairness.weight=2.0, segmenter.weights=sam.pth": runs[2:],
  }


def test_a_run_that_was_changed_on_the_way_is_another_method(tmp_path):
  straight = make_run(tmp_path / "a_0", train__steps=16)
  longer = make_run(tmp_path / "a_1", seed=1)
  config = configs.load(longer).unlock()
  config.train.steps = 16
  configs.claim(longer, config, step=8, proceed=True)
  assert len(compare.group_runs([straight, longer], ["a", "b"])) == 2


def test_one_run_alone(tmp_path):
  run = make_run(tmp_path / "run", table(np.random.default_rng(0)))
  compare.compare_runs({"A": [run]}, tmp_path / "out")
  text = (tmp_path / "out" / "comparison.md").read_text()
  assert "±" not in text.split("## How to read")[0]
  assert text.count("\n## ") == 4


def test_summary_holds_the_rows_and_the_differences(study):
  _, rows, out = study
  summary = json.loads((out / "summary.json").read_text())
  assert summary["schema"] == compare.SCHEMA
  assert summary["reference"] == "reference"
  assert summary["ceiling"] == "ceiling"
  assert summary["groups"] == {"Asian": 12, "Black": 32, "White": 40}
  assert summary["n"] == 87
  assert [Path(run).name for run in summary["methods"][EVIL]] == ["1_0", "1_1"]
  assert len(summary["rows"]) == len(rows)
  for row in summary["rows"]:
    expected = rows[tuple(row[key] for key in compare.KEYS)]
    for key in compare.VALUES:
      value = np.nan if row[key] is None else row[key]
      np.testing.assert_equal(value, expected[key])
  differences = {
    tuple(row[key] for key in compare.KEYS): row
    for row in summary["differences"]
  }
  assert {key[0] for key in differences} == {EVIL, "ceiling"}
  row = differences[EVIL, "cup", "dice", "es", ""]
  assert row["p"] == rows[EVIL, "cup", "dice", "es", ""]["p"]
  assert row["difference"] == rows[EVIL, "cup", "dice", "es", ""]["difference"]


def test_no_figure_ends_a_comparison(tmp_path):
  """Structures that are nowhere, a group of one, patients of unknown group."""
  for i, groups in enumerate((["unknown"] * 3, ["Asian", "Black", "Black"])):
    columns = {"name": list("abc"), "group": np.array(groups)}
    columns |= {
      key: np.full(3, 0.5) for key in map("_".join, segmentation.scores())
    }
    columns |= dict.fromkeys(("cup_dice", "rim_hd95"), np.full(3, np.nan))
    runs = {
      name: [make_run(tmp_path / f"{name}{i}", columns)] for name in ("a", "b")
    }
    out = tmp_path / f"out{i}"
    compare.compare_runs(runs, out, ceiling="b")
    text = (out / "comparison.md").read_text()
    assert "nan" not in text + page_of(out)
    assert json.loads((out / "summary.json").read_text())["n"] == 3


def test_a_comparison_is_complete_or_absent(tmp_path, monkeypatch):
  run = make_run(tmp_path / "run", table(np.random.default_rng(0)))
  (tmp_path / "out").mkdir()
  whole = files.write

  def full(path, data):
    if path.name == "comparison.md":
      raise OSError(errno.ENOSPC, "No space left on device", str(path))
    whole(path, data)

  monkeypatch.setattr(files, "write", full)
  with pytest.raises(OSError, match="No space left .*comparison.md"):
    compare.compare_runs({"A": [run]}, tmp_path / "out")
  assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]
  assert not list((tmp_path / "out").iterdir())
  monkeypatch.undo()
  compare.compare_runs({"A": [run]}, tmp_path / "out")
  assert len(list((tmp_path / "out").iterdir())) == 4


def test_cells_run_nothing_in_a_spreadsheet(tmp_path):
  columns = table(np.random.default_rng(0))
  columns["name"][0] = "=cmd|' /C calc'!A0"
  run = make_run(tmp_path / "run", columns)
  assert "\n=" not in (run / "report" / "cases.csv").read_text()
  assert compare.read_cases(run)["name"][0] == columns["name"][0]
  compare.compare_runs({"=1+1": [run]}, tmp_path / "out")
  assert "\n=" not in (tmp_path / "out" / "comparison.csv").read_text()


def test_nothing_is_overwritten(tmp_path):
  (tmp_path / "mine.txt").write_text("precious")
  with pytest.raises(FileExistsError, match="is not empty.*--out"):
    compare.compare_runs({"A": []}, tmp_path)


def test_bad_arguments(tmp_path):
  out, run = tmp_path / "out", make_run(tmp_path / "run")
  with pytest.raises(ValueError, match="no run to compare"):
    compare.compare_runs({}, out)
  with pytest.raises(ValueError, match="method 'A' has no run"):
    compare.compare_runs({"A": []}, out)
  for end in ("reference", "ceiling"):
    with pytest.raises(ValueError, match="no method 'B' among A"):
      compare.compare_runs({"A": [run]}, out, **{end: "B"})
  assert not out.exists()


def test_bad_tables(tmp_path):
  run = make_run(tmp_path / "run")
  path = run / "report" / "cases.csv"
  remedy = r"fairdiff evaluate --workdir .*run"
  with pytest.raises(FileNotFoundError, match=rf"cases\.csv does.*{remedy}"):
    compare.read_cases(run)
  path.write_text("name,group\n")
  with pytest.raises(ValueError, match=f"holds no case; .*{remedy}"):
    compare.read_cases(run)
  path.write_text("name,group\na,b\n")
  with pytest.raises(ValueError, match=f"has no column 'cup_dice'; .*{remedy}"):
    compare.read_cases(run)
  columns = table(np.random.default_rng(0))
  columns["cup_dice"] = ["much"] * len(GROUPS)
  segmentation.write_csv(path, columns)
  with pytest.raises(ValueError, match=f"damaged: .*'much'; .*{remedy}"):
    compare.read_cases(run)


def test_other_cases_or_groups_cannot_be_paired(tmp_path):
  columns = table(np.random.default_rng(0))
  shorter = {key: value[:-1] for key, value in columns.items()}
  group = GROUPS.copy()
  group[2] = "Black"
  a = make_run(tmp_path / "a", columns)
  b = make_run(tmp_path / "b", shorter)
  c = make_run(tmp_path / "c", columns | {"group": group})
  for other, message in (
    (b, r"case 87 is data_00086 \(unknown\) in the one, absent in the other"),
    (c, r"case 3 is data_00002 \(Asian\) in the one, data_00002 \(Black\) in"),
  ):
    with pytest.raises(ValueError, match=message):
      compare.compare_runs({"A": [a], "B": [other]}, tmp_path / "out")


def test_other_definitions_cannot_be_compared(tmp_path):
  columns = table(np.random.default_rng(0))
  a = make_run(tmp_path / "a", columns)
  b = make_run(tmp_path / "b", columns, definitions=SUM)
  out = tmp_path / "out"
  with pytest.raises(ValueError, match=r"a and .*b were .* by different .*"):
    compare.compare_runs({"A": [a], "B": [b]}, out)
  path = a / "report" / "summary.json"
  path.write_text("{}")
  remedy = r"fairdiff evaluate --workdir .*a$"
  with pytest.raises(ValueError, match=f"not say its definitions; .*{remedy}"):
    compare.compare_runs({"A": [a]}, out)
  path.unlink()
  with pytest.raises(FileNotFoundError, match=f"does not exist; .*{remedy}"):
    compare.compare_runs({"A": [a]}, out)
  assert not out.exists()


def test_other_patients_of_the_same_names_cannot_be_paired(tmp_path):
  columns = table(np.random.default_rng(0))
  a, b, c = (
    make_run(
      tmp_path / name,
      columns,
      facts={"image size": size, report.TEST_DIGEST: digest},
    )
    for name, size, digest in (
      ("a", "8x8", "1"),
      ("b", "8x8", "2"),
      ("c", "16x16", "3"),
    )
  )
  message = r"a and .*b were not tested on the same cases: their names, images"
  with pytest.raises(ValueError, match=message):
    compare.compare_runs({"A": [a], "B": [b]}, tmp_path / "out")
  compare.compare_runs({"A": [a], "C": [c]}, tmp_path / "out")


def test_a_report_of_other_cases_than_its_table_is_named(tmp_path):
  run = make_run(tmp_path / "run", table(np.random.default_rng(0)))
  path = run / "report" / "summary.json"
  for summary, message in (
    ({"n": 88}, "cases.csv has 87 cases, summary.json speaks of 88"),
    ({"tables": {}}, "no segmentation figures; leave it out"),
    ({"facts": []}, "summary.json is damaged .'facts'"),
    ({"sha256": {"cases.csv": "0"}}, "cases.csv is not the table of"),
  ):
    path.write_text(json.dumps({"definitions": {}} | summary))
    with pytest.raises(ValueError, match=message):
      compare.compare_runs({"A": [run]}, tmp_path / "out")


def test_definitions_are_those_of_the_reports(tmp_path):
  columns = table(np.random.default_rng(0))
  other = columns | {"cup_dice": columns["cup_dice"] + 0.05}
  runs = {
    name: [make_run(tmp_path / name, values, definitions=SUM)]
    for name, values in (("a", columns), ("b", other))
  }
  rows = compare.compare_runs(runs, tmp_path / "out")
  (first, second) = (
    row
    for row in rows
    if (row["class"], row["measure"], row["figure"]) == ("cup", "dice", "es")
  )
  values = stored(columns, "cup_dice")
  figures = expected(values)
  overall = figures["overall", ""]
  spread = sum(abs(figures["group", g] - overall) for g in KNOWN)
  assert first["value"] == pytest.approx(overall / (1 + spread))
  assert first["low"] < first["value"]
  assert second["difference"] == pytest.approx(0.05 / (1 + spread), rel=1e-3)
  text = (tmp_path / "out" / "comparison.md").read_text()
  assert "FairSeg's definition" in text


def test_launch_script(tmp_path):
  def launch(*arguments):
    return subprocess.run(
      [sys.executable, ROOT / "launch" / "compare.py", *arguments],
      capture_output=True,
      text=True,
      cwd=tmp_path,
      env=os.environ | {"PYTHONPATH": str(ROOT)},
    )

  rng = np.random.default_rng(0)
  make_run(tmp_path / "a_0", table(rng))
  make_run(tmp_path / "a_1", table(rng), seed=1)
  make_run(tmp_path / "b", table(rng), fairness__method="gap")
  done = launch(
    *("a_0", "a_1", "b", "--names", "first,second"),
    *("--reference", "second", "--ceiling", "first"),
  )
  assert done.returncode == 0, done.stderr
  assert "comparison/index.html" in done.stdout
  text = (tmp_path / "comparison/comparison.md").read_text()
  assert "| second | 1 |" in text
  assert "Dice less that of second" in text and "from second to first" in text
  again = launch("a_0", "b")
  assert again.returncode == 1
  assert again.stderr.startswith("error: comparison is not empty")
