"""FSDP2 against one process: losses, gradients, bytes on a rank, checkpoints that other ranks resume, kill -9.

    python bench/fsdp_agrees.py --json bench/results/fsdp_agrees.json

Random models like Qwen2 (biases on q, k, v) and Llama (tied embeddings) are trained for six steps of eight packed rows
in float32, by one process without FSDP2 and by 1, 2 and 4 gloo ranks of one core with it.

    losses       largest relative difference from one process over the six steps
    gradients    largest relative difference of a parameter's gradient, |g - g0| / |g0|, in the first step
    bytes        of a rank's weights, gradients and moments after a step, counted from its tensors
    resumed      two ranks stop after three steps; 1, 2 and 4 ranks and one process go on: losses of all six steps
    killed       two ranks get SIGKILL after their third checkpoint; two others go on: losses of all six steps

The bounds are those of float32 sums in another order; exit status 1 if any is exceeded.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch._dynamo  # torch's recomputation imports it: here once for all ranks
import torch.distributed as dist
import transformers
from machine import processor

from bessemer.addons.distributed.fsdp_collective import of_fsdp
from bessemer.addons.distributed.on_fsdp_ranks import OnFSDPRanks
from bessemer.addons.distributed.ranks import Ranks
from bessemer.addons.families import causal_lm
from bessemer.config.recipe import LayoutConfig
from bessemer.config.training import PretrainConfig
from bessemer.config.units import Points
from bessemer.data.batch import Batch
from bessemer.train.objective import next_token
from bessemer.train.plan import TrainingPlan, constant
from bessemer.train.runtime import Runtime
from bessemer.train.trainer import Trainer

STEPS, ROWS, LENGTH, VOCAB = 6, 8, 64, 512
SHAPE = dict(
    vocab_size=VOCAB, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.1,
)  # fmt: skip
MODELS = {
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {}),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {"tie_word_embeddings": True}),
}
BOUNDS = {"losses": 1e-5, "gradients": 1e-6, "bytes": 0.01}
TERMS = {"mtp_lambda": 0.0, "balance_alpha": 0.0}


def rows(first: int, count: int) -> Batch:
    """Two packed samples per row."""
    generators = [torch.Generator().manual_seed(number) for number in range(first, first + count)]
    tokens_BT = torch.stack([torch.randint(2, VOCAB, (LENGTH,), generator=generator) for generator in generators])
    segments_BT = (torch.arange(LENGTH) >= LENGTH // 3).long().expand(count, -1).contiguous()
    loss_BT = torch.ones(count, LENGTH)
    loss_BT[:, :3] = 0.0
    return Batch(tokens_BT, loss_BT, segments_BT=segments_BT)


def trainer(runtime: Runtime, base: Path, folder: Path | None, values: list, stop_after: int | None) -> Trainer:
    if isinstance(runtime, OnFSDPRanks):
        model = runtime.read_network(base)
    else:
        model = causal_lm.load(base, torch.float32)
    config = PretrainConfig(kind="pretrain", lr=Points(1e-3), micro_rows=2, save_seconds=1e9)
    plan = TrainingPlan(
        tokens=STEPS * ROWS * LENGTH, batch_rows=constant(ROWS), save_steps=1, keep=9,
        terms={name: constant(value) for name, value in TERMS.items()},
    )  # fmt: skip
    ahead = isinstance(runtime, OnFSDPRanks)  # ranks ask within the step
    return runtime.trainer(
        model, next_token, rows, config, plan, folder, lambda step, tokens, metrics: values.append(metrics),
        lambda: stop_after is not None and len(values) >= stop_after - ahead, model_config=model.cfg.model_dump(),
    )  # fmt: skip


def gradients(run: Trainer) -> dict[str, torch.Tensor]:
    run.collective.accumulate(run.on_device.micro_batches(), TERMS)
    named = {name: p.grad for name, p in run.model.named_parameters()}
    return {name: (g.full_tensor() if hasattr(g, "full_tensor") else g).clone() for name, g in named.items()}


def trained(runtime: Runtime, base: Path, folder: Path | None = None, stop_after: int | None = None) -> dict[str, Any]:
    values: list[dict[str, float]] = []
    run = trainer(runtime, base, folder, values, stop_after)
    first = None
    if folder is None:
        first = gradients(run)
        run.optimizer.zero_grad()
    run.run()
    facts = {"losses": [step["train/loss"] for step in values], "gradients": first}
    if isinstance(runtime, OnFSDPRanks):
        gradients(run)  # they are there, as at the end of a backward
        optimizer = run.optimizer
        facts["bytes"] = of_fsdp(run).sharded.bytes() + optimizer.bytes()
    return facts


def rank(me: int, n: int, store: Path, send: Any, read: Any, arguments: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=me, world_size=n)
    ranks = Ranks(dist.distributed_c10d._get_default_store(), me, n, torch.device("cpu"))
    facts = trained(OnFSDPRanks(ranks, LayoutConfig(), lambda text: None), *arguments)
    if me == 0:
        send.put(facts)
        read.wait()
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(n: int, *arguments: Any, kill_at: Path | None = None) -> dict[str, Any] | None:
    """Rank 0's facts; None if all were killed once the checkpoint `kill_at` existed."""
    context = get_context("fork")
    send, read = context.SimpleQueue(), context.Event()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        processes = [context.Process(target=rank, args=(me, n, store, send, read, arguments)) for me in range(n)]
        for process in processes:
            process.start()
        if kill_at is not None:
            while not kill_at.exists():
                assert processes[0].is_alive(), "it has ended before it was killed"
                time.sleep(0.001)
            for process in processes:
                with suppress(ProcessLookupError):
                    os.kill(process.pid or 0, signal.SIGKILL)
                process.join()
            return None
        facts = send.get()
        read.set()
        for process in processes:
            process.join()
            assert process.exitcode == 0, "a rank failed"
        return facts


