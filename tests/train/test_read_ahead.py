"""The next step's batches are read while the current step is computed, with no effect other than speed."""

import threading
from dataclasses import replace

import pytest
import torch
from tiny_run import ROWS, T, batches, model, trainer

from bessemer.addons.accelerate.transfer import ReadAhead
from bessemer.data.batch import Batch
from bessemer.errors import UserError
from bessemer.train.step_device import StepDevice


def reader_lives():
    return any(thread.name == "reading" for thread in threading.enumerate())


def grown(tokens):
    """The rows per step, which double after four steps."""
    return ROWS if tokens < 4 * ROWS * T else 2 * ROWS


def masters(run):
    return {name: value.clone() for name, value in run.optimizer.masters().items()}


def test_stops_resumes_and_rollbacks_give_the_same_bits(tmp_path):
    """Steps of two sizes, three bad ones with a rollback to where steps were smaller, a stop and a resume."""

    def made(folder, ahead, stop_at=None):
        reads = []
        run = trainer(
            steps=14, state_dir=folder, save_steps=3, batch_rows=grown, read_ahead=ahead, warn=messages.append,
            data=lambda first, n: reads.append((run.reading, first, n)) or batches(first, n),
            stop=lambda: run.step == stop_at,
        )  # fmt: skip
        objective = run.objective

        def bad(model, batch, **terms):
            loss = objective(model, batch, **terms)
            return replace(loss, total=loss.total * float("nan")) if 3 <= run.rows // ROWS < 8 else loss

        run.objective = bad
        assert run.run() == (stop_at is None) and not reader_lives()
        return run, reads

    messages = []
    plain, expected = made(tmp_path / "plain", False)
    ahead, asked = made(tmp_path / "ahead", True)
    assert sum("back to step" in line for line in messages) == 2 and plain.skipped == 3
    assert set(expected) <= set(asked), "what was read for a step that never came was thrown away"
    made(tmp_path / "cut", True, stop_at=9)
    resumed, _ = made(tmp_path / "cut", True)
    for run in (ahead, resumed):
        assert (run.step, run.tokens, run.rows) == (plain.step, plain.tokens, plain.rows)
        assert all(torch.equal(value, masters(plain)[name]) for name, value in masters(run).items())


def test_one_step_is_read_beside_another_and_no_more():
    read, done = [], threading.Event()

    def data(first_row, n_rows):
        read.append((first_row // ROWS, threading.current_thread().name))
        if first_row == 3 * ROWS:
            done.set()
        return batches(first_row, n_rows)

    run = trainer(steps=6, micro_rows=ROWS, data=data, read_ahead=True)

    def during(model, batch, objective=run.objective, **terms):
        if run.step == 2:
            assert done.wait(60), "the reader has its step while this one is computed"
            assert max(read)[0] == 3, "and no later one"
        return objective(model, batch, **terms)

    run.objective = during
    assert run.run() and read == [(step, "reading") for step in range(6)] and not reader_lives()


def test_an_error_comes_at_its_step(tmp_path):
    def data(first_row, n_rows):
        if first_row >= 3 * ROWS:
            raise UserError("train-00000 was altered")
        return batches(first_row, n_rows)

    run = trainer(steps=6, data=data, read_ahead=True, state_dir=tmp_path, save_steps=1)
    with pytest.raises(UserError, match="was altered"):
        run.run()
    assert run.step == 3 and not reader_lives()
    run = trainer(steps=6, state_dir=tmp_path, data=data, read_ahead=True, stop=lambda: True)
    with pytest.raises(UserError, match="was altered"):
        run.run()
    early = trainer(steps=6, data=data, read_ahead=True, stop=lambda: early.step == 3)
    assert early.run() is False, "a step that never came has no errors"


def test_ctrl_c_leaves_no_thread():
    reading, go_on = threading.Event(), threading.Event()

    def data(first_row, n_rows):
        if first_row == ROWS:
            reading.set()
            assert go_on.wait(60)
        assert first_row <= ROWS, "the reader is told between two micro-batches"
        return batches(first_row, n_rows)

    def interrupt(run):
        assert reading.wait(60)
        threading.Timer(0.05, go_on.set).start()  # fires while the trainer waits for the thread
        raise KeyboardInterrupt

    run = trainer(steps=6, data=data, read_ahead=True, on_step=[interrupt])
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert not reader_lives()


def test_counts_read_ahead_are_only_transferred(monkeypatch):
    segmented = replace(batches(0, 2), segments_BT=torch.arange(T).expand(2, -1) // 5)
    ahead = ReadAhead(lambda position: [segmented])
    (actual,) = ahead.take((0, 0))
    expected = segmented.to("meta")
    monkeypatch.setattr(Batch, "_count", lambda batch: pytest.fail("counted twice"))
    sent = actual.to("meta")
    assert [t.shape for t in sent.tensors()] == [t.shape for t in expected.tensors()]
    assert sent.segments.longest == expected.segments.longest
    assert actual.to("cpu").before is None, "and not on a CPU"


def test_read_ahead_is_on_for_gpus():
    assert type(trainer(model()).on_device) is StepDevice
