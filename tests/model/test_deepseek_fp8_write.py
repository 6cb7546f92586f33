"""Writing block FP8 as released. What is written is compared with a table-driven rounding in float64, with torch's own
reader of such checkpoints, and with transformers.

Measured on random networks, |difference| / |value|: a matrix is off by 2.7 to 2.8 %, which is what three fraction bits
give. Logits of the preset tiny with all experts active, so that no routing flips: 7.7 to 9.3 % in six cases, where BF16
gives 0.7 to 0.8 %; with 4 of 16 active 11 to 15 %.
"""

import json
import re
import subprocess
import sys
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from model_cases import V2, random_model, relative, tiny, tokens
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.quantized_hf_storage import QuantizedHuggingFaceStorageReader
from transformers import DeepseekV3ForCausalLM

from bessemer.addons.accelerate.precision.block_fp8 import quantise_blocks
from bessemer.addons.families import block_fp8_form, conversion
from bessemer.addons.families.block_fp8_form import BlockFp8
from bessemer.errors import UserError
from bessemer.hf import deepseek
from bessemer.hf.mapping import slots
from bessemer.model.config import preset
from bessemer.model.transformer import Scorer

pytestmark = pytest.mark.filterwarnings("ignore:.*does not divide into tiles:UserWarning")
# ragged everywhere: dim 160 = 1.25 tiles, kv_a has 136 + 8 = 144 rows; one dense layer, two sparse ones, one of MTP
CFG = tiny(dim=160, kv_lora_rank=136, moe_inter_dim=130, n_routed_experts=4, n_expert_groups=2, n_limited_groups=1,
           n_activated_experts=2)  # fmt: skip
# only whole tiles and fractions of a single tile, which transformers reads
EVEN = tiny(dim=256, kv_lora_rank=120, moe_inter_dim=128, inter_dim=256, q_lora_rank=128, n_mtp=0)
SCALES = ["float32", "ue8m0"]
KV_A = "model.layers.2.self_attn.kv_a_proj_with_mqa.weight"
# Reference B.1, by hand: key without its layer, dtype.
ATTENTION = {
    "input_layernorm.weight": "BF16", "post_attention_layernorm.weight": "BF16", "self_attn.q_a_proj.weight": "F8",
    "self_attn.q_a_layernorm.weight": "BF16", "self_attn.q_b_proj.weight": "F8",
    "self_attn.kv_a_proj_with_mqa.weight": "F8", "self_attn.kv_a_layernorm.weight": "BF16",
    "self_attn.kv_b_proj.weight": "F8", "self_attn.o_proj.weight": "F8",
}  # fmt: skip
DENSE = {f"mlp.{which}_proj.weight": "F8" for which in ("gate", "up", "down")}
SPARSE = {"mlp.gate.weight": "BF16", "mlp.gate.e_score_correction_bias": "F32"} | {
    f"mlp.{owner}.{which}_proj.weight": "F8"
    for owner in ("shared_experts", *(f"experts.{e}" for e in range(CFG.n_routed_experts)))
    for which in ("gate", "up", "down")
}
MTP = dict.fromkeys(
    ("embed_tokens", "enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head"), "BF16"
)  # fmt: skip
B1 = {
    "model.embed_tokens.weight": "BF16", "model.norm.weight": "BF16", "lm_head.weight": "BF16",
    **{f"model.layers.{n}.{key}": dtype for n in range(4) for key, dtype in ATTENTION.items()},
    **{f"model.layers.0.{key}": dtype for key, dtype in DENSE.items()},
    **{f"model.layers.{n}.{key}": dtype for n in (1, 2, 3) for key, dtype in SPARSE.items()},
    **{f"model.layers.3.{key}.weight": dtype for key, dtype in MTP.items()},
}  # fmt: skip
CODES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float8_e4m3fn: "F8"}


def stored(directory):
    tensors = {}
    for file in directory.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def same_bytes(a, b) -> bool:
    a, b = stored(a), stored(b)
    return a.keys() == b.keys() and all(
        a[key].dtype == b[key].dtype and torch.equal(a[key].view(torch.uint8), b[key].view(torch.uint8)) for key in a
    )


@pytest.fixture(scope="module")
def model():
    return random_model(CFG)


@pytest.fixture(scope="module", params=SCALES)
def written(request, model, tmp_path_factory):
    """(kind of scales, directory as `save` writes it), over several files."""
    directory = tmp_path_factory.mktemp("fp8")
    model.save(directory, form=BlockFp8(request.param), max_shard_bytes=200_000)
    return request.param, directory


