"""The library as its users import it: on one run, trained once."""

import doctest
import inspect
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest
import safetensors.numpy
import tables
from jax import export

import fairdiff_jax
from fairdiff_jax import config as configs
from fairdiff_jax import fairness, files, handover
from fairdiff_jax.data import prepare, storage
from fairdiff_jax.data.examine import resize
from fairdiff_jax.evaluation import evaluate, report
from fairdiff_jax.evaluation.predictor import Predictor
from fairdiff_jax.layout import Layout
from fairdiff_jax.objectives import latent_space
from fairdiff_jax.objectives.segmentation import segmentation_task
from fairdiff_jax.pretrained import fairdiff, stable_diffusion
from fairdiff_jax.run import Run
from fairdiff_jax.training.checkpoint import Inference
from fairdiff_jax.training.setup import setup
from fairdiff_jax.training.trained import Trained
from fairdiff_jax.training.validation import SCORE

README = Path(__file__).parents[1] / "README.md"


def examples(thing):
  """Runs the examples of an object's own docstring, where there are some."""
  module = inspect.getmodule(thing)
  globs = vars(module) | {"__name__": module.__name__}
  (test,) = doctest.DocTestFinder(exclude_empty=False, recurse=False).find(
    thing, getattr(thing, "__name__", str(thing)), module, globs
  )
  assert test.examples, f"{test.name} has no example"
  found = doctest.DocTestRunner(optionflags=doctest.REPORT_NDIFF).run(test)
  assert not found.failed


@pytest.fixture(scope="module")
def place(tmp_path_factory, trained_run):
  """A folder with the run and the photographs of the examples."""
  folder = tmp_path_factory.mktemp("place")
  shutil.copytree(trained_run, folder / "runs" / "first")
  photographs(folder / "photographs")
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(folder)
    examples(Run.train)
    yield folder


@pytest.fixture(scope="module")
def run(place):
  return fairdiff_jax.Run("runs/first")


@pytest.fixture(scope="module")
def test_cases(run):
  return storage.load(run.layout.data, "test", progress=False)


def photographs(folder):
  rng = np.random.default_rng(0)
  (folder / "later").mkdir(parents=True)
  grey = rng.integers(0, 2**16, (40, 50), np.uint16)
  cv2.imwrite(str(folder / "one.png"), grey)
  colour = rng.integers(0, 256, (32, 32, 3), np.uint8)
  cv2.imwrite(str(folder / "two.jpg"), colour)
  np.save(folder / "later" / "one.npy", rng.random((70, 33)))
  (folder / "notes.txt").write_text("of nothing")
  (folder / ".hidden").write_text("")


PUBLIC = [
  fairdiff_jax,
  fairness,
  *(getattr(fairdiff_jax, n) for n in fairdiff_jax.__all__ if n[0] != "_"),
  *(getattr(fairness, n) for n in fairness.__all__),
  *(
    value.func if hasattr(value, "func") else getattr(value, "fget", value)
    for name, value in vars(Run).items()
    if name[0] != "_" and name != "train"
  ),
]


@pytest.mark.parametrize("thing", PUBLIC, ids=lambda x: x.__name__)
def test_every_public_name_has_an_example_that_runs(place, thing):
  examples(thing)


def readme():
  (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
  return [code]


def tour():
  cells = json.loads((README.parent / "docs" / "tour.ipynb").read_text())[
    "cells"
  ]
  return ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]


@pytest.mark.parametrize("cells", [readme, tour], ids=["readme", "tour"])
def test_what_the_documentation_runs_runs(place, cells, monkeypatch):
  """On the run that is there, of the same recipe, which is also validated."""

  def train(self):
    configs.require(self.layout.workdir, self.config)
    return True

  recipe = fairdiff_jax.recipe
  validated = {"data.validation": 0.2, "evaluation.every": 2}
  monkeypatch.setattr(
    fairdiff_jax, "recipe", lambda name: recipe(name, validated)
  )
  monkeypatch.setattr(Run, "train", train)
  monkeypatch.setenv("MPLBACKEND", "agg")
  names = {}
  for cell in cells():
    exec(cell, names)
  names["run"].trained  # noqa: B018
  if "figures" in names and cells is tour:
    assert names["figures"]["n"] <= len(names["test"].name)
    assert {*names["intervals"]["few"]} == {*names["run"].groups}


