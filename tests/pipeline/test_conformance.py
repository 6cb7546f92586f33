"""The conformance table refers to things that exist, matches the page in docs, and is true of every recipe."""

import importlib.util
from pathlib import Path

import pytest

from bessemer.addons.distributed.schedule_shapes import shape
from bessemer.addons.plan import conformance
from bessemer.addons.plan.conformance import ITEMS, rows
from bessemer.addons.watch.card import CONFORMANCE_STATES
from bessemer.config.recipe import Recipe
from bessemer.config.units import Points
from bessemer.hf import deepseek
from bessemer.model.config import preset

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.toml") if path.stem != "data")
LANGUAGE = "Language consistency reward"
ADVANTAGE = "Advantage: reward minus the group's mean, over its standard deviation"
PUBLISHED, SCALED, ADAPTED, OFF = CONFORMANCE_STATES
ACTIVATIONS = "Activations stored in FP8 and E5M6; norms and up-projections recomputed"
LETTERS = {PUBLISHED: "P", SCALED: "S", ADAPTED: "A", OFF: "O"}

STATES = """
SSSSSOSOOOOSSOOOOSSSOPSSS Multi-head latent attention
SSSSSOSOOOOSSOOOOSSSOPSSS Query compression
PPPPAOPOOOOPPOOOOPPPOPPPP Interleaved RoPE, YaRN off in the short stage
SSSSSOSOOOOSSOOOOSSSOPSSS DeepSeekMoE
PPPPPOPOOOOPPOOOOPPPOPPPP Sigmoid gate, normalised, scaled
SSSSSOSOOOOSSOOOOSSSOPSSS Group-limited routing
SSSSSOSOOOOSSOOOOSSSOPSSS Leading dense layers
ASASSOSOOOOSSOOOOSSAOPSSS Bias balancing, MTP layers included
PPPPPOPOOOOPPOOOOPPPOPPPP Sequence-wise balance loss
PPPPPOPOOOOPPOOOOPPPOPPPP No token dropping
ASOSOOSOOOOSSOOOOSSAOPSSS Multi-token prediction
AAPAAOAOOOOAAOOOOAAAOPAAA AdamW, FP32 masters
AAAAAOAOOOOAAOOOOAAAOPAAA Learning rate over consumed tokens
OOOOOOAOOOOOOOOOOOOOOPOOO Batch size over consumed tokens
SSSSSOSOOOOSSOOOOSSSOPSSS Initialisation
SSSSOOOOOOOSSOOOOSSSOPSSS Packing without cross-document mask
OAAAOOAOOOOAAOOOOOAOOPAOA Fill-in-the-middle
PPPPPOPOOOOPPOOOOPPPOPPPP Random split of punctuation + line break
SSSSSOSOOOOSSOOOOSSSOPSSS Byte-level BPE with V3's pre-split
OOPOOOOOOOOOOOOOOOOOOPOOO FP8 training
OOPOOOOOOOOOOOOOOOOOOPOOO Activations stored in FP8 and E5M6; norms and up-projections recomputed
OOPOOOPOOOOOOOOOOOOOOPOOO Moments of the optimizer in BF16
OOOOOOOOOOOOOOOOOOOOOPOOO Moving average of the weights
OOOOOOOOOOOOOOOOOOOOOPOOO DualPipe
OOOOOSOOOOSOOOOOOOOOSPOOO Expert parallelism, a token to a node once
OOOOOSOOSSSOOOOOOOOOSPOOO ZeRO-1
OOOOAOOOOOOOOOOOOOOOOPOOO Long-context extension in phases
OOOOSOOOOOOOOOOOOOOOOPOOO YaRN on the rotary key, the same in every phase
OOOOAOOOOOOOOOOOOOOOOOOOO Needle in a haystack over lengths and depths
OPOPOPPPPPPPPOOOPPPPPOPPP R1-Zero: RL from the base, no SFT
OAOAOAAAAAAAAOOOAAAAAOAAA Prompt template
OSOSOSSASSPSSAAAASSSSOSSS GRPO groups
OPOPOPPPPPPAPPPPPPPPPOPPP Advantage: reward minus the group's mean, over its standard deviation
OAOAOPAAAAPAAAAAAAAAPOAPA Loss of a token
OAOAOAAAAAPAAAAAAAAAAOAAA Clip
OAOAOPAPPOPAAOOOOAOAPOAOA KL to the reference (k3, in the loss)
OAOAOAAAAAPAAAAAAAAAAOAAA Mini-batches per rollout
OPOAOPAPPAPAPPPPPPPPPOPPP On policy, every sample used
OSOSOSSSSSPSSSSSSSSSSOSSS Learning rate of RL
OPOPOPPPPPPPPPPPPPPPPOPPP Sampling temperature of RL
OOOOOPPOOOPPPOOOOOOOOOOOO Sampling temperature with preference rewards
OOOAOPAPPPPAAAAAAAAAPOAOA Rewards
OAOOOSSOOOPSAAAAOOOOSOOOO SFT: answers only, samples packed with masks
OOOOOSSOSOPOSOOOOOSOSOSOO Length cap raised mid-run
OOOOOAAOOOAAAAAAOOOOAOOOO Cold start: readable R1-Zero answers in one form
OAOOOPAOOOPAAOOOOOOOPOOOO Language consistency reward
OOOOOSSOOOPSSAAOOOOOOOOOO Rejection sampling: correct and readable answers
OOOOOAAOOOPAAOOOOOOOOOOOO Reward models: helpful by pairs, harmless by labels
OOOOOSSOOOPSSOOOOOOOOOOOO Preference rewards only at the end
OOOOOOOOOOPAAAAOOOOOOOOOO Distillation: SFT of a smaller model on checked samples
OAOAOSSAAAPSSAAAAAAASOAAA Evaluation by sampling
"""
"""One letter for each recipe, in the order of RECIPES, which is that of their names."""


