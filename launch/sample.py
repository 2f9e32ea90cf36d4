"""Draws labelled synthetic patients from a run's best checkpoint.

  fairdiff sample --workdir runs/quickstart \\
    --counts Asian=64,Black=64 --cup-to-disc 0.3:0.6 --out synthetic
  fairdiff sample --workdir runs/quickstart \\
    --masks my_masks --group Black --out synthetic
  fairdiff sample --workdir runs/quickstart \\
    --again synthetic/manifest.jsonl --only 17 --out again

Writes npz files of the current FairSeg release and data_summary.csv, or, of
patients in a table, PNG files and cases.csv; manifest.jsonl; a contact sheet;
DATA_CARD.md and data_card.json. Every case passes a gate: it is no nearer to a
training patient than real ones are to each other, and a segmenter finds its
mask; what is refused is drawn again. Any ratio of the run's domain can be asked
for by its name, as areas. The same command goes on where it stopped.
"""

import sys

from absl import flags
from fairdiff_jax.launch import cli

WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
CHECKPOINT = flags.DEFINE_string(*cli.CHECKPOINT)
COUNTS = flags.DEFINE_list(
  "counts", [], "Cases of each group, such as Asian=64,Black=64."
)
RATIOS = flags.DEFINE_list(
  "ratios", [], "Ranges, such as 'cup to disc=0.3:0.6', or --cup-to-disc."
)
MASKS = flags.DEFINE_string(
  "masks", None, "Directory of label images to make images for; with --group."
)
GROUP = flags.DEFINE_string("group", "", "Whose masks these are.")
AGAIN = flags.DEFINE_string(
  "again", None, "A manifest, to make its cases anew."
)
ONLY = flags.DEFINE_list("only", [], "Numbers of the cases made anew.")
OUT = flags.DEFINE_string("out", None, "Directory to write to.")
SEED = flags.DEFINE_integer(
  "seed", 0, "Seed of the cases.", lower_bound=0, upper_bound=2**32 - 1
)
BUDGET = flags.DEFINE_integer("budget", 20, "Draws of a case.", lower_bound=1)
GATE = flags.DEFINE_boolean(
  "gate", True, "Needs the run's data; without, the data card warns."
)
flags.mark_flags_as_required(["workdir", "out"])


def main(_):
  from fairdiff_jax.evaluation.gate import make_gate
  from fairdiff_jax.synthesis.export import export
  from fairdiff_jax.synthesis.making import again
  from fairdiff_jax.training.trained import restore

  trained = restore(WORKDIR.value, CHECKPOINT.value)
  print(f"checkpoint: {trained}")
  if AGAIN.value:
    if not all(text.isdecimal() for text in ONLY.value):
      raise ValueError("--only takes numbers of cases, such as 17,18")
    only = [int(text) for text in ONLY.value]
    made = again(trained, AGAIN.value, OUT.value, only, masks=MASKS.value)
    print(f"made again, to the same bytes: {len(made)} cases in {OUT.value}")
    return
  export(
    *(trained, OUT.value, COUNTS.value),
    seed=SEED.value,
    ratios=RATIOS.value,
    masks=MASKS.value,
    group_name=GROUP.value,
    gate=make_gate(trained) if GATE.value else None,
    budget=BUDGET.value,
  )
  print(f"contact sheet: {OUT.value}/contact_sheet.png")


def ratios_as_flags(argv):
  """--cup-to-disc 0.3:0.6 as --ratios=cup-to-disc=0.3:0.6, all in one."""
  rest, found, left = [], [], iter(argv)
  for text in left:
    name, _, value = text.partition("=")
    known = name.lstrip("-").split(".")[0] in flags.FLAGS
    if name.startswith("--") and "to" in name.split("-") and not known:
      found.append(f"{name[2:]}={value or next(left, '')}")
    else:
      rest.append(text)
  return rest + ([f"--ratios={','.join(found)}"] if found else [])


def start():
  sys.argv = [sys.argv[0], *ratios_as_flags(sys.argv[1:])]
  cli.run(main)


if __name__ == "__main__":
  start()
