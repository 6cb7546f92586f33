"""The training loop: the same result however a step is split, stopped or killed."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from tiny_run import ROWS, T, batches, config, model, trainer
from torch._dynamo.utils import counters

from bessemer import plugins
from bessemer.config.units import Points
from bessemer.errors import UserError
from bessemer.model import ops
from bessemer.train.checkpoint import latest
from bessemer.train.objective import Loss, next_token
from bessemer.train.trainer import Trainer


def everything(run):
    """A run's whole state: one dict of tensors, and the counters."""
    state = run.state()
    flat = {f"{stem}/{name}": t.clone() for stem, part in state.tensors.items() for name, t in part.items()}
    return flat, {key: value for key, value in state.counters.items()}


def assert_same_bits(a, b):
    (tensors_a, counters_a), (tensors_b, counters_b) = a, b
    assert counters_a == counters_b and tensors_a.keys() == tensors_b.keys()
    for name, tensor in tensors_a.items():
        assert torch.equal(tensor, tensors_b[name]), name


def noisy(model, batch, **terms):
    """An objective that draws random numbers, so that a lost random state shows."""
    loss = next_token(model, batch, **terms)
    noise = 1 + 0.1 * torch.rand(()) + 0.1 * np.random.rand()
    return Loss(loss.total * noise, loss.tokens, loss.metrics)


# This test comes first: at the end of the suite's last file, one core would idle while it runs.
def test_compiled_layers_learn_the_same(monkeypatch):
    """Parameters that are views of flat vectors survive torch.compile. It only traces: inductor takes a minute."""
    if (compiler := plugins.hook("compile")) is None:
        pytest.skip("no add-on compiles layers")
    terms, shape = {"mtp_lambda": 0.0, "balance_alpha": 1e-3}, {"n_mtp": 0, "n_layers": 1, "n_dense_layers": 0}
    plain, compiled = (trainer(model(**shape), steps=2, terms=terms, micro_rows=ROWS) for _ in range(2))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    assert compiler("on", [*compiled.model.layers, *compiled.model.mtp], 0.0, lambda text: None)
    before = counters["stats"]["unique_graphs"]
    plain.run(), compiled.run()
    assert counters["stats"]["unique_graphs"] > before, "something was compiled"
    assert_close_moments(plain, compiled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bitwise(tmp_path, dtype):
    """20 steps against 7 + 6 + 7 with all objects made anew: weights, moments, biases and random states are equal."""

    def run(directory, stop_at=None, seed=0):
        torch.manual_seed(1 if seed == 0 else 99)
        np.random.seed(1 if seed == 0 else 99)
        logged = {}
        new_trainer = Trainer(
            model(seed), noisy, batches, *config(20, compute_dtype=dtype), directory,
            log=lambda step, tokens, values: logged.update({step: (tokens, values["train/loss"], values["train/lr"])}),
            stop=lambda: new_trainer.step == stop_at, model_config={"seed": 7},
        )  # fmt: skip
        assert new_trainer.run() == (stop_at is None)
        return new_trainer, logged

    straight, log = run(tmp_path / "straight")
    _, log1 = run(tmp_path / "cut", stop_at=7)
    _, log2 = run(tmp_path / "cut", stop_at=13, seed=3)  # another model and seed: all state must come from disk
    last, log3 = run(tmp_path / "cut", seed=4)
    assert log == log1 | log2 | log3 and list(log) == list(range(1, 21))
    assert_same_bits(everything(straight), everything(last))
    assert log[20][1] < 0.9 * log[1][1], "and it learns"


def test_resume_after_kill_9_is_bitwise(tmp_path):
    command = [sys.executable, str(Path(__file__).with_name("tiny_run.py")), str(tmp_path / "killed"), "14"]
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}  # pytest's path, which has the tests' shared helpers
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | path)
    for line in process.stdout:
        if int(line) == 8:
            os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    at = latest(tmp_path / "killed")[1].counters["step"]
    assert 0 < at < 14
    resumed = trainer(model(5), steps=14, state_dir=tmp_path / "killed")
    steps = []
    resumed.on_step = [lambda t: steps.append(t.step)]
    resumed.run()
    assert steps == list(range(at + 1, 15))
    straight = trainer(steps=14)
    straight.run()
    ours, reference = everything(resumed)[0], everything(straight)[0]
    assert_same_bits(
        ({k: v for k, v in ours.items() if k != "rng/torch"}, 0),
        ({k: v for k, v in reference.items() if k != "rng/torch"}, 0),
    )


