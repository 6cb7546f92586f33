"""GGUF files that we write, read with the `gguf` package alone: tensors, metadata and what is refused.

Names are checked against the package's own table for deepseek2, values against the source's safetensors, computed by
naive loops. What llama.cpp makes of such a file is in `test_other_engines.py`.
"""

import json
import os
import resource
import signal
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from hf_cases import made
from model_cases import YARN, random_model, tiny
from safetensors.torch import load_file, save_file

from bessemer.addons.accelerate.precision.block_fp8 import quantise_blocks
from bessemer.addons.families import gguf_file, hf_tokenizer
from bessemer.addons.families.causal_lm import CausalLM
from bessemer.data import chat, tokenizer
from bessemer.errors import UserError
from bessemer.hf import deepseek
from bessemer.hf.safetensors_reader import dequantise_blocks
from bessemer.model.transformer import Scorer

TEXTS = ["the quick brown fox", "<think>two and two</think> <answer>4</answer>", "盛钢水 1234"] * 4
SPARE = 5
"""Rows of the embedding without a token."""


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A saved tokenizer of ours."""
    trained = tokenizer.Tokenizer.train(TEXTS, 300, chat_style="r1")
    trained.save(tmp_path_factory.mktemp("tokenizer"))
    return trained


@pytest.fixture
def source(words, tmp_path):
    """Makes a model directory of the given shape."""

    def make(dtype=None, **changes):
        model = random_model(tiny(vocab_size=words.vocab_size + SPARE, **changes))
        words.save(tmp_path / "words")
        model.save(tmp_path / "model", tokenizer_dir=tmp_path / "words", dtype=dtype)
        return tmp_path / "model"

    return make


def read(file):
    """(tensors by name, metadata by key)."""
    reader = gguf.GGUFReader(file)
    tensors = {}
    for tensor in reader.tensors:
        raw = torch.from_numpy(np.array(tensor.data).view(np.uint8))
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[tensor.tensor_type.name]
        tensors[tensor.name] = raw.view(dtype).view(tensor.shape[::-1].tolist())
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    return tensors, fields


def expected(stored, cfg, dtype):
    """What the file must hold, computed from the source's tensors by loops, under the `gguf` package's names."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, cfg.n_layers)

    def name(key):
        stem, _, suffix = key.removesuffix("_bias").rpartition(".")
        if key.endswith("e_score_correction_bias"):
            stem, suffix = key.removesuffix("_bias"), "bias"
        return f"{table.get_name(stem)}.{suffix}"

    tensors = {}
    for key, tensor in stored.items():
        parts = key.split(".")
        if parts[1] == "layers" and int(parts[2]) >= cfg.n_layers:
            continue
        if "kv_b_proj" in key:
            rows = cfg.qk_nope_head_dim + cfg.v_head_dim
            heads = [tensor[h * rows : (h + 1) * rows] for h in range(cfg.n_heads)]
            keys = [head[: cfg.qk_nope_head_dim].T for head in heads]
            values = [head[cfg.qk_nope_head_dim :] for head in heads]
            tensors[name(key.replace("kv_b", "k_b"))] = torch.stack(keys).to(dtype)
            tensors[name(key.replace("kv_b", "v_b"))] = torch.stack(values).to(dtype)
        elif ".experts." in key:
            if parts[5] == "0":
                every = [stored[key.replace(".experts.0.", f".experts.{e}.")] for e in range(cfg.n_routed_experts)]
                tensors[name(key.replace(".experts.0.", ".experts."))] = torch.stack(every).to(dtype)
        else:
            exact = tensor.dim() == 1 or key.endswith("mlp.gate.weight")
            tensors[name(key)] = tensor.to(torch.float32 if exact else dtype)
    return tensors


def same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("changes", [{}, dict(q_lora_rank=0, n_dense_layers=0), dict(tie_embeddings=True)])
@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16"])
def test_every_tensor_matches_that_of_the_source(source, tmp_path, changes, dtype):
    directory, file = source(**changes), tmp_path / "out.gguf"
    gguf_file.write(directory, file, dtype)
    tensors, facts = read(file)
    stored, cfg = load_file(directory / "model.safetensors"), deepseek.read_config(directory)
    same(tensors, expected(stored, cfg, torch.float32 if dtype is None else getattr(torch, dtype)))
    assert facts["general.file_type"] == {None: 0, "float16": 1, "bfloat16": 32}[dtype]
    assert ("output.weight" in tensors) != cfg.tie_embeddings


