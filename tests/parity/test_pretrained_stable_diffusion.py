"""Stable Diffusion's checkpoints: folders both ways, and the single file."""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

from fairdiff_jax.pretrained import graft  # noqa: E402
from fairdiff_jax.pretrained import stable_diffusion as sd  # noqa: E402

WIDTHS, CONTEXT = (32, 64, 64), 64
ENCODER = {
  "block_out_channels": WIDTHS,
  "down_block_types": (
    "CrossAttnDownBlock2D",
    "CrossAttnDownBlock2D",
    "DownBlock2D",
  ),
  "layers_per_block": 1,
  "cross_attention_dim": CONTEXT,
}
FOLDERS = {
  "unet": "unet",
  "controlnet": "controlnet",
  "autoencoder": "vae",
  "text_encoder": "text_encoder",
}


def _randomise(model):
  with torch.no_grad():
    for parameter in model.parameters():
      parameter += 0.1 * torch.randn_like(parameter)
  return model.eval()


@pytest.fixture(scope="module")
def models():
  """Small networks of the libraries, with random weights."""
  torch.manual_seed(0)
  text_config = transformers.CLIPTextConfig(
    vocab_size=50,
    hidden_size=CONTEXT,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=1,
    bos_token_id=0,
    eos_token_id=49,
    pad_token_id=49,
  )
  made = {
    "unet": diffusers.UNet2DConditionModel(
      **ENCODER,
      up_block_types=(
        "UpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
      ),
    ),
    "controlnet": diffusers.ControlNetModel(
      **ENCODER, conditioning_embedding_out_channels=(8, 16)
    ),
    "autoencoder": diffusers.AutoencoderKL(
      block_out_channels=(32, 64),
      down_block_types=("DownEncoderBlock2D",) * 2,
      up_block_types=("UpDecoderBlock2D",) * 2,
    ),
    "text_encoder": transformers.CLIPTextModel(text_config),
  }
  return {name: _randomise(model) for name, model in made.items()}


@pytest.fixture(scope="module")
def pipeline(models, tmp_path_factory):
  """A folder that holds them all."""
  directory = tmp_path_factory.mktemp("pipeline")
  for name, model in models.items():
    model.save_pretrained(directory / FOLDERS[name])
  return directory


@pytest.fixture(scope="module")
def networks(pipeline):
  return sd.load(pipeline)


@pytest.fixture
def copy(pipeline, tmp_path):
  """Copies one network's folder, to be spoilt."""

  def copy_of(name):
    return shutil.copytree(pipeline / FOLDERS[name], tmp_path / name)

  return copy_of


def _tensors(folder):
  (path,) = folder.glob("*.safetensors")
  return path, safetensors_torch.load_file(path)


def _write(tensors, path):
  safetensors_torch.save_file(tensors, path, metadata={"format": "pt"})


def _edit_config(folder, **fields):
  path = folder / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _assert_same(found, expected):
  """The same modules with exactly the same variables."""
  assert found.keys() == expected.keys()
  for name, (module, variables) in found.items():
    assert module == expected[name][0]
    jax.tree.map(np.testing.assert_array_equal, variables, expected[name][1])


def _relative_error(found, expected):
  expected = expected.detach().numpy()
  if expected.ndim == 4:
    expected = expected.transpose(0, 2, 3, 1)
  return np.abs(found - expected).max() / np.abs(expected).max()


def test_sizes_are_read_off_the_configuration(networks):
  assert list(networks) == list(FOLDERS)
  unet, controlnet, autoencoder, text_encoder = (
    m for m, _ in networks.values()
  )
  for module in (unet, controlnet):
    assert module.block_out_channels == WIDTHS
    assert module.layers_per_block == 1
    assert module.cross_attention_dim == CONTEXT
  assert controlnet.conditioning_embedding_out_channels == (8, 16)
  assert autoencoder.block_out_channels == (32, 64)
  assert text_encoder.num_hidden_layers == 2
  for _, variables in networks.values():
    leaves = jax.tree.leaves(variables)
    assert {leaf.dtype for leaf in leaves} == {np.dtype("float32")}


