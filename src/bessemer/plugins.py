"""Finds what a recipe names: parts of the package, of add-ons, and code of the user's own.

A name is one of four things, in this order:

    my_file.py:NAME       an object in a file; the path is relative to the recipe's folder
    grpo                  a built-in member of its kind (`register`)
    leave-one-out         an entry point of the group bessemer.KIND, from any installed package
    package.module:NAME   an object in an installed module

The first and the last are the user's own code, named in the user's own recipe: it runs in this process with the user's
rights, outside the sandbox, and the first load of a file prints a warning. A stage records its SHA-256 (`digest`) and
runs again when it has changed; the modules that it imports are not hashed. Its errors become one line with its file and
line (`blamed`).

Members of some kinds (`BY_IMPORT`) are not named: they serve wherever they can. Their entry points name modules, which
register them, and are imported once, at the first use of the table.
"""

import ast
import difflib
import hashlib
import inspect
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache, lru_cache, wraps
from importlib import import_module, util
from importlib.metadata import EntryPoint, PackageNotFoundError, distribution, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, get_type_hints

from pydantic import create_model

from bessemer.config.places import located, looked_in
from bessemer.config.table import ConfigTable, validate
from bessemer.errors import UserError
from bessemer.repeatable import repeatable

PACKAGE = "bessemer"
KINDS = {
    "stages": "stage", "tables": "table", "tasks": "task", "rewards": "reward", "advantages": "advantage",
    "losses": "loss", "samplers": "sampler", "commands": "command", "ops": "operation", "steps": "step backend",
    "families": "model family", "hooks": "hook", "sources": "text source",
}  # fmt: skip
"""Every kind, and what an error calls a member."""
STAGES = "bessemer.pipeline.stages"
CORE = {
    "stages": {
        "corpus": f"{STAGES}.corpus:Corpus",
        "eval": f"{STAGES}.eval:Eval",
        "pretrain": f"{STAGES}.pretrain:Pretrain",
        "rl": f"{STAGES}.rl:RL",
        "sft": f"{STAGES}.sft:SFT",
    }
}
"""The core's own members that are loaded when they are named; known in a checkout that is not installed, too."""
BY_IMPORT = ("ops", "steps", "families", "sources", "hooks")
OWN_FILE = re.compile(r".+\.py:[A-Za-z_][A-Za-z0-9_]*")
OWN_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)
_Member = TypeVar("_Member")
_built_in: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}


def register(kind: str, name: str) -> Callable[[_Member], _Member]:
    """Decorator: the object is the built-in member `name` of its kind."""

    def add(member: _Member) -> _Member:
        assert _built_in[kind].setdefault(name, member) is member, f"two {kind} are called {name}"
        return member

    return add


def names(kind: str) -> list[str]:
    """The names of all members, sorted; nothing is loaded."""
    return sorted({*_built_in[kind], *_entry_points(kind)})


def table(kind: str) -> dict[str, Any]:
    """All members by name, those of removed add-ons left out. Entry points are loaded; UserError if one is broken."""
    loaded = {}
    for name, entry in _entry_points(kind).items():
        with suppress(RemovedAddOn):
            loaded[name] = _loaded(kind, entry)
    return dict(_built_in[kind]) if kind in BY_IMPORT else {**_built_in[kind], **loaded}


def hook(name: str) -> Any:
    """The object that an add-on offers under this name; None without one. Only its module is loaded."""
    with suppress(RemovedAddOn):
        return find("hooks", name) if name in names("hooks") else None
    return None


def find(kind: str, name: str, takes: str = "", derives: type | None = None) -> Any:
    """The object that a recipe names.

    `takes` lists the arguments of a function, "rewards_PG, groups"; errors of a function that is not ours are `blamed`
    on it. `derives` is the base class of a class; with both, either will do. UserError if nothing has this name, if it
    cannot be loaded, or if it is something else; the message shows the expected form."""
    if OWN_FILE.fullmatch(name):
        member = _from_file(name)
    elif name in _built_in[kind]:
        return _built_in[kind][name]
    elif (entry := _entry_points(kind).get(name)) is not None:
        member = _loaded(kind, entry)
    elif OWN_MODULE.fullmatch(name):
        member = _from_module(name)
    else:
        close = difflib.get_close_matches(name, names(kind), n=1)
        known = f"did you mean {close[0]!r}? Known" if close else "known"
        raise UserError(
            f"there is no {KINDS[kind]} {name!r}; {known}: {', '.join(names(kind)) or 'none'}, or your own, "
            "as FILE.py:NAME or package.module:NAME"
        )
    if derives is not None and isinstance(member, type) and issubclass(member, derives):
        return member
    if derives is not None and not (takes and not isinstance(member, type)):
        base = f"{derives.__module__}.{derives.__qualname__}"
        raise UserError(f"{where(name, member)} is not a {KINDS[kind]}; derive the class from {base}")
    if takes:
        _check_arguments(kind, name, member, takes)
        return _guarded(name, member)
    return member


