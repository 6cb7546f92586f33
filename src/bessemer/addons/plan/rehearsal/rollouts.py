"""RL's loop in miniature: rollouts and their updates on ranks, against one process.

The loop is the one that a run has, with the recipe's objective; the prompts are additions, and the reward is a hash of
the answer, because a random network is never right and GRPO learns from differences alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bessemer.addons.distributed.ranks import Ranks
from bessemer.addons.plan.rehearsal.miniature import VOCAB, Miniature, RankGroup
from bessemer.addons.plan.rehearsal.training import runtime_of
from bessemer.config import places
from bessemer.config.recipe import Recipe
from bessemer.config.rl import RLConfig
from bessemer.data.tokenizer import Tokenizer
from bessemer.model.config import ModelConfig
from bessemer.model.transformer import Transformer
from bessemer.rl.loop import Loop
from bessemer.runs.context import StageContext, StopFlag
from bessemer.runs.metrics import Metrics, StageMetrics
from bessemer.runs.progress import RunProgress

ROLLOUTS, NEW_TOKENS = 2, 12
TEXT = "User: Compute 3*7+6.\nAssistant: <think>21+6=27</think><answer>27</answer>"
REWARD = """
def varied(problem, answer, verdict):
    return float(sum(map(ord, answer)) % 3)
"""
RECIPE = """
name = "rehearsal"
seed = 7
[[stage]]
kind = "rl"
name = "zero"
tasks = ["arithmetic"]
prompt_template = "zero"
reward = "varied.py:varied"
rollouts = 2
prompts_per_rollout = 4
samples = 4
max_new_tokens = 12
lr = 1e-3
precision = "float32"
heldout = { every = 99, problems = 1, minimum_pass = 0.0 }
"""
KEYS = ("loss", "normalise", "temperature", "top_p", "mtp", "optimizer", "clip_norm", "advantage")
"""Keys of the recipe's stage that the miniature has too."""


def write_base(network: Miniature, folder: Path) -> None:
    """The stage's source: a random network and a tokenizer."""
    tokenizer = Tokenizer.train([TEXT] * 8, 290)
    tokenizer.save(folder / "tokenizer")
    if isinstance(network.small, ModelConfig):
        model = Transformer(network.small).initialise(3)
        model.save(folder / "model", tokenizer_dir=folder / "tokenizer")
    else:
        tokenizer.save(folder / "model")
    (folder / "varied.py").write_text(REWARD)
    assert tokenizer.vocab_size <= VOCAB


def settings_of(stage: RLConfig, cfg: ModelConfig | dict[str, Any]) -> list[str]:
    """The recipe's own settings, as overrides of RECIPE."""
    plain = stage.model_dump(mode="json", by_alias=True)
    plain = {key: plain[key] for key in KEYS}
    plain["kl"] = {key: plain_kl for key, plain_kl in stage.kl.model_dump().items() if key != "reference_every"}
    plain["updates_per_rollout"] = min(2, stage.updates_per_rollout)
    if not isinstance(cfg, ModelConfig) or not cfg.n_mtp:
        del plain["mtp"]
    if stage.advantage.name not in ("group", "batch"):
        del plain["advantage"]
    flat: dict[str, Any] = {}
    for key, value in plain.items():
        flat |= {f"{key}.{name}": one for name, one in value.items()} if isinstance(value, dict) else {key: value}
    return [f"zero.{key}={json.dumps(value)}" for key, value in flat.items()]


def played(
    ranks: Ranks | None, network: Miniature, group: RankGroup, stage: RLConfig, recompute: Sequence[str], base: Path,
    out: Path,
) -> list[dict[str, float]]:  # fmt: skip
    """The metrics of the loop's steps on this rank."""
    me = 0 if ranks is None else ranks.me
    path = base / f"recipe-{out.name}-{me}.toml"
    path.write_text(f"{RECIPE}[layout]\nrecompute = {json.dumps([*recompute])}\n")
    recipe = Recipe.load(path, settings_of(stage, network.small))
    out.mkdir(exist_ok=True)
    metrics = StageMetrics(Metrics(out / f"metrics-{me}.jsonl"), "zero")
    with places.of_recipe(base), open(os.devnull, "w") as nowhere:
        ctx = StageContext(
            "zero", out, {}, base, recipe, out, metrics, RunProgress({}, out=nowhere).begin("zero"), StopFlag(),
            runtime=runtime_of(ranks, network, group),
        )  # fmt: skip
        Loop(recipe.stage("zero"), ctx, {}).run()  # type: ignore[arg-type]
    return [values for _, values in metrics.history()]