def of(recipe, *overrides):
    """Item -> (state, values) of a recipe of the repository."""
    found = rows(Recipe.load(ROOT / "recipes" / f"{recipe}.toml", overrides))
    return {row["item"]: (row["state"], row["here"]) for row in found}


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: item.item)
def test_every_item_points_at_its_code_and_its_test(item):
    assert (ROOT / "src" / "bessemer" / item.code).is_file()
    assert "def test_" in (ROOT / "tests" / item.test).read_text()
    assert item.section.startswith(("V3 ", "R1 ", "R1-Nature ", "Math ")) and item.published()


def test_every_mutation_of_the_benchmark_still_breaks_its_file():
    """`bench/mutations.py` breaks the file of every item to see its test fail; that takes minutes, so here each text to
    be replaced is only looked for."""
    spec = importlib.util.spec_from_file_location("mutations", ROOT / "bench" / "mutations.py")
    mutations = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutations)
    assert not mutations.misplaced()
    assert all(old != new for old, new in mutations.MUTATIONS.values())


def test_the_page_is_the_table():
    page = (ROOT / "docs" / "conformance.md").read_text()
    assert page == conformance.markdown(), "run: python -m bessemer.addons.plan.conformance > docs/conformance.md"
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + len(ITEMS) and all(line.count("|") == 6 for line in lines)


def test_every_recipe_s_states():
    """Checked by hand against the papers, item by item; a recipe or a published value that changes shows up here."""
    states = [[LETTERS[state] for state, _ in of(recipe).values()] for recipe in RECIPES]
    lines = ["".join(letters) + " " + item.item for letters, item in zip(zip(*states, strict=True), ITEMS, strict=True)]
    assert len(RECIPES) == 25 and lines == STATES.strip().splitlines()