def test_the_default_dtype_is_the_stored_one(source, tmp_path):
    directory, file = source(dtype="bfloat16"), tmp_path / "out.gguf"
    gguf_file.write(directory, file)
    stored = load_file(directory / "model.safetensors")
    same(read(file)[0], expected(stored, deepseek.read_config(directory), torch.bfloat16))


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_block_fp8_is_written_as_the_values_it_encodes(source, tmp_path, dtype):
    directory, file = source(dtype="bfloat16"), tmp_path / "out.gguf"
    stored, exact = {}, {}
    for key, tensor in load_file(directory / "model.safetensors").items():
        stored[key] = exact[key] = tensor
        if key.endswith("_proj.weight") and "eh_proj" not in key:
            stored[key], stored[key + "_scale_inv"] = quantise_blocks(tensor)
            exact[key] = dequantise_blocks(stored[key], stored[key + "_scale_inv"], dtype=torch.float32)
    save_file(stored, directory / "model.safetensors")
    gguf_file.write(directory, file, dtype)
    same(read(file)[0], expected(exact, deepseek.read_config(directory), torch.float32 if dtype else torch.bfloat16))


def test_gguf_facts_describe_shape_and_routing(source, tmp_path):
    """Every key that llama.cpp's loader reads for this architecture, spelled out."""
    gguf_file.write(source(**YARN, mscale=0.707, mscale_all_dim=0.707), tmp_path / "out.gguf")
    facts = read(tmp_path / "out.gguf")[1]
    own_facts = {key.removeprefix("deepseek2."): value for key, value in facts.items() if key.startswith("deepseek2.")}
    assert own_facts.pop("rope.scaling.yarn_log_multiplier") == pytest.approx(0.0707)
    assert own_facts.pop("attention.layer_norm_rms_epsilon") == pytest.approx(1e-6)
    assert own_facts == {
        "vocab_size": 305, "context_length": 64, "embedding_length": 32, "block_count": 3,
        "leading_dense_block_count": 1, "feed_forward_length": 48, "attention.head_count": 2,
        "attention.head_count_kv": 1, "attention.q_lora_rank": 24, "attention.kv_lora_rank": 16,
        "attention.key_length": 24, "attention.value_length": 16, "attention.key_length_mla": 16,
        "attention.value_length_mla": 12, "rope.dimension_count": 8, "rope.freq_base": 10000.0,
        "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16,
        "expert_feed_forward_length": 16, "expert_shared_count": 1, "expert_gating_func": 2,
        "expert_weights_norm": True, "expert_weights_scale": 2.5, "expert_count": 12, "expert_used_count": 3,
        "expert_group_count": 4, "expert_group_used_count": 2,
    }  # fmt: skip
    assert facts["general.architecture"] == "deepseek2"
    assert facts["general.sampling.temp"] == pytest.approx(0.6) and facts["general.sampling.top_p"] == pytest.approx(
        0.95
    )


@pytest.mark.parametrize(
    "changes, limited",
    [
        (dict(n_limited_groups=4), False),
        (dict(topk_method="greedy"), False),
        (dict(score_func="softmax", norm_topk_prob=False), True),
    ],
)
def test_groups_are_named_only_where_they_limit(source, tmp_path, changes, limited):
    """llama.cpp refuses a file that allows every group, and has no routing that ignores groups named in the file."""
    gguf_file.write(source(**changes), tmp_path / "out.gguf")
    facts = read(tmp_path / "out.gguf")[1]
    assert [key for key in facts if "expert_group" in key] == limited * [
        "deepseek2.expert_group_count", "deepseek2.expert_group_used_count",
    ]  # fmt: skip
    assert facts["deepseek2.expert_gating_func"] == (1 if "score_func" in changes else 2)
    assert facts["deepseek2.rope.scaling.type"] == "none" and "deepseek2.rope.scaling.factor" not in facts


def test_tokenizer_and_template(source, tmp_path, words):
    directory = source()
    gguf_file.write(directory, tmp_path / "out.gguf")
    facts = read(tmp_path / "out.gguf")[1]
    own_facts = {key.rpartition(".")[2]: value for key, value in facts.items() if key.startswith("tokenizer.")}
    spec = json.loads((directory / "tokenizer.json").read_text("utf-8"))
    assert (own_facts["model"], own_facts["pre"], own_facts["chat_template"]) == (
        "gpt2",
        "deepseek-v3",
        chat.jinja("r1"),
    )
    assert [own_facts[f"{kind}_token_id"] for kind in ("bos", "eos", "padding")] == [0, 1, 2]
    assert (own_facts["add_bos_token"], own_facts["add_eos_token"]) == (False, False)
    tokens, kinds = own_facts["tokens"], own_facts["token_type"]
    assert len(tokens) == len(kinds) == words.vocab_size + SPARE
    assert {text: number for number, text in enumerate(tokens[:-SPARE])} == spec["model"]["vocab"]
    assert kinds[-SPARE:] == SPARE * [5] and len(set(tokens)) == len(tokens)
    assert own_facts["merges"] == [f"{a} {b}" for a, b in spec["model"]["merges"]]
    text = ("<think>", "</think>", "<answer>", "</answer>")
    for number in range(words.vocab_size):
        expected = 4 if tokens[number] in text else 3 if words.is_special(number) else 1
        assert kinds[number] == expected, tokens[number]


