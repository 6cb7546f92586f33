"""Files that a recipe names: where they are looked up, and what a second call does after one of them changed."""

import json
import os
import shutil
import time
from pathlib import Path

import hub_server
import pytest
import torch
from typer.testing import CliRunner

import bessemer
from bessemer.addons.families import conversion, data_sets
from bessemer.addons.families.dcp import export
from bessemer.cli import app
from bessemer.config import places
from bessemer.config.recipe import Recipe
from bessemer.data import fingerprints
from bessemer.data.tokenizer import Tokenizer
from bessemer.errors import UserError
from bessemer.model.config import preset
from bessemer.model.transformer import Transformer
from bessemer.pipeline import runner
from bessemer.pipeline.stage import find_kind

MODEL = {
    "vocab_size": 390, "dim": 16, "n_layers": 1, "n_dense_layers": 1, "n_mtp": 0, "inter_dim": 16, "n_heads": 1,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4,
    "max_seq_len": 64,
}  # fmt: skip
RECIPE = """
name = "own"
seed = 1
[model]
preset = "tiny"
vocab_size = 390
[[stage]]
kind = "import"
model = "start"
[[stage]]
kind = "corpus"
row_length = 32
vocab_sample = 10000
heldout = 0.2
parts = { notes = "data/notes" }
[[stage]]
kind = "sft"
from = "import"
data = ["chat.jsonl"]
epochs = 1
row_length = 48
lr = 1e-3
lr_final = 1e-4
precision = "float32"
[[stage]]
kind = "eval"
models = ["sft"]
tasks = ["jsonl:q.jsonl@test"]
problems = 1
samples = 1
max_new_tokens = 2
"""


def lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def talk(answer):
    return {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": answer}]}


class Own:
    """A recipe with a file of each kind beside it; the working directory is elsewhere."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "run"

    def run(self, recipe=None, **kwargs):
        """Run the recipe and return the stages that ran."""
        torch.set_num_threads(1)
        results = runner.run(Recipe.load(recipe or self.folder / "own.toml"), kwargs.pop("out", self.out), **kwargs)
        return [result.name for result in results if result.status == "done"]

    def records(self):
        return {path.parent.name[3:]: path for path in sorted(self.out.glob("??-*/stage.json"))}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    own = Own(tmp_path_factory.mktemp("own"))
    (own.folder / "data" / "notes").mkdir(parents=True)
    text = "".join(f"note {n} about the number {n * n}\n\n" for n in range(200))
    (own.folder / "data" / "notes" / "a.txt").write_text(text)
    (own.folder / "data" / "notes" / "unread.md").write_text("x")
    lines(own.folder / "chat.jsonl", *(talk(f"good day {n}") for n in range(8)))
    lines(own.folder / "q.jsonl", {"question": "What is 2 + 2?", "answer": "4"})
    Tokenizer.train([text], 390, "zero").save(own.folder / "tokenizer")
    Transformer(preset("tiny", **MODEL)).save(own.folder / "start", tokenizer_dir=own.folder / "tokenizer")
    (own.folder / "own.toml").write_text(RECIPE)
    assert own.run() == ["import", "corpus", "sft", "eval"]
    return own


@pytest.fixture
def own(finished, tmp_path, monkeypatch):
    """A copy of the finished run and its inputs, under another path."""
    shutil.copytree(finished.folder, tmp_path / "own")
    monkeypatch.setenv("BESSEMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return Own(tmp_path / "own")


def test_names_start_at_the_recipe_and_so_do_those_of_the_copy_in_the_run(own, tmp_path, monkeypatch):
    assert own.run() == []
    copy = own.out / "recipe.toml"
    assert 'folder = ".."' in copy.read_text() and str(tmp_path) not in copy.read_text()
    assert own.run(copy) == []
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert own.run(copy) == []
    shutil.move(own.folder / "q.jsonl", elsewhere)  # the same file, now found in the working directory
    assert own.run() == []
    (elsewhere / "q.jsonl").unlink()
    with pytest.raises(
        UserError, match=rf"no file or directory q\.jsonl \(looked in {own.folder}.*{elsewhere}, the wo"
    ):
        own.run()


@pytest.mark.parametrize(
    ("file", "old", "new", "again", "said"),
    [
        ("data/notes/a.txt", "note 3 ", "note 4 ", ["corpus"], "corpus: data/notes/a.txt changed since the run of 20"),
        ("chat.jsonl", "good day 1", "good day 9", ["sft", "eval"], "sft: chat.jsonl changed since the run of 20"),
        ("q.jsonl", "2 + 2", "3 + 1", ["eval"], "eval: q.jsonl changed since the run of 20"),
        (
            "start/config.json",
            '"bos_token_id": 0',
            '"bos_token_id": 1',
            ["import"],
            "import: start/config.json changed",
        ),
    ],
)
def test_a_file_that_was_replaced_makes_its_stage_run_again(own, capsys, file, old, new, again, said):
    """Even if the new file has the same size and modification time."""
    assert own.run() == []
    path = own.folder / file
    before = path.stat()
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    capsys.readouterr()
    assert own.run()[: len(again)] == again
    text = capsys.readouterr().err
    assert said in text and "; the stage runs again; the old one is moved to" in text
    assert own.run() == []


def test_a_file_that_changes_during_the_call_that_resumes_its_stage(own, capsys, monkeypatch):
    """The stage would go on with its checkpoint, whose data it no longer has."""
    kind, sft = find_kind("corpus"), next(own.out.glob("*-sft"))
    work = kind.run

    def run(self, config, ctx):
        lines(own.folder / "chat.jsonl", *(talk(f"good night {n}") for n in range(8)))
        return work(self, config, ctx)

    monkeypatch.setattr(kind, "run", run)
    (next(own.out.glob("*-corpus")) / "done.json").unlink()
    (sft / "done.json").unlink()
    assert list((sft / "state").iterdir())
    assert own.run() == ["corpus", "sft", "eval"]
    assert "sft: chat.jsonl changed since" in capsys.readouterr().err
    assert list((sft.with_name(f"{sft.name}.stale-1") / "state").iterdir())
    assert own.run() == []


def test_a_folder_of_data_with_a_config_is_watched_below_its_top(own, capsys):
    (own.folder / "data" / "notes" / "config.json").write_text("{}")
    (own.folder / "data" / "notes" / "more").mkdir()
    (own.folder / "data" / "notes" / "more" / "b.txt").write_text("one more")
    assert own.run() == ["corpus"]
    (own.folder / "data" / "notes" / "more" / "b.txt").write_text("one less")
    assert own.run() == ["corpus"] and "notes/more/b.txt changed since" in capsys.readouterr().err


def test_other_dates_unread_files_and_data_that_was_removed_change_nothing(own):
    for path in own.folder.glob("start/*"):
        os.utime(path, (1, 1))
    (own.folder / "data" / "notes" / "unread.md").write_text("y")
    (own.folder / "chat.jsonl").unlink()
    assert own.run() == []
    (own.folder / "data" / "notes" / "b.txt").write_text("one more")
    assert own.run() == ["corpus"]


def test_reuse_takes_no_stage_whose_files_have_changed(own, tmp_path, capsys):
    lines(own.folder / "q.jsonl", {"question": "What is 2 + 3?", "answer": "5"})
    assert own.run(out=tmp_path / "new", reuse=own.out) == ["eval"]
    output = capsys.readouterr().err
    assert "eval: q.jsonl changed since the run of 20" in output and f"not taken from {own.out}" in output


def test_an_address_on_the_hub_keeps_its_commit_in_a_run(own, tmp_path, monkeypatch, capsys):
    pytest.importorskip("datasets")
    path = own.folder / "hub.toml"
    path.write_text('name = "hub"\n[[stage]]\nkind = "import"\nmodel = "hf://own/name"\n')
    out, files = tmp_path / "run", {file.name: file.read_bytes() for file in (own.folder / "start").iterdir()}
    with hub_server.serving(monkeypatch) as server:
        first = server.commit(files)
        assert own.run(path, out=out, until="import") == ["import"]
        made = json.loads((out / "01-import" / "done.json").read_text())["digest"]
        second = server.commit(
            files | {"config.json": files["config.json"].replace(b'"bos_token_id": 0', b'"bos_token_id": 1')}
        )
        assert own.run(path, out=out) == []
        (out / "01-import" / "done.json").unlink()  # as after a kill, and then on another machine
        monkeypatch.setenv("BESSEMER_CACHE", str(tmp_path / "empty"))
        assert own.run(path, out=out) == ["import"]
        assert json.loads((out / "01-import" / "done.json").read_text())["digest"] == made
        assert own.run(path, out=tmp_path / "reused", reuse=out) == []
        assert own.run(path, out=tmp_path / "new", until="import") == ["import"]
        pinned = [
            json.loads((run / "revisions.json").read_text()) for run in (out, tmp_path / "reused", tmp_path / "new")
        ]
        assert [one["hf://own/name"] for one in pinned] == [first, first, second]
        (out / "revisions.json").write_text(json.dumps({"hf://own/name": second}))
        assert own.run(path, out=out) == ["import"] and "import: hf://own/name changed since" in capsys.readouterr().err


def test_a_data_set_is_read_at_the_commit_of_the_run(tmp_path, monkeypatch):
    datasets, asked = pytest.importorskip("datasets"), []
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, revision=None, **__: asked.append(revision) or iter(()))
    with hub_server.serving(monkeypatch) as server:
        first = server.commit({"a": b"1"})
        for head in (first, server.commit({"a": b"2"})):
            server.head = head
            with places.of_recipe(None, tmp_path / "revisions.json"):
                list(data_sets.hub_records("hf://own/name/en#test"))
                list(data_sets.hub_records(f"hf://own/name@{head}"))
            list(data_sets.hub_records("hf://own/name"))  # outside a run: the newest revision
            list(data_sets.hub_records("hf://own/name@v2"))
    assert asked == [first, first, None, "v2", first, head, None, "v2"]


def test_a_flipped_bit_in_a_finished_model_is_detected_on_load(own, monkeypatch):
    monkeypatch.setenv(fingerprints.NO_VERIFY, "")
    monkeypatch.setattr(fingerprints, "SETTLED_NS", 0)
    monkeypatch.setattr(
        fingerprints, "sha256_of", lambda path, real=fingerprints.sha256_of: read.append(path) or real(path)
    )
    folder, read = own.out / "03-sft" / "model", list[Path]()
    good = bessemer.load(folder)
    assert len(read) == len(list(folder.iterdir()))
    bessemer.load(folder)
    assert len(read) == len(list(folder.iterdir())), "a stat each, once they have been read"
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    for use in (
        bessemer.load,
        *(lambda src, to=to: to(src, own.folder / "copy") for to in (conversion.convert, export)),
    ):
        with pytest.raises(
            UserError, match=rf"{weights} is not what its stage wrote.*run the recipe again.*--no-verify"
        ):
            use(folder)
    asked = ["generate", str(own.out / "sft"), "note", "--max-tokens", "2"]
    refused = CliRunner().invoke(app, asked)
    assert isinstance(refused.exception, UserError) and "model.safetensors is not" in str(refused.exception)
    assert CliRunner().invoke(app, [*asked, "--no-verify"]).output.startswith("note")
    monkeypatch.setenv(fingerprints.NO_VERIFY, "1")
    assert any((a != b).any() for a, b in zip(good.parameters(), bessemer.load(folder).parameters(), strict=True))


def test_a_large_file_is_read_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fingerprints, "LARGE", 1)
    monkeypatch.setenv("BESSEMER_CACHE", str(tmp_path / "cache"))
    path, read = tmp_path / "file", []
    real = fingerprints.sha256_of
    monkeypatch.setattr(fingerprints, "sha256_of", lambda path: read.append(path) or real(path))
    monkeypatch.setattr(fingerprints, "SETTLED_NS", 0)
    path.write_bytes(b"one")
    first = fingerprints.sha256(path)
    assert fingerprints.sha256(path) == first and len(read) == 1
    assert capsys.readouterr().err == f"reading {path} (0 GB) once, for its SHA-256\n"
    before = path.stat()
    time.sleep(0.02)
    path.write_bytes(b"six")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # the same size and date as before
    assert fingerprints.sha256(path) != first and len(read) == 2
    monkeypatch.setattr(fingerprints, "SETTLED_NS", 10**12)
    path.write_bytes(b"two")  # modified too recently: read every time
    assert fingerprints.sha256(path) == fingerprints.sha256(path) != first and len(read) == 4
    (tmp_path / "cache" / "hashes.sqlite").write_bytes(b"no table of hashes" * 100)
    assert fingerprints.sha256(path) != first
