"""What a rehearsal runs: the recipe's networks and layout with small numbers.

Every size that differs from 1 becomes 2, in as many groups of processes as it takes to have every pair (with 8
processes: every triple) of axes together. Rules stay: attention with or without latents, YaRN, the gate and its groups,
dense layers, MTP modules, tied embeddings, the schedule, recomputation, the optimizer. Arithmetic is float32, so that
a bound on the differences means something.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

from bessemer.addons.distributed import distributed, schedules
from bessemer.addons.distributed.mesh import Layout
from bessemer.addons.plan import stage_memory
from bessemer.addons.plan.other_models import OtherModel
from bessemer.addons.r1.tables import ExtendConfig
from bessemer.config.recipe import Recipe
from bessemer.config.rl import RLConfig
from bessemer.config.table import StageConfig
from bessemer.config.training import OptimizerConfig, PretrainConfig, SFTConfig
from bessemer.model.config import ModelConfig
from bessemer.model.layer import Phase
from bessemer.rl.algorithms.base import loss_of
from bessemer.rl.losses import GRPO
from bessemer.train.objective import next_token

LENGTH, VOCAB = 64, 512
"""Tokens of a row; rows of the embedding."""
STEPS = 4
MTP_LAMBDA = 0.1
"""Weight of the MTP modules' loss where RL trains them."""
AXES = ("pp", "ep", "cp", "dp")
FSDP = "FSDP2"
"""The name of data parallelism for a model of another family."""
NODES = "ep over nodes"
"""The name of an exchange in two hops, which groups of experts larger than a node need."""


@dataclass(frozen=True)
class RankGroup:
    """Processes that run together."""

    layout: Layout
    schedule: str
    axes: tuple[str, ...]

    @property
    def name(self) -> str:
        sizes = {"pp": self.layout.pp, "ep": self.layout.ep, "cp": self.layout.cp, "dp": self.layout.dp}
        text = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1)
        text = text.replace("dp", FSDP) if FSDP in self.axes else text
        return text + (f", {self.layout.nodes} nodes" if self.layout.nodes > 1 else "")


@dataclass(frozen=True)
class Miniature:
    """A network of the recipe and its miniature."""

    full: ModelConfig | OtherModel
    small: ModelConfig | dict[str, Any]
    """For a model of another family: its transformers config, with `model_type`."""
    works: tuple[Trial, ...]
    groups: tuple[RankGroup, ...]
    wanted: tuple[str, ...]
    """Axes that the groups must use together."""
    rl: RLConfig | None = None
    """The first RL stage that trains it, whose loop is run too."""

    @property
    def own(self) -> bool:
        return isinstance(self.small, ModelConfig)


@dataclass(frozen=True)
class Trial:
    """What a group trains: the objective and the settings of one of the recipe's stages."""

    stage: str
    kind: Literal["pretrain", "sft", "rl"]
    objective: Any
    settings: dict[str, Any]
    """Keys of a pre-training stage."""
    terms: dict[str, float]
    gamma: float
    masked: bool
    """Whether rows hold several texts that do not see each other."""
    recompute: tuple[Phase, ...]


def networks(recipe: Recipe, world: int, processes: int) -> tuple[list[Miniature], list[str]]:
    """(networks that the recipe trains, with what to run of them; stages that are left out, and why)."""
    by_network: dict[ModelConfig | OtherModel, list[StageConfig]] = {}
    left_out = []
    for stage in recipe.stages:
        if not isinstance(stage, OptimizerConfig):
            continue
        cfg, model, _ = stage_memory.network_of(recipe, stage)
        if cfg is None and model is None:
            left_out.append(f'stage "{stage.name}": the shape of its network is unknown before it is downloaded')
        elif work_of(recipe, stage) is None:
            left_out.append(f'stage "{stage.name}": the objective of its kind, {stage.kind}')
        else:
            network = cfg if cfg is not None else model
            assert network is not None
            by_network.setdefault(_shape(network), []).append(stage)
    found = []
    for full, stages in by_network.items():
        by_kind: dict[str, Trial] = {}
        for stage in stages:
            if (work := work_of(recipe, stage)) is not None:
                by_kind.setdefault(work.kind, work)
        works = tuple(by_kind.values())
        if isinstance(full, ModelConfig):
            small: ModelConfig | dict[str, Any] = shrunk(full)
            groups = tuple(_groups(recipe, world, processes))
        else:
            small = other_shrunk(full)
            groups = (RankGroup(Layout(dp=2), "auto", (FSDP,)),) if world > 1 else ()
        wanted = _wanted(recipe, world, isinstance(full, ModelConfig))
        rl = next((stage for stage in stages if isinstance(stage, RLConfig)), None)
        found.append(Miniature(full, small, works, groups, wanted, rl))
    return found, left_out


def _shape(network: ModelConfig | OtherModel) -> ModelConfig | OtherModel:
    """Without what no miniature shows: stages that differ only in their context share one."""
    return network.model_copy(update={"max_seq_len": 4096}) if isinstance(network, ModelConfig) else network


