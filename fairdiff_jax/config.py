"""The config: its defaults, whether it can run, and what a run keeps of it.

`defaults()` has every field (they stand in `fields.py`); the recipes in
`configs/` change what they need.
`check` looks at all of a config before anything runs. A run's directory holds
the config that it was started with, and what was changed on the way.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from fairdiff_jax import files
from fairdiff_jax.fields import BY_NAME, FIELDS, Field, flatten
from fairdiff_jax.layout import Layout

VERSION = 2  # of config.json's form; 1 held the config alone

# Fields that may change when a run goes on: they do not alter its result.
HARMLESS = ("checkpoint", "log", "parallel", "evaluation", "baseline")
DECISIVE = ("evaluation.patience",)  # among those, it does
# Paths: what lies there is compared, not where. And what the data decide.
NOT_COMPARED = (
  "data.source",
  "data.directory",
  "data.split",
  "data.domain",
  "data.words",
  "data.pooled",
  "data.allow_synthetic",
  "image.weights",
  "segmenter.weights",
)
SPANS = ("points", "image", "segmenter")


def all_fields() -> dict[str, Field]:
  """Every field by name, such as 'train.steps'."""
  return dict(BY_NAME)


def defaults() -> ConfigDict:
  """Every field with its default; the networks' are the published ones."""
  return _build({})


def _build(given: Mapping[str, Any]) -> ConfigDict:
  """A config of the values given by name, and of defaults."""

  def build(node, prefix=""):
    return {
      key: build(value, f"{prefix}{key}.")
      if isinstance(value, dict)
      else _as_tuples(given.get(prefix + key, value.default))
      for key, value in node.items()
    }

  return ConfigDict(build(FIELDS))


def _as_tuples(value: Any) -> Any:
  """JSON's lists as the tuples that they were."""
  return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def span(config: ConfigDict, network: str) -> tuple[int, int]:
  """The steps (from, to) in which a network learns; see `train`'s fields."""
  start, stop = config.train[network]
  if isinstance(start, float) or isinstance(stop, float):
    return round(start * config.train.steps), round(stop * config.train.steps)
  return start, stop


def check(config: ConfigDict, num_devices: int | None = None) -> None:
  """Looks at all of a config.

  Args:
    config: what shall run.
    num_devices: devices that it shall run on; None if not known yet.

  Raises:
    ValueError: it cannot run; the message has a line for every fault.
  """
  faults = _faults(config)
  if not faults:  # what fields mean together is only asked of sound ones
    faults = [*_contradictions(config, num_devices)]
  if faults:
    raise ValueError(_list("the config cannot run:", faults))


def _faults(config) -> list[str]:
  """What is wrong with single fields."""
  values = dict(flatten(config.to_dict()))
  return [
    *(f"{n} is no field of a config" for n in values if n not in BY_NAME),
    *(f"{n} is missing" for n in BY_NAME if n not in values),
    *(
      f"{name} must be {field.allowed}, got {values[name]!r}"
      for name, field in BY_NAME.items()
      if name in values and not field.holds(values[name])
    ),
  ]


def _list(title: str, lines: Sequence[str], end: str = "") -> str:
  """One line alone, several as a list."""
  if len(lines) == 1 and not end:
    return lines[0]
  return "\n".join(
    [title, *(f"  {line}" for line in lines), *filter(None, [end])]
  )


