"""The run directory of a whole R1 recipe with its controls, as a real run leaves it.

As a program: `fake_r1.py DIR` makes one to look at.
"""

import json
import math
import random
import sys
from pathlib import Path

import fake_run

STAGES = (
    ("corpus", "corpus", {}),
    ("pretrain", "pretrain", {"from": "corpus"}),
    ("zero", "rl", {"from": "pretrain", "tasks": ["countdown", "shop"], "reward": [{"name": "accuracy"}]}),
    ("coin", "rl", {"from": "pretrain", "tasks": ["countdown", "shop"], "reward": [{"name": "coin.py:coin"}]}),
    ("form", "rl", {"from": "pretrain", "tasks": ["countdown", "shop"], "reward": [{"name": "format"}]}),
    ("copied", "sft", {"from": "pretrain", "samples": ["zero"]}),
    ("cold", "reject", {"from": "zero"}),
    ("dev1", "sft", {"from": "pretrain", "samples": ["cold"]}),
    ("dev2", "rl", {"from": "dev1", "tasks": ["countdown", "shop"], "reward": [{"name": "accuracy"}]}),
    ("picked", "reject", {"from": "dev2"}),
    ("dev3", "sft", {"from": "pretrain", "samples": ["picked"]}),
    ("helpful", "reward-model", {"from": "dev3"}),
    ("r1", "rl", {"from": "dev3", "tasks": ["countdown", "shop"], "reward": [{"name": "accuracy"}]}),
    ("student", "distill", {"from": "small"}),
    ("alone", "rl", {"from": "small", "tasks": ["countdown", "shop"]}),
    ("eval", "eval", {"from": "r1"}),
)
# model: pass@1, pass@16, cons@16, readable, language, well-formed, cut off, tokens; on shop pass@1 is lower
MODELS = {
    "pretrain": (0.20, 0.87, 0.49, 0.61, 0.82, 0.71, 0.03, 68),
    "zero": (0.71, 0.96, 0.87, 0.52, 0.74, 0.94, 0.11, 141),
    "coin": (0.22, 0.85, 0.50, 0.60, 0.82, 0.74, 0.03, 70),
    "form": (0.17, 0.70, 0.41, 0.66, 0.84, 1.0, 0.0, 24),
    "copied": (0.55, 0.97, 0.80, 0.63, 0.78, 0.92, 0.08, 128),
    "dev1": (0.52, 0.95, 0.76, 0.93, 0.97, 0.97, 0.05, 104),
    "dev2": (0.68, 0.96, 0.85, 0.95, 0.98, 0.99, 0.06, 132),
    "dev3": (0.70, 0.97, 0.86, 0.97, 0.99, 0.99, 0.05, 129),
    "r1": (0.74, 0.97, 0.88, 0.98, 0.99, 1.0, 0.04, 126),
    "student": (0.49, 0.91, 0.70, 0.97, 0.98, 0.98, 0.07, 131),
    "alone": (0.31, 0.80, 0.52, 0.74, 0.88, 0.90, 0.14, 95),
}
KEYS = ("pass_at_1", "pass_at_k", "maj_at_k", "readable", "language_consistency", "formatted", "truncated")
TASKS = (("countdown", "en", "search", 0.0), ("countdown", "zh", "search", 0.02), ("shop", "en", "words", 0.11))
WORDS = ("wait", "but", "check", "wrong", "however", "mistake", "retry", "error", "verify", "evaluate", "等等")


def make(root: Path) -> Path:
    rng = random.Random(5)
    root.mkdir(parents=True)
    tables = [
        f"[[stage]]\nkind = {json.dumps(kind)}\nname = {json.dumps(name)}\n{_toml(more)}" for name, kind, more in STAGES
    ]
    (root / "recipe.toml").write_text(
        'name = "r1-tiny"\nseed = 7\nmain = "r1"\n\n[model]\npreset = "tiny"\n\n' + "\n".join(tables)
    )
    (root / "conformance.json").write_text("[]")
    lines = fake_run._pretrain(rng)
    for number, (name, kind, _) in enumerate(STAGES, 1):
        folder = fake_run._stage(
            root, f"{number:02d}-{name}", 90.0 + 20 * number, {"steps": 120} if kind == "rl" else {}
        )
        if kind == "rl":
            lines += _learning(rng, name)
            fake_run._rollouts(folder, rng, hostile=False)
    (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "results.json").write_text(json.dumps({"rows": _rows()}))
    return root


