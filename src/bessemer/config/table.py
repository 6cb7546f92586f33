"""The tables of a recipe as pydantic models whose errors are one clear sentence.

Each stage kind has a class that extends `StageConfig`; the docstring under a field is its help text. A field annotated
`StageRef` (or `list[StageRef]`) names an earlier stage: the recipe checks it, and the stage finds that stage's folder
in `ctx.inputs`. Validation is strict: "3" is not 3, and an unknown key is an error that names the nearest one.
"""

import contextlib
import difflib
import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, ErrorDetails

from bessemer.errors import UserError


class _Ref:
    """Marks a string as the name of an earlier stage."""


StageRef = Annotated[str, _Ref]


class _SourceName:
    """Marks a string that may lead to a file, a directory or a data set of the hub."""


class _TaskName:
    """Marks the name of a task, which may end in a path, or of the user's own code."""


SourceName = Annotated[str, _SourceName]
TaskName = Annotated[str, _TaskName]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""What both numpy and torch take as a random seed."""
Precision = Literal["auto", "device", "float32", "bfloat16"]
"""A compute dtype. device: bfloat16 on a GPU that has it, float32 on a CPU; auto: the same on a GPU, and on a CPU the
one that measures faster."""


class ConfigTable(BaseModel):
    """A table of a recipe: unknown keys refused, no silent conversions, immutable, documented fields."""

    runtime_only: ClassVar[frozenset[str]] = frozenset()
    # keys that change how a stage runs but never its output (how often to save): excluded from the fingerprint

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, populate_by_name=True, use_attribute_docstrings=True,
        protected_namespaces=(), validate_default=True, allow_inf_nan=False,
    )  # fmt: skip


AnyTable = TypeVar("AnyTable", bound=ConfigTable)


class PluginTable(ConfigTable):
    """A plug-in of the recipe (plugins.py): its name, or a table of its name and its settings."""

    plugins: ClassVar[str]
    # the kind of plug-in
    named: ClassVar[str] = "name"
    # the key that holds the name

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: object) -> object:
        return {cls.named: value} if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"type": "string"}, handler(schema)]}

    @property
    def plugin(self) -> str:
        return getattr(self, self.named)

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class StageConfig(ConfigTable):
    """The keys every stage has."""

    makes_model: ClassVar[bool] = False
    # whether its output is a model that writes text, which other stages may train further
    starts_from: ClassVar[bool] = True
    # whether `from` is part of its lineage; the stage before a corpus, an import or examples is not

    kind: TaskName
    """Which stage this is; FILE.py:CLASS or package.module:CLASS is one of your own."""
    name: str = ""
    """The stage's name, used by other stages, by --set and in its folder. Default: its kind."""
    source: StageRef | None = Field(default=None, alias="from")
    """The earlier stage whose output this one starts from. Default: the stage before it."""
    like: str | None = Field(default=None, exclude=True)
    """Earlier stage from which this one inherits every key that it does not set, in its tables too; a table that names
    another plug-in, or whose keys are names, such as a mixture, is set whole."""
    seed: Seed | None = None
    """Random seed for this stage alone, to repeat it on the same inputs. Default: the recipe's."""

    @property
    def imported(self) -> str | None:
        """The model from elsewhere that the stage begins with: a directory or an address. None: no such model."""
        return None

    @property
    def context(self) -> int | None:
        """Longest row, in tokens, that its model reads from then on; None if the stage leaves that as it was."""
        return None

    @property
    def judges(self) -> str | None:
        """What the reward model that it makes judges, such as "helpful"; None if it makes none."""
        return None

    def fingerprint_values(self) -> dict[str, Any]:
        """The values that decide the output, as JSON."""
        excluded: dict[str, Any] = dict.fromkeys({*self.runtime_only, "seed"}, True)
        for name, value in self:
            if isinstance(value, ConfigTable) and value.runtime_only:
                excluded.setdefault(name, value.runtime_only)
        return self.model_dump(mode="json", by_alias=True, exclude=excluded)


