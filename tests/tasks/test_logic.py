"""Three formulas per problem: values agree with Python, guessing solves 1/8, training never shows a test formula."""

import re
from collections import Counter, defaultdict

import pytest

from bessemer.addons.tasks.logic import steps, value, write
from bessemer.tasks import get

TASK = get("logic")


@pytest.fixture(scope="module")
def asked():
    """Training and test problems."""
    return [TASK.problem("train", i) for i in range(1500)], [TASK.problem("test", i) for i in range(600)]


@pytest.fixture(scope="module")
def pages():
    return [TASK.written(i) for i in range(3000)]


def python_says(text):
    """Evaluate a written formula, in either language, with Python's own not, and, or."""
    for word, meaning in (("真", " True "), ("假", " False "), ("非", " not "), ("且", " and "), ("或", " or ")):
        text = text.replace(word, meaning)
    text = text.replace("true", "True").replace("false", "False")
    assert re.fullmatch(r"(?:True|False|not|and|or|[() ])+", text), text
    return eval(text)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_values_and_every_step_agree_with_python(language, asked):
    for problem in asked[0][:400]:
        for formula, truth in zip(problem.meta["formulas"], problem.meta["values"], strict=True):
            assert python_says(write(formula, language)) == truth == value(formula)
            assert write(formula, language) in problem.prompt or language != problem.language
            reduced = steps(formula)
            assert [python_says(write(step, language)) for step in reduced] == [truth] * len(reduced)
            assert reduced[-1] is truth


def test_both_languages_ask_the_same():
    for i in range(50):
        english, chinese = (TASK.problem("test", i, language=language) for language in ("en", "zh"))
        assert english.meta["formulas"] == chinese.meta["formulas"]
        assert english.prompt.isascii() and not re.search("[a-z]", chinese.prompt)


def test_every_pattern_is_equally_likely_at_every_difficulty(asked):
    for problems in asked:
        for level in (1, 2):
            patterns = Counter(tuple(p.meta["values"]) for p in problems if p.meta["difficulty"] == level)
            assert len(patterns) == 8
            assert max(patterns.values()) < 0.2 * patterns.total()  # 1/8 plus four standard deviations at 300
    train, _ = asked
    assert {p.meta["difficulty"] for p in train} == {1, 2}
    leaves = Counter(
        (p.meta["difficulty"], len(re.findall("true|false", write(f, "en")))) for p in train for f in p.meta["formulas"]
    )
    assert set(leaves) == {(1, 3), (2, 4)}


def parts(formula):
    yield formula
    if not isinstance(formula, bool):
        for part in formula[1:]:
            yield from parts(part)


def bracketed(text):
    """What stands in brackets, at every depth."""
    open_at = []
    for at, letter in enumerate(text):
        if letter == "(":
            open_at.append(at + 1)
        elif letter == ")":
            yield text[open_at.pop() : at]


def test_no_formula_is_in_both_splits(asked, pages):
    """Training has no test formula as a question, nor as a step of a page's response, nor as a part of either."""
    test = {formula for problem in asked[1] for formula in problem.meta["formulas"]}
    train = {f for problem in (*asked[0], *(page.problem for page in pages)) for f in problem.meta["formulas"]}
    assert len(test) > 700 and len(train) > 4000
    assert not test & {part for formula in train for part in parts(formula)}
    steps_shown = [step for page in pages for step in re.split("[=\n]|<.*?>", page.response)]
    steps_shown += [inner for step in steps_shown for inner in bracketed(step)]
    test_formulas = {write(formula, language) for formula in test for language in ("en", "zh")}
    assert len(steps_shown) > 10_000 and not test_formulas & set(steps_shown)
    held_out = get("logic", phrasing="held-out")
    assert not {formula for i in range(200) for formula in held_out.problem("test", i).meta["formulas"]} & train


@pytest.mark.parametrize(
    ("answer", "reason", "canonical"),
    [
        ("true, false, true", "correct", "TFT"),
        ("真、假、真", "correct", "TFT"),
        (" true,false ,\ntrue", "correct", "TFT"),
        ("真，假，真", "correct", "TFT"),
        ("true, true, true", "wrong-value", "TTT"),
        ("true, 假, true", "unparsable", None),
        ("true, false", "unparsable", None),
        ("true, false, true, false", "unparsable", None),
        ("True, False, True", "unparsable", None),
        ("true false true", "unparsable", None),
        ("true or false, false, true", "unparsable", None),
        ("TFT", "unparsable", None),
        ("1, 0, 1", "unparsable", None),
        ("not false, false, true", "unparsable", None),
        (",,", "unparsable", None),
        ("", "empty", None),
    ],
)
def test_grades(answer, reason, canonical, asked):
    problem = next(p for p in asked[1] if p.meta["values"] == [True, False, True])
    verdict = TASK.verify(problem, f"<think>t</think><answer>{answer}</answer>")
    assert (verdict.reason, verdict.answer) == (reason, canonical)


def test_most_pages_show_failed_attempts(pages):
    groups = defaultdict(list)
    for page in pages:
        groups[page.author].append(TASK.verify(page.problem, page.response).sound)
    rate = {author: sum(right) / len(right) for author, right in groups.items()}
    assert 0.15 < rate["sloppy"] < 0.35 and 0.91 < rate["careful"] < 0.99 and rate["direct"] == 0.0  # no thoughts
    assert 0.25 < sum(map(sum, groups.values())) / len(pages) < 0.40
    assert len(groups["direct"]) / len(pages) == pytest.approx(TASK.mix.direct, abs=0.03)


def test_careful_pages_are_true_line_by_line(pages):
    for page in pages:
        assert re.match(r"User: .+\nAssistant:<(think|answer)>", page.text)
        if page.author == "careful" and page.response.endswith("</answer>"):
            think = page.response.partition("<think>")[2].partition("</think>")[0]
            for line, truth in zip(think.split("\n"), page.problem.meta["values"], strict=True):
                assert {python_says(step) for step in line.split("=")} == {truth}


def test_other_language_and_settings(pages):
    thinking = [p for p in pages if p.problem.language == "en" and p.author != "direct"]
    share = sum(bool(re.search("[真假]", page.response.partition("</think>")[0])) for page in thinking) / len(thinking)
    assert 0.06 < share < 0.14
    sure = get("logic", direct=0.0, sloppy=0.0, truncated=0.0, other_language=0.0, languages=["en"])
    assert all(sure.verify(page.problem, page.response).correct for page in map(sure.written, range(100)))
    assert all(sure.document(i).isascii() for i in range(100))
