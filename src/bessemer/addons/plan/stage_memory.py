"""What every stage of a recipe needs of a process's memory, and whether the machine that it is for has that.

    training       `plan.memory` for the stage's network on its layout; a model of another family, or a stage that one
                   process runs alone, in one piece
    copies         whole networks beside the trained one: RL's policy gathered on every rank, its reference and that of
                   its checkpoint, a rounded copy for sampling, a critic, teachers
    cache          latents, or keys and values, of the answers that are sampled together; on a GPU one answer, since the
                   engine takes what is left

On a CPU each worker process has gradients and activations of its own. Nothing is allocated: these are sums over shapes.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass

import torch

from bessemer.addons.distributed import distributed, schedules
from bessemer.addons.distributed.mesh import Layout
from bessemer.addons.families.tables import ImportConfig
from bessemer.addons.plan import memory
from bessemer.addons.plan.guess import params
from bessemer.addons.plan.hardware import GIB, RESERVE, Device
from bessemer.addons.plan.memory import NumberFormats
from bessemer.addons.r1.tables import DistillConfig, ExtendConfig, LongEvalConfig, RejectConfig
from bessemer.config.evaluation import EvalConfig
from bessemer.config.recipe import Recipe
from bessemer.config.rl import RLConfig
from bessemer.config.table import StageConfig
from bessemer.config.training import OptimizerConfig, PretrainConfig
from bessemer.errors import UserError
from bessemer.model.accounting import embedding_params, kv_cache_bytes, main_params, mtp_params
from bessemer.model.config import ModelConfig
from bessemer.pipeline.work import PROMPT
from bessemer.system import memory as this_machine
from bessemer.train import lineage, setup

OWN = re.compile(r"deepseek-(v2|v3|r1)|moonlight|kimi-k2", re.IGNORECASE)
OTHER = re.compile(r"distill|qwen|llama", re.IGNORECASE)
"""What the address of a model says about its family before it is downloaded."""
BILLIONS = re.compile(r"(\d+(?:\.\d+)?)b\b", re.IGNORECASE)
"""Its parameters, as in Qwen2.5-Math-7B."""
CERTAIN = ("weights", "gradients", "masters", "moments", "copies")
"""Kinds that follow from shapes alone; the others depend on what a step holds at its peak."""
CHIEF = 3
"""Kinds that a message names."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes of the fullest process of a stage, by kind."""

    stage: str
    ranks: int
    """Processes that hold as much, on one machine or several."""
    bytes: dict[str, int]
    guess: str = ""
    """Where the size of a model that is not here yet is from; "" if its files or [model] tell."""

    @property
    def total(self) -> int:
        return sum(self.bytes.values())

    def chief(self) -> str:
        """The largest kinds, as text."""
        largest = sorted(self.bytes.items(), key=lambda item: -item[1])[:CHIEF]
        return ", ".join(f"{kind} {_amount(size)}" for kind, size in largest if size)

    def describe(self) -> str:
        per = " a rank" if self.ranks > 1 else ""
        return f"memory {_amount(self.total)}{per}: {self.chief()}" + f" ({self.guess})" * bool(self.guess)


@dataclass(frozen=True)
class Room:
    """The memory that a process may use, and whose it is."""

    name: str
    bytes: float
    shared: int = 1
    """Ranks that share the machine's memory."""

    def describe(self) -> str:
        together = " for all of them together" if self.shared > 1 else ""
        return f"{self.name} has {_amount(self.bytes * self.shared)}{together}"

    @classmethod
    def of(cls, device: Device | None, ranks: int) -> Room:
        """Of a rank on a named device, or on this machine, whose processors share its memory among all ranks."""
        if device is not None:
            return cls(device.name, device.room)
        if torch.cuda.is_available():
            total = torch.cuda.get_device_properties(0).total_memory
            return cls(torch.cuda.get_device_name(), (1 - RESERVE) * total)
        return cls("this machine", (this_machine() or float("inf")) / ranks, ranks)


