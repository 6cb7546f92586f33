"""How sharp the vectors are: every small slip in a reference, one at a time, and whether a case differs.

    python vectors/tools/mutants.py [--json OUT]        about two minutes

A slip exchanges + and -, * and /, < and <=, and and or, min and max, or == and !=, moves a number by one (a fraction by
half of itself), turns a condition round, or drops a minus. A slip survives if every case still agrees. Survivors are
printed: each is either a slip that changes nothing (`Of the same value`) or a gap in the vectors.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import signal
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bessemer_vectors import load, reference
from bessemer_vectors.runner import AGREES, run
from bessemer_vectors.topics import TOPICS

SECONDS = 10
"""A slip that makes a loop endless counts as seen."""
EXCHANGED: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Lt: ast.LtE, ast.LtE: ast.Lt,
    ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
JUDGE = {"judge", "complete", "needs", "run", "peak"}
"""They belong to the runner: a table is judged by the original."""
NAMES = {"min": "max", "max": "min", "floor": "ceil", "ceil": "floor"}


def slips(node: ast.AST) -> Iterator[tuple[str, Any]]:
    """(what it is, a function that makes it in this node) of every slip of one node."""
    if isinstance(node, ast.BinOp) and type(node.op) in EXCHANGED:
        yield "operator", lambda own: setattr(own, "op", EXCHANGED[type(own.op)]())
    if isinstance(node, ast.BoolOp):
        yield "operator", lambda own: setattr(own, "op", EXCHANGED[type(own.op)]())
    if isinstance(node, ast.Compare) and type(node.ops[0]) in EXCHANGED:
        yield "comparison", lambda own: own.ops.__setitem__(0, EXCHANGED[type(own.ops[0])]())
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield (
            "number",
            lambda own: setattr(own, "value", own.value * 1.5 if own.value % 1 else own.value + 1),
        )
    if isinstance(node, ast.Name) and node.id in NAMES:
        yield "name", lambda own: setattr(own, "id", NAMES[own.id])
    if isinstance(node, ast.Attribute) and node.attr in NAMES:
        yield "name", lambda own: setattr(own, "attr", NAMES[own.attr])
    if isinstance(node, (ast.If, ast.IfExp)):
        yield "condition", lambda own: setattr(own, "test", ast.UnaryOp(ast.Not(), own.test))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield "minus", lambda own: setattr(own, "op", ast.UAdd())


def mutants(tree: ast.Module) -> Iterator[tuple[int, str, ast.Module]]:
    """(line, what it is, the module with it) of every slip inside a function, the judge of pipelines left out."""
    functions = [part for part in tree.body if isinstance(part, ast.FunctionDef) and part.name not in JUDGE]
    inside = {id(node) for function in functions for part in function.body for node in ast.walk(part)}
    for number, node in enumerate(ast.walk(tree)):
        if id(node) not in inside:
            continue
        for which, (kind, _) in enumerate(slips(node)):
            made = copy.deepcopy(tree)
            own = next(other for place, other in enumerate(ast.walk(made)) if place == number)
            list(slips(own))[which][1](own)
            yield getattr(node, "lineno", 0), kind, ast.fix_missing_locations(made)


def is_seen(module: types.ModuleType, topics: list[Any]) -> bool:
    """Whether a case differs or fails."""

    def late(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        return any(run(module, topic, case).outcome != AGREES for topic in topics for case in topic.cases)
    except TimeoutError:
        return True
    finally:
        signal.alarm(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    stored, results = load(), {}
    for module in reference.MODULES:
        path = Path(str(module.__file__))
        source = path.read_text(encoding="utf-8")
        topics = [stored[name] for name in TOPICS if hasattr(module, name)]
        survivors, number = [], 0
        for line, kind, tree in mutants(ast.parse(source)):
            changed = types.ModuleType(module.__name__)
            exec(compile(tree, str(path), "exec"), changed.__dict__)
            number += 1
            if not is_seen(changed, topics):
                survivors.append(f"{path.name}:{line} {kind}: {source.splitlines()[line - 1].strip()}")
        results[path.stem] = {"slips": number, "seen": number - len(survivors), "survivors": survivors}
        print(f"{path.stem:12} {number - len(survivors):4} of {number:4} slips seen", flush=True)
        for survivor in survivors:
            print(f"    {survivor}")
    total, seen = (sum(result[key] for result in results.values()) for key in ("slips", "seen"))
    print(f"{'all':12} {seen:4} of {total:4} slips seen")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
