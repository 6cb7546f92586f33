"""Prompts from a file."""

from __future__ import annotations

import json
from pathlib import Path

from bessemer.errors import UserError


def read_prompts(file: str | Path) -> list[str]:
    """The prompts of a file: its lines, or with the ending .jsonl the field "prompt" of every object."""
    try:
        lines = Path(file).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as UTF-8 text ({error})") from None
    if Path(file).suffix != ".jsonl":
        return [line for line in lines if line]
    found = []
    for number, line in enumerate(lines, 1):
        try:
            prompt = json.loads(line)["prompt"] if line.strip() else None
        except (ValueError, KeyError, TypeError):
            prompt = 0
        if prompt is not None and not isinstance(prompt, str):
            raise UserError(f'{file}, line {number}: not an object with a text under "prompt"')
        found += [] if prompt is None else [prompt]
    return found