def test_the_split_matches_that_of_our_tokenizer():
    """The model package cannot import the data package, so both hold the rules."""
    assert hf_tokenizer.SPLITS == (tokenizer.DIGITS, tokenizer.CJK, tokenizer.WORDS)


REFUSED = {
    "mscale 1 and mscale_all_dim 0.5": dict(**YARN, mscale_all_dim=0.5),
    "mscale 0 and mscale_all_dim 0;": dict(**YARN, mscale=0.0, mscale_all_dim=0.0),
    "beta_fast 16 and beta_slow 1": dict(**YARN, beta_fast=16.0),
    "compressed queries in 27 layers": dict(n_layers=27),
    "without shared experts": dict(n_shared_experts=0),
    "groups rated by the best 1 of their experts": dict(topk_method="group_limited_greedy", score_func="softmax"),
    "route_scale 0": dict(route_scale=0.0),
    "513 layers": dict(n_layers=513),
    "1025 experts": dict(n_routed_experts=1025, n_expert_groups=1, n_limited_groups=1),
}


@pytest.mark.parametrize("words_, changes", REFUSED.items(), ids=REFUSED)
def test_models_that_llama_cpp_computes_differently_are_refused(words_, changes):
    with pytest.raises(UserError, match=words_):
        gguf_file.check_network(tiny(**changes), "here")


@pytest.mark.parametrize("changes", [
    dict(n_layers=27, q_lora_rank=0), dict(n_shared_experts=0, n_dense_layers=3), YARN, dict(mscale_all_dim=0.5),
    dict(topk_method="group_limited_greedy", n_limited_groups=4), dict(n_layers=28, beta_fast=16.0),
])  # fmt: skip
def test_similar_models_that_llama_cpp_computes_alike_are_written(changes):
    gguf_file.check_network(tiny(**changes), "here")


def changed(file, change):
    values = json.loads(file.read_text("utf-8"))
    change(values)
    file.write_text(json.dumps(values))


TOKENIZERS = {
    "a split of another family": lambda spec: spec["pre_tokenizer"]["pretokenizers"].pop(1),
    "a rule that differs": lambda spec: spec["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\p{N}"),
    "a prefix space": lambda spec: spec["pre_tokenizer"]["pretokenizers"][-1].update(add_prefix_space=True),
    "a normaliser": lambda spec: spec.update(normalizer={"type": "NFC"}),
    "whole words first": lambda spec: spec["model"].update(ignore_merges=True),
    "a token that eats spaces": lambda spec: spec["added_tokens"][5].update(lstrip=True),
}


@pytest.mark.parametrize("change", TOKENIZERS.values(), ids=TOKENIZERS)
def test_another_tokenizer_is_refused(source, tmp_path, change):
    directory = source()
    changed(directory / "tokenizer.json", change)
    with pytest.raises(UserError, match=r"byte-level BPE.*convert_hf_to_gguf"):
        gguf_file.write(directory, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokenizer.json", lambda spec: spec.pop("model")),
        ("tokenizer.json", lambda spec: spec.pop("added_tokens")),
        ("tokenizer.json", lambda spec: spec.update(pre_tokenizer=[1])),
        ("tokenizer.json", lambda spec: spec["model"].update(vocab={"a": "x"})),
        ("tokenizer.json", lambda spec: spec["added_tokens"][0].pop("special")),
        ("generation_config.json", lambda values: values.update(temperature="x")),
        ("generation_config.json", lambda values: values.update(top_p=[1])),
        ("generation_config.json", lambda values: values.update(eos_token_id=[{}])),
    ],
)
def test_damaged_files_are_one_line(call, source, tmp_path, name, change):
    directory = source()
    changed(directory / name, change)
    status, _, message = call("convert", directory, tmp_path / "out.gguf")
    assert status == 2 and "is damaged (" in message and message.count("\n") == 1


def test_a_published_tokenizer_spells_line_breaks_as_they_are(source, tmp_path):
    directory = source()

    def spell(spec):
        spec["normalizer"] = {"type": "Sequence", "normalizers": []}
        pattern = spec["pre_tokenizer"]["pretokenizers"][2]["pattern"]
        pattern["Regex"] = pattern["Regex"].replace(r"\r", "\r").replace(r"\n", "\n")

    changed(directory / "tokenizer.json", spell)
    gguf_file.write(directory, tmp_path / "out.gguf")


