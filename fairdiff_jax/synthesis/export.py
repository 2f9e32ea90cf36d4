"""Labelled synthetic patients: npz files, or images with a table.

Of npz files' patients they are files of Harvard-FairSeg's current release; of a
table's they are PNG files, with `cases.csv` and `domain.json`. The directory
can be prepared and trained on like any other. Every npz file says that it is
synthetic and how many clouds were drawn for it, as does the manifest, and what
each was made from, and its SHA-256. A chunk of `bank.batch_size` cases
is made whole, so that an export that was stopped goes on to the very same files
(on devices of the same kind and number). What is there is kept if it is what
was written, and else named: nothing is overwritten.
"""

import contextlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from fairdiff_jax import config as configs
from fairdiff_jax import files
from fairdiff_jax.data import domain as domains
from fairdiff_jax.data import npz, table
from fairdiff_jax.data.attributes import ATTRIBUTES
from fairdiff_jax.data.groups import (
  Vocabulary,
  attributes_of,
  group_code,
  vocabulary_of,
)
from fairdiff_jax.synthesis.generate import make_generator
from fairdiff_jax.synthesis.sheet import SHOWN, contact_sheet
from fairdiff_jax.training.checkpoint import fingerprint
from fairdiff_jax.training.trained import Trained

REQUEST, MANIFEST = "request.json", "manifest.jsonl"
AGAIN = "move it away, and the same command makes it anew"
TABLE, IMAGES, LABELS = "cases.csv", "images", "masks"


def require_networks(trained: Trained, *names: str) -> None:
  """Raises ValueError unless a run has some of the generators."""
  tasks = trained.setup.objective.tasks
  lacking = [f"train.{name}" for name in names if name not in tasks]
  if lacking:
    raise ValueError(
      f"the run in {trained.layout.workdir} has no generators for this: it"
      f" trains {', '.join(tasks)} alone. Take a run in which"
      f" {' and '.join(lacking)} are not empty"
    )


def export(
  trained: Trained, out: str | Path, counts: Sequence[str], *, seed: int = 0
) -> None:
  """Writes synthetic cases from a run's newest checkpoint.

  `data_00001.npz` and on, groups in the order of their codes, then
  `data_summary.csv` (of a table's patients `images/data_00001.png`,
  `masks/data_00001.png` and on, `domain.json`, then `cases.csv`),
  `manifest.jsonl` and `contact_sheet.png`. The same call goes on where it was
  stopped.

  Args:
    trained: the run.
    out: where to write; new, empty, or of the same request.
    counts: cases of each group, such as ['Asian=64', 'Black=64'].
    seed: of all noise.

  Raises:
    FileExistsError: `out` holds something else.
    ValueError: bad counts, a run without generators, a mask that could not be
      drawn, or a file in `out` that is not what was written there.
  """
  out = Path(out)
  config, run = trained.config, trained.setup
  attribute = config.data.attribute
  words = vocabulary_of(config.data)
  wanted = parse_counts(counts, attribute, config.data.pooled, words)
  require_networks(trained, "points", "image")
  step, inference = trained.step, trained.inference
  names = run.objective.group_names
  request = {
    "attribute": attribute,
    "counts": {names[code]: count for code, count in wanted.items()},
    "seed": seed,
    "checkpoint_step": step,
    "checkpoint_sha256": fingerprint(inference._asdict()),
    "config_sha256": configs.config_hash(config),
  }
  require_request(out, request)
  group = np.repeat(
    np.array(list(wanted), np.int32), np.array(list(wanted.values()))
  )
  domain = trained.domain
  as_table = domains.is_table(config.data.source)
  suffix = "png" if as_table else "npz"
  folder = out / IMAGES if as_table else out
  paths = [folder / f"data_{i:05d}.{suffix}" for i in range(1, len(group) + 1)]
  size = config.bank.batch_size
  lines = _read_manifest(out, paths)
  if as_table:
    lines = {k: v for k, v in lines.items() if (out / LABELS / k).exists()}
  missing = [
    chunk
    for chunk in (slice(i, i + size) for i in range(0, len(group), size))
    if not lines.keys() >= {path.name for path in paths[chunk]}
  ]
  if jax.process_count() > 1:  # all have looked before one writes
    multihost_utils.sync_global_devices("export")
  first_host = jax.process_index() == 0
  if first_host:
    for directory in (out, *((folder, out / LABELS) if as_table else ())):
      directory.mkdir(parents=True, exist_ok=True)
      files.sweep(directory)
    if not (out / REQUEST).exists():
      files.write(out / REQUEST, json.dumps(request, indent=2) + "\n")
  sampler = {
    "points": {"num_steps": config.points.num_steps},
    "image": {
      key: config.image[key]
      for key in ("sample_steps", "solver", "eta", "guidance")
    },
  }
  facts = {k: v for k, v in request.items() if k != "counts"}
  facts["sampler"] = sampler
  generate = make_generator(run) if missing else None
  number = np.arange(len(group))
  bar = tqdm(missing, desc="export", unit="batch", disable=not first_host)
  for chunk in bar:
    cases = generate(inference, seed, number[chunk], group[chunk])
    cases.require_sound()
    if first_host:
      for i, image, mask, attempts in zip(
        number[chunk], cases.image, cases.mask, cases.attempts, strict=True
      ):
        path, name = paths[i], names[group[i]]
        if path.name in lines:
          continue
        if as_table:
          label = out / LABELS / path.name
          for place, pixels in ((label, domain.label(mask)), (path, image)):
            with made_beside(place) as made:
              table.write_png(made, pixels)
        else:
          codes = attributes_of(attribute, name, config.data.pooled, words)
          codes = {k: v for k, v in codes.items() if k in ATTRIBUTES}
          with made_beside(path) as made:
            npz.write_case(
              made, image, mask, codes, synthetic=1, attempts=attempts
            )
        lines[path.name] = {
          "file": path.name,
          "sha256": files.sha256(path),
          "synthetic": True,
          "group": name,
          "number": int(i),
          "attempts": int(attempts),
        } | facts
      known = [lines[path.name] for path in paths if path.name in lines]
      text = "".join(json.dumps(line) + "\n" for line in known)
      files.write(out / MANIFEST, text)
  if first_host:
    told = [
      attributes_of(attribute, names[code], config.data.pooled, words)
      for code in group
    ]
    if as_table:
      files.write(
        out / domains.FILE, json.dumps(domains.to_json(domain), indent=2) + "\n"
      )
      with made_beside(out / TABLE) as made:
        _write_table(made, paths, told, words)
    else:
      rows = [
        {
          "filename": path.name,
          **{k: v for k, v in codes.items() if k in ATTRIBUTES},
          "use": "training",
          "synthetic": 1,
        }
        for path, codes in zip(paths, told, strict=True)
      ]
      with made_beside(out / npz.SUMMARY) as made:
        npz.write_summary(made.parent, rows)
    sheet = out / "contact_sheet.png"
    if not sheet.exists():

      def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
        if not as_table:
          return npz.read_case(path)[:2]
        masks = (out / LABELS / path.name,)
        row = table.Row(path.stem, path, masks, "train", {})
        return table.read_case(row, domain)[:2]

      groups = {
        f"Synthetic: {names[code]}, seed {seed}, step {step}": [
          read(paths[i]) for i in number[group == code][:SHOWN]
        ]
        for code in wanted
      }
      files.write(sheet, contact_sheet(groups, domain))


