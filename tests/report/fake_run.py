"""A run directory as a real run leaves it, with figures like those of small runs, made in a fraction of a second.

As a program: `fake_run.py DIR` makes one to look at.
"""

import json
import math
import random
import sys
from pathlib import Path

RECIPE = """name = "tiny"
seed = 7

[model]
preset = "tiny"

[[stage]]
kind = "corpus"
name = "corpus"

[[stage]]
kind = "pretrain"
name = "pretrain"
from = "corpus"
tokens = 8000000

[[stage]]
kind = "eval"
name = "before"
from = "pretrain"

[[stage]]
kind = "rl"
name = "zero"
from = "pretrain"

[[stage]]
kind = "eval"
name = "after"
from = "zero"
"""

HOSTILE = '<script>alert("x")</script><img src=//evil.example onerror=alert(1)>\x00\x1b[31m </pre></details>\ud800'
PROMPTS = ("The fox ", "从前", "User: What is 2+2?\nAssistant:")
CONFORMANCE = [
    ("Multi-head latent attention", "2.1.1", "latent 512 + 64, 128 heads", "latent 64 + 16, 4 heads", "as published"),
    ("DeepSeekMoE", "2.1.2", "256 routed + 1 shared, top-8", "16 routed + 1 shared, top-4", "as published"),
    ("Bias balancing, MTP layers included", "2.1.2", "gamma 0.001", "gamma 0.001", "as published"),
    ("Sequence-wise balance loss", "2.1.2", "alpha 0.0001", "alpha 0.0001", "as published"),
    ("Multi-token prediction", "2.2", "depth 1, lambda 0.3", "depth 1, lambda 0.3", "as published"),
    ("FP8 training", "3.3", "E4M3, 1x128 and 128x128, sums to float32 every 128", "off", "off"),
    ("Long-context extension in phases", "4.3", "4096 -> 32768 -> 131072", "no such stage", "off"),
    ("R1-Zero: RL from the base, no SFT", "R1 2.2", "no SFT, rule rewards", "no SFT, rule rewards", "as published"),
]


