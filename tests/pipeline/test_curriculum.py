"""Pre-training with a changing mixture, epoch caps and growing rows: whole, killed, and refused where impossible."""

import json
import shutil
from types import SimpleNamespace

import pytest
import stages_run
import torch
from safetensors.torch import load_file

from bessemer.config.recipe import Recipe
from bessemer.config.units import Points
from bessemer.data import corpus
from bessemer.data.documents import Document
from bessemer.data.tokenizer import Tokenizer
from bessemer.errors import UserError
from bessemer.pipeline.stages.pretrain import Feed, beyond_budget

CHANGES = """
lengths = [["0", 32], ["8K", 64], ["16K", 128]]
epoch_caps = { english = 0.25 }
[stage.mixture]
english = 0.2
countdown = [["0", 0.4], ["12K", 0.4], ["12K", 0.0]]
arithmetic = [["0", 0.4], ["12K", 0.4], ["12K", 0.8]]
"""


def write_recipe(folder, changes=CHANGES):
    path = stages_run.write_recipe(folder)
    text = path.read_text().split('[[stage]]\nkind = "rl"')[0]
    text, _ = text.split("[stage.mixture]")
    path.write_text(text.replace('tokens = "80K"', 'tokens = "24K"').replace('"40K"', '"4K"') + changes)
    return path


def values(out, name):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["tokens"]: line["values"][name] for line in lines if name in line["values"]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("curriculum")
    recipe = write_recipe(folder)
    stages_run.run(recipe, folder / "run")
    return recipe, folder / "run"


def test_steps_keep_their_tokens_while_rows_grow(whole):
    _, out = whole
    at = sorted(values(out, "train/loss"))
    assert {b - a for a, b in zip([0, *at], at, strict=False)} == {8 * 64}
    assert max(at) >= 24_000


def test_realised_shares_follow_the_recipe(whole):
    _, out = whole
    shares = {name: values(out, f"data/share/{name}") for name in ("english", "countdown", "arithmetic")}
    for at in shares["english"]:
        assert sum(share[at] for share in shares.values()) == pytest.approx(1)
    early, last = min(shares["countdown"]), max(shares["countdown"])
    assert shares["countdown"][early] == pytest.approx(0.4, abs=0.06)
    assert shares["countdown"][last] == pytest.approx(0.4 / 2, abs=0.05), "none of it in the second half"
    epochs = values(out, "data/epochs/english")
    assert epochs[last] == pytest.approx(0.25, abs=0.02), "its cap"


def test_a_budget_overrun_by_whole_steps_is_reported(whole, tmp_path, capsys):
    """40K tokens in steps of 64 rows of 256; at V3's size a step is no hundredth of the budget."""
    assert "3 of them train on 49.2K tokens where the budget is 40K" in beyond_budget(40_000, 256, Points(64))
    assert beyond_budget(40_960, 256, Points(16)) is None
    ramp = Points([["0", 3072], ["469B", 15360]])
    assert beyond_budget(14_800_000_000_000, 4096, ramp) is None
    path, out = whole
    tokenizer, ctx = Tokenizer.load(out / "01-corpus" / "tokenizer"), SimpleNamespace(state=tmp_path, seed=7, say=print)
    Feed(Recipe.load(path, ["pretrain.tokens=3K", "pretrain.batch_rows=40", "pretrain.lengths=64"]).stage("pretrain"),
         ctx, out / "01-corpus", None, tokenizer)  # fmt: skip
    assert "steps are whole: 2 of them train on 5.12K tokens" in capsys.readouterr().out


def test_rows_have_the_length_that_the_recipe_says(whole, tmp_path):
    path, out = whole
    tokenizer, ctx = Tokenizer.load(out / "01-corpus" / "tokenizer"), SimpleNamespace(state=tmp_path, seed=7, say=print)
    config = Recipe.load(path, ["pretrain.lengths=186"]).stage("pretrain")  # 64 / (64 / 186) is less than 186
    feed = Feed(config, ctx, out / "01-corpus", None, tokenizer)
    assert feed.batch(0, 2).tokens_BT.shape == (2, 186)


@pytest.mark.parametrize("masked", [True, False])
def test_validation_attends_as_training_does(whole, tmp_path, masked):
    path, out = whole
    config = Recipe.load(path).stage("pretrain").model_copy(update={"document_mask": masked})
    tokenizer, ctx = Tokenizer.load(out / "01-corpus" / "tokenizer"), SimpleNamespace(state=tmp_path, seed=7, say=print)
    feed = Feed(config, ctx, out / "01-corpus", None, tokenizer)
    held = feed.validation("arithmetic")[0]
    assert torch.equal(held.tokens_BT[:2], feed.heldout["arithmetic"].batch(range(2)).tokens_BT)
    for batch in (feed.batch(0, 4), held):
        if not masked:
            assert batch.segments_BT is None
            continue
        begins_BT = batch.segments_BT.diff(dim=1) == 1
        assert begins_BT[batch.tokens_BT[:, 1:] == tokenizer.bos_id].all()
    if masked:  # after every end that no padding follows
        after_BT = (held.tokens_BT[:, :-1] == tokenizer.eos_id) & (held.tokens_BT[:, 1:] != tokenizer.pad_id)
        assert torch.equal(begins_BT, after_BT)
        pieces_BT = begins_BT & (held.tokens_BT[:, 1:] != tokenizer.bos_id)
        assert not held.loss_BT[:, 1:][pieces_BT].any(), "another document does not predict it"
    assert (held.tokens_BT == tokenizer.bos_id).sum(1).max() > 1


