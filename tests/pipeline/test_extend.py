"""Two context extensions and their evaluation, as a user runs them: whole, killed, on two ranks, and refused."""

import json
import math
import os
import random
import subprocess
import sys
import weakref
from dataclasses import replace

import pytest
import stages_run
import torch

import bessemer
from bessemer.addons.tasks.needle import Needle
from bessemer.addons.watch import card
from bessemer.errors import UserError
from bessemer.hf import deepseek
from bessemer.train import setup

MORE = """
[[stage]]
kind = "corpus"
name = "rows-128"
row_length = 128
tokenizer = "corpus"
heldout = 0.2
[stage.parts]
english = "{text}"
needle = "needle:{text}"
[stage.limits]
needle = "6K"
[stage.mix.needle]
longest = 200

[[stage]]
kind = "extend"
name = "to-128"
from = "pretrain"
corpus = "rows-128"
length = 128
rope_factor = 8.0
tokens = "6K"
lr = 1e-3
batch_rows = 4
micro_rows = 2
compile = "off"
precision = "float32"
validate_every = "3K"
save_seconds = 0
mixture = {{ english = 0.5, needle = 0.5 }}

[[stage]]
kind = "corpus"
name = "rows-256"
like = "rows-128"
row_length = 256

[[stage]]
kind = "extend"
name = "to-256"
like = "to-128"
from = "to-128"                    # and from its corpus, in longer rows
length = 256

[[stage]]
kind = "longeval"
models = ["pretrain", "to-128", "to-256"]
switched = ["pretrain"]
haystack = "{text}"
corpus = "rows-256"
parts = ["english"]
lengths = [100, 200]
depths = [0.0, 1.0]
problems = 2
needles = 2
rows = 2
short = "corpus"
short_parts = ["english", "arithmetic"]
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A recipe, and a run of it on one process."""
    folder = tmp_path_factory.mktemp("extend")
    recipe = stages_run.write_recipe(folder)
    draw = random.Random(1)
    lines = [json.loads(line)["text"] for line in (folder / "text.jsonl").read_text().splitlines()]
    texts = [" ".join(draw.sample(lines, 4)) for _ in range(60)]
    (folder / "long.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    before = recipe.read_text().partition('[[stage]]\nkind = "rl"')[0].replace('tokens = "80K"', 'tokens = "12K"')
    recipe.write_text(before + MORE.format(text=folder / "long.jsonl"))
    stages_run.run(recipe, folder / "one")
    return folder


def out_of(base, name):
    return next((base / "one").glob(f"0?-{name}"))


def lines(out, stage):
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["stage"] == stage]


def test_positions_change_where_the_recipe_says_and_nowhere_else(base):
    plain, first, second = (
        deepseek.read_config(out_of(base, name) / "model") for name in ("pretrain", "to-128", "to-256")
    )
    assert (plain.rope_factor, plain.max_seq_len, plain.yarn) == (1.0, 192, False)
    assert (first.rope_factor, first.original_seq_len, first.max_seq_len) == (8.0, 64, 128)
    assert second == first.at_length({"max_seq_len": 256})
    m = 0.1 * math.log(8) + 1
    assert first.softmax_scale == pytest.approx(plain.softmax_scale * m * m)
    unchanged = {"rope_factor": 1.0, "original_seq_len": plain.original_seq_len, "max_seq_len": 192}
    assert first.at_length(unchanged) == plain
    written = json.loads((out_of(base, "to-256") / "model" / "config.json").read_text())
    assert written["rope_scaling"]["factor"] == 8.0 and written["max_position_embeddings"] == 256


def test_it_continues_from_the_weights_of_its_source(base):
    """It is nearer to the source than a freshly initialised model would be, and yet it has moved."""
    before, after = (bessemer.load(out_of(base, name) / "model") for name in ("pretrain", "to-128"))
    moved = sum((a - b).norm() ** 2 for a, b in zip(before.parameters(), after.parameters(), strict=True)).sqrt()
    size = sum(a.norm() ** 2 for a in before.parameters()).sqrt()
    assert 0.001 * size < moved < 0.3 * size
    tokenizers = [(out_of(base, name) / "model" / "tokenizer.json").read_bytes() for name in ("pretrain", "to-256")]
    assert tokenizers[0] == tokenizers[1]
    losses = [line["values"]["train/loss"] for line in lines(base / "one", "to-128") if "train/loss" in line["values"]]
    assert losses[-1] < losses[0]


