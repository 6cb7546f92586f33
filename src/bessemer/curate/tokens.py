"""A unit's documents as shards of its part, and the parts that the shards of all units make up."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

from bessemer.curate.settings import Tokens
from bessemer.data import rowplan
from bessemer.data import shards as shardfiles
from bessemer.data.augment import Augment
from bessemer.data.document import Document
from bessemer.data.encoded import tokenised
from bessemer.data.encoder import Encoder
from bessemer.data.tokenizer import Tokenizer
from bessemer.hf.foreign_tokenizer import load_tokenizer

GROUP = 1_000_000
"""Characters tokenised at once."""


class Shards:
    """One shard for training and one held out, `number` of the part; `facts` once it has been left."""

    def __init__(self, folder: Path, part: str, number: int, tokens: Tokens, tokenizer: Path, seed: int) -> None:
        self._folder, self._part, self._tokens = folder, part, tokens
        self._augment = _augment(
            str(tokenizer), tokens.fim_rate if part in tokens.fim_parts else 0.0, tokens.boundary_split_rate, seed
        )
        self._tokenizer = _tokenizer(str(tokenizer))
        self._encoder = _encoder(str(tokenizer))
        dtype = shardfiles.dtype_of(self._tokenizer)
        self._writers = {side: shardfiles.Writer(folder, side, number, dtype) for side in shardfiles.PARTS}
        self._group: list[Document] = []
        self._size = 0
        self.facts: dict[str, dict[str, Any]] = {}

    def add(self, text: str) -> None:
        self._group.append(Document(text, self._part))
        self._size += len(text)
        if self._size >= GROUP:
            self._flush()

    def _flush(self) -> None:
        for document, side, ids in tokenised(self._group, self._encoder, self._tokens.heldout, self._augment):
            self._writers[side].add(ids, document.domain, len(document.text.encode()))
        self._group, self._size = [], 0

    def __enter__(self) -> Shards:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if kind is None:
            self._flush()
        self.facts = {side: writer.finish() for side, writer in self._writers.items()}
        if kind is None:
            length = self._tokens.row_length
            for writer in self._writers.values():
                rowplan.write(
                    self._folder, self._folder / f"rows-{length}", writer.name,
                    shardfiles.dtype_of(self._tokenizer), length,
                )  # fmt: skip


@lru_cache(maxsize=1)
def _tokenizer(folder: str) -> Tokenizer:
    return load_tokenizer(folder)


@lru_cache(maxsize=1)
def _encoder(folder: str) -> Encoder:
    return Encoder(_tokenizer(folder))


@lru_cache(maxsize=4)
def _augment(folder: str, fim_rate: float, split_rate: float, seed: int) -> Augment:
    return Augment(_tokenizer(folder), fim_rate, split_rate, seed)


def seal(
    part: Path, units: Sequence[tuple[Path, Mapping[str, Any]]], tokenizer: Tokenizer, tokens: Tokens, seed: int
) -> None:
    """Makes the folder of a part out of (folder, facts of its shards) of its units, without a copy where possible."""
    scratch = part.with_name(f".{part.name}.building")
    shutil.rmtree(scratch, ignore_errors=True)
    rows = scratch / f"rows-{tokens.row_length}"
    rows.mkdir(parents=True)
    for folder, facts in units:
        for shard in facts.values():
            if shard["documents"]:
                name = shard["name"]
                for file in (shardfiles.tokens_file(folder, name), shardfiles.ends_file(folder, name)):
                    place(file, scratch / file.name)
                for file in rowplan.files(folder / rows.name, name):
                    place(file, rows / file.name)
    sides = {side: [facts[side] for _, facts in units] for side in shardfiles.PARTS}
    fim_rate = tokens.fim_rate if part.name in tokens.fim_parts else 0.0
    rates = {"fim_rate": fim_rate, "boundary_split_rate": tokens.boundary_split_rate, "seed": seed}
    shardfiles.seal(scratch, tokenizer, tokens.row_length, sides, heldout=tokens.heldout, **rates)
    shutil.rmtree(part, ignore_errors=True)
    os.replace(scratch, part)


def place(file: Path, target: Path) -> None:
    """A second name for the file, or a copy where the file system has no such thing."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)
