"""Shared by all commands: the program, common options, JSON output."""

import json
import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from bessemer.errors import UserError
from bessemer.escape import escaped, escaped_json

app = typer.Typer(
    help="From documents to a reasoning model that answers: DeepSeek-V3, R1-Zero and R1 in one run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model directory, or a run: its main model, by default the last.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Seed = Annotated[int, typer.Option(help="Same seed, same text.")]
Drafts = Annotated[int, typer.Option(min=0, max=8, help="Tokens that the MTP module drafts at each step.")]
Compile = Annotated[
    bool,
    typer.Option("--compile", help="On a CPU without the kernels, compile the decoding steps (a minute or two)."),
]
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


def print_json(facts: object) -> None:
    print(escaped_json(json.dumps(facts, ensure_ascii=False, indent=1)))


def one_line(message: object) -> str:
    """A message for the terminal; it may quote a file or a model."""
    return escaped(" ".join(str(message).split("\n")))


def write_page(path: Path, text: str) -> None:
    """Writes a page or chart where the user wants it. Replaces only an older page or chart."""
    from bessemer.runs.files import explained, write_atomic

    with explained(path):
        if path.is_dir():
            raise UserError(f"{path} is a directory; name the file to write")
        if path.exists():
            with open(path, "rb") as file:
                begins = file.read(4)
            if begins != text.encode()[:4]:
                raise UserError(f"{path} exists and is something else; name another file")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{path.parent} is a file, not a folder; name another file to write") from None
        write_atomic(path, text)


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
