"""IFEval's verifiable instructions (Zhou et al. 2023): "answer in at least 300 words", "no commas", and 23 others.

An instruction is an id and its arguments, as the public data set states them (`instruction_id_list`, `kwargs`); `check`
rejects what no checker here can judge, and `follows` judges a reply. A reply follows a prompt if it follows all its
instructions, read strictly: R1's figure is this prompt-level strict accuracy.

The checkers are ours and agree with the published ones, except where those need a download or are wrong:
  sentences        a full stop ends one unless an abbreviation, an initial or a lower-case word says otherwise
                   (published: nltk's punkt model)
  language         fastText's lid.176 (published: langdetect)
  capital words    split at spaces and punctuation (published: nltk's tokenizer, which also divides "DON'T")
  forbidden words  a text that no letter or digit touches (published: "c++" as a pattern, which also forbids "c")
  letter           any character counts as stated (published: for "!" or "#" a letter is drawn at random)
Keywords are texts, not patterns, and every checker takes time linear in the reply, which is hostile text.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from bessemer.errors import UserError

CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
LESS, AT_LEAST = RELATIONS = ("less than", "at least")
_ABBREVIATION = re.compile(
    r"mrs?|ms|dr|prof|[js]r|st|vs|etc|e\.g|i\.e|inc|ltd|co|corp|no|vol|fig|al|approx|dept|est|gen|gov|sen|rep|"
    r"jan|feb|mar|apr|ju[nl]|aug|sept?|oct|nov|dec|u\.[skn]|[ap]\.m|ph\.d|[a-hj-z]"
)
"""Also an initial, other than the pronoun I."""
_BETWEEN_WORDS = re.compile(r"(?:[\s;@#$%&?!()\[\]{}<>\"*`«“‘„»”’]|[,:](?![0-9]))+|--+")
_PARAGRAPHS = re.compile(r"\s?\*\*\*\s?")
_FENCES = ("```json", "```Json", "```JSON", "```")


def follows(instruction: str, arguments: dict[str, Any], reply: str) -> bool:
    """Whether the reply follows one instruction; an empty one follows none."""
    return bool(reply.strip()) and _CHECKS[instruction].judge(reply, **arguments)


def check(instruction: object, arguments: object, where: str) -> dict[str, Any]:
    """The arguments that an instruction's checker needs; UserError, which begins with `where`, if they do not fit."""
    if instruction not in _CHECKS:
        raise UserError(f"{where}: {instruction!r} in instruction_id_list is not one of IFEval's instructions")
    if not isinstance(arguments, dict):
        raise UserError(f"{where}: kwargs holds no object for {instruction}")
    needed = {}
    for name, kind in _CHECKS[str(instruction)].arguments.items():
        value = arguments.get(name)
        fits = isinstance(value, kind) and not isinstance(value, bool) and value != "" and value != []
        if not fits or ("relation" in name and value not in RELATIONS):
            raise UserError(f"{where}: kwargs of {instruction} needs {name!r}, {_KINDS[kind]}, but has {value!r}")
        if isinstance(value, list) and not all(isinstance(item, str) and item for item in value):
            raise UserError(f"{where}: kwargs of {instruction}: {name!r} contains something that is not text")
        needed[name] = value
    return needed


def sentences(text: str) -> int:
    """Number of sentences in an English text; a remainder without a full stop counts as one."""
    words, count, open_sentence = text.split(), 0, False
    for word, following in zip(words, [*words[1:], ""], strict=False):
        bare = word.strip("\"'“”‘’()[]*_")
        inside = bare.endswith(".") and _ABBREVIATION.fullmatch(bare[:-1].lower())
        open_sentence = not bare.endswith((".", "!", "?")) or bool(following and (inside or following[0].islower()))
        count += not open_sentence
    return count + open_sentence


def _in(reply: str, code: str) -> bool:
    from bessemer.addons.curate.filters import language  # its imports are slow

    return language(reply)[0] == code.split("-")[0].lower()


def _compare(count: int, relation: str, bound: int) -> bool:
    return count < bound if relation == LESS else count >= bound


def _count(reply: str, text: str) -> int:
    return len(re.findall(re.escape(text), reply, re.IGNORECASE))