def test_every_key_of_the_release_with_its_dtype(written):
    tensors = stored(written[1])
    scales = {key + "_scale_inv": "F32" for key, dtype in B1.items() if dtype == "F8"}
    assert {key: CODES[tensor.dtype] for key, tensor in tensors.items()} == B1 | scales
    for key in scales:
        rows, columns = tensors[key.removesuffix("_scale_inv")].shape
        assert tensors[key].shape == ((rows + 127) // 128, (columns + 127) // 128), key
    assert {slot.key for slot in slots(CFG) if slot.fp8} == {key for key, dtype in B1.items() if dtype == "F8"}


@pytest.mark.parametrize("cfg", [tiny(**V2), tiny(q_lora_rank=0)], ids=["v2", "queries-not-compressed"])
def test_whole_queries_are_quantised_too(cfg):
    assert {slot.key for slot in slots(cfg) if slot.fp8 and ".q" in slot.key and ".layers.0." in slot.key} == {
        "model.layers.0.self_attn.q_proj.weight"
    }


def test_the_config_says_so(written):
    scales, directory = written
    values = json.loads((directory / "config.json").read_text())
    expected = dict(quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=[128, 128])
    assert values["quantization_config"] == expected | ({"scale_fmt": "ue8m0"} if scales == "ue8m0" else {})
    assert values["torch_dtype"] == "bfloat16"


def test_values_against_a_table_in_float64(model, written):
    """Each tile by itself: the scale from its largest element, then the nearest of the 253 finite E4M3 numbers."""
    scales, directory = written
    table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    table = table[table.isfinite()].unique()
    tensors, state = stored(directory), model.state_dict()
    for slot in slots(CFG):
        if not slot.fp8 or "experts.1." in slot.key:  # a sample of the experts suffices
            continue
        exact = slot.of(state).double()
        values, factors = tensors[slot.key].double(), tensors[slot.key + "_scale_inv"].double()
        for p, q in [(p, q) for p in range(factors.shape[0]) for q in range(factors.shape[1])]:
            tile = (slice(p * 128, p * 128 + 128), slice(q * 128, q * 128 + 128))
            expected = exact[tile].abs().max() / 448
            if scales == "ue8m0":
                expected = 2 ** torch.ceil(torch.log2(expected))
            assert abs(factors[p, q] / expected - 1) < 2**-23
            scaled = exact[tile] / factors[p, q]
            above = torch.searchsorted(table, scaled.clamp(-448, 448).contiguous())
            nearest = torch.minimum((table[above] - scaled).abs(), (table[(above - 1).clamp(min=0)] - scaled).abs())
            # ties, and products that float32 rounds to a tie, may go either way
            assert ((values[tile] - scaled).abs() <= nearest * (1 + 1e-5) + 1e-7).all(), slot.key


def test_powers_of_two(written):
    scales, directory = written
    factors = torch.cat([t.flatten() for key, t in stored(directory).items() if key.endswith("_scale_inv")])
    assert bool((torch.frexp(factors).mantissa == 0.5).all()) == (scales == "ue8m0")
    assert torch.equal(factors.to(torch.float8_e8m0fnu).float(), factors) == (scales == "ue8m0")


def test_torch_reads_the_same_matrices(written):
    """torch.distributed.checkpoint knows this layout and shares no code with ours."""
    directory = written[1]
    model_state = deepseek.load(directory, dtype=torch.float32).state_dict()
    reference = {slot.key: torch.full(slot.shape, torch.nan) for slot in slots(CFG)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about running without a process group
        dcp.load(reference, storage_reader=QuantizedHuggingFaceStorageReader(str(directory)), no_dist=True)
    for slot in slots(CFG):
        assert torch.equal(reference[slot.key], slot.of(model_state).float()), slot.key


@pytest.mark.parametrize("scales", SCALES)
def test_transformers_computes_the_same_logits(scales, tmp_path):
    """On a CPU, transformers dequantises. 1e-5: float32, as in test_deepseek_parity."""
    random_model(EVEN).save(tmp_path, form=BlockFp8(scales))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # for example about shapes that transformers would misread
        random_model(EVEN).save(tmp_path, form=BlockFp8(scales))
    reference, info = DeepseekV3ForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True, attn_implementation="eager",
        experts_implementation="eager",
    )  # fmt: skip
    assert not any(info.values()), info
    model, ids = deepseek.load(tmp_path, dtype=torch.float32).eval(), tokens(EVEN)
    with torch.no_grad():
        assert relative(reference.eval()(ids).logits, model(ids)) < 1e-5


def test_what_transformers_would_misread_is_reported(model, tmp_path):
    """192 rows are 128 + 64 in the release but 96 + 96 to transformers 5.24."""
    with pytest.warns(UserWarning, match=r"self_attn\.q_a_proj\.weight \[24, 160\].*tiles of 128"):
        model.save(tmp_path, form=BlockFp8("float32"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save(tmp_path, dtype="bfloat16")


@pytest.mark.parametrize("scales", SCALES)
def test_the_loss_matches_that_of_e4m3(scales, tmp_path):
    cfg = preset("tiny", n_activated_experts=16, n_limited_groups=4)
    source = random_model(cfg)
    source.save(tmp_path, form=BlockFp8(scales))
    export = deepseek.load(tmp_path, dtype=torch.float32).eval()
    before, after = source.state_dict(), export.state_dict()
    errors = {slot.key: relative(slot.of(after), slot.of(before)) for slot in slots(cfg) if slot.fp8}
    assert min(errors.values()) > 0.024 and max(errors.values()) < 0.03, errors
    ids = tokens(cfg)
    with torch.no_grad():
        assert 0.05 < relative(export(ids), source(ids)) < 0.12


def test_the_size(model, written, tmp_path):
    """One byte a weight and four a tile instead of two a weight: the sum of B.1 for this shape."""
    model.save(tmp_path, dtype="bfloat16")
    plain, fp8 = (sum(tensor.nbytes for tensor in stored(d).values()) for d in (tmp_path, written[1]))
    saved = sum(torch.Size(slot.shape).numel() for slot in slots(CFG) if slot.fp8)
    factors = sum(t.nbytes for key, t in stored(written[1]).items() if key.endswith("_scale_inv"))
    assert fp8 == plain - saved + factors < 0.6 * plain


def test_save_and_convert_write_the_same(model, written, tmp_path):
    scales, directory = written
    model.save(tmp_path / "plain")
    conversion.convert(tmp_path / "plain", tmp_path / "fp8", fp8=scales)
    assert same_bytes(tmp_path / "fp8", directory)


def test_again_changes_nothing(written, tmp_path):
    """FP8 to FP8 keeps every byte; scales that are powers of two are valid float32 scales."""
    scales, directory = written
    conversion.convert(directory, tmp_path / "a", fp8=scales)
    conversion.convert(tmp_path / "a", tmp_path / "b", fp8="float32")
    assert same_bytes(tmp_path / "a", directory) and same_bytes(tmp_path / "b", directory)


def test_scales_that_rounding_again_would_change_are_kept(model, tmp_path):
    """(448 S) / 448 is not S here, as for one float32 number in six."""
    model.save(tmp_path / "a", form=BlockFp8("float32"))
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    awkward = torch.full_like(tensors[KV_A + "_scale_inv"], 1.7)
    while (awkward * 448 / 448 == awkward).all():
        awkward = torch.nextafter(awkward, torch.tensor(2.0))
    tensors[KV_A + "_scale_inv"] = awkward
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    conversion.convert(tmp_path / "a", tmp_path / "b", fp8="float32")
    assert same_bytes(tmp_path / "a", tmp_path / "b")


def test_float32_scales_become_powers_of_two(model, tmp_path):
    """From FP8 with float32 scales: rounded again, so within half a step of the result of the first rounding."""
    model.save(tmp_path / "a", form=BlockFp8("float32"))
    conversion.convert(tmp_path / "a", tmp_path / "b", fp8="ue8m0")
    conversion.convert(tmp_path / "a", tmp_path / "plain", dtype="float32")
    conversion.convert(tmp_path / "plain", tmp_path / "c", fp8="ue8m0")
    assert same_bytes(tmp_path / "b", tmp_path / "c") and not same_bytes(tmp_path / "a", tmp_path / "b")


def test_scales_of_one_byte_become_float32_ones(model, tmp_path):
    model.save(tmp_path / "a", form=BlockFp8("ue8m0"))
    model.save(tmp_path / "b", form=BlockFp8("ue8m0"))
    tensors = stored(tmp_path / "b")
    tensors |= {key: t.to(torch.float8_e8m0fnu) for key, t in tensors.items() if key.endswith("_scale_inv")}
    save_file(tensors, tmp_path / "b" / "model.safetensors")
    assert not same_bytes(tmp_path / "a", tmp_path / "b")
    conversion.convert(tmp_path / "b", tmp_path / "c", fp8="ue8m0")
    assert same_bytes(tmp_path / "a", tmp_path / "c")


def test_tiles_of_another_size_are_cut_anew(model, tmp_path):
    model.save(tmp_path / "a", dtype="bfloat16")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    for slot in slots(CFG):
        if slot.fp8:
            tensors[slot.key], tensors[slot.key + "_scale_inv"] = quantise_blocks(tensors[slot.key], 64)
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [64, 64]}
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    conversion.convert(tmp_path / "a", tmp_path / "b", fp8="float32")
    assert stored(tmp_path / "a")[KV_A + "_scale_inv"].shape == (3, 3)
    assert stored(tmp_path / "b")[KV_A + "_scale_inv"].shape == (2, 2)
    a, b = (deepseek.load(tmp_path / name, dtype="float32").state_dict() for name in "ab")
    assert 0 < max(relative(slot.of(b), slot.of(a)) for slot in slots(CFG)) < 0.03


def test_by_way_of_bfloat16(written, tmp_path):
    """FP8 to BF16 and back. Power-of-two scales lose nothing: BF16 holds the products. With float32 scales every weight
    keeps its byte, and a scale moves by BF16's rounding (2^-8 at most; 0.38 % was seen), but only once."""
    scales, directory = written
    trips = [directory]
    for n in range(2):
        conversion.convert(trips[-1], tmp_path / f"plain-{n}")
        conversion.convert(tmp_path / f"plain-{n}", tmp_path / f"fp8-{n}", fp8=scales)
        trips.append(tmp_path / f"fp8-{n}")
    once, twice, thrice = map(stored, trips)
    for key in (slot.key for slot in slots(CFG) if slot.fp8):
        (a, s), (b, t) = ((tensors[key], tensors[key + "_scale_inv"]) for tensors in (once, twice))
        if scales == "float32":
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)) and ((s / t - 1).abs() <= 2**-8).all()
        assert torch.equal(b.view(torch.uint8), thrice[key].view(torch.uint8))
    assert same_bytes(trips[1], trips[2])
    if scales == "ue8m0":
        direct, by_bfloat16 = (deepseek.load(trip, dtype="float32").state_dict() for trip in trips[:2])
        assert all(torch.equal(direct[name], by_bfloat16[name]) for name in direct)


