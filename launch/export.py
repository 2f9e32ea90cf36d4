"""Hands over what a run has learned: weights, a program, a model card.

  fairdiff export --workdir runs/quickstart --to quickstart_model

Writes the segmenter as StableHLO, which JAX runs without this package, and as
safetensors, of a SAMed also its LoRA by the public code's names; the mask
generator; the image generator, for Stable Diffusion as folders that diffusers
reads; and MODEL_CARD.md with data, groups, figures and licences.
"""

from absl import flags
from fairdiff_jax.launch import cli

WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
CHECKPOINT = flags.DEFINE_string(*cli.CHECKPOINT)
TO = flags.DEFINE_string("to", None, "New directory.")
flags.mark_flags_as_required(["workdir", "to"])


def main(_):
  from fairdiff_jax.run import Run

  run = Run(WORKDIR.value, checkpoint=CHECKPOINT.value)
  print(f"checkpoint: {run.trained}")
  run.export(TO.value)
  print(f"written: {TO.value}/MODEL_CARD.md says what there is")


def start():
  cli.run(main)


if __name__ == "__main__":
  start()
