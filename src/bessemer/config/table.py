"""What a stage can be told: pydantic settings whose mistakes come back as one clear sentence.

Each stage kind has a `Settings` class that extends `StageSettings`; the docstring under a field is its help text. A
field annotated `StageRef` (or `list[StageRef]`) names an earlier stage: the schema checks it and the stage finds that
stage's directory in `ctx.inputs`. Validation is strict: "3" is not 3, and an unknown key is an error that names the
nearest one.
"""

import difflib
import json
from typing import Annotated, Any, ClassVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bessemer.errors import UserError


class _Ref:
    """Marks a string as the name of an earlier stage."""


StageRef = Annotated[str, _Ref]


class Strict(BaseModel):
    """A table of a recipe: unknown keys refused, no silent conversions, immutable, documented fields."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, populate_by_name=True, use_attribute_docstrings=True,
        protected_namespaces=(), validate_default=True,
    )  # fmt: skip


class StageSettings(Strict):
    """The keys every stage has."""

    free: ClassVar[frozenset[str]] = frozenset()
    # keys that change how a stage runs but never what it makes (how often to save): changing one redoes nothing

    later: ClassVar[frozenset[str]] = frozenset()
    # keys that came when runs existed already, and whose default is what those runs did: at its default none counts

    kind: str
    """Which stage this is."""
    name: str = ""
    """What other stages and --set call it, and the name of its folder. Default: its kind."""
    source: StageRef | None = Field(default=None, alias="from")
    """The earlier stage whose output this one starts from. Default: the stage before it."""
    like: str | None = Field(default=None, exclude=True)
    """An earlier stage, whose keys count wherever this table sets none of its own."""
    seed: int | None = None
    """Random seed of this stage alone, to repeat it on the same inputs. Default: the recipe's."""


def changed(settings: BaseModel, name: str) -> bool:
    """Whether a key was set to something else than its default; a run's own recipe has all of them written out."""
    return getattr(settings, name) != type(settings).model_fields[name].default


def stage_refs(settings: StageSettings) -> list[tuple[str, str]]:
    """(key, stage name) for every stage that these settings name."""
    found = []
    for field_name, field in type(settings).model_fields.items():
        if _Ref in field.metadata or _mentions_ref(field.annotation):
            value = getattr(settings, field_name)
            names = [value] if isinstance(value, str) else list(value or [])
            found += [(field.alias or field_name, name) for name in names]
    return found


def _mentions_ref(annotation: Any) -> bool:
    return annotation is _Ref or any(_mentions_ref(part) for part in get_args(annotation))


def nearest(key: str, known: list[str]) -> str:
    """' (did you mean "tokens"?)', or the list of what exists when nothing is near."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f'did you mean "{close[0]}"?' if close else f"known: {', '.join(sorted(known))}"


def keys(table: type[BaseModel]) -> list[str]:
    """The keys of a table as they are written in a recipe."""
    return [field.alias or name for name, field in table.model_fields.items()]


def validate(table: type[BaseModel], values: dict[str, Any], where: str) -> Any:
    """`values` as a `table`, or a UserError that starts with `where` (file and table) and names the key."""
    # through JSON, because pydantic's strict mode then still takes a list for a tuple and a string for a path
    try:
        return table.model_validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        raise UserError(f"{where}: {_sentence(table, error)}") from None


_EXPECTED = {
    "int_type": "a whole number", "float_type": "a number", "bool_type": "true or false", "string_type": "a string",
    "list_type": "a list", "tuple_type": "a list", "dict_type": "a table", "model_type": "a table",
}  # fmt: skip
_TYPES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "a table",
}


def _sentence(table: type[BaseModel], error: ValidationError) -> str:
    """The first mistake, in words. One at a time: the second is often a child of the first."""
    first = error.errors(include_url=False)[0]
    at = [str(part) for part in first["loc"] if not str(part).startswith(("function-", "nullable", "constrained-"))]
    key = ".".join(at)
    if first["type"] == "extra_forbidden":
        known = keys(_table_at(table, at[:-1]))
        return f'unknown key "{key}"; {nearest(at[-1], known)}'
    if first["type"] == "missing":
        return f'key "{key}" is required'
    given = json.dumps(first["input"], ensure_ascii=False, default=str)
    given = given if len(given) <= 80 else given[:77] + "..."
    if first["type"] == "value_error":
        return f'key "{key}" is {given}: {first["ctx"]["error"]}'
    expected = _EXPECTED.get(first["type"])
    if expected is None and first["type"] == "literal_error":
        expected = "one of " + first["ctx"]["expected"]
    if expected is None:  # bounds and the like, which pydantic says well: "Input should be greater than 0"
        expected = first["msg"].removeprefix("Input should be ").removeprefix("Value should be ")
    return f'key "{key}" is {given} ({_type_name(first["input"])}), expected {expected}'


def _table_at(table: type[BaseModel], path: list[str]) -> type[BaseModel]:
    """The nested table that a path of keys leads to."""
    for part in path:
        for name, field in table.model_fields.items():
            if part in (name, field.alias):
                inner = [found for found in _tables_in(field.annotation)]
                table = inner[0] if inner else table
    return table


def _tables_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in _tables_in(part)]


def _type_name(value: Any) -> str:
    return _TYPES.get(type(value), "nothing" if value is None else type(value).__name__)
