"""Checkpoints of many ranks: saved under one layout, resumed under another, and again; damage and refusals."""

import hashlib
import json
import math
import os
import re
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from test_distributed_trainer import CFG, LR, across, at_home, batches, config, model_of, update
from torch.testing._internal.distributed.fake_pg import FakeStore

from bessemer.addons.distributed import chunked_files, sharded_checkpoint, zero1
from bessemer.addons.distributed.checkpoint_reader import CheckpointReader
from bessemer.addons.distributed.mesh import Layout
from bessemer.errors import UserError
from bessemer.hf import deepseek
from bessemer.model.config import preset
from bessemer.model.transformer import Transformer
from bessemer.train import checkpoint
from bessemer.train.objective import next_token
from bessemer.train.trainer import Trainer

ALL = 8
"""Micro-batches in a step, over all ranks."""


def steps_of(rank, name, layout, first, last, folder, ema=0.0):
    """Runs steps `first` to `last` under a layout and saves; resumes from the newest checkpoint unless `first` is 0."""
    micro = ALL // (layout.dp * layout.ep)
    training = across(layout, name, state_dir=folder, ema_decay=ema)
    assert training.start() == (first > 0) and training.step == first
    norms = [update(training, step, micro)["train/grad_norm"] for step in range(first, last)]
    training.save()
    training.finish()
    return norms


def alone(first, last, folder, ema=0.0):
    """The same on one process."""
    message = []
    trainer = Trainer(
        model_of(CFG),
        next_token,
        None,
        *config(ema_decay=ema),
        folder,
        model_config=CFG.model_dump(),
        warn=message.append,
    )
    assert trainer.start() == (first > 0) and trainer.step == first
    norms = [trainer.update(batches(step, 0, ALL))["train/grad_norm"] for step in range(first, last)]
    trainer.save()
    trainer.finish()
    return norms, trainer


def test_checkpoint_resumes_under_other_layouts(tmp_path):
    """Pipeline and experts, then DualPipe, then data alone, then one process: norms, weights, moments, moving averages
    and routing biases are those of one process that never stopped."""
    parts = [
        ("1f1b", Layout(2, 1, 2), 0, 1), ("dualpipe", Layout(2, 1, 1), 1, 2), ("gpipe", Layout(1, 2, 2), 2, 3),
    ]  # fmt: skip
    actual = []
    for name, layout, first, last in parts:
        norms = on_ranks(layout.world, steps_of, name, layout, first, last, tmp_path, 0.5)
        assert all(on_rank == norms[0] for on_rank in norms)
        actual += norms[0]
    norms, ended = alone(3, 4, tmp_path, 0.5)
    trainer, values = at_home(1, ALL, ema_decay=0.5)
    assert actual + norms == pytest.approx([v["train/grad_norm"] for v in values], rel=1e-4)
    weights, state = trainer.optimizer.masters(), trainer.optimizer.state_dict()
    for name, value in ended.optimizer.masters().items():
        assert (value - weights[name]).abs().max() < 0.1 * LR, name
    for name, value in ended.optimizer.state_dict().items():
        if name.startswith(("m/", "ema/")):
            assert (value - state[name]).norm() <= 1e-3 * value.norm() + 1e-9, name
    for name, gate in trainer.gates.items():
        assert torch.equal(ended.gates[name].bias_E, gate.bias_E), name


