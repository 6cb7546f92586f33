"""Recipes on many ranks, as a user runs them: started, killed, hung, stopped, resumed under another layout."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import rl_stage
import torch
import whole_runs
from forks import Fork
from stages_run import copy_without, run, write_recipe

from bessemer import cli
from bessemer.addons.distributed import watchdog
from bessemer.hf import deepseek

SHORT = ("--set", "pretrain.tokens=20K", "--set", "pretrain.sample_every=100K", "--set", "pretrain.save_seconds=0.2",
         "--set", "pretrain.ema_decay=0.9")  # fmt: skip
LONG = ("--set", "pretrain.tokens=200K", *SHORT[2:])


MORE = """
[[stage]]
kind = "sft"
data = ["{talks}"]
epochs = 1
row_length = 48
lr = 3e-3
lr_final = 1e-3
batch_rows = 4
micro_rows = 2
precision = "float32"
prompts = ["1 + 1 ="]
"""
"""Added between pre-training and RL; its last step has fewer rows than the others."""


LAST = """
[[stage]]
kind = "reward-model"
name = "helpful"
aim = "helpful"
from = "pretrain"
data = ["{pairs}"]
made = 8
samples = 1
max_new_tokens = 4
row_length = 160
lr = 1e-2
batch_rows = 4
micro_rows = 2
heldout = 0.3
style = "r1"
precision = "float32"

[[stage]]
kind = "distill"
name = "taught"
from = "pretrain"
teacher = "zero"
tasks = ["arithmetic"]
steps = 2
prompts_per_step = 4
samples = 2
max_new_tokens = 12
lr = 3e-3
eval_every = 2
eval_problems = 2
micro_tokens = 200
precision = "float32"
"""
"""Added after RL."""


CRITIC = f'advantage = "critic"\nreward = "{rl_stage.COIN_TERM}"'
ROOT = Path(__file__).parents[2]
FILTER = f'{{ name = "{ROOT}/examples/plugins/difficulty.py:DifficultyFilter", pool = 2, explore = 0.3 }}'
HOOKS = f'hooks = [{FILTER}, "routing-replay", {{ name = "correction", form = "token-truncate" }}]\ntop_p = 0.9'


AFTER_RL = ("05-helpful", "06-taught")


def sums(folder):
    """A task with so few problems that RL repeats some."""
    for split, first in (("train", 2), ("test", 6)):
        lines = (json.dumps({"question": f"{n} + {n} =", "answer": str(2 * n)}) for n in range(first, first + 4))
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return f"jsonl:{folder}"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a recipe and of its run on one process."""
    folder = tmp_path_factory.mktemp("many")
    recipe = write_recipe(folder)
    before, _, after = recipe.read_text().partition('[[stage]]\nkind = "rl"')
    turns = ((f"{n} + 1 =", str(n + 1)) for n in range(80))
    talks = [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in turns]
    (folder / "talks.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    output = {"chosen": "It is a good question.", "rejected": "What a stupid thing!"}
    answers = {key: f"<think>\n</think>\n\n{text}" for key, text in output.items()}
    pairs = "".join(json.dumps({"prompt": f"Say {n}.", **answers}) + "\n" for n in range(60))
    (folder / "pairs.jsonl").write_text(pairs)
    more, rl = MORE.format(talks=folder / "talks.jsonl"), after.partition("[[stage]]")[0]
    rl = rl.replace('tasks = ["arithmetic"]', f'tasks = ["arithmetic", "{sums(folder)}"]\n{HOOKS}\n{CRITIC}')
    rl = rl.replace("samples = 6", "samples = 2")  # half the groups get equal rewards and are left out later
    recipe.write_text(f'{before}{more}[[stage]]\nkind = "rl"{rl}{LAST.format(pairs=folder / "pairs.jsonl")}')
    run(recipe, folder / "one", *SHORT[1::2])
    return folder


@pytest.fixture
def out(base, tmp_path):
    """A copy of the run in which pre-training comes next."""
    return copy_without(base / "one", tmp_path / "run", "02-pretrain", "03-sft", "04-zero", *AFTER_RL)


def command(base, out, *more, until="pretrain"):
    return ["run", str(base / "small.toml"), "--out", str(out), "--until", until, *more]


def start(base, out, *more, environment=None, until="pretrain"):
    """Run the program in a fork; the ranks that it starts are new processes."""

    def work():
        os.environ.update({"OMP_NUM_THREADS": "1"} | (environment or {}))
        sys.argv = ["bessemer", *command(base, out, *more, until=until)]
        cli.main()

    return Fork(work)


def finished(process, seconds=120):
    _, output = process.communicate(timeout=seconds)
    return process.returncode, output


def figures(out, stage, key):
    """A stage's metric by step; no step may occur twice."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = [(line["step"], line["values"][key]) for line in lines if line["stage"] == stage and key in line["values"]]
    assert len(dict(found)) == len(found), "a step is there twice"
    return dict(found)


def losses(out, stage="pretrain"):
    found = figures(out, stage, "train/loss")
    assert list(found) == list(range(1, len(found) + 1)), "a step is missing"
    return found


def same_curve(mine, wanted):
    """Equal up to rounding, which depends on the order of sums; a lost or repeated batch would exceed that at once."""
    assert mine.keys() == wanted.keys()
    for step, loss in wanted.items():
        assert mine[step] == pytest.approx(loss, rel=2e-3, abs=1e-6), step


def rank_of(process, rank, seconds=30.0):
    """The pid of this rank among the children of `process`; waits for it to start."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in children:
            entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if f"RANK={rank}".encode() in entries:
                return int(pid)
        time.sleep(0.05)
    raise AssertionError(f"rank {rank} never came")


def wait_for_step(out, step, stage="pretrain", seconds=60.0):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        text = (out / "metrics.jsonl").read_text()
        if f'"stage":"{stage}","step":{step},' in text:
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} never came")