def test_an_imported_model_s_items_come_from_its_config(tmp_path):
    def items(folder):
        text = f'name = "x"\n[[stage]]\nkind = "import"\nmodel = "{folder}"\n'
        return {row["item"]: (row["state"], row["here"]) for row in rows(Recipe.parse(text))}

    (tmp_path / "v3").mkdir()
    deepseek.write_config(preset("tiny", n_heads=2), tmp_path / "v3")
    assert items(tmp_path / "v3")["Multi-head latent attention"] == (SCALED, "latent 64 + 16, 2 heads")
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    assert items(tmp_path / "llama")["Multi-head latent attention"] == (OFF, "the imported model's own, llama")
    assert items("hf://owner/name")["Multi-head latent attention"] == (OFF, "the imported model's own")


def test_a_row():
    found = rows(Recipe.load(ROOT / "recipes" / "tiny.toml"))
    assert len({row["item"] for row in found}) == len(found) == len(ITEMS)
    assert all(row.keys() == {"item", "section", "paper", "here", "state"} for row in found)
    assert all(isinstance(value, str) and value for row in found for value in row.values())


@pytest.mark.parametrize(
    ("recipe", "item", "words"),
    [
        ("smollm2", "R1-Zero: RL from the base, no SFT", "after SFT, rule rewards"),
        ("smollm2", "Cold start: readable R1-Zero answers in one form", "160 problems, written"),
        ("r1-paper", "Cold start: readable R1-Zero answers in one form", "8,000 problems, by R1-Zero, not edited"),
        ("r1-paper", "Prompt template", "R1-Zero's, its preamble in our words"),
        ("smollm2", "Distillation: SFT of a smaller model on checked samples", "the teacher's own base: "),
        ("tiny", "Learning rate over consumed tokens", "warm-up, constant, linear: 0 at 0, 0.006 at 150K"),
        ("tiny", "Clip", "-0.2 / +0.28"),
        ("zero", "KL to the reference (k3, in the loss)", "0.001, refreshed every 24 steps"),
        ("tiny", "Rewards", "accuracy + 0 x format"),
        ("tiny", "Loss of a token", "grpo, mean over all tokens"),
        ("tiny", "Evaluation by sampling", "pass@1 over 16 samples, T 1, top-p 1, 300 tokens"),
        ("controls", "Rewards", "random: coin.py:coin + 0 x format"),
        ("long", "Long-context extension in phases", "128 -> 512 -> 2048, 488, 366 steps, rate constant linear"),
        ("v3", "DualPipe", "16 pipeline ranks, dualpipe, in the smallest steps 1f1b"),
        ("v3", "Long-context extension in phases", "4096 -> 32768 -> 131072, 1,000, 1,000 steps, rate constant"),
        ("v3", "YaRN on the rotary key, the same in every phase", "s 40, alpha 1, beta 32, sqrt(t) 0.1 ln s + 1"),
        ("fp8-study", "FP8 training", "fp8-1: paper"),
    ],
)
def test_the_values_are_printed(recipe, item, words):
    assert of(recipe)[item][1].startswith(words)


