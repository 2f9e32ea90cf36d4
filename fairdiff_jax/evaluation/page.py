"""The page kit: what reports and comparisons are laid out with.

A page is a lead and sections, and needs nothing else: no script, no address
that is loaded. Whatever goes into it as plain text is escaped by the templates
in `templates/`; `Markup` is what they have made, and goes in as it is.
"""

import base64
import contextlib
import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
from markupsafe import Markup

if TYPE_CHECKING:  # seconds to import; who only predicts draws nothing
  from matplotlib.figure import Figure

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
MARKERS = "os^vP*"
WIDTH = 4.2  # inches of a chart
INK = "#123456"  # stands for the page's text colour until the SVG is inlined
PRINTED = "#1b1f24"  # what it is in a figure that is taken away
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
_TEMPLATES = jinja2.Environment(
  loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
  autoescape=True,
  undefined=jinja2.StrictUndefined,
)
PARTS: Any = _TEMPLATES.get_template("parts.html").module


class Cell(NamedTuple):
  """A cell of a table.

  Attributes:
    text: what it says.
    detail: a small second line that explains it.
    css: `better`, `worse` or ''.
  """

  text: str
  detail: str = ""
  css: str = ""


class Section(NamedTuple):
  """A part of a page.

  Attributes:
    title: its heading, by which the contents name it.
    body: what it shows.
    note: how to read it.
  """

  title: str
  body: Markup
  note: str = ""

  @property
  def anchor(self) -> str:
    """What its address on the page is, after '#'."""
    return slug(self.title)


def slug(text: str) -> str:
  """Text as part of an address or a file's name."""
  return "-".join(re.findall(r"\w+", text.lower())) or "part"


def render(
  title: str, sections: Iterable[Section], lead: Iterable[Markup] = ()
) -> str:
  """A page, with contents that lead to its sections.

  Args:
    title: its heading.
    sections: in their order.
    lead: what stands before the contents.
  """
  return _TEMPLATES.get_template("page.html").render(
    title=title, sections=list(sections), lead=Markup("").join(lead)
  )


def table(
  label: str,
  head: Sequence[Cell | str],
  blocks: Mapping[str, Sequence[Sequence[Cell | str]]],
) -> Markup:
  """A table in a box that scrolls by itself.

  Args:
    label: what it shows, for screen readers.
    head: a cell for each column.
    blocks: title of a block -> its rows, each its head and its cells. An empty
      title takes no row.
  """

  def cells(row):
    return [Cell(cell) if isinstance(cell, str) else cell for cell in row]

  filled = [(title, list(map(cells, rows))) for title, rows in blocks.items()]
  return PARTS.table(label, cells(head), filled)


@contextlib.contextmanager
def drawing(height: float) -> "Iterator[Figure]":
  """An empty figure, to be drawn and made a `chart` of in the block.

  Args:
    height: inches.
  """
  import matplotlib
  from matplotlib.figure import Figure

  with matplotlib.rc_context(STYLE):
    yield Figure(figsize=(WIDTH, height), layout="constrained")


def chart(figure: "Figure", alt: str, name: str) -> Markup:
  """A figure as inline SVG in the page's colours, and a link to take it away.

  Args:
    figure: of `drawing`.
    alt: what it shows, in words.
    name: of the file that the link gives, without its ending.
  """
  buffer = io.StringIO()
  figure.savefig(buffer, format="svg", transparent=True)
  whole = buffer.getvalue()
  whole = whole[whole.index("<svg") :]
  whole = re.sub(r"<metadata>.*?</metadata>", "", whole, flags=re.DOTALL)
  text = whole.replace("xlink:href", "href").replace(INK, "currentColor")
  text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
  text = re.sub(r'<g id="[^"]*"', "<g", text)
  label = Markup('<svg role="img" aria-label="{}"').format(alt)
  inline = Markup(text.replace("<svg", label, 1))
  address = data_address("svg+xml", whole.replace(INK, PRINTED).encode())
  return PARTS.chart(inline, f"{slug(name)}.svg", address)


def data_address(kind: str, data: bytes) -> str:
  """An image as an address that holds it; `kind` such as 'png'."""
  return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def number(
  value: float | None, scale: float = 100, digits: int = 1, sign: str = ""
) -> str:
  """A figure times `scale` as text; a dash where it is undefined.

  Args:
    value: the figure.
    scale: 100 for points.
    digits: after the point.
    sign: '+' to write that of what is above 0, too.
  """
  if value is None or not math.isfinite(value):
    return "–"
  text = f"{scale * value:z.{digits}f}"
  if sign and float(text) > 0:
    text = f"{sign}{text}"
  return text.replace("-", "−")


def interval(
  ends: Sequence[float | None],
  scale: float = 100,
  digits: int = 1,
  sign: str = "",
) -> str:
  """Both ends as text; '' where one is undefined."""
  texts = [number(end, scale, digits, sign) for end in ends]
  return "" if "–" in texts else " to ".join(texts)


def listed(items: Sequence[str]) -> str:
  """'a, b and c'."""
  *first, last = items
  return f"{', '.join(first)} and {last}" if first else last
