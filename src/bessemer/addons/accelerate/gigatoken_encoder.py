"""gigatoken encodes documents for tokenizers with V3's pre-split, several times faster than the tokenizers library and
with the same ids. Only the version whose ids were compared is used; without it, nothing changes.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from bessemer.data.tokenizer import CJK, DIGITS, WORDS, Tokenizer

GIGATOKEN, MOST_CHARACTERS = "0.10.0", 1 << 26
"""The version whose ids we compared, at every code point too; and the characters after which its cache is reset."""


class GigatokenEncoder:
    def __init__(self, tokenizer: Tokenizer, encoder: Any) -> None:
        self._tokenizer, self._encoder, self._seen = tokenizer, encoder, 0

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray] | None:
        self._seen += sum(map(len, texts))
        if self._seen > MOST_CHARACTERS:
            self._encoder, self._seen = gigatoken_of(self._tokenizer), 0
        if not texts:
            return []
        try:
            encoded = self._encoder.encode_batch([*texts], parallel=False).layout
        except TypeError:  # a lone surrogate: the tokenizer says where
            return None
        return np.split(np.asarray(encoded.content.data, np.int32), encoded.offsets.data[1:-1].astype(np.int64))


def faster(tokenizer: Tokenizer) -> GigatokenEncoder | None:
    encoder = gigatoken_of(tokenizer) if has_v3_split(tokenizer) else None
    return None if encoder is None else GigatokenEncoder(tokenizer, encoder)


def gigatoken_of(tokenizer: Tokenizer) -> Any:
    """gigatoken's form of a tokenizer with V3's pre-split. None if that version is not installed, or if added tokens
    can overlap: here control tokens are text but take part in the search, and gigatoken does not know them."""
    with suppress(PackageNotFoundError):
        added = tokenizer.spec["added_tokens"]
        ordinary = [token for token in added if not token["special"]]
        names = [[token["content"] for token in some] for some in (ordinary, added)]
        if version("gigatoken") != GIGATOKEN or any(can_overlap(a, b) for a in names[0] for b in names[1] if a != b):
            return None
        from gigatoken import Tokenizer as Gigatoken

        spec = json.loads(json.dumps(tokenizer.spec)) | {"added_tokens": ordinary}
        for part in spec["pre_tokenizer"]["pretokenizers"]:
            if rule := part.get("pattern"):  # it knows only the published spelling
                rule["Regex"] = rule["Regex"].replace(r"\r", "\r").replace(r"\n", "\n").replace(r"\"", '"')
        return Gigatoken.from_json(json.dumps(spec))
    return None


def can_overlap(first: str, second: str) -> bool:
    ends = range(1, min(len(first), len(second)))
    return first in second or second in first or any(first[-k:] == second[:k] or second[-k:] == first[:k] for k in ends)


def has_v3_split(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer's pre-split is V3's and no earlier step changes the text."""
    if type(tokenizer) is not Tokenizer or tokenizer.spec.get("normalizer") is not None:
        return False
    spec = tokenizer.spec
    if any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in spec["added_tokens"]):
        return False
    steps = (spec.get("pre_tokenizer") or {}).get("pretokenizers", [])
    patterns = [step.get("pattern", {}).get("Regex") for step in steps[:-1]]
    isolated = all(step.get("behavior") == "Isolated" and not step.get("invert") for step in steps[:-1])
    last = steps[-1] if steps else {}
    plain = last.get("type") == "ByteLevel" and not last.get("add_prefix_space") and not last.get("use_regex")
    return patterns == [DIGITS, CJK, WORDS] and isolated and plain
