"""An item of the conformance table: what a recipe has, next to what the papers state.

`RecipeFacts` answers an item's questions about a recipe; `Item.status` compares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from bessemer.addons.watch.card import CONFORMANCE_STATES
from bessemer.config.recipe import Recipe
from bessemer.config.units import Points, show_tokens
from bessemer.model.config import ModelConfig
from bessemer.train import lineage
from bessemer.train.setup import model_config


class RecipeFacts:
    """The recipe and its model, for the items."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        first = recipe.stages[0]
        imported = lineage.config_of(recipe, first.name) if first.kind == "import" else None
        self.model: ModelConfig = imported or model_config(recipe)
        self.foreign = first.kind == "import" and imported is None
        """Whether the recipe begins with a model of another family, or with one that is unknown before its import."""

    def stages(self, kind: str) -> list[Any]:
        return [stage for stage in self.recipe.stages if stage.kind == kind]

    def chain(self, name: str) -> list[Any]:
        """A stage and those that trained its model before, the first stage last."""
        chained = []
        while name:
            chained.append(self.recipe.stage(name))
            name = chained[-1].source or ""
        return chained

    def base(self, name: str) -> str:
        """The stage that a stage's model began in."""
        return first.name if (first := lineage.origin(self.recipe, name)) is not None else name

    def is_after_sft(self, name: str) -> bool:
        return any(stage.kind == "sft" for stage in self.chain(name))

    def authors(self, sft: Any) -> list[Any]:
        """The stages whose answers an SFT stage is trained on."""
        return [self.recipe.stage(name) for name in sft.samples]

    def is_distillation(self, sft: Any) -> bool:
        """Whether an SFT stage is trained on another model's checked answers, with no RL after it (R1 2.4)."""
        rejected = any(author.kind == "reject" for author in self.authors(sft))
        return rejected and all(stage.source != sft.name for stage in self.stages("rl"))

    def cold_starts(self) -> list[Any]:
        """The stages that wrote what the first SFT before RL is trained on."""
        starts = {stage.source for stage in self.stages("rl")}
        return next((self.authors(stage) for stage in self.stages("sft") if stage.name in starts and stage.samples), [])


Found = list[Any] | str
"""The config tables that hold an item's values, or the reason why there are none."""
ABSENT = "no such stage"
IMPORTED = "the imported model's own"
ANY = "undocumented"
"""A published value that the paper does not state; no value differs from it."""


class Read(NamedTuple):
    """A published value that is not a key of the table."""

    published: Any
    of: Callable[[RecipeFacts, Any], Any]


@dataclass(frozen=True)
class Item:
    item: str
    section: str
    text: str
    """How the paper's and the run's values are shown."""
    found: Callable[[RecipeFacts], Found]
    code: str
    """File under src/bessemer."""
    test: str
    """File under tests."""
    choices: Mapping[str, Any] = field(default_factory=dict)
    """Key of the table, or name -> `Read`: published value. A range or a frozenset holds several."""
    sizes: Mapping[str, Any] = field(default_factory=dict)
    """The same for values that scale with the model."""
    on: Callable[[dict[str, Any]], bool] = lambda values: True
    """Whether these values mean that the mechanism is on at all."""
    paper: str = ""
    """The paper's words, if its values in `text` would not say it."""
    best: bool = False
    """Of several tables, take the one nearest to the paper, because they differ on purpose; else the farthest."""

    def published(self) -> str:
        values = {**self.choices, **self.sizes}
        return self.paper or self._show({key: v.published if isinstance(v, Read) else v for key, v in values.items()})

    def status(self, facts: RecipeFacts) -> tuple[str, str]:
        """(state, values as text) of a run."""
        tables = self.found(facts)
        if isinstance(tables, str) or not tables:
            return "off", tables if isinstance(tables, str) else ABSENT
        judged = [(*self._judge(facts, table), getattr(table, "name", "")) for table in tables]
        pick = min if self.best else max
        state, text, name = pick(judged, key=lambda judgement: CONFORMANCE_STATES.index(judgement[0]))
        return state, f"{name}: {text}" if len({text for _, text, _ in judged}) > 1 else text

    def _judge(self, facts: RecipeFacts, table: Any) -> tuple[str, str]:
        values: dict[str, Any] = {}
        equal = {}
        for key, entry in {**self.choices, **self.sizes}.items():
            published, read = entry if isinstance(entry, Read) else (entry, None)
            values[key] = read(facts, table) if read else getattr(table, key)
            equal[key] = _is_equal(values[key], published)
        if not self.on(values):
            state = "off"
        elif not all(equal[key] for key in self.choices):
            state = "adapted"
        else:
            state = "as published" if all(equal.values()) else "scaled"
        return state, self._show(values)

    def _show(self, values: dict[str, Any]) -> str:
        return self.text.format_map({key: _show(value) for key, value in values.items()})


def _is_equal(value: Any, published: Any) -> bool:
    if published is ANY:
        return True
    if isinstance(published, range | frozenset):
        return value in published
    return math.isclose(value, published, rel_tol=1e-6) if isinstance(published, float) else bool(value == published)


def _show(value: Any) -> str:
    if value is None:
        return "by the data"
    if isinstance(value, Points):
        texts = [f"{y:g} at {show_tokens(at)}" for at, y, *_ in value.plain()]
        return f"{value.values[0]:g}" if len(texts) == 1 else ", ".join(texts)
    if isinstance(value, range | frozenset):
        return f"{_show(min(value))} to {_show(max(value))}"
    if isinstance(value, list):
        return ", ".join(map(_show, value))
    return f"{value:g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
