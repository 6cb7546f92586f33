"""The steps of a build, each a function that writes a folder and returns facts. They run in worker processes.

read        a unit's pieces   -> its documents, as they were found, without what no rule or reader lets through
sign        its documents     -> MinHash signatures, keys and exact hashes; which documents are contaminated
match       all signatures    -> pairs of copies, in one bin of keys
join        all pairs         -> which documents are copies of an earlier one
tokenizer   what is left      -> a tokenizer
write       a unit's documents -> those that are left, and their tokens as a shard
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

from bessemer.curate import documents, heldout, rules
from bessemer.curate import match as matching
from bessemer.curate.decode import UTF8
from bessemer.curate.language import language
from bessemer.curate.minhash import Shape, keys, signed
from bessemer.curate.origins import Unit
from bessemer.curate.reading import Gone, texts
from bessemer.curate.records import GONE, NO_TEXT, Fault, Found
from bessemer.curate.settings import Dedup, Source, Tokens
from bessemer.curate.tally import Tally, example
from bessemer.curate.tokens import Shards
from bessemer.curate.words import words
from bessemer.data.fetch import sha256_of
from bessemer.errors import UserError

LANGUAGE = "language"
"""Why a text is dropped that is in none of the source's languages."""


def read(folder: Path, unit: Unit, cache: str | None) -> dict[str, Any]:
    """Reads a unit; a source that disappears is tried again, then skipped or refused as it says itself."""
    source = unit.source
    for attempt in range(source.retries + 1):
        try:
            with redirect_stderr(io.StringIO()):  # libraries that complain of what is counted here
                return _read_once(folder, unit, cache, last=attempt == source.retries)
        except Gone as gone:
            if attempt == source.retries:
                raise UserError(
                    f'source "{source.name}": {gone}; {attempt + 1} attempts. Bring it back and run the same command, '
                    'or set bad = "skip" for this source'
                ) from gone
            time.sleep(source.pause * 2**attempt)
    raise AssertionError


def _read_once(folder: Path, unit: Unit, cache: str | None, last: bool) -> dict[str, Any]:
    source, dropped, kept = unit.source, Tally(), Tally()
    languages: Counter[str] = Counter()
    decoded: Counter[str] = Counter()
    found = size = 0
    complete = True
    with documents.create(folder) as file:
        for one in _found(unit, cache, last):
            found += 1
            size += one.bytes
            if isinstance(one, Fault):
                _check(one, source)
                complete = complete and one.reason != GONE
                dropped.add(one.reason, one.bytes, example(one.where, one.detail))
                continue
            if one.encoding != UTF8:
                decoded[one.encoding] += 1
            tongue, sure = language(one.text)
            languages[tongue] += 1
            if source.languages and (tongue not in source.languages or sure < source.confidence):
                dropped.add(LANGUAGE, one.bytes, example(f"{one.where} ({tongue} {sure})", one.text))
                continue
            if rule := rules.broken(one.text, source.rules):
                dropped.add(rule, one.bytes, example(one.where, one.text))
                continue
            kept.add("documents", one.bytes)
            record = {"text": one.text, "source": source.name, "language": tongue, "where": one.where}
            documents.dump(file, record | ({"address": one.address} if one.address else {}))
    return {
        "complete": complete,
        "found": {"documents": found, "bytes": size},
        "kept": {"documents": kept.documents["documents"], "bytes": kept.bytes["documents"]},
        "dropped": dropped.facts(),
        "languages": dict(sorted(languages.items())),
        "decoded": dict(sorted(decoded.items())),
        "sha256": sha256_of(folder / documents.NAME),
    }


def _found(unit: Unit, cache: str | None, last: bool) -> Iterator[Found]:
    for piece in unit.pieces:
        try:
            yield from texts(piece, unit.source, cache)
        except Gone as gone:
            if not last or unit.source.bad == "refuse":
                raise
            yield Fault(GONE, piece.path, str(gone))


def _check(fault: Fault, source: Source) -> None:
    if source.bad == "refuse" and fault.reason != NO_TEXT:
        raise UserError(
            f'source "{source.name}": {fault.where}: {fault.detail} ({fault.reason}); mend it, or set bad = "skip" for '
            "this source to leave such things out and count them"
        )


