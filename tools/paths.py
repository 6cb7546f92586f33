"""Counts what a reader opens to follow a token, a rollout, a request and a setting through the package.

    python tools/paths.py             the table of docs/architecture.md
    python tools/paths.py --files     every file of every path, with its functions
    python tools/paths.py --check     fails if a path is over its reading budget
    python tools/paths.py --write     writes the table into docs/architecture.md

A line trace of real runs: a small recipe (corpus, two steps of pre-training, one rollout of GRPO), then a streamed chat
request to a server on its model. Counted are the functions of the package that run between the two ends of a path:
their lines of code (no docstrings, comments, blank lines), and those of them that ran. Three rules keep judgement out:

- A file counts from five lines that ran; less is read where it is called.
- What measures, records, saves or guards (`BESIDE`) is left out, in all paths alike.
- The network (`NETWORK`) counts in the token's path, and as one thing in the others.

A setting is followed by its value: a function counts if one of its variables holds the value, or settings that do.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
ROOT = REPOSITORY / "src" / "bessemer"
LEAST = 5
"""Lines that run before a file counts."""
BESIDE = (
    "runs/", "addons/watch/", "addons/diagnose/", "addons/plan/", "errors.py", "system.py", "heartbeat.py", "escape.py",
    "rl/monitor.py", "addons/serve/metrics.py", "addons/accelerate/instruments.py", "train/guard.py",
    "addons/accelerate/determinism.py", "train/checkpoint", "addons/accelerate/background.py", "train/lineage.py",
)  # fmt: skip
NETWORK = (
    "model/", "addons/accelerate/register.py", "addons/accelerate/kernels/attention.py",
    "addons/accelerate/kernels/deferred.py", "addons/accelerate/kernels/experts.py",
    "addons/accelerate/kernels/gate.py", "addons/accelerate/kernels/norm.py", "addons/accelerate/kernels/product.py",
)  # fmt: skip
ASKED = 4
"""Calls of a function whose variables are searched for the followed setting."""
LR = 0.0051234
"""The value of the setting that is followed; nothing else has it."""


@dataclass(frozen=True)
class Budget:
    """What a path may cost a reader, with a C++ compiler at hand. It falls when the path does, and is never raised: a
    longer path needs another part of it to become shorter."""

    files: int
    lines: int
    aim: str


BUDGETS = {
    "token": Budget(41, 1_760, "25 files, 1,450 lines"),
    "rollout": Budget(51, 2_160, "25 files, 1,400 lines"),
    "request": Budget(29, 1_925, "25 files, 1,500 lines"),
    "setting": Budget(11, 485, "8 files"),
}
TITLES = {
    "token": "a token, from document to updated weight",
    "rollout": "a rollout, from problem to updated weight (the network as one)",
    "request": "a request, from HTTP to streamed token (the network as one)",
    "setting": "a setting, from `--set pretrain.lr` to the optimizer",
}
RECIPE = """
name = "paths"
seed = 7
[model]
preset = "tiny"
[[stage]]
kind = "corpus"
row_length = 320
vocab_sample = 30_000
[stage.parts]
text = "{text}"
[stage.limits]
text = "100K"
[[stage]]
kind = "pretrain"
tokens = "10K"
precision = "bfloat16"
lr = 1e-3
batch_rows = 16
micro_rows = 8
gamma = 0.001
mtp_lambda = 0.3
[stage.mixture]
text = 1.0
[[stage]]
kind = "rl"
name = "zero"
tasks = ["countdown"]
prompt_template = "model"
rollouts = 1
updates_per_rollout = 1
prompts_per_rollout = 2
samples = 4
max_new_tokens = 24
lr = 1e-4
heldout.every = 1
heldout.problems = 4
heldout.minimum_pass = 0.0
"""

Trace = dict[tuple[str, str, int], set[int]]
"""(file, function, its first line) -> the lines that ran."""


class Tracer:
    """Records the lines of the package that run while it is on, in this thread and in those that begin meanwhile. With
    `only`, records a function when `only` says so of its frame at the end, for then all its variables are there."""

    def __init__(self, only: Callable[[FrameType], bool] | None = None) -> None:
        self.only = only
        self.lines: dict[CodeType, set[int]] = {}
        self.kept: set[CodeType] = set()
        self.asked: Counter[CodeType] = Counter()

    @contextmanager
    def on(self) -> Iterator[None]:
        before = sys.gettrace()
        self.start()
        try:
            yield
        finally:
            sys.settrace(before)
            threading.settrace(before)

    def start(self) -> None:
        threading.settrace(self._call)
        sys.settrace(self._call)

    def _call(self, frame: FrameType, event: str, arg: object) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(f"{ROOT}{os.sep}"):
            return None
        self.lines.setdefault(code, {code.co_firstlineno})
        return self._line

    def _line(self, frame: FrameType, event: str, arg: object) -> Any:
        code = frame.f_code
        if event == "line":
            self.lines.setdefault(code, {code.co_firstlineno}).add(frame.f_lineno)
        elif event == "return" and self.only is not None and self.asked[code] < ASKED:
            self.asked[code] += 1
            if self.only(frame):
                self.kept.add(code)
        return self._line

    def trace(self) -> Trace:
        files: Trace = {}
        for code, lines in list(self.lines.items()):
            if "<module>" not in code.co_qualname and (self.only is None or code in self.kept):
                file = Path(code.co_filename).relative_to(ROOT).as_posix()
                files[file, code.co_qualname, code.co_firstlineno] = set(lines)
        return files


@contextmanager
def traced(path_name: str, tracer: Tracer, call: int = 1) -> Iterator[None]:
    """Traces call number `call` of "module:Class.method" or "module:function"."""
    module, _, name = path_name.partition(":")
    owner: Any = importlib.import_module(f"bessemer.{module}")
    *outer, last = name.split(".")
    for part in outer:
        owner = getattr(owner, part)
    original, calls = getattr(owner, last), [0]

    @functools.wraps(original)
    def counted(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] != call:
            return original(*arguments, **named)
        with tracer.on():
            return original(*arguments, **named)

    setattr(owner, last, counted)
    try:
        yield
    finally:
        setattr(owner, last, original)


def holds(value: object) -> bool:
    """Whether a variable holds the followed setting: the number, its text, or settings with it."""
    if isinstance(value, str):
        return str(LR) in value
    if isinstance(value, float):
        return value == LR
    plain = isinstance(value, (dict, list, tuple)) and len(value) < 100
    return (plain or type(value).__module__.startswith("bessemer.config.")) and str(LR) in repr(value)


def run_traces(directory: Path) -> dict[str, Trace]:
    """The traces of a token, a rollout and a setting, from one run of the recipe, which is written to `directory`."""
    from bessemer import cli

    text, recipe = directory / "text.txt", directory / "paths.toml"
    text.write_text("\n\n".join(f"The crow of page {n} drops {n} stones into the jar and drinks." for n in range(2000)))
    recipe.write_text(RECIPE.replace("{text}", str(text)))
    token, rollout = Tracer(), Tracer()
    setting = Tracer(lambda frame: any(holds(value) for value in list(frame.f_locals.values())))
    arguments = sys.argv
    sys.argv = ["bessemer", "run", str(recipe), "--out", str(directory / "run"), "--set", f"pretrain.lr={LR}"]
    try:
        with (
            traced("pipeline.stages.corpus:Corpus.run", token),
            traced("train.trainer:Trainer.update", token, call=2),  # the first one also sets things up
            traced("rl.loop:Loop._rollout", rollout),
            traced("config.recipe:Recipe.load", setting),
            traced("pipeline.stages.pretrain:Pretrain.run", setting),
        ):
            cli.main()
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.argv = arguments
    return {"token": token.trace(), "rollout": rollout.trace(), "setting": setting.trace()}


def follow_process(directory: Path) -> None:
    """Traces this process from the moment that `directory` holds a file `begin`, and writes the trace once there is a
    file `end`. The server's processes start with it."""
    for module in ("server", "worker"):
        importlib.import_module(f"bessemer.addons.serve.{module}")  # a trace of their imports takes a minute
    tracer = Tracer()

    def watch() -> None:
        sys.settrace(None)
        while not (directory / "begin").exists():
            time.sleep(0.05)
        tracer.lines.clear()
        while not (directory / "end").exists():
            time.sleep(0.05)
        rows = [[*key, sorted(lines)] for key, lines in tracer.trace().items()]
        part = directory / f"{os.getpid()}.part"
        part.write_text(json.dumps(rows))
        part.rename(directory / f"{os.getpid()}.json")

    threading.Thread(target=watch, daemon=True).start()
    tracer.start()


