"""Checkpoints: parts, facts, retention, damage. On a state of a few numbers."""

import json
import os
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fairdiff_jax.layout import Layout
from fairdiff_jax.training import checkpoint
from fairdiff_jax.training.banks import check_bank, prune
from fairdiff_jax.training.checkpoint import Checkpoints, fingerprint
from fairdiff_jax.training.step import TrainState


def make_state(step):
  def weights(seed):
    key = jax.random.key(seed)
    return {"segmenter": {"kernel": jax.random.normal(key, (64, 64))}}

  return TrainState(
    step=jnp.int32(step),
    updates={"segmenter": jnp.int32(step)},
    params=weights(step),
    ema=weights(step + 100),
    batch_stats={"segmenter": {}},
    frozen={"segmenter": {"mean": jnp.arange(3.0)}},
    imported={"segmenter": {}},
    opt_state=weights(step + 200),
    fairness=(),
  )


@pytest.fixture
def abstract():
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return checkpoint.describe(
    lambda: make_state(0), lambda tree: jax.tree.map(lambda _: device, tree)
  )


def save(workdir, *steps, keep=2):
  checkpoints = Checkpoints(workdir, keep)
  for step in steps:
    checkpoints.save(make_state(step), facts={"bank": f"bank of {step}"})
  checkpoints.close()


def files(workdir, step, part):
  return [
    path
    for path in (workdir / "checkpoints" / str(step) / part).rglob("*")
    if path.is_file()
  ]


def test_split_and_join():
  state = make_state(1)
  parts = checkpoint.split(state)
  assert set(parts["inference"]) == {"ema", "batch_stats", "frozen"}
  assert fingerprint(checkpoint.join(parts, {"segmenter": {}})) == fingerprint(
    state
  )


def test_round_trip(tmp_path, abstract):
  save(tmp_path, 3, 6)
  checkpoints = Checkpoints(tmp_path, 2)
  step, parts = checkpoints.restore(abstract, ("inference", "training"))
  checkpoints.close()
  assert step == 6
  assert fingerprint(checkpoint.join(parts, {"segmenter": {}})) == fingerprint(
    make_state(6)
  )


def test_inference_alone_reads_nothing_else(tmp_path, abstract):
  save(tmp_path, 3)
  shutil.rmtree(tmp_path / "checkpoints" / "3" / "training")
  step, inference, *_ = checkpoint.restore_inference(tmp_path, None, abstract)
  assert step == 3
  assert fingerprint(inference) == fingerprint(
    checkpoint.Inference.of(make_state(3))
  )


def test_nothing_to_restore(tmp_path, abstract):
  checkpoints = Checkpoints(tmp_path, 2)
  assert checkpoints.restore(abstract) is None
  checkpoints.close()
  with pytest.raises(FileNotFoundError, match="no checkpoint yet"):
    checkpoint.restore_inference(tmp_path, None, abstract)


def test_facts(tmp_path):
  save(tmp_path, 3, 6)
  checkpoints = Checkpoints(tmp_path)
  assert checkpoints.facts(3)["bank"] == "bank of 3"
  assert checkpoints.facts(6)["bank"] == "bank of 6"
  checkpoints.close()


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_keeps_the_newest(tmp_path, keep):
  save(tmp_path, 1, 2, 3, 4, keep=keep)
  checkpoints = Checkpoints(tmp_path)
  assert checkpoints.steps == [1, 2, 3, 4][-keep:]
  checkpoints.close()
  found = {path.name for path in (tmp_path / "checkpoints").iterdir()}
  assert found == {str(s) for s in [1, 2, 3, 4][-keep:]}


def test_a_reader_leaves_a_save_in_progress_alone(tmp_path, abstract):
  save(tmp_path, 3)
  unfinished = tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp"
  shutil.copytree(tmp_path / "checkpoints" / "3", unfinished)
  assert checkpoint.restore_inference(tmp_path, None, abstract)[0] == 3
  assert unfinished.exists()
  save(tmp_path, 6)
  assert not unfinished.exists()


def truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def damage_data(change):
  def damage(workdir, step):
    largest = max(
      files(workdir, step, "training"), key=lambda path: path.stat().st_size
    )
    change(largest)

  return damage


def damage_all(workdir, step):
  for path in files(workdir, step, ""):
    path.write_bytes(b"")


def damage_facts(workdir, step):
  path = workdir / "checkpoints" / str(step) / "_CHECKPOINT_METADATA"
  truncate(path)


def another_value(workdir, step):
  """What only the digest can tell: all is well-formed, but not as saved."""
  path = workdir / "checkpoints" / str(step) / "_CHECKPOINT_METADATA"
  content = json.loads(path.read_text())
  digests = content["custom_metadata"]["sha256"]
  digests["training"] = "0" * 64
  path.write_text(json.dumps(content))


def remove_part(workdir, step):
  shutil.rmtree(workdir / "checkpoints" / str(step) / "training")


