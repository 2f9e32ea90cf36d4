"""Reading patients' files: dialects, images, masks, damage."""

import io
import os
import re
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from patients import BUILD, IMAGE, MASK, eye, patient, write_source

from fairdiff_jax.data import attributes, npz, prepare


@pytest.fixture
def source(tmp_path):
  return write_source(tmp_path / "source")


@pytest.mark.parametrize("dialect", attributes.DIALECTS)
def test_every_dialect_reads_the_same(tmp_path, dialect):
  image, mask = eye()
  form = attributes.DIALECTS[dialect]
  white = next(code for code, i in form.race.items() if i == 2)
  current = dialect == "current"
  arrays = {
    form.image: image,
    form.mask: mask,
    "race": white,
    "age": 60 if form.age == "years" else 60 * 365.25,
    "gender": 1,
    "ethnicity" if current else "hispanic": 0,
    "language": 1,
    "maritalstatus" if current else "marriagestatus": 3,
    "datadir": np.array({"an": "object"}, object),
  } | dict.fromkeys(form.markers, 12345)
  np.savez(tmp_path / "data_00001.npz", **arrays)
  case = npz.read_case(tmp_path / "data_00001.npz")
  assert case.dialect == dialect
  assert case.attributes == {
    "race": 2,
    "gender": 1,
    "ethnicity": 0,
    "language": 1,
    "maritalstatus": 3,
    "age": 60,
  }
  np.testing.assert_array_equal(case.image, image)
  np.testing.assert_array_equal(case.mask, -mask)


@pytest.mark.parametrize(
  ("dtype", "scale"), [(np.float32, 1 / 255), (np.float64, 1), (np.int64, 1)]
)
def test_image_types(tmp_path, dtype, scale):
  image, _ = eye()
  path = tmp_path / "a.npz"
  np.savez(path, **patient(slo_fundus=(image * scale).astype(dtype)))
  np.testing.assert_array_equal(npz.read_case(path).image, image)


BAD = {
  "a nan": (
    {"slo_fundus": np.where(IMAGE > 100, np.nan, IMAGE)},
    "slo_fundus has .* pixels that are NaN",
  ),
  "a range": (
    {"slo_fundus": IMAGE.astype(np.int32) * 300},
    "goes from 0 to .*; needed is 0 to 255",
  ),
  "a colour image": (
    {"slo_fundus": np.stack([IMAGE] * 3, -1)},
    r"shape \(60, 76, 3\).* one grey image",
  ),
  "a range from -1": (
    {"slo_fundus": IMAGE / 100 - 1},
    "goes from -1 to 0.99; needed is 0 to 255",
  ),
  "a range that could be two": (
    {"slo_fundus": IMAGE / 100},
    "goes from 0 to 1.99, which could be from 0 to 1 with values beyond it",
  ),
  "a constant": (
    {"slo_fundus": np.full_like(IMAGE, 7)},
    "shows nothing: every pixel is 7",
  ),
  "zeros and ones": (
    {"slo_fundus": (IMAGE > 100).astype(np.uint8)},
    "no grey levels: every pixel is 0 or 1",
  ),
  "zeros and ones in floating point": (
    {"slo_fundus": (IMAGE > 100).astype(np.float32)},
    "no grey levels: every pixel is 0 or 1",
  ),
  "no pixels": (
    {"slo_fundus": IMAGE[:0], "disc_cup_mask": MASK[:0]},
    r"shape \(0, 76\)",
  ),
  "mask values": (
    {"disc_cup_mask": np.where(MASK == -2, 2, MASK)},
    "holds the values 2; a mask has 0 background, -1 rim and -2 cup",
  ),
  "a fraction": (
    {"disc_cup_mask": MASK * 1.0000001},
    "holds the values -2.00.*, -1.0000001.*, which are not whole numbers.*"
    " round them",
  ),
  "a type without negative numbers": (
    {"disc_cup_mask": MASK.astype(np.int8).astype(np.uint8)},
    "holds the values 254, 255, which are -1 and -2 if the type uint8.*"
    " save it as int8",
  ),
  "no numbers": (
    {"disc_cup_mask": MASK.astype(np.int8).astype(str)},
    r"shape \(60, 76\) and type <U.* of whole numbers \(int8\)",
  ),
  "mask with nan": (
    {"disc_cup_mask": np.where(MASK == -2, np.nan, MASK)},
    "holds the values nan",
  ),
  "no disc": ({"disc_cup_mask": 0 * MASK}, "shows no disc"),
  "no cup": ({"disc_cup_mask": MASK.clip(-1, 0)}, "shows no cup"),
  "sizes": (
    {"disc_cup_mask": MASK[:-1]},
    "image 60 x 76 and mask 59 x 76 differ in size",
  ),
  "keys": ({"disc_cup_mask": None}, "not a known form .* slo_fundus; one of"),
  "a pickle": (
    {"race": np.array({"a": 1}, object)},
    "array 'race' holds pickled objects, which are refused",
  ),
  "a lost cup": (
    {"disc_cup_mask": np.where(MASK == 0, 0, -1 - (IMAGE == IMAGE.max()))},
    "cup 0.00; .* 64 points are too few for it; raise data.num_points",
  ),
  "two discs": (
    {"disc_cup_mask": np.concatenate([MASK, MASK], 1)}
    | {"slo_fundus": np.concatenate([IMAGE, IMAGE], 1)},
    r"its points do not give its mask back \(Dice of the disc 0\.67, .*"
    "discs: 2, cups: 2; keep one of each",
  ),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_case_is_set_aside_with_its_reason(source, tmp_path, fault):
  changes, message = BAD[fault]
  np.savez(source / "data_00002.npz", **patient(**changes))
  report = prepare.build(source, tmp_path / "data", **BUILD)
  assert report.usable == 2
  ((file, reason),) = report.set_aside
  assert file == "data_00002.npz"
  with pytest.raises(ValueError, match=message):
    raise ValueError(reason)
  assert f"data_00002.npz  {reason}" in str(report)


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "text"])
def test_damaged_file(source, damage):
  path = source / "data_00001.npz"
  np.savez_compressed(path, **patient())
  data = bytearray(path.read_bytes())
  if damage == "flipped":
    data[200:220] = bytes(20)
  text = b"version https://git-lfs.github.com/spec/v1"
  path.write_bytes(
    {
      "empty": b"",
      "truncated": data[:-100],
      "flipped": data,
      "text": text,
    }[damage]
  )
  with pytest.raises(ValueError, match=r"data_00001.npz: .*download or copy"):
    npz.read_case(path)


