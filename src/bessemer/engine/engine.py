"""`Engine` turns prompts into completions, for RL rollouts, evaluation, `bessemer generate` and chat.

On a CPU samples run in static batches, with one prefill per distinct prompt of a batch (a prompt's samples are split
only where they exceed a batch): batches go to processes, one for each core, and their kernels do not profit from rows
that are refilled. On a GPU all samples of a call go through one `Scheduler`, as many at a time as memory holds. Results
do not depend on either: every sample has its own random stream, identified by the seed, the prompt's tokens and the
sample's number.

Shapes: B live sequences, L sparse layers, K experts per token.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import abc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bessemer import heartbeat
from bessemer.config.places import read_text
from bessemer.data.tokenizer import Tokenizer
from bessemer.engine import room, static_steps
from bessemer.engine.compiled import CompiledSteps
from bessemer.engine.decode import Model, RoutingTrace, new_cache, whole_prompts
from bessemer.engine.grammar import Grammars
from bessemer.engine.kept_tokens import KeptTokens
from bessemer.engine.kernel_steps import KernelSteps
from bessemer.engine.model_runner import ModelRunner, not_finite
from bessemer.engine.routing_record import RoutingRecord
from bessemer.engine.sampling import stream_key
from bessemer.engine.scheduler import Scheduler
from bessemer.engine.sequence import (
    Finished,
    Request,
    SamplingParams,
    Sequence,
    StopStrings,
    Token,
    check_positive,
    check_stop_strings,
    cut_at_stop,
)
from bessemer.engine.speculative import check_drafts
from bessemer.engine.static_steps import Steps
from bessemer.errors import UserError
from bessemer.hf.causal_lm import CausalLM, load_any
from bessemer.hf.hf_tokenizer import load_tokenizer
from bessemer.model.transformer import Transformer, evaluating
from bessemer.precision import probe
from bessemer.workers import Workers

Prompt = str | abc.Sequence[int]
PREFILL = 8192
"""Prompt tokens that a step prefills at most where a call's samples go through a scheduler."""
GATHER = 16
"""One in so many rows may be idle until prompts are prefilled together: each prefill takes as many launches as several
steps."""
FEW = 8
"""Rows up to which steps that are kept have room for the whole context."""
NEW_TOKENS = 2048
"""Length of an answer where nobody asks for one; most contexts of small models leave less."""
OnTokens = Callable[[list[tuple[int, int, int]]], None]


@dataclass(frozen=True)
class Completion:
    """One sample."""

    tokens: list[int]
    """Generated ids, the stop id included."""
    text: str
    """Decoded without control tokens, up to the stop string if one ended it."""
    logprobs: list[float]
    """Of each token under softmax(logits / temperature), as the trainer computes it: without truncation, or over the
    kept tokens where they are recorded. Temperature 0 counts as 1."""
    raw_logprobs: list[float]
    """The same at temperature 1, always without truncation."""
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    routing: Tensor | None = field(default=None, compare=False, repr=False)
    """Experts chosen by every token in every sparse layer, [prompt_tokens + len(tokens) - 1, L, K], uint8 or int16: the
    last token is never fed to the model, so it chose none. None unless requested."""
    kept: KeptTokens | None = field(default=None, compare=False, repr=False)
    """The tokens that truncation left at every token. None unless requested."""


@dataclass(frozen=True)
class _Sample:
    """One sample to generate."""

    prompt: int
    """Index into the caller's prompts."""
    sample: int
    request: Request


@dataclass(frozen=True)
class GenerationBatch:
    """Samples that are generated together, in whichever process."""

    samples: list[_Sample]
    stop_strings: list[str]
    on_tokens: OnTokens | None
    record_routing: bool
    drafts: int
    record_kept: bool = False


@dataclass(frozen=True)
class GenerationPlan:
    """A call of `Engine.generate`, divided into batches."""

    batches: list[GenerationBatch]
    prompts: int
    samples: int

    def gather(self, results: Iterable[list[Completion]]) -> list[list[Completion]]:
        """`samples` completions of each prompt, in order, from the completions of each batch, in order."""
        gathered: dict[tuple[int, int], Completion] = {}
        for batch, completions in zip(self.batches, results, strict=True):
            for sample, completion in zip(batch.samples, completions, strict=True):
                gathered[sample.prompt, sample.sample] = completion
        return [[gathered[p, k] for k in range(self.samples)] for p in range(self.prompts)]


