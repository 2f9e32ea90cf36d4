"""What a comparison of methods shows: tables, charts, a page and Markdown."""

import math
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup

from fairdiff_jax.data.domain import Domain
from fairdiff_jax.evaluation import page, segmentation
from fairdiff_jax.evaluation.glossary import glossary
from fairdiff_jax.evaluation.page import Cell, Section, number
from fairdiff_jax.fairness import metrics, uncertainty

LEVEL = 0.95  # of intervals
TITLE = "Comparison"
FILES = {
  "comparison.csv": "every measure, one figure a row",
  "comparison.md": "the tables of Dice",
  "summary.json": "every figure by name",
}

# (method, class, measure, figure, group) -> its values by name
Rows = dict[tuple[str, str, str, str, str], dict[str, float]]
Tables = dict[str, list[list[Cell]]]


def _p(value: float) -> str:
  if math.isnan(value):
    return "p –"
  return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def _value_cell(row: Mapping[str, float]) -> Cell:
  value = number(row["value"])
  if row["n_seeds"] > 1:
    value += f" ± {number(row['sd'])}"
  return Cell(value, f"{number(row['low'])} to {number(row['high'])}")


def _difference_cell(row: Mapping[str, float]) -> Cell:
  ends = [number(row[f"difference_{end}"], sign="+") for end in ("low", "high")]
  p = row["p"] if math.isnan(row["p_holm"]) else row["p_holm"]
  value = number(row["difference"], sign="+")
  return Cell(value, f"{' to '.join(ends)}; {_p(p)}")


def _worst_cell(figures: Mapping[tuple[str, str], dict]) -> Cell:
  for (figure, group), row in figures.items():
    if figure == "worst":
      value, detail, _ = _value_cell(row)
      return Cell(f"{group} {value}", detail)
  return Cell("–")


def _dice(rows: Rows, cls: str) -> dict[str, dict[tuple[str, str], dict]]:
  """Method -> (figure, group) -> the values of the Dice of one class."""
  result: dict[str, dict] = {}
  for (method, *of, figure, group), row in rows.items():
    if of == [cls, "dice"]:
      result.setdefault(method, {})[figure, group] = row
  return result


def tables(
  rows: Rows,
  cls: str,
  groups: Mapping[str, int],
  reference: str,
  ceiling: str | None,
) -> Tables:
  """Dice of one class, and its differences from the reference.

  Args:
    rows: every figure.
    cls: the class.
    groups: test cases of every group.
    reference: the method that others are tested against.
    ceiling: the method that is the best to hope for, if any.

  Returns:
    Title -> rows, head first.
  """
  titles = {("overall", ""): Cell("All cases")}
  titles |= {("group", g): Cell(g, f"n={n}") for g, n in groups.items()}
  titles |= {("es", ""): Cell("ES-Dice"), ("gap", ""): Cell("Gap")}
  ends = Cell("Method"), Cell("Seeds"), Cell("Worst group")
  values = [[*ends[:2], *titles.values(), ends[2]]]
  differences = [[ends[0], *titles.values()]]
  if ceiling:
    differences[0].append(Cell("Share closed"))
  for method, of in _dice(rows, cls).items():
    values.append([Cell(method), Cell(str(of["overall", ""]["n_seeds"]))])
    values[-1] += [_value_cell(of[key]) for key in titles]
    values[-1].append(_worst_cell(of))
    if method != reference:
      differences.append([Cell(method)])
      differences[-1] += [_difference_cell(of[key]) for key in titles]
      if ceiling:
        differences[-1].append(Cell(number(of["es", ""]["share"])))
  result = {f"{cls.title()}, Dice": values}
  if len(differences) > 1:
    result[f"{cls.title()}, Dice less that of {reference}"] = differences
  return result


def warning(groups: Mapping[str, int]) -> str:
  """What to know before anything else; '' if nothing."""
  few = [k for k, n in groups.items() if n < uncertainty.MIN_CASES]
  if not few:
    return ""
  return (
    f"Warning: fewer than {uncertainty.MIN_CASES} test cases of"
    f" {', '.join(few)}; read these groups, and gap and ES-Dice, with care."
  )


