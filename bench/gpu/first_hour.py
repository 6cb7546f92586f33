"""Everything to find out in the first hour with a GPU, as one command: under 40 minutes on a Hopper card.

    python bench/gpu/first_hour.py [--out runs/first-hour] [--only step decode] [--again]
    python bench/gpu/first_hour.py --rehearse          the same on a CPU with a small network, in two minutes

Every check runs in a process of its own with a limit on its time (checks.py), so that one that crashes, hangs or
damages the card's context costs no other: whatever it started ends with it. Results are kept as they come: the same
command resumes after an interruption and repeats checks that failed, were left out or ran on other cards; `--again`
repeats everything. Without a GPU that torch can use, only `machine` runs. It ends with OUT/first_hour.json, a page with
verdicts beside it (first_hour.html), and exit status 1 if a check is bad.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from checks import BAD, CHECKS, GOOD, LEFT, ROOT, SHOWN

from bessemer.addons.watch import page

NONE = "no GPU"
MARK = "BESSEMER_CHECK"
"""Environment variable that a check's processes share."""
CARDS = f"""import torch
print(f"{{torch.cuda.device_count()}} x {{torch.cuda.get_device_name()}}" if torch.cuda.is_available() else "{NONE}")"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/first-hour"))
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS), metavar="CHECK")
    parser.add_argument("--again", action="store_true", help="repeat checks that are done")
    parser.add_argument("--rehearse", action="store_true", help="with a small network, on whatever is here")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "first_hour.json"
    report: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    stop_at_signals()
    machine = {"rehearsed": args.rehearse, "cards": cards()}
    if machine["cards"] == NONE and not args.rehearse:
        args.only = ["machine"]  # says what is wrong; other checks would compare the CPU with itself
    commit, bad = version(), []
    for name in (name for name in CHECKS if name in args.only):
        old = report.get(name, {})
        if not args.again and old.get("verdict") in (GOOD, SHOWN) and old | machine == old:
            print(f"{name}: done before ({old['verdict']})")
            continue
        print(f"{name}: {question(name)}", flush=True)
        report[name] = one(name, args.out, args.rehearse) | machine | {"commit": commit}
        print(f"  {report[name]['verdict']}: {report[name]['says']} ({report[name]['seconds']:.0f} s)", flush=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
        path.with_suffix(".html").write_text(document(report), encoding="utf-8")
        if report[name]["verdict"] == BAD:
            bad.append(name)
            if name == "machine":
                break
    print(path.with_suffix(".html"))
    if bad:
        logs = ", ".join(str(args.out / f"{name}.log") for name in bad)
        sys.exit(f"{len(bad)} bad: {', '.join(bad)}; what {'they' if len(bad) > 1 else 'it'} printed is in {logs}")


def stop_at_signals() -> None:
    """Being terminated or losing the terminal ends a check, too, whose processes have a session of their own."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, lambda number, frame: sys.exit(128 + number))


def cards() -> str:
    """The GPUs that torch can use, asked in a process of its own: this one must not hold memory of theirs."""
    return subprocess.run([sys.executable, "-c", CARDS], capture_output=True, text=True).stdout.strip() or NONE


def one(name: str, out: Path, rehearse: bool) -> dict[str, Any]:
    """Runs a check; a crash or a timeout is a bad finding with the end of what it printed."""
    result, log = out / f"{name}.json", out / f"{name}.log"
    result.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).with_name("checks.py")), name, "--json", str(result)]
    began, limit = time.monotonic(), CHECKS[name][1]
    command += ["--rehearse"] if rehearse else []
    status, mark = None, f"{MARK}={os.getpid()}-{time.monotonic_ns()}"
    marked = os.environ | dict([mark.split("=")])
    with log.open("wb") as file:
        job = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=marked)
        try:
            with suppress(subprocess.TimeoutExpired):
                status = job.wait(limit)
        finally:
            end(job, mark)
    seconds = time.monotonic() - began
    if result.exists():
        return json.loads(result.read_text()) | {"seconds": seconds}
    lines = log.read_text(errors="replace").strip().splitlines() or [""]
    why = f"took more than {limit:.0f} s" if status is None else f"ended with {status}"
    return {"verdict": BAD, "says": f"{why}: {lines[-1]}", "figures": {"log": lines[-30:]}, "seconds": seconds}


def end(job: subprocess.Popen[bytes], mark: str) -> None:
    """Kills a check's group and those of its descendants: torchrun gives every rank one of its own. A check that has
    crashed is no longer their parent, so the mark in their environment tells them, too."""
    parents, groups, family = {}, {job.pid: job.pid}, {job.pid}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            pid = int(stat.parent.name)
            parents[pid], groups[pid] = map(int, stat.read_text().rpartition(")")[2].split()[1:3])
            if mark.encode() in stat.with_name("environ").read_bytes().split(b"\0"):
                family.add(pid)
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    for group in {groups[pid] for pid in family}:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    job.wait()


def question(name: str) -> str:
    """What a check asks, in a sentence."""
    return " ".join((CHECKS[name][0].__doc__ or "").split())


def version() -> str:
    revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return revision.stdout.strip() or "unknown"


def document(findings: dict[str, Any]) -> str:
    """The page: a verdict for each check, then its figures."""
    rows = [
        (
            name,
            page.pill(finding["verdict"], on=finding["verdict"] == GOOD),
            finding["says"],
            finding.get("cards", "unknown"),
            f"{finding['seconds']:.0f}",
        )
        for name, finding in findings.items()
    ]
    counts = {
        verdict: sum(finding["verdict"] == verdict for finding in findings.values()) for verdict in (GOOD, BAD, LEFT)
    }
    lead = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    if any(finding["rehearsed"] for finding in findings.values()):
        lead += "; a rehearsal with a small network"
    commits = ", ".join(sorted({finding["commit"] for finding in findings.values()}))
    lead += f". {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, commit {commits}."
    details = [
        page.fold(f"{name}: {question(name)}", page.block(json.dumps(finding["figures"], indent=1)))
        for name, finding in findings.items()
    ]
    verdicts = page.table(("check", "verdict", "found", "cards", "s"), rows, numeric=(4,))
    return page.document(
        "The first hour",
        page.join(
            page.Html(f"<h1>{page.text(', '.join(sorted({row[3] for row in rows})))}</h1>"),
            page.section("verdicts", "Verdicts", verdicts, lead),
            page.section("figures", "Figures", page.join(*details)),
        ),
    )


if __name__ == "__main__":
    main()
