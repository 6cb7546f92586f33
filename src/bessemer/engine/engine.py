"""`Engine` turns prompts into completions, for RL rollouts, evaluation, `bessemer generate` and chat.

Samples run in fixed batches, with one prefill per distinct prompt in a batch (a prompt's samples are split only if they
exceed a batch). On a CPU batches go to processes, one per core. Results do not depend on either: every sample has its
own random stream, identified by the seed, the prompt's tokens and the sample's number.
"""

from __future__ import annotations

from collections import abc
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor

from bessemer import heartbeat, probe
from bessemer.data.tokenizer import Tokenizer
from bessemer.engine import decode, generation  # noqa: F401  decode registers the steps in torch
from bessemer.engine.generation import (
    CallOptions,
    Completion,
    GenerationBatch,
    GenerationPlan,
    OnText,
    OnTokens,
    Options,
    Prompt,
    Sample,
)
from bessemer.engine.kept_tokens import KeptTokens
from bessemer.engine.model_runner import ModelRunner, not_finite
from bessemer.engine.routing_record import RoutingRecord
from bessemer.engine.sequence import Sequence, cut_at_stop, stop_strings
from bessemer.engine.speculative import check_drafts
from bessemer.engine.steps import PrefillChunk, backend_of
from bessemer.errors import UserError
from bessemer.hf.families import load_tokenizer
from bessemer.hf.model_directory import load
from bessemer.model.protocol import LanguageModel
from bessemer.model.transformer import evaluating
from bessemer.workers import Workers


