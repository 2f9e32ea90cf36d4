"""What a report concludes of two segmenters, and what it refuses to.

Of every reported structure: is the first segmenter fairer than the second?

    fairer                 the gap of Dice between groups shrinks, its interval
                           clear of 0, and no group got worse
    partly levelling down  the gap shrinks, and some groups got worse
    levelling down         the same, and no group got better
    less fair              the gap grows, its interval clear of 0
    not shown              anything else

A group got worse if it lost more than `HARM` points, whatever the chance, or
anything at all beyond chance. Nothing is said where a group has fewer than
`MIN_CASES` test cases, nor of a segmenter that has learned nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fairdiff_jax import files
from fairdiff_jax.evaluation.page import listed, number
from fairdiff_jax.fairness.uncertainty import MIN_CASES

FLOOR = 0.3  # Dice over all cases; below, a segmenter has learned nothing
HARM = 0.003  # Dice that a group may lose while others gain
NOISE = 0.005  # of difference that is not worth a claim
SIGNIFICANT = 0.05  # p above which a difference is not, either

FAIRER, LESS_FAIR = "fairer", "less fair"
PARTLY, DOWN = "partly levelling down", "levelling down"
OPEN = "not shown to be fairer or less fair"
SILENT = "nothing is said"
CLAIM = {
  FAIRER: "{0} is fairer than {1}",
  LESS_FAIR: "{0} is less fair than {1}",
  PARTLY: "{0} is not fairer than {1} but partly levelling down",
  DOWN: "{0} is not fairer than {1} but levelling down",
  OPEN: "{0} is not shown to be fairer or less fair than {1}",
}

Row = Mapping[str, float | None]


class Finding(NamedTuple):
  """What is said of one structure.

  Attributes:
    word: `FAIRER`, `LESS_FAIR`, `PARTLY`, `DOWN`, `OPEN` or `SILENT`.
    better: groups that got better, by more than `HARM` or beyond chance.
    worse: groups that got worse, likewise.
    why: the reason for `SILENT`, a clause.
  """

  word: str
  better: tuple[str, ...] = ()
  worse: tuple[str, ...] = ()
  why: str = ""


class Verdict(NamedTuple):
  """A report's conclusion.

  Attributes:
    findings: structure -> what is said of it; {} without two segmenters.
    claims: the same in sentences, the headline's first.
    cautions: what must be known with it, sentences.
  """

  findings: dict[str, Finding]
  claims: list[str]
  cautions: list[str]

  def __str__(self) -> str:
    return " ".join([*self.claims, *self.cautions])


def gain(key: str, row: Row) -> int:
  """1 for better, -1 for worse, 0 for a difference not worth a claim.

  Args:
    key: 'gap', of which less is better, or anything else.
    row: a difference as `uncertainty.compare` gives it.
  """
  p = row.get("p_bootstrap_holm", row.get("p"))
  difference, low, high = map(row.get, ("difference", "low", "high"))
  if None in (difference, low, high, p) or low <= 0 <= high:
    return 0
  if abs(difference) <= NOISE or p >= SIGNIFICANT:
    return 0
  return 1 if (difference < 0) == (key == "gap") else -1


def _moved(row: Row, sign: int) -> bool:
  """Whether a group's mean got better (1) or worse (-1)."""
  ends = [row[key] for key in ("low", "high")]
  sure = None not in ends and min(sign * end for end in ends) > 0
  return sure or sign * row["difference"] > HARM


def judge(difference: Mapping[str, Any]) -> Finding:
  """What is said of a structure whose figures may be compared.

  Args:
    difference: of its Dice, as `segmentation.difference` gives it, with `gap`
      and `groups`.
  """
  rows = difference["groups"]
  if None in [row["difference"] for row in rows.values()]:
    return Finding(OPEN)
  worse, better = (
    tuple(name for name, row in rows.items() if _moved(row, sign))
    for sign in (-1, 1)
  )
  gap = gain("gap", difference["gap"])
  shrinks = (difference["gap"]["difference"] or 0) < -NOISE
  harmed = any(gain("overall", row) < 0 for row in rows.values())
  word = {1: FAIRER, -1: LESS_FAIR, 0: OPEN}[gap]
  if worse and (gap > 0 or (shrinks and harmed)):
    word = PARTLY if better else DOWN
  return Finding(word, better, worse)


def _unlearned(summaries: Mapping[str, dict], cls: str) -> str:
  """Which segmenter has learned nothing of a structure; '' if none."""
  for name, summary in summaries.items():
    dice = summary[cls]["dice"]["overall"]
    if dice is not None and dice < FLOOR:
      return (
        f"this segmenter has learned nothing ({name}: Dice {number(dice)} of"
        f" the {cls} over all cases, below {number(FLOOR, digits=0)})"
      )
  return ""


