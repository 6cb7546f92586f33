"""The steps of a build. Each is a function that writes a folder and returns facts; they run in worker processes.

read        a unit's pieces     -> its documents, without unreadable ones and those that the filters drop
sign        its documents       -> MinHash signatures, LSH keys and exact hashes; which documents are contaminated
match       all signatures      -> pairs of duplicates, in one bin of keys
join        all pairs           -> which documents duplicate an earlier one
tokenizer   what remains        -> a tokenizer
write       a unit's documents  -> those that remain, and their tokens as a shard
"""

import hashlib
import io
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from bessemer.addons.curate import decontaminate, duplicates, filters, output
from bessemer.addons.curate.decode import GONE, NO_TEXT, UTF8, ReadError, ReadResult
from bessemer.addons.curate.duplicates import SignatureShape, keys, signed
from bessemer.addons.curate.filters import language
from bessemer.addons.curate.origins import Unit
from bessemer.addons.curate.output import ShardPair
from bessemer.addons.curate.reading import SourceGone, texts
from bessemer.addons.curate.report import Tally, example
from bessemer.addons.curate.settings import Dedup, Source, Tokens
from bessemer.addons.curate.words import words
from bessemer.data.fetch import sha256_of
from bessemer.errors import UserError

LANGUAGE = "language"
"""Drop reason of a text that is in none of the source's languages."""


def read(folder: Path, unit: Unit, cache: str | None) -> dict[str, Any]:
    """Read a unit. A source that disappears is retried, then skipped or refused according to its `bad` key."""
    source = unit.source
    for attempt in range(source.retries + 1):
        try:
            with redirect_stderr(io.StringIO()):  # libraries print about errors that are counted here
                return _read_once(folder, unit, cache, last=attempt == source.retries)
        except SourceGone as gone:
            if attempt == source.retries:
                raise UserError(
                    f'source "{source.name}": {gone}; {attempt + 1} attempts. Restore it and run the same command, '
                    'or set bad = "skip" for this source'
                ) from gone
            time.sleep(source.pause * 2**attempt)
    raise AssertionError


def _read_once(folder: Path, unit: Unit, cache: str | None, last: bool) -> dict[str, Any]:
    source, dropped, kept = unit.source, Tally(), Tally()
    languages: Counter[str] = Counter()
    decoded: Counter[str] = Counter()
    count = size = 0
    complete = True
    with output.create(folder) as file:
        for document in _found(unit, cache, last):
            count += 1
            size += document.bytes
            if isinstance(document, ReadError):
                _check(document, source)
                complete = complete and document.reason != GONE
                dropped.add(document.reason, document.bytes, example(document.where, document.detail))
                continue
            if document.encoding != UTF8:
                decoded[document.encoding] += 1
            code, confidence = language(document.text)
            languages[code] += 1
            if source.languages and (code not in source.languages or confidence < source.confidence):
                dropped.add(LANGUAGE, document.bytes, example(f"{document.where} ({code} {confidence})", document.text))
                continue
            if rule := filters.broken(document.text, source.rules):
                dropped.add(rule, document.bytes, example(document.where, document.text))
                continue
            kept.add("documents", document.bytes)
            record = {"text": document.text, "source": source.name, "language": code, "where": document.where}
            output.dump(file, record | ({"address": document.address} if document.address else {}))
    return {
        "complete": complete,
        "found": {"documents": count, "bytes": size},
        "kept": {"documents": kept.documents["documents"], "bytes": kept.bytes["documents"]},
        "dropped": dropped.facts(),
        "languages": dict(sorted(languages.items())),
        "decoded": dict(sorted(decoded.items())),
        "sha256": sha256_of(folder / output.NAME),
    }


def _found(unit: Unit, cache: str | None, last: bool) -> Iterator[ReadResult]:
    for piece in unit.pieces:
        try:
            yield from texts(piece, unit.source, cache)
        except SourceGone as gone:
            if not last or unit.source.bad == "refuse":
                raise
            yield ReadError(GONE, piece.path, str(gone))


def _check(fault: ReadError, source: Source) -> None:
    if source.bad == "refuse" and fault.reason != NO_TEXT:
        raise UserError(
            f'source "{source.name}": {fault.where}: {fault.detail} ({fault.reason}); fix it, or set bad = "skip" for '
            "this source to drop and count such records"
        )


