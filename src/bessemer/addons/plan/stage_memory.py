"""What every stage of a recipe needs of a process's memory, and whether the machine that it is for has that.

    training       `plan.memory` for the stage's network on its layout, or `plan.other_memory` for a model of another
                   family, which several ranks shard (FSDP2)
    beside it      RL's reference and reward models, sharded like the policy; a critic; teachers; a rounded copy for
                   sampling
    sampling       the whole network gathered from its shards, if the trainer's own processes sample; the cache of the
                   answers that are sampled together; vLLM on the trainer's GPUs; one tensor on its way to a sampler
    workers        processes elsewhere that sample: weights, and the cache of one answer

Updates and sampling take turns, so what only one of the two needs is there once: the larger of the two. On a CPU each
worker process has gradients and activations of its own. Nothing is allocated: these are sums over shapes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import product

import torch

from bessemer.addons.distributed import distributed, mesh, schedules
from bessemer.addons.distributed.mesh import Layout
from bessemer.addons.distributed.ray_settings import VLLMSettings
from bessemer.addons.families import own_lora
from bessemer.addons.families.tables import ImportConfig
from bessemer.addons.plan import memory, other_memory, other_models
from bessemer.addons.plan.guess import params
from bessemer.addons.plan.hardware import GIB, RESERVE, Device
from bessemer.addons.plan.memory import NumberFormats
from bessemer.addons.plan.other_models import OtherModel
from bessemer.addons.r1.tables import DistillConfig, ExtendConfig, LongEvalConfig, RejectConfig
from bessemer.config.evaluation import EvalConfig
from bessemer.config.recipe import LayoutConfig, Recipe
from bessemer.config.rl import RLConfig
from bessemer.config.table import StageConfig
from bessemer.config.training import OptimizerConfig, PretrainConfig
from bessemer.errors import UserError
from bessemer.model.accounting import embedding_params, kv_cache_bytes, main_params, mtp_params
from bessemer.model.config import ModelConfig, preset
from bessemer.model.layer import PHASES
from bessemer.pipeline.work import PROMPT
from bessemer.system import memory as this_machine
from bessemer.train import lineage, setup

PUBLISHED = {
    "v2-lite": r"deepseek-(coder-)?v2-lite",
    "moonlight": r"moonlight-16b",
    "v3": r"deepseek-(v3|r1)(?!.*distill)",
}
"""Presets, and the addresses of the models that have their shape."""
BILLIONS = re.compile(r"(\d+(?:\.\d+)?)b\b", re.IGNORECASE)
"""A model's parameters, as in Qwen2.5-Math-7B."""
KINDS = (
    "weights", "gradients", "masters", "moments", "routing", "operands", "reference", "critic", "teachers", "judges",
    "rounded",
    "activations", "working", "gathered", "cache", "engine", "exchange",
)  # fmt: skip
UPDATING, SAMPLING = ("activations", "working"), ("gathered", "cache", "engine", "exchange")
"""Kinds that only updates need, and those that only sampling needs."""
GUESSED = ("operands", "activations", "working", "cache", "engine", "exchange")
"""Kinds that depend on what a step holds at its peak; the others follow from shapes alone."""
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
    workers: int = 0
    """Devices elsewhere that sample for the stage."""
    worker_bytes: dict[str, int] = field(default_factory=dict)
    """What each device that samples holds at least, elsewhere or as a share of the trainer's (`engine`)."""

    @property
    def total(self) -> int:
        """Bytes at the stage's fullest moment."""
        return self.total_of(self.bytes)

    def total_of(self, kinds: Collection[str]) -> int:
        """Those of these kinds alone."""

        def sum_of(some: Collection[str]) -> int:
            return sum(size for kind, size in self.bytes.items() if kind in some and kind in kinds)

        held = {*self.bytes} - {*UPDATING, *SAMPLING}
        return sum_of(held) + max(sum_of(UPDATING), sum_of(SAMPLING))

    def chief(self) -> str:
        """The largest kinds, as text."""
        largest = sorted(self.bytes.items(), key=lambda item: -item[1])[:CHIEF]
        return ", ".join(f"{kind} {_amount(size)}" for kind, size in largest if size)

    def describe(self) -> str:
        per = " a rank" if self.ranks > 1 else ""
        parts = [f"{_amount(self.total)}{per}: {self.chief()}"] if self.bytes else []
        if self.workers:
            parts.append(f"{_amount(sum(self.worker_bytes.values()))} on each device of {self.workers:,} that sample")
        return f"memory {'; '.join(parts)}" + f" ({self.guess})" * bool(self.guess)

    def facts(self) -> dict[str, object]:
        """As JSON, in bytes."""
        facts: dict[str, object] = {"ranks": self.ranks, "total": self.total, "bytes": self.bytes}
        if self.worker_bytes:
            facts |= {"workers": self.workers, "worker_bytes": self.worker_bytes}
        return facts | ({"guess": self.guess} if self.guess else {})


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


