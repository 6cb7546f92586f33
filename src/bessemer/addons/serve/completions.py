"""POST /v1/completions: raw text or ids, several prompts at once, `echo` and `logprobs`.

With `echo` the prompt is part of the answer; with `logprobs` as well, each prompt token but the first is scored given
those before it. A BOS that the server prepended to a text is not listed, because the client did not send it; the text's
first token then has a log-probability too. So positions refer to the text as sent, which lm-eval relies on.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any, NamedTuple

from bessemer.addons.serve import sampling_params
from bessemer.addons.serve.events import MIN_LOGPROB, ChoiceBuilder, Responder, likeliest
from bessemer.addons.serve.models import LoadedModel, Vocabulary
from bessemer.addons.serve.protocol import CompletionRequest, invalid, unsupported
from bessemer.addons.serve.reasoning_parser import AnswerEvent, ReasoningParser
from bessemer.addons.serve.requests import Finished, ServedRequest, Token
from bessemer.addons.serve.service import Gone, Stream
from bessemer.addons.serve.worker import Scored
from bessemer.engine.sequence import FinishReason

MOST_LOGPROBS = 1 << 19
"""Most log-probabilities of prompts in one answer: a second of work, during which no other request is served."""


class TextPrompt(NamedTuple):
    """One prompt."""

    ids: tuple[int, ...]
    added: int
    """Ids at the front that the server prepended."""
    text: str
    """What `echo` repeats."""


class CompletionResponder(Responder):
    """A request to continue texts."""

    id_prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, body: CompletionRequest, model: LoadedModel, prompts: Sequence[TextPrompt], client: str):
        _check(body, model, prompts)
        self.body, self.prompts, self.tokenizer = body, prompts, model.tokenizer
        self.tables = [LogprobTable(model.vocabulary, body.logprobs) for _ in range(len(prompts) * (body.n or 1))]
        requests = (
            []
            if body.max_tokens == 0
            else sampling_params.requests(
                body,
                model,
                [prompt.ids for prompt in prompts],
                client=client,
                max_tokens=16 if body.max_tokens is None else body.max_tokens,
                param="prompt",
                top=body.logprobs or 0,
            )
        )
        choices = [self._choice(request) for request in requests] or [self._choice(None) for _ in self.tables]
        super().__init__(body, model, requests, choices, sum(len(prompt.ids) for prompt in prompts))

    def _choice(self, request: ServedRequest | None) -> ChoiceBuilder:
        """Without a request, the answer is only the echo."""
        if request is None:
            return ChoiceBuilder(ReasoningParser(self.tokenizer), finish_reason="length")
        return ChoiceBuilder(ReasoningParser(self.tokenizer, request.stop_strings, split=False), request.stop_ids)

    async def submit(self, gone: Gone) -> Stream | None:
        if self.body.echo:
            await self._echo(gone)
        return await super().submit(gone)

    def opening(self) -> Sequence[dict[str, Any]]:
        return [{"text": table.text, "logprobs": table.take()} for table in self.tables] if self.body.echo else ()

    def fields(self, n: int, event: AnswerEvent) -> dict[str, Any]:
        self.tables[n].add(event)
        return {"text": event.text, "logprobs": self.tables[n].take()}

    def whole_fields(self, n: int, events: Sequence[AnswerEvent]) -> dict[str, Any]:
        for event in events:
            self.tables[n].add(event)
        return {"text": self.tables[n].text, "logprobs": self.tables[n].take()}

    async def _echo(self, gone: Gone) -> None:
        """Begins every answer with its prompt. If the request asks for one greedy token and scored prompts, as lm-eval
        does, the scores already contain the whole answer."""
        scores: dict[int, Scored] = {}
        if (top := self.body.logprobs) is not None:
            scores = await self.model.service.score([prompt.ids for prompt in self.prompts], top, gone)
        greedy = scores and all(_is_one_greedy_token(request) for request in self.requests)
        for n, table in enumerate(self.tables):
            prompt = n // (self.body.n or 1)
            table.begin(self.prompts[prompt], scores.get(prompt))
            if greedy and self.requests:
                self.precomputed += _likeliest_token(n, self.requests[n], scores[prompt])


class LogprobTable:
    """The text of one choice as it grows, and its `logprobs` object."""

    def __init__(self, vocabulary: Vocabulary, top: int | None):
        self.vocabulary, self.top = vocabulary, top
        self.text = ""
        self._rows: list[tuple[str, float | None, dict[str, float] | None, int]] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0
        """Complete characters of text in the tokens so far."""

    def begin(self, prompt: TextPrompt, scored: Scored | None) -> None:
        """Adds the prompt, which comes first."""
        self.text += prompt.text
        if scored is None:
            return
        for i in range(prompt.added, len(prompt.ids)):
            if i:
                self._row(prompt.ids[i], scored.logprobs[i - 1], scored.tops[i - 1])
            else:
                self._row(prompt.ids[i], None, ())

    def add(self, event: AnswerEvent) -> None:
        self.text += event.text
        for token in event.tokens if self.top is not None else ():
            self._row(token.token, token.raw_logprob, likeliest(token))

    def take(self) -> dict[str, Any] | None:
        """The rows added since the last call; None if the request does not ask for them."""
        if self.top is None:
            return None
        rows, self._rows = self._rows, []
        columns = list(zip(*rows, strict=True)) or [()] * 4
        names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        logprobs = {name: list(column) for name, column in zip(names, columns, strict=True)}
        return logprobs if self.top else logprobs | {"top_logprobs": None}

    def _row(self, token_id: int, logprob: float | None, top: Sequence[tuple[int, float]]) -> None:
        top_logprobs: dict[str, float] | None = None
        if logprob is not None:
            logprob = max(logprob, MIN_LOGPROB)
            top_logprobs = {}
            for i, value in (*top[: self.top], (token_id, logprob)):
                # if two tokens have the same name, the likelier one counts
                other = self.vocabulary.name(i)
                top_logprobs[other] = max(value, top_logprobs.get(other, MIN_LOGPROB))
        name, raw = self.vocabulary.name(token_id), self.vocabulary.text(token_id)
        start, self._offset = self._offset, self._offset + len(self._decoder.decode(raw))
        if raw == name.encode():  # comes after the replacement mark of an unfinished character
            start = self._offset - len(name)
        self._rows.append((name, logprob, top_logprobs, start))


async def prepare(body: CompletionRequest, model: LoadedModel, client: str) -> CompletionResponder:
    """The request for this model. Raises ApiError or UserError if it cannot be served."""
    if isinstance(body.prompt, list) and (body.max_tokens, body.n or 1) != (0, 1):  # scoring alone takes one place
        count = 1 if isinstance(next(iter(body.prompt), 0), int) else len(body.prompt)
        model.service.admit(count * (body.n or 1))
    texts = [body.prompt] if isinstance(body.prompt, str) else [p for p in body.prompt if isinstance(p, str)]
    if texts:
        model.check_length(max(map(len, texts)), "prompt")
        encode = lambda: [_text_prompt(text, model, body.add_special_tokens is not False) for text in texts]  # noqa: E731
        prompts = await model.tokenise(encode, sum(map(len, texts)))
    else:
        token_ids = [i for i in body.prompt if isinstance(i, int)]
        lists = [token_ids] if token_ids else [ids for ids in body.prompt if isinstance(ids, list)]
        if (most := max(map(len, lists), default=0)) > model.facts.context:
            raise model.too_long(most, "prompt")
        decode, known = model.tokenizer.decode, model.tokenizer.vocab_size
        text = lambda ids: decode(i for i in ids if i < known) if body.echo else ""  # noqa: E731
        prompts = await model.tokenise(
            lambda: [TextPrompt(tuple(ids), 0, text(ids)) for ids in lists], sum(map(len, lists))
        )
    return CompletionResponder(body, model, prompts, client)


def _text_prompt(text: str, model: LoadedModel, begin: bool) -> TextPrompt:
    ids = model.vocabulary.prompt_ids(text, begin)
    return TextPrompt(tuple(ids), len(ids) - len(model.vocabulary.prompt_ids(text, False)), text)


def _check(body: CompletionRequest, model: LoadedModel, prompts: Sequence[TextPrompt]) -> None:
    if not prompts:
        raise invalid("prompt is an empty list; give a text or ids", "prompt")
    if body.best_of is not None and body.best_of not in (0, body.n or 1):
        raise unsupported("best_of", "best_of is not supported; ask for n samples and choose among them")
    if body.suffix:
        raise unsupported("suffix", "suffix is not supported: the answer follows its prompt")
    if body.max_tokens == 0 and not body.echo:
        raise invalid("max_tokens 0 leaves nothing to answer without echo", "max_tokens")
    for ids, *_ in prompts:
        if not ids:
            raise invalid("a prompt is empty; give at least one token", "prompt")
        if len(ids) > model.facts.context:
            raise model.too_long(len(ids), "prompt")
        if max(ids) >= model.service.facts.vocabulary:
            raise invalid(f"token id {max(ids)} is outside the model's vocabulary", "prompt")
    if body.echo and body.logprobs is not None:
        rows = sum(len(prompt.ids) for prompt in prompts) * (body.n or 1)
        if rows * (body.logprobs + 1) > MOST_LOGPROBS:
            what = f"the answer would list {rows} prompt tokens with {body.logprobs} alternatives each"
            raise invalid(f"{what}; send fewer or shorter texts, or ask for fewer samples or alternatives", "prompt")


def _is_one_greedy_token(request: ServedRequest) -> bool:
    plain = request.sampling.temperature == 0 and request.control is None
    return plain and request.max_new_tokens == 1 and not request.routing and not request.stop_strings


def _likeliest_token(n: int, request: ServedRequest, scored: Scored) -> list[Token | Finished]:
    token, logprob = scored.tops[-1][0]
    reason: FinishReason = "stop" if token in request.stop_ids else "length"
    return [Token(n, token, logprob, logprob, scored.tops[-1][: request.top]), Finished(n, reason)]
