"""Options that commands on models share, and files of prompts."""

import json
import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from bessemer.errors import UserError

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A model directory, or a run: its main model, by default the last.")
]
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
