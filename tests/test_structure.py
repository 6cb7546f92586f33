"""The package keeps its structure: no import cycles, a layer for every room, one meaning per class name.

`python tests/test_structure.py` prints the sizes.
"""

import ast
import re
import sys
import tomllib
from collections import Counter
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "bessemer"
sys.path.insert(0, str(ROOT / "tools"))

import core  # noqa: E402


def modules() -> dict[str, Path]:
    named = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return named


def imports(tree: ast.AST, known: dict[str, Path]) -> set[str]:
    """The package's own modules that a file imports anywhere, including inside functions and for type checkers."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                names.add(inner if inner in known else node.module)
    return names & known.keys()


def counts() -> dict[str, int]:
    sources = {path: path.read_text(encoding="utf-8") for path in modules().values()}
    own = [path for path in sources if core.part(path) == "core"]
    lines = {path: len(text.splitlines()) for path, text in sources.items()}
    return {
        "files": len(sources),
        "lines": sum(lines.values()),
        "core files": len(own),
        "core lines": sum(lines[path] for path in own),
        "Any lines": sum(len(re.findall(r"^.*(?:: |-> )Any\b", text, re.M)) for text in sources.values()),
        "repeated names": len(repeated_names()),
    }


def repeated_names() -> list[str]:
    """Names that more than one public class has."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in modules().values()]
    classes = Counter(node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    return sorted(name for name, number in classes.items() if number > 1 and not name.startswith("_"))


def test_every_folder_of_tests_is_collected(pytestconfig):
    """pytest skips folders by name, and its default list includes "dist"."""
    folders = {path.parent for path in (ROOT / "tests").rglob("test_*.py")}
    skipped = pytestconfig.getini("norecursedirs")
    assert not [folder for folder in folders if any(fnmatch(folder.name, pattern) for pattern in skipped)]


def test_no_circle_of_imports():
    known = modules()
    graph = {name: imports(ast.parse(path.read_text(encoding="utf-8")), known) - {name} for name, path in known.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError("a circle of imports: " + " -> ".join(error.args[1])) from None


def test_no_import_leads_out_of_the_core():
    """Neither an import, wherever it stands, nor a string that names a module."""
    assert not [f"{path.relative_to(ROOT)}:{line} names {target}" for path, line, target, _ in core.arrows()]


def test_every_room_has_its_layer():
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
    layered = {name.strip() for layer in contract for name in re.split("[|:]", layer)}
    folders = {path.relative_to(PACKAGE.parent) for path in PACKAGE.glob("*/") if (path / "__init__.py").exists()}
    folders |= {path.relative_to(PACKAGE.parent) for path in (PACKAGE / "addons").glob("*/") if list(path.glob("*.py"))}
    rooms = {".".join(path.parts) for path in folders} - {"bessemer.addons"}
    files = {f"bessemer.{path.stem}" for path in PACKAGE.glob("*.py") if not path.stem.startswith("__")}
    beside = {name for name in layered if name.startswith(("bessemer.addons.", "bessemer_claims"))}
    assert layered - beside == (rooms | files) - beside
    assert not core.ADDONS or beside == {f"bessemer.addons.{name}" for name in core.ADDONS} | {"bessemer_claims"}


REPEATED = {"Generation", "Rows", "Steps"}


def test_class_names_have_one_meaning():
    assert set(repeated_names()) <= REPEATED


def test_the_slow_tier_names_tests_that_exist():
    lines = [line for name in ("slow.txt", "by_name.txt") for line in (ROOT / "tests" / name).read_text().splitlines()]
    for line in [line for line in lines if line and not line.startswith("#")]:
        file, _, name = line.partition("::")
        if core.ADDONS or (ROOT / file).exists():  # a copy without add-ons has not all tests
            assert f"def {name}(" in (ROOT / file).read_text() or not name, line


if __name__ == "__main__":
    for name, number in counts().items():
        print(f"{name:15} {number:7,}")
    sys.stdout.write("repeated: " + ", ".join(repeated_names()) + "\n")
