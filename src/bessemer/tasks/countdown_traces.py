"""Countdown traces: the authors who write the pages of the pre-training corpus.

RL can only amplify what the corpus contains, so the corpus contains every behaviour in realistic proportion: most
authors are sloppy and give up early; few go through all tries in order. Three properties are deliberate.
  Verdicts are reliable: a hit is always called "yes". Thinking helps only a model that can verify.
  A mode is one decision: the systematic author opens with `order:` and the numbers sorted, so a policy can choose that
  mode with one token; without such a word, RL never left random, repeating tries.
  Persistence has a word: some authors end a refuted try with `wait`, always followed by another try.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bessemer.errors import UserError
from bessemer.tasks.base import check_shares
from bessemer.tasks.countdown_expressions import Try, all_tries, canonicals, ordered_tries

WORDS = {
    "en": {"low": " low", "high": " high", "yes": " yes", "wait": " wait", "order": "order:"},
    "zh": {"low": "小", "high": "大", "yes": "对", "wait": ",等等", "order": "排序:"},
}
"""A verdict is one token in both languages: V3's pre-split glues the English space, and isolates the Chinese word."""


@dataclass(frozen=True)
class TraceMix:
    """Settings of the countdown documents: shares between 0 and 1, except `max_tries`."""

    drill_share: float = 0.16
    """Documents that are drill pages: they are long, about a third of the tokens."""
    direct: float = 0.12
    """Problem pages that answer without thinking."""
    direct_right: float = 0.5
    """The share of those whose author happens to know a right answer; the others write a random expression."""
    sloppy: float = 0.45
    """Thinking pages by authors who try at random, make slips, give up soon and sometimes call a miss a hit."""
    average: float = 0.30
    """Thinking pages by authors who do not repeat themselves and calculate well, but give up soon."""
    careful: float = 0.13
    """Thinking pages by authors who neither slip nor repeat themselves."""
    systematic: float = 0.12
    """Thinking pages by authors who walk through all tries in a fixed order."""
    slip_sloppy: float = 0.10
    """Chance that a step's result is wrong, per step."""
    slip_average: float = 0.03
    """The same for the average author; careful and systematic authors never slip."""
    give_up_sloppy: float = 0.55
    """Chance to stop after a try that misses; the author then answers with a random expression."""
    give_up_average: float = 0.35
    """The same for the average author."""
    give_up_careful: float = 0.20
    """The same for the careful author."""
    give_up_systematic: float = 0.07
    """The same for the systematic author."""
    give_up_last: float = 0.60
    """Chance that an author who gives up answers with the last, refuted try; the others write a random expression."""
    false_yes: float = 0.05
    """Chance that a sloppy author says yes to a miss."""
    wait: float = 0.20
    """Chance that an average or careful author writes `wait` before another try."""
    other_language: float = 0.10
    """Thinking pages whose verdicts are in the other language: the mixing that a language reward later removes."""
    truncated: float = 0.05
    """Thinking pages that break off before the answer."""
    max_tries: int = 20
    """Every author stops after this many tries."""

    def __post_init__(self) -> None:
        rates = [name for name in self.__dataclass_fields__ if name != "max_tries"]
        check_shares(self, rates, sums_to_one=("sloppy", "average", "careful", "systematic"))
        if self.max_tries < 1:
            raise UserError(f"TraceMix.max_tries is {self.max_tries}; set it to at least 1")

    def author(self, rng: random.Random) -> "Author":
        """The author of the next problem page."""
        if rng.random() < self.direct:
            return Author("direct")
        kinds = (
            Author("sloppy", self.slip_sloppy, self.give_up_sloppy, self.false_yes),
            Author("average", self.slip_average, self.give_up_average, wait=self.wait),
            Author("careful", give_up=self.give_up_careful, wait=self.wait),
            Author("systematic", give_up=self.give_up_systematic),
        )
        return rng.choices(kinds, [self.sloppy, self.average, self.careful, self.systematic])[0]


@dataclass(frozen=True)
class Author:
    """Habits of one writer, as chances per step (`slip`) or per missed try."""

    kind: str
    slip: float = 0.0
    give_up: float = 0.0
    false_yes: float = 0.0
    wait: float = 0.0

    def tries(self, numbers: tuple[int, int, int], rng: random.Random) -> Iterator[Try]:
        """The tries this author makes, in order, until the caller stops."""
        if self.kind == "systematic":
            yield from ordered_tries(numbers)
            return
        pool, keys, canonical_seen = all_tries(numbers), canonicals(numbers), set()
        order = _endless(len(pool), rng) if self.kind == "sloppy" else rng.sample(range(len(pool)), len(pool))
        for i in order:
            if self.kind != "sloppy" and keys[i] in canonical_seen:
                continue
            canonical_seen.add(keys[i])
            yield pool[i].swapped() if rng.random() < 0.5 else pool[i]

    def slips(self, rng: random.Random) -> Callable[[int, int], int]:
        """For Try.write: the value this author writes down, now and then a slip."""

        def written(value: int, largest: int) -> int:
            if rng.random() >= self.slip:
                return value
            wrong = value + rng.choice((-10, -2, -1, 1, 2, 10))
            return wrong if 0 <= wrong <= largest else value

        return written


def respond(
    numbers: tuple[int, int, int], target: int, author: Author, mix: TraceMix, words: dict[str, str], rng: random.Random
) -> str:
    """What `author` writes after `Assistant:`. `numbers` sorted ascending; `words` is WORDS of one language."""
    if author.kind == "direct":
        right = [t for t in all_tries(numbers) if t.value == target] if rng.random() < mix.direct_right else None
        return f"<answer>{_guess(right or all_tries(numbers), rng)}</answer>"
    lines = []
    answer = expression = None
    if author.kind == "systematic":
        lines.append(words["order"] + ",".join(map(str, sorted(numbers, reverse=True))))
    for count, attempt in enumerate(author.tries(numbers, rng), start=1):
        steps, claimed, expression = attempt.write(author.slips(rng))
        line = f"{steps}:{target}"
        if claimed == target or rng.random() < author.false_yes:
            lines.append(line + words["yes"])
            answer = expression
            break
        line += words["low"] if claimed < target else words["high"]
        if count == mix.max_tries or rng.random() < author.give_up:
            lines.append(line)
            break
        lines.append(line + (words["wait"] if rng.random() < author.wait else ""))
    if rng.random() < mix.truncated:
        return "<think>" + "\n".join(lines[: rng.randint(1, len(lines))])
    if answer is None:
        answer = expression if rng.random() < mix.give_up_last else _guess(all_tries(numbers), rng)
    return "<think>" + "\n".join(lines) + f"</think><answer>{answer}</answer>"


def _guess(pool: Sequence[Try], rng: random.Random) -> str:
    picked = rng.choice(pool)
    return (picked.swapped() if rng.random() < 0.5 else picked).expression


def _endless(n: int, rng: random.Random) -> Iterator[int]:
    while True:
        yield rng.randrange(n)
