"""What a compiled step is said to take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs.phantom import get_config
from fairdiff_jax.training import ahead_of_time
from fairdiff_jax.training.mesh import BATCH, make_mesh


def test_collectives_are_counted_with_their_bytes():
  text = """
  %a = f32[4,8]{1,0} all-reduce(f32[4,8] %x), replica_groups={}
  %b = (f32[2]{0}, bf16[3]{0}) all-reduce(%y, %z), to_apply=%add
  %c = (f32[2]{0}, f32[16]{0}) all-gather-start(%w), dimensions={0}
  %d = f32[16]{0} all-gather-done(%c)
  %e = f32[] add(%all-reduce.1, %q)
  %f = bf16[8]{0} all-gather(%param_0.1), channel_id=1, dimensions={0}
  %g = bf16[8]{0} all-gather(%param_0.2), channel_id=1, dimensions={0}
  %h = bf16[8]{0} all-gather(%param_0.3), channel_id=2, dimensions={0}
  %i = (bf16[6]{0}, bf16[6]{0}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%v), channel_id=1
  """
  found = ahead_of_time.collectives(text, 1)
  assert ahead_of_time.by_kind(found) == {
    "all-reduce": {"count": 2, "bytes": 4 * 32 + 8 + 6},
    "all-gather": {"count": 3, "bytes": 64 + 2 * 16},
    "collective-permute": {"count": 1, "bytes": 12},
  }


def test_a_gradients_all_reduce_is_as_large_as_the_parameters():
  """On eight chips each sends 7/8 of it twice: 30 float32 are 210 bytes."""
  mesh = make_mesh()
  whole, split = (NamedSharding(mesh, s) for s in (PartitionSpec(), BATCH))
  gradient = jax.jit(
    jax.grad(lambda w, x: jnp.mean((x @ w) ** 2)),
    in_shardings=(whole, split),
    out_shardings=whole,
  )
  shapes = (jax.ShapeDtypeStruct(s, np.float32) for s in ((6, 5), (16, 6)))
  text = gradient.lower(*shapes).compile().as_text()
  found = ahead_of_time.collectives(text, 8)
  assert ahead_of_time.by_kind(found) == {
    "all-reduce": {"count": 1, "bytes": 4 * 6 * 5}
  }
  assert ahead_of_time.wire_bytes(found) == 210


def test_bytes_on_the_wire_are_those_of_rings_over_their_groups():
  text = """
  %a = f32[10] all-reduce(%x), replica_groups={}, to_apply=%add
  %b = f32[10] all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}
  %c = f32[10] reduce-scatter(%x), replica_groups={{0,1},{2,3},{4,5},{6,7}}
  %d = f32[10] all-to-all(%x), replica_groups=[1,8]<=[8], dimensions={0}
  %e = f32[10] collective-permute(%x), source_target_pairs={{0,1},{1,0}}
  """
  found = ahead_of_time.collectives(text, 8)
  assert [(op.size, op.group) for op in found[:4]] == [
    *((40, 8), (40, 4), (40, 2), (40, 8))
  ]
  assert ahead_of_time.wire_bytes(found) == 70 + 30 + 40 + 35 + 40


def test_growth_is_over_the_first_of_a_generation():
  rows = [
    {"topology": name, "flops": flops, "wire_bytes": sent, "seconds": seconds}
    for name, flops, sent, seconds in (
      ("v5e:2x4", 197e9, 0, None),  # 1 ms at peak
      ("v5e:8x8", 197e9, 2e7, None),  # and .1 ms of links
      ("v5p:2x2x2", 459e9, 0.6e9, 3e-3),
      ("v5p:4x4x4", 459e9, 0.6e9, 7e-3),
    )
  ]
  found = [*ahead_of_time.scaling(rows)]
  steps = [row["step_seconds"] for row in found]
  assert steps == pytest.approx([1e-3, 1.1e-3, 4e-3, 8e-3])
  growth = [row["growth"] for row in found]
  assert growth == pytest.approx([0, 0.1, 0, 1])
  assert found[2]["compute_seconds"] == pytest.approx(1e-3)
  assert found[2]["collective_seconds"] == pytest.approx(1e-3)


def test_more_devices_hold_less_and_talk_more():
  config = get_config("smoke").unlock()
  config.train.points = config.train.image = (0, 0)
  one = ahead_of_time.analyse(config, jax.devices()[:1], peak=1e12)
  config.parallel.fsdp = 8
  eight = ahead_of_time.analyse(config, jax.devices()[:8], peak=1e12)
  assert one["networks"] == ["segmenter"] and not one["collectives"]
  assert eight["collectives"]["all-reduce"]["bytes"] > 0
  assert eight["wire_bytes"] > 0 == one["wire_bytes"]
  assert eight["flops"] < one["flops"] / 2
  assert eight["arguments"] < one["arguments"] / 2


@pytest.mark.parametrize(
  "seconds, calls, flops, want",
  [
    (0.25, 0, 1e11, 0.25),
    (0.25, 3, 1e11, 0.25),  # of a generation that takes nothing off
    (-2.75, 3, 1e11, 0.25),
    (-2.75, 2, 1e11, None),  # not explained by the calls
    (-2.75, 3, 1e12, None),  # faster than the chip
    (0.0, 0, 0.0, None),
  ],
)
def test_seconds_taken_off_for_calls_are_put_back(seconds, calls, flops, want):
  cost = {"optimal_seconds": seconds, "flops": flops}
  text = "%x = f32[] custom-call(%y)\n" * calls
  assert ahead_of_time.estimate(cost, text, peak=1e12) == want


def test_unknown_tpus_are_named():
  with pytest.raises(ValueError, match="unknown TPU 'v9' in topology 'v9:1x1'"):
    ahead_of_time.tpu_devices("v9:1x1")
