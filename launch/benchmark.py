"""Times the joint train step for several values of a config field.

  python launch/benchmark.py --config configs/phantom.py \
    --field fairness.method --values erm,variance

All variants take turns in one process, so that their ratios hold on a noisy
machine; the ratio is that of each round's times, its median and quartiles.
"""

import ast
import contextlib
import time

import numpy as np
from absl import flags
from fairdiff_jax.launch import cli
from tqdm import tqdm

FIELD = flags.DEFINE_string("field", "fairness.method", "Field to vary.")
VALUES = flags.DEFINE_list("values", ["erm", "variance"], "Its values.")
ROUNDS = flags.DEFINE_integer(
  "rounds", 40, "Rounds; each times every value.", lower_bound=1
)
STEPS = flags.DEFINE_integer(
  "steps", 5, "Steps per value and round.", lower_bound=1
)


def random_batch(config, num_groups, active):
  """A batch of noise with the shapes of a run's batches."""
  import jax

  from fairdiff_jax.training.setup import describe_batch

  rng = np.random.default_rng(0)

  def draw(path, like):
    name = path[-1].key
    if name == "weight":
      return np.ones(like.shape, np.float32)
    if name in ("mask", "group"):
      return rng.integers(
        0, 3 if name == "mask" else num_groups, like.shape, np.int32
      )
    scale = 10 if name == "points" else 0.5
    return rng.normal(scale=scale, size=like.shape).astype(np.float32)

  return jax.tree_util.tree_map_with_path(draw, describe_batch(config, active))


def configure(base, value):
  """The config with the field at a value.

  Raises:
    ValueError: there is no such field, or it cannot be so.
  """
  config = base.copy_and_resolve_references()
  settings = [value]
  with contextlib.suppress(ValueError, SyntaxError):
    settings.append(ast.literal_eval(value))  # of a field that is no text
  for setting in settings:
    try:
      config.update_from_flattened_dict({FIELD.value: setting})
    except KeyError as error:
      raise ValueError(
        f"--field={FIELD.value} is no field of the config"
      ) from error
    except TypeError:
      continue
    return config
  raise ValueError(f"--values: {FIELD.value} cannot be {value}")


def main(_):
  base = cli.config()
  configs = {value: configure(base, value) for value in VALUES.value}
  import jax

  from fairdiff_jax.data import statistics
  from fairdiff_jax.training.setup import make_step, setup

  steps, states = {}, {}
  for value, config in configs.items():
    run = setup(config)
    num_groups = len(run.objective.group_names)
    batch = random_batch(config, num_groups, tuple(run.objective.tasks))
    stats = jax.tree.map(np.ones_like, statistics.shapes(num_groups))
    stats = {name: stats[name] for name in run.objective.tasks}
    states[value] = run.init(stats, np.ones(num_groups, np.float32))
    steps[value] = make_step(run, tuple(run.objective.tasks))
    states[value], _ = steps[value](states[value], batch)
  seconds = {value: [] for value in VALUES.value}
  for number in tqdm(range(ROUNDS.value), unit="round"):
    # Alternating the order keeps a drift of the machine out of the ratios.
    order = VALUES.value if number % 2 else VALUES.value[::-1]
    for value in order:
      jax.block_until_ready(states[value])
      start = time.perf_counter()
      for _ in range(STEPS.value):
        states[value], _ = steps[value](states[value], batch)
      jax.block_until_ready(states[value])
      seconds[value].append((time.perf_counter() - start) / STEPS.value)
  first = np.asarray(seconds[VALUES.value[0]])
  print(f"{FIELD.value:<24}{'ms a step':>10}{'ratio':>9}   quartiles")
  for value in VALUES.value:
    ratio = np.asarray(seconds[value]) / first
    low, middle, high = np.percentile(ratio, [25, 50, 75])
    print(
      f"{value:<24}{1e3 * np.median(seconds[value]):10.1f}{middle:9.3f}"
      f"   {low:.3f} to {high:.3f}"
    )


def start():
  cli.run(main, takes_config=True)


if __name__ == "__main__":
  start()
