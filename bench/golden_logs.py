"""Logs of runs of TRL's GRPOTrainer that go well, and of runs with one planted fault each, for `bessemer diagnose`.

    python bench/golden_logs.py --out /tmp/golden            # all that are missing, about 25 minutes of one core
    python bench/golden_logs.py --out /tmp/golden --only set-healthy-max

A tiny Llama is first trained on pages of a task (a few of them wrong or without form), then by GRPO for STEPS steps.
A completion is `<` letters `>` digits `.`: the letters are free, so a healthy policy keeps its entropy. Every scenario
is run twice: `set`, on which bounds may be chosen, and `held`, with other tasks, seeds and magnitudes, which are judged
once with the rules fixed (bench/diagnose.py). EXPECTED is the cause that a diagnosis must name first.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

STEPS, PROMPTS, SAMPLES, CAP = 120, 16, 8, 24
LEARNING_RATE = 6e-4

EXPECTED: dict[str, tuple[str, ...]] = {
    "healthy": (),
    "entropy-collapse": ("entropy-collapse",),
    "length-collapse": ("length-collapse",),
    "format-hacking": ("format-hacking",),
    "frozen-reference": ("frozen-reference",),
    "wrong-kl-sign": ("wrong-kl-sign",),
    "rate-too-high": ("steps-too-large", "collapse", "entropy-explosion", "kl-runaway"),
    "rate-zero": ("learning-rate-zero",),
    "too-hard": ("no-contrast", "groups-too-hard"),
    "cut-at-cap": ("never-ending",),
}
"""The codes that may stand first. A rate that is too high shows in several ways, each with that cause."""

OMITTED = re.compile(r"min|max|num_tokens|step_time|epoch|total_flos|terminated|low_mean|high_mean|/std$")
"""Metrics left out of the committed logs, so that they stay small."""

Answer = Callable[[str], str]
TASKS: dict[str, tuple[int, Answer]] = {
    "max": (3, lambda asked: max(asked)),
    "min": (3, lambda asked: min(asked)),
    "max4": (4, lambda asked: max(asked)),
    "min4": (4, lambda asked: min(asked)),
    "twice": (4, lambda asked: asked * 2),
    "thrice": (4, lambda asked: asked * 3),
    "sum": (3, lambda asked: str(sum(map(int, asked)) % 10)),  # not learnt by this base: one in ten is right by chance
    "code": (3, lambda asked: f"{(int(asked) * 7919 + 104729) % 10000:04d}"),  # out of reach: no rule that can be seen
}
"""Task -> digits of a prompt, and the answer to it."""


def scenario(kind: str, held: bool) -> dict[str, Any]:
    """The settings of a run beside the common ones; the held-out ones have other tasks, seeds and magnitudes."""
    base: dict[str, Any] = {"task": "min4" if held else "max", "seed": 29 if held else 11, "beta": 0.02}
    more: dict[str, dict[str, Any]] = {
        # a bonus on entropy with the wrong sign
        "entropy-collapse": {"beta": 0.0, "entropy_coef": -0.25 if held else -0.3, "steps": 2 * STEPS, "logging": 2},
        "length-collapse": {
            "rewards": ["accuracy_reward", "brevity_reward"],
            "beta": 0.0,
            "task": "sum" if held else "code",
        },
        "format-hacking": {"task": "sum" if held else "code"},
        "frozen-reference": {"follow": True, "beta": 0.05 if held else 0.02},
        "wrong-kl-sign": {"beta": -0.05 if held else -0.1},
        "rate-too-high": {"rate": 0.02 if held else 0.04, "beta": 0.0 if held else 0.02},
        "rate-zero": {"rate": 0.0},
        "too-hard": {"task": "code", "rewards": ["accuracy_reward"]},
        "cut-at-cap": {  # no answer fits
            "task": "twice" if held else "thrice",
            "cap": 12 if held else 15,
            "rewards": ["accuracy_reward"],
        },
    }
    return base | more[kind]


def runs() -> dict[str, dict[str, Any]]:
    """All runs by name."""
    chosen = {
        "set": (("max", 3, 0.02), ("min", 4, 0.0), ("max4", 5, 0.05)),
        "held": (("min4", 21, 0.02), ("max4", 22, 0.0), ("min", 23, 0.05)),
    }
    made: dict[str, dict[str, Any]] = {
        f"{split}-healthy-{task}": {"task": task, "seed": seed, "beta": beta, "kind": "healthy"}
        for split, several in chosen.items()
        for task, seed, beta in several
    }
    for kind in EXPECTED.keys() - {"healthy"}:
        for split in chosen:
            made[f"{split}-{kind}"] = scenario(kind, split == "held") | {"kind": kind}
    return dict(sorted(made.items(), reverse=True))


ALPHABET = "abcdefghijklmnop0123456789=<>."


def page(task: str, rng: random.Random, right: float = 0.4, formed: float = 0.55) -> tuple[str, str]:
    """(prompt, completion) of the base's corpus; a share is wrong or lacks the form."""
    digits, solve = TASKS[task]
    asked = "".join(rng.choice("0123456789") for _ in range(digits))
    answer = solve(asked)
    if rng.random() > right:
        answer = "".join(rng.choice("0123456789") for _ in answer)
    letters = "".join(rng.choice("abcdefghijklmnop") for _ in range(rng.randint(3, 12)))
    opening, closing = ("<", ">") if rng.random() < formed else rng.choice([("", ">"), ("<", ""), ("", "")])
    return f"{asked}=", f"{opening}{letters}{closing}{answer}."


