"""Does `bessemer diagnose` name the right cause first? On the golden logs of bench/golden_logs.py.

    python bench/diagnose.py --json bench/results/diagnose.json
    python bench/diagnose.py --own runs/*        # what the rules say of our own finished runs

A log is right if its first finding is one of the causes that golden_logs.EXPECTED lists for it; a healthy one is right
if there is no finding, at its end or earlier. The logs `set-*` may have been looked at when bounds were chosen;
`held-*` were judged once, with the rules fixed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

from golden_logs import EXPECTED, runs
from machine import processor

from bessemer.addons.diagnose.diagnosis import diagnose
from bessemer.addons.evals.mean_interval import wilson

LOGS = Path(__file__).resolve().parents[1] / "tests" / "diagnose" / "golden"


def judged(folder: Path) -> list[dict]:
    rows = []
    for name, settings in runs().items():
        path = folder / f"{name}.json"
        if not path.exists():
            continue
        (run,) = diagnose(path).runs
        codes = [finding.code for finding in run.findings]
        earlier = [code for code, *_ in run.earlier]
        expected = EXPECTED[settings["kind"]]
        right = codes[:1] != [] and codes[0] in expected if expected else not codes and not earlier
        rows.append({
            "log": name, "split": name.split("-")[0], "kind": settings["kind"], "findings": codes, "earlier": earlier,
            "since": [finding.since for finding in run.findings], "right": right,
        })  # fmt: skip
    return rows


def summary(rows: list[dict]) -> dict:
    made = {}
    for split in ("set", "held"):
        faulty = [row for row in rows if row["split"] == split and EXPECTED[row["kind"]]]
        healthy = [row for row in rows if row["split"] == split and not EXPECTED[row["kind"]]]
        right = sum(row["right"] for row in faulty)
        made[split] = {
            "faulty": len(faulty), "right_first_cause": right,
            "interval": [round(bound, 3) for bound in wilson(right / len(faulty), len(faulty))] if faulty else None,
            "healthy": len(healthy), "healthy_without_alarm": sum(row["right"] for row in healthy),
        }  # fmt: skip
    return made


def own(folders: list[Path]) -> dict:
    """Alarms of our own runs: log -> code -> runs."""
    counts: Counter[str] = Counter()
    read = 0
    for folder in folders:
        for path in sorted(folder.rglob("metrics.jsonl")):
            if '"rl/reward"' not in path.read_text("utf-8", errors="replace"):
                continue
            for run in diagnose(path).runs:
                read += 1
                codes = {each.code for each in run.findings} | {code for code, *_ in run.earlier}
                counts.update(codes)
                print(f"{path} {run.run.name}: {', '.join(sorted(codes)) or 'no alarm'}")
    return {"runs": read, "alarms": dict(counts)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logs", type=Path, default=LOGS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--own", type=Path, nargs="*", help="folders of our own runs")
    args = parser.parse_args()
    if args.own:
        print(json.dumps(own(args.own), indent=1))
        return
    rows = judged(args.logs)
    if not rows:
        sys.exit(f"{args.logs} has no golden logs; python bench/golden_logs.py --out FOLDER --trim {args.logs}")
    for row in rows:
        print(f"{'right' if row['right'] else 'WRONG'}  {row['log']:28} {', '.join(row['findings']) or 'no alarm'}"
              + (f"   (earlier: {', '.join(row['earlier'])})" if row["earlier"] else ""))  # fmt: skip
    results = {"machine": processor(), **summary(rows), "logs": rows}
    print(json.dumps({split: results[split] for split in ("set", "held")}, indent=1))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
