"""Made-up data sets as tables: files, a csv and a domain.json."""

import csv
import json

import cv2
import numpy as np
from PIL import Image

SIDE = 64
ROWS, COLUMNS = np.indices((SIDE, SIDE))


def ellipse(row, column, height, width):
  return ((ROWS - row) / height) ** 2 + ((COLUMNS - column) / width) ** 2 < 1


def write(directory, cases, domain, save, suffix):
  """Writes (image, label, attributes) triples; every third is a test case."""
  directory.mkdir(parents=True)
  rows = []
  for i, (image, label, attributes) in enumerate(cases):
    names = {"image": f"image_{i}{suffix}", "mask": f"label_{i}.png"}
    save(directory / names["image"], image)
    cv2.imwrite(str(directory / names["mask"]), label)
    split = "test" if i % 3 == 2 else "training"
    rows.append(names | {"split": split, "patient": f"p{i}"} | attributes)
  write_rows(directory / "cases.csv", rows)
  (directory / "domain.json").write_text(json.dumps(domain))
  return directory / "cases.csv"


def write_rows(path, rows):
  with open(path, "w", newline="") as file:
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)


def shade(rng, label, levels):
  """A noisy image with a level for every value of a label image."""
  image = np.zeros((*label.shape, *np.shape(levels[0])))
  for value, level in levels.items():
    image[label == value] = level
  return image + rng.normal(0, 6, image.shape)


def lungs(directory, count=18):
  """Two lungs side by side: grey PNG, `sex` and `age`."""
  rng = np.random.default_rng(0)
  cases = []
  for i in range(count):
    shift, size = rng.uniform(-2, 2), rng.uniform(9, 11)
    left = ellipse(32 + shift, 19, 2 * size, size)
    right = ellipse(32 - shift, 45, 2 * size, size)
    label = (left * 80 + right * 160).astype(np.uint8)
    image = shade(rng, label, {0: 150, 80: 60, 160: 70}).clip(0, 255)
    attributes = {"sex": "FM"[i % 2], "age": 30 + 3 * i}
    cases.append((image.astype(np.uint8), label, attributes))
  domain = {
    "channels": 1,
    "structures": [
      {"name": "left lung", "values": [80]},
      {"name": "right lung", "values": [160]},
    ],
    "reported": {
      "left lung": [80],
      "right lung": [160],
      "lungs": [80, 160],
    },
    "headline": "lungs",
  }
  return write(directory, cases, domain, save_pillow, ".png")


TONES = ("I", "II", "III", "IV", "V", "VI")


def lesions(directory, count=36):
  """A concave lesion, absent in a fifth: RGB JPEG, `skin tone` of six."""
  rng = np.random.default_rng(1)
  cases = []
  for i in range(count):
    row, column = rng.uniform(29, 35, 2)
    body = ellipse(row, column, 17, 17)
    bite = ellipse(row - 10, column, 10, 7)
    label = (body & ~bite).astype(np.uint8) * 255
    if i % 5 == 4:
      label[:] = 0
    skin = np.array([230, 190, 170]) - 25 * (i % 6)
    image = shade(rng, label, {0: skin, 255: np.array([90, 50, 45])})
    attributes = {"skin tone": TONES[i // 3 % 6]}
    cases.append((image.clip(0, 255).astype(np.uint8), label, attributes))
  domain = {
    "channels": 3,
    "structures": [{"name": "lesion", "values": [255]}],
  }
  return write(directory, cases, domain, save_pillow, ".jpg")


def hearts(directory, count=18):
  """A ventricle in its ring beside another: 16-bit TIFF, `scanner`."""
  rng = np.random.default_rng(2)
  cases = []
  for i in range(count):
    row, column = rng.uniform(30, 34), rng.uniform(38, 42)
    size = rng.uniform(12, 14)
    label = ellipse(row, column - 22, 12, 7) * 3
    label[ellipse(row, column, size, size)] = 1
    label[ellipse(row, column, size - 5, size - 5)] = 2
    levels = {0: 40, 1: 90, 2: 200, 3: 180}
    image = shade(rng, label, levels).clip(0, 255) * 16
    attributes = {"scanner": ("A", "B")[i % 2]}
    cases.append((image.astype(np.uint16), label.astype(np.uint8), attributes))
  domain = {
    "channels": 1,
    "structures": [
      {"name": "left ventricle", "values": [1, 2]},
      {"name": "cavity", "values": [2], "within": "left ventricle"},
      {"name": "right ventricle", "values": [3]},
    ],
    "reported": {"cavity": [2], "ring": [1], "right ventricle": [3]},
    "ratios": {"cavity to ring": ["cavity", "ring"]},
    "headline": "cavity",
  }
  return write(directory, cases, domain, save_cv2, ".tiff")


def save_pillow(path, image):
  Image.fromarray(image).save(path, quality=95)


def save_cv2(path, image):
  cv2.imwrite(str(path), image)