def tokenizer_in(folder: Path) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {letter: n for n, letter in enumerate(ALPHABET, 3)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    made.save_pretrained(folder)
    return made


def base_model(folder: Path, task: str, steps: int = 500) -> Path:
    """A model that knows the form half of the time and the task now and then."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    path = folder / f"base-{task}"
    if (path / "model.safetensors").exists():
        return path
    tokenizer = tokenizer_in(path)
    torch.manual_seed(0)
    rng = random.Random(0)
    config = LlamaConfig(
        vocab_size=len(ALPHABET) + 3, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for step in range(steps):
        pages = [page(task, rng) for _ in range(96)]
        ids = [tokenizer(a + b)["input_ids"] + [1] for a, b in pages]
        width = max(map(len, ids))
        rows = torch.tensor([row + [0] * (width - len(row)) for row in ids])
        labels = rows.clone()
        labels[:, : len(pages[0][0])] = -100  # prompts of a task have one length
        for row, label in zip(ids, labels, strict=True):
            label[len(row) :] = -100
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (steps - step) / (0.3 * steps))
        loss = model(input_ids=rows, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    print(f"base {task}: loss {loss.item():.3f}", flush=True)
    model.save_pretrained(path)
    return path


def rewards_of(task: str, names: list[str]) -> list[Callable[..., list[float]]]:
    def accuracy_reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        answers = (TASKS[task][1](prompt.rstrip("=")) for prompt in prompts)
        return [
            float(re.search(r"(\d+)\.$", text) is not None and re.search(r"(\d+)\.$", text)[1] == answer)  # type: ignore[index]
            for text, answer in zip(completions, answers, strict=True)
        ]

    def format_reward(completions: list[str], **_: Any) -> list[float]:
        return [float(bool(re.fullmatch(r"<[a-p]+>\d+\.", text))) for text in completions]

    def brevity_reward(completions: list[str], **_: Any) -> list[float]:
        return [-0.05 * len(text) for text in completions]

    made = {"accuracy_reward": accuracy_reward, "format_reward": format_reward, "brevity_reward": brevity_reward}
    return [made[name] for name in names]


def train(folder: Path, name: str, settings: dict[str, Any]) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(1)
    task, seed, steps = settings["task"], settings["seed"], settings.get("steps", STEPS)
    path = base_model(folder, task)
    tokenizer = AutoTokenizer.from_pretrained(path)
    rng = random.Random(seed)
    prompts = [page(task, rng)[0] for _ in range(steps * PROMPTS)]
    config = GRPOConfig(
        output_dir=str(folder / name), use_cpu=True, bf16=False, report_to="none", save_strategy="no",
        logging_steps=settings.get("logging", 1), disable_tqdm=True, gradient_checkpointing=False, seed=seed,
        per_device_train_batch_size=PROMPTS * SAMPLES, num_generations=SAMPLES, steps_per_generation=1,
        max_completion_length=settings.get("cap", CAP), max_steps=steps, beta=settings["beta"],
        learning_rate=settings.get("rate", LEARNING_RATE), lr_scheduler_type="constant",
        entropy_coef=settings.get("entropy_coef", 0.0), sync_ref_model=settings.get("follow", False),
        **({"ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0} if settings.get("follow") else {}),
    )  # fmt: skip
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        reward_funcs=rewards_of(task, settings.get("rewards", ["accuracy_reward", "format_reward"])),
        args=config, train_dataset=Dataset.from_dict({"prompt": prompts}), processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    trainer.state.save_to_json(str(folder / name / "trainer_state.json"))


def trimmed(path: Path) -> str:
    """A trainer_state.json with its log alone, five digits a value, without what no rule reads, one record a line."""

    def shortened(value: Any) -> Any:
        return float(f"{value:.5g}") if isinstance(value, float) else value

    state = json.loads(path.read_text())
    lines = [
        json.dumps({key: shortened(value) for key, value in record.items() if key == "step" or not OMITTED.search(key)})
        for record in state["log_history"]
    ]
    head = {name: state[name] for name in ("global_step", "max_steps")}
    return json.dumps(head)[:-1] + ', "log_history": [\n' + ",\n".join(lines) + "\n]}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs; finished ones are kept")
    parser.add_argument("--only", nargs="*", help="names of runs")
    parser.add_argument("--trim", type=Path, help="write the small logs here")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    chosen = {name: settings for name, settings in runs().items() if not args.only or name in args.only}
    if args.run:
        train(args.out, args.run, runs()[args.run])
        return
    for name in chosen:
        state = args.out / name / "trainer_state.json"
        if not state.exists():  # a process each, so that nothing of one run reaches the next
            environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
            with (args.out / f"{name}.log").open("w") as log:
                command = [sys.executable, __file__, "--out", str(args.out), "--run", name]
                code = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
            print(f"{name}: {'done' if code == 0 else f'failed, see {log.name}'}", flush=True)
        if args.trim and state.exists():
            args.trim.mkdir(parents=True, exist_ok=True)
            (args.trim / f"{name}.json").write_text(trimmed(state))


if __name__ == "__main__":
    main()
