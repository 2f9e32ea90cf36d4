"""Labelled synthetic patients: npz files, or images with a table.

Of npz files' patients they are files of Harvard-FairSeg's current release; of a
table's they are PNG files, with `cases.csv` and `domain.json`. The directory
can be prepared and trained on like any other. Every file says that it is
synthetic and what it was made from, as does the manifest, with its SHA-256, and
a data card says what there is. No case starts from a real patient; what a gate
refuses is drawn again. A chunk of `bank.batch_size` cases
is made whole, so that an export that was stopped goes on to the very same files
(on devices of the same kind and number). What is there is kept if it is what
was written, and else named: nothing is overwritten.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
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
  group_code,
  vocabulary_of,
)
from fairdiff_jax.synthesis import card as cards
from fairdiff_jax.synthesis import draws
from fairdiff_jax.synthesis.draws import Gate
from fairdiff_jax.synthesis.making import (
  AGAIN,
  IMAGES,
  LABELS,
  Maker,
  made_beside,
  read_masks,
)
from fairdiff_jax.synthesis.sheet import SHOWN, contact_sheet
from fairdiff_jax.training.checkpoint import fingerprint
from fairdiff_jax.training.trained import Trained

REQUEST, MANIFEST = "request.json", table.MANIFEST
TABLE = "cases.csv"


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
  trained: Trained,
  out: str | Path,
  counts: Sequence[str] = (),
  *,
  seed: int = 0,
  ratios: Sequence[str] = (),
  masks: str | Path | None = None,
  group_name: str = "",
  gate: Gate | None = None,
  budget: int = draws.BUDGET,
) -> None:
  """Writes synthetic cases from a run's newest checkpoint.

  `data_00001.npz` and on, groups in the order of their codes, then
  `data_summary.csv` (of a table's patients `images/data_00001.png`,
  `masks/data_00001.png` and on, `domain.json`, then `cases.csv`),
  `manifest.jsonl`, `contact_sheet.png`, and the data card. The same call goes
  on where it was stopped. No case starts from a real patient.

  Args:
    trained: the run.
    out: where to write; new, empty, or of the same request.
    counts: cases of each group, such as ['Asian=64', 'Black=64'].
    seed: of all noise.
    ratios: ranges of areas' ratios, such as ['cup to disc=0.3:0.6'].
    masks: directory of label images, one for each case, in place of counts.
    group_name: the group of whom these are.
    gate: what every case must pass; what is refused is drawn again.
    budget: draws of a case.

  Raises:
    FileExistsError: `out` holds something else.
    FileNotFoundError: there are no such masks.
    ValueError: bad counts or ranges, a run without generators, cases that were
      refused until the budget was used up, or a file in `out` that is not what
      was written there.
  """
  out = Path(out)
  config = trained.config
  attribute = config.data.attribute
  words = vocabulary_of(config.data)
  given = None
  if masks is not None:
    if counts or ratios:
      raise ValueError(
        "with --masks give --group, and neither counts nor ratios"
      )
    if not group_name:
      raise ValueError("--masks needs --group: whose masks they are")
    require_networks(trained, "image")
    given = read_masks(trained, masks)
    counts = [f"{group_name}={len(given.name)}"]
  wanted = parse_counts(counts, attribute, config.data.pooled, words)
  if given is None:
    require_networks(trained, "points", "image")
  domain = trained.domain
  ranges = draws.parse_ratios(ratios, domain)
  step, inference = trained.step, trained.inference
  maker = Maker(trained, ranges, given)
  names = maker.names
  request = {
    "attribute": attribute,
    "counts": {names[code]: count for code, count in wanted.items()},
    "seed": seed,
    "checkpoint_step": step,
    "checkpoint_sha256": fingerprint(inference._asdict()),
    "config_sha256": configs.config_hash(config),
    "ratios": {name: list(ends) for name, ends in ranges.items()},
    "masks": dict(zip(given.name, given.sha256, strict=True)) if given else {},
    "gate": gate is not None,
  }
  require_request(out, request)
  group = np.repeat(
    np.array(list(wanted), np.int32), np.array(list(wanted.values()))
  )
  suffix = "png" if maker.as_table else "npz"
  paths = [
    maker.path(out, f"data_{i:05d}.{suffix}") for i in range(1, len(group) + 1)
  ]
  size = config.bank.batch_size
  lines = _read_manifest(out, paths)
  if maker.as_table:
    lines = {k: v for k, v in lines.items() if (out / LABELS / k).exists()}
  missing = [
    chunk
    for chunk in (slice(i, i + size) for i in range(0, len(group), size))
    if not lines.keys() >= {path.name for path in paths[chunk]}
  ]
  _wait()  # all have looked before one writes
  first_host = jax.process_index() == 0
  if first_host:
    folders = {out, *(path.parent for path in paths)}
    if maker.as_table:
      folders.add(out / LABELS)
    for directory in folders:
      directory.mkdir(parents=True, exist_ok=True)
      files.sweep(directory)
    if not (out / REQUEST).exists():
      files.write(out / REQUEST, json.dumps(request, indent=2) + "\n")
  facts = {k: v for k, v in request.items() if k not in ("counts", "masks")}
  facts |= {
    "model": trained.layout.workdir.name,
    "starts_from": "given masks" if given else "noise",
    "sampler": {
      "points": {"num_steps": config.points.num_steps},
      "image": {
        key: config.image[key]
        for key in ("sample_steps", "solver", "eta", "guidance")
      },
    },
  }
  number = np.arange(len(group))
  bar = tqdm(missing, desc="export", unit="batch", disable=not first_host)
  for chunk in bar:
    drawn = draws.draw_accepted(
      *(maker, seed, number[chunk], group[chunk]), gate=gate, budget=budget
    )
    if first_host:
      cases = drawn.cases
      for row, i in enumerate(number[chunk]):
        if paths[i].name in lines:
          continue
        line = {
          "synthetic": True,
          "group": names[group[i]],
          "number": int(i),
          "draw": int(drawn.draw[row]),
          "refused": drawn.refused[row],
          "attempts": int(cases.attempts[row]),
        } | facts
        if given:
          line |= {"mask": given.name[i], "mask_sha256": given.sha256[i]}
        line = {"file": paths[i].name, "sha256": ""} | line
        line["sha256"] = maker.write(
          out, line, cases.image[row], cases.mask[row]
        )
        lines[paths[i].name] = line
      known = [lines[path.name] for path in paths if path.name in lines]
      text = "".join(json.dumps(line) + "\n" for line in known)
      files.write(out / MANIFEST, text)
  _wait()
  card = _make_card(trained, maker, paths, group, request, gate)
  if first_host:
    refused = Counter(
      why
      for line in files.read_json_lines(out / MANIFEST)
      for why in line.get("refused", ())
    )
    card["gate"]["refused"] = dict(sorted(refused.items()))
    cards.check(card)
    text = json.dumps(card, indent=2, ensure_ascii=False) + "\n"
    for name, content in (
      (cards.CARD, text),
      (cards.TEXT, cards.to_text(card)),
    ):
      with made_beside(out / name) as made:
        files.write(made, content)
    _write_tables(out, maker, paths, [names[code] for code in group], words)
    sheet = out / "contact_sheet.png"
    if not sheet.exists():
      groups = {
        f"Synthetic: {names[code]}, seed {seed}, step {step}": [
          maker.read(paths[i]) for i in number[group == code][:SHOWN]
        ]
        for code in wanted
      }
      files.write(sheet, contact_sheet(groups, domain))


def _wait():
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("export")


def _make_card(
  trained: Trained,
  maker: Maker,
  paths: Sequence[Path],
  group: np.ndarray,
  request: Mapping[str, Any],
  gate: Gate | None,
) -> dict[str, Any]:
  """The data card of cases that were written, but for what was refused."""
  image, mask = map(np.stack, zip(*map(maker.read, paths), strict=True))
  measured = [draws.measure_ratios(m, maker.domain) for m in mask]
  ratios = {}
  for name in maker.domain.ratios:
    known = [row[name] for row in measured if row[name] is not None]
    if known:
      ratios[name] = {
        "mean": float(np.mean(known)),
        "least": min(known),
        "most": max(known),
      }
  figures = {"privacy": None, "agreement": None}
  if gate:
    figures = gate.measure(image, mask, group)
  source = trained.config.data.source
  return {
    "schema": cards.VERSION,
    "synthetic": True,
    "cases": len(paths),
    "groups": request["counts"],
    "attribute": request["attribute"],
    "ratios": ratios,
    "model": {
      "run": trained.layout.workdir.name,
      **{
        key: request[key]
        for key in ("checkpoint_step", "checkpoint_sha256", "config_sha256")
      },
    },
    "seed": request["seed"],
    "starts_from": "given masks" if request["masks"] else "noise",
    "gate": {"checked": gate is not None, "refused": {}},
    **figures,
    "licence": (
      "Made from phantoms: no patient's data has terms to hold."
      if source == "phantom"
      else "Made by a model that was trained on other people's data"
      f" ({Path(source).name or 'unnamed'}): its terms, and those of imported"
      " weights, hold for these cases as well, such as that they may be used"
      " for research alone."
    ),
  }


def _write_tables(
  out: Path,
  maker: Maker,
  paths: Sequence[Path],
  groups: Sequence[str],
  words: Vocabulary,
) -> None:
  """Writes what tells of the cases' attributes."""
  told = [maker.attributes(name) for name in groups]
  if maker.as_table:
    text = json.dumps(domains.to_json(maker.domain), indent=2) + "\n"
    files.write(out / domains.FILE, text)
    with made_beside(out / TABLE) as made:
      _write_table(made, paths, told, words)
    return
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