@pytest.mark.parametrize(
  ("start", "heavy"),
  [
    ("import fairdiff_jax; dir(fairdiff_jax)", "jax scipy cv2 ml_collections"),
    ("fairdiff_jax.Run", "matplotlib scipy.stats tensorboardX"),
  ],
)
def test_what_is_slow_to_import_waits_until_it_is_needed(start, heavy):
  code = f"""import sys, fairdiff_jax
{start}
assert not {{*{heavy.split()}}} & {{*sys.modules}}"""
  subprocess.run([sys.executable, "-c", code], check=True)


def test_a_name_that_is_not_there_is_named():
  with pytest.raises(AttributeError, match="has no attribute 'Rum'"):
    fairdiff_jax.Rum  # noqa: B018


def test_rates_and_pictures_are_logged(run):
  """Every network's learning rate, and each bank's picture."""
  lines = run.layout.log.read_text().splitlines()
  logged = [json.loads(line) for line in lines]
  told = {name for line in logged for name in line if "_rate/" in name}
  assert told == {
    f"learning_rate/{n}" for n in ("points", "image", "segmenter")
  }
  sheets = sorted(run.layout.banks.glob("step_*/sheet.png"))
  assert sheets == [bank / "sheet.png" for bank in run.layout.filled_banks]
  events = [p.read_bytes() for p in run.layout.workdir.glob("events.*")]
  assert b"".join(events).count(b"\x89PNG") >= len(sheets) > 0


def test_segment_is_what_the_report_is_about(run, test_cases, monkeypatch):
  shown = {}
  monkeypatch.setattr(report, "write", lambda _, **page: shown.update(page))
  config = run.config.copy_and_resolve_references().unlock()
  config.evaluation.synthetic_per_group = 0
  evaluate.evaluate(run.trained, evaluation=config.evaluation)
  expected = shown["cases"]["prediction"]
  assert len(np.unique(expected)) > 1
  images = test_cases.image
  np.testing.assert_array_equal(run.segment(images), expected)
  np.testing.assert_array_equal(run.segment(images / 255), expected)
  colour = np.repeat(images[..., None], 3, axis=-1)
  np.testing.assert_array_equal(run.segment([*colour[::-1]]), expected[::-1])
  (alone,) = run.segment([images[3]])
  np.testing.assert_array_equal(alone, expected[3])