def parse_counts(
  counts: Sequence[str],
  attribute: str,
  pooled: Sequence[str] = (),
  vocabulary: Vocabulary = ATTRIBUTES,
) -> dict[int, int]:
  """Reads ['Asian=64', ...] as {code: cases}, in the order of codes.

  Raises:
    ValueError: not of that form, an unknown or repeated group, or less than
      one case.
  """
  if not counts:
    raise ValueError("counts ask for 0 cases; give some, such as Asian=64")
  wanted = {}
  for text in counts:
    name, _, number = (part.strip() for part in text.partition("="))
    try:
      count = int(number)
    except ValueError:
      raise ValueError(
        f"counts hold {text!r}, which is not GROUP=CASES, such as Asian=64"
      ) from None
    code = group_code(attribute, name, pooled, vocabulary)
    if code in wanted:
      raise ValueError(f"counts name {name} twice; add the two up")
    if count < 1:
      raise ValueError(
        f"counts ask for {count} cases of {name}; give at least 1, or leave"
        " the group out"
      )
    wanted[code] = count
  return dict(sorted(wanted.items()))


def require_request(out: Path, request: dict[str, Any]) -> None:
  """Raises FileExistsError if `out` holds anything but a request's files."""
  remedy = "name another directory (--out), or delete this one"
  if not out.exists():
    return
  if (out / REQUEST).is_file():
    stored = files.read_json(out / REQUEST, remedy)
    differing = [
      f"{key} {stored.get(key)} (now {value})"
      for key, value in request.items()
      if stored.get(key) != value
    ]
    if differing:
      raise FileExistsError(
        f"{out} holds files of another request: {', '.join(differing)};"
        f" {remedy}"
      )
  elif not out.is_dir() or any(out.iterdir()):
    raise FileExistsError(
      f"{out} is in use and was not made by this command (it has no {REQUEST});"
      f" {remedy}"
    )


def _read_manifest(
  out: Path, paths: Sequence[Path]
) -> dict[str, dict[str, Any]]:
  """Lines of the manifest, by name, of the files that are there as written.

  Raises:
    ValueError: a file is there and is another than was written.
  """
  manifest = out / MANIFEST
  stored = files.read_json_lines(manifest) if manifest.exists() else []
  by_name = {line.get("file"): line for line in stored if "sha256" in line}
  lines = {path.name: by_name.get(path.name) for path in paths if path.exists()}
  places = {path.name: path for path in paths}
  for name, line in lines.items():
    if line and files.sha256(places[name]) != line["sha256"]:
      raise ValueError(
        f"{places[name]} is not the file that was written there: its SHA-256 is"
        f" not that of {manifest}; {AGAIN}"
      )
  return {name: line for name, line in lines.items() if line}


@contextlib.contextmanager
def made_beside(path: Path) -> Iterator[Path]:
  """A path of the same name to write to, which then becomes `path`.

  Raises:
    ValueError: there is another file already.
  """
  with tempfile.TemporaryDirectory(
    prefix=files.LEFTOVER, dir=path.parent
  ) as directory:
    made = Path(directory) / path.name
    yield made
    if not path.exists():
      made.rename(path)
    elif files.sha256(made) != files.sha256(path):
      raise ValueError(f"{path} is not what this request makes here; {AGAIN}")


def _write_table(path, images, told, words):
  """Writes `cases.csv`; what is not known of a group is an empty cell.

  The bands of 'age:50,65' are words, in a column 'age band'.
  """
  names = [
    f"{part.partition(':')[0]} band" if ":" in part else part for part in words
  ]
  rows = [
    [
      f"{IMAGES}/{image.name}",
      f"{LABELS}/{image.name}",
      "training",
      *(words[p][codes[p]] if p in codes else "" for p in words),
      1,
    ]
    for image, codes in zip(images, told, strict=True)
  ]
  columns = ["image", "mask", "split", *names, "synthetic"]
  files.write_csv(path, columns, rows)
