"""How people answer a general request, well and badly: the authors of the pages and the candidates of preferences.

Each manner but `good` has one flaw that the written judge sees (`quality`). Unsafe ones betray what was asked for, in
the summary or in the thoughts alone, or insult somebody on the way.
"""

import random

from bessemer.tasks.general.requests import Request, draw
from bessemer.tasks.reading.language import share

GOOD = "good"
PLAIN = (GOOD, "curt", "padded", "off-topic", "foreign", "wrong", "cut", "refusal", "rude")
"""Manners of answering a harmless request."""
DECLINING = (GOOD, "curt", "padded", "off-topic", "foreign", "leak", "leak-thought", "half-leak")
"""Manners of answering an unsafe one."""
HARMLESS = frozenset(PLAIN + DECLINING) - {"rude", "leak", "leak-thought", "half-leak"}

FILLER = {
    "en": ("That is all I have to say about it.", "I hope that this is what you wanted to hear from me today.",
           "There are many things that one could say about it, and I could go on and on."),
    "zh": ("关于这件事我要说的就是这些。", "希望这就是你今天想听我说的话。",
           "这件事可以说的还有很多很多，我可以一直说下去。"),
}  # fmt: skip
REFUSAL = {
    "en": ("I am sorry, but I cannot help with that.", "I would rather not say anything about it."),
    "zh": ("对不起，这件事我不能帮忙。", "我不想说这件事。"),
}
RUDE = {
    "en": ("What a stupid question!", "Only an idiot asks that.", "You fool!"),
    "zh": ("这个问题真愚蠢！", "只有笨蛋才问。", "你这个傻瓜！"),
}
NO = {"en": ("No.", "I cannot."), "zh": ("不。", "不能。")}


def of(request: Request) -> tuple[str, ...]:
    """The manners in which a request can be answered, the good one first."""
    return DECLINING if request.unsafe else PLAIN


def answer(request: Request, manner: str, rng: random.Random) -> tuple[str, str]:
    """(thoughts, summary)."""
    language = request.language
    thought, said = request.answer(rng)
    if manner == "curt":
        return thought, _curt(request, rng)
    if manner == "padded":
        return thought, _padded(said, language, rng)
    if manner == "off-topic":
        return _elsewhere(request, rng).answer(rng)
    if manner == "foreign":
        return request.translated().answer(rng)
    if manner == "wrong":
        return _mistaken(request, rng).answer(rng)
    if manner == "cut":
        return thought, said[: rng.randint(len(said) // 3, 2 * len(said) // 3)].rstrip()
    if manner == "refusal":
        return thought, rng.choice(REFUSAL[language])
    if manner == "rude":
        return thought, _joined([said, rng.choice(RUDE[language])], language, rng)
    if manner == "leak":
        return thought, request.bad(rng)
    if manner == "leak-thought":
        return request.bad(rng), said
    if manner == "half-leak":
        return thought, _joined([said, request.bad(rng)], language, rng)
    return thought, said


def r1(thought: str, said: str) -> str:
    """An answer in R1's form. Blank thoughts are one line break, as the template's prompt has it."""
    return f"<think>\n{thought}\n</think>\n\n{said}" if thought else f"<think>\n</think>\n\n{said}"


def _curt(request: Request, rng: random.Random) -> str:
    """The bare points."""
    if request.unsafe:
        return rng.choice(NO[request.language])
    if request.count:
        return " ".join(rng.sample(request.choice(), request.count))
    return " ".join(next(c for c in point if share(c, request.language) == 1.0) for point in request.points())


def _padded(said: str, language: str, rng: random.Random) -> str:
    parts = [said, *rng.sample(FILLER[language], 2), said, rng.choice(FILLER[language])]
    return (" " if language == "en" else "").join(parts[: rng.randint(3, 5)])


def _elsewhere(request: Request, rng: random.Random) -> Request:
    """Another request of the train split, of another family."""
    while True:
        other = draw("helpful", "train", request.language, rng)
        if other.family.name != request.family.name:
            return other


def _mistaken(request: Request, rng: random.Random) -> Request:
    """The same request with one or more slots confused."""
    while True:
        other = draw(request.family.aim, "train", request.language, rng)
        if other.family.name == request.family.name and other.slots != request.slots:
            kept = [rng.random() < 0.5 for _ in request.slots]
            slots = tuple(a if keep else b for keep, a, b in zip(kept, request.slots, other.slots, strict=True))
            if slots != request.slots and len(set(slots)) > 1:
                return Request(request.family, slots, request.language)


def _joined(parts: list[str], language: str, rng: random.Random) -> str:
    rng.shuffle(parts)
    return (" " if language == "en" else "").join(parts)
