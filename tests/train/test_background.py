"""Checkpoints written while training continues."""

import contextlib
import os
import threading

import pytest
import torch
from tiny_run import model, trainer

from bessemer.addons.accelerate import background
from bessemer.addons.accelerate.background import HostCopies
from bessemer.errors import UserError
from bessemer.train import checkpoint, checkpointed


def test_training_continues_while_the_disk_is_stuck(tmp_path, monkeypatch):
    """The checkpoint of step 2 is only written once step 6 is over, and holds the state after step 2. The disk never
    makes the training thread wait: none of the fsync calls come from it."""
    disk, sync = threading.Event(), os.fsync
    callers = []

    def slow(file):
        callers.append(threading.current_thread().name)
        assert disk.wait(60), "the training thread waits for the disk"
        sync(file)

    run = trainer(steps=6, state_dir=tmp_path)
    run.start()
    run.finish()
    monkeypatch.setattr(os, "fsync", slow)
    micro = [run.batches(row, 4) for row in range(0, 24, 4)]
    for step in range(6):
        if step == 2:
            kept = {name: value.clone() for name, value in run.optimizer.masters().items()}
            moments = {name: value.clone() for name, value in run.optimizer.state_dict().items()}
            run.extras = {"list": [1]}
            run.save()
            run.extras["list"].append(2)
        run.update(micro[step : step + 1])
    assert run.store.busy and [path.name for path in checkpoint.steps(tmp_path)] == ["step-00000000"]
    disk.set()
    run.finish()
    saved = checkpoint.load(tmp_path / "step-00000002")
    assert set(callers) == {"saving"} and len(callers) >= 8
    assert saved.counters["step"] == 2 and saved.counters["extras"] == {"list": [1]}
    for stem, state in (("model", kept), ("optimizer", moments)):
        assert saved.tensors[stem].keys() == state.keys()
        assert all(torch.equal(saved.tensors[stem][name], value) for name, value in state.items()), stem


def test_a_checkpoint_that_is_due_is_left_out_while_the_last_is_written(tmp_path, monkeypatch):
    disk, sync = threading.Event(), os.fsync
    run = trainer(steps=4, state_dir=tmp_path, save_seconds="0.001s")
    run.start()
    run.finish()
    monkeypatch.setattr(os, "fsync", lambda file: (disk.wait(60), sync(file)))
    run._save_cost, run._saved_at = 0.0, 0.0
    for row in range(3):
        run.update([run.batches(4 * row, 4)])
        run.save_if_due()
    assert run._saved_step == 1
    disk.set()
    run.finish()
    run._save_cost = 1000.0
    assert not run.due_by_time(), "a checkpoint that took 1000 s of training comes again after 20,000"
    run._save_cost, run._saved_at = 0.0, 0.0
    assert run.due_by_time()


def saved_steps(tmp_path, monkeypatch, seconds_to_write: float, steps: int) -> tuple[list[int], list[str]]:
    """(the steps that were saved by time, what was said) with `save_seconds` = 60, a second a step by a clock of our
    own, and a disk that takes as long."""
    now, sync, messages, saved, written = 0.0, os.fsync, [], [], set()

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return now

    def slow(file):
        nonlocal now
        if run.step not in written:
            written.add(run.step)
            now += seconds_to_write
        sync(file)

    monkeypatch.setattr(os, "fsync", slow)
    for module in (background, checkpointed):
        monkeypatch.setattr(module, "time", Clock)
    run = trainer(steps=steps, state_dir=tmp_path, save_seconds="60s", warn=messages.append)
    run.start()
    run.finish()
    for step in range(steps):
        run.step = step + 1
        now += 1.0
        run.save_if_due()
        run.finish()
        if (tmp_path / f"step-{run.step:08d}").exists():
            saved.append(run.step)
    return saved, messages


def test_a_large_state_is_written_for_a_twentieth_of_the_time(tmp_path, monkeypatch):
    """84 GB, a 7B model's state, take about 80 s: with a checkpoint every 60 s, a disk would never rest."""
    fast, quiet = saved_steps(tmp_path / "small", monkeypatch, 0.09, 600)
    assert len(fast) >= 9 and not quiet
    slow, messages = saved_steps(tmp_path / "large", monkeypatch, 80.0, 6_000)
    assert 3 <= len(slow) <= 6_000 / (20 * 80) + 1
    assert len(messages) == 1 and "save_seconds" in messages[0]


