"""Turns published Stable Diffusion weights into what `image.weights` names.

  python launch/import_weights.py --source stable-diffusion-v1-5 \
    --controlnet control_sd15_seg.pth --out weights/sd15

Prompts are turned into tokens by transformers' CLIPTokenizer, which only this
command needs.
"""

import cli
from absl import flags

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


def main(_):
  try:
    from transformers import CLIPTokenizer
  except ImportError as error:
    raise ImportError("prompts need transformers: pip install it") from error
  tokenizer = CLIPTokenizer.from_pretrained(
    TOKENIZER.value or f"{SOURCE.value}/tokenizer"
  )

  def ids(prompts):
    return tokenizer(
      prompts, padding="max_length", truncation=True, return_tensors="np"
    ).input_ids

  paths = [SOURCE.value, *filter(None, [CONTROLNET.value])]
  networks = {}
  for path in paths:
    networks |= importing.read(path)
  importing.write(
    OUT.value,
    networks,
    positive=ids(PROMPTS.value),
    negative=ids([NEGATIVE.value])[0],
    facts={
      "sources": {path: importing.sha256(path) for path in paths},
      "prompts": PROMPTS.value,
      "negative_prompt": NEGATIVE.value,
    },
  )
  print(f"written: {OUT.value}; train with --config.image.weights={OUT.value}")


if __name__ == "__main__":
  cli.run(main)
