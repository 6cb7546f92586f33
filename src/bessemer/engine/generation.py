"""The plan of an `Engine.generate` call: which samples it has, and which of them are generated together.

The plan depends only on the arguments, the tokenizer and the model's sizes. So every process of a call makes the same
plan, and any process with the weights can generate any batch.
"""

from __future__ import annotations

import hashlib
import inspect
from array import array
from collections import abc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal, TypedDict, TypeVar

from torch import Tensor

from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.kept_tokens import KeptTokens
from bessemer.engine.random_streams import stream_key
from bessemer.engine.sequence import Request, SamplingParams, check_positive, check_stop_strings
from bessemer.engine.speculative import check_drafts
from bessemer.errors import UserError
from bessemer.model.protocol import LanguageModel

Prompt = str | abc.Sequence[int]
NEW_TOKENS = 2048
"""Length limit of an answer if none is given; the contexts of most small models leave less."""
OnTokens = Callable[[list[tuple[int, int, int]]], None]
"""Called after each step with (prompt index, sample, token) for every new token."""
OnText = Callable[[int, int, str], None]
"""Called with (prompt index, sample, text) for every sample, as soon as it is complete."""


@dataclass(frozen=True)
class Completion:
    """One sample. It takes 8 bytes a token beside its text, which `numpy.frombuffer` reads without a copy."""

    tokens: array[int]
    """Generated ids, the stop id included; int32."""
    text: str
    """Decoded without control tokens, up to the stop string if one ended it."""
    logprobs: array[float]
    """Of each token under softmax(logits / temperature), as the trainer computes it: without truncation, or over the
    kept tokens if they are recorded. Temperature 0 counts as 1. float32."""
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    routing: Tensor | None = field(default=None, compare=False, repr=False)
    """Experts chosen by every token in every sparse layer, [prompt_tokens + len(tokens) - 1, L, K], uint8 or int16: the
    last token is never fed to the model, so it chose none. None unless requested."""
    kept: KeptTokens | None = field(default=None, compare=False, repr=False)
    """The tokens that truncation kept at each position. None unless requested."""


@dataclass(frozen=True)
class Sample:
    """One sample to generate."""

    prompt: int
    """Index into the caller's prompts."""
    sample: int
    request: Request


@dataclass(frozen=True)
class GenerationBatch:
    """Samples that are generated together, in any process."""

    samples: list[Sample]
    on_tokens: OnTokens | None = None
    record_routing: bool = False
    record_kept: bool = False
    drafts: int = 0


@dataclass(frozen=True)
class GenerationPlan:
    """A call of `Engine.generate`, divided into batches."""

    batches: list[GenerationBatch]
    prompts: int
    samples: int

    def announced(self, results: Iterable[list[Completion]], on_text: OnText | None) -> Iterator[list[Completion]]:
        """The completions of each batch, each passed to on_text when its batch arrives."""
        for batch, completions in zip(self.batches, results, strict=True):
            for sample, completion in zip(batch.samples, completions, strict=True):
                if on_text is not None:
                    on_text(sample.prompt, sample.sample, completion.text)
            yield completions

    def gather(self, results: Iterable[list[Completion]]) -> list[list[Completion]]:
        """`samples` completions of each prompt, in order, from the completions of each batch, in order."""
        gathered: dict[tuple[int, int], Completion] = {}
        for batch, completions in zip(self.batches, results, strict=True):
            for sample, completion in zip(batch.samples, completions, strict=True):
                gathered[sample.prompt, sample.sample] = completion
        return [[gathered[p, k] for k in range(self.samples)] for p in range(self.prompts)]


class Options(TypedDict, total=False):
    """The options of `Engine.generate`, for editors and type checkers; `CallOptions` has their defaults."""

    samples: int
    """Completions of each prompt."""
    max_new_tokens: int
    """Most tokens of a completion."""
    temperature: float
    """Divides the logits; 0 takes the most likely token."""
    top_p: float
    """Keep the most likely tokens that together hold this mass; 1 keeps all."""
    top_k: int
    """Keep the k most likely tokens; 0 keeps all."""
    min_p: float
    """Keep tokens at least this fraction as likely as the most likely one; 0 keeps all."""
    seed: int
    """The same seed gives the same completions."""
    stop_ids: Iterable[int] | None
    """Tokens that end a completion; None: those that end a text or an answer in this tokenizer."""
    stop_strings: Iterable[str] | None
    """Strings that end a completion; they are not part of its text."""
    batch_rows: int
    """Most samples that a CPU generates together."""
    seeds: abc.Sequence[int] | None
    """One per prompt, in place of seed and prompt as the identity of the random streams: sample k of prompt p is then a
    function of (seeds[p], k)."""
    record_routing: bool
    """Fill `Completion.routing`. It changes nothing else."""
    drafts: int
    """Tokens that the MTP module drafts per step (`speculative`). Greedy answers stay the same; sampled ones have the
    same distribution but use other random numbers. Useful for few samples."""
    record_kept: bool
    """Fill `Completion.kept`. Log-probabilities are then those of the truncated distribution that was sampled from."""