def fault(
    recipe: Recipe, need: StageMemory, device: Device | None, certain: bool = False, other: Device | None = None
) -> str | None:
    """Why a stage cannot run on a device (None: on this machine), with what to do; None if it can. `certain`: only what
    follows from shapes counts. `other`: the device of the workers, by default the same."""
    room = Room.of(device, need.ranks)
    total = need.total_of({*need.bytes} - {*GUESSED}) if certain else need.total
    per = f" on each of {need.ranks:,} ranks" if need.ranks > 1 else ""
    if total > room.bytes:
        need_text = f'stage "{need.stage}" needs {_amount(total)}{per} ({need.chief()})'
        return f"{need_text}; {room.describe()}; {_advice(recipe, need, device, room)}"
    each = sum(need.worker_bytes.values())
    parts = ", ".join(f"{kind} {_amount(size)}" for kind, size in need.worker_bytes.items())
    if 0 < (engine := need.bytes.get("engine", 0)) < each:
        return (
            f'stage "{need.stage}": vLLM gets {_amount(engine)} of a device and needs {_amount(each)} ({parts}); raise '
            "rollout.gpu_memory_utilization, or rollout.gpus, over which a copy of the model is spread"
        )
    where = other or device
    if need.workers and where is not None and each > where.room:
        return (
            f'stage "{need.stage}" samples on devices that need {_amount(each)} each ({parts}); {where.name} has '
            f"{_amount(where.room)}; spread a copy of the model over more of them: rollout.gpus"
        )
    return None


def table(needs: Iterable[StageMemory]) -> list[str]:
    """The stages as lines of text: GiB of the fullest device by kind, and in all."""
    needs = [need for need in needs if need.bytes]
    kinds = [kind for kind in KINDS if any(need.bytes.get(kind, 0) >= GIB / 20 for need in needs)]
    width = max([5, *(len(need.stage) for need in needs)])
    lines = ["  ".join([f"{'stage':<{width}}", *kinds, "in all"])]
    for need in needs:
        sizes = [f"{need.bytes.get(kind, 0) / GIB:{len(kind)}.1f}" for kind in kinds]
        lines.append("  ".join([f"{need.stage:<{width}}", *sizes, f"{need.total / GIB:6.1f}"]))
    return lines