def check_settings(kind: str, name: str, member: Callable[..., Any], settings: Mapping[str, Any], stage: str) -> None:
    """UserError if the other keys of a plug-in's table are not the member's keyword arguments, in name, type and range:
    `def grpo(logp_N, ..., *, clip_low: Annotated[float, Field(gt=0)] = 0.2)` takes `clip_low`. A class with many has
    them as a table, `Settings`, instead."""
    where = f'stage "{stage}"', f": {KINDS[kind]} {name}"
    if (own := getattr(member, "Settings", None)) is not None:
        validate(own, dict(settings), *where)
        return
    types = get_type_hints(
        getattr(member, "__init__", member) if isinstance(member, type) else member, include_extras=True
    )
    keys: dict[str, Any] = {}
    with suppress(ValueError):  # a function of C has no signature, and takes no settings
        for key, parameter in inspect.signature(member).parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY:
                keys[key] = types.get(key, Any), ... if parameter.default is parameter.empty else parameter.default
    form = create_model("Settings", __base__=ConfigTable, **keys)
    validate(form, dict(settings), *where)


def is_built_in(kind: str, name: str) -> bool:
    """Whether the name leads to code of this package, add-ons included."""
    entry = _entry_points(kind).get(name)
    return name in _built_in[kind] or (entry is not None and entry.module.startswith("bessemer."))


def digest(kind: str, name: str) -> dict[str, str]:
    """{name of the file or module: SHA-256} of code that is not part of this package; {} for the rest and for what is
    missing."""
    if OWN_FILE.fullmatch(name):
        file = name.rpartition(":")[0]
        path: Path | None = located(file)
    else:
        entry = None if name in _built_in[kind] else _entry_points(kind).get(name)
        own = OWN_MODULE.fullmatch(name) and name not in _built_in[kind]
        file = entry.module if entry is not None else name.rpartition(":")[0] if own else ""
        path = _file_of_module(file) if file and not is_built_in(kind, name) else None
    return {file: hashlib.sha256(path.read_bytes()).hexdigest()} if path is not None and path.is_file() else {}


@contextmanager
def blamed(name: str, member: object) -> Iterator[None]:
    """Inside, what the member raises becomes a UserError with the file and the line. An error of ours, which does not
    pass through the member's file, keeps its traceback."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        source = _source(member)
        if source is not None and not _lines(error, source):
            raise
        raise _fault(error, source, name) from error


def where(name: str, member: object) -> str:
    """The name with the file and the line where the member begins, for errors about what it is or returned."""
    with suppress(TypeError, OSError):
        return f"{name} ({_source(member)}, line {inspect.getsourcelines(inspect.unwrap(member))[1]})"  # type: ignore[arg-type]
    return name


class RemovedAddOn(UserError):
    """An entry point leads to an add-on that is not installed."""


@cache
def check_installed() -> None:
    """Warns, once, if the package has no metadata: without its entry points no add-on is known."""
    try:
        distribution(PACKAGE)
    except PackageNotFoundError:
        warnings.warn(
            "this checkout is not installed, so no add-on is known: no fast kernels, other tasks, models or commands; "
            "in its folder: pip install -e .",
            stacklevel=2,
        )


@cache
def _entry_points(kind: str) -> dict[str, EntryPoint]:
    check_installed()
    group = f"bessemer.{kind}"
    found = {name: EntryPoint(name, value, group) for name, value in CORE.get(kind, {}).items()}
    for entry in entry_points(group=group):
        if entry.value == CORE.get(kind, {}).get(entry.name):
            continue  # an older version of this package lists the core's own, too
        if entry.name in found or entry.name in _built_in[kind]:
            first = _package(found[entry.name]) if entry.name in found else "bessemer"
            raise UserError(
                f"{first} and {_package(entry)} both bring the {KINDS[kind]} {entry.name!r}; uninstall one of them"
            )
        found[entry.name] = entry
    return found


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else entry.module.partition(".")[0]


@cache
def _loaded(kind: str, entry: EntryPoint) -> Any:
    try:
        return entry.load()
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise unloadable(kind, entry, error) from error


def unloadable(kind: str, entry: EntryPoint, error: BaseException) -> UserError:
    """Why an entry point cannot be loaded, with the package or the extra that brings what is missing."""
    package = _package(entry)
    what = f"the {KINDS[kind]} {entry.name!r} of the package {package} ({entry.value})"
    missing = error.name or "" if isinstance(error, ModuleNotFoundError) else ""
    if f"{entry.module}.".startswith(f"{missing}."):
        whole = "pip install -e . in a whole checkout" if package == PACKAGE else f"pip install {package}"
        return RemovedAddOn(f"{what} comes with {missing}, which is not here; install {package} again: {whole}")
    for needed in (entry.dist.requires or []) if entry.dist is not None else []:
        extra = re.search(r"""extra == ["']([\w-]+)""", needed)
        named = re.match(r"[\w.-]+", needed)
        if missing and extra and named and named[0].replace("-", "_") == missing.partition(".")[0]:
            return UserError(f"{what} needs {missing}: pip install '{package}[{extra[1]}]'")
    return UserError(f"{what} cannot be loaded: {type(error).__name__}: {error}; repair or uninstall it")


