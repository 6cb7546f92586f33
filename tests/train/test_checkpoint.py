"""Every way in which a checkpoint can go wrong."""

import ctypes
import errno
import json
import os
import random
import resource
import stat
import weakref

import numpy as np
import pytest
import safetensors.torch
import torch
from tiny_run import trainer

from bessemer.errors import UserError
from bessemer.train import checkpoint, guard
from bessemer.train.checkpoint import State, latest, load, save, steps
from bessemer.train.checkpoint_files import TensorFile

CONFIG = {"model": {"dim": 32, "experts": [8, 2]}, "seed": 7}


def state(value=1.0, size=1000):
    tensors = {
        "model": {"a/b": torch.full((size,), value), "scalar": torch.tensor(3), "half": torch.randn(3, 5).bfloat16()},
        "extras": {},
        "odd": {"bytes": torch.arange(7, dtype=torch.uint8), "view": torch.arange(12.0).view(3, 4).T},
    }
    return State(tensors, {"step": 1, "nested": {"x": [1, 2.5]}}, CONFIG)


def same(a: State, b: State):
    assert a.counters == b.counters and a.config == b.config and a.tensors.keys() == b.tensors.keys()
    for stem, tensors in a.tensors.items():
        assert tensors.keys() == b.tensors[stem].keys()
        for name, tensor in tensors.items():
            other = b.tensors[stem][name]
            assert tensor.dtype == other.dtype and torch.equal(tensor, other), name


def test_round_trip_is_exact_and_readable_by_the_library(tmp_path):
    path = save(tmp_path / "state", 123, original := state())
    assert path.name == "step-00000123"
    same(load(path), original)
    same(latest(tmp_path / "state", CONFIG)[1], original)
    assert safetensors.torch.load_file(path / "odd.safetensors")["view"].shape == (4, 3)
    assert latest(tmp_path / "nothing here") is None


def test_keeps_the_newest(tmp_path):
    for step in (1, 2, 30, 100):
        save(tmp_path, step, state(step), keep=2)
    assert [p.name for p in steps(tmp_path)] == ["step-00000030", "step-00000100"]
    assert latest(tmp_path)[1].tensors["model"]["a/b"][0] == 100


def truncate(file):
    os.truncate(file, file.stat().st_size - 1)


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


FILES = [
    "model.safetensors",
    "odd.safetensors",
    "counters.json",
    "config.json",
    "manifest.json",
]


@pytest.mark.parametrize("damage", [truncate, flip, os.remove])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_reported_and_skipped(tmp_path, damage, name):
    good, bad = save(tmp_path, 1, state(1.0)), save(tmp_path, 2, state(2.0))
    damage(bad / name)
    messages = []
    path, found = latest(tmp_path, CONFIG, messages.append)
    assert path == good and found.tensors["model"]["a/b"][0] == 1
    assert len(messages) == 1 and name in messages[0] and "step-00000002" in messages[0]
    damage(good / name)
    with pytest.raises(UserError, match="none of the 2 checkpoints"):
        latest(tmp_path, CONFIG, messages.append)


def test_a_checkpoint_under_the_name_of_another_step_is_passed_over(tmp_path):
    good, other = save(tmp_path, 1, state(1.0)), save(tmp_path, 2, state(2.0))
    other.rename(tmp_path / "step-00000009")
    messages = []
    assert latest(tmp_path, CONFIG, messages.append)[0] == good
    assert "step-00000009 is damaged (manifest.json is that of step 2)" in messages[0]


def test_every_single_bit_of_the_manifest_matters(tmp_path):
    manifest = save(tmp_path, 1, state(size=1)) / "manifest.json"
    data, random_bits = manifest.read_bytes(), random.Random(0)
    for _ in range(100):
        broken = bytearray(data)
        broken[random_bits.randrange(len(data))] ^= 1 << random_bits.randrange(8)
        manifest.write_bytes(broken)
        try:
            same_meaning = json.loads(broken) == json.loads(data)
        except ValueError:
            same_meaning = False
        if not same_meaning:  # a flip in white space changes nothing
            with pytest.raises(checkpoint.Damaged):
                load(manifest.parent)


def test_a_state_is_read_one_tensor_at_a_time(tmp_path, monkeypatch):
    """While a run resumes, at most one tensor of the checkpoint is in memory beside those of the run, and each byte is
    read once."""
    run = trainer(steps=2, state_dir=tmp_path)
    run.run()
    sizes = [tensor.nbytes for part in load(steps(tmp_path)[-1]).tensors.values() for tensor in part.values()]
    held, most, read_bytes, read = 0, 0, 0, TensorFile.__getitem__

    def counting(self, *arguments):
        nonlocal held, most, read_bytes
        tensor = read(self, *arguments)
        size = tensor.nbytes
        read_bytes += size
        held += size
        most = max(most, held)

        def gone():
            nonlocal held
            held -= size

        weakref.finalize(tensor, gone)
        return tensor

    monkeypatch.setattr(TensorFile, "__getitem__", counting)
    again = trainer(steps=2, state_dir=tmp_path)
    assert again.start() and again.step == 2
    assert most <= 2 * max(sizes) < sum(sizes) / 4 and read_bytes < 1.001 * sum(sizes)
    for name, value in run.optimizer.state_dict().items():
        assert torch.equal(again.optimizer.state_dict()[name], value), name


