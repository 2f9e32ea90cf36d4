"""What the documentation names is there."""

import fnmatch
import importlib
import re
from pathlib import Path

import pytest
from fairdiff_jax.launch import command

from fairdiff_jax import config as configs
from fairdiff_jax import recipes
from fairdiff_jax.data.domain import FUNDUS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))
SCRIPTS = [*(ROOT / "launch").glob("*.py"), *(ROOT / "configs").glob("*.py")]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)


def text_of(page):
  """Its text, with commands that go over several lines on one."""
  return re.sub(r" *\\+\n *", " ", page.read_text())


@pytest.mark.parametrize("page", [*PAGES, *SCRIPTS], ids=lambda p: p.name)
def test_every_command_and_its_flags_are_there(page):
  code = re.findall(r"```\n(.*?)```|`(fairdiff[^`]*)`", text_of(page), re.S)
  named = "\n".join(text for pair in code for text in pair)
  if page.suffix == ".py":
    named = "\n".join(re.findall(r"^ *fairdiff .*", text_of(page), re.M))
  for name, rest in re.findall(r"\bfairdiff ([\w-]+)(.*)", named):
    assert name in command.COMMANDS, f"fairdiff {name}"
    script = (ROOT / "launch" / f"{name.replace('-', '_')}.py").read_text()
    flags = set(re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)"', script))
    if "takes_config=True" in script:
      flags |= {"config"}
    if name == "sample":  # of the run's domain
      flags |= {ratio.replace(" ", "-") for ratio in FUNDUS.ratios}
    for flag in re.findall(r"--([\w.-]+)", rest):
      flag = flag.partition(".")[0] if flag.startswith("config.") else flag
      assert flag in flags | {"help"}, f"fairdiff {name} --{flag}"


@pytest.mark.parametrize("page", [*PAGES, *SCRIPTS], ids=lambda p: p.name)
def test_every_recipe_and_field_is_there(page):
  text = text_of(page)
  for field in re.findall(r"--config\.([a-z][\w.]*)(?=[=\s`])", text):
    assert field in configs.all_fields(), field
  for name in re.findall(
    r"(?:fairdiff |launch/).*?--config[ =]([\w:./]*\w)", text
  ):
    if name not in ("NAME", "RECIPE"):
      recipes.find(name)


@each_page
def test_every_field_in_prose_is_there(page):
  prose = re.findall(r"`([a-z_]+\.[a-z_.*]+)(?:=[^`]*)?`", page.read_text())
  for field in prose:
    if field.partition(".")[0] not in configs.FIELDS:
      continue
    known = fnmatch.filter(configs.all_fields(), field)
    assert known, f"{page.name}: `{field}` is no field of a config"


@each_page
def test_every_link_and_path_is_there(page):
  text = page.read_text()
  links = re.findall(r"\]\(((?!https?:)[^)#]+)", text)
  for link in links:
    assert (page.parent / link).exists(), f"{page.name}: {link}"
  for path in re.findall(r"\b((?:launch|configs|tests)/[\w/]+\.\w+)", text):
    assert (ROOT / path).is_file(), f"{page.name}: {path}"
  targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
  for target in re.findall(r"^make (\w+)|`make (\w+)`", text, re.M):
    assert "".join(target) in targets, f"{page.name}: make {target}"


def test_the_readme_leads_to_every_guide():
  text = (ROOT / "README.md").read_text()
  for guide in [
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / "docs").glob("*.ipynb"),
  ]:
    assert f"(docs/{guide.name})" in text, guide.name


def test_the_tests_are_told_of():
  """What continuous integration runs is what users are told to run."""
  (run,) = re.findall(r"^make \w+", (ROOT / ".ci/run").read_text(), re.M)
  assert run in (ROOT / "README.md").read_text()


def test_the_methods_and_settings_of_the_guide_are_all_there_are():
  guide = (ROOT / "docs" / "methods.md").read_text()
  for field in ("method", "strategy"):
    allowed = configs.all_fields()[f"fairness.{field}"].allowed
    for name in re.findall(r"'(\w+)'", allowed):
      assert f"`{name}`" in guide, name


ROWS = re.findall(
  r"^\| (an? [\w ]+?) \|.*\]\((\S+\.py)\).*?\| (`.*) \|$",
  (ROOT / "CONTRIBUTING.md").read_text(),
  re.M,
)


def test_a_stranger_finds_the_five_places():
  assert [what for what, *_ in ROWS] == [
    "a segmenter",
    "a fairness method",
    "a sampler",
    "a figure or section of the report",
    "a file format of images",
  ]


@pytest.mark.parametrize(("what", "path", "found"), ROWS)
def test_a_place_to_add_to_is_one_table(what, path, found):
  """It is in the file that is named, and the config knows all of its names."""
  registry, *field = re.findall(r"`([\w.]+)`", found)
  module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
  names = getattr(module, registry)
  assert len(names)
  if field and field[0] in configs.all_fields():
    quoted = re.findall(r"'([^']+)'", configs.all_fields()[field[0]].allowed)
    assert {*names} == {*quoted}
