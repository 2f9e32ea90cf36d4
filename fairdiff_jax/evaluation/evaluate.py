"""Evaluation of a run: from its checkpoint to a report."""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from fairdiff_jax import config as configs
from fairdiff_jax.data import domain as domains
from fairdiff_jax.data.cases import Cases
from fairdiff_jax.data.loader import normalize
from fairdiff_jax.data.storage import digest, load, num_cases
from fairdiff_jax.evaluation import realism, report, results, segmentation
from fairdiff_jax.fairness.metrics import Definitions, dice
from fairdiff_jax.synthesis.anatomy import Anatomy
from fairdiff_jax.synthesis.generate import Generated, make_generator
from fairdiff_jax.training.banks import bank_directory, read_bank
from fairdiff_jax.training.checkpoint import network, restore_inference
from fairdiff_jax.training.mesh import map_batch
from fairdiff_jax.training.pools import case_groups, makers
from fairdiff_jax.training.schedule import bank_step, learning_steps
from fairdiff_jax.training.setup import Setup, setup

BASELINE = "Baseline (Repeat Sample)"
REPORT = 2  # tells the noise of a report's cases from that of banks


def make_predictor(
  run: Setup, inference: dict[str, Any], batch_size: int
) -> Callable[[np.ndarray], np.ndarray]:
  """The segmenter as (images uint8) -> labels uint8 [n, H, W]."""
  variables = network(inference, "segmenter")
  function = jax.jit(
    run.objective.tasks["segmenter"].sample,
    out_shardings=NamedSharding(run.mesh, PartitionSpec()),
  )

  def predict(images):
    labels = [
      map_batch(
        partial(function, variables),
        [normalize(images[i : i + batch_size])],
        run.mesh,
        batch_size,
      )
      for i in range(0, len(images), batch_size)
    ]
    none = np.empty((0, *images.shape[1:3]), np.uint8)
    return np.concatenate([none, *labels]).astype(np.uint8)

  return predict


def synthesize(
  run: Setup, inference: dict[str, Any], per_group: int, anatomy: Anatomy
) -> tuple[Generated, np.ndarray, list[str]]:
  """Fresh synthetic cases of every group, made as a bank's are.

  Args:
    run: set-up of the run.
    inference: the state's averages.
    per_group: how many; as many as have a sound mask are left.
    anatomy: the training cases.

  Returns:
    The cases, their groups [n], and a sentence for every group that lacks some.
  """
  names, attempts = run.objective.group_names, run.config.bank.max_attempts
  group = np.repeat(np.arange(len(names), dtype=np.int32), per_group)
  cases = make_generator(run, anatomy)(
    inference,
    (run.config.seed, 0, REPORT),
    np.arange(len(group)),
    group,
    "synthetic cases",
  )
  notices = []
  for g, name in enumerate(names):
    faults = Counter(cases.fault[(group == g) & ~cases.sound].tolist())
    if faults:
      why = ", ".join(f"{fault}: {n}" for fault, n in faults.most_common())
      notices.append(
        f"{faults.total()} of {per_group} synthetic patients of {name} could"
        f" not be drawn: no sound mask in {attempts} draws each ({why})."
      )
  sound = np.flatnonzero(cases.sound)
  return cases.take(sound), group[sound], notices


def agreement(
  predict: Callable[[np.ndarray], np.ndarray],
  generated: Generated,
  synthetic_group: np.ndarray,
  test: Cases,
  test_group: np.ndarray,
  names: tuple[str, ...],
  empty: str,
) -> dict[str, dict[str, dict[str, float]]]:
  """A segmenter's Dice on synthetic cases beside its Dice on real ones.

  Returns:
    group (or 'all', the mean over groups) -> class -> {'synthetic', 'real',
    'ratio'}; NaN where there is no case, and for the ratio to 0.
  """
  sides = {
    "synthetic": (generated.mask, predict(generated.image), synthetic_group),
    "real": (test.mask, predict(test.image), test_group),
  }
  result: dict[str, dict[str, dict[str, float]]] = {}
  for cls in test.domain.parts:
    code = test.domain.reported_classes[cls]
    means = {
      side: [_mean(scores[group == g]) for g in range(len(names))]
      for side, (label, prediction, group) in sides.items()
      for scores in [dice(label, prediction, code, empty)]
    }
    for i, name in enumerate((*names, "all")):
      synthetic, real = (
        _mean(of) if name == "all" else of[i] for of in means.values()
      )
      result.setdefault(name, {})[cls] = {
        "synthetic": synthetic,
        "real": real,
        "ratio": synthetic / real if real > 0 else math.nan,
      }
  return result


