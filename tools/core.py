"""Counts the core and the add-ons (src/bessemer/addons), and the imports that lead out of the core.

    python tools/core.py            sizes, and the number of arrows from core outwards
    python tools/core.py --arrows   each arrow: file:line -> module (add-on)
    python tools/core.py --files    every file with its part
    python tools/core.py --alone    the deletion test: in a copy of the repository without any add-on, and without the
                                    tests that import one, the tests pass and the tiny recipe runs
    python tools/core.py --without serve watch      the same without these add-ons only

An arrow is an import of an add-on's module anywhere in a core file, also inside a function or for type checkers, or a
string that names such a module.
"""

from __future__ import annotations

import argparse
import ast
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "bessemer"

PROJECTS = ("claims", "vectors")
"""Folders of the repository that stand beside the package; a copy without an add-on leaves them out."""

ADDONS = sorted({path.parent.name for path in PACKAGE.glob("addons/*/*.py")})


def part(path: Path) -> str:
    """The add-on of a file, or "core"."""
    names = path.relative_to(PACKAGE).parts
    return names[1] if names[0] == "addons" and len(names) > 2 else "core"


def parts() -> dict[Path, str]:
    return {path: part(path) for path in sorted(PACKAGE.rglob("*.py"))}


def module(path: Path) -> str:
    names = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


def arrows() -> list[tuple[Path, int, str, str]]:
    """(core file, line, module, its add-on) of every import that leads out of the core."""
    sorting = parts()
    addon_of = {module(path): name for path, name in sorting.items()}
    outward = []
    for path, name in sorting.items():
        if name != "core":
            continue
        seen = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for target in _targets(node, addon_of):
                if addon_of[target] != "core" and target not in seen and target != module(path):
                    seen.add(target)
                    outward.append((path, getattr(node, "lineno", 0), target, addon_of[target]))
    return outward


def _targets(node: ast.AST, modules: dict[str, str]) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names} & modules.keys()
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        inner = {f"{node.module}.{alias.name}" for alias in node.names} & modules.keys()
        own = {node.module} if len(inner) < len(node.names) else set()
        return inner | own & modules.keys()
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("bessemer."):
        return {node.value.partition(":")[0]} & modules.keys()
    return set()


BY_NAME = ROOT / "tests" / "by_name.txt"
"""Tests that ask for an add-on by its name, without importing it."""
RUN = (
    "tiny", "--set", "pretrain.tokens=60K", "--set", "zero.rollouts=1", "--set", "zero.max_new_tokens=24",
    "--set", "zero.heldout.minimum_pass=0", "--set", "eval.problems=4", "--set", "eval.max_new_tokens=24",
)  # fmt: skip
"""The tiny recipe, cut to a minute."""


def copy_without(removed: set[str], target: Path) -> list[Path]:
    """Copies the repository's files except those of the removed add-ons and the tests that import one; returns these
    tests."""
    gone = {path for path, name in parts().items() if name in removed}
    modules = {module(path) for path in gone}
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    files = [
        ROOT / name for name in names.split("\0") if name and ((ROOT / name).is_file() or (ROOT / name).is_symlink())
    ]
    tests = [path for path in files if path.suffix == ".py" and path.relative_to(ROOT).parts[0] == "tests"]
    helpers = {path.stem: path for path in tests if path.parent.name == "shared"}
    left_out = {path for path in tests if _reaches(path, modules, helpers, set())}
    kept_rooms = {path.parent for path in parts() if path not in gone}
    for path in files:
        if path in gone or path in left_out or path.relative_to(ROOT).parts[0] in PROJECTS:
            continue
        if path.is_relative_to(PACKAGE) and path.suffix != ".py" and not _has_code(path, kept_rooms):
            continue  # an add-on's own data
        copied = target / path.relative_to(ROOT)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copied, follow_symlinks=False)
    return sorted(left_out)


def _has_code(path: Path, rooms: set[Path]) -> bool:
    """Whether the closest folder of Python files above a data file stays."""
    folder = next(parent for parent in path.parents if any(parent.glob("*.py")))
    return folder in rooms


def _reaches(path: Path, modules: set[str], helpers: dict[str, Path], seen: set[Path]) -> bool:
    """Whether a test, or a helper that it imports, imports or names one of the modules."""
    seen.add(path)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if _targets(node, dict.fromkeys(modules, "")):
            return True
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            helper = helpers.get(name.partition(".")[0])
            if helper and helper not in seen and _reaches(helper, modules, helpers, seen):
                return True
    return False


def deletion_test(removed: set[str], options: list[str]) -> int:
    """The first exit status that is not 0 of the tiny recipe and the remaining tests in a copy without the add-ons."""
    with tempfile.TemporaryDirectory(prefix="core-") as folder:
        target = Path(folder) / "repository"
        left_out = copy_without(removed, target)
        print(f"without {', '.join(sorted(removed))}; {len(left_out)} files of tests import them", flush=True)
        path = os.pathsep.join(filter(None, (str(target / "src"), os.environ.get("PYTHONPATH"))))
        env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        run = [sys.executable, "-m", "bessemer", "run", *RUN, "--out", str(Path(folder) / "run")]
        names = [line for line in BY_NAME.read_text().splitlines() if line and not line.startswith("#")]
        tests = [sys.executable, "-m", "pytest", "-q", *(f"--deselect={name}" for name in names), *options]
        tests += [f"--ignore={name}" for name in names if "::" not in name]
        for command in (run, tests):
            if status := subprocess.run(command, cwd=target, env=env).returncode:
                return status
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--without", nargs="+", choices=sorted(ADDONS), default=[])
    parser.add_argument("options", nargs="*", help="passed to pytest")
    parser.add_argument("--arrows", action="store_true")
    parser.add_argument("--files", action="store_true")
    args = parser.parse_args()
    if removed := set(ADDONS) if args.alone else set(args.without):
        raise SystemExit(deletion_test(removed, args.options))
    sorting = parts()
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sorting}
    if args.files:
        for path, name in sorted(sorting.items(), key=lambda entry: (entry[1], entry[0])):
            print(f"{name:12} {lines[path]:5}  {path.relative_to(PACKAGE)}")
    outward = arrows()
    if args.arrows:
        for path, line, target, name in outward:
            print(f"{path.relative_to(PACKAGE)}:{line} -> {target} ({name})")
    for name in ["core", *ADDONS]:
        own = [path for path, its in sorting.items() if its == name]
        print(f"{name:12} {sum(lines[path] for path in own):7,} lines {len(own):4} files")
    for name in PROJECTS:
        own = list((ROOT / name / "src").rglob("*.py"))
        total = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in own)
        print(f"{name:12} {total:7,} lines {len(own):4} files, a project beside the package")
    rooms = Counter(
        (relative[0] if len(relative := path.relative_to(PACKAGE).parts) > 1 else "top")
        for path, name in sorting.items()
        if name == "core"
    )
    sizes = Counter({room: 0 for room in rooms})
    for path, name in sorting.items():
        if name == "core":
            relative = path.relative_to(PACKAGE).parts
            sizes[relative[0] if len(relative) > 1 else "top"] += lines[path]
    print("core rooms:  " + ", ".join(f"{room} {sizes[room]:,}/{number}" for room, number in sorted(rooms.items())))
    print(f"all          {sum(lines.values()):7,} lines {len(lines):4} files")
    print(f"arrows from the core outwards: {len(outward)}")


if __name__ == "__main__":
    main()
