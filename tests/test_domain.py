"""Any organ, attribute and camera: from a table's files to a report."""

import json
import time

import cv2
import numpy as np
import pytest

from configs import own
from fairdiff_jax.data import contours, groups, prepare, storage, table
from fairdiff_jax.data import domain as domains
from fairdiff_jax.data.domain import FUNDUS
from fairdiff_jax.experiment import run
from fairdiff_jax.files import read_csv
from fairdiff_jax.synthesis.export import export
from fairdiff_jax.training.trained import restore
from tests import patients, tables

TINY = {
  "data.size": (16, 16),
  "points.num_steps": 4,
  "points.flow_depth": 1,
  "image.conditioning": "concat",
  "image.attention": (False,),
  "image.sample_steps": 1,
  "data.num_points": 64,
  "points.num_points": 64,
  "train.steps": 2,
  "train.points": (0, 2),
  "train.image": (0, 2),
  "train.segmenter": (0, 2),
  "train.generation_batch": 8,
  "train.segmentation_batch": 8,
  "bank.every": 1,
  "checkpoint.every": 0,
  "baseline": False,
  "fairness.strategy": "repeat_sample",
  "evaluation.synthetic_per_group": 1,
}


def configure(source, attribute, **changes):
  config = own.get_config("smoke").unlock()
  fields = {"data.source": str(source), "data.attribute": attribute}
  config.update_from_flattened_dict(TINY | fields | changes)
  return config.lock()


def prepared(tmp_path, source, attribute, **changes):
  config = configure(source, attribute, **changes)
  report = prepare.prepare(config.data, tmp_path / "run" / "data")
  return config, report


def test_fundus_is_a_domain():
  assert FUNDUS.parents == (None, 0)
  assert FUNDUS.num_classes == 3
  assert FUNDUS.reported_classes == {"cup": (2,), "rim": (1,), "disc": (1, 2)}
  assert FUNDUS.parts == ("cup", "rim")
  assert domains.parse(domains.to_json(FUNDUS)) == FUNDUS
  assert domains.of(domains.text(FUNDUS)) == FUNDUS
  other = FUNDUS._replace(channels=3)
  assert domains.of(domains.text(other)) == other


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"channels": 2}, "channels must be 1 or 3"),
    ({"structures": []}, "a list of 1 to 15"),
    ({"colour": 1}, "'colour' is no key"),
    ({"structures": [{"name": "a", "values": []}]}, "values of 'a' must be"),
    (
      {"structures": [{"name": "a", "values": [1], "within": "b"}]},
      "must be a structure that is given before it",
    ),
    ({"reported": {"a": [7]}}, "reported 'a' must be values of structures"),
    ({"headline": "b"}, "headline 'b' is not reported"),
    ({"ratios": {"c": ["a", "b"]}}, "the ratio 'c' must be of two"),
  ],
)
def test_what_is_no_domain_is_refused(changes, message):
  sound = {"structures": [{"name": "a", "values": [1]}]}
  domains.parse(sound)
  with pytest.raises(ValueError, match=message):
    domains.parse(sound | changes)


def read_report(tmp_path):
  path = tmp_path / "run" / "report" / "summary.json"
  return json.loads(path.read_text())


def test_two_lungs_by_sex_and_age_from_files_to_report(tmp_path):
  source = tables.lungs(tmp_path / "source")
  config, report = prepared(
    *(tmp_path, source, "sex+age:45,60"),
    **{"fairness.strategy": "none", "train.points": (0, 0)},
    **{"train.image": (0, 0)},
  )
  assert report.usable == 18 and not report.set_aside
  assert report.round_trip.keys() == {"left lung", "right lung"}
  assert run(config, tmp_path / "run")
  summary = read_report(tmp_path)
  (figures,) = summary["models"].values()
  assert list(figures) == ["left lung", "right lung", "lungs"]
  assert summary["verdict"].startswith("On the lungs")
  assert set(summary["groups"]) <= {
    f"{sex} {band}"
    for sex in "FM"
    for band in ("below 45", "45 to 60", "60 and above")
  }
  cases = storage.load(tmp_path / "run" / "data", "test", progress=False)
  assert set(np.unique(cases.mask)) == {0, 1, 2}


def test_a_lesion_that_some_lack_in_colour_from_files_to_report(tmp_path):
  source = tables.lesions(tmp_path / "source")
  config, report = prepared(
    tmp_path, source, "skin tone", **{"fairness.strategy": "equal_scale"}
  )
  assert report.usable == 36
  assert "7 cases show no lesion" in "".join(report.notes)
  cases = storage.load(tmp_path / "run" / "data", "train", progress=False)
  assert cases.image.shape == (24, 16, 16, 3)
  drawn = cases.points.any(axis=(1, 2))
  np.testing.assert_array_equal(drawn, cases.mask.any(axis=(1, 2)))
  # Colours stay in their order, in lesions and beside them.
  assert (cases.image[..., 0].mean() - cases.image[..., 2].mean()) > 20
  assert run(config, tmp_path / "run")
  summary = read_report(tmp_path)
  (figures,) = summary["models"].values()
  assert list(figures) == ["lesion"]
  assert list(summary["groups"]) == sorted(tables.TONES)


