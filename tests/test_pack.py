"""`bessemer pack` makes archives of a run's models; `bessemer pull` unpacks them, and whoever loads one compares it."""

import gzip
import io
import json
import re
import subprocess
import sys
import tarfile
from importlib.util import find_spec

import pytest
import torch
from made_run import write_run
from transformers import AutoModelForCausalLM, AutoTokenizer

import bessemer
from bessemer.addons.distributed import vllm_engine
from bessemer.addons.distributed.ray_settings import VLLMOptions
from bessemer.addons.families import archive
from bessemer.data import fingerprints
from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.engine import Engine
from bessemer.runs.directory import write_done
from bessemer.runs.files import write_json

ROW = {"task": "countdown", "language": "en", "model": "zero", "temperature": 1.0, "n": 5, "samples": 16,
       "pass_at_1": 0.5, "by_problem": [0.5] * 5}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = write_run(tmp_path_factory.mktemp("runs") / "tiny")
    (root / "02-eval").mkdir()
    write_json(root / "02-eval" / "results.json", {"rows": [ROW, ROW | {"model": "other"}]})
    write_json(root / "02-eval" / "stage.json", {"fingerprint": "f", "identity": {"kind": "eval"}, "inputs": {}})
    write_done(root / "02-eval", {"fingerprint": "f", "inputs": {}}, {}, 1.0)
    return root


@pytest.fixture
def packed(call, run, tmp_path):
    status, out, err = call("pack", run, tmp_path / "assets", "--licence", "mit", "--json")
    assert (status, err) == (0, "")
    (row,) = json.loads(out)
    assert row["stage"] == "zero" and row["file"] == str(tmp_path / "assets" / "tiny-zero.tar")
    return tmp_path / "assets" / "tiny-zero.tar"


def test_a_packed_model_comes_back_with_its_card_and_its_evaluation_and_answers(call, run, packed, tmp_path):
    assert call("pull", packed, tmp_path / "down") == (0, f"{tmp_path / 'down'}\n", "")
    down, model = tmp_path / "down", run / "01-zero" / "model"
    for path in model.iterdir():
        assert (down / path.name).read_bytes() == path.read_bytes()
    extra = {path.name for path in down.iterdir()} - {path.name for path in model.iterdir()}
    assert extra == {"README.md", "SHA256SUMS", "evaluation.json"}
    assert json.loads((down / "evaluation.json").read_text()) == {"run": "tiny", "stage": "zero", "evaluations": [ROW]}
    card = (down / "README.md").read_text()
    assert card.startswith('---\nlicense: "mit"\n') and "| countdown | en | 1.0 | 50.0 % |" in card
    assert "bessemer pull tiny-zero.tar && bessemer chat tiny-zero\n" in card
    assert call("generate", down, "the quick", "--max-tokens", "4")[0] == 0


def test_sha256sum_finds_all_files_right(packed, tmp_path):
    check = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    subprocess.run(check, cwd=packed.parent, check=True, capture_output=True)
    with tarfile.open(packed) as tar:
        tar.extractall(tmp_path, filter="data")
    done = subprocess.run(check, cwd=tmp_path / "tiny-zero", check=True, capture_output=True, text=True)
    unlisted = {path.name for path in (tmp_path / "tiny-zero").iterdir()} - set(done.stdout.replace(": OK", "").split())
    assert unlisted == {"README.md", "SHA256SUMS"}


def test_the_same_run_gives_the_same_bytes(call, run, packed, tmp_path):
    assert call("pack", run, tmp_path / "again")[0] == call("pack", run, tmp_path / "third")[0] == 0
    again, third = ((tmp_path / name / packed.name).read_bytes() for name in ("again", "third"))
    assert again == third


def greedy(directory):
    """A prompt and our engine's greedy continuation."""
    engine = Engine(bessemer.load(directory), Tokenizer.load(directory))
    ids = engine.tokenizer.encode("the quick brown fox")
    ((row,),) = engine.generate([ids], max_new_tokens=16, temperature=0, stop_ids=[])
    assert len(set(row.tokens)) > 3
    return ids, list(row.tokens)


