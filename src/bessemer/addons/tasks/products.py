"""Products of two two-digit numbers, which a small model cannot compute in its head but a calculator can.

The smallest task in which calling a tool pays. Most authors of its pages write the product down and guess its value,
nearly always wrong; a few call the calculator and copy its answer. So RL has something to amplify: the call. Pages with
a call have several turns (`WrittenTurns`); the corpus encodes them as conversations. No prompt describes the tool: the
pages have taught its form.
"""

import json
import random
from dataclasses import dataclass

from bessemer.addons.tasks.environment import Environment, WrittenTurns
from bessemer.addons.tasks.tools import CALCULATOR
from bessemer.tasks.base import Problem, Written, check_shares, read_templates, split_of

TEMPLATES = read_templates(__package__, "questions.toml", "products")
LEAST, MOST = 12, 99


@dataclass(frozen=True)
class ProductsMix:
    """Settings of the documents, shares between 0 and 1."""

    calls: float = 0.2
    """Pages that call the calculator; the others guess."""
    right: float = 0.02
    """The share of guesses that are right."""
    slip: float = 0.2
    """Chance that a caller calls with a wrong number."""

    def __post_init__(self) -> None:
        check_shares(self, list(self.__dataclass_fields__))


class Products(Environment):
    name, domain = "products", "arithmetic"
    translated = True
    Mix = ProductsMix
    tools = (CALCULATOR,)
    described = False
    max_turns = 3

    def make(self, split: str, index: int, seed: int, language: str, phrasing: str) -> Problem:
        rng = self.rng("problem", split, index, seed)
        a, b = _numbers(rng)
        while split_of([a, b]) != split:
            a, b = _numbers(rng)
        templates = TEMPLATES[language, phrasing]
        template = rng.randrange(len(templates))
        meta = {"numbers": [a, b], "value": a * b, "template": f"{language}-{phrasing}-{template}"}
        meta["difficulty"] = len(str(a * b)) - 2  # the product has three or four digits
        prompt = templates[template].format(a=a, b=b)
        return Problem(f"{self.name}/{split}/{seed}/{index}/{language}", prompt, language, meta)

    def written(self, index: int, seed: int = 0, language: str | None = None) -> Written:
        problem, mix = self.train_problem(index, seed, language), self.mix
        rng = self.rng("document", index, seed)
        (a, b), value = problem.meta["numbers"], problem.meta["value"]
        if rng.random() >= mix.calls:
            guess = value if rng.random() < mix.right else max(1, value + rng.choice((-1, 1)) * rng.randint(1, 400))
            return Written(problem, "guesser", f"<think>{a}*{b}={guess}</think><answer>{guess}</answer>")
        if rng.random() < mix.slip:
            b = _numbers(rng)[0]
            while split_of([a, b]) != "train":
                b = _numbers(rng)[0]
        arguments = {"expression": f"{a}*{b}"}
        function = {"name": CALCULATOR.name, "arguments": json.dumps(arguments)}
        turns = (
            {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "type": "function", "function": function}]},
            {"role": "tool", "content": CALCULATOR.run(**arguments), "tool_call_id": "1"},
        )
        return WrittenTurns(problem, "caller", f"<answer>{a * b}</answer>", turns)


def _numbers(rng: random.Random) -> tuple[int, int]:
    return rng.randint(LEAST, MOST), rng.randint(LEAST, MOST)