def test_a_resume_on_other_kernels_says_so(tmp_path, monkeypatch):
    messages = []
    trainer(steps=2, state_dir=tmp_path, warn=messages.append).run()
    backend = latest(tmp_path)[1].counters["backend"]
    trainer(steps=2, state_dir=tmp_path, warn=messages.append).run()
    assert backend.startswith("cpu (kernels ") and not messages
    monkeypatch.setattr(ops, "backend", lambda device: "cpu (kernels of others)")
    trainer(steps=3, state_dir=tmp_path, warn=messages.append).run()
    assert messages == [
        f"step 2 was saved on {backend}, this run continues on cpu (kernels of others): results differ by rounding"
    ]
    assert latest(tmp_path)[1].counters["backend"] == "cpu (kernels of others)"


def assert_close_moments(actual, expected):
    """First moments are linear in the gradients; weights are not, as Adam amplifies rounding in tiny gradients."""
    for name, m in actual.optimizer.state_dict().items():
        if name.startswith("m/"):
            assert (m - expected.optimizer.state_dict()[name]).norm() <= 1e-5 * m.norm() + 1e-9, name


def test_result_does_not_depend_on_micro_batches():
    """1 x 8 and 4 x 2 rows give the same sums in another order, so they differ only by float32 rounding."""
    # K/M = 2 as in V3
    whole, cut = (trainer(model(n_activated_experts=4), steps=3, micro_rows=rows) for rows in (8, 2))
    logs = []
    for run in (whole, cut):
        run.log = lambda step, tokens, values: logs.append(
            [values[f"train/{name}"] for name in ("loss", "mtp_1", "balance", "grad_norm")]
        )
        run.run()
    assert torch.allclose(torch.tensor(logs[:3]), torch.tensor(logs[3:]), rtol=1e-5)
    assert_close_moments(whole, cut)
    for name, value in whole.optimizer.masters().items():
        assert (value - cut.optimizer.masters()[name]).norm() <= 1e-6 * value.norm(), name
    for name, gate in whole.gates.items():
        assert torch.equal(gate.bias_E, cut.gates[name].bias_E)


def test_uneven_rows_are_averaged_by_token():
    """With 3 loss tokens in one row and 15 in another, the step's gradient is that of all 18 tokens together."""
    data = batches(0, 2)
    data.loss_BT[0, 4:] = 0
    terms = {"mtp_lambda": 0.3, "balance_alpha": 0.0}
    one, two = trainer(terms=terms), trainer(terms=terms)
    a, b = one.update([data]), two.update(data.micro(1))
    assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-6)
    assert_close_moments(one, two)


def test_counters_schedules_and_log(tmp_path):
    log = []
    run = trainer(
        steps=12, state_dir=tmp_path, log=lambda *entry: log.append(entry), save_steps=5,
        batch_rows=Points([[0, 4], [8 * T * ROWS, 12]]), micro_rows=3,
    )  # fmt: skip
    run.run()
    tokens, row = 0, 0
    for step, (logged_step, logged_tokens, values) in enumerate(log):
        assert values["train/lr"] == run.config.lr(tokens)
        assert values["train/mtp_lambda"] == run.plan.terms["mtp_lambda"](tokens)
        rows = int(run.plan.batch_rows(tokens))
        row, tokens = row + rows, tokens + rows * T
        assert (logged_step, logged_tokens) == (step + 1, tokens)
        assert {"train/loss", "train/mtp_1", "train/balance", "train/max_vio", "moe/max_vio/mtp0"} <= values.keys()
    assert run.rows == row and run.tokens >= 12 * ROWS * T
    saved = [p.name for p in sorted(tmp_path.glob("step-*"))]
    assert saved == [f"step-{10:08d}", f"step-{run.step:08d}"]


