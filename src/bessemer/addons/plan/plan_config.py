"""The planner's input: the user's options (`--set layout.pp=8 batch=8192 precision=bf16 ...`) over those of a published
run or a recipe, checked and turned into a `Setup`, or one clear error."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

from bessemer.addons.distributed import mesh, schedules
from bessemer.addons.distributed.context_parallel import refusal as split_refusal
from bessemer.addons.distributed.mesh import Layout
from bessemer.addons.families.tables import ImportConfig
from bessemer.addons.plan.hardware import ClusterSpec, read_toml
from bessemer.addons.plan.other_models import OtherModel, from_config, known_model
from bessemer.addons.plan.training_setup import IN_STEP, ModelShape, Setup, imbalance
from bessemer.config import places
from bessemer.config.builtin import PREFIX, builtin_recipes
from bessemer.config.data import CorpusConfig
from bessemer.config.recipe import Recipe
from bessemer.config.rl import RLConfig
from bessemer.config.table import StageConfig, nearest
from bessemer.config.training import FineTuningConfig, PretrainConfig
from bessemer.errors import UserError
from bessemer.model.config import PRESETS, ModelConfig, preset
from bessemer.model.layer import PHASES
from bessemer.train import lineage
from bessemer.train.setup import model_config

SEARCHED = ("pp", "ep", "dp", "schedule", "recompute", "micro_rows", "precision")
"""Options that a search may choose."""
UNITS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


@dataclass(frozen=True)
class PlanConfig:
    """Every option of a plan; None if it is not set."""

    pp: int | None = None
    """Pipeline ranks."""
    ep: int | None = None
    """Expert-parallel ranks."""
    dp: int | None = None
    """Data-parallel ranks; by default as many as the cluster allows."""
    cp: int | None = None
    """Context-parallel ranks."""
    node: int | None = None
    """Ranks per node; by default the devices per node."""
    schedule: str | None = None
    """A pipeline schedule, or auto."""
    tokens: float | None = None
    """Tokens of the whole run."""
    batch: tuple[tuple[float, float], ...] | None = None
    """Sequences per step, as (tokens, sequences) points over consumed tokens."""
    seq: int | None = None
    """Tokens of a sequence."""
    micro_rows: int | None = None
    """Sequences of a micro-batch."""
    precision: str | None = None
    """fp8 or bf16."""
    optimizer: str | None = None
    """adamw or muon."""
    moments: str | None = None
    """bfloat16 or float32: dtype of the optimizer's moments."""
    mtp: int | None = None
    """1: with the MTP modules; 0: without."""
    packed: int | None = None
    """1: rows hold several texts that do not see each other, as fine-tuning packs them; 0: every token sees its row."""
    routing: str | None = None
    """balanced, or a load trace (JSON: tokens of each expert, layer by layer)."""
    recompute: tuple[str, ...] | None = None
    """Phases that backward recomputes: attend, experts, finish, or none."""
    stages: str | None = None
    """balanced: pipeline stages of nearly equal work; even: of equal numbers of layers."""
    in_step: float | None = None
    """Ratio of kernels' time in a step to their time alone."""
    usd: float | None = None
    """Dollars per device hour."""
    model: dict[str, Any] = field(default_factory=dict)
    """Changes to the network's config."""

    def over(self, defaults: PlanConfig) -> PlanConfig:
        """This config, with the options that it does not set taken from `other`."""
        options = {f.name: v for f in fields(self) if (v := getattr(self, f.name)) is not None and f.name != "model"}
        return replace(defaults, **options, model={**defaults.model, **self.model})

    @property
    def has_layout(self) -> bool:
        """Whether any parallel size is set."""
        return any(size is not None for size in (self.pp, self.ep, self.dp, self.cp))

    @property
    def ranks(self) -> int:
        """Ranks of one data-parallel replica."""
        return (self.pp or 1) * (self.ep or 1) * (self.cp or 1)

    def for_search(self, options: PlanConfig) -> PlanConfig:
        """This config, with the searched options set only if the user gave them."""
        return replace(self, **{name: getattr(options, name) for name in SEARCHED})

    def rows(self, tokens: float) -> float:
        """Sequences per step after `tokens` consumed tokens."""
        points = self.batch or ((0.0, 1.0),)
        for (at, value), (end, next_value) in pairwise(points):
            if at <= tokens < end:
                return value + (next_value - value) * (tokens - at) / (end - at)
        return points[0][1] if tokens < points[0][0] else points[-1][1]


