"""The doctor finds what is right, what is not, and what it cannot know."""

import json

import jax.numpy as jnp
import pytest
from fairdiff_jax.launch import doctor as script

from fairdiff_jax import doctor

SOME = ["small U-Net", "point network"]


@pytest.fixture
def run(monkeypatch, tmp_path):
  """Runs the command; (exit status, verdicts by name, what --json has)."""

  class Flag:
    def __init__(self, value):
      self.value = value

  def run():
    path = tmp_path / "found.json"
    monkeypatch.setattr(script, "JSON", Flag(str(path)))
    monkeypatch.setattr(script, "NETWORKS", Flag(SOME))
    status = script.main([])
    found = json.loads(path.read_text())
    return status, {f["name"]: f for f in found["findings"]}, found

  return run


def test_a_cpu_is_trusted(run, capsys):
  status, findings, found = run()
  assert status == 0 and found["trustworthy"]
  assert found["devices"] == 8 and found["platform"] == "cpu"
  assert found["mesh"] == {"data": 8, "fsdp": 1}
  verdicts = {name: f["verdict"] for name, f in findings.items()}
  assert verdicts == {
    **{f"{name}, float32": "not checked" for name in SOME},
    **{f"{name}, bfloat16": "right" for name in SOME},
    "attention by cuDNN": "not checked",
    "attention by Pallas": "not checked",
    "sum over 8 devices": "right",
    "gather over 8 devices": "right",
    "scattered sum over 8 devices": "right",
    "exchange over 8 devices": "right",
    "checkpoint, saved and restored": "right",
  }
  assert findings["small U-Net, bfloat16"]["cases_per_second"] > 0
  said = capsys.readouterr().out
  assert "attention by cuDNN                       no GPU here" in said
  assert "not checked: small U-Net, float32" in said


def test_a_fault_is_found(run, monkeypatch, capsys):
  class Faulty(doctor.small_unet.SmallUNet):
    fault: float = 0.0

    def __call__(self, image):
      return super().__call__(image) * (1 + self.fault)

  def make(dtype):
    return Faulty(fault=0.5 if dtype == jnp.bfloat16 else 0.0)

  probe = doctor.NETWORKS["small U-Net"]
  monkeypatch.setitem(doctor.NETWORKS, SOME[0], probe._replace(make=make))

  def broken(*_):
    raise RuntimeError("no such device\nand more")

  monkeypatch.setattr(doctor, "_collectives", broken)
  monkeypatch.setattr(doctor, "_checkpoint", lambda: iter(()))
  status, findings, found = run()
  assert status == 1 and not found["trustworthy"]
  wrong = {
    n: f["detail"] for n, f in findings.items() if f["verdict"] == "wrong"
  }
  assert wrong.keys() == {"small U-Net, bfloat16", "collectives"}
  assert wrong["collectives"] == "RuntimeError: no such device"
  assert "wrong: small U-Net, bfloat16, collectives" in capsys.readouterr().out
