"""Completions from a model directory in one call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bessemer.data.foreign_tokenizer import load_tokenizer
from bessemer.infer.engine import Engine, Prompt
from bessemer.model.foreign import load_any


def load_engine(model_dir: str | Path, mtp: bool = False) -> Engine:
    """Model and tokenizer of a Hugging Face directory. The MTP layers stay on the disk unless they are to guess."""
    return Engine(load_any(model_dir, mtp=mtp), load_tokenizer(model_dir))


def generate_texts(model_dir: str | Path, prompts: Sequence[Prompt], **sampling: Any) -> list[str]:
    """One continuation of each prompt; `sampling` as in `Engine.generate`."""
    engine = load_engine(model_dir, mtp=bool(sampling.get("drafts")))
    return [completions[0].text for completions in engine.generate(prompts, samples=1, **sampling)]