def test_ranks_resume_a_single_process_checkpoint(tmp_path):
    norms, _ = alone(0, 2, tmp_path)
    (more, _) = on_ranks(2, steps_of, "1f1b", Layout(2, 1, 1), 2, 4, tmp_path)
    _, values = at_home(1, ALL)
    assert norms + more == pytest.approx([v["train/grad_norm"] for v in values], rel=1e-4)
    assert [path.name for path in checkpoint.steps(tmp_path)] == ["step-00000002", "step-00000004"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_model_directory_from_checkpoint(tmp_path, dtype):
    """Bit for bit what one process with the same master weights writes."""
    on_ranks(4, steps_of, "1f1b", Layout(2, 1, 2), 0, 1, tmp_path / "state", 0.5)
    path = tmp_path / "state" / "step-00000001"
    sharded_checkpoint.export(path, CFG, tmp_path / "model", dtype=dtype)
    sharded_checkpoint.export(path, CFG, tmp_path / "ema", kind="ema", dtype=dtype)
    trainer = Trainer(model_of(CFG), next_token, None, *config(dtype, ema_decay=0.5), tmp_path / "state",
                      model_config=CFG.model_dump())  # fmt: skip
    trainer.start()
    for folder, expected in (("model", trainer.model.state_dict()), ("ema", None)):
        if expected is None:
            with trainer.optimizer.averaged():
                expected = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        state = deepseek.load(tmp_path / folder).state_dict()
        assert all(
            torch.equal(state[name], value) and state[name].dtype == value.dtype for name, value in expected.items()
        )
    assert not torch.equal(deepseek.load(tmp_path / "ema").head.weight, deepseek.load(tmp_path / "model").head.weight)


def test_masters_out_of_range_are_named(tmp_path):
    _, trainer = alone(0, 0, tmp_path / "state")
    trainer.optimizer.masters()["layers.0.ffn_norm.weight"][0] = 7e4
    trainer.step = 1
    trainer.save()
    trainer.finish()
    with pytest.raises(UserError, match=r"^tensor model\.layers\.0\.post_attention_layernorm\.weight .*use float32"):
        sharded_checkpoint.of_checkpoint(tmp_path / "state" / "step-00000001", tmp_path / "out", dtype="float16")


def other_model(rank, folder):
    try:
        across(Layout(), "gpipe", CFG.model_copy(update={"route_scale": 1.0}), state_dir=folder).start()
    except UserError as error:
        return str(error)


def test_checkpoint_of_another_model_is_refused(tmp_path):
    on_ranks(1, steps_of, "gpipe", Layout(), 0, 1, tmp_path)
    (message,) = on_ranks(1, other_model, tmp_path)
    assert re.search(r"route_scale.* 1\.0 .*run.* 2\.5 .*checkpoint", message)


def some(rank, folder, names):
    saver = sharded_checkpoint.Saver(folder, {}, 2)
    saver.save(1, {name: torch.full((2, 3), float(len(name))) for name in names[rank]}, {"step": 1, "updates": 1})
    saver.finish()


def test_experts_are_restacked(tmp_path):
    names = [["model/a", "model/e.experts.w/1"], ["model/c", "model/e.experts.w/0"], []]
    on_ranks(3, some, tmp_path, names)
    path = tmp_path / "step-00000001"
    assert sorted(file.name for file in path.glob("*.safetensors")) == [
        "rank-00000.safetensors",
        "rank-00001.safetensors",
    ]
    assert CheckpointReader(path).locations.keys() == {name for own in names for name in own}
    complete = checkpoint.load(path).tensors["model"]
    assert complete["e.experts.w"].shape == (2, 2, 3) and complete["a"].shape == (2, 3)
    with pytest.raises(UserError, match=r"no model/z.*another model"):
        CheckpointReader(path).read(["model/z"])


def test_damaged_file_is_named(tmp_path):
    on_ranks(2, some, tmp_path, [["model/a"], ["model/b"]])
    path = tmp_path / "step-00000001"
    file = next(file for file in path.glob("*.safetensors") if b"model/b" in file.read_bytes())
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert CheckpointReader(path).read(["model/a"])["model/a"].shape == (2, 3), "what it does not need it does not read"
    with pytest.raises(checkpoint.Damaged, match=rf"{file.name}.*checksum"):
        CheckpointReader(path).read(["model/b"])
    (path / "manifest.json").write_text("{}")
    with pytest.raises(checkpoint.Damaged, match=r"manifest.json"):
        CheckpointReader(path)


def damaged(rank, layout, folder):
    message = []
    training = across(layout, "1f1b", state_dir=folder, warn=message.append)
    training.start()
    return training.step, message


def test_damage_on_one_rank_sends_all_to_the_previous_checkpoint(tmp_path):
    for first, last in ((0, 1), (1, 2)):
        on_ranks(2, steps_of, "1f1b", Layout(2, 1, 1), first, last, tmp_path)
    file = tmp_path / "step-00000002" / "rank-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    for step, message in on_ranks(2, damaged, Layout(2, 1, 1), tmp_path):
        assert step == 1 and re.search("rank-00001.safetensors.*checksum", message[0])


def bytes_read(rank, layout, folder):
    """Resumes; returns the bytes that this rank reads from files with tensors, and those of all their tensors."""
    pread, n_read = os.pread, 0

    def counting(file, size, offset):
        nonlocal n_read
        data = pread(file, size, offset)
        n_read += len(data)
        return data

    training = across(layout, "1f1b", state_dir=folder)
    chunked_files.os = SimpleNamespace(**{name: getattr(os, name) for name in ("fstat",)}, pread=counting)
    assert training.start()
    return n_read, checkpoint.load(checkpoint.steps(folder)[-1]).bytes()


def test_ranks_together_read_each_byte_once(tmp_path):
    """Not once each: of 8 x 84 GB, a 7B model's state on 8 ranks, seven eighths were of no use to the rank that read
    and hashed them."""
    chunk, chunked_files.CHUNK = chunked_files.CHUNK, 256
    try:
        on_ranks(4, steps_of, "1f1b", Layout(2, 1, 2), 0, 1, tmp_path)
    finally:
        chunked_files.CHUNK = chunk
    for layout in (Layout(1, 4, 1), Layout(1, 2, 2), Layout(2, 1, 2)):
        read, (complete, *_) = zip(*on_ranks(4, bytes_read, layout, tmp_path), strict=True)
        assert sum(read) < 1.35 * complete and max(read) < 0.5 * complete, layout


def empty(folder, tensors):
    """A checkpoint of one process whose tensors, of these shapes, are holes in sparse files."""
    zeros, files = hashlib.sha256(bytes(chunked_files.CHUNK)).digest(), {}
    for stem, named in tensors.items():
        header, end = {}, 0
        for name, shape in named.items():
            start, end = end, end + 4 * math.prod(shape)
            header[name] = {"dtype": "F32", "shape": [*shape], "data_offsets": [start, end]}
        head = json.dumps(header).encode()
        head = len(head).to_bytes(8, "little") + head
        path = folder / f"{stem}.safetensors"
        path.write_bytes(head)
        os.truncate(path, len(head) + end)
        chunks, remainder = divmod(end, chunked_files.CHUNK)
        digests = zeros * chunks + (hashlib.sha256(bytes(remainder)).digest() if remainder else b"")
        files[path.name] = {
            "header": hashlib.sha256(head).hexdigest(), "chunk": chunked_files.CHUNK,
            "digests": chunked_files.write_synced(chunked_files.digests_file(path), digests),
        }  # fmt: skip
    for name in ("counters.json", "config.json"):
        files[name] = chunked_files.write_synced(folder / name, b"{}")
    checkpoint.seal(folder, 1, files)


def one_of_128(_, folder, me):
    """The bytes that one of 128 ranks reads of a 16B model's state, 94 GB, and its share."""
    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=me, world_size=128)
    cfg = preset("v2-lite")
    with torch.device("meta"):
        model = Transformer(cfg)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    empty(folder, {"model": shapes, "optimizer": {f"m/{name}": shape for name, shape in shapes.items()}})
    world = dist.group.WORLD
    mesh = SimpleNamespace(group={"dense": world, "expert": world}, pp=0, experts=range(cfg.n_routed_experts))
    optimizer = zero1.Zero1(model, mesh, lambda name: [], compute_dtype=torch.bfloat16)
    for group in optimizer.groups:
        group.moments.pop("v")  # half as much to hash
    reader = CheckpointReader(folder)
    optimizer.load_pieces(reader)
    n_bytes = sum(8 * math.prod(shape) for shape in shapes.values())
    return reader.bytes_read, n_bytes / 128


