"""Your own patients: a csv that names an image, a mask and a split a row.

  fairdiff prepare --config own --workdir runs/own \
    --config.data.source=cases.csv --config.data.attribute=sex
  fairdiff train --config own --workdir runs/own \
    --config.data.source=cases.csv --config.data.attribute=sex

What masks and images show is said by domain.json beside the csv. Variants: ''
(256 x 256, for accelerators), 'small' (128 x 128, for a CPU and a few dozen
cases), 'smoke' (seconds; for tests).
"""

from fairdiff_jax.configs import fairseg, phantom

VARIANTS = ("", "small", "smoke")


def get_config(variant: str = ""):
  if variant not in VARIANTS:
    raise ValueError(
      f"unknown variant {variant!r} of own; use one of"
      f" {', '.join(map(repr, VARIANTS))}"
    )
  if variant == "smoke":
    config = phantom.get_config("smoke").unlock()
    config.data.source = ""
  else:
    config = fairseg.get_config(variant).unlock()
    config.data.validation = 0.2
    config.evaluation.every = config.evaluation.every or 1_000
  config.data.attribute = "sex"
  config.bank.harmonics = 0
  config.bank.min_solidity = 0.0  # structures may be concave
  return config.lock()
