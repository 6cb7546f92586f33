"""Shared by all commands: the program, JSON output."""

import json
import warnings
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from bessemer.errors import UserError
from bessemer.escape import escaped, escaped_json

ELSEWHERE = {"audit": "claims", "claims": "claims"}
"""Commands of the repository's other projects: name -> the project's folder in a clone."""


class Commands(TyperGroup):
    """The core's own commands, and those that add-ons and other packages list in the entry-point group
    `bessemer.commands`: functions annotated for typer, or a group of them. A package is imported only for its own
    command, for a list of all commands and for an unknown one."""

    def list_commands(self, ctx: Any) -> list[str]:
        self._plug_in()
        return list(self.commands)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in self.commands:
            self._plug_in()
        if cmd_name in self.commands or cmd_name not in ELSEWHERE:
            return self.commands.get(cmd_name)
        folder = ELSEWHERE[cmd_name]
        return _refusing(cmd_name, f"{cmd_name} comes with bessemer-{folder}; in a clone: pip install -e ./{folder}")

    def _plug_in(self) -> None:
        entries = entry_points(group="bessemer.commands")
        if not entries:
            from bessemer.plugins import check_installed

            check_installed()
        for entry in entries:
            command = self.commands.get(entry.name)
            if command is None:
                self.commands[entry.name] = _plugged(entry)
            elif getattr(command, "entry", "") != entry.value:
                warnings.warn(f"{entry.value} is left out: there is a command {entry.name} already", stacklevel=2)


def _plugged(entry: EntryPoint) -> Any:
    """The command of an entry point. If it cannot be imported, a command that says why."""
    try:
        command = _command(entry.name, entry.load())
    except Exception as error:
        from bessemer.plugins import unloadable

        command = _refusing(entry.name, str(unloadable("commands", entry, error)))
    command.entry = entry.value
    return command


def _refusing(name: str, why: str) -> Any:
    """A hidden command that takes all arguments and refuses."""

    def refuse() -> None:
        raise UserError(why)

    takes_all = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
    return _command(name, refuse, hidden=True, context_settings=takes_all)


def _command(name: str, function: Callable[..., Any] | typer.Typer, **settings: Any) -> Any:
    if isinstance(function, typer.Typer):
        group = typer.main.get_command(function)
        group.name = name
        return group
    alone = typer.Typer(add_completion=False)
    alone.command(name, **settings)(function)
    return typer.main.get_command(alone)


app = typer.Typer(
    cls=Commands,
    help="From documents to a reasoning model that answers: DeepSeek-V3, R1-Zero and R1 in one run.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def recipes_like(incomplete: str) -> list[str]:
    """Built-in recipes whose names begin so, for a shell; without any it offers files."""
    from bessemer.config.builtin import builtin_recipes

    return [name for name in builtin_recipes() if name.startswith(incomplete)]


def print_json(facts: object) -> None:
    print(escaped_json(json.dumps(facts, ensure_ascii=False, indent=1)))


def one_line(message: object) -> str:
    """A message for the terminal; it may quote a file or a model."""
    return escaped(" ".join(str(message).split("\n")))