def _groups(recipe: Recipe, world: int, processes: int) -> Iterator[RankGroup]:
    layout, schedule, _ = distributed.layout_of(recipe.layout, world)
    axes = [axis for axis in AXES if getattr(layout, axis) > 1]
    together = min(len(axes), int(math.log2(processes)))
    for chosen in combinations(axes, together) if together else ():
        yield RankGroup(Layout(**dict.fromkeys(chosen, 2)), schedule, chosen)
    if layout.nodes > 1 and processes >= 4:
        yield RankGroup(Layout(ep=4, node=2), schedule, ("ep", NODES))


def _wanted(recipe: Recipe, world: int, own: bool) -> tuple[str, ...]:
    if not own:
        return (FSDP,) if world > 1 else ()
    layout, *_ = distributed.layout_of(recipe.layout, world)
    return tuple(axis for axis in AXES if getattr(layout, axis) > 1) + (NODES,) * (layout.nodes > 1)


def micro_batches(group: RankGroup) -> list[int]:
    """Micro-batches of a pipeline in every step. A schedule that changes with the batch ("auto") has steps of both."""
    pp = group.layout.pp
    least = schedules.micro_batches(group.schedule, pp, 2)
    more = schedules.micro_batches(group.schedule, pp, 2 * pp)
    return [least] * (STEPS // 2) + [more] * (STEPS - STEPS // 2)


def work_of(recipe: Recipe, stage: StageConfig) -> Trial | None:
    """None for a kind whose objective is not rehearsed."""
    if not isinstance(stage, OptimizerConfig):
        return None
    kinds: dict[type, Literal["pretrain", "sft", "rl"]] = {
        PretrainConfig: "pretrain", ExtendConfig: "pretrain", SFTConfig: "sft", RLConfig: "rl",
    }  # fmt: skip
    kind = next((kind for table, kind in kinds.items() if type(stage) is table), None)
    if kind is None or getattr(stage, "lora", None) is not None:
        return None
    settings = {"optimizer": stage.optimizer, "weight_decay": stage.weight_decay, "clip_norm": stage.clip,
                "ema_decay": stage.ema_decay}  # fmt: skip
    terms = {"mtp_lambda": _most(getattr(stage, "mtp_lambda", 0.0)),
             "balance_alpha": float(getattr(stage, "balance_alpha", 0.0))}  # fmt: skip
    masked = kind != "pretrain" or bool(getattr(stage, "document_mask", False))
    gamma = _most(getattr(stage, "gamma", 0.0))
    objective = grpo_of(stage) if isinstance(stage, RLConfig) else next_token
    return Trial(stage.name, kind, objective, settings, terms, gamma, masked, tuple(recipe.layout.recompute))


def grpo_of(stage: RLConfig) -> GRPO:
    constant = LENGTH if stage.normalise == "constant" else 0
    mtp = MTP_LAMBDA if stage.mtp == "trained" else 0.0
    return GRPO(loss_of(stage), stage.kl.weight, stage.temperature, constant, stage.kl.unbiased, mtp)


def _most(value: Any) -> float:
    return float(max(value.values)) if hasattr(value, "values") else float(value)


def shrunk(cfg: ModelConfig) -> ModelConfig:
    """A network of the same rules with 4 layers and at most 16 experts."""
    groups = min(cfg.n_expert_groups, 4)
    limited = min(cfg.n_limited_groups, 2 if cfg.limited else groups)
    experts = min(cfg.n_routed_experts, 16)
    small = {
        "vocab_size": VOCAB, "dim": 64, "n_layers": 4, "n_dense_layers": min(cfg.n_dense_layers, 1), "inter_dim": 128,
        "moe_inter_dim": 32, "n_heads": 4, "q_lora_rank": 32 if cfg.q_lora_rank else 0,
        "kv_lora_rank": 32 if cfg.kv_lora_rank else 0, "n_kv_heads": 2 if cfg.n_kv_heads else 0,
        "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": experts,
        "n_shared_experts": min(cfg.n_shared_experts, 1), "shared_inter_dim": 48 if cfg.shared_inter_dim else 0,
        "n_activated_experts": min(cfg.n_activated_experts, 2 * limited, experts), "n_expert_groups": groups,
        "n_limited_groups": limited, "n_mtp": min(cfg.n_mtp, 1), "max_seq_len": 4 * LENGTH,
        "original_seq_len": LENGTH if cfg.yarn else 4 * LENGTH, "rope_factor": 4.0 if cfg.yarn else 1.0,
        "init_std": 0.08,
    }  # fmt: skip
    return ModelConfig.make(cfg.model_dump() | small)


def other_shrunk(model: OtherModel) -> dict[str, Any]:
    """A transformers config of the same family with 2 layers and at most 8 experts."""
    small: dict[str, Any] = {
        "model_type": model.family, "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2 if model.kv_heads < model.heads else 4,
        "max_position_embeddings": 4 * LENGTH, "tie_word_embeddings": model.tied, "initializer_range": 0.1,
    }  # fmt: skip
    if model.head_dim:
        small["head_dim"] = 16
    if model.experts:
        small |= {"num_experts": 8, "num_experts_per_tok": min(model.chosen, 2), "moe_intermediate_size": 32}
    return small