def sign(folder: Path, read: Path, dedup: Dedup, asked: str | None, n: int) -> dict[str, Any]:
    """Signs the documents of a unit. Contaminated ones get no keys, so nothing is dropped as a copy of one."""
    shape = Shape(dedup.ngram, dedup.permutations, dedup.bands)
    index = _index(asked, n) if asked else None
    signatures, exact, have, hits = [], [], [], {}
    first = 0
    for group in documents.blocks(read):
        found = words(group)
        here = index.hits(found) if index else {}
        hits |= {first + number: name for number, name in here.items()}
        clean = np.ones(len(group), bool)
        clean[list(here)] = False
        exact.append(np.stack([_exact(text) for text in group]))
        if dedup.near:
            signed_NP, any_N = signed(found, len(group), shape)
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
        who = np.flatnonzero(have_N).astype(np.uint32)
        keys_BN = keys(signed_NP[have_N], shape)
        order = np.argsort(keys_BN, axis=1, kind="stable")
        np.save(folder / "keys.npy", np.take_along_axis(keys_BN, order, 1))
        np.save(folder / "order.npy", who[order])
    return {"documents": first, "contaminated": len(hits), "found_in": dict(Counter(hits.values()).most_common(20))}


@lru_cache(maxsize=2)
def _index(file: str, n: int) -> heldout.Index:
    """Once in a process: the file's name changes with what is in it."""
    return heldout.Index(heldout.load(Path(file)), n)


def _exact(text: str) -> np.ndarray:
    """128 bits of a text, blind to case and white space."""
    normal = " ".join(text.lower().split())
    return np.frombuffer(hashlib.blake2b(normal.encode("utf-8", "surrogatepass"), digest_size=16).digest(), np.uint64)


def match(folder: Path, units: Sequence[matching.Signed], which: matching.Bin, threshold: float) -> dict[str, Any]:
    """The pairs of one bin."""
    pairs = matching.match(units, which, threshold)
    np.save(folder / "pairs.npy", pairs)
    return {"pairs": len(pairs)}


def join(folder: Path, exact: Sequence[Path], near: Sequence[Path], firsts: Sequence[int]) -> dict[str, Any]:
    """copies.npy: the documents that repeat an earlier one, ascending; exact.npy: which of them are equal to it.

    `firsts` are the numbers of the first documents of all units; the facts hold a digest of each unit's copies.
    """
    same, leaders = matching.clusters(np.load(bin_ / "pairs.npy") for bin_ in exact)
    equal = same[same != leaders]
    every, leaders = matching.clusters(np.load(bin_ / "pairs.npy") for bin_ in [*exact, *near])
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
    """Trains on the beginning of every unit, as many characters of each source as `tokens.sample`.

    `units`: (read, sign, join folders, number of the first document, source).
    """
    from bessemer.data.tokenizer import Tokenizer

    of_source = Counter(source for *_, source in units)

    def sample() -> Iterator[str]:
        for read, sign, join, first, source in units:
            left = -(-tokens.sample // of_source[source])
            for _, record, why in documents.judged(read, sign, join, first):
                if why is None:
                    yield record["text"]
                    left -= len(record["text"])
                if left <= 0:
                    break

    made = Tokenizer.train(sample(), tokens.vocab_size, chat_style="zero")
    made.save(folder / "tokenizer")
    return {"vocab_size": made.vocab_size}


def write(
    folder: Path, read: Path, sign: Path, join: Path, first: int, part: str, number: int, tokens: Tokens,
    tokenizer: Path, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """What is left of a unit: its documents, and shard `number` of the part, with the rows of `tokens.row_length`."""
    kept, dropped = Tally(), Tally()
    languages: Counter[str] = Counter()
    with documents.create(folder) as file, Shards(folder, part, number, tokens, tokenizer, seed) as shards:
        for line, record, why in documents.judged(read, sign, join, first):
            size = len(record["text"].encode())
            if why:
                dropped.add(why, size, example(record["where"], record["text"]))
                continue
            kept.add("documents", size)
            languages[record["language"]] += 1
            file.write(line)
            shards.add(record["text"])
    return {
        "kept": {"documents": kept.documents["documents"], "bytes": kept.bytes["documents"]},
        "dropped": dropped.facts(),
        "languages": dict(sorted(languages.items())),
        "sha256": sha256_of(folder / documents.NAME),
        "shards": shards.facts,
    }
