"""The command bessemer-vectors."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bessemer_vectors.reader import load, read_index
from bessemer_vectors.runner import AGREES, DIFFERS, FAILED, NOT_OFFERED, AdapterError, Report, TopicReport, check


def main(arguments: list[str] | None = None) -> int:
    """0: every case that is offered agrees; 1: one differs or failed; 2: nothing was run."""
    parser = argparse.ArgumentParser(prog="bessemer-vectors", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run an adapter over the cases")
    run.add_argument("adapter", type=Path, metavar="ADAPTER.py")
    run.add_argument("--only", action="append", default=[], metavar="TOPIC", help="this topic alone; may be repeated")
    run.add_argument("--large", action="store_true", help="cases of real size, drawn now, in place of the stored ones")
    run.add_argument("--json", type=Path, metavar="OUT", help="also write the results to a file")
    listing = commands.add_parser("list", help="the topics, or one topic with its signature and cases")
    listing.add_argument("topic", nargs="?")
    commands.add_parser("hash", help="the SHA-256 over all files")
    options = parser.parse_args(arguments)
    try:
        if options.command == "run":
            return of_adapter(options.adapter, options.only, options.large, options.json)
        print(read_index()["sha256"] if options.command == "hash" else listed(options.topic))
    except (ValueError, AdapterError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def of_adapter(path: Path, only: list[str], large: bool, out: Path | None) -> int:
    if out is not None and not out.absolute().parent.is_dir():
        raise ValueError(f"{out}: its folder does not exist")
    if large:
        from bessemer_vectors.large import topics_of

        topics = topics_of(only)
    else:
        topics = load()
    report = check(path, only, topics)
    print(table(report))
    if out is not None:
        out.write_text(json.dumps(as_json(report, large), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 1 if report.count(DIFFERS) or report.count(FAILED) else 0


def table(report: Report) -> str:
    """A row per topic; below, every case that differs or failed, and why others are not offered."""
    width = max(len("topic"), *(len(entry.topic.name) for entry in report.topics))
    head = f"{'topic':{width}}  cases  agree  differ  failed  not offered  largest rel. difference"
    rows = [f"{report.name}", "", head]
    for entry in report.topics:
        largest = entry.largest()
        rows.append(
            f"{entry.topic.name:{width}}  {len(entry.results):5}  {entry.count(AGREES):5}  {entry.count(DIFFERS):6}  "
            f"{entry.count(FAILED):6}  {entry.count(NOT_OFFERED):11}  {'-' if largest is None else f'{largest:.1e}':>7}"
        )
    counts = [report.count(outcome) for outcome in (AGREES, DIFFERS, FAILED, NOT_OFFERED)]
    rows.append(f"{'all':{width}}  {sum(counts):5}  {counts[0]:5}  {counts[1]:6}  {counts[2]:6}  {counts[3]:11}")
    for entry in report.topics:
        rows += differing(entry)
    return "\n".join(rows)


def differing(entry: TopicReport) -> list[str]:
    rows: list[str] = []
    for result in entry.results:
        if result.outcome == DIFFERS:
            rows += [
                "",
                f"{entry.topic.name}, case {result.case!r}: {result.text}",
                f"  expected  {entry.topic.formula}",
            ]
            rows += [
                f"  gives the value of: {name}: {formula}  ({source})" for name, formula, source in result.rivals
            ] or ["  the value of no rival that the case knows"]
    for outcome, word in ((FAILED, "failed"), (NOT_OFFERED, "not offered")):
        reasons: dict[str, int] = {}
        for result in entry.results:
            if result.outcome == outcome and result.text:
                reasons[result.text] = reasons.get(result.text, 0) + 1
        rows += [f"\n{entry.topic.name}, {number} {word}: {text}" for text, number in list(reasons.items())[:1]]
        if len(reasons) > 1:
            rows[-1] += f" (and {len(reasons) - 1} other reasons)"
    return rows


def as_json(report: Report, large: bool) -> dict[str, Any]:
    return {
        "format": "bessemer-vectors-results/1",
        "adapter": report.name,
        "vectors": "drawn" if large else read_index()["sha256"],
        "topics": {
            entry.topic.name: {
                "formula": entry.topic.formula,
                "tolerance": entry.topic.tolerance,
                "cases": {
                    result.case: {
                        "outcome": result.outcome,
                        "relative": result.relative,
                        "text": result.text,
                        "compared": list(result.compared),
                        "rivals": [
                            {"name": name, "formula": formula, "source": source}
                            for name, formula, source in result.rivals
                        ],
                    }
                    for result in entry.results
                },
            }
            for entry in report.topics
        },
    }


def listed(topic: str | None) -> str:
    from bessemer_vectors.topics import TOPICS

    known = load()
    if topic is None:
        width = max(map(len, known))
        return "\n".join(f"{name:{width}}  {len(of.cases):2} cases  {of.title}" for name, of in known.items())
    if topic not in known:
        raise ValueError(f"no topic {topic}; the topics are {', '.join(known)}")
    signature = TOPICS[topic]
    rows = [signature.title, "", f"  {signature.formula}", f"  sources: {'; '.join(signature.sources)}", ""]
    for heading, values in (("inputs", signature.inputs), ("outputs", signature.outputs)):
        rows.append(heading)
        rows += [
            f"  {value.name}: {value.type}{f'[{value.shape}]' if value.shape else ''}  {value.meaning}"
            for value in values
        ]
    rows.append("cases")
    for case in known[topic].cases:
        rows.append(f"  {case.name}: {case.why}")
        rows += [f"    rival: {rival.name}: {rival.formula}  ({rival.source})" for rival in case.rivals]
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
