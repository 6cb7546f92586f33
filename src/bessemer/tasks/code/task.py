"""Small functions to write, judged by what they give: `code` from our own templates, `code:PATH` from a file.

The answer is Python source between the answer tags, in a code fence or bare. It runs in the sandbox (sandbox/), which
refuses where nothing isolates it, and only the values come back. The hidden tests of a template problem follow from the
problem, so they are the same everywhere and in no document. Reasons besides those of every task: wrong-output, error,
timeout, memory, output (it wrote too much), syntax-error, no-function, too-long.
"""

import json
import re
from functools import lru_cache

from bessemer.tasks import sandbox
from bessemer.tasks.answer import parse_reply
from bessemer.tasks.base import SPLITS, Problem, Task, Verdict, Written, stable_hash, stable_random
from bessemer.tasks.code.book import FAMILIES, HELD_OUT, Wanted, wanted
from bessemer.tasks.code.traces import CodeMix, respond

NAME = "f"
LONGEST = 10_000  # characters of an answer
TOO_LONG = "too-long"
TEMPLATES = {
    ("en", "seen"): ("Write f({argument}): {words}.", "Code a function f({argument}) that returns {words}."),
    ("en", "held-out"): ("Define f({argument}) in Python to give {words}.",),
    ("zh", "seen"): ("写函数f({argument})：{words}。", "编写f({argument})，返回{words}。"),
    ("zh", "held-out"): ("请用Python定义f({argument})，求{words}。",),
}
_FENCE = re.compile("```(?:python|py)?[ \t]*\n")


class Judged(Task):
    """A task whose answers are run. A subclass writes `tests`; `meta["function"]` is the name that is called."""

    domain = "code"

    def tests(self, problem: Problem) -> sandbox.Tests:
        raise NotImplementedError

    def verify(self, problem: Problem, completion: str) -> Verdict:
        """As for every task, but what could not be paid anyway is not run."""
        reply = parse_reply(completion)
        if reply.problem is None:
            return super().verify(problem, completion)
        source = None if reply.answer is None else source_of(reply.answer) or None
        return Verdict(False, False, reply.problem, source)

    def grade(self, problem: Problem, answer: str) -> tuple[str, str | None]:
        """The source without its fence and blank lines is what votes are counted by."""
        source = source_of(answer)
        if not source:
            return sandbox.NO_FUNCTION, None
        if len(source) > LONGEST:
            return TOO_LONG, None
        return _judged(source, problem.meta["function"], json.dumps(self.tests(problem))), source


class Code(Judged):
    name = "code"
    Mix = CodeMix

    def size(self, split: str) -> int:
        """Number of different functions in a split."""
        return len(wanted(split))

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
        """They depend on the function alone, not on how often or in what words it is asked for."""
        return _hidden_tests(_goal(problem).key)

    def written(self, index: int, seed: int = 0, language: str | None = None) -> Written:
        problem = self.train_problem(index, seed, language)
        author, response = respond(_goal(problem), problem.language, self.mix, self.rng("document", index, seed))
        return Written(problem, author, response)


def source_of(answer: str) -> str:
    """The program in an answer: the inside of its first code fence, or all of it; blank lines dropped."""
    opening = _FENCE.search(answer)
    if opening:
        answer = answer[opening.end() :].partition("```")[0]
    return "\n".join(line.rstrip() for line in answer.strip().splitlines() if line.strip())


def _goal(problem: Problem) -> Wanted:
    return Wanted(FAMILIES[problem.meta["family"]], tuple(problem.meta["parameters"]))


@lru_cache(maxsize=1024)  # asked for by every sample of a group
def _hidden_tests(key: str) -> sandbox.Tests:
    goal = next(one for split in SPLITS for one in wanted(split) if one.key == key)
    return goal.tests(stable_random("code tests", key))


@lru_cache(maxsize=4096)  # the samples of a group often give the same answer
def _judged(source: str, function: str, tests: str) -> str:
    return sandbox.judge(source, function, json.loads(tests)).reason


@lru_cache(maxsize=64)
def _shuffled(split: str, seed: int, epoch: int) -> tuple[Wanted, ...]:
    return tuple(sorted(wanted(split), key=lambda one: stable_hash("code", split, seed, epoch, one.key)))
