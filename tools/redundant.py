"""Which tests prove nothing that others do not prove: by coverage of each test, and by mutants of the source.

    python tools/redundant.py tests/rl/test_rl_losses.py                     tests whose arcs others cover too
    python tools/redundant.py tests/rl/*losses*.py --mutants 60 --source rl  and, of those, what may leave
    python tools/redundant.py tests/rl/test_rl_losses.py --mutants 60 --without test_a test_b    asks about two

A test is a function with all its parameters. Its arcs are the steps from line to line in src that it alone takes under
coverage (`--cov-context=test`; processes that a test starts are not seen). A mutant is one changed piece of a covered
line: a comparison, an operator, a number, a condition, a statement left out, two arguments exchanged. The lines that
fewest tests cover come first. Each mutant runs, in a copy of the repository and in a process of its own, against the
asked tests that cover its line, and where one of them notices it, against the others until one does. A test may leave
if the tests that stay take all its arcs and kill every mutant that it kills.

What it prints is a proposal. A test against an independent reference and a test of bad input stay, whoever else passes
by the same lines: mutants are a sample.
"""

from __future__ import annotations

import argparse
import ast
import gc
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from itertools import zip_longest
from pathlib import Path
from types import CodeType, FunctionType

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 45
"""Seconds for all tests against one mutant; who has not passed by then has noticed it."""

OPPOSITE = {ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
            ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub,
            ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Add,
            ast.And: ast.Or, ast.Or: ast.And, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd}  # fmt: skip


def coverage_options(folder: Path) -> list[str]:
    rc = folder / "coverage.ini"
    rc.write_text("[run]\nsource_pkgs = bessemer\nbranch = true\nconcurrency = thread\n")
    return ["--cov", f"--cov-config={rc}", "--cov-context=test", "--cov-report="]


def measure(tests: list[str], folder: Path, marks: str) -> Path:
    data = folder / "coverage"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        marks,
        *coverage_options(folder),
        *tests,
    ]
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "claims" / "src")])
    environment = os.environ | {"COVERAGE_FILE": str(data), "COVERAGE_CORE": "ctrace", "PYTHONPATH": path}
    subprocess.run(command, cwd=ROOT, env=environment, check=False)
    return data


def arcs(data: Path) -> dict[str, set[tuple[str, int, int]]]:
    """test function -> its arcs (file relative to src, from, to)."""
    arcs_of = defaultdict(set)
    tables = "arc JOIN file ON file.id = file_id JOIN context ON context.id = context_id"
    for path, context, start, end in sqlite3.connect(data).execute(f"SELECT path, context, fromno, tono FROM {tables}"):
        if context:
            test = context.partition("|")[0].partition("[")[0]
            arcs_of[test].add((path.rpartition("/src/")[2], start, end))
    return arcs_of


def mutants(file: str, source: str, lines: set[int]) -> list[tuple[int, str, str, str]]:
    """(line, qualified name of the outermost function, what is changed, the whole changed source) of every mutant of
    `lines`. What stands outside functions stays: it runs at import, once for all mutants."""
    variants = []
    for name, function in _functions(ast.parse(source).body, ""):
        for node in (node for statement in function.body for node in ast.walk(statement)):
            line = getattr(node, "lineno", None)
            if line not in lines or node.end_lineno - line > 8:
                continue
            for kind, new in _changes(node):
                start, end = (
                    _offset(source, line, node.col_offset),
                    _offset(source, node.end_lineno, node.end_col_offset),
                )
                label = f"{file}:{line} {kind}: {ast.unparse(node).splitlines()[0][:60]}"
                variants.append((line, name, label, source[:start] + new + source[end:]))
    return variants


def _functions(body, before: str):
    for node in body:
        if isinstance(node, ast.FunctionDef):
            yield before + node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node.body, f"{before}{node.name}.")


def _offset(source: str, line: int, column: int) -> int:
    rows = source.splitlines(keepends=True)
    return sum(map(len, rows[: line - 1])) + len(rows[line - 1].encode()[:column].decode())


