"""The letter of a choice that a text states as its answer, in the sentences in which models state one.

A letter is stated by a sentence that says so ("the answer is (B)", "I choose B", "B is correct", 故选B, B正确), or by a
line that is nothing but a letter, alone or with its choice, at the beginning or end of the text or after "the answer
is". A letter in a list of options states nothing, nor do quoted text, denied or supposed sentences. A statement of
several letters ("A or B") states each.
"""

import re
from collections.abc import Iterator
from itertools import islice

from bessemer.tasks.answer import Reader, Tagged
from bessemer.tasks.statements import DENIED, LAST, MOST, QUOTED, SENTENCE_START

_OPEN = r"(?:[*_$({\[（「【\s]|\\[([]|\\(?:text|textbf|mathbf|mathrm|boxed|bf) ?\{){0,8}"
_CLOSE = r"(?:[*_$)}\]）」】]|\\[)\]])*"
_LETTER = rf"{_OPEN}(?P<letter>[A-Z])(?![A-Za-z0-9'’_^]|[-+/=]|\s*[+=<>])"
_MORE = re.compile(
    rf"{_CLOSE}[ \t]*(?:,|or|and|/|&|或|和|与|、|还是)[ \t]*(?:[Oo]ption |[Cc]hoice |选)?"
    rf"{_OPEN}([A-Z])(?![A-Za-z0-9'’])(?!(?<=[AI]) [a-z])"
)
_KIND = r"(?:[Oo]ption|[Cc]hoice|(?i:answer)|[Ll]etter|[Ss]tatement|选项|答案)"
_MARK = (
    r"[*_]{0,4}[ \t]*(?:[:：]|\b(?:is|(?:would|must|should|will) be)\b(?: (?:therefore|thus|hence|clearly|indeed|simply"
    r"|then|likely))?|=|->|→|是|为)[*_ \t]{0,6}\s{0,3}(?:[:：][*_ \t]{0,6}\s{0,3})?"
)
_STATED = (
    # The (final, correct) answer (to the question) is (option) B
    rf"\b(?:(?i:answer)|[Cc]hoice|[Oo]ption|[Rr]esponse|[Ss]election)(?: (?:to|for|here|among|from"
    rf"|of)\b[^.\n:：]{{0,60}}?)?[ \t]*{_MARK}"
    rf"(?:\b(?:the )?(?:letter |option |choice |answer |[Oo]ption |[Cc]hoice ))?{_LETTER}",
    rf"\*\*(?:[Ff]inal )?(?i:answer)[*:：\s]{{1,6}}(?:[Oo]ption )?{_LETTER}",
    rf"\b(?:[Ww]e|[Ii]|I would|I'd|I'll|[Ww]e should|[Ww]e can|[Ll]et(?:'s| me| us)|[Tt]herefore,?|[Ss]o,?|[Tt]hus,?"
    rf"|[Hh]ence,?|[Mm]ust|[Ss]hould) "
    rf"(?:choose|select|pick|go with|choosing|conclude)(?: (?:the )?(?:option|choice|answer|letter))? ?{_LETTER}",
    # option B is correct, B is the right answer, (B) is the correct choice
    rf"(?:{_KIND} )?{_LETTER}{_CLOSE}(?:[ \t]+(?!is\b)[^.\n]{{1,60}}?|[.):][^.\n]{{1,60}}?)?[ \t]+is (?:indeed "
    rf"|therefore |thus |clearly |hence )?(?:the )?"
    r"(?:only )?(?:correct|right|best|true|final)(?: one| answer| option| choice| statement)?(?=[\s.,;:!*)]|$)",
    rf"(?:[Oo]ption |[Cc]hoice )?{_LETTER}{_CLOSE} is the (?:answer|choice)\b",
    rf"\b(?:correct|right|best|final) (?:one|statement|letter) is[: ]+(?:option |choice )?{_LETTER}",
    rf"\b(?:matches|corresponds to|which is|that is|namely|gives us|leads to) (?:the )?(?:option|choice"
    rf"|answer) {_LETTER}",
    rf"[.!?:]\s+\*\*{_LETTER}{_CLOSE}[.]?\**\s*\Z",
    rf"(?:^|[.!:：]\s+|\n)[*_]{{0,4}}(?:[Tt]herefore|[Tt]hus|[Hh]ence|[Ss]o|[Cc]onclusion)[,:]? (?:it(?: i|')s "
    rf"|[Oo]ption |[Cc]hoice |the answer: )?{_LETTER}(?={_CLOSE}\s*(?:[.!]|$))",
    rf"\b(?:[Ii]t['’]s|[Ii]t is|[Tt]hat['’]s) (?:option )?{_LETTER}(?={_CLOSE}[.!]?\s*$)",
    rf"\bleaving (?:us with )?(?:only )?(?:option |choice )?{_LETTER}",
    rf"\b(?:option |choice )?{_LETTER}{_CLOSE} as the (?:correct|right|only|best)\b",
    # 答案是B, 故选B, B正确
    r"(?:答案[】）)]?(?:应该|应|就)?(?:是|为|选)?|选择|选项(?:是|为|[:：]))[*_]{0,4}[:：]?[*_ \t]{0,6}\s{0,2}"
    rf"(?:选项 ?|选择? ?)?{_LETTER}",
    r"(?:故|应|因此|所以|应该|正确的?|综上|本题|此题|我)[，,]?(?:本题)?(?:答案)?(?:应|就)?(?:选择?|是|为)(?:选项)?[:：]?"
    rf"[*_ \t]{{0,6}}{_LETTER}",
    rf"(?:^|[。，,；？\n]) ?选择?(?:选项)?[:：]? ?{_LETTER}",
    rf"{_LETTER}{_CLOSE}(?:选项|项)?(?:是|为|才是|说法)?(?:正确|对)(?:的|答案|选项)?(?=[。，,；！!\s）)]|$)",
)
_STATEMENT = [re.compile(pattern, re.MULTILINE) for pattern in _STATED]
_ANSWER = [pattern for pattern in _STATEMENT if re.match(r"\\[b*].{0,24}answer|\(\?:答案", pattern.pattern)]
"""Those that call the letter the answer: they count beside a box too."""
_LONE = re.compile(
    rf"^[ \t]*(?:[-•#]+ )?(?:[Oo]ption |[Cc]hoice |选项? ?)?{_LETTER}{_CLOSE}[ \t]*"
    r"(?:[.):：、．,，]{1,2}[*_ \t]*(?P<text>.*)|(?P<why>(?:because|since|as|for|—|-|–)\b.*|——?.*|\(.*\))|)$"
)
_LEADS = re.compile(r"(?:\bis|[:：]|[是为选])[*_ \t]*$")


