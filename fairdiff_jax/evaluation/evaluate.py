"""Evaluation of a run: from its checkpoint to a report."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from fairdiff_jax import config as configs
from fairdiff_jax.data import domain as domains
from fairdiff_jax.data import groups
from fairdiff_jax.data.cases import Cases, require_training
from fairdiff_jax.data.domain import Domain
from fairdiff_jax.data.prepare import is_made_up
from fairdiff_jax.data.storage import digest, load, num_cases
from fairdiff_jax.evaluation import (
  features,
  realism,
  report,
  results,
  segmentation,
  trust,
)
from fairdiff_jax.evaluation.predictor import Predictor
from fairdiff_jax.fairness.metrics import Definitions
from fairdiff_jax.layout import Layout
from fairdiff_jax.synthesis.anatomy import Anatomy
from fairdiff_jax.synthesis.generate import Generated, make_generator
from fairdiff_jax.training.banks import read_bank
from fairdiff_jax.training.pools import case_groups, makers
from fairdiff_jax.training.schedule import bank_step, learning_steps
from fairdiff_jax.training.trained import Trained, told

BASELINE = "Baseline (Repeat Sample)"
REPORT = 2  # tells the noise of a report's cases from that of banks


def synthesize(
  trained: Trained, per_group: int, anatomy: Anatomy | None
) -> tuple[Generated, np.ndarray, np.ndarray, list[str]]:
  """Fresh synthetic cases of every group, made as a bank's are.

  Args:
    trained: the run.
    per_group: how many; as many as have a sound mask are left.
    anatomy: the training cases; None to make cases of noise alone.

  Returns:
    The cases, their groups [n], the training cases [n, patients] whose images
    they are warped from, -1 for none, and a sentence for every group that lacks
    some.
  """
  run, config = trained.setup, trained.config
  names, attempts = run.objective.group_names, config.bank.max_attempts
  group = np.repeat(np.arange(len(names), dtype=np.int32), per_group)
  drawn = (config.seed, 0, REPORT), np.arange(len(group)), group
  cases = make_generator(run, anatomy)(
    *(trained.inference, *drawn, "synthetic cases")
  )
  patient = np.full((len(group), 1), -1)
  if anatomy and config.bank.strength < 1:
    patient = anatomy.draw_patients(*drawn)
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
  return cases.take(sound), group[sound], patient[sound], notices


def _patients(train: Cases, case: np.ndarray) -> np.ndarray:
  """Whose images every synthetic case shows; where nobody's, it is its own.

  Args:
    train: the training cases.
    case: as `synthesize` gives them [n, patients].
  """
  return np.array(
    [
      [train.whose[c] if c >= 0 else f"synthetic {i}" for c in cases]
      for i, cases in enumerate(case)
    ],
    str,
  )


def definitions_of(evaluation: ConfigDict) -> Definitions:
  """The definitions that a run's `config.evaluation` names.

  Raises:
    ValueError: it names an unknown one.
  """
  try:
    return Definitions(evaluation.empty, evaluation.equity)
  except ValueError as error:
    raise ValueError(f"evaluation.{error}") from error


def report_directory(layout: Layout, data: str | Path | None = None) -> Path:
  """Where a run's report goes, on its own data or on other."""
  if data is None:
    return layout.report
  data = Path(data).resolve()
  name = f"{data.parent.name}_{data.name}_{digest(data)[:8]}"
  return layout.external_report(name)


