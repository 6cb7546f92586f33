"""The digest of a model directory: it follows the content alone, and reads little of a large one."""

import json
import os
import shutil
import struct

import pytest
from safetensors.torch import load_file, save_file

from bessemer.addons.serve import digest as module
from bessemer.addons.serve.digest import digest
from bessemer.model.config import preset
from bessemer.model.transformer import Transformer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    shape = dict(
        vocab_size=300, dim=32, n_layers=2, inter_dim=48, moe_inter_dim=16, n_heads=2, q_lora_rank=16, kv_lora_rank=16,
        qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=8, n_activated_experts=2,
        n_expert_groups=4, n_limited_groups=2, max_seq_len=640,
    )  # fmt: skip
    Transformer(preset("tiny", **shape)).initialise(3).save(folder)
    return folder


def test_digest_survives_copies_and_changes_with_training(model, tmp_path):
    first = digest(model)
    copied = shutil.copytree(model, tmp_path / "copy")
    assert digest(copied) == first and len(first) == 32
    (weights,) = copied.glob("*.safetensors")
    tensors = load_file(weights)
    for changed in (max(tensors, key=lambda name: tensors[name].numel()), "model.norm.weight"):
        save_file(tensors | {changed: tensors[changed] * 1.001}, weights, {"format": "pt"})
        assert digest(copied) != first
    save_file(tensors, weights, {"format": "pt"})
    assert digest(copied) == first
    (copied / "chat_template.jinja").write_text("{{ messages }}")
    assert digest(copied) != first


def test_digest_of_a_terabyte_reads_little(tmp_path, monkeypatch):
    """Sparse files of the size and with the number of tensors of V3: no byte of them exists."""
    tensors, shards, size = 90_000, 10, 15_000_000
    for shard in range(shards):
        per_shard = tensors // shards
        header = json.dumps({
            f"model.layers.{shard}.{n}.weight": {
                "dtype": "BF16", "shape": [size // 2], "data_offsets": [n * size, (n + 1) * size],
            }
            for n in range(per_shard)
        }).encode()  # fmt: skip
        file = tmp_path / f"model-{shard:05d}.safetensors"
        file.write_bytes(struct.pack("<Q", len(header)) + header)
        os.truncate(file, 8 + len(header) + per_shard * size)
    index = {
        f"model.layers.{s}.{n}.weight": f"model-{s:05d}.safetensors"
        for s in range(shards)
        for n in range(tensors // shards)
    }
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    read, entries = [], module.Checkpoint(tmp_path).entries
    assert sum(entry.size for entry in entries.values()) == 1_350_000_000_000
    opened = type(tmp_path).open

    def counted(self, *args, **named):
        if self.suffix == ".safetensors":
            read.append(self)
        return opened(self, *args, **named)

    monkeypatch.setattr(type(tmp_path), "open", counted)
    first = digest(tmp_path)
    assert len(read) <= module.MOST_TENSORS + 2 * shards
    monkeypatch.undo()
    name = sorted(entries)[0]
    with entries[name].file.open("r+b") as file:
        file.seek(entries[name].start + entries[name].size // 2)
        file.write(b"\1")
    assert digest(tmp_path) != first