def _word_in(reply: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", reply, re.IGNORECASE) is not None


def _paragraphs(reply: str, num_paragraphs: int) -> bool:
    """Paragraphs between `***`; only the first and the last may be blank."""
    parts = [part.strip() for part in _PARAGRAPHS.split(reply)]
    return all(parts[1:-1]) and sum(map(bool, parts)) == num_paragraphs


def _first_word(reply: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    parts = [part.strip() for part in reply.split("\n\n")]
    count = sum(map(bool, parts))
    if not 1 <= nth_paragraph <= count == num_paragraphs or not parts[nth_paragraph - 1]:
        return False
    word = parts[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    return re.split("[.,?!'\"]", word)[0].lower() == first_word.lower()


def _placeholders(reply: str, num_placeholders: int) -> bool:
    """`[...]` on one line."""
    count = 0
    for line in reply.split("\n"):
        close = -1
        while (opening := line.find("[", close + 1)) >= 0 and (close := line.find("]", opening)) >= 0:
            count += 1
    return count >= num_placeholders


def _postscript(reply: str, postscript_marker: str) -> bool:
    patterns = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return re.search(patterns.get(postscript_marker, re.escape(postscript_marker.lower())), reply.lower()) is not None


def _bullets(reply: str, num_bullets: int) -> bool:
    lines = [line.lstrip() for line in reply.split("\n")]
    starred = sum(line.startswith("*") and line[1:2] not in ("", "*") for line in lines)
    return starred + sum(line.startswith("-") for line in lines) == num_bullets


def _highlights(reply: str, num_highlights: int) -> bool:
    once = [text for text in re.findall(r"\*[^\n*]*\*", reply) if text.strip("*").strip()]
    twice = [text for text in re.findall(r"\*\*[^\n*]*\*\*", reply) if text[2:-2].strip()]
    return len(once) + len(twice) >= num_highlights


def _sections(reply: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"{re.escape(section_spliter.strip())}\s?[0-9]+", reply)) >= num_sections


def _json(reply: str) -> bool:
    reply = reply.strip()
    for fence in _FENCES:
        reply = reply.removeprefix(fence)
    try:
        json.loads(reply.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _title(reply: str) -> bool:
    """`<<...>>` on one line."""
    for line in reply.split("\n"):
        opening, close = line.find("<<"), line.rfind(">>")
        if opening >= 0 and close >= opening + 3 and line[opening : close + 2].lstrip("<").rstrip(">").strip():
            return True
    return False


def _two_replies(reply: str) -> bool:
    parts = [part.strip() for part in reply.split("******")]
    filled = [part for part in parts if part]
    return all(parts[1:-1]) and len(filled) == 2 and filled[0] != filled[1]


def _capitals(reply: str, capital_frequency: int, capital_relation: str) -> bool:
    count = sum(word.isupper() for word in _BETWEEN_WORDS.split(reply))
    return _compare(count, capital_relation, capital_frequency)


def _quoted(reply: str) -> bool:
    reply = reply.strip()
    return len(reply) > 1 and reply[0] == reply[-1] == '"'


def _ends(reply: str, end_phrase: str) -> bool:
    return reply.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _repeats(reply: str, prompt_to_repeat: str) -> bool:
    return reply.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _keywords(reply: str, keywords: Sequence[str]) -> bool:
    return all(_count(reply, keyword) for keyword in keywords)


def _forbidden(reply: str, forbidden_words: Sequence[str]) -> bool:
    return not any(_word_in(reply, word) for word in forbidden_words)


class _Check(NamedTuple):
    judge: Callable[..., bool]
    arguments: dict[str, type]


_KINDS = {str: "text", int: "a whole number", list: "a list of strings"}
_CHECKS = {
    "keywords:existence": _Check(_keywords, {"keywords": list}),
    "keywords:frequency": _Check(
        lambda reply, keyword, frequency, relation: _compare(_count(reply, keyword.strip()), relation, frequency),
        {"keyword": str, "frequency": int, "relation": str},
    ),
    "keywords:forbidden_words": _Check(_forbidden, {"forbidden_words": list}),
    "keywords:letter_frequency": _Check(
        lambda reply, letter, let_frequency, let_relation: _compare(
            reply.lower().count(letter.lower()), let_relation, let_frequency
        ),
        {"letter": str, "let_frequency": int, "let_relation": str},
    ),
    "language:response_language": _Check(lambda reply, language: _in(reply, language), {"language": str}),
    "length_constraints:number_sentences": _Check(
        lambda reply, num_sentences, relation: _compare(sentences(reply), relation, num_sentences),
        {"num_sentences": int, "relation": str},
    ),
    "length_constraints:number_paragraphs": _Check(_paragraphs, {"num_paragraphs": int}),
    "length_constraints:number_words": _Check(
        lambda reply, num_words, relation: _compare(len(re.findall(r"\w+", reply)), relation, num_words),
        {"num_words": int, "relation": str},
    ),
    "length_constraints:nth_paragraph_first_word": _Check(
        _first_word, {"num_paragraphs": int, "nth_paragraph": int, "first_word": str}
    ),
    "detectable_content:number_placeholders": _Check(_placeholders, {"num_placeholders": int}),
    "detectable_content:postscript": _Check(_postscript, {"postscript_marker": str}),
    "detectable_format:number_bullet_lists": _Check(_bullets, {"num_bullets": int}),
    "detectable_format:constrained_response": _Check(lambda reply: any(phrase in reply for phrase in CONSTRAINED), {}),
    "detectable_format:number_highlighted_sections": _Check(_highlights, {"num_highlights": int}),
    "detectable_format:multiple_sections": _Check(_sections, {"section_spliter": str, "num_sections": int}),
    "detectable_format:json_format": _Check(_json, {}),
    "detectable_format:title": _Check(_title, {}),
    "combination:two_responses": _Check(_two_replies, {}),
    "combination:repeat_prompt": _Check(_repeats, {"prompt_to_repeat": str}),
    "startend:end_checker": _Check(_ends, {"end_phrase": str}),
    "startend:quotation": _Check(_quoted, {}),
    "change_case:capital_word_frequency": _Check(_capitals, {"capital_frequency": int, "capital_relation": str}),
    "change_case:english_capital": _Check(lambda reply: reply.isupper() and _in(reply, "en"), {}),
    "change_case:english_lowercase": _Check(lambda reply: reply.islower() and _in(reply, "en"), {}),
    "punctuation:no_comma": _Check(lambda reply: "," not in reply, {}),
}
