"""The real RL stage on a small random network. The policy solves nothing, so the test decides its rewards.

`COIN` tosses a coin per sample, a pure function of problem and tokens: with 2 samples about half the groups are dead.
The verdict pays nothing: all groups are dead.

As a program, `rl_stage.py BASE FOLDER SIGNAL STEP CHANGES...`, it sends itself a signal after writing the metrics of a
step; if the signal stops it gracefully, it exits with 3.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import stages_run
import torch

from bessemer.config.recipe import Recipe
from bessemer.data.tokenizer import Tokenizer
from bessemer.model.config import preset
from bessemer.model.transformer import Transformer
from bessemer.rl.loop import Loop
from bessemer.runs.context import Interrupted, StageContext, StopFlag
from bessemer.runs.metrics import Metrics, StageMetrics
from bessemer.runs.progress import RunProgress
from bessemer.train import checkpoint

COIN_TERM = f"{Path(__file__).parents[2] / 'recipes' / 'coin.py'}:coin"
COIN = f'reward="{COIN_TERM}"'
AHEAD = 'hooks=["sample-ahead"]'
AHEAD_CORRECTED = 'hooks=["sample-ahead", "routing-replay", {name="correction", form="token-truncate"}]'
CORRECTED = 'hooks=["routing-replay", {name="correction", form="token-truncate"}]'
TEXTS = ["User: Compute 3*7+6.\nAssistant:<think>(3*7)+6=21+6=27\nwait</think><answer>27</answer>"] * 8
SMALL = (
    "rollouts=3", "prompts_per_rollout=4", "samples=2", "updates_per_rollout=2", "max_new_tokens=12", "lr=1e-3",
    "heldout.every=99", "heldout.problems=2", "micro_tokens=300", "save_seconds=0", "heldout.minimum_pass=0.0",
)  # fmt: skip


def write_base(folder: Path) -> Path:
    """Make a stage folder with a model."""
    tokenizer = Tokenizer.train(TEXTS, 300)
    tokenizer.save(folder / "tokenizer")
    shape = dict(
        vocab_size=tokenizer.vocab_size, dim=32, n_layers=2, inter_dim=48, moe_inter_dim=16, n_heads=2, q_lora_rank=16,
        kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=8,
        n_activated_experts=2, n_expert_groups=4, n_limited_groups=2, max_seq_len=640, init_std=0.2,
    )  # fmt: skip
    Transformer(preset("tiny", **shape)).initialise(3).save(folder / "model", tokenizer_dir=folder / "tokenizer")
    return folder


class Stage:
    """`Stage(base, folder, "lr=1e-2", ...)`: the stage with the settings SMALL and these changes. `run()` may be
    called repeatedly in one folder."""

    def __init__(self, base: Path, folder: Path, *changes: str) -> None:
        torch.set_num_threads(1)
        folder.mkdir(exist_ok=True)
        self.base, self.folder = base, folder
        self.recipe = Recipe.load(stages_run.write_recipe(folder), [f"zero.{c}" for c in (*SMALL, *changes)])
        self.out = folder / "zero"
        self.out.mkdir(exist_ok=True)

    def loop(self) -> Loop:
        metrics = Metrics(self.folder / "metrics.jsonl")
        ctx = StageContext(
            "zero", self.out, {}, self.base, self.recipe, self.folder, StageMetrics(metrics, "zero"),
            RunProgress({}).begin("zero"), StopFlag(),
        )  # fmt: skip
        return Loop(self.recipe.stage("zero"), ctx, {})

    def run(self) -> Loop:
        loop = self.loop()
        loop.summary = loop.run()
        return loop

    def as_run(self) -> Path:
        """Turn the folder into a run directory."""
        self.out.rename(self.folder / "03-zero")
        shutil.copytree(self.base, self.folder / "02-pretrain")
        (self.folder / "recipe.toml").write_text(self.recipe.to_toml())
        return self.folder

    def values(self, name: str) -> list[float]:
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [line["values"][name] for line in lines if name in line["values"]]

    def kept(self, key: str) -> dict:
        """The newest checkpoint's entry under this key."""
        return checkpoint.load(checkpoint.steps(self.out / "state")[-1]).counters["extras"][key]

    def leaves(self) -> dict[str, bytes]:
        """Model, metrics and the checkpoint's own tensors: what must not depend on how often the stage was killed."""
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        facts = [{key: line[key] for key in ("step", "tokens", "values")} for line in lines]
        newest = max((self.out / "state").glob("step-*"))
        files = {path.name: path.read_bytes() for path in newest.glob("*.safetensors") if path.stem != "rng"}
        return files | {
            "weights": (self.out / "model" / "model.safetensors").read_bytes(), "metrics": json.dumps(facts).encode(),
        }  # fmt: skip


def differences(got: dict, expected: dict) -> list[str]:
    """How the leaves of two stages differ, in a few lines (`assert a == b` on megabytes takes minutes to fail)."""
    names = [name for name in sorted(got | expected) if got.get(name) != expected.get(name)]
    if "metrics" not in names:
        return names
    facts = [json.loads(found) if isinstance(found := side["metrics"], bytes) else found for side in (got, expected)]
    if len(facts[0]) != len(facts[1]):
        return [*names, f"{len(facts[0])} lines of metrics, not {len(facts[1])}"]
    for ours, reference in zip(*facts, strict=True):
        if ours != reference:
            a, b = ours.pop("values"), reference.pop("values")
            return [
                *names,
                f"{ours}, not {reference}",
                *(f"{key}: {a.get(key)}, not {b.get(key)}" for key in sorted(a | b) if a.get(key) != b.get(key)),
            ]
    return names


def main(base: str, folder: str, number: str, step: str, *changes: str) -> None:
    loop = Stage(Path(base), Path(folder), *changes).loop()
    signal.signal(signal.SIGTERM, lambda number, frame: setattr(loop.ctx.stop_flag, "signal", number))
    write = loop.ctx.metrics.write

    def deadly(at, tokens, values):
        write(at, tokens, values)
        if at == int(step):
            os.kill(os.getpid(), int(number))

    loop.ctx.metrics.write = deadly
    try:
        loop.run()
    except Interrupted:
        sys.exit(3)


if __name__ == "__main__":
    main(*sys.argv[1:])
