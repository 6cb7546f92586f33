"""The recipe: a TOML file that defines a run, parsed strictly.

    name, seed | [model] | [layout] | [[stage]] ...

`Recipe.load(path, overrides)` returns a validated recipe or raises a UserError that names file, table and key. The path
may be the name of a recipe that comes with the package.
Overrides are the `--set` arguments: `stage.key=value` with the stage's name, `model.key=value`, `layout.key=value`,
`seed=8`. A stage with `like = "other"` has that earlier stage's keys where it sets none of its own, inside its tables
too. The [model] table stays a plain dictionary here; the stages that build a model check it (`Stage.resolve`) before
anything runs.
"""

import json
import os
import re
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, SerializeAsAny

from bessemer.config.builtin import NAME, RECIPE, builtin_recipes, check_run_format, find_recipe
from bessemer.config.kinds import stage_config
from bessemer.config.places import of_recipe, read_text
from bessemer.config.table import (
    ConfigTable,
    PluginTable,
    Seed,
    StageConfig,
    field_of,
    keys,
    nearest,
    spelled_out,
    stage_refs,
    table_of,
    validate,
)
from bessemer.config.units import Seconds
from bessemer.errors import UserError

RESERVED = ("model", "layout", "stage", "name", "seed", "trackers")  # words with a meaning of their own in --set


class LayoutConfig(ConfigTable):
    """[layout]: how the run is distributed over devices. It changes speed and memory, not the output."""

    pp: int = Field(1, ge=1)
    """Pipeline-parallel ranks (V3: 16)."""
    ep: int = Field(1, ge=1)
    """Expert-parallel ranks (V3: 64)."""
    dp: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Data-parallel ranks (V3: 2, of 64 expert-parallel ranks each); auto: the number of ranks divided by pp, ep and
    cp."""
    cp: int = Field(1, ge=1)
    """Context-parallel ranks: each computes a slice of every row, for rows too long for one rank (V3: none). The row
    length must be a multiple of 2 cp. RL rounds its rows up to that; reward models and
    distillation use data-parallel ranks instead."""
    node: int = Field(8, ge=1)
    """Ranks per node; a token crosses to another node at most once."""
    exchange: Literal["auto", "all-to-all", "deepep"] = "auto"
    """How tokens reach experts on other ranks. deepep: DeepSeek's kernels for NVLink and RDMA; every rank needs the
    deep_ep wheel. auto: deepep on GPUs if all ranks can use it, otherwise all-to-all."""
    schedule: Literal["auto", "gpipe", "1f1b", "interleaved", "zb1p", "zbv", "dualpipe", "dualpipe-v"] = "auto"
    """Pipeline schedule. auto: dualpipe if pp is even (V3); 1f1b otherwise, and in steps with fewer than 2 pp
    micro-batches."""
    recompute: list[Literal["attend", "experts", "finish"]] = Field(default_factory=list)
    """Phases of every layer that the backward pass recomputes instead of storing their activations. Not with fp8, which
    recomputes by its own rules. Of models of other families, any phase means whole layers."""
    deterministic: bool = False
    """On a GPU: training steps that are reproducible bit for bit, so a resumed run equals one that never stopped. They
    are slower; the run reports its tokens per second. On a CPU they are always reproducible."""
    timeout: Seconds = 600.0
    """Maximum time that one rank waits for another; then the run ends and reports which rank waits for which. For
    sampling it is the time without progress."""

    @property
    def fewest(self) -> int:
        """The smallest number of ranks that fits."""
        return self.pp * self.ep * self.cp * (1 if self.dp == "auto" else self.dp)


class Head(ConfigTable):
    """The keys of a recipe outside layout and stages."""

    name: str
    """The run's name; its folder is runs/NAME unless --out says otherwise."""
    seed: Seed = 0
    """Seed for every random choice in the run."""
    model: dict[str, Any] = Field(default_factory=lambda: {"preset": "tiny"})
    """preset = "tiny", plus any keys of `bessemer keys model`."""
    trackers: list[str] = Field(default_factory=list)
    """Experiment trackers that also receive the run's metrics: tensorboard, wandb, mlflow, trackio (pip install
    'bessemer[trackers]'). Each reads its own environment variables, such as WANDB_PROJECT or MLFLOW_TRACKING_URI. A
    tracker that fails does not stop the run."""
    main: str | None = None
    """The stage whose model stands for the run: `bessemer chat RUN`, serve, push and other commands take it, and the
    report compares it with the first. Default: the last finished model."""
    folder: str | None = None
    """Where relative paths in this recipe start; a path that does not exist there is looked up in the working
    directory. Default: the recipe's own folder. A run's copy of its recipe records it."""