def sign(folder: Path, read: Path, dedup: Dedup, eval_texts: str | None, n: int) -> dict[str, Any]:
    """Sign the documents of a unit. Contaminated ones get no keys, so nothing is dropped as a duplicate of them."""
    shape = SignatureShape(dedup.ngram, dedup.permutations, dedup.bands)
    index = _index(eval_texts, n) if eval_texts else None
    signatures, exact, have = [], [], []
    hits: dict[int, str] = {}
    first = 0
    for group in output.blocks(read):
        block = words(group)
        new_hits = index.hits(block) if index else {}
        hits |= {first + number: name for number, name in new_hits.items()}
        clean = np.ones(len(group), bool)
        clean[list(new_hits)] = False
        exact.append(np.stack([_exact(text) for text in group]))
        if dedup.near:
            signed_NP, any_N = signed(block, len(group), shape)
            signatures.append(signed_NP)
            have.append(any_N & clean)
        else:
            have.append(clean)
        first += len(group)
    have_N = np.concatenate([*have, np.zeros(0, bool)])
    clean_N = np.ones(first, bool)
    clean_N[list(hits)] = False
    np.save(folder / "contaminated.npy", np.array(sorted(hits), np.uint32))
    np.save(folder / "clean.npy", clean_N)
    np.save(folder / "exact.npy", np.concatenate([*exact, np.zeros((0, 2), np.uint64)]))
    if dedup.near:
        signed_NP = np.concatenate([*signatures, np.zeros((0, shape.permutations), np.uint32)])
        np.save(folder / "signatures.npy", signed_NP.astype(np.uint16))
        documents = np.flatnonzero(have_N).astype(np.uint32)
        keys_BN = keys(signed_NP[have_N], shape)
        order = np.argsort(keys_BN, axis=1, kind="stable")
        np.save(folder / "keys.npy", np.take_along_axis(keys_BN, order, 1))
        np.save(folder / "order.npy", documents[order])
    return {"documents": first, "contaminated": len(hits), "found_in": dict(Counter(hits.values()).most_common(20))}


@lru_cache(maxsize=2)
def _index(file: str, n: int) -> decontaminate.Index:
    """The index, built once per process; the file's name changes with its content."""
    return decontaminate.Index(decontaminate.load(Path(file)), n)


def _exact(text: str) -> np.ndarray:
    """A 128-bit hash of a text that ignores case and white space."""
    normal = " ".join(text.lower().split())
    return np.frombuffer(hashlib.blake2b(normal.encode("utf-8", "surrogatepass"), digest_size=16).digest(), np.uint64)


def match(
    folder: Path, units: Sequence[duplicates.SignedUnit], which: duplicates.Bin, threshold: float
) -> dict[str, Any]:
    """Write the duplicate pairs of one bin."""
    pairs = duplicates.match(units, which, threshold)
    np.save(folder / "pairs.npy", pairs)
    return {"pairs": len(pairs)}


def join(folder: Path, exact: Sequence[Path], near: Sequence[Path], firsts: Sequence[int]) -> dict[str, Any]:
    """Write copies.npy, the documents that duplicate an earlier one, ascending, and exact.npy, which of them are equal
    to it.

    `firsts`: the number of each unit's first document. The facts hold a digest of each unit's duplicates.
    """
    exact_copies, leaders = duplicates.clusters(np.load(bin_ / "pairs.npy") for bin_ in exact)
    equal = exact_copies[exact_copies != leaders]
    every, leaders = duplicates.clusters(np.load(bin_ / "pairs.npy") for bin_ in [*exact, *near])
    copies = every[every != leaders]
    np.save(folder / "copies.npy", copies)
    np.save(folder / "exact.npy", np.isin(copies, equal))
    edges = np.searchsorted(copies, np.array([*firsts, np.iinfo(np.uint64).max], np.uint64))
    flags = np.isin(copies, equal)
    digests = [
        hashlib.sha256((copies[low:high] - np.uint64(first)).tobytes() + flags[low:high].tobytes()).hexdigest()[:32]
        for first, low, high in zip(firsts, edges[:-1], edges[1:], strict=True)
    ]
    return {"copies": len(copies), "clusters": len(np.unique(leaders)), "digests": digests}


def tokenizer(folder: Path, units: Sequence[tuple[Path, Path, Path, int, str]], tokens: Tokens) -> dict[str, Any]:
    """Train a tokenizer on the beginning of every unit, `tokens.sample` characters of each source.

    `units`: (read folder, sign folder, join folder, number of the first document, source).
    """
    from bessemer.data.tokenizer import Tokenizer

    of_source = Counter(source for *_, source in units)

    def sample() -> Iterator[str]:
        for read, sign, join, first, source in units:
            room = -(-tokens.sample // of_source[source])
            for _, record, reason in output.with_drop_reason(read, sign, join, first):
                if reason is None:
                    yield record["text"]
                    room -= len(record["text"])
                if room <= 0:
                    break

    trained = Tokenizer.train(sample(), tokens.vocab_size, chat_style="zero")
    trained.save(folder / "tokenizer")
    return {"vocab_size": trained.vocab_size}


def write(
    folder: Path, read: Path, sign: Path, join: Path, first: int, part: str, number: int, tokens: Tokens,
    tokenizer: Path, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Write what remains of a unit: its documents, and shard `number` of the part, packed for `tokens.row_length`."""
    kept, dropped = Tally(), Tally()
    languages: Counter[str] = Counter()
    with output.create(folder) as file, ShardPair(folder, part, number, tokens, tokenizer, seed) as shards:
        for line, record, reason in output.with_drop_reason(read, sign, join, first):
            size = len(record["text"].encode())
            if reason:
                dropped.add(reason, size, example(record["where"], record["text"]))
                continue
            kept.add("documents", size)
            languages[record["language"]] += 1
            file.write(line)
            shards.add(record["text"])
    return {
        "kept": {"documents": kept.documents["documents"], "bytes": kept.bytes["documents"]},
        "dropped": dropped.facts(),
        "languages": dict(sorted(languages.items())),
        "sha256": sha256_of(folder / output.NAME),
        "shards": shards.facts,
    }
