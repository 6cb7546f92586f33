"""`bessemer push` and `pull` against a local hub, through the real client over HTTP."""

import json
import re
import shutil
import tomllib

import pytest
from hub_server import serving
from made_run import write_run

from bessemer.addons.families import remote
from bessemer.addons.watch import facts
from bessemer.addons.watch.model_card import _corpora, _data, model_card
from bessemer.config.recipe import Recipe
from bessemer.data import chat
from bessemer.errors import UserError
from bessemer.hf import deepseek
from bessemer.model.transformer import Scorer
from bessemer.runs.files import write_json

ROW = {"task": "countdown", "language": "en", "model": "zero", "temperature": 1.0, "n": 5, "samples": 16,
       "pass_at_1": 0.5, "pass_at_1_interval": [0.4, 0.6]}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # raised by the client itself


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("HF_TOKEN", "secret")
    with serving(monkeypatch) as server:
        from huggingface_hub import constants
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()  # the variable counts only before the first import
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        server.token = "secret"
        yield server


def test_a_model_goes_up_and_comes_down_the_same(call, run, server, tmp_path):
    status, out, err = call("push", run, "own/name", "--licence", "mit")
    assert (status, err) == (0, ""), server.requests
    assert "/own/name/commit/" in out
    files = server.commits[server.head]
    model = run / "01-zero" / "model"
    assert {name: data for name, data in files.items() if name != "README.md"} == {
        path.name: path.read_bytes() for path in model.iterdir() if path.name != "README.md"
    }
    card = files["README.md"].decode()
    assert card.startswith('---\nlicense: "mit"\n') and remote.MARK in card and "bessemer pull own/name" in card
    status, out, _ = call("pull", "own/name", tmp_path / "down", "--json")
    assert status == 0 and json.loads(out) == {"directory": str(tmp_path / "down"), "commit": server.head}
    assert (tmp_path / "down" / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert deepseek.load(tmp_path / "down").cfg == deepseek.load(model).cfg
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".down")]
    status, _, err = call("pull", "own/name", tmp_path / "down")
    assert status == 2 and "down exists already" in err


def test_a_push_replaces_the_weights_of_an_earlier_one_and_leaves_the_owner_s_card(call, run, server, tmp_path):
    """transformers takes model.safetensors before shards, so stale weights under another name would win."""
    stale = ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    stale += ("adapter_config.json",)
    server.commit(dict.fromkeys(stale, b"old") | {"README.md": b"# Mine", "notes.txt": b"kept", "more/a.bin": b"kept"})
    model = tmp_path / "model"
    shutil.copytree(run / "01-zero" / "model", model)
    (model / "README.md").write_text("a card from elsewhere")
    assert call("push", model, "own/name")[0] == 0
    files = server.commits[server.head]
    assert files["README.md"] == b"# Mine" and not files.keys() & {*stale}
    assert {"notes.txt", "more/a.bin", "model.safetensors"} <= files.keys()


def test_every_stage_of_a_run_has_the_corpora_it_read(run):
    """A run's recipe writes out every default, such as the numbers of samples."""
    recipe = tomllib.loads(Recipe.load("r1-tiny").to_toml())
    stages = [facts.StageFacts(stage["name"], stage["kind"], run, True, 0.0, {}, stage) for stage in recipe["stage"]]
    whole = facts.RunFacts(None, {}, "", stages, [], 0.0)
    read = {stage.name: [corpus.name for corpus in _corpora(whole, stage)] for stage in stages}
    assert read["r1"] == read["zero"] == ["corpus"] and all(
        _data(whole, stage) for stage in stages if stage.name == "r1"
    )


def test_hidden_files_are_not_pushed(call, run, server, tmp_path):
    """As in a folder of `hf download --local-dir` and in a clone. The hub refuses such files."""
    shutil.copytree(run / "01-zero" / "model", tmp_path / "model")
    for name in (".cache/huggingface/config.json.metadata", ".git/config", "more/.cache/x"):
        (tmp_path / "model" / name).parent.mkdir(parents=True)
        (tmp_path / "model" / name).write_text("x")
    assert call("push", tmp_path / "model", "own/name")[0] == 0
    assert server.commits[server.head].keys() == {path.name for path in (run / "01-zero" / "model").iterdir()} | {
        "README.md"
    }


