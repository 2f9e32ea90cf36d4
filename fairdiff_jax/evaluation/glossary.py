"""What the words of a report mean, by the definitions that it follows."""

from fairdiff_jax.data.domain import FUNDUS, Domain
from fairdiff_jax.evaluation import verdict
from fairdiff_jax.evaluation.page import number
from fairdiff_jax.fairness import uncertainty
from fairdiff_jax.fairness.metrics import Definitions
from fairdiff_jax.fairness.uncertainty import MIN_CASES

# What a case counts that lacks a structure: of Dice and IoU, of HD95.
EMPTY = {
  "exclude": (
    "A case where label and prediction both lack the structure is left out; one"
    " where only the label lacks it, or only the prediction, counts 0.",
    "Left out where label or prediction lacks the structure.",
  ),
  "published": (
    "As in the public code, a case where only the label lacks the structure"
    " counts 1, and one where both lack it, or only the prediction, 0.",
    "As in the public code, 0 where label or prediction lacks the structure.",
  ),
}
# Spread s of the group means.
EQUITY = {
  "fairdiff_std": "the standard deviation (divisor: groups less one) of the"
  " group means, both in [0, 1]; the definition of FairDiff's tables",
  "fairseg_sum": "the sum over the groups of the distance between their mean"
  " and the overall one, both in [0, 1]; FairSeg's definition",
  "population_std": "the standard deviation (divisor: groups) of the group"
  " means, both in [0, 1]; FairMedFM's definition",
}
GLOSSARY = {
  "Dice, IoU": "Overlap of predicted and labelled pixels of a case, times 100.",
  "ES-Dice": "Equity-scaled Dice: overall / (1 + s), where s is",
  "Gap": "Mean Dice of the best group less that of the worst, in points.",
  "HD95": "95th percentile of the distances between the two outlines, both"
  " directions pooled, in pixels of the prepared masks. Less is better.",
  "Verdict": "Fairer: the gap shrinks, by more than"
  f" {number(verdict.NOISE)} points, with an interval clear of 0 and p below"
  f" {verdict.SIGNIFICANT}, and no group got worse. Levelling down: the gap"
  " shrinks and groups got worse; partly, if others got better. A group got"
  f" worse that lost more than {number(verdict.HARM)} points, whatever the"
  " chance, or anything beyond chance. Nothing is said with fewer than"
  f" {MIN_CASES} test cases of a group, nor of a segmenter whose Dice over all"
  f" cases is below {number(verdict.FLOOR, digits=0)}.",
  "Intervals": "The small range at a figure: a 95% bootstrap interval"
  " (percentiles of 2,000 resamples of the test cases within their groups). It"
  " shows the chance of the test cases, not that of training. For ES-Dice and"
  " gap the group means of a resample are first drawn together by what their"
  " noise adds to their spread. The figures themselves are not: with few cases"
  " a group ES-Dice is rather too low and the gap too high, so that they may"
  " lie towards an end of their interval. The interval of a difference is"
  " paired: both models on the same cases, those with a value in both.",
  "p": "Two-sided, of a difference, paired by test case. With fewer than"
  f" {uncertainty.MIN_RESAMPLED} cases of a mean, or {MIN_CASES} of a group for"
  " ES-Dice and gap, it is the share of exchanges of the two models' results of"
  " a case that set them as far apart: of all exchanges, or of 2,000 where more"
  f" than {uncertainty.ALL_EXCHANGES} cases differ. With more cases it is the"
  " paired bootstrap's. Of n cases that differ, no p is below 2/2ⁿ; fewer"
  f" than {uncertainty.MIN_TESTED} cases have none.",
  "Groups": "Means over the cases of a group. Cases of unknown group count in"
  " the overall mean only.",
}


def ratio_title(name: str) -> str:
  """What the error of a ratio is called, 'Cup-to-disc error'."""
  return f"{name[:1].upper()}{name[1:].replace(' ', '-')} error"


def glossary(
  definitions: Definitions, domain: Domain = FUNDUS
) -> dict[str, str]:
  """What the report's words mean, by the definitions that it follows."""
  terms = dict(GLOSSARY)
  behind = {k: terms.pop(k) for k in ("Verdict", "Intervals", "p", "Groups")}
  for name, (part, whole) in domain.ratios.items():
    terms[ratio_title(name)] = (
      f"Absolute error of the area ratio of {part} to {whole}. Left out where"
      f" label or prediction has no {whole}."
    )
  classes = domain.reported_classes
  for name in domain.reported:
    made_of = [p for p in domain.parts if set(classes[p]) < set(classes[name])]
    if name not in domain.parts:
      made_of = sorted(made_of, key=lambda p: classes[p])
      text = f"{', '.join(made_of[:-1])} and {made_of[-1]} together."
      terms[name.title()] = text[:1].upper() + text[1:]
  terms |= behind
  overlap, distance = EMPTY[definitions.empty]
  more = {
    "Dice, IoU": overlap,
    "ES-Dice": f"{EQUITY[definitions.equity]}. More is better.",
    "HD95": distance,
  }
  return {
    k: f"{text} {more[k]}" if k in more else text for k, text in terms.items()
  }