def _silence(
  summaries: Mapping[str, dict], few: Sequence[str], cls: str
) -> str:
  """Why nothing is said of a structure, a clause; '' where it may be."""
  if why := _unlearned(summaries, cls):
    return why
  for name, summary in summaries.items():
    if summary[cls]["dice"]["overall"] is None:
      return f"no test case has a Dice of {name}"
  groups = next(iter(summaries.values()))[cls]["dice"]["groups"]
  if few:
    sizes = {name: groups[name]["n"] for name in few}
    if max(sizes.values()) < MIN_CASES:
      told = [f"{name} ({n})" for name, n in sizes.items()]
      return f"fewer than {MIN_CASES} test cases of {files.some(told)}"
    told = [f"{name} ({n} cases)" for name, n in sizes.items()]
    return f"fewer than {MIN_CASES} test patients of {files.some(told)}"
  if len(groups) < 2:
    return "there are no two groups to compare"
  return ""


def headline(summary: dict, cls: str) -> dict[str, float | None]:
  """The Dice that a report speaks of first: over all cases, ES, gap, worst."""
  dice = summary[cls]["dice"]
  worst = dice["groups"].get(dice["worst"], {"mean": None})["mean"]
  return {key: dice[key] for key in ("overall", "es", "gap")} | {"worst": worst}


def _figures(summaries: Mapping[str, dict], cls: str) -> str:
  figures = [headline(summary, cls) for summary in summaries.values()]
  es, gap, worst, dice = (
    " against ".join(number(f[key]) for f in figures)
    for key in ("es", "gap", "worst", "overall")
  )
  return (
    f"ES-Dice {es}, gap between groups {gap} points, worst group {worst}, all"
    f" cases {dice}"
  )


def _changes(difference: Mapping[str, Any]) -> str:
  """'Asian +1.9, Black −1.3, gap −2.0'."""
  rows = difference["groups"] | {"gap": difference["gap"]}
  return ", ".join(
    f"{name} {number(row['difference'], sign='+')}"
    for name, row in rows.items()
  )


def conclude(
  summaries: Mapping[str, dict],
  differences: Mapping[str, dict],
  reported: Sequence[str],
  first: str,
  *,
  reason: str = "",
  baseline: str = "",
  made_up: bool = False,
) -> Verdict:
  """What follows from the figures of a report.

  Args:
    summaries: segmenter -> what `segmentation.summary` gives; the first is the
      subject, the second the baseline.
    differences: what `segmentation.difference` gives of them, or {}.
    reported: names of the structures.
    first: the one that is spoken of first.
    reason: why there is no segmenter, a clause.
    baseline: what the baseline is, a clause.
    made_up: whether the patients are.
  """
  if not summaries:
    claim = f"There are no segmentation figures because {reason}: nothing is"
    return Verdict({}, [f"{claim} said of fairness."], [])
  pair = dict(list(summaries.items())[:2])
  structures = sorted(reported, key=lambda cls: cls != first)
  silence = {}
  for cls in structures:
    few = next(iter(pair.values()))[cls]["dice"]["interval"]["few"]
    if differences:
      few = differences[cls]["dice"]["few"]
    silence[cls] = _unlearned(pair, first) or _silence(pair, few, cls)
  findings = {}
  if differences:
    findings = {
      cls: Finding(SILENT, why=why) if why else judge(differences[cls]["dice"])
      for cls, why in silence.items()
    }
  claims = []
  for cls, why in silence.items():
    if why:
      silent = listed([c for c, other in silence.items() if other == why])
      claims.append(f"On the {silent}, nothing is said of fairness: {why}.")
    elif differences:
      claims.append(
        _claim(pair, differences[cls]["dice"], findings[cls], cls, cls == first)
      )
    else:
      claims.append(f"On the {cls}, {_figures(pair, cls)}.")
  if not differences:
    claims.append("There is no baseline, so nothing is called fairer.")
  cautions = ["It is one run of one seed: another may end otherwise."]
  if made_up:
    cautions.append(
      "The patients are made up (phantoms): nothing follows for real ones."
    )
  if differences and baseline:
    cautions.append(f"The baseline is {baseline}.")
  return Verdict(findings, list(dict.fromkeys(claims)), cautions)


def _claim(
  pair: Mapping[str, dict],
  difference: Mapping[str, Any],
  finding: Finding,
  cls: str,
  is_first: bool,
) -> str:
  sentence = CLAIM[finding.word].format(*pair) if is_first else finding.word
  changes = _changes(difference)
  text = f"On the {cls}, {sentence}: {changes} points"
  if finding.word == LESS_FAIR and not finding.worse:
    text += ", though no group got worse"
  if is_first:
    text += f"; {_figures(pair, cls)}"
  return f"{text}."
