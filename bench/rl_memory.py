"""What an RL stage on many ranks holds of weights, in bytes a rank by kind, while it samples and while it updates.

    python bench/rl_memory.py                  # a miniature of DeepSeek-V2-Lite on 1, 2 and 4 gloo ranks

A network of V2-Lite's proportions in float32 samples in the trainer's processes for two rollouts, with a reference that
follows the policy after the first. The counts are of live tensors (`held_bytes`), of the fullest rank; weights,
reference and gathered networks are also given as multiples of one whole network. Activations and caches are not
counted. Results: bench/results/rl_memory.json.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.distributed as dist

SHAPE = dict(
    dim=128, n_layers=5, inter_dim=640, moe_inter_dim=88, n_heads=4, kv_lora_rank=64, qk_nope_head_dim=32,
    qk_rope_head_dim=16, v_head_dim=32, n_routed_experts=16, max_seq_len=512, rope_factor=1.0, original_seq_len=512,
)  # fmt: skip
LAYOUTS: dict[str, dict[str, int]] = {
    "1 rank": {},
    "2 ranks, ep 2": {"ep": 2},
    "2 ranks, pp 2": {"pp": 2},
    "4 ranks, pp 2 x ep 2": {"pp": 2, "ep": 2},
}
RECIPE = """
name = "memory"
seed = 7
[model]
preset = "v2-lite"
[[stage]]
kind = "rl"
name = "zero"
tasks = ["arithmetic"]
prompt_template = "zero"
rollouts = 2
prompts_per_rollout = 4
samples = 4
updates_per_rollout = 2
max_new_tokens = 16
lr = 1e-4
kl.reference_every = 2
heldout.minimum_pass = 0.0
heldout.problems = 4
heldout.every = 99
precision = "float32"
[layout]
schedule = "1f1b"
"""
NETWORKS = ("weights", "reference", "gathered", "rounded", "checkpoint")
"""Kinds that are networks or parts of them; the others belong to the optimizer."""
RESULTS = Path(__file__).parent / "results" / "rl_memory.json"


def write_base(folder: Path) -> int:
    """Makes the stage's source; returns the bytes of its weights."""
    from bessemer.data.tokenizer import Tokenizer
    from bessemer.hf import deepseek  # noqa: F401 (it writes models)
    from bessemer.model.config import preset
    from bessemer.model.transformer import Transformer

    tokenizer = Tokenizer.train(["User: Compute 3*7+6.\nAssistant: <think>21+6=27</think><answer>27</answer>"] * 8, 290)
    tokenizer.save(folder / "tokenizer")
    model = Transformer(preset("v2-lite", vocab_size=512, **SHAPE)).initialise(3)
    model.save(folder / "model", tokenizer_dir=folder / "tokenizer")
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def count(rank: int, n: int, layout: dict[str, int], base: Path, folder: Path) -> dict[str, dict[str, int]]:
    """{"sampling" or "updates": the most bytes by kind} on this rank."""
    from bessemer.addons.distributed.held_bytes import held_bytes
    from bessemer.addons.distributed.on_ranks import OnRanks
    from bessemer.addons.distributed.ranks import Ranks
    from bessemer.config.recipe import Recipe
    from bessemer.rl.loop import Loop
    from bessemer.runs.context import StageContext, StopFlag
    from bessemer.runs.metrics import Metrics, StageMetrics
    from bessemer.runs.progress import RunProgress
    from bessemer.train.runtime import Runtime

    torch.set_num_threads(1)
    (folder / f"recipe-{rank}.toml").write_text(RECIPE + "\n".join(f"{k} = {v}" for k, v in layout.items()))
    recipe, runtime = Recipe.load(folder / f"recipe-{rank}.toml"), Runtime()
    if n > 1:
        ranks = Ranks(dist.distributed_c10d._get_default_store(), rank, n, torch.device("cpu"))
        runtime = OnRanks(ranks, recipe.layout, lambda text: None)
    ctx = StageContext(
        "zero", folder, {}, base, recipe, folder, StageMetrics(Metrics(folder / f"metrics-{rank}.jsonl"), "zero"),
        RunProgress({}).begin("zero"), StopFlag(), runtime=runtime,
    )  # fmt: skip
    loop = Loop(recipe.stage("zero"), ctx, {})
    most: dict[str, dict[str, int]] = {}

    def counted(moment: str, work: Callable, first: bool) -> Callable:
        def run(*arguments):
            if first:
                keep(moment)
            result = work(*arguments)
            keep(moment)
            return result

        return run

    def keep(moment: str) -> None:
        held = held_bytes(loop)
        if sum(held.values()) > sum(most.get(moment, {}).values()):
            most[moment] = held

    loop.generator.rollout = counted("sampling", loop.generator.rollout, first=False)
    loop.trainer.update = counted("updates", loop.trainer.update, first=True)
    loop.run()
    return most


def _rank(rank: int, n: int, store: str, answers, *arguments) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=n)
    answers.put((rank, count(rank, n, *arguments)))
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(n: int, *arguments) -> list[dict[str, dict[str, int]]]:
    if n == 1:
        return [count(0, 1, *arguments)]
    context = get_context("fork")
    answers = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank, args=(rank, n, f"{folder}/store", answers, *arguments)) for rank in range(n)
        ]
        for process in processes:
            process.start()
        found = dict(answers.get() for _ in processes)
        for process in processes:
            process.join()
    return [found[rank] for rank in range(n)]


def measure(layouts: dict[str, dict[str, int]] = LAYOUTS) -> dict:
    facts: dict = {"shape": "v2-lite", "changes": SHAPE, "dtype": "float32", "layouts": {}}
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        base.mkdir()
        facts["whole"] = write_base(base)
        for number, (name, layout) in enumerate(layouts.items()):
            run = Path(folder) / str(number)
            run.mkdir()
            n = layout.get("pp", 1) * layout.get("ep", 1)
            ranks = on_ranks(n, layout, base, run)
            row = {
                moment: max((rank[moment] for rank in ranks), key=lambda kinds: sum(kinds.values()))
                for moment in ("sampling", "updates")
            }
            networks = {moment: sum(kinds[kind] for kind in NETWORKS) / facts["whole"] for moment, kinds in row.items()}
            facts["layouts"][name] = row | {"networks": networks}
    return facts


def main() -> None:
    facts = measure()
    if RESULTS.exists():
        facts |= {"before": json.loads(RESULTS.read_text()).get("before")}
    RESULTS.write_text(json.dumps(facts, indent=1) + "\n")
    for name, row in facts["layouts"].items():
        for moment in ("sampling", "updates"):
            kinds = ", ".join(f"{kind} {size / 1e6:.2f}" for kind, size in row[moment].items() if size)
            print(f"{name}, {moment}: {row['networks'][moment]:.2f} networks of {facts['whole'] / 1e6:.2f} MB: {kinds}")


if __name__ == "__main__":
    main()
