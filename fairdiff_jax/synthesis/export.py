"""Labelled synthetic patients as files of Harvard-FairSeg's current release.

The directory can be prepared and trained on like any other. Every file says
that it is synthetic and how many clouds were drawn for it, and the manifest
says what it was made from, and its SHA-256. A chunk of `bank.batch_size` cases
is made whole, so that an export that was stopped goes on to the very same files
(on devices of the same kind and number). What is there is kept if it is what
was written, and else named: nothing is overwritten.
"""

import contextlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from fairdiff_jax import config as configs
from fairdiff_jax import files
from fairdiff_jax.data import npz
from fairdiff_jax.data.attributes import attributes_of, group_code
from fairdiff_jax.synthesis.generate import make_generator
from fairdiff_jax.training.checkpoint import fingerprint, restore_inference
from fairdiff_jax.training.setup import setup

REQUEST, MANIFEST = "request.json", "manifest.jsonl"
AGAIN = "move it away, and the same command makes it anew"
SHOWN = 8  # cases of a group on the contact sheet
TILE = 160  # least side of a case there, in pixels
DISC, CUP = (0, 159, 230), (233, 180, 86)  # colours, BGR


def export(
  workdir: str | Path, out: str | Path, counts: Sequence[str], *, seed: int = 0
) -> None:
  """Writes synthetic cases from a run's newest checkpoint.

  `data_00001.npz` and on, groups in the order of their codes, then
  `data_summary.csv`, `manifest.jsonl` and `contact_sheet.png`. The same call
  goes on where it was stopped.

  Args:
    workdir: the run's directory.
    out: where to write; new, empty, or of the same request.
    counts: cases of each group, such as ['Asian=64', 'Black=64'].
    seed: of all noise.

  Raises:
    FileNotFoundError: no such run, or it has no checkpoint.
    FileExistsError: `out` holds something else.
    ValueError: bad counts, a run without generators, a mask that could not be
      drawn, or a file in `out` that is not what was written there.
  """
  out = Path(out)
  config = configs.load(workdir)
  attribute = config.data.attribute
  wanted = parse_counts(counts, attribute, config.data.pooled)
  run = setup(config)
  if not {"points", "image"} <= run.objective.tasks.keys():
    raise ValueError(
      f"the run in {workdir} has no generators: it trains"
      f" {', '.join(run.objective.tasks)} alone. Sample from a run whose"
      " train.points and train.image are not empty"
    )
  step, inference = restore_inference(workdir, run.objective, run.abstract)
  names = run.objective.group_names
  request = {
    "attribute": attribute,
    "counts": {names[code]: count for code, count in wanted.items()},
    "seed": seed,
    "checkpoint_step": step,
    "checkpoint_sha256": fingerprint(inference),
    "config_sha256": configs.config_hash(config),
  }
  _check_directory(out, request)
  group = np.repeat(
    np.array(list(wanted), np.int32), np.array(list(wanted.values()))
  )
  paths = [out / f"data_{i:05d}.npz" for i in range(1, len(group) + 1)]
  size = config.bank.batch_size
  lines = _read_manifest(out, paths)
  missing = [
    chunk
    for chunk in (slice(i, i + size) for i in range(0, len(group), size))
    if not lines.keys() >= {path.name for path in paths[chunk]}
  ]
  if jax.process_count() > 1:  # all have looked before one writes
    multihost_utils.sync_global_devices("export")
  first_host = jax.process_index() == 0
  if first_host:
    out.mkdir(parents=True, exist_ok=True)
    files.sweep(out)
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
        codes = attributes_of(attribute, name, config.data.pooled)
        with _made_beside(path) as made:
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
    rows = [
      {
        "filename": path.name,
        **attributes_of(attribute, names[code], config.data.pooled),
        "use": "training",
        "synthetic": 1,
      }
      for path, code in zip(paths, group, strict=True)
    ]
    with _made_beside(out / npz.SUMMARY) as made:
      npz.write_summary(made.parent, rows)
    sheet = out / "contact_sheet.png"
    if not sheet.exists():
      groups = {
        f"{names[code]}, seed {seed}, step {step}": [
          npz.read_case(paths[i])[:2] for i in number[group == code][:SHOWN]
        ]
        for code in wanted
      }
      files.write(sheet, _contact_sheet(groups))


