"""Intervals and tests of group figures, against hand computation and scipy."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fairdiff_jax.fairness import metrics, uncertainty

NAMES = ("A", "B", "C")
SIZES = (60, 80, 200)
FAST = {"num_resamples": 200}
some_p = st.lists(st.floats(0, 1) | st.just(float("nan")), max_size=8)


def dice(means, sizes=SIZES, seed=0):
  """Skewed values around the means of the groups, and the groups."""
  group = np.repeat(np.arange(len(means)), sizes)
  mean = np.asarray(means)[group]
  rng = np.random.default_rng(seed)
  return rng.beta(10 * mean, 10 * (1 - mean)), group


def flat(result):
  """Every (low, high) of what `intervals` returns."""
  kinds = [result[k] for k in ("overall", "gap", "es") if k in result]
  return [*kinds, *result["groups"].values()]


def test_interval_of_a_mean_is_that_of_normal_theory():
  values, group = dice((0.7, 0.8, 0.8))
  found = uncertainty.intervals(values, group, NAMES, num_resamples=20_000)
  for g, name in enumerate(NAMES):
    cases = values[group == g]
    half = 1.96 * cases.std() / len(cases) ** 0.5
    expected = (cases.mean() - half, cases.mean() + half)
    assert found["groups"][name] == pytest.approx(expected, abs=0.1 * half)
  # Groups keep their sizes, so only variance within them counts overall.
  variance = sum(n * values[group == g].var() for g, n in enumerate(SIZES))
  half = 1.96 * variance**0.5 / len(values)
  expected = (values.mean() - half, values.mean() + half)
  assert found["overall"] == pytest.approx(expected, abs=0.1 * half)


def test_intervals_of_small_groups_are_as_wide_as_student_s():
  values = np.random.default_rng(3).normal(0.7, 0.1, 12)
  found = uncertainty.intervals(
    values, np.zeros(12, int), "A", num_resamples=50_000
  )
  expected = stats.t.interval(0.95, 11, values.mean(), stats.sem(values))
  assert found["groups"]["A"] == pytest.approx(expected, abs=0.01)


def test_two_cases_a_group_by_hand():
  # A resample of {x, y} has mean x, y (a quarter each) or their middle.
  values, group = [0.2, 0.4, 0.7, 0.9], [0, 0, 1, 1]
  found = uncertainty.intervals(values, group, "AB")
  assert found["groups"] == {
    "A": pytest.approx((0.2, 0.4)),
    "B": pytest.approx((0.7, 0.9)),
  }
  assert found["few"] == ["A", "B"]
  assert found["level"] == 0.95
  # v = 0.02 / 2 in both groups; the gap of two means is √2 s, so a plain gap d
  # becomes √(d² - 4 v), d from 0.3 to 0.7 (each 1/16).
  assert found["gap"] == pytest.approx((0.05**0.5, 0.45**0.5))


@pytest.mark.parametrize("equity", metrics.EQUITY)
def test_without_noise_intervals_are_the_figures(equity):
  options = FAST | {"definition": equity}
  values, group = np.repeat([0.5, 0.7, 0.9], 40), np.repeat([0, 1, 2], 40)
  found = uncertainty.intervals(values, group, NAMES, **options)
  figures = metrics.summarize(values, group, NAMES, definition=equity)
  for kind in ("overall", "gap", "es"):
    assert found[kind] == pytest.approx((figures[kind],) * 2)
  other = np.repeat([0.6, 0.7, 0.8], 40)
  paired = uncertainty.compare(values, other, group, NAMES, **options)
  after = metrics.summarize(other, group, NAMES, definition=equity)
  difference = after["es"] - figures["es"]
  for key in ("difference", "low", "high"):
    assert paired["es"][key] == pytest.approx(difference)
  equal = uncertainty.intervals(np.full(120, 0.5), group, NAMES, **FAST)
  assert equal["gap"] == (0, 0)
  assert equal["es"] == (0.5, 0.5)


@pytest.mark.parametrize(
  ("values", "group", "undefined"),
  [
    ([], [], {"overall", "gap", "es", "A", "B", "C"}),
    ([0.5], [0], {"overall", "gap", "es", "A", "B", "C"}),
    ([0.5, np.nan], [0, 0], {"overall", "gap", "es", "A", "B", "C"}),
    ([0.5, 0.6], [0, 1], {"overall", "gap", "es", "A", "B", "C"}),
    ([0.5, 0.6, 0.7], [0, 0, 1], {"gap", "es", "B", "C"}),
    ([0.5, 0.6], [0, 0], {"gap", "B", "C"}),
    ([0.5, 0.6], [-1, -1], {"gap", "A", "B", "C"}),
    ([0.5, 0.6, 0.5, 0.6], [0, 0, 1, 1], {"C"}),
  ],
)
def test_undefined_intervals(values, group, undefined):
  found = uncertainty.intervals(values, group, NAMES, **FAST)
  pairs = {k: found[k] for k in ("overall", "gap", "es")} | found["groups"]
  assert {k for k, v in pairs.items() if np.isnan(v).any()} == undefined
  assert found["few"] == list(NAMES)
  paired = uncertainty.compare(values, values, group, NAMES, **FAST)
  rows = {k: paired[k] for k in ("overall", "gap", "es")} | paired["groups"]
  assert {k for k, v in rows.items() if np.isnan(v["low"])} == undefined


def test_distances_have_no_es():
  values, group = dice((0.7, 0.8, 0.8))
  for found in (
    uncertainty.intervals(values, group, NAMES, lower_is_better=True, **FAST),
    uncertainty.compare(
      values, values, group, NAMES, lower_is_better=True, **FAST
    ),
  ):
    assert "es" not in found
    assert "gap" in found


@settings(deadline=None, max_examples=30)
@given(
  means=st.lists(st.floats(0.2, 0.9), min_size=3, max_size=3),
  seed=st.integers(0, 1000),
  level=st.floats(0.5, 0.99),
)
def test_intervals_are_ordered_bounded_nested_and_repeatable(
  means, seed, level
):
  values, group = dice(means, seed=seed)
  found = uncertainty.intervals(
    values, group, NAMES, level=level, seed=seed, **FAST
  )
  wider = uncertainty.intervals(
    values, group, NAMES, level=0.995, seed=seed, **FAST
  )
  for (low, high), (lower, higher) in zip(
    flat(found), flat(wider), strict=True
  ):
    assert 0 <= lower <= low <= high <= higher <= 1
  again = uncertainty.intervals(
    values, group, NAMES, level=level, seed=seed, **FAST
  )
  assert found == again
  assert found["few"] == []


@pytest.mark.parametrize("means", [(0.8, 0.8, 0.8), (0.75, 0.8, 0.85)])
def test_coverage(means):
  """The bound is 4 standard errors of 200 trials below 92%."""
  trials = 200
  truth = metrics.equity_scaled(means, np.mean(means))
  hits = []
  for seed in range(trials):
    values, group = dice(means, (60, 60, 60), seed=seed)
    found = uncertainty.intervals(values, group, NAMES, **FAST)
    checks = (
      (found["groups"]["A"], means[0]),
      (found["es"], truth),
      (found["gap"], np.ptp(means)),
    )
    hits.append([low <= t <= high for (low, high), t in checks])
  assert (np.mean(hits, 0) >= 0.843).all()


def test_compare_is_paired():
  values, group = dice((0.7, 0.8, 0.8))
  better = np.minimum(values + 0.01, 1)
  paired = uncertainty.compare(values, better, group, NAMES, **FAST)
  single = uncertainty.intervals(values, group, NAMES, **FAST)
  row = paired["groups"]["B"]
  assert row["low"] <= row["difference"] <= row["high"]
  assert row["low"] > 0
  # The cases' luck cancels: the difference is known far better than the mean.
  assert row["high"] - row["low"] < 0.1 * np.diff(single["groups"]["B"])[0]
  # 80 gains alike: p of a 201st of exchanges, the runs as they are.
  assert row["p_bootstrap"] == pytest.approx(1 / 201)
  assert row["p_wilcoxon"] == pytest.approx(
    stats.wilcoxon((better - values)[group == 1]).pvalue
  )
  assert row["n"] == 80
  assert row["p_wilcoxon"] < row["p_wilcoxon_holm"] < 1e-6
  # No resample is at 0; a mean of 340 cases has Student's tails.
  tail = stats.t.cdf(stats.norm.ppf(1 / 201) * (339 / 340) ** 0.5, 339)
  assert paired["overall"]["p"] == pytest.approx(2 * tail)


def test_compare_figures_and_sign():
  values, group = dice((0.6, 0.8, 0.8))
  fairer = np.where(group == 0, values + 0.15, values)
  paired = uncertainty.compare(values, fairer, group, NAMES)
  before, after = (metrics.summarize(v, group, NAMES) for v in (values, fairer))
  for kind in ("overall", "gap", "es"):
    row = paired[kind]
    assert row["difference"] == pytest.approx(after[kind] - before[kind])
    assert row["p"] < 0.05
    assert row["low"] * row["high"] > 0
  assert paired["gap"]["high"] < 0 < paired["es"]["low"]
  swapped = uncertainty.compare(fairer, values, group, NAMES)
  assert swapped["gap"]["low"] == pytest.approx(-paired["gap"]["high"])


def test_the_same_run_twice_does_not_differ():
  values, group = dice((0.7, 0.8, 0.8))
  paired = uncertainty.compare(values, values, group, NAMES, **FAST)
  for kind in ("overall", "gap", "es"):
    assert paired[kind] == {"difference": 0, "low": 0, "high": 0, "p": 1}
  for row in paired["groups"].values():
    assert {row[k] for k in row if k.startswith("p_")} == {1}


def test_compare_leaves_out_cases_undefined_in_either():
  values, group = dice((0.7, 0.8, 0.8))
  other = values[::-1].copy()
  a, b = values.copy(), other.copy()
  a[3], b[70], b[-1] = np.nan, np.nan, np.nan
  keep = ~np.isnan(a + b)
  assert uncertainty.compare(a, b, group, NAMES, **FAST) == uncertainty.compare(
    values[keep], other[keep], group[keep], NAMES, **FAST
  )


def test_the_p_of_four_cases_is_not_given():
  """However alike they gain."""
  values, group = [0.5, 0.6, 0.7, 0.8], [0, 0, 0, 0]
  paired = uncertainty.compare(values, np.add(values, 0.1), group, "A", **FAST)
  row = paired["groups"]["A"]
  assert row["difference"] == pytest.approx(0.1)
  assert np.isnan([row[k] for k in row if k.startswith("p_")]).all()
  assert np.isnan([paired[k]["p"] for k in ("overall", "gap", "es")]).all()


def test_the_p_of_six_cases_by_hand():
  a, b = np.zeros(6), np.array([1, 2, 3, 4, 5, -1.5])
  (row,) = uncertainty.compare(a, b, np.zeros(6, int), "A")["groups"].values()
  # Of 64 choices of signs, sums of 13.5, 14.5 and 16.5, and their opposites.
  sums = np.array(list(itertools.product([1, -1], repeat=6))) @ np.abs(b)
  expected = np.mean(np.abs(sums) >= 13.5)
  assert row["p_bootstrap"] == pytest.approx(expected) == 6 / 64
  # Positive ranks are all but 2: as far out are the sums 19, 20 and 21.
  assert row["p_wilcoxon"] == pytest.approx(2 * 3 / 64)
  assert stats.wilcoxon(b, method="exact").pvalue == row["p_wilcoxon"]


@pytest.mark.parametrize("n", [6, 12, 13, 29])
def test_as_many_signs_as_cases_decide(n):
  """All gain: only the exchanges of none and of all are as far from 0."""
  gains = np.random.default_rng(n).uniform(0.1, 0.2, n)
  values, group = np.full(n, 0.5), np.zeros(n, int)
  paired = uncertainty.compare(values, values + gains, group, "A", **FAST)
  row = paired["groups"]["A"]
  least = 2 / 2**n
  assert row["p_wilcoxon"] == pytest.approx(least)
  expected = least if n <= uncertainty.ALL_EXCHANGES else 1 / 201
  assert row["p_bootstrap"] == paired["overall"]["p"] == pytest.approx(expected)


@settings(deadline=None, max_examples=30)
@given(data=st.data(), sizes=st.lists(st.integers(0, 40), min_size=1))
def test_no_p_is_below_what_the_cases_allow(data, sizes):
  sizes = sizes[:3]
  n = sum(sizes)
  group = np.repeat(np.arange(len(sizes)), sizes)
  group = np.where(data.draw(st.booleans()), group, -1)
  seed = data.draw(st.integers(0, 99))
  rng = np.random.default_rng(seed)
  values = rng.choice([0, 0.5, 1, np.nan], n, p=[0.2, 0.3, 0.4, 0.1])
  gain = data.draw(st.sampled_from([0, 0.1, 1]))
  changed = rng.random(n) < data.draw(st.sampled_from([0.1, 1]))
  other = np.where(changed, values + gain, values)
  paired = uncertainty.compare(
    values, other, group, NAMES, seed=seed, num_resamples=50
  )
  known = ~np.isnan(values + other)
  tests = {k: (paired[k], known) for k in ("overall", "gap", "es")}
  for g, name in enumerate(NAMES):
    tests[name] = (paired["groups"][name], known & (group == g))
  for row, member in tests.values():
    cases = int(member.sum())
    differing = int(np.sum((other != values)[member]))
    for key in (k for k in row if k.startswith("p")):
      if np.isnan(row[key]):
        continue
      assert cases >= uncertainty.MIN_TESTED
      assert (
        1 >= row[key] >= min(1, 2.0 ** (1 - differing)) >= 2.0 ** (1 - cases)
      )


def test_false_alarms_of_few_cases():
  """Of runs that are alike; the bound is 3.3 standard errors above 5%."""
  trials = 300
  group = np.repeat([0, 1, 2], (8, 13, 20))
  alarms = []
  for seed in range(trials):
    rng = np.random.default_rng(seed)
    luck = rng.beta(8, 2, len(group))
    a, b = luck + rng.normal(0, 0.05, (2, len(group)))
    paired = uncertainty.compare(a, b, group, NAMES, seed=seed, **FAST)
    rows = paired["groups"].values()
    found = [paired[k]["p"] for k in ("overall", "gap", "es")]
    found += [paired["groups"]["A"][k] for k in ("p_bootstrap", "p_wilcoxon")]
    for test in ("p_bootstrap_holm", "p_wilcoxon_holm"):
      found.append(min(row[test] for row in rows))
    alarms.append([p <= 0.05 for p in found])
  assert (
    np.mean(alarms, 0) <= 0.05 + 3.3 * (0.05 * 0.95 / trials) ** 0.5
  ).all()


def test_a_small_group_makes_gap_and_es_exact():
  """Four cases of B gain alike; A and C, of 40 each, do not change."""
  group = np.repeat([0, 1, 2], (40, 4, 40))
  values = np.random.default_rng(0).uniform(0.7, 0.8, 84)
  better = values + 0.3 * (group == 1)
  paired = uncertainty.compare(values, better, group, NAMES)
  for kind in ("overall", "gap", "es"):
    assert paired[kind]["p"] >= 2 / 2**4
  assert np.isnan(paired["groups"]["B"]["p_bootstrap"])
  assert paired["groups"]["A"]["p_bootstrap"] == 1


def test_wilcoxon_with_ties_and_zeros_is_exact():
  d = np.array([0, 0, 1, 1, 1, -1, 2, 2, -3, 4, 5, 6.0])
  n = np.count_nonzero(d)
  ranks = stats.rankdata(np.abs(d[d != 0]))
  signs = np.array(list(itertools.product([0, 1], repeat=n)))
  sums, found = signs @ ranks, ranks[d[d != 0] > 0].sum()
  tail = min(np.mean(sums <= found), np.mean(sums >= found))
  paired = uncertainty.compare(0 * d, d, np.zeros(12, int), "A", **FAST)
  assert paired["groups"]["A"]["p_wilcoxon"] == pytest.approx(2 * tail)


def test_holm_by_hand():
  # Sorted 0.01, 0.02, 0.04 times 3, 2, 1.
  p = [0.04, 0.01, np.nan, 0.02]
  np.testing.assert_allclose(uncertainty.holm(p), [0.04, 0.03, np.nan, 0.04])
  assert uncertainty.holm([0.6, 0.7]).tolist() == [1, 1]


@settings(deadline=None)
@given(some_p)
def test_holm_properties(p):
  p = np.array(p)
  adjusted = uncertainty.holm(p)
  known = ~np.isnan(p)
  assert (np.isnan(adjusted) == ~known).all()
  p, adjusted = p[known], adjusted[known]
  assert ((p <= adjusted) & (adjusted <= 1)).all()
  assert (adjusted <= np.minimum(1, len(p) * p)).all()
  assert (np.diff(adjusted[np.argsort(p)]) >= 0).all()


def test_over_seeds():
  found = uncertainty.over_seeds([0.8, 0.82, 0.84, np.nan])
  half = stats.t.ppf(0.975, 2) * 0.02 / 3**0.5
  assert found == pytest.approx(
    {"mean": 0.82, "sd": 0.02, "n": 3, "low": 0.82 - half, "high": 0.82 + half}
  )
  one = uncertainty.over_seeds([0.8])
  assert (one["mean"], one["n"]) == (0.8, 1)
  assert np.isnan([one["sd"], one["low"], one["high"]]).all()
  none = uncertainty.over_seeds([])
  assert none.pop("n") == 0
  assert np.isnan(list(none.values())).all()


@pytest.mark.parametrize(
  ("change", "match"),
  [
    ({"level": 1}, "level"),
    ({"num_resamples": 0}, "num_resamples"),
    ({"group": [0, 3]}, "group"),
    ({"group": [0]}, "values and group"),
  ],
)
def test_arguments_are_checked(change, match):
  arguments = {"group": [0, 1], "names": NAMES} | change
  with pytest.raises(ValueError, match=match):
    uncertainty.intervals([0.5, 0.6], **arguments)
  with pytest.raises(ValueError, match=match):
    uncertainty.compare([0.5, 0.6], [0.5, 0.6], **arguments)


def test_compared_runs_have_the_same_cases():
  with pytest.raises(ValueError, match="lengths"):
    uncertainty.compare([0.5, 0.6], [0.5], [0, 1], NAMES)


def by_hand(values, group, patient, num_resamples, seed):
  """Figures of resampled patients, one resample at a time.

  Equity is 'population_std', and of group means without noise's correction.
  """
  rng = np.random.default_rng(seed)
  members = {}
  for g in np.unique(group):
    of = np.unique(patient[group == g])
    members[g] = [np.flatnonzero((patient == p) & (group == g)) for p in of]
  draws = {
    g: rng.integers(len(of), size=(num_resamples, len(of)))
    for g, of in members.items()
  }
  rows = []
  for r in range(num_resamples):
    means = {
      g: np.mean([values[i] for j in draws[g][r] for i in of[j]])
      for g, of in members.items()
    }
    total = sum(np.mean(group == g) * mean for g, mean in means.items())
    rows.append([total, *means.values()])
  return np.array(rows, np.float64)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000))
def test_patients_are_resampled_whole(seed):
  """Two measures of unlike numbers of eyes, against a loop in float64."""
  rng = np.random.default_rng(seed)
  eyes = rng.integers(1, 4, 12)
  patient = np.repeat([f"p{i:02d}" for i in range(12)], eyes)
  group = np.repeat([0, 1, 2, -1], 3)[np.repeat(np.arange(12), eyes)]
  order = rng.permutation(len(patient))
  patient, group = patient[order], group[order]
  values = rng.uniform(size=(len(patient), 2))
  patients = uncertainty._patients(values, group, patient)
  assert sorted(patients.cases) == sorted(eyes)
  found = uncertainty._bootstrap(patients, 50, seed, "population_std")
  for k in range(2):
    expected = by_hand(values[:, k], group, patient, 50, seed)
    keys = ["overall", -1, 0, 1, 2]
    resampled = np.stack([found[key][:, k] for key in keys], 1)
    np.testing.assert_allclose(resampled, expected, rtol=1e-12)


def test_a_patient_of_one_case_is_a_case():
  """And one whose cases are copies is no more than one of them."""
  values, group = dice((0.6, 0.7, 0.8), (40, 50, 60))
  other = np.clip(values + 0.03, 0, 1)
  names = np.array([f"{i:03d}" for i in range(len(values))])
  twice = [np.repeat(x, 2) for x in (values, other, group, names)]
  for measure in (
    lambda a, b, g, p: uncertainty.intervals(a, g, NAMES, patient=p, **FAST),
    lambda a, b, g, p: uncertainty.compare(a, b, g, NAMES, patient=p, **FAST),
  ):
    expected = measure(values, other, group, None)
    assert measure(values, other, group, names) == expected
    found = measure(*twice)
    assert found["few"] == expected["few"] == []
    for kind in ("overall", "gap", "es"):
      assert found[kind] == pytest.approx(expected[kind])
    for name in NAMES:
      row, known = found["groups"][name], expected["groups"][name]
      if isinstance(row, dict):
        assert row.pop("n") == 2 * known.pop("n")
      assert row == pytest.approx(known)
  # As if they were other patients, intervals are too narrow.
  narrow = uncertainty.intervals(twice[0], twice[2], NAMES, **FAST)
  whole = uncertainty.intervals(values, group, NAMES, **FAST)
  assert np.ptp(narrow["overall"]) < 0.85 * np.ptp(whole["overall"])


def test_few_patients_are_few_however_many_their_cases():
  group = np.repeat([0, 1], 60)
  patient = np.repeat(np.arange(40).astype(str), 3)
  values = np.random.default_rng(0).uniform(size=120)
  found = uncertainty.intervals(values, group, "AB", patient=patient, **FAST)
  assert found["few"] == ["A", "B"]
  with pytest.raises(ValueError, match="patient must be"):
    uncertainty.intervals(values, group, "AB", patient=patient[:3])