def test_killed_it_ends_the_same_bit_for_bit(whole, tmp_path):
    recipe, out = whole
    copy = tmp_path / "run"
    shutil.copytree(out, copy)
    shutil.rmtree(copy / "02-pretrain")
    lines = [line for line in (copy / "metrics.jsonl").read_text().splitlines(True) if '"pretrain"' not in line]
    (copy / "metrics.jsonl").write_text("".join(lines))
    stages_run.killed(recipe, copy, "pretrain", 30)
    stages_run.run(recipe, copy)
    first, second = (load_file(run / "02-pretrain/model/model.safetensors") for run in (out, copy))
    assert all((first[name] == second[name]).all() for name in first)
    assert values(out, "data/share/english") == values(copy, "data/share/english")


def test_shares_by_size_and_shards_built_elsewhere(tmp_path):
    recipe = write_recipe(tmp_path, "temperature = 0.5\n")
    texts = [json.loads(line)["text"] for line in (tmp_path / "text.jsonl").read_text().splitlines()]
    tokenizer = Tokenizer.train(texts, 400)
    tokenizer.save(tmp_path / "built" / "tokenizer")
    built = corpus.build([Document(text, "english") for text in texts], tokenizer, 32, tmp_path / "built" / "english")
    link = f'corpus.parts.english="shards:{tmp_path / "built" / "english"}"'
    stages_run.run(recipe, tmp_path / "run", link, 'pretrain.tokens="4K"')
    assert Tokenizer.load(tmp_path / "run" / "01-corpus" / "tokenizer").fingerprint == tokenizer.fingerprint
    parts = {
        name: corpus.load(tmp_path / "run" / "01-corpus" / name).train
        for name in ("english", "arithmetic", "countdown")
    }
    assert parts["english"].path == built.path and parts["english"].row_length == 64
    sizes = {name: rows.facts["tokens"] ** 0.5 for name, rows in parts.items()}
    shares = {name: list(values(tmp_path / "run", f"data/share/{name}").values())[-1] for name in parts}
    assert shares == pytest.approx({name: size / sum(sizes.values()) for name, size in sizes.items()}, abs=0.05)
    shutil.rmtree(tmp_path / "built" / "english")
    with pytest.raises(UserError, match=r"not a finished corpus.*bessemer data build"):
        stages_run.run(recipe, tmp_path / "run", link)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ("temperature = 0.5\nlengths = [['0', 4]]\n", "lengths must lie between 8 and the model's max_seq_len 192"),
        ("temperature = 0.5\nlengths = [['0', 256]]\n", "lengths must lie between"),
        ("temperature = 0.5\nlengths = [['0', 192]]\nbatch_rows = 2\n", "less than one row of 192"),
        ("temperature = 0.5\nbatch_rows = [['0', 0], ['2K', 8]]\n", "batch_rows is 0 at its lowest; raise it to"),
        ("temperature = 0.5\n[stage.mixture]\nenglish = 1.0\n", "leave mixture out, or temperature"),
        ("epoch_caps = { french = 2.0 }\n[stage.mixture]\nenglish = 1.0\n", 'epoch_caps names "french"'),
        ("[stage.mixture]\nenglish = 'half'\n", "points in consumed tokens"),
        ("[stage.mixture]\nenglish = -1\n", "the weight of english is -1; it must never be negative, and must be"),
        ("[stage.mixture]\nenglish = [['0', 0.5], ['9K', -0.5]]\n", "the weight of english is 0.5 to -0.5; it must"),
        ("[stage.mixture]\nenglish = 0\n", "the weight of english is 0; it must never be negative, and must be"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(tmp_path, changes, word):
    recipe = write_recipe(tmp_path, changes)
    if "batch_rows" in changes:
        recipe.write_text(recipe.read_text().replace("batch_rows = 8\n", ""))
    with pytest.raises(UserError, match=word):
        stages_run.run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_caps_that_leave_too_little_data_are_refused(whole, tmp_path):
    recipe, out = whole
    shutil.copytree(out, tmp_path / "run")
    with pytest.raises(UserError, match=r"the data runs out at [\d,]+ tokens.*raise a cap"):
        stages_run.run(recipe, tmp_path / "run", "pretrain.epoch_caps={english=0.2,arithmetic=0.2,countdown=0.2}")


def test_weights_that_stay_are_numbers(tmp_path):
    settings = Recipe.load(stages_run.write_recipe(tmp_path)).stage("pretrain")
    assert settings.model_dump(mode="json")["mixture"] == {"english": 0.1, "countdown": 0.05, "arithmetic": 0.85}
