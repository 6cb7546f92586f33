"""General requests: R1's prompts without a verifiable answer, from its last RL stage (R1 2.3.4, R1-Nature B.3.1).

Short everyday requests in English and Chinese, most for helpfulness and some for harmlessness (general_requests.py).
Rewards come from reward models (r1/preference.py), and the truth from a written judge (general_quality.py), which rates
the helpfulness of the summary and the harmlessness of thoughts and summary. An answer is `<think>...</think>`, a blank
line and a summary in plain words, without answer tags; the thoughts before a greeting are blank.

`Problem.meta`: aim ("helpful" or "harmless", the reward model that judges it), family, slots, template, difficulty
(1 without thoughts, 2 with them, 3 for an unsafe request).
"""

import random
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from bessemer.addons.tasks.files import FileTask, LineIndex, Question
from bessemer.addons.tasks.general_quality import HELPFUL, judge
from bessemer.addons.tasks.general_requests import GeneralRequest, answer_in_manner, manners_for, sample_request
from bessemer.tasks.answer import NO_THINK, plain_fault, r1_form, summary
from bessemer.tasks.base import CORRECT, Problem, Task, Verdict, Written, check_shares

AIMS = ("helpful", "harmless")
UNSAFE, UNJUDGED = "unsafe", "unjudged"
SEEN = {"seen": (0, 1), "held-out": (2,)}
"""Indices of the wordings, by phrasing."""


@dataclass(frozen=True)
class GeneralMix:
    """Settings of the problems and pages, shares between 0 and 1."""

    harmless_share: float = 0.15
    """Requests that ask for something unsafe (R1: 12K of 78K general prompts)."""
    good: float = 0.5
    """Pages with a good answer; the other authors are curt, padded, off the point, in the wrong language or unsafe."""
    plain: float = 0.5
    """Pages that answer at once, without think tags."""

    def __post_init__(self) -> None:
        check_shares(self, list(self.__dataclass_fields__))


class GeneralFile(FileTask):
    """General prompts from a file. Reward models score the answers in RL, and a model judges them in rejection sampling
    (`addons/r1/judge.py`), next to the reference answer if a line has one; here only their form is judged."""

    domain = "general"
    family = "general"
    form = (
        '{"prompt": "...", "aim": "helpful" or "harmless", "reference": "..."}, where the reference answer is optional '
        "and the aim of a prompt is helpful unless given"
    )

    def __init__(self, path: str, **settings: Any):
        super().__init__(path, **settings)
        self.judged_by = frozenset(aim for file in self.files.values() for aim in _aims_of(file))

    @classmethod
    def read(cls, record: dict[str, Any], where: str) -> Question:
        aim, text = _aim(record), cls.text(record, where)
        if aim not in AIMS:
            raise cls.wrong(where, f"the aim is {aim!r}, not {' or '.join(AIMS)}", record)
        if "reference" not in record:
            return Question(text, {"aim": aim})
        return Question(text, {"aim": aim, "reference": cls.text(record, where, ["reference"])})

    def verify(self, problem: Problem, completion: str) -> Verdict:
        fault = plain_fault(completion)
        answer = " ".join(summary(completion).split())
        return Verdict(False, fault is None, fault or UNJUDGED, answer or None)


def _aim(record: dict[str, Any]) -> object:
    """The reward model for a line; a prompt-only data set names none."""
    return record.get("aim", AIMS[0] if "prompt" in record else None)


@lru_cache(maxsize=16)
def _aims_of(file: LineIndex) -> frozenset[str]:
    return frozenset(str(_aim(file.record(row))) for row in range(len(file.lines)))


class General(Task):
    name = "general"
    translated = True
    domain = "general"
    translated = True
    Mix = GeneralMix

    def option_names(self) -> list[str]:
        return ["harmless_share"]

    def make(self, split: str, index: int, seed: int, language: str, phrasing: str) -> Problem:
        rng = self.rng("problem", split, index, seed)
        aim = "harmless" if rng.random() < self.mix.harmless_share else "helpful"
        request = sample_request(aim, split, language, rng)
        template = rng.choice(SEEN[phrasing])
        meta = {
            "aim": aim,
            "family": request.family.name,
            "slots": list(request.slots),
            "template": f"{language}-{request.family.name}-{template}",
            "difficulty": 3 if request.unsafe else 1 + bool(request.family.think),
        }
        return Problem(f"{self.name}/{split}/{seed}/{index}/{language}", request.asks()[template], language, meta)

    def verify(self, problem: Problem, completion: str) -> Verdict:
        """Correct: harmless and helpful enough, with tags that are not broken. The reason is the first of no-answer,
        no-think, bad-tags, unsafe, or the weakest component of helpfulness."""
        fault, quality = plain_fault(completion), judge(GeneralRequest.of(problem), completion)
        reason = UNSAFE if not quality.harmless else CORRECT if quality.helpful >= HELPFUL else quality.weakest
        answer = " ".join(summary(completion).split())
        correct = reason == CORRECT and fault in (None, NO_THINK)
        return Verdict(correct, fault is None, fault or reason, answer or None)

    def conversation(self, index: int, seed: int = 0, language: str | None = None) -> list[dict[str, str]]:
        """A good answer to a request of the train split in R1's form, as messages for SFT."""
        problem = self.train_problem(index, seed, language)
        content = r1_form(*GeneralRequest.of(problem).answer(self.rng("conversation", index, seed)))
        return [{"role": "user", "content": problem.prompt}, {"role": "assistant", "content": content}]

    def written(self, index: int, seed: int = 0, language: str | None = None) -> Written:
        problem, rng = self.train_problem(index, seed, language), self.rng("document", index, seed)
        request = GeneralRequest.of(problem)
        author = "good" if rng.random() < self.mix.good else rng.choice(manners_for(request)[1:])
        return Written(problem, author, self._page(*answer_in_manner(request, author, rng), rng))

    def _page(self, thought: str, answer: str, rng: random.Random) -> str:
        return f" {answer}" if answer and rng.random() < self.mix.plain else r1_form(thought, answer)
