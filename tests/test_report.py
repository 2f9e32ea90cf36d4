"""The report: its files, its figures, and that the page stands alone."""

import base64
import errno
import html
import html.parser
import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairdiff_jax import files
from fairdiff_jax.evaluation import report, sections, segmentation
from fairdiff_jax.evaluation.page import number
from fairdiff_jax.evaluation.results import Results
from fairdiff_jax.fairness import metrics, uncertainty

GROUPS = ("Asian", "Black", "White")
EVIL = '<script src="//x">&"$a$'
AGREEMENT = ("synthetic", "real", "ratio")
VOID = ("meta", "br", "link", "img", "input", "hr")


def disc(shape, radius):
  """A mask with a centred disc and a cup of half its radius."""
  r = np.hypot(*(np.indices(shape) - (np.array(shape) - 1)[:, None, None] / 2))
  return (r < radius).astype(np.uint8) + (r < radius / 2).astype(np.uint8)


@pytest.fixture(scope="module")
def case():
  rng = np.random.default_rng(0)
  group = np.r_[np.repeat([0, 1, 2], (8, 9, 31)), -1]
  label = np.stack([disc((24, 28), r) for r in rng.uniform(6, 9, len(group))])
  better = np.roll(label, 1, axis=2)
  worse = np.where(
    (group == 0)[:, None, None], np.roll(label, 3, axis=2), better
  )
  names = [f"data_{i:05d}" for i in range(len(group))]
  names[0] = EVIL

  def columns(prediction):
    return segmentation.per_case(label, prediction, names, group, GROUPS)

  return {
    "image": rng.integers(0, 256, label.shape).astype(np.uint8),
    "label": label,
    "prediction": better,
    "worse": worse,
    "group": group,
    "columns": (columns(better), columns(worse)),
  }


@pytest.fixture(scope="module")
def log(tmp_path_factory):
  path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
  records = [
    {"step": s, "loss/segmenter": 1 / (1 + s), "risk/Asian": 0.5, "rate": 3}
    for s in range(200)
  ]
  records[3]["risk/Asian"] = float("nan")
  records[4]["risk/Asian"] = None
  records.append({"step": 199, "loss/segmenter": 7.0})
  path.write_text("".join(json.dumps(r) + "\n" for r in records))
  return path


@pytest.fixture(scope="module")
def written(case, log, tmp_path_factory):
  """The full report: (directory, what `write` returned)."""
  directory = tmp_path_factory.mktemp("run") / "report"
  ours, baseline = case["columns"]
  agreement = {"synthetic": 0.7, "real": 0.8, "ratio": np.float32(0.875)}
  result = report.write(
    directory,
    title=EVIL,
    models={"Ours": ours, EVIL: baseline},
    cases={k: case[k] for k in ("image", "label", "prediction")},
    synthetic={
      "image": case["image"][:4],
      "mask": case["label"][:4],
      "group": np.array(GROUPS)[[0, 0, 1, 0]],
    },
    agreement={EVIL: {g: {"cup": agreement} for g in GROUPS}},
    counts={"Asian": {"real": 9, "synthetic": 1291}, EVIL: {"real": 100}},
    epoch={"Asian": {"real": 9, "repeated": 1, "synthetic": 5}},
    log=log,
    baseline_log=log,
    baseline_start=100,
    phases=[(0, 100, ("points",)), (100, 300, ("segmenter", EVIL))],
    facts={EVIL: EVIL, "seed": np.int64(3)},
    provenance={"date": EVIL, "training_goodput": {"step": 9, "save": 3}},
  )
  return directory, result


class Page(html.parser.HTMLParser):
  """Collects the addresses and texts of a page; fails on unbalanced tags."""

  def __init__(self, text):
    super().__init__()
    self.addresses, self.tags, self.text, self.open = [], [], [], []
    self.feed(text)
    assert self.open == []

  def handle_starttag(self, tag, attributes):
    self.handle_startendtag(tag, attributes)
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attributes):
    self.tags.append((tag, dict(attributes)))
    for key, value in attributes:
      if key.split(":")[-1] in ("src", "href", "data", "action", "srcset"):
        self.addresses.append(value)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text.append(data)