def test_parameters_are_as_many_as_the_tensors_hold(networks, models):
  for name, (_, variables) in networks.items():
    size = sum(p.numel() for p in models[name].parameters())
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == size


def test_paths_follow_the_names(networks, models):
  params = networks["unet"][1]["params"]
  state = models["unet"].state_dict()
  norm = params["up_blocks_1"]["resnets_0"]["norm1"]
  np.testing.assert_array_equal(
    norm["scale"], state["up_blocks.1.resnets.0.norm1.weight"]
  )
  linear = params["time_embedding"]["linear_1"]
  np.testing.assert_array_equal(
    linear["kernel"], state["time_embedding.linear_1.weight"].T
  )
  np.testing.assert_array_equal(
    params["conv_in"]["kernel"],
    state["conv_in.weight"].permute(2, 3, 1, 0),
  )


@pytest.mark.parametrize("name", FOLDERS)
def test_one_network_is_read_by_its_class(pipeline, networks, name):
  found = sd.load(pipeline / FOLDERS[name])
  _assert_same(found, {name: networks[name]})


def test_saved_networks_are_read_back(networks, tmp_path):
  given = {name: networks[name] for name in ("unet", "controlnet")}
  sd.save(tmp_path / "new", **given)
  _assert_same(sd.load(tmp_path / "new"), given)


def test_libraries_read_what_is_saved(networks, tmp_path):
  """They compute what the networks here do, on an odd size."""
  sd.save(tmp_path, unet=networks["unet"], controlnet=networks["controlnet"])
  controlnet, controlnet_info = diffusers.ControlNetModel.from_pretrained(
    tmp_path / "controlnet", output_loading_info=True
  )
  unet, unet_info = diffusers.UNet2DConditionModel.from_pretrained(
    tmp_path / "unet", output_loading_info=True
  )
  assert not any(controlnet_info.values())
  assert not any(unet_info.values())

  rng = np.random.default_rng(0)
  latents, context, hint = (
    rng.normal(size=shape).astype(np.float32)
    for shape in ((2, 7, 10, 4), (2, 5, CONTEXT), (2, 14, 20, 3))
  )
  steps = np.array([3, 700])

  @jax.jit
  def predict(unet_variables, controlnet_variables):
    residuals = networks["controlnet"][0].apply(
      controlnet_variables, latents, steps, context, hint
    )
    return residuals, networks["unet"][0].apply(
      unet_variables, latents, steps, context, residuals
    )

  residuals, prediction = predict(
    networks["unet"][1], networks["controlnet"][1]
  )

  images = [torch.from_numpy(x.transpose(0, 3, 1, 2)) for x in (latents, hint)]
  conditions = torch.from_numpy(steps), torch.from_numpy(context)
  with torch.no_grad():
    down, middle = controlnet.eval()(
      images[0], *conditions, images[1], return_dict=False
    )
    expected = unet.eval()(
      images[0],
      *conditions,
      down_block_additional_residuals=down,
      mid_block_additional_residual=middle,
    ).sample
  for found, wanted in zip(residuals[0], down, strict=True):
    assert _relative_error(found, wanted) < 1e-4
  assert _relative_error(residuals[1], middle) < 1e-4
  assert _relative_error(prediction, expected) < 1e-4


def test_nothing_is_overwritten(networks, tmp_path):
  (tmp_path / "controlnet").mkdir()
  with pytest.raises(FileExistsError, match="controlnet exists"):
    sd.save(tmp_path, unet=networks["unet"], controlnet=networks["controlnet"])
  assert [path.name for path in tmp_path.iterdir()] == ["controlnet"]


def test_variables_of_another_module_are_not_saved(networks, tmp_path):
  swapped = networks["unet"][0], networks["controlnet"][1]
  with pytest.raises(ValueError, match="not expected\n(?s:.*) more$"):
    sd.save(tmp_path, unet=swapped)
  assert not [*tmp_path.iterdir()]


