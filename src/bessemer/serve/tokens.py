"""/tokenize, /detokenize and /tokenizer_info, in the form that vLLM gave them and lm-eval's remote tokenizer reads."""

from __future__ import annotations

import asyncio

from bessemer.serve import prompt
from bessemer.serve.chat import LONG_TEXT
from bessemer.serve.errors import invalid
from bessemer.serve.models import Loaded
from bessemer.serve.protocol import DetokenizeRequest, TokenizeRequest
from bessemer.serve.replies import TokenizerInfo, Tokens


async def tokenize(body: TokenizeRequest, model: Loaded) -> Tokens:
    if (body.prompt is None) == (body.messages is None):
        raise invalid("give either prompt or messages", "prompt")
    tokenizer, vocabulary = model.tokenizer, model.vocabulary

    def ids() -> list[int]:
        if body.messages is not None:
            return list(prompt.of(tokenizer, body.messages).ids)
        return vocabulary.prompt_ids(body.prompt, body.add_special_tokens is not False)

    size = len(body.prompt or "") + sum(len(text) for turn in body.messages or () for text in prompt.texts(turn))
    found = ids() if size < LONG_TEXT else await asyncio.to_thread(ids)
    names = [vocabulary.name(i) for i in found]
    return Tokens(tokens=found, count=len(found), max_model_len=model.facts.context, token_strs=names)


def detokenize(body: DetokenizeRequest, model: Loaded) -> str:
    tokenizer = model.tokenizer
    if bad := [i for i in body.tokens if i >= tokenizer.vocab_size]:
        raise invalid(f"token id {bad[0]} is outside the vocabulary of {tokenizer.vocab_size}", "tokens")
    return tokenizer.decode(body.tokens, skip_special=False)


def info(model: Loaded) -> TokenizerInfo:
    tokenizer = model.tokenizer
    name = lambda i: None if i is None else tokenizer.token_bytes(i).decode("utf-8", "replace")  # noqa: E731
    return TokenizerInfo(
        tokenizer_class="PreTrainedTokenizerFast", bos_token=name(tokenizer.bos_id), eos_token=name(tokenizer.eos_id),
        pad_token=name(tokenizer.pad_id), chat_template=tokenizer.chat_template or None,
    )  # fmt: skip
