"""Sampling on all ranks for a stage, or part of one, that rank 0 runs alone: the other GPUs would sit idle.

Rank 0 announces every call, with its prompts as token ids. The others load the same model and generate their share of
the batches, then all exchange results. If rank 0 trains the model, it sends the weights whenever they changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import torch
import torch.distributed as dist

from bessemer.addons.distributed import watchdog
from bessemer.addons.distributed.apart import held_by
from bessemer.addons.distributed.ranks import Ranks
from bessemer.config.table import Precision
from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.engine import Engine
from bessemer.engine.generation import Completion, OnText, Options, Prompt
from bessemer.model.protocol import LanguageModel
from bessemer.rl.sampler import Completions, SamplingOptions
from bessemer.train import setup


class DealtEngine:
    """Rank 0's side: used like an `Engine`, but all ranks generate. The others keep one model per `role`. For a model
    that changes, `version()` returns a number that differs after every change."""

    def __init__(
        self, engine: Engine, folder: Path, ranks: Ranks, role: str = "model", version: Callable[[], int] | None = None,
        precision: Precision = "device",
    ) -> None:  # fmt: skip
        self.engine, self.folder, self.ranks, self.role, self.version = engine, folder, ranks, role, version
        self.precision = precision
        self._sent: int | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        return self.engine.tokenizer

    @property
    def model(self) -> LanguageModel:
        return self.engine.model

    def generate(self, prompts: Sequence[Prompt], **options: Unpack[SamplingOptions]) -> Completions:
        assert not any(isinstance(prompt, str) for prompt in prompts), "stages ask in token ids"
        options.setdefault("stop_ids", self.tokenizer.stop_ids)
        on_text = options.pop("on_text", None)
        listed = {name: list(value) if isinstance(value, Sequence) else value for name, value in options.items()}
        sent, self._sent = self._sent, None if self.version is None else self.version()
        changed = sent != self._sent
        trained = None if self.version is None else str(self.model.embed.weight.dtype).removeprefix("torch.")
        self.ranks.order(
            {"samples": str(self.folder), "role": self.role, "precision": trained or self.precision,
             "trained": trained is not None, "changed": changed,
             "prompts": [list(prompt) for prompt in prompts], "options": listed}
        )  # fmt: skip
        if changed:
            share_weights(self.model, self.ranks)
        if on_text is not None:
            options["on_text"] = on_text
        return deal(self.engine, self.ranks, prompts, **options)


class _Loaded(NamedTuple):
    model: tuple[str, str, bool]
    """Its folder, its precision, and whether rank 0 trains it, which overwrites what the folder holds."""
    engine: Engine


class Helper:
    """The other ranks' side: does what rank 0 orders. Keeps the last model of each role until `forget`."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._loaded: dict[str, _Loaded] = {}

    def take_part(self, order: dict[str, Any]) -> None:
        role, model = order["role"], (order["samples"], order["precision"], order["trained"])
        if role not in self._loaded or self._loaded[role].model != model:
            self._loaded.pop(role, None)
            loaded = setup.load_to_sample(Path(order["samples"]), lambda text: None, precision=order["precision"])
            self._loaded[role] = _Loaded(model, Engine(*loaded, setup.workers()))
        engine = self._loaded[role].engine
        if order["changed"]:
            share_weights(engine.model, self.ranks)
        deal(engine, self.ranks, order["prompts"], **order["options"])

    def forget(self) -> None:
        self._loaded.clear()


@torch.no_grad()
def share_weights(model: LanguageModel, ranks: Ranks) -> None:
    """Copies rank 0's weights into the others' models of the same shape, in place. Collective; one tensor at a time, in
    float32."""
    for name, own in model.state_dict().items():
        value = torch.empty(own.shape, dtype=torch.float32, device=own.device)
        if ranks.me == 0:
            value.copy_(own)
        with watchdog.waiting(name, [0] if ranks.me else range(ranks.n)):
            dist.broadcast(value, 0)
        if ranks.me:
            own.copy_(value)


def deal(
    engine: Engine, ranks: Ranks, prompts: Sequence[Prompt], apart: bool = False, on_text: OnText | None = None,
    **options: Unpack[Options],
) -> Completions:  # fmt: skip
    """`Engine.generate` shared by all ranks, whose engines have the same weights; all get all samples, or `apart` as in
    `Runtime.generate`. on_text hears of this rank's share. Collective."""
    n = ranks.n
    options["batch_rows"] = rows_of_batch(len(prompts) * options.get("samples", 1), options.get("batch_rows", 512), n)
    plan = engine.plan(prompts, **options)
    own = engine.run_all(plan.batches[ranks.me :: n], on_text)
    completions: list[list[Completion]] = [[] for _ in plan.batches]
    ranks.meet("samples")  # one rank may take many times as long as another
    if not apart:
        for rank, share in enumerate(ranks.all_gather(own, "samples")):
            completions[rank::n] = share
        return plan.gather(completions)
    facts = [
        [(len(completion.tokens), completion.finish_reason, completion.prompt_tokens) for completion in batch]
        for batch in own
    ]
    for rank, lengths in enumerate(ranks.all_gather(facts, "lengths of samples")):
        completions[rank::n] = [[held_by(rank, *completion) for completion in batch] for batch in lengths]
    completions[ranks.me :: n] = own
    return plan.gather(completions)


def rows_of_batch(samples: int, rows: int, n: int) -> int:
    """Rows per batch, at most `rows`, such that n ranks get equally many batches: 1,024 samples in batches of 256 would
    leave half of eight ranks idle."""
    batches = max(1, -(-samples // (rows * n))) * n
    return max(1, -(-samples // batches))