def evaluate(
  trained: Trained,
  directory: str | Path | None = None,
  evaluation: ConfigDict | None = None,
) -> dict:
  """Evaluates a run, with its baseline if it has one, and writes the report.

  Without a segmenter or a test case the report has no segmentation figures and
  says so; whatever else it lacks it says in notices.

  Args:
    trained: the run.
    directory: where the report goes; None for the run's own place.
    evaluation: as `config.evaluation`; None for the run's own.

  Returns:
    What `summary.json` holds; on hosts other than the first, {}.

  Raises:
    FileNotFoundError: `evaluation.features_weights` names no file.
    ValueError: that file holds another network; unknown definitions; or other
      data than the run was trained on.
  """
  config, run, layout = trained.config, trained.setup, trained.layout
  evaluation = evaluation or config.evaluation
  definitions = definitions_of(evaluation)
  names, tasks = run.objective.group_names, run.objective.tasks.keys()
  data = configs.data_directory(config, layout.workdir)
  expected = trained.record.data
  if expected not in ("", found := digest(data)):
    raise ValueError(
      f"{data} holds other cases ({found[:12]}) than the run in"
      f" {layout.workdir} was trained on ({expected[:12]}); put those back"
    )
  train = load(data, "train")
  require_training(train, "the report's generators")
  test = load(data, "test") if num_cases(data, "test") else train.none("test")
  train_group, test_group = (case_groups(config, c) for c in (train, test))
  domain = train.domain
  bank, counts, notices = _read_bank(config, layout, trained.step, names)
  for g, name in enumerate(names):
    counts[name]["real"] = int((train_group == g).sum())

  generates = {*makers(config)} <= tasks and evaluation.synthetic_per_group > 0
  extractor = None
  if generates:  # what cannot be read is said before anything is computed
    extractor = features.published(evaluation, run.mesh, data)
  predictors, used, reason, missing = _predictors(
    trained, evaluation.batch_size
  )
  notices += missing
  if not test.name:
    reason = f"there is no test case in {data}"
  predictions = {}
  if test.name:
    predictions = {k: predict(test.image) for k, predict in predictors.items()}
  cases = _shown(test, test_group, names, predictions)
  synthetic, agreements, realistic, private, pairs = None, None, None, {}, {}
  if generates:
    generated, group, patient, missing = synthesize(
      trained,
      evaluation.synthetic_per_group,
      Anatomy(train.image, train.mask, train_group, config.bank.patients),
    )
    notices += missing
    synthetic = {
      "image": generated.image,
      "mask": generated.mask,
      "group": np.array(names)[group],
      "patient": _patients(train, patient),
    }
    segmenter = _segmenter(predictors)
    extractor = extractor or segmenter
    realistic = trust.realism_of(
      *(test, cases["group"], synthetic, names, extractor)
    )
    sources = {"as in the bank": generated}
    anew = config.bank.strength < 1 or config.bank.masks != "generated"
    if anew and len(group) >= realism.MIN_CASES:
      if {"points", "image"} <= tasks:
        fresh = synthesize(trained, evaluation.synthetic_per_group, None)[0]
        sources["as exported"] = fresh
    private, pairs = trust.privacy_of(
      *(sources, train, test, (train_group, test_group), segmenter)
    )
    agreements = {
      name: trust.agreement(
        {
          "synthetic": predict(generated.image),
          "real": predictions.get(name, test.mask),  # without cases, neither
        },
        *(generated, group, test, test_group, names, definitions.empty),
      )
      for name, predict in predictors.items()
    }
  if jax.process_index() != 0:
    return {}
  title = f"Fair segmentation of {layout.workdir.name}"
  if not predictions:
    title = f"{layout.workdir.name}, without segmentation figures"
  return report.write(
    directory or report_directory(layout),
    title=title,
    models=_measured(test, test_group, names, predictions, definitions, domain),
    reason=reason,
    notices=notices,
    cases=cases,
    synthetic=synthetic,
    realism=realistic,
    privacy=private,
    pairs=pairs,
    agreement=agreements,
    counts=counts,
    checkpoints=used,
    epoch=results.epoch(
      *(config, names, train_group),
      [counts[name]["synthetic"] for name in names],
      None if bank == "none" else layout.banks / bank,
    ),
    log=layout.log,
    facts={
      "data": config.data.source,
      "attribute": config.data.attribute,
      "pooled groups": ", ".join(config.data.pooled) or "none",
      "crop": "x".join(map(str, config.data.crop)) or "none",
      "image size": "x".join(map(str, config.data.size)),
      "training cases": len(train.name),
      "test cases": len(test.name),
      report.TEST_DIGEST: _digest(test),
      **_run_facts(trained, used),
      "bank in use at the end": bank,
      "features of realism": extractor.words if extractor else "none",
      "absent structures": definitions.empty,
      "equity scaling": definitions.equity,
      "config sha256": configs.config_hash(config),
    },
    definitions=definitions,
    domain=domain,
    **results.about_run(config, layout),
  )


