"""`bessemer convert` on real models: what it accepts, and that it loses nothing."""

import json
import warnings

import pytest
from hf_cases import made
from made_run import write_run

from bessemer.addons.families import conversion
from bessemer.hf import deepseek

FP8_WARNING = "ignore:.* does not divide into tiles"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "tiny")


def content(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_model_is_never_lost(call, run, tmp_path):
    """Naming a finished model as both source and target once dropped 68 of its tensors."""
    before, model = content(run), run / "01-zero" / "model"
    (tmp_path / "link").symlink_to(model)
    copy = tmp_path / "copy"
    assert call("convert", model, copy)[0] == 0
    content_before = content(copy)
    for source, target, words in (
        (model, model, "belongs to a run"),  # a stage's folder
        (run, model, "belongs to a run"),
        (model, tmp_path / "link", "belongs to a run"),
        (model, run / "01-zero" / "new", "belongs to a run"),
        (copy, copy, "is the model to convert"),
        (copy, tmp_path / "x" / ".." / "copy", "is the model to convert"),
        (copy, copy / "model.safetensors", "lies in the model to convert"),
    ):
        status, out, err = call("convert", source, target, "--no-mtp", "--force")
        assert status == 2 and not out and err.startswith("error: ") and err.count("\n") == 1 and words in err
    status, _, err = call("convert", run, copy, "--no-mtp")
    assert status == 2 and "copy exists already" in err and "--force" in err
    assert (content(run), content(copy)) == (before, content_before)
    assert call("convert", run, copy, "--no-mtp", "--force")[0] == 0
    assert (deepseek.load(copy).cfg.n_mtp, deepseek.load(model).cfg.n_mtp) == (0, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "link"] and content(run) == before
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to(copy)
    assert call("convert", tmp_path / "link", copy, "--force")[0] == 2


def test_a_file_or_folder_of_other_things_stays(call, run, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for target in ("thesis", "thesis/chapter.tex", "loop", "thesis/chapter.tex/model"):
        for force in ([], ["--force"]):
            status, _, err = call("convert", run, tmp_path / target, *force)
            assert status == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "x"
    (tmp_path / "empty").mkdir()
    assert call("convert", run, tmp_path / "empty")[0] == 0


def test_a_run_a_stage_or_a_directory(call, run, tmp_path, monkeypatch):
    monkeypatch.chdir(run.parent.parent)
    for number, source in enumerate((run, run / "zero", run / "01-zero", run / "01-zero" / "model")):
        assert call("convert", source, tmp_path / str(number)) == (0, f"{tmp_path / str(number)}\n", "")
    assert content(tmp_path / "0").values() and len({tuple(content(tmp_path / n).values()) for n in "0123"}) == 1
    status, _, err = call("convert", run / "sft", tmp_path / "n")
    assert status == 2 and 'has no stage "sft"; known: zero' in err


def test_the_name_gives_the_format(call, run, tmp_path):
    pytest.importorskip("gguf")
    status, _, err = call("convert", run, tmp_path / "a b.gguf")
    assert (status, err) == (0, f"for Ollama: ollama create 'a b' -f '{tmp_path}/a b.Modelfile'\n")
    assert call("convert", run, tmp_path / "a.gguf")[0] == 0
    assert (tmp_path / "a.gguf").read_bytes()[:4] == b"GGUF"
    assert "\nFROM ./a.gguf\n" in (tmp_path / "a.Modelfile").read_text("utf-8")
    (tmp_path / "d.Modelfile").write_text("mine")
    status, _, err = call("convert", run, tmp_path / "e.Modelfile", "--to", "gguf")
    assert status == 2 and "name the latter NAME.gguf" in err
    status, _, err = call("convert", run, tmp_path / "d.gguf")
    assert status == 2 and "d.Modelfile exists already" in err and not (tmp_path / "d.gguf").exists()
    status, _, err = call("convert", run, tmp_path / "a.gguf", "--dtype", "float16")
    assert status == 2 and "a.gguf exists already" in err
    assert call("convert", run, tmp_path / "a.gguf", "--dtype", "float16", "--force")[0] == 0
    assert call("convert", run, tmp_path / "b.gguf", "--to", "hf")[0] == 0 and (tmp_path / "b.gguf").is_dir()
    status, _, err = call("convert", run, tmp_path / "c.gguf", "--fp8")
    assert status == 2 and "--fp8: a GGUF file has no FP8 in tiles" in err
    status, _, err = call("convert", run, tmp_path / "c.gguf", "--mtp")
    assert status == 2 and "no place for MTP layers" in err


@pytest.mark.filterwarnings(FP8_WARNING)
def test_options_reach_the_export(call, run, tmp_path):
    assert call("convert", run, tmp_path / "a", "--fp8", "--scales", "ue8m0", "--dtype", "float16")[0] == 0
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["quantization_config"]["scale_fmt"] == "ue8m0" and config["torch_dtype"] == "float16"
    status, _, err = call("convert", run, tmp_path / "b", "--scales", "ue8m0")
    assert status == 2 and "--scales" in err and "--fp8" in err
    assert call("convert", run, tmp_path / "b", "--dtype", "int3")[0] == 2
    assert call("convert", run, tmp_path / "b", "--fp8", "--scales", "e5m2")[0] == 2
    assert not (tmp_path / "b").exists()


def test_a_warning_is_one_line_without_the_place_in_the_program(call, run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        conversion, "check_finished", lambda *_, **__: warnings.warn("tiles are\nnot even", stacklevel=1)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        status, _, err = call("convert", run, tmp_path / "out")
    assert status == 0 and err == "warning: tiles are not even\n"


@pytest.mark.parametrize("target", ["out", "out.gguf", "out --to dcp", "out --dtype bfloat16"])
def test_a_model_of_another_family_needs_no_export(call, tmp_path, target):
    """Its folder is in transformers' form already; the line says how an adapter is merged."""
    made("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "adapter").mkdir()
    name, *options = target.split()
    status, out, err = call("convert", tmp_path / "model", tmp_path / name, *options)
    assert status == 2 and not out and err.count("\n") == 1 and not (tmp_path / name).exists()
    for words in ("llama", "needs no export", str(tmp_path / "adapter"), "bessemer convert RUN/NN-STAGE/adapter DST"):
        assert words in err
