"""The registry, settings, and the guarantee that a task is the same in every process."""

import os
import subprocess
import sys

import pytest

from bessemer.errors import UserError
from bessemer.tasks import Problem, Task, Verdict, get, names
from bessemer.tasks.base import split_of, split_of_text, stable_hash
from bessemer.tasks.countdown import _difficulty

DIGEST = """
from bessemer.tasks import Problem, Task, Verdict, get, names
from bessemer.tasks.base import stable_hash
for name in names():
    if ":" in name:
        continue
    task = get(name)
    problems = [task.problem(split, i, seed) for split in ("train", "test") for seed in (0, 3) for i in range(150)]
    documents = [task.document(i, seed, language) for seed in (0, 3) for language in (None, "en") for i in range(150)]
    print(name, stable_hash(*problems, *documents))
"""


FIXED = ["arithmetic", "code", "countdown", "general", "logic", "products", "sums", "words"]
OURS = ["arithmetic", "countdown", "logic", "products", "sums", "words"]


def test_names_and_get():
    assert names() == sorted(
        [
            *FIXED,
            "choice:PATH",
            "code:PATH",
            "countdown:NUMBERS",
            "env:URL",
            "general:PATH",
            "gsm8k:PATH",
            "gym:NAME",
            "jsonl:PATH",
            "puzzle:PATH",
            "tools:NAMES:TASK",
            "verifiers:NAME",
        ]
    )
    assert all(get(name).name == name for name in FIXED)


@pytest.mark.parametrize("name", FIXED)
def test_every_problem_has_a_domain_and_a_difficulty(name):
    task = get(name)
    assert task.domain not in ("", "own")
    levels = {task.problem(split, i).meta["difficulty"] for split in ("train", "test") for i in range(100)}
    assert levels <= set(range(10)) and all(isinstance(level, int) for level in levels)
    assert len(levels) > 1


def test_difficulty_of_countdown_is_where_the_product_stands():
    assert _difficulty((1, 2, 7), 8) == 1  # 2+7-1
    assert _difficulty((1, 2, 7), 13) == 2  # 2*7-1
    assert _difficulty((1, 2, 7), 16) == 3  # 2*(7+1)
    levels = [get("countdown").problem("test", i).meta["difficulty"] for i in range(225)]
    assert all(50 < levels.count(level) < 100 for level in (1, 2, 3))


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (lambda: get("countdwon"), "countdown"),
        (lambda: get("countdown", slopy=0.5), "sloppy"),
        (lambda: get("countdown", languages=["ja"]), "zh"),
        (lambda: get("countdown", phrasing="heldout"), "held-out"),
        (lambda: get("countdown", direct=1.5), "between 0 and 1"),
        (lambda: get("countdown", sloppy=0.9), "add up to 1"),
        (lambda: get("countdown", max_tries=0), "at least 1"),
        (lambda: get("arithmetic", slip=-0.1), "between 0 and 1"),
        (lambda: get("logic", slip=1.1), "between 0 and 1"),
        (lambda: get("words", misread=-1), "between 0 and 1"),
        (lambda: get("worsd"), "words"),
        (lambda: get("gim:word_sorting"), "gym:NAME"),
        (lambda: get("countdown").problem("valid", 0), "train"),
        (lambda: get("countdown").problem("train", -1), "from 0"),
        (lambda: get("countdown", languages=["en"]).problem("train", 0, language="zh"), "en"),
    ],
)
def test_an_error_names_the_fix(wrong, hint):
    with pytest.raises(UserError, match=hint):
        wrong()


