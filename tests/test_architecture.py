"""Who may import whom: data flows one way."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "fairdiff_jax"

# What each part may import, besides itself.
ALLOWED = {
  "cluster": [],
  "files": [],
  "array_files": ["files"],
  "layout": [],
  "fields": [],
  "config": ["files", "layout", "fields"],
  "recipes": ["config", "fields"],
  "data": ["files", "array_files"],
  "models": ["data"],
  "pretrained": ["files", "array_files", "models"],
  "diffusion": ["data", "models"],
  "fairness": ["data", "models"],
}
ALLOWED["objectives"] = ["files", "array_files", "data", "models", "pretrained"]
ALLOWED["objectives"] += ["diffusion", "fairness"]
ALLOWED["training"] = [*ALLOWED["objectives"], "objectives", "config", "layout"]
ALLOWED["training"] += ["cluster"]
ALLOWED["synthesis"] = [*ALLOWED["training"], "training"]
ALLOWED["evaluation"] = [*ALLOWED["synthesis"], "synthesis"]
ALLOWED["experiment"] = [*ALLOWED["evaluation"], "evaluation"]
ALLOWED["handover"] = [*ALLOWED["evaluation"], "evaluation", "__version__"]
ALLOWED["run"] = [*ALLOWED["handover"], "handover", "experiment"]
ALLOWED["doctor"] = ["models", "training", "__version__"]
ALLOWED["study"] = [*ALLOWED["experiment"], "experiment", "fields"]


def imports(path):
  """Dotted names that a file imports, wherever in the file it does."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f"{path}: relative import"
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(*folders):
  return sorted(p for f in folders for p in (ROOT / f).rglob("*.py"))


def part_of(path):
  return path.relative_to(ROOT / PACKAGE).with_suffix("").parts[0]


LIBRARY = [p for p in files(PACKAGE) if p.parent != ROOT / PACKAGE]
LIBRARY += [p for p in (ROOT / PACKAGE).glob("*.py") if p.name != "__init__.py"]


def test_every_part_has_a_place():
  assert {part_of(p) for p in LIBRARY} == ALLOWED.keys()


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_point_one_way(part):
  wrong = []
  for path in LIBRARY:
    if part_of(path) != part:
      continue
    for name in imports(path):
      first, *rest = name.split(".")
      if first in ("launch", "configs", "tests"):
        wrong.append((path.name, name))
      elif first == PACKAGE and rest[0] not in (part, *ALLOWED[part]):
        wrong.append((path.name, name))
  assert not wrong


@pytest.mark.parametrize("framework", ["tensorflow", "torch"])
def test_no_other_framework(framework):
  """But for PyTorch's own files, whose readers import it when called.

  And for a script that compares with it.
  """
  found = [
    path.name
    for path in files(PACKAGE, "configs", "launch")
    if path.name != "benchmark_peers.py"
    for name in imports(path)
    if name.split(".")[0] == framework
  ]
  assert set(found) <= ({"graft.py"} if framework == "torch" else set())
  for name in found:
    tree = ast.parse((ROOT / PACKAGE / "pretrained" / name).read_text())
    top = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    assert "torch" not in "".join(map(ast.unparse, top))
