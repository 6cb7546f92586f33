"""Real NaNs: in forward, in backward, and persistent ones."""

import pytest
import torch
from tiny_run import ROWS, batches, model, trainer

from bessemer.errors import UserError


class Poison:
    """Hooks one module and turns its output, or the gradient of its output, into NaN while armed."""

    def __init__(self, module, backward=False):
        self.armed = False
        module.register_forward_hook(self.grad if backward else self.out)

    def out(self, module, inputs, output):
        return output * float("nan") if self.armed else output

    def grad(self, module, inputs, output):
        if self.armed and output.requires_grad:
            output.register_hook(lambda g: g * float("nan"))
        return output


def poisoned(name, backward=False, bad_steps=(), **options):
    """A run in which the given steps are bad, counting attempts from 0."""
    network, messages = model(), []
    poison = Poison(network.get_submodule(name), backward)
    attempts = iter(range(10**6))

    def data(first, n):
        poison.armed = next(attempts) in bad_steps
        return batches(first, n)

    return trainer(network, data=data, micro_rows=ROWS, warn=messages.append, **options), messages


@pytest.mark.parametrize(
    ("name", "backward"), [("layers.1.ffn.shared.w2", False), ("mtp.0.eh_proj", False), ("layers.1.attn_norm", True)]
)
def test_bad_step_is_skipped_and_counted(name, backward):
    log = {}
    run, messages = poisoned(
        name, backward, bad_steps={2}, steps=5, log=lambda step, tokens, values: log.update({step: values})
    )
    steps_seen = []
    run.on_step = [lambda t: steps_seen.append({n: p.detach().clone() for n, p in t.model.named_parameters()})]
    run.run()
    assert run.step == 5 and run.skipped == 1 and run.optimizer.steps == 4 and run.rows == 5 * ROWS
    assert all(torch.equal(steps_seen[1][n], steps_seen[2][n]) for n in steps_seen[1]), (
        "the bad step left the weights alone"
    )
    assert any(not torch.equal(steps_seen[2][n], steps_seen[3][n]) for n in steps_seen[2])
    assert len(messages) == 1 and f"rows {2 * ROWS} to {3 * ROWS - 1}" in messages[0]
    assert [log[s]["train/skipped"] for s in range(1, 6)] == [0, 0, 1, 1, 1]
    assert all(p.isfinite().all() for p in run.model.parameters())
    assert all(torch.isfinite(g.bias_E).all() and g.load_E.sum() == 0 for g in run.gates.values())


def test_a_skipped_step_is_as_if_its_rows_were_not_there():
    clean = trainer(steps=4, micro_rows=ROWS)
    order = iter([0, 1, 3])
    clean.plan.tokens = 10**9
    skipping, _ = poisoned("norm", bad_steps={2}, steps=4)
    skipping.run()
    lrs = [(0, 0), (1, 1), (3, 3)]
    for tokens, step in lrs:  # the schedules count the skipped tokens too
        clean.tokens, clean.step = tokens * ROWS * 16, step
        clean.update([batches(next(order) * ROWS, ROWS)])
    for name, value in clean.optimizer.masters().items():
        assert torch.equal(value, skipping.optimizer.masters()[name]), name
    for name, gate in clean.gates.items():
        assert torch.equal(gate.bias_E, skipping.gates[name].bias_E), "the loads of a bad step are forgotten"


def test_three_in_a_row_roll_back_and_go_past_the_rows(tmp_path):
    run, messages = poisoned("norm", bad_steps={4, 5, 6}, steps=8, state_dir=tmp_path, save_steps=2)
    read_rows, data = [], run.batches
    run.batches = lambda first, n: read_rows.append(first // ROWS) or data(first, n)
    weights = {}
    run.on_step = [lambda t: weights.setdefault(t.step, t.optimizer.masters()["norm.weight"].clone())]
    run.run()
    assert read_rows == list(range(11)), "data go forward: 4 good steps, 3 bad, 4 more from step 4 on"
    assert run.step == 8 and run.optimizer.steps == 8 and run.skipped == 3
    assert len(messages) == 4 and all(part in messages[-1] for part in ("step-00000004", "row 56", "1 of 2"))


def test_progress_between_rollbacks_forgives(tmp_path):
    """Three bad patches with checkpoints in between are three incidents, not one run that fails to recover."""
    bad = {4, 5, 6, 12, 13, 14, 20, 21, 22}
    run, messages = poisoned("norm", bad_steps=bad, steps=16, state_dir=tmp_path, save_steps=2)
    assert run.run() and sum("rollback 1 of 2" in line for line in messages) == 3


def test_cursor_after_a_rollback_survives_a_kill(tmp_path):
    run, _ = poisoned("norm", bad_steps={4, 5, 6}, steps=8, state_dir=tmp_path, save_steps=2)
    run.on_step = [lambda t: (_ for _ in ()).throw(KeyboardInterrupt) if t.rows == 7 * ROWS else None]
    with pytest.raises(KeyboardInterrupt):
        run.run()
    again = trainer(model(4), steps=8, state_dir=tmp_path)
    assert again.start() and again.step == 4 and again.rows == 7 * ROWS and again.skipped == 3


def test_endless_nan_stops_with_advice(tmp_path):
    run, messages = poisoned("norm", bad_steps=range(4, 1000), steps=50, state_dir=tmp_path, save_steps=2)
    with pytest.raises(UserError, match=r"2 rollbacks.*lower lr"):
        run.run()
    assert run.skipped == 9 and sum("back to" in line for line in messages) == 2
    again = trainer(model(4), steps=6, state_dir=tmp_path)
    assert again.run() and again.step == 6, "the checkpoint of before is still good"


def test_without_checkpoints_three_bad_steps_stop():
    run, _ = poisoned("norm", bad_steps=range(1, 9), steps=9)
    with pytest.raises(UserError, match=r"no checkpoint.*micro-batch 0 is nan"):
        run.run()


def test_a_step_without_loss_tokens_is_reported_not_divided():
    messages = []
    run = trainer(warn=messages.append)
    batch = batches(0, 4)
    batch.loss_BT.zero_()
    before = run.optimizer.masters()["norm.weight"].clone()
    assert run.update([batch])["train/skipped"] == 1 and "no token" in messages[0]
    assert torch.equal(before, run.optimizer.masters()["norm.weight"])


def test_gamma_without_any_bias_is_an_error():
    messages = []
    trainer(model(n_expert_groups=1, n_limited_groups=1, topk_method="greedy"), warn=messages.append)
    assert "gamma has no effect" in messages[0]
    trainer(warn=pytest.fail)