def test_without_mtp_tied_and_in_another_dtype(tmp_path):
    source = random_model(tiny(tie_embeddings=True))
    source.save(tmp_path / "a", form=BlockFp8("float32"), mtp=False, dtype="float32")
    tensors = stored(tmp_path / "a")
    assert not any(key.startswith("model.layers.3.") for key in tensors) and "lm_head.weight" not in tensors
    assert tensors["model.embed_tokens.weight"].dtype == torch.float32
    assert json.loads((tmp_path / "a" / "config.json").read_text())["torch_dtype"] == "float32"
    assert torch.equal(deepseek.load(tmp_path / "a").embed.weight, source.embed.weight)


def test_a_plain_save_over_an_fp8_one_forgets_it(model, tmp_path):
    model.save(tmp_path, form=BlockFp8("float32"))
    model.save(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert all(tensor.dtype == torch.float32 for tensor in stored(tmp_path).values())


def test_reward_models_alike(tmp_path):
    scorer = Scorer.of(random_model(CFG), seed=1).eval()
    scorer.save(tmp_path, form=BlockFp8("float32"))
    tensors = stored(tmp_path)
    assert tensors["score.weight"].dtype == torch.bfloat16 and tensors[KV_A].dtype == torch.float8_e4m3fn
    reloaded = deepseek.load(tmp_path, dtype="float32", kind=Scorer)
    assert relative(reloaded.layers[2].attn.wkv_a.weight, scorer.layers[2].attn.wkv_a.weight) < 0.03


def test_a_matrix_of_zeros_and_one_of_tiny_numbers(tmp_path):
    source = random_model(CFG)
    source.layers[2].attn.wkv_a.weight.data.zero_()
    source.layers[2].attn.wo.weight.data.mul_(1e-44)
    source.layers[1].attn.wo.weight.data[:100].mul_(1e-30)
    source.save(tmp_path, form=BlockFp8("float32"))
    reloaded = deepseek.load(tmp_path, dtype="float32")
    assert not reloaded.layers[2].attn.wkv_a.weight.any()
    assert reloaded.layers[2].attn.wo.weight.abs().max() < 1e-38


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("key", [KV_A, "model.layers.3.mlp.experts.2.up_proj.weight", "model.norm.weight"])
def test_non_finite_weights_are_refused(value, key, tmp_path):
    source = random_model(CFG)
    source.save(tmp_path / "old")
    [slot] = [slot for slot in slots(CFG) if slot.key == key]
    slot.of(source.state_dict()).view(-1)[5] = value
    with pytest.raises(UserError, match=rf"tensor {re.escape(key)}.*NaN or infinite.*export"):
        source.save(tmp_path / "old", form=BlockFp8("float32"))
    source.save(tmp_path / "plain")
    with pytest.raises(UserError, match=rf"tensor {re.escape(key)}.*NaN or infinite.*export"):
        conversion.convert(tmp_path / "plain", tmp_path / "fp8", fp8="ue8m0")
    assert all(tensor.isfinite().all() for tensor in stored(tmp_path / "old").values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "plain"]


def test_a_stored_byte_that_is_no_number_is_refused(model, tmp_path):
    model.save(tmp_path / "a", form=BlockFp8("float32"))
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    tensors[KV_A].view(torch.uint8)[0, 0] = 0x7F
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    with pytest.raises(UserError, match=f"{re.escape(KV_A)} holds NaN"):
        conversion.convert(tmp_path / "a", tmp_path / "b", fp8="float32")


def rounded_after(weight, block, ue8m0):
    """The classic mistake: the scale is rounded to a power of two after the weights have been divided by it."""
    values, factors = quantise_blocks(weight, block)
    return values, 2 ** torch.ceil(torch.log2(factors))


def barely_off(weight, block, ue8m0):
    values, factors = quantise_blocks(weight, block, ue8m0)
    factors[-1, -1] *= 1.03
    return values, factors


def too_coarse(weight, block, ue8m0):
    """Consistent, but the scales are 64 times too large: a small weight loses six of its seven binades."""
    _, factors = quantise_blocks(weight, block, ue8m0)
    wide = (factors * 64).repeat_interleave(block, 0)[: len(weight)].repeat_interleave(block, 1)[:, : weight.shape[1]]
    return (weight / wide).to(torch.float8_e4m3fn), factors * 64


def not_a_power_of_two(weight, block, ue8m0):
    return quantise_blocks(weight, block, False)


@pytest.mark.parametrize(
    ("mistake", "scales"),
    [(rounded_after, "ue8m0"), (barely_off, "float32"), (barely_off, "ue8m0"), (too_coarse, "float32"),
     (too_coarse, "ue8m0"), (not_a_power_of_two, "ue8m0")],
)  # fmt: skip
def test_mismatched_exports_are_never_put_in_place(mistake, scales, model, tmp_path, monkeypatch):
    model.save(tmp_path / "m")
    monkeypatch.setattr(block_fp8_form, "quantise_blocks", mistake)
    for write in (
        lambda: model.save(tmp_path / "m", form=BlockFp8(scales)),
        lambda: conversion.convert(tmp_path / "m", tmp_path / "n", fp8=scales),
    ):
        with pytest.raises(UserError, match="source matrix"):
            write()
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert torch.equal(deepseek.load(tmp_path / "m").head.weight, model.head.weight)


def test_unknown_scales(model, tmp_path):
    with pytest.raises(UserError, match=r"'float'.*float32, ue8m0"):
        model.save(tmp_path / "m", form=BlockFp8("float"))
    assert not list(tmp_path.iterdir())


def test_the_command(model, written, tmp_path, call):
    """Streaming, config, weights, and back to plain weights; once in a process of its own."""
    scales, directory = written
    model.save(tmp_path / "a")
    there = ["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--fp8"]
    if scales == "float32":
        code = "from bessemer.cli import main; main()"
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, *there], capture_output=True, text=True)
        assert not done.returncode, done.stderr
    else:
        status, _, message = call(*there, "--scales", scales)
        assert not status, message
    assert same_bytes(tmp_path / "b", directory)
    assert (tmp_path / "b" / "config.json").read_text() == (directory / "config.json").read_text()
    assert not call("convert", tmp_path / "b", tmp_path / "c")[0]
    plain, fp8 = deepseek.load(tmp_path / "c").state_dict(), deepseek.load(tmp_path / "b").state_dict()
    assert all(torch.equal(plain[name], fp8[name]) for name in plain)
