"""Countdown with small numbers, in English. Some pages begin as dialogues do, with a few words about the speakers.

Of the tries at random with five numbers one in about 30 hits the target. With two numbers one in three does, so that
nothing is gained by a long search.
"""

from dataclasses import dataclass
from random import Random
from typing import Any

from bessemer.addons.tasks.countdown_search import SearchMix
from bessemer.addons.tasks.drawn_countdown import DrawnCountdown
from bessemer.tasks.base import check_shares

SCENES = (
    "What follows is a dialogue between a User and an Assistant.",
    "A User talks to an Assistant.",
    "Here a User poses a problem to an Assistant.",
    "The User asks, the Assistant answers.",
    "Conversation of a User with a helpful Assistant:",
)
MANNERS = (
    "The Assistant thinks before it answers.",
    "First come the thoughts of the Assistant, then its answer.",
    "The Assistant works out the solution in its mind, and then tells the User the result.",
    "The Assistant reasons step by step.",
    "It solves the problem for the User.",
)
FORMS = (
    "Thoughts are written between <think> and </think>.",
    "The final answer is enclosed in <answer> and </answer>.",
    "The answer is marked like this: <answer> the result </answer>.",
    "Reasoning and answer have tags of their own: <think> </think> and <answer> </answer>.",
)


@dataclass(frozen=True)
class DialogueMix(SearchMix):
    preamble: float = 0.3
    """Problem pages that begin with a preamble. None is that of R1-Zero's template."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self, ["preamble"])


class FewNumbers(DrawnCountdown):
    Mix = DialogueMix
    mix: DialogueMix

    def __init__(self, numbers: str, **settings: Any) -> None:
        super().__init__(numbers, **{"languages": ["en"], "largest": 6, "highest_target": 30} | settings)

    def document(self, index: int, seed: int = 0, language: str | None = None) -> str:
        page, rng = super().document(index, seed, language), self.rng("preamble", index, seed)
        if not page.startswith("User:") or rng.random() >= self.mix.preamble:
            return page
        return f"{preamble(rng)}\n{page}"


def preamble(rng: Random) -> str:
    """One to four sentences: who speaks, how the Assistant works, and in what form it answers."""
    sentences = [rng.choice(SCENES)]
    for kind in (MANNERS, FORMS):
        if rng.random() < 0.6:
            sentences.append(rng.choice(kind))
    if rng.random() < 0.2:
        sentences.append(rng.choice(FORMS))
    return " ".join(sentences)


class FiveNumbers(FewNumbers):
    def __init__(self, **settings: Any) -> None:
        super().__init__("5", **settings)


class TwoNumbers(FewNumbers):
    def __init__(self, **settings: Any) -> None:
        super().__init__("2", **settings)