def of_stages(recipe: Recipe, world: int | None = None, device: Device | None = None) -> dict[str, StageMemory]:
    """Stage -> what it needs on `world` ranks (None: as few as [layout] needs), for the stages that hold a model."""
    needs = {}
    for stage in recipe.stages:
        size = _of_stage(recipe, stage, world or recipe.layout.fewest, device)
        if size is not None:
            needs[stage.name] = size
    return needs


def fault(recipe: Recipe, need: StageMemory, device: Device | None, kinds: Collection[str] | None = None) -> str | None:
    """Why a stage cannot run on a device (None: on this machine), with what to do; None if it can. `kinds`: those of
    memory that count, by default all."""
    room = Room.of(device, need.ranks)
    total = sum(size for kind, size in need.bytes.items() if kinds is None or kind in kinds)
    if total <= room.bytes:
        return None
    per = f" on each of {need.ranks:,} ranks" if need.ranks > 1 else ""
    need_text = f'stage "{need.stage}" needs {_amount(total)}{per} ({need.chief()})'
    return f"{need_text}; {room.describe()}; {_advice(recipe, need, device, room)}"


def _advice(recipe: Recipe, need: StageMemory, device: Device | None, room: Room) -> str:
    stage = recipe.stage(need.stage)
    if need.bytes.get("copies", 0) > room.bytes:
        return "every rank holds whole copies of the network, so no layout helps: a smaller model, or larger devices"
    if device is None and not torch.cuda.is_available():
        return "choose a smaller model, or name the devices that it is for: --device H100"
    if need.total - need.bytes.get("activations", 0) - need.bytes.get("working", 0) <= room.bytes:
        return "shorten its rows, lower micro_rows, or set [layout] recompute, or cp, which splits rows over ranks"
    if not isinstance(stage, OptimizerConfig) or (cfg := _network(recipe, stage)[0]) is None:
        return "a smaller model, or larger devices: one process holds it whole"
    if (layout := _nearest(recipe, stage, cfg, device, room)) is not None:
        return f"the smallest [layout] that fits: pp = {layout.pp}, ep = {layout.ep} ({layout.world:,} ranks)"
    return "no [layout] of up to 1,024 ranks fits: a smaller model, shorter rows, or larger devices"


def _nearest(
    recipe: Recipe, stage: OptimizerConfig, cfg: ModelConfig, device: Device | None, room: Room
) -> Layout | None:
    """The layout with the fewest ranks whose fullest one has room."""
    sizes = [(pp, ep) for pp in (1, 2, 4, 8, 16) for ep in (1, 2, 4, 8, 16, 32, 64) if cfg.n_routed_experts % ep == 0]
    for pp, ep in sorted(sizes, key=lambda size: (size[0] * size[1], size[0])):
        if pp * ep <= recipe.layout.fewest or pp > cfg.n_layers // 2:
            continue
        changed = recipe.layout.model_copy(update={"pp": pp, "ep": ep, "dp": 1, "cp": 1, "schedule": "auto"})
        changed_recipe = recipe.model_copy(update={"layout": changed})
        size = _of_stage(changed_recipe, stage, pp * ep, device)
        if size is not None and size.total <= room.bytes:
            return Layout(pp, 1, ep, recipe.layout.node)
    return None


def _of_stage(recipe: Recipe, stage: StageConfig, world: int, device: Device | None) -> StageMemory | None:
    cfg, guess = _network(recipe, stage)
    on_gpu = device is not None or torch.cuda.is_available()
    if isinstance(stage, OptimizerConfig):
        number = 2 if stage.precision == "bfloat16" or (stage.precision != "float32" and on_gpu) else 4
        if cfg is None:
            return _foreign(recipe, stage, number)
        layout, *_ = distributed.layout_of(recipe.layout, world, not isinstance(stage, RLConfig | DistillConfig))
        by_kind = _training(recipe, stage, cfg, layout, number, device)
        by_kind |= _copies(recipe, stage, cfg, layout, number, by_kind)
        by_kind["cache"] = _cache(stage, cfg, number, layout.world)
        return StageMemory(stage.name, world, by_kind, guess)
    if isinstance(stage, RejectConfig | EvalConfig | LongEvalConfig):  # one process holds the whole model
        number = 2 if on_gpu else 4
        count, guess = (_held(cfg), guess) if cfg else _parameters(recipe, _source(stage))
        if not count:
            return None
        cache = _cache(stage, cfg, number, 1) if cfg else 0
        return StageMemory(stage.name, 1, {"weights": number * count, "cache": cache}, guess)
    return None