class AskingConfig(StageConfig):
    """The key of the stages that ask a model questions."""

    prompt_template: Literal["model", "zero", "r1-zero"] = "model"
    """Prompt format. model: the model's own chat template; r1-zero: R1-Zero's, a preamble and `User: ... Assistant:`
    (R1 Table 1); zero: the same without the preamble. A training stage exports it with the model, so later stages,
    `bessemer eval` and the server use it too."""


class RolloutConfig(PluginTable):
    """[rollout]: where samples are generated. Its other keys are settings of the engine."""

    plugins: ClassVar = "samplers"
    named: ClassVar = "engine"

    engine: str = "local"
    """local: in the trainer's processes, alternating with the updates; ray: in separate rollout workers on Ray, with
    Bessemer's engine; vllm: the same with vLLM, whose samples differ by rounding and random numbers; vllm-server:
    from a `vllm serve` that runs already, at `url`; or a sampler of your own (docs/plugins.md)."""
    precision: Literal["trainer", "bfloat16"] = "trainer"
    """Weights used for sampling: the trainer's own, or a copy of them rounded to BF16, half as large and faster on
    processors with AMX. Evaluations use the copy, too. rl/sampler_gap measures the difference; the hooks
    "routing-replay" and "correction" remove its effect on the updates. vLLM always rounds."""


class SamplingConfig(AskingConfig):
    """The keys of the stages that ask a model which they do not train."""

    runtime_only = frozenset({"rollout"})

    precision: Precision = "device"
    """Dtype in which the models answer. device: bfloat16 on a GPU that supports it, float32 on a CPU; auto: on a CPU,
    whichever measures faster."""
    rollout: RolloutConfig = RolloutConfig()
    """Where answers are sampled. Workers and servers load the model themselves, so none has to fit this process."""


def is_changed(settings: BaseModel, name: str) -> bool:
    """Whether a key differs from its default. Being set is no evidence: a run's own recipe writes out every default."""
    field = type(settings).model_fields[name]
    return getattr(settings, name) != field.get_default(call_default_factory=True, validated_data={})


def stage_refs(settings: ConfigTable) -> list[tuple[str, str]]:
    """(key, stage name) for every stage that these settings and their tables name."""
    return _marked(settings, _Ref)


def named_sources(settings: ConfigTable) -> list[str]:
    """Every text source and model that these settings name."""
    return [name for _, name in _marked(settings, _SourceName)]


def named_tasks(settings: ConfigTable) -> list[str]:
    """Every task that these settings name."""
    return [name for _, name in _marked(settings, _TaskName)]


def named_plugins(settings: BaseModel) -> list[tuple[str, str]]:
    """(kind, name) of every plug-in that these settings name."""
    plugins_of = [(settings.plugins, settings.plugin)] if isinstance(settings, PluginTable) else []
    for _, value in settings:
        inner = value if isinstance(value, list) else [value]
        plugins_of += [named for table in inner if isinstance(table, BaseModel) for named in named_plugins(table)]
    return plugins_of


def _marked(settings: ConfigTable, mark: type) -> list[tuple[str, str]]:
    """(key, value) of every string with this mark, alone, in a list, or as a value of a table."""
    marked = []
    for field_name, field in type(settings).model_fields.items():
        if isinstance(inner := getattr(settings, field_name), ConfigTable):
            marked += [(f"{field_name}.{key}", name) for key, name in _marked(inner, mark)]
        elif mark in field.metadata or _mentions(field.annotation, mark):
            value = getattr(settings, field_name)
            value = value.values() if isinstance(value, dict) else value
            names = [value] if isinstance(value, str) else list(value or [])
            marked += [(field.alias or field_name, name) for name in names]
    return marked


def _mentions(annotation: object, mark: type) -> bool:
    return annotation is mark or any(_mentions(part, mark) for part in get_args(annotation))


def nearest(key: str, names: list[str]) -> str:
    """'did you mean "tokens"?', or the list of known keys if none is close."""
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    return f'did you mean "{close[0]}"?' if close else f"known: {', '.join(sorted(names))}"


def keys(table: type[ConfigTable]) -> list[str]:
    """The keys of a table as they are written in a recipe."""
    return [field.alias or name for name, field in table.model_fields.items()]