class Engine:
    """Generates with a model and its tokenizer. No state outlives a call, so the model may be trained between calls."""

    def __init__(
        self, model: LanguageModel, tokenizer: Tokenizer, workers: Workers | None = None, batch_invariant: bool = False
    ):
        """batch_invariant: samples keep their bits in any batch, as `StepBackend.batch_invariant` promises. UserError
        if nothing promises it for this model, or if model and tokenizer do not belong together."""
        if tokenizer.vocab_size > model.cfg.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} tokens but the model only {model.cfg.vocab_size}; they do "
                "not match: load both from one directory"
            )
        model.cfg.require_latent("the engine")
        self.model = model
        self.tokenizer = tokenizer
        self.batch_invariant = batch_invariant
        if batch_invariant:
            backend_of(model, batch_invariant)
        self.workers = workers or Workers()
        """Processes that run batches in parallel; their number does not change the result."""

    @generation.spelled_out
    def generate(
        self, prompts: abc.Sequence[Prompt], *, on_tokens: OnTokens | None = None, on_text: OnText | None = None,
        **options: Unpack[Options],
    ) -> list[list[Completion]]:  # fmt: skip
        """`samples` completions of each prompt, in order; `generation.Options` describes the options.

        on_tokens is called after each step with the new tokens, a list of (prompt index, sample, token). on_text is
        called as `OnText` says; for samples of another process, when that process has finished their batch.
        """
        plan = self.plan(prompts, on_tokens=on_tokens, **options)
        if on_tokens is None and self.workers.n > 1:
            return plan.gather(plan.announced(self.workers.map(self.run, plan.batches), on_text))
        return plan.gather(self.run_all(plan.batches, on_text))

    @generation.spelled_out
    def plan(
        self, prompts: abc.Sequence[Prompt], *, on_tokens: OnTokens | None = None, **options: Unpack[Options]
    ) -> GenerationPlan:
        """Batches of at most `batch_rows` samples; `run` generates one, in this or another process with these weights.
        The options are those of `generate`."""
        return generation.plan(self.model, self.tokenizer, prompts, CallOptions(**options), on_tokens)

    def check_prompt(self, ids: abc.Sequence[int], name: str = "the prompt") -> None:
        """UserError for a prompt that is empty, leaves no room for an answer, or has ids outside the vocabulary."""
        generation.check_prompt(self.model, ids, name)

    def run_all(self, batches: abc.Sequence[GenerationBatch], on_text: OnText | None = None) -> list[list[Completion]]:
        """`run` for every batch, one after another in this process."""
        return [self.run(batch, on_text) for batch in batches]

    def run(self, batch: GenerationBatch, on_text: OnText | None = None) -> list[Completion]:
        """One completion of each sample in the batch: all its prompts start together, and its rows are not refilled."""
        record = RoutingRecord() if batch.record_routing else None
        sequences = [
            Sequence(sample.request, number, stop_strings(self.tokenizer, sample.request.stop_strings))
            for number, sample in enumerate(batch.samples)
        ]
        with evaluating(self.model), torch.inference_mode():
            runner = self._prefilled(sequences, batch, record)
            while decoded := runner.sequences:
                heartbeat.beat()
                runner.step()
                if failed := [sequence for sequence in decoded if sequence.finish == "error"]:
                    raise not_finite(len(failed), len(decoded), len(failed[0].tokens) + 1)
                self._report(batch, [(batch.samples[sequence.number], sequence) for sequence in decoded], on_text)
        routing: list[Tensor | None] = [None] * len(sequences)
        if record is not None:
            routing[:] = record.of([sequence.number for sequence in sequences])
        return [self._completion(*pair) for pair in zip(sequences, routing, strict=True)]

    def _prefilled(
        self, sequences: abc.Sequence[Sequence], batch: GenerationBatch, record: RoutingRecord | None
    ) -> ModelRunner:
        """The sequences after their prompts, each of which runs through the network once."""
        steps = backend_of(self.model, self.batch_invariant)
        cache = steps.new_cache(drafts=batch.drafts)
        runner: ModelRunner[Sequence] = ModelRunner(
            steps, self.tokenizer, cache, batch.drafts, record, batch.record_kept
        )
        prompts = [(cache.open(ids), list(group)) for ids, group in groupby(sequences, attrgetter("request.prompt"))]
        for prompt, _ in prompts:
            cache.extend(prompt, len(prompt.ids))
        heartbeat.beat()
        runner.admit(prompts, runner.prefill([PrefillChunk(prompt, len(prompt.ids)) for prompt, _ in prompts]))
        return runner

    def _report(self, batch: GenerationBatch, decoded: list[tuple[Sample, Sequence]], on_text: OnText | None) -> None:
        """Passes the tokens since the last call to on_tokens, and the texts of sequences that have ended to on_text."""
        if batch.on_tokens is not None:
            batch.on_tokens([(s.prompt, s.sample, token) for s, q in decoded for token in q.tokens[q.n_emitted :]])
            for _, sequence in decoded:
                sequence.n_emitted = len(sequence.tokens)
        for sample, sequence in decoded if on_text is not None else ():
            if on_text is not None and sequence.finish is not None:
                on_text(sample.prompt, sample.sample, self._text(sequence))

    def _text(self, sequence: Sequence) -> str:
        text, strings = self.tokenizer.decode(sequence.tokens), sequence.request.stop_strings
        return cut_at_stop(text, strings) if strings else text

    def _completion(self, sequence: Sequence, routing: Tensor | None) -> Completion:
        return Completion(
            tokens=sequence.tokens[:],  # without room to grow
            text=self._text(sequence),
            logprobs=sequence.logp[:],
            finish_reason="stop" if sequence.finish == "stop" else "length",
            prompt_tokens=len(sequence.request.prompt),
            routing=routing,
            kept=KeptTokens.of(sequence.kept_ids, sequence.kept_counts) if sequence.kept_counts else None,
        )


def load_engine(model_dir: str | Path, drafts: int = 0) -> Engine:
    """Loads the model and tokenizer of a Hugging Face directory onto this machine's device. MTP layers are loaded only
    for drafting."""
    model = load(model_dir, device=probe.device(), mtp=drafts > 0)
    engine = Engine(model, load_tokenizer(model_dir))
    check_drafts(engine.model, drafts)
    return engine
