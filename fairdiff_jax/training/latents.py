"""Latents of the training cases, encoded once and kept beside the data.

They lie in `<data>/latents/<key>`, complete or absent. The key is a hash of the
autoencoder, its scaling factor included, and of the prepared images: latents of
others are never taken. They are kept without that factor, in float32, so that a
step's losses are those of encoding in it: 1 GB for 8,000 cases of 512 x 512.
float16 would move a mean near 8 by up to 1/256, more than a narrow posterior's
spread.
"""

import json
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fairdiff_jax import array_files, files
from fairdiff_jax.data.cases import Cases
from fairdiff_jax.data.loader import normalize
from fairdiff_jax.objectives.latent_space import (
  encode_image,
  latent_size,
  load_autoencoder,
)
from fairdiff_jax.pretrained.stable_diffusion import sizes_of
from fairdiff_jax.training.checkpoint import fingerprint
from fairdiff_jax.training.mesh import in_batches, map_batch, replicate
from fairdiff_jax.training.schedule import learning_steps

FILE, DIGEST = "latent.npy", "latent.sha256"
PER_DEVICE = 4  # images that are encoded at a time


def cached_shape(config) -> tuple[int, int, int] | None:
  """Shape (h, w, 2 C) of a case's cached latent; None for runs without.

  Raises:
    ValueError: if images have no latents, or none of `data.size`.
  """
  start, stop = learning_steps(config, "image")
  if not config.image.cache_latents or start >= stop:
    return None
  if config.image.network != "stable_diffusion":
    raise ValueError(
      "image.cache_latents=True is for image.network='stable_diffusion', not"
      f" {config.image.network!r}, which has no latents; set it to False"
    )
  channels = 2 * config.image.stable_diffusion.latent_channels
  return *latent_size(config.image, config.data.size), channels


def cached_latents(
  config, mesh: Mesh, cases: Cases, directory: str | Path
) -> np.ndarray:
  """Reads the latents of training cases; encodes them if there are none.

  Args:
    config: the run's config.
    mesh: devices that encode.
    cases: training cases.
    directory: of the prepared data, shared by all hosts.

  Returns:
    Mean and log-variance of every case's posterior, float32 [n, h, w, 2 C],
    memory-mapped.

  Raises:
    ValueError: if the autoencoder's weights cannot be used, or the latents are
      damaged.
  """
  autoencoder, params = load_autoencoder(config.image)
  sizes = json.dumps(sizes_of(autoencoder), sort_keys=True)
  key = fingerprint(
    {
      "autoencoder": params,
      "sizes": np.frombuffer(sizes.encode(), np.uint8),
      "image": cases.image,
    }
  )
  folder = Path(directory) / "latents" / key[:16]
  if jax.process_index() == 0:
    files.sweep(folder.parent)
  # One host looks, so that all do the same.
  if not multihost_utils.broadcast_one_to_all(np.asarray(folder.exists())):
    latent = _encode(autoencoder, params, cases.image, mesh)
    if jax.process_index() == 0:
      _write(folder, latent)
    multihost_utils.sync_global_devices("latents")
  return _read(folder)


def _encode(autoencoder, params, image, mesh):
  whole = NamedSharding(mesh, PartitionSpec())
  encode = partial(
    jax.jit(partial(encode_image, autoencoder), out_shardings=whole),
    replicate(params, mesh),
  )
  size = PER_DEVICE * mesh.size
  # TPUs would multiply with 8 bits of mantissa.
  with jax.default_matmul_precision("high"):
    return in_batches(
      lambda x: map_batch(encode, [normalize(x)], mesh, size),
      *(image, size, "latents"),
    )


def _write(folder, latent):
  with files.new_directory(folder) as directory:
    with array_files.new_array(
      directory / FILE, len(latent), latent.shape[1:], latent.dtype
    ) as append:
      append(latent)
    # As sha256sum writes and checks it.
    digest = files.sha256(directory / FILE)
    files.write(directory / DIGEST, f"{digest}  {FILE}\n")


def _read(folder):
  try:
    expected = files.read_text(folder / DIGEST).split()[0]
    sound = files.sha256(folder / FILE) == expected
  except (OSError, ValueError, IndexError):
    sound = False
  if not sound:
    raise ValueError(
      f"{folder / FILE} is damaged; remove {folder}, and the same command"
      " encodes its images again"
    )
  return np.load(folder / FILE, mmap_mode="r", allow_pickle=False)
