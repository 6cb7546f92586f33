"""Small functions to write, from our own families and judged by their results; code_files.py reads those of a file.

The answer is Python source, between the answer tags or in a fenced block after the thoughts. It runs in the
sandbox (sandbox/), which refuses to run code without isolation, and only the values come back. The hidden tests of a
template problem are derived from the problem, so they are the same everywhere and appear in no document. Its reasons,
in addition to those of every task: wrong-output, error, timeout, memory, output (it wrote too much), syntax-error,
no-function, too-long.
"""

import json
from functools import lru_cache

from bessemer.addons.tasks import sandbox
from bessemer.addons.tasks.code_functions import FAMILIES, HELD_OUT, CodeMix, TargetFunction, functions_of, respond
from bessemer.addons.tasks.fences import ProgramReader, flush_left, last_program
from bessemer.addons.tasks.verifiers import CostlyTask
from bessemer.tasks.base import (
    SPLITS,
    Problem,
    Written,
    read_templates,
    stable_hash,
    stable_random,
)

NAME = "f"
LONGEST = 10_000  # characters of an answer
TOO_LONG = "too-long"
TEMPLATES = read_templates(__package__, "questions.toml", "code")


class SandboxedTask(CostlyTask):
    """A task whose answers are run. A subclass writes `judge`."""

    domain = "code"
    reader = ProgramReader()

    def judge(self, problem: Problem, source: str) -> str:
        """The reason code of a program."""
        raise NotImplementedError

    def grade(self, problem: Problem, answer: str) -> tuple[str, str | None]:
        """The program runs as it stands, without the indentation of a list around it; the canonical form leaves out
        blank lines."""
        source = flush_left(last_program(answer)).strip()
        if not source:
            return sandbox.NO_FUNCTION, None
        if len(source) > LONGEST:
            return TOO_LONG, None
        return self.judge(problem, source), source_of(answer)


class Code(SandboxedTask):
    name = "code"
    translated = True
    Mix = CodeMix

    def size(self, split: str) -> int:
        """Number of different functions in a split."""
        return len(functions_of(split))

    def make(self, split: str, index: int, seed: int, language: str, phrasing: str) -> Problem:
        size = self.size(split)
        goal = _shuffled(split, seed, index // size)[index % size]
        templates = TEMPLATES[language, phrasing]
        template = self.rng("problem", split, index, seed).randrange(len(templates))
        prompt = templates[template].format(argument=goal.family.argument, words=goal.words(language))
        meta = {
            "function": NAME,
            "family": goal.family.name,
            "parameters": list(goal.parameters),
            "held_out": "family" if goal.family.name in HELD_OUT else "parameters" if split == "test" else None,
            "difficulty": goal.family.difficulty,
            "template": f"{language}-{phrasing}-{template}",
        }
        return Problem(f"{self.name}/{split}/{seed}/{index}/{language}", prompt, language, meta)

    def tests(self, problem: Problem) -> sandbox.Tests:
        """The hidden tests; they depend only on the function, not on seed, index or wording."""
        return _hidden_tests(_goal(problem).key)

    def judge(self, problem: Problem, source: str) -> str:
        return _reason_of(source, problem.meta["function"], json.dumps(self.tests(problem)))

    def written(self, index: int, seed: int = 0, language: str | None = None) -> Written:
        problem = self.train_problem(index, seed, language)
        author, response = respond(_goal(problem), problem.language, self.mix, self.rng("document", index, seed))
        return Written(problem, author, response)


def source_of(answer: str) -> str:
    """The canonical form of the program in an answer, without blank lines."""
    lines = flush_left(last_program(answer)).strip().split("\n")  # splitlines knows ten other ends of a line
    return "\n".join(line.rstrip() for line in lines if line.strip())


def _goal(problem: Problem) -> TargetFunction:
    return TargetFunction(FAMILIES[problem.meta["family"]], tuple(problem.meta["parameters"]))


@lru_cache(maxsize=1024)  # used by every sample of a group
def _hidden_tests(key: str) -> sandbox.Tests:
    goal = next(function for split in SPLITS for function in functions_of(split) if function.key == key)
    return goal.tests(stable_random("code tests", key))


@lru_cache(maxsize=4096)  # the samples of a group often give the same answer
def _reason_of(source: str, function: str, tests: str) -> str:
    return sandbox.judge(source, function, json.loads(tests)).reason


@lru_cache(maxsize=64)
def _shuffled(split: str, seed: int, epoch: int) -> tuple[TargetFunction, ...]:
    return tuple(
        sorted(functions_of(split), key=lambda function: stable_hash("code", split, seed, epoch, function.key))
    )
