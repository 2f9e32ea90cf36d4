"""The sections of a report that speak of synthetic cases.

Each is a function from results to a section, as in `sections`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from fairdiff_jax.evaluation import figures, segmentation
from fairdiff_jax.evaluation.page import (
  PARTS,
  Cell,
  Section,
  interval,
  number,
  table,
)
from fairdiff_jax.evaluation.realism import MIN_CASES
from fairdiff_jax.evaluation.results import Results

STRIP, STRIPS_IN_ALL = 8, 96  # images of a group and kind, and at most
REALISTIC = (0.85, 1.15)  # ratios of synthetic to real that pass


def real_beside_synthetic(results: Results) -> Section | None:
  """Per group a row of real and a row of synthetic images."""
  synthetic, cases = results.synthetic, results.cases
  if synthetic is None:
    return None
  sources = {
    "Synthetic": (synthetic["image"], synthetic["mask"], synthetic["group"])
  }
  if cases is not None:
    real = cases["image"], cases["label"], results.case_groups
    sources = {"Real": real} | sources
  parts = []
  names = {str(group) for *_, of in sources.values() for group in of}
  names -= {segmentation.UNKNOWN}
  each = max(2, min(STRIP, STRIPS_IN_ALL // (2 * max(len(names), 1))))
  for name in sorted(names):
    parts.append(PARTS.heading(name))
    for source, (images, masks, of) in sources.items():
      chosen = np.flatnonzero(np.asarray(of, str) == name)[:each]
      parts.append(PARTS.small(source if len(chosen) else f"{source}: none"))
      alt = f"{source} case, {name}"
      parts.append(figures.strip(images, masks, chosen, alt, results.domain))
  note = (
    f"The first {each} of each group, not selected, with the outlines of their"
    " masks. Real cases are test cases."
  )
  return Section("Real beside synthetic", Markup("").join(parts), note)


def realism(results: Results) -> Section | None:
  """AUC and ratios of statistics, a column for every group."""
  if not results.realism:
    return None
  found = segmentation.json_ready(results.realism)
  auc, rows = [Cell("AUC, real against synthetic")], {}
  for of in found.values():
    ends = interval(of["auc_interval"], 1, 2)
    auc.append(Cell(number(of["auc"], 1, 2), ends))
    for name, row in of["statistics"].items():
      ends = [row["low"], row["high"]]
      off = None not in ends and not (
        REALISTIC[0] <= row["ratio"] <= REALISTIC[1]
      )
      cell = number(row["ratio"], 1, 2), interval(ends, 1, 2), "worse" * off
      rows.setdefault(name, [Cell(name.capitalize())]).append(Cell(*cell))
  blocks = {"": [auc], "Synthetic / real": [*rows.values()]}
  note = (
    "A small classifier that sees the statistics below tries to tell synthetic"
    " from real test cases: AUC 0.5 is chance, 1 is certain; a dash where a"
    f" group has fewer than {MIN_CASES} of either. It is asked about patients"
    " that it has not seen, also where images are made from real ones."
    " Synthetic cases are as they are drawn; of its own a bank may keep the"
    " segmenter's hardest (bank.candidates). Ratios"
    " of means over cases, with 95% intervals; those beyond"
    f" {REALISTIC[0]} to {REALISTIC[1]} are coloured."
  )
  body = table("Realism by group", ["", *found], blocks)
  body += _features(found) + _clouds(found)
  return Section("Realism", body, note)


def _features(found: Mapping[str, Any]) -> Markup:
  """Distances between features, where an extractor has seen the cases."""
  of = {g: row["features"] for g, row in found.items() if "features" in row}
  if not of:
    return Markup("")
  kid = [
    [
      Cell(title),
      *(_figure(row[key], row[f"{key}_interval"]) for row in of.values()),
    ]
    for key, title in (("kid", "KID"), ("kid_real", "real against real"))
  ]
  first = next(iter(of.values()))
  other = "" if first["network"] == "inception" else ", and not Inception's"
  text = (
    f"Features are those of {first['extractor']}, pooled{other}: figures"
    " compare with those of the same extractor alone. KID is unbiased and takes"
    " all cases: an interval that holds 0 tells no difference. The others"
    " depend on how many cases there are, and are measured between halves of n"
    " cases, with the spread of the halves; what two halves of real test cases,"
    " of different patients, give at the same n stands below each, and is the"
    " best there can be. Published: as the paper's public code has it, with the"
    " roles of real and synthetic swapped. All together: the groups in the"
    " proportions of the synthetic cases."
  )
  blocks = {"": kid, **_measures(of)}
  body = table("Realism in features", ["", *of], blocks)
  return PARTS.heading("In features") + body + PARTS.small(text)


def _clouds(found: Mapping[str, Any]) -> Markup:
  """Distances between the contours of masks."""
  of = {g: row["clouds"] for g, row in found.items() if "clouds" in row}
  if not any(row["measures"] for row in of.values()):
    return Markup("")
  text = (
    "Chamfer distances between contours, of a 64-pixel image, between halves as"
    " above. 1-NNA: how often the nearest other mask is of the same kind; 0.5"
    " says that nobody can tell the masks apart."
  )
  body = table("Masks", ["", *of], _measures(of))
  return PARTS.heading("In masks") + body + PARTS.small(text)


def _measures(of: Mapping[str, Any]) -> dict[str, list[list[Cell]]]:
  """A block of rows: every measure, and below it real against real."""
  rows = [
    [
      Cell("n"),
      *(Cell(str(row["n"]) if row["n"] else "–") for row in of.values()),
    ]
  ]
  for name in dict.fromkeys(k for row in of.values() for k in row["measures"]):
    for key, title, ends in (
      ("value", name, ("low", "high")),
      ("real", "real against real", ("real_low", "real_high")),
    ):
      cells = [
        _figure(found.get(key), [found.get(end) for end in ends])
        for found in (row["measures"].get(name, {}) for row in of.values())
      ]
      rows.append([Cell(title), *cells])
  return {"Between halves of n cases": rows}


def _figure(value: float | None, ends: Sequence[float | None]) -> Cell:
  """A figure of any size, to three digits."""
  known = [abs(v) for v in (value, *ends) if v is not None]
  largest = max(known, default=0)
  digits = 2 - math.floor(math.log10(largest)) if largest > 0 else 2
  style = (1, min(max(digits, 0), 6))
  return Cell(number(value, *style), interval(ends, *style))


def privacy(results: Results) -> Section | None:
  """How near synthetic cases are to training patients, and the nearest."""
  if not results.privacy:
    return None
  found = segmentation.json_ready(results.privacy)
  blocks = {}
  for source, of in found.items():
    rows = blocks[f"{source.capitalize()}, {of['synthetic']} cases"] = []
    for key, title, ends in (
      ("nearest", "nearest real patient, median", None),
      ("nearest_real", "of real patients, median", None),
      ("threshold", "1% of real patients are nearer than", None),
      ("closer", "share of synthetic cases that are", "closer_interval"),
      ("ratio", "nearest / second nearest, median", None),
      ("ratio_real", "of real patients, median", None),
      ("ratio_below", "share below 1% of real patients", None),
      ("attack", "membership attack, AUC", "attack_interval"),
    ):
      cells = [
        _figure(space[key], space[ends] if ends else ())
        for space in of["spaces"].values()
      ]
      rows.append([Cell(title), *cells])
  first = next(iter(found.values()))
  body = table("Privacy", ["", *first["spaces"]], blocks)
  for source, pairs in (results.pairs or {}).items():
    items = []
    for pair in pairs:
      told = ("synthetic", f"distance {pair.distance:.3f}")
      for image, mask, text in zip(
        pair.image, pair.mask, (told, ("real", pair.name)), strict=True
      ):
        alt = f"{text[0].capitalize()} half of a nearest pair"
        picture = figures.picture(
          image, alt, results.domain, figures.MIDDLE, label=mask
        )
        items.append((picture, text))
    body += PARTS.heading(f"Nearest pairs, {source}")
    body += PARTS.pictures(items, "cases")
  note = (
    f"Against {first['members']} training patients, with {first['held_out']}"
    " held out. Images are aligned at their first structure, standardised,"
    " and compared with every training image and its mirror; features are those"
    " of the baseline's segmenter, or of the run's where there is no baseline."
    " Of independent cases 1% are closer than 1% of real patients are to each"
    " other, and the attack has an AUC of 0.5; of copies all are, and it has 1."
    " A bank's cases may start from real ones, and never leave the run; an"
    " export's start from noise, and pass a gate. Images that were turned or"
    " warped are far in these distances: figures of a bank that warps real"
    " images say nothing of whose they are."
  )
  return Section("Privacy", body, note)


def agreement(results: Results) -> Section | None:
  """Dice of each segmenter on synthetic and on real cases."""
  if not results.agreement:
    return None
  blocks, head, keys = {}, ["Group"], ("synthetic", "real", "ratio", "below")
  for segmenter, groups in segmentation.json_ready(results.agreement).items():
    rows = blocks[f"Seen by {segmenter}"] = []
    for group, classes in groups.items():
      row = [Cell(group)]
      for value in classes.values():
        row += [Cell(number(value[key])) for key in keys[:2]]
        row.append(Cell(number(value["ratio"], 1, 2)))
        row.append(Cell(number(value.get("below"))))
      rows.append(row)
      pairs = [(cls, key) for cls in classes for key in keys]
      head = ["Group", *(Cell(cls.title(), key) for cls, key in pairs)]
  note = (
    "Dice of a segmenter on synthetic and on real cases, in points. A ratio"
    " near 1 says that it finds the mask in the image as well as in real ones."
    " Below: the share of synthetic cases, in %, that are below 99% of the"
    " group's real ones; 1 is chance."
  )
  body = table("Agreement by segmenter and group", head, blocks)
  return Section("Agreement of synthetic images with their masks", body, note)