def test_shards_are_joined(models, networks, tmp_path):
  models["unet"].save_pretrained(tmp_path, max_shard_size="300KB")
  assert len([*tmp_path.glob("*.safetensors")]) > 1
  _assert_same(sd.load(tmp_path), {"unet": networks["unet"]})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_float32(copy, networks, dtype):
  folder = copy("autoencoder")
  path, tensors = _tensors(folder)
  _write({name: value.to(dtype) for name, value in tensors.items()}, path)
  _, variables = sd.load(folder)["autoencoder"]
  leaves = jax.tree.leaves(variables)
  assert {leaf.dtype for leaf in leaves} == {np.dtype("float32")}
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0.01, atol=1e-6),
    variables,
    networks["autoencoder"][1],
  )


def test_first_names_of_attention(copy, networks):
  folder = copy("autoencoder")
  path, tensors = _tensors(folder)
  older = {}
  for name, value in tensors.items():
    for new, old in (
      ("to_q", "query"),
      ("to_k", "key"),
      ("to_v", "value"),
      ("to_out.0", "proj_attn"),
    ):
      name = name.replace(f".{new}.", f".{old}.")
    older[name] = value
  assert "encoder.mid_block.attentions.0.proj_attn.bias" in older
  _write(older, path)
  _assert_same(sd.load(folder), {"autoencoder": networks["autoencoder"]})


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_text_model_with_and_without_its_level(copy, networks, prefix):
  folder = copy("text_encoder")
  path, tensors = _tensors(folder)
  renamed = {
    prefix + name.removeprefix("text_model."): value
    for name, value in tensors.items()
  }
  renamed[f"{prefix}embeddings.position_ids"] = torch.arange(77)[None]
  _write(renamed, path)
  _assert_same(sd.load(folder), {"text_encoder": networks["text_encoder"]})