def test_a_ventricle_in_its_ring_from_files_to_report_and_export(tmp_path):
  source = tables.hearts(tmp_path / "source")
  config, report = prepared(
    *(tmp_path, source, "scanner"),
    **{"bank.max_attempts": 100, "fairness.strategy": "equal_scale"},
  )
  assert report.round_trip.keys() == {
    *("left ventricle", "cavity", "right ventricle", "ring")
  }
  assert run(config, tmp_path / "run")
  summary = read_report(tmp_path)
  (figures,) = summary["models"].values()
  assert list(figures) == [
    "cavity",
    "ring",
    "right ventricle",
    "cavity_to_ring",
  ]
  page = (tmp_path / "run" / "report" / "index.html").read_text()
  assert "Cavity-to-ring error" in page and "Disc" not in page
  out = tmp_path / "synthetic"
  export(restore(tmp_path / "run"), out, ["B=2"])
  domain = domains.of("", str(source))
  assert domains.of("", str(out / "cases.csv")) == domain
  found = table.read(out / "cases.csv", domain)
  assert found.vocabulary["scanner"] == ("B",)
  for row in found.rows:
    case = table.read_case(row, domain)
    assert case.image.shape == (16, 16)
    assert set(np.unique(case.mask)) == {0, 1, 2, 3}


# Least Dice of any structure at 512 points, as asked of each data set.
@pytest.mark.parametrize(
  ("make", "least"),
  [(tables.lungs, 0.985), (tables.lesions, 0.96), (tables.hearts, 0.98)],
)
def test_contours_give_masks_back(tmp_path, make, least):
  source = make(tmp_path / "source")
  domain = domains.of("", str(source))
  found = table.read(source, domain)
  seconds = []
  for row in found.rows:
    mask = table.read_case(row, domain).mask
    mask = cv2.resize(mask, (256, 256), interpolation=cv2.INTER_NEAREST)
    if mask.any():
      began = time.process_time()
      points = contours.mask_to_points(mask, 512, domain.parents)
      dice = contours.round_trip(mask, points, domain.parents)
      seconds.append(time.process_time() - began)
      assert min(dice) >= least
  assert np.median(seconds) < 0.02


def test_a_table_of_eyes_is_prepared_as_npz_files_are(tmp_path):
  npz = patients.write_source(tmp_path / "npz")
  prepare.build(npz, tmp_path / "a", **patients.BUILD)
  directory = tmp_path / "png"
  directory.mkdir()
  rows = []
  for path in sorted(npz.glob("*.npz")):
    with np.load(path) as arrays:
      cv2.imwrite(str(directory / f"{path.stem}.png"), arrays["slo_fundus"])
      mask = (-arrays["disc_cup_mask"]).astype(np.uint8)
      cv2.imwrite(str(directory / f"{path.stem}_mask.png"), mask)
    names = {"image": f"{path.stem}.png", "mask": f"{path.stem}_mask.png"}
    split = "test" if path.stem.endswith("3") else "training"
    sex = "Male" if path.stem.endswith("2") else "Female"
    rows.append(names | {"split": split, "sex": sex})
  tables.write_rows(directory / "cases.csv", rows)
  config = configure(directory / "cases.csv", "sex").unlock()
  config.data.size, config.data.num_points = (40, 48), 64
  prepare.prepare(config.data, tmp_path / "b")
  for split in ("train", "test"):
    a, b = (
      storage.load(tmp_path / name, split, progress=False) for name in "ab"
    )
    assert a.name == b.name
    for field in ("image", "mask", "points"):
      np.testing.assert_array_equal(getattr(a, field), getattr(b, field))
  prepare.require_prepared(config.data, tmp_path / "b")


def test_one_file_per_structure(tmp_path):
  source = tables.hearts(tmp_path / "source", 3)
  domain = domains.of("", str(source))
  _, rows = read_csv(source)
  expected = [
    table.read_case(r, domain).mask for r in table.read(source, domain).rows
  ]
  for i, row in enumerate(rows):
    names = []
    for j, region in enumerate(domain.split(expected[i]).values()):
      names.append(f"structure_{i}_{j}.png")
      pixels = region.astype(np.uint8) * 255
      cv2.imwrite(str(source.parent / names[-1]), pixels)
    row["mask"] = ";".join(names)
  rows[0]["mask"] = rows[0]["mask"].rpartition(";")[0] + ";"
  expected[0][expected[0] == 3] = 0
  tables.write_rows(source, rows)
  for row, mask in zip(table.read(source, domain).rows, expected, strict=True):
    np.testing.assert_array_equal(table.read_case(row, domain).mask, mask)