def test_files(written, case):
  directory, result = written
  assert sorted(p.name for p in directory.iterdir()) == [
    "cases.csv",
    "cases_2.csv",
    "index.html",
    "summary.json",
  ]
  stored = json.loads((directory / "summary.json").read_text())
  assert stored == result
  assert stored["tables"] == {"Ours": "cases.csv", EVIL: "cases_2.csv"}
  lines = (directory / "cases.csv").read_text().splitlines()
  assert len(lines) == 1 + len(case["group"])


def test_summary_equals_direct_computation(written, case):
  _, result = written
  assert result["n"] == 49
  assert result["groups"] == {"Asian": 8, "Black": 9, "White": 31}
  for model, prediction in (("Ours", "prediction"), (EVIL, "worse")):
    for name, cls in (("rim", 1), ("cup", 2), ("disc", (1, 2))):
      dice = metrics.dice(case["label"], case[prediction], cls)
      means = [dice[case["group"] == g].mean() for g in range(3)]
      figures = result["models"][model][name]["dice"]
      assert figures["overall"] == pytest.approx(dice.mean())
      assert figures["gap"] == pytest.approx(np.ptp(means))
      assert figures["worst"] == GROUPS[np.argmin(means)]
      assert figures["es"] == pytest.approx(
        dice.mean() / (1 + np.std(means, ddof=1))
      )
  ours, baseline = (result["models"][m]["cup"]["dice"] for m in ("Ours", EVIL))
  difference = result["difference"]["cup"]["dice"]
  assert difference["es"]["difference"] == pytest.approx(
    ours["es"] - baseline["es"]
  )
  assert difference["worst"]["difference"] == pytest.approx(
    min(g["mean"] for g in ours["groups"].values())
    - min(g["mean"] for g in baseline["groups"].values())
  )


def test_definitions_are_used_and_recorded(written, case, tmp_path):
  directory, default = written
  assert default["definitions"] == {
    "empty": "exclude",
    "equity": "fairdiff_std",
  }
  assert "FairDiff's tables" in " ".join(
    Page((directory / "index.html").read_text()).text
  )
  ours, baseline = case["columns"]
  result = report.write(
    tmp_path,
    title="t",
    models={"A": ours, "B": baseline},
    definitions=metrics.Definitions("published", "fairseg_sum"),
  )
  assert result["definitions"] == {
    "empty": "published",
    "equity": "fairseg_sum",
  }
  figures = result["models"]["A"]["cup"]["dice"]
  spread = sum(
    abs(group["mean"] - figures["overall"])
    for group in figures["groups"].values()
  )
  assert figures["es"] == pytest.approx(figures["overall"] / (1 + spread))
  low, high = figures["interval"]["es"]
  options = {"definition": "fairseg_sum"}
  scores = ours["cup_dice"], baseline["cup_dice"]
  expected = uncertainty.intervals(scores[0], case["group"], GROUPS, **options)
  assert (low, high) == expected["es"]
  paired = uncertainty.compare(*scores[::-1], case["group"], GROUPS, **options)
  assert result["difference"]["cup"]["dice"]["es"] == paired["es"]
  shown = " ".join(Page((tmp_path / "index.html").read_text()).text)
  assert "FairSeg's definition" in shown and "As in the public code" in shown
  assert "FairDiff's tables" not in shown


def test_columns_follow_the_policy_for_absent_structures():
  label = np.zeros((1, 8, 8), np.uint8)
  prediction = label + 2
  columns = segmentation.per_case(
    label, prediction, "a", np.array([0]), "A", "published"
  )
  assert columns["cup_dice"] == columns["disc_iou"] == [1]
  assert columns["rim_dice"] == columns["cup_hd95"] == [0]


