"""bessemer-vectors against other projects: which versions agree, and which of their old bugs the vectors catch.

    python bench/vectors_peers.py --venvs /tmp/peers-venv- --trees /tmp/peers --json bench/results/vectors_peers.json
    python bench/vectors_peers.py --table bench/results/vectors_peers.json --into docs/vectors.md

bench/vectors_peers.toml lists peers, versions, bugs and differences of convention. Each version runs in a process of
its own, by the Python of its environment (`--venvs` before its name there; `main` is this one), with the adapter of
vectors/adapters. A version that no package index has is a folder under `--trees`: the source at the commit stated.

A bug is caught if the version with it differs from vectors of the topic, and the version without it agrees with each of
them. A false alarm is a vector from which a version differs that has no known bug in that topic, where
the file states no difference of convention.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FACTS = tomllib.loads((ROOT / "bench" / "vectors_peers.toml").read_text())
OFFLINE = {
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TORCHDYNAMO_DISABLE": "1",
    "WANDB_MODE": "disabled", "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip


def run(peer: dict[str, Any], version: dict[str, Any], venvs: str, trees: Path) -> dict[str, Any]:
    """The outcomes of one version by topic, those it offers. RuntimeError with the end of its error if none came."""
    python = sys.executable if version["venv"] == "main" else f"{venvs}{version['venv']}/bin/python"
    environment = {**os.environ, **OFFLINE, "PYTHONPATH": str(ROOT / "vectors" / "src")}
    if "checkout" in version:
        environment[version["checkout"]] = str(trees / version["tree"])
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        adapter = ROOT / "vectors" / "adapters" / f"{peer['adapter']}_adapter.py"
        command = [python, "-m", "bessemer_vectors", "run", str(adapter), "--json", str(report)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=1200)
        if not report.is_file():
            raise RuntimeError(f"{peer['name']} {version['version']}: {(done.stderr or done.stdout)[-1500:]}")
        found = json.loads(report.read_text())
    topics = {}
    for name, topic in found["topics"].items():
        cases = {
            case: {"outcome": entry["outcome"], "text": entry["text"], "rivals": [r["name"] for r in entry["rivals"]]}
            for case, entry in topic["cases"].items()
        }
        if any(entry["outcome"] != "not offered" for entry in cases.values()):
            topics[name] = cases
    source = {key: version[key] for key in ("pip", "commit") if key in version}
    return {
        "peer": peer["name"],
        "version": version["version"],
        **source,
        "vectors": found["vectors"],
        "topics": topics,
    }


def differing(entry: dict[str, Any], topic: str) -> set[str]:
    cases = entry["topics"].get(topic, {})
    return {case for case, entry in cases.items() if entry["outcome"] in ("differs", "failed")}


def judged(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Verdicts on the bugs, and the differences that are neither a bug's nor a convention's."""
    results = {f"{entry['peer']} {entry['version']}": entry for entry in runs}
    conventions = {
        (peer, entry["topic"], case)
        for entry in FACTS["convention"]
        for peer in entry["peers"]
        for case in entry["cases"]
    }

    def unexplained(name: str, topic: str) -> set[str]:
        peer = results[name]["peer"]
        return {case for case in differing(results[name], topic) if (peer, topic, case) not in conventions}

    bugs = []
    for bug in FACTS["bug"]:
        if bug["with"] not in results:
            continue
        topic, clean = bug["topic"], bug.get("without")
        cases = differing(results[bug["with"]], topic)
        if clean is None:
            verdict = "caught, no version without it" if cases else "missed"
        else:
            verdict = "caught" if cases and not cases & differing(results[clean], topic) else "missed"
        entries = results[bug["with"]]["topics"].get(topic, {})
        rivals = sorted({name for case in cases for name in entries[case]["rivals"]})
        bugs.append({**bug, "verdict": verdict, "cases": sorted(cases), "rivals": rivals})
    excused = {(name, bug["topic"]) for bug in FACTS["bug"] for name in [bug["with"], *bug.get("also", [])]}
    alarms = [
        {"version": name, "topic": topic, "case": case}
        for name, entry in results.items()
        for topic in entry["topics"]
        for case in sorted(unexplained(name, topic))
        if (name, topic) not in excused
    ]
    return {"bugs": bugs, "conventions": FACTS["convention"], "false_alarms": alarms}


