"""Metadata of fairdiff_jax; exact versions are pinned in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

INIT = Path("fairdiff_jax/__init__.py").read_text(encoding="utf-8")

setup(
  name="fairdiff_jax",
  version=re.search('__version__ = "(.+)"', INIT)[1],
  description="Joint training of FairDiff's three networks in JAX.",
  long_description=Path("README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=[
    *find_packages(include=["fairdiff_jax", "fairdiff_jax.*"]),
    "fairdiff_jax.configs",
    "fairdiff_jax.launch",
  ],
  package_dir={
    "fairdiff_jax.configs": "configs",
    "fairdiff_jax.launch": "launch",
  },
  package_data={
    "fairdiff_jax": ["py.typed"],
    "fairdiff_jax.evaluation": ["templates/*"],
  },
  entry_points={
    "console_scripts": ["fairdiff=fairdiff_jax.launch.command:main"]
  },
  install_requires=[
    "absl-py",
    "array_record",
    "contourpy",
    "flatbuffers",
    "flax>=0.12",
    "jax>=0.10",
    "jinja2",
    "markupsafe",
    "matplotlib",
    "ml-collections",
    "numpy",
    "opencv-python-headless",
    "optax",
    "orbax-checkpoint>=0.12",
    "pillow",
    "safetensors",
    "scipy",
    "tensorboardX",
    "tensorflow-datasets",
    "tqdm",
  ],
  extras_require={
    "dicom": ["pydicom"],
    "wandb": ["wandb"],
    "test": [
      "chex",
      "fairmedfm",
      "hypothesis",
      "medpy",
      "mypy",
      "pytest-xdist",
      "ruff",
      "setuptools",
    ],
    "parity": [
      "diffusers",
      "segment-anything",
      "torch",
      "torch-fidelity",
      "torchvision",
      "transformers",
    ],
  },
)
