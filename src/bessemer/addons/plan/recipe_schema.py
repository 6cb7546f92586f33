"""JSON schemas of recipes, by which editors complete keys, show their help and mark what is wrong.

A schema is looser than `Recipe.load`: it sees no other table, so it cannot tell whether a stage that is named exists.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import core_schema

from bessemer.config.builtin import NAME
from bessemer.config.kinds import stage_tables
from bessemer.config.recipe import RESERVED, Head, LayoutConfig
from bessemer.config.table import ConfigTable, StageConfig, keys
from bessemer.config.units import COSINE, AtMost, parse_bytes, parse_seconds, parse_tokens

DIALECT = "https://json-schema.org/draft/2020-12/schema"
Schema = dict[str, Any]
TOKENS: Schema = {
    "type": ["number", "string"], "minimum": 0, "exclusiveMaximum": 2**63, "multipleOf": 1,
    # a text's fraction needs a unit or an exponent
    "pattern": r"^\s*[0-9][0-9_]*((\.0+)?|(\.[0-9]+)?([eE]\+?[0-9]+\s*[KMBTkmbt]?|\s*[KMBTkmbt]))\s*$",
}  # fmt: skip
SECONDS: Schema = {"type": ["number", "string"], "minimum": 0} | {
    "pattern": r"^ *([0-9]+(\.[0-9]+)? *|([0-9]+(\.[0-9]+)? *(ms|[smhd]) *)+)$"
}
BY_READER: dict[object, Schema] = {
    parse_tokens: TOKENS,
    parse_bytes: {"type": ["integer", "string"]},
    parse_seconds: SECONDS,
}
"""The schemas of quantities that may be written as text, by the functions that read them."""


class RecipeSchema(GenerateJsonSchema):
    """pydantic's schemas, and those of quantities and schedules."""

    def function_before_schema(self, schema: core_schema.BeforeValidatorFunctionSchema) -> Schema:
        form = BY_READER.get(schema["function"]["function"])
        return super().function_before_schema(schema) if form is None else dict(form)

    def function_plain_schema(self, schema: core_schema.PlainValidatorFunctionSchema) -> Schema:
        return _points()

    def function_after_schema(self, schema: core_schema.AfterValidatorFunctionSchema) -> Schema:
        check = schema["function"]["function"]
        if isinstance(check, AtMost):
            return _points(minimum=0, maximum=check.most)
        return super().function_after_schema(schema)


def _points(**bounds: float) -> Schema:
    """A schedule: a number, or points in consumed tokens."""
    value = {"type": "number"} | bounds
    pair = {"prefixItems": [TOKENS, value, {"const": COSINE}], "minItems": 2, "maxItems": 3}
    return {"anyOf": [value, {"type": "array", "minItems": 1, "items": {"type": "array"} | pair}]}


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
    branch = {
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
    return {"type": "array", "minItems": 1, "items": branch}


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
    schema = table.model_json_schema(by_alias=True, schema_generator=RecipeSchema)
    defs |= schema.pop("$defs", {})
    schema.pop("title", None)
    if issubclass(table, Head | StageConfig):
        free = "" if issubclass(table, Head) else f"(?!({'|'.join(RESERVED)})$)"
        schema["properties"]["name"]["pattern"] = f"^{free}{NAME.pattern}$"
    for name, field in table.model_fields.items():  # the schema of a count in text form replaces its field's bounds
        described = schema["properties"].get(field.alias or name, {})
        if least := [bound.ge for bound in field.metadata if hasattr(bound, "ge") and "minimum" in described]:
            described["minimum"] = max(least)
    return schema
