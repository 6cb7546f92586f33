"""Logs of real runs of TRL's GRPOTrainer with one planted fault each (bench/golden_logs.py): the fault stands first."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bessemer.addons.diagnose.command import main
from bessemer.addons.diagnose.diagnosis import diagnose

GOLDEN = Path(__file__).parent / "golden"
BENCH = Path(__file__).parents[2] / "bench"
RESULTS = json.loads((BENCH / "results" / "diagnose.json").read_text())
LOGS = {row["log"]: row for row in RESULTS["logs"]}


@pytest.mark.parametrize("name", LOGS)
def test_the_diagnosis_is_the_recorded_one(name):
    (run,) = diagnose(GOLDEN / f"{name}.json").runs
    assert [finding.code for finding in run.findings] == LOGS[name]["findings"]
    assert run.named.key == "trl" and {"reward", "accuracy", "length"} <= {*run.named.called}


def test_the_figures_hold():
    held = RESULTS["held"]
    assert held["right_first_cause"] + held["healthy_without_alarm"] >= 10 and held["faulty"] + held["healthy"] >= 12
    assert all(RESULTS[split]["healthy_without_alarm"] == RESULTS[split]["healthy"] >= 3 for split in ("set", "held"))
    assert {path.stem for path in GOLDEN.glob("*.json")} == {*LOGS}
    assert all(path.stat().st_size < 60_000 for path in GOLDEN.glob("*.json"))


def test_exit_codes(capsys):
    healthy = next(name for name, row in LOGS.items() if not row["findings"])
    faulty = next(name for name, row in LOGS.items() if row["findings"])
    assert main([str(GOLDEN / f"{healthy}.json")]) == 0 and main([str(GOLDEN / f"{faulty}.json")]) == 1
    assert main([str(GOLDEN / f"{healthy}.json"), str(GOLDEN / "absent.json")]) == 2
    assert "absent.json" in capsys.readouterr().err


def test_a_stranger_installs_it_alone(tmp_path):
    """The wheel of diagnose/, built from the same modules, in a fresh environment with nothing else."""
    import shutil

    root = BENCH.parent
    shutil.copytree(root / "diagnose", tmp_path / "diagnose", ignore=shutil.ignore_patterns("build", "*.egg-info"))
    shutil.copytree(root / "src/bessemer/addons/diagnose", tmp_path / "src/bessemer/addons/diagnose")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [
        *pip,
        "wheel",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "-w",
        str(tmp_path / "wheels"),
        str(tmp_path / "diagnose"),
    ]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = (tmp_path / "wheels").iterdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    subprocess.run(
        [*pip, "--python", python, "install", "--no-index", "--no-deps", str(wheel)], check=True, capture_output=True
    )
    command = str(tmp_path / "venv" / "bin" / "bessemer-diagnose")
    name, row = next((name, row) for name, row in LOGS.items() if row["findings"])
    done = subprocess.run(
        [command, "--json", str(GOLDEN / f"{name}.json")], capture_output=True, text=True, env={"PATH": ""}
    )
    assert done.returncode == 1, done.stderr
    assert [each["code"] for each in json.loads(done.stdout)["logs"][0]["runs"][0]["findings"]] == row["findings"]
    alone = "import bessemer_diagnose, importlib.util as found; assert found.find_spec('bessemer') is None"
    subprocess.run([python, "-I", "-c", alone], check=True)