def _changes(node: ast.AST):
    """(kind, new text) of each change of a node. Texts, names in imports and docstrings stay."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in OPPOSITE:
        new = ast.Compare(node.left, [OPPOSITE[type(node.ops[0])]()], node.comparators)
        yield "comparison", f"({ast.unparse(new)})"
    elif isinstance(node, ast.BinOp) and type(node.op) in OPPOSITE:
        yield "operator", f"({ast.unparse(ast.BinOp(node.left, OPPOSITE[type(node.op)](), node.right))})"
    elif isinstance(node, ast.BoolOp):
        yield "operator", f"({ast.unparse(ast.BoolOp(OPPOSITE[type(node.op)](), node.values))})"
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield "number", repr(node.value + 1)
    elif isinstance(node, ast.Constant) and type(node.value) is bool:
        yield "number", repr(not node.value)
    elif isinstance(node, ast.IfExp):
        yield "condition", f"({ast.unparse(ast.IfExp(node.test, node.orelse, node.body))})"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield "condition", f"({ast.unparse(node.operand)})"
    elif (
        isinstance(node, ast.Call)
        and len(node.args) >= 2
        and not any(isinstance(a, ast.Starred) for a in node.args[:2])
    ):
        first, second, *rest = node.args
        yield "arguments", ast.unparse(ast.Call(node.func, [second, first, *rest], node.keywords))
    elif isinstance(node, (ast.AugAssign, ast.Raise)) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ):
        yield "statement", "pass"
    elif isinstance(node, ast.Return) and node.value is not None and not isinstance(node.value, ast.Constant):
        yield "statement", "return None"


def codes(source: str, path: Path) -> dict[str, list[CodeType]]:
    """qualified name -> code of the functions of a file."""
    code_of, waiting = defaultdict(list), [compile(source, str(path), "exec")]
    while waiting:
        code = waiting.pop(0)
        code_of[code.co_qualname].append(code)
        waiting += [const for const in code.co_consts if isinstance(const, CodeType)]
    return code_of


def place(code: CodeType) -> tuple:
    """Codes themselves cannot be compared: the interpreter writes into those that have run."""
    return code.co_filename, code.co_qualname, code.co_firstlineno


def rounds(pools: list[list], count: int) -> list:
    """Up to `count` different items, the next of each pool in turn."""
    picked: dict = {}
    for row in zip_longest(*pools):
        picked.update(dict.fromkeys(item for item in row if item is not None))
    return list(picked)[:count]


class Session:
    """A pytest session that collects its tests once, and runs some of them against each mutant in a fork of its own."""

    def __init__(self, copy: Path, covered, chosen, count: int, seed: int):
        self.copy, self.covered, self.chosen, self.count, self.seed = copy, covered, chosen, count, seed
        self.kills: dict[str, set[str]] = {test: set() for test in covered}
        self.made, self.tried = 0, Counter()

    def pytest_runtest_logreport(self, report):
        if report.failed or report.when == "call":
            with (self.copy / "notes.jsonl").open("a") as file:
                note = [report.nodeid.partition("[")[0], report.passed or report.skipped]
                file.write(json.dumps(note) + "\n")

    def pytest_runtestloop(self, session):
        source = str(self.copy / "src")
        self.functions = [
            function
            for function in gc.get_objects()
            if type(function) is FunctionType and function.__code__.co_filename.startswith(source)
        ]
        gc.freeze()
        for test in self.failures(session, set(self.covered), {}):
            print("does not pass as it is, left out:", test)
            self.covered.pop(test), self.kills.pop(test), self.chosen.discard(test)
        tests_of_line = defaultdict(set)  # (file, line) -> tests
        for test, lines_of_test in self.covered.items():
            for file, start, end in lines_of_test:
                tests_of_line[file, abs(start)].add(test)
                tests_of_line[file, abs(end)].add(test)
        lines = defaultdict(set)
        for file, line in (line_number for line_number, tests in tests_of_line.items() if tests & self.chosen):
            lines[file].add(line)
        texts = {file: (self.copy / "src" / file).read_text(encoding="utf-8") for file in sorted(lines)}
        every = [(file, *mutant) for file, text in texts.items() for mutant in mutants(file, text, lines[file])]
        random.Random(self.seed).shuffle(every)
        every.sort(key=lambda mutant: len(tests_of_line[mutant[:2]]))
        picked = rounds(
            [[m for m in every if test in tests_of_line[m[:2]]] for test in sorted(self.chosen)], self.count
        )
        self.made = len(picked)
        for number, (file, line, name, label, text) in enumerate(picked):
            path = self.copy / "src" / file
            path.write_text(text, encoding="utf-8")  # for processes that a test starts
            os.utime(path, (number, number))  # no bytecode of another mutant fits
            old, new = codes(texts[file], path)[name], codes(text, path)[name]
            pairs = zip(old, new, strict=False)
            changed = {place(a): b for a, b in pairs if a != b and a.co_freevars == b.co_freevars}
            if not changed:  # another closure, which a function that exists cannot get
                path.write_text(texts[file], encoding="utf-8")
                continue
            self.tried.update(tests_of_line[file, line])
            killers = self.failures(session, tests_of_line[file, line] & self.chosen, changed)
            if killers:  # of those that stay, one is enough
                killers |= self.failures(session, tests_of_line[file, line] - self.chosen, changed, stop=True)
            path.write_text(texts[file], encoding="utf-8")
            for test in killers:
                self.kills[test].add(label)
            print(
                f"{number + 1}/{len(picked)} killed by {len(killers)} of {len(tests_of_line[file, line])}: {label}",
                flush=True,
            )
        return True

    def failures(self, session, tests: set[str], changed: dict[tuple, CodeType], stop=False) -> set[str]:
        """Which of the test functions do not pass; with `stop`, the first of them."""
        items = [item for item in session.items if item.nodeid.partition("[")[0] in tests]
        (self.copy / "notes.jsonl").unlink(missing_ok=True)
        child = os.fork()
        if not child:
            try:
                os.setsid()
                for function in self.functions:
                    function.__code__ = changed.get(place(function.__code__), function.__code__)
                for item, following in zip(items, [*items[1:], None], strict=True):
                    failed = {test for test, good in self.notes() if not good}
                    if item.nodeid.partition("[")[0] in failed and following is not None:
                        continue
                    item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                    if stop and any(not good for _, good in self.notes()):
                        break
            finally:
                os._exit(0)
        end = time.monotonic() + LIMIT
        while not os.waitpid(child, os.WNOHANG)[0]:
            if time.monotonic() > end:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                break
            time.sleep(0.02)
        failed, ran = {test for test, good in self.notes() if not good}, {test for test, _ in self.notes()}
        return failed if stop and failed else failed | tests - ran

    def notes(self) -> list[list]:
        path = self.copy / "notes.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def may_leave(covered, kills, chosen, sizes) -> list[str]:
    """The longest first: those whose arcs and mutants the tests that stay have too."""
    stay, gone = set(covered), []
    for test in sorted(chosen, key=lambda test: -sizes.get(test, 0)):
        others = stay - {test}
        if kills[test] <= set().union(*(kills[o] for o in others)) and covered[test] <= set().union(
            *(covered[o] for o in others)
        ):
            stay.remove(test)
            gone.append(test)
    return gone


def lengths(files: list[str]) -> dict[str, int]:
    sizes = {}
    for file in files:
        for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                sizes[f"{file}::{node.name}"] = node.end_lineno - first + 1
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--mutants", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--source", default="", help="only arcs of files whose path under src matches this expression")
    parser.add_argument("--without", nargs="*", default=[], help="ask only whether these test functions may leave")
    parser.add_argument(
        "--beside", nargs="*", default=[], help="test files that stay but may take over arcs and mutants"
    )
    parser.add_argument("--data", type=Path, help="a coverage file measured with contexts, instead of a new run")
    parser.add_argument("--but", default="^$", help="not those whose name matches this expression")
    parser.add_argument("--marks", default="not slow")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        paths = [*args.files, *args.beside]
        covered = {
            test: {arc for arc in steps if re.search(args.source, arc[0])}
            for test, steps in arcs(args.data or measure(paths, Path(scratch), args.marks)).items()
            if test.partition("::")[0] in paths or (args.data and not args.mutants)
        }
        sizes = lengths(args.files)
        takers = Counter(arc for steps in covered.values() for arc in steps)
        chosen = {
            test
            for test in covered
            if test in sizes
            and (not args.without or test.rpartition(":")[2] in args.without)
            and not re.search(args.but, test.rpartition(":")[2])
            and not any(takers[arc] == 1 for arc in covered[test])
        }
        kills, n_made, tried = {test: set() for test in covered}, 0, Counter()
        if args.mutants:
            copy = Path(scratch) / "copy"
            shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__", "build"))
            os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
            os.chdir(copy)
            sys.path[:0] = [str(copy / "src"), str(copy / "claims" / "src")]
            os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])
            import pytest
            import torch._dynamo  # noqa: F401  # else every fork would import it
            from hypothesis import Phase, settings

            settings.register_profile("mutants", derandomize=True, phases=[Phase.explicit, Phase.generate])
            settings.load_profile("mutants")  # nobody reads the smallest example

            session = Session(copy, covered, chosen, args.mutants, args.seed)
            options = ["-qq", "-s", "-p", "no:cacheprovider", "-p", "no:cov", "--timeout=15", "-m", args.marks]
            pytest.main([*options, *paths], plugins=[session])
            kills, n_made, tried = session.kills, session.made, session.tried
    killed = set().union(*kills.values())
    gone = may_leave(covered, kills, chosen, sizes)
    stay = set().union(*(kills[test] for test in covered if test not in gone))
    for test in sorted(chosen):
        verdict = "leave" if test in gone else "stay "
        print(f"{verdict} lines {sizes[test]:3} arcs {len(covered[test]):4} "
              f"kills {len(kills[test]):3} of {tried[test]:3}  {test}")  # fmt: skip
    print(f"{n_made} mutants, {len(killed)} killed, {len(stay)} without those that may leave "
          f"({len(gone)} tests, {sum(sizes[t] for t in gone)} lines)")  # fmt: skip


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # nanobind counts what a frozen heap leaks