def _mean(values: Sequence[float] | np.ndarray) -> float:
  """Mean of the values that are known; NaN where none is."""
  known = np.asarray(values, float)
  known = known[np.isfinite(known)]
  return float(known.mean()) if len(known) else math.nan


def definitions_of(evaluation: ConfigDict) -> Definitions:
  """The definitions that a run's `config.evaluation` names.

  Raises:
    ValueError: it names an unknown one.
  """
  try:
    return Definitions(evaluation.empty, evaluation.equity)
  except ValueError as error:
    raise ValueError(f"evaluation.{error}") from error


def evaluate(
  workdir: str | Path,
  directory: str | Path | None = None,
  evaluation: ConfigDict | None = None,
) -> dict:
  """Evaluates a run, with its baseline if it has one, and writes the report.

  Without a segmenter or a test case the report has no segmentation figures and
  says so; whatever else it lacks it says in notices.

  Args:
    workdir: the run's directory.
    directory: where the report goes; None for `<workdir>/report`.
    evaluation: as `config.evaluation`; None for the run's own.

  Returns:
    What `summary.json` holds; on hosts other than the first, {}.

  Raises:
    FileNotFoundError: no such run, or it has no checkpoint.
    ValueError: unknown definitions, or other data than the run was trained on.
  """
  workdir = Path(workdir)
  record = configs.load_record(workdir)
  config = record.config
  evaluation = evaluation or config.evaluation
  definitions = definitions_of(evaluation)
  run = setup(config)
  step, inference = restore_inference(workdir, run.objective, run.abstract)
  names, tasks = run.objective.group_names, run.objective.tasks.keys()
  data = configs.data_directory(config, workdir)
  if record.data not in ("", found := digest(data)):
    raise ValueError(
      f"{data} holds other cases ({found[:12]}) than the run in {workdir} was"
      f" trained on ({record.data[:12]}); put those back"
    )
  train = load(data, "train")
  test = _load_test(data, train)
  train_group, test_group = (case_groups(config, c) for c in (train, test))
  domain = train.domain
  bank, counts, notices = _read_bank(config, workdir, step, names)
  for g, name in enumerate(names):
    counts[name]["real"] = int((train_group == g).sum())

  size = evaluation.batch_size
  generates = {*makers(config)} <= tasks
  subject = "FairDiff, joint" if generates else "Segmenter"
  predictors = {}
  reason = ""
  if "segmenter" not in tasks:
    reason = "the run trains no segmenter (train.segmenter is empty)"
  elif step <= learning_steps(config, "segmenter")[0]:
    reason = f"at step {step} the segmenter has not learned yet"
  else:
    predictors[subject] = make_predictor(run, inference, size)
    baseline, missing = _baseline_predictor(workdir, size)
    if baseline:
      predictors[BASELINE] = baseline
    notices += missing
  if not test.name:
    reason = f"there is no test case in {data}"
  predictions = {}
  if test.name:
    predictions = {k: predict(test.image) for k, predict in predictors.items()}
  cases = {
    "image": test.image,
    "label": test.mask,
    "group": np.array([*names, segmentation.UNKNOWN])[test_group],
  }
  if predictions:
    cases["prediction"] = predictions[subject]
  synthetic, agreements, realistic = None, None, None
  if generates and evaluation.synthetic_per_group:
    generated, group, missing = synthesize(
      run,
      inference,
      evaluation.synthetic_per_group,
      Anatomy(train.image, train.mask, train_group),
    )
    notices += missing
    synthetic = {
      "image": generated.image,
      "mask": generated.mask,
      "group": np.array(names)[group],
    }
    real = {"image": test.image, "mask": test.mask, "group": cases["group"]}
    realistic = realism.compare(real, synthetic, domain.regions, names)
    agreements = {
      name: agreement(
        predict, generated, group, test, test_group, names, definitions.empty
      )
      for name, predict in predictors.items()
    }
  if jax.process_index() != 0:
    return {}
  title = f"Fair segmentation of {workdir.name}"
  if not predictions:
    title = f"{workdir.name}, without segmentation figures"
  return report.write(
    directory or workdir / report.DIRECTORY,
    title=title,
    models={
      name: segmentation.per_case(
        *(test.mask, prediction, test.name, test_group, names),
        *(definitions.empty, domain),
      )
      for name, prediction in predictions.items()
    },
    reason=reason,
    notices=notices,
    cases=cases,
    synthetic=synthetic,
    realism=realistic,
    agreement=agreements,
    counts=counts,
    epoch=results.epoch(
      *(config, names, train_group),
      [counts[name]["synthetic"] for name in names],
      None if bank == "none" else workdir / "bank" / bank,
    ),
    log=workdir / "metrics.jsonl",
    facts={
      "data": config.data.source,
      "attribute": config.data.attribute,
      "pooled groups": ", ".join(config.data.pooled) or "none",
      "crop": "x".join(map(str, config.data.crop)) or "none",
      "image size": "x".join(map(str, config.data.size)),
      "training cases": len(train.name),
      "test cases": len(test.name),
      report.TEST_DIGEST: _digest(test),
      "steps": step,
      **{
        f"changed at step {change['step']}": "; ".join(
          f"{name}: {old} before, {new} then"
          for name, (old, new) in change["fields"].items()
        )
        for change in record.changes
      },
      "bank in use at the end": bank,
      "fairness method": config.fairness.method,
      "data strategy": config.fairness.strategy,
      "seed": config.seed,
      "absent structures": definitions.empty,
      "equity scaling": definitions.equity,
      "config sha256": configs.config_hash(config),
    },
    definitions=definitions,
    domain=domain,
    **results.about_run(config, workdir),
  )


