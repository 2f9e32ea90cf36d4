"""Filling the bank: synthetic cases that a run's segmenter learns from.

A bank holds what its segmenter gets wrong: of `bank.candidates` cases that are
drawn for each, those of the highest risk, group by group.

    l_i = segmenter's loss of case i, as in the joint objective

Their masks are right by construction, so that a high risk is no wrong label.
Batches are written as they are made, so that a refill that is stopped goes on
after the last of them, to the very same bank.
"""

import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from fairdiff_jax import array_files, files
from fairdiff_jax.data.cases import Cases, require_training
from fairdiff_jax.synthesis import sheet
from fairdiff_jax.synthesis.anatomy import Anatomy
from fairdiff_jax.synthesis.generate import (
  Generated,
  batches,
  compile_network,
  join,
  make_generator,
  require_sound,
)
from fairdiff_jax.training.banks import (
  CASES,
  MANIFEST,
  RECORD,
  SHEET,
  Synthetic,
  read_bank,
  read_record,
  remedy,
)
from fairdiff_jax.training.checkpoint import Inference, fingerprint, split
from fairdiff_jax.training.mesh import from_first_host, to_host
from fairdiff_jax.training.pools import case_groups
from fairdiff_jax.training.setup import Setup
from fairdiff_jax.training.step import TrainState

BANK = 1  # tells the noise of banks from that of other synthetic cases
SHOWN = 4  # real cases of a group in a bank's picture, and as many synthetic
UNFINISHED = "unfinished"  # batches of a bank that is being filled
BATCH = (*Generated._fields, "risk")  # arrays of such a batch


def make_refill(run: Setup, cases: Cases) -> Callable[..., Synthetic | None]:
  """Compiles the generators of a run's bank.

  Args:
    run: set-up of the run.
    cases: training cases, of which `bank.masks` and `bank.strength` may ask
      for some.

  Returns:
    (state, step, sizes [G], quota [G], directory, stop=, say=) -> the bank's
    cases, the same on every host: read if the directory is there and was made
    from this state, else generated from the state's averages and written; None
    if `stop()` gave True between two batches. `say` prints a line.

    A mask that stays unsound is left out; if too few are left, with a notice.
    It raises ValueError if more than half of a group's are unsound, or the bank
    that is there is damaged.
  """
  require_training(cases, "the bank")
  real_group = case_groups(run.config, cases)
  patients = run.config.bank.patients
  anatomy = Anatomy(cases.image, cases.mask, real_group, patients)
  real = {
    code: [
      (cases.image[i], cases.mask[i])
      for i in np.flatnonzero(real_group == code)[:SHOWN]
    ]
    for code in range(len(run.objective.group_names))
  }
  generate = make_generator(run, anatomy)
  candidates = run.config.bank.candidates
  risk_of = _make_risk(run) if candidates > 1 else None
  names = run.objective.group_names
  shape = tuple(run.config.data.size)
  domain = run.domain
  first_host = jax.process_index() == 0

  def refill(
    state: TrainState,
    step: int,
    sizes: np.ndarray,
    quota: np.ndarray,
    directory: Path,
    *,
    stop: Callable[[], bool],
    say: Callable[[str], None],
  ) -> Synthetic | None:
    # A segmenter that has learned nothing has none that it gets wrong.
    judged = risk_of and int(to_host(state.updates["segmenter"])) > 0
    drawn = np.multiply(quota, candidates if judged else 1)
    group = np.repeat(np.arange(len(quota), dtype=np.int32), drawn)
    saved = split(state)["inference"]
    source = fingerprint({"averages": saved, "group": group})
    # One host looks, so that all do the same.
    found = from_first_host(first_host and _is_made_from(directory, source))
    if not found:
      # Every bank is new: its noise is of its own step.
      seed = (run.config.seed, step, BANK)
      folder = directory.parent / UNFINISHED / f"{directory.name}_{source[:16]}"
      done = from_first_host(_start(folder) if first_host else 0)
      size = run.config.bank.batch_size
      inference = Inference.of(state)
      title = f"bank at step {step}"
      for rows in batches(len(group), size, title, first=done):
        if stop():
          return None
        cases = generate(
          inference, seed, np.arange(len(group))[rows], group[rows]
        )
        number = len(cases.fault)
        risk = risk_of(inference, cases) if judged else np.zeros(number)
        if first_host:
          path = folder / f"{rows.start // size:05d}.npz"
          _write_chunk(path, cases._asdict() | {"risk": risk})
      if first_host:
        # Mapped: a bank may be larger than memory.
        none = join([], shape, domain.channels)._asdict()
        chunks = [
          none | {"risk": np.empty(0)},
          *(_read(path) for path in _finished(folder)),
        ]
        fault, attempts, risk = (
          np.concatenate([c[name] for c in chunks])
          for name in ("fault", "attempts", "risk")
        )
        facts = {
          "synthetic": True,
          "step": step,
          "seed": seed,
          "masks": run.config.bank.masks,
          "warped": run.config.bank.strength < 1,  # from real patients
          "candidates": candidates,
        }
        try:
          unsound = _count_unsound(attempts, fault, group, names)
        except ValueError:
          shutil.rmtree(folder.parent)  # what is changed may be no other state
          raise
        kept = riskiest(np.where(fault == "", risk, np.nan), group, quota)
        cases = [
          {
            "case": i,
            "number": int(number),
            "group": names[group[number]],
            "attempts": int(attempts[number]),
            "risk": float(risk[number]),
          }
          | facts
          for i, number in enumerate(np.flatnonzero(kept))
        ]
        record = facts | {"source": source, "unsound": unsound}
        ends = np.cumsum([len(c["risk"]) for c in chunks])[:-1]
        chunks = [
          (c, rows)
          for c, rows in zip(chunks, np.split(kept, ends), strict=True)
        ]
        picture = _draw(chunks, group[kept], real, names, domain)
        _write(directory, chunks, group[kept], sizes, cases, record, picture)
        shutil.rmtree(folder.parent)
        if missing := int(np.sum(quota) - kept.sum()):
          say(
            f"{title}: {int((fault != '').sum())} of {len(group)} masks are"
            f" still unsound after {run.config.bank.max_attempts} draws each"
            f" ({unsound}); real cases stand in for {missing}"
          )
      if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"bank {step}")
    return read_bank(directory, shape, len(names), domain)

  return refill