@pytest.mark.parametrize("high", [1, 1.0000001, 1.0009765625])
@pytest.mark.parametrize("low", [0, -1e-7])
def test_a_hair_beyond_the_range_is_not_another_range(tmp_path, low, high):
  image = (IMAGE / 255).astype(np.float64)
  image[0, 0], image[0, 1] = low, high
  path = tmp_path / "a.npz"
  np.savez(path, **patient(slo_fundus=image))
  found = npz.read_case(path).image
  np.testing.assert_array_equal(found.ravel()[2:], IMAGE.ravel()[2:])
  assert (found[0, 0], found[0, 1]) == (0, 255)


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.float16, np.float64])
def test_mask_types(tmp_path, dtype):
  path = tmp_path / "a.npz"
  np.savez(path, **patient(disc_cup_mask=MASK.astype(dtype)))
  np.testing.assert_array_equal(npz.read_case(path).mask, -MASK)


def test_values_that_cannot_be_read_are_unknown_and_listed(tmp_path):
  path = tmp_path / "a.npz"
  changes = {"race": 7, "gender": "x", "language": [1, 2], "age": 20000}
  np.savez(path, **patient(**changes, ethnicity=b"\xff"))
  case = npz.read_case(path)
  assert case.attributes == dict.fromkeys(attributes.KEYS, -1) | {
    "maritalstatus": 4
  }
  assert dict(case.unread) == {
    "race": "7",
    "gender": "x",
    "ethnicity": "\N{REPLACEMENT CHARACTER}",
    "language": "[1 2]",
    "age": "20000",
  }


def test_abbreviations_are_read(tmp_path):
  path = tmp_path / "a.npz"
  np.savez(path, **patient(gender="F", age="90+"))
  case = npz.read_case(path)
  assert (case.attributes["gender"], case.attributes["age"]) == (0, 90)
  assert case.unread == ()


def test_race_2_without_an_age_is_unknown(tmp_path):
  path = tmp_path / "a.npz"
  arrays = {"fundus_slo": IMAGE, "disc_cup": MASK, "pid": 1, "race": 2}
  np.savez(path, **arrays)
  case = npz.read_case(path)
  assert case.attributes["race"] == -1
  assert case.unread == (("race", "2 without an age"),)


def test_only_the_arrays_that_are_needed_are_unpacked(tmp_path):
  """Others may be large, or unreadable."""
  path = tmp_path / "a.npz"
  other = np.array([{}], object)
  np.savez(path, **patient(), fundus_slo=other, disc_cup=other, pid=other)
  np.testing.assert_array_equal(npz.read_case(path).image, IMAGE)