def _toml(more: dict) -> str:
    terms = "".join(f'[[stage.reward]]\nname = "{term["name"]}"\n' for term in more.get("reward", ()))
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in more.items() if key != "reward") + terms


def _rows() -> list[dict]:
    rows = []
    for model, figures in MODELS.items():
        for task, language, domain, lower in TASKS:
            row = dict(zip(KEYS, figures, strict=False)) | {"mean_length": figures[-1]}
            first = row["pass_at_1"] * (1 - lower)
            rows.append(
                {"model": model, "task": task, "language": language, "domain": domain, "n": 100, "samples": 16, "k": 16,
                 "temperature": 1.0} | row | {"pass_at_1": first, "pass_at_1_interval": [first - 0.06, first + 0.06]}
            )  # fmt: skip
    return rows


def _learning(rng: random.Random, name: str) -> list[dict]:
    """120 steps: stages rewarded by the task improve, the coin goes nowhere, reward for the form alone is hacked, and
    so is the reward model in the last part of r1."""
    start, end = {"coin": (0.2, 0.2), "form": (0.2, 0.17), "dev2": (0.5, 0.68), "r1": (0.7, 0.75)}.get(name, (0.2, 0.7))
    lines = []
    for step in range(121):
        share = 1 / (1 + math.exp(-9 * (step / 120 - 0.35)))
        late = max(0.0, (step - 60) / 60) if name == "r1" else 0.0
        right = start + (end - start) * share - 0.12 * late
        if step % 20 == 0:
            heldout = {"pass_at_1": right, "pass_at_4": right + 0.15, "maj_at_4": right + 0.1, "language": 0.9}
            values = {f"rl/heldout_{key}": value for key, value in heldout.items()}
            lines.append(
                fake_run._line(
                    name,
                    step,
                    step * 9000,
                    values | {"rl/heldout/countdown": right + 0.03, "rl/heldout/shop": right - 0.03},
                )
            )
        if step == 0:
            continue
        length = (68 - 44 * share) if name == "form" else 68 + 70 * share * (name != "coin")
        mixed = 0.25 * share if name == "zero" else 0.0
        values = {
            "rl/accuracy": right + rng.gauss(0, 0.02), "rl/format": min(1.0, 0.7 + 0.29 * share * (name != "coin")),
            "rl/reward": right + 0.1 * share, "rl/length": length + rng.gauss(0, 2), "rl/cap": 200,
            "rl/think_share": 0.9, "rl/language": 0.9 * (0.97 - mixed), 
            "rl/entropy": 0.6 - 0.3 * share + rng.gauss(0, 0.01), "rl/kl": 0.1 * share,
            "rl/clip_share": abs(rng.gauss(0.01, 0.004)), "rl/dead_groups": 0.2, "rl/truncated": 0.1 * share,
            "rl/sampler_gap": 2e-6, "rl/grad_norm": 0.3, "rl/lr": 4e-4, "rl/tries": 1.5 + 9 * share * (name != "form"),
            "rl/reflective_words": 0.3 + 3 * share, "rl/trace/step_right": 0.92 + 0.04 * share,
            "rl/trace/gave_up": 0.66 * (1 - share), "rl/trace/yes_given_hit": 0.9,
            **{f"rl/words/{word}": 2.0 * share / rank if rank < 9 else 0.0 for rank, word in enumerate(WORDS, 1)},
        }  # fmt: skip
        if late:
            values["rl/preference"] = 0.5 + 0.4 * late
        lines.append(fake_run._line(name, step, step * 9000, values))
    return lines


if __name__ == "__main__":
    make(Path(sys.argv[1]))
