"""The report of a build: counts of documents and bytes by reason, as JSON and as plain text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from bessemer.addons.curate.origins import Unit
from bessemer.addons.curate.settings import Settings

EXAMPLES = 3
SHOWN = 160
"""Most characters of an example."""


class Tally:
    """Counts and examples by name. `facts` are plain JSON, so that `added` can sum those of many units."""

    def __init__(self) -> None:
        self.documents: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, name: str, size: int, example: str | None = None) -> None:
        self.documents[name] += 1
        self.bytes[name] += size
        if example is not None and len(kept := self.examples.setdefault(name, [])) < EXAMPLES:
            kept.append(example)

    def facts(self) -> dict[str, Any]:
        return {
            name: {"documents": n, "bytes": self.bytes[name], "examples": self.examples.get(name, [])}
            for name, n in sorted(self.documents.items())
        }


def example(where: str, text: str) -> str:
    """One line that identifies a document and shows its beginning."""
    line = " ".join(text[: 2 * SHOWN].split())
    return f"{where}: {line[:SHOWN]}{'...' if len(line) > SHOWN else ''}"


def added(tables: list[dict[str, Any]]) -> dict[str, Any]:
    """The sum of facts: adds numbers, adds tables by key, and keeps the first EXAMPLES entries of lists."""
    total: dict[str, Any] = {}
    for table in tables:
        for key, value in table.items():
            if isinstance(value, dict):
                total[key] = added([total.get(key, {}), value])
            elif isinstance(value, list):
                total[key] = (total.get(key, []) + value)[:EXAMPLES]
            else:
                total[key] = total.get(key, 0) + value
    return total


MB = 1e6
SIDES = ("train", "heldout")


def gather(
    settings: Settings, searched: Mapping[str, int], units: Sequence[Unit], ignored: Mapping[str, int],
    read: Sequence[dict[str, Any]], write: Sequence[dict[str, Any]], steps: Mapping[str, dict[str, Any]],
    seconds: float, memory: int, workers: int, vocab_size: int,
) -> dict[str, Any]:  # fmt: skip
    """The report as JSON. `searched`: the number of problems searched for, by task."""
    sources: dict[str, Any] = {}
    for source in settings.sources:
        at = [number for number, unit in enumerate(units) if unit.source.name == source.name]
        read_sums = added([{key: read[i][key] for key in ("found", "dropped", "languages", "decoded")} for i in at])
        write_sums = added([{key: write[i][key] for key in ("kept", "dropped")} for i in at])
        tokens = added([_tokens(write[i]) for i in at])
        sources[source.name] = {
            "from": source.spec,
            "domain": source.domain,
            "part": source.part,
            "units": len(at),
            "files_ignored": ignored[source.name],
            **read_sums,
            "dropped": {**read_sums["dropped"], **write_sums["dropped"]},
            "kept": write_sums["kept"],
            "tokens": tokens,
            "bytes_per_token": _ratio(sum(side["bytes"] for side in tokens.values()), tokens),
        }
    parts: dict[str, Any] = {}
    for part in dict.fromkeys(source.part for source in settings.sources):
        tokens = added([_tokens(facts) for unit, facts in zip(units, write, strict=True) if unit.source.part == part])
        parts[part] = tokens | {"bytes_per_token": _ratio(sum(side["bytes"] for side in tokens.values()), tokens)}
    found_bytes = sum(facts_of_source["found"]["bytes"] for facts_of_source in sources.values())
    return {
        "name": settings.name,
        "vocab_size": vocab_size,
        "row_length": settings.tokens.row_length,
        "workers": workers,
        "seconds": round(seconds, 2),
        "peak_memory": max([memory, *(facts["memory"] for step in steps.values() for facts in step["facts"])]),
        "total": {
            "found": added([facts_of_source["found"] for facts_of_source in sources.values()]),
            "kept": added([facts_of_source["kept"] for facts_of_source in sources.values()]),
            "tokens": sum(side["tokens"] for part in parts.values() for side in (part["train"], part["heldout"])),
        },
        "searched_for": dict(searched),
        "parts": parts,
        "sources": sources,
        "steps": {name: _step(step, found_bytes) for name, step in steps.items()},
    }


def _tokens(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {side: {key: facts["shards"][side][key] for key in ("documents", "tokens", "bytes")} for side in SIDES}


def _ratio(size: int, tokens: Mapping[str, Any]) -> float:
    return round(size / max(1, sum(side["tokens"] for side in tokens.values())), 3)


def _step(step: Mapping[str, Any], n_bytes: int) -> dict[str, Any]:
    """Facts of a step, with `bytes_per_second` of the bytes read if all its jobs ran in this build."""
    facts, all_fresh = step["facts"], step["fresh"] == len(step["facts"])
    return {
        "jobs": len(facts),
        "done_now": step["fresh"],
        "seconds": round(step["wall"], 2),
        "worker_seconds": round(sum(job_facts["seconds"] for job_facts in facts), 2),
        "cpu_seconds": round(sum(job_facts["cpu_seconds"] for job_facts in facts), 2),
        "peak_memory": max((job_facts["memory"] for job_facts in facts), default=0),
        "bytes_per_second": round(n_bytes / step["wall"]) if all_fresh and step["wall"] > 0 else None,
    }


def text(facts: Mapping[str, Any]) -> str:
    """The report as plain text."""
    total = facts["total"]
    lines = [
        f"{facts['name']}: {total['found']['documents']:,} documents ({total['found']['bytes'] / MB:,.1f} MB) read, "
        f"{total['kept']['documents']:,} ({total['kept']['bytes'] / MB:,.1f} MB) kept: {total['tokens']:,} tokens",
        f"{facts['seconds']:,.1f} s with {facts['workers']} workers, at most {facts['peak_memory'] / MB:,.0f} MB each",
        *(
            f"searched for: {name} ({count:,} problem{'s' if count != 1 else ''})"
            for name, count in facts["searched_for"].items()
        ),
        "",
        _row(("part", "documents", "held out", "tokens", "bytes/token")),
    ]
    for name, part in facts["parts"].items():
        lines.append(
            _row((
                name, f"{part['train']['documents']:,}", f"{part['heldout']['documents']:,}",
                f"{part['train']['tokens'] + part['heldout']['tokens']:,}", f"{part['bytes_per_token']:.2f}",
            ))
        )  # fmt: skip
    for name, source in facts["sources"].items():
        lines += ["", *_source(name, source)]
    lines += ["", _row(("step", "jobs", "now", "seconds", "MB/s", "MB"))]
    for name, step in facts["steps"].items():
        speed = f"{step['bytes_per_second'] / MB:,.1f}" if step["bytes_per_second"] else "-"
        memory = f"{step['peak_memory'] / MB:,.0f}"
        lines.append(
            _row((name, f"{step['jobs']:,}", f"{step['done_now']:,}", f"{step['seconds']:,.1f}", speed, memory))
        )
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"{cells[0]:<24}" + "".join(f"{cell:>14}" for cell in cells[1:])


def _source(name: str, source: Mapping[str, Any]) -> list[str]:
    found, kept = source["found"], source["kept"]
    share = kept["documents"] / max(1, found["documents"])
    lines = [
        f"{name} ({source['from']}): {found['documents']:,} documents, {kept['documents']:,} kept ({share:.1%}), "
        f"{found['bytes'] / MB:,.1f} MB, {kept['bytes'] / MB:,.1f} MB kept",
        f"  languages: {_most(source['languages'])}",
    ]
    if source["decoded"]:
        lines.append(f"  not UTF-8: {_most(source['decoded'])}")
    if source["files_ignored"]:
        lines.append(f"  {source['files_ignored']:,} files of other kinds were ignored")
    for reason, counts in sorted(source["dropped"].items(), key=lambda item: -item[1]["documents"]):
        lines.append(f"  {reason:<30}{counts['documents']:>12,} documents{counts['bytes'] / MB:>12,.1f} MB")
        lines += [f"      {example}" for example in counts["examples"][:1]]
    return lines


def _most(counts: Mapping[str, int], most: int = 8) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    others = sum(n for _, n in ordered[most:])
    return ", ".join(f"{name} {n:,}" for name, n in ordered[:most]) + (f", others {others:,}" if others else "")
