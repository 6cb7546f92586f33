"""Kills a run of every kind of stage at random moments, resumes it each time, and compares it with one never killed.

    nice -n 15 python bench/random_kills.py --work runs/random-kills --kills 200

The recipe is a chain of all twelve kinds at the smallest size that keeps each of them busy for seconds. Every round
starts the run afresh: in each stage in turn the process gets SIGKILL at random fractions of the stage's time (a sixth
of the kills: in the first second of the process instead), and the same command resumes it. Then these must be equal,
byte for byte: every output file of every stage, the summaries, and the metrics except seconds and speeds. Nothing may
be moved aside, and no temporary file or process may be left.

Each round is drawn from its own seed, which is printed. Results go to bench/results/random_kills.json after every
round, so an interrupted measurement resumes where it stopped; a round that differs ends it and keeps its folder.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import random
import shutil
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "pipeline"), str(ROOT / "tests" / "shared")]

import test_r1_paper as paper  # noqa: E402
import torch  # noqa: E402
from same_run import metrics  # noqa: E402
from stages_run import RECIPE as SMALL  # noqa: E402
from stages_run import write_recipe  # noqa: E402

from bessemer import cli  # noqa: E402
from bessemer.runs.directory import damage, stage_folders  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "random_kills.json"
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER: processes that a killed run leaves become our children
LEFT_SECONDS = 5.0
"""How long the children of a killed run may take to end."""
IGNORED = ("seconds", "per_second", "version", "wall")
TRAINED = 'precision = "float32"\nsave_seconds = 0.2'
RECIPE = (
    'name = "kills"\nseed = 7\n'
    + SMALL[SMALL.index("[model]") : SMALL.index("[stage.limits]")].replace('countdown = "task:countdown"\n', "")
    + """
