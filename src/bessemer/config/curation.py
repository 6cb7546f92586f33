"""The recipe of `bessemer data build`: which sources, what is kept of them, and how they become shards.

    name, seed, row_length, heldout, fim_rate, fim_parts, boundary_split_rate
    [tokenizer] | [[source]] ... | [dedup] | [decontaminate] | [engine]

Overrides are `key=value`, `table.key=value`, and `SOURCE.key=value` with a source's name. `pipeline/curation.py` loads
and runs it.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from bessemer.config.table import ConfigTable, nearest, validate
from bessemer.config.units import Bytes, Tokens
from bessemer.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_TAKEN = ("documents", "work", "tokenizer")
"""Folders of a build that no part may be called after."""


class SourceTable(ConfigTable):
    """[[source]]: where texts come from."""

    name: str
    """What reports, folders and --set call it."""
    source: str = Field(alias="from")
    """A registered source, hf://owner/name[/config][#split], or a file, folder or pattern (data/**/*.jsonl.gz) of
    .jsonl, .txt, .parquet, .html, .warc and .wet files, also .gz and .zst."""
    domain: str
    """english, chinese, code, mathematics, or a name of your own."""
    part: str = ""
    """The folder of shards its tokens go to, a part of the training mixture. Default: its domain."""
    text: str = "text"
    """The key or column that holds the text."""
    languages: list[str] = Field(default_factory=list)
    """Languages to keep (en, zh, ...); empty: all, whatever they are."""
    confidence: float = Field(0.65, ge=0, le=1)
    """Least confidence in the language, where some are asked for (FineWeb: 0.65)."""
    filters: Literal["none", "repetition", "web", "code"] = "none"
    """A set of rules of quality with the numbers their authors published."""
    rules: dict[str, float | bool] = Field(default_factory=dict)
    """Other numbers for single rules; false leaves one out, one that is not in `filters` is added."""
    bad: Literal["refuse", "skip"] = "refuse"
    """What to do about what cannot be read: end the build and say where it is, or leave it out and count it."""
    longest: Bytes = 10_000_000
    """Bytes of the longest document, line or page; what is longer is bad."""
    retries: int = Field(3, ge=0)
    """How often a source that disappears while it is read is tried again."""
    pause: float = Field(1.0, ge=0)
    """Seconds before the first of them; twice as long before each next one."""


class TokenizerTable(ConfigTable):
    """[tokenizer]: made of the texts that are left, or brought along."""

    source: str | None = Field(None, alias="from")
    """A tokenizer or model directory. Default: one is trained."""
    vocab_size: int = Field(32_768, ge=300)
    """Size of one that is trained."""
    sample: Tokens = 20_000_000
    """Characters of each source that it is trained on."""


class DedupTable(ConfigTable):
    """[dedup]: which copies are dropped. The first stays: a source that stands earlier in the recipe wins."""

    exact: bool = True
    """Texts that are equal but for case and white space."""
    near: bool = True
    """Texts that share most of their runs of words, by MinHash."""
    ngram: int = Field(5, ge=1)
    """Words of a run; in Chinese, characters (FineWeb: 5)."""
    permutations: int = Field(120, ge=8)
    """Hashes in a signature."""
    bands: int = Field(20, ge=1)
    """Keys by which candidates meet; must divide the permutations."""
    threshold: float = Field(0.75, ge=0.1, le=1)
    """Share of equal places from which on two texts are copies."""


class DecontaminateTable(ConfigTable):
    """[decontaminate]: evaluations whose questions and solutions must not be in the texts."""

    tasks: list[str] = Field(default_factory=list)
    """Tasks, such as "countdown" or "gsm8k:data/gsm8k"."""
    n: int = Field(10, ge=5)
    """Words in a row that make a hit (R1-Nature D.1: 10)."""
    problems: int = Field(1000, ge=1)
    """Held-out problems of a task that never runs out of them, per language."""


class EngineTable(ConfigTable):
    """[engine]: where jobs run. It does not change the output."""

    kind: Literal["processes", "ray"] = "processes"
    """Processes of this machine, or a Ray cluster (RAY_ADDRESS) whose nodes all see the sources and --out."""
    workers: int = Field(0, ge=0)
    """Jobs at a time; 0: one per core."""
    unit_bytes: Bytes = 64_000_000
    """About this much input is one job. Unlike the other keys of this table it decides how many shards there are."""
    memory: Bytes = 512_000_000
    """What one job of finding copies may take."""


class Curation(ConfigTable):
    """A whole recipe."""

    name: str
    """The build's name; its folder is data/NAME unless --out says otherwise."""
    seed: int = 0
    """Decides which documents get fill-in-the-middle and which tokens are split."""
    row_length: int = Field(256, ge=8)
    """Tokens of a row; training may ask for rows of another length."""
    heldout: float = Field(0.01, ge=0, lt=0.5)
    """Share of documents, chosen by hash, kept for validation."""
    fim_rate: float = Field(0.1, ge=0, le=1)
    """Share of training documents of `fim_parts` in prefix-suffix-middle order (V3 4.1: 0.1)."""
    fim_parts: list[str] = Field(default_factory=list)
    """Parts that it applies to; the paper applies it to all."""
    boundary_split_rate: float = Field(0.05, ge=0, le=1)
    """Share of "punctuation + line break" tokens split in two (V3 4.1 leaves the share open)."""
    tokenizer: TokenizerTable = TokenizerTable()
    """Where ids come from."""
    sources: list[SourceTable] = Field(alias="source")
    """The sources, the most trusted first."""
    dedup: DedupTable = DedupTable()
    """Copies."""
    decontaminate: DecontaminateTable = DecontaminateTable()
    """Evaluations."""
    engine: EngineTable = EngineTable()
    """Where jobs run."""

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Curation:
        path = Path(path)
        try:
            values = tomllib.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise UserError(f"no recipe at {path}; a first one is recipes/data.toml") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error})") from None
        if "stage" in values:
            raise UserError(f"{path} is a training recipe; run it with bessemer run, or name a data recipe")
        for override in overrides:
            _override(values, override)
        found = validate(cls, values, str(path))
        found._check(str(path))
        return found

    def _check(self, where: str) -> None:
        if not self.sources:
            raise UserError(f"{where}: there is no [[source]]; name at least one")
        names = [source.name for source in self.sources]
        for source in self.sources:
            table = f'{where}: source "{source.name}"'
            for key, name in (("name", source.name), ("part", source.part or source.domain)):
                if not _NAME.fullmatch(name):
                    raise UserError(f"{table}: {key} {name!r} must be letters, digits, - and _, as it names a folder")
            if (source.part or source.domain) in _TAKEN:
                raise UserError(f"{table}: no part may be called {' or '.join(_TAKEN)}; give it another part")
            if names.count(source.name) > 1:
                raise UserError(f"{table} is there twice; give each its own name")
            for rule, number in source.rules.items():
                if number is True:
                    raise UserError(f"{table}: rule {rule} is true; give its number, or false to leave it out")
        if self.dedup.permutations % self.dedup.bands:
            raise UserError(
                f"{where}: dedup.bands {self.dedup.bands} does not divide dedup.permutations {self.dedup.permutations}"
            )
        parts = list(dict.fromkeys(source.part or source.domain for source in self.sources))
        for part in self.fim_parts:
            if part not in parts:
                raise UserError(f'{where}: fim_parts has "{part}", which is no part; {nearest(part, parts)}')


def _override(values: dict[str, Any], override: str) -> None:
    """`key=value`, `table.key=value` or `SOURCE.key=value` into the recipe's values."""
    key, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"--set {override}: must read key=value, table.key=value or SOURCE.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    head, dot, rest = key.strip().partition(".")
    if not dot:
        values[head] = value
        return
    sources = values.get("source", [])
    named = [one for one in sources if isinstance(one, dict) and one.get("name") == head]
    tables = {name: field for name, field in Curation.model_fields.items() if name not in ("sources",)}
    if named:
        table = named[0]
    elif head in tables:
        table = values.setdefault(head, {})
    else:
        known = [*tables, *(one.get("name", "") for one in sources if isinstance(one, dict))]
        raise UserError(f"--set {override}: no table or source is called {head}; {nearest(head, known)}")
    *path, last = rest.split(".")
    for step in path:
        table = table.setdefault(step, {})
    if not isinstance(table, dict):
        raise UserError(f"--set {override}: {head} is no table")
    table[last] = value
