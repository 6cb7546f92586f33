"""A short name for what a model directory holds: two directories with different digests answer differently.

It covers the table of all tensors, a sample of the weights, the tokenizer and the chat template. A sample, because a
server of a large model cannot read all of its weights to answer who it is: training moves every tensor that it trains,
so bytes from the middle of thousands of tensors tell its steps apart.
"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from bessemer.hf.safetensors_reader import Checkpoint

MOST_TENSORS = 4_096
"""Tensors that are looked into, evenly spaced among all by name."""
SAMPLE = 256
"""Bytes read from the middle of each."""
TEXTS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def digest(folder: Path) -> str:
    """32 hex digits."""
    entries = sorted(Checkpoint(folder).entries.items())
    total = sha256()
    for name, entry in entries:
        total.update(f"{name} {entry.dtype} {entry.shape}\n".encode())
    step = -(-len(entries) // MOST_TENSORS) or 1
    for _, entry in entries[::step]:
        with entry.file.open("rb", buffering=0) as file:
            file.seek(entry.start + max(0, entry.size - SAMPLE) // 2)
            total.update(file.read(min(SAMPLE, entry.size)))
    for name in TEXTS:
        if (path := folder / name).is_file():
            total.update(f"{name}\n".encode() + path.read_bytes())
    return total.hexdigest()[:32]
