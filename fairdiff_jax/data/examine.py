"""One case on its way from its file to prepared arrays, and what was found.

* Crop: `data.crop`, the centre of the native image that is resized. A case
  whose structures it misses is set aside.
* Image: area interpolation when shrinking, cubic when enlarging.
* Mask: nested area vote. A pixel is disc where at least half of its area is
  disc, and cup where more than half is cup. Rim is disc without cup: one
  thinner than a pixel keeps its area, where a vote of three classes drops it.
  So it is with any structures: those that lie within none as the disc, others
  as the cup.
* Points: sampled from the mask at its native size, then moved to the prepared
  size with r' = (r + 0.5) H / H0 - 0.5. A case whose points do not give its
  mask back (`contours.LEAST_DICE`) is set aside, or, where its source is not
  strict, has a cloud of zeros: it teaches image generator and segmenter, and
  the mask generator leaves it out. So it is with one that lacks a structure.
"""

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np

from fairdiff_jax.data import attributes, contours, groups
from fairdiff_jax.data import domain as domains
from fairdiff_jax.data.audit import mask_fault
from fairdiff_jax.data.cases import Case, Source
from fairdiff_jax.data.domain import FUNDUS, Domain
from fairdiff_jax.data.report import Report, named, plain
from fairdiff_jax.data.storage import case_digest, combine, told

MIN_SOLIDITY = 0.9  # of masks, as `bank.min_solidity` is by default


_WORST = 3  # cases whose round trip is listed


_MOST_WORDS = 30  # of an attribute whose words are counted


class Found(NamedTuple):
  """What reading one case has come to.

  Attributes:
    case: without its pixels.
    shape: of its pixels.
    record: to be written; {} where nothing is.
    digest: of the record.
    dice: see `contours.round_trip`; () without a cloud.
    absent: structures that the mask lacks.
    unlike: why its cloud does not stand for its mask, or None.
    fault: why the mask would be refused if it were made up, or None.
    cut: whether the crop cuts structures.
    part: the split that it belongs to.
    differing: attributes in which its source contradicts itself.
  """

  case: Case
  shape: tuple[int, ...]
  record: Mapping[str, Any]
  digest: bytes
  dice: tuple[float, ...]
  absent: tuple[str, ...]
  unlike: str | None
  fault: str | None
  cut: bool
  part: str = ""
  differing: Sequence[str] = ()


def examine(
  case: Case, name: str, settings: Mapping[str, Any], source: Source
) -> Found:
  """Crops, samples and resizes a case; without a size it is not resized.

  Args:
    case: at native size.
    name: of it.
    settings: crop, size and num_points; without num_points clouds are whole
      contours.
    source: whose domain, vocabulary and strictness are meant.

  Raises:
    ValueError: it cannot be used.
  """
  domain, vocabulary, strict = source.domain, source.vocabulary, source.strict
  parents, number = domain.parents, settings.get("num_points")
  shape, whole = case.image.shape[:2], np.count_nonzero(case.mask)
  case = _crop(case, settings.get("crop", ()), domain, strict)
  mask = case.mask
  absent = tuple(k for k, of in domain.split(mask).items() if not of.any())
  points, dice, unlike = np.zeros((number or 0, 3), np.float32), (), None
  if strict or not absent:
    points = contours.mask_to_points(mask, number, parents)
    dice = contours.round_trip(mask, points, parents)
    unlike = contours.round_trip_fault(
      mask, points, dice, parents, domain.names
    )
  if unlike and strict:
    raise ValueError(unlike)
  record, digest = {}, b""
  cut = np.count_nonzero(mask) < whole
  if "size" in settings:
    size = settings["size"]
    if unlike:
      points = np.zeros_like(points)
    elif not absent:
      points[:, :2] = (points[:, :2] + 0.5) * np.divide(size, mask.shape) - 0.5
    image, mask = resize(case.image, size), resize_mask(mask, size, domain)
    if strict:
      _require_shown(case.mask, mask, domain)
    codes = case.attributes
    values = told(vocabulary or attributes.ATTRIBUTES, codes)
    digest = case_digest(name, image, mask, points, values)
    record = {"name": name, "image": _png(image), "mask": _png(mask)}
    record["points"] = points
    if vocabulary:
      codes = {
        "codes": np.array([codes[a] for a in vocabulary], np.int32),
        "patient": case.patient,
      }
    record |= codes
  return Found(
    case=case._replace(image=None, mask=None),
    shape=shape,
    record=record,
    digest=digest,
    dice=dice,
    absent=absent,
    unlike=unlike,
    fault=mask_fault(mask, min_solidity=MIN_SOLIDITY, domain=domain),
    cut=cut,
  )


