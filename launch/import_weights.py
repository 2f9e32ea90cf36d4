"""Turns published Stable Diffusion weights into what `image.weights` names.

  fairdiff import-weights --source stable-diffusion-v1-5 \
    --controlnet control_sd15_seg.pth --out weights/sd15

Prompts are turned into tokens by transformers' CLIPTokenizer, which only this
command needs.
"""

import os
from pathlib import Path

from absl import flags
from fairdiff_jax.launch import cli

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


def tokens(folder, prompts):
  """Token ids [P, 77] by the tokenizer in a folder."""
  import numpy as np

  from fairdiff_jax import files
  from fairdiff_jax.objectives.latent_space import TOKENS

  try:
    from transformers import CLIPTokenizer
  except ImportError as error:
    raise ImportError(
      "this command needs transformers: pip install transformers"
    ) from error
  folder = Path(folder)
  for name in ("vocab.json", "merges.txt"):
    if not (folder / name).exists():
      raise FileNotFoundError(f"{folder} has no {name}; correct --tokenizer")
    files.require_whole(folder / name)
  files.read_json(folder / "vocab.json", "copy or download it again")
  try:
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    ids = tokenizer(prompts, padding="max_length", max_length=TOKENS).input_ids
  except Exception as error:
    raise ValueError(
      f"{folder} holds no tokenizer of CLIP ({type(error).__name__}: {error});"
      " correct --tokenizer"
    ) from error
  for prompt, row in zip(prompts, ids, strict=True):
    if len(row) > TOKENS:
      raise ValueError(
        f"prompt {prompt!r} has {len(row)} tokens with start and end; at most"
        f" {TOKENS} are read: shorten it"
      )
  return np.array(ids, np.int32)


def main(_):
  import numpy as np

  from fairdiff_jax import files
  from fairdiff_jax.pretrained import importing, stable_diffusion

  source, controlnet, tokenizer, out = (
    os.path.expanduser(flag.value)
    for flag in (SOURCE, CONTROLNET, TOKENIZER, OUT)
  )
  # Before gigabytes are read:
  importing.require_new(out)
  paths = [source, *filter(None, [controlnet])]
  for path in paths:
    files.find(path)
  scheduler = importing.read_scheduler(source)
  tokenizer = tokenizer or f"{source}/tokenizer"
  *positive, negative = tokens(tokenizer, [*PROMPTS.value, NEGATIVE.value])
  networks = {}
  for path in paths:
    networks |= importing.read(path)
  importing.write(
    out,
    networks,
    positive=np.stack(positive),
    negative=negative,
    facts={
      "sources": {path: importing.sha256(path) for path in paths},
      "prompts": PROMPTS.value,
      "negative_prompt": NEGATIVE.value,
    },
    scheduler=scheduler,
  )
  settings = {"weights": out} | {
    field: value
    for field, value in stable_diffusion.read_schedule(out).items()
    if value != stable_diffusion.SCHEDULE[field]
  }
  fields = " ".join(f"--config.image.{k}={v}" for k, v in settings.items())
  print(f"written: {out}; train with {fields}")


def start():
  cli.run(main)


if __name__ == "__main__":
  start()
