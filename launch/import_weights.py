"""Turns published Stable Diffusion weights into what `image.weights` names.

  python launch/import_weights.py --source stable-diffusion-v1-5 \
    --controlnet control_sd15_seg.pth --out weights/sd15

Prompts are turned into tokens by transformers' CLIPTokenizer, which only this
command needs.
"""

from pathlib import Path

import cli
import numpy as np
from absl import flags

from fairdiff_jax.objectives.latent_space import TOKENS
from fairdiff_jax.pretrained import importing

SOURCE = flags.DEFINE_string(
  "source", None, "Pipeline's folder as diffusers writes it, or single file."
)
CONTROLNET = flags.DEFINE_string(
  "controlnet", "", "Folder or file of a ControlNet; '' starts from the U-Net."
)
TOKENIZER = flags.DEFINE_string(
  "tokenizer",
  "",
  "Folder with vocab.json and merges.txt; '' = SOURCE/tokenizer.",
)
OUT = flags.DEFINE_string("out", None, "New directory.")
PROMPTS = flags.DEFINE_multi_string(
  "prompt",
  [
    "Scanning Laser Ophthalmoscope Fundus Image depicting the Optic Nerve Head"
    " and Central Cup"
  ],
  "For all groups; or one for each group and a last one for unknown groups.",
)
NEGATIVE = flags.DEFINE_string(
  "negative_prompt",
  "lowres, extra digit, fewer digits, cropped, worst quality",
  "What guidance leads away from.",
)
flags.mark_flags_as_required(["source", "out"])


def tokens(prompts):
  """Token ids [P, 77]."""
  try:
    from transformers import CLIPTokenizer
  except ImportError as error:
    raise ImportError("prompts need transformers: pip install it") from error
  folder = Path(TOKENIZER.value or f"{SOURCE.value}/tokenizer")
  if not (folder / "vocab.json").is_file():
    raise FileNotFoundError(f"{folder} has no vocab.json; correct --tokenizer")
  tokenizer = CLIPTokenizer.from_pretrained(folder)
  ids = tokenizer(prompts, padding="max_length", max_length=TOKENS).input_ids
  for prompt, row in zip(prompts, ids, strict=True):
    if len(row) > TOKENS:
      raise ValueError(
        f"prompt {prompt!r} has {len(row)} tokens with start and end; at most"
        f" {TOKENS} are read: shorten it"
      )
  return np.array(ids, np.int32)


def main(_):
  importing.require_new(OUT.value)  # before gigabytes are read
  *positive, negative = tokens([*PROMPTS.value, NEGATIVE.value])
  paths = [SOURCE.value, *filter(None, [CONTROLNET.value])]
  networks = {}
  for path in paths:
    networks |= importing.read(path)
  importing.write(
    OUT.value,
    networks,
    positive=np.stack(positive),
    negative=negative,
    facts={
      "sources": {path: importing.sha256(path) for path in paths},
      "prompts": PROMPTS.value,
      "negative_prompt": NEGATIVE.value,
    },
  )
  print(f"written: {OUT.value}; train with --config.image.weights={OUT.value}")


if __name__ == "__main__":
  cli.run(main)
