"""Completion in bash, zsh and fish: scripts that ask this program for candidates for the last word.

The candidates come from the commands' own parser, so that they always match what the commands accept: commands,
options, choices, recipes by name, runs, their stages. If a script gets no candidates, the shell completes files.
"""

import glob
import re
from collections.abc import Callable, Iterator
from enum import StrEnum
from functools import cache
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from bessemer.cli.common import app

_STAGE = re.compile(r"\d+-([A-Za-z0-9_-]+)")
Node = Any
"""A node of typer's parser: a command, a group of commands, or a parameter."""
Candidates = Iterator[tuple[str, str]]
"""(word, its meaning in a few words or "")."""


class Shell(StrEnum):
    bash = "bash"
    zsh = "zsh"
    fish = "fish"


SCRIPTS = {
    # Split the words here: bash's own splitting breaks a word at every = and :, and then replaces only the last part.
    Shell.bash: r"""_bessemer() {
    local line=${COMP_LINE:0:COMP_POINT} words current kept word
    read -ra words <<< "$line"
    [[ $line == *[[:space:]] ]] && words+=("")
    current=${words[${#words[@]} - 1]} COMPREPLY=()
    kept=${current%"${current##*[=:]}"}
    while IFS= read -r word; do
        COMPREPLY+=("$(printf %q "${word#"$kept"}")")
    done < <("${words[0]}" completion bash -- "${words[@]:1}" 2>/dev/null)
    [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == */ ]] && compopt -o nospace 2>/dev/null
    return 0
}
complete -o default -o bashdefault -F _bessemer bessemer
""",
    Shell.zsh: r"""#compdef bessemer
_bessemer() {
    local -a found folders
    found=("${(@f)$("${words[1]}" completion zsh -- "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    found=("${(@)found:#}")
    folders=("${(@M)found:#*/:}")
    found=("${(@)found:#*/:}")
    if (( $#found + $#folders == 0 )); then
        _files
        return
    fi
    (( $#folders )) && compadd -S '' -- "${(@)folders%:}"
    (( $#found )) && _describe -V bessemer found
}
if [[ ${funcstack[1]} == _bessemer ]]; then _bessemer "$@"; else compdef _bessemer bessemer; fi
""",
    Shell.fish: r"""function __bessemer_words
    set -l words (commandline -opc)
    set -l found ($words[1] completion fish -- $words[2..] (commandline -ct | string collect --allow-empty) 2>/dev/null)
    if set -q found[1]
        printf '%s\n' $found
    else
        __fish_complete_path (commandline -ct)
    end
end
complete -c bessemer -f -a '(__bessemer_words)'
""",
}


@app.command()
def completion(
    shell: Annotated[Shell, typer.Argument(help="The shell that the script is for.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- WORD...]", help="Print what may replace the last word; used by the scripts."),
    ] = None,
) -> None:
    """Print the script that completes commands, options, recipes and runs: eval "$(bessemer completion bash)"."""
    if words is None:
        print(SCRIPTS[shell], end="")
        return
    for word, meaning in candidates(words):
        if not (word + meaning).isprintable():
            continue  # a folder name with a line break, which a line protocol cannot carry
        if shell is Shell.bash:
            print(word)
        elif shell is Shell.fish:
            print(word, meaning, sep="\t")
        else:
            print(word.replace("\\", "\\\\").replace(":", "\\:"), meaning, sep=":")


def candidates(words: list[str]) -> Candidates:
    """Candidates for the last of the words after the program's name."""
    command = _program()
    *before, text = words
    path, waiting, arguments, options = list[str](), None, 0, True
    for word in before:
        if waiting is not None:
            waiting = None
        elif options and word == "--":
            options = False
        elif options and word.startswith("-"):
            waiting = None if "=" in word else _valued(command, word)
        elif (inner := _commands(command)) is None:
            arguments += 1
        elif word in inner:
            command = inner[word]
            path.append(word)
        else:
            return
    name, equals, value = text.partition("=")
    if waiting is not None:
        found = _values(command, path, waiting, text)
    elif options and equals and name.startswith("-"):
        option = _valued(command, name)
        found = (
            ((f"{name}={one}", about) for one, about in _values(command, path, option, value)) if option else iter(())
        )
    elif options and text.startswith("-"):
        found = _options(command)
    elif (inner := _commands(command)) is not None:
        found = ((one, _about(each)) for one, each in inner.items() if not each.hidden)
    else:
        takes = [param for param in command.params if param.param_type_name == "argument"]
        last = takes[-1] if takes and takes[-1].nargs == -1 else None
        param = takes[arguments] if arguments < len(takes) else last
        found = _values(command, path, param, text) if param is not None else iter(())
    yield from ((one, about) for one, about in found if one.startswith(text))


