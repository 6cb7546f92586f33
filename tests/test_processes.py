"""How many processes `bessemer run` starts on a machine with several GPUs, and the line that says why."""

import os
import subprocess
import sys

import pytest

from bessemer.addons.distributed.many_processes import Gpus, decide
from bessemer.config.recipe import Recipe
from bessemer.errors import UserError
from bessemer.system import granted_cores

TEXT = """
name = "small"
[model]
preset = "tiny"
[[stage]]
kind = "corpus"
row_length = 64
[stage.parts]
arithmetic = "task:arithmetic"
[stage.limits]
arithmetic = "5K"
[[stage]]
kind = "pretrain"
batch_rows = 8
lr = 1e-3
[[stage]]
kind = "rl"
name = "zero"
tasks = ["arithmetic"]
lr = 1e-3
"""


def decided(*overrides, gpus=8, present=8, chosen=None, requested=None, text=TEXT):
    return decide(Recipe.parse(text, overrides), requested, Gpus(gpus, present, chosen))


@pytest.mark.parametrize(
    ("machine", "n", "words"),
    [
        ({}, 8, "8 of 8 GPUs: one process each; --gpus 1 uses one alone"),
        ({"gpus": 1, "present": 1}, 1, ""),
        ({"gpus": 0, "present": 0}, 1, ""),
        ({"requested": 1}, 1, "1 of 8 GPUs: --processes 1"),
        ({"requested": 2, "gpus": 0, "present": 0}, 2, "2 processes on this machine (--processes 2)"),
        (
            {"requested": 800, "gpus": 0, "present": 0},
            800,
            f"no GPU here: 800 processes share {granted_cores()} CPU cores, no faster than --processes ",
        ),
        ({"gpus": 1, "chosen": "3"}, 1, "1 of 8 GPUs: CUDA_VISIBLE_DEVICES=3"),
        ({"gpus": 2, "chosen": "0,1"}, 2, "2 of 8 GPUs: CUDA_VISIBLE_DEVICES=0,1"),
    ],
    ids=["all", "one", "cpu", "asked", "asked on a cpu", "more than cores", "one is visible", "two are visible"],
)
def test_every_gpu_is_used_or_the_reason_is_printed(machine, n, words):
    processes, message = decided(**machine)
    assert processes == n and (message == words or (words and message == f"{words}{granted_cores()}"))


@pytest.mark.parametrize(
    ("overrides", "n", "words"),
    [
        (["layout.pp=2"], 8, "one process each"),
        (["layout.pp=2", "layout.dp=2"], 4, "4 of 8 GPUs: [layout]"),
        (["layout.dp=1"], 1, "1 of 8 GPUs: [layout]"),
        (["pretrain.batch_rows=3"], 3, '3 of 8 GPUs: stage "pretrain": a step of 3 rows is too small for pp 1 x dp 8'),
        (["zero.rollout.engine=vllm", "zero.rollout.workers=2"], 6, "6 of 8 GPUs: 2 are for the workers that sample"),
        (
            ["zero.rollout.engine=ray", "zero.rollout.workers=4", "layout.pp=4"],
            4,
            "4 of 8 GPUs: [layout], and 4 are for the workers",
        ),
        (["zero.rollout.engine=ray", "zero.rollout.workers=9"], 1, "1 of 8 GPUs: 9 are for the workers"),
        (["zero.rollout.engine=vllm", "zero.rollout.sleep=true"], 8, "one process each"),
        (['zero.hooks=["routing-replay"]'], 8, "one process each"),
        (["zero.advantage=critic"], 8, "one process each"),
    ],
    ids=[
        "a multiple of the layout's",
        "layout",
        "layout of one",
        "rows",
        "sampling",
        "sampling beside a layout",
        "more sampling than there are",
        "sampling on the trainer's",
        "replay",
        "critic",
    ],
)
def test_what_a_recipe_allows(overrides, n, words):
    processes, message = decided(*overrides)
    assert processes == n and words in message, message


def test_a_recipe_that_trains_nothing_needs_one_process():
    assert decided(text=TEXT.partition('[[stage]]\nkind = "pretrain"')[0]) == (
        1, "1 of 8 GPUs: no stage of this recipe runs on several"
    )  # fmt: skip


def test_a_fault_of_the_recipe_is_left_to_the_run():
    assert decided('zero.tasks=["nothing"]') == (1, "")


def test_requested_processes_must_fit_the_layout():
    for overrides, words in (
        (["layout.pp=3"], "--processes is 8, but [layout] makes 3 ranks or a multiple"),
        (["layout.dp=2"], "--processes is 8, but [layout] makes 2 ranks"),
    ):
        with pytest.raises(UserError) as caught:
            decided(*overrides, requested=8)
        assert str(caught.value) == words


CORES = """
import os
from bessemer.addons.distributed.launcher_cores import all_cores
from bessemer.workers import cores
os.sched_getaffinity = lambda pid: range(7)
before = cores()
with all_cores():
    inside = cores()
print(before, inside, cores())
"""


@pytest.mark.parametrize(("users", "expected"), [({}, "1 7 1"), ({"OMP_NUM_THREADS": "1"}, "1 1 1")], ids=["", "set"])
def test_a_rank_that_works_alone_has_all_cores_unless_the_user_limits_them(users, expected):
    """The launcher, a process of its own, sets for its child the environment that torchrun sets."""
    launcher = (
        "import os, subprocess, sys\n"
        "os.environ.update(OMP_NUM_THREADS='1', TORCHELASTIC_RUN_ID='x')\n"
        f"print(subprocess.run([sys.executable, '-c', {CORES!r}], capture_output=True, text=True).stdout, end='')"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | users
    done = subprocess.run([sys.executable, "-c", launcher], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == expected, done.stderr
