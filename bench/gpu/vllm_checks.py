"""What vLLM does on a GPU that a CPU build cannot: weights mapped into its processes, sleep, routed experts, sampling
masks. Each is compared with our own engine on the same weights. Called by checks.py.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bessemer.addons.distributed.ray_settings import VLLMOptions
from bessemer.addons.distributed.ray_worker import NewWeights, RolloutWorker, pack_weights
from bessemer.addons.distributed.sampler_check import Probe, dtype_of, logprobs
from bessemer.engine.engine import Engine

LENGTH, ROWS, NEW = 512, 32, 64
MISROUTED, OUTSIDE = "experts that the trainer would choose otherwise", "tokens outside their own mask"


def figures(model: Any, tokenizer: Any) -> dict[str, float]:
    """Of a network on the GPU: gaps in nats per token, shares, and GiB that sleep gives back."""
    engine, found = Engine(model, tokenizer), dict[str, float]()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder) / "tokenizer")
        model.save(Path(folder) / "model", tokenizer_dir=Path(folder) / "tokenizer")
        prompts = [[0, *(3 + (7 * n + t) % 280 for t in range(31))] for n in range(ROWS)]

        def batch(**options: Any) -> Any:
            options = {"max_new_tokens": NEW, "stop_ids": [], "batch_rows": ROWS, "seeds": range(ROWS)} | options
            (planned,) = engine.plan(prompts, **options).batches
            return planned

        def weights(version: int) -> NewWeights:
            with torch.no_grad():
                model.layers[0].attn.wo.weight.mul_(1 + 0.05 * version)
            ids = [*prompts[0], *range(20, 60)]
            return NewWeights(pack_weights(model.state_dict()), Probe(ids, logprobs(model, ids), dtype_of(model)))

        for level in (1, 2):
            worker = _worker(folder, sleep=level)
            for version in (1, 2):  # the check of the exchange is the test of MappedWeights
                answers = worker.generate(version, weights(version), batch()).completions
                found[f"gap, exchange {version}, sleep {level}"] = _gap(model, prompts, answers)
            free, _ = torch.cuda.mem_get_info()
            found[f"GiB free asleep, level {level}"] = free / 2**30
            _end(worker)
        worker = _worker(folder, records_routing=True)
        answers = worker.generate(1, weights(3), batch(record_routing=True)).completions
        found[MISROUTED] = _misrouted(model, prompts, answers)
        _end(worker)
        worker = _worker(folder, records_kept=True)
        answers = worker.generate(1, weights(4), batch(top_p=0.9, record_kept=True)).completions
        found[OUTSIDE] = _outside(answers)
        _end(worker)
    return found


def _worker(folder: str, **needs: Any) -> RolloutWorker:
    options = VLLMOptions(max_model_len=LENGTH, gpu_memory_utilization=0.4, **needs)
    worker = RolloutWorker("vllm", str(Path(folder) / "model"), 1, options)
    worker.open()
    return worker


def _end(worker: RolloutWorker) -> None:
    engine: Any = worker.engine
    engine.llm.llm_engine.engine_core.shutdown()
    worker.engine = None


def _gap(model: Any, prompts: Sequence[list[int]], answers: Sequence[Any]) -> float:
    """Mean distance of the answers' log-probabilities from the trainer's."""
    gaps = []
    for prompt, answer in zip(prompts, answers, strict=True):
        own = logprobs(model, [*prompt, *answer.tokens])[len(prompt) - 1 :]
        gaps += [abs(a - b) for a, b in zip(answer.logprobs, own, strict=True)]
    return sum(gaps) / len(gaps)


def _misrouted(model: Any, prompts: Sequence[list[int]], answers: Sequence[Any]) -> float:
    """Share of (token, layer) pairs."""
    differ = total = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        fed = torch.tensor([[*prompt, *answer.tokens][:-1]], device=model.embed.weight.device)
        own_TLK = model.chosen_experts(fed, None)[0].cpu().sort(-1).values
        differ += int((own_TLK != answer.routing.to(own_TLK.dtype).sort(-1).values).any(-1).sum())
        total += own_TLK.shape[0] * own_TLK.shape[1]
    return differ / total


def _outside(answers: Sequence[Any]) -> float:
    """Share of the tokens that are not among those they were drawn from."""
    missing = total = 0
    for answer in answers:
        kept = answer.kept.id_M.split(answer.kept.count_T.tolist())
        missing += sum(token not in ids.tolist() for token, ids in zip(answer.tokens, kept, strict=True))
        total += len(answer.tokens)
    return missing / total