def test_a_run_is_chosen_by_its_validation_cases(run):
  """What the log says is what masks of the run say, and the best is taken."""
  lines = files.read_json_lines(run.layout.log)
  history = [(x["step"], x[SCORE]) for x in lines if SCORE in x]
  assert [step for step, _ in history] == [4, 6, 8]
  assert [*run.trained.history] == history
  step, score = max(history, key=lambda of: (of[1], -of[0]))
  summary = report.read(run.layout.workdir)
  used, baseline = summary["checkpoints"].values()
  assert used == {
    **{"chosen": "best", "step": step, "score": score, "validations": 3},
    **{"last_step": 8, "stopped_early": False},
  }
  assert baseline["chosen"] == "best" and baseline["validations"] == 3
  told = summary["facts"]["checkpoint of FairDiff, joint"]
  assert told.startswith(f"best of 3 validations, step {step}, validation ES")
  page = (run.layout.report / "index.html").read_text()
  assert told in page and "Validation ES-Dice" in page
  cases = storage.load(run.layout.data, "validation", progress=False)
  of = cases.attributes["race"]
  for wanted in {"best", "last"}:
    chosen = fairdiff_jax.Run(run.layout.workdir, checkpoint=wanted)
    found = chosen.segment(cases.image)
    (line,) = [
      x for x in lines if x["step"] == chosen.trained.step and SCORE in x
    ]
    scaled = []
    for structure, values in (("cup", (2,)), ("rim", (1,)), ("disc", (1, 2))):
      a, b = (np.isin(masks, values) for masks in (cases.mask, found))
      areas = (a.sum((1, 2)) + b.sum((1, 2))).astype(float)
      dice = 2 * (a & b).sum((1, 2)) / np.where(areas, areas, np.nan)
      means = [np.nanmean(dice[of == g]) for g in range(3)]
      for name, mean in zip(run.groups, means, strict=True):
        told = line[f"validation/dice/{structure}/{name}"]
        assert told == pytest.approx(mean, abs=1e-12)
      scaled.append(np.nanmean(dice) / (1 + np.std(means, ddof=1)))
      told = line[f"validation/es_dice/{structure}"]
      assert told == pytest.approx(scaled[-1], abs=1e-12)
    assert line[SCORE] == pytest.approx(np.mean(scaled[:2]), abs=1e-12)
    assert chosen.trained.score == line[SCORE]
  with pytest.raises(ValueError, match="no checkpoint of step 5; there are"):
    _ = fairdiff_jax.Run(run.layout.workdir, checkpoint=5).trained
  with pytest.raises(ValueError, match="--checkpoint first is no checkpoint"):
    fairdiff_jax.Run(run.layout.workdir, checkpoint="first")


def test_no_patient_is_in_two_splits_of_a_run(run):
  """By name, and by what is seen of them."""
  splits = {
    split: storage.load(run.layout.data, split, progress=False)
    for split in ("train", "validation", "test")
  }
  seen = {}
  for split, cases in splits.items():
    names = {*(cases.patient or cases.name)}
    seen[split] = names | {image.tobytes() for image in cases.image}
    groups = np.unique(cases.attributes["race"])
    assert groups.tolist() == [0, 1, 2], split
  assert len(splits["train"].name) + len(splits["validation"].name) == 24
  for one, other in itertools.combinations(seen.values(), 2):
    assert one.isdisjoint(other)


def test_validation_needs_validation_cases(tmp_path):
  config = fairdiff_jax.recipe("phantom:smoke", {"evaluation.every": 2})
  with pytest.raises(ValueError, match=r"has none; .*data\.validation=.2"):
    fairdiff_jax.Run(tmp_path / "run", config).train()
  assert not Layout(tmp_path / "run").config.exists()