def test_an_error_of_the_writer_is_raised_by_the_training(tmp_path, monkeypatch):
    """It is raised in a later step or at the end, and the checkpoint before is intact."""
    run = trainer(steps=50, state_dir=tmp_path, save_steps=2)
    write = checkpoint.write_tensors

    def full(path, tensors):
        if ".tmp-step-00000002" in str(path):
            raise OSError(28, "No space left on device")
        return write(path, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(UserError, match=r"step 2 .*No space left.*intact"):
        run.run()
    assert run.step < 50 and checkpoint.latest(tmp_path)[1].counters["step"] == 0
    short = trainer(steps=2, state_dir=tmp_path)
    with pytest.raises(UserError, match="cannot save step 2"):
        short.run()


def test_where_memory_has_no_room_for_a_copy_training_waits(tmp_path, monkeypatch):
    messages, callers, write = [], set(), checkpoint.write_tensors
    monkeypatch.setattr(background, "host_room", lambda: 1000)
    monkeypatch.setattr(
        checkpoint, "write_tensors", lambda *a: (callers.add(threading.current_thread().name), write(*a))[1]
    )
    run = trainer(steps=3, state_dir=tmp_path, save_seconds=0, warn=messages.append)
    run.run()
    assert callers == {threading.current_thread().name} and run.store.writer._copies.held == 0
    assert len(messages) == 1 and "waits while checkpoints are written" in messages[0]
    assert checkpoint.latest(tmp_path)[1].counters["step"] == 3


def test_copies_reuse_one_buffer():
    copies, tensors = (
        HostCopies(),
        [torch.randn(700, 30), torch.tensor(3), torch.randn(3, 5).bfloat16().T, torch.ones(0)],
    )
    copies.begin(tensors)
    first = [copies.add(tensor) for tensor in tensors]
    places = [copy.data_ptr() for copy in first]
    assert all(torch.equal(copy, tensor) for copy, tensor in zip(first, tensors, strict=True))
    assert sum(t.numel() * t.element_size() for t in tensors) <= copies.held < 85_000
    copies.begin(tensors)
    assert [copies.add(tensor + 1).data_ptr() for tensor in tensors] == places and first[1] == 4
    copies.begin()
    big = copies.add(torch.zeros(100_000))
    assert big.data_ptr() not in places and copies.held >= background.CHUNK, "what has grown goes into more pieces"


def test_growing_tensors_come_last_and_move_nothing(tmp_path):
    """RL's waiting rollouts in `extras` grow, but masters and moments keep their places in pinned memory."""
    run = trainer(steps=3, state_dir=tmp_path)
    run.start()
    run.finish()
    copies = run.store.writer._copies
    (first,), places = copies._chunks, []
    for step, size in ((1, 10), (2, 100_000)):
        run.step, run.extra_tensors = step, {"rollouts": torch.ones(size)}
        run.save()
        run.finish()
        places.append(checkpoint.load(tmp_path / f"step-0000000{step}").tensors["extras"]["rollouts"].numel())
    assert places == [10, 100_000] and copies._chunks[0] is first and len(copies._chunks) == 2


def test_free_memory_counts_system_and_container_limits(tmp_path, monkeypatch):
    monkeypatch.setattr(background, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(background, "CGROUP", tmp_path)
    assert background.host_room() == 1 << 62
    (tmp_path / "meminfo").write_text("MemTotal:  100 kB\nMemAvailable:  64 kB\n")
    assert background.host_room() == 64 * 1024
    for name, text in (
        ("memory.stat", "anon 5\ninactive_file 3000\n"),
        ("memory.current", "9000"),
        ("memory.max", "max"),
    ):
        (tmp_path / name).write_text(text)
    assert background.host_room() == 64 * 1024
    (tmp_path / "memory.max").write_text("16000\n")
    assert background.host_room() == 10_000


class OnGPU(torch.Tensor):
    """A tensor that claims to be on a GPU."""

    is_cuda = property(lambda self: True)


def test_order_of_copies_from_a_gpu(tmp_path, monkeypatch):
    """What forward changes is copied on the main stream. Then a side stream, after the last step, copies weights and
    moments; the next step waits for that, and so does the thread before it writes. (torch.cuda only logs here.)"""
    log, current = [], ["main"]

    class Stream:
        def wait_stream(self, other):
            log.append(f"side waits for {other}")

    class Event:
        def record(self):
            log.append(f"event on {current[0]}")

        def synchronize(self):
            log.append("thread waits")

    class Main:
        __str__ = lambda self: "main"  # noqa: E731

        def wait_event(self, event):
            log.append("main waits")

    @contextlib.contextmanager
    def on(stream):
        current[0] = "side"
        yield
        current[0] = "main"

    class CudaRuntime:
        cudaHostRegister = staticmethod(lambda pointer, size, flags: log.append(f"pinned {flags}") or 0)
        cudaHostUnregister = staticmethod(lambda pointer: log.append("unpinned"))

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", Main)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "cudart", CudaRuntime)
    add = HostCopies.add

    def logged(self, tensor, place=None):
        log.append(f"copy on {current[0]}")
        return add(self, tensor.as_subclass(torch.Tensor), place)

    monkeypatch.setattr(HostCopies, "add", logged)
    run = trainer(steps=2, state_dir=tmp_path)
    state = run.state

    def on_gpu():
        gpu_state = state()
        for named in gpu_state.tensors.values():
            named.update({name: tensor.as_subclass(OnGPU) for name, tensor in named.items()})
        return gpu_state

    run.state = on_gpu
    step = run.optimizer.groups[0].step
    run.optimizer.groups[0].step = lambda update: (log.append("step"), step(update))
    run.start()
    run.finish()
    tensors = state().tensors
    n_late = len(tensors["model"]) + len(tensors["optimizer"])
    n_early = sum(map(len, tensors.values())) - n_late
    assert n_early and log == [
        "pinned 1", *["copy on main"] * n_early, "side waits for main", *["copy on side"] * n_late, "event on side",
        "thread waits",
    ]  # fmt: skip
    log.clear()
    run.update([run.batches(0, 4)])
    run.update([run.batches(4, 4)])
    assert log == ["main waits", "step", "step"]
    log.clear()
    run._restore_latest()
    assert run.step == 0, "and what was written can be read"
    del run.store.writer._copies
    assert log == ["unpinned"]


def test_helpers_share_the_copies():
    """A fork shares the pages, so its writes are seen here and copy nothing; it may drop its reference to them."""
    copies = HostCopies()
    copies.begin([torch.ones(1000)])
    copies.add(torch.ones(1000))
    pid = os.fork()
    if pid == 0:
        copies._chunks[0][0] = 7
        copies._chunks.clear()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0 and copies._chunks[0][0] == 7


def test_a_bad_step_goes_back_to_a_checkpoint_that_was_still_being_written(tmp_path, monkeypatch):
    sync = os.fsync
    run = trainer(model(), steps=9, state_dir=tmp_path, warn=lambda text: None, failures=1)
    run.start()
    run.update([run.batches(0, 4)])
    monkeypatch.setattr(os, "fsync", lambda file: (threading.Event().wait(0.01), sync(file)))
    run.save()
    next(iter(run.optimizer.masters().values())).fill_(torch.nan)
    run.update([run.batches(4, 4)])
    assert run.step == 1 and run.guard.rolled_back == 1
    assert all(torch.isfinite(value).all() for value in run.optimizer.masters().values())


def test_outgrown_buffers_are_released(monkeypatch):
    """A stage whose checkpoints hold rollouts of growing answers must not keep every earlier size."""
    monkeypatch.setattr(background, "CHUNK", 1 << 16)
    copies, sizes = HostCopies(), [1000, 300_000, 50]
    copies.begin([torch.zeros(size, dtype=torch.uint8) for size in sizes])
    for growth in range(40):
        tensors = [torch.full((int(size * 1.02**growth),), growth, dtype=torch.uint8) for size in sizes]
        copies.begin(tensors)
        assert all(torch.equal(copies.add(tensor), tensor) for tensor in tensors)
    assert copies.held < 3 * sum(tensor.numel() for tensor in tensors) + (1 << 17)
