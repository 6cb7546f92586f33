"""Whether a sampler computes what the trainer computes: log-probabilities of a few tokens on both sides.

A sampler with kernels of its own goes wrong without an error: a rotary embedding in another form, experts in another
order, or a reload of weights that changes nothing. RL then trains on samples of a policy that nobody has, and its
reward falls or stays.

    at the start              the sampler writes a short answer, and the trainer computes the log-probabilities of its
                              tokens: prefill and decoding are compared
    after every exchange      each worker computes the log-probabilities of that answer from the weights it has just
                              loaded, and compares them with those that the trainer sent along: no old or mixed weights

The gap of real samples is a metric of every rollout (rl/sampler_gap, rl/sampler_kl), with an alarm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from bessemer.data.chat import question_ids
from bessemer.data.tokenizer import Tokenizer
from bessemer.engine.generation import Completion, Options
from bessemer.errors import UserError
from bessemer.model.protocol import LanguageModel
from bessemer.train.loss import token_logprobs

BOUNDS = {"float32": 1e-3, "bfloat16": 0.1}
"""The greatest gap that is taken for rounding, nats per token: of the mean without the greatest tenth, since rounding
sends a few tokens to other experts. Seen in float32, vLLM against the trainer: 1e-6; old weights after two updates of a
small network: 0.0095 (bench/broken_samplers.py)."""
TOKENS = 48
"""Length of the answer."""
QUESTION = "Write a short text."


class Probe(NamedTuple):
    """An answer, and what the trainer's weights make of it."""

    ids: list[int]
    """Prompt and answer."""
    logprobs: list[float]
    """Of every id after the first, under softmax(logits)."""
    dtype: str
    """In which the trainer computed them."""


def dtype_of(model: LanguageModel) -> str:
    """The name of the dtype of its weights: "bfloat16"."""
    return str(model.head_weight.dtype).removeprefix("torch.")


def short_answer(
    generate: Callable[..., list[list[Completion]]], tokenizer: Tokenizer, temperature: float = 1.0
) -> tuple[list[int], Completion]:
    """(prompt, the answer that the sampler writes to it), for the check at the start."""
    prompt = question_ids(tokenizer, QUESTION)
    options = Options(max_new_tokens=TOKENS, temperature=temperature, seeds=[0], stop_ids=[])
    ((answer,),) = generate([prompt], **options)
    return prompt, answer


@torch.no_grad()
def logprobs(model: LanguageModel, ids: Sequence[int], temperature: float = 1.0) -> list[float]:
    """Of every id after the first, under softmax(logits / temperature)."""
    row_BT = torch.tensor([ids], device=model.embed.weight.device)
    hidden_BTD = model.train_outputs(row_BT, mtp=False).hidden_BTD
    return token_logprobs(hidden_BTD[0, :-1], model.head_weight, row_BT[0, 1:], temperature).logp.tolist()


def check(sampler: Sequence[float], trainer: Sequence[float], dtypes: Sequence[str], sampler_name: str) -> float:
    """The gap between log-probabilities of the same tokens. UserError if it is more than rounding in the coarsest of
    `dtypes`."""
    gaps = torch.tensor(sampler).sub(torch.tensor(trainer)).abs()
    gap = gaps.sort().values[: -(-9 * len(gaps) // 10)].mean().item() if gaps.isfinite().all() else math.nan
    dtype = max(dtypes, key=BOUNDS.__getitem__)
    bound = BOUNDS[dtype]
    if not gap <= bound:
        worst = int(gaps.argmax())
        raise UserError(
            f"{sampler_name} does not compute what the trainer computes: the log-probabilities of {len(gaps)} tokens "
            f"differ by {gap:.3g} on average (token {worst}: {sampler[worst]:.3g} against {trainer[worst]:.3g}), where "
            f"rounding in {dtype} makes less than {bound:g}. Likely causes: weights that were loaded in part or not at "
            "all; an operation that this build of the sampler computes otherwise (rotary embedding, gate); another "
            'model in its folder. rollout.engine = "ray" or "local" samples with the trainer\'s own code; the same '
            "command resumes from the last checkpoint"
        )
    return gap
