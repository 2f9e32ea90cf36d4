"""The report of a run: one HTML page that needs nothing else, and its data.

`write` takes plain data and leaves `index.html`, one table of cases per model
and, last, `summary.json` (every figure by name): where that lies the report is
complete. The page has no script and loads nothing: charts are inline SVG that
take the page's colours, images are inline PNG under contours drawn as SVG
paths. A part without data is left out, an undefined figure is a dash, and what
is missing is said in a notice: no figure ends a report.
"""

import base64
import dataclasses
import html
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import contourpy
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from fairdiff_jax import files
from fairdiff_jax.data import domain as domains
from fairdiff_jax.data.domain import FUNDUS, Domain
from fairdiff_jax.evaluation import segmentation
from fairdiff_jax.evaluation.realism import MIN_CASES as MIN_SAMPLE
from fairdiff_jax.fairness import uncertainty
from fairdiff_jax.fairness.metrics import DEFAULT, Definitions
from fairdiff_jax.fairness.uncertainty import MIN_CASES

DIRECTORY = "report"  # of a run's directory
PAGE, TABLE, SUMMARY = "index.html", "cases.csv", "summary.json"
TEST_DIGEST = "test cases sha256"  # a fact, of names, images and masks
NOISE = 0.5  # points of difference that are not worth a claim
SIGNIFICANT = 0.05  # p above which a difference is not, either
WORST = 6  # cases shown
STRIP = 8  # images a group
CURVE = 60  # points a curve is averaged to
REALISTIC = (0.85, 1.15)  # ratios of synthetic to real that pass
THUMBNAIL = 320  # pixels of the longer side of an inlined image
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
PLACES = range(1, len(PALETTE) + 1)  # of models
INK = "#123456"  # stands for the page's text colour until the SVG is inlined
STYLE = {
  "svg.fonttype": "none",
  "svg.hashsalt": "report",
  "text.parse_math": False,
  "font.size": 10,
  "axes.titlesize": 11,
  "axes.spines.top": False,
  "axes.spines.right": False,
  **dict.fromkeys(
    ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor"), INK
  ),
  "xtick.color": INK,
  "ytick.color": INK,
}
CSS = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#5a6470;--page:#fff;
--card:#f5f7f9;--line:#d9dee4;--good:#00694d;--bad:#a63a00}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ed;--soft:#a3adb8;
--page:#14171b;--card:#1d2126;--line:#363d45;--good:#4fd1a5;--bad:#ff9a62}}
*{box-sizing:border-box}
body{margin:0 auto;padding:2rem 1.25rem 4rem;max-width:70rem;
background:var(--page);color:var(--ink);overflow-wrap:anywhere;
font:1rem/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.75rem;line-height:1.2;margin:0 0 .75rem}
h2{font-size:1.25rem;margin:2.75rem 0 .5rem}
h3{font-size:1rem;margin:1.25rem 0 .4rem}
p{max-width:46rem;margin:.4rem 0}
.verdict{font-size:1.15rem;max-width:52rem;padding:.9rem 1.1rem;
background:var(--card);border-left:4px solid #0072b2;border-radius:4px}
.notice{padding:.1rem 1.1rem;border-left:4px solid #e69f00;max-width:52rem}
.note,small,figcaption{color:var(--soft);font-size:.875rem}
.scroll{overflow-x:auto;margin:.75rem 0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;
overflow-wrap:normal}
th,td{padding:.35rem .75rem;text-align:right;white-space:nowrap;
vertical-align:top;border-bottom:1px solid var(--line)}
th{font-weight:600}thead th{vertical-align:bottom}
th:first-child{text-align:left}th[scope=row]{font-weight:400;
white-space:normal;min-width:8rem;max-width:14rem;overflow-wrap:break-word}
th[scope=rowgroup]{padding-top:1rem}tbody{border-bottom:2px solid var(--line)}
td small{white-space:nowrap}
.better{color:var(--good)}.worse{color:var(--bad)}
.charts,.cases,.strip{display:grid;gap:.75rem}
.charts{grid-template-columns:repeat(auto-fit,minmax(min(20rem,100%),1fr))}
.charts>svg{width:100%;max-width:32rem;height:auto}
.charts text{font-family:inherit!important}
.cases{grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr))}
.strip{grid-template-columns:repeat(8,1fr);gap:.35rem;margin-bottom:.35rem}
figure{margin:0}.case{display:block;width:100%;height:auto;border-radius:4px}
path.c{fill:none;stroke-width:1.75;vector-effect:non-scaling-stroke}
path.label,i.label{stroke:#56b4e9;border-color:#56b4e9}
path.prediction,i.prediction{stroke:#e69f00;border-color:#e69f00}
path.prediction{stroke-dasharray:4 2}
i{display:inline-block;width:1.75rem;border-top:3px solid;
vertical-align:middle;margin:0 .35rem 0 .1rem}i.prediction{border-style:dashed}
dl{display:grid;grid-template-columns:minmax(7rem,max-content) 1fr;
gap:.35rem 1.25rem;margin:.75rem 0}
dt{font-weight:600}dd{margin:0;max-width:46rem}
@media(max-width:600px){body{padding:1.25rem 1rem 3rem}h1{font-size:1.4rem}
.strip{grid-template-columns:repeat(4,1fr)}table{font-size:.9rem}
th,td{padding:.35rem .4rem;white-space:normal}
.scroll th:first-child{min-width:5rem;max-width:8rem}
td small{font-size:.75rem}
dl{display:block}dd{margin-bottom:.6rem}}
"""
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


def _ratio_title(name: str) -> str:
  return f"{name[:1].upper()}{name[1:].replace(' ', '-')} error"


def glossary(
  definitions: Definitions, domain: Domain = FUNDUS
) -> dict[str, str]:
  """What the report's words mean, by the definitions that it follows."""
  terms = dict(GLOSSARY)
  behind = {k: terms.pop(k) for k in ("Intervals", "p", "Groups")}
  for name, (part, whole) in domain.ratios.items():
    terms[_ratio_title(name)] = (
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


HEADLINE = {
  "overall": "All cases",
  "es": "ES-Dice",
  "gap": "Gap",
  "worst": "Worst group",
}
NAMES = {"dice": "Dice", "iou": "IoU", "hd95": "HD95, px"}


def escape(text) -> str:
  return html.escape(str(text))


def _number(value: float | None, scale: float = 100, digits: int = 1) -> str:
  return "–" if value is None else f"{scale * value:.{digits}f}"


def _range(
  interval: list[float | None],
  scale: float = 100,
  digits: int = 1,
) -> str:
  """A small second line for a cell; nothing for an undefined interval."""
  if None in interval:
    return ""
  low, high = (_number(end, scale, digits) for end in interval)
  return f"<br><small>{low} to {high}</small>"


def section(title: str, body: str, note: str = "") -> str:
  note = note and f'<p class="note">{note}</p>'
  return f"<section><h2>{title}</h2>{note}{body}</section>" if body else ""


def _th(text: str, scope: str = "col", span: int = 1) -> str:
  return f'<th scope="{scope}" colspan="{span}">{text}</th>'


def td(text: str, css: str = "") -> str:
  return f'<td class="{css}">{text}</td>'


def html_table(label: str, head: list[str], blocks: Mapping[str, list]) -> str:
  """A table in a box that scrolls by itself.

  Args:
    label: What the table shows, for screen readers.
    head: Texts (HTML) of the head, one a column.
    blocks: Title of a block -> its rows; a row is its head (text) and its
      cells (with their tags). An empty title takes no row.
  """
  parts = []
  for title, rows in blocks.items():
    lines = [f"<tr>{_th(title, 'rowgroup', len(head))}</tr>"] if title else []
    lines += [f"<tr>{_th(r, 'row')}{''.join(cells)}</tr>" for r, *cells in rows]
    parts.append(f"<tbody>{''.join(lines)}</tbody>")
  return (
    f'<div class="scroll" role="region" tabindex="0" aria-label="{label}">'
    f"<table><thead><tr>{''.join(map(_th, head))}</tr></thead>"
    f"{''.join(parts)}</table></div>"
  )


def _marked(groups: Mapping[str, int]) -> dict[str, int]:
  """The same counts, with a mark at the names of small groups."""
  mark = "\N{NO-BREAK SPACE}†"
  return {g + mark * (n < MIN_CASES): n for g, n in groups.items()}


def svg(figure: Figure, alt: str) -> str:
  """The figure as inline SVG without addresses, in the page's text colour."""
  buffer = io.StringIO()
  figure.savefig(buffer, format="svg", transparent=True)
  text = buffer.getvalue()
  text = text[text.index("<svg") :].replace("xlink:href", "href")
  text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
  text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
  text = re.sub(r'<g id="[^"]*"', "<g", text).replace(INK, "currentColor")
  return text.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1)


def _bars(
  summaries: Mapping[str, dict], cls: str, groups: Mapping[str, int]
) -> str:
  """Dice of `cls` by group with intervals, one colour a model."""
  count = len(summaries)
  with matplotlib.rc_context(STYLE):
    height = 0.9 + (0.2 * count + 0.1) * len(groups) + 0.2 * count
    figure = Figure(figsize=(4.2, height), layout="constrained")
    axes = figure.subplots()
    alt = [f"Dice of the {cls} by group."]
    for i, (name, summary) in enumerate(summaries.items()):
      dice = summary[cls]["dice"]
      means = [dice["groups"][g]["mean"] for g in groups]
      ends = [dice["interval"]["groups"][g] for g in groups]
      arms = [
        (0, 0) if None in end else np.abs(100 * (np.array(end) - mean))
        for mean, end in zip(means, ends, strict=True)
      ]
      y = np.arange(len(groups)) + (i - (count - 1) / 2) * 0.8 / count
      bars = axes.barh(
        y,
        [100 * (mean or 0) for mean in means],
        0.75 / count,
        xerr=np.reshape(arms, (-1, 2)).T,
        error_kw={"ecolor": INK, "elinewidth": 1},
        color=PALETTE[i],
        label=name,
      )
      texts = [_number(mean) for mean in means]
      axes.bar_label(bars, texts, fontsize=8.5, padding=2)
      alt.append(
        f"{name}: {', '.join(map(' '.join, zip(groups, texts, strict=True)))}."
      )
    ticks = [f"{group} (n={n})" for group, n in _marked(groups).items()]
    axes.set_yticks(range(len(groups)), ticks)
    axes.invert_yaxis()
    axes.set(title=f"{cls.title()}, Dice", xlim=(0, 105))
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside lower center", frameon=False)
    return svg(figure, " ".join(alt))


def _curves(title: str, curves: Mapping[str, tuple]) -> str:
  """Lines over training steps; `curves` maps a name to (steps, values)."""
  with matplotlib.rc_context(STYLE):
    figure = Figure(figsize=(4.2, 2.6), layout="constrained")
    axes = figure.subplots()
    styles = ("-", "--", ":", "-.")
    for i, (name, (steps, values)) in enumerate(curves.items()):
      axes.plot(
        steps, values, styles[i % 4], color=PALETTE[i % 6], lw=1.8, label=name
      )
    axes.set(title=title, xlabel="step")
    if len(curves) > 1:
      figure.legend(loc="outside lower center", frameon=False, ncols=3)
    ends = ", ".join(
      f"{k} {v[0]:.3g} to {v[-1]:.3g}" for k, (_, v) in curves.items()
    )
    return svg(figure, f"{title} over training steps: {ends}")


def _outline(mask: np.ndarray, css: str, domain: Domain) -> str:
  """Outlines of the structures of a mask `[H, W]` as one SVG path."""
  data = []
  for region in domain.split(mask).values():
    field = np.pad(region, 1).astype(np.float32)
    for line in contourpy.contour_generator(z=field).lines(0.5):
      points = (f"{x - 0.5:.1f} {y - 0.5:.1f}" for x, y in line)
      data.append("M" + "L".join(points))
  return f'<path class="c {css}" d="{"".join(data)}"/>'


def _picture(
  image: np.ndarray, alt: str, domain: Domain, **masks: np.ndarray
) -> str:
  """A uint8 image, grey or RGB, with the outlines of the masks over it."""
  height, width = image.shape[:2]
  thumbnail = Image.fromarray(np.ascontiguousarray(image, np.uint8))
  thumbnail.thumbnail((THUMBNAIL, THUMBNAIL))
  buffer = io.BytesIO()
  thumbnail.save(buffer, "PNG", optimize=True)
  data = base64.b64encode(buffer.getvalue()).decode()
  outlines = "".join(_outline(mask, css, domain) for css, mask in masks.items())
  return (
    f'<svg class="case" role="img" aria-label="{escape(alt)}" '
    f'viewBox="0 0 {width} {height}"><image width="{width}" '
    f'height="{height}" href="data:image/png;base64,{data}"/>{outlines}</svg>'
  )


def _figures(summary: dict, cls: str) -> dict[str, float | None]:
  """The Dice of the headline: over all cases, ES, gap and worst group."""
  dice = summary[cls]["dice"]
  worst = dice["groups"].get(dice["worst"], {"mean": None})["mean"]
  return {key: worst if key == "worst" else dice[key] for key in HEADLINE}


def _intervals(summary: dict, cls: str) -> dict[str, list[float | None]]:
  """(low, high) of what `_figures` returns."""
  dice = summary[cls]["dice"]
  worst = dice["interval"]["groups"].get(dice["worst"], [None, None])
  return {k: worst if k == "worst" else dice["interval"][k] for k in HEADLINE}


def _gain(key: str, row: Mapping[str, float | None]) -> int:
  """1 for better, -1 for worse, 0 for a difference not worth a claim."""
  difference, low, high, p = map(row.get, ("difference", "low", "high", "p"))
  if None in (difference, low, high, p) or low <= 0 <= high:
    return 0
  if abs(100 * difference) <= NOISE or p >= SIGNIFICANT:
    return 0
  return 1 if (difference < 0) == (key == "gap") else -1


def _verdict(
  summaries: Mapping[str, dict],
  differences: Mapping,
  reason: str,
  headline: str,
) -> str:
  """Which of the first two models is the fairer, and by what."""
  if not summaries:
    return (
      f"There are no segmentation figures because {reason}: nothing is said of"
      " fairness."
    )
  name, *others = summaries
  figures = [_figures(summary, headline) for summary in summaries.values()][:2]
  es, gap, worst, dice = (
    " against ".join(_number(f[key]) for f in figures)
    for key in ("es", "gap", "worst", "overall")
  )
  verdict = "ES-Dice"
  if others:
    rows = differences[headline]["dice"]
    gains = {_gain(key, rows[key]) for key in ("es", "gap")}
    word = {
      (True, False): "fairer than",
      (False, True): "less fair than",
      (True, True): "fairer in one way and less fair in another than",
      (False, False): "not shown to be fairer or less fair than",
    }[1 in gains, -1 in gains]
    verdict = f"{name} is {word} {others[0]}: ES-Dice"
  few = summaries[name][headline]["dice"]["interval"]["few"]
  caution = (
    f" With fewer than {MIN_CASES} cases of {', '.join(few)}, do not rely on "
    "it."
  )
  return (
    f"On the {headline}, {verdict} {es}, gap between groups {gap} points, "
    f"worst group {worst}, all cases {dice}.{caution * bool(few)}"
  )


def _headline(
  summaries: Mapping[str, dict], differences: Mapping, domain: Domain
) -> str:
  models = dict(list(summaries.items())[:2])
  blocks = {}
  for cls in domain.reported:
    rows = blocks[cls.title()] = []
    for key, label in HEADLINE.items():
      row = [label]
      for summary in models.values():
        group = summary[cls]["dice"]["worst"] if key == "worst" else None
        value = _number(_figures(summary, cls)[key])
        value += _range(_intervals(summary, cls)[key])
        row.append(td(f"{escape(group)} {value}" if group else value))
      if differences:
        change = differences[cls]["dice"][key]
        word = {1: "better", -1: "worse", 0: ""}[_gain(key, change)]
        points = "–"
        if change["difference"] is not None:
          points = f"{100 * change['difference']:+.1f} {word}"
        if "low" in change:
          points += _range([change["low"], change["high"]])
        row.append(td(points.replace("-", "−"), word))
      rows.append(row)
  head = ["Dice", *map(escape, models)]
  head += ["Difference"] if len(models) > 1 else []
  return html_table("Headline", head, blocks)


def _measures(
  summaries: Mapping[str, dict], groups: Mapping, n: int, domain: Domain
) -> str:
  blocks = {}
  titles = {
    (cls, m): f"{cls.title()} {name}"
    for m, name in NAMES.items()
    for cls in domain.reported
  }
  for name in domain.ratios:
    titles[segmentation.key(name), "error"] = _ratio_title(name)
  for (cls, measure), title in titles.items():
    style = {"hd95": (1, 1), "error": (1, 3)}.get(measure, (100, 1))
    rows = blocks[escape(title)] = []
    for name, summary in summaries.items():
      figures = summary[cls][measure]
      ends = figures["interval"]["overall"]
      means = [(figures["overall"], figures["n"], n, ends)]
      for group, count in groups.items():
        figure = figures["groups"][group]
        ends = figures["interval"]["groups"][group]
        means.append((figure["mean"], figure["n"], count, ends))
      row = [escape(name)]
      for mean, defined, count, ends in means:
        few = f" <small>n={defined}</small>" if defined < count else ""
        row.append(td(_number(mean, *style) + few + _range(ends, *style)))
      rows.append(row)
  head = ["Model"]
  for title, count in [("All", n), *_marked(groups).items()]:
    head.append(f"{escape(title)}<br><small>n={count}</small>")
  return html_table("All measures", head, blocks)


def _worst_cases(
  columns: segmentation.Columns, cases: Mapping, domain: Domain
) -> str:
  score = np.stack([columns[f"{cls}_dice"] for cls in domain.parts])
  known = ~np.isnan(score)
  count = known.sum(0)
  total = np.where(known, score, 0).sum(0)
  mean = np.where(count > 0, total / np.maximum(count, 1), np.inf)
  figures = []
  for i in np.argsort(mean, kind="stable")[:WORST]:
    name, group = columns["name"][i], columns["group"][i]
    found = ", ".join(
      f"{cls} {_number(None if np.isnan(s) else s)}"
      for cls, s in zip(domain.parts, score[:, i], strict=True)
    )
    text = f"{escape(name)}<br>{escape(group)}<br>{escape(found)}"
    picture = _picture(
      cases["image"][i],
      f"Case {name}, {group}, with outlines of label and prediction",
      domain,
      label=cases["label"][i],
      prediction=cases["prediction"][i],
    )
    figures.append(f"<figure>{picture}<figcaption>{text}</figcaption></figure>")
  return f'<div class="cases">{"".join(figures)}</div>'


def _strips(cases: Mapping | None, synthetic: Mapping, domain: Domain) -> str:
  """Per group a row of real and a row of synthetic images."""
  sources = {
    "Synthetic": (synthetic["image"], synthetic["mask"], synthetic["group"])
  }
  if cases is not None:
    real = cases["image"], cases["label"], cases["group"]
    sources = {"Real": real} | sources
  parts = []
  groups = {str(group) for *_, of in sources.values() for group in of}
  for group in sorted(groups - {segmentation.UNKNOWN}):
    parts.append(f"<h3>{escape(group)}</h3>")
    for source, (images, masks, of) in sources.items():
      chosen = np.flatnonzero(np.asarray(of, str) == group)[:STRIP]
      pictures = "".join(
        _picture(images[i], f"{source} case, {group}", domain, label=masks[i])
        for i in chosen
      )
      note = source if pictures else f"{source}: none"
      parts.append(f'<small>{note}</small><div class="strip">{pictures}</div>')
  return "".join(parts)


def _agreement(agreement: Mapping) -> str:
  blocks, head = {}, ["Group"]
  for segmenter, groups in agreement.items():
    rows = blocks[f"Seen by {escape(segmenter)}"] = []
    for group, classes in segmentation.json_ready(groups).items():
      row = [escape(group)]
      for value in classes.values():
        row += [td(_number(value[key])) for key in ("synthetic", "real")]
        row.append(td(_number(value["ratio"], 1, 2)))
      rows.append(row)
      head = ["Group"] + [
        f"{escape(cls.title())}<br>{key}"
        for cls in classes
        for key in ("synthetic", "real", "ratio")
      ]
  return html_table("Agreement by segmenter and group", head, blocks)


def _realism(realism: Mapping) -> str:
  """AUC and ratios of statistics, a column for every group."""
  realism = segmentation.json_ready(realism)
  auc = ["AUC, real against synthetic"]
  rows = {}
  for found in realism.values():
    auc.append(
      td(_number(found["auc"], 1, 2) + _range(found["auc_interval"], 1, 2))
    )
    for name, row in found["statistics"].items():
      interval = [row["low"], row["high"]]
      text = _number(row["ratio"], 1, 2) + _range(interval, 1, 2)
      off = None not in interval and not (
        REALISTIC[0] <= row["ratio"] <= REALISTIC[1]
      )
      rows.setdefault(name, [escape(name.capitalize())]).append(
        td(text, "worse" * off)
      )
  blocks = {"": [auc], "Synthetic / real": [*rows.values()]}
  head = ["", *map(escape, realism)]
  return html_table("Realism by group", head, blocks)


def _counts(counts: Mapping[str, Mapping[str, int]]) -> str:
  sources = list(dict.fromkeys(k for row in counts.values() for k in row))
  table = {g: [row.get(k, 0) for k in sources] for g, row in counts.items()}
  table["All"] = np.sum(list(table.values()), axis=0).tolist()
  rows = [
    [escape(group), *(td(f"{v:,}") for v in [*row, sum(row)])]
    for group, row in table.items()
  ]
  head = ["Group", *map(escape, sources), "total"]
  return html_table("Training cases by group", head, {"": rows})


def read_log(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Loss and risk curves of a `metrics.jsonl`, averaged over bins of steps.

  A step that was logged twice, as after a restart, counts as last written;
  what follows a line that is cut is left out.

  Returns:
    For every `loss/...` and `risk/...` with a finite value: `[2, k]`, steps
    and values, k at most `CURVE`.

  Raises:
    FileNotFoundError: No such file.
    ValueError: It is no text.
  """
  values: dict[str, dict[float, float]] = {}
  for record in files.read_json_lines(path):
    step = record.get("step")
    for key, value in record.items():
      if (
        key.startswith(("loss/", "risk/"))
        and isinstance(step, int | float)
        and isinstance(value, int | float)
      ):
        values.setdefault(key, {})[step] = value
  curves = {}
  for key, by_step in values.items():
    points = np.array(sorted(by_step.items()), float)
    points = points[np.isfinite(points).all(1)]
    if len(points):
      bins = np.array_split(points, min(CURVE, len(points)))
      curves[key] = np.transpose([part.mean(0) for part in bins])
  return curves


def _training(curves: Mapping[str, np.ndarray]) -> str:
  charts = [
    _curves(f"Loss: {key[5:]}", {key[5:]: value})
    for key, value in curves.items()
    if key.startswith("loss/")
  ]
  risks = {k[5:]: v for k, v in curves.items() if k.startswith("risk/")}
  charts += [_curves("Risk by group", risks)] if risks else []
  return "".join(charts) and f'<div class="charts">{"".join(charts)}</div>'


def _definitions(items: Mapping) -> str:
  rows = (f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in items.items())
  return f"<dl>{''.join(rows)}</dl>"


def _check(models: Mapping, cases: Mapping | None) -> None:
  if len(models) > len(PALETTE):
    raise ValueError(f"at most {len(PALETTE)} models, got {len(models)}")
  lists = [
    list(zip(columns["name"], columns["group"], strict=True))
    for columns in models.values()
  ]
  if any(names != lists[0] for names in lists):
    raise ValueError("the models were not measured on the same cases")
  sizes = {key: len(value) for key, value in (cases or {}).items()}
  if models:
    sizes["measured"] = len(lists[0])
  if len(set(sizes.values())) > 1:
    listed = ", ".join(f"{n} {key}" for key, n in sizes.items())
    raise ValueError(f"the cases differ in number: {listed}")


def _tested(
  summaries: Mapping[str, dict],
  differences: Mapping[str, dict],
  columns: segmentation.Columns,
  cases: Mapping | None,
  domain: Domain,
) -> str:
  """What the test cases say: headline, groups, worst cases."""
  groups, n = segmentation.groups(columns), len(columns["name"])
  sizes = ", ".join(f"{g} {count}" for g, count in _marked(groups).items())
  if unknown := n - sum(groups.values()):
    sizes += f", {segmentation.UNKNOWN} {unknown}"
  few = (
    f"† fewer than {MIN_CASES} cases: trust neither mean nor interval."
    if "†" in sizes
    else ""
  )
  rounding = (len(summaries) > 1) * (
    "Differences are taken before rounding. They are called better or worse "
    f"only above {NOISE} points, where their interval leaves out 0 and p is "
    f"below {SIGNIFICANT}; that of the worst groups never, as the data chose "
    "them."
  )
  subject = escape(next(iter(summaries)))
  legend = '<i class="label"></i>label <i class="prediction"></i>prediction'
  bars = [_bars(summaries, cls, groups) for cls in domain.parts if groups]
  sections = [
    section(
      "Headline",
      _headline(summaries, differences, domain),
      f"In points, with 95% intervals, on {n} test cases ({escape(sizes)}). "
      f"{few} {rounding}",
    ),
    bars
    and section(
      "Dice by group",
      f'<div class="charts">{"".join(bars)}</div>',
      "In points. Lines at the bars' ends are 95% intervals.",
    ),
    section(
      "All measures by group",
      _measures(summaries, groups, n, domain),
      "Dice and IoU in points, with 95% intervals. A small n in a cell says "
      "how many cases the measure is defined for, where that is not all. "
      f"{few}",
    ),
    "prediction" in (cases or {})
    and section(
      "Worst cases",
      _worst_cases(columns, cases, domain),
      "The test cases with the lowest mean Dice of "
      f"{escape(' and '.join(domain.parts))}, {subject}. "
      f"{legend}",
    ),
  ]
  return "".join(filter(None, sections))


def _trained(
  cases: Mapping | None,
  synthetic: Mapping | None,
  realism: Mapping | None,
  agreement: Mapping | None,
  counts: Mapping | None,
  curves: Mapping[str, np.ndarray],
  domain: Domain,
) -> str:
  """What it was trained on and how: synthetic cases, counts, curves."""
  sections = [
    synthetic is not None
    and section(
      "Real beside synthetic",
      _strips(cases, synthetic, domain),
      f"The first {STRIP} of each group, not selected, with the outlines of "
      "their masks. Real cases are test cases.",
    ),
    realism
    and section(
      "Realism",
      _realism(realism),
      "A small classifier that sees the statistics below tries to tell "
      "synthetic from real test cases: AUC 0.5 is chance, 1 is certain; a "
      f"dash where a group has fewer than {MIN_SAMPLE} of either. Ratios of "
      "means over cases, with 95% intervals; those beyond "
      f"{REALISTIC[0]} to {REALISTIC[1]} are coloured.",
    ),
    agreement
    and section(
      "Agreement of synthetic images with their masks",
      _agreement(agreement),
      "Dice of a segmenter on synthetic and on real cases, in points. A ratio "
      "near 1 says that it finds the mask in the image as well as in real "
      "ones.",
    ),
    counts and section("Training cases by group", _counts(counts)),
    section(
      "Training",
      _training(curves),
      f"Each curve is averaged to at most {CURVE} points.",
    ),
  ]
  return "".join(filter(None, sections))


def write(
  directory: str | os.PathLike,
  *,
  title: str,
  models: Mapping[str, segmentation.Columns],
  reason: str = "",
  notices: Sequence[str] = (),
  cases: Mapping[str, np.ndarray] | None = None,
  synthetic: Mapping | None = None,
  realism: Mapping | None = None,
  agreement: Mapping | None = None,
  counts: Mapping[str, Mapping[str, int]] | None = None,
  log: str | os.PathLike | None = None,
  facts: Mapping[str, object] | None = None,
  definitions: Definitions = DEFAULT,
  domain: Domain = FUNDUS,
) -> dict:
  """Writes `index.html`, tables of cases and `summary.json` to `directory`.

  The first model's table is `cases.csv`, the second's `cases_2.csv`, and so
  on; `summary.json`, which is written last, names them.

  Args:
    directory: Made if absent; the files in it are replaced.
    title: Heading of the page.
    models: Name -> columns of `segmentation.per_case`, on the same cases. The
      first is the subject, the second, if any, the baseline.
    reason: Why there is no model, where there is none: a clause.
    notices: What a reader must know first, a sentence each.
    cases: Test cases in the order of the columns: `image` `[n, H, W]` uint8,
      `label` and, where there are models, `prediction` (the subject's)
      `[n, H, W]`; where there is none, `group` `[n]` names.
    synthetic: `image` `[m, H, W]` uint8, `mask` `[m, H, W]`, `group` `[m]`
      names.
    realism: What `realism.compare` gives.
    agreement: Segmenter -> group -> class -> {`synthetic`, `real`, `ratio`}:
      its Dice in [0, 1] on synthetic and real cases, and their ratio.
    counts: Group -> source ("real", "synthetic") -> number of training cases.
    log: Path of a `metrics.jsonl`; a notice says if it cannot be read.
    facts: What else there is to say of the run, name -> value.
    definitions: What the columns were measured by, and how to scale by equity.
    domain: What masks show, and what is reported.

  Returns:
    What `summary.json` holds.

  Raises:
    OSError: A file cannot be written; the message names it.
    ValueError: No model and no reason, too many models, or lengths or cases
      that do not match.
  """
  if not models and not reason:
    raise ValueError("no models to report on, and no reason why")
  columns = next(iter(models.values()), {"name": [], "group": []})
  if models and cases is not None:
    cases = {**cases, "group": columns["group"]}
  _check(models, cases)
  equity = definitions.equity
  summaries = {
    name: segmentation.summary(c, equity, domain) for name, c in models.items()
  }
  differences = {}
  if len(models) > 1:
    pair = list(models.values())[:2]
    differences = segmentation.difference(*pair, equity, domain)
  verdict = _verdict(summaries, differences, reason, domain.headline)
  notices, curves = [*notices], {}
  if log is not None:
    try:
      curves = read_log(log)
    except FileNotFoundError:
      notices.append(f"No curves of the training: {log} does not exist.")
    except (OSError, ValueError) as error:
      notices.append(f"No curves of the training: {error}.")
  words = glossary(definitions, domain)
  parts = [
    *(f'<p class="notice">{escape(notice)}</p>' for notice in notices),
    models and _tested(summaries, differences, columns, cases, domain),
    _trained(cases, synthetic, realism, agreement, counts, curves, domain),
    facts and section("The run", _definitions(facts)),
    models and section("Definitions", _definitions(words)),
  ]
  page = (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width,initial-scale=1">'
    f"<title>{escape(title)}</title><style>{CSS}</style></head><body><main>"
    f'<h1>{escape(title)}</h1><p class="verdict">{escape(verdict)}</p>'
    f"{''.join(filter(None, parts))}</main></body></html>\n"
  )
  names = [f"cases_{i}.csv" if i > 1 else TABLE for i in PLACES]
  tables = dict(zip(models, names, strict=False))

  directory = Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  files.sweep(directory)
  for name in (SUMMARY, *names):  # of an earlier report; the summary first
    (directory / name).unlink(missing_ok=True)
  for model, table in models.items():
    segmentation.write_csv(directory / tables[model], table)
  files.write(directory / PAGE, page)
  summary = segmentation.json_ready(
    {
      "title": title,
      "verdict": verdict,
      "notices": notices,
      "n": len(columns["name"]),
      "groups": segmentation.groups(columns),
      "models": summaries,
      "difference": differences,
      "realism": realism or {},
      "agreement": agreement or {},
      "training_cases": counts or {},
      "facts": facts or {},
      "definitions": dataclasses.asdict(definitions),
      "domain": domains.to_json(domain),
      "tables": tables,
      "sha256": {n: files.sha256(directory / n) for n in tables.values()},
    }
  )
  text = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False)
  files.write(directory / SUMMARY, text + "\n")
  return summary


def read(workdir: str | os.PathLike) -> dict:
  """What the `summary.json` of a run's complete report holds.

  Args:
    workdir: The run's directory; its report is in `report`.

  Raises:
    FileNotFoundError: The run has no complete report.
    ValueError: The report is damaged: the summary cannot be read or lacks its
      definitions, or a table is not the one that it was written with.
  """
  path = Path(workdir) / DIRECTORY / SUMMARY
  remedy = f"make it with: python launch/evaluate.py --workdir {workdir}"
  if not path.exists():
    raise FileNotFoundError(f"{path} does not exist; {remedy}")
  summary = files.read_json(path, remedy)
  if "definitions" not in summary:
    raise ValueError(f"{path} does not say its definitions; {remedy}")
  for key in ("definitions", "facts", "models", "sha256", "tables"):
    if not isinstance(summary.get(key, {}), dict):
      raise ValueError(f"{path} is damaged ({key!r}); {remedy}")
  try:
    Definitions(**summary["definitions"])
  except (TypeError, ValueError) as error:
    raise ValueError(f"{path} is damaged ({error}); {remedy}") from error
  for name, digest in summary.get("sha256", {}).items():
    table = path.parent / name
    if not table.exists():
      raise FileNotFoundError(f"{table} does not exist; {remedy}")
    if files.sha256(table) != digest:
      raise ValueError(f"{table} is not the table of {path}; {remedy}")
  return summary