def test_a_folder_that_cannot_be_sent_makes_no_repository(call, run, server, monkeypatch):
    import huggingface_hub

    def refuse(*args):
        raise ValueError("Invalid `path_in_repo`")

    monkeypatch.setattr(huggingface_hub, "CommitOperationAdd", refuse)
    assert call("push", run, "own/name")[0] == 2 and not server.requests


def test_a_second_copy_of_the_weights_is_not_downloaded(call, run, server, tmp_path):
    """As in Mistral's repositories, which have the model in their own format, too."""
    assert call("push", run, "own/name")[0] == 0
    server.commit(
        server.commits[server.head] | {"consolidated.safetensors": b"x", "consolidated-00001.safetensors": b"x"}
    )
    assert call("pull", "own/name", tmp_path / "down")[0] == 0
    assert not list((tmp_path / "down").glob("consolidated*"))
    deepseek.load(tmp_path / "down")


def test_the_owners_card_stays(call, run, server):
    server.commit({"README.md": b"---\nlicense: mit\n---\nMy own words."})
    assert call("push", run, "own/name")[0] == 0
    files = server.commits[server.head]
    assert files["README.md"].endswith(b"My own words.") and "model.safetensors" in files
    server.commit(files | {"README.md": b"---\nlicense: mit\n---\n"})  # what the hub writes for a new repository
    assert call("push", run, "own/name")[0] == 0
    assert remote.MARK.encode() in server.commits[server.head]["README.md"]


def test_a_hub_that_fails_half_way_has_the_old_model_and_the_second_try_sends_the_rest(call, run, server):
    before = server.commit({"config.json": b"{}"})
    server.failures = {"/commit/": 500}
    status, out, err = call("push", run, "own/name")
    assert status == 2 and not out and err.startswith("error: cannot push to own/name") and err.count("\n") == 1
    assert server.head == before and len(server.large) == 1
    server.failures, server.requests = {}, []
    assert call("push", run, "own/name")[0] == 0
    assert not [request for request in server.requests if request.startswith("PUT")], "the large file was sent again"
    assert "model.safetensors" in server.commits[server.head]


@pytest.mark.parametrize(
    ("token", "failures", "words"),
    [("other", {}, "HF_TOKEN to a token with write access"), ("secret", {"/repos/create": 403}, "another owner")],
)
def test_push_without_write_access_is_refused(call, run, server, token, failures, words):
    server.token, server.failures = token, failures
    status, out, err = call("push", run, "own/name")
    assert status == 2 and not out and words in err and err.count("\n") == 1 and "secret" not in err


def test_missing_repository_is_refused(call, run, server, tmp_path, monkeypatch):
    server.commit({"notes.txt": b"x"})
    status, _, err = call("pull", "own/name", tmp_path / "down")
    assert status == 2 and "has no config.json" in err
    status, _, err = call("pull", "own/name@nosuch", tmp_path / "down")
    assert status == 2 and "check the name and the revision" in err
    for name in ("own", "own/name/more", "/name"):
        status, _, err = call("pull", name)
        assert status == 2 and "must have the form owner/name" in err
    server.shutdown()
    server.server_close()
    status, _, err = call("pull", "own/name", tmp_path / "down")
    assert status == 2 and "check the network" in err
    assert not (tmp_path / "down").exists()


