"""Whether the devices at hand compute what a CPU computes.

Of every network at a small size, the value and the gradients on the first
device, in float32 and bfloat16, are held against float32 on the CPU; attention
by the platform's kernel against the formula; sums, gathers and exchanges over
the mesh, and a checkpoint of a state that lies on it, against what they must
be. What the platform has no means to check is said, and is no fault.
"""

import math
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import metadata
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fairdiff_jax.models import (
  autoencoder,
  point_cloud,
  samed,
  small_unet,
  transunet,
  unet,
)
from fairdiff_jax.models import stable_diffusion as sd
from fairdiff_jax.models.attention import attend
from fairdiff_jax.models.fused_attention import fused_attention
from fairdiff_jax.training.checkpoint import Checkpoints, join
from fairdiff_jax.training.mesh import BATCH, make_mesh, to_host
from fairdiff_jax.training.step import TrainState

RIGHT, WRONG, UNCHECKED = "right", "wrong", "not checked"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# Relative to the norm. Float32 has full products; errors of bfloat16 add up
# over layers, to 0.17 for the small U-Net with other weights, where what is
# wrong is off by more than half.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}
REPEATS = 3  # of the timed step
CASES = 2


class Finding(NamedTuple):
  """One thing that was checked.

  Attributes:
    name: of it.
    verdict: RIGHT, WRONG or UNCHECKED.
    detail: the figure, or the reason.
    cases_per_second: of forward and backward pass, where that was timed.
  """

  name: str
  verdict: str
  detail: str
  cases_per_second: float | None = None


class Probe(NamedTuple):
  """A network at a small size.

  Attributes:
    make: dtype of the computation -> module.
    shapes: of its inputs; int32 ones are steps or groups, and are 0 and 1.
  """

  make: Callable[[Any], Any]
  shapes: Sequence[tuple[int, ...] | None]


STEP = None  # in place of a shape: an integer per case
_SD = {
  "block_out_channels": (32, 64),
  "layers_per_block": 1,
  "attention_head_dim": 2,
  "cross_attention_dim": 16,
  "norm_num_groups": 8,
}
_PIXELS = {"channels": (16, 32), "num_heads": 2, "patch": 2}
_LATENTS, _TOKENS = (CASES, 16, 16, 4), (CASES, 7, 16)
NETWORKS = {
  "point network": Probe(
    lambda dtype: point_cloud.PointFlowVAE(
      16, (32, 64), (32,), 2, 32, (32, 64, 32)
    ),
    [(CASES, 64, 3)],
  ),
  "U-Net": Probe(
    lambda dtype: unet.UNet(**_PIXELS), [(CASES, 16, 16, 1), STEP, STEP]
  ),
  "ControlNet": Probe(
    lambda dtype: unet.ControlNet(**_PIXELS),
    [(CASES, 16, 16, 1), STEP, STEP, (CASES, 16, 16, 3)],
  ),
  "Stable Diffusion's U-Net": Probe(
    lambda dtype: sd.StableDiffusionUNet(**_SD, dtype=dtype),
    [_LATENTS, STEP, _TOKENS],
  ),
  "Stable Diffusion's ControlNet": Probe(
    lambda dtype: sd.StableDiffusionControlNet(
      **_SD,
      conditioning_embedding_out_channels=(4, 8, 16, 16),
      dtype=dtype,
    ),
    [_LATENTS, STEP, _TOKENS, (CASES, 128, 128, 3)],
  ),
  "autoencoder": Probe(
    lambda dtype: autoencoder.AutoencoderKL(
      block_out_channels=(16, 32),
      layers_per_block=1,
      norm_num_groups=8,
      dtype=dtype,
    ),
    [(CASES, 32, 32, 3)],
  ),
  "small U-Net": Probe(
    lambda dtype: small_unet.SmallUNet(), [(CASES, 32, 32, 1)]
  ),
  "TransUNet": Probe(
    lambda dtype: transunet.TransUNet(
      stages=(1, 1, 1),
      width=32,
      hidden_dim=32,
      mlp_dim=64,
      num_heads=2,
      num_layers=1,
      decoder_channels=(32, 16, 16, 8, 8),
      dtype=dtype,
    ),
    [(CASES, 32, 32, 1)],
  ),
  "SAMed": Probe(
    lambda dtype: samed.SAMed(
      image_size=64,
      embed_dim=32,
      depth=2,
      num_heads=2,
      global_blocks=(1,),
      window=2,
      decoder_dim=32,
      decoder_heads=2,
      decoder_mlp_dim=64,
      dtype=dtype,
    ),
    [(CASES, 64, 64, 1)],
  ),
}


def describe() -> dict[str, Any]:
  """Versions, devices, their memory, and the mesh."""
  from fairdiff_jax import __version__

  devices = jax.devices()
  memory = devices[0].memory_stats() or {}
  return {
    "versions": {
      "fairdiff_jax": __version__,
      "python": platform.python_version(),
      **{name: metadata.version(name) for name in PACKAGES},
    },
    "platform": devices[0].platform,
    "device": devices[0].device_kind,
    "devices": len(devices),
    "processes": jax.process_count(),
    "mesh": dict(make_mesh().shape),
    "memory_bytes": memory.get("bytes_limit"),
  }


