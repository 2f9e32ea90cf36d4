"""A config is checked whole, and a run's directory remembers its own."""

import json
from pathlib import Path

import jax
import pytest
from ml_collections import ConfigDict

from configs import fairseg, phantom
from fairdiff_jax import config as configs
from fairdiff_jax.layout import Layout

ROOT = Path(__file__).parents[1]


def smoke(**changes):
  config = phantom.get_config("smoke")
  config.update_from_flattened_dict(changes)
  return config


def test_defaults_are_allowed():
  for name, field in configs.all_fields().items():
    assert field.holds(field.default), name
    assert field.doc and field.allowed, name
  configs.check(configs.defaults(), 8)


@pytest.mark.parametrize(
  ("field", "value", "allowed"),
  [
    ("seed", -1, "a whole number from 0 to 4294967295"),
    ("seed", 2**32, "a whole number from 0 to 4294967295"),
    ("data.phantom.test_seed", -1, "a whole number from 0"),
    ("data.size", (64,), r"\(rows, columns\)"),
    ("image.spacing", "trailing", "'even', 'leading', 'linspace'"),
    ("image.prediction", "epsilon", "'v', 'eps', 'x0'"),
    ("image.solver", "euler", "'ddim', 'dpm"),
    ("image.schedule", "cosin", "'cosine', 'linear', 'scaled_linear'"),
    ("image.min_snr", -1.0, "at least 0"),
    ("image.dropout", 1.5, "a number from 0 to 1"),
    ("image.dropout", float("nan"), "a number from 0 to 1"),
    ("image.attention", ("false",), "True or False for each level"),
    ("image.channels", (), "whole numbers of at least 1"),
    ("image.channels", (8, 0), "whole numbers of at least 1"),
    ("train.ema_decay", 1.1, "a number from 0 to 1"),
    ("train.points", (4, 2), "'to' not before 'from'"),
    ("train.points", (0.5, 2.0), "shares of train.steps"),
    ("train.points", (-1, 2), "whole steps"),
    ("optimizer.image.accumulate", 0, "a whole number of at least 1"),
    ("optimizer.image.kind", "adam", "'adamw', 'sgd'"),
    ("bank.every", -1, "a whole number of at least 0"),
    ("bank.min_solidity", 2.0, "a number from 0 to 1"),
    ("fairness.method", "varience", "'variance'"),
    ("fairness.strategy", "equal_scales", "'equal_scale'"),
    ("fairness.real_share", 2.0, "a number from 0 to 1"),
    ("evaluation.equity", "fairest", "'fairdiff_std'"),
    ("parallel.rules", (("(", "fsdp"),), "pairs"),
    ("parallel.rules", ((".*", "split"),), "'fsdp' or 'replicate'"),
  ],
)
def test_a_value_out_of_range_is_named(field, value, allowed):
  with pytest.raises(ValueError, match=rf"^{field} must be .*{allowed}.*got"):
    configs.check(smoke(**{field: value}))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"train.steps": 4, "train.segmenter": (2, 8)},
      "goes beyond train.steps=4",
    ),
    (
      {
        "train.steps": 12,
        "train.points": (0, 8),
        "train.image": (0, 8),
        "train.segmenter": (2, 8),
      },
      "nothing learns after step 8 of train.steps=12",
    ),
    ({"segmenter.weights": "sam.pth"}, "is read by no small_unet"),
    ({"image.weights": "sd15"}, "is read by no unet"),
    ({"image.cache_latents": True}, "which has no latents; set it to False"),
    ({"image.sample_steps": 1001}, "image.sample_steps=1001 is not in 1 to"),
    ({"image.attention": (True, False)}, "for each of the 1 levels"),
    ({"data.size": (32, 33)}, "must be multiples of 2"),
    ({"train.segmentation_batch": 12}, "12 cannot be split over 8 devices"),
    ({"train.generation_batch": 12}, "12 cannot be split over 8 devices"),
    ({"parallel.fsdp": 3}, "does not divide the 8 devices"),
    ({"parallel.compile": "pmap", "parallel.fsdp": 2}, "set parallel.fsdp=1"),
    ({"data.pooled": ("Asian",)}, "set data.min_cases"),
    (
      {"evaluation.features": "inception"},
      "its weights in evaluation.features_weights",
    ),
    ({"evaluation.features_weights": "a.pth"}, "is read by no 'segmenter'"),
  ],
)
def test_what_contradicts_itself_is_named(changes, message):
  with pytest.raises(ValueError, match=message):
    configs.check(smoke(**changes), 8)


def test_all_faults_are_named_at_once():
  with pytest.raises(ValueError) as error:
    configs.check(smoke(seed=-1, **{"image.dropout": 2.0}))
  first, *rest = str(error.value).splitlines()
  assert first == "the config cannot run:"
  assert [line.split()[0] for line in rest] == ["seed", "image.dropout"]


def test_a_batch_of_what_never_learns_is_not_asked_for():
  changes = {"train.points": (0, 0), "train.image": (0, 0)}
  configs.check(smoke(**changes, **{"train.generation_batch": 3}), 8)