class LetterReader(Reader):
    """Reads the letter of a choice from tags, boxes and sentences, which must agree."""

    def stated(self, rest: str, tagged: Tagged | None) -> list[str]:
        boxed = self.marked(rest, tagged)
        outside = rest[: tagged[0]] + rest[tagged[3] :] if tagged else rest
        return [*boxed, *letters(outside, any(boxed))]


def letters(text: str, beside_a_box: bool = False) -> Iterator[str]:
    """Every letter that a text states, in order, at most MOST of a kind; a letter that stands with the text of its
    choice as `B) Ne`."""
    plain = QUOTED.sub(lambda match: " " * len(match[0]) if len(match[0]) > 6 else match[0], text[-LAST:])
    letter_at = {}
    for pattern in _ANSWER if beside_a_box else _STATEMENT:
        for match in islice(pattern.finditer(plain), MOST):
            if _holds(plain, match):
                letter_at[match.start("letter")] = match["letter"]
                for more in _more(plain, match.end("letter")):
                    letter_at[more.start(1)] = more[1]
    yield from (f"{letter_at[place]}{_beside(plain, place + 1)}" for place in sorted(letter_at))
    if not beside_a_box:
        yield from _lines(plain, bool(letter_at))


def _more(text: str, start: int) -> Iterator[re.Match[str]]:
    for _ in range(26):
        match = _MORE.match(text, start)
        if match is None:
            return
        yield match
        start = match.end(1)


