"""Stories of the task `words` composed of clauses: an opening, one or two events, a question.

A model learns thirty stories by heart, but it has to read thousands, made of a few dozen clauses. A hash of the clauses
decides which compositions are held out, so a test problem combines clauses in a way that no page does.
"""

from dataclasses import dataclass
from functools import cache
from itertools import permutations, product

from bessemer.tasks.base import read_toml, split_of_text

STEPS = (2, 3)
"""Numbers of steps that a story may take."""
HELD_OUT_SHARE = 0.2


@dataclass(frozen=True)
class Story:
    """`ranges`: those of the numbers a, b, c, d, in the order of the text; `steps`: see `word_problems`."""

    id: str
    en: str
    zh: str
    ranges: dict[str, tuple[int, int]]
    steps: tuple[str, ...]

    @classmethod
    def parse(cls, id: str, en: str, zh: str, ranges: str, steps: str) -> "Story":
        """`ranges` like "a 2-9, b 3-12", `steps` like "a*b, x-c"."""
        return cls(id, en, zh, _bounds(ranges), tuple(steps.split(", ")))


def _bounds(ranges: str) -> dict[str, tuple[int, int]]:
    bounds: dict[str, tuple[int, int]] = {}
    for entry in ranges.split(", "):
        letter, ends = entry.split()
        lowest, highest = map(int, ends.split("-"))
        bounds[letter] = (lowest, highest)
    return bounds


@cache
def composed(split: str, steps: int) -> tuple[Story, ...]:
    """The compositions of a split that take `steps` steps, in a fixed order."""
    clauses = read_toml(__package__, "story_clauses.toml")
    events = [(name,) for name in clauses["events"]] + list(permutations(clauses["events"], 2))
    stories = []
    for opening, happens, question in product(clauses["openings"], events, clauses["questions"]):
        first, last = clauses["openings"][opening], clauses["questions"][question]
        name = ".".join((opening, *happens, question))
        if bool(first[-1]) + len(happens) + bool(last[-1]) == steps and split_of_text(name, HELD_OUT_SHARE) == split:
            stories.append(_compose(name, first, [*(clauses["events"][event] for event in happens), last]))
    return tuple(stories)


def _compose(name: str, opening: list[str], clauses: list[list[str]]) -> Story:
    """Every clause gets the next letter for its number, and the amount so far for t."""
    first_en, first_zh, ranges, step = opening
    english, chinese, bounds = [first_en], [first_zh], _bounds(ranges)
    steps = [step] if step else []
    for en, zh, ends, step in clauses:
        so_far = "xyz"[len(steps) - 1] if steps else "a"
        letter = "abcd"[len(bounds)] if ends else ""
        if ends:
            lowest, highest = map(int, ends.split("-"))
            bounds[letter] = (lowest, highest)
        if step:
            steps.append(step.replace("t", so_far).replace("n", letter))
        english.append(en.replace("{n}", f"{{{letter}}}"))
        chinese.append(zh.replace("{n}", f"{{{letter}}}"))
    return Story(name, " ".join(english), "".join(chinese), bounds, tuple(steps))
