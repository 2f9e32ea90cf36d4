"""Times SAMed and TransUNet against PyTorch, on the CPU.

  python launch/benchmark_segmenters.py
  python launch/benchmark_segmenters.py --full --rounds 5

Needs the extra `parity` (PyTorch, segment-anything). Both sides start from the
same weights and see the same batch, with all cores; their first losses must
agree. They take turns in one process, so that the ratio of each round's times
holds on a noisy machine; its median and quartiles are printed, below 1 where
the recipes of `configs/fairseg.py` are faster, and the median ratio of the time
of all cores, which other programs disturb least. A step is forward pass, loss,
backward pass and optimiser; ours also averages the parameters.
"""

import functools
import importlib.util
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import flags
from fairdiff_jax.launch import cli
from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[1] / "tests" / "parity"))

NETWORKS = flags.DEFINE_list("networks", ["samed", "transunet"], "Recipes.")
FULL = flags.DEFINE_bool("full", False, "The published sizes, not small ones.")
BATCH = flags.DEFINE_integer("batch", 1, "Images a step.", lower_bound=1)
ROUNDS = flags.DEFINE_integer(
  "rounds", 15, "Rounds; each times every side.", lower_bound=1
)
NEEDED = {"torch": "torch", "segment_anything": "segment-anything"}
PAUSE = 0.3  # seconds in which the threads of one side fall asleep
SMALL = {
  "samed": {
    "data.size": (256, 256),
    "segmenter.image_size": 256,
    "segmenter.samed.embed_dim": 384,
    "segmenter.samed.depth": 4,
    "segmenter.samed.num_heads": 6,
    "segmenter.samed.global_blocks": (1, 3),
  },
  "transunet": {
    "data.size": (128, 128),
    "segmenter.image_size": 128,
    "segmenter.transunet.stages": (1, 1, 2),
    "segmenter.transunet.hidden_dim": 384,
    "segmenter.transunet.mlp_dim": 1536,
    "segmenter.transunet.num_heads": 6,
    "segmenter.transunet.num_layers": 4,
    "segmenter.transunet.decoder_channels": (256, 128, 64, 32, 16),
  },
}


def configure(name, weights):
  """The recipe, without warm-up and dropout."""
  from fairdiff_jax.configs import fairseg

  config = fairseg.get_config(name)
  with config.unlocked():
    config.update_from_flattened_dict({} if FULL.value else SMALL[name])
    config.segmenter.weights = weights
    config.segmenter.transunet.dropout_rate = 0.0
    config.optimizer.segmenter.warmup_steps = 0
    config.train.segmentation_batch = BATCH.value
  return config


def make_samed(config, path):
  """Writes weights; returns (forward, parameters) of the peer."""
  import peers
  import safetensors.numpy
  import torch

  sizes = config.segmenter.samed.to_dict()
  rank = sizes.pop("rank")
  model = peers.sam(config.segmenter.image_size, **sizes, noise=0.02)
  tensors = peers.tensors(model)
  tensors = {k: np.ascontiguousarray(v) for k, v in tensors.items()}
  safetensors.numpy.save_file(tensors, path)
  model.image_encoder.requires_grad_(False)
  shape = {"a": (rank, sizes["embed_dim"]), "b": (sizes["embed_dim"], rank)}
  factors = {
    # The second factors are 0 at first, so the first may be any.
    f"w_{ab}_{i:03d}": (0.02 if ab == "a" else 0.0) * torch.randn(shape[ab])
    for i in range(2 * sizes["depth"])
    for ab in "ab"
  }
  learnt = [p for p in model.parameters() if p.requires_grad]
  learnt += [factor.requires_grad_() for factor in factors.values()]

  def forward(image, train):
    del train
    return peers.samed_logits(model, image.expand(-1, 3, -1, -1), factors)

  return forward, learnt


def make_transunet(config, path):
  """Writes weights; returns (forward, parameters) of the peer."""
  import peers
  import safetensors.numpy

  from fairdiff_jax.data.domain import FUNDUS
  from fairdiff_jax.models.transunet import TransUNet

  module = TransUNet(FUNDUS.num_classes, **config.segmenter.transunet)
  weights = peers.transunet_weights(module, config.segmenter.image_size)
  safetensors.numpy.save_file(weights, path)
  peer = peers.TransUNetPeer(weights, module)
  learnt = [p for p in peer.state.values() if p.requires_grad]
  return peer.network, learnt


MAKERS = {"samed": make_samed, "transunet": make_transunet}


def make_batch(config):
  """Images and masks of noise, as a host's batch."""
  from fairdiff_jax.data.domain import FUNDUS

  rng = np.random.default_rng(0)
  shape = (BATCH.value, *config.data.size)
  return {
    "image": rng.uniform(-1, 1, (*shape, 1)).astype(np.float32),
    "mask": rng.integers(0, FUNDUS.num_classes, shape, np.int32),
    "points": np.zeros((BATCH.value, 0, 3), np.float32),
    "group": np.zeros(BATCH.value, np.int32),
    "weight": np.ones(BATCH.value, np.float32),
  }


