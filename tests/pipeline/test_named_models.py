"""Finding the model that a user means."""

import json
import os
import warnings
from pathlib import Path

import pytest

from bessemer.addons.families.named_models import model_dir, tokenizer_of_checkpoint
from bessemer.errors import UserError
from bessemer.runs.directory import run_dir, writing_models


def make(root, name, done=True, model=True):
    folder = root / name
    folder.mkdir(parents=True)
    if model:
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text("{}")
    if done:
        (folder / "done.json").write_text(json.dumps({"seconds": 1}))
    return folder


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "runs" / "tiny"
    root.mkdir(parents=True)
    (root / "recipe.toml").write_text('name = "tiny"\n')
    return root


def test_a_run_means_its_last_finished_model(root):
    make(root, "01-pretrain")
    zero = make(root, "02-zero")
    make(root, "03-eval", model=False)
    make(root, "04-next", done=False)
    make(root, "05-old.stale-1")
    assert model_dir(root) == zero / "model"
    assert model_dir("tiny").samefile(zero / "model")  # by name, under runs/
    assert model_dir(root / "01-pretrain") == root / "01-pretrain" / "model"
    assert model_dir(zero / "model") == zero / "model"
    assert model_dir(root / "pretrain") == root / "01-pretrain" / "model"  # by the stage's name
    assert model_dir("tiny/zero").samefile(zero / "model")
    with pytest.raises(UserError, match='has no stage "zerro"; did you mean "zero"'):
        model_dir(root / "zerro")


def test_a_stage_that_was_interrupted_is_not_passed_over_in_silence(root, call):
    """The base answers in its place, and whoever asks reads so, whatever the command."""
    tables = [("corpus", "corpus"), ("pretrain", "pretrain"), ("sft", "chatty"), ("eval", "eval")]
    text = "".join(f'[[stage]]\nkind = "{kind}"\nname = "{name}"\n' for kind, name in tables)
    (root / "recipe.toml").write_text('name = "tiny"\n' + text)
    base = make(root, "02-pretrain")
    make(root, "03-chatty", done=False)
    with pytest.warns(UserWarning, match='"chatty" .*not finished.*"pretrain"'):
        assert model_dir("tiny") == Path("runs/tiny/02-pretrain/model")
    _, _, err = call("generate", root, "hi")
    assert 'warning: stage "chatty"' in err
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model_dir(root / "pretrain") == base / "model", "named by the user"
        (root / "03-chatty" / "done.json").write_text('{"seconds": 1}')
        assert model_dir(root) == root / "03-chatty" / "model"


def test_a_reward_model_cannot_chat(root):
    make(root, "01-zero")
    judge = make(root, "02-helpful")
    (judge / "model" / "config.json").write_text('{"architectures": ["DeepseekV3ForSequenceClassification"]}')
    assert model_dir(root) == root / "01-zero" / "model"
    assert [name for name, _ in writing_models(root)] == ["zero"]


def test_a_recipe_may_name_the_model_that_stands_for_its_run(root):
    """Without `main`, `bessemer chat runs/r1-small` would open the student, which is trained last."""
    (root / "recipe.toml").write_text('name = "tiny"\nmain = "r1"\n')
    student = make(root, "03-student")
    with pytest.warns(UserWarning, match='"r1" .*not finished.*"student"'):
        assert model_dir(root) == student / "model"
    r1 = make(root, "02-r1")
    assert model_dir(root) == r1 / "model"
    assert [name for name, _ in writing_models(root)] == ["student", "r1"]  # serve's default is the last
    (root / "recipe.toml").write_text("main = " + "[" * 3000)
    assert model_dir(root) == student / "model"  # models outlive their recipe


def test_errors_list_what_exists(root):
    with pytest.raises(UserError, match=r"no model or run at tinny; available runs: runs/tiny"):
        model_dir("tinny")
    with pytest.raises(UserError, match=r"none yet; continue with: bessemer run"):
        model_dir(root)
    make(root, "01-pretrain", done=False)
    make(root, "02-eval", model=False)
    with pytest.raises(UserError, match=r"01-pretrain \(unfinished\), 02-eval \(no model\)"):
        model_dir(root)
    os.mkdir("empty")
    with pytest.raises(UserError, match=r"no config.json; it holds nothing"):
        model_dir("empty")
    with pytest.raises(UserError, match=r"available runs: runs/tiny"):
        run_dir("empty")
    assert run_dir("tiny").samefile(root)


def test_a_kept_checkpoint_has_the_tokenizer_of_its_stage_or_of_what_the_stage_read(tmp_path):
    stage = tmp_path / "02-rl"
    for folder in (stage / "state" / "kept" / "step-5", tmp_path / "01-import" / "model"):
        folder.mkdir(parents=True)
    (tmp_path / "01-import" / "model" / "tokenizer.json").write_text("{}")
    (stage / "stage.json").write_text('{"inputs": {"import": "digest"}}')
    assert tokenizer_of_checkpoint(stage / "state" / "kept" / "step-5") == tmp_path / "01-import" / "model"
    (stage / "state" / "tokenizer").mkdir()
    (stage / "state" / "tokenizer" / "tokenizer.json").write_text("{}")
    assert tokenizer_of_checkpoint(stage / "state" / "kept" / "step-5") == stage / "state" / "tokenizer"
