"""A verdict that cannot flatter: what it calls fairer, and what it will not."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairdiff_jax.data.domain import FUNDUS
from fairdiff_jax.evaluation import segmentation, verdict
from fairdiff_jax.evaluation.results import Results

GROUPS = ("Asian", "Black", "White")


def columns(cup, rim=None, disc=None, sizes=(60, 60, 60), seed=0, spread=0.03):
  """A table whose groups have these mean Dice, cases around them."""
  rng = np.random.default_rng(seed)
  group = np.repeat(np.arange(len(sizes)), sizes)
  result = {
    "name": np.array([str(i) for i in range(len(group))]),
    "group": np.array(GROUPS)[group],
  }
  noise = rng.normal(0, spread, len(group))
  for g in range(len(sizes)):
    noise[group == g] -= noise[group == g].mean()
  for key in map("_".join, segmentation.scores(FUNDUS)):
    result[key] = np.full(len(group), 0.5)
  for cls, means in (("cup", cup), ("rim", rim or cup), ("disc", disc or cup)):
    result[f"{cls}_dice"] = np.array(means)[group] + noise
  return result


def conclude(ours, other=None, **fields):
  models = {"Ours": ours} | ({"Other": other} if other else {})
  return Results(title="t", models=models, **fields).verdict


BASE = (0.70, 0.80, 0.81)


@pytest.mark.parametrize(
  ("ours", "word", "better", "worse"),
  [
    ((0.75, 0.81, 0.82), verdict.FAIRER, GROUPS, ()),
    ((0.75, 0.80, 0.81), verdict.FAIRER, GROUPS[:1], ()),
    ((0.75, 0.798, 0.81), verdict.FAIRER, GROUPS[:1], ()),
    ((0.75, 0.79, 0.80), verdict.PARTLY, GROUPS[:1], GROUPS[1:]),
    ((0.70, 0.75, 0.75), verdict.DOWN, (), GROUPS[1:]),
    ((0.69, 0.72, 0.72), verdict.DOWN, (), GROUPS),
    ((0.65, 0.80, 0.81), verdict.LESS_FAIR, (), GROUPS[:1]),
    ((0.70, 0.80, 0.90), verdict.LESS_FAIR, GROUPS[2:], ()),
    (BASE, verdict.OPEN, (), ()),
    ((0.75, 0.85, 0.86), verdict.OPEN, GROUPS, ()),
  ],
)
def test_words(ours, word, better, worse):
  """Cases differ by noise that is not the baseline's, of 1 point."""
  found = conclude(
    columns(ours, spread=0.01, seed=1), columns(BASE, spread=0.01)
  )
  finding = found.findings["cup"]
  assert (finding.word, finding.better, finding.worse) == (word, better, worse)
  claim = verdict.CLAIM[word].format("Ours", "Other")
  assert found.claims[0].startswith(f"On the cup, {claim}: Asian ")


def test_every_structure_is_named():
  found = conclude(
    columns((0.75, 0.8, 0.81), rim=(0.719, 0.787, 0.798), disc=BASE),
    columns(BASE),
  )
  cup, rim, disc = found.claims
  assert cup.startswith("On the cup, Ours is fairer than Other: Asian +5.0")
  assert rim == (
    "On the rim, partly levelling down: Asian +1.9, Black −1.3, White −1.2, gap"
    " −3.1 points."
  )
  assert disc.startswith("On the disc, not shown to be fairer or less fair: ")
  assert found.findings["rim"].worse == ("Black", "White")


def test_what_must_be_known_with_it():
  tables = columns((0.75, 0.8, 0.81)), columns(BASE)
  cautions = conclude(*tables, made_up=True, baseline="something").cautions
  one, made_up, baseline = cautions
  assert "one seed" in one
  assert "made up" in made_up
  assert baseline == "The baseline is something."
  assert conclude(*tables).cautions == [one]
  alone = conclude(tables[0])
  assert alone.findings == {} and "no baseline" in alone.claims[-1]
  assert "ES-Dice 7" in alone.claims[0]


def test_nothing_is_said_of_few_cases():
  """The stated n is that of the groups of which intervals are trusted."""
  for sizes, silent in (((60, 29, 60), True), ((60, 30, 60), False)):
    found = conclude(
      columns((0.75, 0.8, 0.81), sizes=sizes), columns(BASE, sizes=sizes)
    )
    assert (found.findings["cup"].word == verdict.SILENT) == silent
    assert ("fairer than" in str(found)) != silent
  few = conclude(
    columns(BASE, sizes=(60, 29, 60)), columns(BASE, sizes=(60, 29, 60))
  )
  assert few.claims == [
    "On the cup, rim and disc, nothing is said of fairness: fewer than 30 test"
    " cases of Black (29)."
  ]


