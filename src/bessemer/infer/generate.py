"""Completions from a model directory in one call."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bessemer.data.foreign_tokenizer import load_tokenizer
from bessemer.errors import UserError
from bessemer.infer.engine import Engine, Prompt
from bessemer.model.foreign import load_any


def load_engine(model_dir: str | Path, mtp: bool = False) -> Engine:
    """Model and tokenizer of a Hugging Face directory. The MTP layers stay on the disk unless they are to guess."""
    return Engine(load_any(model_dir, mtp=mtp), load_tokenizer(model_dir))


def generate_texts(model_dir: str | Path, prompts: Sequence[Prompt], **sampling: Any) -> list[str]:
    """One continuation of each prompt; `sampling` as in `Engine.generate`."""
    engine = load_engine(model_dir, mtp=bool(sampling.get("drafts")))
    return [completions[0].text for completions in engine.generate(prompts, samples=1, **sampling)]


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