def _crop(
  case: Case, crop: Sequence[int], domain: Domain, strict: bool
) -> Case:
  """The centre [H, W] of a case; all of it for a crop ()."""
  if not crop:
    return case
  shape = case.image.shape[:2]
  if any(new > old for new, old in zip(crop, shape, strict=True)):
    raise ValueError(
      f"the image ({plain(shape)}) is smaller than the crop {plain(crop)}; "
      "choose a smaller crop."
    )
  centre = centre_of(shape, crop)
  # What lies within others is asked first.
  for name, region in reversed(domain.split(case.mask[centre]).items()):
    if strict and not region.any():
      raise ValueError(
        f"the crop {plain(crop)} of {plain(shape)} shows no {name}; choose a "
        "larger crop."
      )
  return case._replace(image=case.image[centre], mask=case.mask[centre])


def centre_of(shape: Sequence[int], crop: Sequence[int]) -> tuple[slice, slice]:
  """Where the centre `crop` (H, W) of an image lies; all of it for ()."""
  crop = crop or shape
  starts = (old // 2 - new // 2 for new, old in zip(crop, shape, strict=True))
  rows, columns = (slice(i, i + n) for i, n in zip(starts, crop, strict=True))
  return rows, columns


def resize(image: np.ndarray, size: Sequence[int]) -> np.ndarray:
  """An image [H, W] or [H, W, C] at another size (H, W), as it is prepared."""
  shrinking = all(
    new <= old for new, old in zip(size, image.shape[:2], strict=True)
  )
  method = cv2.INTER_AREA if shrinking else cv2.INTER_CUBIC
  return cv2.resize(image, (size[1], size[0]), interpolation=method)


def resize_mask(
  mask: np.ndarray, size: Sequence[int], domain: Domain = FUNDUS
) -> np.ndarray:
  """Resizes a mask [H0, W0] to [H, W] by nested area vote."""
  painted: dict[str, np.ndarray] = {}
  for structure, region in zip(
    domain.structures, domain.split(mask).values(), strict=True
  ):
    share = resize(region.astype(np.float32), size)
    if structure.within is None:
      painted[structure.name] = share >= 0.5
    else:
      painted[structure.name] = painted[structure.within] & (share > 0.5)
  return domain.paint(painted)


def _require_shown(
  native: np.ndarray, mask: np.ndarray, domain: Domain
) -> None:
  """Raises ValueError if a structure is lost where a mask is resized."""
  for name, region in reversed(domain.split(mask).items()):
    if not region.any():
      pixels = np.count_nonzero(domain.split(native)[name])
      raise ValueError(
        f"the {name} ({pixels} pixels of {plain(native.shape)}) is "
        f"lost at {plain(mask.shape)}; choose a larger size."
      )


def _png(pixels: np.ndarray) -> bytes:
  if pixels.ndim == 3:
    pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
  return cv2.imencode(".png", pixels)[1].tobytes()


def report_on(
  used: Mapping[str, Found],
  by_part: Mapping[str, Sequence[Found]],
  set_aside: list[tuple[str, str]],
  left_out: Mapping[str, int],
  settings: dict[str, Any],
  source: Source,
) -> Report:
  """What was found in cases, by name and by part, and in those not used."""
  domain, vocabulary = source.domain, source.vocabulary
  drawn = {name: f for name, f in used.items() if f.dice}
  measured = _measured(domain)
  dice = np.reshape([f.dice for f in drawn.values()], (-1, len(measured)))
  worst = [name for name in drawn if min(drawn[name].dice) < 1]
  worst = sorted(worst, key=lambda name: min(drawn[name].dice))[:_WORST]
  return Report(
    settings=settings,
    dialects=_counted(f.case.dialect for f in used.values()),
    sizes=_counted(plain(f.shape) for f in used.values()),
    counts={
      part: _groups(found, vocabulary) for part, found in by_part.items()
    },
    set_aside=set_aside,
    left_out=dict(left_out),
    notes=[
      *source.notes(used),
      *_synthetic_notes(used),
      *_structure_notes(used, domain),
    ],
    round_trip={
      structure: {"mean": float(column.mean()), "least": float(column.min())}
      for structure, column in zip(measured, dice.T, strict=True)
      if drawn
    },
    worst=[(name, *drawn[name].dice) for name in worst],
    digests={
      part: combine(f.digest for f in found)
      for part, found in by_part.items()
      if found and "size" in settings
    },
    domain={} if domain == FUNDUS else domains.to_json(domain),
    vocabulary={name: list(words) for name, words in vocabulary.items()},
  )


def _measured(domain: Domain) -> list[str]:
  """What `contours.round_trip` measures, by name."""
  names = {of: name for name, of in domain.reported_classes.items()}
  own = [
    names.get((i + 1,), f"{name} alone")
    for i, name in enumerate(domain.names)
    if i in domain.parents
  ]
  return [*domain.names, *own]


def _synthetic_notes(used: Mapping[str, Found]) -> list[str]:
  made_up = [name for name, found in used.items() if found.case.synthetic]
  if not made_up:
    return []
  return [
    f"{len(made_up)} cases are synthetic, not real patients: {named(made_up)}."
  ]


def _structure_notes(used: Mapping[str, Found], domain: Domain) -> list[str]:
  """What is worth saying of masks, one sentence each."""
  notes = []
  for structure in domain.names:
    lacking = [name for name, f in used.items() if structure in f.absent]
    if lacking:
      notes.append(
        f"{len(lacking)} cases show no {structure}; the mask generator leaves "
        f"them out: {named(lacking)}."
      )
  unlike = [name for name, f in used.items() if f.unlike]
  if unlike:
    notes.append(
      f"{len(unlike)} cases are left out by the mask generator: {named(unlike)}"
      f". Of the first, {used[unlike[0]].unlike}"
    )
  cut = [name for name, found in used.items() if found.cut]
  if cut:
    what = "disc" if domain == FUNDUS else "structures"
    notes.append(
      f"The crop cuts the {what} of {len(cut)} cases, which are kept: "
      f"{named(cut)}."
    )
  unsound = collections.defaultdict(list)
  for name, found in used.items():
    if found.fault and domain == FUNDUS:
      unsound[found.fault].append(name)
  notes += [
    f"{len(names)} masks would be refused as {fault!r} if they were made up "
    f"(bank.min_solidity={MIN_SOLIDITY}), and are kept: {named(names)}."
    for fault, names in unsound.items()
  ]
  return notes


def _counted(values: Iterable[str]) -> dict[str, int]:
  return dict(collections.Counter(values))


def _groups(
  found: Sequence[Found], vocabulary: groups.Vocabulary
) -> dict[str, dict[str, int]]:
  """Cases by attribute and name of the group; of a table, by word."""
  counts = {}
  if vocabulary:
    counts["cases"] = {"all": len(found)}
  for name, words in vocabulary.items():
    of = collections.Counter(int(f.case.attributes[name]) for f in found)
    if len(words) <= _MOST_WORDS:
      counts[name] = {w: of[i] for i, w in enumerate(words)}
      counts[name] |= {"Unknown": of[attributes.UNKNOWN]}
  if vocabulary:
    return counts
  for attribute, names in attributes.ATTRIBUTES.items():
    by_code = collections.Counter(f.case.attributes[attribute] for f in found)
    counts[attribute] = {
      attributes.group_name(attribute, code): by_code[code]
      for code in (*range(len(names)), attributes.UNKNOWN)
    }
  return counts