def test_killed_and_gone_on_with_it_leaves_the_same(base, tmp_path):
    expected = out_of(base, "to-128")
    out = stages_run.copy_without(base / "one", tmp_path / "run", expected.name, out_of(base, "to-256").name,
                                  out_of(base, "longeval").name)  # fmt: skip
    recipe = tmp_path / "small.toml"
    recipe.write_text((base / "small.toml").read_text())
    stages_run.killed(recipe, out, "to-128", 5)
    stages_run.run(recipe, out)
    for name in ("model/model.safetensors", "model/config.json"):
        assert (out / expected.name / name).read_bytes() == (expected / name).read_bytes()
    evaluated = out_of(base, "longeval").name
    assert (out / evaluated / "long.json").read_bytes() == (base / "one" / evaluated / "long.json").read_bytes()


def test_two_ranks_come_to_the_same_curve(base, tmp_path):
    names = [out_of(base, name).name for name in ("to-128", "rows-256", "to-256", "longeval")]
    out = stages_run.copy_without(base / "one", tmp_path / "run", *names)
    recipe = tmp_path / "small.toml"
    recipe.write_text((base / "small.toml").read_text())
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "bessemer", "run",
               str(recipe), "--out", str(out), "--until", "to-128", "--set", "layout.ep=2"]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    mine, expected = (
        [line["values"]["train/loss"] for line in lines(place, "to-128") if "train/loss" in line["values"]]
        for place in (out, base / "one")
    )
    assert mine == pytest.approx(expected, rel=2e-3)
    assert deepseek.read_config(out / names[0] / "model") == deepseek.read_config(out_of(base, "to-128") / "model")


def test_the_evaluation_says_what_it_asked(base):
    table = json.loads((out_of(base, "longeval") / "long.json").read_text())
    asked = [(row["model"], row["length"], row["n"], len(row["cells"])) for row in table["needle"]]
    models = ["pretrain", "pretrain + YaRN", "to-128", "to-256"]
    assert asked == [(model, length, 4, 2) for model in models for length in (100, 200)]
    assert all(0 <= row["low"] <= row["share"] <= row["high"] <= 1 for row in table["needle"])
    for row in table["positions"]:
        assert [(b["first"], b["end"]) for b in row["buckets"]] == [(1, 64), (64, 128), (128, 256)]
        assert all(0 < b["nats"] < 12 and b["n"] > 0 for b in row["buckets"])
    by_model = {row["model"]: row["buckets"] for row in table["positions"]}
    assert by_model["pretrain"] != by_model["pretrain + YaRN"]  # other positions, other losses
    assert {row["part"] for row in table["short"]} == {"english", "arithmetic"}
    assert all(0 < row["bpb"] < 8 for row in table["short"])
    html = card.render(card.read(base / "one"))
    assert 'id="long"' in html and "pretrain + YaRN" in html and "Loss by position" in html


def test_a_model_is_gone_before_the_next_is_loaded(base, tmp_path, monkeypatch):
    out = stages_run.copy_without(base / "one", tmp_path / "run", out_of(base, "longeval").name)
    held, real = [], setup.load_to_sample

    def noted(*args, **options):
        assert [model() for model in held] == [None] * len(held)
        model, tokenizer = real(*args, **options)
        held.append(weakref.ref(model))
        return model, tokenizer

    monkeypatch.setattr(setup, "load_to_sample", noted)
    few = ("longeval.lengths=[100]", "longeval.depths=[0.0]", "longeval.problems=1", "longeval.rows=1")
    stages_run.run(base / "small.toml", out, *few)
    assert len(held) == 4


def test_the_first_buckets_of_the_loss_match_those_of_a_plain_forward(base):
    """Their weighted mean equals the held-out loss of the rows as pre-training measures it."""
    from bessemer.addons.evals import long_context
    from bessemer.data.rows import open_rows
    from bessemer.train import loss

    model = bessemer.load(out_of(base, "to-256") / "model")
    rows = open_rows(out_of(base, "rows-256") / "english", "heldout")
    found = long_context.loss_by_position(model, rows, 2)
    nats, tokens = loss.heldout_nats(model, [rows.batch([0, 1])])
    assert sum(b["n"] for b in found) == tokens
    assert sum(b["nats"] * b["n"] for b in found) == pytest.approx(nats, rel=1e-5)


