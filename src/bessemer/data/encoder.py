"""Encodes batches of documents as arrays of ids. The tokenizers library does the work, unless an add-on's hook `encode`
brings a faster implementation with the same ids.
"""

from collections.abc import Callable, Sequence

import numpy as np

from bessemer import plugins
from bessemer.data import chat
from bessemer.data.tokenizer import Tokenizer

EncodeBatch = Callable[[Sequence[str]], list[np.ndarray] | None]
"""The int32 ids of each text; None if it cannot encode one of them."""


class Encoder:
    """`encode_batch` for one tokenizer, in this thread, and the ids around a document."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.opening = np.array([] if tokenizer.bos_id is None else [tokenizer.bos_id], np.int32)
        """Ids at the start of a document."""
        self.ending = np.array([tokenizer.end_id], np.int32)
        """Ids at the end of a document."""
        self._faster = faster(tokenizer)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 ids of each text."""
        if self._faster is not None and (ids := self._faster(texts)) is not None:
            return ids
        return [np.array(ids, np.int32) for ids in self._tokenizer.encode_batch(texts)]

    def conversation(self, messages: Sequence[chat.Message]) -> list[int]:
        """The ids of a conversation, without those at the start and end of a document."""
        ids = chat.render_ids(self._tokenizer, messages, add_generation_prompt=False)
        begin, end = self.opening.tolist(), self.ending.tolist()  # a template may write neither, or only one
        ids = ids[len(begin) :] if ids[: len(begin)] == begin else ids
        return ids[: -len(end)] if ids[-len(end) :] == end else ids


def faster(tokenizer: Tokenizer) -> EncodeBatch | None:
    """What the hook `encode` makes for this tokenizer; None without a hook, or if it does not serve the tokenizer."""
    make = plugins.hook("encode")
    return None if make is None else make(tokenizer)
