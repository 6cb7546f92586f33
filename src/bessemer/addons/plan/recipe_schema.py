"""JSON schemas of recipes, by which editors complete keys, show their help and mark what is wrong.

A schema is looser than `Recipe.load`: it sees no other table, so it cannot tell whether a stage that is named exists.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from bessemer.config.builtin import NAME
from bessemer.config.kinds import stage_tables
from bessemer.config.recipe import RESERVED, Head, LayoutConfig
from bessemer.config.table import ConfigTable, StageConfig, keys

DIALECT = "https://json-schema.org/draft/2020-12/schema"
Schema = dict[str, Any]


def recipe_schema(network: type[BaseModel], presets: list[str]) -> Schema:
    """Of training recipes. `network` is the class of the table [model], in which `preset` may stand for the rest."""
    defs: Schema = {}
    model = _schema(network, defs)
    model.pop("required", None)
    model["properties"]["preset"] = {"enum": presets, "description": "A published or small shape; other keys override."}
    head = _schema(Head, defs)
    head["properties"] |= {"model": model, "layout": _schema(LayoutConfig, defs), "stage": _stages(defs)}
    head["required"] = ["name", "stage"]
    return {"$schema": DIALECT, "title": "A recipe of Bessemer"} | head | {"$defs": defs}


def schema_of(name: str, recipe: type[ConfigTable]) -> Schema:
    """Of another kind of recipe."""
    defs: Schema = {}
    table = _schema(recipe, defs)
    return {"$schema": DIALECT, "title": f"A {name} recipe of Bessemer"} | table | {"$defs": defs}


def _stages(defs: Schema) -> Schema:
    tables = stage_tables()
    every = sorted({key for config in tables.values() for key in keys(config)})
    cases: list[Schema] = [
        {"if": {"properties": {"kind": {"const": kind}}, "required": ["kind"]}, "then": _stage(kind, config, defs)}
        for kind, config in tables.items()
    ]
    # the kind of the stage that this one is `like` stands in another table
    cases.append({"if": {"not": {"required": ["kind"]}}, "then": {"propertyNames": {"enum": every}}})
    one = {
        "type": "object",
        "properties": {
            "kind": {
                "anyOf": [{"enum": list(tables)}, {"type": "string", "pattern": ":"}],  # or a stage of the user's own
                "description": StageConfig.model_fields["kind"].description,
            }
        },
        "anyOf": [{"required": ["kind"]}, {"required": ["like"]}],
        "allOf": cases,
    }
    return {"type": "array", "minItems": 1, "items": one}


def _stage(kind: str, config: type[StageConfig], defs: Schema) -> Schema:
    """What a stage requires it may have by `like`."""
    table = _schema(config, defs)
    table["properties"]["kind"] = {"const": kind}
    required = [key for key in table.pop("required", []) if key != "kind"]
    if required:
        table |= {"if": {"not": {"required": ["like"]}}, "then": {"required": required}}
    defs[f"stage {kind}"] = table
    return {"$ref": f"#/$defs/stage {kind}"}


def _schema(table: type[BaseModel], defs: Schema) -> Schema:
    """The schema of one table; the tables inside it go to `defs`."""
    schema = table.model_json_schema(by_alias=True)
    defs |= schema.pop("$defs", {})
    schema.pop("title", None)
    if issubclass(table, Head | StageConfig):
        free = "" if issubclass(table, Head) else f"(?!({'|'.join(RESERVED)})$)"
        schema["properties"]["name"]["pattern"] = f"^{free}{NAME.pattern}$"
    for name, field in table.model_fields.items():  # the schema of a count in text form replaces its field's bounds
        one = schema["properties"].get(field.alias or name, {})
        if least := [bound.ge for bound in field.metadata if hasattr(bound, "ge") and "minimum" in one]:
            one["minimum"] = max(least)
    return schema