def ours(config, batch):
  """(step, infer): a step returns its loss; both end when all is computed."""
  import jax

  from fairdiff_jax.data import statistics
  from fairdiff_jax.training.checkpoint import Inference
  from fairdiff_jax.training.setup import make_step, setup
  from fairdiff_jax.training.start import start_from_weights

  run = setup(config, jax.devices()[:1])
  groups = len(run.objective.group_names)
  stats = jax.tree.map(np.ones_like, statistics.shapes(groups))
  stats = {name: stats[name] for name in run.objective.tasks}
  state = run.init(stats, np.ones(groups, np.float32))
  state = start_from_weights(state, run.objective, run.abstract)
  train = make_step(run, ("segmenter",))
  predict = jax.jit(run.objective.tasks["segmenter"].sample)

  def step():
    nonlocal state
    state, metrics = train(state, {"segmentation": batch})
    jax.block_until_ready(state)
    return float(metrics["loss/segmenter"])

  def infer():
    variables = Inference.of(state).network("segmenter")
    jax.block_until_ready(predict(variables, batch["image"]))

  return step, infer


def theirs(config, batch, forward, learnt):
  """The same in PyTorch."""
  import torch

  from fairdiff_jax.data.domain import FUNDUS

  options = config.optimizer.segmenter
  kinds = {
    "adamw": torch.optim.AdamW,
    "sgd": functools.partial(torch.optim.SGD, momentum=0.9),
  }
  optimizer = kinds[options.kind](
    learnt, lr=options.learning_rate, weight_decay=options.weight_decay
  )
  image = torch.tensor(batch["image"].transpose(0, 3, 1, 2) / 2 + 0.5)
  mask = torch.tensor(batch["mask"])[:, None].float()
  resize = torch.nn.functional.interpolate

  def step():
    optimizer.zero_grad()
    logits = forward(image, True)
    label = resize(mask, logits.shape[2:], mode="nearest-exact")[:, 0].long()
    y = torch.nn.functional.one_hot(label, FUNDUS.num_classes).permute(
      0, 3, 1, 2
    )
    p = logits.softmax(1)
    both, sizes = (p * y).sum((2, 3)), (p**2 + y).sum((2, 3))
    dice = 1 - (2 * both + 1e-5) / (sizes + 1e-5)
    loss = config.segmenter.dice_weight * dice.mean()
    loss += config.segmenter.cross_entropy_weight * (
      torch.nn.functional.cross_entropy(logits, label)
    )
    loss.backward()
    optimizer.step()
    return loss.item()

  def infer():
    with torch.inference_mode():
      logits = forward(image, False)
      resize(logits, image.shape[2:], mode="bilinear").argmax(1)

  return step, infer


def time_sides(sides):
  """Seconds [rounds, 2] of the two functions, in turns: by clock, of cores."""
  seconds = np.empty((2, ROUNDS.value, 2))
  for number in tqdm(range(ROUNDS.value), unit="round"):
    # Alternating the order keeps a drift of the machine out of the ratios.
    for i in (0, 1) if number % 2 else (1, 0):
      time.sleep(PAUSE)
      start = time.perf_counter(), time.process_time()
      sides[i]()
      stop = time.perf_counter(), time.process_time()
      seconds[:, number, i] = np.subtract(stop, start)
  return seconds


def benchmark(name, path):
  """Times one network; returns lines of the table."""
  config = configure(name, path)
  forward, learnt = MAKERS[name](config, path)
  batch = make_batch(config)
  pairs = [ours(config, batch), theirs(config, batch, forward, learnt)]
  losses = [step() for step, _ in pairs]
  if not np.isclose(*losses, rtol=1e-3):
    raise ValueError(f"{name}: first losses {losses} differ")
  for _, infer in pairs:
    infer()
  for what, sides in zip(
    ("step", "inference"), zip(*pairs, strict=True), strict=True
  ):
    seconds = time_sides(sides)
    ratio, cores = seconds[..., 0] / seconds[..., 1]
    low, middle, high = np.percentile(ratio, [25, 50, 75])
    mine, peer = np.median(seconds[0], axis=0)
    yield (
      f"| {name}, {config.segmenter.image_size} px | {what} | {mine:.3f} |"
      f" {peer:.3f} | {middle:.2f} | {low:.2f} to {high:.2f} |"
      f" {np.median(cores):.2f} |"
    )


def main(_):
  unknown = set(NETWORKS.value) - MAKERS.keys()
  if unknown:
    raise ValueError(
      f"--networks has {', '.join(sorted(unknown))}; use {', '.join(MAKERS)}"
    )
  for module, package in NEEDED.items():
    if importlib.util.find_spec(module) is None:
      raise ImportError(f"this command needs {package}: pip install {package}")
  import torch

  torch.manual_seed(0)
  torch.set_num_threads(os.cpu_count())
  lines = [
    "| network | what | s, ours | s, PyTorch | ratio | quartiles | of cores |",
    "|---|---|---|---|---|---|---|",
  ]
  with tempfile.TemporaryDirectory() as directory:
    for name in NETWORKS.value:
      lines += benchmark(name, f"{directory}/{name}.safetensors")
  print("\n".join(lines))


def start():
  cli.run(main)


if __name__ == "__main__":
  start()