class Engine:
    """Generates with a model and its tokenizer. No state outlives a call, so the model may be trained in between."""

    def __init__(self, model: Model, tokenizer: Tokenizer, workers: Workers | None = None, compile: bool = False):
        """compile: on a CPU where no kernel serves (`kernel_steps`), decoding steps go through torch.compile
        (`compiled`)."""
        if tokenizer.vocab_size > model.cfg.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} tokens but the model only {model.cfg.vocab_size}; they do "
                "not belong together: load both from one directory"
            )
        if isinstance(model, Transformer):
            model.cfg.require_latent("the engine")
        if isinstance(model, CausalLM):
            from bessemer.engine import hf_decode  # noqa: F401 (registers foreign models; needs transformers)
        self.model = model
        self.tokenizer = tokenizer
        self.grammars = Grammars(tokenizer)
        self.compiled: CompiledSteps | None = None
        self.not_compiled = ""
        """Why `compile` has compiled nothing, for the user."""
        if compile and static_steps.serves(model):
            self.not_compiled = "--compile: nothing to compile, the steps of a GPU are CUDA graphs of its own kernels"
        elif compile and KernelSteps.of(model) is not None:
            self.not_compiled = "--compile: nothing to compile, faster kernels in C++ serve this model"
        elif compile:
            self.compiled = CompiledSteps(model, tokenizer.vocab_size)
        self.rows = 0
        """Samples that decode together on a GPU; 0: as many as its memory holds."""
        self.keeps_memory = False
        """Between calls, the buffers and graphs on a GPU; only where nobody else needs its memory."""
        self._steps: Steps | None = None
        self.workers = workers or Workers(1)
        """Processes that run batches in parallel; their number does not change the result."""

    def generate(
        self, prompts: abc.Sequence[Prompt], *, on_tokens: OnTokens | None = None, **options: Any
    ) -> list[list[Completion]]:
        """`samples` completions of each prompt, in order; the options are those of `plan`.

        on_tokens is called after each step with (prompt index, sample, token) of every sample that is still running.
        """
        plan = self.plan(prompts, on_tokens=on_tokens, **options)
        if on_tokens is None and not self._continuous(plan.batches):
            return plan.gather(self.workers.map(self.run, plan.batches))
        return plan.gather(self.run_all(plan.batches))

    def plan(
        self,
        prompts: abc.Sequence[Prompt],
        *,
        samples: int = 1,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop_ids: Iterable[int] | None = None,
        stop_strings: Iterable[str] | None = None,
        batch_rows: int = 512,
        seeds: abc.Sequence[int] | None = None,
        on_tokens: OnTokens | None = None,
        record_routing: bool = False,
        drafts: int = 0,
        record_kept: bool = False,
    ) -> GenerationPlan:
        """Batches of at most `batch_rows` samples; `run` generates one, in this or another process with these weights.

        A prompt is text (the start of a document: BOS is prepended) or ids, used as given. stop_ids None: the ids that
        end a text or an answer in this tokenizer. A sample also ends at the model's max_seq_len. Sample k of a prompt
        is the same whatever else is in the call; when a prompt occurs twice, the second occurrence continues the
        numbering of the first. `seeds`, one per prompt, replaces seed and prompt as the identity of the streams: sample
        k is then a function of (seeds[p], k).
        record_routing fills `Completion.routing`; it changes nothing else. record_kept fills `Completion.kept`; its
        log-probabilities are then of the truncated distribution, which was sampled from.
        drafts: number of tokens that the MTP module drafts per step (`speculative`). Greedy answers stay the same;
        sampled ones have the same distribution but use other random numbers. Useful for few samples.
        """
        sampling = SamplingParams(temperature, top_p, top_k, min_p, repetition_penalty)
        check_positive(samples=samples, max_new_tokens=max_new_tokens, batch_rows=batch_rows)
        if record_routing and all(layer.dense for layer in self.model.layers):
            raise UserError("record_routing: no layer of this model has routed experts; leave it off")
        if check_drafts(self.model, drafts) and record_routing:
            raise UserError("record_routing and drafts do not go together; leave one of them off")
        if record_kept and drafts:
            raise UserError("record_kept and drafts do not go together; leave one of them off")
        if record_kept and (not sampling.truncated or sampling.penalised):
            raise UserError(
                "record_kept records what truncation leaves; give a temperature above 0 with top_p, top_k or min_p, "
                "and no penalty"
            )
        strings = check_stop_strings(stop_strings)
        stop_ids = tuple(self.tokenizer.stop_ids if stop_ids is None else stop_ids)
        max_seq_len = self.model.cfg.max_seq_len

        def request(ids: tuple[int, ...], key: int) -> Request:
            room = min(max_new_tokens, max_seq_len - len(ids))
            return Request(ids, key, room, sampling, stop_ids, tuple(strings))

        all_samples = self._samples(self._encode(prompts), samples, seed, seeds, request)
        batches = [
            GenerationBatch(batch, strings, on_tokens, record_routing, drafts, record_kept)
            for batch in _batches(all_samples, batch_rows)
        ]
        return GenerationPlan(batches, len(prompts), samples)

    def _encode(self, prompts: abc.Sequence[Prompt]) -> list[tuple[int, ...]]:
        if isinstance(prompts, str):
            raise UserError(f"prompts must be a list; write [{prompts[:20]!r}]")
        texts = iter(self.tokenizer.encode_batch([p for p in prompts if isinstance(p, str)]))
        bos = () if self.tokenizer.bos_id is None else (self.tokenizer.bos_id,)
        encoded = [(*bos, *next(texts)) if isinstance(p, str) else tuple(int(i) for i in p) for p in prompts]
        for number, ids in enumerate(encoded):
            self.check_prompt(ids, f"prompt {number}")
        return encoded

    def check_prompt(self, ids: abc.Sequence[int], name: str = "the prompt") -> None:
        """UserError for a prompt that cannot be answered."""
        max_seq_len, vocab = self.model.cfg.max_seq_len, self.model.cfg.vocab_size
        if not ids:
            raise UserError(f"{name} is empty; give at least the tokenizer's bos_id")
        if len(ids) >= max_seq_len:
            raise UserError(
                f"{name} has {len(ids)} tokens; the model's max_seq_len {max_seq_len} leaves no room for an answer. "
                "Shorten the prompt"
            )
        if not 0 <= min(ids) <= max(ids) < vocab:
            bad = next(i for i in ids if not 0 <= i < vocab)
            raise UserError(f"{name} contains token id {bad}, outside the model's vocabulary of {vocab}")

    def _samples(
        self,
        encoded: list[tuple[int, ...]],
        samples: int,
        seed: int,
        seeds: abc.Sequence[int] | None,
        request: Callable[[tuple[int, ...], int], Request],
    ) -> list[_Sample]:
        """All samples, with equal prompts next to each other and prompts sorted by length."""
        if seeds is not None and len(seeds) != len(encoded):
            raise UserError(f"seeds has {len(seeds)} entries for {len(encoded)} prompts; give one per prompt")
        result: list[_Sample] = []
        seen: dict[tuple[int, ...], int] = {}
        for p, ids in enumerate(encoded):
            first = 0 if seeds is not None else seen.get(ids, 0)
            seen[ids] = first + samples
            stream = (seeds[p],) if seeds is not None else (seed, prompt_digest(ids))
            result += [_Sample(p, k, request(ids, stream_key(*stream, first + k))) for k in range(samples)]
        return sorted(result, key=lambda sample: (len(sample.request.prompt), sample.request.prompt))

    def run(self, batch: GenerationBatch) -> list[Completion]:
        """One completion of each sample in the batch."""
        return self.run_all([batch])[0]

    def run_all(self, batches: abc.Sequence[GenerationBatch]) -> list[list[Completion]]:
        """`run` of every batch in this process: one after another, or on a GPU all together."""
        if self._continuous(batches):
            try:
                return self._run_continuously(batches)
            finally:
                if not self.keeps_memory:
                    self.release()
        return [self._run_batch(batch) for batch in batches]

    def release(self) -> None:
        """Gives back the GPU's memory that `keeps_memory` keeps."""
        if self._steps is not None:
            self._steps = None
            torch.cuda.empty_cache()

    def _continuous(self, batches: abc.Sequence[GenerationBatch]) -> bool:
        return bool(batches) and static_steps.serves(self.model)

    def _run_continuously(self, batches: abc.Sequence[GenerationBatch]) -> list[list[Completion]]:
        """All samples through one scheduler, those of a batch one after another in the queue."""
        samples = [(batch, sample) for batch in batches for sample in batch.samples]
        record = RoutingRecord() if any(batch.record_routing for batch in batches) else None
        with evaluating(self.model), torch.inference_mode():
            longest = max(len(s.request.prompt) + s.request.max_new_tokens for _, s in samples)
            drafts = batches[0].drafts
            steps = self._steps_for(self.rows or len(samples), longest, drafts)
            # prompts with a known beginning would be prefilled one by one, which costs more than computing it again
            scheduler = Scheduler(
                self, rows=steps.rows, prefill_tokens=PREFILL, drafts=drafts, steps=steps, record=record,
                prefix_cache=False, gather=max(1, steps.rows // GATHER), kept=batches[0].record_kept,
            )  # fmt: skip
            started = [(batch, sample, scheduler.start(sample.request)) for batch, sample in samples]
            by_ticket = {sequence.number: (batch, sample) for batch, sample, sequence in started}
            while not scheduler.idle:
                heartbeat.beat()
                events = scheduler.step()
                if failed := [e for e in events if isinstance(e, Finished) and e.reason == "error"]:
                    bad = next(s for *_, s in started if s.number == failed[0].ticket)
                    raise not_finite(len(failed), len(scheduler.runner.sequences) + len(failed), len(bad.tokens) + 1)
                _pass_on(events, by_ticket)
            routing: list[Tensor | None] = [None] * len(started)
            if record is not None:
                routing[:] = record.of([sequence.number for *_, sequence in started])
        completions = iter(self._completion(s, routed) for (*_, s), routed in zip(started, routing, strict=True))
        return [[next(completions) for _ in batch.samples] for batch in batches]

    def _steps_for(self, rows: int, row_tokens: int, drafts: int) -> Steps:
        """Static steps for up to `rows` rows, fewer where memory holds fewer: those of the last call, if they are large
        enough and no weight has moved."""
        model, steps = self.model, self._steps
        fits = steps is not None and steps.asked >= rows and steps.row_tokens >= row_tokens and steps.depth == drafts
        if steps is None or not fits or not steps.current:
            self.release()
            steps = None
            free = room.free_bytes(model.embed.weight.device)
            whole = model.cfg.max_seq_len
            if self.keeps_memory and rows <= FEW and room.fits(model, rows, whole, PREFILL, free, drafts):
                row_tokens = whole  # a conversation grows: its steps are captured once
            fit = room.rows_that_fit(model, row_tokens, PREFILL, free, drafts)
            n = rows if fit is None or self.rows else min(rows, fit)
            cache_tokens, vocab = n * (row_tokens + static_steps.ahead(drafts)), self.tokenizer.vocab_size
            self._steps = room.make_steps(model, vocab, n, row_tokens, cache_tokens, PREFILL, room.SPARE, drafts)
            self._steps.asked = rows
        assert self._steps is not None
        return self._steps

    def _run_batch(self, batch: GenerationBatch) -> list[Completion]:
        stop = StopStrings(self.tokenizer, batch.stop_strings) if batch.stop_strings else None
        sequences = [Sequence(sample.request, number, stop) for number, sample in enumerate(batch.samples)]
        by_prompt = {ids: list(same) for ids, same in groupby(sequences, key=lambda s: s.request.prompt)}
        model, trace, record = self.model, None, RoutingRecord()
        if batch.record_routing and isinstance(model, Transformer):
            trace = RoutingTrace(model.cfg)
        with evaluating(model), torch.inference_mode():
            cache = new_cache(model, drafts=batch.drafts)
            runner = ModelRunner(
                model, self.tokenizer, cache, trace, batch.drafts, self.compiled, kept=batch.record_kept
            )
            prompts = [cache.open(ids) for ids in by_prompt]
            logits_PV = torch.cat([runner.prefill(batch) for batch in whole_prompts(cache, prompts)])
            runner.admit(list(zip(prompts, by_prompt.values(), strict=True)), logits_PV)
            for prompt in prompts if trace is not None else ():
                record.start([sequence.number for sequence in by_prompt[prompt.ids]], torch.cat(prompt.routing))
            while runner.sequences:
                heartbeat.beat()
                runner.sample()
                if failed := [s for s in runner.sequences if s.finish == "error"]:
                    raise not_finite(len(failed), len(runner.sequences), len(failed[0].tokens) + 1)
                _emit(batch, runner.sequences)
                runner.retire()
                if runner.sequences:
                    runner.advance()
                    if runner.expert_BLK is not None:
                        record.add_step([s.number for s in runner.sequences], runner.expert_BLK)
                    if batch.drafts:
                        _emit(batch, runner.sequences)
                        runner.retire()
        routing: list[Tensor | None] = [None] * len(sequences)
        if trace is not None:
            routing[:] = record.of([sequence.number for sequence in sequences])
        return [self._completion(*both) for both in zip(sequences, routing, strict=True)]

    def _completion(self, sequence: Sequence, routing: Tensor | None) -> Completion:
        text, strings = self.tokenizer.decode(sequence.tokens), sequence.request.stop_strings
        return Completion(
            tokens=sequence.tokens,
            text=cut_at_stop(text, strings) if strings else text,
            logprobs=sequence.logp,
            raw_logprobs=sequence.raw_logp,
            finish_reason="stop" if sequence.finish == "stop" else "length",
            prompt_tokens=len(sequence.request.prompt),
            routing=routing,
            kept=KeptTokens.of(sequence.kept_ids, sequence.kept_counts) if sequence.kept_counts else None,
        )


def _emit(batch: GenerationBatch, sequences: list[Sequence]) -> None:
    """Passes the tokens since the last call to on_tokens."""
    if batch.on_tokens is None:
        return
    running = [(batch.samples[sequence.number], sequence) for sequence in sequences]
    batch.on_tokens([(s.prompt, s.sample, token) for s, seq in running for token in seq.tokens[seq.n_emitted :]])
    for sequence in sequences:
        sequence.n_emitted = len(sequence.tokens)


def _pass_on(
    events: abc.Sequence[Token | Finished], by_ticket: abc.Mapping[int, tuple[GenerationBatch, _Sample]]
) -> None:
    """The tokens of a scheduler's step to on_tokens."""
    for batch, own in groupby(
        (event for event in events if isinstance(event, Token)), key=lambda event: by_ticket[event.ticket][0]
    ):
        if batch.on_tokens is not None:
            pairs = [(by_ticket[event.ticket][1], event.token) for event in own]
            batch.on_tokens([(sample.prompt, sample.sample, token) for sample, token in pairs])


def _batches(samples: list[_Sample], batch_rows: int) -> Iterator[list[_Sample]]:
    """Batches of at most batch_rows; the samples of one prompt stay together where they fit into a batch."""
    batch: list[_Sample] = []
    for _, group in groupby(samples, key=lambda sample: sample.request.prompt):
        same = list(group)
        if batch and len(batch) + len(same) > batch_rows:
            yield batch
            batch = []
        for sample in same:
            if len(batch) == batch_rows:
                yield batch
                batch = []
            batch.append(sample)
    if batch:
        yield batch


def prompt_digest(ids: abc.Sequence[int]) -> int:
    """64 bits of a prompt's ids, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(tuple(ids)).encode(), digest_size=8).digest(), "little")


def load_engine(model_dir: str | Path, drafts: int = 0, compile: bool = False) -> Engine:
    """Model and tokenizer of a Hugging Face directory, on this machine's device. MTP layers are loaded only for
    drafting. compile: the decoding steps are compiled now, for calls with this many drafts."""
    model = load_any(model_dir, device=probe.device(), mtp=drafts > 0)
    engine = Engine(model, load_tokenizer(model_dir), compile=compile)
    engine.keeps_memory = True
    check_drafts(engine.model, drafts)
    if engine.compiled is not None:
        print(
            "compiling the decoding steps: a minute or two the first time, seconds later", file=sys.stderr, flush=True
        )
        engine.compiled.prepare(drafts)
    elif engine.not_compiled:
        print(engine.not_compiled, file=sys.stderr, flush=True)
    return engine


def about_cuts(completions: abc.Sequence[Completion], asked: int | None, context: int) -> list[str]:
    """What a user should know about texts that did not end by themselves; `asked`: the option --max-tokens."""
    rooms = [context - one.prompt_tokens for one in completions]
    cut = [(one, room) for one, room in zip(completions, rooms, strict=True) if one.finish_reason == "length"]
    full = sum(len(one.tokens) >= room for one, room in cut)
    of = f" of {len(completions)} texts" if len(completions) > 1 else " text"
    notes = []
    if asked is not None and asked > min(rooms):
        notes.append(f"--max-tokens {asked}: the context of {context} tokens leaves {min(rooms)} after the prompt")
    if len(cut) > full:
        more = f"--max-tokens, here at most {max(rooms)}, lets it go on"
        notes.append(f"{len(cut) - full}{of} cut at {asked or NEW_TOKENS} tokens; {more}")
    if full:
        notes.append(f"{full}{of} cut where the model's context of {context} tokens is full")
    return notes


def read_prompts(file: str | Path) -> list[str]:
    """The prompts of a file: its lines, or with the extension .jsonl the field "prompt" of every object."""
    lines = read_text(Path(file), "file of prompts").splitlines()
    if Path(file).suffix != ".jsonl":
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
