"""Patients' files for tests."""

import csv

import numpy as np

from fairdiff_jax.data import attributes

H0, W0 = 60, 76
BUILD = {"size": (40, 48), "num_points": 64, "progress": False}


def eye(shape=(H0, W0), cup=0.5):
  """An image and its mask in the files' codes."""
  r, c = np.indices(shape)
  distance = np.hypot(r - 0.45 * shape[0], c - 0.55 * shape[1]) / shape[0]
  mask = np.where(distance < 0.3 * cup, -2.0, -1.0 * (distance < 0.3))
  image = (200 - 300 * distance).clip(0, 255).astype(np.uint8)
  return image, mask


IMAGE, MASK = eye()


def patient(**changes):
  """Arrays of one file of the current release; None leaves a key out."""
  arrays = {"slo_fundus": IMAGE, "disc_cup_mask": MASK, "age": 60}
  arrays |= {"race": 1, "gender": 0, "ethnicity": -1, "language": 2}
  arrays |= {"maritalstatus": 4} | changes
  return {k: np.array(v) for k, v in arrays.items() if v is not None}


def write_csv(directory, rows):
  """Writes {stem: use or a row} as data_summary.csv."""
  columns = ["filename", *attributes.KEYS, "use"]
  with open(directory / "data_summary.csv", "w", newline="") as file:
    writer = csv.DictWriter(file, columns, restval="unknown")
    writer.writeheader()
    for stem, row in rows.items():
      row = row if isinstance(row, dict) else {"use": row}
      writer.writerow({"filename": f"{stem}.npz", **row})


def write_source(directory):
  """Three good cases, two to train on."""
  directory.mkdir()
  for i in (1, 2, 3):
    np.savez(directory / f"data_0000{i}.npz", **patient(race=i - 1))
  write_csv(
    directory,
    {"data_00001": "training", "data_00002": "training", "data_00003": "test"},
  )
  return directory
