"""Bytes that the planner predicts for a rank, against bytes counted in real training on gloo ranks.

    python bench/memory_predicted.py                    # all cases, about a minute each; at most four ranks
    python bench/memory_predicted.py qwen lora          # those whose names contain one of the words; others stay

Counted: the storages of weights, gradients, masters and moments after a step, those of a reference, and what a forward
saves for backward, once for every storage that is no parameter. For models of the DeepSeek V3 family the last is what a
step's forwards leave allocated, since its kernels save outside of autograd's hooks; real routing is not balanced, so it
is averaged over the ranks of a pipeline stage. Predicted: `plan.memory` and `plan.other_memory`, from shapes alone. A
case passes within 5 % of the total and of the activations. Results: bench/results/memory_predicted.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "shared"))
from step_memory import LENGTH, MICRO, ROWS, Step, random_batch, storages  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "memory_predicted.json"
BOUND = 0.05
STATE = ("weights", "gradients", "masters", "moments", "reference", "judges")


@dataclass(frozen=True)
class Case:
    name: str
    family: str
    """deepseek_v3, or a `model_type` of transformers."""
    layout: dict[str, int] = field(default_factory=dict)
    dtype: str = "bfloat16"
    moments: str = "float32"
    recompute: bool = False
    lora: int = 0
    reference: bool = False
    judge: bool = False
    """A reward model, in float32."""

    @property
    def ranks(self) -> int:
        return self.layout.get("pp", 1) * self.layout.get("ep", 1) * self.layout.get("dp", 1)


CASES = [
    Case("own, 1 rank, float32", "deepseek_v3", dtype="float32"),
    Case("own, 1 rank, BF16 moments", "deepseek_v3", moments="bfloat16"),
    Case("own, 2 ranks, ep 2", "deepseek_v3", {"ep": 2}),
    Case("own, 2 ranks, pp 2, recomputed", "deepseek_v3", {"pp": 2}, recompute=True),
    Case("own, 2 ranks, dp 2, BF16 moments", "deepseek_v3", {"dp": 2}, moments="bfloat16"),
    Case("own, 4 ranks, pp 2 x ep 2", "deepseek_v3", {"pp": 2, "ep": 2}),
    Case("own, 2 ranks, ep 2, reference", "deepseek_v3", {"ep": 2}, reference=True),
    Case("llama, 1 rank, float32", "llama", dtype="float32"),
    Case("llama, 1 rank, LoRA", "llama", lora=16),
    Case("llama, 1 rank, LoRA, recomputed", "llama", lora=16, recompute=True),
    Case("qwen2, 1 rank, recomputed, reference", "qwen2", recompute=True, reference=True),
    Case("qwen2, 1 rank, BF16 moments", "qwen2", moments="bfloat16"),
    Case("qwen3_moe, 1 rank", "qwen3_moe"),
    Case("qwen2, 2 ranks, FSDP2", "qwen2", {"dp": 2}, dtype="float32"),
    Case("llama, 2 ranks, FSDP2, recomputed", "llama", {"dp": 2}, recompute=True),
    Case("llama, 2 ranks, FSDP2, LoRA", "llama", {"dp": 2}, lora=16),
    Case("own, 2 ranks, pp 2, reward model", "deepseek_v3", {"pp": 2}, judge=True),
    Case("own, 4 ranks, pp 2 x ep 2, reward model", "deepseek_v3", {"pp": 2, "ep": 2}, judge=True),
    Case("qwen2, 2 ranks, FSDP2, reward model", "qwen2", {"dp": 2}, judge=True),
]
OTHER = {
    "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2,
    "intermediate_size": 352, "vocab_size": 2048, "max_position_embeddings": 256,
}  # fmt: skip
EXPERTS = {"head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96}


def judge_bytes(rank: int, case: Case, save: Callable[[Path], None]) -> int:
    """What loading a reward model, which `save` writes, leaves allocated on this rank."""
    import tempfile

    import torch.distributed as dist
    from allocator import live_and_highest

    from bessemer.addons.distributed.on_ranks import OnRanks
    from bessemer.addons.distributed.ranks import Ranks
    from bessemer.config.recipe import LayoutConfig

    folder = [tempfile.mkdtemp() if rank == 0 else ""]
    if rank == 0:
        save(Path(folder[0]))
    dist.broadcast_object_list(folder, 0)
    ranks = Ranks(dist.distributed_c10d._get_default_store(), rank, case.ranks, torch.device("cpu"))
    runtime = OnRanks(ranks, LayoutConfig(**case.layout), lambda text: None)
    live, _ = live_and_highest(lambda: runtime.reward_model(Path(folder[0])))
    dist.barrier()
    if rank == 0:
        shutil.rmtree(folder[0])
    return live


# --- models of the DeepSeek V3 family ----------------------------------------------------------------------------


def own_config() -> Any:
    from bessemer.model.config import preset

    return preset("tiny")


def count_own(rank: int, case: Case) -> dict[str, int]:
    """Bytes of a rank, by kind."""
    from bessemer.addons.distributed.mesh import Layout, Mesh
    from bessemer.addons.distributed.model_shard import ModelShard
    from bessemer.model.transformer import Transformer

    cfg, layout, dtype = own_config(), Layout(**case.layout), getattr(torch, case.dtype)
    model = Transformer(cfg).initialise(1)
    if case.recompute:
        model.set_recompute(["attend", "experts"])
    step = Step(rank, model, layout, "1f1b", moments=case.moments, compute_dtype=dtype)
    step.trainer.update(step.batches)
    state = {
        "weights": storages(g.compute for g in step.groups),
        "gradients": storages(t for g in step.groups for t in (g.grad, g.summed)),
        "masters": storages(g.master for g in step.groups if g.compute.dtype != torch.float32),
        "moments": storages(t for g in step.groups for t in g.moments.values()),
    }
    if case.reference:  # a shard of its own, in the compute dtype
        network = Transformer(cfg).initialise(1).to_compute(dtype)
        frozen = ModelShard(network, Mesh(layout, cfg), "1f1b")
        state["reference"] = storages(p for part in frozen.slices.values() for p in part.parameters())
    if case.judge:
        from bessemer.model.transformer import Scorer

        scorer = Scorer.of(Transformer(cfg).initialise(1), 2)
        state["judges"] = judge_bytes(rank, case, scorer.save)
    return state | {"activations": step.saved(), "pp": step.collective.mesh.pp}


def predict_own(case: Case, pp: int) -> dict[str, int]:
    from bessemer.addons.distributed.mesh import Layout
    from bessemer.addons.distributed.model_slice import cut
    from bessemer.addons.distributed.schedules import schedule
    from bessemer.addons.distributed.table import actions
    from bessemer.addons.plan import memory
    from bessemer.addons.plan.memory import NumberFormats

    cfg, layout = own_config(), Layout(**case.layout)
    number = getattr(torch, case.dtype).itemsize
    numbers = NumberFormats(number, getattr(torch, case.moments).itemsize, fused=False)
    table = schedule("1f1b", layout.pp, MICRO)
    recompute = ["attend", "experts"] if case.recompute else []
    kinds = memory.per_rank(cfg, layout, table, ROWS, LENGTH, numbers, recompute)[pp]
    saved = memory.saved_by_stage(cfg, cut(cfg, table.stages), ROWS, LENGTH, numbers, recompute, whole=layout.ep == 1)
    # all forwards of the step, as they are counted; a schedule holds fewer at a time
    activations = sum(saved[action.stage] for action in actions(table.steps[pp]) if action.kind == "F")
    state = {kind: kinds[kind] for kind in ("weights", "gradients", "masters", "moments")}
    judge = memory.scorer_bytes(cfg, layout, 4)[pp] * case.judge
    return state | {"reference": kinds["weights"] * case.reference, "judges": judge, "activations": activations}


# --- models of other families ------------------------------------------------------------------------------------


def other_config(case: Case) -> Any:
    import transformers

    extra = EXPERTS if case.family == "qwen3_moe" else {}
    return transformers.AutoConfig.for_model(case.family, **OTHER, **extra, tie_word_embeddings=False)


def count_other(rank: int, case: Case) -> dict[str, int]:
    import transformers
    from train_config import train_config

    from bessemer.addons.families.causal_lm import CausalLM
    from bessemer.addons.families.lora import attach
    from bessemer.config.training import LoRAConfig
    from bessemer.train.objective import next_token
    from bessemer.train.trainer import Trainer

    torch.manual_seed(1)
    terms = {"mtp_lambda": 0.0, "balance_alpha": 0.0}
    dtype = getattr(torch, case.dtype)
    model: Any = CausalLM(transformers.AutoModelForCausalLM.from_config(other_config(case)))
    if case.lora:
        model = attach(model, LoRAConfig(rank=case.lora, alpha=2 * case.lora), 7, Path("base"), "tuned")
    if case.recompute:
        model.inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    settings = train_config(
        tokens=1, lr=1e-3, gamma=0.0, batch_rows=1, micro_rows=1, terms=terms, moments=case.moments, compute_dtype=dtype
    )
    if case.ranks > 1:
        from bessemer.addons.distributed import fsdp, fsdp_collective

        sharded = fsdp.ShardedModel(model, torch.device("cpu"), dtype)
        trainer = fsdp_collective.trainer_of(sharded, next_token, None, *settings)
    else:
        if case.lora:  # the base, which no optimizer casts
            model.to_compute(dtype)
        trainer = Trainer(model, next_token, None, *settings)
    batch = random_batch(OTHER["vocab_size"], rank)
    if case.ranks > 1:
        trainer.collective.accumulate([batch], terms)
        gradients = storages(fsdp.local(p.grad) for p in model.parameters() if p.grad is not None)
        trainer.optimizer.step(1e-3, 1.0, 1.0, 1.0)
        state = {
            "weights": storages(fsdp.local(p) for p in sharded.tensors.values()), "gradients": gradients, "masters": 0,
            "moments": storages(fsdp.local(t) for ts in trainer.optimizer.moments.values() for t in ts.values()),
        }  # fmt: skip
    else:
        trainer.update([batch])
        groups = trainer.optimizer.groups
        frozen = [p for p in model.parameters() if not p.requires_grad]
        state = {
            "weights": storages([*(g.compute for g in groups), *frozen]),
            "gradients": storages(g.grad for g in groups),
            "masters": storages(g.master for g in groups if g.compute.dtype != torch.float32),
            "moments": storages(t for g in groups for t in g.moments.values()),
        }
    if case.reference:
        reference = CausalLM(transformers.AutoModelForCausalLM.from_config(other_config(case))).to_compute(dtype)
        state["reference"] = storages(reference.parameters())
    if case.judge:
        whole = CausalLM(transformers.AutoModelForCausalLM.from_config(other_config(case)))
        state["judges"] = judge_bytes(rank, case, whole.scorer(2).save)
    return state | {"activations": saved_bytes(model, batch.tokens_BT, [*model.parameters(), *model.buffers()], case)}


def saved_bytes(model: Any, tokens: torch.Tensor, weights: Iterable[torch.Tensor], case: Case) -> int:
    """Bytes of the storages, other than weights, that a forward saves for backward. Gathered weights of FSDP2 are left
    out by their sizes: a saved tensor that has the shape of a parameter is one."""
    own = {t.untyped_storage().data_ptr() for t in weights if t.device.type != "meta" and case.ranks == 1}
    shapes = {tuple(p.shape) for p in model.parameters()} | {tuple(p.shape[::-1]) for p in model.parameters()}
    saved: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        gathered = case.ranks > 1 and tuple(tensor.shape) in shapes
        if storage.data_ptr() not in own and not gathered:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    if case.recompute:
        model.inner.train()  # transformers recomputes in training mode alone; there is no dropout
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train_outputs(tokens)
    size = sum(size for size, _ in saved.values())
    if case.recompute:  # the cosines and sines are arguments of the layers, which no hook sees
        head = EXPERTS["head_dim"] if case.family == "qwen3_moe" else OTHER["hidden_size"] // 8
        size += 2 * LENGTH * head * getattr(torch, case.dtype).itemsize
    return size


def predict_other(case: Case) -> dict[str, int]:
    from bessemer.addons.plan import other_memory
    from bessemer.addons.plan.other_models import from_config

    model = from_config(other_config(case).to_dict())
    assert model is not None, "transformers' own config"
    number, moments = getattr(torch, case.dtype).itemsize, getattr(torch, case.moments).itemsize
    kinds = other_memory.training(
        model, case.ranks, ROWS, LENGTH, number, moments, case.recompute, case.lora, on_gpu=False
    )
    reference = number * model.shard(case.ranks) * case.reference
    state = {kind: kinds[kind] for kind in ("weights", "gradients", "masters", "moments", "activations")}
    return state | {"reference": reference, "judges": 4 * model.scorer(case.ranks) * case.judge}


# --- comparison --------------------------------------------------------------------------------------------------


def measure(case: Case) -> dict[str, Any]:
    """Predicted and counted bytes of a case, of the fullest pipeline stage."""
    from ranks import on_ranks

    own = case.family == "deepseek_v3"
    counted = on_ranks(case.ranks, count_own if own else count_other, case)
    rows = []
    for pp in sorted({rank.get("pp", 0) for rank in counted}):
        ranks = [rank for rank in counted if rank.get("pp", 0) == pp]
        kinds = {
            kind: max(rank.get(kind, 0) for rank in ranks) if kind != "activations"
            else sum(rank["activations"] for rank in ranks) // len(ranks)
            for kind in (*STATE, "activations")
        }  # fmt: skip
        predicted = predict_own(case, pp) if own else predict_other(case)
        rows.append((predicted, kinds))
    predicted, kinds = max(rows, key=lambda row: sum(row[0].values()))
    error = sum(predicted.values()) / sum(kinds.values()) - 1
    activations = predicted["activations"] / kinds["activations"] - 1
    return {
        **asdict(case), "predicted": predicted, "counted": kinds, "error": error, "error_activations": activations,
        "passed": max(abs(error), abs(activations)) <= BOUND,
    }  # fmt: skip


def can_run(case: Case) -> bool:
    """Whether this checkout shards models of other families."""
    if case.family == "deepseek_v3" or case.ranks == 1:
        return True
    return find_spec("bessemer.addons.distributed.fsdp") is not None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="only the cases whose names contain one of them")
    words = parser.parse_args().words
    chosen = [case for case in CASES if not words or any(word in case.name for word in words)]
    torch.set_num_threads(1)
    results = []
    for case in chosen:
        if not can_run(case):
            print(f"{case.name:<40} not run: there is no FSDP2 here")
            continue
        result = measure(case)
        results.append(result)
        print(
            f"{case.name:<40}{100 * result['error']:+7.2f} %  activations {100 * result['error_activations']:+7.2f} %"
        )
    earlier = json.loads(RESULTS.read_text())["cases"] if words else []
    by_name = {result["name"]: result for result in [*earlier, *results]}
    cases = [by_name[case.name] for case in CASES if case.name in by_name]
    worst = max(abs(case["error"]) for case in cases)
    facts = {"bound": BOUND, "worst": worst, "rows": ROWS, "length": LENGTH, "cases": cases}
    RESULTS.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"{len(cases)} cases, worst {100 * worst:.2f} %")
    if not all(result["passed"] for result in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