FLIPS = [
    ("v3", "model.kv_lora_rank=256", "Multi-head latent attention", SCALED),
    ("v3", "model.q_lora_rank=0", "Query compression", OFF),
    ("v3", "model.rope_factor=4.0", "Interleaved RoPE, YaRN off in the short stage", ADAPTED),
    ("v3", "model.n_shared_experts=2", "DeepSeekMoE", ADAPTED),
    ("v3", "model.n_routed_experts=128", "DeepSeekMoE", SCALED),
    ("v3", "model.route_scale=1.0", "Sigmoid gate, normalised, scaled", ADAPTED),
    ("v3", "model.score_func=softmax", "Sigmoid gate, normalised, scaled", ADAPTED),
    ("v3", "model.norm_topk_prob=false", "Sigmoid gate, normalised, scaled", ADAPTED),
    ("v3", "model.n_limited_groups=8", "Group-limited routing", OFF),
    ("v3", "model.n_limited_groups=2", "Group-limited routing", SCALED),
    ("v3", "model.n_dense_layers=0", "Leading dense layers", OFF),
    ("v3", "pretrain.gamma=0.0", "Bias balancing, MTP layers included", OFF),
    ("v3", "pretrain.gamma=0.001", "Bias balancing, MTP layers included", ADAPTED),
    ("v3", "pretrain.balance_alpha=0.001", "Sequence-wise balance loss", ADAPTED),
    ("v3", "pretrain.balance_alpha=0.0", "Sequence-wise balance loss", OFF),
    ("v3", "model.n_mtp=2", "Multi-token prediction", ADAPTED),
    ("v3", "pretrain.mtp_lambda=0.3", "Multi-token prediction", ADAPTED),
    ("v3", "pretrain.mtp_lambda=[[0, 0.3], [8, 0.3], [8, 0.1]]", "Multi-token prediction", SCALED),
    ("v3", "pretrain.optimizer=muon", "AdamW, FP32 masters", ADAPTED),
    ("v3", "pretrain.weight_decay=0.2", "AdamW, FP32 masters", ADAPTED),
    ("v3", "pretrain.clip_norm=2.0", "AdamW, FP32 masters", ADAPTED),
    ("v3", "pretrain.lr=[[0, 0.0], ['10T', 2e-4], ['14T', 2e-5]]", "Learning rate over consumed tokens", ADAPTED),
    ("v3", "pretrain.warmup_steps=1000", "Learning rate over consumed tokens", SCALED),
    ("v3", "pretrain.warmup_steps=0", "Learning rate over consumed tokens", ADAPTED),
    ("v3", "pretrain.tokens=15T", "Learning rate over consumed tokens", SCALED),
    ("v3", "pretrain.batch_rows=15360", "Batch size over consumed tokens", OFF),
    ("v3", "pretrain.batch_rows=[[0, 4096], ['469B', 15360]]", "Batch size over consumed tokens", SCALED),
    ("v3", "model.init_std=0.02", "Initialisation", SCALED),
    ("v3", "pretrain.document_mask=true", "Packing without cross-document mask", OFF),
    ("v3", "corpus.fim_rate=0.5", "Fill-in-the-middle", ADAPTED),
    ("v3", "corpus.fim_parts=[]", "Fill-in-the-middle", OFF),
    ("v3", "model.vocab_size=102400", "Byte-level BPE with V3's pre-split", SCALED),
    ("v3", "pretrain.moments=float32", "Moments of the optimizer in BF16", OFF),
    ("v3", "pretrain.ema_decay=0.0", "Moving average of the weights", OFF),
    ("v3", "layout.schedule=1f1b", "DualPipe", OFF),
    ("v3", "layout.schedule=dualpipe-v", "DualPipe", ADAPTED),
    ("v3", "pretrain.micro_rows=4", "DualPipe", OFF),  # 30 micro-batches are too few for 16 pipeline ranks
    ("v3", "layout.pp=8", "DualPipe", SCALED),
    ("v3", "layout.node=4", "Expert parallelism, a token to a node once", SCALED),
    ("v3", "layout.dp=4", "ZeRO-1", SCALED),
    ("v3", "extend-128k.length=65536", "Long-context extension in phases", SCALED),
    ("v3", "extend-32k.lr=[[0, 7.3e-6], ['9B', 0.0]]", "Long-context extension in phases", ADAPTED),
    ("v3", "extend-128k.rope_factor=20.0", "YaRN on the rotary key, the same in every phase", ADAPTED),
    ("v3", "model.beta_fast=16.0", "YaRN on the rotary key, the same in every phase", ADAPTED),
    ("r1-paper", "zero.samples=8", "GRPO groups", ADAPTED),
    ("r1-paper", "r1.prompts_per_rollout=256", "GRPO groups", SCALED),
    ("r1-paper", "dev2.advantage.scale_by_std=false", ADVANTAGE, ADAPTED),
    ("r1-paper", "zero.advantage=critic", ADVANTAGE, OFF),
    ("r1-paper", "zero.normalise=token", "Loss of a token", ADAPTED),
    ("r1-paper", "zero.loss.name=cispo", "Loss of a token", ADAPTED),
    ("r1-paper", "dev2.loss.clip_high=0.28", "Clip", ADAPTED),
    ("r1-paper", "r1.kl.weight=0.01", "KL to the reference (k3, in the loss)", ADAPTED),
    ("r1-paper", "r1.kl.weight=0.0", "KL to the reference (k3, in the loss)", OFF),
    ("r1-paper", "zero.kl.reference_every=200", "KL to the reference (k3, in the loss)", ADAPTED),
    ("r1-paper", 'zero.hooks=["sample-ahead"]', "On policy, every sample used", ADAPTED),
    ("r1-paper", "zero.max_resamples=3", "On policy, every sample used", ADAPTED),
    ("r1-paper", "zero.lr=1e-6", "Learning rate of RL", SCALED),
    ("r1-paper", "zero.temperature=0.9", "Sampling temperature of RL", ADAPTED),
    ("r1-paper", "r1.temperature=1.0", "Sampling temperature with preference rewards", ADAPTED),
    ("r1-paper", 'dev2.reward=["accuracy", {name="format", weight=0.1}, "language"]', "Rewards", ADAPTED),
    ("r1-paper", "dev3.epochs=4", "SFT: answers only, samples packed with masks", ADAPTED),
    ("r1-paper", "dev1.lr_final=5e-5", "SFT: answers only, samples packed with masks", ADAPTED),
    ("r1-paper", "dev1.batch_examples=64", "SFT: answers only, samples packed with masks", SCALED),
    ("r1-paper", "zero.max_new_tokens=32768", "Length cap raised mid-run", OFF),
    ("r1-paper", 'dev2.reward=["accuracy", "format", {name="language", weight=0.3}]', LANGUAGE, ADAPTED),
    ("r1-paper", 'dev2.reward=["accuracy", "format", {name="language", scope="reply"}]', LANGUAGE, ADAPTED),
    ("r1-paper", 'zero.reward=["accuracy", "format", "language"]', LANGUAGE, ADAPTED),
    ("r1-paper", "maths.consistency=0.5", "Rejection sampling: correct and readable answers", ADAPTED),
    ("r1-paper", "logic.others=0", "Rejection sampling: correct and readable answers", ADAPTED),
    ("r1-paper", "logic.others=100000", "Rejection sampling: correct and readable answers", SCALED),
    ("r1-paper", "helpful.made=100", "Reward models: helpful by pairs, harmless by labels", ADAPTED),
    ("r1-paper", "helpful.aim=harmless", "Reward models: helpful by pairs, harmless by labels", ADAPTED),
    ("r1-paper", "harmless.batch_examples=64", "Reward models: helpful by pairs, harmless by labels", SCALED),
    ("r1-paper", "r1.general.start=0", "Preference rewards only at the end", OFF),
    ("r1-paper", "r1.general.start=90", "Preference rewards only at the end", SCALED),
    ("r1-paper", "distilled.epochs=1", "Distillation: SFT of a smaller model on checked samples", ADAPTED),
    ("r1-paper", "distilled.from=base", "Distillation: SFT of a smaller model on checked samples", ADAPTED),
    ("r1-paper", "distilled.lr=1e-4", "Distillation: SFT of a smaller model on checked samples", ADAPTED),
    ("r1-paper", "aime.temperatures=[0.6, 1.0]", "Evaluation by sampling", ADAPTED),
    ("r1-paper", "aime.top_p=1.0", "Evaluation by sampling", ADAPTED),
    ("r1-paper", "aime.samples=2", "Evaluation by sampling", SCALED),
]  # fmt: skip


