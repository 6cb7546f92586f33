"""What the user asks the planner for: settings by hand (`--set layout.pp=8 batch=8192 precision=bf16 ...`) over those
of a published run or a recipe, made into a `Setup` that can be, or one clear error."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from bessemer.dist import mesh, schedules
from bessemer.dist.mesh import Layout
from bessemer.errors import UserError
from bessemer.model.config import ModelConfig
from bessemer.model.recompute import PHASES
from bessemer.plan import routing
from bessemer.plan.hardware import Cluster, figures
from bessemer.plan.setup import IN_STEP, Setup
from bessemer.plan.shape import Shape

SEARCHED = ("pp", "ep", "dp", "schedule", "recompute", "micro_rows", "precision")
"""What a search decides."""
UNITS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


@dataclass(frozen=True)
class Wanted:
    """Everything that can be set. None: not said."""

    pp: int | None = None
    """Pipeline ranks."""
    ep: int | None = None
    """Expert-parallel ranks."""
    dp: int | None = None
    """Data-parallel ranks; what the cluster leaves where it is not said."""
    node: int | None = None
    """Ranks of a node; those of the device where it is not said."""
    schedule: str | None = None
    """A pipeline schedule, or auto."""
    tokens: float | None = None
    """Of the whole run."""
    batch: tuple[tuple[float, float], ...] | None = None
    """Sequences of a step: a number, or points over consumed tokens."""
    seq: int | None = None
    """Tokens of a sequence."""
    micro_rows: int | None = None
    """Sequences of a micro-batch."""
    precision: str | None = None
    """fp8 or bf16."""
    mtp: int | None = None
    """1: with the MTP modules, 0: without."""
    routing: str | None = None
    """balanced, or a load trace (JSON: tokens of each expert, layer by layer)."""
    recompute: tuple[str, ...] | None = None
    """Phases that backward makes again: attend, experts, finish, or none."""
    stages: str | None = None
    """balanced: pipeline stages of nearly equal work; even: of equal numbers of layers."""
    in_step: float | None = None
    """What kernels take in a step over what they take alone."""
    usd: float | None = None
    """Price of a device hour."""
    model: dict[str, Any] = field(default_factory=dict)
    """Changes to the network's config."""

    def over(self, other: Wanted) -> Wanted:
        """What this one says, else what the other does."""
        said = {f.name: v for f in fields(self) if (v := getattr(self, f.name)) is not None and f.name != "model"}
        return replace(other, **said, model={**other.model, **self.model})

    @property
    def laid_out(self) -> bool:
        """Whether it says how ranks are laid out."""
        return any(size is not None for size in (self.pp, self.ep, self.dp))

    @property
    def ranks(self) -> int:
        """Of one data-parallel copy."""
        return (self.pp or 1) * (self.ep or 1)

    def free(self, told: Wanted) -> Wanted:
        """The same with no more of what a search looks for than the user told."""
        return replace(self, **{name: getattr(told, name) for name in SEARCHED})

    def rows(self, tokens: float) -> float:
        """Sequences of a step after so many tokens."""
        points = self.batch or ((0.0, 1.0),)
        for (at, value), (end, then) in pairwise(points):
            if at <= tokens < end:
                return value + (then - value) * (tokens - at) / (end - at)
        return points[0][1] if tokens < points[0][0] else points[-1][1]


def published(name: str) -> Wanted:
    """The run of a preset as published; nothing said for others."""
    values = dict(figures("published.toml").get(name, {}))
    values.pop("source", None)
    if "batch" in values:
        values["batch"] = tuple(map(tuple, values["batch"]))
    return Wanted(**values)


