"""The figures of a report: dot plots, curves, and images under outlines."""

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import contourpy
import numpy as np
from markupsafe import Markup
from PIL import Image

from fairdiff_jax.data.domain import Domain
from fairdiff_jax.evaluation import page
from fairdiff_jax.evaluation.page import INK, MARKERS, PALETTE, number

if TYPE_CHECKING:
  from matplotlib.axes import Axes

# Pixels of the longer side of an image: alone, in a strip, one among many.
LARGE, MIDDLE, SMALL = 320, 200, 112
LOSSLESS = 128  # up to which it is as it was, but of one among many
QUALITY = 85  # of JPEG
SPAN = 2.0  # points that an axis shows at least: less is no difference
NARROW = 0.14  # share of the steps shown below which a phase's name has no room
DASHES = ("-", "--", ":", "-.")

Phase = tuple[int, int, Sequence[str]]


def _dots(
  axes: "Axes",
  y: np.ndarray,
  rows: Sequence[tuple[float | None, Sequence[float | None]]],
  color: str,
  marker: str,
  hollow: Sequence[bool] = (),
  label: str = "",
  sign: str = "",
) -> None:
  """Values with their intervals, both times 100, and the values in figures."""
  for i, (value, ends) in enumerate(rows):
    if None not in ends:
      low, high = (100 * end for end in ends)
      axes.hlines(y[i], low, high, color, lw=1.8)
    if value is None:
      continue
    fill = "none" if hollow and hollow[i] else color
    axes.plot(
      100 * value, y[i], marker, color=color, markerfacecolor=fill, ms=6
    )
    axes.annotate(
      number(value, sign=sign),
      (100 * value, y[i]),
      (0, 4),
      textcoords="offset points",
      ha="center",
      va="bottom",
      fontsize=8,
    )
  if label:
    axes.plot([], [], marker, color=color, label=label)


def _widen(axes: "Axes") -> None:
  """Makes the x-axis no narrower than `SPAN`."""
  low, high = axes.get_xlim()
  more = max(0.0, SPAN - (high - low)) / 2
  axes.set_xlim(low - more, high + more)


def dots(
  cls: str, summaries: Mapping[str, dict], groups: Mapping[str, str]
) -> Markup:
  """Dice of a structure by group, zoomed, one colour and marker a model.

  Args:
    cls: the structure.
    summaries: model -> what `segmentation.summary` gives.
    groups: name -> what its row is called.
  """
  count = len(summaries)
  names = ["All cases", *groups.values()]
  alt = [f"Dice of the {cls} by group."]
  height = 0.9 + (0.27 * count + 0.12) * len(names) + 0.2 * count
  with page.drawing(height) as figure:
    axes = figure.subplots()
    for i, (model, summary) in enumerate(summaries.items()):
      dice = summary[cls]["dice"]
      rows = [(dice["overall"], dice["interval"]["overall"])]
      for group in groups:
        ends = dice["interval"]["groups"][group]
        rows.append((dice["groups"][group]["mean"], ends))
      y = np.arange(len(names)) + (i - (count - 1) / 2) * 0.72 / count
      _dots(axes, y, rows, PALETTE[i], MARKERS[i], label=model)
      pairs = zip(["All cases", *groups], rows, strict=True)
      texts = [f"{name} {number(value)}" for name, (value, _) in pairs]
      alt.append(f"{model}: {', '.join(texts)}.")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.65)
    axes.margins(x=0.08)
    _widen(axes)
    axes.set(title=f"{cls.title()}, Dice", xlabel="Dice, zoomed")
    axes.grid(axis="x", color=INK, alpha=0.15, lw=0.8)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside lower center", frameon=False)
    return page.chart(figure, " ".join(alt), f"dice {cls}")


def differences(
  cls: str, difference: Mapping[str, Mapping], groups: Mapping[str, str]
) -> Markup:
  """What sets two models apart, by group, with intervals, about a line at 0.

  Args:
    cls: the structure.
    difference: of its Dice, as `segmentation.difference` gives it.
    groups: name -> what its row is called.
  """
  rows = {"All cases": difference["overall"]}
  rows |= {text: difference["groups"][name] for name, text in groups.items()}
  rows |= {"Gap (less is better)": difference["gap"]}
  found = [(r["difference"], [r["low"], r["high"]]) for r in rows.values()]
  unsure = [None in ends or ends[0] <= 0 <= ends[1] for _, ends in found]
  with page.drawing(0.8 + 0.36 * len(rows)) as figure:
    axes = figure.subplots()
    axes.axvline(0, color=INK, lw=1, ls=":")
    y = np.arange(len(rows))
    _dots(axes, y, found, PALETTE[0], "o", unsure, sign="+")
    axes.axhline(len(rows) - 1.5, color=INK, lw=0.5, alpha=0.4)
    axes.set_yticks(y, list(rows))
    axes.set_ylim(len(rows) - 0.5, -0.75)
    axes.margins(x=0.1)
    _widen(axes)
    axes.set(title=cls.title(), xlabel="difference of Dice, points")
    axes.tick_params(axis="y", length=0)
    texts = [
      f"{name} {number(value, sign='+')} ({page.interval(ends, sign='+')})"
      for name, (value, ends) in zip(rows, found, strict=True)
    ]
    alt = f"Difference of Dice of the {cls}: {', '.join(texts)}."
    return page.chart(figure, alt, f"difference {cls}")