def make(root: Path, hostile: bool = False) -> Path:
    rng = random.Random(1)
    root.mkdir(parents=True)
    (root / "recipe.toml").write_text(RECIPE)
    rows = [dict(zip(("item", "section", "paper", "here", "state"), row, strict=True)) for row in CONFORMANCE]
    (root / "conformance.json").write_text(json.dumps(rows))
    lines = _pretrain(rng) + _zero(rng)
    (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _stage(root, "01-corpus", 41.0, {"documents": 41230, "rows": 22100, "vocabulary": 2048})
    folder = _stage(root, "02-pretrain", 402.0, {"tokens": 8_000_000, "loss": 1.83, "tokens_per_second": 21400})
    _samples(folder, rng)
    _evaluation(_stage(root, "03-before", 14.0, {"pass_at_1": 0.181}), [("pretrain", 0.181, 0.75, 0.26, 10.8)])
    folder = _stage(root, "04-zero", 288.0, {"steps": 200, "accuracy": 0.571, "length": 39.7})
    _rollouts(folder, rng, hostile)
    _evaluation(
        _stage(root, "05-after", 21.0, {"pass_at_1": 0.569}),
        [("pretrain", 0.181, 0.75, 0.26, 10.8), ("zero", 0.569, 0.992, 0.84, 39.7)],
    )
    return root


def _stage(root: Path, name: str, seconds: float, summary: dict) -> Path:
    folder = root / name
    folder.mkdir()
    (folder / "done.json").write_text(json.dumps({"seconds": seconds, "summary": summary}))
    return folder


def _line(stage: str, step: int, tokens: int, values: dict) -> dict:
    return {"time": 1.78e9 + step, "stage": stage, "step": step, "tokens": tokens, "values": values}


def _loads(rng: random.Random, share: float, experts: int = 16) -> list[float]:
    skew = 1.6 * math.exp(-4 * share)
    return [max(0.0, 256 * (1 + skew * math.sin(2.4 * expert) + rng.gauss(0, 0.06))) for expert in range(experts)]


def _pretrain(rng: random.Random) -> list[dict]:
    lines = []
    for step in range(1, 501):
        share = step / 500
        loss = 1.7 + 5.9 * math.exp(-7 * share**0.55) + rng.gauss(0, 0.06)
        values = {
            "train/loss": loss,
            "train/mtp_1": loss + 0.35 + rng.gauss(0, 0.05),
            "train/mtp_lambda": 0.3,
            "train/balance": 1e-4 * (1 + math.exp(-9 * share)),
            "train/lr": 3e-3 * min(1.0, share * 40) * (1.0 if share < 0.75 else 1 - 3.6 * (share - 0.75)),
            "train/grad_norm": 0.6 + 3 * math.exp(-12 * share) + abs(rng.gauss(0, 0.12)),
            "train/tokens_per_second": 21400 + rng.gauss(0, 700),
            "guard/skipped": 0,
        }
        if step % 10 == 0:
            for layer in range(1, 4):
                loads = _loads(rng, share)
                values[f"moe/load/{layer}"] = loads
                values[f"moe/max_vio/{layer}"] = max(loads) / (sum(loads) / len(loads)) - 1
        if step % 50 == 0:
            for domain, floor in (("fables", 1.21), ("drills", 0.42), ("code", 1.5), ("chinese", 1.9)):
                values[f"val/bpb/{domain}"] = floor + 2.4 * math.exp(-4 * share)
        lines.append(_line("pretrain", step, step * 16000, values))
    return lines


def _zero(rng: random.Random) -> list[dict]:
    lines = []
    for step in range(1, 201):
        share = step / 200
        rise = 1 / (1 + math.exp(-9 * (share - 0.35)))
        values = {
            "rl/accuracy": 0.16 + 0.42 * rise + rng.gauss(0, 0.04),
            "rl/format": min(1.0, 0.6 + 0.39 * rise + rng.gauss(0, 0.02)),
            "rl/reward": 0.2 + 0.45 * rise + rng.gauss(0, 0.04),
            "rl/length": 10.8 + 29 * rise + rng.gauss(0, 1.2),
            "rl/think_share": min(1.0, 0.51 + 0.46 * rise + rng.gauss(0, 0.02)),
            "rl/entropy": 0.62 - 0.3 * rise + rng.gauss(0, 0.02),
            "rl/kl": 0.13 * rise + abs(rng.gauss(0, 0.004)),
            "rl/clip_share": abs(rng.gauss(0.01, 0.004)),
            "rl/dead_groups": max(0.0, 0.3 - 0.2 * rise + rng.gauss(0, 0.04)),
            "rl/truncated": max(0.0, 0.02 + 0.05 * rise + rng.gauss(0, 0.01)),
            "rl/grad_norm": 0.3 + abs(rng.gauss(0, 0.05)),
            "rl/tries": 1.2 + 3.4 * rise + rng.gauss(0, 0.2),
        }
        lines.append(_line("zero", step, step * 9000, values))
    return lines


def _samples(folder: Path, rng: random.Random) -> None:
    words = [
        "the",
        "fox",
        "saw",
        "a",
        "crow",
        "with",
        "cheese",
        "and",
        "said",
        "how",
        "fine",
        "狐狸",
        "看见",
        "了",
        "乌鸦",
    ]
    parts = []
    for step in (50, 100, 200, 300, 400, 500):
        for prompt in PROMPTS:
            text = prompt + " ".join(rng.choice(words) for _ in range(step // 10)) + ".\n\ndef add(a, b):\n    return"
            body = "\n".join("    " + line for line in text.split("\n"))
            parts.append(f"## step {step} · {step * 16}K tokens\n\n{body}\n\n")
    (folder / "samples.md").write_text("".join(parts))


def _rollouts(folder: Path, rng: random.Random, hostile: bool) -> None:
    lines = []
    for step in (1, 40, 80, 120, 160, 200):
        for prompt in range(10):
            a, b, c = 3 + prompt, 8, 2
            tries = 1 + step * 4 // 200
            thought = " wait ".join(f"{a}+{b}*{c} = {a + b * c + guess - tries + 1}" for guess in range(tries))
            correct = rng.random() < 0.2 + 0.004 * step
            text = f"<think>{thought}</think> <answer>{a}+{b}*{c}</answer>"
            for member in range(4):
                lines.append({
                    "step": step, "id": f"countdown-{prompt}", "prompt": f"Use {a}, {b}, {c} to make {a + b * c}.",
                    "completion": HOSTILE if hostile else text, "reward": 1.1 if correct else 0.1,
                    "correct": correct and member < 3, "formatted": True, "length": len(text) // 3,
                    "answer": f"{a}+{b}*{c}",
                })  # fmt: skip
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _evaluation(folder: Path, models: list[tuple]) -> None:
    rows = []
    for language, shift in (("en", 0.0), ("zh", -0.03)):
        for model, pass_at_1, pass_at_k, majority, length in models:
            value = pass_at_1 + shift
            rows.append({
                "model": model, "task": "countdown", "language": language, "n": 200, "samples": 8,
                "by_problem": {f"p{n}": min(1.0, 2 * value * (n % 10) / 9) for n in range(200)},
                "pass_at_1": value, "pass_at_1_interval": [value - 0.032, value + 0.034], "pass_at_k": pass_at_k,
                "maj_at_k": majority, "mean_length": length,
            })  # fmt: skip
    (folder / "results.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    make(Path(sys.argv[1]))