@pytest.mark.parametrize("name", ["slo_fundus", "race"])
def test_sizes_are_looked_at_before_unpacking(source, name):
  """A file of some KB can ask for GB, in an array or in its header."""
  path = source / "data_00001.npz"
  arrays = patient()
  del arrays[name]
  np.savez_compressed(path, **arrays)
  header = io.BytesIO()
  np.lib.format.write_array_header_2_0(
    header, {"descr": "<f8", "fortran_order": False, "shape": (2**40, 8)}
  )
  with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr(f"{name}.npy", header.getvalue() + bytes(10**6))
  report = prepare.check(source, progress=False)
  ((file, reason),) = report.set_aside
  assert file == "data_00001.npz"
  assert f"array '{name}' claims 70368744177664 bytes" in reason
  assert str(source) not in reason
  np.savez_compressed(path, **arrays | {name: np.zeros((5000, 5000))})
  with pytest.raises(ValueError, match=f"array '{name}' has 200 MB, more than"):
    npz.read_case(path)


def test_a_header_of_gigabytes_is_not_unpacked(tmp_path):
  path = tmp_path / "a.npz"
  np.savez_compressed(path, **patient(race=None))
  with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
    with archive.open("race.npy", "w") as file:
      file.write(b"\x93NUMPY\x02\x00" + (10**8).to_bytes(4, "little"))
      for _ in range(100):
        file.write(b" " * 10**6)
  tracemalloc.start()
  with pytest.raises(ValueError, match="array 'race' cannot be read"):
    npz.read_case(path)
  assert tracemalloc.get_traced_memory()[1] < 10**7
  tracemalloc.stop()


def test_one_bad_file_never_ends_a_check(source, tmp_path):
  """Whatever is called like a file of ours is used or named."""
  good = (source / "data_00001.npz").read_bytes()
  (source / "data_00004.npz").symlink_to(tmp_path / "gone.npz")
  (source / "data_00005.npz").mkdir()
  (source / "data_00006.NPZ").write_bytes(good)
  (source / "incomplete_data_00007.npz").write_bytes(good)
  (source / "data_00003.npz").write_bytes(b"")
  report = prepare.check(source, progress=False)
  assert report.usable == 2
  reasons = dict(report.set_aside)
  for file, part in {
    "data_00004.npz": f"is a link to {tmp_path / 'gone.npz'}, which is not",
    "data_00005.npz": "is not a file",
    "data_00006.NPZ": "ends in .NPZ; rename it to end in .npz",
    "incomplete_data_00007.npz": "half written .*; delete it",
    "data_00003.npz": r"cannot \(0 bytes\) be read",
  }.items():
    assert re.search(part, reasons.pop(file)), file
  assert not reasons


def test_names_that_are_no_text_are_set_aside(source, tmp_path):
  name = os.fsdecode(b"data_\xff.npz")
  (source / name).write_bytes((source / "data_00001.npz").read_bytes())
  report = prepare.build(source, tmp_path / "data", **BUILD)
  assert report.usable == 3
  assert report.set_aside == [
    ("data_\\udcff.npz", "its name is not UTF-8 text; rename it.")
  ]
  str(report).encode()


numbers = hnp.arrays(
  st.one_of(
    hnp.integer_dtypes(endianness="="),
    hnp.unsigned_integer_dtypes(endianness="="),
    hnp.floating_dtypes(endianness="="),
    hnp.boolean_dtypes(),
    hnp.complex_number_dtypes(endianness="="),
    hnp.unicode_string_dtypes(endianness="=", max_len=3),
    hnp.byte_string_dtypes(max_len=3),
    hnp.datetime64_dtypes(endianness="="),
  ),
  hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=6),
)
codes = hnp.arrays(
  np.float64,
  hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
  elements=st.sampled_from([0.0, -1.0, -2.0, -2.0]),
)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(
  st.dictionaries(st.sampled_from([*attributes.KEYS, "slo_fundus"]), numbers),
  st.one_of(numbers, codes),
)
def test_any_file_is_used_or_set_aside(tmp_path_factory, arrays, mask):
  source = tmp_path_factory.mktemp("any")
  image = np.arange(mask.size, dtype=np.uint8).reshape(mask.shape)
  np.savez(
    source / "a.npz", **{"slo_fundus": image, "disc_cup_mask": mask} | arrays
  )
  report = prepare.check(source, progress=False)
  assert report.usable + len(report.set_aside) == 1
  assert str(source) not in str(report.set_aside)
  str(report)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.data())
def test_any_damage_is_set_aside_or_harmless(tmp_path_factory, data):
  source = tmp_path_factory.mktemp("any")
  content = io.BytesIO()
  np.savez(content, **patient())
  content = bytearray(content.getvalue())
  # Headers are at both ends of the file, and between arrays.
  places = st.one_of(
    st.integers(0, 300), st.integers(-1500, -1), st.integers(-8000, -1)
  )
  for _ in range(data.draw(st.integers(1, 6))):
    content[data.draw(places)] = data.draw(st.integers(0, 255))
  (source / "a.npz").write_bytes(content)
  report = prepare.check(source, progress=False)
  assert report.usable + len(report.set_aside) == 1