def tables(report: dict[str, Any]) -> str:
    """Markdown: the bugs, the versions, the differences of convention."""
    rows = [
        "| bug | topic | with it | without it | what it computes | what the vectors expect | verdict |",
        "|" + "---|" * 7,
    ]
    for bug in report["bugs"]:
        rows.append(
            f"| {link(bug['thread'])} | `{bug['topic']}` | {bug['with']} | {bug.get('without', '-')} | "
            f"{bug['wrong']} | {bug['right']} | {bug['verdict']}: {', '.join(bug['cases'])} |"
        )
    rows += ["", "| project | version | topics | agree | differ | not offered, of these topics |", "|" + "---|" * 6]
    for entry in report["runs"]:
        outcomes = [case["outcome"] for cases in entry["topics"].values() for case in cases.values()]
        differ = [
            f"`{topic}` {number}"
            for topic, cases in entry["topics"].items()
            if (number := sum(case["outcome"] in ("differs", "failed") for case in cases.values()))
        ]
        names = ", ".join(f"`{topic}`" for topic in entry["topics"])
        rows.append(
            f"| {entry['peer']} | {entry['version']} | {names} | {outcomes.count('agrees')} | "
            f"{', '.join(differ) or 0} | {outcomes.count('not offered')} |"
        )
    rows += ["", "| topic | project | its formula | formula of the vectors |", "|" + "---|" * 4]
    for entry in report["conventions"]:
        rows.append(f"| `{entry['topic']}` | {', '.join(entry['peers'])} | {entry['theirs']} | {entry['vectors']} |")
    return "\n".join(rows) + "\n"


BEGIN, END = "<!-- peers: bench/vectors_peers.py --into -->\n", "<!-- end of peers -->\n"


def with_tables(page: str, text: str) -> str:
    """A page with other tables. ValueError if it has not both comments, each once."""
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"the page needs one line {BEGIN.strip()!r} and, below, one line {END.strip()!r}")
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


def link(thread: str) -> str:
    """Links of "owner/name#number", with what stands between them."""
    parts = []
    for part in thread.split(" = "):
        if "#" not in part:
            parts.append(part)
            continue
        repository, _, rest = part.partition("#")
        number = rest.split(",")[0].split(" ")[0]
        parts.append(f"[{part}](https://github.com/{repository}/issues/{number})")
    return " = ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venvs", default="/tmp/peers-venv-", help="what stands before an environment's name")
    parser.add_argument("--trees", type=Path, default=Path("/tmp/peers-src"), help="folder of source trees")
    parser.add_argument("--only", action="append", default=[], help="this peer; the others stay as the file has them")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path, help="print the tables of a file that --json wrote")
    parser.add_argument("--into", type=Path, help="write the tables between the two comments of a page instead")
    options = parser.parse_args()
    if options.table:
        text = tables(json.loads(options.table.read_text()))
        if options.into:
            options.into.write_text(with_tables(options.into.read_text(), text))
        else:
            print(text, end="")
        return
    before = json.loads(options.json.read_text())["runs"] if options.only and options.json else []
    known = {(entry["peer"], entry["version"]): entry for entry in before}
    runs = []
    for peer in FACTS["peer"]:
        for version in peer["versions"]:
            if options.only and peer["name"] not in options.only:
                entry = known[peer["name"], version["version"]]
            else:
                entry = run(peer, version, options.venvs, options.trees)
            outcomes = [case["outcome"] for cases in entry["topics"].values() for case in cases.values()]
            agree, differ = outcomes.count("agrees"), outcomes.count("differs") + outcomes.count("failed")
            print(f"{entry['peer']} {entry['version']}: {agree} agree, {differ} differ", flush=True)
            runs.append(entry)
    report = {"format": "bessemer-vectors-peers/1", "runs": runs, **judged(runs)}
    if options.json:
        options.json.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    for bug in report["bugs"]:
        print(f"{bug['verdict']:30} {bug['thread']}")
    print(f"false alarms: {len(report['false_alarms'])}")
    for alarm in report["false_alarms"]:
        print(f"  {alarm}")


if __name__ == "__main__":
    main()