def evaluate_elsewhere(
  trained: Trained,
  data: str | Path,
  directory: str | Path | None = None,
  evaluation: ConfigDict | None = None,
) -> dict:
  """Evaluates a run on other data than its own, by the groups found there.

  Its test cases, or, where there are none, its training cases: the run has
  seen neither.

  Args:
    trained: the run.
    data: another prepared directory, of any size of images.
    directory: where the report goes; None for the run's place for such.
    evaluation: as `config.evaluation`; None for the run's own.

  Returns:
    What `summary.json` holds; on hosts other than the first, {}.

  Raises:
    FileNotFoundError: `data` is not prepared.
    ValueError: it is the run's own, shows other structures, or lacks the
      attribute; the run has no segmenter, or definitions are unknown.
  """
  config, layout = trained.config, trained.layout
  evaluation = evaluation or config.evaluation
  definitions = definitions_of(evaluation)
  data = Path(data)
  found = digest(data)
  if found == trained.record.data:
    raise ValueError(
      f"{data} is the data that the run in {layout.workdir} was trained on;"
      " leave --data out to evaluate on its test cases"
    )
  split = "test" if num_cases(data, "test") else "train"
  cases = load(data, split)
  _require_alike(trained.domain, cases.domain, data)
  attribute = config.data.attribute
  try:
    names = groups.group_names(attribute, (), cases.vocabulary)
  except ValueError as error:
    raise ValueError(f"{data}: {error}") from error
  group = groups.group_codes(attribute, cases.attributes, (), cases.vocabulary)
  predictors, used, reason, notices = _predictors(
    trained, evaluation.batch_size
  )
  if not predictors:
    raise ValueError(f"{layout.workdir}: {reason}")
  predictions = {
    k: np.stack([*predict.segment(cases.image)])
    for k, predict in predictors.items()
  }
  if jax.process_index() != 0:
    return {}
  kind = {"test": "test", "train": "training"}[split]
  return report.write(
    directory or report_directory(layout, data),
    title=f"{layout.workdir.name} on other data",
    models=_measured(
      *(cases, group, names, predictions, definitions, trained.domain)
    ),
    notices=[
      f"External evaluation: these are the {len(cases.name)} {kind} cases of"
      f" {data} (sha256 {found[:12]}), by its own groups. The run was trained"
      f" on other data ({config.data.source}).",
      *notices,
    ],
    cases=_shown(cases, group, names, predictions),
    checkpoints=used,
    facts={
      "external data": str(data),
      "external data sha256": found,
      "external cases": f"{len(cases.name)}, its {kind} cases",
      "attribute": attribute,
      report.TEST_DIGEST: _digest(cases),
      "trained on": config.data.source,
      **_run_facts(trained, used),
      "absent structures": definitions.empty,
      "equity scaling": definitions.equity,
      "config sha256": configs.config_hash(config),
    },
    definitions=definitions,
    domain=trained.domain,
    **results.about_run(config, layout)
    | {"made_up": is_made_up(data), "baseline_log": None},
  )


def _require_alike(own: Domain, other: Domain, data: Path) -> None:
  """Raises ValueError unless masks and images show the same."""

  def told(of: Domain) -> str:
    nested = (
      f"{s.name} within {s.within}" if s.within else s.name
      for s in of.structures
    )
    return f"{', '.join(nested)} in {of.channels} channels"

  if told(own) != told(other):
    raise ValueError(
      f"{data} shows {told(other)}, but the run was trained on {told(own)};"
      " prepare it with the domain of the run"
    )


