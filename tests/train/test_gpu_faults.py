"""The error of a step that runs out of GPU memory, with the numbers of the planner's table; and a GPU that fails."""

from types import SimpleNamespace

import pytest
import torch
from tiny_run import batches, model, trainer

from bessemer.addons.accelerate import gpu_faults
from bessemer.addons.distributed import schedules
from bessemer.addons.distributed.mesh import Layout
from bessemer.addons.plan import memory
from bessemer.addons.plan.memory import NumberFormats
from bessemer.config.rl import RLConfig
from bessemer.config.training import PretrainConfig
from bessemer.config.units import Points
from bessemer.errors import UserError
from bessemer.model.config import preset
from bessemer.model.transformer import Transformer
from bessemer.pipeline import runner
from bessemer.train.optimizer import Optimizer

GIB = 1 << 30
CARD = "NVIDIA H100 80GB HBM3"
PRETRAIN = PretrainConfig(kind="pretrain", name="base", lr=Points(1e-3), micro_rows=32)


@pytest.fixture(scope="module")
def network():
    with torch.device("meta"):
        return Transformer(preset("small"))


@pytest.fixture(scope="module")
def stays(network):
    with torch.device("meta"):
        own = Transformer(preset("small"))
    return gpu_faults.held(Optimizer(own, compute_dtype=torch.bfloat16).groups)


def advice(network, stays, total, config=PRETRAIN, rows=32, length=4096):
    return str(gpu_faults.explain(CARD, total, stays, network, config, rows, length, 2, True))


def test_resident_bytes_match_the_planners_table(network, stays):
    table = schedules.schedule("1f1b", 1, 1)
    planned = memory.per_rank(network.cfg, Layout(1, 1, 1), table, 32, 4096, NumberFormats(2, 4))[0]
    one_process = planned["gradients"] - planned["masters"]  # the table adds a rank's share of the summed gradients
    assert stays["moments"] == planned["moments"] and stays["weights"] == planned["weights"]
    assert abs(stays["gradients"] - one_process) < 0.01 * one_process + (1 << 20)
    whole = gpu_faults.kept(network, 32, 4096, 2, True)
    assert 0.8 * planned["activations"] < whole <= planned["activations"]


@pytest.mark.parametrize("share", [0.6, 0.3, 0.07])
def test_a_smaller_forward_that_fits_is_named(network, stays, share):
    """The largest halving of micro_rows with which memory fits in nine tenths of the card."""
    fixed = sum(stays.values())
    total = int((fixed + share * gpu_faults.kept(network, 32, 4096, 2, True)) / gpu_faults.USABLE)
    text = advice(network, stays, total)
    rows = 32
    while fixed + gpu_faults.kept(network, rows, 4096, 2, True) > gpu_faults.USABLE * total:
        rows //= 2
    assert f"Lower micro_rows from 32 to {rows}" in text and "resumes from the last checkpoint" in text
    assert text.startswith(f'stage "base" ran out of memory on {CARD} ({total / GIB:.1f} GiB): weights ')


@pytest.mark.parametrize(
    ("packed", "major", "number", "padded"),
    [(False, 9, 2, False), (True, 9, 2, True), (False, 8, 2, True), (True, 8, 4, False)],
)
def test_memory_of_packed_rows_and_old_cards_is_counted(network, monkeypatch, packed, major, number, padded):
    card = SimpleNamespace(name=CARD, total_memory=79 * GIB, major=major)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    text = str(gpu_faults.of_step("cuda", [], network, PRETRAIN, (32, 4096, packed), number, True))
    size = gpu_faults.kept(network, 32, 4096, number, True, padded)
    assert f"keeps about {size / GIB:.1f}. " in text
    assert size != gpu_faults.kept(network, 32, 4096, number, True, not padded)


def test_advice_when_no_forward_fits(network, stays):
    fixed = sum(stays.values())
    text = advice(network, stays, int(fixed / gpu_faults.USABLE) + 1000)
    assert 'Even one row is too much: set recompute = ["attend", "experts", "finish"] in [layout]' in text
    text = advice(network, stays, fixed)
    assert f'set moments = "bfloat16" (saves {stays["moments"] / 2 / GIB:.1f} GiB)' in text
    assert "more than the card holds" in text and "resumes" not in text


def test_micro_rows_is_lowered_where_rows_are_shorter_too(network, stays):
    """A forward then has more rows than micro_rows says."""
    fixed = sum(stays.values())
    total = int((fixed + 0.6 * gpu_faults.kept(network, 128, 1024, 2, True)) / gpu_faults.USABLE)
    assert "Lower micro_rows from 32 to 16" in advice(network, stays, total, rows=128, length=1024)
    single_row = PRETRAIN.model_copy(update={"micro_rows": 1})
    assert "Even one row is too much" in advice(network, stays, total, single_row, rows=128, length=1024)


def test_rl_lowers_tokens(network, stays):
    config = RLConfig(kind="rl", name="zero", tasks=["countdown"], micro_tokens=4096)
    text = advice(network, stays, 2 * sum(stays.values()), config, rows=8, length=512)
    assert "Lower micro_tokens from 4096 to 2048" in text and "moments" in text


def test_a_model_of_another_family_halves(stays):
    text = advice(torch.nn.Linear(2, 2), stays, 2 * sum(stays.values()))
    assert "Lower micro_rows from 32 to 16; results" in text


def test_a_step_that_runs_out_ends_in_one_sentence(tmp_path, monkeypatch):
    """The error is raised inside the step, as by torch; the checkpoint before is intact and the run resumes from it."""

    class Card:
        name, total_memory, major = CARD, 79 * GIB, 9

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    run = trainer(model(), steps=4, state_dir=tmp_path, read_ahead=True)  # a GPU's steps, on the CPU
    objective, count = run.objective, 0

    def greedy(*arguments, **terms):
        nonlocal count
        count += 1
        if count > 2:  # two micro-batches per step
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return objective(*arguments, **terms)

    run.objective = greedy
    with pytest.raises(UserError, match=rf"memory on {CARD} .*micro_rows from 4 to 2") as caught:
        run.run()
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    again = trainer(model(3), steps=4, state_dir=tmp_path, data=batches)
    assert again.run() and again.step == 4


def test_a_stage_that_runs_out_while_it_samples_ends_in_one_sentence(monkeypatch):
    class Card:
        name, total_memory = CARD, 79 * GIB

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 70 * GIB)
    words = r'stage "zero" ran out of memory on .* held 70\.0 at most.*max_new_tokens'
    with pytest.raises(UserError, match=words), runner.computing("zero"):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    with pytest.raises(RuntimeError, match="something else"), runner.computing("zero"):
        raise RuntimeError("something else")


@pytest.mark.parametrize(
    ("words", "is_card_fault"),
    [
        ("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be ...", True),
        ("CUDA error: CUDA-capable device(s) is/are busy or unavailable", True),
        ("CUDA error: unknown error", True),
        ("CUDA error: an illegal memory access was encountered", False),
        ("shapes cannot be multiplied: unknown error", False),
        ("", False),
    ],
)
def test_gpu_failures_are_one_line_and_bugs_keep_their_traceback(words, is_card_fault):
    error = torch.AcceleratorError(words)
    with pytest.raises(UserError if is_card_fault else RuntimeError) as caught, runner.computing("zero"):
        raise error
    if is_card_fault:
        assert str(caught.value).startswith(f'stage "zero": the GPU failed ({words.splitlines()[0]})')
        assert "resumes from the last checkpoint" in str(caught.value) and "\n" not in str(caught.value)
    else:
        assert caught.value is error
