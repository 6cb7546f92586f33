"""Plans of rows: those of placing piece after piece, by far fewer steps; shared by processes."""

import os
import signal
import sys
import time
from multiprocessing import get_context

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.data import plans, shards
from bessemer.data.plans import best_fit, find_plan, plan_files
from bessemer.runs.directory import outputs


def piece_by_piece(lengths: list[int], row_length: int) -> list[list[tuple[int, int]]]:
    """The (start, length) of the pieces of each row: longest first, each into the open row with the least room that is
    enough, among equals the one that came to that room last."""
    pieces, start = [], 0
    for length in lengths:
        for cut in range(0, length, row_length):
            pieces.append((start + cut, min(row_length, length - cut)))
        start += length
    rows, room, changed = [], [], []
    for turn, piece in enumerate(sorted(pieces, key=lambda piece: -piece[1])):
        fitting = [n for n in range(len(rows)) if room[n] >= piece[1]]
        if not fitting:
            rows.append([])
            room.append(row_length)
            changed.append(-1)
        n = min(fitting, key=lambda n: (room[n], -changed[n])) if fitting else len(rows) - 1
        rows[n].append(piece)
        room[n], changed[n] = room[n] - piece[1], turn
    return sorted(sorted(row) for row in rows)


def rows_of(packed) -> list[list[tuple[int, int]]]:
    return [[(piece.start, len(piece)) for piece in row] for row in packed.rows()]


@given(st.lists(st.integers(1, 60), max_size=80), st.integers(2, 40))
@settings(deadline=None, max_examples=300)
def test_a_plan_matches_that_of_placing_piece_after_piece(lengths, row_length):
    assert rows_of(best_fit(np.array(lengths, np.int64), row_length)) == piece_by_piece(lengths, row_length)


def documents(n: int) -> np.ndarray:
    return np.maximum(8, np.random.default_rng(0).lognormal(6.2, 1, n).astype(int))


def test_a_plan_of_long_rows_matches_that_of_placing_piece_after_piece():
    lengths = documents(1_500)
    assert rows_of(best_fit(lengths, 32_768)) == piece_by_piece(lengths.tolist(), 32_768)


@pytest.mark.parametrize("row_length", [2_048, 32_768, 131_072])
def test_work_is_less_than_a_step_for_every_piece(row_length):
    """Lines of Python that run, for the documents of a shard: ten for every piece if each is placed by itself."""
    lengths, lines = documents(200_000), 0
    n_pieces = int((-(-lengths // row_length)).sum())

    def trace(frame, event, _):
        nonlocal lines
        lines += event == "line"
        return trace if frame.f_code.co_filename == plans.__file__ else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        best_fit(lengths, row_length)
    finally:
        sys.settrace(before)
    assert lines < 2.5 * n_pieces


@pytest.fixture
def corpus(tokenizer, tmp_path):
    """A corpus of 12 shards."""
    folder, draw, facts = tmp_path / "c", np.random.default_rng(1), []
    folder.mkdir()
    for number in range(12):
        writer = shards.ShardWriter(folder, "train", number, shards.dtype_of(tokenizer))
        for _ in range(200):
            writer.add(draw.integers(3, 200, int(draw.integers(5, 300))), "text", 1)
        facts.append(writer.finish())
    shards.seal(folder, tokenizer, 64, {"train": facts})
    return folder


def look(corpus, target, planned, barrier):
    """Finds a plan, and reports every shard that this process plans."""
    write = plans.write_plan

    def counting(folder, to, name, *arguments):
        planned.put(name)
        time.sleep(0.02)  # the others have their turn
        write(folder, to, name, *arguments)

    plans.write_plan = counting
    barrier.wait()
    find_plan(corpus, shards.read_meta(corpus), 256, target)


def test_processes_plan_a_shard_once_between_them(corpus, tmp_path):
    context = get_context("fork")
    planned, barrier = [context.SimpleQueue() for _ in range(3)], context.Barrier(3)
    ranks = [context.Process(target=look, args=(corpus, tmp_path / "together", queue, barrier)) for queue in planned]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
        assert rank.exitcode == 0
    plans = []
    for queue in planned:
        first = []
        while not queue.empty():
            first.append(queue.get())
        assert first, "each has a part of the work"
        plans += first
    assert sorted(plans) == [f"train-{number:05d}" for number in range(12)]
    alone = find_plan(corpus, shards.read_meta(corpus), 256, tmp_path / "alone")
    assert sorted(file.name for file in (tmp_path / "together" / "rows-256").iterdir()) == sorted(
        file.name for file in alone.iterdir()
    )
    for name in plans:
        for first, second in zip(
            plan_files(alone, name), plan_files(tmp_path / "together" / "rows-256", name), strict=True
        ):
            assert first.read_bytes() == second.read_bytes()


def test_plans_of_a_killed_process_are_redone(corpus, tmp_path):
    def die(*arguments):
        raise SystemExit(9)

    def killed():
        plans.write_plan = die
        find_plan(corpus, shards.read_meta(corpus), 64, tmp_path / "plans")

    process = get_context("fork").Process(target=killed)
    process.start()
    process.join()
    assert process.exitcode == 9
    plan = find_plan(corpus, shards.read_meta(corpus), 64, tmp_path / "plans")
    assert len(list(plan.glob("*.rows.npy"))) == 12


def test_what_a_kill_leaves_of_a_plan_is_no_output_of_the_stage(corpus, tmp_path):
    def killed():
        plans.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        find_plan(corpus, shards.read_meta(corpus), 64, stage)

    stage = tmp_path / "stage"
    process = get_context("fork").Process(target=killed)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    plan = find_plan(corpus, shards.read_meta(corpus), 64, stage)
    assert len(outputs(stage)) == 24 and {path.parent for path in outputs(stage)} == {plan}