def _advice(recipe: Recipe, need: StageMemory, device: Device | None, room: Room) -> str:
    stage = recipe.stage(need.stage)
    held = need.total_of({*need.bytes} - {*UPDATING, *SAMPLING})
    if device is None and not torch.cuda.is_available():
        return "choose a smaller model, or name the devices that it is for: --device H100"
    if held <= room.bytes < held + need.bytes.get("gathered", 0):
        return 'sampling gathers the whole network; let others sample: [stage.rollout] engine = "vllm"'
    if held + need.bytes.get("engine", 0) > room.bytes >= held and need.bytes.get("engine", 0):
        return "lower rollout.gpu_memory_utilization, or give vLLM devices of its own: rollout.sleep = false"
    if isinstance(stage, RejectConfig | EvalConfig):
        gpus = 1 << math.ceil(math.log2(max(2.0, need.total / room.bytes)))
        settings = f'rollout = {{ engine = "vllm", gpus = {gpus} }}'
        return f"one process holds it whole; let vLLM sample, a copy on {gpus} devices: {settings}"
    if not isinstance(stage, OptimizerConfig):
        return "one process holds it whole: a smaller model, or larger devices"
    if (layout := nearest(recipe, stage, device, room)) is not None:
        return f"the smallest [layout] that fits{layout}"
    if held <= room.bytes:
        ways = ["shorten its rows", "lower micro_rows or micro_tokens"]
        ways += [] if recipe.layout.recompute else ["set [layout] recompute"]
        ways += ["or raise cp, which splits rows"] if network_of(recipe, stage)[0] is not None else []
        return ", ".join(ways)
    return "no [layout] that was tried fits: a smaller model, shorter rows, or larger devices"


def nearest(recipe: Recipe, stage: OptimizerConfig, device: Device | None, room: Room | None = None) -> str | None:
    """The layout with the fewest ranks on which a stage fits, as text; one on which all stages do, if there is any."""
    room = room or Room.of(device, 1)
    trained = [other for other in recipe.stages if isinstance(other, OptimizerConfig)]
    fits_alone = None
    for layout in _layouts(recipe.layout, stage, network_of(recipe, stage)[0], room.bytes):
        changed = recipe.model_copy(update={"layout": layout})

        def fits(other: OptimizerConfig, changed: Recipe = changed) -> bool:
            size = _of_stage(changed, other, changed.layout.fewest, device)
            return size is None or size.total <= room.bytes

        if layout == recipe.layout or not fits(stage):
            continue
        sizes = {"pp": layout.pp, "ep": layout.ep, "cp": layout.cp, "dp": 1 if layout.dp == "auto" else layout.dp}
        named = [f"{key} = {value}" for key, value in sizes.items() if value > 1]
        named += [f"recompute = {layout.recompute}".replace("'", '"')] if layout.recompute else []
        text = f"{', '.join(named) or 'one rank'} ({layout.fewest:,} ranks)"
        if all(map(fits, trained)):
            return f": {text}"
        fits_alone = fits_alone or f" this stage: {text}"
    return fits_alone