def test_intervals_are_those_of_uncertainty(written, case):
  _, result = written
  ours, baseline = (
    metrics.dice(case["label"], case[key], metrics.CUP)
    for key in ("prediction", "worse")
  )
  expected = uncertainty.intervals(ours, case["group"], GROUPS)
  interval = result["models"]["Ours"]["cup"]["dice"]["interval"]
  assert interval["gap"] == list(expected["gap"])
  assert interval["groups"]["Black"] == list(expected["groups"]["Black"])
  assert interval["few"] == ["Asian", "Black"]
  assert "es" not in result["models"]["Ours"]["cup"]["hd95"]["interval"]
  paired = uncertainty.compare(baseline, ours, case["group"], GROUPS)
  difference = result["difference"]["cup"]["dice"]
  assert difference["es"] == paired["es"]
  assert difference["groups"] == paired["groups"]


def test_every_figure_is_finite(written):
  def leaves(tree):
    if isinstance(tree, dict):
      tree = list(tree.values())
    if not isinstance(tree, list):
      return [tree]
    return [leaf for value in tree for leaf in leaves(value)]

  figures = leaves({k: v for k, v in written[1].items() if k != "provenance"})
  assert None not in figures
  assert np.isfinite([f for f in figures if not isinstance(f, str)]).all()


def test_page_stands_alone(written):
  """Nothing is loaded; links lead to its parts and to the files beside it."""
  directory, _ = written
  text = (directory / "index.html").read_text()
  assert not re.search(r"https?:|@import|url\((?!#)", text)
  page = Page(text)
  kinds = {"png": 0, "jpeg": 0, "svg+xml": 0}
  for address in page.addresses:
    if address.startswith("data:image/"):
      kinds[address[11:].split(";")[0]] += 1
    elif not address.startswith("#"):
      assert (directory / address).is_file()
  # 3 differences, 3 dot plots, 1 loss, 1 risk
  # 4 worst cases of 3 groups and the unknown one, strips of 8+3, 8+1, 8+0
  # 37 of a group to browse, as far as it has them
  charts, pictures, thumbnails = 3 + 3 + 2, 4 * 3 + 1 + 28, 8 + 9 + 31 + 1
  assert kinds == {"png": pictures, "jpeg": thumbnails, "svg+xml": charts}
  drawings = [a for tag, a in page.tags if tag == "svg"]
  assert len(drawings) == charts + pictures + thumbnails
  assert all(a["role"] == "img" and a["aria-label"] for a in drawings)


def test_contents_lead_to_every_part(written):
  page = Page((written[0] / "index.html").read_text())
  anchors = [a["id"] for tag, a in page.tags if tag == "h2"]
  assert len(anchors) == len(set(anchors)) == 14
  links = [a[1:] for a in page.addresses if a.startswith("#")]
  assert links[: len(anchors)] == anchors
  files = [a for a in page.addresses if a.endswith((".csv", ".json"))]
  assert files == ["cases.csv", "cases_2.csv", "summary.json"]


def test_a_figure_can_be_taken_away(written):
  """What a link gives is a whole SVG, in ink on paper."""
  page = Page((written[0] / "index.html").read_text())
  links = {a["download"]: a["href"] for _, a in page.tags if "download" in a}
  assert {"dice-cup.svg", "difference-rim.svg", "risk-by-group.svg"} < set(
    links
  )
  for address in links.values():
    data = base64.b64decode(address.split(",")[1])
    assert ElementTree.fromstring(data).tag == "{http://www.w3.org/2000/svg}svg"
    assert sections.figures.INK.encode() not in data