def notes(
  groups: Mapping[str, int],
  n: int,
  reference: str,
  ceiling: str | None,
  definitions: metrics.Definitions,
  domain: Domain,
) -> list[str]:
  """What a reader must know of the tables."""
  sizes = ", ".join(f"{name} {count}" for name, count in groups.items())
  if unknown := n - sum(groups.values()):
    sizes += f", {segmentation.UNKNOWN} {unknown}"
  found = [
    f"Dice times 100 on {n} test cases ({sizes}). With several seeds: mean over"
    " the seeds ± standard deviation over the seeds.",
    f"Intervals ({100 * LEVEL:.0f} %) are bootstrapped over the test cases,"
    " of each case's mean over the seeds. They hold the chance of the test"
    " cases, not that of the seeds.",
    "ES-Dice and gap can lie near or past an end of their interval: intervals"
    " are corrected for the noise of the group means, the figures are not, and"
    " both figures of the cases' means differ from their means over seeds.",
    f"Differences are to {reference}, paired by test case, of each case's mean"
    " over the seeds; p of the groups after Holm. Wilcoxon's signed-rank test,"
    f" exact for up to {uncertainty.EXACT_RANKS} cases that differ, is in"
    " comparison.csv.",
    "Worst group: the one with the lowest mean.",
  ]
  if ceiling:
    found.append(
      f"Share closed: of the distance of ES-Dice from {reference} to {ceiling},"
      f" times 100; – where {ceiling} is not above {reference}."
    )
  words = glossary(definitions, domain)
  terms = ["Dice, IoU", "ES-Dice", "Gap", "p", "Groups"]
  terms += [name.title() for name in domain.reported]
  return found + [f"{term}: {words[term]}" for term in terms if term in words]


def markdown(
  lead: str, notes: Sequence[str], tables: Mapping[str, list[list[Cell]]]
) -> str:
  """The tables for a README."""

  def line(cells):
    texts = [f"{c.text} ({c.detail})" if c.detail else c.text for c in cells]
    return "| " + " | ".join(t.replace("|", "\\|") for t in texts) + " |"

  parts = [f"# {TITLE}", *([lead] if lead else [])]
  for title, (head, *lines) in tables.items():
    rule = "|---" * len(head) + "|"
    parts += [f"## {title}", "\n".join([line(head), rule, *map(line, lines)])]
  parts += ["## How to read", "\n".join(f"* {note}" for note in notes)]
  return "\n\n".join(parts) + "\n"


def chart(rows: Rows, cls: str, groups: Mapping[str, int]) -> Markup:
  """ES-Dice of every method with its interval, and its groups as dots."""
  methods = _dice(rows, cls)
  alt = [f"ES-Dice of the {cls} and Dice of its groups."]
  height = 1.2 + 0.45 * len(methods) + 0.2 * math.ceil(len(groups) / 3)
  with page.drawing(height) as figure:
    axes = figure.subplots()
    y = np.arange(len(methods))
    es = [of["es", ""] for of in methods.values()]
    low, value, high = (
      [100 * row[key] for row in es] for key in ("low", "value", "high")
    )
    axes.hlines(y, low, high, page.INK, lw=1.8)
    axes.plot(value, y, "D", color=page.INK, label="ES-Dice", zorder=3)
    for i, name in enumerate(groups):
      axes.plot(
        [100 * of["group", name]["value"] for of in methods.values()],
        y + 0.25,
        page.MARKERS[i % len(page.MARKERS)],
        color=page.PALETTE[i % len(page.PALETTE)],
        label=name,
      )
    for method, of in methods.items():
      value, ends, _ = _value_cell(of["es", ""])
      dots = [f"{g} {number(of['group', g]['value'])}" for g in groups]
      alt.append(f"{method}: {value} ({ends}); {', '.join(dots)}.")
    names = [textwrap.fill(m, 18, break_long_words=False) for m in methods]
    axes.set_yticks(y, names)
    axes.set_ylim(len(methods) - 0.4, -0.5)
    axes.set(title=f"{cls.title()}, Dice", xlabel="Dice times 100, zoomed")
    axes.grid(axis="x", color=page.INK, alpha=0.15, lw=0.8)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside lower center", frameon=False, ncols=3)
    return page.chart(figure, " ".join(alt), f"comparison {cls}")


def render(
  lead: str,
  notes: Sequence[str],
  tables: Mapping[str, list[list[Cell]]],
  charts: Sequence[Markup],
) -> str:
  """The page."""
  note = (
    f"Diamond and line: ES-Dice and its {100 * LEVEL:.0f} % interval. Axes are"
    " zoomed."
  )
  sections = [Section("Dice by method", page.PARTS.charts(charts), note)]

  def whole(cell):  # '±' begins no line
    return cell._replace(
      text=cell.text.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")
    )

  for title, (head, *lines) in tables.items():
    rows = [list(map(whole, line)) for line in lines]
    sections.append(Section(title, page.table(title, head, {"": rows})))
  listed = page.PARTS.files(list(FILES.items()))
  sections.append(Section("Files", listed))
  sections.append(Section("How to read", page.PARTS.paragraphs(notes)))
  leads = [page.PARTS.verdict([lead], [])] if lead else []
  return page.render(TITLE, sections, leads)
