"""What a run has learned, for others to use: weights, programs, a model card.

A directory, complete or absent:

    MODEL_CARD.md            data, groups, figures, how to use it, licences
    config.json              what it was trained with, less the paths
    segmenter/               `segmenter.stablehlo`, a program that holds its
                             weights; `parameters.safetensors`; of a SAMed also
                             `lora.safetensors`, tensors by SAMed's own names
    points/                  `parameters.safetensors` of the mask generator
    image/                   the image generator: folders that diffusers reads,
                             or `parameters.safetensors`
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax import export

from fairdiff_jax import __version__, files
from fairdiff_jax.data import domain as domains
from fairdiff_jax.evaluation import report
from fairdiff_jax.objectives import latent_space
from fairdiff_jax.objectives.task import Variables
from fairdiff_jax.pretrained import fairdiff, importing, stable_diffusion
from fairdiff_jax.training.mesh import to_host
from fairdiff_jax.training.trained import Trained

CARD = "MODEL_CARD.md"
PROGRAM = "segmenter.stablehlo"
PARAMETERS = "parameters.safetensors"
PLATFORMS = ("cpu", "cuda", "tpu")  # that the program runs on
# Fields of a config that say where something lies.
PATHS = (
  *("source", "directory", "split", "domain", "weights"),
  "features_weights",
)


def write(trained: Trained, out: str | Path) -> None:
  """Writes what a run has learned.

  Args:
    trained: the run.
    out: a directory that does not exist yet.

  Raises:
    FileExistsError: it exists.
  """
  importing.require_new(out)
  Path(out).absolute().parent.mkdir(parents=True, exist_ok=True)
  writers = {
    "segmenter": _write_segmenter,
    "points": _write_parameters,
    "image": _write_image,
  }
  with files.new_directory(out) as directory:
    facts = {}
    for name, write_network in writers.items():
      if name not in trained.setup.objective.tasks:
        continue
      (directory / name).mkdir()
      variables = to_host(trained.inference.network(name))
      facts[name] = write_network(trained, variables, directory / name) or {}
    text = json.dumps(_shareable(trained.config.to_dict()), indent=2)
    files.write(directory / "config.json", text + "\n")
    files.write(directory / CARD, card(trained, facts))
    importing.require_new(out)  # which another process may have made since


def program(trained: Trained) -> export.Exported:
  """The segmenter with its weights: uint8 [n, H, W, C] -> logits.

  H, W and C are the run's `data.size` and channels, logits float32 [n, H, W,
  classes]; n is any number, or 1 where the network cannot leave it open.
  """
  task = trained.setup.objective.tasks["segmenter"]
  variables = to_host(trained.inference.network("segmenter"))

  @jax.jit
  def segmenter(image):
    return task.logits(variables, image.astype(jnp.float32) / 127.5 - 1)

  shape = (*trained.config.data.size, trained.domain.channels)

  def exported(number):
    image = jax.ShapeDtypeStruct((number, *shape), np.uint8)
    return export.export(segmenter, platforms=PLATFORMS)(image)

  try:
    return exported(*export.symbolic_shape("n"))
  except (NotImplementedError, TypeError, ValueError):
    return exported(1)  # an operation that asks for the number


def _write_parameters(
  trained: Trained, variables: Variables, folder: Path
) -> None:
  """All of a network's variables, by path."""
  del trained
  leaves = jax.tree_util.tree_leaves_with_path(variables)
  arrays = {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in leaves
  }
  _save(folder / PARAMETERS, arrays)


def _save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
  arrays = {k: np.ascontiguousarray(array) for k, array in arrays.items()}
  files.write(path, safetensors.numpy.save(arrays, {"format": "pt"}))


def _write_segmenter(
  trained: Trained, variables: Variables, folder: Path
) -> dict[str, Any]:
  _write_parameters(trained, variables, folder)
  exported = program(trained)
  files.write(folder / PROGRAM, bytes(exported.serialize()))
  if trained.config.segmenter.network == "samed":
    learnt = {
      "params": variables.params | variables.frozen["params"],
      "constants": variables.frozen["constants"],
    }
    _save(folder / "lora.safetensors", fairdiff.save_samed_lora(learnt))
  (image,), (logits,) = exported.in_avals, exported.out_avals
  return {"image": image.shape, "logits": logits.shape}