def test_page_escapes_and_shows_figures(written):
  directory, result = written
  text = (directory / "index.html").read_text()
  assert "<script" not in text
  page = Page(text)
  shown = " ".join(page.text)
  assert EVIL in shown
  dice = result["models"]["Ours"]["cup"]["dice"]
  for value in (dice["overall"], dice["es"], dice["gap"]):
    assert f"{100 * value:.1f}" in shown
  for ends in (dice["interval"]["es"], dice["interval"]["groups"]["White"]):
    assert "{:.1f} to {:.1f}".format(*(100 * end for end in ends)) in page.text
  row = result["difference"]["rim"]["dice"]["groups"]["Asian"]
  ends = (f"{100 * row[end]:+.1f}" for end in ("low", "high"))
  assert " to ".join(ends).replace("-", "−") in page.text
  assert "1,291" in shown
  assert "Asian\N{NO-BREAK SPACE}†" in shown
  assert "White\N{NO-BREAK SPACE}†" not in shown
  assert "unknown 1" in shown
  assert "0 to 100: points; 100 to 300: segmenter" in shown
  assert "of 12 s: steps 75%, saving 25%" in page.text
  assert "segmenter, baseline" in shown and "Asian, baseline" in shown


def test_each_groups_worst_are_shown(written, case):
  page = (written[0] / "index.html").read_text()
  part = page[page.index('id="worst-cases-by-group"') :]
  part = part[: part.index("</section>")]
  ours, _ = case["columns"]
  score = (ours["cup_dice"] + ours["rim_dice"]) / 2
  for group, few in (("Asian", False), ("White", False), ("unknown", True)):
    _, _, rest = part.partition(f"<h3>{group}</h3>")
    names = re.findall("<figcaption>(.*?)<br>", rest.split("<h3>")[0])
    members = np.flatnonzero(ours["group"] == group)
    worst = members[np.argsort(score[members], kind="stable")][:4]
    expected = [html.escape(str(ours["name"][i]), quote=True) for i in worst]
    assert len(names) == (1 if few else 4)
    assert [html.unescape(n) for n in names] == list(
      map(html.unescape, expected)
    )


def test_the_page_of_many_cases_stays_small(tmp_path):
  """Of 2,000 noisy ones in 12 groups, which is as hard as it gets."""
  rng = np.random.default_rng(0)
  group = np.arange(2000) % 12
  label = np.stack([disc((256, 256), r) for r in range(60, 80)])[group]
  image = rng.integers(0, 256, (20, 256, 256)).astype(np.uint8)[group]
  names = [f"Group {g}" for g in range(12)]
  blank = np.zeros((2000, 2, 2), np.uint8)
  columns = segmentation.per_case(
    *(blank, blank, list(map(str, range(2000))), group, names)
  )
  for key in set(columns) - {"name", "group"}:
    columns[key] = rng.uniform(0, 1, 2000)
  models = {"Ours": columns}
  cases = {"image": image, "label": label, "prediction": label}
  synthetic = {"image": image, "mask": label, "group": columns["group"]}
  shown = Results(title="t", models=models, cases=cases, synthetic=synthetic)
  drawn = sections.worst_cases, sections.browse, sections.real_beside_synthetic
  assert sum(len(section(shown).body) for section in drawn) < 8e6


def test_parts_without_data_are_left_out(written, case, tmp_path):
  def headings(directory):
    text = (directory / "index.html").read_text()
    Page(text)
    return re.findall("<h2 id=.*?>(.*?)</h2>", text)

  result = report.write(
    tmp_path, title="t", models={"Ours": case["columns"][0]}
  )
  assert headings(tmp_path) == [
    "Headline",
    "Dice by group",
    "All measures by group",
    "Files",
    "Definitions",
  ]
  assert len(headings(written[0])) == len(sections.SECTIONS) - 2
  assert result["difference"] == {}
  assert ">Difference" not in (tmp_path / "index.html").read_text()


def test_undefined_figures_are_dashes(tmp_path):
  empty = np.zeros((2, 8, 8), np.uint8)
  columns = segmentation.per_case(empty, empty, "ab", np.array([0, 1]), "AB")
  result = report.write(
    tmp_path,
    title="t",
    models={"Ours": columns, "Other": columns},
    cases={"image": empty, "label": empty, "prediction": empty},
  )
  assert result["models"]["Ours"]["cup"]["dice"]["overall"] is None
  assert result["difference"]["cup"]["dice"]["es"]["difference"] is None
  text = (tmp_path / "index.html").read_text()
  Page(text)
  assert "–" in text
  assert "nan" not in " ".join(Page(text).text)


