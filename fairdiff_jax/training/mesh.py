"""Devices as a ('data', 'fsdp') mesh, and how arrays lie on it."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

BATCH = PartitionSpec(("data", "fsdp"))


def make_mesh(
  fsdp: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """All devices, or those given; `fsdp` of them share one parameter copy.

  Raises:
    ValueError: if `fsdp` does not divide the number of devices.
  """
  count = jax.device_count() if devices is None else len(devices)
  if fsdp < 1 or count % fsdp:
    raise ValueError(
      f"parallel.fsdp={fsdp} does not divide the {count} devices at hand"
    )
  return jax.make_mesh(
    (count // fsdp, fsdp),
    ("data", "fsdp"),
    axis_types=(AxisType.Auto, AxisType.Auto),
    devices=devices,
  )


def _split_largest(shape: tuple[int, ...], parts: int) -> PartitionSpec:
  """Splits the largest axis that divides; replicates if none does."""
  axes = [i for i, size in enumerate(shape) if size % parts == 0]
  if not axes:
    return PartitionSpec()
  largest = max(axes, key=lambda i: shape[i])
  return PartitionSpec(*[None] * largest, "fsdp")


def tree_shardings(
  tree: Any, mesh: Mesh, rules: Sequence[tuple[str, str]]
) -> Any:
  """A sharding for every array of a tree.

  Args:
    tree: arrays or ShapeDtypeStructs.
    mesh: the device mesh.
    rules: (pattern, rule) pairs; the first pattern found (`re.search`) in an
      array's path, such as 'params/image/unet/conv_in/kernel', decides: rule
      'fsdp' splits its largest axis over 'fsdp', 'replicate' copies it.
      Arrays without a match are replicated.

  Raises:
    ValueError: if a rule is unknown.
  """
  for _, rule in rules:
    if rule not in ("fsdp", "replicate"):
      raise ValueError(
        f"unknown sharding rule {rule!r}; use 'fsdp' or 'replicate'"
      )

  def place(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    rule = next((r for p, r in rules if re.search(p, name)), "replicate")
    spec = PartitionSpec()
    if rule == "fsdp":
      spec = _split_largest(leaf.shape, mesh.shape["fsdp"])
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(place, tree)


def put_batch(batch: Any, mesh: Mesh) -> Any:
  """Global device arrays from this host's slice of a batch."""
  sharding = NamedSharding(mesh, BATCH)
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)),
    batch,
  )


def replicate(tree: Any, mesh: Mesh) -> Any:
  """Numpy arrays, the same on every host, whole on every device."""
  whole = NamedSharding(mesh, PartitionSpec())
  return jax.tree.map(
    lambda x: jax.make_array_from_callback(x.shape, whole, x.__getitem__), tree
  )


def to_host(tree: Any) -> Any:
  """Arrays of a tree as numpy, whole, on every host."""

  def fetch(x):
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
      if x.is_fully_replicated:
        return np.asarray(x.addressable_data(0))
      return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)

  return jax.tree.map(fetch, tree)


def all_hosts(value: bool) -> bool:
  """Whether it is so on every host; each must ask."""
  if jax.process_count() == 1:
    return value
  return bool(multihost_utils.process_allgather(np.asarray(value)).all())


def from_first_host(value: int) -> int:
  """The first host's value; each must ask."""
  if jax.process_count() == 1:
    return value
  return int(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def host_slice(global_size: int) -> slice:
  """The rows of a global batch that this host must build.

  Raises:
    ValueError: if the devices do not divide `global_size`.
  """
  if global_size % jax.device_count():
    raise ValueError(
      f"a batch of {global_size} cannot be split over"
      f" {jax.device_count()} devices; choose a multiple"
    )
  local = global_size // jax.process_count()
  return slice(jax.process_index() * local, (jax.process_index() + 1) * local)


def map_batch(
  function: Callable[..., jax.Array],
  arrays: Sequence[np.ndarray],
  mesh: Mesh,
  size: int,
) -> np.ndarray:
  """Calls a compiled function on at most `size` rows, spread over the mesh.

  The batch is padded with its last row to `size`, rounded up to a multiple of
  the devices, so that every call has the same shape.

  Args:
    function: batched arrays -> array, its result replicated.
    arrays: the rows, whole on every host.
    mesh: device mesh.
    size: rows of a full batch.

  Returns:
    The results of the given rows, on every host.
  """
  rows = len(arrays[0])
  size = -(-size // mesh.size) * mesh.size
  per_host = size // jax.process_count()
  first = jax.process_index() * per_host

  def pad(x):
    x = np.concatenate([x, np.repeat(x[-1:], size - rows, axis=0)])
    return x[first : first + per_host]

  with jax.set_mesh(mesh):  # kernels ask for it
    result = function(*put_batch([pad(x) for x in arrays], mesh))
  return to_host(result)[:rows]


def in_batches(
  function: Callable[[np.ndarray], np.ndarray],
  rows: np.ndarray,
  size: int,
  title: str = "",
) -> np.ndarray:
  """What a function says of all rows, of which it is given `size` at a time.

  Args:
    function: rows -> an array with as many.
    rows: at least one.
    size: most rows of a call.
    title: of a progress bar on the first host; '' for none.
  """
  starts = tqdm(
    range(0, len(rows), size),
    desc=title,
    unit="batch",
    disable=not title or jax.process_index() != 0,
  )
  return np.concatenate([function(rows[i : i + size]) for i in starts])