def test_a_structure_that_few_cases_have_is_left_out():
  tables = columns((0.75, 0.8, 0.81)), columns(BASE)
  for table in tables:
    table["rim_dice"][:40] = np.nan
  found = conclude(*tables)
  assert found.findings["cup"].word == verdict.FAIRER
  assert found.claims[1].startswith("On the rim, nothing is said of fairness")
  assert "Asian (20)" in found.claims[1]


@pytest.mark.parametrize("who", [0, 1])
def test_nothing_is_said_of_a_segmenter_that_has_learned_nothing(who):
  """Nor against one."""
  tables = [columns((0.75, 0.8, 0.81)), columns(BASE)]
  tables[who] = columns((0.05, 0.05, 0.06), rim=BASE)
  found = conclude(*tables)
  assert {f.word for f in found.findings.values()} == {verdict.SILENT}
  (claim,) = found.claims
  name = ("Ours", "Other")[who]
  assert (
    f"this segmenter has learned nothing ({name}: Dice 5.3 of the cup" in claim
  )
  alone = conclude(columns((0.05, 0.05, 0.06)))
  assert "learned nothing" in alone.claims[0]


def test_groups_that_nobody_can_compare():
  one = columns((0.75,), sizes=(60,))
  assert "no two groups" in str(conclude(one, one))
  unknown = one | {"group": np.full(60, segmentation.UNKNOWN)}
  assert "no two groups" in str(conclude(unknown, unknown))
  nowhere = columns(BASE) | {"cup_dice": np.full(180, np.nan)}
  assert "no test case has a Dice of Ours" in str(conclude(nowhere, nowhere))


points = st.floats(-0.2, 0.2)


@st.composite
def rows(draw, name):
  difference = draw(points)
  low, high = (draw(st.floats(0, 0.1)) for _ in "ab")
  p = draw(st.floats(0, 1))
  return {
    "difference": difference,
    "low": difference - low,
    "high": difference + high,
    **({"p": p} if name == "gap" else {"p_bootstrap": p}),
    **({} if name == "gap" else {"p_bootstrap_holm": min(1, 3 * p)}),
  }


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_nobody_pays_for_what_is_called_fairer(data):
  """Whatever the figures: fairer needs a smaller gap and no loser."""
  difference = {
    "gap": data.draw(rows("gap")),
    "groups": {name: data.draw(rows(name)) for name in GROUPS},
  }
  finding = verdict.judge(difference)
  lost = [
    name
    for name, row in difference["groups"].items()
    if row["difference"] < -0.003 or row["high"] < 0
  ]
  assert set(finding.worse) == set(lost)
  if finding.word == verdict.FAIRER:
    assert not lost
    assert difference["gap"]["high"] < 0
    assert difference["gap"]["p"] < 0.05
  if finding.word == verdict.DOWN:
    assert lost and not finding.better
  if difference["gap"]["low"] <= 0 <= difference["gap"]["high"]:
    assert finding.word not in (verdict.FAIRER, verdict.LESS_FAIR)


@settings(max_examples=12, deadline=None)
@given(
  loss=st.floats(0.004, 0.08),
  gain=st.floats(0, 0.2),
  loser=st.sampled_from([1, 2]),
  seed=st.integers(0, 99),
)
def test_levelling_down_is_never_called_fairer(loss, gain, loser, seed):
  """From tables of cases: a better group loses, the worst may gain."""
  ours = list(BASE)
  ours[0] += min(gain, 0.1)
  ours[loser] -= loss
  found = conclude(columns(ours, seed=seed), columns(BASE))
  assert found.findings["cup"].word != verdict.FAIRER
  assert "is fairer than" not in str(found)
  assert "rim, fairer" not in str(found)
  assert GROUPS[loser] in found.findings["cup"].worse


def test_an_undefined_difference_is_no_gain():
  whole = {"difference": 0.1, "low": 0.05, "high": 0.15, "p_bootstrap_holm": 0}
  gap = {"difference": -0.1, "low": -0.2, "high": -0.05, "p": 0.001}
  none = dict.fromkeys(whole)
  found = verdict.judge({"gap": gap, "groups": {"A": whole, "B": none}})
  assert found.word == verdict.OPEN
  found = verdict.judge({"gap": gap, "groups": {"A": whole, "B": whole}})
  assert found.word == verdict.FAIRER