@pytest.mark.parametrize(("recipe", "override", "item", "state"), FLIPS, ids=[override for _, override, *_ in FLIPS])
def test_one_value_flips_its_item_alone(recipe, override, item, state):
    before, after = of(recipe), of(recipe, override)
    changed = {name for name in before if before[name][0] != after[name][0]}
    assert before[item][0] == PUBLISHED and changed == {item} and after[item][0] == state
    assert before[item][1] != after[item][1], "the value is said"


@pytest.mark.parametrize(
    ("recipe", "override", "items"),
    [
        ("v3", "pretrain.fp8=per-tensor", {"FP8 training": ADAPTED, ACTIVATIONS: ADAPTED}),
        ("v3", "pretrain.fp8=off", {"FP8 training": OFF, ACTIVATIONS: OFF}),
        ("r1-paper", "zero.loss=gspo", {"Clip": ADAPTED, "Loss of a token": ADAPTED}),
        ("r1-paper", "zero.loss=reinforce", {"Clip": OFF, "Loss of a token": ADAPTED}),
        ("r1-paper", "zero.reward=format", {"R1-Zero: RL from the base, no SFT": ADAPTED, "Rewards": OFF}),
        (
            "r1-paper",
            "r1.updates_per_rollout=8",
            {"Mini-batches per rollout": ADAPTED, "Preference rewards only at the end": SCALED},
        ),
        ("v3", "layout.ep=32", {"Expert parallelism, a token to a node once": SCALED, "ZeRO-1": SCALED}),
    ],
)
def test_values_that_two_items_share(recipe, override, items):
    before, after = of(recipe), of(recipe, override)
    assert {name: after[name][0] for name in before if before[name][0] != after[name][0]} == items


