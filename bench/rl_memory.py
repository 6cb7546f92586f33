"""What an RL stage on many ranks holds of weights, in bytes a rank by kind, while it samples and while it updates.

    python bench/rl_memory.py                  # a miniature of DeepSeek-V2-Lite on 1, 2 and 4 gloo ranks
    python bench/rl_memory.py --only ray       # some of the cases; the file keeps the others

A network of V2-Lite's proportions in float32 runs two rollouts, with a reference that follows the policy after the
first. It samples in the trainer's processes or, where a case ends with "ray", in a Ray worker of rank 0; a case with
"FSDP2" is a Qwen2 of about that size, and one with "MTP" has a frozen MTP module. The counts are of live tensors, of
the fullest rank; weights, reference, gathered networks and what a rank hands over to Ray's store are also given as
multiples of one whole network. The store itself, activations and caches are not counted. Results:
bench/results/rl_memory.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

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
    "2 ranks, ep 2, ray": {"ep": 2},
    "2 ranks, pp 2, ray": {"pp": 2},
    "4 ranks, pp 2 x ep 2, ray": {"pp": 2, "ep": 2},
    "2 ranks, ep 2, correction, ray": {"ep": 2},
    "2 ranks, ep 2, routing-replay, ray": {"ep": 2},
    "2 ranks, ep 2, MTP, ray": {"ep": 2},
    "2 ranks, FSDP2, ray": {"dp": 2},
}
OTHER = dict(
    vocab_size=512, hidden_size=256, intermediate_size=640, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False,
)  # fmt: skip
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
HOOKS = {"correction": 'hooks = [{ name = "correction", form = "token-truncate" }]\n',
         "routing-replay": 'hooks = ["routing-replay"]\n'}  # fmt: skip
NETWORKS = ("weights", "reference", "gathered", "rounded", "checkpoint", "handed over")
"""Kinds that are networks or parts of them; the others belong to the optimizer."""
MOMENTS = ("sampling", "preparing", "updates")
"""Preparing: what hooks compute between a rollout and its updates."""
RESULTS = Path(__file__).parent / "results" / "rl_memory.json"


def write_base(folder: Path, name: str) -> int:
    """Makes the stage's source, of our own or of another family; returns the bytes of its weights."""
    from bessemer.data.tokenizer import Tokenizer
    from bessemer.hf import deepseek  # noqa: F401 (it writes models)
    from bessemer.model.config import preset
    from bessemer.model.transformer import Transformer

    tokenizer = Tokenizer.train(["User: Compute 3*7+6.\nAssistant: <think>21+6=27</think><answer>27</answer>"] * 8, 290)
    tokenizer.save(folder / "tokenizer")
    if "FSDP2" in name:
        from transformers import Qwen2Config, Qwen2ForCausalLM

        torch.manual_seed(3)
        foreign = Qwen2ForCausalLM(Qwen2Config(**OTHER))
        foreign.save_pretrained(folder / "model")
        tokenizer.save(folder / "model")
        return sum(tensor.nbytes for tensor in foreign.state_dict().values())
    model = Transformer(preset("v2-lite", vocab_size=512, n_mtp=int("MTP" in name), **SHAPE)).initialise(3)
    model.save(folder / "model", tokenizer_dir=folder / "tokenizer")
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def held(loop: Any) -> dict[str, int]:
    """Kind -> bytes at this moment."""
    from bessemer.addons.distributed.fsdp import local
    from bessemer.addons.distributed.fsdp_collective import FSDPCollective
    from bessemer.addons.distributed.held_bytes import held_bytes
    from bessemer.rl.reference import Reference

    if not isinstance(loop.trainer.collective, FSDPCollective):
        return held_bytes(loop)
    references = [component for component in loop.components if isinstance(component, Reference)]
    moments = [tensor for named in loop.trainer.optimizer.moments.values() for tensor in named.values()]
    kinds = {
        "weights": loop.trainer.collective.sharded.tensors.values(),
        "moments": moments,
        "reference": [tensor for reference in references for tensor in reference.copy._own.values()],
        "gathered": loop.policy.model.parameters(),
    }
    return {kind: sum(local(x).untyped_storage().nbytes() for x in tensors) for kind, tensors in kinds.items()}


