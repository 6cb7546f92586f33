"""The file of a study, and its arms as recipes.

    name, question, claim       what is asked, and what the rules together would show
    recipe, set, shared         the recipe of all arms; `shared` is the last stage that a seed's arms share
    seeds                       the recipe's seed; differences are taken within each
    [arm.NAME]                  changes of the recipe, a recipe of its own, or a command
    [figure.NAME]               a number that a run gives
    [[rule]], [[control]]       bounds on differences, fixed before the first run

What a result follows from, `Study.fixed`, is recorded with its hash before the first run: everything here but prose,
estimates and the time budget, the recipes with their defaults, and the hashes of the files that they name.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from bessemer.config import places
from bessemer.config.builtin import find_recipe
from bessemer.config.places import read_text
from bessemer.config.recipe import Recipe
from bessemer.config.table import ConfigTable, Seed, StageConfig, nearest, validate
from bessemer.errors import UserError
from bessemer.pipeline import inputs
from bessemer.runs.directory import digest
from bessemer.tasks import get

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
FIGURES = "figures.json"
"""What a command writes into its folder: {figure: number}."""


class ArmTable(ConfigTable):
    """[arm.NAME]: what this arm changes."""

    about: str = ""
    """What it is, for the reader."""
    recipe: str | None = None
    """Its own recipe, whose stages up to `shared` equal those of the study's. Default: the study's."""
    set: list[str] = Field(default=[])
    """Changes of the recipe, in the form of `bessemer run --set`; {here} is the folder of the study's file."""
    command: list[str] = Field(default=[])
    """Instead of a recipe: a program and its arguments, in which {seed}, {out}, {base} and {here} stand for the seed,
    the run's own folder, the run of the shared stages and the folder of the study's file. It writes figures.json into
    {out}. Without a shell; it starts with the folder of the study's file as working directory."""
    minutes: float | None = Field(None, gt=0)
    """Estimate of one run, for a command."""


class FigureTable(ConfigTable):
    """[figure.NAME]: a number of a run. A command gives its figures by name and needs only `failed`."""

    stage: str | None = None
    """A stage of kind eval, or with `metric` any stage."""
    model: str | None = None
    """Of an evaluation: the stage whose model was asked."""
    task: str | None = None
    """Of an evaluation: one task; of a task of your own, FILE.py:NAME is enough. Default: the mean over all rows."""
    language: str | None = None
    """Of an evaluation: one language. Default: the mean over all."""
    value: str = "pass_at_1"
    """Of an evaluation: a number of its rows."""
    metric: str | None = None
    """Instead of an evaluation: a metric of the stage, such as rl/heldout_accuracy."""
    last: int = Field(1, ge=1)
    """Of a metric: the mean of so many of its last values."""
    of: list[str] = Field(default=[])
    """Instead of a stage: other figures of the same run."""
    take: Literal["mean", "range"] = "mean"
    """What is taken of the figures in `of`; range: the largest less the smallest."""
    failed: float | None = None
    """What a failed run, or a figure that is not finite, counts as. Default: rules that need it cannot tell."""


class RuleTable(ConfigTable):
    """[[rule]] and [[control]]: a bound on the mean difference between two figures of a seed."""

    name: str
    """What it says, for the reader."""
    first: str
    """ARM, or ARM.FIGURE if there are several figures."""
    second: str | None = None
    """What is subtracted. Default: nothing, and the bound is on the figure itself."""
    side: Literal["above", "below", "within"]
    """above, below: the bound `by`; within: closer to 0 than `by`."""
    by: float
    """The bound."""
    expected: float
    """The difference that is expected, or that matters: what the power is computed for."""
    spread: float | None = Field(None, gt=0)
    """Standard deviation of the difference over seeds that is assumed before any run. Default: --dry-run says which
    spread the seeds can bear."""