def published(name: str) -> PlanConfig:
    """The published run of a preset; an empty config for presets without one."""
    values = dict(read_toml("published.toml").get(name, {}))
    values.pop("source", None)
    if "batch" in values:
        values["batch"] = tuple(map(tuple, values["batch"]))
    return PlanConfig(**values)


def parse(settings: Sequence[str]) -> PlanConfig:
    """The config from `--set` arguments, each with one or more key=value; UserError for one it cannot read."""
    values: dict[str, Any] = {"model": {}}
    options = {f.name for f in fields(PlanConfig)} - {"model"}
    for setting in (part for text in settings for part in text.split()):
        key, equals, text = setting.partition("=")
        name = key.removeprefix("layout.")
        if not equals or not text:
            raise UserError(f"--set {setting}: write key=value, such as layout.pp=8 or precision=bf16")
        if key.startswith("model."):
            values["model"][key.removeprefix("model.")] = _number(setting, text, float) if _is_numeric(text) else text
            continue
        if name not in options:
            near = difflib.get_close_matches(name, options, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"--set {setting}: unknown key; {hint}Known: {', '.join(sorted(options))}, model.KEY")
        values[name] = _READ.get(name, _whole)(setting, text)
    return PlanConfig(**values)


def _is_numeric(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _number(setting: str, text: str, kind: type[int] | type[float]) -> float:
    try:
        value: float = kind(text)
    except ValueError:
        value = float("nan")
    if (not value > 0 and kind is not float) or not math.isfinite(value):
        raise UserError(f"--set {setting}: expected a {'positive whole' if kind is int else 'finite'} number")
    return int(value) if float(value).is_integer() else value


def _whole(setting: str, text: str) -> int:
    return int(_number(setting, text, int))


def _amount(setting: str, text: str) -> float:
    unit = UNITS.get(text[-1].upper(), 1.0)
    value = _number(setting, text if unit == 1.0 else text[:-1], float) * unit
    if not 0 < value < math.inf:
        raise UserError(f"--set {setting}: expected a positive amount, such as 14.8T")
    return value


def _one_of(*words: str) -> Callable[[str, str], str]:
    def read(setting: str, text: str) -> str:
        if text not in words:
            raise UserError(f"--set {setting}: expected one of {', '.join(words)}")
        return text

    return read


def _phases(setting: str, text: str) -> tuple[str, ...]:
    names = () if text == "none" else tuple(text.split(","))
    for name in names:
        _one_of(*PHASES)(setting, name)
    return names


_READ: dict[str, Callable[[str, str], Any]] = {
    "schedule": _one_of("auto", *schedules.SCHEDULES), "tokens": _amount, "precision": _one_of("fp8", "bf16"),
    "optimizer": _one_of("adamw", "muon"), "moments": _one_of("bfloat16", "float32"),
    "batch": lambda setting, text: ((0.0, float(_whole(setting, text))),), "routing": lambda setting, text: text,
    **dict.fromkeys(("mtp", "packed"), lambda setting, text: int(_one_of("0", "1")(setting, text))),
    "recompute": _phases, "stages": _one_of("balanced", "even"), "in_step": _amount, "usd": _amount,
}  # fmt: skip


def micro_batches(name: str, ranks: int, target: int) -> tuple[str, int]:
    """(schedule, micro-batches per step), with `target` rounded down to a multiple the schedule allows. "auto":
    DualPipe if possible, otherwise 1F1B."""
    name = schedules.chosen(name, ranks, target)
    multiple = schedules.SCHEDULES[name].multiple(ranks)
    return name, max(multiple, target // multiple * multiple)


def tokens_of(config: PlanConfig, name: str) -> float:
    """The token budget; UserError if the config has none."""
    if config.tokens is None:
        recipe = f", or name the recipe, {PREFIX}{name}" if name in PRESETS and name in builtin_recipes() else ""
        raise UserError(f"{name} has no budget; set the number of training tokens, such as --set tokens=1T{recipe}")
    return config.tokens


def setup(config: PlanConfig, cfg: ModelConfig, cluster: ClusterSpec) -> Setup:
    """The setup of the run on a cluster; UserError for an impossible layout, with the nearest possible ones."""
    node = config.node or cluster.device.devices
    pp, ep, cp = config.pp or 1, config.ep or 1, config.cp or 1
    dp = config.dp or max(1, cluster.size // (pp * ep * cp))
    layout = Layout(pp, dp, ep, node, cp)
    mesh.check(layout, cfg, cluster.size)
    return with_layout(config, cfg, cluster, layout)


def with_layout(config: PlanConfig, cfg: ModelConfig, cluster: ClusterSpec, layout: Layout) -> Setup:
    """The setup of the run in a valid layout; UserError if the batch is too small for it."""
    length = config.seq or (cfg.max_seq_len if cfg.rope_factor == 1.0 else cfg.original_seq_len)
    if layout.cp > 1 and length % (2 * layout.cp):
        raise UserError(split_refusal(length, layout.cp))
    rows, pipelines = config.micro_rows or 1, layout.dp * layout.ep
    batch = round(config.rows(config.tokens or 0.0)) if config.batch else pipelines * rows * 4 * layout.pp
    if batch < pipelines:
        raise UserError(
            f"a batch of {batch} sequences is too small for {pipelines} data-parallel ranks; "
            f"raise batch to at least {pipelines}, or use more pipeline ranks"
        )
    name = schedules.chosen(config.schedule or "auto", layout.pp, fewest := -(-batch // (pipelines * rows)))
    micro = schedules.micro_batches(name, layout.pp, fewest)
    rows = -(-batch // (pipelines * micro))  # as the trainer cuts a step
    if batch < (least := schedules.least(name, layout.pp)) * pipelines:
        raise UserError(
            f"{name} on {layout.pp} pipeline ranks needs {least} micro-batches or more of each of {pipelines} "
            f"data-parallel ranks; raise batch to at least {least * pipelines:,}, or set schedule=1f1b"
        )
    busiest = 1.0
    if config.routing not in (None, "balanced"):
        busiest = imbalance(Path(config.routing), layout.ep, cfg.n_routed_experts)
    fp8 = config.precision == "fp8" if config.precision else cluster.device.fp8 is not None
    return Setup(
        ModelShape.of(cfg), layout, cluster.device, name, micro, rows, length, fp8,
        config.mtp != 0, config.recompute or (), busiest, config.in_step or IN_STEP, config.stages == "even",
        cp=layout.cp, muon=config.optimizer == "muon", moments=4 if config.moments == "float32" else 2,
        packed=config.packed == 1, batch=batch,
    )  # fmt: skip


def resolve(name: str, options: PlanConfig) -> tuple[str, ModelConfig, PlanConfig, Recipe | None]:
    """(name, network, config, recipe or None) of a preset or a recipe's path, with the user's options over its own;
    UserError if `name` is neither, or its network is unknown."""
    if name in PRESETS:
        return name, preset(name, **options.model), options.over(published(name)), None
    path = Path(name)
    if path.suffix != ".toml" and not _is_recipe(name):
        hint = nearest(name, [*{*PRESETS, *builtin_recipes()}])
        raise UserError(f'no model or recipe "{name}": {hint} (or the path of a recipe, such as my.toml)')
    recipe = Recipe.load(name)
    with places.of_recipe(recipe.folder):
        base = _imported(recipe)
        default = recipe.model == Recipe.model_fields["model"].get_default(call_default_factory=True)
        if base is not None and planned(recipe) is None and default and not options.model:
            raise UserError(
                f'recipe "{recipe.name}": stage "{base.name}" imports a network of unknown shape; plan with a similar '
                "one of V3's family, such as --set model.preset=v2-lite"
            )
        settings, cfg, length = pretraining(recipe, options.model)
    return recipe.name, cfg, options.over(of_recipe(recipe, settings, length)), recipe


def other_model(name: str, options: PlanConfig) -> tuple[Recipe, OtherModel] | None:
    """(recipe, shape of its model) if `name` is a recipe that imports a model of another family which is known, and no
    other network is named in its place; None otherwise."""
    if name in PRESETS or options.model or (Path(name).suffix != ".toml" and not _is_recipe(name)):
        return None
    recipe = Recipe.load(name)
    model = other_model_of(recipe)
    return None if model is None else (recipe, model)


def other_model_of(recipe: Recipe) -> OtherModel | None:
    """The shape of the model of another family that a recipe imports, if it is known."""
    with places.of_recipe(recipe.folder):
        base, default = _imported(recipe), Recipe.model_fields["model"].get_default(call_default_factory=True)
        if base is None or next(begun(recipe), None) is not None or recipe.model != default:
            return None
        config = lineage.imported_config(recipe, base.name)
        return known_model(base.model) if config is None else from_config(config)


def _is_recipe(name: str) -> bool:
    return Path(name).exists() or name.removeprefix(PREFIX) in builtin_recipes()


def _imported(recipe: Recipe) -> ImportConfig | None:
    """The first stage that imports a model."""
    return next((stage for stage in recipe.stages if isinstance(stage, ImportConfig)), None)


def planned(recipe: Recipe) -> StageConfig | None:
    """The stage that the planned network begins in: pre-training or, without it, the first import, if it is of V3's
    family and on this machine. None: the plan is of the recipe's [model]."""
    if (settings := next(begun(recipe), None)) is not None:
        return settings
    base = _imported(recipe)
    with places.of_recipe(recipe.folder):
        return None if base is None or lineage.config_of(recipe, base.name) is None else base


def begun(recipe: Recipe) -> Iterator[PretrainConfig]:
    """The stages that pre-train from random weights; the recipe defines their network."""
    return (stage for stage in recipe.stages if isinstance(stage, PretrainConfig) and stage.corpus is None)


@overload
def pretraining(recipe: Recipe, *, needed_for: str) -> tuple[PretrainConfig, ModelConfig, int]: ...


@overload
def pretraining(
    recipe: Recipe, model: dict[str, Any] | None = None
) -> tuple[PretrainConfig | None, ModelConfig, int]: ...


def pretraining(
    recipe: Recipe, model: dict[str, Any] | None = None, needed_for: str = ""
) -> tuple[PretrainConfig | None, ModelConfig, int]:
    """(pre-training stage or None, planned network with the changes `model`, tokens per sequence) of a recipe.
    `needed_for`: the option named in the UserError for a recipe without pre-training; empty: no error."""
    settings = next(begun(recipe), None)
    if settings is None and needed_for:
        raise UserError(
            f'recipe "{recipe.name}": {needed_for} pre-training, but no "pretrain" stage starts from random weights'
        )
    changes = (settings.model if settings else {}) | (model or {})
    first = planned(recipe)
    own = lineage.config_of(recipe, first.name) if isinstance(first, ImportConfig) and "preset" not in changes else None
    cfg = model_config(recipe, changes) if own is None else ModelConfig.make(own.model_dump() | changes)
    corpus = next((stage for stage in recipe.stages if isinstance(stage, CorpusConfig)), None)
    return settings, cfg, _longest_row(recipe, cfg) if corpus is None else corpus.row_length


def _longest_row(recipe: Recipe, cfg: ModelConfig) -> int:
    """Tokens of the longest rows that fine-tuning packs or RL samples; the network's context if there is no such
    stage."""
    rows = [getattr(stage, "row_length", 0) for stage in recipe.stages]
    rows += [int(max(stage.max_new_tokens.values)) for stage in recipe.stages if isinstance(stage, RLConfig)]
    return min(max(rows, default=0) or cfg.max_seq_len, cfg.max_seq_len)


def of_recipe(recipe: Recipe, settings: PretrainConfig | None, length: int) -> PlanConfig:
    """The layout of a recipe and, if it has one, its pre-training, on sequences of `length` tokens."""
    table = recipe.layout
    parallel = table.pp * table.ep * table.cp > 1 or table.dp not in (1, "auto")
    layout: dict[str, Any] = {"pp": table.pp, "ep": table.ep, "node": table.node} if parallel else {}
    if table.cp > 1:
        layout["cp"] = table.cp
    if parallel and table.dp != "auto":
        layout["dp"] = table.dp
    if table.schedule != "auto":
        layout["schedule"] = table.schedule
    if table.recompute:
        layout["recompute"] = tuple(table.recompute)
    if settings is None:
        fp8 = any(getattr(stage, "fp8", "off") != "off" for stage in recipe.stages)
        packed = int(any(hasattr(stage, "row_length") for stage in recipe.stages))
        precision = "fp8" if fp8 else "bf16"
        return PlanConfig(**layout, seq=length, precision=precision, moments=FineTuningConfig.moments, packed=packed)
    rows = settings.batch_rows
    return PlanConfig(
        **layout, tokens=float(settings.tokens), batch=tuple(zip(rows.tokens, rows.values, strict=True)),
        seq=length, micro_rows=settings.micro_rows, optimizer=settings.optimizer,
        moments=settings.moments,
        precision="fp8" if settings.fp8 != "off" else "bf16", mtp=int(any(settings.mtp_lambda.values)),
        packed=int(settings.document_mask),
    )  # fmt: skip