def test_spans_follow_the_steps():
  config = fairseg.get_config()
  assert configs.span(config, "image") == (5_000, 30_000)
  config.train.steps = 2_000
  configs.check(config)
  assert configs.span(config, "points") == (0, 2_000)
  assert configs.span(config, "segmenter") == (1_000, 2_000)
  assert configs.span(phantom.get_config(), "segmenter") == (250, 1000)
  config.train.segmenter = (7, 9)
  assert configs.span(config, "segmenter") == (7, 9)


def test_unknown_variant():
  for module in (fairseg, phantom):
    with pytest.raises(ValueError, match="unknown variant 'smok' of"):
      module.get_config("smok")


def stored(workdir):
  return json.loads(Layout(workdir).config.read_text())


def test_a_run_remembers_its_config(tmp_path):
  config = configs.defaults()
  configs.claim(tmp_path, config)
  loaded = configs.load(tmp_path)
  assert isinstance(loaded, ConfigDict)
  assert loaded.to_dict() == config.to_dict()
  assert loaded.parallel.rules[0][1] == "fsdp"
  configs.claim(tmp_path, loaded)  # a run may be claimed again
  assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_a_run_older_than_a_field_has_its_default(tmp_path):
  old = configs.defaults().to_dict()
  del old["train"]["ema_decay"], old["bank"]
  old["gone"], old["data"]["augment"] = 1, True
  Layout(tmp_path).config.write_text(json.dumps(old))  # before versions
  expected = configs.defaults()
  expected.data.augment = "light"
  assert configs.load(tmp_path).to_dict() == expected.to_dict()
  configs.require(tmp_path, expected)
  configs.claim(tmp_path, expected)
  assert stored(tmp_path)["version"] == configs.VERSION


@pytest.mark.parametrize(
  "text",
  ["{", "[]", '{"version": 2}', '{"seed": -1}', '{"version": 2, "config": 3}'],
)
def test_a_damaged_config_is_named(tmp_path, text):
  path = Layout(tmp_path).config
  path.write_text(text)
  with pytest.raises(ValueError, match="is damaged .* give --config") as error:
    configs.load(tmp_path)
  assert str(path) in str(error.value)


def test_another_config_is_refused_and_nothing_is_overwritten(tmp_path):
  configs.claim(tmp_path, smoke())
  before = stored(tmp_path)
  other = smoke(seed=7, **{"train.points": (0, 4)})
  for ask in (configs.require, configs.claim):
    with pytest.raises(ValueError) as error:
      ask(tmp_path, other)
    assert str(error.value).splitlines()[1:3] == [
      "  seed: 0 before, 7 now",
      "  train.points: [0, 8] before, [0, 4] now",
    ]
    assert "--continue" in str(error.value)
  assert stored(tmp_path) == before


@pytest.mark.parametrize(
  "changes",
  [
    {"checkpoint.every": 1},
    {"log.every": 0},
    {"parallel.fsdp": 2},
    {"evaluation.equity": "fairseg_sum"},
    {"baseline": False},
    {"data.directory": "/moved"},  # what lies there counts, not where
    {"data.source": "/moved/FairSeg"},
    {"train.points": (0, 8)},  # the same steps in other words
    {"data.pooled": ("Asian",)},  # found, not asked for
  ],
)
def test_what_alters_no_result_may_change(tmp_path, changes):
  old, new = smoke(), smoke(**changes)
  configs.claim(tmp_path, old)
  configs.claim(tmp_path, new)
  assert configs.load(tmp_path).to_dict() == new.to_dict()
  assert configs.config_hash(old) == configs.config_hash(new)


def test_going_on_differently_is_recorded(tmp_path):
  trained_with, _ = configs.claim(tmp_path, smoke(), data="abc")
  longer = smoke(**{"optimizer.image.learning_rate": 1e-5})
  configs.claim(tmp_path, longer, data="abc", step=6, proceed=True)
  field = "optimizer.image.learning_rate"
  change = {"step": 6, "fields": {field: [2e-3, 1e-5]}}
  assert configs.load_record(tmp_path).changes == (change,)
  # Going on from the same checkpoint again is no other change.
  for proceed in (False, True):
    configs.claim(
      tmp_path,
      longer,
      data="abc",
      step=6,
      trained_with=trained_with,
      proceed=proceed,
    )
    assert stored(tmp_path)["changes"] == [change]


def test_other_data_are_refused(tmp_path):
  configs.claim(tmp_path, smoke(), data="abc")
  with pytest.raises(ValueError, match="prepared data: abc before, def now"):
    configs.claim(tmp_path, smoke(), data="def")
  configs.claim(tmp_path, smoke())  # where data are not looked at
  assert stored(tmp_path)["data"] == "abc"


def test_a_lost_config_is_known_from_the_checkpoint(tmp_path):
  trained_with, _ = configs.claim(tmp_path, smoke(), data="abc")
  Layout(tmp_path).config.unlink()
  trained_with = json.loads(json.dumps(trained_with))
  with pytest.raises(ValueError, match="seed: 0 before, 3 now"):
    configs.claim(tmp_path, smoke(seed=3), trained_with=trained_with)
  configs.claim(tmp_path, smoke(), data="abc", trained_with=trained_with)


def test_jax_tells_seeds_apart_that_the_config_allows():
  highest = configs.all_fields()["seed"]
  assert highest.holds(2**32 - 1)
  keys = [jax.random.key_data(jax.random.key(s)) for s in (0, 2**32 - 1)]
  assert (keys[0] != keys[1]).any()