def test_directories_that_are_refused(source, words, tmp_path):
    out = tmp_path / "out.gguf"
    directory = source()
    with pytest.raises(UserError, match=r"is a directory.*model\.gguf"):
        (tmp_path / "folder").mkdir()
        gguf_file.write(directory, tmp_path / "folder")
    with pytest.raises(UserError, match=r"'int8'.*float32, bfloat16, float16"):
        gguf_file.write(directory, out, "int8")
    CausalLM(made("llama")).save(tmp_path / "foreign")
    with pytest.raises(UserError, match=r"'llama'.*convert_hf_to_gguf"):
        gguf_file.write(tmp_path / "foreign", out)
    scorer = Scorer(tiny(vocab_size=words.vocab_size, n_mtp=0)).initialise(0)
    scorer.save(tmp_path / "scorer", tokenizer_dir=tmp_path / "words")
    with pytest.raises(UserError, match="holds a reward model"):
        gguf_file.write(tmp_path / "scorer", out)
    random_model(tiny(vocab_size=words.vocab_size - 1)).save(tmp_path / "small", tokenizer_dir=tmp_path / "words")
    with pytest.raises(UserError, match=r"300 tokens.*299 rows"):
        gguf_file.write(tmp_path / "small", out)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mlp.experts.3.up_proj.weight"][0, 0] = 7e4
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(UserError, match=r"experts\.3\.up_proj\.weight .*float16; use float32"):
        gguf_file.write(directory, out, "float16")
    (directory / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        gguf_file.write(directory, out)
    assert not [path for path in tmp_path.iterdir() if ".gguf" in path.name]


def test_a_tied_head_that_differs_is_refused(source, tmp_path):
    directory = source(tie_embeddings=True)
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(UserError, match=r"lm_head\.weight differs"):
        gguf_file.write(directory, tmp_path / "out.gguf")


def test_a_write_the_system_refuses_leaves_the_old_file(source, tmp_path):
    """A file-size limit in a forked child makes write() fail half way through the tensors."""
    directory, file = source(), tmp_path / "out.gguf"
    file.write_bytes(b"old")
    child = os.fork()
    if not child:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            gguf_file.write(directory, file)
        except UserError as error:
            code = 7 if "File too large" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert file.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir() if ".gguf" in p.name] == ["out.gguf"]
    gguf_file.write(directory, file)
    assert file.read_bytes()[:4] == b"GGUF"


FLIPPED = {"magic": 0, "number of tensors": 8, "length of a key": 24, "name of the model": 150, "a tensor": -100}


@pytest.mark.parametrize("damaged_part", FLIPPED.values(), ids=FLIPPED)
def test_damage_between_writing_and_reading_back_is_found(source, tmp_path, monkeypatch, damaged_part):
    """A single flipped bit in the file."""
    directory, file = source(), tmp_path / "out.gguf"
    original = gguf_file._write

    def damaged(path, *args):
        sums = original(path, *args)
        data = bytearray(path.read_bytes())
        data[damaged_part] ^= 1
        path.write_bytes(data)
        return sums

    monkeypatch.setattr(gguf_file, "_write", damaged)
    with pytest.raises(UserError, match="check the disk"):
        gguf_file.write(directory, file)
    assert not [p for p in tmp_path.iterdir() if ".gguf" in p.name]


MEMORY = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from bessemer.addons.families import gguf_file
from bessemer.hf import deepseek
from bessemer.hf.mapping import slots
from bessemer.hf.safetensors_writer import TensorSpec, write_tensors
from bessemer.model.config import preset
gguf_file._library()

def memory(which):
    line = next(line for line in open("/proc/self/status") if line.startswith(which))
    return int(line.split()[1]) / 1024

root = Path(sys.argv[1])
cfg = preset("tiny", vocab_size=512, dim=256, n_layers=5, moe_inter_dim=256, n_routed_experts=32, n_mtp=0)
plan = [TensorSpec(slot.key, torch.bfloat16, slot.shape) for slot in slots(cfg)]
deepseek.write_config(cfg, root)
write_tensors(root, plan, (torch.randn(slot.shape) for slot in slots(cfg)), 4e6)
start = memory("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # forget the high-water mark of the imports
peak = []
gguf_file._verify = lambda *_: peak.append(memory("VmHWM") - start)  # it maps the file, which counts as resident
gguf_file.write(root, root / "out.gguf", "float32")
print(peak[0], (root / "out.gguf").stat().st_size / 2**20)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peak memory is read from Linux's /proc")
def test_memory_stays_below_the_experts_of_one_layer(tmp_path, words):
    """The experts of a layer are tensors of 8 MiB in the file, but pass through memory in pieces of 256 KiB."""
    words.save(tmp_path)
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    peak, size = map(float, done.stdout.split())
    print(f"{peak:.1f} MiB to write {size:.0f} MiB")
    assert size > 90 and peak < 6
