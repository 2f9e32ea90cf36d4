"""The data card beside an export: what it holds, from what, how near to whom.

`data_card.json` follows `SCHEMA` (JSON Schema, of which `faults` knows what is
used here); `DATA_CARD.md` says the same in words.
"""

from collections.abc import Iterator, Mapping
from typing import Any

CARD, TEXT = "data_card.json", "DATA_CARD.md"
VERSION = 1


def _object(*optional: str, **properties: Any) -> dict[str, Any]:
  return {
    "type": "object",
    "properties": properties,
    "required": [name for name in properties if name not in optional],
    "additionalProperties": False,
  }


def _map(of: Mapping[str, Any]) -> dict[str, Any]:
  return {"type": "object", "additionalProperties": of}


_NUMBER = {"type": ["number", "null"]}
_WHOLE = {"type": "integer"}
_TEXT = {"type": "string"}
_ENDS = {"type": "array", "items": _NUMBER}
_SPACE = _object(
  **dict.fromkeys(
    (
      *("nearest", "nearest_real", "threshold", "closer"),
      *("ratio", "ratio_real", "ratio_below", "attack"),
    ),
    _NUMBER,
  ),
  closer_interval=_ENDS,
  attack_interval=_ENDS,
)
SCHEMA: dict[str, Any] = {
  "$schema": "https://json-schema.org/draft/2020-12/schema",
  "title": "Data card of synthetic cases",
  **_object(
    schema={"const": VERSION},
    synthetic={"const": True},
    cases=_WHOLE,
    groups=_map(_WHOLE),
    attribute=_TEXT,
    ratios=_map(_object(mean=_NUMBER, least=_NUMBER, most=_NUMBER)),
    model=_object(
      run=_TEXT,
      checkpoint_step=_WHOLE,
      checkpoint_sha256=_TEXT,
      config_sha256=_TEXT,
    ),
    seed=_WHOLE,
    starts_from={"enum": ["noise", "given masks"]},
    gate=_object(checked={"type": "boolean"}, refused=_map(_WHOLE)),
    privacy={
      "anyOf": [
        {"type": "null"},
        _object(
          synthetic=_WHOLE,
          members=_WHOLE,
          held_out=_WHOLE,
          spaces=_map(_SPACE),
        ),
      ]
    },
    agreement={
      "anyOf": [
        {"type": "null"},
        _map(_object(mean=_NUMBER, threshold=_NUMBER)),
      ]
    },
    licence=_TEXT,
  ),
}
_TYPES = {
  "object": dict,
  "array": list,
  "string": str,
  "integer": int,
  "number": (int, float),
  "boolean": bool,
  "null": type(None),
}


def faults(
  value: Any, schema: Mapping[str, Any] = SCHEMA, where: str = "card"
) -> Iterator[str]:
  """What a card has that its schema has not, and conversely."""
  if "const" in schema and value != schema["const"]:
    yield f"{where} is {value!r}, not {schema['const']!r}"
  if "enum" in schema and value not in schema["enum"]:
    yield f"{where} is {value!r}, none of {schema['enum']}"
  if "anyOf" in schema:
    found = [[*faults(value, of, where)] for of in schema["anyOf"]]
    if all(found):
      yield min(found, key=len)[0]
  kinds = schema.get("type", [])
  kinds = [kinds] if isinstance(kinds, str) else kinds
  if kinds and not any(_is(value, kind) for kind in kinds):
    yield f"{where} is {type(value).__name__}, not {' or '.join(kinds)}"
    return
  if isinstance(value, list):
    for i, item in enumerate(value):
      yield from faults(item, schema.get("items", {}), f"{where}[{i}]")
  if isinstance(value, dict):
    known = schema.get("properties", {})
    for name in schema.get("required", ()):
      if name not in value:
        yield f"{where} lacks {name!r}"
    for name, item in value.items():
      of = known.get(name, schema.get("additionalProperties", True))
      if of is False:
        yield f"{where} has {name!r}, which is unknown"
      elif isinstance(of, Mapping):
        yield from faults(item, of, f"{where}.{name}")


def _is(value: Any, kind: str) -> bool:
  if isinstance(value, bool):
    return kind == "boolean"
  return isinstance(value, _TYPES[kind])


def check(card: Mapping[str, Any]) -> None:
  """Raises ValueError unless a card follows `SCHEMA`."""
  found = [*faults(card)]
  if found:
    raise ValueError(f"the data card is not as declared: {'; '.join(found)}")


def to_text(card: Mapping[str, Any]) -> str:
  """A card as Markdown."""
  model = card["model"]
  lines = [
    "# Synthetic patients",
    "",
    f"{card['cases']} cases, **all synthetic**: no image is of a real patient.",
    "",
    "| group | cases |",
    "|---|---|",
    *(f"| {group} | {n} |" for group, n in card["groups"].items()),
    "",
    "## How they were made",
    "",
    f"* run `{model['run']}`, checkpoint of step {model['checkpoint_step']}"
    f" (sha256 `{model['checkpoint_sha256']}`), config"
    f" (sha256 `{model['config_sha256']}`), seed {card['seed']}",
    f"* from {card['starts_from']}; no case starts from a real patient's image",
    "* `manifest.jsonl` has a line for each case, from which `fairdiff sample"
    " --again` makes it anew",
  ]
  for name, of in card["ratios"].items():
    lines.append(
      f"* {name} (areas): mean {_say(of['mean'])}, from {_say(of['least'])} to"
      f" {_say(of['most'])}"
    )
  gate = card["gate"]
  lines += ["", "## What was checked", ""]
  if gate["checked"]:
    lines.append(
      "Every case passed a gate: not nearer to a training patient than 1% of"
      " real patients are to each other, and an independent segmenter finds its"
      " mask as well as in real images."
    )
  else:
    lines.append(
      "**Nothing: these cases passed no gate.** Nobody has compared them with"
      " the training patients; do not share them."
    )
  refused = gate["refused"]
  if refused:
    lines += ["", "Drawn again, since refused:", ""]
    lines += [f"* {why}: {n}" for why, n in refused.items()]
  privacy = card["privacy"]
  if privacy:
    lines += [
      "",
      f"Against {privacy['members']} training patients"
      f" ({privacy['held_out']} held out):",
      "",
      "| compared in | nearest (real to real) | closer than 1% of real |"
      " nearest / second (real) | membership attack, AUC |",
      "|---|---|---|---|---|",
    ]
    for name, of in privacy["spaces"].items():
      ends = " to ".join(map(_say, of["attack_interval"]))
      lines.append(
        f"| {name} | {_say(of['nearest'])} ({_say(of['nearest_real'])})"
        f" | {_say(of['closer'])} | {_say(of['ratio'])}"
        f" ({_say(of['ratio_real'])}) | {_say(of['attack'])} ({ends}) |"
      )
  agreement = card["agreement"]
  if agreement:
    lines += ["", "Dice of the segmenter with the masks, by group:", ""]
    lines += [
      f"* {group}: mean {_say(of['mean'])}, at least {_say(of['threshold'])}"
      for group, of in agreement.items()
    ]
  lines += ["", "## Terms", "", card["licence"], ""]
  return "\n".join(lines)


def _say(value: float | None) -> str:
  return "–" if value is None else f"{value:.3g}"