def _make_risk(run: Setup) -> Callable[[Inference, Generated], np.ndarray]:
  """Compiles the averaged segmenter's loss of a batch of cases: [n]."""
  shape, channels = tuple(run.config.data.size), run.domain.channels
  task = run.objective.tasks["segmenter"]

  def losses(variables, keys, image, mask):
    batch = {
      "image": image.reshape(*mask.shape, channels) / 127.5 - 1,
      "mask": mask,
      "weight": jnp.ones(len(mask)),
    }
    return task.risk(variables, batch, None, False)[0]

  image = shape if channels == 1 else (*shape, channels)
  call = compile_network(run, "segmenter", losses, image, shape)

  def risk_of(inference, cases):
    nobody = np.zeros(len(cases.mask), int)  # nothing is drawn here
    key = jax.random.key(0, impl="threefry2x32")
    return call(inference, key, nobody, cases.image, cases.mask)

  return risk_of


def riskiest(
  risk: np.ndarray, group: np.ndarray, quota: np.ndarray
) -> np.ndarray:
  """Which cases a bank keeps: bool [n].

  Args:
    risk: of every candidate [n], NaN of those that are of no use.
    group: of every candidate [n].
    quota: how many of each group [G] are kept, if there are so many.

  Returns:
    Those of the highest risk in each group, the earlier ones of equal risk.
  """
  kept = np.zeros(len(risk), bool)
  for code, number in enumerate(quota):
    rows = np.flatnonzero((group == code) & np.isfinite(risk))
    kept[rows[np.argsort(-risk[rows], kind="stable")[:number]]] = True
  return kept


def _is_made_from(directory: Path, source: str) -> bool:
  """Whether a bank is there; removes one that was made from another state.

  A run that goes on from an earlier step comes to the same state again on a
  CPU, and nearly so on other devices.
  """
  if not directory.exists():
    return False
  if read_record(directory)["source"] == source:
    return True
  shutil.rmtree(directory)
  return False


def _start(folder: Path) -> int:
  """Makes the folder of a bank's batches; how many of them are there."""
  folder.mkdir(parents=True, exist_ok=True)
  files.sweep(folder)
  for other in folder.parent.iterdir():
    if other != folder:
      shutil.rmtree(other)
  return len(_finished(folder))


def _finished(folder: Path) -> list[Path]:
  return sorted(folder.glob("*.npz"))


def _read(path: Path) -> dict[str, np.ndarray]:
  arrays = array_files.read_npz(path, mapped=True)
  absent = [name for name in BATCH if arrays.get(name) is None]
  if absent:
    raise ValueError(
      f"{path} has no array {absent[0]!r}; {remedy(path.parent)}"
    )
  return arrays


def _write_chunk(path: Path, cases: dict[str, np.ndarray]):
  with array_files.new_npz(path) as add:
    for name, array in cases.items():
      add(name, len(array), array.shape[1:], array.dtype, [array])


def _draw(chunks, group, real, names, domain) -> bytes | None:
  """Some real cases of every group that the bank has, and synthetic ones."""
  made = {code: [] for code in real}
  codes = iter(group)
  for chunk, kept in chunks:
    for i in np.flatnonzero(kept):
      found = made[next(codes)]
      if len(found) < SHOWN:
        found.append((chunk["image"][i], chunk["mask"][i]))
  rows = {
    f"{names[code]}: {len(real[code])} real, then synthetic": real[code] + found
    for code, found in made.items()
    if found
  }
  return sheet.contact_sheet(rows, domain) if rows else None


def _write(directory: Path, chunks, group, sizes, cases, record, picture):
  """Writes what is kept of all chunks, manifest, picture and record."""
  first = chunks[0][0]
  with files.new_directory(directory) as temporary:
    with array_files.new_npz(temporary / CASES) as add:
      for name in ("image", "mask"):
        found = (c[name][kept] for c, kept in chunks)
        add(name, len(group), first[name].shape[1:], first[name].dtype, found)
      for name, array in (("group", group), ("sizes", sizes)):
        add(name, len(array), (), array.dtype, [array])
    text = "".join(json.dumps(case) + "\n" for case in cases)
    files.write(temporary / MANIFEST, text)
    if picture:
      files.write(temporary / SHEET, picture)
    record = record | {"sha256": files.sha256(temporary / CASES)}
    files.write(temporary / RECORD, json.dumps(record, indent=2) + "\n")


def _count_unsound(attempts, fault, group, names) -> dict[str, dict[str, int]]:
  """Unsound masks by group and fault.

  Raises:
    ValueError: if more than half of a group's are.
  """
  counts = defaultdict(Counter)
  for code, found in zip(group, fault.tolist(), strict=True):
    if found:
      counts[names[code]][found] += 1
  for code, name in enumerate(names):
    of = group == code
    if 2 * counts[name].total() > of.sum():
      require_sound(attempts[of], fault[of], f"masks of {name}")
  return {name: dict(found) for name, found in counts.items() if found}