def _training(
    recipe: Recipe, stage: OptimizerConfig, cfg: ModelConfig, layout: Layout, number: int, device: Device | None
) -> dict[str, int]:
    """Bytes of the fullest rank's part of a training, by kind."""
    on_gpu = device is not None or torch.cuda.is_available()
    packed = bool(getattr(stage, "document_mask", not isinstance(stage, RLConfig | DistillConfig)))
    padded = number == 2 and device is not None and (packed or not device.cudnn)
    rows, length = _micro_batch(recipe, stage, cfg)
    name, micro = schedules.of_step(recipe.layout.schedule, layout.pp, 2 * layout.pp)
    moments = 2 if stage.moments == "bfloat16" else 4
    numbers = NumberFormats(number, moments, stage.fp8 != "off", on_gpu, stage.optimizer == "muon", padded)
    table = schedules.schedule(name, layout.pp, micro)
    room = Room.of(device, layout.world).bytes if on_gpu else None
    ranks = memory.per_rank(cfg, layout, table, rows, length, numbers, recipe.layout.recompute, room=room)
    by_kind = max(ranks, key=lambda kinds: sum(kinds.values()))
    workers = 1 if on_gpu or layout.world > 1 else setup.workers().n
    if layout.world == 1:  # no share of a sum over ranks beside them
        by_kind = by_kind | {"gradients": by_kind["gradients"] // 2}
    return {k: size * (workers if k in ("gradients", "activations", "working") else 1) for k, size in by_kind.items()}


def _micro_batch(recipe: Recipe, stage: OptimizerConfig, cfg: ModelConfig) -> tuple[int, int]:
    """(rows, tokens of a row) of a forward pass."""
    if isinstance(stage, RLConfig | DistillConfig):
        cap = max(stage.max_new_tokens.values) if isinstance(stage, RLConfig) else stage.max_new_tokens
        length = int(min(cap + PROMPT, cfg.max_seq_len))
        return max(1, stage.micro_tokens // length), length
    if isinstance(stage, ExtendConfig):
        return stage.micro_rows, stage.length
    corpus = getattr(stage, "corpus", None) or stage.source
    of_corpus = getattr(recipe.stage(corpus) if corpus else None, "row_length", cfg.max_seq_len)
    return stage.micro_rows, int(getattr(stage, "row_length", of_corpus))


def _copies(
    recipe: Recipe, stage: OptimizerConfig, cfg: ModelConfig, layout: Layout, number: int, trained: dict[str, int]
) -> dict[str, int]:
    """Whole networks beside the trained one, in bytes."""
    whole, gathered = number * _held(cfg), (layout.pp, layout.ep) != (1, 1)
    if isinstance(stage, DistillConfig):
        teachers = len({*stage.teachers.values(), *([stage.teacher] if stage.teacher else [])})
        return {"copies": whole * gathered + teachers * trained["weights"]}
    if not isinstance(stage, RLConfig):
        return {"copies": 0}
    copies = whole * gathered
    copies += (
        2 * whole * (stage.kl.weight > 0 and stage.lora is None)
    )  # the reference, and what its checkpoint keeps of it
    copies += 2 * _held(cfg) * (stage.rollout.precision == "bfloat16" and number == 4)
    if stage.advantage.name == "critic":  # a score in place of the head, no MTP modules
        own = sum(trained[kind] for kind in ("weights", "gradients", "masters", "moments"))
        head = 0 if cfg.tie_embeddings else embedding_params(cfg)
        copies += own * (main_params(cfg) - head) // _held(cfg)
    return {"copies": copies}


def _held(cfg: ModelConfig) -> int:
    """Parameters in memory: MTP modules share embedding and head."""
    return main_params(cfg) + mtp_params(cfg)


def _cache(stage: StageConfig, cfg: ModelConfig, number: int, ranks: int) -> int:
    """Bytes of what the engine stores of the answers that it samples together."""
    if isinstance(stage, RLConfig):
        if stage.rollout.engine != "local":
            return 0  # workers of their own sample
        answers, cap = stage.prompts_per_rollout * stage.samples, max(stage.max_new_tokens.values)
        rows = setup.batch_rows(answers)
    elif isinstance(stage, DistillConfig | RejectConfig | EvalConfig):
        answers, cap = getattr(stage, "prompts_per_step", 64) * stage.samples, stage.max_new_tokens
        rows = setup.batch_rows(answers)
    elif isinstance(stage, LongEvalConfig):
        answers, cap, rows = 1, max(stage.lengths), 1
    else:
        return 0
    rows = max(1, min(rows, answers) // ranks)
    return int(rows * min(cap + PROMPT, cfg.max_seq_len) * kv_cache_bytes(cfg, number))


def _foreign(recipe: Recipe, stage: OptimizerConfig, number: int) -> StageMemory | None:
    """A model of another family is trained by one process; activations are not counted."""
    count, guess = _parameters(recipe, stage.source)
    if not count:
        return None
    lora = getattr(stage, "lora", None) is not None
    by_kind = {"weights": number * count}
    if not lora:
        by_kind |= {"gradients": 4 * count, "masters": 4 * count * (number < 4), "moments": 8 * count}
    if isinstance(stage, RLConfig) and stage.kl.weight > 0 and not lora:
        by_kind["copies"] = 2 * number * count
    return StageMemory(stage.name, 1, by_kind, guess)


def refused_layout(recipe: Recipe, stage: StageConfig, world: int | None = None) -> str | None:
    """Why a stage cannot be run on the ranks of [layout]: its model is of another family. None if it can."""
    ranks, origin = world or recipe.layout.fewest, lineage.origin(recipe, _source(stage))
    if ranks == 1 or recipe.layout.fewest == 1 or not isinstance(stage, OptimizerConfig):
        return None
    if not isinstance(origin, ImportConfig) or _is_own_family(recipe, origin):
        return None
    return (
        f'stage "{stage.name}" trains {origin.model}, which is not of the DeepSeek V3 family, and [layout] splits '
        f"it over {recipe.layout.fewest} ranks; train it in a run of its own without [layout]"
    )


def _is_own_family(recipe: Recipe, origin: ImportConfig) -> bool:
    """Whether an imported model is of the V3 family: by its config if it is here, otherwise by its address."""
    if lineage.imported_config(recipe, origin.name) is not None:
        return lineage.config_of(recipe, origin.name) is not None
    return bool(OWN.search(origin.model)) and not OTHER.search(origin.model)


def _network(recipe: Recipe, stage: StageConfig) -> tuple[ModelConfig | None, str]:
    """(network of a stage, `StageMemory.guess`); None for another family."""
    name = stage.name if isinstance(stage, PretrainConfig) else _source(stage)
    if (cfg := lineage.config_of(recipe, name)) is not None:
        return cfg, ""
    origin = lineage.origin(recipe, name)
    if isinstance(origin, ImportConfig) and _is_own_family(recipe, origin):
        with suppress(UserError):
            return setup.model_config(recipe), "as if its model were [model]"
    return None, ""


def _source(stage: StageConfig) -> str | None:
    """The stage whose model a stage holds; of several models, which are loaded one after the other, the first."""
    models = getattr(stage, "models", None)
    return models[0] if models else stage.source


def _parameters(recipe: Recipe, name: str | None) -> tuple[int, str]:
    """(parameters of a model of another family, `StageMemory.guess`): from its files, else from its address; 0 if
    neither tells."""
    if counted := params(recipe, name):
        return int(counted), ""
    origin = lineage.origin(recipe, name)
    match = BILLIONS.search(origin.model) if isinstance(origin, ImportConfig) else None
    return (int(1e9 * float(match[1])), "by its model's name") if match else (0, "")


def _amount(size: float) -> str:
    return f"{size / GIB:,.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:,.0f} MiB"