def change(source, **cells):
  """Changes cells of the table's second row; None takes a column away."""
  _, rows = read_csv(source)
  rows[1] |= cells
  gone = [name for name, value in cells.items() if value is None]
  tables.write_rows(
    source, [{k: v for k, v in row.items() if k not in gone} for row in rows]
  )


@pytest.mark.parametrize(
  ("cells", "attribute", "message"),
  [
    ({"split": None}, "sex", "cases.csv has no column 'split'"),
    ({"split": "unused"}, "sex", "line 3: split is 'unused'"),
    ({"patient": "p2"}, "sex", "in two splits are the patients p2; put all"),
    ({"image": "lost.png"}, "sex", "lost.png, which is not there; correct"),
    ({"mask": "a;b;c"}, "sex", "line 3: mask names 3 files"),
    ({"image": "image_0.png"}, "sex", "has image_0.png in two rows"),
    ({}, "sax", "No attribute 'sax'. Did you mean 'sex'"),
    ({}, "site", "data.attribute='site' has the one group A"),
    ({}, "sex:3", "sex 'F' is not a number"),
    ({}, "age:60,50", "'age:60,50' is not an attribute with the bounds"),
  ],
)
def test_bad_tables_are_named(tmp_path, cells, attribute, message):
  source = tables.lungs(tmp_path / "source", 6)
  _, rows = read_csv(source)
  tables.write_rows(source, [row | {"site": "A"} for row in rows])
  change(source, **cells)
  with pytest.raises((ValueError, FileNotFoundError)) as error:
    prepared(tmp_path, source, attribute)
  assert message in str(error.value)
  assert "\n" not in str(error.value)


def test_a_value_that_is_not_declared_is_named(tmp_path):
  source = tables.lungs(tmp_path / "source", 6)
  path = source.parent / "label_1.png"
  label = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
  label[0, 0] = 7
  cv2.imwrite(str(path), label)
  with pytest.raises(ValueError, match=r"label_1\.png holds the value 7"):
    prepared(tmp_path, source, "sex")


def test_a_damaged_image_is_set_aside(tmp_path):
  source = tables.lungs(tmp_path / "source", 6)
  (source.parent / "image_1.png").write_bytes(b"no image")
  _, report = prepared(tmp_path, source, "sex")
  ((name, reason),) = report.set_aside
  assert name == "image_1" and "cannot be read as an image" in reason


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_any_form(tmp_path, channels):
  rng = np.random.default_rng(0)
  colour = rng.integers(0, 256, (8, 9, 3), np.uint8)
  grey = colour[..., 0]
  shape = (8, 9) if channels == 1 else (8, 9, 3)
  alpha = np.dstack([colour, np.full((8, 9), 255, np.uint8)])
  for name, image in (("rgb", colour), ("rgba", alpha), ("grey", grey)):
    path = tmp_path / f"{name}.png"
    tables.save_pillow(path, image)
    np.save(path.with_suffix(".npy"), image)
    found = table.read_image(path, channels)[0]
    assert found.shape == shape and found.dtype == np.uint8
    if channels == 3 and name != "grey":
      np.testing.assert_array_equal(found, colour)
    if channels == 1 and name == "grey":
      np.testing.assert_array_equal(found, grey)
    again = table.read_image(path.with_suffix(".npy"), channels)[0]
    np.testing.assert_array_equal(again, found)
  deep = tmp_path / "deep.tiff"
  tables.save_cv2(deep, colour.astype(np.uint16)[..., ::-1] * 16)
  found = table.read_image(deep, channels)[0]
  assert found.shape == shape
  if channels == 3:
    assert (found.min(), found.max()) == (0, 255)
    assert np.corrcoef(found.ravel(), colour.ravel())[0, 1] > 0.99


def test_bands_are_words():
  words = {"age": ("49", "50", "64.5", "80"), "sex": ("F", "M")}
  names = groups.group_names("age:50,65,80", (), words)
  assert names == ("below 50", "50 to 65", "65 to 80", "80 and above")
  columns = {
    "age": np.array([0, 1, 2, 3, -1]),
    "sex": np.array([0, 1, 0, 1, 0]),
  }
  codes = groups.group_codes("age:50,65,80", columns, (), words)
  np.testing.assert_array_equal(codes, [0, 1, 1, 3, -1])
  both = groups.group_names("sex+age:50", (), words)
  assert both == (
    "F below 50",
    "F 50 and above",
    "M below 50",
    "M 50 and above",
  )


def test_fairseg_has_bands_of_age(tmp_path):
  npz = patients.write_source(tmp_path / "npz")
  np.savez(npz / "data_00001.npz", **patients.patient(age=30))
  prepare.build(npz, tmp_path / "data", **patients.BUILD)
  cases = storage.load(tmp_path / "data", "train", progress=False)
  codes = groups.group_codes(
    "age:50", cases.attributes, vocabulary=cases.vocabulary
  )
  np.testing.assert_array_equal(codes, [0, 1])
