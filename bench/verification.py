"""How long verdicts take, one after another and by verifiers; how long a sampler waits for them; what a sample takes.

    python bench/verification.py --before OTHER/src --json bench/results/verification.json
    python bench/verification.py --answers 64 --sample 8 --rollout 64 --tokens 32     a rehearsal of a minute

verdicts    `--answers`, a quarter programs of 20 tests, a quarter symbolic mathematics, the rest sums; all are
            different. Serial: `Task.verify` in this process, of `--sample` of each kind, scaled to all of them; with
            `--before`, by the package of another checkout. Verifiers: all of the answers on all cores, after a warm-up.
idle        An engine writes `--rollout` samples of up to `--tokens` tokens on one core while one verifier judges on
            another. Its model is random, so each sample counts as one of those programs. Idle is the part of the
            rollout in which the engine is done and a verdict is missing; `after` begins no verdict before that.
memory      Bytes per token of these samples: arrays, text, and whole objects on their way to another process.

Nothing else should run on the machine. The default takes about eight minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

TESTS = 20
KINDS = ("programs", "mathematics", "sums", "sums")


def write_problems(folder: Path) -> None:
    tests = [{"input": f"{n}\n{n + 3}\n", "output": f"{2 * n + 3}\n"} for n in range(TESTS)]
    (folder / "code.jsonl").write_text(json.dumps({"prompt": "Print the sum of two numbers.", "tests": tests}) + "\n")
    question = "Which polynomial is it, problem"
    lines = [{"question": f"{question} {n}?", "answer": f"x^2+{n + 2}x+{n + 1}"} for n in range(64)]
    (folder / "maths.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def program(n: int) -> str:
    return f"a = int(input())\nb = int(input())  # {n}\nprint(a + b)"


def answers(folder: Path, count: int) -> list:
    """(task, problem, answer), `count` of them, of KINDS in turn."""
    from bessemer import tasks

    code, maths = tasks.get(f"code:{folder}/code.jsonl@train"), tasks.get(f"jsonl:{folder}/maths.jsonl@train")
    families = {"programs": code, "mathematics": maths, "sums": tasks.get("arithmetic")}
    rows = []
    for n in range(count):
        task = families[KINDS[n % len(KINDS)]]
        problem = task.problem("train", n // len(KINDS) % 64 if task is maths else 0)
        k = int(problem.meta["gold"].split("+")[2]) if task is maths else 0
        text = {code: program(n), maths: f"x^2+{k + 1}x+{k + n + 1}-{n + 1}"}.get(task, str(n))
        rows.append((task, problem, f"<think>t</think><answer>{text}</answer>"))
    return rows


def serial(folder: Path, sample: int) -> dict[str, float]:
    """Seconds of one verdict of each kind."""
    sampled = answers(folder, (sample + 1) * len(KINDS))
    seconds = {}
    for index, kind in enumerate(KINDS[:3]):
        own = sampled[index :: len(KINDS)]
        own[0][0].verify(*own[0][1:])  # starts the referee
        began = time.perf_counter()
        right = [task.verify(problem, answer).correct for task, problem, answer in own[1:]]
        seconds[kind] = (time.perf_counter() - began) / sample
        assert all(right) or kind == "sums", f"{kind}: {sum(right)} of {sample} are right"
    return seconds


def verdicts(folder: Path, args: argparse.Namespace) -> dict:
    from bessemer.eval.judging import judge_all

    triples = answers(folder, args.answers + 64)
    judge_all(triples[args.answers :])  # starts the verifiers and their referees
    began = time.perf_counter()
    judged = judge_all(triples[: args.answers])
    seconds = time.perf_counter() - began
    right = [answer.verdict.correct for answer in judged]
    assert all(right[0::4]) and all(right[1::4])
    return {"answers": args.answers, "seconds": seconds}


def idle(folder: Path, args: argparse.Namespace) -> dict:
    """Two rollouts of the same samples, with verdicts beside sampling and after it."""
    import torch

    from bessemer.data.tokenizer import Tokenizer
    from bessemer.engine.engine import Engine
    from bessemer.model.config import preset
    from bessemer.model.transformer import Transformer
    from bessemer.rl import rollout

    torch.set_num_threads(1)
    tokenizer = Tokenizer.train(["the quick brown fox " * 50] * 4, 300)
    cfg = preset("tiny", vocab_size=1024, max_seq_len=args.tokens + 64, n_mtp=0)
    engine = Engine(Transformer(cfg).initialise(0).eval(), tokenizer)
    code = answers(folder, 1)[0][0]
    groups = args.rollout // 8
    problems = [(code, code.problem("train", 0))] * groups
    ended = [0.0]

    class Writes:
        """The engine; each of its samples is a program."""

        def __init__(self, first: int, beside: bool) -> None:
            self.first, self.beside, self.tokenizer = first, beside, tokenizer

        def text(self, p: int, k: int) -> str:
            return f"<think>t</think><answer>{program(self.first + 8 * p + k)}</answer>"

        def generate(self, prompts, on_text=None, **options):
            callback = (lambda p, k, _: on_text(p, k, self.text(p, k))) if self.beside else None
            groups = engine.generate(prompts, on_text=callback, **options)
            ended[0] = time.perf_counter()
            return [
                [replace(completion, text=self.text(p, k)) for k, completion in enumerate(g)]
                for p, g in enumerate(groups)
            ]

    result: dict = {"samples": groups * 8, "tokens_at_most": args.tokens}
    for name, beside in (("warm-up", True), ("after", False), ("beside", True)):
        first = {"warm-up": 10**6, "after": 2 * 10**6, "beside": 3 * 10**6}[name]
        few = problems[:1] if name == "warm-up" else problems
        began = time.perf_counter()
        rollouts = rollout.sample(
            Writes(first, beside), few, lambda _: [0, 5, 6], samples=8, seed=1, max_new_tokens=args.tokens,
            stop_ids=[0], batch_rows=64,
        )  # fmt: skip
        seconds = time.perf_counter() - began
        assert all(row.verdict.correct for group in rollouts for row in group)
        if name != "warm-up":
            waited = time.perf_counter() - ended[0]
            result[name] = {"seconds": seconds, "idle_seconds": waited, "idle_percent": 100 * waited / seconds}
    rows = [row.completion for group in rollouts for row in group]
    tokens = sum(len(row.tokens) for row in rows)
    result["memory"] = {
        "tokens": tokens,
        "array_bytes_per_token": sum(sys.getsizeof(x) for row in rows for x in (row.tokens, row.logprobs)) / tokens,
        "sent_bytes_per_token": len(pickle.dumps([replace(row, text="") for row in rows])) / tokens,
    }
    return result


def child(part: str, folder: Path, args: argparse.Namespace, source: str, cores: int) -> dict:
    """A part of this bench in a process of its own, with the package in `source`."""
    env = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": str(cores), "BESSEMER_CACHE": str(folder)}
    numbers = [f"--{name}={getattr(args, name)}" for name in ("answers", "sample", "rollout", "tokens")]
    done = subprocess.run(
        [sys.executable, __file__, "--part", part, "--folder", folder, *numbers],
        env=env, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=8192)
    parser.add_argument("--sample", type=int, default=64, help="answers of each kind that are judged one by one")
    parser.add_argument("--rollout", type=int, default=256, help="samples of the rollout")
    parser.add_argument("--tokens", type=int, default=4096, help="its longest sample")
    parser.add_argument("--before", help="folder of another version of the package, for the serial verdicts")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--part", choices=("serial", "verdicts", "idle"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part is not None:
        parts = {"serial": lambda: serial(args.folder, args.sample)}
        parts |= {"verdicts": lambda: verdicts(args.folder, args), "idle": lambda: idle(args.folder, args)}
        print(json.dumps(parts[args.part]()))
        return
    from bessemer.system import granted_cores

    source, cores = os.environ.get("PYTHONPATH", ""), granted_cores()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_problems(folder)
        serial_run = child("serial", folder, args, args.before or source, 1)
        counts = {kind: args.answers * KINDS.count(kind) / len(KINDS) for kind in serial_run}
        before = {
            "package": "before" if args.before else "this one",
            "seconds_each": serial_run,
            "scaled_seconds": sum(serial_run[kind] * counts[kind] for kind in serial_run),
        }
        after = child("verdicts", folder, args, source, cores)
        facts = {
            "machine": platform.processor() or platform.machine(), "cores": cores, "serial": before, "verifiers": after,
            "times": before["scaled_seconds"] / after["seconds"], "idle": child("idle", folder, args, source, 1),
        }  # fmt: skip
    print(json.dumps(facts, indent=1))
    if args.json is not None:
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
