"""Files of which a reader verifies no more than it reads."""

import pytest
import torch

from bessemer.addons.distributed import chunked_files
from bessemer.addons.distributed.checkpoint_reader import CheckpointReader
from bessemer.train import checkpoint
from bessemer.train.checkpoint_files import write_synced


@pytest.fixture
def large(monkeypatch, tmp_path):
    """A checkpoint with a tensor of 100 chunks and small ones around it."""
    monkeypatch.setattr(chunked_files, "CHUNK", 1 << 10)
    tensors = {"model/before": torch.ones(3), "model/large": torch.arange(100 * 256.0), "model/after": torch.ones(4)}
    path = tmp_path / "step-00000001"
    path.mkdir()
    files = {"rank-00000.safetensors": chunked_files.write_chunked(path / "rank-00000.safetensors", tensors)}
    files |= {name: write_synced(path / name, b"{}") for name in ("counters.json", "config.json")}
    checkpoint.seal(path, 1, files)
    return path, tensors["model/large"]


def test_reading_a_slice_reads_only_its_chunks(large):
    path, tensor = large
    reader = CheckpointReader(path)
    assert reader.bytes_read == 0
    assert torch.equal(reader.elements("model/large", 5_000, 5_500), tensor[5_000:5_500])
    assert reader.bytes_read == 3 << 10, "2,000 bytes lie in three chunks"
    assert torch.equal(reader.elements("model/large", 5_500, 5_600), tensor[5_500:5_600])
    assert reader.bytes_read == 3 << 10, "the last chunk is not read again"
    assert reader.elements("model/large", 7, 7).shape == (0,)


def test_damage_is_noticed_only_by_readers_of_its_chunk(large):
    path, tensor = large
    file = path / "rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    reader = CheckpointReader(path)
    assert torch.equal(reader.elements("model/large", 0, 10_000), tensor[:10_000])
    with pytest.raises(checkpoint.Damaged, match=r"rank-00000.safetensors does not match"):
        reader.elements("model/large", 10_000, 15_000)


def test_ranks_read_slices_of_a_single_process_file(tmp_path):
    state = checkpoint.State({"model": {"a/b": torch.arange(40.0)}}, {}, {})
    path = checkpoint.save(tmp_path, 3, state)
    assert CheckpointReader(path).elements("model/a/b", 10, 30).tolist() == [*range(10, 30)]
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-1] + b"x")
    with pytest.raises(checkpoint.Damaged, match=r"model.safetensors"):
        CheckpointReader(path).elements("model/a/b", 10, 30)