def test_images_of_any_size_have_masks_of_theirs(run, test_cases):
  image = test_cases.image[0]
  large = cv2.resize(image, (96, 64), interpolation=cv2.INTER_CUBIC)
  images = [image, large, large.astype(np.uint16) * 200]
  masks = run.segment(images)
  chances = run.segment(images, probabilities=True)
  assert [m.shape for m in masks] == [(32, 32), (64, 96), (64, 96)]
  for mask, chance in zip(masks, chances, strict=True):
    assert chance.shape == (*mask.shape, 3)
    np.testing.assert_allclose(chance.sum(-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(chance.argmax(-1), mask)
  prepared = resize(large, (32, 32))
  logits = run._predictor(None)._logits(prepared[None])[0]
  expected = cv2.resize(logits, (96, 64)).argmax(-1)
  np.testing.assert_array_equal(masks[1], expected)
  assert run.segment([]) == []


@pytest.mark.parametrize(
  ("images", "message"),
  [
    (np.zeros((8, 8)), "is one image; give several"),
    (np.zeros((8, 8, 3)), "is one image; give several"),
    ([np.zeros((8, 8))], "image 0 shows nothing"),
    ([np.full((8, 8), np.nan)], "image 0 has pixels that are NaN"),
    ([np.eye(9), np.array([["a"]])], "image 1 holds <U1"),
    ([np.zeros((2, 8, 8))], r"image 0 has shape \(2, 8, 8\); needed is one"),
  ],
)
def test_what_is_no_image_is_named(run, images, message):
  with pytest.raises(ValueError, match=message):
    run.segment(images)


def test_a_crop_is_taken_from_the_centre(run):
  """What lies beyond it is background; smaller images are refused."""
  config = run.trained.config.copy_and_resolve_references().unlock()
  config.data.crop = (40, 48)
  record = run.trained.record._replace(config=config)
  cropping = Predictor(run.trained._replace(record=record))
  image = np.random.default_rng(1).integers(0, 256, (60, 60), np.uint8)
  (whole,) = cropping.segment([image])
  (centre,) = run.segment([image[10:50, 6:54]])
  np.testing.assert_array_equal(whole[10:50, 6:54], centre)
  whole[10:50, 6:54] = 0
  assert not whole.any()
  (chances,) = cropping.segment([image], probabilities=True)
  assert (chances[0] == (1, 0, 0)).all()
  with pytest.raises(ValueError, match="image 0 is 39 x 60, smaller than the"):
    cropping.segment([image[:39]])


def test_what_cannot_be_generated_is_named(run):
  mask = np.zeros((1, 32, 32), int)
  for masks, groups, message in (
    (mask[:, :8], "Asian", r"\(1, 8, 32\); give \[n, 32, 32\]"),
    (mask + 3, "Asian", "classes from 0 to 2"),
    (mask, ["Asian"] * 2, "1 masks, but 2 groups"),
    (mask, "Asien", "Did you mean 'Asian'"),
  ):
    with pytest.raises(ValueError, match=message):
      run.generate(masks, groups)


def test_predictions_are_files(run, place, tmp_path):
  done = run.predict("photographs", tmp_path)
  assert (done.segmented, done.kept) == (3, 0)
  names = ["later/one.png", "one.png", "two.png"]
  shapes = {"one.png": (40, 50), "two.png": (32, 32), names[0]: (70, 33)}
  for name in names:
    mask = cv2.imread(str(tmp_path / "masks" / name), cv2.IMREAD_UNCHANGED)
    assert mask.shape == shapes[name]
    assert set(np.unique(mask)) <= {0, 1, 2}
    overlay = cv2.imread(str(tmp_path / "overlays" / name))
    assert overlay.shape == (*shapes[name], 3)
  columns, rows = files.read_csv(tmp_path / "areas.csv")
  assert columns == [
    *("image", "mask", "height", "width"),
    *("cup_pixels", "rim_pixels", "disc_pixels", "cup_to_disc"),
  ]
  (first, *_) = rows
  mask = cv2.imread(str(tmp_path / "masks" / first["mask"]), -1)
  assert int(first["cup_pixels"]) == (mask == 2).sum()
  assert int(first["disc_pixels"]) == (mask > 0).sum()
  (unread,) = files.read_csv(tmp_path / "unreadable.csv")[1]
  assert unread["image"] == "notes.txt"
  assert "cannot be read as an image" in unread["reason"]
  sheet = cv2.imread(str(tmp_path / "contact_sheet.png"))
  assert sheet.shape[1] > 8 * 160


def test_prediction_goes_on_and_overwrites_nothing(run, place, tmp_path):
  images, out = tmp_path / "images", tmp_path / "out"
  shutil.copytree("photographs", images)
  run.predict(images, out)
  before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
  (out / "masks" / "one.png").unlink()
  (out / "overlays" / "two.png").unlink()
  done = run.predict(images, out)
  assert (done.segmented, done.kept) == (3, 1)
  assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before

  shutil.copyfile(images / "one.png", images / "three.png")
  assert run.predict(images, out)[:2] == (4, 3)
  shutil.copyfile(images / "two.jpg", images / "one.png")
  with pytest.raises(ValueError, match=r"one.png is not the image that .*made"):
    run.predict(images, out)
  shutil.copyfile("photographs/one.png", images / "one.png")
  shutil.copyfile(out / "masks" / "two.png", out / "masks" / "three.png")
  with pytest.raises(ValueError, match=r"three.png is not the file that was"):
    run.predict(images, out)
  (out / "manifest.jsonl").unlink()
  with pytest.raises(ValueError, match=r"three.png is not what this request"):
    run.predict(images, out)
  with pytest.raises(FileExistsError, match="is in use"):
    run.predict(images, images)


def test_a_directory_without_images_is_named(run, tmp_path):
  with pytest.raises(FileNotFoundError, match="none is not a directory"):
    run.predict(tmp_path / "none", tmp_path / "out")
  with pytest.raises(FileNotFoundError, match="holds no file"):
    run.predict(tmp_path, tmp_path / "out")


def test_evaluation_elsewhere_says_so(run, tmp_path):
  """Other patients, of other size, by the groups found there."""
  other = run.config.data.copy_and_resolve_references().unlock()
  other.size, other.phantom.test_seed = (40, 48), 7
  prepare.prepare(other, tmp_path / "site")
  figures = run.evaluate(tmp_path / "site", tmp_path / "out")
  assert figures["n"] == 6
  (notice,) = figures["notices"]
  assert notice.startswith("External evaluation: these are the 6 test cases of")
  assert str(tmp_path / "site") in notice
  assert figures["facts"]["external data"] == str(tmp_path / "site")
  assert figures["title"] == "first on other data"
  assert any("made up" in caution for caution in figures["cautions"])
  assert "External evaluation" in (tmp_path / "out/index.html").read_text()
  assert report.read(run.layout.workdir)["facts"]["data"] == "phantom"
  where = run.report(tmp_path / "site")
  assert where.parent == run.layout.workdir / "external"
  with pytest.raises(ValueError, match="leave --data out"):
    run.evaluate(run.layout.data)


def test_other_data_must_show_the_same(run, tmp_path):
  source = tables.lungs(tmp_path / "source", 6)
  config = fairdiff_jax.recipe("own:smoke", {"data.source": str(source)})
  prepare.prepare(config.data, tmp_path / "lungs")
  message = "shows left lung, right lung in 1 channels, but .*disc, cup within"
  with pytest.raises(ValueError, match=message):
    run.evaluate(tmp_path / "lungs")
  (source.parent / "domain.json").unlink()
  for path in source.parent.glob("label_*.png"):
    label = cv2.imread(str(path), -1)
    cv2.imwrite(str(path), np.where(label == 80, 1, np.where(label, 2, 0)))
  prepare.prepare(config.data, tmp_path / "fundus")
  with pytest.raises(ValueError, match="fundus: No attribute 'race'"):
    run.evaluate(tmp_path / "fundus")


@pytest.fixture(scope="module")
def handed_over(run, tmp_path_factory):
  out = tmp_path_factory.mktemp("handed_over") / "out"
  run.export(out)
  return out


def relative_error(found, expected):
  """The largest, by the largest value."""
  return np.abs(found - expected).max() / np.abs(expected).max()


def test_the_program_alone_gives_the_same_logits(run, handed_over, test_cases):
  data = (handed_over / "segmenter" / "segmenter.stablehlo").read_bytes()
  program = export.deserialize(bytearray(data))
  for number in (1, 5):
    images = test_cases.image[:number, ..., None]
    logits = np.asarray(program.call(images))
    expected = run._predictor(None)._logits(test_cases.image[:number])
    assert relative_error(logits, expected) < 1e-5
    np.testing.assert_array_equal(logits.argmax(-1), expected.argmax(-1))


def test_what_is_handed_over_explains_itself(run, handed_over):
  names = {str(p.relative_to(handed_over)) for p in handed_over.rglob("*.*")}
  assert names == {
    "MODEL_CARD.md",
    "config.json",
    "image/parameters.safetensors",
    "points/parameters.safetensors",
    "segmenter/parameters.safetensors",
    "segmenter/segmenter.stablehlo",
  }
  card = (handed_over / "MODEL_CARD.md").read_text()
  assert "Made-up patients" in card and "| Asian | 1 |" in card
  assert "FairDiff, joint | cup |" in card and "Apache-2.0" in card
  assert "uint8 [n, 32, 32, 1]" in card
  arrays = safetensors.numpy.load_file(
    handed_over / "segmenter" / "parameters.safetensors"
  )
  variables = run.trained.inference.network("segmenter")
  assert {k.split("/")[0] for k in arrays} == {"params"}
  found = sum(array.size for array in arrays.values())
  assert found == sum(x.size for x in jax.tree.leaves(variables))
  with pytest.raises(FileExistsError, match="is not overwritten"):
    run.export(handed_over)


def test_paths_and_licences_of_others_are_kept_apart(run):
  config = run.config.copy_and_resolve_references().unlock()
  config.data.source = "/home/me/FairSeg"
  config.image.network = "stable_diffusion"
  config.image.weights = "/home/me/sd15"
  config.evaluation.features_weights = "/home/me/inception.pth"
  config.segmenter.network = "samed"
  shared = handover._shareable(config.to_dict())
  assert shared["data"]["source"] == "FairSeg"
  assert "/home" not in json.dumps(shared)
  text = handover._licences(config, ("image", "segmenter"))
  for licence in ("CC BY-NC-ND 4.0", "OpenRAIL-M", "Segment Anything, Apache"):
    assert licence in text


SIZES = {
  "samed": {
    "segmenter.image_size": 32,
    "segmenter.samed.embed_dim": 8,
    "segmenter.samed.depth": 1,
    "segmenter.samed.num_heads": 2,
    "segmenter.samed.global_blocks": (),
    "segmenter.samed.window": 2,
    "segmenter.samed.decoder_dim": 8,
    "segmenter.samed.decoder_depth": 1,
    "segmenter.samed.decoder_heads": 2,
    "segmenter.samed.decoder_mlp_dim": 8,
  },
  "transunet": {
    "segmenter.image_size": 32,
    "segmenter.transunet.stages": (),
    "segmenter.transunet.hidden_dim": 8,
    "segmenter.transunet.mlp_dim": 8,
    "segmenter.transunet.num_heads": 2,
    "segmenter.transunet.num_layers": 1,
    "segmenter.transunet.decoder_channels": (8, 8, 8, 8, 8),
  },
}


def drawn(init):
  """Variables of a network, at random."""
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: rng.uniform(0.01, 0.2, x.shape).astype(x.dtype),
    jax.eval_shape(init, jax.random.key(0)),
  )


def test_stable_diffusion_is_handed_over_as_weights_to_start_from(
  run, tmp_path
):
  """In folders as diffusers writes them, which a run can start from."""
  config = run.config.copy_and_resolve_references().unlock()
  config.image.update(stable_diffusion.SCHEDULE)
  config.image.network, config.image.unet = "stable_diffusion", "decoder"
  config.image.stable_diffusion = {
    "block_out_channels": (8,),
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": 8,
    "norm_num_groups": 4,
    "hint_channels": (4, 8),
    "latent_channels": 4,
    "autoencoder_channels": (8, 8),
    "autoencoder_layers": 1,
  }
  variables = drawn(latent_space.latent_space(config.image, 3).init)
  record = run.trained.record._replace(config=config)
  handover._write_image(
    run.trained._replace(record=record), variables, tmp_path
  )
  config.image.weights = str(tmp_path)
  found = latent_space.latent_space(config.image, 3).load()
  jax.tree.map(np.testing.assert_array_equal, found, variables)


@pytest.mark.parametrize("network", SIZES)
def test_every_segmenter_can_be_handed_over(network, tmp_path):
  config = fairdiff_jax.recipe(
    "phantom:smoke",
    SIZES[network]
    | {
      "segmenter.network": network,
      "train.points": (0, 0),
      "train.image": (0, 0),
      "train.segmenter": (0.0, 1.0),
      "fairness.strategy": "none",
    },
  )
  task = segmentation_task(config.segmenter)
  made = drawn(task.init)
  trees = ({"segmenter": tree} for tree in (*made, {}))
  params, batch_stats, imported, frozen = trees
  trained = Trained(
    Layout(tmp_path / "run"),
    configs.Record(config),
    setup(config, jax.devices()[:1]),
    8,
    Inference(params, batch_stats, frozen, imported),
  )
  handover.write(trained, tmp_path / "out")
  folder = tmp_path / "out" / "segmenter"
  data = (folder / "segmenter.stablehlo").read_bytes()
  program = export.deserialize(bytearray(data))
  images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 1), np.uint8)
  logits = np.asarray(program.call(images))
  expected = jax.jit(task.logits)(made, images / np.float32(127.5) - 1)
  assert relative_error(logits, expected) < 1e-5
  if network == "samed":
    tensors = safetensors.numpy.load_file(folder / "lora.safetensors")
    assert "w_a_000" in tensors and "mask_decoder.iou_token.weight" in tensors
    assert not any(name.startswith("image_encoder") for name in tensors)
    whole = {
      "params": made.params | made.frozen["params"],
      "constants": made.frozen["constants"],
    }
    found = fairdiff.load_samed_lora(tensors, whole)
    jax.tree.map(np.testing.assert_array_equal, found, whole)


