"""Completions from a model directory in one call."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bessemer.engine.engine import Engine, Prompt
from bessemer.engine.speculative import check_drafts
from bessemer.hf.causal_lm import load_any
from bessemer.hf.foreign_tokenizer import load_tokenizer


def load_engine(model_dir: str | Path, drafts: int = 0, compile: bool = False) -> Engine:
    """Model and tokenizer of a Hugging Face directory. The MTP layers stay on the disk unless they are to guess.
    compile: the decoding steps are compiled now, for calls with so many drafts."""
    engine = Engine(load_any(model_dir, mtp=drafts > 0), load_tokenizer(model_dir), compile=compile)
    check_drafts(engine.model, drafts)
    if engine.compiled is not None:
        print(
            "compiling the decoding steps: a minute or two the first time, seconds later", file=sys.stderr, flush=True
        )
        engine.compiled.prepare(drafts)
    return engine


def generate_texts(
    model_dir: str | Path, prompts: Sequence[Prompt], compile: bool = False, **sampling: Any
) -> list[str]:
    """One continuation of each prompt; `sampling` as in `Engine.generate`."""
    engine = load_engine(model_dir, sampling.get("drafts", 0), compile)
    return [completions[0].text for completions in engine.generate(prompts, samples=1, **sampling)]