def test_a_warm_up_in_steps_rises_evenly_while_batches_grow_and_continues_after_a_stop(tmp_path):
    def rates(**options):
        logged = []
        run = trainer(
            steps=12, state_dir=tmp_path, lr=2e-3, warmup_steps=5, batch_rows=Points([[0, 4], [8 * T * ROWS, 12]]),
            log=lambda *entry: logged.append(entry[2]["train/lr"]), **options,
        )  # fmt: skip
        run.run()
        return logged

    first = rates(stop=iter([False, False, True]).__next__)
    assert len(first) == 3
    expected = [2e-3 * min(1.0, step / 5) for step in range(9)]
    assert (first + rates())[:9] == pytest.approx(expected, rel=1e-12)


def test_clip_bounds_the_update_not_the_log():
    """Clipping scales the gradient before Adam: the clipped run's Adam sees a gradient of norm `clip`."""
    run, clipped = trainer(clip=1e9), trainer(clip=0.01)
    values = [r.update([batches(0, 4)]) for r in (run, clipped)]
    norm = values[0]["train/grad_norm"]
    assert values[1]["train/grad_norm"] == norm > 0.1
    for name, m in run.optimizer.state_dict().items():
        if name.startswith("m/") and m.abs().max() > 1e-5:
            assert torch.allclose(clipped.optimizer.state_dict()[name], m * (0.01 / norm), rtol=1e-3, atol=1e-9), name


def test_checkpoint_holds_masters_and_extras(tmp_path):
    run = trainer(steps=2, state_dir=tmp_path, compute_dtype=torch.bfloat16)
    run.extras, run.extra_tensors = {"best": 0.5}, {"baseline": torch.ones(3)}
    run.run()
    path, _ = latest(tmp_path)
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    assert tensors.keys() == dict(run.model.named_parameters()).keys()
    assert all(t.dtype == torch.float32 for t in tensors.values())
    again = trainer(model(3), steps=2, state_dir=tmp_path, compute_dtype=torch.bfloat16)
    assert again.start() and again.extras == {"best": 0.5} and again.extra_tensors["baseline"].sum() == 3
    assert_same_bits(everything(run), everything(again))
    assert all(torch.equal(p, dict(run.model.named_parameters())[n]) for n, p in again.model.named_parameters())


def test_changed_config_on_resume_is_an_error(tmp_path):
    trainer(steps=1, state_dir=tmp_path, model_config={"lr": [[0, 1.0]]}).run()
    with pytest.raises(UserError, match=r"lr is \[\[0, 2.0\]\] in this run but \[\[0, 1.0\]\]"):
        trainer(steps=1, state_dir=tmp_path, model_config={"lr": [[0, 2.0]]}).run()


def test_changed_moments_dtype_on_resume_is_an_error(tmp_path):
    trainer(steps=1, state_dir=tmp_path).run()
    with pytest.raises(UserError, match="bfloat16"):
        trainer(steps=1, state_dir=tmp_path, moments="bfloat16").run()


def test_zero_rows_is_an_error():
    with pytest.raises(UserError, match="batch_rows is 0"):
        trainer(batch_rows=0.5).run()


def test_validation_between_steps_leaves_no_trace():
    def validate(run):
        run.model.eval()
        with torch.no_grad():
            next_token(run.model, batches(10**6, 4), mtp_lambda=0.3, balance_alpha=0.0)

    plain, validated = trainer(steps=4), trainer(steps=4, on_step=[validate])
    plain.run(), validated.run()
    assert_same_bits(everything(plain), everything(validated))
