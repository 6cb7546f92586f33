"""The value that a text states as its answer without a box or tags, in the sentences in which models state one:
`#### 42`, "the answer is 42", `**Answer:** 42`, 答案是42, or a last sentence that ends "is **42**". Quoted text and
sentences that deny or suppose state nothing.
"""

import re
from itertools import islice

MOST = 64
"""Maximum number of statements of a kind that are read."""
LAST = 4_000
"""Characters at the end of a text that are searched: its conclusion."""
_END = r"(?=[*_]{0,4}(?:[.。!！]?[*_]{0,4}[ \t]*$|[.。!！][ \t]))"
_VALUE = (
    r"(?P<value>\$\$?[^$\n]{1,300}\$\$?|\\\(.{1,300}?\\\)|\\\[\s*+(?=\S).{1,300}?\s*+\\\]|(?:(?!\banswer\b)[^\n]){1,120}?)"
    rf"{_END}"
)
_VALUES = (
    re.compile(rf"^####[ \t]*{_VALUE}", re.MULTILINE),
    re.compile(
        rf"\b(?i:answer)(?: to the (?:question|problem))?[*_]{{0,4}}(?:(?: is"
        rf"|[ \t]*[:：])[*_]{{0,4}})+\s{{0,3}}[*_]{{0,4}}{_VALUE}"
        rf"|答案(?:应?[是为]|[:：])[*_]{{0,4}}[:：]?\s{{0,2}}[*_]{{0,4}}(?P<zh>[^\n，。]{{1,120}}?){_END}",
        re.MULTILINE,
    ),
    re.compile(r"\bis:?[ \t]+\*\*(?P<value>[^*\n]{1,120})\*\*[.!]?\s*\Z"),
)
"""From the plainest on; what an earlier one finds, the later are not asked for."""
QUOTED = re.compile('"[^"\n]{0,300}"|“[^”\n]{0,300}”|「[^」\n]{0,300}」|^[ \t]*>.*$|`[^`\n]{0,300}`', re.MULTILINE)
DENIED = re.compile(
    r"\b(?:[Ii]f|[Ss]uppose|[Aa]ssum\w+|[Ss]aying|[Uu]nless|[Ww]hether|[Ww]hy|might|may|could|would have|not"
    r"|never|neither|rather than|instead of|except|wrong|incorrect|false|tempting|seems?|appears?|looks?|mistake\w*)\b"
    r"|n['’]t\b"
    r"|如果|假如|假设|若|不(?!等)|可能|错误|是否",
)
SENTENCE_START = re.compile(r"(?:[.!?。！？；;]\s|[。！？；\n，]|, (?:so|therefore|thus|hence|but) )")


def values(text: str) -> list[str]:
    """Every value that a text states, at most MOST."""
    plain = QUOTED.sub(lambda match: " " * len(match[0]), text[-LAST:])
    for pattern in _VALUES:
        matches = [match for match in islice(pattern.finditer(plain), MOST) if not DENIED.search(_before(plain, match))]
        if matches:
            return [next(filter(None, match.groups())).strip(" *_") for match in matches]
    return []


def _before(text: str, match: re.Match[str]) -> str:
    """The sentence up to the beginning of a match."""
    first = max(0, match.start() - 300)
    ends = [sentence.end() for sentence in SENTENCE_START.finditer(text, first, match.start() + 1)]
    return text[ends[-1] if ends else first : match.start()]