numbers = st.sampled_from([0.0, 0.5, 1.0, np.nan])


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_no_figure_ends_a_report(tmp_path_factory, data):
  """Groups of none, of one and of all alike; structures that are nowhere."""
  n = data.draw(st.integers(0, 5))
  group = data.draw(
    st.lists(st.sampled_from(["A", "B", segmentation.UNKNOWN]), min_size=n)
  )[:n]
  mask = np.zeros((n, 8, 8), np.uint8)
  columns = segmentation.per_case(
    mask, mask, list(map(str, range(n))), np.full(n, -1), []
  ) | {"group": np.array(group, str)}
  models = {"Ours": columns}
  if data.draw(st.booleans()):
    models["Other"] = dict(columns)
  for table in models.values():
    for key in set(table) - {"name", "group"}:
      if data.draw(st.booleans()):
        table[key] = np.full(n, data.draw(numbers))
      else:
        table[key] = np.array([data.draw(numbers) for _ in range(n)])
  directory = tmp_path_factory.mktemp("report")
  result = report.write(
    directory,
    title="t",
    models=models,
    cases={"image": mask, "label": mask, "prediction": mask},
    synthetic={"image": mask, "mask": mask, "group": np.array(group, str)},
    agreement={"Ours": {"A": {"cup": dict.fromkeys(AGREEMENT, np.nan)}}},
    counts={},
  )
  assert result == json.loads((directory / "summary.json").read_text())
  shown = " ".join(Page((directory / "index.html").read_text()).text)
  assert not re.search(r"\b(nan|inf|None)\b", shown)


def test_a_report_without_models_says_why(case, tmp_path):
  group = np.array([*GROUPS, "unknown"])[case["group"]]
  result = report.write(
    tmp_path,
    title="t",
    models={},
    reason="no segmenter was trained",
    cases={"image": case["image"], "label": case["label"], "group": group},
    synthetic={
      "image": case["image"][:1],
      "mask": case["label"][:1],
      "group": ["Asian"],
    },
    counts={"Asian": {"real": 9, "synthetic": 0}},
    notices=["The bank is empty."],
  )
  assert "no segmentation figures because no segmenter" in result["verdict"]
  assert (result["n"], result["models"], result["tables"]) == (0, {}, {})
  page = Page((tmp_path / "index.html").read_text())
  assert result["verdict"] in page.text
  assert "The bank is empty." in page.text
  drawings = [a for tag, a in page.tags if tag == "svg"]
  assert len(drawings) == 8 + 1 + 8 + 8
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    "index.html",
    "summary.json",
  ]


@pytest.mark.parametrize(
  ("content", "curves", "notice"),
  [
    ('{"step": 1, "loss/a": 2}\n{"step": 2, "lo', 1, None),
    ("[1]\n", 0, None),
    ('{"loss/a": 2}\n{"step": "x", "loss/a": 2}\n', 0, None),
    ('{"step": 1, "loss/a": "x"}\n', 0, None),
    ("", 0, None),
    (None, 0, "metrics.jsonl does not exist"),
    ("\0\0", 0, "metrics.jsonl is not text"),
  ],
)
def test_a_damaged_log_costs_its_curves(
  case, tmp_path, content, curves, notice
):
  log = tmp_path / "metrics.jsonl"
  if content is not None:
    log.write_text(content)
  models = {"A": case["columns"][0]}
  result = report.write(tmp_path / "r", title="t", models=models, log=log)
  assert len(result["notices"]) == bool(notice)
  assert (notice or "") in "".join(result["notices"])
  text = (tmp_path / "r" / "index.html").read_text()
  assert text.count(">Loss: a<") == curves


