"""The conformance table points at what exists, is the page in docs, and says the truth about a recipe."""

from pathlib import Path

import pytest

from bessemer.config.recipe import Recipe
from bessemer.pipeline import conformance
from bessemer.pipeline.conformance import ITEMS, rows

ROOT = Path(__file__).parents[2]
TINY = ROOT / "recipes" / "tiny.toml"


FIXED = """
name = "fixed"
[[stage]]
kind = "corpus"
parts = { code = "python-code" }
fim_parts = ["code"]
[[stage]]
kind = "pretrain"
lr = 0.001
mixture = { code = 1.0 }
[[stage]]
kind = "rl"
name = "zero"
tasks = ["countdown"]
[[stage]]
kind = "eval"
models = ["pretrain", "zero"]
tasks = ["countdown"]
"""  # recipes/tiny.toml may be tuned without a change here


def of(*overrides):
    return {row["item"]: (row["here"], row["on"]) for row in rows(Recipe.parse(FIXED, overrides))}


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: item.item)
def test_every_item_points_at_its_code_and_its_test(item):
    assert (ROOT / "src" / "bessemer" / item.code).is_file()
    assert "def test_" in (ROOT / "tests" / item.test).read_text()
    assert item.section.startswith(("V3 ", "R1 ", "R1-Nature ")) and item.paper


def test_the_page_is_the_table():
    page = (ROOT / "docs" / "conformance.md").read_text()
    assert page == conformance.markdown(), "run: python -m bessemer.pipeline.conformance > docs/conformance.md"
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    assert len(lines) == 1 + len(ITEMS) and all(line.count("|") == 6 for line in lines)


def test_the_tiny_recipe_names_every_item_once():
    found = rows(Recipe.load(TINY))
    assert [row["item"] for row in found] == [item.item for item in ITEMS]
    assert len({row["item"] for row in found}) == len(found)
    for row in found:
        assert row.keys() == {"item", "section", "paper", "here", "on"}
        assert isinstance(row["here"], str) and row["here"] and isinstance(row["on"], bool)
    off = {row["item"] for row in found if not row["on"]}
    assert {"FP8 training", "Long-context extension in phases"} <= off
    assert not off & {"Multi-head latent attention", "DeepSeekMoE", "Multi-token prediction", "GRPO groups", "Clip"}


def test_the_extension_is_said_phase_by_phase():
    """Of V3's own run, whose two phases are a thousand steps each; of a recipe without one that it has none."""
    v3 = {row["item"]: (row["here"], row["on"]) for row in rows(Recipe.load(ROOT / "recipes" / "v3.toml"))}
    assert v3["Long-context extension in phases"] == ("short -> 32768 -> 131072, 1000, 1000 steps", True)
    yarn = "s 40, alpha 1, beta 32, sqrt(t) 0.1 ln s + 1"
    assert v3["YaRN on the rotary key, the same in every phase"] == (yarn, True)
    assert of()["Long-context extension in phases"] == ("no such stage", False)


@pytest.mark.parametrize(
    ("override", "item", "here", "on"),
    [
        ("model.kv_lora_rank=48", "Multi-head latent attention", "latent 48 + 16, 4 heads", True),
        ("model.q_lora_rank=0", "Query compression", "rank 0", False),
        ("model.rope_factor=4.0", "Interleaved RoPE, YaRN off in the short stage", "theta 10000, YaRN 4", False),
        ("model.n_dense_layers=4", "DeepSeekMoE", "16 routed + 1 shared, top-4", False),
        ("model.n_expert_groups=1", "Group-limited routing", "1 of 1 groups", False),
        ("model.n_mtp=0", "Multi-token prediction", "depth 0", False),
        ("pretrain.gamma=0.0", "Bias balancing, MTP layers included", "gamma 0", False),
        ("pretrain.balance_alpha=0.0", "Sequence-wise balance loss", "alpha 0", False),
        ("pretrain.weight_decay=0.2", "AdamW, FP32 masters", "0.9 / 0.95, decay 0.2, clip 1", True),
        ("pretrain.batch_rows=[[0, 8], [1000, 16]]", "Batch size over consumed tokens", "8 at 0, 16 at 1K rows", True),
        ("pretrain.document_mask=true", "Packing without cross-document mask", "rows of 256, masked", False),
        ("corpus.fim_rate=0.0", "Fill-in-the-middle", "rate 0 on code", False),
        ("corpus.boundary_split_rate=0.0", "Random split of punctuation + line break", "rate 0", False),
        ("zero.samples=32", "GRPO groups", "32 samples, 16 prompts a rollout", True),
        ("zero.clip_high=10", "Clip", "-0.2 / +10", True),
        ("zero.kl=0.0", "KL to the reference (k3, in the loss)", "0, refreshed every 400 steps", False),
        ("zero.updates_per_rollout=4", "Mini-batches per rollout", "4, one epoch", True),
        ("zero.format_reward=1", "Rewards", "accuracy + 1 x format", True),
        ("eval.temperatures=[0.6, 1.0]", "Evaluation by sampling", "16 samples, T 0.6, 1", True),
    ],
)
def test_what_a_recipe_changes_is_seen(override, item, here, on):
    overrides = [override, "model.n_limited_groups=1"] if "n_expert_groups" in override else [override]
    shown, is_on = of(*overrides)[item]
    assert shown.startswith(here) and is_on == on
    assert of()[item] != (shown, is_on), "the recipe as it stands says something else"


def test_a_recipe_without_a_stage_says_so():
    recipe = Recipe.parse('name = "x"\n[[stage]]\nkind = "corpus"\nparts = { english = "fables-en" }\n')
    found = {row["item"]: (row["here"], row["on"]) for row in rows(recipe)}
    assert found["GRPO groups"] == found["Sequence-wise balance loss"] == ("no such stage", False)
    assert found["Packing without cross-document mask"] == ("rows of 256", True)


def test_of_an_imported_model_nothing_of_ours_is_claimed():
    found = rows(Recipe.load(ROOT / "recipes" / "smollm2.toml"))
    ours = [row for row in found if row["section"].startswith("V3 2") and row["here"] != "no such stage"]
    assert len(ours) > 4 and {(row["here"], row["on"]) for row in ours} == {("the imported model's own", False)}