def examine(networks: Sequence[str] | None = None) -> Iterator[Finding]:
  """Checks everything, one finding after the other.

  Args:
    networks: those of `NETWORKS` to check; all by default.
  """
  for name in NETWORKS if networks is None else networks:
    yield from _guarded(name, _network, name)
  for kernel in ("cuDNN", "Pallas"):
    yield from _guarded(f"attention by {kernel}", _attention, kernel)
  yield from _guarded("collectives", _collectives)
  yield from _guarded("checkpoint", _checkpoint)


def _guarded(name, check, *arguments):
  """What a check finds; that it cannot run is a finding too."""
  try:
    yield from check(*arguments)
  except Exception as error:
    first = (str(error).splitlines() or [""])[0]
    yield Finding(name, WRONG, f"{type(error).__name__}: {first}")


def _distance(found, known) -> float:
  """Largest of the arrays' distances, relative to their norms."""
  worst, known = 0.0, [np.asarray(x, np.float64) for x in known]
  # What is 0 but for rounding is held against the others' size.
  least = 1e-3 * max(np.linalg.norm(x) / math.sqrt(x.size) for x in known)
  for a, b in zip(found, known, strict=True):
    if not np.isfinite(np.asarray(a, np.float64)).all():
      return math.inf
    size = max(np.linalg.norm(b), least * math.sqrt(b.size))
    worst = max(worst, np.linalg.norm(np.asarray(a, np.float64) - b) / size)
  return worst


def _arrays(parts, dtype):
  """All arrays; in bfloat16 those of a part, value or gradient, as one.

  Alone, gradients that cancel are rounding errors.
  """
  if dtype == "float32":
    return jax.tree.leaves(parts)
  flat = [jax.tree.leaves(part) for part in parts]
  return [
    np.concatenate([np.asarray(x, np.float32).reshape(-1) for x in leaves])
    for leaves in flat
  ]


def _judged(name, found, known, dtype, **figures) -> Finding:
  distance = _distance(_arrays(found, dtype), _arrays(known, dtype))
  right = distance <= TOLERANCE[dtype]
  detail = f"off by {distance:.1e} of {TOLERANCE[dtype]:g}"
  return Finding(name, RIGHT if right else WRONG, detail, **figures)


def _draw(rng, described, path=()):
  """Weights of a network that was not trained, none of them 0."""
  name, shape = str(path[-1].key), described.shape
  noise = rng.normal(size=shape)
  if name in ("scale", "var"):
    return np.float32(1 + 0.1 * np.abs(noise))
  fan_in = math.prod(shape[:-1]) if len(shape) > 1 else 100
  return np.float32(noise / math.sqrt(fan_in))


def _cast(tree, dtype):
  floats = lambda x: np.issubdtype(x.dtype, np.floating)  # noqa: E731
  return jax.tree.map(lambda x: x.astype(dtype) if floats(x) else x, tree)


def _network(name):
  probe, rng = NETWORKS[name], np.random.default_rng(0)
  inputs = [
    np.arange(CASES, dtype=np.int32)
    if shape is STEP
    else rng.uniform(0, 1, shape).astype(np.float32)
    for shape in probe.shapes
  ]
  described = jax.eval_shape(
    probe.make(jnp.float32).init, jax.random.key(0), *inputs
  )
  variables = jax.tree_util.tree_map_with_path(
    lambda path, leaf: _draw(rng, leaf, path), described
  )
  rest = {k: v for k, v in variables.items() if k != "params"}

  def total(params, rest, inputs, dtype):
    outputs = probe.make(dtype).apply({"params": params, **rest}, *inputs)
    outputs = _cast(outputs, jnp.float32)
    # Every output counts by another weight.
    return sum(
      jnp.mean(jnp.square(y - 0.1 * i))
      for i, y in enumerate(jax.tree.leaves(outputs))
    ), outputs

  @partial(jax.jit, static_argnums=3)
  def compute(params, rest, inputs, dtype):
    return jax.grad(total, has_aux=True)(params, rest, inputs, dtype)

  def run(device, dtype):
    arguments = jax.device_put(
      _cast((variables["params"], rest, inputs), dtype), device
    )
    with jax.default_matmul_precision("highest"):
      found = jax.block_until_ready(compute(*arguments, dtype))
      seconds = []
      for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(compute(*arguments, dtype))
        seconds.append(time.perf_counter() - start)
    return jax.device_get(found), CASES / min(seconds)

  (cpu, *_), (device, *_) = (
    jax.local_devices(backend="cpu"),
    jax.local_devices(),
  )
  known, rate = run(cpu, np.dtype("float32"))
  if device.platform == "cpu":
    yield Finding(
      f"{name}, float32", UNCHECKED, "the CPU is what is compared with", rate
    )
  for dtype in ("float32", "bfloat16"):
    if dtype == "float32" and device.platform == "cpu":
      continue
    found, rate = run(device, jnp.dtype(dtype))
    yield _judged(
      f"{name}, {dtype}", found, known, dtype, cases_per_second=rate
    )


