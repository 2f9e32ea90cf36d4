"""What `image.weights` names: networks to start from, and prompts as tokens.

Prompts are constants, so that the text encoder runs once, here; training and
sampling need neither it nor its tokenizer.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from fairdiff_jax.pretrained import stable_diffusion
from fairdiff_jax.pretrained.stable_diffusion import Network


def read(path: str | Path) -> dict[str, Network]:
  """Networks of a folder as diffusers writes it, or of the original's file."""
  if Path(path).is_dir():
    return stable_diffusion.load(path)
  return stable_diffusion.load_single_file(path)


def sha256(path: str | Path) -> dict[str, str]:
  """SHA-256 of a file, or of every file of a folder, by name."""
  path = Path(path)
  files = [path] if path.is_file() else sorted(path.rglob("*"))
  digests = {}
  for file in files:
    if file.is_file():
      name = file.name if file == path else str(file.relative_to(path))
      with file.open("rb") as content:
        digests[name] = hashlib.file_digest(content, "sha256").hexdigest()
  return digests


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
) -> None:
  """Writes what `image.weights` names, complete or not at all.

  Args:
    out: a directory that does not exist yet: gets unet/, controlnet/, vae/,
      prompts.safetensors and import.json.
    networks: 'unet', 'autoencoder', 'text_encoder' and, unless one shall start
      from the U-Net, 'controlnet'.
    positive: token ids [P, 77], of one prompt for all groups or of one for
      every group and a last one for unknown groups.
    negative: token ids [77].
    facts: where all this comes from, for import.json.

  Raises:
    FileExistsError: `out` exists.
    ValueError: a network is missing.
  """
  out = Path(out)
  missing = {"unet", "autoencoder", "text_encoder"} - networks.keys()
  if missing:
    raise ValueError(f"these networks are missing: {sorted(missing)}")
  require_new(out)
  networks = dict(networks)
  module, variables = networks.pop("text_encoder")
  encode = jax.jit(module.apply)
  prompts = {
    "positive": encode(variables, jnp.asarray(positive)),
    "negative": encode(variables, jnp.asarray(negative)[None])[0],
  }
  if "controlnet" not in networks:
    networks["controlnet"] = stable_diffusion.new_controlnet(networks["unet"])
  temporary = out.with_name("tmp_" + out.name)
  shutil.rmtree(temporary, ignore_errors=True)
  stable_diffusion.save(temporary, **networks)
  safetensors.numpy.save_file(
    {name: np.ascontiguousarray(x) for name, x in prompts.items()},
    temporary / stable_diffusion.PROMPTS,
  )
  record = {**facts, "sha256": sha256(temporary)}
  (temporary / "import.json").write_text(json.dumps(record, indent=2) + "\n")
  temporary.rename(out)
