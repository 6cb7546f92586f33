"""Part 3 of a rehearsal, what remains unproved: whatever the recipe uses on the cluster that no process here has used.

Each line follows from a key of the recipe, from the cluster or from what part 1 left out. A line that a recipe does not
cause is not there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bessemer.addons.distributed import distributed
from bessemer.addons.plan import stage_memory
from bessemer.addons.plan.hardware import RESERVE, ClusterSpec
from bessemer.addons.plan.rehearsal.miniature import AXES, LENGTH
from bessemer.config.recipe import Recipe
from bessemer.config.rl import RLConfig
from bessemer.config.training import OptimizerConfig


def remaining(recipe: Recipe, cluster: ClusterSpec, left_out: list[str], computed: dict[str, Any]) -> list[str]:
    return [*_arithmetic(recipe, cluster), *_ranks(recipe, cluster), *_stages(recipe, left_out), *_sizes(computed)]


def _arithmetic(recipe: Recipe, cluster: ClusterSpec) -> Iterator[str]:
    trained = [stage for stage in recipe.stages if isinstance(stage, OptimizerConfig)]
    if trained:
        yield f"kernels: what {cluster.device.name} computes; the runs were in torch's operations and kernels of a CPU"
    if fp8 := [stage.name for stage in trained if stage.fp8 != "off"]:
        yield f"FP8 ({', '.join(fp8)}): its arithmetic, and rows sent to experts in FP8; the runs were in float32"
    if half := [stage.name for stage in trained if stage.precision != "float32"]:
        yield f"BF16 ({', '.join(half)}): weights and sums in BF16; the runs were in float32"
    if low := [stage.name for stage in trained if stage.moments == "bfloat16"]:
        yield f"moments in BF16 ({', '.join(low)}); those of the runs were in float32"
    if recipe.layout.deterministic:
        yield "deterministic steps: torch's deterministic kernels on the card"


def _ranks(recipe: Recipe, cluster: ClusterSpec) -> Iterator[str]:
    if cluster.size == 1:
        return
    layout, *_ = distributed.layout_of(recipe.layout, cluster.size)
    node = cluster.device.devices
    yield f"NCCL and its streams on {cluster.size:,} ranks; the runs used gloo, where the host waits"
    own = [axis for axis in AXES if getattr(layout, axis) > 2]
    if own:
        sizes = ", ".join(f"{axis} {getattr(layout, axis)}" for axis in own)
        yield f"the sizes {sizes}; the runs had 2 of each"
    if layout.ep > 1 and recipe.layout.exchange != "all-to-all":
        yield 'DeepEP, which [layout] exchange may choose on the cards; the runs exchanged rows by "all-to-all"'
    if cluster.size > node:
        yield f"the fabric between {-(-cluster.size // node):,} machines: bandwidth, congestion, failing links"
    if layout.ep > 1:
        yield "the load of experts: rows and memory of ranks were computed under balanced routing"
    yield "throughput: a plan predicts it (bessemer plan), nothing here measured it"


def _stages(recipe: Recipe, left_out: list[str]) -> Iterator[str]:
    yield from (f"not run: {text}" for text in left_out)
    rl = [stage for stage in recipe.stages if isinstance(stage, RLConfig)]
    if engines := sorted({stage.rollout.engine for stage in rl} - {"local"}):
        yield f"sampling with {', '.join(engines)}, and the way of new weights there; the runs sampled in the trainer"
    if rl:
        names = sorted({name for stage in rl for name in (*stage.tasks, *stage.general_tasks)})
        yield f"tasks and rewards of RL ({len(names)} tasks): the runs rewarded a hash of the answer"
    if hooks := sorted({hook.name for stage in rl for hook in stage.hooks}):
        yield f"hooks of RL: {', '.join(hooks)}"
    if any(stage.reward_models for stage in rl):
        yield "reward models on the ranks of RL"
    if any(stage.advantage.name not in ("group", "batch") for stage in rl):
        yield "RL's advantage, which is not one of the built-in groups: the runs compared samples in groups"
    longest = max((_length(recipe, stage) for stage in recipe.stages if isinstance(stage, OptimizerConfig)), default=0)
    if longest > LENGTH:
        yield f"rows of {longest:,} tokens; those of the runs had {LENGTH}"
    yield "data: no file of the recipe was read, no loss of a trained model was seen"


def _length(recipe: Recipe, stage: OptimizerConfig) -> int:
    cfg, model, _ = stage_memory.network_of(recipe, stage)
    if cfg is None and model is None:
        return 0
    return stage_memory.micro_batch(recipe, stage, cfg.max_seq_len if cfg is not None else 1 << 20)[1]


def _sizes(computed: dict[str, Any]) -> Iterator[str]:
    if any("memory" in stage for stage in computed["stages"]):
        yield (
            f"memory beyond the sums: fragmentation, NCCL's buffers and the context share {RESERVE:.0%} of a card, an "
            "assumption"
        )
    largest = max(
        (stage["checkpoint"]["state_bytes"] for stage in computed["stages"] if "checkpoint" in stage), default=0
    )
    if largest:
        yield f"storage: writing checkpoints of {largest / 1e12:.2f} TB, and reading them back, at the cluster's speed"