def test_card_describes_its_run(call, run):
    shots = {"pass_at_1": 0.7, "shots": 4, "shot_kind": "worked"}
    settings = {"prefix": "a|b\nc", "top_p": 0.95, "pass_at_1": 0.6}
    rows = [ROW | {"pass_at_1": 0.1}, ROW | shots, ROW, ROW | settings, ROW | {"model": "other", "pass_at_1": 0.9}]
    write_json(run / "01-zero" / "results.json", {"rows": rows})
    text = (run / "recipe.toml").read_text()
    try:
        (run / "recipe.toml").write_text('folder = "/home/someone"\n' + text + 'from = "corpus"\n')
        status, card, _ = call("push", run, "own/name", "--dry-run")
    finally:
        (run / "recipe.toml").write_text(text)
        (run / "01-zero" / "results.json").unlink()
    assert status == 0 and card.startswith('---\nlicense: "other"\n') and "# own/name" in card
    card, _, in_chinese = card.partition("## 中文\n")
    assert re.findall(r"(?m)^\| countdown.*", card) == [
        f"| countdown{before} | en | 1.0 | {score} % (40.0-60.0) | 5 | 16 |"
        for before, score in (
            ("", "50.0"), (", 4 worked examples first", "70.0"), (', top-p 0.95, after "a\\|b c"', "60.0")
        )
    ]  # fmt: skip
    assert re.findall(r"(?m)^\| countdown.*", in_chinese)[0] == "| countdown | en | 1.0 | 50.0%（40.0-60.0） | 5 | 16 |"
    assert text.strip() in card and "someone" not in card and "### 评测" in in_chinese and "```" not in in_chinese
    use = card.partition("## Use\n\n```\n")[2].partition("```")[0].splitlines()
    assert use == [
        "bessemer pull own/name model && bessemer chat model", "VLLM_MLA_DISABLE=1 vllm serve own/name",
        "bessemer convert model model.gguf && ollama create my-model -f model.Modelfile",
    ]  # fmt: skip
    assert "written for latents of 512 + 64; this model has " in card and "were not run with this model" in card


def test_the_card_of_a_model_without_a_run(run, tmp_path):
    shutil.copytree(run / "01-zero" / "model", tmp_path / "model")
    (tmp_path / "recipe.toml").write_text("[dish]\nname = 'soup'\n")  # some other program's
    card = model_card(tmp_path / "model", "own/name", "mit")
    assert "16 routed experts (4 per token)" in card and "Recipe" not in card and "of the run" not in card
    (tmp_path / "model" / "chat_template.jinja").write_text(chat.jinja("r1"), "utf-8")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    write_json(tmp_path / "model" / "config.json", config | {"kv_lora_rank": 512, "qk_rope_head_dim": 64})
    card = model_card(tmp_path / "model", "own/name", "mit")
    assert "\nvllm serve own/name --reasoning-parser deepseek_r1\n" in card and "512 + 64" not in card
    assert "\npython -m sglang.launch_server --model-path own/name --reasoning-parser deepseek-r1\n" in card
    write_json(tmp_path / "model" / "config.json", config | {"kv_lora_rank": 0})
    assert "no other program can serve it" in model_card(tmp_path / "model", "own/name", "mit")
    (tmp_path / "model" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not valid JSON"):
        model_card(tmp_path / "model", "own/name", "mit")


def test_a_model_beside_a_run_or_of_an_unfinished_stage_is_not_the_runs(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    stage = tmp_path / "run" / "01-zero"
    assert "of a run that took" in model_card(stage / "model", "own/name", None)
    for folder in (tmp_path / "run" / "downloads" / "model", stage / "older" / "model"):
        shutil.copytree(stage / "model", folder)
        assert "of the run" not in model_card(folder, "own/name", None)
    (stage / "done.json").unlink()
    assert "of the run" not in model_card(stage / "model", "own/name", None)


def test_the_card_of_a_reward_model_does_not_offer_to_chat_with_it(run, tmp_path):
    deepseek.save(Scorer(deepseek.read_config(run / "01-zero" / "model")), tmp_path, tokenizer_dir=run / "tokenizer")
    card = model_card(tmp_path, "own/name", None)
    assert '\npipeline_tag: "text-classification"\n' in card and "It is a reward model" in card
    assert "\n```\nbessemer pull own/name model\n```\n" in card and "vllm" not in card and "ollama" not in card
