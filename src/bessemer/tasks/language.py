"""Whether thoughts keep to the language of the question: the measure behind R1's reward R_lang (R1 2.3.2).

`share` is the share of target-language words. A word is a run of two or more Latin letters, or one Han character.
Digits, operators, names of one letter, the think and answer tags belong to no language, nor does notation: code and
formulas, which the tasks of an add-on use, and which its hook `notation` takes out of a text.
"""

import re

from bessemer import plugins
from bessemer.errors import UserError
from bessemer.tasks.answer import plain_fault, prose, summary, thought

_WORD = re.compile(
    "</?(?:think|answer)>|([A-Za-z]{2,})|([\u3400-\u4dbf\u4e00-\u9fff])"
    "|([\u0400-\u06ff\u0900-\u0eff\u3040-\u30ff\uac00-\ud7af]{2,})"  # other scripts; Greek is mathematics
)


def share(text: str, language: str) -> float:
    """Share of words in `language` ("en" or "zh"); 1.0 for a text without words."""
    if language not in ("en", "zh"):
        raise UserError(f"language {language!r} is not supported; use 'en' or 'zh'")
    latin = han = other = 0
    notation = plugins.hook("notation")
    for match in _WORD.finditer(text if notation is None else notation(text)):
        latin += match[1] is not None
        han += match[2] is not None
        other += match[3] is not None
    if latin + han + other == 0:
        return 1.0
    return (latin if language == "en" else han) / (latin + han + other)


def consistency(completion: str, language: str) -> float:
    """R_lang of a completion: `share` of its thoughts, or of its summary if a plain reply has blank thoughts. 0 for a
    completion that skips the thoughts it should have, so that skipping earns nothing."""
    thoughts = thought(completion)
    if thoughts.strip():
        return share(thoughts, language)
    return share(summary(completion), language) if plain_fault(completion) is None else 0.0


def reply_consistency(completion: str, language: str) -> float:
    """The smaller of `consistency` and the summary's `share` without the answer itself."""
    return min(consistency(completion, language), share(prose(completion), language))