@cache
def _program() -> Node:
    return typer.main.get_command(app)


def _commands(command: Node) -> dict[str, Node] | None:
    if not hasattr(command, "list_commands"):
        return None
    return {name: command.get_command(None, name) for name in command.list_commands(None)}


def _valued(command: Node, name: str) -> Node:
    """The option of this name, if it takes a value."""
    options = (param for param in command.params if param.param_type_name == "option" and not param.is_flag)
    return next((option for option in options if name in option.opts), None)


def _options(command: Node) -> Candidates:
    for param in command.params:
        if param.param_type_name == "option" and not param.hidden:
            for name in (*param.opts, *param.secondary_opts):
                if name.startswith("--"):
                    yield name, _first(param.help)
    yield "--help", "Show what it does."


def _about(command: Node) -> str:
    return _first(command.short_help or command.help)


def _first(text: str | None) -> str:
    """The first sentence."""
    return " ".join((text or "").split()).partition(". ")[0].rstrip(".")


def _values(command: Node, path: list[str], param: Node, text: str) -> Candidates:
    """What a parameter takes: its choices, or whatever its name in the help stands for."""
    hint = get_type_hints(command.callback).get(param.name)  # an enumeration: alone, in a list or optional
    for kind in (hint, *get_args(hint)):
        if isinstance(kind, type) and issubclass(kind, StrEnum):
            yield from ((one.value, "") for one in kind)
            return
    means = _OF_COMMANDS.get((*path, param.name)) or _OF_METAVARS.get(str(param.metavar))
    if means is not None:
        yield from means(text)


def _recipes(text: str, data: bool = False) -> Candidates:
    from bessemer.config.builtin import builtin_recipes, purpose

    yield from ((name, purpose(path)) for name, path in builtin_recipes(data).items())
    if text:
        yield from ((path, "") for path in sorted(glob.glob(f"{glob.escape(text)}*.toml")))
        yield from _folders(text)


def _runs(text: str, stages: bool = False) -> Candidates:
    yield from ((str(path.parent), "") for path in sorted(Path("runs").glob("*/recipe.toml")))
    root, slash, _ = text.rpartition("/")
    if stages and slash and (Path(root) / "recipe.toml").is_file():
        models = sorted(Path(root).glob("[0-9][0-9]*-*/model"))  # `runs.directory` knows more, but it imports torch
        names = (_STAGE.fullmatch(path.parent.name) for path in models)
        yield from ((f"{root}/{name[1]}", "") for name in names if name)
    elif text:
        yield from _folders(text)


def _folders(text: str) -> Candidates:
    folders = (one for one in sorted(glob.glob(f"{glob.escape(text)}*/")) if Path(one).parent != Path("runs"))
    yield from ((one, "") for one in folders)


def _models(text: str) -> Candidates:
    return _runs(text, stages=True)


def _keys(module: str, table: str, *more: str) -> Callable[[str], Candidates]:
    """The keys of a table that is imported only when asked for. In a list they follow the last comma."""

    def found(text: str) -> Candidates:
        known = (*getattr(import_module(f"bessemer.{module}"), table), *more)
        return ((text[: text.rfind(",") + 1] + key, "") for key in known)

    return found


_OF_METAVARS: dict[str, Callable[[str], Candidates]] = {
    "RECIPE": _recipes, "[MODEL|RECIPE]": _recipes, "RECIPE|RUN": lambda text: chain(_recipes(text), _runs(text)),
    "RUN": _runs, "RUN...": _runs, "RUN[/STAGE]": _models,
    "MODEL": _models, "[MODEL]": _models, "MODEL[,MODEL]": _models, "SRC": _models,
}  # fmt: skip
_OF_COMMANDS: dict[tuple[str, ...], Callable[[str], Candidates]] = {
    ("data", "build", "recipe"): lambda text: _recipes(text, data=True), ("init", "source"): lambda _: _recipes(""),
    ("recipes", "name"): lambda _: chain(_recipes(""), _recipes("", data=True)),
    ("keys", "kind"): _keys("config.kinds", "CORE", "data", "model"),
    ("track", "to"): _keys("runs.trackers", "TRACKERS"),
}  # fmt: skip
