"""Decoding against llama.cpp: the same float32 weights, prompts, greedy tokens and threads, in one run.

    python bench/llama_speed.py MODEL [--rounds 3] [--tokens 96] [--threads 1] [--json bench/results/llama_speed.json]

MODEL is a directory of our model family, such as runs/zero/03-zero/model; llama.cpp reads it through a GGUF file that
we write. Both sides ignore stop tokens. For each row count llama.cpp uses its fastest form (flash attention or not,
cache in F32 or F16). Its batch goes through `llama_decode` itself, all rows in one call, and the next tokens are one
`argmax` of all logits. Rounds alternate between the sides; figures are tokens of all rows divided by the time of whole
calls, prefill included: medians, with minimum and maximum. Requires llama-cpp-python, which builds llama.cpp.
"""

# ruff: noqa: E402  (the path changes between imports)
from __future__ import annotations

import argparse
import ctypes
import json
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]  # llama_cpp.py here is a benchmark
import llama_cpp as llama

sys.path.insert(0, str(HERE))
import numpy as np
import torch
from machine import processor, spread

import bessemer
from bessemer import tasks
from bessemer.addons.families import gguf_file
from bessemer.data.chat import question_ids
from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.engine import Engine
from bessemer.train.setup import keep_memory

FORMS = {
    f"{'flash' if flash else 'plain'}, {name}": (flash, kind)
    for flash in (False, True)
    for name, kind in (("F32 cache", llama.GGML_TYPE_F32), ("F16 cache", llama.GGML_TYPE_F16))
}

SILENT = llama.llama_log_callback(lambda *_: None)
"""Kept alive here, since llama.cpp may call it at any time."""


class Peer:
    """llama.cpp on a GGUF file, with room for `rows` rows of `length` tokens."""

    def __init__(self, file: Path, rows: int, length: int, threads: int, flash: bool, kind: int):
        self.model = llama.llama_model_load_from_file(str(file).encode(), llama.llama_model_default_params())
        options = llama.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = rows * length, rows * length, 512
        options.n_seq_max, options.n_threads, options.n_threads_batch = rows, threads, threads
        options.type_k = options.type_v = kind
        options.flash_attn_type = int(flash)
        self.context = llama.llama_init_from_model(self.model, options)
        if not self.context:
            raise RuntimeError("llama.cpp refuses this form")
        self.batch = llama.llama_batch_init(rows * length, 0, 1)
        self.vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))

    def _feed(self, tokens: list[int], positions: list[int], rows: list[int], with_logits: list[bool]) -> np.ndarray:
        """Logits of the wanted tokens, [wanted, vocabulary]."""
        batch = self.batch
        for i, (token, position, row, logits) in enumerate(zip(tokens, positions, rows, with_logits, strict=True)):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = row, logits
        batch.n_tokens = len(tokens)
        if llama.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        size = sum(with_logits) * self.vocab
        values = np.ctypeslib.as_array(
            ctypes.cast(llama.llama_get_logits(self.context), ctypes.POINTER(ctypes.c_float)), (size,)
        )
        return values.reshape(-1, self.vocab)

    def greedy(self, prompts: list[list[int]], n: int) -> list[list[int]]:
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)
        rows = range(len(prompts))
        logits = self._feed(
            [token for prompt in prompts for token in prompt],
            [position for prompt in prompts for position in range(len(prompt))],
            [row for row in rows for _ in prompts[row]],
            [position == len(prompt) - 1 for prompt in prompts for position in range(len(prompt))],
        )
        steps = [logits.argmax(1).tolist()]
        for step in range(n - 1):
            places = [len(prompt) + step for prompt in prompts]
            steps.append(self._feed(steps[-1], places, list(rows), [True] * len(prompts)).argmax(1).tolist())
        return [list(row) for row in zip(*steps, strict=True)]

    def close(self) -> None:
        llama.llama_batch_free(self.batch)
        llama.llama_free(self.context)
        llama.llama_model_free(self.model)


def timed(work) -> tuple[float, list[list[int]]]:
    begin = time.perf_counter()
    result = work()
    return time.perf_counter() - begin, result


def case(engine: Engine, file: Path, prompts: list[list[int]], n: int, rounds: int, threads: int) -> dict:
    """One number of rows: every form of the peer once, then its fastest and ours in turn."""

    def ours() -> list[list[int]]:
        return [list(row[0].tokens) for row in engine.generate(prompts, max_new_tokens=n, temperature=0, stop_ids=())]

    length, forms = len(prompts[0]) + n, {}
    for name, form in FORMS.items():
        try:
            peer = Peer(file, len(prompts), length, threads, *form)
        except RuntimeError as error:
            print(f"{name}: {error}")
            continue
        peer.greedy(prompts, 4)
        forms[name] = timed(lambda peer=peer: peer.greedy(prompts, n))[0]
        peer.close()
    best = min(forms, key=forms.__getitem__)
    peer = Peer(file, len(prompts), length, threads, *FORMS[best])
    seconds: dict[str, list[float]] = {"ours": [], "llama.cpp": []}
    ours(), peer.greedy(prompts, 4)
    for _ in range(rounds):
        own_seconds, own = timed(ours)
        seconds["ours"].append(own_seconds)
        own_seconds, reference = timed(lambda: peer.greedy(prompts, n))
        seconds["llama.cpp"].append(own_seconds)
    peer.close()
    total = len(prompts) * n
    return {
        "rows": len(prompts), "prompt": len(prompts[0]), "form": best,
        "forms": {name: total / own_seconds for name, own_seconds in forms.items()},
        "tokens_equal": sum(a == b for x, y in zip(own, reference, strict=True) for a, b in zip(x, y, strict=True)),
        "tokens": total,
        "tokens_per_second": {name: spread([total / took for took in values]) for name, values in seconds.items()},
        "ratio": spread([b / a for a, b in zip(*seconds.values(), strict=True)]),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_memory()
    llama.llama_log_set(SILENT, ctypes.c_void_p())
    model, tokenizer = bessemer.load(args.model, dtype="float32").eval(), Tokenizer.load(args.model)
    engine, task, cases = Engine(model, tokenizer), tasks.get("countdown"), []
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "model.gguf"
        gguf_file.write(args.model, file, "float32")
        for rows, length in ((1, 32), (32, 32), (1, 320), (32, 320)):
            ids = [question_ids(tokenizer, task.problem("test", i).prompt) for i in range(rows)]
            prompts = [(part * (length // len(part) + 1))[-length:] for part in ids]
            cases.append(result := case(engine, file, prompts, args.tokens, args.rounds, args.threads))
            speed = {name: f"{values['median']:,.0f}" for name, values in result["tokens_per_second"].items()}
            ratio, equal = result["ratio"]["median"], f"{result['tokens_equal']} of {result['tokens']} tokens equal"
            print(f"{rows} rows, prompt {length}: {speed} tokens/s, {ratio:.2f} times ({result['form']}); {equal}")
    if args.json:
        facts = {
            "model": "/".join(args.model.resolve().parts[-3:]), "processor": processor(), "threads": args.threads,
            "torch": torch.__version__, "llama_cpp_python": llama.__version__, "dtype": "float32", "cases": cases,
        }  # fmt: skip
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