def _layouts(own: LayoutConfig, stage: OptimizerConfig, cfg: ModelConfig | None, room: float) -> Iterator[LayoutConfig]:
    """Layouts to try: the recipe's with more recomputation, then others, those of few ranks first."""
    more = sorted({*own.recompute, "attend", "experts"})
    recomputed = [own.recompute] if getattr(stage, "fp8", "off") != "off" else [own.recompute, more, [*PHASES]]
    yield from (own.model_copy(update={"recompute": phases}) for phases in recomputed)
    tried = [{"pp": 1, "ep": 1, "cp": 1, "dp": 1 << n} for n in range(11)] if cfg is None else []
    if cfg is not None:
        least = 6 * main_params(cfg) / room  # weights and gradients of the experts, which no data parallelism divides
        splits = product((1, 2, 4, 8, 16) if cfg.kv_lora_rank else (1,), (1, 2, 4, 8, 16), (1, 2, 4, 8, 16, 32, 64))
        for cp, pp, ep in sorted(splits, key=lambda split: (math.prod(split), split)):
            if pp * ep >= least and cfg.n_routed_experts % ep == 0 and pp <= max(1, cfg.n_layers // 2):
                tried.append({"pp": pp, "ep": ep, "cp": cp, "dp": 1})
    for sizes in tried:
        schedule = own.schedule if sizes["pp"] > 1 else "auto"
        for phases in recomputed:
            yield own.model_copy(update=sizes | {"schedule": schedule, "recompute": phases})


def by_rank(recipe: Recipe, stage: OptimizerConfig, world: int, device: Device | None) -> list[StageMemory]:
    """What a stage needs on every pipeline rank; of ranks that all hold the same, once. [] if nothing tells."""
    pipeline = recipe.layout.pp if network_of(recipe, stage)[0] is not None else 1
    needs = (_of_stage(recipe, stage, world, device, rank) for rank in range(pipeline))
    return [need for need in needs if need is not None]


def _of_stage(
    recipe: Recipe, stage: StageConfig, world: int, device: Device | None, rank: int | None = None
) -> StageMemory | None:
    """`rank`: the pipeline rank; None: the fullest one."""
    cfg, model, guess = network_of(recipe, stage)
    on_gpu = device is not None or torch.cuda.is_available()
    if isinstance(stage, OptimizerConfig):
        number = 2 if stage.precision == "bfloat16" or (stage.precision != "float32" and on_gpu) else 4
        if cfg is None and model is None:
            return _by_count(recipe, stage, number, world)
        judges = _judges(recipe, stage, world, 2 if on_gpu else 4)
        if cfg is not None:
            layout, *_ = distributed.layout_of(recipe.layout, world, not isinstance(stage, DistillConfig))
            by_kind = _training(recipe, stage, cfg, layout, number, device, judges, rank)
            by_kind |= _beside(recipe, stage, cfg, layout, number, by_kind, on_gpu)
        else:
            assert model is not None
            by_kind = _other_training(recipe, stage, model, world, number, on_gpu) | {"judges": max(judges)}
        n_params, largest = _sizes(cfg, model)
        by_kind |= _sampling(stage, cfg, model, number, world, device)
        if isinstance(stage, RLConfig) and (stage.rollout.engine != "local" or by_kind.get("gathered")):
            by_kind["exchange"] = number * largest
        workers, worker_bytes = _workers(stage, cfg, model, n_params)
        return StageMemory(stage.name, world, {k: v for k, v in by_kind.items() if v}, guess, workers, worker_bytes)
    if isinstance(stage, RejectConfig | EvalConfig | LongEvalConfig):
        number = 2 if on_gpu else 4
        count = _sizes(cfg, model)[0]
        if not count:
            count, guess = _parameters(recipe, _source(stage))
        if not count:
            return None
        settings = getattr(stage, "rollout", None)
        if settings is not None and settings.engine != "local":
            workers, worker_bytes = _workers(stage, cfg, model, count)
            return StageMemory(stage.name, 1, {}, guess, workers, worker_bytes)
        cache = _cache(stage, cfg, model, number, 1)
        return StageMemory(stage.name, 1, {"weights": number * count, "cache": cache}, guess)
    return None


def _sizes(cfg: ModelConfig | None, model: OtherModel | None) -> tuple[int, int]:
    """(parameters in memory, those of the largest tensor)."""
    if cfg is not None:
        experts = 2 * cfg.n_routed_experts * cfg.moe_inter_dim * cfg.dim if cfg.n_dense_layers < cfg.n_layers else 0
        return main_params(cfg) + mtp_params(cfg), max(cfg.vocab_size * cfg.dim, experts)
    if model is not None:
        return model.count(), model.largest()
    return 0, 0


def _training(
    recipe: Recipe, stage: OptimizerConfig, cfg: ModelConfig, layout: Layout, number: int, device: Device | None,
    judges: list[int], rank: int | None = None,
) -> dict[str, int]:  # fmt: skip
    """Bytes of a pipeline rank's part of a training, by kind, by default the fullest one's; `judges`: of reward models
    by pipeline rank."""
    on_gpu = device is not None or torch.cuda.is_available()
    packed = bool(getattr(stage, "document_mask", True))
    padded = number == 2 and device is not None and (packed or not device.cudnn)
    rows, length = micro_batch(recipe, stage, cfg.max_seq_len)
    name, micro = schedules.of_step(recipe.layout.schedule, layout.pp, 2 * layout.pp)
    moments = 2 if stage.moments == "bfloat16" else 4
    numbers = NumberFormats(number, moments, stage.fp8 != "off", on_gpu, stage.optimizer == "muon", padded)
    table = schedules.schedule(name, layout.pp, micro)
    room = Room.of(device, layout.world).bytes if on_gpu else None
    ranks = memory.per_rank(cfg, layout, table, rows, length, numbers, recipe.layout.recompute, room=room)
    ranks = [kinds | {"judges": size} for kinds, size in zip(ranks, judges, strict=True)]
    by_kind = ranks[rank] if rank is not None else max(ranks, key=lambda kinds: sum(kinds.values()))
    by_kind = memory.of_process(by_kind, layout)
    workers = 1 if on_gpu or layout.world > 1 else setup.workers().n
    if (lora := getattr(stage, "lora", None)) is not None:
        adapters, adapted = own_lora.sizes(cfg, lora, stage.name)
        by_kind = by_kind | {
            "weights": by_kind["weights"] + number * (adapters + adapted * hasattr(stage, "rollout")),  # and sampled
            "gradients": 4 * adapters,
            "masters": 4 * adapters * (number < 4), "moments": 2 * moments * adapters,
            "activations": by_kind["activations"] + number * adapted,  # the sums of matrices and adapters
        }  # fmt: skip
    return {k: size * (workers if k in ("gradients", "activations", "working") else 1) for k, size in by_kind.items()}


def _other_training(
    recipe: Recipe, stage: OptimizerConfig, model: OtherModel, world: int, number: int, on_gpu: bool
) -> dict[str, int]:
    rows, length = micro_batch(recipe, stage, model.context or 1 << 20)
    lora = getattr(stage, "lora", None)
    moments = 2 if stage.moments == "bfloat16" else 4
    by_kind = other_memory.training(
        model, world, rows, length, number, moments, bool(recipe.layout.recompute), lora.rank if lora else 0, on_gpu
    )
    if isinstance(stage, RLConfig) and stage.kl.weight > 0 and lora is None:
        by_kind["reference"] = number * model.shard(world)
    if isinstance(stage, RLConfig) and stage.rollout.precision == "bfloat16" and number == 4:
        by_kind["rounded"] = 2 * model.count()
    if isinstance(stage, RLConfig) and world > 1 and stage.rollout.engine == "local":
        by_kind["gathered"] = number * model.count()
    return by_kind


def micro_batch(recipe: Recipe, stage: OptimizerConfig, context: int) -> tuple[int, int]:
    """(rows, tokens of a row) of a forward pass."""
    if isinstance(stage, RLConfig | DistillConfig):
        cap = max(stage.max_new_tokens.values) if isinstance(stage, RLConfig) else stage.max_new_tokens
        length = int(min(cap + PROMPT, context))
        return max(1, stage.micro_tokens // length), length
    if isinstance(stage, ExtendConfig):
        return stage.micro_rows, stage.length
    corpus = getattr(stage, "corpus", None) or stage.source
    of_corpus = getattr(recipe.stage(corpus) if corpus else None, "row_length", context)
    return stage.micro_rows, int(getattr(stage, "row_length", of_corpus))


def _beside(
    recipe: Recipe, stage: OptimizerConfig, cfg: ModelConfig, layout: Layout, number: int, trained: dict[str, int],
    on_gpu: bool,
) -> dict[str, int]:  # fmt: skip
    """Networks beside the trained one, in bytes."""
    count = _sizes(cfg, None)[0]
    rollout = getattr(stage, "rollout", None)
    gathered = number * count * ((layout.pp, layout.ep) != (1, 1) and rollout is not None and rollout.engine == "local")
    if isinstance(stage, DistillConfig):
        teachers = len({*stage.teachers.values(), *([stage.teacher] if stage.teacher else [])})
        return {"teachers": teachers * trained["weights"], "gathered": gathered}
    if not isinstance(stage, RLConfig):
        return {}
    beside = {"reference": trained["weights"] * (stage.kl.weight > 0 and stage.lora is None)}
    rounded = stage.rollout.precision == "bfloat16" and number == 4
    if gathered:
        beside["gathered"] = gathered // 2 if rounded else gathered
    elif rounded and stage.rollout.engine == "local":
        beside["rounded"] = 2 * count
    if stage.advantage.name == "critic":  # a score in place of the head, no MTP modules
        own = sum(trained[kind] for kind in ("weights", "gradients", "masters", "moments"))
        head = 0 if cfg.tie_embeddings else embedding_params(cfg)
        beside["critic"] = own * (main_params(cfg) - head) // count
    return beside


def _judges(recipe: Recipe, stage: OptimizerConfig, world: int, number: int) -> list[int]:
    """Bytes of the reward models that score RL's answers, divided over the ranks as they were in their own training, by
    pipeline rank."""
    total = [0] * recipe.layout.pp
    for name in stage.reward_models if isinstance(stage, RLConfig) else []:
        cfg, model, _ = network_of(recipe, recipe.stage(name))
        if cfg is not None:
            layout, *_ = distributed.layout_of(recipe.layout, world, split_rows=False)
            fits = mesh.refusal(layout, mesh.headed(cfg), world) is None
            sizes = memory.scorer_bytes(cfg, layout if fits else Layout(), number)
        elif model is not None:
            sizes = [number * model.scorer(world)]
        else:
            sizes = [number * -(-_parameters(recipe, recipe.stage(name).source)[0] // world)]
        total = [before + size for before, size in zip(total, sizes * (len(total) // len(sizes)), strict=True)]
    return total


def _sampling(
    stage: OptimizerConfig, cfg: ModelConfig | None, model: OtherModel | None, number: int, ranks: int,
    device: Device | None,
) -> dict[str, int]:  # fmt: skip
    """What sampling holds on the trainer's own devices."""
    settings = _vllm(stage)
    if settings is not None and settings.sleep:
        return {"engine": 0 if device is None else int(settings.gpu_memory_utilization * device.memory * GIB)}
    return {"cache": _cache(stage, cfg, model, number, ranks)}


def _vllm(stage: StageConfig) -> VLLMSettings | None:
    """The settings of vLLM, if it samples for the stage."""
    rollout = getattr(stage, "rollout", None)
    if rollout is None or rollout.engine != "vllm":
        return None
    known = {key: value for key, value in rollout.settings.items() if key in VLLMSettings.model_fields}
    return VLLMSettings(**known)


def _workers(
    stage: StageConfig, cfg: ModelConfig | None, model: OtherModel | None, count: int
) -> tuple[int, dict[str, int]]:
    """(devices that sample and do nothing else, what each holds at least): a copy of the model, perhaps over several
    devices, and the cache of the longest answer."""
    rollout = getattr(stage, "rollout", None)
    if rollout is None or rollout.engine not in ("ray", "vllm"):
        return 0, {}
    vllm = _vllm(stage)
    gpus = max(1, int(rollout.settings.get("gpus") or 1))
    cap = getattr(stage, "max_new_tokens", 0)
    longest = max(cap.values) if hasattr(cap, "values") else cap
    cache = int((longest + PROMPT) * _token_bytes(cfg, model, 2))
    elsewhere = 0 if vllm is not None and vllm.sleep else int(rollout.settings.get("workers", 1)) * gpus
    return elsewhere, {"weights": 2 * count // gpus, "cache": cache // gpus}


def _token_bytes(cfg: ModelConfig | None, model: OtherModel | None, number: int) -> int:
    """Bytes of a token's cache."""
    if cfg is not None:
        return int(kv_cache_bytes(cfg, number))
    return model.kv_bytes(number) if model is not None else 0


def _cache(stage: StageConfig, cfg: ModelConfig | None, model: OtherModel | None, number: int, ranks: int) -> int:
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
    context = cfg.max_seq_len if cfg is not None else (model.context if model is not None else 0) or cap + PROMPT
    return int(rows * min(cap + PROMPT, context) * _token_bytes(cfg, model, number))


def _by_count(recipe: Recipe, stage: OptimizerConfig, number: int, ranks: int) -> StageMemory | None:
    """For a model of which only the number of parameters is known; activations are not counted."""
    count, guess = _parameters(recipe, stage.source)
    if not count:
        return None
    share = -(-count // ranks)
    if getattr(stage, "lora", None) is not None:
        return StageMemory(stage.name, ranks, {"weights": number * share}, guess)
    by_kind = {"weights": 4 * share} if ranks > 1 else {"weights": number * share, "masters": 4 * share * (number < 4)}
    by_kind |= {"gradients": 4 * share, "moments": 8 * share}
    if isinstance(stage, RLConfig) and stage.kl.weight > 0:
        by_kind["reference"] = number * share
    return StageMemory(stage.name, ranks, by_kind, guess)


def network_of(recipe: Recipe, stage: StageConfig) -> tuple[ModelConfig | None, OtherModel | None, str]:
    """(network of a stage, or its shape if it is of another family, `StageMemory.guess`)."""
    name = stage.name if isinstance(stage, PretrainConfig) else _source(stage)
    if (cfg := lineage.config_of(recipe, name)) is not None:
        return cfg, None, ""
    if (config := lineage.imported_config(recipe, name)) is not None:
        return None, other_models.from_config(config), ""
    origin = lineage.origin(recipe, name)
    if not isinstance(origin, ImportConfig):
        return None, None, ""
    if (model := other_models.known_model(origin.model)) is not None:
        return None, model, "by its published config"
    if (named := published_preset(origin.model)) is None:
        return None, None, ""
    with suppress(UserError):
        default = recipe.model == Recipe.model_fields["model"].get_default(call_default_factory=True)
        if not default:
            return setup.model_config(recipe), None, "as if its model were [model]"
    return preset(named), None, "by its published config"


def without_rows(recipe: Recipe, stage: StageConfig, world: int | None = None) -> str:
    """What to know if a step has fewer rows than ranks that shard a model of another family; "" otherwise."""
    ranks = world or recipe.layout.fewest
    if network_of(recipe, stage)[1] is None or not isinstance(stage, OptimizerConfig):
        return ""
    return distributed.without_rows(step_rows(stage, ranks), ranks)


def step_rows(stage: OptimizerConfig, otherwise: float) -> float:
    """Rows of a stage's smallest step; `otherwise` if the recipe does not say."""
    if isinstance(stage, RLConfig):
        return stage.prompts_per_rollout * stage.samples // stage.updates_per_rollout
    rows = getattr(stage, "batch_examples", 0) or getattr(stage, "batch_rows", None) or otherwise
    return min(getattr(rows, "values", [rows]))


def unsupported(recipe: Recipe, stage: StageConfig) -> str | None:
    """What a stage asks of a model of another family that only V3's has; None if there is nothing."""
    model = network_of(recipe, stage)[1]
    if model is None or not isinstance(stage, RLConfig):
        return None
    if any(hook.name == "routing-replay" for hook in stage.hooks) and not model.experts:
        return f'stage "{stage.name}": routing-replay has nothing to replay in a dense model; leave the hook out'
    if stage.advantage.name == "critic" and recipe.layout.fewest > 1:
        return f'stage "{stage.name}": a critic of another family is trained by one process; leave [layout] out'
    return None


def published_preset(address: str) -> str | None:
    """The preset of the model at an address on the Hub, if it is one of V3's family that is known."""
    return next((name for name, form in PUBLISHED.items() if re.search(form, address, re.IGNORECASE)), None)


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