def _load_test(directory: Path, train: Cases) -> Cases:
  """The test cases; no case where the data has no such split."""
  if num_cases(directory, "test"):
    return load(directory, "test")
  image, mask, points = (x[:0] for x in (train.image, train.mask, train.points))
  attributes = {name: codes[:0] for name, codes in train.attributes.items()}
  return train._replace(
    name=[], image=image, mask=mask, points=points, attributes=attributes
  )


def _digest(cases: Cases) -> str:
  """SHA-256 of the cases' names, images and masks."""
  digest = hashlib.sha256("\n".join(cases.name).encode())
  for pixels in (cases.image, cases.mask):
    digest.update(np.ascontiguousarray(pixels))
  return digest.hexdigest()


def _read_bank(
  config: ConfigDict, workdir: Path, step: int, names: Sequence[str]
) -> tuple[str, dict[str, dict[str, int]], list[str]]:
  """The bank that the step before `step` used.

  Returns:
    Its name or 'none', its cases as group -> {'real': 0, 'synthetic': n}, and
    what is wrong with it, a sentence.
  """
  counts = {name: {"real": 0, "synthetic": 0} for name in names}
  filled = bank_step(config, step - 1)
  if filled is None or not list((workdir / "bank").glob("step_*")):
    return "none", counts, []
  directory = bank_directory(workdir, filled)
  try:
    domain = domains.of(config.data.domain, config.data.source)
    group = read_bank(directory, config.data.size, len(names), domain).group
  except (OSError, ValueError) as error:
    notice = f"Synthetic training cases are not counted: {error}."
    return directory.name, counts, [notice]
  for g, name in enumerate(names):
    counts[name]["synthetic"] = int((group == g).sum())
  return directory.name, counts, []


def _baseline_predictor(
  workdir: Path, batch_size: int
) -> tuple[Callable[[np.ndarray], np.ndarray] | None, list[str]]:
  """The segmenter of a run's baseline; None and why, where it has none."""
  directory = workdir / "baseline"
  if not (directory / "checkpoints").exists():
    return None, []
  try:
    run = setup(configs.load(directory))
    _, inference = restore_inference(directory, run.objective, run.abstract)
    return make_predictor(run, inference, batch_size), []
  except (OSError, ValueError) as error:
    return None, [f"The baseline is left out: {error}."]
