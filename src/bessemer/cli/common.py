"""Shared by all commands: the program, common options, JSON output."""

import json
import os
import warnings
from collections.abc import Callable
from enum import StrEnum
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
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

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model directory, or a run: its main model, by default the last.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Seed = Annotated[int, typer.Option(help="Same seed, same text.")]
Drafts = Annotated[int, typer.Option(min=0, max=8, help="Tokens that the MTP module drafts at each step.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 picks the most likely token.")]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus threshold; 1 keeps all tokens.")]


def _skip_comparison(given: bool) -> bool:
    if given:
        from bessemer.data.fingerprints import NO_VERIFY

        os.environ[NO_VERIFY] = "1"
    return given


NoVerify = Annotated[
    bool,
    typer.Option(
        "--no-verify",
        help="Load a run's model without comparing it with the checksums that its stage recorded.",
        callback=_skip_comparison,
    ),
]


class YesNo(StrEnum):
    yes = "yes"
    no = "no"


def recipes_like(incomplete: str) -> list[str]:
    """Built-in recipes whose names begin so, for a shell; without any it offers files."""
    from bessemer.config.builtin import builtin_recipes

    return [name for name in builtin_recipes() if name.startswith(incomplete)]


def print_json(facts: object) -> None:
    print(escaped_json(json.dumps(facts, ensure_ascii=False, indent=1)))


def one_line(message: object) -> str:
    """A message for the terminal; it may quote a file or a model."""
    return escaped(" ".join(str(message).split("\n")))


def read_prompts(file: str | Path) -> list[str]:
    """The prompts in a file: its lines, or the field "prompt" of every object if the extension is .jsonl."""
    from bessemer.config.places import read_text

    lines = read_text(Path(file), "file of prompts").split("\n")  # splitlines knows ten other ends of a line
    if Path(file).suffix.lower() != ".jsonl":
        return [line for line in lines if line]
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            prompt = json.loads(line)["prompt"] if line.strip() else None
        except (ValueError, KeyError, TypeError):
            prompt = 0
        if prompt is not None and not isinstance(prompt, str):
            raise UserError(f'{file}, line {number}: not an object with a text under "prompt"')
        prompts += [] if prompt is None else [prompt]
    return prompts
