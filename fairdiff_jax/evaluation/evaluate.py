"""Evaluation of a run: from its checkpoint to a report."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict
from tqdm import tqdm

from fairdiff_jax import config as configs
from fairdiff_jax.data.fairseg import Cases, load
from fairdiff_jax.data.loader import normalize
from fairdiff_jax.evaluation import report, segmentation
from fairdiff_jax.fairness.metrics import CUP, RIM, Definitions, dice
from fairdiff_jax.synthesis.generate import Generated, make_generator
from fairdiff_jax.training.checkpoint import network, restore_inference
from fairdiff_jax.training.mesh import map_batch
from fairdiff_jax.training.pools import case_groups
from fairdiff_jax.training.setup import Setup, setup

BASELINE = "Baseline (ERM)"


def make_predictor(
  run: Setup, inference: dict[str, Any], batch_size: int
) -> Callable[[np.ndarray], np.ndarray]:
  """The segmenter as (images uint8 [n, H, W]) -> labels uint8 [n, H, W]."""
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
    return np.concatenate(labels).astype(np.uint8)

  return predict


def synthesize(
  run: Setup, inference: dict[str, Any], per_group: int
) -> tuple[Generated, np.ndarray]:
  """Fresh synthetic cases of every group, and their groups [n]."""
  generate = make_generator(run)
  group = np.repeat(
    np.arange(len(run.objective.group_names), dtype=np.int32), per_group
  )
  number = np.arange(len(group))
  size = run.config.bank.batch_size
  # Seeds of banks are at least 0: these cases are in none of them.
  seed = (1 << 31) - 1 - run.config.seed
  chunks = [
    generate(inference, seed, number[i : i + size], group[i : i + size])
    for i in tqdm(
      range(0, len(group), size),
      desc="synthetic cases",
      unit="batch",
      disable=jax.process_index() != 0,
    )
  ]
  return Generated(*map(np.concatenate, zip(*chunks, strict=True))), group


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
    'ratio'}.
  """
  sides = {
    "synthetic": (generated.mask, predict(generated.image), synthetic_group),
    "real": (test.mask, predict(test.image), test_group),
  }
  result = {}
  for g, name in enumerate(names):
    result[name] = {}
    for cls, code in (("cup", CUP), ("rim", RIM)):
      means = {}
      for side, (label, prediction, group) in sides.items():
        member = group == g
        scores = dice(label[member], prediction[member], code, empty)
        scores = scores[np.isfinite(scores)]
        means[side] = float(scores.mean()) if len(scores) else float("nan")
      result[name][cls] = means
  result["all"] = {
    cls: {
      side: float(np.nanmean([result[name][cls][side] for name in names]))
      for side in sides
    }
    for cls in ("cup", "rim")
  }
  for classes in result.values():
    for means in classes.values():
      means["ratio"] = means["synthetic"] / means["real"]
  return result


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

  Args:
    workdir: the run's directory.
    directory: where the report goes; None for `<workdir>/report`.
    evaluation: as `config.evaluation`; None for the run's own.

  Returns:
    What `summary.json` holds; on hosts other than the first, {}.

  Raises:
    FileNotFoundError: no such run, or it has no checkpoint.
    ValueError: unknown definitions.
  """
  workdir = Path(workdir)
  config = configs.load(workdir)
  evaluation = evaluation or config.evaluation
  definitions = definitions_of(evaluation)
  run = setup(config)
  step, inference = restore_inference(workdir, run.objective, run.abstract)
  names = run.objective.group_names
  data = configs.data_directory(config, workdir)
  test, train = load(data, "test"), load(data, "train")
  test_group, train_group = (
    case_groups(config, test),
    case_groups(config, train),
  )
  size = evaluation.batch_size
  generates = {"points", "image"} <= run.objective.tasks.keys()
  subject = "FairDiff, joint" if generates else "Segmenter"
  predictors = {subject: make_predictor(run, inference, size)}
  if (workdir / "baseline" / "checkpoints").exists():
    baseline = setup(configs.load(workdir / "baseline"))
    _, parameters = restore_inference(
      workdir / "baseline", baseline.objective, baseline.abstract
    )
    predictors[BASELINE] = make_predictor(baseline, parameters, size)
  predictions = {
    name: predict(test.image) for name, predict in predictors.items()
  }
  synthetic, agreements = None, None
  if generates:
    per_group = evaluation.synthetic_per_group
    generated, group = synthesize(run, inference, per_group)
    synthetic = {
      "image": generated.image,
      "mask": generated.mask,
      "group": np.asarray(names)[group],
    }
    agreements = {
      name: agreement(
        predict, generated, group, test, test_group, names, definitions.empty
      )
      for name, predict in predictors.items()
    }
  if jax.process_index() != 0:
    return {}
  counts = {
    name: {"real": int((train_group == g).sum()), "synthetic": 0}
    for g, name in enumerate(names)
  }
  banks = sorted((workdir / "bank").glob("step_*/cases.npz"))
  if banks:
    with np.load(banks[-1], allow_pickle=False) as bank:
      for g, name in enumerate(names):
        counts[name]["synthetic"] = int((bank["group"] == g).sum())
  return report.write(
    directory or workdir / "report",
    title=f"Fair segmentation of {workdir.name}",
    models={
      name: segmentation.per_case(
        test.mask, prediction, test.name, test_group, names, definitions.empty
      )
      for name, prediction in predictions.items()
    },
    cases={
      "image": test.image,
      "label": test.mask,
      "prediction": predictions[subject],
    },
    synthetic=synthetic,
    agreement=agreements,
    counts=counts,
    log=workdir / "metrics.jsonl",
    facts={
      "data": config.data.source,
      "attribute": config.data.attribute,
      "pooled groups": ", ".join(config.data.pooled) or "none",
      "crop": "x".join(map(str, config.data.crop)) or "none",
      "image size": "x".join(map(str, config.data.size)),
      "training cases": len(train.name),
      "test cases": len(test.name),
      "steps": step,
      "fairness method": config.fairness.method,
      "data strategy": config.fairness.strategy,
      "seed": config.seed,
      "absent structures": definitions.empty,
      "equity scaling": definitions.equity,
      "config sha256": configs.config_hash(config),
    },
    definitions=definitions,
  )
