"""Measures how often intervals and tests of group figures hold what they say.

  python launch/benchmark_intervals.py --trials 1000

Draws test sets from known populations of Dice values and counts how often the
95% intervals of `fairness.uncertainty` cover the population's figures. The
cases of a second run share most of their luck with the first's, and its groups
lie half as far apart. Prints a Markdown table.
"""

import functools
import itertools
import os
from concurrent import futures

import numpy as np
from absl import flags
from fairdiff_jax.launch import cli
from tqdm import tqdm

TRIALS = flags.DEFINE_integer("trials", 1000, "Test sets a row.", lower_bound=1)
EQUITY = flags.DEFINE_string(
  "equity", "fairdiff_std", "Definition of ES, as `evaluation.equity`."
)
RESAMPLES = flags.DEFINE_integer(
  "resamples", 1000, "Resamples an interval.", lower_bound=1
)

NAMES = ("a", "b", "c")
POPULATION = 20_000  # cases a group
# Share of the cases on which both runs fail.
FAILURES = {"skewed": 0.0, "skewed, 5% failures": 0.05}
MEANS = ((0.80, 0.80, 0.80), (0.80, 0.82, 0.84), (0.75, 0.80, 0.85))
SIZES = ((50, 50, 50), (200, 200, 200), (500, 500, 500), (50, 83, 423))
COLUMNS = ("group mean", "gap", "ES", "gap difference", "ES difference")


def values_of(mean, quantiles):
  """Dice with a long lower tail: Beta of that mean, deviation about 0.12."""
  from scipy import stats

  return stats.beta.ppf(quantiles, 10 * mean, 10 * (1 - mean))


@functools.lru_cache(maxsize=1)  # trials come row by row
def population(distribution, means):
  """Dice `[3, POPULATION, 2]` of two runs."""
  from scipy import stats

  rng = np.random.default_rng(0)
  luck = rng.multivariate_normal(
    [0, 0], [[1, 0.8], [0.8, 1]], (len(means), POPULATION)
  )
  quantiles = stats.norm.cdf(luck)
  center = np.mean(means)
  values = np.stack(
    [
      np.stack([values_of(m, q[:, 0]), values_of((m + center) / 2, q[:, 1])], 1)
      for m, q in zip(means, quantiles, strict=True)
    ]
  )
  failed = rng.random(values.shape[:2]) < FAILURES[distribution]
  values[failed] *= 0.1
  return values


def trial(task):
  """Which intervals of one test set cover, bool in the order of `COLUMNS`."""
  from fairdiff_jax.fairness import metrics, uncertainty

  distribution, means, sizes, equity, resamples, seed = task
  values = population(distribution, means)
  group = np.repeat(np.arange(len(means)), sizes)
  rng = np.random.default_rng(seed)
  cases = values[group, rng.integers(POPULATION, size=len(group))]
  options = {"num_resamples": resamples, "definition": equity}
  found = uncertainty.intervals(cases[:, 0], group, NAMES, **options)
  paired = uncertainty.compare(*cases.T, group, NAMES, **options)
  # The truth is that of a population with the groups in the same proportion.
  group_means = values.mean(1)
  overall = np.average(group_means, axis=0, weights=sizes)
  gap = np.ptp(group_means, axis=0)
  es = [
    metrics.equity_scaled(group_means[:, run], overall[run], equity)
    for run in (0, 1)
  ]
  checks = (
    (found["groups"]["a"], group_means[0, 0]),
    (found["gap"], gap[0]),
    (found["es"], es[0]),
    ((paired["gap"]["low"], paired["gap"]["high"]), gap[1] - gap[0]),
    ((paired["es"]["low"], paired["es"]["high"]), es[1] - es[0]),
  )
  return [low <= truth <= high for (low, high), truth in checks]


def main(_):
  from fairdiff_jax.fairness import metrics

  if EQUITY.value not in metrics.EQUITY:
    raise ValueError(
      f"--equity={EQUITY.value} is unknown; use one of"
      f" {', '.join(metrics.EQUITY)}"
    )
  rows = list(itertools.product(FAILURES, MEANS, SIZES))
  trials = [row for row in rows for _ in range(TRIALS.value)]
  options = EQUITY.value, RESAMPLES.value
  tasks = [(*row, *options, seed) for seed, row in enumerate(trials)]
  with futures.ProcessPoolExecutor(os.cpu_count()) as pool:
    results = pool.map(trial, tasks, chunksize=25)
    covered = np.array(list(tqdm(results, total=len(tasks), unit="trial")))
  covered = covered.reshape(len(rows), TRIALS.value, -1).mean(1)
  head = ["Dice", "group means", "n per group", *COLUMNS]
  print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
  for (distribution, means, sizes), shares in zip(rows, covered, strict=True):
    cells = [
      distribution,
      " / ".join(f"{m:.2f}" for m in means),
      " / ".join(map(str, sizes)),
      *(f"{100 * share:.1f}" for share in shares),
    ]
    print(f"| {' | '.join(cells)} |")


def start():
  cli.run(main)


if __name__ == "__main__":
  start()
