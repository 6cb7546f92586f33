"""Completions made by hand."""

from array import array

from bessemer.engine.generation import Completion


def completion(tokens, text="", logprobs=None, finish_reason="stop", prompt_tokens=1, **fields):
    """`logprobs` None: -1 for every token."""
    logprobs = [-1.0] * len(tokens) if logprobs is None else logprobs
    return Completion(array("i", tokens), text, array("f", logprobs), finish_reason, prompt_tokens, **fields)
