"""How much of a text is in the language it should be in: the measure behind R1's language-consistency reward.

R1 takes the share of target-language words in the chain of thought (R_lang, first RL stage). A word here is a run of
Latin letters or one Han character; digits, operators and punctuation belong to no language, nor do the think and answer
tags.
"""

import re

from bessemer.errors import UserError
from bessemer.tasks.answer import plain_fault, summary, thought

_WORD = re.compile("</?(?:think|answer)>|([A-Za-z]+)|([\u3400-\u4dbf\u4e00-\u9fff])")


def share(text: str, language: str) -> float:
    """Share of words in `language` ("en" or "zh"); 1.0 for a text without words, where nothing is amiss."""
    if language not in ("en", "zh"):
        raise UserError(f"no language {language!r} is known here; use 'en' or 'zh'")
    latin = han = 0
    for match in _WORD.finditer(text):
        latin += match[1] is not None
        han += match[2] is not None
    if latin + han == 0:
        return 1.0
    return (latin if language == "en" else han) / (latin + han)


def consistency(completion: str, language: str) -> float:
    """R_lang of a completion: `share` of its thoughts; of its summary where a plain reply had nothing to think about.
    0 for one that does not think where it should, which must not pay."""
    thoughts = thought(completion)
    if thoughts.strip():
        return share(thoughts, language)
    return share(summary(completion), language) if plain_fault(completion) is None else 0.0