class Recipe(Head):
    """A recipe, the definition of a run."""

    layout: LayoutConfig = LayoutConfig()
    """How the run is distributed over devices."""
    stages: list[SerializeAsAny[StageConfig]] = Field(alias="stage")
    """The stages, in order; each [[stage]] table has a kind and that kind's own keys."""
    _arguments: dict[str, str] = PrivateAttr(default_factory=dict)
    # address -> the argument --set that gave its value

    def of_model(self, key: str) -> str:
        """ "--set model.KEY=VALUE: " if the command line gave this key of [model], otherwise nothing."""
        argument = self._arguments.get(f"model.{key}")
        return "" if argument is None else f"{argument}: "

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> "Recipe":
        path = find_recipe(path)
        if path.name == RECIPE:
            check_run_format(path.parent)
        text = read_text(path, "recipe", _nearby(path))
        with of_recipe(folder := os.path.abspath(path.parent / _folder(text))):
            recipe = cls.parse(text, overrides, where=str(path))
        return recipe.model_copy(update={"folder": folder})

    @classmethod
    def parse(cls, text: str, overrides: Sequence[str] = (), where: str = "recipe") -> "Recipe":
        """A recipe from TOML text; `where` names it in errors."""
        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"{where}: not valid TOML: {error}") from None
        tables = data.get("stage")
        if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
            raise UserError(f"{where}: no stages; a recipe needs at least one [[stage]] table with a kind")
        for table in tables:
            table.setdefault("name", str(table.get("kind", "")).rpartition(":")[2])
        for override in overrides:
            _override(data, override)
        data["stage"] = tables = _inherit_keys(data["stage"], where)
        unknown = [key for key in data if key not in keys(cls)]
        if unknown:
            raise UserError(f'{where}: unknown key "{unknown[0]}" at the top level; {nearest(unknown[0], keys(cls))}')
        arguments = {argument.partition("=")[0].strip(): f"--set {argument}" for argument in overrides}
        stages = [_stage(table, number, where, arguments) for number, table in enumerate(tables, start=1)]
        _check_names(stages, where)
        _check_refs(stages, where, arguments)
        set_by = _set_by("layout.", arguments)
        layout = validate(LayoutConfig, data.get("layout", {}), where, ": [layout]", set_by)
        head = validate(Head, {key: data[key] for key in keys(Head) if key in data}, where, set_by=arguments)
        if not NAME.fullmatch(head.name):
            label = arguments.get("name", where)
            raise UserError(
                f'{label}: name is "{head.name}"; use letters, digits, ".", "-" and "_", because it names a folder'
            )
        writers = [stage.name for stage in stages if stage.makes_model]
        if head.main is not None and head.main not in writers:
            label = arguments.get("main", where)
            raise UserError(f'{label}: main = "{head.main}" is no stage with a model; {nearest(head.main, writers)}')
        recipe = cls.model_construct(**dict(head), layout=layout, stages=stages)
        recipe._arguments = arguments
        return recipe

    def stage(self, name: str) -> StageConfig:
        for settings in self.stages:
            if settings.name == name:
                return settings
        raise UserError(f'no stage "{name}" in the recipe "{self.name}"; stages: {", ".join(self.names())}')

    def names(self) -> list[str]:
        return [settings.name for settings in self.stages]

    def seed_of(self, stage: StageConfig) -> int:
        """The stage's own seed, or the recipe's."""
        return self.seed if stage.seed is None else stage.seed

    def to_toml(self) -> str:
        """The recipe with overrides and defaults written out; running it repeats this run."""
        plain = self.model_dump(mode="json", by_alias=True)
        stages = plain.pop("stage")
        lines = _pairs({key: value for key, value in plain.items() if not isinstance(value, dict)})
        for key, value in plain.items():
            if isinstance(value, dict):
                lines += ["", f"[{key}]", *_pairs(value)]
        for stage in stages:
            lines += ["", "[[stage]]", *_pairs(stage)]
        return "\n".join(lines) + "\n"


def _folder(text: str) -> str:
    """Where relative paths of a recipe start; `parse` reports what is wrong with it."""
    try:
        return str(tomllib.loads(text).get("folder", "."))
    except tomllib.TOMLDecodeError:
        return "."


