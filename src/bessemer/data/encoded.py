"""Documents as the ids that go into shards: on which side each falls, and what V3 does to those of training."""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from bessemer.data.augment import Augment
from bessemer.data.document import Document
from bessemer.data.encoder import Encoder


def is_heldout(text: str, share: float) -> bool:
    """Whether a document belongs to the held-out part."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def tokenised(
    documents: Sequence[Document], encoder: Encoder, heldout: float, augment: Augment
) -> Iterator[tuple[Document, str, np.ndarray]]:
    """(document, "train" or "heldout", BOS + ids + EOS) of each; training documents as `augment` makes them."""
    plain = encoder.encode_batch([document.text for document in documents])
    for document, ids in zip(documents, plain, strict=True):
        part = "heldout" if is_heldout(document.text, heldout) else "train"
        inner = augment(document.text, ids) if part == "train" else ids
        yield document, part, np.concatenate([encoder.opening, inner, encoder.ending], dtype=np.int32)