def _contradictions(config, num_devices) -> Iterator[str]:
  """What no single field shows."""
  train, image, segmenter = config.train, config.image, config.segmenter
  spans = {name: span(config, name) for name in SPANS}
  for name, (_, stop) in spans.items():
    if stop > train.steps:
      yield (
        f"train.{name}={tuple(train[name])} goes beyond train.steps="
        f"{train.steps}; give it as shares of train.steps, such as (0.5, 1.0)"
      )
  last = max(stop for _, stop in spans.values())
  if last < train.steps:
    yield (
      f"nothing learns after step {last} of train.steps={train.steps}; set"
      " train.steps, or train.points, train.image and train.segmenter"
    )
  learns = {name for name, (start, stop) in spans.items() if start < stop}
  if "image" in learns:
    yield from _image_contradictions(config)
  if segmenter.weights and segmenter.network == "small_unet":
    yield (
      f"segmenter.weights={segmenter.weights!r} is read by no small_unet; set"
      " segmenter.network to 'samed' or 'transunet', or leave it out"
    )
  if image.weights and image.network != "stable_diffusion":
    yield (
      f"image.weights={image.weights!r} is read by no unet; set image.network"
      " to 'stable_diffusion', or leave it out"
    )
  if config.data.pooled and not config.data.min_cases:
    yield "data.pooled is found when the run starts; set data.min_cases"
  if image.cache_latents and image.network != "stable_diffusion":
    yield (
      "image.cache_latents=True is for image.network='stable_diffusion', not"
      f" {image.network!r}, which has no latents; set it to False"
    )
  evaluation = config.evaluation
  if evaluation.patience and not evaluation.every:
    yield (
      f"evaluation.patience={evaluation.patience} counts validations, and there"
      " are none; set evaluation.every too"
    )
  if evaluation.features != "segmenter" and not evaluation.features_weights:
    yield (
      f"evaluation.features={evaluation.features!r} is a published network;"
      " name the file of its weights in evaluation.features_weights"
    )
  if evaluation.features == "segmenter" and evaluation.features_weights:
    yield (
      f"evaluation.features_weights={evaluation.features_weights!r} is read by"
      " no 'segmenter'; set evaluation.features to the network whose they are,"
      " or leave it out"
    )
  parallel = config.parallel
  if parallel.compile == "pmap" and parallel.fsdp != 1:
    yield "parallel.compile='pmap' replicates; set parallel.fsdp=1"
  if num_devices is None:
    return
  if num_devices % parallel.fsdp:
    yield (
      f"parallel.fsdp={parallel.fsdp} does not divide the {num_devices} devices"
      " at hand"
    )
  for field, users in (
    ("generation_batch", {"points", "image"}),
    ("segmentation_batch", {"segmenter"}),
  ):
    if users & learns and train[field] % num_devices:
      yield (
        f"train.{field}={train[field]} cannot be split over {num_devices}"
        " devices; choose a multiple"
      )


def _image_contradictions(config) -> Iterator[str]:
  image = config.image
  if image.sample_steps > image.num_steps:
    yield (
      f"image.sample_steps={image.sample_steps} is not in 1 to"
      f" image.num_steps={image.num_steps}"
    )
  if image.network != "unet":
    return
  if len(image.attention) != len(image.channels):
    yield (
      f"image.attention={tuple(image.attention)} needs one value for each of"
      f" the {len(image.channels)} levels of image.channels"
    )
  factor = image.patch * 2 ** (len(image.channels) - 1)
  if any(side % factor for side in config.data.size):
    yield (
      f"data.size={tuple(config.data.size)} must be multiples of {factor}:"
      " image.patch, doubled for every level of image.channels but one"
    )


def to_json(config: ConfigDict) -> str:
  """The config as JSON, keys sorted; tuples become lists."""
  return json.dumps(config.to_dict(), indent=2, sort_keys=True)


def compared(config: ConfigDict) -> dict[str, Any]:
  """The fields that a run's result depends on, by name, in JSON's types."""
  values = dict(flatten(json.loads(to_json(config))))
  values |= {f"train.{name}": [*span(config, name)] for name in SPANS}
  return {
    name: value
    for name, value in values.items()
    if name in DECISIVE
    or (name.split(".")[0] not in HARMLESS and name not in NOT_COMPARED)
  }


