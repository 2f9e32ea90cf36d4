"""What `image.weights` names: networks to start from, and prompts as tokens.

Prompts are constants, so that the text encoder runs once, here; training and
sampling need neither it nor its tokenizer.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from fairdiff_jax import files
from fairdiff_jax.pretrained import stable_diffusion
from fairdiff_jax.pretrained.stable_diffusion import Network


def read(path: str | Path) -> dict[str, Network]:
  """Networks of a folder as diffusers writes it, or of the original's file."""
  if files.find(path).is_dir():
    return stable_diffusion.load(path)
  return stable_diffusion.load_single_file(path)


def read_scheduler(path: str | Path) -> dict[str, Any] | None:
  """How the networks were trained, as diffusers says it; None as 1.5 was.

  Raises:
    ValueError: it is damaged, or no run here can go on so.
  """
  path = files.find(path)
  file = path / stable_diffusion.SCHEDULER
  if not path.is_dir() or not file.exists():
    return None
  stable_diffusion.read_schedule(path)
  return files.read_json(file)


def sha256(path: str | Path) -> dict[str, str]:
  """SHA-256 of a file, or of every file of a folder, by name."""
  path = files.find(path)
  if path.is_file():
    return {path.name: files.sha256(path)}
  return {
    str(file.relative_to(path)): files.sha256(file)
    for file in sorted(path.rglob("*"))
    if file.is_file()
  }


def require_new(out: str | Path) -> None:
  """Raises FileExistsError if there is such a directory."""
  if Path(out).exists():
    raise FileExistsError(f"{out} exists; it is not overwritten")


def write(
  out: str | Path,
  networks: Mapping[str, Network],
  *,
  positive: np.ndarray,
  negative: np.ndarray,
  facts: Mapping[str, Any],
  scheduler: Mapping[str, Any] | None = None,
) -> None:
  """Writes what `image.weights` names, complete or not at all.

  Args:
    out: a directory that does not exist yet: gets unet/, controlnet/, vae/,
      scheduler/, prompts.safetensors and import.json.
    networks: 'unet', 'autoencoder', 'text_encoder' and, unless one shall start
      from the U-Net, 'controlnet'.
    positive: token ids [P, 77], of one prompt for all groups or of one for
      every group and a last one for unknown groups.
    negative: token ids [77].
    facts: where all this comes from, for import.json.
    scheduler: of `read_scheduler`.

  Raises:
    FileExistsError: `out` exists.
    ValueError: a network is missing, or the text encoder has no such token.
  """
  missing = {"unet", "autoencoder", "text_encoder"} - networks.keys()
  if missing:
    raise ValueError(f"these networks are missing: {sorted(missing)}")
  require_new(out)
  networks = dict(networks)
  module, variables = networks.pop("text_encoder")
  largest = max(np.max(positive), np.max(negative))
  if largest >= module.vocab_size:
    raise ValueError(
      f"token {largest} is none of the text encoder's {module.vocab_size}; the"
      " tokenizer is of another one"
    )
  encode = jax.jit(module.apply)
  prompts = {
    "positive": encode(variables, jnp.asarray(positive)),
    "negative": encode(variables, jnp.asarray(negative)[None])[0],
  }
  if "controlnet" not in networks:
    networks["controlnet"] = stable_diffusion.new_controlnet(networks["unet"])
  with files.new_directory(out) as directory:
    stable_diffusion.save(directory, **networks)
    safetensors.numpy.save_file(
      {name: np.ascontiguousarray(x) for name, x in prompts.items()},
      directory / stable_diffusion.PROMPTS,
    )
    if scheduler is not None:
      file = directory / stable_diffusion.SCHEDULER
      file.parent.mkdir()
      files.write(file, json.dumps(scheduler, indent=2) + "\n")
    record = {**facts, "sha256": sha256(directory)}
    files.write(directory / "import.json", json.dumps(record, indent=2) + "\n")
    require_new(out)  # which another process may have made since
