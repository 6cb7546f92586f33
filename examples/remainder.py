"""Remainders: what is left of a division."""

from dataclasses import dataclass

from bessemer.tasks.base import Problem, Task, Verdict, Written, check_shares, grade_integer, split_of

TEMPLATES = {
    ("en", "seen"): "What is left of {a} divided by {b}?",
    ("en", "held-out"): "Give the remainder of {a} by {b}.",
    ("zh", "seen"): "{a}除以{b}余几？",
    ("zh", "held-out"): "求{a}除以{b}的余数。",
}


@dataclass(frozen=True)
class RemainderMix:
    """Knobs of the documents."""

    sloppy: float = 0.7
    """Share of the pages whose author guesses the quotient."""

    def __post_init__(self) -> None:
        check_shares(self, ["sloppy"])


class Remainder(Task):
    name, domain = "remainder", "arithmetic"
    Mix = RemainderMix

    def make(self, split: str, index: int, seed: int, language: str, phrasing: str) -> Problem:
        rng = self.rng("problem", split, index, seed)  # the same in every process; the language must not touch it
        a = b = 0
        while not b or split_of([a, b]) != split:  # numbers of the test split are never trained on
            a, b = rng.randint(20, 99), rng.randint(3, 12)
        meta = {"a": a, "b": b, "value": a % b, "difficulty": 1 if b < 8 else 2}
        prompt = TEMPLATES[language, phrasing].format(a=a, b=b)
        return Problem(f"{self.name}/{split}/{seed}/{index}/{language}", prompt, language, meta)

    def grade(self, problem: Problem, answer: str) -> tuple[str, str | None]:
        return grade_integer(answer, problem.meta["value"])

    def written(self, index: int, seed: int = 0, language: str | None = None) -> Written:
        problem, rng = self.train_problem(index, seed, language), self.rng("document", index, seed)
        a, b = problem.meta["a"], problem.meta["b"]
        author = "sloppy" if rng.random() < self.mix.sloppy else "careful"
        times = rng.randint(1, a // b) if author == "sloppy" else a // b
        left = a - times * b
        response = f"<think>{times}*{b}={times * b},{a}-{times * b}={left}</think><answer>{left}</answer>"
        return Written(problem, author, response)


def brief(problem: Problem, answer: str, verdict: Verdict) -> float:
    """A reward for `reward = "remainder.py:brief"`: a right answer is worth more if it is short."""
    return verdict.correct * (1.0 if len(answer) < 120 else 0.5)