def test_needles_are_counted_from_what_the_model_writes(base):
    """An engine that always writes what the text says first finds the needle at depth 0 and no other."""
    from bessemer.addons.evals import long_context, tables
    from bessemer.engine.engine import Engine

    model, tokenizer = setup.load_model(out_of(base, "to-256") / "model")
    texts = [json.loads(line)["text"] for line in (base / "long.jsonl").read_text().splitlines()]
    task = Needle({"test": texts})
    asked = []

    class First(Engine):
        def generate(self, prompts, **options):
            asked.extend(len(tokenizer.encode(prompt)) for prompt in prompts)
            answers = super().generate(prompts, **options)
            words = [prompt.partition(" says ")[2].partition(".")[0] for prompt in prompts]
            return [[replace(answer, text=f" {word}")] for word, (answer,) in zip(words, answers, strict=True)]

    grid = long_context.NeedleGrid([250], [0.0, 1.0], 3, 3)
    cells = long_context.find_needles(First(model, tokenizer), task, grid, 250)
    assert [(cell["depth"], cell["correct"], cell["n"]) for cell in cells] == [(0.0, 3, 3), (1.0, 0, 3)]
    assert all(200 < n <= 250 - long_context.ANSWER - 1 for n in asked)
    whole = tables.needles_found(cells)
    assert whole["share"] == 0.5 and 0.1 < whole["low"] < 0.5 < whole["high"] < 0.9


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("to-256.rope_factor=4.0",), 'rope_factor is 4, "to-128" has 8; all phases of one model keep the same'),
        (("to-128.rope_factor=1.5", "to-256.rope_factor=1.5"), "rope_factor 1.5 reaches 96 tokens from 64"),
        (("to-256.length=128", "to-256.corpus=rows-128"), '"to-128" reached 128 already; raise it'),
        (("rows-128.row_length=64", "to-128.length=64"), "length is 64, the model reads 64 already"),
        (("to-128.corpus=pretrain",), 'corpus = "pretrain" is of kind pretrain'),
        (("to-128.mixture={poems=1.0}",), 'mixture names "poems", the corpus has english, needle'),
        (("to-128.model={dim=8}",), "model"),
        (("longeval.switched=[\"to-128\"]", "longeval.models=[\"pretrain\"]"), "switched names a stage"),
        (("longeval.parts=[\"poems\"]",), 'parts names "poems"'),
        (("longeval.depths=[2.0]",), "between 0 and 1"),
        (("longeval.short=pretrain",), 'is of kind pretrain; name a stage of kind corpus'),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused_before_anything_runs(base, tmp_path, change, said):
    with pytest.raises(UserError, match="(?s)" + said.replace("(", r"\(")):
        stages_run.run(base / "small.toml", tmp_path / "run", *change)
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("0*"))


def test_rows_of_another_tokenizer_are_refused(base, tmp_path):
    names = [out_of(base, name).name for name in ("rows-128", "to-128", "rows-256", "to-256", "longeval")]
    out = stages_run.copy_without(base / "one", tmp_path / "run", *names)
    recipe = tmp_path / "small.toml"
    text = (base / "small.toml").read_text()
    recipe.write_text(text.replace('tokenizer = "corpus"\n', "vocab_sample = 10000\n"))
    with pytest.raises(UserError, match=r'"rows-128" .*another tokenizer'):
        stages_run.run(recipe, out)


def test_prompts_beyond_a_thousand_tokens_are_taken_in_and_continued(base):
    """Prefill and decode match the plain forward at lengths where attention stores no probabilities."""
    folder = out_of(base, "to-256") / "model"
    model = deepseek.load(folder, context={"max_seq_len": 2048, "rope_factor": 40.0})
    model.eval()
    from bessemer.data.tokenizer import Tokenizer
    from bessemer.engine.engine import Engine

    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, 400, (n,), generator=generator).tolist() for n in (1500, 1100)]
    answers = Engine(model, Tokenizer.load(folder)).generate(ids, max_new_tokens=4, temperature=0.0, stop_ids=())
    for prompt, (answer,) in zip(ids, answers, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *answer.tokens[:-1]]]))[0, len(prompt) - 1 :]
        logp = logits.float().log_softmax(-1)
        assert list(answer.tokens) == logp.argmax(-1).tolist()
        expected = logp.gather(-1, torch.tensor(answer.tokens)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(answer.logprobs), expected, atol=2e-4, rtol=0)