def relative(actual: list[float], expected: list[float]) -> float:
    assert len(actual) == len(expected), (actual, expected)
    return max(abs(a - b) / abs(b) for a, b in zip(actual, expected, strict=True))


def measured(kind: str, scratch: Path) -> dict[str, Any]:
    base = scratch / kind
    config, model, changes = MODELS[kind]
    torch.manual_seed(0)
    model(config(**(SHAPE | changes))).save_pretrained(base)
    n_parameters = sum(parameter.numel() for parameter in causal_lm.load(base).parameters())
    one = trained(Runtime(), base)
    facts: dict[str, Any] = {"parameters": n_parameters, "losses of one process": one["losses"], "ranks": {}}
    for n in (1, 2, 4):
        own = on_ranks(n, base)
        assert own is not None
        gaps = [float((own["gradients"][name] - g).norm() / g.norm()) for name, g in one["gradients"].items()]
        facts["ranks"][n] = {
            "losses": relative(own["losses"], one["losses"]), "gradients": max(gaps), "bytes": own["bytes"],
            "share": own["bytes"] / (16 * n_parameters),
        }  # fmt: skip
    facts["resumed"] = {}
    for n in (1, 2, 4, None):
        folder = scratch / f"{kind}-{n}"
        first = on_ranks(2, base, folder, STEPS // 2)
        rest = trained(Runtime(), base, folder) if n is None else on_ranks(n, base, folder)
        assert first is not None and rest is not None and len(first["losses"]) == STEPS // 2
        name = "one process" if n is None else f"{n} ranks"
        facts["resumed"][name] = relative(first["losses"] + rest["losses"], one["losses"])
    folder = scratch / f"{kind}-killed"
    on_ranks(2, base, folder, kill_at=folder / "step-00000003")
    done = max(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))
    rest = on_ranks(2, base, folder)
    assert rest is not None
    facts["killed"] = {"after step": done, "losses": relative(rest["losses"], one["losses"][done:])}
    return facts


def beyond(kind: str, facts: dict[str, Any]) -> list[str]:
    """What exceeds its bound."""
    found = []
    for n, own in facts["ranks"].items():
        found += [
            f"{kind}, {n} ranks: {name} {own[name]}" for name in ("losses", "gradients") if own[name] > BOUNDS[name]
        ]
        if abs(own["share"] * n - 1) > BOUNDS["bytes"]:
            found.append(f"{kind}, {n} ranks: {own['share']:.4f} of the bytes")
    runs = facts["resumed"] | {"killed": facts["killed"]["losses"]}
    return found + [f"{kind}, {name}: {gap}" for name, gap in runs.items() if gap > BOUNDS["losses"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    json_file = parser.parse_args().json
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        models = {kind: measured(kind, Path(folder)) for kind in MODELS}
    setting = {"torch": torch.__version__, "transformers": transformers.__version__, "processor": processor()}
    sizes = {"steps": STEPS, "rows": ROWS, "length": LENGTH, "precision": "float32", "backend": "gloo", "shape": SHAPE}
    result = {"setting": setting | sizes, "bounds": BOUNDS, "models": models}
    print(json.dumps(result, indent=1))
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n")
    if found := [line for kind, facts in models.items() for line in beyond(kind, facts)]:
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