def _write_image(trained: Trained, variables: Variables, folder: Path) -> None:
  config = trained.config.image
  if config.network != "stable_diffusion":
    _write_parameters(trained, variables, folder)
    return
  unet, controlnet = latent_space.make_networks(config)
  params, frozen = variables.params, variables.frozen
  autoencoder = latent_space.make_autoencoder(config).clone(
    scaling_factor=float(frozen["scaling_factor"])
  )
  stable_diffusion.save(
    folder,
    unet=(unet, {"params": params["unet"] | frozen["unet"]}),
    controlnet=(controlnet, {"params": params["controlnet"]}),
    autoencoder=(autoencoder, {"params": frozen["autoencoder"]}),
  )
  _save(folder / stable_diffusion.PROMPTS, frozen["prompts"])
  scheduler = files.find(config.weights) / stable_diffusion.SCHEDULER
  if scheduler.exists():
    place = folder / stable_diffusion.SCHEDULER
    place.parent.mkdir()
    files.write(place, scheduler.read_bytes())


def _shareable(tree: Mapping[str, Any]) -> dict[str, Any]:
  """A config whose paths do not tell where things lay."""

  def of(key, value):
    if isinstance(value, Mapping):
      return _shareable(value)
    if key in PATHS and not str(value).lstrip().startswith("{"):
      return Path(value).name if value else value
    return value

  return {key: of(key, value) for key, value in tree.items()}


def card(trained: Trained, facts: Mapping[str, Mapping[str, Any]]) -> str:
  """The model card, Markdown.

  Args:
    trained: the run.
    facts: of the networks that are handed over.
  """
  config, domain = trained.config, trained.domain
  structures = ", ".join(domain.names)
  title = trained.layout.workdir.resolve().name
  names = {
    "segmenter": f"segments {structures} (`segmenter.network="
    f"{config.segmenter.network}`)",
    "points": "draws point clouds, which become masks",
    "image": f"draws an image of a mask (`image.network={config.image.network}`"
    ")",
  }
  parts = [
    f"# {title}",
    f"Trained with fairdiff_jax {__version__} for {trained.step} steps"
    f" (checkpoint: {trained}), to segment images of all groups of patients"
    " equally well. For research: it is no medical device.",
    "\n".join(f"* `{name}/` {names[name]}" for name in facts),
    "## Data",
    _data(trained),
    "## Figures",
    _figures(trained),
    "## Use",
    _use(trained, facts),
    "## Limits",
    "One run with one seed: another seed gives other figures. They hold for"
    " patients and devices like those of the test cases; evaluate it on yours"
    " first (`fairdiff evaluate --workdir RUN --data PREPARED`). Synthetic"
    " images are made up and show no patient, but networks may remember what"
    " they were trained on.",
    "## Licences",
    _licences(config, facts),
  ]
  return "\n\n".join(parts) + "\n"


def _data(trained: Trained) -> str:
  config = trained.config.data
  source = {"phantom": "made-up patients (phantoms)"}.get(
    config.source, f"`{Path(config.source).name}`"
  )
  size = " x ".join(map(str, config.size))
  lines = [
    f"{source[:1].upper()}{source[1:]}, images of {size} pixels and"
    f" {trained.domain.channels} channel(s); sha256 of the prepared cases:"
    f" `{trained.record.data or 'unknown'}`. Groups are those of"
    f" `{config.attribute}`: {', '.join(trained.setup.objective.group_names)}.",
  ]
  try:
    counts = report.read(trained.layout.workdir)["training_cases"]
  except (OSError, ValueError, KeyError):
    return lines[0]
  lines += [
    "",
    "| group | real training cases | synthetic ones |",
    "|---|---|---|",
    *(f"| {g} | {n['real']} | {n['synthetic']} |" for g, n in counts.items()),
  ]
  return "\n".join(lines)


