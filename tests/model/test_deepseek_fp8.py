"""Released checkpoints are block FP8: loading gives the same model in the dtype asked for, or a UserError."""

import json

import pytest
import torch
from model_cases import random_model, tiny
from safetensors.torch import load_file, save_file

from bessemer.addons.accelerate.precision.block_fp8 import quantise_blocks
from bessemer.addons.families import conversion
from bessemer.errors import UserError
from bessemer.hf import deepseek
from bessemer.hf.mapping import slots
from bessemer.hf.safetensors_reader import dequantise_blocks, scale_shape
from bessemer.model import accounting
from bessemer.model.config import preset

# ragged everywhere: dim 160 = 1.25 tiles, kv_a has 136 + 8 = 144 rows
CFG = tiny(dim=160, kv_lora_rank=136, moe_inter_dim=130, n_routed_experts=4, n_expert_groups=2, n_limited_groups=1,
           n_activated_experts=2)  # fmt: skip
KV_A = "model.layers.2.self_attn.kv_a_proj_with_mqa.weight"


def is_fp8(key: str) -> bool:
    """What the release quantises (V3 3.3.1): the projections, except eh_proj."""
    return key.endswith(("_proj.weight", "kv_a_proj_with_mqa.weight")) and "eh_proj" not in key


@pytest.fixture(params=["float", "ue8m0", "ue8m0-bytes"])
def quantised(request, tmp_path):
    """(directory in the released form, the weights that it represents, by key)."""
    random_model(CFG).save(tmp_path, dtype="bfloat16")
    file = tmp_path / "model.safetensors"
    stored, exact = {}, {}
    for key, tensor in load_file(file).items():
        if not is_fp8(key):
            stored[key] = exact[key] = tensor
            continue
        weight, scale = quantise_blocks(tensor, ue8m0=request.param != "float")
        exact[key] = dequantise_blocks(weight, scale, dtype=torch.float32)
        stored[key] = weight
        stored[key + "_scale_inv"] = scale.to(torch.float8_e8m0fnu) if request.param == "ue8m0-bytes" else scale
    save_file(stored, file)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = dict(quant_method="fp8", fmt="e4m3", activation_scheme="dynamic",
                                         weight_block_size=[128, 128])  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path, exact


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32])
def test_fp8_loads_as_the_values_it_encodes(quantised, dtype):
    directory, exact = quantised
    model = deepseek.load(directory, dtype=dtype)
    assert model.head.weight.dtype == (dtype or torch.bfloat16)
    assert model.layers[2].attn.wkv_a.weight.dtype == (dtype or torch.bfloat16)
    state = model.state_dict()
    for slot in slots(CFG):
        value = slot.of(state)
        assert torch.equal(value, exact[slot.key].to(value.dtype)), slot.key


def test_convert_writes_plain_weights(quantised, tmp_path_factory):
    directory, _ = quantised
    plain = tmp_path_factory.mktemp("plain")
    conversion.convert(directory, plain, dtype="float32")
    assert "quantization_config" not in json.loads((plain / "config.json").read_text())
    a, b = deepseek.load(directory, dtype=torch.float32).state_dict(), deepseek.load(plain).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


def change(directory, key, tensor):
    file = directory / "model.safetensors"
    tensors = load_file(file)
    if tensor is None:
        del tensors[key]
    else:
        tensors[key] = tensor
    save_file(tensors, file)


def test_missing_and_misshapen_scales(quantised):
    directory, _ = quantised
    scale = load_file(directory / "model.safetensors")[KV_A + "_scale_inv"]
    assert scale.shape == (2, 2)
    change(directory, KV_A + "_scale_inv", scale[:1].contiguous())
    with pytest.raises(UserError, match=rf"{KV_A}_scale_inv.*\[1, 2\].*\[144, 160\].*\[2, 2\]"):
        deepseek.load(directory)
    change(directory, KV_A + "_scale_inv", None)
    with pytest.raises(UserError, match=f"{KV_A} is FP8, but {KV_A}_scale_inv is missing"):
        deepseek.load(directory)


@pytest.mark.parametrize(
    "change",
    [
        {"quant_method": "gptq"}, {"fmt": "e5m2"}, {"weight_block_size": [1, 128]}, {"weight_block_size": [128]},
        {"weight_block_size": [0, 0]}, {"weight_block_size": 128}, "fp8",
    ],
)  # fmt: skip
def test_other_quantisations_are_refused(tmp_path, change):
    random_model(tiny()).save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": change}))
    with pytest.raises(UserError, match=r"config.json: quantisation .*e4m3"):
        deepseek.load(tmp_path)


def test_the_released_checkpoint_tensor_by_tensor():
    """Reference A.2 and B.1: 684,489,845,504 parameters, 91,991 tensors, 41,540,496 scales, 688,574,839,360 bytes."""
    layout = slots(preset("v3"))
    size = {slot.key: torch.Size(slot.shape).numel() for slot in layout}
    scales = {slot.key: torch.Size(scale_shape(slot.shape)).numel() for slot in layout if is_fp8(slot.key)}
    assert len(size) == len(layout)  # no key occurs twice
    assert sum(size.values()) == accounting.stored_params(preset("v3")) == 684_489_845_504
    assert len(size) + len(scales) == 91_991
    assert sum(scales.values()) == 41_540_496
    wide = sum(n for key, n in size.items() if key.endswith("e_score_correction_bias")) + sum(scales.values())
    narrow = sum(size[key] for key in scales)
    half = sum(size.values()) + sum(scales.values()) - wide - narrow
    assert 4 * wide + 2 * half + narrow == 688_574_839_360
