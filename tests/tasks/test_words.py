"""Word problems: parallel in both languages, right by an independent evaluation, stories and numbers held out."""

import re
from collections import Counter, defaultdict

import pytest

from bessemer.addons.tasks.composed_stories import STEPS, composed
from bessemer.addons.tasks.word_problems import HELD_OUT, TRAINED
from bessemer.tasks import get
from bessemer.tasks.base import split_of
from bessemer.tasks.countdown_expressions import LARGEST

TASK = get("words")
COMPOSED = {split: [story for steps in STEPS for story in composed(split, steps)] for split in ("train", "test")}
TRAIN = [TASK.problem("train", i) for i in range(2000)]
TEST = [TASK.problem("test", i) for i in range(600)]
PAGES = [TASK.written(i) for i in range(3000)]


def python_says(problem):
    values = dict(problem.meta["numbers"])
    for name, step in zip("xyz", problem.meta["steps"], strict=False):
        values[name] = eval(step, {}, values)
        assert values[name] == int(values[name]) and 1 <= values[name] <= LARGEST, problem
    return values["xyz"[len(problem.meta["steps"]) - 1]]


def test_values_agree_with_python_and_nothing_leaves_the_bounds():
    for problem in (*TRAIN, *TEST):
        assert python_says(problem) == problem.meta["value"]
        assert problem.meta["difficulty"] == len(problem.meta["steps"])
    assert {p.meta["difficulty"] for p in TRAIN} == {p.meta["difficulty"] for p in TEST} == {2, 3}


def test_there_are_enough_stories_and_no_two_alike():
    everything = (*TRAINED, *HELD_OUT, *COMPOSED["train"], *COMPOSED["test"])
    assert len(TRAINED) >= 24 and len(HELD_OUT) >= 8 and len(COMPOSED["train"]) > 1500 < 4 * len(COMPOSED["test"])
    for texts in ([s.id for s in everything], [s.en for s in everything], [s.zh for s in everything]):
        assert len(set(texts)) == len(everything)
    patterns = {s.steps for s in TRAINED}
    assert {s.steps for s in HELD_OUT} - patterns <= {("a*b", "c-x")}  # new stories with known kinds of steps


@pytest.mark.parametrize(
    "story", [*TRAINED, *HELD_OUT, *COMPOSED["test"][::16], *COMPOSED["train"][::64]], ids=lambda story: story.id
)
def test_a_story_is_the_same_in_both_languages(story):
    fields = [re.findall(r"\{(\w+)\}", text) for text in (story.en, story.zh)]
    letters = [[slot for slot in slots if len(slot) == 1] for slots in fields]
    assert letters[0] == letters[1] == list(story.ranges)  # each number once, in the same order
    # compare which things occur, not how often
    assert {s for s in fields[0] if s == "thing"} == {s for s in fields[1] if s == "thing"}
    used = set("".join(story.steps)) & set("abcd")
    assert used == set(story.ranges)
    assert story.en.isascii() and not re.search("[A-Za-z]", re.sub(r"\{\w+\}", "", story.zh))
    assert len(story.en) < 140


def test_parallel_problems_have_the_same_numbers():
    for i in range(200):
        english, chinese = (TASK.problem("test", i, language=language) for language in ("en", "zh"))
        assert english.meta == chinese.meta
        assert re.findall(r"\d+", english.prompt) == re.findall(r"\d+", chinese.prompt)
        assert english.prompt.isascii() and not re.search("[A-Za-z]", chinese.prompt)


def test_no_story_and_no_numbers_of_the_test_are_trained_on():
    def stories(problems):
        return {p.meta["story"] for p in problems}

    documents = [page.problem for page in PAGES]
    trained, tested = ({s.id for s in COMPOSED[split]} for split in ("train", "test"))
    trained_ids = {s.id for s in TRAINED}
    assert trained_ids < stories(documents) <= trained_ids | trained and stories(TRAIN) <= trained_ids | trained
    assert stories(TEST) <= tested and not tested & (trained_ids | trained)
    clauses = {clause for id in stories(documents) for clause in id.split(".")}
    assert {clause for id in stories(TEST) for clause in id.split(".")} <= clauses  # no clause is new
    for split, problems in (("train", (*TRAIN, *documents)), ("test", TEST)):
        assert all(split_of(list(p.meta["numbers"].values())) == split for p in problems)
    unseen = get("words", phrasing="held-out")
    assert stories(unseen.problem("train", i) for i in range(300)) == {s.id for s in HELD_OUT}
    assert [unseen.document(i) for i in range(100)] == [TASK.document(i) for i in range(100)]


def test_no_answer_is_common_enough_to_be_guessed():
    for problems in (TRAIN, TEST):
        assert max(Counter(p.meta["value"] for p in problems).values()) < 0.07 * len(problems)


@pytest.mark.parametrize(
    ("answer", "reason", "canonical"),
    [
        ("{value}", "correct", "{value}"),
        (" {value}\n", "correct", "{value}"),
        ("{value}.0", "unparsable", None),
        ("{value} apples", "unparsable", None),
        ("100000", "wrong-value", "100000"),
        ("", "empty", None),
        ("１２", "unparsable", None),
    ],
)
def test_grades(answer, reason, canonical):
    problem = TEST[0]
    value = str(problem.meta["value"])
    verdict = TASK.verify(problem, f"<think>t</think><answer>{answer.replace('{value}', value)}</answer>")
    assert (verdict.reason, verdict.answer) == (reason, canonical and canonical.replace("{value}", value))


def lines(page):
    return page.response.removeprefix("<think>").partition("</think>")[0].split("\n")


def test_pages_are_short_and_often_show_failed_attempts():
    groups = defaultdict(list)
    for page in PAGES:
        groups[page.author].append(TASK.verify(page.problem, page.response).sound)
        assert re.match(r"User: .+\nAssistant:<(think|answer)>", page.text)
        assert len(page.text) < 240
        if page.author != "direct":
            assert 1 <= len(lines(page)) <= 3
            assert all(re.fullmatch(r"(first:|then:|先:|再:)\d+[+*/-]\d+=\d+", line) for line in lines(page)), page
    rate = {author: sum(right) / len(right) for author, right in groups.items()}
    assert 0.30 < rate["sloppy"] < 0.50 and 0.91 < rate["careful"] < 0.99 and rate["direct"] == 0.0
    assert 0.30 < sum(map(sum, groups.values())) / len(PAGES) < 0.50


def test_careful_steps_are_true_and_answer_what_was_worked_out():
    for page in PAGES:
        if page.author == "careful":
            for line in lines(page):
                work, result = line.partition(":")[2].split("=")
                assert eval(work) == int(result)
            if page.response.endswith("</answer>"):
                assert TASK.verify(page.problem, page.response).correct


def test_settings_take_effect():
    sure = get("words", direct=0.0, sloppy=0.0, truncated=0.0, languages=["zh"])
    assert all(sure.verify(page.problem, page.response).correct for page in map(sure.written, range(100)))
    slipping = get("words", direct=0.0, sloppy=1.0, truncated=0.0, slip=1.0)
    assert sum(slipping.verify(p.problem, p.response).correct for p in map(slipping.written, range(200))) < 30