def _figures(trained: Trained) -> str:
  """Dice by structure and group, of the run's own report."""
  try:
    summary = report.read(trained.layout.workdir)
  except (OSError, ValueError) as error:
    return f"None: {error}."
  models, groups = summary["models"], summary["groups"]
  if not models:
    return summary["verdict"]
  head = ["model", "structure", "all", *groups, "ES-Dice", "gap"]
  rows = ["", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
  for model, classes in models.items():
    for cls in trained.domain.reported:
      dice = classes[cls]["dice"]
      spread = dice["interval"]
      means = {g: dice["groups"][g]["mean"] for g in groups}
      cells = [
        *(model, cls, _cell(dice["overall"], spread["overall"])),
        *(_cell(mean, spread["groups"][g]) for g, mean in means.items()),
        _cell(dice["es"], spread["es"]),
        _cell(dice["gap"], spread["gap"]),
      ]
      rows.append(f"| {' | '.join(cells)} |")
  sizes = ", ".join(f"{n} {group}" for group, n in groups.items())
  told = summary["facts"].get("steps")
  late = "" if told == trained.step else f" They are of step {told}."
  first = (
    f"Dice x 100 with 95% intervals, on {summary['n']} test cases ({sizes})."
    f" {summary['verdict']}{late}"
  )
  return "\n".join([first, *rows])


def _cell(value: float | None, ends) -> str:
  if value is None:
    return "–"
  text = f"{100 * value:.1f}"
  if ends is None or None in ends:
    return text
  return f"{text} ({100 * ends[0]:.1f} to {100 * ends[1]:.1f})"


def _use(trained: Trained, facts: Mapping[str, Mapping[str, Any]]) -> str:
  parts = []
  if "segmenter" in facts:
    shapes = facts["segmenter"]
    classes = ["background", *trained.domain.names]
    named = ", ".join(f"{i} {name}" for i, name in enumerate(classes))
    parts.append(f"""\
The segmenter needs JAX alone (and the package flatbuffers):

```python
from pathlib import Path
from jax import export
data = Path("segmenter/{PROGRAM}").read_bytes()
segmenter = export.deserialize(bytearray(data))
logits = segmenter.call(images)
```

`images` are uint8 {_shape(shapes["image"])}, resized as the training images
were (crop: {tuple(trained.config.data.crop) or "none"}); `logits` are float32
{_shape(shapes["logits"])}. Classes: {named}; of structures that lie within
others a pixel has the innermost.""")
  if trained.config.segmenter.network == "samed" and "segmenter" in facts:
    parts.append(
      "`segmenter/lora.safetensors` has what SAMed learned by the names of its"
      " public code (`w_a_000`, `prompt_encoder.*`, `mask_decoder.*`), for"
      " `safetensors.torch.load_file`."
    )
  if trained.config.image.network == "stable_diffusion" and "image" in facts:
    parts.append(
      "`image/unet`, `image/controlnet` and `image/vae` are folders for"
      " diffusers' `from_pretrained`; `image/` itself is what"
      " `--config.image.weights` takes. `prompts.safetensors` has the prompts'"
      " embeddings."
    )
  parts.append(
    "All other weights are safetensors files by the paths of fairdiff_jax's"
    " modules, which `config.json` describes. Its masks hold classes, as"
    f" `{json.dumps(domains.to_json(trained.domain))}` says."
  )
  return "\n\n".join(parts)


def _shape(shape) -> str:
  return f"[{', '.join(map(str, shape))}]"


def _licences(config, facts: Mapping[str, Any]) -> str:
  """What whoever hands the weights on must keep to."""
  source = config.data.source
  lines = ["fairdiff_jax: Apache-2.0. Weights also inherit:", ""]
  if source == "phantom":
    lines.append("* data: made up by fairdiff_jax, Apache-2.0")
  elif domains.is_table(source):
    lines.append(
      "* data: your patients; whether weights may be shared is for consent,"
      " ethics board and owner to say"
    )
  else:
    lines.append(
      "* data: Harvard-FairSeg is CC BY-NC-ND 4.0: no commercial use, credit to"
      " its authors (Tian et al., ICLR 2024), and nothing derived from it may"
      " be shared unless they agree; if these are other files in its form, the"
      " licence is theirs"
    )
  if config.image.network == "stable_diffusion" and "image" in facts:
    lines.append(
      "* image generator: Stable Diffusion, CreativeML OpenRAIL-M, whose"
      " restrictions of use go with every derivative"
    )
  if config.segmenter.network == "samed" and "segmenter" in facts:
    lines.append("* segmenter: Segment Anything, Apache-2.0")
  if config.segmenter.network == "transunet" and "segmenter" in facts:
    lines.append(
      "* segmenter: Google's Vision Transformer, Apache-2.0, where it started"
      " from those weights"
    )
  return "\n".join(lines)
