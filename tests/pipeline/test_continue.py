"""Pre-training that continues from a model, ours with its MTP module or one of another family, not random weights."""

import json
import math
import sys
from pathlib import Path

import pytest
import stages_run
import torch

import bessemer
from bessemer.config.kinds import stage_tables
from bessemer.config.recipe import Recipe
from bessemer.data.rows import open_rows
from bessemer.errors import UserError
from bessemer.hf.families import load_tokenizer
from bessemer.hf.model_directory import load
from bessemer.pipeline import runner
from bessemer.pipeline.stage import find_kind

sys.path.append(str(Path(__file__).parents[1] / "data"))
import hf_tokenizers as houses
from hf_cases import made

MORE = """
[[stage]]
kind = "corpus"
name = "new"
tokenizer = "{base}"
row_length = 64
heldout = 0.2
parts = {{ mine = "{text}" }}

[[stage]]
kind = "pretrain"
name = "further"
from = "{base}"
corpus = "new"
tokens = "6K"
lr = [["0", 0.0], ["2K", 2e-3], ["6K", 2e-4]]
batch_rows = 8
micro_rows = 4
compile = "off"
precision = "float32"
validate_every = "3K"
save_seconds = 0
"""
IMPORT = """
name = "foreign"
seed = 3
[[stage]]
kind = "import"
name = "base"
model = "{model}"
"""


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """The folder of a run that pre-trains and then continues on other text."""
    folder = tmp_path_factory.mktemp("ours")
    recipe = stages_run.write_recipe(folder)
    lines = (folder / "text.jsonl").read_text().splitlines(keepends=True)
    (folder / "new.jsonl").write_text("".join(line.replace("a ", "the old ") for line in lines))
    before = recipe.read_text().partition('[[stage]]\nkind = "rl"')[0].replace('tokens = "80K"', 'tokens = "20K"')
    recipe.write_text(before + MORE.format(base="pretrain", text=folder / "new.jsonl"))
    stages_run.run(recipe, folder / "run")
    return folder


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """The folder of a run that imports a Llama with its own tokenizer and continues its pre-training."""
    folder = tmp_path_factory.mktemp("foreign")
    made("llama", vocab_size=420, max_position_embeddings=128).save_pretrained(folder / "llama")
    houses.byte_level(folder / "llama")
    stages_run.write_recipe(folder)
    recipe = folder / "foreign.toml"
    recipe.write_text(IMPORT.format(model=folder / "llama") + MORE.format(base="base", text=folder / "text.jsonl"))
    stages_run.run(recipe, folder / "run")
    return folder


def at(folder, name):
    return next((folder / "run").glob(f"0?-{name}"))


def values(folder, name):
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {
        line["step"]: line["values"][name] for line in lines if line["stage"] == "further" and name in line["values"]
    }


def loss_of(folder, base, rows):
    """Mean loss in nats on held-out tokens, from the base's own logits and independent of the training code."""
    model = load(at(folder, base) / "model", dtype=torch.float32)
    batch = rows.batch(range(min(rows.n_rows, 64)))
    with torch.no_grad():
        logits = model(batch.tokens_BT).log_softmax(-1)[:, :-1]
    nats = -logits.gather(-1, batch.tokens_BT[:, 1:, None])[..., 0]
    return float((nats * batch.loss_BT[:, 1:]).sum() / batch.loss_BT[:, 1:].sum())


@pytest.mark.parametrize(("run", "base"), [("ours", "pretrain"), ("foreign", "base")])
def test_the_first_loss_matches_that_of_the_model_it_continues_from(run, base, request):
    folder = request.getfixturevalue(run)
    rows = open_rows(at(folder, "new") / "mine", "heldout", None)
    nats = loss_of(folder, base, rows)
    bits = values(folder, "val/bpb/mine")
    assert bits[0] == pytest.approx(nats / math.log(2) / rows.bytes_per_token, rel=1e-3)
    first = values(folder, "train/loss")[1]
    assert first == pytest.approx(nats, rel=0.1), "other rows of the same text"
    assert abs(first - nats) < 0.2 * abs(math.log(420) - nats), "far from random weights"
    assert bits[max(bits)] < bits[0], "it learns"