def _attention(kernel):
  """Value and gradients of the kernel against the formula on the CPU."""
  needed = {"cuDNN": "gpu", "Pallas": "tpu"}[kernel]
  name = f"attention by {kernel}"
  if jax.default_backend() != needed:
    yield Finding(name, UNCHECKED, f"no {needed.upper()} here")
    return
  mesh = make_mesh()
  rng = np.random.default_rng(0)
  shape = (mesh.size, 1024, 2, 64)
  heads = [rng.normal(size=shape).astype(np.float32) for _ in range(4)]

  def formula(*heads):
    return attend(*(jnp.swapaxes(x, 1, 2) for x in heads)).swapaxes(1, 2)

  def compute(attention, query, key, value, weight):
    y, transpose = jax.vjp(attention, query, key, value)
    return y, transpose(weight)

  cpu = jax.local_devices(backend="cpu")[0]
  known = jax.jit(partial(compute, formula))(*jax.device_put(heads, cpu))
  known = jax.device_get(known)
  sharding = NamedSharding(mesh, BATCH)
  halves = [jax.device_put(x.astype(jnp.bfloat16), sharding) for x in heads]
  with jax.set_mesh(mesh):
    program = jax.jit(partial(compute, fused_attention)).lower(*halves)
    found = program.compile()(*halves)
  calls = {"cuDNN": "__cudnn$fmha", "Pallas": "tpu_custom_call"}[kernel]
  if calls not in program.as_text():
    yield Finding(name, WRONG, "the program does not call it")
    return
  yield _judged(name, to_host(found), known, "bfloat16")


def _collectives():
  mesh = make_mesh()
  if mesh.size == 1:
    yield Finding("collectives", UNCHECKED, "there is one device")
    return
  axis = ("data", "fsdp")
  x = np.arange(mesh.size**2 * 3, dtype=np.float32).reshape(-1, 3)
  rows = PartitionSpec(axis)
  operations = {
    "sum": (
      lambda x: jax.lax.psum(x, axis),
      PartitionSpec(),
      x.reshape(mesh.size, -1, 3).sum(0),
    ),
    "gather": (
      lambda x: jax.lax.all_gather(x, axis, tiled=True),
      PartitionSpec(),
      x,
    ),
    "scattered sum": (
      lambda x: jax.lax.psum_scatter(x, axis, tiled=True),
      rows,
      x.reshape(mesh.size, -1, 3).sum(0),
    ),
    "exchange": (
      lambda x: jax.lax.all_to_all(x, axis, 0, 0, tiled=True),
      rows,
      x.reshape(mesh.size, mesh.size, 3).swapaxes(0, 1).reshape(-1, 3),
    ),
  }
  placed = jax.device_put(x, NamedSharding(mesh, rows))
  for name, (operation, spec, known) in operations.items():
    mapped = jax.shard_map(
      operation, mesh=mesh, in_specs=rows, out_specs=spec, check_vma=False
    )
    found = to_host(jax.jit(mapped)(placed))
    right = np.array_equal(found, known)
    yield Finding(
      f"{name} over {mesh.size} devices",
      RIGHT if right else WRONG,
      "equal" if right else f"off by {np.abs(found - known).max():g}",
    )


def _checkpoint():
  """A state over the mesh, saved in a temporary directory and restored."""
  mesh = make_mesh(jax.device_count())
  rng = np.random.default_rng(0)
  split = NamedSharding(mesh, PartitionSpec("fsdp"))
  whole = NamedSharding(mesh, PartitionSpec())
  weights = rng.normal(size=(8 * mesh.size, 3)).astype(np.float32)

  def part():
    return {"network": {"kernel": jax.device_put(weights, split)}}

  state = TrainState(
    step=jax.device_put(np.int32(1), whole),
    updates={"network": jax.device_put(np.int32(1), whole)},
    params=part(),
    ema=part(),
    batch_stats={"network": {}},
    frozen={"network": {}},
    imported={"network": {}},
    opt_state=part(),
    fairness=(),
  )
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )
  with tempfile.TemporaryDirectory() as directory:
    checkpoints = Checkpoints(directory, 1)
    checkpoints.save(state, facts={})
    checkpoints.close()
    checkpoints = Checkpoints(directory)
    _, parts = checkpoints.restore(abstract, ("inference", "training"))
    checkpoints.close()
  restored = to_host(join(parts, state.imported))
  right = jax.tree.all(jax.tree.map(np.array_equal, restored, to_host(state)))
  yield Finding(
    "checkpoint, saved and restored",
    RIGHT if right else WRONG,
    "equal" if right else "other numbers came back",
  )
