"""The recipe of `bessemer data build`: the sources, their filters, and how they become shards.

    name, seed, row_length, heldout, fim_rate, fim_parts
    [tokenizer] | [[source]] ... | [dedup] | [decontaminate] | [engine]

Overrides are `key=value`, `table.key=value`, and `SOURCE.key=value` with a source's name. `data_recipe.py` loads and
runs it.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from bessemer.config.builtin import find_recipe
from bessemer.config.places import read_text
from bessemer.config.table import ConfigTable, Seed, nearest, validate
from bessemer.config.units import Bytes
from bessemer.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_RESERVED = ("documents", "work", "tokenizer")
"""Folders of a build; no part can have one of these names."""


class SourceTable(ConfigTable):
    """[[source]]: where texts come from."""

    name: str
    """Name in reports, folders and --set."""
    source: str = Field(alias="from")
    """A registered source, `hf://owner/name[/config][#split]`, or a file, folder or pattern (`data/**/*.jsonl.gz`) of
    .jsonl, .txt, .parquet, .html, .warc and .wet files, also .gz and .zst."""
    domain: str
    """english, chinese, code, mathematics, or a name of your own: the part of the training mixture, and the folder of
    its shards."""
    text: str = "text"
    """The key or column that holds the text."""
    languages: list[str] = Field(default_factory=list)
    """Languages to keep (en, zh, ...); empty: all."""
    confidence: float = Field(0.65, ge=0, le=1)
    """Minimum confidence of the language detector, if `languages` is set (FineWeb: 0.65)."""
    filters: Literal["none", "repetition", "web", "code"] = "none"
    """Quality filters: a set of rules with its published thresholds."""
    rules: dict[str, float | bool] = Field(default_factory=dict)
    """Thresholds of single rules, in place of those of `filters`; false removes a rule, and a rule outside `filters` is
    added."""
    bad: Literal["refuse", "skip"] = "refuse"
    """What to do with unreadable input. refuse: end the build with an error that names the place; skip: leave it out
    and count it."""
    longest: Bytes = 10_000_000
    """Maximum bytes of a document, line or page; longer ones count as unreadable."""


class TokenizerTable(ConfigTable):
    """[tokenizer]: trained on the filtered texts, or an existing one."""

    source: str | None = Field(None, alias="from")
    """A tokenizer or model directory. Default: train a new tokenizer."""
    vocab_size: int = Field(32_768, ge=300)
    """Vocabulary size of a new tokenizer."""


class DedupTable(ConfigTable):
    """[dedup]: removal of duplicates. The first copy stays; sources earlier in the recipe take precedence."""

    exact: bool = True
    """Remove texts that differ only in case and white space."""
    near: bool = True
    """Remove texts that share most of their n-grams, by MinHash."""
    threshold: float = Field(0.75, ge=0.1, le=1)
    """Minimum share of equal hashes between the signatures of two copies."""


class DecontaminateTable(ConfigTable):
    """[decontaminate]: evaluations whose questions and solutions must not occur in the texts."""

    tasks: list[str] = Field(default_factory=list)
    """Tasks, such as "countdown", "gsm8k:data/gsm8k" or "jsonl:FILE@test"; without @test, only a tenth of one file is
    held out and searched for."""
    n: int = Field(10, ge=5)
    """Consecutive words that count as a match (R1-Nature D.1: 10)."""
    problems: int = Field(1000, ge=1)
    """Held-out problems per language of a task that generates them without end."""


class EngineTable(ConfigTable):
    """[engine]: where jobs run. It does not change the output."""

    kind: Literal["processes", "ray"] = "processes"
    """processes: on this machine; ray: tasks on a Ray cluster (RAY_ADDRESS) whose nodes all see the sources and
    --out."""
    workers: int = Field(0, ge=0)
    """Jobs that run in parallel; 0: one per core."""
    unit_bytes: Bytes = 64_000_000
    """Approximate input of one job. Unlike the other keys of this table, it determines the number of shards."""


class Curation(ConfigTable):
    """A data recipe."""

    name: str
    """Name of the build; its folder is data/NAME unless --out says otherwise."""
    seed: Seed = 0
    """Seed that selects the documents for fill-in-the-middle and the tokens to split."""
    row_length: int = Field(256, ge=8)
    """Tokens per row; a training stage can read rows of another length."""
    heldout: float = Field(0.01, ge=0, lt=0.5)
    """Share of documents held out for validation, chosen by hash."""
    fim_rate: float = Field(0.1, ge=0, le=1)
    """Share of training documents of `fim_parts` in prefix-suffix-middle order (V3 4.1: 0.1)."""
    fim_parts: list[str] = Field(default_factory=list)
    """Parts with fill-in-the-middle (V3: all)."""
    tokenizer: TokenizerTable = TokenizerTable()
    """The tokenizer."""
    sources: list[SourceTable] = Field(alias="source")
    """The sources, the most trusted first."""
    dedup: DedupTable = DedupTable()
    """Removal of duplicates."""
    decontaminate: DecontaminateTable = DecontaminateTable()
    """Removal of evaluation problems."""
    engine: EngineTable = EngineTable()
    """Where jobs run."""

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Curation:
        path = find_recipe(path, data=True)
        try:
            values = tomllib.loads(read_text(path, "recipe", "an example is the built-in recipe data"))
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"{path}: not valid TOML: {error}") from None
        if "stage" in values:
            raise UserError(f"{path} is a training recipe; run it with bessemer run, or name a data recipe")
        for override in overrides:
            _override(values, override)
        curation = validate(cls, values, str(path))
        curation._check(str(path))
        return curation

    def _check(self, where: str) -> None:
        if not self.sources:
            raise UserError(f"{where}: there is no [[source]]; name at least one")
        names = [source.name for source in self.sources]
        for source in self.sources:
            table = f'{where}: source "{source.name}"'
            for key, name in (("name", source.name), ("domain", source.domain)):
                if not _NAME.fullmatch(name):
                    raise UserError(f"{table}: {key} {name!r} must be letters, digits, - and _, as it names a folder")
            if (source.domain) in _RESERVED:
                raise UserError(f"{table}: no domain may be called {' or '.join(_RESERVED)}; give it another one")
            if names.count(source.name) > 1:
                raise UserError(f"{table} occurs twice; give each source its own name")
            for rule, number in source.rules.items():
                if number is True:
                    raise UserError(f"{table}: rule {rule} is true; give its number, or false to leave it out")
        parts = list(dict.fromkeys(source.domain for source in self.sources))
        for part in self.fim_parts:
            if part not in parts:
                raise UserError(f'{where}: fim_parts names "{part}", which is not a part; {nearest(part, parts)}')


def _override(values: dict[str, Any], override: str) -> None:
    """`key=value`, `table.key=value` or `SOURCE.key=value` into the recipe's values."""
    key, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"--set {override}: must read key=value, table.key=value or SOURCE.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    head, dot, inner = key.strip().partition(".")
    if not dot:
        values[head] = value
        return
    sources = values.get("source", [])
    named = [source for source in sources if isinstance(source, dict) and source.get("name") == head]
    tables = {name: field for name, field in Curation.model_fields.items() if name not in ("sources",)}
    if named:
        table = named[0]
    elif head in tables:
        table = values.setdefault(head, {})
    else:
        names = [*tables, *(source.get("name", "") for source in sources if isinstance(source, dict))]
        raise UserError(f"--set {override}: no table or source is called {head}; {nearest(head, names)}")
    *path, last = inner.split(".")
    for step in path:
        table = table.setdefault(step, {}) if isinstance(table, dict) else table
    if not isinstance(table, dict):
        raise UserError(f"--set {override}: {head} is not a table")
    table[last] = value