class StudyTable(ConfigTable):
    """A study."""

    name: Name
    question: str
    """What is asked."""
    claim: str
    """What the study shows if all rules hold."""
    recipe: str | None = None
    """A file, from the study's folder, or the name of a built-in recipe. Default: all arms are commands."""
    set: list[str] = Field(default=[])
    """Changes of the recipe in all arms."""
    shared: str | None = None
    """The last stage that the arms of a seed share. It is run once for every seed. Default: arms share nothing."""
    seeds: list[Seed] = Field(min_length=1)
    """Seeds of the recipe."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    """Of the intervals."""
    power: float = Field(0.8, gt=0, lt=1)
    """How likely the expected effect should be shown."""
    minutes: float | None = Field(None, gt=0)
    """Time budget of a call: no run starts after it. Default: none."""
    arm: dict[Name, ArmTable] = Field(min_length=1)
    figure: dict[Name, FigureTable] = Field(min_length=1)
    rule: list[RuleTable] = Field(min_length=1)
    control: list[RuleTable] = Field(default=[])


@dataclass(frozen=True)
class ArmFigure:
    """An arm and a figure of it: one side of a comparison."""

    arm: str
    figure: str


class Study:
    """A study's file, checked."""

    def __init__(self, table: StudyTable, path: Path) -> None:
        self.table, self.path, self.name = table, path, table.name
        self.here = path.parent.resolve()
        self._check()

    @classmethod
    def load(cls, path: Path) -> Study:
        """UserError for anything that is wrong with the file, its recipes or its rules."""
        text = read_text(path, "study")
        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"{path}: not valid TOML: {error}") from None
        return cls(validate(StudyTable, data, str(path)), path)

    @property
    def comparisons(self) -> list[RuleTable]:
        return [*self.table.rule, *self.table.control]

    def side(self, text: str) -> ArmFigure:
        """ "task.accuracy" -> its arm and figure; the figure may be left out if there is only one."""
        arm, _, figure = text.partition(".")
        figures = list(self.table.figure)
        if arm not in self.table.arm:
            raise UserError(f'{self.path}: "{text}": no arm "{arm}"; {nearest(arm, list(self.table.arm))}')
        if not figure and len(figures) > 1:
            raise UserError(f'{self.path}: "{text}" names no figure; write {arm}.FIGURE with {", ".join(figures)}')
        if figure and figure not in figures:
            raise UserError(f'{self.path}: "{text}": no figure "{figure}"; {nearest(figure, figures)}')
        return ArmFigure(arm, figure or figures[0])

    def sides(self, rule: RuleTable) -> list[ArmFigure]:
        return [self.side(text) for text in (rule.first, rule.second) if text is not None]

    def figures_of(self, arm: str) -> list[str]:
        """The figures of an arm: for a command those that a comparison asks of it, for a recipe all whose stages it
        has."""
        asked = {side.figure for rule in self.comparisons for side in self.sides(rule) if side.arm == arm}
        if self.table.arm[arm].command:
            return [name for name in self.table.figure if name in asked]
        names = self.recipe(arm, self.table.seeds[0]).names()
        return [name for name in self.table.figure if name in asked or self._has(name, names)]

    def _has(self, name: str, stages: list[str]) -> bool:
        figure = self.table.figure[name]
        return all(self._has(part, stages) for part in figure.of) if figure.of else figure.stage in stages

    def path_of(self, recipe: str) -> Path:
        beside = self.here / recipe
        return beside if beside.is_file() else find_recipe(recipe)

    def settings(self, arm: str | None, seed: int) -> list[str]:
        """The changes of the recipe of an arm, or of the shared stages (None)."""
        changes = [*self.table.set, *(self.table.arm[arm].set if arm else [])]
        return [*(change.replace("{here}", str(self.here)) for change in changes), f"seed={seed}"]

    def file_of(self, arm: str | None) -> Path:
        """The recipe of an arm, or of the shared stages (None)."""
        own = self.table.arm[arm].recipe if arm else None
        named = own or self.table.recipe
        if named is None:
            raise UserError(f"{self.path}: {f'arm {arm}' if arm else 'shared'} has no recipe; set recipe, or a command")
        return self.path_of(named)

    def recipe(self, arm: str | None, seed: int) -> Recipe:
        return Recipe.load(self.file_of(arm), self.settings(arm, seed))

    def shared(self, recipe: Recipe) -> list[StageConfig]:
        """The stages of a recipe up to the last shared one."""
        if self.table.shared is None:
            return []
        names = recipe.names()
        if self.table.shared not in names:
            raise UserError(f'{self.path}: shared = "{self.table.shared}": {nearest(self.table.shared, names)}')
        return recipe.stages[: names.index(self.table.shared) + 1]

    @cached_property
    def fixed(self) -> dict[str, Any]:
        """What the results follow from."""
        prose = {"question", "claim", "minutes"}
        table = self.table.model_dump(mode="json", exclude=prose)
        for arm in table["arm"].values():
            del arm["about"], arm["minutes"]
        return table | {"recipes": {name: list(self._of_recipe(name)) for name in self._arms_with_recipes()}}

    @property
    def hash(self) -> str:
        return digest(self.fixed)

    def _arms_with_recipes(self) -> list[str]:
        return [name for name, arm in self.table.arm.items() if not arm.command]

    def _of_recipe(self, arm: str) -> Iterator[Any]:
        recipe = self.recipe(arm, self.table.seeds[0])
        with places.of_recipe(recipe.folder):
            yield recipe.model_copy(update={"folder": None}).to_toml().replace(str(self.here), "{here}")
            for stage in recipe.stages:
                if files := inputs.read_by(stage):
                    yield [stage.name, digest(sorted(files.values(), key=str))]

    def _check(self) -> None:
        table = self.table
        if len(set(table.seeds)) < len(table.seeds):
            raise UserError(f"{self.path}: a seed stands twice in seeds; a repeated run is no second seed")
        for name, arm in table.arm.items():
            if arm.command and (arm.recipe or arm.set):
                raise UserError(f"{self.path}: arm {name} has a command and changes of a recipe; leave one of them out")
        for name, figure in table.figure.items():
            self._check_figure(name, figure)
        names = [rule.name for rule in self.comparisons]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f'{self.path}: two rules are named "{twice[0]}"; give each its own name')
        for rule in self.comparisons:
            self._check_rule(rule)
        base = self.shared(self.recipe(None, table.seeds[0])) if table.shared else []
        for name in self._arms_with_recipes():
            recipe = self.recipe(name, table.seeds[0])
            for own, common in zip(self.shared(recipe), base, strict=False):
                if own != common:
                    raise UserError(
                        f'{self.path}: arm {name} changes stage "{common.name}", which the arms share; name an earlier '
                        "stage as shared, or leave shared out"
                    )
            for asked in {side.figure for rule in self.comparisons for side in self.sides(rule) if side.arm == name}:
                figure = table.figure[asked]
                if not self._has(asked, recipe.names()):
                    raise UserError(f'{self.path}: figure {asked}: arm {name} has no stage "{figure.stage}"')
                if figure.stage and figure.task and not listed_as(recipe, figure.stage, figure.task):
                    raise UserError(
                        f'{self.path}: figure {asked}: stage "{figure.stage}" of arm {name} does not evaluate on '
                        f"{figure.task}; its tasks: {', '.join(_tasks(recipe, figure.stage)) or 'none'}"
                    )

    def _check_figure(self, name: str, figure: FigureTable) -> None:
        others = list(self.table.figure)
        for part in figure.of:
            if part not in others[: others.index(name)]:
                raise UserError(f"{self.path}: figure {name}: of = {part!r} is no figure above it")
        if figure.of and figure.stage:
            raise UserError(f"{self.path}: figure {name} has a stage and other figures (of); leave one of them out")
        if figure.stage and not figure.metric and not figure.model:
            raise UserError(f"{self.path}: figure {name} needs model, of an evaluation, or metric")

    def _check_rule(self, rule: RuleTable) -> None:
        self.sides(rule)
        beyond = {
            "above": rule.expected > rule.by, "below": rule.expected < rule.by, "within": abs(rule.expected) < rule.by
        }[rule.side]  # fmt: skip
        if not beyond:
            raise UserError(
                f'{self.path}: rule "{rule.name}": expected = {rule.expected:g} would not satisfy {rule.side} '
                f"{rule.by:g}; state the difference that the rule is there to show"
            )


def listed_as(recipe: Recipe, stage: str, task: str) -> set[str]:
    """The names under which an evaluation lists the task of a figure. One of the user's own may name itself, so that
    its rows have another name than the recipe's FILE.py:CLASS."""
    with places.of_recipe(recipe.folder):
        named = {name: {name, get(name).name} for name in _tasks(recipe, stage)}
    return {name for names in named.values() for name in names if any(_is(task, other) for other in names)}


def _tasks(recipe: Recipe, stage: str) -> list[str]:
    return getattr(recipe.stage(stage), "tasks", [])


def _is(asked: str, name: str) -> bool:
    return name == asked or name.endswith(f"/{asked}")
