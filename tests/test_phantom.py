"""Made-up patients: determinism, the table of groups, the files."""

import csv

import numpy as np
import pytest
from scipy import ndimage

from fairdiff_jax.data import phantom
from fairdiff_jax.data.attributes import ATTRIBUTES, parse_attribute

RACES = ATTRIBUTES["race"]


@pytest.fixture(scope="module")
def patients():
  """120 (image, mask) of each group, in grey levels."""
  return [
    [
      phantom.generate(np.random.default_rng([3, group, i]), group)
      for i in range(120)
    ]
    for group in range(len(RACES))
  ]


def test_a_patient_is_a_function_of_its_generator():
  draw = [
    phantom.generate(np.random.default_rng(seed), 1) for seed in (4, 4, 5)
  ]
  for a, b, other in zip(*draw, strict=True):
    np.testing.assert_array_equal(a, b)
    assert (a != other).any()


def test_images_are_rendered_for_masks():
  for group in range(len(RACES)):
    image, mask = phantom.generate(np.random.default_rng(group), group)
    rng = np.random.default_rng(group)
    np.testing.assert_array_equal(phantom.draw_mask(rng, group), mask)
    np.testing.assert_array_equal(phantom.render(rng, group, mask), image)


@pytest.mark.parametrize("mask", [np.zeros, np.ones], ids=["empty", "full"])
def test_any_mask_can_be_rendered(mask):
  for seed in range(12):
    rng = np.random.default_rng(seed)
    image = phantom.render(rng, seed % 3, mask((40, 48), np.uint8))
    assert image.shape == (40, 48) and image.dtype == np.uint8
    assert image.std() > 0.5


@pytest.mark.parametrize("shape", [(64, 64), (48, 80), (166, 200)])
def test_shapes_types_and_nesting(shape):
  for group in range(len(RACES)):
    image, mask = phantom.generate(np.random.default_rng(group), group, shape)
    assert image.shape == mask.shape == shape
    assert image.dtype == mask.dtype == np.uint8
    assert set(np.unique(mask)) == {0, 1, 2}
    # A ring of rim lies around the cup everywhere.
    cup = np.pad(mask == 2, 1)
    near = cup[2:, 1:-1] | cup[:-2, 1:-1] | cup[1:-1, 2:] | cup[1:-1, :-2]
    assert (mask[near] > 0).all()


def test_the_look_grows_with_the_image():
  for group in range(len(RACES)):
    areas = [
      np.mean(
        [
          (
            phantom.generate(np.random.default_rng(i), group, shape)[1] > 0
          ).sum()
          for i in range(8)
        ]
      )
      for shape in ((64, 64), (128, 160))
    ]
    assert areas[1] == pytest.approx(4 * areas[0], rel=0.03)


def test_an_unknown_group_is_refused():
  with pytest.raises(ValueError, match="group must index"):
    phantom.generate(np.random.default_rng(0), 3)


def test_anatomy_follows_the_table(patients):
  for race, cases in zip(RACES, patients, strict=True):
    anatomy = phantom.ANATOMY[race]
    disc = np.array([(mask > 0).sum() for _, mask in cases])
    cup = np.array([(mask == 2).sum() for _, mask in cases])
    radius = np.sqrt(disc / np.pi)
    assert radius.mean() == pytest.approx(anatomy.disc_radius[0], abs=0.5)
    assert radius.std() == pytest.approx(anatomy.disc_radius[1], abs=0.4)
    ratio = np.sqrt(cup / disc)
    assert ratio.mean() == pytest.approx(anatomy.cup_to_disc[0], abs=0.03)


def test_anatomy_differs_between_groups(patients):
  def areas(label):
    return [np.mean([(m >= label).sum() for _, m in x]) for x in patients]

  asian, black, white = areas(2)
  assert black > 1.25 * max(asian, white)
  axes = []
  for cases in patients:
    spread = [np.cov(np.argwhere(mask > 0).T) for _, mask in cases]
    values = np.linalg.eigvalsh(spread)
    axes.append(np.sqrt(values[:, 1] / values[:, 0]).mean())
  asian, black, white = axes
  assert asian > 1.1 * max(black, white)


def around(mask):
  """The background within 8 pixels of the disc, but for its edge."""
  distance = ndimage.distance_transform_edt(mask == 0)
  return (distance > 1.5) & (distance < 8)


def test_rims_are_brighter_than_the_background_in_every_group(patients):
  for cases in patients:
    steps = np.array(
      [
        np.median(image[mask == 1]) - np.median(image[mask == 0])
        for image, mask in cases
      ]
    )
    assert (steps > 0).mean() > 0.95
    assert 8 < np.median(steps) < 30


def test_levels_and_noise_are_those_of_photographs(patients):
  """As in 26 grey photographs of optic nerves at this size."""
  for cases in patients:
    level = np.array([np.median(image[mask == 0]) for image, mask in cases])
    assert 40 < level.mean() < 80
    assert 8 < level.std() < 30
    noise = []
    for image, mask in cases:
      x = image.astype(float)
      fine = (x - ndimage.gaussian_filter(x, 1.0))[mask == 0]
      noise.append(1.48 * np.median(np.abs(fine - np.median(fine))))
    assert 0.5 < np.mean(noise) < 2.5