@pytest.mark.parametrize("name", FOLDERS)
def test_missing_tensor_is_named(copy, name):
  folder = copy(name)
  path, tensors = _tensors(folder)
  missing = sorted(tensors)[len(tensors) // 2]
  del tensors[missing]
  _write(tensors, path)
  with pytest.raises(ValueError, match=f"{folder}.*no tensor .*{missing}"):
    sd.load(folder)


@pytest.mark.parametrize("name", FOLDERS)
def test_extra_tensor_is_named(copy, name):
  folder = copy(name)
  path, tensors = _tensors(folder)
  tensors["class_embedding.weight"] = torch.zeros(2)
  _write(tensors, path)
  with pytest.raises(ValueError, match=r"unused.*class_embedding\.weight"):
    sd.load(folder)


@pytest.mark.parametrize("name", FOLDERS)
def test_misshapen_tensor_is_named(copy, name):
  folder = copy(name)
  path, tensors = _tensors(folder)
  misshapen = next(key for key in sorted(tensors) if key.endswith("norm1.bias"))
  tensors[misshapen] = torch.zeros(5)
  _write(tensors, path)
  with pytest.raises(ValueError, match=r"norm1/bias: \(5,\), not \(\d+,\)"):
    sd.load(folder)


@pytest.mark.parametrize(
  ("name", "field", "value"),
  [
    ("unet", "class_embed_type", "timestep"),
    ("unet", "attention_head_dim", [5, 10, 20]),
    ("unet", "use_linear_projection", True),
    ("unet", "down_block_types", ["DownBlock2D"] * 3),
    ("unet", "flip_sin_to_cos", False),
    ("controlnet", "controlnet_conditioning_channel_order", "bgr"),
    ("controlnet", "global_pool_conditions", True),
    ("autoencoder", "shift_factor", 0.1),
    ("autoencoder", "use_quant_conv", False),
    ("text_encoder", "hidden_act", "gelu"),
  ],
)
def test_unsupported_configuration_is_named(copy, name, field, value):
  folder = copy(name)
  _edit_config(folder, **{field: value})
  message = re.escape(f"configuration {field} = {value!r} is not supported")
  with pytest.raises(ValueError, match=message):
    sd.load(folder)


def test_other_classes_are_refused(copy):
  folder = copy("unet")
  _edit_config(folder, _class_name="VQModel")
  with pytest.raises(ValueError, match="holds a VQModel, none of"):
    sd.load(folder)
  with pytest.raises(ValueError, match="VQModel, not a UNet2DConditionModel"):
    sd.load(folder.parent)


def test_missing_files_are_named(copy, tmp_path):
  with pytest.raises(FileNotFoundError, match="neither a config.json nor any"):
    sd.load(tmp_path)
  folder = copy("unet")
  (folder / "diffusion_pytorch_model.safetensors").unlink()
  with pytest.raises(FileNotFoundError, match="has neither diffusion_pytorch"):
    sd.load(folder)


# The original's names of this file's small networks, layer by layer.
ENCODER_LAYERS = {
  "time_embedding.linear_1": "time_embed.0",
  "time_embedding.linear_2": "time_embed.2",
  "conv_in": "input_blocks.0.0",
  "down_blocks.0.resnets.0": "input_blocks.1.0",
  "down_blocks.0.attentions.0": "input_blocks.1.1",
  "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
  "down_blocks.1.resnets.0": "input_blocks.3.0",
  "down_blocks.1.attentions.0": "input_blocks.3.1",
  "down_blocks.1.downsamplers.0.conv": "input_blocks.4.0.op",
  "down_blocks.2.resnets.0": "input_blocks.5.0",
  "mid_block.resnets.0": "middle_block.0",
  "mid_block.attentions.0": "middle_block.1",
  "mid_block.resnets.1": "middle_block.2",
}
LAYERS = {
  "unet": {
    **ENCODER_LAYERS,
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.upsamplers.0": "output_blocks.1.1",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.attentions.0": "output_blocks.2.1",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
    "up_blocks.1.attentions.1": "output_blocks.3.1",
    "up_blocks.1.upsamplers.0": "output_blocks.3.2",
    "up_blocks.2.resnets.0": "output_blocks.4.0",
    "up_blocks.2.attentions.0": "output_blocks.4.1",
    "up_blocks.2.resnets.1": "output_blocks.5.0",
    "up_blocks.2.attentions.1": "output_blocks.5.1",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
  },
  "controlnet": {
    **ENCODER_LAYERS,
    "controlnet_cond_embedding.conv_in": "input_hint_block.0",
    "controlnet_cond_embedding.blocks.0": "input_hint_block.2",
    "controlnet_cond_embedding.blocks.1": "input_hint_block.4",
    "controlnet_cond_embedding.conv_out": "input_hint_block.6",
    "controlnet_down_blocks.0": "zero_convs.0.0",
    "controlnet_down_blocks.1": "zero_convs.1.0",
    "controlnet_down_blocks.2": "zero_convs.2.0",
    "controlnet_down_blocks.3": "zero_convs.3.0",
    "controlnet_down_blocks.4": "zero_convs.4.0",
    "controlnet_down_blocks.5": "zero_convs.5.0",
    "controlnet_mid_block": "middle_block_out.0",
  },
  "autoencoder": {
    "encoder.conv_in": "encoder.conv_in",
    "encoder.down_blocks.0.resnets.0": "encoder.down.0.block.0",
    "encoder.down_blocks.0.downsamplers.0": "encoder.down.0.downsample",
    "encoder.down_blocks.1.resnets.0": "encoder.down.1.block.0",
    "encoder.mid_block.resnets.0": "encoder.mid.block_1",
    "encoder.mid_block.attentions.0": "encoder.mid.attn_1",
    "encoder.mid_block.resnets.1": "encoder.mid.block_2",
    "encoder.conv_norm_out": "encoder.norm_out",
    "encoder.conv_out": "encoder.conv_out",
    "quant_conv": "quant_conv",
    "post_quant_conv": "post_quant_conv",
    "decoder.conv_in": "decoder.conv_in",
    "decoder.mid_block.resnets.0": "decoder.mid.block_1",
    "decoder.mid_block.attentions.0": "decoder.mid.attn_1",
    "decoder.mid_block.resnets.1": "decoder.mid.block_2",
    "decoder.up_blocks.0.resnets.0": "decoder.up.1.block.0",
    "decoder.up_blocks.0.resnets.1": "decoder.up.1.block.1",
    "decoder.up_blocks.0.upsamplers.0": "decoder.up.1.upsample",
    "decoder.up_blocks.1.resnets.0": "decoder.up.0.block.0",
    "decoder.up_blocks.1.resnets.1": "decoder.up.0.block.1",
    "decoder.conv_norm_out": "decoder.norm_out",
    "decoder.conv_out": "decoder.conv_out",
  },
}
DIFFUSION_PARTS = {
  "norm1": "in_layers.0",
  "conv1": "in_layers.2",
  "time_emb_proj": "emb_layers.1",
  "norm2": "out_layers.0",
  "conv2": "out_layers.3",
  "conv_shortcut": "skip_connection",
}
AUTOENCODER_PARTS = {
  "conv_shortcut": "nin_shortcut",
  "group_norm": "norm",
  "to_q": "q",
  "to_k": "k",
  "to_v": "v",
  "to_out.0": "proj_out",
}
ORIGINAL_PREFIXES = {
  "unet": "model.diffusion_model.",
  "controlnet": "control_model.",
  "autoencoder": "first_stage_model.",
}


def _original_name(network, name):
  layers = LAYERS[network]
  layer = max((key for key in layers if name.startswith(key + ".")), key=len)
  part, _, kind = name.removeprefix(layer + ".").rpartition(".")
  if ".resnets." in layer or network == "autoencoder":
    parts = AUTOENCODER_PARTS if network == "autoencoder" else DIFFUSION_PARTS
    part = parts.get(part, part)
  return ORIGINAL_PREFIXES[network] + ".".join(
    filter(None, (layers[layer], part, kind))
  )


@pytest.fixture(scope="module")
def original(models):
  """The small networks' tensors under the original's names."""
  tensors = {
    "betas": torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2,
    "alphas_cumprod_prev": torch.zeros(10),
    "sqrt_recipm1_alphas_cumprod": torch.zeros(10),
    "posterior_mean_coef2": torch.zeros(10),
    "model_ema.num_updates": torch.tensor(3),
    "model_ema.diffusion_modelout2bias": torch.zeros(4),
  }
  for network in LAYERS:
    for name, value in models[network].state_dict().items():
      if network == "autoencoder" and re.search(r"to_\w+(\.0)?\.weight", name):
        value = value[:, :, None, None]
      tensors[_original_name(network, name)] = value.clone()
  prefix = "cond_stage_model.transformer.text_model."
  for name, value in models["text_encoder"].state_dict().items():
    tensors[prefix + name.removeprefix("text_model.")] = value.clone()
  tensors[f"{prefix}embeddings.position_ids"] = torch.arange(77)[None]
  return tensors


@pytest.mark.parametrize("nested", [True, False])
def test_single_file_of_pytorch(original, networks, tmp_path, nested):
  path = tmp_path / "model.ckpt"
  torch.save({"state_dict": original} if nested else original, path)
  _assert_same(sd.load_single_file(path), networks)


def test_single_file_of_safetensors(original, networks, tmp_path):
  path = tmp_path / "model.safetensors"
  _write(original, path)
  _assert_same(sd.load_single_file(path), networks)


def test_single_file_of_one_network(original, networks, tmp_path):
  path = tmp_path / "control.pth"
  control = {k: v for k, v in original.items() if k.startswith("control")}
  torch.save(control, path)
  expected = {"controlnet": networks["controlnet"]}
  _assert_same(sd.load_single_file(path), expected)


@pytest.mark.parametrize(
  ("extra", "message"),
  [
    ("embedding_manager.weight", "unknown tensors.*embedding_manager.weight"),
    ("model.diffusion_model.label_emb.0.0.bias", "unused.*label_emb.0.0.bias"),
  ],
)
def test_unknown_tensor_of_single_file_is_named(
  original, tmp_path, extra, message
):
  path = tmp_path / "model.safetensors"
  _write({**original, extra: torch.zeros(2)}, path)
  with pytest.raises(ValueError, match=message):
    sd.load_single_file(path)


@pytest.mark.parametrize(
  ("missing", "message"),
  [
    (
      "model.diffusion_model.input_blocks.3.0.in_layers.0.bias",
      "no tensor 'down_blocks.1.resnets.0.norm1.bias'",
    ),
    (
      "control_model.input_hint_block.0.weight",
      "no tensor 'input_hint_block.0.weight'",
    ),
    (
      "first_stage_model.decoder.up.1.block.0.norm1.weight",
      "no tensor 'decoder.up_blocks.0.resnets.0.norm1.weight'",
    ),
    (
      "cond_stage_model.transformer.text_model.final_layer_norm.bias",
      "no tensor 'text_model.final_layer_norm.bias'",
    ),
  ],
)
def test_missing_tensor_of_single_file_is_named(
  original, tmp_path, missing, message
):
  path = tmp_path / "model.safetensors"
  _write({k: v for k, v in original.items() if k != missing}, path)
  with pytest.raises(ValueError, match=message):
    sd.load_single_file(path)


def test_scale_and_betas_of_a_single_file(original, tmp_path):
  path = tmp_path / "model.safetensors"
  part = {
    name: value
    for name, value in original.items()
    if name == "betas" or name.startswith("first_stage_model")
  }
  _write({**part, "scale_factor": torch.tensor(0.5)}, path)
  (module, _), *others = sd.load_single_file(path).values()
  assert module.scaling_factor == 0.5 and not others
  _write({**part, "betas": part["betas"] * 1.1}, path)
  with pytest.raises(ValueError, match=f"{path}: its betas are not those"):
    sd.load_single_file(path)


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (
      b"<html>not found</html>",
      r"damaged, cut short or not PyTorch's \(Unpick",
    ),
    ("cut", "damaged, cut short or not PyTorch's"),
    ([torch.zeros(2)], "holds no tensors by name but list; save a state dict"),
    ({"a": torch.zeros(2), "b": 3}, "not tensors: 'b'; save its state dict"),
    ({"a": torch.eye(2).to_sparse()}, "tensor 'a' is no plain array"),
    ({"a": re.compile}, "it holds re.compile, and what can run code is never"),
    ({"a": Path("b")}, r"it holds pathlib.\w+, and what can run code is never"),
  ],
)
def test_pytorch_files_that_cannot_be_read(tmp_path, content, message):
  path = tmp_path / "a.pth"
  torch.save({"a": torch.zeros(2)} if content == "cut" else content, path)
  if content == "cut":
    path.write_bytes(path.read_bytes()[:-9])
  elif isinstance(content, bytes):
    path.write_bytes(content)
  with pytest.raises(ValueError, match=message) as raised:
    graft.read(path)
  assert str(path) in str(raised.value)
  assert "weights_only" not in str(raised.value)


