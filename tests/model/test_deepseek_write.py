"""Writing a model: what reaches the disk, when, and what happens if writing fails.

The crash test kills a forked process before its n-th file operation, for every n, and checks what a reader finds.
"""

import errno
import json
import os
import resource
import signal
import subprocess
import sys

import pytest
import torch
from model_cases import random_model, tiny
from safetensors.torch import load_file, save_file

from bessemer.addons.accelerate.precision.block_fp8 import quantise_blocks
from bessemer.addons.families import conversion, dcp
from bessemer.errors import UserError
from bessemer.hf import deepseek, replace, safetensors_writer
from bessemer.hf.mapping import slots
from bessemer.hf.safetensors_reader import cast
from bessemer.model import transformer
from bessemer.model.config import preset
from bessemer.model.transformer import Scorer

SPECIAL = [{"content": "<s>", "id": 3}, {"content": "</s>", "id": 4}]


def same(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def model():
    return random_model(tiny())


def tokenizer(directory):
    directory.mkdir()
    (directory / "tokenizer.json").write_text(json.dumps({"added_tokens": SPECIAL}))
    names = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (directory / "tokenizer_config.json").write_text(json.dumps(names))
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    return directory


def test_the_files_of_a_model_directory(model, tmp_path):
    model.save(tmp_path / "m", tokenizer_dir=tokenizer(tmp_path / "t"), files={"README.md": "# card\n"})
    assert {path.name for path in (tmp_path / "m").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "README.md",
    }  # fmt: skip
    for name in ("config.json", "generation_config.json"):
        values = json.loads((tmp_path / "m" / name).read_text())
        assert (values["bos_token_id"], values["eos_token_id"]) == (3, 4)
    assert load_file(tmp_path / "m" / "model.safetensors").keys() == {slot.key for slot in slots(model.cfg)}


ALONE = """
import sys
from bessemer.model import transformer
from bessemer.model.config import preset
from bessemer.model import transformer

kind = getattr(transformer, sys.argv[1])
kind(preset("tiny", n_layers=2, vocab_size=64)).initialise(3).save(sys.argv[2])
"""


@pytest.mark.parametrize("kind", ["Transformer", "Scorer"])
def test_a_network_is_saved_where_nothing_but_the_network_was_imported(tmp_path, kind):
    """In a process of its own: here other tests have imported what writes."""
    done = subprocess.run([sys.executable, "-c", ALONE, kind, tmp_path / "m"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = getattr(transformer, kind)(preset("tiny", n_layers=2, vocab_size=64)).initialise(3)
    assert same(deepseek.load(tmp_path / "m", kind=type(expected)), expected)


@pytest.mark.parametrize("limit", [1, 9_000, 50_000])
def test_shards(model, tmp_path, limit):
    model.save(tmp_path, max_shard_bytes=limit)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert set(index["weight_map"].values()) == set(files)
    total = 0
    for file in files:
        tensors = load_file(tmp_path / file)
        assert {key for key, name in index["weight_map"].items() if name == file} == tensors.keys()
        used = sum(tensor.nbytes for tensor in tensors.values())
        assert used <= limit or len(tensors) == 1
        total += used
    assert index["metadata"]["total_size"] == total
    assert same(deepseek.load(tmp_path), model)


def test_dtypes(model, tmp_path):
    """A forced dtype applies to all but the routing biases; by default each parameter keeps its own."""
    model.save(tmp_path / "forced", dtype="bfloat16")
    stored = load_file(tmp_path / "forced" / "model.safetensors")
    wide = {key for key, tensor in stored.items() if tensor.dtype == torch.float32}
    assert wide == {key for key in stored if key.endswith("e_score_correction_bias")}
    model.to_compute(torch.bfloat16).save(tmp_path / "default")
    stored = load_file(tmp_path / "default" / "model.safetensors")
    assert stored["model.norm.weight"].dtype == stored["model.layers.1.mlp.gate.weight"].dtype == torch.float32
    assert stored["lm_head.weight"].dtype == torch.bfloat16
    assert json.loads((tmp_path / "default" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert same(deepseek.load(tmp_path / "default"), model)


@pytest.mark.parametrize("stored", [torch.float32, torch.float64, torch.bfloat16, torch.float8_e4m3fn])
def test_values_that_a_dtype_cannot_hold_are_refused(model, tmp_path, stored):
    """They would become infinite without a word."""
    key = "model.layers.1.self_attn.q_a_proj.weight"
    (tmp_path / "m").mkdir()
    deepseek.write_config(model.cfg, tmp_path / "m")
    exact = {slot.key: slot.of(model.state_dict()).clone() for slot in slots(model.cfg)}
    exact[key][0, 0] = 7e4
    if stored is torch.float8_e4m3fn:
        exact[key], exact[f"{key}_scale_inv"] = quantise_blocks(exact[key])
    else:
        exact[key] = exact[key].to(stored)
    save_file(exact, tmp_path / "m" / "model.safetensors")
    loaded = deepseek.load(tmp_path / "m")
    for use in (
        lambda: conversion.convert(tmp_path / "m", tmp_path / "n", dtype="float16"),
        lambda: dcp.export(tmp_path / "m", tmp_path / "n", torch.float16),
        lambda: deepseek.load(tmp_path / "m", "float16"),
        lambda: loaded.save(tmp_path / "n", dtype="float16"),
    ):
        with pytest.raises(UserError, match=rf"tensor {key}.*too large for float16; use float32"):
            use()
        assert not (tmp_path / "n").exists()
    conversion.convert(tmp_path / "m", tmp_path / "n", dtype="bfloat16")


def test_values_too_large_for_float32_get_no_advice_to_use_it():
    with pytest.raises(UserError, match=r"tensor w.*too large for float32$"):
        cast(torch.tensor([1e300], dtype=torch.float64), torch.float32, "w")


def test_tied_head_is_shared_after_loading(tmp_path):
    model = random_model(tiny(tie_embeddings=True))
    model.save(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = deepseek.load(tmp_path)
    assert loaded.head.weight is loaded.embed.weight and same(loaded, model)
    conversion.convert(tmp_path, tmp_path / "again")
    assert same(deepseek.load(tmp_path / "again"), model)


def test_loaded_counters_start_at_zero(model, tmp_path):
    model.save(tmp_path)
    for gate in deepseek.load(tmp_path).gates().values():
        assert not gate.load_E.any()


def test_replacing_keeps_what_is_not_ours(model, tmp_path):
    model.save(tmp_path / "m", max_shard_bytes=9_000)
    (tmp_path / "m" / "notes.md").write_text("mine")
    (tmp_path / "m" / "adapter_config.json").write_text("{}")  # with other weights it would say something false
    (tmp_path / "m" / "logs").mkdir()
    (tmp_path / "m" / "logs" / "a").write_text("b")
    other = random_model(tiny(), seed=4)
    other.save(tmp_path / "m")
    names = {path.name for path in (tmp_path / "m").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "notes.md", "logs"}
    assert (tmp_path / "m" / "logs" / "a").read_text() == "b"
    assert same(deepseek.load(tmp_path / "m"), other)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_directory_of_other_things_is_never_replaced(model, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="is not a model directory"):
        model.save(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        model.save(tmp_path / "thesis.tex")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_full_disk_leaves_the_old_directory(model, tmp_path, monkeypatch):
    model.save(tmp_path / "m")

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device", file.name)

    monkeypatch.setattr(safetensors_writer, "_sync", full)
    with pytest.raises(UserError, match=r"No space left.*m is unchanged"):
        random_model(tiny(), seed=4).save(tmp_path / "m")
    assert same(deepseek.load(tmp_path / "m"), model)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_write_the_system_really_refuses(model, tmp_path):
    """A file-size limit in a forked child makes write() fail half way through the shard."""
    model.save(tmp_path / "m")
    child = os.fork()
    if not child:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            random_model(tiny(), seed=4).save(tmp_path / "m")
        except UserError as error:
            code = 7 if "File too large" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert same(deepseek.load(tmp_path / "m"), model)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def _die_before(step: int) -> None:
    """From now on the process kills itself before file operation number `step`; reads are not counted. The event
    ctypes.dlsym stands for the exchange of two directories, which has no audit event of its own."""
    changes = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "ctypes.dlsym"}
    done = 0

    def hook(event, arguments):
        nonlocal done
        if event in changes or (event == "open" and arguments[2] & os.O_CREAT):
            if done == step:
                os.kill(os.getpid(), signal.SIGKILL)
            done += 1

    sys.addaudithook(hook)


@pytest.mark.parametrize("in_one_step", [True, False])
def test_killed_at_any_moment(tmp_path, monkeypatch, in_one_step):
    if not in_one_step:
        monkeypatch.setattr(replace, "exchange", lambda source, destination: False)
    old, new = random_model(tiny()), random_model(tiny(), seed=4)
    target, finished, restored = tmp_path / "m", False, in_one_step
    old.save(target)
    for step in range(0 if in_one_step else 12, 300):
        child = os.fork()
        if not child:
            _die_before(step)
            new.save(target, max_shard_bytes=50_000)
            os._exit(0)
        finished = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        if not in_one_step and not target.exists():  # between two renames: the next writer restores the old one
            restored = True
            with pytest.raises(ZeroDivisionError), replace.replacing(target):
                raise ZeroDivisionError
        loaded = deepseek.load(target)
        assert same(loaded, new) if finished else same(loaded, old) or same(loaded, new)
        if finished:
            break
        if same(loaded, new):
            old.save(target)
    assert finished and restored and step > 20


@pytest.mark.parametrize("replacing", [replace.replacing, conversion.replacing_file])
def test_two_processes_never_write_one_target(tmp_path, replacing):
    """The second is refused and disturbs nothing; a killed one is in nobody's way."""
    target, (read, write) = tmp_path / "m", os.pipe()
    child = os.fork()
    if not child:
        with replacing(target):
            os.write(write, b"!")
            signal.pause()
    try:
        assert os.read(read, 1) == b"!"
        scratch = sorted(tmp_path.iterdir())
        with pytest.raises(UserError, match=r"another process.*m; wait"), replacing(target):
            raise AssertionError("two at once")
        assert sorted(tmp_path.iterdir()) == scratch
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with replacing(target) as fresh:
        (fresh / "config.json" if fresh.is_dir() else fresh).write_text("{}")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("damage", [lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: data[:-8]])
def test_damage_between_writing_and_reading_back_is_found(model, tmp_path, monkeypatch, damage):
    model.save(tmp_path / "m")
    original = safetensors_writer.write_tensors

    def damaged(directory, *args):
        sums = original(directory, *args)
        file = directory / "model.safetensors"
        file.write_bytes(damage(file.read_bytes()))
        return sums

    monkeypatch.setattr(safetensors_writer, "write_tensors", damaged)
    for write in (lambda: model.save(tmp_path / "m"), lambda: conversion.convert(tmp_path / "m", tmp_path / "n")):
        with pytest.raises(UserError, match=r"model\.safetensors"):
            write()
    assert same(deepseek.load(tmp_path / "m"), model) and not (tmp_path / "n").exists()


def test_convert_copies_the_rest(model, tmp_path):
    src, dst = tmp_path / "a", tmp_path / "b"
    model.save(src, tokenizer_dir=tokenizer(tmp_path / "t"), files={"README.md": "card"})
    (src / "generation_config.json").write_text('{"top_p": 0.5}')
    conversion.convert(src, dst, mtp=False, dtype="bfloat16", max_shard_bytes=20_000)
    assert (dst / "README.md").read_text() == "card" and (dst / "tokenizer.json").exists()
    assert json.loads((dst / "generation_config.json").read_text()) == {"top_p": 0.5}
    config = json.loads((dst / "config.json").read_text())
    assert (config["eos_token_id"], config["torch_dtype"], config["num_nextn_predict_layers"]) == (4, "bfloat16", 0)
    actual, expected = deepseek.load(dst).state_dict(), deepseek.load(src, dtype="bfloat16", mtp=False).state_dict()
    for name, tensor in expected.items():
        stored = tensor if name.endswith("bias_E") else tensor.to(torch.bfloat16)
        assert torch.equal(actual[name], stored.to(tensor.dtype)), name


def test_convert_never_writes_over_its_source(model, tmp_path):
    source = tmp_path / "m"
    model.save(source)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    (tmp_path / "link").symlink_to(source)
    for target in (source, tmp_path / "link", tmp_path / "x" / ".." / "m", source / "config.json", tmp_path):
        with pytest.raises(UserError, match="never changed in place"):
            conversion.convert(source, target, mtp=False)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    conversion.convert(tmp_path / "link", tmp_path / "n", max_shard_bytes=9_000)
    assert same(deepseek.load(tmp_path / "n"), model)


def test_a_model_that_is_replaced_leaves_no_tokenizer_behind(model, tmp_path):
    """Its template with these weights would be a mixture of two models; files that are not part of a model stay."""
    model.save(tmp_path / "a")
    model.save(tmp_path / "b", tokenizer_dir=tokenizer(tmp_path / "t"), files={"notes.md": "mine"})
    (tmp_path / "a" / "generation_config.json").unlink()
    model.save(tmp_path / "b")  # without a tokenizer of its own it keeps the one that is there
    assert (tmp_path / "b" / "chat_template.jinja").exists()
    (tmp_path / "t" / "chat_template.jinja").unlink()
    model.save(tmp_path / "b", tokenizer_dir=tmp_path / "t")
    assert not (tmp_path / "b" / "chat_template.jinja").exists()
    for replace_by in (conversion.convert, dcp.export):
        model.save(tmp_path / "b", tokenizer_dir=tmp_path / "t")
        for name in ("added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.json"):
            (tmp_path / "b" / name).write_text("{}")
        (tmp_path / "b" / "additional_chat_templates").mkdir()
        replace_by(tmp_path / "a", tmp_path / "b")
        names = {path.name for path in (tmp_path / "b").iterdir()}
        weights = {"model.safetensors"} if replace_by is conversion.convert else {".metadata", "__0_0.distcp"}
        assert names == {"config.json", "generation_config.json", "notes.md"} | weights


def test_convert_refuses_a_copy_that_is_none(model, tmp_path):
    model.save(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    tensors["model.layers.3.embed_tokens.weight"] += 1
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.layers\.3\.embed_tokens.weight differs"):
        conversion.convert(tmp_path / "a", tmp_path / "b")
    conversion.convert(tmp_path / "a", tmp_path / "b", mtp=False)
    assert deepseek.load(tmp_path / "b").cfg.n_mtp == 0


def test_a_reward_model_is_not_converted(tmp_path, model):
    Scorer.of(model, 0).save(tmp_path / "reward")
    with pytest.raises(UserError, match="holds a reward model"):
        conversion.convert(tmp_path / "reward", tmp_path / "other")


MEMORY = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from bessemer.addons.families import conversion
from bessemer.hf import deepseek
from bessemer.hf.mapping import slots
from bessemer.hf.safetensors_writer import TensorSpec, write_tensors
from bessemer.model import transformer
from bessemer.model.config import preset

def memory(which):
    line = next(line for line in open("/proc/self/status") if line.startswith(which))
    return int(line.split()[1]) / 1024

def peak(work):
    start = memory("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # forget the high-water mark of the imports
    done = work()
    return memory("VmHWM") - start, done

root = Path(sys.argv[1])
cfg = preset("tiny", vocab_size=512, dim=256, n_layers=8, moe_inter_dim=256, n_routed_experts=32, n_mtp=0)
layout = slots(cfg)
plan = [TensorSpec(slot.key, torch.bfloat16, slot.shape) for slot in layout]
torch.randn(1000, 1000).to(torch.bfloat16)
(root / "a").mkdir()
deepseek.write_config(cfg, root / "a")
write_tensors(root / "a", plan, (torch.randn(slot.shape) for slot in layout), 4e6)
converted, _ = peak(lambda: conversion.convert(root / "a", root / "b", dtype="float32", max_shard_bytes=8e6))
loaded, model = peak(lambda: deepseek.load(root / "b"))
size = sum(tensor.nbytes for tensor in model.state_dict().values()) / 2**20
print(converted, size, loaded, len(list((root / "b").glob("*.safetensors"))))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peak memory is read from Linux's /proc")
def test_memory_stays_that_of_one_tensor(tmp_path):
    """A checkpoint of at least 20 shards: converting takes a small part of its size, loading its size once."""
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    converted, size, loaded, shards = map(float, done.stdout.split())
    print(f"{size:.0f} MiB in {shards:.0f} shards: {converted:.1f} MiB to convert, {loaded:.1f} to load")
    assert shards > 20 and size > 150
    assert converted < 12
    assert 0.95 * size < loaded < size + 12


def test_a_replaced_model_leaves_no_weights_of_any_kind(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    old = ("model.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json", "model.pth")
    for name in (*old, "notes.txt", "training_args.bin"):
        (tmp_path / name).write_text("old")
    with replace.replacing(tmp_path) as fresh:
        (fresh / "config.json").write_text("{}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "notes.txt", "training_args.bin"]