def config_hash(config: ConfigDict) -> str:
  """SHA-256 of what `compared` returns."""
  text = json.dumps(compared(config), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def differences(
  old: Mapping[str, Any], new: Mapping[str, Any]
) -> dict[str, list[Any]]:
  """Fields of two configs, as `compared` returns them, that differ.

  Returns:
    name -> [before, now], names in order; what only one of them has is left
    out.
  """
  return {
    name: [old[name], new[name]]
    for name in sorted(old.keys() & new.keys())
    if old[name] != new[name]
  }


class Record(NamedTuple):
  """What a run's directory says of its config.

  Attributes:
    config: the config, locked.
    data: digest of the prepared data; '' where it is not known.
    changes: what was changed on the way, each {'step', 'fields': {name:
      [before, now]}}.
    started: whether it was trained with; until then it may still change.
  """

  config: ConfigDict
  data: str = ""
  changes: tuple[dict[str, Any], ...] = ()
  started: bool = True


def load_record(workdir: str | Path) -> Record:
  """Reads what an existing run says of its config.

  Fields that are younger than the run have their defaults.

  Raises:
    FileNotFoundError: if `workdir` holds no run.
    ValueError: if its config.json is damaged.
  """
  path = Layout(workdir).config
  if not path.exists():
    raise FileNotFoundError(
      f"{path} does not exist: {workdir} is not the work directory of a run;"
      " train first, or correct --workdir"
    )
  remedy = "restore it, or remove it and give --config"
  stored = files.read_json(path, remedy)
  if "version" not in stored:
    stored = {"config": stored}
  try:
    given = dict(flatten(stored["config"]))
    if isinstance(given.get("data.augment"), bool):  # before it had names
      given["data.augment"] = "light" if given["data.augment"] else "none"
    record = Record(
      _build(given).lock(),
      stored.get("data", ""),
      (*stored.get("changes", ()),),
      stored.get("started", True),
    )
  except (KeyError, TypeError, AttributeError, ValueError) as error:
    raise ValueError(f"{path} is damaged ({error!r}); {remedy}") from error
  faults = _faults(record.config)
  if faults:
    raise ValueError(f"{path} is damaged ({'; '.join(faults)}); {remedy}")
  return record


def load(workdir: str | Path) -> ConfigDict:
  """The config of an existing run; raises as `load_record`."""
  return load_record(workdir).config


def _compared_of(record: Record) -> dict[str, Any]:
  data = {"prepared data": record.data} if record.data else {}
  return compared(record.config) | data


def claim(
  workdir: str | Path,
  config: ConfigDict,
  *,
  data: str = "",
  step: int = 0,
  trained_with: Mapping[str, Any] | None = None,
  proceed: bool = False,
  write: bool = True,
) -> tuple[dict[str, Any], tuple[dict[str, Any], ...]]:
  """Makes `workdir` the work directory of `config`, or checks that it is.

  Args:
    workdir: the run's directory; made if need be.
    config: the run's config.
    data: digest of the prepared data; '' for any.
    step: the step that the run goes on from.
    trained_with: as this returned it to the process that saved that step.
    proceed: whether the run may go on differently from then on, which is
      recorded.
    write: whether this process writes (the first host does).

  Returns:
    What the run is trained with, to be kept with its checkpoints, and its
    record's `changes`.

  Raises:
    ValueError: if the directory belongs to a run of another config or data and
      may not proceed.
  """
  record = _find_started(workdir)
  asked = _compared_of(Record(config, data))
  changed, changes = {}, ()
  if record:
    changed, changes = differences(_compared_of(record), asked), record.changes
  if trained_with and not changed and not changes:
    changed = differences(trained_with, asked)
  if changed and not proceed:
    raise ValueError(_refusal(workdir, changed))
  if changed:
    changes = (*changes, {"step": step, "fields": changed})
  if write:
    data = data or (record.data if record else "")
    _write(workdir, Record(config, data, changes))
  return asked, changes


def plan(workdir: str | Path, config: ConfigDict) -> None:
  """Makes `config` what a run in `workdir` will start with.

  Raises:
    ValueError: if the directory holds a run of another config.
  """
  if _find_started(workdir) is None:
    _write(workdir, Record(config, started=False))
  else:
    require(workdir, config)


def _write(workdir, record: Record) -> None:
  stored = record._asdict() | {
    "version": VERSION,
    "config": json.loads(to_json(record.config)),
  }
  Path(workdir).mkdir(parents=True, exist_ok=True)
  text = json.dumps(stored, indent=2, sort_keys=True)
  files.write(Layout(workdir).config, text + "\n")


def find_record(workdir: str | Path) -> Record | None:
  """As `load_record`; None where there is no run."""
  return load_record(workdir) if Layout(workdir).config.exists() else None


def _find_started(workdir: str | Path) -> Record | None:
  """As `find_record`; None too for a run that is only planned."""
  record = find_record(workdir)
  return record if record and record.started else None


def require(workdir: str | Path, config: ConfigDict) -> None:
  """Raises ValueError if `workdir` holds a run of another config."""
  record = _find_started(workdir)
  if record:
    changed = differences(compared(record.config), compared(config))
    if changed:
      raise ValueError(_refusal(workdir, changed))


def _refusal(workdir, changed):
  return _list(
    f"{workdir} holds a run of another config:",
    [f"{k}: {old} before, {new} now" for k, (old, new) in changed.items()],
    "Change these fields back (without --config the run's own are taken), give"
    " another --workdir, or go on differently from the newest checkpoint with"
    " --continue",
  )


def data_directory(config: ConfigDict, workdir: str | Path) -> Path:
  """Where a run's prepared data lies."""
  return Path(config.data.directory or Layout(workdir).data)
