"""Times the networks against their PyTorch peers, on the CPU.

  python launch/benchmark_peers.py --json peers.json
  python launch/benchmark_peers.py --networks samed,transunet --small

Needs the extra `parity` (PyTorch, diffusers, segment-anything). Both sides
start from the same weights, and must agree on the same inputs. They take turns
in one process, so that the ratio of each round's times holds on a noisy
machine: its median and quartiles are printed, below 1 where ours is faster.
Times are those of the CPU. On one core they say what the work costs; on more,
a thread that waits for another by spinning, as PyTorch's do, counts as well.

A step is forward pass, loss, backward pass and optimiser; those of segmenters
also average the parameters, which their peers' do not.

  point       the flow VAE of FairDiff; a step on 48 clouds of 512 points, and
              as many drawn in `points.sample_steps`, the peer's in 100
  controlnet  U-Net and ControlNet of 64, 128 and 256 channels (27,149,652
              parameters) on 2 latents of 32 x 32, against diffusers
  transunet, samed
              the recipes of `configs/fairseg.py` on one image
  small_unet  the segmenter of `configs/phantom.py` on 16 images
"""

import functools
import importlib.util
import json
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

NAMES = ("point", "controlnet", "transunet", "samed", "small_unet")
NETWORKS = flags.DEFINE_list("networks", list(NAMES), "Which are timed.")
SMALL = flags.DEFINE_bool(
  "small", False, "SAMed and TransUNet at small sizes, not the published."
)
ROUNDS = flags.DEFINE_integer(
  "rounds", 9, "Rounds; each times both sides.", lower_bound=1
)
CORES = flags.DEFINE_integer("cores", 1, "Of the CPU, used.", lower_bound=1)
JSON = flags.DEFINE_string("json", "", "File to write the ratios to.")
NEEDED = {
  "torch": "torch",
  "diffusers": "diffusers",
  "segment_anything": "segment-anything",
}
PAUSE = 0.3  # seconds in which the threads of one side fall asleep
CLOUDS = 48
CONTROLNET = {
  "block_out_channels": (64, 128, 256),
  "layers_per_block": 2,
  "attention_head_dim": 8,
  "cross_attention_dim": 256,
}
LATENTS, SIDE, TOKENS = 2, 32, 77
SMALL_SIZES = {
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


def require_agreement(name, ours, theirs, rtol=1e-3):
  """Raises ValueError where the two sides' arrays are not alike."""
  ours, theirs = np.asarray(ours), np.asarray(theirs)
  if not np.allclose(ours, theirs, rtol, rtol * np.abs(theirs).mean()):
    raise ValueError(f"{name}: our figures {ours} are not the peer's {theirs}")


def point(directory):
  """Step and sampling of the flow VAE."""
  del directory
  import jax
  import optax
  import peers
  import torch

  from fairdiff_jax import config as configs
  from fairdiff_jax.diffusion.samplers import example_keys
  from fairdiff_jax.models.point_cloud import PointFlowVAE
  from fairdiff_jax.objectives.points import points_task
  from fairdiff_jax.objectives.task import Variables
  from fairdiff_jax.pretrained.fairdiff import load_point_flow_vae

  config = configs.defaults()
  sizes, rate = config.points, config.optimizer.points.learning_rate
  clip = 10.0
  module = PointFlowVAE(flow_depth=sizes.flow_depth)
  weights = peers.point_weights(module)
  module, variables = load_point_flow_vae(weights)
  peer = peers.PointPeer(weights, sizes.num_steps, sizes.kl_weight)
  shape = (CLOUDS, config.data.num_points, 3)
  clouds = np.random.default_rng(0).normal(size=shape).astype(np.float32)

  tensors, latent = torch.tensor(clouds), np.ones((CLOUDS, module.latent_dim))
  latent, beta = latent.astype(np.float32), np.full(CLOUDS, 0.01, np.float32)
  with torch.inference_mode():
    mean, _ = peer.encode(tensors, train=False)
    noise = peer.denoise(tensors, *map(torch.tensor, (beta, latent)))
  found, _ = module.apply(variables, clouds, method="encode")
  require_agreement("point", found, mean)
  found = module.apply(variables, clouds, beta, latent, method="denoise")
  require_agreement("point", found, noise)

  task = points_task(sizes, 0)
  frozen = {"mean": np.zeros(3, np.float32), "std": np.float32(1)}
  batch = {
    "points": clouds,
    "weight": np.ones(CLOUDS, np.float32),
    "group": np.full(CLOUDS, -1, np.int32),
  }
  optimizer = optax.chain(optax.clip_by_global_norm(clip), optax.adam(rate))
  index = np.arange(CLOUDS)

  @functools.partial(jax.jit, donate_argnums=0)
  def update(state, batch):
    params, batch_stats, opt_state, number = state
    keys = example_keys(jax.random.fold_in(jax.random.key(0), number), index)

    def loss(params):
      whole = Variables(params, batch_stats, frozen)
      losses, aux = task.risk(whole, batch, keys, True)
      return losses.mean(), aux["batch_stats"]

    (_, batch_stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    return params, batch_stats, opt_state, number + 1

  params, batch_stats = variables["params"], variables["batch_stats"]
  state = (params, batch_stats, optimizer.init(params), np.int32(0))
  state = jax.tree.map(jax.numpy.array, state)
  whole = Variables(params, batch_stats, frozen)
  draw = jax.jit(task.sample)
  keys = example_keys(jax.random.key(1), index)

  def step():
    nonlocal state
    state = jax.block_until_ready(update(state, batch))

  def sample():
    jax.block_until_ready(draw(whole, batch["group"], keys))

  their_optimizer = torch.optim.Adam(peer.learnt, lr=rate)

  def their_step():
    their_optimizer.zero_grad()
    peer.loss(tensors).backward()
    torch.nn.utils.clip_grad_norm_(peer.learnt, clip)
    their_optimizer.step()

  def their_sample():
    peer.sample(CLOUDS, config.data.num_points)

  return {"step": (step, their_step), "sampling": (sample, their_sample)}


def controlnet(directory):
  """Step of Stable Diffusion's U-Net and ControlNet, both learning."""
  import diffusers
  import jax
  import optax
  import torch

  from fairdiff_jax.pretrained import stable_diffusion

  names = ["CrossAttnDownBlock2D"] * 2 + ["DownBlock2D"]
  up = ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 2
  networks = {
    "controlnet": diffusers.ControlNetModel(
      **CONTROLNET, down_block_types=names
    ),
    "unet": diffusers.UNet2DConditionModel(
      **CONTROLNET, down_block_types=names, up_block_types=up
    ),
  }
  learnt, modules, params = [], {}, {}
  for name, network in networks.items():
    for parameter in network.parameters():
      parameter.data += 0.01 * torch.randn(parameter.shape)
    learnt += network.parameters()
    network.save_pretrained(f"{directory}/{name}")
    found = stable_diffusion.load(f"{directory}/{name}")
    ((modules[name], variables),) = found.values()
    params[name] = variables["params"]

  rng = np.random.default_rng(0)
  x, noise = rng.normal(size=(2, LATENTS, SIDE, SIDE, 4)).astype(np.float32)
  hint = rng.uniform(size=(LATENTS, 8 * SIDE, 8 * SIDE, 3))
  context = rng.normal(
    size=(LATENTS, TOKENS, CONTROLNET["cross_attention_dim"])
  )
  hint, context = hint.astype(np.float32), context.astype(np.float32)
  t = np.array([3, 950], np.int32)
  optimizer = optax.adamw(1e-5, weight_decay=1e-2)

  @functools.partial(jax.jit, donate_argnums=0)
  def update(state, x, t, context, hint, noise):
    params, opt_state = state

    def loss(params):
      residuals = modules["controlnet"].apply(
        {"params": params["controlnet"]}, x, t, context, hint
      )
      predicted = modules["unet"].apply(
        {"params": params["unet"]}, x, t, context, residuals
      )
      return ((predicted - noise) ** 2).mean()

    value, grads = jax.value_and_grad(loss)(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), value

  params = jax.tree.map(jax.numpy.array, params)
  state = params, optimizer.init(params)

  def step():
    nonlocal state
    state, value = update(state, x, t, context, hint, noise)
    jax.block_until_ready(state)
    return float(value)

  their_optimizer = torch.optim.AdamW(learnt, lr=1e-5, weight_decay=1e-2)
  nchw = [torch.tensor(a.transpose(0, 3, 1, 2)) for a in (x, hint, noise)]
  their_x, their_hint, their_noise = nchw
  their_t, their_context = torch.tensor(t), torch.tensor(context)

  def their_step():
    their_optimizer.zero_grad()
    down, middle = networks["controlnet"](
      their_x, their_t, their_context, their_hint, return_dict=False
    )
    predicted = networks["unet"](
      their_x,
      their_t,
      their_context,
      down_block_additional_residuals=down,
      mid_block_additional_residual=middle,
    ).sample
    loss = ((predicted - their_noise) ** 2).mean()
    loss.backward()
    their_optimizer.step()
    return loss.item()

  require_agreement("controlnet", step(), their_step())
  return {"step": (step, their_step)}


def segmenter_config(name, weights):
  """A recipe with this segmenter alone, without warm-up and dropout."""
  from fairdiff_jax.configs import fairseg, phantom

  if name == "small_unet":
    config = phantom.get_config()
  else:
    config = fairseg.get_config(name)
  with config.unlocked():
    config.update_from_flattened_dict(
      SMALL_SIZES.get(name, {}) if SMALL.value else {}
    )
    config.train.points = config.train.image = (0, 0)
    config.fairness.method = "erm"
    config.segmenter.transunet.dropout_rate = 0.0
    config.optimizer.segmenter.warmup_steps = 0
    config.optimizer.segmenter.clip_norm = 0.0
    if name != "small_unet":
      config.segmenter.weights = weights
      config.train.segmentation_batch = 1
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
    return peers.samed_logits(
      model, (image / 2 + 0.5).expand(-1, 3, -1, -1), factors
    )

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
  return lambda x, train: peer.network(x / 2 + 0.5, train), learnt


PEERS = {"samed": make_samed, "transunet": make_transunet}


def make_batch(config):
  """Images and masks of noise, as a host's batch."""
  from fairdiff_jax.data.domain import FUNDUS

  rng = np.random.default_rng(0)
  size = config.train.segmentation_batch
  shape = (size, *config.data.size)
  return {
    "image": rng.uniform(-1, 1, (*shape, 1)).astype(np.float32),
    "mask": rng.integers(0, FUNDUS.num_classes, shape, np.int32),
    "points": np.zeros((size, 0, 3), np.float32),
    "group": np.zeros(size, np.int32),
    "weight": np.ones(size, np.float32),
  }


def ours(config, batch):
  """(step, infer, first parameters); a step returns its loss.

  Both end when all is computed.
  """
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
  params = jax.tree.map(np.array, state.params["segmenter"])
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

  return step, infer, params


def theirs(config, batch, forward, learnt):
  """(step, infer) in PyTorch."""
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
  image = torch.tensor(batch["image"].transpose(0, 3, 1, 2))
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


def segmenter(name, directory):
  """Step and inference of a segmenter."""
  import peers

  path = f"{directory}/{name}.safetensors"
  config = segmenter_config(name, path)
  batch = make_batch(config)
  if name in PEERS:
    peer = PEERS[name](config, path)
    step, infer, _ = ours(config, batch)
  else:
    step, infer, params = ours(config, batch)
    peer = peers.small_unet(params, config.segmenter.patch)
  their_step, their_infer = theirs(config, batch, *peer)
  require_agreement(name, step(), their_step())
  return {"step": (step, their_step), "inference": (infer, their_infer)}


def time_sides(sides):
  """CPU seconds [rounds, 2] of the two functions, in turns."""
  seconds = np.empty((ROUNDS.value, 2))
  for side in sides:
    side()
  for number in tqdm(range(ROUNDS.value), unit="round"):
    # Alternating the order keeps a drift of the machine out of the ratios.
    for i in (0, 1) if number % 2 else (1, 0):
      time.sleep(PAUSE)
      start = time.process_time()
      sides[i]()
      seconds[number, i] = time.process_time() - start
  return seconds


def main(_):
  unknown = set(NETWORKS.value) - set(NAMES)
  if unknown:
    raise ValueError(
      f"--networks has {', '.join(sorted(unknown))}; use {', '.join(NAMES)}"
    )
  if JSON.value and os.path.exists(JSON.value):
    raise FileExistsError(f"--json {JSON.value} exists; it is not overwritten")
  for module, package in NEEDED.items():
    if importlib.util.find_spec(module) is None:
      raise ImportError(f"this command needs {package}: pip install {package}")
  cores = sorted(os.sched_getaffinity(0))[-CORES.value :]
  os.sched_setaffinity(0, cores)  # before JAX and PyTorch count them
  import peers
  import torch

  peers.mend_torchvision()
  torch.set_num_threads(len(cores))
  prepare = {"point": point, "controlnet": controlnet}
  found = {}
  print(
    "| measure | CPU s, ours | CPU s, peer | ratio | quartiles |\n"
    "|---|---|---|---|---|"
  )
  for name in NETWORKS.value:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
      make = prepare.get(name, functools.partial(segmenter, name))
      measures = make(directory)
    for what, sides in measures.items():
      seconds = time_sides(sides)
      ratio = seconds[:, 0] / seconds[:, 1]
      low, middle, high = np.percentile(ratio, [25, 50, 75])
      found[f"{name}_{what}"] = {"ratio": middle, "quartiles": [low, high]}
      mine, peer = np.median(seconds, axis=0)
      print(
        f"| {name}_{what} | {mine:.3f} | {peer:.3f} | {middle:.2f} |"
        f" {low:.2f} to {high:.2f} |",
        flush=True,
      )
  if JSON.value:
    with open(JSON.value, "x") as file:
      json.dump(found, file, indent=2)


def start():
  cli.run(main)


if __name__ == "__main__":
  start()