[stage.limits]
arithmetic = "20K"
[[stage]]
kind = "pretrain"
tokens = "40K"
lr = 1e-2
batch_rows = 8
micro_rows = 4
compile = "off"
{trained}
prompts = ["a fox"]
first_sample = "10K"
sample_every = "15K"
validate_every = "20K"
mixture = {{ english = 0.5, arithmetic = 0.5 }}
[[stage]]
kind = "corpus"
name = "rows-128"
row_length = 128
tokenizer = "corpus"
heldout = 0.2
parts = {{ english = "{text}" }}
[[stage]]
kind = "extend"
from = "pretrain"
corpus = "rows-128"
length = 128
rope_factor = 8.0
tokens = "10K"
lr = 1e-3
batch_rows = 4
micro_rows = 2
compile = "off"
{trained}
validate_every = "5K"
mixture = {{ english = 1.0 }}
[[stage]]
kind = "longeval"
models = ["pretrain", "extend"]
switched = ["pretrain"]
haystack = "{text}"
corpus = "rows-128"
parts = ["english"]
lengths = [100]
problems = 3
needles = 2
rows = 2
[[stage]]
kind = "import"
model = "{folder}/model"
[[stage]]
kind = "examples"
tasks = ["arithmetic"]
examples = 60
[[stage]]
kind = "sft"
name = "taught"
from = "import"
samples = ["examples"]
style = "r1"
epochs = 2
row_length = 256
lr = 1e-3
lr_final = 1e-4
{trained}
prompts = ["Compute 1+2."]
[[stage]]
kind = "rl"
name = "zero"
from = "import"
prompt_template = "r1-zero"
tasks = ["jsonl:{folder}/maths.jsonl@train", "code:{folder}/code.jsonl@train"]
heldout.tasks = ["jsonl:{folder}/aime_2024.jsonl@test"]
rollouts = 3
prompts_per_rollout = 3
samples = 4
updates_per_rollout = 2
kl.reference_every = 2
max_new_tokens = 48
heldout.minimum_pass = 0.0
heldout.every = 2
heldout.problems = 3
lr = 1e-4
{trained}
[[stage]]
kind = "reject"
from = "zero"
tasks = ["jsonl:{folder}/maths.jsonl@train", "code:{folder}/code.jsonl@train"]
problems = 6
samples = 4
keep = 2
max_new_tokens = 48
form = "r1"
consistency = 0.0
repeated = 1.0
[[stage]]
kind = "sft"
name = "dev"
from = "import"
samples = ["reject"]
data = ["{folder}/others.jsonl"]
style = "r1"
epochs = 4
row_length = 256
lr = 1e-3
lr_final = 1e-4
{trained}
[[stage]]
kind = "reward-model"
name = "helpful"
from = "dev"
aim = "helpful"
data = ["{folder}/preference_pairs.jsonl"]
made = 40
samples = 1
epochs = 2
max_new_tokens = 12
row_length = 192
lr = 4e-3
batch_rows = 6
micro_rows = 3
heldout = 0.15
{trained}
[[stage]]
like = "helpful"
name = "harmless"
aim = "harmless"
data = ["{folder}/safety_labels.jsonl"]
[[stage]]
kind = "rl"
name = "r1"
from = "dev"
tasks = ["arithmetic"]
general.tasks = ["general:{folder}/general.jsonl@train"]
general.prompts = 2
general.reward_models = ["helpful", "harmless"]
rollouts = 2
prompts_per_rollout = 2
samples = 4
max_new_tokens = 32
heldout.minimum_pass = 0.0
heldout.problems = 2
lr = 1e-4
{trained}
[[stage]]
kind = "distill"
from = "dev"
teacher = "r1"
tasks = ["arithmetic"]
steps = 4
prompts_per_step = 4
max_new_tokens = 32
eval_every = 2
eval_problems = 2
{trained}
[[stage]]
kind = "eval"
models = ["zero", "dev", "r1", "distill"]
tasks = ["arithmetic", "jsonl:{folder}/aime_2024.jsonl@test"]
problems = 3
samples = 4
max_new_tokens = 32
"""
)


def write_inputs(folder: Path) -> Path:
    """Writes the data, a model that has memorised its answers, and the recipe, unless they exist; returns its path."""
    recipe = folder / "kills.toml"
    if not recipe.exists():
        folder.mkdir(parents=True, exist_ok=True)
        text = write_recipe(folder).with_name("text.jsonl")
        paper.write_data(folder)
        paper.write_base(folder)
        recipe.write_text(RECIPE.format(text=text, folder=folder, trained=TRAINED))
    return recipe


def start(recipe: Path, out: Path) -> int:
    """Forks a process that does `bessemer run` without the seconds that the imports take; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    code: Any = 1
    try:
        log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1), os.dup2(log, 2)
        sys.argv = ["bessemer", "run", str(recipe), "--out", str(out)]
        cli.main()
    except SystemExit as exit:
        code = exit.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def ended(pid: int) -> int | None:
    """The exit code of a process; None while it runs."""
    waited, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if waited else None


def left_over() -> list[str]:
    """The command names of processes that outlive their killed run by more than LEFT_SECONDS."""
    until = time.monotonic() + LEFT_SECONDS
    while True:
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        if not children or time.monotonic() > until:
            return [Path(f"/proc/{pid}/comm").read_text().strip() for pid in children]
        time.sleep(0.05)


def place(out: Path) -> str:
    """The stage in progress."""
    folders = stage_folders(out) if out.exists() else []
    return next((name for _, name, at in folders if not (at / "done.json").exists()), "between")


def kill_at(
    recipe: Path, out: Path, stage: str, number: int, seconds: float, from_start: bool
) -> dict[str, Any] | None:
    """Starts the run and kills it `seconds` after it began (or resumed) the stage, or as soon as the stage is done;
    None if the run ended first."""
    folder, begun = out / f"{number:02d}-{stage}", time.time_ns()
    from_start = from_start or (folder / "done.json").exists()
    pid, clock = start(recipe, out), time.monotonic()
    under_way = from_start
    while (code := ended(pid)) is None:
        record = folder / "stage.json"
        if not under_way and record.exists() and record.stat().st_mtime_ns > begun:
            under_way, clock = True, time.monotonic()
        done = not from_start and (folder / "done.json").exists()
        if done or (under_way and time.monotonic() - clock >= seconds):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            at, leftovers = place(out), left_over()
            return {"aimed": stage, "stage": at, "seconds": round(seconds, 3), "start": from_start, "left": leftovers}
        time.sleep(0.004)
    assert code == 0, f"the run exited with {code}: see {out.with_suffix('.log')}"
    return None


