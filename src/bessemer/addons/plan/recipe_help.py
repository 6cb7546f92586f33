"""The recipe's keys as text, from the docstrings under the fields."""

import json
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from bessemer.config.kinds import recipe_tables, stage_tables
from bessemer.config.recipe import Head, LayoutConfig
from bessemer.config.table import StageConfig, StageRef, nearest, tables_in
from bessemer.config.units import Points, parse_bytes, parse_seconds, parse_tokens
from bessemer.errors import UserError

MODEL = "model"
"""Stands for a stage kind: the table [model]."""
LAYOUT = "layout"
"""Stands for a stage kind: the table [layout]."""


def describe_keys(kind: str | None, network: type[BaseModel], presets: Sequence[str]) -> str:
    """The keys of all tables of a recipe, of one stage kind or of [model] (UserError for an unknown kind), or of
    another kind of recipe, such as `data`; "rl.lr" is one key. `network`: the class of [model], in which one of
    `presets` may stand for the rest."""
    stages, recipes = stage_tables(), recipe_tables()
    if kind in recipes:
        return _table(f"{kind} recipe", recipes[kind])
    if kind is not None and "." in kind:
        kind, _, key = kind.partition(".")
        return _one(kind, key, network)
    if kind == LAYOUT:
        return _table("[layout]", LayoutConfig)
    if kind is not None and kind not in (MODEL, *stages):
        tables: dict[str, type[BaseModel]] = {
            "": Head,
            f"{LAYOUT}.": LayoutConfig,
            f"{MODEL}.": network,
            **{f"{k}.": t for k, t in stages.items()},
        }
        named = [f"{where}{kind}" for where, table in tables.items() if kind in dict(_entries(table))]
        if named and named[0] != kind:
            raise UserError(f"keys: {kind} is a key of {', '.join(named)}; write one of these")
        if named:
            return "\n".join(["top level", *dict(_entries(Head))[kind]])
        raise UserError(f'keys: unknown kind "{kind}"; {nearest(kind, [*recipes, MODEL, LAYOUT, *stages])}')
    preset = f"  preset (one of {', '.join(presets)})\n      A published or small shape; the other keys change it."
    model = "\n".join(["[model]", preset, *_keys(network)]).replace(", required", "")  # a preset has them all
    if kind == MODEL:
        return model
    if kind is not None:
        return _table(f'[[stage]] kind = "{kind}"', stages[kind])
    listed = [_table("top level", Head), model, _table("[layout]", LayoutConfig)]
    listed += [_table(f'[[stage]] kind = "{name}"', table) for name, table in stages.items()]
    return "\n\n".join(listed)


def _table(title: str, table: type[BaseModel]) -> str:
    return "\n".join([title, *_keys(table)])


def _one(kind: str, key: str, network: type[BaseModel]) -> str:
    """One key of a table, with those of its own table if it has one."""
    tables: dict[str, type[BaseModel]] = {**recipe_tables(), MODEL: network, LAYOUT: LayoutConfig, **stage_tables()}
    if kind not in tables:
        raise UserError(f'keys: unknown kind "{kind}"; {nearest(kind, list(tables))}')
    entries = dict(_entries(tables[kind]))
    explained = [line for name, lines in entries.items() if name == key or name.startswith(f"{key}.") for line in lines]
    if not explained:
        raise UserError(f'keys: {kind} has no key "{key}"; {nearest(key, list(entries))}')
    return "\n".join([f"{kind}:", *explained])


def _keys(table: type[BaseModel]) -> list[str]:
    return [line for _, lines in _entries(table) for line in lines]


def _entries(table: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    """(key, its lines). A key whose value is a documented table is followed by that table's keys."""
    for name, field in table.model_fields.items():
        if issubclass(table, StageConfig) and name == "kind":
            continue
        inner = next(iter(tables_in(field.annotation)), None)
        listed = get_origin(field.annotation) in (list, tuple)
        facts = ("tables" if listed else "table") if inner is not None else _type(field) + _default(field)
        key = f"{prefix}{field.alias or name}"
        text = textwrap.wrap(field.description or "", 100, initial_indent="      ", subsequent_indent="      ")
        yield key, [f"  {key} ({facts})", *text]
        if inner is not None:
            yield from _entries(inner, f"{key}.")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ", required"
    value = field.get_default(call_default_factory=True, validated_data={})
    return "" if value in (None, "") else f", default {json.dumps(_plain(value), ensure_ascii=False)}"


def _plain(value: object) -> object:
    return value.plain() if hasattr(value, "plain") else to_jsonable_python(value)


def _type(field: FieldInfo) -> str:
    quantities = {parse_tokens: "tokens", parse_bytes: "bytes", parse_seconds: "duration"}
    for item in field.metadata:
        if item in get_args(StageRef)[1:]:
            return "earlier stage"
        if isinstance(item, BeforeValidator) and item.func in quantities:
            return quantities[item.func]
    return _name(field.annotation)


def _name(annotation: Any) -> str:
    plain = {int: "whole number", float: "number", str: "string", bool: "true or false", type(None): ""}
    if annotation in plain:
        return plain[annotation]
    if hasattr(annotation, "__metadata__"):  # Annotated, inside another type
        return "earlier stage" if annotation == StageRef else _name(annotation.__origin__)
    parts = get_args(annotation)
    if not parts:
        return "schedule" if issubclass(annotation, Points) else "table"
    origin = getattr(annotation, "__origin__", None)
    if origin is list:
        inner = _name(parts[0])
        return inner.replace("one of", "any of", 1) if inner.startswith("one of") else f"list of {inner}s"
    if origin is dict:
        return "table"
    if origin is not None and all(isinstance(part, str | int | float) for part in parts):
        return ("one of " if len(parts) > 1 else "") + ", ".join(map(str, parts))
    named = [_name(part) for part in parts if isinstance(part, type) or get_args(part)]
    return " or ".join(name for name in named if name)