def training(
  title: str,
  lines: Mapping[str, np.ndarray],
  dashed: Mapping[str, np.ndarray],
  phases: Sequence[Phase] = (),
) -> Markup:
  """Curves over the steps of a run, and its phases as named spans.

  Args:
    title: of the chart.
    lines: name -> `[2, k]`, steps and values.
    dashed: the same of the baseline, in the colours of the same names.
    phases: (from, to, networks that learn).
  """
  rows = -(-(len(lines) + len(dashed)) // 2)
  with page.drawing(2.5 + 0.2 * rows) as figure:
    axes = figure.subplots()
    for i, (name, (steps, values)) in enumerate(lines.items()):
      dash = DASHES[i // len(PALETTE) % len(DASHES)]
      color = PALETTE[i % len(PALETTE)]
      axes.plot(steps, values, dash, color=color, lw=1.8, label=name)
      if name in dashed:
        label = f"{name}, baseline"
        style = {"lw": 1.2, "alpha": 0.8, "label": label}
        axes.plot(*dashed[name], "--", color=color, **style)
    first = min(steps[0] for steps, _ in lines.values())
    tall = _mark(axes, [p for p in phases if p[1] >= first])
    axes.set_title(title, pad=5 + 8.5 * tall)
    axes.set_xlabel("step")
    if len(lines) + len(dashed) > 1:
      figure.legend(loc="outside lower center", frameon=False, ncols=2)
    ends = [
      f"{name}{of} {v[0]:.3g} to {v[-1]:.3g}"
      for of, these in (("", lines), (", baseline", dashed))
      for name, (_, v) in these.items()
      if name in lines
    ]
    alt = f"{title} over training steps: {', '.join(ends)}"
    return page.chart(figure, alt, title)


def _mark(axes: "Axes", phases: Sequence[Phase]) -> int:
  """Shades every other phase and names them; the lines of the longest name."""
  if not phases:
    return 0
  first, last, tall = phases[0][0], phases[-1][1], 0
  axes.set_xlim(first, last)
  for i, (start, stop, networks) in enumerate(phases):
    if i % 2 == 0:
      axes.axvspan(start, stop, color=INK, alpha=0.07, lw=0)
    if i:
      axes.axvline(start, color=INK, alpha=0.35, lw=0.8)
    if stop - start >= NARROW * (last - first):
      axes.annotate(
        "\n".join(networks) or "none",
        ((start + stop) / 2, 1),
        (0, 2),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=7,
        linespacing=1.0,
      )
      tall = max(tall, len(networks) or 1)
  return tall


def _outline(mask: np.ndarray, domain: Domain, scale: float = 1) -> str:
  """Outlines of the structures of a mask `[H, W]`, data of one SVG path."""
  data = []
  for region in domain.split(mask).values():
    field = np.pad(region, 1).astype(np.float32)
    for line in contourpy.contour_generator(z=field).lines(0.5):
      points = (f"{scale * x:.1f} {scale * y:.1f}" for x, y in line - 0.5)
      data.append("M" + "L".join(points))
  return "".join(data)


def picture(
  image: np.ndarray,
  alt: str,
  domain: Domain,
  most: int = LARGE,
  **masks: np.ndarray,
) -> Markup:
  """An image with the outlines of the masks over it.

  Args:
    image: uint8 `[H, W]`, or RGB `[H, W, 3]`.
    alt: what it shows, in words.
    domain: what masks show.
    most: pixels of its longer side; a larger image is made smaller. What is
      larger than `LOSSLESS` then loses a little to JPEG.
    **masks: `[H, W]`, by what the style sheet calls their outlines.
  """
  height, width = image.shape[:2]
  step = -(-max(height, width) // most)
  small = Image.fromarray(np.ascontiguousarray(image, np.uint8)).reduce(step)
  lossless = max(small.size) <= LOSSLESS and most > LOSSLESS
  kind = "png" if lossless else "jpeg"
  options = {"optimize": True} if lossless else {"quality": QUALITY}
  buffer = io.BytesIO()
  small.save(buffer, kind, **options)
  address = page.data_address(kind, buffer.getvalue())
  outlines = {
    css: _outline(mask[step // 2 :: step, step // 2 :: step], domain, step)
    for css, mask in masks.items()
  }
  return page.PARTS.picture(alt, width, height, address, outlines)


def spread(ranked: Sequence[int], most: int) -> Iterator[int]:
  """At most so many of them, evenly over their order, both ends among them."""
  where = np.linspace(0, len(ranked) - 1, min(most, len(ranked)))
  return (ranked[i] for i in where.round().astype(int))


def strip(
  images: Sequence[np.ndarray],
  masks: Sequence[np.ndarray],
  chosen: Iterable[int],
  alt: str,
  domain: Domain,
) -> Markup:
  """A row of images with the outlines of their masks."""
  pictures = [
    (picture(images[i], alt, domain, MIDDLE, label=masks[i]), ())
    for i in chosen
  ]
  return page.PARTS.pictures(pictures, "strip")
