"""Results on disk: one file for every finished job, and those committed with the package.

committed/PART.json holds a list of `runs.ArmResult`, one line per arm and seed. Results from other rules,
or from other settings of the arm than today's, are reported and left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from bessemer.errors import UserError
from bessemer.runs.files import write_atomic, write_json
from bessemer_claims import PARTS, registry, runs
from bessemer_claims.runs import TIERS, ArmJob, ArmResult, Tier, joined, part
from bessemer_claims.verdict import Measured

FILE = "result.json"
"""Name of the result file in a job's directory."""


class Sifted(NamedTuple):
    results: list[ArmResult]
    left_out: list[str]
    """A sentence for each set of results that cannot be mixed with today's."""


def write(folder: Path, result: ArmResult) -> None:
    write_json(folder / FILE, asdict(result))


def read(folder: Path) -> ArmResult | None:
    """The result in a job's directory; None if there is none, UserError if the file is broken."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        return ArmResult(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it, the job measures again") from None


def digests() -> dict[tuple[str, str, str], str]:
    """(part, arm, shape) -> digest of today's settings."""
    jobs = (job for name in PARTS for tier in TIERS for job in part(name).jobs(tier) if job.arms)
    return {(job.part, job.arm, job.shape): job.digest for job in jobs}


COMMITTED = Path(__file__).resolve().parent / "committed"


def committed(folder: Path = COMMITTED) -> Sifted:
    """The committed results, or those in a folder of the same form; UserError if a file is broken."""
    arm_results: list[ArmResult] = []
    left_out: list[str] = []
    for file in (folder / f"{name}.json" for name in sorted(PARTS)):
        if not file.is_file():
            continue
        try:
            entries = [ArmResult(**entry) for entry in json.loads(file.read_text(encoding="utf-8"))]
        except (ValueError, TypeError) as error:
            raise UserError(f"{file} is no file of results ({error}); name another folder") from None
        part_results = sifted(entries, file.name)
        arm_results += part_results.results
        left_out += part_results.left_out
    return Sifted(arm_results, left_out)


def finished(out: Path) -> Sifted:
    """The results of the jobs in a folder of runs."""
    results = [read(path.parent) for path in sorted(out.glob(f"*/{FILE}"))]
    return sifted(
        (result for result in results if result is not None and (result.metrics or result.diverged)), str(out)
    )


def sifted(results: Iterable[ArmResult], where: str) -> Sifted:
    """Leaves out the results from other rules and other settings."""
    known, rules = digests(), registry.rules_hash()
    current: list[ArmResult] = []
    others: dict[str, list[str]] = {}
    for result in results:
        today = known.get((result.part, result.arm, result.shape))
        if not registry.counts(result.rules):
            why = f"ran under other rules ({result.rules[:12]}, today's are {rules[:12]})"
        elif today != result.settings:
            why = "no longer exist" if today is None else "ran with other settings than the arm has today"
        else:
            current.append(result)
            continue
        others.setdefault(why, []).append(f"{result.arm} seed {result.seed}")
    return Sifted(current, [f"{where}: {', '.join(names)} {why}; left out" for why, names in others.items()])


def save(results: Sequence[ArmResult], folder: Path) -> list[Path]:
    """Writes PART.json for every part, as they are committed, joined with what the files hold; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    results = joined(committed(folder).results, results)
    written = []
    for name in sorted({result.part for result in results}):
        own = [result for result in results if result.part == name]
        entries: list[dict[str, Any]] = [
            asdict(result) for result in sorted(own, key=lambda result: (result.shape, result.arm, result.seed))
        ]
        path = folder / f"{name}.json"
        lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
        write_atomic(path, f"[\n{lines}\n]\n")
        written.append(path)
    return written


def of_job(job: ArmJob, folder: Path) -> ArmResult | None:
    """The job's finished result, if it has today's settings and rules."""
    result = read(folder)
    return result if result is not None and result.settings == job.digest and registry.counts(result.rules) else None


def evidence(
    tier: Tier, committed_results: Sequence[ArmResult], own: Sequence[ArmResult]
) -> tuple[dict[str, dict[str, Measured]], dict[str, dict[str, Measured]], list[str]]:
    """(what judges each claim, one seed of this tier's own runs beside it, a sentence for every A/A test that failed).

    The committed results judge, unless the own runs add seeds to a metric. A full run's results join the committed."""
    judged, wrong = runs.best(committed_results, own), runs.different(joined(committed_results, own))
    if tier == "full":
        return judged, {}, wrong
    committed, once = runs.best(committed_results), runs.measured(own, tier, most=1)
    beside: dict[str, dict[str, Measured]] = {claim: {} for claim in committed if claim in once}
    for claim, metrics in committed.items():
        for metric, values in metrics.items():
            if len(judged[claim][metric].values) > len(values.values):
                continue
            judged[claim][metric] = values
            if metric in once.get(claim, {}):
                beside[claim][metric] = once[claim][metric]
    return judged, beside, wrong