def test_transformers_generates_the_same_from_the_unpacked_folder(packed, tmp_path):
    archive.unpack(packed, tmp_path / "down")
    ids, ours = greedy(tmp_path / "down")
    assert AutoTokenizer.from_pretrained(tmp_path / "down")("the quick brown fox").input_ids == ids
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "down")
    theirs = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=16, min_new_tokens=16)
    assert theirs[0, len(ids) :].tolist() == ours


@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="needs tools/vllm_cpu.sh")
def test_vllm_generates_the_same_from_the_unpacked_folder(packed, tmp_path):
    archive.unpack(packed, tmp_path / "down")
    ids, ours = greedy(tmp_path / "down")
    plan = Engine(bessemer.load(tmp_path / "down"), Tokenizer.load(tmp_path / "down")).plan
    (batch,) = plan([ids], max_new_tokens=16, temperature=0, stop_ids=[]).batches
    (theirs,) = vllm_engine.VLLMEngine(tmp_path / "down", 0, VLLMOptions(max_model_len=64)).run(batch)
    assert list(theirs.tokens) == ours


def test_a_loaded_model_is_compared_with_its_hashes(call, packed, tmp_path, monkeypatch):
    monkeypatch.setenv(fingerprints.NO_VERIFY, "")  # the option sets it for the whole process
    down = tmp_path / "down"
    archive.unpack(packed, down)
    (down / "README.md").write_text("my own words")
    bessemer.load(down)
    weights = (down / "model.safetensors").read_bytes()
    (down / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    ask = ("generate", down, "the", "--max-tokens", "2")
    status, out, err = call(*ask)
    assert (status, out) == (2, "") and "model.safetensors is not what bessemer pack wrote" in err
    assert err.count("\n") == 1 and "--no-verify" in err and "bessemer run" not in err
    assert call(*ask, "--no-verify")[0] == 0


def headers(data):
    """Where each header of an archive begins, by the name of its file."""
    places, at = {}, 0
    while any(data[at : at + 512]):
        member = tarfile.TarInfo.frombuf(data[at : at + 512], "ascii", "strict")
        places[member.name.rpartition("/")[2]] = at
        at += 512 + member.size + -member.size % 512
    return places


def made(*members):
    """An archive of (name, content) or TarInfo."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def link(kind, name, target):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


BROKEN = {
    "flipped bit": (lambda data: flipped(data, headers(data)["model.safetensors"] + 2000), "does not have the SHA-256"),
    "cut": (lambda data: data[: len(data) // 2], "is cut off within model.safetensors"),
    "cut between files": (lambda data: data[: headers(data)["config.json"]], "is not whole: config.json is missing"),
    "no hashes": (lambda data: data[headers(data)["chat_template.jinja"] :], "it holds no SHA256SUMS"),
    "a file more": (
        lambda data: data[: headers(data)["tokenizer_config.json"]] + made(("tiny-zero/z.json", b"{}")),
        "tokenizer_config.json is missing",
    ),
    "unlisted": (lambda data: made(("tiny-zero/a.json", b"{}"), ("m/SHA256SUMS", b"")), "a.json does not have"),
    "foreign hashes": (lambda data: made(("m/SHA256SUMS", b"no line of it\n")), "is not a SHA-256 and the name"),
    "compressed": (gzip.compress, "no header of a tar file"),
    "empty": (lambda data: b"", "it holds no SHA256SUMS"),
    "text": (lambda data: b"not found\n" * 100, "no header of a tar file"),
    "parent": (lambda data: made(("../config.json", b"{}"), ("m/SHA256SUMS", b"")), "is not whole|does not have"),
    "deeper": (lambda data: made(("m/../../config.json", b"{}")), "it holds 'm/../../config.json'"),
    "absolute": (lambda data: made(("/etc/config.json", b"{}")), "it holds '/etc/config.json'"),
    "no folder": (lambda data: made(("config.json", b"{}")), "it holds 'config.json'"),
    "hidden": (lambda data: made(("m/.config.json", b"{}")), "it holds 'm/.config.json'"),
    "code": (lambda data: made(("m/modeling.py", b"x")), "it holds 'm/modeling.py'"),
    "pickle": (lambda data: made(("m/pytorch_model.bin", b"x")), "it holds 'm/pytorch_model.bin'"),
    "link": (lambda data: made((link(tarfile.SYMTYPE, "m/config.json", "/etc/passwd"), b"")), "it holds 'm/config"),
    "hard link": (lambda data: made((link(tarfile.LNKTYPE, "m/config.json", "m/x"), b"")), "it holds 'm/config"),
    "twice": (lambda data: made(("m/a.json", b"1"), ("m/a.json", b"2")), "a.json twice"),
    "control characters": (lambda data: made(("m/\x1b[2J.json", b"1")), r"it holds 'm/\x1b"),
}


def flipped(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(("break_it", "why"), BROKEN.values(), ids=BROKEN)
def test_an_archive_that_is_not_whole_or_not_ours_leaves_nothing(call, packed, tmp_path, break_it, why):
    bad = tmp_path / "bad.tar"
    bad.write_bytes(break_it(packed.read_bytes()))
    status, out, err = call("pull", bad, tmp_path / "down")
    assert (status, out) == (2, "") and re.search(why if "|" in why else re.escape(why), err) and err.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"bad.tar", "assets"}


def test_what_exists_is_not_replaced_and_what_is_missing_is_named(call, run, packed, tmp_path):
    (tmp_path / "here").mkdir()
    for command in (("pack", run, tmp_path / "here"), ("pull", packed, tmp_path / "here")):
        status, _, err = call(*command)
        assert status == 2 and "here exists already" in err and err.count("\n") == 1
    status, _, err = call("pull", tmp_path / "none.tar")
    assert status == 2 and "none.tar" in err and err.count("\n") == 1
    status, _, err = call("pack", run, tmp_path / "new", "--stage", "zro")
    assert status == 2 and 'did you mean "zero"' in err and not (tmp_path / "new").exists()


def test_a_changed_model_of_a_run_is_not_packed(call, tmp_path):
    run = write_run(tmp_path / "run")
    (run / "01-zero" / "model" / "config.json").write_bytes(b"{}")
    status, _, err = call("pack", run, tmp_path / "assets")
    assert status == 2 and "config.json has 2 bytes" in err and not (tmp_path / "assets").exists()


@pytest.mark.parametrize("verb", ["pack", "pull"])
def test_a_full_disk_leaves_nothing(run, packed, tmp_path, verb):
    """A limit on the size of a file makes write() fail within the weights."""
    what = ["pack", run, tmp_path / "new"] if verb == "pack" else ["pull", packed, tmp_path / "new"]
    code = "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); from bessemer import cli; cli.main()"
    done = subprocess.run([sys.executable, "-c", code, *map(str, what)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "File too large" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"assets"}


def test_imported_models_are_packed_only_by_name(call, tmp_path):
    run = write_run(tmp_path / "run")
    (run / "recipe.toml").write_text('name = "tiny"\n[[stage]]\nkind = "import"\nname = "zero"\n')
    status, _, err = call("pack", run, tmp_path / "assets")
    assert status == 2 and "imported" in err
    assert call("pack", run, tmp_path / "assets", "--stage", "zero")[0] == 0


def test_a_conversion_of_a_packed_model_keeps_no_hashes_of_the_old_one(call, packed, tmp_path):
    archive.unpack(packed, tmp_path / "down")
    assert call("convert", tmp_path / "down", tmp_path / "small", "--dtype", "bfloat16")[0] == 0
    assert not (tmp_path / "small" / "SHA256SUMS").exists()
    bessemer.load(tmp_path / "small")