def test_what_the_model_has_stays(ours, foreign):
    before, after = (bessemer.load(at(ours, name) / "model") for name in ("pretrain", "further"))
    assert after.cfg == before.cfg and after.cfg.n_mtp == 1
    assert values(ours, "train/mtp_1")[1] < 0.9 * math.log(512), "the MTP module's weights too"
    rates = values(ours, "train/lr")
    assert rates[1] == 0.0 and max(rates.values()) == pytest.approx(2e-3, rel=0.3), "it rises anew"
    for folder, base in ((ours, "pretrain"), (foreign, "base")):
        files = [at(folder, name) / "model" / "tokenizer.json" for name in (base, "further")]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert load_tokenizer(at(foreign, "further") / "model").chat_template == houses.CHATML
    assert json.loads((at(foreign, "further") / "model" / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            ["further.corpus=null"],
            'has from = "base" of kind import, which is a model; to train it further, name the corpus',
        ),
        (["further.from=new"], 'from must name a stage with a model, but it is "new" of kind corpus'),
        (["further.corpus=base"], 'corpus = "base" is of kind import; name a stage of kind corpus'),
        (["further.model.dim=64"], 'continues from the model of "base", whose sizes are fixed; leave model out'),
        (["new.row_length=256"], 'row_length of "new" is 256, but the model of "base" reads 128 tokens'),
        (["new.tokenizer=null"], "were made with another tokenizer than the model has"),
    ],
)
def test_mistakes_are_named_before_a_step(changes, complaint, foreign, tmp_path):
    text = (foreign / "foreign.toml").read_text()
    for change in changes:
        if change.endswith("=null"):
            key = change.partition("=")[0].partition(".")[2]
            text = "".join(line for line in text.splitlines(keepends=True) if not line.startswith(f"{key} ="))
            changes = []
    with pytest.raises(UserError) as raised:
        runner.run(Recipe.parse(text, changes), tmp_path / "run", reuse=foreign / "run")
    assert complaint in str(raised.value)
    assert not (tmp_path / "run" / "03-further" / "model").exists()


CORPORA = """
name = "twice"
model = { preset = "tiny" }
[[stage]]
kind = "corpus"
name = "first"
parts = { tales = "fables-en", plays = "shakespeare" }
[[stage]]
kind = "pretrain"
lr = 1e-3
mixture = { tales = 1.0 }
[[stage]]
kind = "sft"
lr = 1e-3
lr_final = 1e-3
data = ["chat.jsonl"]
[[stage]]
kind = "corpus"
name = "second"
parts = { tales = "fables-en", plays = "shakespeare", needles = "needle:fables-en" }
tokenizer = "first"
heldout = 0.1
[[stage]]
kind = "pretrain"
name = "further"
from = "sft"
corpus = "second"
mixture = { plays = 1.0 }
lr = 1e-4
[[stage]]
kind = "longeval"
models = ["further"]
corpus = "second"
parts = ["plays"]
short = "second"
short_parts = ["plays"]
"""


@pytest.mark.parametrize(
    ("stage", "change", "source"),
    [
        ("further", "further.mixture={tales = 1.0}", "fables-en"),
        ("further", "further.mixture={needles = 1.0}", "fables-en"),
        ("longeval", "longeval.parts=['tales']", "fables-en"),
        ("longeval", "longeval.short_parts=[]", "fables-en"),
        ("longeval", "longeval.haystack=fables-en", "fables-en"),
        ("further", "pretrain.mixture.plays=0.5", "shakespeare"),
    ],
)
def test_nothing_is_measured_on_text_that_the_model_was_trained_on(stage, change, source):
    def resolve(*changes):
        recipe = Recipe.parse(CORPORA, changes)
        return find_kind(recipe.stage(stage).kind)().resolve(recipe.stage(stage), recipe)

    resolve()
    resolve(change, "first.heldout=0.1")
    with pytest.raises(UserError) as raised:
        resolve(change)
    assert (
        f'stage "{stage}": "second" holds out 0.1 of {source}, but "pretrain" was trained on all but 0.02 of it; '
        "give both corpora the same heldout" in str(raised.value)
    )


def test_only_stages_that_make_a_model_are_gone_on_from():
    makers = {"pretrain", "extend", "import", "sft", "distill", "rl"}
    assert {kind for kind, table in stage_tables().items() if table.makes_model} == makers