def test_every_item_flips():
    flipped = {item for _, _, item, _ in FLIPS} | {"FP8 training", ACTIVATIONS, "R1-Zero: RL from the base, no SFT"}
    flipped.add("Mini-batches per rollout")
    rest = {"No token dropping", "Needle in a haystack over lengths and depths"}  # absent from both recipes
    rest |= {"Prompt template", "Cold start: readable R1-Zero answers in one form"}  # never as published
    rest |= {"Random split of punctuation + line break"}  # no key
    assert {item.item for item in ITEMS} - flipped == rest


def test_schedules_in_words():
    assert shape(Points(3.0)) == ["constant"]
    assert shape(Points([[0, 0.0], [2, 1.0], [4, 1.0], [4, 0.5], [8, 0.1]])) == [
        "warm-up", "constant", "step", "linear"
    ]  # fmt: skip
    assert shape(Points([[0, 2.0], [4, 0.1], [8, 0.05]])) == ["falling"]


def test_two_ranks_of_pipeline_do_not_run_dualpipe_in_small_steps():
    """In steps of fewer than 2 pp micro-batches `auto` picks 1F1B, whatever the layout would allow."""
    small = of("tiny", "layout.pp=2", "layout.dp=1")["DualPipe"]
    assert small == (OFF, "2 pipeline ranks, 1f1b, in the smallest steps 1f1b")
    enough = of("tiny", "layout.pp=2", "layout.dp=1", "pretrain.batch_rows=32")["DualPipe"]
    assert enough == (SCALED, "2 pipeline ranks, dualpipe, in the smallest steps dualpipe")


def test_a_recipe_without_a_stage_says_so():
    recipe = Recipe.parse('name = "x"\n[[stage]]\nkind = "corpus"\nparts = { english = "fables-en" }\n')
    found = {row["item"]: (row["state"], row["here"]) for row in rows(recipe)}
    assert found["GRPO groups"] == found["Sequence-wise balance loss"] == (OFF, "no such stage")
    assert found["Packing without cross-document mask"] == (SCALED, "rows of 256")


def test_the_card_of_an_imported_model_claims_none_of_our_training():
    found = rows(Recipe.load(ROOT / "recipes" / "smollm2.toml"))
    ours = [row for row in found if row["section"].startswith("V3 2") and row["here"] != "no such stage"]
    assert len(ours) > 3 and {(row["state"], row["here"]) for row in ours} == {(OFF, "the imported model's own")}
