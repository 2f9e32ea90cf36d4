"""Files of weights: what is wrong with one is said with its name."""

import json
import re
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from configs import fairseg
from fairdiff_jax.objectives.segmentation import make_network
from fairdiff_jax.pretrained import (
  graft,
  importing,
  segment_anything,
  stable_diffusion,
  vit,
)

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}
FORMATS = (".safetensors", ".npz", ".pth", ".ckpt")


def save(path, tensors=None):
  tensors = TENSORS if tensors is None else tensors
  if path.suffix == ".npz":
    np.savez(path, **tensors)
  else:
    safetensors.numpy.save_file(tensors, path)
  return path


def refuses(path, read, message, error=ValueError):
  """Holds that the one line names the file and says what to do."""
  with pytest.raises(error) as raised:
    read(path)
  assert str(path) in str(raised.value)
  assert re.search(message, str(raised.value)), raised.value
  assert "allow_pickle" not in str(raised.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_tensors_are_read_and_nothing_else(tmp_path, suffix):
  path = save(tmp_path / f"a{suffix}")
  np.testing.assert_array_equal(graft.read(path)["a"], TENSORS["a"])
  whole = path.read_bytes()
  for size in (1, 9, len(whole) // 2, len(whole) - 1):
    path.write_bytes(whole[:size])
    refuses(path, graft.read, "download or copy it again")


@pytest.mark.parametrize("suffix", FORMATS)
def test_what_is_no_file_of_weights(tmp_path, monkeypatch, suffix):
  """Said before PyTorch is looked for."""
  monkeypatch.setitem(sys.modules, "torch", None)
  path = tmp_path / f"a{suffix}"
  refuses(path, graft.read, "does not exist; correct", FileNotFoundError)
  path.touch()
  refuses(path, graft.read, "is empty; download")
  path.write_text(POINTER)
  refuses(path, graft.read, "run `git lfs pull`")
  path.unlink()
  path.mkdir()
  (path / "model.safetensors").touch()
  refuses(path, graft.read, r"is a directory; .* \(it holds model.safetensors")


def test_pytorch_is_asked_for_by_name(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)
  path = tmp_path / "a.pth"
  path.write_bytes(b"PK")
  refuses(path, graft.read, "pip install torch, or convert", ImportError)


def test_other_files_are_no_weights(tmp_path):
  path = tmp_path / "a.html"
  path.write_text("<html>")
  refuses(path, graft.read, "name a file of weights")


def test_pickled_arrays_are_refused(tmp_path):
  path = tmp_path / "a.npz"
  np.savez(path, a=np.array([{}], object))
  refuses(path, vit.load, "array 'a' holds pickled objects, which are refused")


def test_addresses_and_the_home_directory(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  save(tmp_path / "a.npz")
  assert graft.read("~/a.npz").keys() == {"a"}
  address = "https://example.org/a.safetensors"
  for read in (graft.read, importing.read, stable_diffusion.load):
    refuses(address, read, "is an address; download")


def test_long_lists_are_cut(tmp_path):
  source = graft.Source({f"t{i}": np.zeros(1) for i in range(300)})
  with pytest.raises(ValueError, match=r"'t0', .*, ... and 295 more\]"):
    source.finish()
  tree = {f"t{i}": np.zeros(2) for i in range(300)}
  with pytest.raises(ValueError, match="... and 295 more") as raised:
    graft.require_shapes(tree, source.arrays)
  assert len(str(raised.value)) < 500


def test_tensors_that_are_no_numbers_are_named():
  source = graft.Source({"a": np.array(["x"]), "b": np.zeros(3)})
  with pytest.raises(ValueError, match="tensor 'a' holds <U1, not numbers"):
    source.take("a")
  with pytest.raises(ValueError, match=r"'b' has shape \(3,\), not 2 axes"):
    source.take("b", 2)


def test_readers_name_the_file(tmp_path):
  refuses(
    save(tmp_path / "a.safetensors"),
    segment_anything.load,
    "no tensor 'image_encoder.pos_embed'",
  )
  refuses(save(tmp_path / "a.npz"), vit.load, "no tensor 'Transformer/posem")
  for name, shape in (
    ("image_encoder.pos_embed", (3,)),
    ("image_encoder.pos_embed", ()),
  ):
    path = save(tmp_path / "b.safetensors", {name: np.zeros(shape, "f4")})
    refuses(path, segment_anything.load, "not 4 axes")


@pytest.fixture
def folder(tmp_path):
  """A U-Net's folder as diffusers writes it, but for its tensors."""
  folder = tmp_path / "unet"
  folder.mkdir()
  config = {"_class_name": "UNet2DConditionModel"}
  (folder / "config.json").write_text(json.dumps(config))
  save(folder / stable_diffusion.WEIGHTS[0])
  return folder


@pytest.mark.parametrize(
  ("content", "error", "message"),
  [
    (None, FileNotFoundError, "unet has no config.json; copy it"),
    ("", ValueError, "config.json is empty"),
    ("{", ValueError, "config.json is damaged .* copy or download"),
    ("[]", ValueError, "config.json is damaged .*no JSON object"),
    (POINTER, ValueError, "config.json is Git LFS's pointer"),
    ("{}", ValueError, "holds a network without a class, not a UNet2DC"),
    ('{"architectures": 3}', ValueError, "holds a 3, not a UNet2DC"),
  ],
)
def test_configurations_that_cannot_be_read(folder, content, error, message):
  path = folder / "config.json"
  path.unlink()
  if content is not None:
    path.write_text(content)
  refuses(
    folder, lambda _: stable_diffusion.load(folder.parent), message, error
  )


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("norm_num_groups", None),
    ("attention_head_dim", "8"),
    ("cross_attention_dim", True),
    ("block_out_channels", []),
    ("block_out_channels", [320, "640"]),
    ("layers_per_block", 0),
    ("in_channels", {}),
  ],
)
def test_values_that_mean_nothing_are_named(folder, field, value):
  path = folder / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
  message = f"configuration {field} = {re.escape(repr(value))} is not supported"
  refuses(folder, stable_diffusion.load, message)


def test_folders_and_files_in_each_others_place(folder, tmp_path):
  file = folder / stable_diffusion.WEIGHTS[0]
  refuses(file, stable_diffusion.load, "is a file, not a folder .*import-weig")
  refuses(folder, stable_diffusion.load_single_file, "is a directory; name")
  none = tmp_path / "none"
  for read in (importing.read, stable_diffusion.load):
    refuses(none, read, "does not exist; correct its path", FileNotFoundError)
  file.unlink()
  refuses(folder, stable_diffusion.load, "has neither", FileNotFoundError)


@pytest.mark.parametrize(
  ("index", "error", "message"),
  [
    ("", ValueError, "is empty"),
    ("{}", ValueError, "no weight_map"),
    ('{"weight_map": {"a": 3}}', ValueError, "no weight_map"),
    ('{"weight_map": {"a": "../../b"}}', ValueError, "no weight_map"),
    (
      '{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}',
      FileNotFoundError,
      r"names 2 files that are not there \(one.*, two.safetensors\); copy",
    ),
  ],
)
def test_indices_of_files_that_are_not_there(folder, index, error, message):
  name = stable_diffusion.WEIGHTS[0]
  (folder / name).unlink()
  path = folder / f"{name}.index.json"
  path.write_text(index)
  refuses(path, lambda _: stable_diffusion.load(folder), message, error)


SAM = dict(
  rank=2,
  embed_dim=16,
  depth=1,
  num_heads=2,
  global_blocks=(0,),
  window=1,
  decoder_dim=32,
  decoder_depth=1,
  decoder_mlp_dim=32,
)


def samed_config(path, **changes):
  config = fairseg.get_config("samed").unlock().segmenter
  config.image_size = 32
  config.samed.update(SAM | changes)
  config.weights = str(path)
  return config


@pytest.fixture(scope="module")
def sam(tmp_path_factory):
  """A SAM of 16 channels and one block."""
  shapes = jax.eval_shape(
    make_network(samed_config("")).init, jax.random.key(0)
  )
  params = {**shapes.params, **shapes.frozen["params"]}
  params.pop("lora")
  variables = jax.tree.map(
    lambda x: np.zeros(x.shape, x.dtype),
    {"params": params, "constants": shapes.frozen["constants"]},
  )
  path = tmp_path_factory.mktemp("sam") / "sam.safetensors"
  return save(path, segment_anything.state_dict(variables))


def test_a_sam_of_another_size_says_what_to_set(sam):
  load = make_network(samed_config(sam, embed_dim=768, depth=12)).load
  with pytest.raises(ValueError) as raised:
    load()
  assert str(raised.value) == (
    f"{sam} does not fit segmenter.samed: it is a ViT (16 channels, 1 blocks):"
    " set segmenter.samed.embed_dim=16 (now 768), segmenter.samed.depth=1 (now"
    " 12), or name other weights"
  )


def test_heads_that_no_shape_shows_are_held_to_the_file(sam):
  load = make_network(samed_config(sam, decoder_heads=4)).load
  with pytest.raises(ValueError, match=r"decoder_heads=8 \(now 4\)"):
    load()


def test_published_sizes_have_names():
  assert vit.describe(1024, 24) == "a ViT-L (1024 channels, 24 blocks)"


SCHEDULER = {
  "_class_name": "PNDMScheduler",
  "beta_end": 0.012,
  "beta_schedule": "scaled_linear",
  "beta_start": 0.00085,
  "clip_sample": False,
  "num_train_timesteps": 1000,
  "set_alpha_to_one": False,
  "skip_prk_steps": True,
  "steps_offset": 1,
  "trained_betas": None,
}


def scheduler(directory, **changes):
  path = directory / stable_diffusion.SCHEDULER
  path.parent.mkdir(exist_ok=True)
  path.write_text(json.dumps(SCHEDULER | changes))
  return path


def test_schedules_are_those_of_the_files(tmp_path):
  read = stable_diffusion.read_schedule
  assert read(tmp_path) == stable_diffusion.SCHEDULE  # without a file
  assert importing.read_scheduler(tmp_path) is None
  scheduler(tmp_path)
  assert read(tmp_path) == stable_diffusion.SCHEDULE
  assert importing.read_scheduler(tmp_path) == SCHEDULER
  scheduler(
    tmp_path, prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2"
  )
  expected = {"prediction": "v", "schedule": "cosine", "num_steps": 1000}
  assert read(tmp_path) == expected
  sd15 = fairseg.get_config("sd15").image
  for field, value in stable_diffusion.SCHEDULE.items():
    assert sd15[field] == value


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("trained_betas", [0.1]),
    ("rescale_betas_zero_snr", True),
    ("clip_sample", True),
    ("thresholding", True),
    ("timestep_type", "continuous"),
    ("use_flow_sigmas", True),
    ("prediction_type", "flow_prediction"),
    ("prediction_type", ["epsilon"]),
    ("beta_schedule", "sigmoid"),
    ("beta_schedule", None),
    ("beta_start", "0.1"),
    ("num_train_timesteps", 0),
  ],
)
def test_schedules_that_no_run_can_follow_are_named(tmp_path, field, value):
  path = scheduler(tmp_path, **{field: value})
  message = rf"{field} = {re.escape(repr(value))} is not supported; \w+"
  for read in (stable_diffusion.read_schedule, importing.read_scheduler):
    refuses(path, lambda _, read=read: read(tmp_path), message)


def test_a_damaged_schedule_is_named(tmp_path):
  path = scheduler(tmp_path)
  for content in ("", POINTER, "{"):
    path.write_text(content)
    refuses(path, lambda _: stable_diffusion.read_schedule(tmp_path), "")
