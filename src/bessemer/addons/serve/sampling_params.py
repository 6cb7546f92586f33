"""From the fields of a request to the scheduler's requests: sampling, lengths, stops, random streams."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from bessemer.addons.serve.models import LoadedModel
from bessemer.addons.serve.penalties import PenaltyParams
from bessemer.addons.serve.protocol import Generation, invalid
from bessemer.addons.serve.requests import ServedRequest
from bessemer.addons.serve.token_controls import TokenRules
from bessemer.engine.generation import prompt_digest
from bessemer.engine.random_streams import stream_key
from bessemer.engine.sequence import MIN_TEMPERATURE, SamplingParams, check_stop_strings
from bessemer.errors import UserError

DEFAULTED = ("temperature", "top_p", "top_k", "min_p")
"""Fields whose default is in generation_config.json."""


def sampling(body: Generation, defaults: dict[str, Any]) -> SamplingParams:
    """How tokens are sampled. A temperature too small for float32, or a top_p of 0, means the likeliest token."""
    params = _given(body, DEFAULTED, defaults)
    if params.get("top_k") == -1:
        params["top_k"] = 0
    if params.get("top_p") == 0:
        params |= {"top_p": 1.0, "temperature": 0.0}
    if params.get("temperature", 1.0) < MIN_TEMPERATURE:
        params["temperature"] = 0.0
    return SamplingParams(**params)


def penalties(body: Generation, defaults: dict[str, Any], vocab_size: int) -> PenaltyParams:
    """How earlier tokens and biases change the logits."""
    params = _given(body, ("repetition_penalty",), defaults)
    params |= _given(body, ("presence_penalty", "frequency_penalty"), {})
    return PenaltyParams(**params, bias=_bias(body.logit_bias or {}, vocab_size))


def _given(body: Generation, names: Iterable[str], defaults: dict[str, Any]) -> dict[str, Any]:
    values = {name: getattr(body, name) for name in names}
    values = {name: defaults.get(name) if value is None else value for name, value in values.items()}
    return {name: value for name, value in values.items() if value is not None}


def _bias(biases: dict[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    for name in biases:
        if not (name.isascii() and name.isdigit() and len(name) < 10 and int(name) < vocab_size):
            raise invalid(f"logit_bias: {name!r} is not a token id below {vocab_size}", "logit_bias")
    return tuple(sorted((int(name), value) for name, value in biases.items()))


def requests(
    body: Generation,
    model: LoadedModel,
    prompts: Sequence[tuple[int, ...]],
    *,
    client: str,
    max_tokens: int | None,
    param: str,
    top: int,
    thinking_budget: int | None = None,
    grammar: str = "",
    grammar_waits: bool = False,
) -> list[ServedRequest]:
    """n consecutive samples of each prompt; equal prompts get different ones. `client`: the sender's address;
    `max_tokens`: most new tokens (None: what `room` leaves); `param`: the field that holds the prompts."""
    if body.return_routing and not model.facts.sparse_layers:
        what = "return_routing: no layer of this model has routed experts"
        raise invalid(what, "return_routing", "routing_unavailable")
    stop_ids = () if body.ignore_eos else model.stop_ids
    stop_strings = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    try:
        check_stop_strings(stop_strings)
    except UserError as error:
        raise invalid(str(error), "stop") from None
    params = sampling(body, model.facts.sampling)
    changes = penalties(body, model.facts.sampling, model.tokenizer.vocab_size)
    ends = tuple(stop_ids) if grammar_waits else ()
    control = TokenRules(changes, thinking_budget, grammar, grammar_waits, ends).or_none()
    seed = secrets.randbits(63) if body.seed is None else body.seed
    for ids in prompts:
        if len(ids) >= model.facts.context:
            raise model.too_long(len(ids), param)
    numbers: Counter[tuple[int, ...]] = Counter()
    served: list[ServedRequest] = []
    for ids in prompts:
        digest, first, n = prompt_digest(ids), numbers[ids], body.n or 1
        numbers[ids] += n
        request = ServedRequest(
            ids,
            0,
            max_new_tokens=room(model, len(ids), max_tokens),
            sampling=params,
            stop_ids=(*stop_ids, *(body.stop_token_ids or ())),
            stop_strings=stop_strings,
            top=top,
            routing=bool(body.return_routing),
            control=control,
            client=client,
            user=body.user or "",
        )
        served += [replace(request, key=stream_key(seed, digest, first + k)) for k in range(n)]
    return served


def room(model: LoadedModel, prompt_tokens: int, max_tokens: int | None) -> int:
    """Most new tokens in an answer to such a prompt. Without `max_tokens` the answer stays within the positions that
    the model was trained on, unless the prompt already fills them."""
    remaining = max(0, model.facts.context - prompt_tokens)
    if max_tokens is not None:
        return min(max_tokens, remaining)
    trained = (model.facts.practice.trained_length or 0) - prompt_tokens
    return min(remaining, trained) if trained > 0 else remaining
