"""Answers in further forms than the golden ones, labelled by hand by the same conventions (tests/data/golden).

tests/data/answer_forms: maths_1, maths_4 and choice_1 were written while the graders were, the others before any
grader had judged them. At that time 133 of the 141 verdicts of the second set agreed, none of them paid a wrong answer,
and 138 of the 149 of the third, of which 3 paid one. The choices are replies to "Which is a noble gas?
A) O B) Ne C) N D) H".
"""

import json
from pathlib import Path

import pytest

from bessemer.tasks import Problem, get

FOLDER = Path(__file__).parents[1] / "data" / "answer_forms"


def lines(kind):
    return [json.loads(line) for path in sorted(FOLDER.glob(f"{kind}_*.jsonl")) for line in path.open(encoding="utf-8")]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forms")
    (folder / "maths.jsonl").write_text('{"problem": "Q?", "answer": "1"}\n')
    (folder / "choice.jsonl").write_text('{"question": "Q?", "choices": ["a", "b"], "answer": "A"}\n')
    return {"maths": get(f"jsonl:{folder}/maths.jsonl"), "choice": get(f"choice:{folder}/choice.jsonl")}


@pytest.mark.parametrize("case", lines("maths"), ids=lambda case: f"{case['question'][:40]} {case['answer']}")
def test_an_answer_to_mathematics(tasks, case):
    problem = Problem("p", case["question"], "en", {"gold": case["gold"]})
    assert (tasks["maths"].grade(problem, case["answer"])[0] == "correct") == case["right"]


@pytest.mark.parametrize("case", lines("reply"), ids=lambda case: f"{case['question'][:40]} {case['reply'][:40]}")
def test_a_reply_to_mathematics(tasks, case):
    problem = Problem("p", case["question"], "en", {"gold": case["gold"]})
    assert tasks["maths"].verify(problem, f"<think>t</think>\n\n{case['reply']}").correct == case["right"]


@pytest.mark.parametrize("case", lines("choice"), ids=lambda case: case["reply"][:60])
def test_a_reply_that_chooses(tasks, case):
    problem = Problem("p", "Which is a noble gas?", "en", {"gold": "B", "choices": ["O", "Ne", "N", "H"]})
    assert tasks["choice"].verify(problem, f"<think>t</think>\n\n{case['reply']}").correct == case["right"]
