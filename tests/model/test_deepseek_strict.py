"""Loading is strict: each defect of a checkpoint gives one UserError that names the tensor and the file."""

import json
import os
import re

import pytest
import torch
from model_cases import random_model, tiny
from safetensors.torch import load_file, save_file

from bessemer.errors import UserError
from bessemer.hf import deepseek
from bessemer.hf.mapping import slots

Q = "model.layers.1.self_attn.q_a_proj.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
SCALE = "model.layers.1.self_attn.q_a_proj.weight_scale_inv"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def original():
    return random_model(tiny())


@pytest.fixture
def single(original, tmp_path):
    original.save(tmp_path)
    return tmp_path


@pytest.fixture
def sharded(original, tmp_path):
    original.save(tmp_path, max_shard_bytes=40_000)
    return tmp_path


def edit(directory, change):
    """Rewrites the only file with the library's own writer."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def edit_index(directory, change):
    index = json.loads((directory / INDEX).read_text())
    change(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


def refused(directory, *words, **options):
    with pytest.raises(UserError) as caught:
        deepseek.load(directory, **options)
    for word in words:
        assert re.search(word, str(caught.value)), str(caught.value)


def test_both_layouts_load_exactly(original, single):
    """The library reads our files, we read the library's, and every tensor comes back bit for bit."""
    edit(single, lambda tensors: None)
    state = deepseek.load(single).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in original.state_dict().items())


KEYS = [slot.key for slot in slots(tiny()) if not slot.copy][::9]


@pytest.mark.parametrize("key", KEYS)
def test_any_missing_tensor(single, key):
    edit(single, lambda tensors: tensors.pop(key))
    refused(single, f"tensor {key} is missing")


def test_a_lost_routing_bias(single):
    edit(single, lambda tensors: tensors.pop(BIAS))
    refused(single, f"{BIAS} is missing")


def test_one_lost_mtp_tensor(single):
    edit(single, lambda tensors: tensors.pop("model.layers.3.hnorm.weight"))
    refused(single, "model.layers.3.hnorm.weight is missing")


def test_extra_tensor(single):
    edit(single, lambda tensors: tensors.update({"model.layers.0.mlp.gate.weight": torch.zeros(2)}))
    refused(single, "model.safetensors: tensor model.layers.0.mlp.gate.weight has no place", "config.json")


def test_more_layers_than_the_config_says(single):
    config = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 0}))
    refused(single, r"tensor model.layers.3.* has no place")
    assert deepseek.load(single, mtp=False).cfg.n_mtp == 0


def test_misshapen_tensor(single):
    edit(single, lambda tensors: tensors.update({Q: tensors[Q].T.contiguous()}))
    refused(single, rf"model.safetensors: tensor {Q} is \[32, 24\], but config.json requires \[24, 32\]")


def test_integer_weights(single):
    edit(single, lambda tensors: tensors.update({Q: tensors[Q].to(torch.int8)}))
    refused(single, f"{Q} is stored as I8")


def test_scales_without_fp8(single):
    edit(single, lambda tensors: tensors.update({SCALE: torch.ones(1, 1)}))
    refused(single, f"{SCALE} has no place")


def test_copy_that_is_none(single):
    key = "model.layers.3.shared_head.head.weight"
    edit(single, lambda tensors: tensors[key].mul_(1.5))
    refused(single, f"{key} differs from the main model's")
    deepseek.load(single, mtp=False)
    edit(single, lambda tensors: tensors.pop(key))
    deepseek.load(single)  # an absent copy adds no information