def handed_over(loop: Any, value: Any) -> int:
    """Bytes of the arrays that are put into Ray's store and are not tensors of the trained or the gathered network."""
    from bessemer.addons.distributed.fsdp import local

    networks = [*loop.trainer.model.state_dict().values(), *loop.policy.model.state_dict().values()]
    storages = [local(tensor).untyped_storage() for tensor in networks]
    spans = [(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in storages]
    items = value.tensors.values() if hasattr(value, "tensors") else [value]
    arrays = [item.data for item in items if hasattr(item, "data")]
    return sum(x.nbytes for x in arrays if not any(start <= x.ctypes.data < end for start, end in spans))


def count(rank: int, n: int, name: str, base: Path, folder: Path) -> dict[str, dict[str, int]]:
    """{moment: the most bytes by kind} on this rank."""
    from bessemer.addons.distributed.on_fsdp_ranks import OnFSDPRanks
    from bessemer.addons.distributed.on_ranks import OnRanks
    from bessemer.addons.distributed.ranks import Ranks
    from bessemer.config.recipe import Recipe
    from bessemer.rl.loop import Loop
    from bessemer.runs.context import StageContext, StopFlag
    from bessemer.runs.metrics import Metrics, StageMetrics
    from bessemer.runs.progress import RunProgress
    from bessemer.train.runtime import Runtime

    torch.set_num_threads(1)
    os.environ.pop("RAY_ADDRESS", None)
    stage, table, rest = RECIPE.partition("[layout]")
    stage += 'rollout = "ray"\n' * name.endswith("ray")
    stage += "".join(text for hook, text in HOOKS.items() if hook in name)
    sizes = "\n".join(f"{k} = {v}" for k, v in LAYOUTS[name].items() if "FSDP2" not in name)
    (folder / f"recipe-{rank}.toml").write_text(stage + table + rest + sizes)
    recipe, runtime = Recipe.load(folder / f"recipe-{rank}.toml"), Runtime()
    if n > 1:
        ranks = Ranks(dist.distributed_c10d._get_default_store(), rank, n, torch.device("cpu"))
        runtime = (OnFSDPRanks if "FSDP2" in name else OnRanks)(ranks, recipe.layout, lambda text: None)
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

    def keep(moment: str, handed: int = 0) -> None:
        kinds = held(loop) | {"handed over": handed}
        if sum(kinds.values()) > sum(most.get(moment, {}).values()):
            most[moment] = kinds

    if name.endswith("ray") and rank == 0:
        from bessemer.addons.distributed.worker_pool import WorkerPool

        begin = WorkerPool.__init__

        def put(plain: Callable, value: Any) -> Any:
            keep("sampling", handed_over(loop, value))
            return plain(value)

        def begun(pool: Any, cluster: Any, *arguments: Any) -> None:  # Ray must not be imported before the cluster is
            cluster.ray.put = partial(put, cluster.ray.put)
            begin(pool, cluster, *arguments)

        WorkerPool.__init__ = begun  # type: ignore[method-assign]

    loop.generator.rollout = counted("sampling", loop.generator.rollout, first=False)
    loop._prepare = counted("preparing", loop._prepare, first=False)
    loop.trainer.update = counted("updates", loop.trainer.update, first=True)
    loop.run()
    return most


def _rank(rank: int, n: int, store: str, answers, *arguments) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=n)
    try:
        answers.put((rank, count(rank, n, *arguments)))
    except BaseException:
        answers.put((rank, traceback.format_exc()))
        raise
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
        try:
            for process in processes:
                process.start()
            found: dict[int, Any] = {}
            while len(found) < n:
                rank, counted = answers.get()
                if isinstance(counted, str):
                    raise RuntimeError(f"rank {rank}: {counted}")
                found[rank] = counted
            for process in processes:
                process.join()
        finally:  # a rank that failed, or a time limit above: the others would wait for it
            for process in processes:
                process.kill()
    return [found[rank] for rank in range(n)]


def measure(cases: Sequence[str] = tuple(LAYOUTS)) -> dict:
    facts: dict = {"shape": "v2-lite", "changes": SHAPE, "other": OTHER, "dtype": "float32", "layouts": {}}
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(cases):
            run, layout = Path(folder) / str(number), LAYOUTS[name]
            base = run / "base"
            base.mkdir(parents=True)
            whole = write_base(base, name)
            ranks = on_ranks(math.prod(layout.values()), name, base, run)
            row = {
                moment: max((rank[moment] for rank in ranks), key=lambda kinds: sum(kinds.values()))
                for moment in MOMENTS
            }
            networks = {moment: sum(kinds.get(kind, 0) for kind in NETWORKS) / whole for moment, kinds in row.items()}
            facts["layouts"][name] = row | {"whole": whole, "networks": networks}
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--only", default="", help="a word in the names of the cases")
    arguments = parser.parse_args()
    facts = measure([name for name in LAYOUTS if arguments.only in name])
    measured = facts["layouts"]
    if arguments.json.exists():
        old = json.loads(arguments.json.read_text())
        rows = old["layouts"] | measured
        facts |= {k: v for k, v in old.items() if k.startswith("before")}
        facts["layouts"] = {name: rows[name] for name in LAYOUTS if name in rows}
    arguments.json.write_text(json.dumps(facts, indent=1) + "\n")
    for name, row in measured.items():
        for moment in MOMENTS:
            kinds = ", ".join(f"{kind} {size / 1e6:.2f}" for kind, size in row[moment].items() if size)
            print(f"{name}, {moment}: {row['networks'][moment]:.2f} networks of {row['whole'] / 1e6:.2f} MB: {kinds}")


if __name__ == "__main__":
    main()