def test_a_report_is_complete_or_absent(case, tmp_path, monkeypatch):
  """What is there of an earlier one does not make up for the rest."""
  ours, baseline = case["columns"]
  directory = tmp_path / "report"
  report.write(directory, title="t", models={"A": ours, "B": baseline})
  assert report.read(tmp_path)["n"] == 49
  whole = files.write

  def full(path, data):
    if path.name == "index.html":
      raise OSError(errno.ENOSPC, "No space left on device", str(path))
    whole(path, data)

  monkeypatch.setattr(files, "write", full)
  with pytest.raises(OSError, match="No space left on device: .*index.html"):
    report.write(directory, title="t", models={"A": ours})
  with pytest.raises(FileNotFoundError, match=r"fairdiff evaluate"):
    report.read(tmp_path)
  monkeypatch.undo()
  report.write(directory, title="t", models={"A": ours})
  assert not (directory / "cases_2.csv").exists()
  assert report.read(tmp_path)["title"] == "t"


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("cases.csv", "name,group\n", "cases.csv is not the table of .*summary"),
    ("cases.csv", None, "cases.csv does not exist"),
    ("summary.json", "{", "summary.json is damaged"),
    ("summary.json", "{}", "does not say its definitions"),
    ("summary.json", '{"definitions": 3}', "summary.json is damaged"),
    ("summary.json", '{"definitions": {"equity": "x"}}', "is damaged .*equity"),
  ],
)
def test_a_damaged_report_is_named(case, tmp_path, name, content, message):
  models = {"A": case["columns"][0]}
  report.write(tmp_path / "report", title="t", models=models)
  path = tmp_path / "report" / name
  path.unlink() if content is None else path.write_text(content)
  with pytest.raises(
    (ValueError, FileNotFoundError),
    match=rf"{message}.*fairdiff evaluate --workdir {tmp_path}",
  ):
    report.read(tmp_path)


def test_arguments_are_checked(case, tmp_path):
  ours, _ = case["columns"]
  shorter = {key: value[1:] for key, value in ours.items()}
  with pytest.raises(ValueError, match="same cases"):
    report.write(tmp_path, title="t", models={"A": ours, "B": shorter})
  with pytest.raises(ValueError, match="no models .* and no reason"):
    report.write(tmp_path, title="t", models={})
  with pytest.raises(ValueError, match="at most 6 models, got 7"):
    report.write(tmp_path, title="t", models=dict.fromkeys("ABCDEFG", ours))
  with pytest.raises(ValueError, match="image"):
    report.write(
      tmp_path,
      title="t",
      models={"A": ours},
      cases={"image": case["image"][1:]},
    )


def test_curves_that_belong_together_share_a_chart(tmp_path):
  """Each loss has its own; what is dashed is the baseline's."""
  line = {"step": 1, "loss/a": 1, "loss/total": 1, "risk/A": 1, "risk/B": 1}
  validated = {f"validation/dice/{g}": 1 for g in "AB"}
  for name, record in (("log", line | validated), ("baseline_log", line)):
    (tmp_path / name).write_text(json.dumps(record))
  logs = {name: tmp_path / name for name in ("log", "baseline_log")}
  made = Results(title="t", models={}, reason="none", **logs)
  shown = Page(sections.training(made).body)
  labels = [a["aria-label"] for tag, a in shown.tags if tag == "svg"]
  assert [label.partition(":")[2] for label in labels[:2]] == [
    " a over training steps: a 1 to 1, a, baseline 1 to 1",
    " total over training steps: total 1 to 1",
  ]
  assert labels[2].startswith("Risk by group over training steps: A 1 to 1, B")
  assert labels[2].endswith("B, baseline 1 to 1")
  assert labels[3].startswith("validation/dice over training steps: A 1 to 1, ")
  assert len(labels) == 4


def test_numbers_as_text():
  """What rounds to 0 has no sign, so that it looks like no difference."""
  texts = [number(v, sign="+") for v in (0.0123, -0.0123, 4e-4, -4e-4, None)]
  assert texts == ["+1.2", "−1.2", "0.0", "0.0", "–"]
  assert [number(v) for v in (0.5, np.nan, np.inf)] == ["50.0", "–", "–"]