def hang(process, rank):
    """Stop this rank with SIGSTOP until another has said so and the agent ends the attempt; returns the line."""
    hung, line = rank_of(process, rank), ""
    os.kill(hung, signal.SIGSTOP)
    while "has waited" not in line:
        line = process.stderr.readline()
        assert line, "it ended without a word"
    until = time.monotonic() + 60
    while not pending(hung) >> signal.SIGTERM - 1 & 1:  # which the agent sends once it knows that the other has ended
        assert time.monotonic() < until, "the agent did not end the attempt"
        time.sleep(0.02)
    os.kill(hung, signal.SIGKILL)
    return line


def pending(pid):
    """The signals that wait for this process, as a mask."""
    return int(re.search(r"ShdPnd:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[1], 16)


def test_a_hung_rank_is_named_and_takes_nothing_with_it(base, out):
    """One of two pipeline ranks is under SIGSTOP and reports nothing more; the other says who waited for whom and ends
    the attempt. All restart, the curve is that of one process, and the models are there."""
    process = start(base, out, *SHORT, "--set", "layout.pp=2", "--set", "layout.timeout=6s")
    wait_for_step(out, 12)
    line = hang(process, 1)
    words = r"rank 0 has waited \d+ s for .* from rank 1 in step \d+; rank 1 has not reported for \d+ s, last"
    assert re.search(words, line), line
    status, output = finished(process)
    assert status == 0, output
    assert "rank 0 waited too long for another rank; restarting all ranks" in output
    assert "resuming at step" in output and "2 ranks: pp 2 x dp 1 x ep 1\n" in output
    assert "schedule: dualpipe, 1f1b for steps of fewer than 4 micro-batches" in output
    assert "Traceback" not in output
    same_curve(losses(out), losses(base / "one"))
    for name in ("model", "model-ema"):
        reference, ours = (deepseek.load(root / "02-pretrain" / name).state_dict() for root in (out, base / "one"))
        assert all((reference[n] - t).norm() <= 0.05 * t.norm() + 1e-3 for n, t in ours.items() if "bias_E" not in n), (
            name
        )
        assert {path.name for path in (out / "02-pretrain" / name).iterdir()} == {
            path.name for path in (base / "one" / "02-pretrain" / name).iterdir()
        }
    assert '"val/bpb_ema/arithmetic":' in (out / "metrics.jsonl").read_text()


def test_stopped_on_two_ranks_and_gone_on_with_on_one(base, out, tmp_path, call):
    """A node is taken away: SIGTERM leaves a checkpoint, and fewer ranks resume from it, here one process."""
    process = start(base, out, *SHORT, "--set", "layout.ep=2")
    wait_for_step(out, 8)
    process.send_signal(signal.SIGTERM)
    status, output = finished(process)
    assert status == 130, output
    assert f'stopped in stage "pretrain"; nothing is lost; continue with: bessemer run {out}/recipe.toml' in output
    done = max(losses(out))
    status, output = finished(start(base, out, *SHORT))
    assert status == 0 and f"resuming at step {done}," in output
    same_curve(losses(out), losses(base / "one"))
    consolidated(out, tmp_path, call)


def consolidated(out, folder, call):
    """Convert the last checkpoint to a model directory, with and without MTP; it cannot become GGUF directly."""
    last = max((out / "02-pretrain" / "state").glob("step-*"))
    for more in ((), ("--no-mtp",)):
        made = folder / "".join(["model", *more])  # convert never overwrites a model
        assert call("convert", last, made, *more)[0] == 0
        expected, found = (deepseek.load(path).state_dict() for path in (out / "02-pretrain" / "model", made))
        assert all(torch.equal(expected[name], value) for name, value in found.items())
        assert any(name.startswith("mtp") for name in found) == (not more)
    assert (folder / "model" / "tokenizer.json").is_file()
    status, _, output = call("convert", last, folder / "x", "--to", "gguf")
    assert status == 2 and "convert it to a model directory first" in output


@pytest.mark.parametrize("killed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_without_an_agent_the_rank_that_is_left_names_the_one_that_died(base, out, killed):
    """No agent watches the two processes, as if each ran on its own machine."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    more = (*LONG, "--set", "layout.pp=2", "--set", "layout.timeout=20s")
    ranks = [start(base, out, *more, environment=where | {"RANK": str(rank)}) for rank in (0, 1)]
    wait_for_step(out, 4)
    ranks[killed].kill()
    began = time.monotonic()
    status, output = finished(ranks[1 - killed])
    finished(ranks[killed])
    assert status == watchdog.LOST and time.monotonic() - began < 20, output
    assert output.count("error:") == 1 and f"error: lost rank {killed} (" in output and "Traceback" not in output


def same_after_rl(out, base):
    """The same reward model, trained on all ranks with rank 0's answers, and the same student of the RL model."""
    for key in ("train/loss", "train/grad_norm", "reward/accuracy", "reward/good", "reward/bad"):
        same_curve(figures(out, "helpful", key), figures(base / "one", "helpful", key))
    for key in ("train/loss", "train/grad_norm", "distill/accuracy", "distill/heldout_pass_at_1"):
        same_curve(figures(out, "taught", key), figures(base / "one", "taught", key))
    for name in AFTER_RL:
        mine, reference = ({path.name for path in (root / name / "model").iterdir()} for root in (out, base / "one"))
        assert mine == reference


def test_fine_tuning_and_rl_on_two_ranks(base, tmp_path):
    """SFT ends with a smaller step. In RL all ranks sample, one verifies, and each has a part of policy and critic; one
    is killed between rollouts."""
    out = copy_without(base / "one", tmp_path / "run", "03-sft", "04-zero", *AFTER_RL)
    process = start(base, out, *SHORT, "--set", "layout.pp=2", until="taught")
    wait_for_step(out, 2, "zero")
    os.kill(rank_of(process, 1), signal.SIGKILL)
    status, output = finished(process)
    assert status == 0 and "rank 1 was killed by SIGKILL; restarting all ranks" in output, output
    same_curve(losses(out, "sft"), losses(base / "one", "sft"))
    kept = (
        "rl/kept_tokens",
        "rl/filter_left_out",
        "rl/filter_explored",
        "rl/correction_weight",
        "critic/loss",
        "critic/grad_norm",
    )
    for key in ("rl/kl", "rl/entropy", "rl/length", "rl/grad_norm", "rl/heldout_pass_at_1", *kept):
        same_curve(figures(out, "zero", key), figures(base / "one", "zero", key))
    drawn = [(root / "04-zero" / "rollouts.jsonl").read_text() for root in (out, base / "one")]
    assert drawn[0] == drawn[1], "the same answers, word for word"
    same_after_rl(out, base)


def test_begun_on_one_process_and_gone_on_with_on_two_and_then_under_torchrun(base, out):
    """Ctrl-C stops the two processes started by --processes as it stops a single one. Under torchrun, which goes on
    with pre-training, each rank computes half of every row there and in SFT; RL and later stages use the two ranks as
    data parallel. The curves are those of one process."""
    process = start(base, out, *SHORT)
    wait_for_step(out, 4)
    process.send_signal(signal.SIGKILL)
    finished(process)
    process = start(base, out, *SHORT, "--processes", "2")
    wait_for_step(out, 10)
    process.send_signal(signal.SIGINT)
    status, output = finished(process)
    assert status == 130 and output.startswith("2 processes on this machine (--processes 2)\n"), output
    assert (
        "2 ranks: pp 1 x dp 2 x ep 1\n" in output and output.count("nothing is lost") == 1 and "Traceback" not in output
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = [*torchrun, "-m", "bessemer", *command(base, out, *SHORT, "--set", "layout.cp=2", until="taught")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "resuming at step" in done.stderr, done.stderr
    assert "2 ranks: pp 1 x dp 1 x ep 1 x cp 2" in done.stderr and "2 ranks: pp 1 x dp 2 x ep 1\n" in done.stderr
    for stage in ("pretrain", "sft"):
        same_curve(losses(out, stage), losses(base / "one", stage))
    for key in ("val/bpb/english", "val/bpb/arithmetic"):
        same_curve(figures(out, "pretrain", key), figures(base / "one", "pretrain", key))
    for key in ("rl/kl", "rl/length", "rl/grad_norm", "rl/correction_weight", "critic/loss", "critic/grad_norm"):
        same_curve(figures(out, "zero", key), figures(base / "one", "zero", key))
    same_after_rl(out, base)


def together(base, out, *overrides):
    """Start ranks by hand, one per list of arguments; the result has each one's (exit status, stderr)."""
    port = str(20000 + os.getpid() % 20000)
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(len(overrides))}
    started = [
        start(base, out, *more, environment={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank, more in enumerate(overrides)
    ]
    return [finished(process) for process in started]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([("--set", "layout.dp=3")] * 2, "layout pp 1 x dp 3 x ep 1 on 2 ranks: it makes 3 ranks; these fit: "),
        ([("--set", "layout.pp=2", "--set", "layout.schedule=dualpipe", "--set", "pretrain.batch_rows=3")] * 2,
         "a step of 3 rows is too small for pp 2 x dp 1 x ep 1: 1 parallel pipelines need 4 micro-batches each "
         "(dualpipe on 2 pipeline ranks), 4 rows in all"),
        ([("--set", "seed=8"), ("--set", "seed=9")], "recipe differs between ranks: "),
    ],
    ids=["world", "rows", "recipes"],
)  # fmt: skip
def test_all_ranks_refuse_and_one_says_why(base, out, overrides, words):
    ended = together(base, out, *overrides)
    assert [status for status, _ in ended] == [2, 2]
    output = "".join(output for _, output in ended)
    assert output.count("error: ") == 1 and words in output, output


def test_ranks_wait_while_one_samples_for_longer_than_the_timeout(tmp_path):
    """A timeout is the time without progress, and continuing 1,200 texts makes some all the time."""
    prompts = [f"User: Compute {n}+5*6.\nAssistant:" for n in range(1200)]
    (tmp_path / "recipe.toml").write_text(
        f'name = "s"\n[model]\npreset = "tiny"\ndim = 32\nn_layers = 2\nn_dense_layers = 1\n[layout]\ndp = 2\n'
        'timeout = "2s"\n[[stage]]\nkind = "corpus"\nrow_length = 64\nparts = { arithmetic = "task:arithmetic" }\n'
        'limits = { arithmetic = "60K" }\n[[stage]]\nkind = "pretrain"\ntokens = "3K"\nfirst_sample = "1K"\n'
        f"prompts = {json.dumps(prompts)}\nlr = 1e-3\nbatch_rows = 8\nmicro_rows = 4\n"
        'mixture = { arithmetic = 1.0 }\nprecision = "float32"\n'
    )
    status, output = whole_runs.run(tmp_path / "recipe.toml", tmp_path / "run")
    assert status == 0 and "waited" not in output, output[-3000:]
