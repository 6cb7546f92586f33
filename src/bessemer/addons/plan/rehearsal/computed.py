"""Part 2 of a rehearsal, what was computed for the full size: nothing here has run.

divisibility    layers by pp, experts by ep, rows by pipelines, row lengths by cp
memory          of every rank of every stage (`stage_memory`), against the card
tables          of every pipeline that a step runs: complete and free of deadlock (`table.check`)
messages        of a rank in the middle of the pipeline in a stage's largest step, by axis: how many, and bytes. Rows
                for experts are counted under balanced routing
checkpoints     bytes on disk
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from bessemer.addons.distributed import distributed, mesh, schedules, table
from bessemer.addons.distributed.mesh import Layout
from bessemer.addons.distributed.model_slice import cut
from bessemer.addons.distributed.table import Table, actions
from bessemer.addons.plan import stage_memory
from bessemer.addons.plan.hardware import GIB, ClusterSpec
from bessemer.addons.plan.stage_memory import StageMemory
from bessemer.addons.plan.step_time import kept_table, links
from bessemer.addons.plan.training_setup import ModelShape, Setup
from bessemer.addons.r1.tables import DistillConfig
from bessemer.config.recipe import Recipe
from bessemer.config.rl import RLConfig
from bessemer.config.training import OptimizerConfig, PretrainConfig
from bessemer.errors import UserError
from bessemer.model.accounting import main_params, mtp_params
from bessemer.model.config import ModelConfig

FLOAT = 4
"""Bytes of a master weight, and of a gradient in a sum."""


def compute(recipe: Recipe, cluster: ClusterSpec) -> dict[str, Any]:
    """The facts of every stage that holds a model; "faults" are reasons to refuse."""
    faults: list[str] = []
    facts: dict[str, Any] = {"stages": [], "faults": faults}
    layout, *_ = distributed.layout_of(recipe.layout, cluster.size)
    facts["layout"] = {"pp": layout.pp, "dp": layout.dp, "ep": layout.ep, "cp": layout.cp, "node": layout.node}
    if layout.world != cluster.size:
        more = " or a multiple" if recipe.layout.dp == "auto" else ""
        faults.append(f"[layout] makes {recipe.layout.fewest:,} ranks{more}, not the {cluster.size:,} of the cluster")
        return facts
    needs = stage_memory.of_stages(recipe, cluster.size, cluster.device)
    for stage in recipe.stages:
        own: dict[str, Any] = {"stage": stage.name, "kind": stage.kind, "faults": []}
        if isinstance(stage, OptimizerConfig):
            try:
                own |= _of_training(recipe, stage, layout, cluster)
            except UserError as error:
                own["faults"].append(str(error))
        if (need := needs.get(stage.name)) is None:
            if isinstance(stage, OptimizerConfig):
                own["unknown"] = "the shape of its network is unknown before it is downloaded"
                facts["stages"].append(own)
            continue
        by_rank = [need]
        if isinstance(stage, OptimizerConfig):
            by_rank = stage_memory.by_rank(recipe, stage, cluster.size, cluster.device)
        own["memory"] = memory_of(by_rank, layout, cluster)
        own["guess"] = need.guess
        if fault := stage_memory.fault(recipe, need, cluster.device):
            own["faults"].append(_over(own["memory"]) + fault)
            own["help"] = what_helps(recipe, stage, cluster) if isinstance(stage, OptimizerConfig) else []
            if own["help"]:
                own["faults"][-1] += f"; of twice as many ranks, {'; '.join(own['help'])}"
        facts["stages"].append(own)
        faults += own["faults"]
    return facts


def memory_of(needs: list[StageMemory], layout: Layout, cluster: ClusterSpec) -> dict[str, Any]:
    """GiB of every rank by kind. Ranks of one pipeline rank hold the same."""
    room, each = cluster.device.room / GIB, cluster.size // max(1, len(needs))
    rows = [
        {"ranks": [rank * each, (rank + 1) * each - 1] if need.ranks > 1 else [0, 0], "gib": need.total / GIB,
         "kinds": {kind: size / GIB for kind, size in need.bytes.items()}}
        for rank, need in enumerate(needs)
    ]  # fmt: skip
    facts: dict[str, Any] = {"room_gib": room, "card_gib": cluster.device.memory, "by_rank": rows}
    if needs[0].worker_bytes:
        facts["workers"] = {"devices": needs[0].workers, "gib_each": sum(needs[0].worker_bytes.values()) / GIB}
    return facts


def _over(memory: dict[str, Any]) -> str:
    """Which ranks exceed the card by how much; "" if none does."""
    over = [row for row in memory["by_rank"] if row["gib"] > memory["room_gib"]]
    if not over:
        return ""
    runs: list[list[int]] = []
    for first, last in (row["ranks"] for row in over):
        if runs and runs[-1][1] == first - 1:
            runs[-1][1] = last
        else:
            runs.append([first, last])
    ranks = ", ".join(f"{first:,} to {last:,}" for first, last in runs)
    worst = max(over, key=lambda row: row["gib"])
    first, last = worst["ranks"]
    excess = worst["gib"] - memory["room_gib"]
    return f"ranks {ranks} do not fit, and {first:,} to {last:,} exceed a card by {excess:,.1f} GiB: "


def what_helps(recipe: Recipe, stage: OptimizerConfig, cluster: ClusterSpec) -> list[str]:
    """What twice as many ranks along each axis would take from the fullest rank, the most first."""
    own, cfg = recipe.layout, stage_memory.network_of(recipe, stage)[0]
    dp = cluster.size // (own.pp * own.ep * own.cp)
    before = stage_memory.of_stages(recipe, cluster.size, cluster.device)[stage.name].total
    found = []
    for axis in ("pp", "ep", "cp", "dp") if cfg is not None else ("dp",):
        sizes = {"pp": own.pp, "ep": own.ep, "cp": own.cp, "dp": dp}
        sizes[axis] *= 2
        changed = recipe.model_copy(update={"layout": own.model_copy(update=sizes)})
        world = math.prod(sizes.values())
        layout, _, slices = distributed.layout_of(changed.layout, world)
        if cfg is not None and mesh.refusal(layout, cfg, world, slices):
            continue
        after = stage_memory.of_stages(changed, world, cluster.device)[stage.name].total
        if after < 0.99 * before:
            found.append((after, f"{axis} = {sizes[axis]} saves {(before - after) / GIB:,.1f} GiB"))
    return [text for _, text in sorted(found)]


def _of_training(recipe: Recipe, stage: OptimizerConfig, layout: Layout, cluster: ClusterSpec) -> dict[str, Any]:
    """What does not depend on the card's memory. UserError for what is impossible."""
    cfg, model, _ = stage_memory.network_of(recipe, stage)
    moments = 2 if stage.moments == "bfloat16" else 4
    kept = FLOAT + 2 * moments + FLOAT * (stage.ema_decay > 0)
    if cfg is None:
        if model is None:
            return {}
        rows = stage_memory.step_rows(stage, cluster.size)
        notes = [*filter(None, [distributed.without_rows(rows, cluster.size)])]
        n = cluster.size
        sent = {"dp": {"messages": 3 * (model.layers + 1),
                       "bytes": int((2 * 2 + FLOAT) * model.count() * (n - 1) / n)}}  # fmt: skip
        return {"checkpoint": _checkpoint(model.count(), kept), "notes": notes,
                "messages": {"per": "micro-batch", "axes": sent if n > 1 else {}}}  # fmt: skip
    split = not isinstance(stage, DistillConfig)
    layout, schedule, slices = distributed.layout_of(recipe.layout, cluster.size, split)
    headed = mesh.headed(cfg)
    mesh.check(layout, cfg if not hasattr(stage, "aim") else headed, cluster.size, slices)
    steps, rl = list(_rows_of_steps(stage, cluster.size)), isinstance(stage, RLConfig)
    distributed.check(recipe, stage.name, () if rl else steps, cfg, cluster.size, split_rows=split)
    rows, length = stage_memory.micro_batch(recipe, stage, cfg.max_seq_len)
    if layout.cp > 1:
        length += -length % (2 * layout.cp)
    pipelines = layout.dp * layout.ep
    tables, notes = {}, [*filter(None, [distributed.without_rows(min(steps), pipelines, "pipelines")])]
    for size in steps:
        n = int(size)
        own = min(rows, max(1, n // pipelines))
        name, micro = schedules.of_step(schedule, layout.pp, math.ceil(n / (pipelines * own)))
        tables[name, micro] = (kept_table(name if schedule != "auto" else "auto", layout.pp, micro), own)
        if n >= pipelines and n % (pipelines * micro * own):
            notes.append(f"a step of {n:,} rows fills {micro} micro-batches of {pipelines} pipelines unevenly")
    checked = [checked_table(one) for one, _ in tables.values()]
    largest, own_rows = max(tables.values(), key=lambda item: item[0].micro)
    held = [len(layers) for layers in cut(cfg, largest.stages)]
    divided = {"layers_by_stage": held, "experts_per_rank": cfg.n_routed_experts // layout.ep, "pipelines": pipelines,
               "rows_per_micro_batch": own_rows, "tokens_per_rank": own_rows * length // layout.cp}  # fmt: skip
    setup = Setup(
        ModelShape.of(cfg), layout, cluster.device, largest.name, largest.micro, own_rows, length,
        stage.fp8 != "off", bool(cfg.n_mtp), tuple(recipe.layout.recompute), cp=layout.cp,
        muon=stage.optimizer == "muon", moments=moments,
    )  # fmt: skip
    return {
        "divided": divided, "tables": checked, "notes": notes,
        "messages": {"per": "step", "axes": messages(setup, cfg, largest)},
        "checkpoint": _checkpoint(main_params(cfg) + mtp_params(cfg), kept),
    }  # fmt: skip


def _rows_of_steps(stage: OptimizerConfig, otherwise: float) -> Iterable[float]:
    """Rows of a stage's steps of different sizes."""
    if isinstance(stage, PretrainConfig):
        return sorted({round(rows) for rows in stage.batch_rows.values})
    rows = stage_memory.step_rows(stage, otherwise)
    return [
        stage.prompts_per_rollout * stage.samples / stage.updates_per_rollout if isinstance(stage, RLConfig) else rows
    ]


def checked_table(one: Table) -> dict[str, Any]:
    """Facts of a table that is complete and free of deadlock; UserError for another."""
    try:
        table.check(one)
    except AssertionError as error:
        raise UserError(
            f"the table of {one.name} on {one.ranks} ranks with {one.micro} micro-batches: {error}"
        ) from None
    steps = sum(len(steps) for steps in one.steps)
    return {"schedule": one.name, "ranks": one.ranks, "micro_batches": one.micro, "stages": one.stages,
            "actions": sum(1 for steps in one.steps for _ in actions(steps)), "steps": steps}  # fmt: skip


def messages(setup: Setup, cfg: ModelConfig, one: Table) -> dict[str, dict[str, int]]:
    """Axis -> messages and bytes that a rank in the middle of the pipeline gives in a step."""
    layout, rank = setup.layout, one.ranks // 2
    sent = links(setup, one)
    axes: dict[str, dict[str, int]] = {}
    if layout.pp > 1:
        number = sum(_leaves(one, action) for action in actions(one.steps[rank]))
        axes["pp"] = {"messages": number, "bytes": int(number * setup.tokens * cfg.dim * 2)}
    cuts = cut(cfg, one.stages)
    stages = [stage for _, stage in one.slices_on(rank)]
    mtp = cfg.n_mtp * (one.stages - 1 in stages)
    layers = sum(len(cuts[stage]) for stage in stages) + mtp
    sparse = sum(i >= cfg.n_dense_layers for stage in stages for i in cuts[stage]) + mtp
    if layout.ep > 1:
        hops = 2 if layout.nodes > 1 else 1
        size = sum(value for name, value in sent.items() if name.startswith("exchange"))
        axes["ep"] = {"messages": 4 * hops * sparse * one.per_lane, "bytes": int(size)}
    if layout.cp > 1:
        width = cfg.kv_lora_rank + cfg.qk_rope_head_dim
        again = 3 if "attend" in setup.recompute else 2
        whole = setup.rows * setup.length * width
        size = again * 2 * whole / layout.cp + FLOAT * whole
        axes["cp"] = {"messages": (again + 1) * layers * one.per_lane, "bytes": int(layers * one.per_lane * size)}
    if setup.ranks > 1:
        axes["dp"] = {"bytes": int(sent["gradients and weights"])}
    return axes


def _leaves(one: Table, action: table.Action) -> bool:
    """Whether the result of an action goes to another rank."""
    place = one.place[action.lane]
    to = action.stage + (1 if action.kind == "F" else -1)
    return action.kind != "W" and 0 <= to < one.stages and place[to] != place[action.stage]


def _checkpoint(params: int, kept: int) -> dict[str, int]:
    """Bytes of what a run resumes from, and of the model that a stage hands on (BF16)."""
    return {"state_bytes": params * kept, "model_bytes": 2 * params}
