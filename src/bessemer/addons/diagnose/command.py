"""The command: `bessemer-diagnose LOGS`, and what `bessemer diagnose` calls.

0  no alarm        1  alarms        2  a log could not be read
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from .diagnosis import LogDiagnosis, diagnose
from .formats import Unreadable, sources
from .names import MEANING, TRAINERS
from .words import describe, page, printable

EPILOG = "Exit code: 0 no alarm, 1 alarms, 2 a log could not be read. Read are: " + "; ".join(
    f"{trainer.title}, {trainer.seen}" for trainer in TRAINERS.values()
)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        "bessemer-diagnose", description="Say what the log of an RL run shows is going wrong.", epilog=EPILOG
    )
    made.add_argument("logs", nargs="+", type=Path, metavar="LOG", help="a log, or the folder of a run")
    made.add_argument("--json", action="store_true", help="everything, as JSON")
    made.add_argument("--html", type=Path, metavar="PAGE", help="write a page, too")
    made.add_argument(
        "--metric",
        action="append",
        default=[],
        metavar="METRIC=NAME",
        help=f"what the log calls a metric; METRIC is one of {', '.join(MEANING)}",
    )
    return made


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return run(args.logs, args.metric, args.json, args.html)


def run(logs: Sequence[Path], metrics: Sequence[str] = (), as_json: bool = False, html: Path | None = None) -> int:
    """Diagnoses and prints; returns the exit code. A log that cannot be read is a line on stderr, and the others are
    diagnosed all the same."""
    made: list[LogDiagnosis] = []
    failures = []
    try:
        own = named(metrics)
    except Unreadable as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in logs:
        try:
            files = sources(path)
        except Unreadable as error:
            failures.append(str(error))
            continue
        unread = []
        for file in files:
            try:
                made.append(diagnose(file, own))
            except Unreadable as error:
                unread.append(str(error))
        if len(unread) == len(files):
            failures += unread
    for metric, name in own.items():
        if made and not any(name in run.run.columns.values for log in made for run in log.runs):
            failures.append(f"--metric {metric}={name}: no log has a metric of that name")
    if as_json:
        print(json.dumps({"logs": [log.facts() for log in made], "unread": failures}, indent=1, allow_nan=False))
    else:
        encoding = (sys.stdout.encoding or "ascii").lower()
        print("\n\n".join(describe(log, plain="utf" not in encoding) for log in made))
    if html is not None and made:
        try:
            html.write_text(page(made), encoding="utf-8")
        except OSError as error:
            failures.append(f"{html}: cannot be written ({error.strerror})")
    for failure in failures:
        print(f"error: {printable(failure)}", file=sys.stderr)
    return 2 if failures else int(any(log.alarms for log in made))


def named(metrics: Sequence[str]) -> dict[str, str]:
    """METRIC=NAME arguments as a table."""
    table = {}
    for each in metrics:
        metric, equals, name = each.partition("=")
        if not equals or not name or metric not in MEANING:
            raise Unreadable(f"--metric {each}: expected METRIC=NAME with METRIC one of {', '.join(MEANING)}")
        table[metric] = name
    return table


if __name__ == "__main__":
    sys.exit(main())