def _predictors(
  trained: Trained, batch_size: int
) -> tuple[dict[str, Predictor], dict[str, dict[str, Any]], str, list[str]]:
  """The run's segmenter, and its baseline's, by name; why there is none.

  Returns:
    Them; their checkpoints, that of the run also where there is no segmenter; a
    clause that says why there is none; and sentences: that one stopped early,
    why the baseline is left out.
  """
  config, tasks = trained.config, trained.setup.objective.tasks
  generates = {*makers(config)} <= tasks.keys()
  subject = "FairDiff, joint" if generates else "Segmenter"
  used = {subject: trained.checkpoint()}
  if "segmenter" not in tasks:
    return (
      {},
      used,
      "the run trains no segmenter (train.segmenter is empty)",
      [],
    )
  if trained.step <= learning_steps(config, "segmenter")[0]:
    reason = f"at step {trained.step} the segmenter has not learned yet"
    return {}, used, reason, []
  found = {subject: Predictor(trained, batch_size)}
  notices = _early(subject, trained)
  if trained.layout.baseline.checkpoints.exists():
    try:
      baseline = trained.baseline()
      found[BASELINE] = Predictor(baseline, batch_size)
      used[BASELINE] = baseline.checkpoint()
      notices += _early(BASELINE, baseline)
    except (OSError, ValueError) as error:
      notices.append(f"The baseline is left out: {error}.")
  return found, used, "", notices


def _segmenter(
  predictors: Mapping[str, Predictor],
) -> features.Extractor | None:
  """The baseline's segmenter, or the run's own, as one that sees images."""
  for name in (BASELINE, *predictors):
    if name in predictors:
      words = f"the segmenter of {name}"
      see = predictors[name].features
      return features.Extractor(features.SEGMENTER, words, see)
  return None


def _early(model: str, trained: Trained) -> list[str]:
  """A sentence if a run stopped early."""
  if not trained.stopped_early:
    return []
  evaluation, steps = trained.config.evaluation, trained.config.train.steps
  return [
    f"{model} stopped early, after step {trained.last} of {steps}:"
    f" {evaluation.patience} validations without a better one"
    " (evaluation.patience)."
  ]


def _shown(
  cases: Cases,
  group: np.ndarray,
  names: Sequence[str],
  predictions: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
  """The cases as a report shows them."""
  shown = {
    "image": cases.image,
    "label": cases.mask,
    "group": np.array([*names, segmentation.UNKNOWN])[group],
  }
  if predictions:
    shown["prediction"] = next(iter(predictions.values()))
  return shown


def _measured(
  cases: Cases,
  group: np.ndarray,
  names: Sequence[str],
  predictions: Mapping[str, np.ndarray],
  definitions: Definitions,
  domain: Domain,
) -> dict[str, segmentation.Columns]:
  return {
    model: segmentation.per_case(
      *(cases.mask, prediction, cases.name, group, names),
      *(definitions.empty, domain, cases.patient),
    )
    for model, prediction in predictions.items()
  }


def _run_facts(
  trained: Trained, used: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
  """How the run was trained, and which checkpoints are used."""
  config = trained.config
  return {
    "steps": trained.step,
    **{f"checkpoint of {model}": told(of) for model, of in used.items()},
    **{
      f"changed at step {change['step']}": "; ".join(
        f"{name}: {old} before, {new} then"
        for name, (old, new) in change["fields"].items()
      )
      for change in trained.record.changes
    },
    "fairness method": config.fairness.method,
    "data strategy": config.fairness.strategy,
    "seed": config.seed,
  }


def _digest(cases: Cases) -> str:
  """SHA-256 of the cases' names, images and masks."""
  digest = hashlib.sha256("\n".join(cases.name).encode())
  for pixels in (cases.image, cases.mask):
    digest.update(np.ascontiguousarray(pixels))
  return digest.hexdigest()


def _read_bank(
  config: ConfigDict, layout: Layout, step: int, names: Sequence[str]
) -> tuple[str, dict[str, dict[str, int]], list[str]]:
  """The bank that the step before `step` used.

  Returns:
    Its name or 'none', its cases as group -> {'real': 0, 'synthetic': n}, and
    what is wrong with it, a sentence.
  """
  counts = {name: {"real": 0, "synthetic": 0} for name in names}
  filled = bank_step(config, step - 1)
  if filled is None or not layout.filled_banks:
    return "none", counts, []
  directory = layout.bank(filled)
  try:
    domain = domains.of(config.data.domain, config.data.source)
    group = read_bank(directory, config.data.size, len(names), domain).group
  except (OSError, ValueError) as error:
    notice = f"Synthetic training cases are not counted: {error}."
    return directory.name, counts, [notice]
  for g, name in enumerate(names):
    counts[name]["synthetic"] = int((group == g).sum())
  return directory.name, counts, []