def _from_module(name: str) -> Any:
    module, _, attribute = name.partition(":")
    try:
        found = import_module(module)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise UserError(f"there is no module {error.name}; install it, or write FILE.py:NAME") from None
        raise _fault(error, _file_of_module(module), module) from error
    return _attribute(found, attribute, module)


def _from_file(name: str) -> Any:
    file, _, attribute = name.rpartition(":")
    path = located(file)
    if not path.is_file():
        raise UserError(f"there is no file {file}{looked_in(file)}; write FILE.py:NAME, from the recipe's folder")
    return _attribute(_module(path.resolve(), hashlib.sha256(path.read_bytes()).hexdigest()), attribute, file)


def _attribute(module: ModuleType, attribute: str, where: str) -> Any:
    if not hasattr(module, attribute):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        near = difflib.get_close_matches(attribute, own, n=1, cutoff=0.0)
        raise UserError(f"{where} defines no {attribute}" + (f"; did you mean {near[0]}?" if near else ""))
    return getattr(module, attribute)


def _check_arguments(kind: str, name: str, member: Any, takes: str) -> None:
    form = f"def {name.rpartition(':')[2].replace('-', '_')}({takes}): ..."
    if not callable(member) or isinstance(member, type):
        raise UserError(f"{where(name, member)} is not a function; the form of a {KINDS[kind]} is {form}")
    arguments = takes.split(", ")
    try:
        with suppress(ValueError):  # a function of C has no signature
            signature = inspect.signature(member)
            own = [p for p in signature.parameters.values() if p.kind is not p.KEYWORD_ONLY]  # the others are settings
            signature.replace(parameters=own).bind(*arguments)
    except TypeError as error:
        raise UserError(
            f"{where(name, member)} cannot be called with {len(arguments)} arguments ({error}); the form of a "
            f"{KINDS[kind]} is {form}"
        ) from None


def _guarded(name: str, member: Callable[..., Any]) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(member):

        @wraps(member)
        async def wait(*args: Any, **named: Any) -> Any:
            with blamed(name, member):
                return await member(*args, **named)

        return wait

    @wraps(member)
    def call(*args: Any, **named: Any) -> Any:
        with blamed(name, member):
            return member(*args, **named)

    return call


def _source(member: object) -> Path | None:
    with suppress(TypeError):
        return Path(inspect.getfile(inspect.unwrap(member)))  # type: ignore[arg-type]
    return None


def _file_of_module(module: str) -> Path | None:
    with suppress(ImportError, ValueError):
        spec = util.find_spec(module)
        return Path(spec.origin) if spec is not None and spec.origin and spec.has_location else None
    return None


def _fault(error: BaseException, path: Path | None, name: str) -> UserError:
    """The error as one line with the last line of the file that was running."""
    lines = [error.lineno] if isinstance(error, SyntaxError) else _lines(error, path)
    at = f"{path}, line {lines[-1]}" if lines else str(path or name)
    return UserError(f"{at}: {type(error).__name__}: {error}; correct the file")


def _lines(error: BaseException, path: Path | None) -> list[int | None]:
    return [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]


@lru_cache(maxsize=64)  # a stage asks for its tasks many times
def _module(path: Path, digest: str) -> ModuleType:
    warnings.warn(f"{path.name} is your own code: it runs with your rights, outside the sandbox", stacklevel=2)
    _check_imports(path)
    name = f"{re.sub(r'[^A-Za-z0-9_]', '_', path.stem)}_{digest[:12]}"
    spec = util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    sys.path.insert(0, str(path.parent))  # where a script finds what lies beside it
    try:
        with repeatable("load", digest):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _fault(error, path, name) from error
    finally:
        with suppress(ValueError):  # the file may have changed the list
            sys.path.remove(str(path.parent))
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # what its functions import when they are called
    return module


_beside: dict[str, Path] = {}
"""Modules that files of the user import from beside them, now or when a function is called."""


def _check_imports(path: Path) -> None:
    """UserError if a file imports, anywhere, a module beside it that has the name of another: it might get that one."""
    files = [path]
    for file in files:
        try:
            tops = {name.partition(".")[0] for name in _imported(ast.parse(file.read_bytes()))}
        except (SyntaxError, ValueError, OSError):  # loading it says what is wrong
            continue
        for top in sorted(tops):
            places = path.parent / top / "__init__.py", path.parent / f"{top}.py"
            beside = next((place for place in places if place.is_file()), None)
            if beside is None or beside in files:
                continue
            files.append(beside)
            loaded = getattr(sys.modules[top], "__file__", None) or "Python's own" if top in sys.modules else beside
            other = _beside.get(top, loaded)
            if beside.resolve() != Path(other).resolve():
                raise UserError(f"{file} imports {top}, of which there are two, {beside} and {other}; rename the first")
            _beside[top] = beside


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module or ""
