"""What a compiled step is said to take."""

import jax
import pytest

from configs.phantom import get_config
from fairdiff_jax.training import ahead_of_time


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
  assert ahead_of_time.collectives(text) == {
    "all-reduce": {"count": 2, "bytes": 4 * 32 + 8 + 6},
    "all-gather": {"count": 3, "bytes": 64 + 2 * 16},
    "collective-permute": {"count": 1, "bytes": 12},
  }


def test_more_devices_hold_less_and_talk_more():
  config = get_config("smoke").unlock()
  config.train.points = config.train.image = (0, 0)
  one = ahead_of_time.analyse(config, jax.devices()[:1], peak=1e12)
  config.parallel.fsdp = 8
  eight = ahead_of_time.analyse(config, jax.devices()[:8], peak=1e12)
  assert one["networks"] == ["segmenter"] and not one["collectives"]
  assert eight["collectives"]["all-reduce"]["bytes"] > 0
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
