"""The bank: the synthetic cases that a run's segmenter learns from.

It lies in `<workdir>/bank/step_XXXXXXXX`, complete or absent, so that a run
that starts again finds it.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from fairdiff_jax.synthesis.generate import Generated, make_generator
from fairdiff_jax.training.checkpoint import split
from fairdiff_jax.training.loop import Setup, Synthetic
from fairdiff_jax.training.step import TrainState


def make_refill(run: Setup) -> Callable[..., Synthetic]:
  """Compiles the generators of a run's bank.

  Returns:
    (state, step, sizes [G], quota [G], directory) -> the bank's cases, the
    same on every host: read if the directory is there, else generated from
    the state's averages and written.
  """
  generate = make_generator(run)
  first_host = jax.process_index() == 0

  def refill(
    state: TrainState,
    step: int,
    sizes: np.ndarray,
    quota: np.ndarray,
    directory: Path,
  ) -> Synthetic:
    if not directory.exists():
      group = np.repeat(np.arange(len(quota), dtype=np.int32), quota)
      # Every bank is new: its noise is of its own step.
      seed = run.config.seed * 1_000_003 + step
      size = run.config.bank.batch_size
      inference = split(state)["inference"] | {"imported": state.imported}
      chunks = [
        generate(inference, seed, np.arange(len(group))[rows], group[rows])
        for rows in tqdm(
          [slice(i, i + size) for i in range(0, len(group), size)],
          desc=f"bank at step {step}",
          unit="batch",
          leave=False,
          disable=not first_host,
        )
      ]
      if first_host:
        if not chunks:
          empty = np.empty((0, *run.config.data.size), np.uint8)
          chunks = [Generated(empty, empty, np.empty(0, int))]
        cases = Generated(*map(np.concatenate, zip(*chunks, strict=True)))
        facts = {"synthetic": True, "step": step, "seed": seed}
        names = run.objective.group_names
        _write(directory, cases, group, sizes, names, facts)
      if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"bank {step}")
    with np.load(directory / "cases.npz", allow_pickle=False) as cases:
      return Synthetic(*(cases[field] for field in Synthetic._fields))

  return refill


def _write(directory, cases, group, sizes, names, facts):
  temporary = directory.with_name("tmp_" + directory.name)
  shutil.rmtree(temporary, ignore_errors=True)
  temporary.mkdir(parents=True)
  np.savez_compressed(
    temporary / "cases.npz",
    image=cases.image,
    mask=cases.mask,
    group=group,
    sizes=sizes,
  )
  with (temporary / "manifest.jsonl").open("w") as file:
    for i, g in enumerate(group):
      record = {
        "case": i,
        "group": names[g],
        "attempts": int(cases.attempts[i]),
      }
      file.write(json.dumps(record | facts) + "\n")
  temporary.rename(directory)