def test_rank_of_128_reads_its_share_of_a_large_state(tmp_path):
    (tmp_path / "step-00000001").mkdir()
    ((read, share),) = on_ranks(1, one_of_128, tmp_path / "step-00000001", 77)
    assert 0.9e9 < share <= read < 1.3 * share


def failing(rank, folder):
    """Only rank 1 finds its disk full, and saving fails on all ranks."""
    write = sharded_checkpoint.write_chunked

    def full(path, tensors):
        if dist.get_rank() == 1:
            raise OSError(28, "No space left on device")
        return write(path, tensors)

    sharded_checkpoint.write_chunked = full
    saver = sharded_checkpoint.Saver(folder, {}, 2)
    saver.save(2, {f"model/{rank}": torch.ones(3)}, {})
    try:
        saver.finish()
    except UserError as error:
        return str(error)
    return "saved"


def test_write_failure_on_one_rank_fails_on_all(tmp_path):
    on_ranks(2, some, tmp_path, [["model/a"], ["model/b"]])
    message = on_ranks(2, failing, tmp_path)
    assert message[0] == message[1] and re.search("rank 1.*No space left", message[0])
    left = [path.name for path in tmp_path.iterdir()]
    assert left == ["step-00000001"], "what was written is gone, since the disk is full"


def in_the_background(rank, folder):
    """A step runs while a checkpoint is written, and changes nothing in it."""
    write = sharded_checkpoint.write_chunked

    def slow(path, tensors):
        time.sleep(0.5 * (rank == 0 and "00000001" in str(path)))
        return write(path, tensors)

    sharded_checkpoint.write_chunked = slow
    training = across(Layout(1, 2, 1), "gpipe", state_dir=folder)
    update(training, 0, 4)
    earlier = {name: value.clone() for name, value in training.optimizer.masters().items()}
    training.save()
    update(training, 1, 4)
    training.save()  # waits for the first save
    training.finish()
    assert CheckpointReader(folder / "step-00000002").updates == 2
    saved = checkpoint.load(folder / "step-00000001").tensors["model"]
    return all(torch.equal(saved[name], value) for name, value in earlier.items())


def test_training_continues_while_a_checkpoint_is_written(tmp_path):
    assert on_ranks(2, in_the_background, tmp_path) == [True, True]
