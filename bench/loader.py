"""The cost of reading data relative to training, and the padding of packed rows.

    python bench/loader.py --json bench/results/loader.json

Loader: seconds to assemble a step's batches (mixture, packed rows read from shards, checksum of every row) against
seconds of the training step itself. One process on one core, `tiny` in float32, 16 rows of 256 tokens, real text, real
routing; medians over the steps. Packing: padding of pre-training rows (best fit, no mask) and of SFT rows (whole
samples, with masks) for several row lengths, on the same text and on the arithmetic task's conversations.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

from bessemer import tasks
from bessemer.config.training import PretrainConfig
from bessemer.config.units import Points
from bessemer.data import corpus, sft_rows, sources
from bessemer.data.documents import Document
from bessemer.data.mixture import Mixture
from bessemer.data.rows import open_rows
from bessemer.data.tokenizer import Tokenizer
from bessemer.model.config import preset
from bessemer.model.transformer import Transformer
from bessemer.train import objective, setup
from bessemer.train.plan import TrainingPlan, constant
from bessemer.train.trainer import Trainer

PARTS = ("fables-en", "fables-zh", "python-code", "shakespeare")
LENGTHS = (256, 1024, 4096)
ROWS, CONVERSATIONS = 16, 20_000


def build(folder: Path) -> Tokenizer:
    texts = {part: list(sources.documents(part)) for part in PARTS}
    sample = itertools.chain.from_iterable((document.text for document in group[:400]) for group in texts.values())
    tokenizer = Tokenizer.train(sample, 2048)
    for part, group in texts.items():
        corpus.build(group, tokenizer, LENGTHS[0], folder / part, fim_rate=0.1, boundary_split_rate=0.05)
    return tokenizer


def loader(folder: Path, steps: int) -> dict[str, float]:
    """Seconds of a step and of loading its batches."""
    mixture = Mixture({part: open_rows(folder / part) for part in PARTS}, dict.fromkeys(PARTS, 1 / len(PARTS)))
    reading: list[float] = []

    def batches(first_row: int, n_rows: int):
        began = time.perf_counter()
        batch = mixture.batch(first_row, n_rows)
        reading.append(time.perf_counter() - began)
        return batch

    setup.keep_memory()
    config = PretrainConfig(kind="pretrain", lr=Points(1e-3), micro_rows=ROWS)
    plan = TrainingPlan(
        tokens=10**12, gamma=constant(1e-3), batch_rows=constant(ROWS),
        terms={"mtp_lambda": constant(0.3), "balance_alpha": constant(1e-4)},
    )  # fmt: skip
    trainer = Trainer(Transformer(preset("tiny")).initialise(0), objective.next_token, batches, config, plan)
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        trainer.update(trainer.on_device.micro_batches())
        seconds.append(time.perf_counter() - began)
    step, read = statistics.median(seconds[2:]), statistics.median(reading[2:])
    return {"step_seconds": step, "loader_seconds": read, "loader_share": read / step,
            "loader_share_worst": max(r / t for r, t in zip(reading[2:], seconds[2:], strict=True))}  # fmt: skip


def talk(answer: str) -> Document:
    messages = ({"role": "user", "content": answer[:20]}, {"role": "assistant", "content": answer})
    return Document("", "sft", messages)


def waste(folder: Path, tokenizer: Tokenizer) -> dict[str, dict[str, float]]:
    shares: dict[str, dict[str, float]] = {}
    for length in LENGTHS:
        parts = [open_rows(folder / part, "train", length) for part in PARTS]
        capacity = sum(rows.n_rows for rows in parts) * length
        shares[str(length)] = {rows.path.name: rows.waste for rows in parts}
        shares[str(length)]["all parts"] = 1 - sum(rows.facts["tokens"] for rows in parts) / capacity
        task = tasks.get("arithmetic")
        talks = (talk(task.document(i)) for i in range(CONVERSATIONS))
        shares[str(length)]["sft, masked"] = sft_rows.build(talks, tokenizer, length, folder / f"sft-{length}")["waste"]
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = build(folder)
        report = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__,
                 "loader": loader(folder, options.steps), "waste": waste(folder, tokenizer)}  # fmt: skip
    print(json.dumps(report, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
