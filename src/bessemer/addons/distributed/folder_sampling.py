"""Samplers of a model directory whose weights stay, for stages and commands that ask a model which they do not train.

Workers and servers load the directory themselves, so the process that asks holds its tokenizer and its sizes alone, and
no card has to hold the whole model. Before the first answer, the log-probabilities of a short one are compared with
those that this machine's CPU computes from the directory, if its memory holds the weights (`on_the_host`).
"""

from __future__ import annotations

from collections import abc
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Unpack, cast

import torch

from bessemer import system
from bessemer.addons.distributed.sampler_check import check, dtype_of, logprobs, short_answer
from bessemer.data.model_files import read_object
from bessemer.engine import generation
from bessemer.engine.generation import CallOptions, GenerationPlan, Options, Prompt
from bessemer.hf.families import load_tokenizer
from bessemer.hf.model_directory import load, own_config
from bessemer.model.protocol import LanguageModel

HOST_SHARE = 0.4
"""Share of the host's memory that the weights may take for the check at the start."""
LONGEST = 4096
"""Context of a model whose config.json states none."""


class FolderEngine:
    """What plans the calls of a model that is elsewhere: its tokenizer and its sizes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tokenizer = folder, load_tokenizer(folder)
        cfg: Any = own_config(folder)
        if cfg is None:
            stated = read_object(folder / "config.json")
            vocabulary, longest = stated.get("vocab_size"), stated.get("max_position_embeddings")
            cfg = SimpleNamespace(
                vocab_size=vocabulary if isinstance(vocabulary, int) else self.tokenizer.vocab_size,
                max_seq_len=longest if isinstance(longest, int) else LONGEST,
                n_mtp=0,
            )
        self.model = cast(LanguageModel, SimpleNamespace(cfg=cfg, layers=[], mtp=[]))

    def plan(self, prompts: abc.Sequence[Prompt], **options: Unpack[Options]) -> GenerationPlan:
        return generation.plan(self.model, self.tokenizer, prompts, CallOptions(**options))

    def check(self, generate: Callable[..., Any], dtype: str, name: str, say: Callable[[str], None]) -> None:
        """UserError if a sampler that computes in `dtype` does not compute what the directory's weights give."""
        prompt, answer = short_answer(generate, self.tokenizer)
        expected = on_the_host(self.folder, [*prompt, *answer.tokens])
        if expected is None:
            say(f"warning: {name} is not checked, since its weights do not fit this machine's memory beside other work")
            return
        values, host = expected
        check(answer.logprobs, values[len(prompt) - 1 :], (dtype, host), name)


def on_the_host(folder: Path, ids: Sequence[int]) -> tuple[list[float], str] | None:
    """(log-probabilities of the ids after the first, their dtype) by this machine's CPU; None if the weights do not fit
    its memory."""
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    room = system.memory() * HOST_SHARE
    if room and stored > room:
        return None
    model = load(folder, dtype=torch.float32 if not room or 2 * stored <= room else None, mtp=False)
    return logprobs(model, ids), dtype_of(model)