def test_stored_rotary_frequencies_are_derived(single):
    edit(single, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    deepseek.load(single)


def test_index_without_an_entry(sharded):
    edit_index(sharded, lambda placed: placed.pop(Q))
    refused(sharded, rf"safetensors: tensor {Q} has no entry in model.safetensors.index.json")


def test_index_with_a_wrong_entry(sharded):
    edit_index(sharded, lambda placed: placed.update({Q: placed["lm_head.weight"]}))
    refused(sharded, f"{Q} (is missing, although|has no entry)")


def test_index_that_names_a_lost_file(sharded):
    sorted(sharded.glob("*.safetensors"))[1].unlink()
    refused(sharded, r"model-00002-of-\d+.safetensors does not exist, although")


def test_index_that_leaves_the_directory(sharded):
    edit_index(sharded, lambda placed: placed.update({Q: "../elsewhere.safetensors"}))
    refused(sharded, "not a plain file name")


def test_lost_index(sharded):
    (sharded / INDEX).unlink()
    refused(sharded, "safetensors files but no model.safetensors.index.json")


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_weights_in_another_format_beside_ours(layout, request):
    folder = request.getfixturevalue(layout)
    (folder / "consolidated.safetensors").write_bytes(b"x")
    deepseek.load(folder)


def test_stray_shard(sharded):
    save_file({"a": torch.zeros(1)}, sharded / "model-99.safetensors")
    refused(sharded, "model-99.safetensors is not in")


def test_key_in_two_shards(sharded):
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    both = load_file(second) | {"model.embed_tokens.weight": torch.zeros(96, 32)}
    save_file(both, second)
    refused(sharded, f"{second.name}: tensor model.embed_tokens.weight is also in .*{first.name}")


def test_key_twice_in_the_index(sharded):
    text = (sharded / INDEX).read_text()
    (sharded / INDEX).write_text(text.replace(f'"{Q}":', f'"{Q}": "model-00001-of-00002.safetensors", "{Q}":'))
    refused(sharded, f"{INDEX}: key {Q} occurs twice")


def test_key_twice_in_a_header(single):
    file = single / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip()
    entry = re.search(rb'"lm_head.weight":\{[^}]*\}', header)[0]
    doubled = header[:-1] + b"," + entry + b"}"
    file.write_bytes(len(doubled).to_bytes(8, "little") + doubled + data[8 + length :])
    refused(single, "model.safetensors: key lm_head.weight occurs twice")


@pytest.mark.parametrize("keep", [0, 5, 200, -1, -4000])
def test_shard_cut_short(single, keep):
    file = single / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(single, r"model\.safetensors: .*not a safetensors file")


def test_shard_with_something_appended(single):
    with open(single / "model.safetensors", "ab") as file:
        file.write(b"more")
    refused(single, r"model\.safetensors: .*not a safetensors file")


def test_overlapping_tensors(single):
    file = single / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    a, b = "model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight"
    header[b]["data_offsets"] = header[a]["data_offsets"]
    head = json.dumps(header).encode()
    file.write_bytes(len(head).to_bytes(8, "little") + head + data[8 + length :])
    refused(single, rf"offset for tensor .({a}|{b})")  # the library names either of the two


@pytest.mark.parametrize(
    "entry",
    [
        '"dtype": "F32", "shape": [1], "data_offsets": [0, 1e999]',
        '"dtype": "F32", "shape": [1], "data_offsets": [0, 4.0]',
        '"dtype": "F32", "shape": [2], "data_offsets": [0, 4]',
        '"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]',
        '"dtype": "F32", "shape": [1], "data_offsets": 4',
        '"dtype": "F32", "data_offsets": [0, 4]',
        '"dtype": [], "shape": [1], "data_offsets": [0, 4]',
    ],
)
def test_an_entry_of_the_wrong_kind(single, entry):
    head = f'{{"a": {{{entry}}}}}'.encode()
    (single / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + bytes(4))
    refused(single, r"model\.safetensors: .*not a safetensors file")


def test_a_header_larger_than_the_library_reads(single):
    file = single / "model.safetensors"
    file.write_bytes((100_000_001).to_bytes(8, "little"))
    os.truncate(file, 100_000_100)
    refused(single, r"model\.safetensors: .*not a safetensors file")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickle_is_refused_unopened(single, name):
    (single / "model.safetensors").rename(single / name)
    refused(single, f"{name} is a pickle")


def test_nothing_there(single, tmp_path):
    (single / "model.safetensors").unlink()
    refused(single, "has no safetensors file")
    refused(tmp_path / "nowhere", "is not a directory")


def test_unknown_dtype(single):
    refused(single, "dtype 'int4' is not one of float32, bfloat16, float16", dtype="int4")