def finish(recipe: Path, out: Path) -> None:
    _, status = os.waitpid(start(recipe, out), 0)
    assert status == 0, f"the run exited with {os.waitstatus_to_exitcode(status)}: see {out.with_suffix('.log')}"


def result(out: Path) -> dict[str, Any]:
    """Everything that must not depend on kills."""
    files: dict[str, Any] = {"metrics.jsonl": metrics(out)}
    for _, name, folder in stage_folders(out):
        done = json.loads((folder / "done.json").read_text())
        assert not damage(folder, done)
        files |= {f"{name}/{file}": fact["sha256"] for file, fact in done["outputs"].items()}
        files[f"{name}: summary"] = _without_clock(done["summary"])
    return files


def _without_clock(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _without_clock(item) for key, item in value.items() if not any(word in key for word in IGNORED)}


def differences(expected: dict[str, Any], out: Path) -> list[str]:
    actual = result(out)
    differing = [name for name in actual.keys() | expected.keys() if actual.get(name) != expected.get(name)]
    leftovers = [
        str(path.relative_to(out)) for path in out.rglob("*") if ".tmp-" in path.name or ".stale-" in path.name
    ]
    return sorted(differing + leftovers)


def one_round(recipe: Path, out: Path, seed: str, seconds: dict[str, float], per_stage: int) -> list[dict[str, Any]]:
    """Kills a new run `per_stage` times in every stage, then lets it end."""
    draw, kills = random.Random(seed), []
    for number, (stage, length) in enumerate(seconds.items(), start=1):
        for _ in range(per_stage):
            from_start = draw.random() < 1 / 6
            moment = draw.random() * (1.0 if from_start else 1.1 * length)
            if kill := kill_at(recipe, out, stage, number, moment, from_start):
                kills.append(kill)
    finish(recipe, out)
    return kills


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder for the runs")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--per-stage", type=int, default=2, help="kills in each stage of a round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    work = args.work.resolve()
    if not (work / "kills.toml").exists():  # in a process of its own, so no training state stays here
        if (pid := os.fork()) == 0:
            write_inputs(work)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
    recipe, uninterrupted = work / "kills.toml", work / "whole"
    finish(recipe, uninterrupted)
    expected = result(uninterrupted)
    times = {
        name: json.loads((at / "done.json").read_text())["seconds"] for _, name, at in stage_folders(uninterrupted)
    }
    print(f"never killed: {len(times)} stages, {sum(times.values()):.0f} s, {len(expected)} files and summaries")
    report = json.loads(args.results.read_text()) if args.results.exists() else {"rounds": {}}
    report |= {"machine": platform.processor() or platform.machine(), "torch": torch.__version__, "seconds": times}
    while (n := sum(len(round_entry["kills"]) for round_entry in report["rounds"].values())) < args.kills:
        seed = f"{args.seed}-{len(report['rounds'])}"
        out = work / f"round-{seed}"
        shutil.rmtree(out, ignore_errors=True)
        kills = one_round(recipe, out, seed, times, args.per_stage)
        differing = differences(expected, out)
        n_left = sum(len(kill["left"]) for kill in kills)
        print(f"seed {seed}: {len(kills)} kills, {n + len(kills)} in all: {len(differing)} differ, {n_left} left over",
              *differing, sep="\n  ", flush=True)  # fmt: skip
        report["rounds"][seed] = {"kills": kills, "compared": len(expected), "differ": differing}
        counts: dict[str, int] = {}
        for round_entry in report["rounds"].values():
            for kill in round_entry["kills"]:
                counts[kill["stage"]] = counts.get(kill["stage"], 0) + 1
        report["kills"], report["by_stage"] = sum(counts.values()), counts
        report["differ"] = sum(len(round_entry["differ"]) for round_entry in report["rounds"].values())
        args.results.write_text(json.dumps(report, indent=1) + "\n")
        if differing or n_left:
            sys.exit(1)
        shutil.rmtree(out)


if __name__ == "__main__":
    main()