DAMAGE = {
  "truncated": damage_data(truncate),
  "flipped": damage_data(flip),
  "emptied": damage_all,
  "facts": damage_facts,
  "another value": another_value,
  "part missing": remove_part,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_noticed_and_replaced(tmp_path, abstract, kind):
  save(tmp_path, 3, 6)
  DAMAGE[kind](tmp_path, 6)
  checkpoints = Checkpoints(tmp_path, 2)
  step, parts = checkpoints.restore(abstract, ("inference", "training"))
  assert step == 3
  assert fingerprint(checkpoint.join(parts, {"segmenter": {}})) == fingerprint(
    make_state(3)
  )
  checkpoints.save(make_state(6), facts={"bank": None})
  checkpoints.close()
  checkpoints = Checkpoints(tmp_path)
  step, parts = checkpoints.restore(abstract, ("inference", "training"))
  checkpoints.close()
  assert step == 6
  assert fingerprint(checkpoint.join(parts, {"segmenter": {}})) == fingerprint(
    make_state(6)
  )


def test_damage_is_warned_of(tmp_path, abstract, caplog):
  save(tmp_path, 3, 6)
  another_value(tmp_path, 6)
  checkpoints = Checkpoints(tmp_path)
  checkpoints.restore(abstract, ("inference", "training"))
  checkpoints.close()
  assert "checkpoint of step 6 is damaged" in caplog.text


def test_nothing_readable_is_an_error(tmp_path, abstract):
  save(tmp_path, 3)
  another_value(tmp_path, 3)
  checkpoints = Checkpoints(tmp_path)
  with pytest.raises(ValueError, match=r"can be read.*step 3.*Move it away"):
    checkpoints.restore(abstract, ("inference", "training"))
  checkpoints.close()


def test_fingerprint_sees_names_types_and_values():
  trees = [
    {"a": np.zeros(2, np.float32)},
    {"b": np.zeros(2, np.float32)},
    {"a": np.zeros(2, np.int32)},
    {"a": np.zeros((2, 1), np.float32)},
    {"a": np.array([0, 1e-30], np.float32)},
  ]
  assert len({fingerprint(tree) for tree in trees}) == len(trees)
  assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})


def test_saves_leave_neither_handles_nor_threads(tmp_path):
  checkpoints = Checkpoints(tmp_path, 2)

  def held():
    checkpoints.wait()
    return len(os.listdir("/proc/self/fd")), threading.active_count()

  for step in (1, 2):  # what Orbax keeps for all saves
    checkpoints.save(make_state(step), facts={})
  before = held()
  for step in range(3, 13):
    checkpoints.save(make_state(step), facts={})
  assert held() == before
  checkpoints.close()


def test_what_could_not_be_written_is_said(tmp_path, monkeypatch):
  class Full:
    def result(self):
      raise RuntimeError("UNAVAILABLE: No space left on device")

  checkpoints = Checkpoints(tmp_path, 2)
  monkeypatch.setattr(
    checkpoints._checkpointer,
    "save_checkpointables_async",
    lambda *args, **kwargs: Full(),
  )
  checkpoints.save(make_state(3), facts={})
  with pytest.raises(OSError, match=r"step 3 could not.*No space left.*make"):
    checkpoints.wait()
  checkpoints.close()


@pytest.mark.parametrize("parts", [("inference",), ("inference", "training")])
def test_a_renamed_checkpoint_is_another_step_s(tmp_path, abstract, parts):
  save(tmp_path, 3, 6)
  folder = tmp_path / "checkpoints"
  (folder / "6").rename(folder / "7")
  checkpoints = Checkpoints(tmp_path)
  assert checkpoints.restore(abstract, parts)[0] == 3
  shutil.rmtree(folder / "3")
  checkpoints.close()
  checkpoints = Checkpoints(tmp_path)
  with pytest.raises(ValueError, match=r"step 7: .*holds step 6: it was re"):
    checkpoints.restore(abstract, parts)
  checkpoints.close()


def test_what_else_a_checkpoint_needs_is_part_of_it(tmp_path, abstract):
  def check(facts):
    if facts["bank"] == "bank of 6":
      raise ValueError("its bank is gone")

  save(tmp_path, 3, 6)
  checkpoints = Checkpoints(tmp_path)
  assert checkpoints.restore(abstract, check=check)[0] == 3
  checkpoints.close()


def test_prune_keeps_the_banks_that_are_needed(tmp_path):
  for step in (2, 6, 10):
    Layout(tmp_path).bank(step).mkdir(parents=True)
  prune(tmp_path, {"step_00000006", "step_00000010"})
  assert sorted(path.name for path in (tmp_path / "bank").iterdir()) == [
    "step_00000006",
    "step_00000010",
  ]


def test_checkpoints_of_the_first_versions_know_their_bank_by_name(tmp_path):
  facts = {"bank": "step_00000006"}
  with pytest.raises(ValueError, match="its bank .*step_00000006.* is missing"):
    check_bank(tmp_path, facts)
  directory = Layout(tmp_path).bank(6)
  directory.mkdir(parents=True)
  (directory / "cases.npz").touch()
  check_bank(tmp_path, facts)