def parse(settings: Sequence[str]) -> Wanted:
    """Of `--set` arguments, each key=value or several."""
    found: dict[str, Any] = {"model": {}}
    known = {f.name for f in fields(Wanted)} - {"model"}
    for setting in (part for text in settings for part in text.split()):
        key, equals, text = setting.partition("=")
        name = key.removeprefix("layout.")
        if not equals or not text:
            raise UserError(f"--set {setting}: write key=value, such as layout.pp=8 or precision=bf16")
        if key.startswith("model."):
            found["model"][key.removeprefix("model.")] = _number(setting, text, float) if _numeric(text) else text
            continue
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"--set {setting}: unknown key; {hint}There are: {', '.join(sorted(known))}, model.KEY")
        found[name] = _READ.get(name, _whole)(setting, text)
    return Wanted(**found)


def _numeric(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _number(setting: str, text: str, kind: Callable[[str], Any]) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = float("nan")
    if (not value > 0 and kind is not float) or value != value:
        raise UserError(
            f"--set {setting}: expected a {'positive whole' if kind is int else ''} number".replace("  ", " ")
        )
    return int(value) if float(value).is_integer() else value


def _whole(setting: str, text: str) -> int:
    return _number(setting, text, int)


def _amount(setting: str, text: str) -> float:
    unit = UNITS.get(text[-1].upper(), 1.0)
    value = _number(setting, text if unit == 1.0 else text[:-1], float) * unit
    if value <= 0:
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
    "batch": lambda setting, text: ((0.0, float(_whole(setting, text))),),
    "mtp": lambda setting, text: int(_one_of("0", "1")(setting, text)), "routing": lambda setting, text: text,
    "recompute": _phases, "stages": _one_of("balanced", "even"), "in_step": _amount, "usd": _amount,
}  # fmt: skip


def micro_batches(name: str, ranks: int, wanted: int) -> tuple[str, int]:
    """(schedule, micro-batches of a step), rounded down to what it takes. "auto": DualPipe where it can be."""
    if name == "auto":
        name = "dualpipe" if ranks % 2 == 0 and wanted >= schedules.least("dualpipe", ranks) else "1f1b"
    multiple = schedules.SCHEDULES[name].multiple(ranks)
    return name, max(multiple, wanted // multiple * multiple)


def tokens_of(wanted: Wanted, name: str) -> float:
    """The budget; UserError for a run without one."""
    if wanted.tokens is None:
        raise UserError(f"{name} has no budget; say how many tokens it trains on, such as --set tokens=1T")
    return wanted.tokens


def setup(wanted: Wanted, cfg: ModelConfig, cluster: Cluster) -> Setup:
    """The run on a cluster; UserError for a layout that cannot exist, with the nearest that can."""
    node = wanted.node or cluster.device.devices
    pp, ep = wanted.pp or 1, wanted.ep or 1
    dp = wanted.dp or max(1, cluster.size // (pp * ep))
    layout = Layout(pp, dp, ep, node)
    mesh.check(layout, cfg, cluster.size)
    return with_layout(wanted, cfg, cluster, layout)


def with_layout(wanted: Wanted, cfg: ModelConfig, cluster: Cluster, layout: Layout) -> Setup:
    """The same with a layout that is known to fit."""
    rows = wanted.micro_rows or 1
    batch = wanted.rows(wanted.tokens or 0.0) if wanted.batch else layout.dp * layout.ep * rows * 4 * layout.pp
    each = layout.dp * layout.ep * rows
    if batch < each:
        raise UserError(
            f"a batch of {batch:.0f} sequences gives none to some of the {layout.dp * layout.ep} data-parallel ranks "
            f"({rows} a micro-batch); raise batch to {each} at least, or use more pipeline ranks"
        )
    name, micro = micro_batches(wanted.schedule or "auto", layout.pp, round(batch) // each)
    busiest = 1.0
    if wanted.routing not in (None, "balanced"):
        busiest = routing.imbalance(Path(wanted.routing), layout.ep)
    fp8 = wanted.precision == "fp8" if wanted.precision else cluster.device.fp8 is not None
    return Setup(
        Shape.of(cfg), layout, cluster.device, name, micro, rows, wanted.seq or cfg.max_seq_len, fp8,
        wanted.mtp != 0, wanted.recompute or (), busiest, wanted.in_step or IN_STEP, wanted.stages == "even",
    )  # fmt: skip
