"""Segments a directory of images with a run's segmenter.

  fairdiff predict --workdir runs/quickstart --images photographs --out found

Images are PNG, JPEG, TIFF, NPY, DICOM (with pydicom) or npz files in FairSeg's
form, of any size, grey or colour. Writes masks/NAME.png, label images with the
values of the run's domain at the image's own size, overlays/NAME.png,
areas.csv, contact_sheet.png, and unreadable.csv for what cannot be read. The
same command goes on where it stopped, and takes new images in.
"""

import sys

from absl import flags
from fairdiff_jax.launch import cli

WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
CHECKPOINT = flags.DEFINE_string(*cli.CHECKPOINT)
IMAGES = flags.DEFINE_string(
  "images", None, "Directory of images, in folders or not."
)
OUT = flags.DEFINE_string("out", None, "Directory to write to.")
BATCH = flags.DEFINE_integer(
  "batch_size",
  None,
  "Images at a time; default evaluation.batch_size of the run.",
  lower_bound=1,
)
flags.mark_flags_as_required(["workdir", "images", "out"])


def main(_):
  from fairdiff_jax.run import Run

  run = Run(WORKDIR.value, checkpoint=CHECKPOINT.value)
  print(f"checkpoint: {run.trained}")
  done = run.predict(IMAGES.value, OUT.value, batch_size=BATCH.value)
  for path, reason in done.unreadable:
    print(f"not read: {path}: {reason}", file=sys.stderr)
  kept = f", {done.kept} of them before" if done.kept else ""
  print(f"masks: {OUT.value}/masks, of {done.segmented} images{kept}")
  if done.unreadable:
    print(f"not read: {len(done.unreadable)}, see {OUT.value}/unreadable.csv")
  return 0 if done.segmented else 1


def start():
  cli.run(main)


if __name__ == "__main__":
  start()