def test_a_recipe_is_checked_whole():
  recipe = fairdiff_jax.recipe
  config = recipe("phantom:smoke", {"train": {"steps": 9}, "seed": 3})
  assert (config.train.steps, config.seed) == (9, 3)
  assert config.is_locked
  assert recipe("phantom:smoke").train.steps == 8
  for overrides, message in (
    ({"train.step": 3}, "train.step is no field .*mean 'train.steps'"),
    ({"train.steps": "many"}, "train.steps must be a whole number"),
    ({"seed": -1}, "seed must be"),
  ):
    with pytest.raises(ValueError, match=message):
      recipe("phantom:smoke", overrides)
  with pytest.raises(FileNotFoundError, match="there are fairseg, own, phan"):
    recipe("phantoms")


def test_a_planned_run_starts_with_any_config(tmp_path):
  """`prepare` leaves a config; training with it, or with another, is free."""
  planned = fairdiff_jax.recipe("phantom:smoke", {"seed": 3})
  configs.plan(tmp_path, planned)
  assert fairdiff_jax.Run(tmp_path).config.seed == 3
  assert not configs.load_record(tmp_path).started
  other = fairdiff_jax.recipe("phantom:smoke", {"seed": 4})
  configs.plan(tmp_path, other)
  configs.require(tmp_path, planned)
  configs.claim(tmp_path, planned)
  assert configs.load_record(tmp_path) == configs.Record(planned.lock())
  with pytest.raises(ValueError, match="seed: 3 before, 4 now"):
    configs.plan(tmp_path, other)
  configs.plan(tmp_path, planned)
  assert configs.load_record(tmp_path).started


def test_nothing_else_knows_what_lies_where():
  """The names of a run's files stand in one module."""
  package = Path(fairdiff_jax.__file__).parent
  named = ('"checkpoints"', '"metrics.jsonl"', '"baseline"', '"config.json"')
  found = [
    (path.name, name)
    for path in package.rglob("*.py")
    if path.parent.name not in ("pretrained",)
    and path.name not in ("layout.py", "handover.py")
    for name in named
    if f"/ {name}" in path.read_text()
  ]
  assert found == []