def validate(
    table: type[AnyTable], values: dict[str, Any], where: str, label: str = "", set_by: Mapping[str, str] | None = None
) -> AnyTable:
    """`values` as a `table`, or a UserError that names the key and starts with `where`, the file, or with the argument
    that set the key (`set_by`), and then `label`, the table."""
    # through JSON, because pydantic's strict mode then still takes a list for a tuple and a string for a path
    try:
        return table.model_validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]  # one at a time: the second is often a child of the first
        key = str(first["loc"][0]) if first["loc"] else ""
        raise UserError(f"{(set_by or {}).get(key, where)}{label}: {_sentence(table, first)}") from None


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


def _sentence(table: type[ConfigTable], first: ErrorDetails) -> str:
    """A mistake in words."""
    at = [str(part) for part in first["loc"] if not str(part).startswith(("function-", "nullable", "constrained-"))]
    key = ".".join(at)
    if first["type"] == "extra_forbidden":
        names = keys(_table_at(table, at[:-1]))
        return f'unknown key "{key}"; {nearest(at[-1], names)}'
    if first["type"] == "missing":
        return f'key "{key}" is required'
    value = json.dumps(first["input"], ensure_ascii=False, default=str)
    value = value if len(value) <= 80 else value[:77] + "..."
    if first["type"] == "value_error":
        return f'key "{key}" is {value}: {first["ctx"]["error"]}'
    expected = _EXPECTED.get(first["type"])
    if expected is None and first["type"] == "literal_error":
        expected = "one of " + first["ctx"]["expected"]
    if expected is None:  # bounds and the like, which pydantic words well: "Input should be greater than 0"
        expected = first["msg"].removeprefix("Input should be ").removeprefix("Value should be ")
    meant = _meant(_table_at(table, at[:-1]), at[-1], first["input"])
    return f'key "{key}" is {value} ({_type_name(first["input"])}), expected {expected}{meant}'


def _meant(table: type[ConfigTable], key: str, value: object) -> str:
    """'; did you mean "rollouts"?' if the value of `key` is one for a key that is spelled nearly alike."""
    fields = {field.alias or name: field for name, field in table.model_fields.items()}
    for near in difflib.get_close_matches(key, [name for name in fields if name != key], n=3, cutoff=0.8):
        with contextlib.suppress(ValidationError):
            _reader(fields[near]).validate_json(json.dumps(value, default=str), strict=True)
            return f'; did you mean "{near}"?'
    return ""


def _reader(field: FieldInfo) -> TypeAdapter[Any]:
    """What reads the value of one key."""
    return TypeAdapter(Annotated[field.annotation, field])  # type: ignore[arg-type]


def _table_at(table: type[ConfigTable], path: list[str]) -> type[ConfigTable]:
    """The nested table that a path of keys leads to; the last one passed where a key holds no table."""
    for part in path:
        for name, field in table.model_fields.items():
            if part in (name, field.alias):
                inner = tables_in(field.annotation)
                table = inner[0] if inner else table
    return table


def tables_in(annotation: object) -> list[type[ConfigTable]]:
    """The tables that a key may hold, such as that of `JudgeConfig | None`."""
    if isinstance(annotation, type) and issubclass(annotation, ConfigTable):
        return [annotation]
    return [table for part in get_args(annotation) for table in tables_in(part)]


def field_of(form: type[ConfigTable] | None, key: str) -> FieldInfo | None:
    """The field of a key."""
    fields = {} if form is None else form.model_fields
    return next((field for name, field in fields.items() if key in (name, field.alias)), None)


def table_of(field: FieldInfo | None) -> type[ConfigTable] | None:
    """The class of the table that a key holds; None for anything else, a list of tables too."""
    if field is None or get_origin(field.annotation) is list:
        return None
    return next(iter(tables_in(field.annotation)), None)


def spelled_out(field: FieldInfo | None, value: object) -> object:
    """A value that stands for a table as that table: {"weight": 0.01} for `kl = 0.01`; any other as it is."""
    if field is None or table_of(field) is None or isinstance(value, dict):
        return value
    with contextlib.suppress(ValidationError):
        return _reader(field).validate_python(value).model_dump(mode="json", by_alias=True, exclude_unset=True)
    return value


def _type_name(value: object) -> str:
    return _TYPES.get(type(value), "nothing" if value is None else type(value).__name__)
