"""From what a request says to what the scheduler is asked: sampling, lengths, ends, random streams."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

from bessemer.engine.engine import prompt_digest
from bessemer.engine.sampling import stream_key
from bessemer.engine.sequence import MIN_TEMPERATURE, Request, SamplingParams
from bessemer.serve.errors import invalid, too_long, unsupported
from bessemer.serve.models import Loaded
from bessemer.serve.protocol import Generation

DEFAULTED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""What generation_config.json may decide where a request does not."""


def sampling(body: Generation, defaults: dict[str, Any]) -> SamplingParams:
    """How tokens are drawn. A temperature too small for float32, or a top_p of 0, means the likeliest token."""
    values = {name: getattr(body, name) for name in DEFAULTED}
    values = {name: defaults.get(name) if value is None else value for name, value in values.items()}
    values |= {name: getattr(body, name) for name in ("presence_penalty", "frequency_penalty")}
    given = {name: value for name, value in values.items() if value is not None}
    if given.get("top_k") == -1:
        given["top_k"] = 0
    if given.get("top_p") == 0:
        given |= {"top_p": 1.0, "temperature": 0.0}
    if given.get("temperature", 1.0) < MIN_TEMPERATURE:
        given["temperature"] = 0.0
    return SamplingParams(**given)


def requests(
    body: Generation, model: Loaded, prompts: Sequence[tuple[int, ...]], *, most: int | None, param: str,
    top: int = 0, thinking_budget: int | None = None, client: str = "",
) -> list[Request]:  # fmt: skip
    """n samples of each prompt, side by side. `most`: new tokens (None: what the context leaves); `param`: the field
    that holds the prompts."""
    if body.logit_bias:
        raise unsupported("logit_bias", "logit_bias is not supported; use stop or the penalties")
    if body.return_routing and not model.facts.sparse_layers:
        what = "return_routing: no layer of this model has routed experts"
        raise invalid(what, "return_routing", "routing_unavailable")
    how = sampling(body, model.facts.sampling)
    stops = () if body.stop is None else (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
    ends = () if body.ignore_eos else model.stop_ids
    ends += tuple(body.stop_token_ids or ())
    seed = secrets.randbits(63) if body.seed is None else body.seed
    context = model.facts.context
    made = []
    for ids in prompts:
        if len(ids) >= context:
            raise too_long(len(ids), context, param)
        room = context - len(ids)
        made += [
            Request(
                ids, stream_key(seed, prompt_digest(ids), k), room if most is None else min(most, room), how, ends,
                stops, top, bool(body.return_routing), thinking_budget, client,
            )
            for k in range(body.n or 1)
        ]  # fmt: skip
    return made


def room(model: Loaded, prompt_tokens: int, most: int | None) -> int:
    """New tokens that an answer to such a prompt may have."""
    left = max(0, model.facts.context - prompt_tokens)
    return left if most is None else min(most, left)


def client_of(address: str, body: Generation) -> str:
    """Whose turn a waiting request takes."""
    return f"{address} {body.user or ''}"