def _inherit_keys(tables: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """Tables with the keys inherited through `like`."""
    done: dict[str, dict[str, Any]] = {}
    complete = []
    for table in tables:
        if "like" in table:
            parent = table["like"]
            if not isinstance(parent, str) or parent not in done:
                named = json.dumps(parent, default=str)
                raise UserError(
                    f'{where}: [[stage]] "{table["name"]}": like = {named} is not an earlier stage; '
                    f"{nearest(str(parent), list(done))}"
                )
            own = {key: value for key, value in table.items() if key != "like"}
            form = None
            with suppress(UserError):  # an unknown kind is reported later
                form = stage_config(own.get("kind", done[parent].get("kind")), where)
            table = _merged(done[parent], own, form)
        complete.append(table)
        done[str(table["name"])] = table
    return complete


class _Changes(dict[str, Any]):
    """A table of which `--set` sets some keys."""


def _merged(inherited: dict[str, Any], own: dict[str, Any], form: type[ConfigTable] | None) -> dict[str, Any]:
    """The keys of both; `own` goes first. A table with known keys (`form`), or one that `--set` changes, is merged in
    the same way; one that names another plug-in, or whose keys are names, such as a mixture, replaces the inherited."""
    merged = {**inherited, **own}
    for key in own.keys() & inherited.keys():
        inner = table_of(field := field_of(form, key))
        base, value = (spelled_out(field, table[key]) for table in (inherited, own))
        if not isinstance(value, dict) or not isinstance(base, dict):
            continue
        changes = isinstance(value, _Changes)
        if inner is not None and issubclass(inner, PluginTable) and not changes and inner.named in value:
            inner = inner if value[inner.named] == base.get(inner.named) else None
        if inner is not None or changes:
            merged[key] = _merged(base, value, inner)
    return merged


def _set_by(prefix: str, arguments: dict[str, str]) -> dict[str, str]:
    """Top key of a table -> the argument that set it or a part of it."""
    keys_of = {
        address.removeprefix(prefix): argument for address, argument in arguments.items() if address.startswith(prefix)
    }
    return {key.partition(".")[0]: argument for key, argument in keys_of.items()}


def _stage(table: dict[str, Any], number: int, where: str, arguments: dict[str, str]) -> StageConfig:
    label = f"{where}: [[stage]] number {number}"
    if "kind" not in table:
        raise UserError(f'{label}: key "kind" is required; it names the kind of stage')
    config, named = stage_config(table["kind"], label), f': [[stage]] "{table["name"]}" (kind {table["kind"]})'
    return validate(config, table, where, named, _set_by(f"{table['name']}.", arguments))


def _check_names(stages: list[StageConfig], where: str) -> None:
    seen: set[str] = set()
    for stage in stages:
        if not NAME.fullmatch(stage.name) or "." in stage.name:
            raise UserError(f'{where}: a stage is named "{stage.name}"; use letters, digits, "-" and "_"')
        if stage.name in RESERVED:
            raise UserError(
                f'{where}: a stage cannot be named "{stage.name}", a word that --set reserves; give it another name'
            )
        if stage.name in seen:
            raise UserError(f'{where}: two stages are named "{stage.name}"; give one of them its own name = "..."')
        seen.add(stage.name)


def _check_refs(stages: list[StageConfig], where: str, arguments: dict[str, str]) -> None:
    names = [stage.name for stage in stages]
    for index, stage in enumerate(stages):
        for key, name in stage_refs(stage):
            if name in names[:index]:
                continue
            why = (
                "does not exist"
                if name not in names
                else "is the stage itself"
                if name == stage.name
                else "comes later"
            )
            earlier = f"stages before it: {', '.join(names[:index])}" if index else "no stage comes before it"
            named = arguments.get(f"{stage.name}.{key}", where)
            raise UserError(f'{named}: [[stage]] "{stage.name}": {key} = "{name}" {why}; {earlier}')
        if index and stage.source is None:
            stages[index] = stage.model_copy(update={"source": names[index - 1]})


def _override(data: dict[str, Any], override: str) -> None:
    """Put one `--set` argument into the parsed TOML."""
    address, equals, text = override.partition("=")
    parts = [part.strip() for part in address.split(".")]
    if not equals or not all(parts):
        raise UserError(f'--set {override}: write stage.key=value, such as --set pretrain.tokens="8M", or seed=8')
    stages = {table["name"]: table for table in data["stage"] if isinstance(table.get("name"), str)}
    if len(parts) == 1:
        if parts[0] not in ("seed", "name", "trackers", "main"):
            raise UserError(f"--set {override}: needs a stage: write stage.key=value with one of: {', '.join(stages)}")
        data[parts[0]] = _value(override, text)
        return
    if parts[0] in ("model", "layout"):
        target = data.setdefault(parts[0], {})
    elif parts[0] in stages:
        target = stages[parts[0]]
    else:
        raise UserError(f'--set {override}: no stage "{parts[0]}"; {nearest(parts[0], [*stages, "model", "layout"])}')
    for part in parts[1:-1]:
        target = target.setdefault(part, _Changes()) if isinstance(target, dict) else target
    if not isinstance(target, dict):
        raise UserError(f'--set {override}: "{".".join(parts[:-1])}" is not a table')
    target[parts[-1]] = _value(override, text)


def _value(override: str, text: str) -> object:
    """TOML, or a bare word as a string: the shell removes quotes, and `tokens=8M` should work."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError as error:
        if not text.strip() or text.lstrip()[0] in "[{\"'":
            raise UserError(f"--set {override}: {text!r} is not a TOML value: {error}") from None
        return text
    if set(parsed) != {"value"}:
        raise UserError(f"--set {override}: expected one value")
    return parsed["value"]


def _nearby(path: Path) -> str:
    siblings = sorted(map(str, path.parent.glob("*.toml")))
    return f"available recipes: {', '.join([*siblings, *builtin_recipes()])}"


def _pairs(table: dict[str, Any]) -> list[str]:
    return [f"{_key(key)} = {_toml(value)}" for key, value in table.items() if value is not None]


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml(key)


def _toml(value: object) -> str:
    """A value as TOML. JSON's spelling of strings, numbers, lists and booleans is TOML's, tables are not."""
    if isinstance(value, dict):
        return "{ " + ", ".join(_pairs(value)) + " }" if value else "{}"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, str):  # TOML has no surrogate escapes and forbids a raw DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, float):
        return repr(value)  # inf and nan are spelled the same
    return json.dumps(value)
