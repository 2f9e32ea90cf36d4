"""Configs by name: the recipes that come with the package, or files."""

import difflib
import functools
import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from fairdiff_jax import config as configs
from fairdiff_jax.fields import flatten


@functools.cache
def directory() -> Path:
  """Where the package's own recipes lie."""
  return Path(importlib.import_module("fairdiff_jax.configs").__path__[0])


def own() -> Iterator[tuple[str, ModuleType]]:
  """The package's recipes, modules by name."""
  for path in sorted(directory().glob("*.py")):
    module = importlib.import_module(f"fairdiff_jax.configs.{path.stem}")
    if hasattr(module, "get_config"):
      yield path.stem, module


def find(name: str) -> ConfigDict:
  """The config of a recipe, its fields not looked at yet.

  Args:
    name: of one of the package's, or of a file; `:VARIANT` may follow.

  Raises:
    FileNotFoundError: no such file.
    ValueError: no recipe, or no such variant.
  """
  path, _, variant = name.partition(":")
  if (directory() / f"{path}.py").is_file():
    path = str(directory() / f"{path}.py")
  if not Path(path).is_file():
    known = ", ".join(name for name, _ in own())
    raise FileNotFoundError(
      f"recipe {path} does not exist; there are {known}, or name a file"
    )
  spec = importlib.util.spec_from_file_location("recipe", path)
  if spec is None or spec.loader is None:
    raise ValueError(f"recipe {path} is no Python file")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, "get_config"):
    raise ValueError(f"recipe {path} is no recipe: it has no get_config()")
  return module.get_config(variant)


def recipe(name: str, overrides: Mapping[str, Any] | None = None) -> ConfigDict:
  """The config of a recipe, checked whole.

  >>> import fairdiff_jax
  >>> config = fairdiff_jax.recipe("phantom:smoke", {"train.steps": 12})
  >>> config.train.steps, config.data.size
  (12, (32, 32))

  Args:
    name: of one of the package's recipes, or of a file; `:VARIANT` may follow,
      as in 'fairseg:small'.
    overrides: fields that shall have another value, by dotted name or nested.

  Raises:
    FileNotFoundError: no such file.
    ValueError: no recipe, variant or field, or the config cannot run; the
      message has a line for every fault.
  """
  config = find(name).copy_and_resolve_references()
  known = configs.all_fields()
  with config.unlocked():
    for field, value in flatten(overrides or {}):
      if field not in known:
        near = difflib.get_close_matches(field, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{field} is no field of a config{hint}")
      *sections, last = field.split(".")
      section = functools.reduce(getattr, sections, config)
      with section.ignore_type():
        section[last] = value
  configs.check(config)
  return config.lock()
