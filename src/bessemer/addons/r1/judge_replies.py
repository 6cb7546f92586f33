"""Stored replies of judges, and which model gave them.

A name does not say who answers: another run's model may be served under it. So the replies of an API are stored under
the identity of its model, which is found at every start:

    digest      what the server itself says about the model's files (`bessemer serve` does)
    otherwise   what /models lists, the server's fingerprint, and the answers to PROBES at temperature 0

Some servers do not answer the same even at temperature 0. So a model is known again if AGREE of the latter four are as
they were at some time, and a probe that differs is asked up to TRIES times.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from bessemer.errors import UserError

PROBES = (
    "Write four sentences about a river in winter.",
    "Name twelve things in an old workshop, separated by commas.",
    "Explain in a few words why the sky is blue, then why sunsets are red.",
)
TRIES = 3
AGREE = 3
"""Of the answers to three probes and the server's fingerprint."""


@dataclass(frozen=True)
class JudgeModel:
    """A model that has answered."""

    identity: str
    facts: str
    """What the server lists about it, as JSON."""
    seen: tuple[frozenset[str], ...]
    """Digests of its answers to each probe, and of its server's fingerprints."""


def recognised(
    facts: Mapping[str, str | int], probe: Callable[[str], tuple[str, str]], known: Sequence[JudgeModel]
) -> JudgeModel:
    """The model that answers, one of `known` or a new one. `probe(question)` gives (answer, fingerprint)."""
    listed = json.dumps(facts, sort_keys=True)
    matches = [model for model in known if model.facts == listed]
    if "digest" in facts:
        return matches[0] if matches else JudgeModel(_digest(listed), listed, ())
    digests: list[set[str]] = [set() for _ in range(len(PROBES) + 1)]
    for tries in range(TRIES):
        for number, question in enumerate(PROBES):
            if tries == 0 or not any(digests[number] & model.seen[number] for model in matches):
                answer, fingerprint = probe(question)
                digests[number].add(_digest(answer))
                digests[-1].add(_digest(fingerprint))
        for model in matches:
            if sum(bool(new & old) for new, old in zip(digests, model.seen, strict=True)) >= AGREE:
                merged = tuple(old | new for new, old in zip(digests, model.seen, strict=True))
                return JudgeModel(model.identity, listed, merged)
        if not matches:
            break
    answers = tuple(map(frozenset, digests))
    return JudgeModel(_digest(listed, *("".join(sorted(group)) for group in answers)), listed, answers)


def _digest(*texts: str) -> str:
    return sha256("\0".join(texts).encode("utf-8", "replace")).hexdigest()[:16]


class Replies:
    """Stored replies by key, in an SQLite file that survives a kill at any moment and serves several runs, or in memory
    (None)."""

    def __init__(self, path: Path | None) -> None:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.database = sqlite3.connect(path or ":memory:", timeout=60, isolation_level=None)
            self.database.execute("create table if not exists replies (key text primary key, reply text not null)")
            self.database.execute(
                "create table if not exists models (address text, identity text, facts text, seen text, "
                "last integer, primary key (address, identity))"
            )
        except sqlite3.Error as error:
            raise UserError(f"{path} cannot be used for the replies of a judge ({error}); move it away") from error

    def get(self, key: str) -> str | None:
        row = self.database.execute("select reply from replies where key = ?", (key,)).fetchone()
        return None if row is None else row[0]

    def put(self, key: str, reply: str) -> None:
        # lone surrogates have no UTF-8
        text = reply.encode("utf-8", "replace").decode()
        self.database.execute("insert or replace into replies values (?, ?)", (key, text))

    def models(self, address: str) -> list[JudgeModel]:
        """The models that have answered at a address, the last one first."""
        rows = self.database.execute(
            "select identity, facts, seen from models where address = ? order by last desc", (address,)
        )
        return [JudgeModel(identity, facts, tuple(map(frozenset, json.loads(seen)))) for identity, facts, seen in rows]

    def met(self, address: str, model: JudgeModel) -> None:
        """Records the model that answers at a address now."""
        seen = json.dumps([sorted(replies) for replies in model.seen])
        self.database.execute(
            "insert or replace into models select ?, ?, ?, ?, coalesce(max(last), 0) + 1 from models",
            (address, model.identity, model.facts, seen),
        )