@dataclass(frozen=True)
class CallOptions:
    """The options of one call."""

    samples: int = 1
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    stop_ids: Iterable[int] | None = None
    stop_strings: Iterable[str] | None = None
    batch_rows: int = 512
    seeds: abc.Sequence[int] | None = None
    record_routing: bool = False
    drafts: int = 0
    record_kept: bool = False

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(self.temperature, self.top_p, self.top_k, self.min_p)

    def check(self, model: LanguageModel) -> None:
        """UserError for options that do not go together or that the model cannot meet."""
        check_positive(samples=self.samples, max_new_tokens=self.max_new_tokens, batch_rows=self.batch_rows)
        if self.record_routing and not model.routes:
            raise UserError("record_routing: no layer of this model has routed experts; leave it off")
        if check_drafts(model, self.drafts) and self.record_routing:
            raise UserError("record_routing and drafts cannot be combined; leave one of them off")
        if self.record_kept and self.drafts:
            raise UserError("record_kept and drafts cannot be combined; leave one of them off")
        if self.record_kept and not self.sampling.truncated:
            raise UserError(
                "record_kept records what truncation keeps; give a temperature above 0 with top_p, top_k or min_p"
            )


Method = TypeVar("Method", bound=Callable[..., object])


def spelled_out(method: Method) -> Method:
    """Shows the options and their defaults in the signature of a method that takes `**options`, for `help` and
    notebooks."""
    signature, own = inspect.signature(method), inspect.signature(CallOptions).parameters
    parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    parameters += [own[name].replace(kind=inspect.Parameter.KEYWORD_ONLY) for name in Options.__annotations__]
    method.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return method


def plan(
    model: LanguageModel, tokenizer: Tokenizer, prompts: abc.Sequence[Prompt], call: CallOptions,
    on_tokens: OnTokens | None = None,
) -> GenerationPlan:  # fmt: skip
    """Batches of at most `batch_rows` samples; `Engine.run` generates one, in any process with these weights.

    A prompt is text (the start of a document: BOS is prepended) or ids, used as given. A sample also ends at the
    model's max_seq_len. Sample k of a prompt is the same whatever else is in the call; when a prompt occurs twice, the
    second occurrence continues the numbering of the first.
    """
    call.check(model)
    strings = tuple(check_stop_strings(call.stop_strings))
    stop_ids = tuple(tokenizer.stop_ids if call.stop_ids is None else call.stop_ids)
    max_seq_len = model.cfg.max_seq_len

    def request(ids: tuple[int, ...], key: int) -> Request:
        room = min(call.max_new_tokens, max_seq_len - len(ids))
        return Request(ids, key, room, call.sampling, stop_ids, strings)

    all_samples = _samples(_encode(model, tokenizer, prompts), call, request)
    batches = [
        GenerationBatch(batch, on_tokens, call.record_routing, call.record_kept, call.drafts)
        for batch in _batches(all_samples, call.batch_rows)
    ]
    return GenerationPlan(batches, len(prompts), call.samples)


def check_prompt(model: LanguageModel, ids: abc.Sequence[int], name: str = "the prompt") -> None:
    """UserError for a prompt that is empty, leaves no room for an answer, or has ids outside the vocabulary."""
    max_seq_len, vocab = model.cfg.max_seq_len, model.cfg.vocab_size
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


def _encode(model: LanguageModel, tokenizer: Tokenizer, prompts: abc.Sequence[Prompt]) -> list[tuple[int, ...]]:
    if isinstance(prompts, str):
        raise UserError(f"prompts must be a list; write [{prompts[:20]!r}]")
    texts = iter(tokenizer.encode_batch([p for p in prompts if isinstance(p, str)]))
    bos = () if tokenizer.bos_id is None else (tokenizer.bos_id,)
    encoded = [(*bos, *next(texts)) if isinstance(p, str) else tuple(int(i) for i in p) for p in prompts]
    for number, ids in enumerate(encoded):
        check_prompt(model, ids, f"prompt {number}")
    return encoded


def _samples(
    encoded: list[tuple[int, ...]], call: CallOptions, request: Callable[[tuple[int, ...], int], Request]
) -> list[Sample]:
    """All samples, with equal prompts next to each other and prompts sorted by length."""
    seeds, samples = call.seeds, call.samples
    if seeds is not None and len(seeds) != len(encoded):
        raise UserError(f"seeds has {len(seeds)} entries for {len(encoded)} prompts; give one per prompt")
    result: list[Sample] = []
    seen: dict[tuple[int, ...], int] = {}
    for p, ids in enumerate(encoded):
        first = 0 if seeds is not None else seen.get(ids, 0)
        seen[ids] = first + samples
        stream = (seeds[p],) if seeds is not None else (call.seed, prompt_digest(ids))
        result += [Sample(p, k, request(ids, stream_key(*stream, first + k))) for k in range(samples)]
    return sorted(result, key=lambda sample: (len(sample.request.prompt), sample.request.prompt))


def _batches(samples: list[Sample], batch_rows: int) -> Iterator[list[Sample]]:
    """Batches of at most batch_rows; the samples of one prompt stay together if they fit into a batch."""
    batch: list[Sample] = []
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