def test_programs_of_pytorch_are_refused(tmp_path):
  path = tmp_path / "a.pt"
  torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
  with pytest.raises(ValueError, match=f"{path} .*TorchScript archives, and"):
    graft.read(path)


def test_parameters_of_pytorch_are_tensors(tmp_path):
  path = tmp_path / "a.pth"
  torch.save({"a": torch.nn.Parameter(torch.ones(2, dtype=torch.half))}, path)
  assert graft.read(path)["a"].dtype == np.float32


def test_autoencoder_keeps_its_scale(networks, tmp_path):
  """From diffusers' configuration, and back to it."""
  folder = tmp_path / "vae"
  diffusers.AutoencoderKL(
    block_out_channels=(32, 64),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    scaling_factor=0.5,
  ).save_pretrained(folder)
  network = sd.load(folder)["autoencoder"]
  assert network[0].scaling_factor == 0.5
  assert networks["autoencoder"][0].scaling_factor == 0.18215
  sd.save(tmp_path / "new", autoencoder=network)
  found, info = diffusers.AutoencoderKL.from_pretrained(
    tmp_path / "new" / "vae", output_loading_info=True
  )
  assert not any(info.values())
  expected = diffusers.AutoencoderKL.from_pretrained(folder)
  for field, value in expected.config.items():
    if not field.startswith("_") and field != "sample_size":
      assert found.config[field] == value, field


def test_single_file_without_networks_is_refused(tmp_path):
  path = tmp_path / "model.safetensors"
  _write({"betas": torch.zeros(10)}, path)
  with pytest.raises(ValueError, match="no names start with"):
    sd.load_single_file(path)


def test_code_in_a_single_file_is_not_run(tmp_path):
  path = tmp_path / "model.ckpt"
  torch.save({"state_dict": {}, "callback": shutil.rmtree}, path)
  with pytest.raises(ValueError, match="cannot be read as tensors alone"):
    sd.load_single_file(path)