def _holds(text: str, match: re.Match[str]) -> bool:
    """Whether the sentence up to the end of the match neither denies nor supposes, and the letter is not a word."""
    begin = max(
        (
            sentence.end()
            for sentence in SENTENCE_START.finditer(text, max(0, match.start() - 300), match.start("letter"))
        ),
        default=max(0, match.start() - 300),
    )
    after = text[match.end("letter") : match.end("letter") + 40]
    word = match["letter"] in "AI" and re.match(
        r" (?!because|since|as\b|for\b|is\b|and\b|or\b|with\b|which\b|due\b)[a-z]", after
    )
    negated = re.match(
        rf"{_CLOSE}\s*(?:(?:选?项|说法)?(?:是|为)?(?:不|错)|(?:is|are|was)(?:n't|n’t| not| incorrect| wrong| false))",
        after,
    )
    return not word and not negated and not DENIED.search(text[begin : match.end("letter")])


_BESIDE = re.compile(
    rf"{_CLOSE}[):.：]+{_CLOSE}[ \t]+([^\n]{{1,200}})|\)[*_}}]*[ \t]+([^\n]{{1,200}})"
    r"|）[*_ \t]*([^\n，,。；;（）]{1,40})[。.]?[ \t]*(?:\n|\Z)"  # （D）一年
)


def _beside(text: str, start: int) -> str:
    """`) Ne` of `(B) Ne.`: the text of a choice in the rest of a line."""
    match = _BESIDE.match(text, start)
    choice_text = next(filter(None, match.groups())).strip(" *_$.。") if match else ""
    return f") {choice_text}" if choice_text else ""


def _lines(text: str, settled: bool) -> Iterator[str]:
    """The letters of lines of their own; those of a list too, which then contradict each other, unless a sentence has
    `settled` the choice."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    marked = [_LONE.match(line) if len(line) < 400 else None for line in lines]
    own = [match["letter"] if match else None for match in marked]
    count = 0
    for n, match in enumerate(marked):
        if match is None or count == MOST:
            continue
        edge, led = n in (0, len(lines) - 1), n > 0 and _LEADS.search(lines[n - 1])
        beside = {own[m] for m in (n - 1, n + 1) if 0 <= m < len(lines)} - {None}
        alone = not match["text"] and not match["why"]
        if n + 1 < len(lines) and re.match("不|错|[Ii]ncorrect|[Ww]rong", lines[n + 1]):
            continue
        if not (edge or led) or (
            match["letter"] in "AI" and not alone and match["why"] is None and not re.match(r".{0,4}[.):：]", lines[n])
        ):
            continue
        if beside - {match["letter"]}:
            if settled:
                continue
            yield from sorted({match["letter"], *filter(None, beside)})  # a list: no letter of it is the answer
            return
        count += 1
        choice_text = (match["text"] or "").strip(" *_$.")
        yield f"{match['letter']}) {choice_text}" if choice_text else match["letter"]


_GIVEN = re.compile(
    rf"{_OPEN}(?:{_KIND}|答案[是为]?|选"
    rf"|the answer is)?[:：]?[ \t]*{_OPEN}(?P<letter>[A-Za-z])(?![A-Za-z0-9'’^_])(?P<close>"
    rf"(?:{_CLOSE}[ \t]*[.):：、．，,]?)*{_CLOSE})\s*(?P<rest>.*)",
    re.DOTALL,
)
_REASON = re.compile(
    r"(?:because|since|as|for|is(?!n['’]t|(?: \w+ly)? (?:not|incorrect|wrong|false))|which|due|—|-|–|\()"
)
_ANOTHER = re.compile(rf"(?:,|or|and|/|&|或|和|与|、|\s)*{_OPEN}[A-Z]{_CLOSE}\s*(?:[.,、，/&]|or\b|and\b|或|和|与|$)")


def letter_of(answer: str, texts: dict[str, str]) -> str | None:
    """The letter of an answer that is one: alone, with its choice, or in a sentence. `texts`: the choices by letter."""
    match = _GIVEN.fullmatch(answer.strip("`"))
    if match is None or (match["letter"].islower() and not match["close"].strip() and match["rest"]):
        stated = {statement[0] for statement in letters(answer)}
        return stated.pop() if len(stated) == 1 else None
    letter, rest = match["letter"].upper(), match["rest"]
    if not _plain(rest) or (letter in texts and _plain(rest) == _plain(texts[letter])):
        return letter
    if _ANOTHER.match(rest) or any(_plain(rest) == _plain(text) for text in texts.values()):
        return None
    return letter if match["close"].strip() or _REASON.match(rest) else None


def _plain(text: str) -> str:
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf|left|right)(?![a-z])|\\[,;:! ]|[${}*~\s]", "", text)
    return text.rstrip(".。").casefold()
