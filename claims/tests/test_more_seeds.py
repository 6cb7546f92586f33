"""claims/tools/more_seeds.py: what it plans, and that it keeps what it ran."""

import runpy
import sys
from pathlib import Path

import pytest

from bessemer_claims import pretrain, registry, results
from bessemer_claims.runs import ArmResult

TOOL = Path(__file__).parents[1] / "tools" / "more_seeds.py"


def test_missing_seeds_run_and_are_kept(tmp_path, monkeypatch, capsys):
    """Every job's run is skipped: its result is there already. One seed of one arm had been committed before."""
    monkeypatch.setattr(results, "COMMITTED", tmp_path / "committed")
    jobs = {(job.arm, job.seed): job for job in pretrain.jobs("full") if job.shape in ("claims", "all")}

    def result(arm, seed):
        job = jobs[arm, seed]
        return ArmResult("pretrain", arm, seed, job.shape, job.digest, registry.rules_hash(), {"bpb": 2.0})

    results.save([result("ref", 1)], tmp_path / "committed")
    for arm, seed in jobs:
        if arm in ("ref", "NS", "corpus"):
            folder = tmp_path / "runs" / jobs[arm, seed].name
            folder.mkdir(parents=True)
            results.write(folder, result(arm, seed))

    def run(*options):
        monkeypatch.setattr(sys, "argv", ["more_seeds.py", "ref", "NS", "--runs", str(tmp_path / "runs"), *options])
        runpy.run_path(str(TOOL), run_name="__main__")

    run("--dry-run")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("seed 0: corpus") and lines[1].startswith("seed 1: NS,") and lines[-1][:7] == "seed 10"
    run()
    kept = {(row.arm, row.seed) for row in results.committed(tmp_path / "committed").results}
    assert kept == {(arm, seed) for arm in ("ref", "NS") for seed in range(1, pretrain.arms()[arm].seeds + 1)}
    monkeypatch.setattr(sys, "argv", ["more_seeds.py", "nobody"])
    with pytest.raises(SystemExit, match="no arm nobody"):
        runpy.run_path(str(TOOL), run_name="__main__")
