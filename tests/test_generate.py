"""Synthetic cases, without networks: what is done with unsound masks."""

import jax
import numpy as np
import pytest

from fairdiff_jax.synthesis.generate import Generated, _key, join


def make(*faults):
  n = len(faults)
  image = np.arange(n * 4, dtype=np.uint8).reshape(n, 2, 2)
  return Generated(image, image % 3, np.full(n, 10), np.array(faults, str))


def test_chunks_are_joined():
  cases = join([make("", "no cup"), make("ragged disc")], (2, 2))
  assert cases.fault.tolist() == ["", "no cup", "ragged disc"]
  assert cases.sound.tolist() == [True, False, False]
  assert cases.image.dtype == cases.mask.dtype == np.uint8
  assert cases.take(cases.sound).fault.tolist() == [""]
  empty = join([], (2, 2))
  assert empty.image.shape == (0, 2, 2) and empty.require_sound() is empty


def test_unsound_masks_can_be_refused():
  cases = make("", "no cup", "no cup", "outside")
  message = (
    r"3 of 4 masks are still unsound after 10 draws each \({'no cup': 2,"
    r" 'outside': 1}\).*train\.segmenter.*bank\.min_solidity"
  )
  with pytest.raises(ValueError, match=message):
    cases.require_sound()
  assert cases.take(slice(0, 1)).require_sound().sound.all()


def test_every_seed_has_noise_of_its_own():
  seeds = [(0, 0, 1), (0, 1_000_003, 1), (1, 0, 1), (4295, 0, 1)]
  seeds += [(4295, 2_045_549, 1), (2**32 - 1, 0, 1), (2**32 - 1, 1, 1)]
  seeds += [0, 1, 2**31 - 1, 2**32, 2**32 + 1, 2**40]
  found = {jax.random.key_data(_key(seed)).tobytes() for seed in seeds}
  assert len(found) == len(seeds)