@pytest.mark.parametrize("other", [2, 4])
def test_another_format_is_refused(tmp_path, monkeypatch, other):
    save(tmp_path, 1, state())
    monkeypatch.setattr(checkpoint, "FORMAT", other)
    save(tmp_path, 2, state())
    monkeypatch.setattr(checkpoint, "FORMAT", 3)
    with pytest.raises(UserError, match=rf"another version.*format {other}.*reads 3"):
        latest(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": {"dim": 64, "experts": [8, 2]}, "seed": 7}, "model.dim is 64 in this run but 32"),
        ({"model": {"dim": 32, "experts": [8, 4]}, "seed": 7}, "model.experts"),
        ({"model": {"dim": 32, "experts": [8, 2]}}, r"seed is '\(not set\)'"),
        ({**CONFIG, "mtp": 1}, "mtp is 1"),
    ],
)
def test_changed_config_is_named(tmp_path, change, words):
    save(tmp_path, 1, state())
    with pytest.raises(UserError, match=words):
        latest(tmp_path, change)
    assert latest(tmp_path, {"seed": 7, "model": {"experts": (8, 2), "dim": 32}}) is not None, (
        "order, tuples: no matter"
    )


@pytest.fixture
def full_disk(tmp_path):
    """A real file system that gets full: a small tmpfs, or a file size limit if mounting is not allowed."""
    directory = tmp_path / "small"
    directory.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", str(directory).encode(), b"tmpfs", 0, b"size=96k") == 0:
        yield directory
        libc.umount(str(directory).encode())
        return
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, limits[1]))
    yield directory
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_full_disk(full_disk):
    save(full_disk, 1, state(1.0, size=1000))
    with pytest.raises(UserError, match=r"step 2.*intact") as caught:
        save(full_disk, 2, state(2.0, size=100_000))
    assert caught.value.__cause__.errno in (errno.ENOSPC, errno.EFBIG)
    assert os.listdir(full_disk) == ["step-00000001"], "nothing half-written stays"
    assert latest(full_disk)[1].tensors["model"]["a/b"][0] == 1
    save(full_disk, 3, state(3.0, size=1000))
    assert latest(full_disk)[0].name == "step-00000003", "with a smaller state it goes on"


@pytest.mark.parametrize("failing", range(1, 15))
def test_crash_at_any_file_operation_leaves_a_checkpoint(tmp_path, monkeypatch, failing):
    """A save that replaces step 1 dies at its n-th sync or rename; step 1, old or new, must still be whole."""
    save(tmp_path, 0, state(0.0))
    save(tmp_path, 1, state(1.0))

    class Killed(BaseException):
        pass

    calls = 0

    def dying(function):
        def call(*args):
            nonlocal calls
            calls += 1
            if calls == failing:
                raise Killed
            return function(*args)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", dying(os.fsync))
        patch.setattr(checkpoint.Path, "rename", dying(checkpoint.Path.rename))
        try:
            save(tmp_path, 1, state(2.0))
            finished = True
        except Killed:
            finished = False
    messages = []
    path, found = latest(tmp_path, CONFIG, messages.append)
    assert path.name == "step-00000001" and found.tensors["model"]["a/b"][0] in (1, 2) and not messages
    if finished:
        assert found.tensors["model"]["a/b"][0] == 2 and calls < failing
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")], "leftovers are swept"


def test_a_file_system_that_syncs_no_folder_keeps_checkpoints_and_a_failing_disk_does_not(tmp_path, monkeypatch):
    sync, answer = os.fsync, errno.EINVAL

    def folders_refuse(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(answer, os.strerror(answer))
        sync(handle)

    monkeypatch.setattr(os, "fsync", folders_refuse)
    save(tmp_path, 1, state(2.0))
    assert latest(tmp_path, CONFIG)[0].name == "step-00000001"
    answer = errno.EIO
    with pytest.raises(UserError, match=r"cannot save step 2 .*Input/output error"):
        save(tmp_path, 2, state(2.0))


def test_random_states_come_back():
    own = {"mix": np.random.default_rng(3), "mt": np.random.Generator(np.random.MT19937(5))}

    def draw():
        legacy = [np.random.randn(), np.random.rand(), random.gauss(0, 1), random.random()]
        return torch.randn(3).tolist(), legacy, [g.random() for g in own.values()]

    np.random.seed(0), random.seed(0)
    draw()  # one Gaussian each: the second of the pair is cached in the state
    tensors, values = guard.capture_rng(own)
    values = json.loads(json.dumps(values))
    expected = draw()
    draw()
    guard.restore_rng(tensors, values, own)
    assert draw() == expected


def test_zeros_take_no_space(tmp_path):
    """The moments before the first step: 1.08 GB of zeros for a model of 135M parameters."""
    tensors = {"m": torch.zeros(4_000_000), "v": torch.zeros(4_000_000), "x": torch.ones(100_000)}
    path = save(tmp_path, 0, original := State({"optimizer": tensors}, {}, CONFIG))
    file = (path / "optimizer.safetensors").stat()
    assert file.st_size > 32e6 and file.st_blocks * 512 < 2e6
    same(load(path), original)
    last = State({"optimizer": {"x": torch.ones(10), "v": torch.zeros(1 << 20)}}, {}, CONFIG)
    same(load(save(tmp_path, 1, last)), last)


def test_a_finished_stage_keeps_one_large_checkpoint_or_all_small_ones(tmp_path, monkeypatch):
    for step in (1, 2):
        checkpoint.keep(save(tmp_path, step, state(step)))
    checkpoint.settle(tmp_path)
    assert [path.name for path in steps(tmp_path)] == ["step-00000001", "step-00000002"]
    monkeypatch.setattr(checkpoint, "SMALL", 1000)
    checkpoint.settle(tmp_path)
    assert [path.name for path in steps(tmp_path)] == ["step-00000002"]
    assert len(steps(tmp_path / checkpoint.KEPT)) == 2 and latest(tmp_path)[1].tensors["model"]["a/b"][0] == 2
    checkpoint.settle(tmp_path / "no state")