def request_trace(run: Path, directory: Path) -> Trace:
    """The trace of a streamed chat request, in the server's two processes."""
    (directory / "sitecustomize.py").write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"import paths, pathlib\npaths.follow_process(pathlib.Path({str(directory)!r}))\n"
    )
    search = os.pathsep.join([str(directory), str(ROOT.parent)])
    command = [sys.executable, "-m", "bessemer", "serve", str(run), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": search})
    try:
        assert server.stdout is not None
        address = next(match for line in server.stdout if (match := re.search(r"http://\S+", line)))[0]
        _ask(address)
        (directory / "begin").touch()
        time.sleep(0.5)
        _ask(address)
        (directory / "end").touch()
        for _ in range(200):
            if len(files := list(directory.glob("*.json"))) == 2:
                break
            time.sleep(0.1)
    finally:
        server.terminate()
        server.wait()
    trace: Trace = {}
    for file in files:
        for name, function, first, lines in json.loads(file.read_text()):
            trace.setdefault((name, function, first), set()).update(lines)
    return trace


def _ask(address: str) -> None:
    body = {"messages": [{"role": "user", "content": "Use 3, 5 and 7 to make 15."}], "stream": True, "max_tokens": 8}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as reply:
        assert b"[DONE]" in reply.read()


@functools.cache
def functions(file: str) -> dict[int, set[int]]:
    """The lines of code of every function of a file, by its first line."""
    text = (ROOT / file).read_text(encoding="utf-8")
    lines, table = text.split("\n"), {}
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        documentation: set[int] = set()
        for inner in ast.walk(node):
            match inner:
                case ast.Expr(value=ast.Constant(value=str()), lineno=start, end_lineno=stop):
                    documentation |= set(range(start, (stop or start) + 1))
        table[first] = {
            number
            for number in range(first, (node.end_lineno or first) + 1)
            if number not in documentation and (line := lines[number - 1].strip()) and not line.startswith("#")
        }
    return table


@dataclass
class File:
    """What a path uses of one file."""

    functions: list[str]
    lines: set[int]
    ran: set[int]


def counted(name: str, trace: Trace) -> dict[str, File]:
    """The files of a path, in the order of first use."""
    files: dict[str, File] = defaultdict(lambda: File([], set(), set()))
    left_out = BESIDE if name in ("token", "setting") else BESIDE + NETWORK
    for (file, function, first), ran in trace.items():
        if not file.startswith(left_out) and (code := functions(file).get(first)):
            used = files[file]
            used.functions.append(function)
            used.lines |= code
            used.ran |= code & ran
    least = 1 if name == "setting" else LEAST
    return {file: used for file, used in files.items() if len(used.ran) >= least}


def measure() -> dict[str, dict[str, File]]:
    """Runs everything; the files of every path."""
    with suppress(AttributeError):  # macOS has no such call
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # else helper processes take a part that is not traced
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        traces = run_traces(directory)
        watched = directory / "watched"
        watched.mkdir()
        traces["request"] = request_trace(directory / "run", watched)
    return {name: counted(name, traces[name]) for name in BUDGETS}


def table(paths: dict[str, dict[str, File]]) -> str:
    rows = ["| path | files | functions | lines of code | of these ran | aim |", "|---|---|---|---|---|---|"]
    for name, files in paths.items():
        parts = [(len(used.functions), len(used.lines), len(used.ran)) for used in files.values()]
        numbers = (len(files), *map(sum, zip(*parts, strict=True)))
        rows.append(f"| {TITLES[name]} | {' | '.join(f'{n:,}' for n in numbers)} | {BUDGETS[name].aim} |")
    return "\n".join(rows)


def over_budget(paths: dict[str, dict[str, File]]) -> list[str]:
    """The paths that cost a reader more than their budget, a line each."""
    over = []
    for name, files in paths.items():
        budget, lines = BUDGETS[name], sum(len(used.lines) for used in files.values())
        if len(files) > budget.files or lines > budget.lines:
            over.append(
                f"{TITLES[name]}: {len(files)} files and {lines:,} lines of code, where {budget.files} and "
                f"{budget.lines:,} are allowed: shorten another part of this path (python tools/paths.py --files)"
            )
    return over


BEGIN, END = "<!-- paths: written by tools/paths.py --write -->\n", "\n<!-- end of paths -->"


def write(text: str) -> None:
    """Replaces the table in docs/architecture.md."""
    page = REPOSITORY / "docs" / "architecture.md"
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    page.write_text(before + BEGIN + text + END + rest.split(END)[1], encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option in ("--files", "--check", "--write"):
        parser.add_argument(option, action="store_true")
    options = parser.parse_args()
    paths = measure()
    print(table(paths))
    if options.write:
        write(table(paths))
    for name, files in paths.items() if options.files else ():
        print(f"\n{name}")
        for file, used in files.items():
            print(f"  {file:36} {len(used.lines):4} {len(used.ran):4}  {', '.join(used.functions)[:200]}")
    faults = over_budget(paths) if options.check else []
    print("\n".join(faults))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