def test_findings_tell_minorities_apart(patients):
  """What a disc's margin shows: bright outside, dark inside, or neither."""
  outside, inside = [], []
  for cases in patients:
    rows = []
    for image, mask in cases:
      rim, near = image[mask == 1], image[around(mask)]
      background = np.median(image[mask == 0])
      rows.append(
        (
          np.mean(near > background + 0.6 * (np.median(rim) - background)),
          np.mean(rim < background),
        )
      )
    a, b = np.mean(rows, axis=0)
    outside.append(a)
    inside.append(b)
  asian, black, white = range(3)
  assert outside[asian] > 3 * outside[white]
  assert inside[black] > 3 * inside[white]


def test_group_counts_are_the_data_sets_proportions():
  assert phantom.group_counts(8000) == (752, 1161, 6087)
  assert phantom.group_counts(100) == (9, 15, 76)
  assert phantom.group_counts(0) == (0, 0, 0)
  assert all(sum(phantom.group_counts(n)) == n for n in range(200))
  with pytest.raises(ValueError, match="at least 0"):
    phantom.group_counts(-1)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  directory = tmp_path_factory.mktemp("phantoms") / "new" / "raw"
  phantom.write(directory, train=20, test=3, seed=6, progress=False)
  return directory


def test_files_are_those_of_the_current_release(written):
  files = sorted(written.glob("*.npz"))
  assert [f.name for f in files] == [f"data_{i:05d}.npz" for i in range(1, 30)]
  for file in files:
    with np.load(file) as case:
      assert set(case) == {"slo_fundus", "disc_cup_mask", "age", *ATTRIBUTES}
      assert case["slo_fundus"].dtype == np.uint8
      assert case["slo_fundus"].shape == (64, 64)
      assert case["disc_cup_mask"].dtype == np.float64
      assert set(np.unique(case["disc_cup_mask"])) == {0, -1, -2}
      assert 18 <= case["age"] <= 95
      for key in ("age", *ATTRIBUTES):
        assert case[key].shape == ()
        assert case[key].dtype == np.int64
      for key, names in ATTRIBUTES.items():
        assert -1 <= case[key] < len(names)


def test_csv_agrees_with_the_files(written):
  text = (written / "data_summary.csv").read_text()
  assert text.splitlines()[0] == (
    "filename,age,gender,race,ethnicity,language,maritalstatus,use"
  )
  assert text == text.lower()
  rows = list(csv.DictReader(text.splitlines()))
  assert len(rows) == 29
  for row in rows:
    with np.load(written / row["filename"]) as case:
      assert int(row["age"]) == case["age"]
      for key in ATTRIBUTES:
        assert parse_attribute(key, row[key]) == case[key]
  for use, counts in (
    ("training", phantom.group_counts(20)),
    ("test", (3, 3, 3)),
  ):
    races = [row["race"] for row in rows if row["use"] == use]
    assert tuple(races.count(race.lower()) for race in RACES) == counts


def test_a_case_depends_on_seed_and_number_only(written):
  # Nine test cases, of test seed 0, come first; training has seed 6.
  for number, seed in ((7, 0), (12, 6)):
    with np.load(written / f"data_{number:05d}.npz") as case:
      rng = np.random.default_rng([seed, number])
      image, mask = phantom.generate(rng, int(case["race"]))
      np.testing.assert_array_equal(case["slo_fundus"], image)
      np.testing.assert_array_equal(-case["disc_cup_mask"], mask)


def test_balanced_training_cases(tmp_path):
  phantom.write(tmp_path, train=9, test=1, balanced=True, progress=False)
  rows = (tmp_path / "data_summary.csv").read_text()
  for race in ATTRIBUTES["race"]:
    assert rows.count(f",{race.lower()},") == 3 + 1
  with pytest.raises(ValueError, match="10 training cases cannot be split"):
    phantom.write(tmp_path / "b", train=10, test=0, balanced=True)


def test_added_patients_change_no_others(written, tmp_path):
  """They come last, of the groups that are smaller than the largest."""
  phantom.write(tmp_path, train=20, test=3, added=4, seed=6, progress=False)
  before = sorted(written.glob("*.npz"))
  for file in before:
    assert file.read_bytes() == (tmp_path / file.name).read_bytes()
  text = (tmp_path / "data_summary.csv").read_text()
  old = (written / "data_summary.csv").read_text()
  assert text.startswith(old)
  new = list(csv.reader(text[len(old) :].splitlines()))
  assert [(row[0], row[3], row[-1]) for row in new] == [
    (f"data_{i:05d}.npz", race, "training")
    for i, race in enumerate(["asian"] * 4 + ["black"] * 4, len(before) + 1)
  ]


def test_to_equal_groups_nothing_is_added(tmp_path):
  phantom.write(
    tmp_path, train=3, test=0, balanced=True, added=2, progress=False
  )
  assert len(list(tmp_path.glob("*.npz"))) == 3


def test_a_directory_in_use_is_refused(tmp_path):
  (tmp_path / "notes.txt").write_text("mine")
  with pytest.raises(FileExistsError, match=f"{tmp_path}.*new directory"):
    phantom.write(tmp_path, train=1, test=0, progress=False)
  assert [f.name for f in tmp_path.iterdir()] == ["notes.txt"]


def test_negative_counts_are_refused(tmp_path):
  with pytest.raises(ValueError, match="at least 0"):
    phantom.write(tmp_path, train=1, test=-1, progress=False)
  with pytest.raises(ValueError, match="at least 0, not -2"):
    phantom.write(tmp_path, train=1, test=1, added=-2, progress=False)