def parse_counts(
  counts: Sequence[str], attribute: str, pooled: Sequence[str] = ()
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
    code = group_code(attribute, name, pooled)
    if code in wanted:
      raise ValueError(f"counts name {name} twice; add the two up")
    if count < 1:
      raise ValueError(
        f"counts ask for {count} cases of {name}; give at least 1, or leave"
        " the group out"
      )
    wanted[code] = count
  return dict(sorted(wanted.items()))


def _check_directory(out: Path, request: dict[str, Any]) -> None:
  """Raises FileExistsError if `out` holds anything but this request's files."""
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
        f"{out} holds cases of another request: {', '.join(differing)};"
        f" {remedy}"
      )
  elif not out.is_dir() or any(out.iterdir()):
    raise FileExistsError(
      f"{out} is in use and was not made by an export (it has no {REQUEST});"
      f" {remedy}"
    )


def _read_manifest(
  out: Path, paths: Iterable[Path]
) -> dict[str, dict[str, Any]]:
  """Lines of the manifest, by name, of the files that are there as written.

  Raises:
    ValueError: a file is there and is another than was written.
  """
  manifest = out / MANIFEST
  stored = files.read_json_lines(manifest) if manifest.exists() else []
  by_name = {line.get("file"): line for line in stored if "sha256" in line}
  lines = {path.name: by_name.get(path.name) for path in paths if path.exists()}
  for name, line in lines.items():
    if line and files.sha256(out / name) != line["sha256"]:
      raise ValueError(
        f"{out / name} is not the file that was written there: its SHA-256 is"
        f" not that of {manifest}; {AGAIN}"
      )
  return {name: line for name, line in lines.items() if line}


@contextlib.contextmanager
def _made_beside(path: Path) -> Iterator[Path]:
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


def _contact_sheet(
  groups: dict[str, Sequence[tuple[np.ndarray, np.ndarray]]],
) -> bytes:
  """Draws (image, mask) pairs by title as PNG, plain over with contours."""
  sheet = []
  for title, cases in groups.items():
    columns = [
      np.concatenate(_enlarge(image, mask), axis=0) for image, mask in cases
    ]
    blank = np.full_like(columns[0], 255)
    columns += [blank] * (SHOWN - len(columns))
    row = np.concatenate(columns, axis=1)
    strip = np.full((28, row.shape[1], 3), 255, np.uint8)
    cv2.putText(
      strip,
      f"Synthetic: {title}",
      (6, 20),
      cv2.FONT_HERSHEY_SIMPLEX,
      0.55,
      (0, 0, 0),
      1,
      cv2.LINE_AA,
    )
    sheet += [strip, row]
  return cv2.imencode(".png", np.concatenate(sheet, axis=0))[1].tobytes()


def _enlarge(
  image: np.ndarray, mask: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """A case at the sheet's size, BGR: plain, and with its contours."""
  scale = max(1, -(-TILE // max(image.shape)))
  size = (scale * image.shape[1], scale * image.shape[0])
  plain = cv2.resize(image, size, interpolation=cv2.INTER_CUBIC)
  plain = cv2.copyMakeBorder(plain, 2, 2, 2, 2, cv2.BORDER_CONSTANT, value=255)
  plain = cv2.cvtColor(plain, cv2.COLOR_GRAY2BGR)
  drawn = plain.copy()
  for least, colour in ((1, DISC), (2, CUP)):
    region = cv2.resize((mask >= least).astype(np.float32), size) > 0.5
    contours, _ = cv2.findContours(
      region.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE
    )
    cv2.drawContours(drawn, contours, -1, colour, 1, cv2.LINE_AA, offset=(2, 2))
  return plain, drawn
