"""The report of a run: one HTML page that needs nothing else, and its data.

`write` takes results and leaves `index.html`, one table of cases per model
and, last, `summary.json` (every figure by name): where that lies the report is
complete. The page has no script and loads nothing: charts are inline SVG that
take the page's colours, images are inline under contours drawn as SVG paths. A
part without data is left out, an undefined figure is a dash, and what is
missing is said in a notice: no figure ends a report.
"""

import json
import os
from pathlib import Path
from typing import Any

from fairdiff_jax import files
from fairdiff_jax.evaluation import page, segmentation
from fairdiff_jax.evaluation.results import PLACES, SCHEMA, TABLE, Results
from fairdiff_jax.evaluation.sections import SECTIONS
from fairdiff_jax.fairness.metrics import Definitions
from fairdiff_jax.layout import Layout

PAGE, SUMMARY = "index.html", "summary.json"
TEST_DIGEST = "test cases sha256"  # a fact, of names, images and masks


def write(directory: str | os.PathLike, **fields: Any) -> dict:
  """Writes `index.html`, tables of cases and `summary.json` to `directory`.

  The first model's table is `cases.csv`, the second's `cases_2.csv`, and so
  on; `summary.json`, which is written last, names them.

  Args:
    directory: made if absent; the files in it are replaced.
    **fields: what there is to say, those of `Results`.

  Returns:
    What `summary.json` holds.

  Raises:
    OSError: a file cannot be written; the message names it.
    ValueError: as `Results`.
  """
  results = Results(**fields)
  verdict = results.verdict
  lead = [
    page.PARTS.verdict(verdict.claims, verdict.cautions),
    page.PARTS.paragraphs(results.remarks, "notice"),
  ]
  found = (section(results) for section in SECTIONS)
  text = page.render(results.title, filter(None, found), lead)
  summary = results.to_json()

  directory = Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  files.sweep(directory)
  others = [f"cases_{i}.csv" for i in PLACES]
  for name in (SUMMARY, TABLE, *others):  # of an earlier report
    (directory / name).unlink(missing_ok=True)
  tables = results.tables
  for model, columns in results.models.items():
    segmentation.write_csv(directory / tables[model], columns)
  files.write(directory / PAGE, text)
  summary["sha256"] = {
    name: files.sha256(directory / name) for name in tables.values()
  }
  text = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False)
  files.write(directory / SUMMARY, text + "\n")
  return summary


def read(workdir: str | os.PathLike) -> dict:
  """What the `summary.json` of a run's complete report holds.

  Args:
    workdir: The run's directory.

  Raises:
    FileNotFoundError: The run has no complete report.
    ValueError: The report is damaged: the summary cannot be read or lacks its
      definitions, a table is not the one that it was written with, or a newer
      version has written it.
  """
  path = Layout(workdir).report / SUMMARY
  remedy = f"make it with: fairdiff evaluate --workdir {workdir}"
  if not path.exists():
    raise FileNotFoundError(f"{path} does not exist; {remedy}")
  summary = files.read_json(path, remedy)
  schema = summary.get("schema", 0)  # 0: before there was a version
  if not isinstance(schema, int) or not 0 <= schema <= SCHEMA:
    raise ValueError(
      f"{path} has schema {schema!r}, this version knows up to {SCHEMA};"
      f" {remedy}"
    )
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