def test_same_in_every_process():
    out = [
        subprocess.run(
            [sys.executable, "-c", DIGEST],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("0", "1", "random")
    ]
    assert out[0] and out[0] == out[1] == out[2]


def test_order_of_calls_does_not_matter():
    forwards, backwards = get("countdown"), get("countdown")
    ahead = [forwards.document(i) for i in range(50)]
    assert ahead == [backwards.document(i) for i in reversed(range(50))][::-1]


def test_stable_hash_is_pinned():
    assert stable_hash("countdown", 1, (2, 3)) == 17681817526729451208
    assert stable_hash("a", "b") != stable_hash("ab")


def test_the_split_of_a_text_is_pinned():
    assert [split_of_text(text) for text in ("a", "b", "true or false")] == ["train", "train", "train"]
    share = sum(split_of_text(str(n)) == "test" for n in range(4000)) / 4000
    assert 0.08 < share < 0.12 and 0.46 < sum(split_of_text(str(n), 0.5) == "test" for n in range(4000)) / 4000 < 0.54


def test_split_ignores_order_and_gives_about_a_tenth():
    assert split_of([3, 1, 2]) == split_of([1, 2, 3])
    share = sum(split_of([a, b, c]) == "test" for a in range(30) for b in range(a) for c in range(b)) / 4060
    assert 0.08 < share < 0.12


@pytest.mark.parametrize("name", OURS)
def test_languages_and_phrasings(name):
    task, held_out = get(name), get(name, phrasing="held-out")
    problems = [task.problem("train", i) for i in range(400)]
    assert 0.4 < sum(p.language == "zh" for p in problems) / 400 < 0.6
    assert {get(name, languages=["zh"]).problem("train", i).language for i in range(20)} == {"zh"}
    assert all(p.prompt.isascii() == (p.language == "en") for p in problems)
    assert not {p.prompt for p in problems} & {held_out.problem("train", i).prompt for i in range(400)}
    assert [held_out.document(i) for i in range(100)] == [task.document(i) for i in range(100)]
    assert len({p.id for p in problems}) == 400


class Graded(Task):
    """Right is "27"; "26" earns half."""

    name = "graded"

    def grade(self, problem, answer):
        return ("correct", answer, 1.0) if answer == "27" else ("wrong-value", answer, 0.5 * (answer == "26"))


MB = 1_000_000
BURIED = {
    "after the tags": "<think>t</think><answer>27</answer>" + "no " * (MB // 3),
    "before the tags": "<think>t</think>" + "27 or " * (MB // 6) + "<answer>27</answer>",
    "before the thoughts": "x" * MB + "<think>t</think><answer>27</answer>",
    "without thoughts": "28? " * (MB // 4) + "\\boxed{27}",
    "around a box in the tags": "<think>t</think><answer>" + "\n" * MB + "\\boxed{27}</answer>",
    "blanks in the tags": "<think>t</think><answer>27" + " " * MB + "</answer>",
    "after an opened thought": "t</think>\n\n\\boxed{27} " + "\u200b" * MB,
    "equal boxes between": "<think>t</think>\n\n" + ("x" * (MB // 40) + "\\boxed{27}") * 40,
}


@pytest.mark.parametrize("text", BURIED.values(), ids=BURIED)
@pytest.mark.parametrize("task", [Graded(), get("sums")], ids=["own", "ours"])
def test_a_right_answer_inside_a_megabyte_of_anything_earns_nothing(task, text):
    verdict = task.verify(Problem("p", "", "en", {"value": 27}), text)
    assert (verdict.correct, verdict.score, verdict.formatted) == (False, 0.0, False)


def test_thoughts_may_be_long_and_unmarked_ones_as_long_as_32k_tokens():
    problem = Problem("p", "", "en", {"value": 27})
    for text in ("<think>" + "so " * (MB // 3) + "</think><answer>27</answer>", "so " * 32_768 + "\\boxed{27}",
                 "so " * (MB // 3) + "</think>\n\n\\boxed{27}"):  # fmt: skip
        assert get("sums").verify(problem, text).correct


def test_partial_credit_is_beside_the_verdict():
    problem = Problem("p", "", "en", {"value": 27})
    scores = {n: Graded().verify(problem, f"<think>t</think><answer>{n}</answer>") for n in ("27", "26", "25")}
    assert [(v.correct, v.score) for v in scores.values()] == [(True, 1.0), (False, 0.5), (False, 0.0)]
    assert {v.reason for v in scores.values()} == {"correct", "wrong-value"}
    assert Verdict(True, True, "", None).score == 1.0 and Verdict(False, True, "", None).score == 0.0
    for credit in (-0.1, 1.5, float("nan")):
        with pytest.raises(UserError, match="credit"):
            Verdict(False, True, "", None, partial=credit)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("27", 0.4),
        ("So it is 27.", 0.4),
        ("<think>3*9</think>\n\nSo it is:\n27", 0.4),
        ("**27**", 0.4),
        ("28", 0.0),
        ("It is 27, I think", 0.0),
        ("27\n28", 0.0),
        ("", 0.0),
        ("27 " * 3000, 0.0),
        ("<think>27", 0.0),
        ("<answer>27", 0.0),
    ],
)
def test_a_plain_right_answer_earns_what_the_option_gives(text, score):
    problem, task = Problem("p", "", "en", {"value": 27}), get("sums", plain_answers=0.4)
    verdict = task.verify(problem, text)
    assert (verdict.correct, verdict.score, verdict.formatted) == (False, score, False)
    assert verdict.reason == get("sums").verify(problem, text).reason and get("sums").verify(problem, text).score == 0.0
    assert task.verify(problem, "<think>t</think><answer>27</answer>").score == 1.0


def test_a_task_is_made_again_from_its_name_and_settings():
    for name in ("countdown", "tools:calculator:arithmetic"):
        task = get(name, languages=["zh"], plain_answers=0.5)
        same_task = get(task.name, **task.settings)
        assert same_task.problem("test", 3) == task.problem("test", 3) and same_task.options == task.options
        assert "plain_answers" in task.option_names()
    assert get("general").option_names() == ["harmless_share"]
    with pytest.raises(UserError, match="plain_answers is 2"):
        get("sums", plain_answers=2.0)
