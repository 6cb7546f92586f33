"""The corpus follows TraceMix in shares, correctness and lengths; careful authors never claim a falsehood."""

import json
import random
import re
from collections import Counter, defaultdict

import pytest

from bessemer.addons.tasks import general_requests
from bessemer.addons.tasks.countdown_diagnosis import diagnose, rates
from bessemer.tasks import get
from bessemer.tasks.base import split_of
from bessemer.tasks.countdown_expressions import LARGEST

N = 6000
TASK = get("countdown")
PAGES = [TASK.written(i) for i in range(N)]


def right(task, page):
    """Whether the page's answer is right, with or without thinking."""
    problem, response = page.problem, page.response
    return task.verify(problem, response if page.author != "direct" else "<think>t</think>" + response).correct


def by_author(pages):
    groups = defaultdict(list)
    for page in pages:
        groups[page.author].append(page)
    return groups


GROUPS = by_author(PAGES)


def board(pages):
    return rates(diagnose(page.problem, page.response) for page in pages)


def test_shares_of_authors():
    share = {author: len(pages) / N for author, pages in GROUPS.items()}
    # four standard deviations of a share in 6000 are at most 0.026
    mix, thinking = TASK.mix, 1 - TASK.mix.direct
    expected = {author: thinking * getattr(mix, author) for author in ("sloppy", "average", "careful", "systematic")}
    expected["direct"] = mix.direct
    assert share == pytest.approx(expected, abs=0.026)


def test_correct_share_is_low_but_rises_with_care():
    assert 0.25 < sum(right(TASK, page) for page in PAGES) / N < 0.33
    assert 0.20 < sum(TASK.verify(p.problem, p.response).sound for p in PAGES) / N < 0.26  # rewarded: with thoughts
    rate = {author: sum(right(TASK, p) for p in pages) / len(pages) for author, pages in GROUPS.items()}
    assert rate["sloppy"] < rate["average"] < rate["careful"] < rate["systematic"]


def test_documents_are_short():
    lengths = [len(page.text) for page in PAGES]
    assert 90 < sum(lengths) / N < 140
    assert max(lengths) < 700


def test_every_claim_of_careful_authors_is_true():
    for author in ("careful", "systematic"):
        rate = board(GROUPS[author])
        always = ("step_right", "linked", "right_numbers", "right_target", "yes_given_hit", "low_high_given_miss")
        assert all(rate[name] == 1.0 for name in always), rate
        assert rate["yes_given_miss"] == rate["repeated"] == rate["unread"] == 0.0
        for page in GROUPS[author]:
            if page.response.endswith("</answer>") and diagnose(page.problem, page.response).said_yes:
                assert TASK.verify(page.problem, page.response).correct


def test_sloppy_authors_are_sloppy_as_announced():
    rate = board(GROUPS["sloppy"])
    assert 0.87 < rate["step_right"] < 0.93
    assert 0.03 < rate["yes_given_miss"] < 0.07
    assert rate["yes_given_hit"] == 1.0 and rate["linked"] == 1.0
    assert 0.03 < rate["repeated"] < 0.12
    assert rate["waits"] == 0.0
    assert board(GROUPS["average"])["repeated"] == 0.0


def test_traces_say_wait_only_before_another_try():
    waits = 0
    for page in PAGES:
        lines = page.response.removeprefix("<think>").partition("</think>")[0].split("\n")
        waits += sum("wait" in line or "等等" in line for line in lines)
        closed = "</think>" in page.response
        assert not closed or not lines[-1].endswith(("wait", "等等"))
    assert 0.05 * N < waits < 0.3 * N


def test_form_of_the_text():
    for page in PAGES[:2000]:
        assert re.match("User: .+\nAssistant:<(think|answer)>", page.text)
        assert (page.author == "direct") == page.response.startswith("<answer>")
        assert not re.search(r" \d", page.response)  # a space before a digit costs a token
        assert all(int(n) <= LARGEST for n in re.findall(r"\d+", page.response))
    thinking = [page for page in PAGES if page.author != "direct"]
    cut = sum(not page.response.endswith("</answer>") for page in thinking) / len(thinking)
    assert 0.03 < cut < 0.07


def test_the_other_language_appears_only_as_often_as_set():
    english = [page for page in PAGES if page.problem.language == "en" and page.author != "direct"]
    assert 0.07 < sum(not page.response.isascii() for page in english) / len(english) < 0.13
    alone = get("countdown", languages=["en"])
    assert all(alone.document(i).isascii() for i in range(300))


def numbers_before(line):
    """The three numbers at the start of a drill line, in the prompt's notation, and the rest of the line."""
    numbers_match = re.match(r"(\d+)(, |、)(\d+)\2(\d+)(:| )", line)
    return ([int(numbers_match[i]) for i in (1, 3, 4)], line[numbers_match.end() :]) if numbers_match else ([], line)


def test_drills_are_true_and_have_their_share():
    drills = [TASK.drill(i) for i in range(N)]
    assert 0.14 < sum("Assistant:" not in TASK.document(i) for i in range(N)) / N < 0.18
    verdicts, kinds = Counter(), Counter()
    for page in drills:
        head, *lines = page.split("\n")
        assert head in ("Drill:", "练习:") and 8 <= len(lines) <= 16
        for line in lines:
            if claim := re.fullmatch(r"(\d+):(\d+) ?(low|high|yes|小|大|对)", line):
                kinds["comparison"] += 1
                value, target = int(claim[1]), int(claim[2])
                verdicts[claim[3]] += 1
                truth = ("yes", "对") if value == target else ("low", "小") if value < target else ("high", "大")
                assert claim[3] in truth
                continue
            numbers, line = numbers_before(line)
            if order := re.fullmatch(r"(?:order|排序):(\d+),(\d+),(\d+)", line):
                kinds["order"] += 1
                assert [int(n) for n in order.groups()] == sorted(numbers, reverse=True)
                continue
            written, *steps = line.split("=")
            chain = re.fullmatch(r"\(\d+[+*-]\d+\)[+*-]\d+|\d+-\(\d+[+*-]\d+\)", written)
            assert re.fullmatch(r"\d+[+*-]\d+", written) or chain, line
            kinds["try" if chain else "fact"] += 1
            assert sorted(numbers) == (sorted(int(n) for n in re.findall(r"\d+", written)) if chain else [])
            assert len(steps) == (2 if chain else 1), line
            assert all(eval(step) == eval(written) for step in steps), line
            assert re.fullmatch(r"\d+", steps[-1]) and all(int(n) <= LARGEST for n in re.findall(r"\d+", line)), line
    assert min(verdicts.values()) > 1000
    share = {kind: count / kinds.total() for kind, count in kinds.items()}
    assert share == pytest.approx({"comparison": 0.35, "try": 0.33, "order": 0.14, "fact": 0.18}, abs=0.01)


def test_no_page_works_on_numbers_of_the_test_split():
    """No question, try, guess or drill: nothing that combines three numbers in one expression."""
    expression = re.compile(r"\((\d+)[+*-](\d+)\)[+*-](\d+)|(\d+)[+*-]\((\d+)[+*-](\d+)\)")
    chains = re.compile(r"\d+(?:[+*-]\d+){2,}")
    by_split = Counter()
    pages = [("drill", TASK.drill(i)) for i in range(N)] + [("page", page.text) for page in PAGES]
    pages += [("arithmetic", get("arithmetic").document(i)) for i in range(1000)]
    for kind, text in pages:
        groups = [[int(n) for n in numbers if n] for numbers in expression.findall(text)]
        groups += [[int(n) for n in re.findall(r"\d+", chain)] for chain in chains.findall(text)]
        assert all(split_of(numbers) == "train" for numbers in groups), text
        by_split[kind] += len(groups)
    assert all(split_of(page.problem.meta["numbers"]) == "train" for page in PAGES)
    assert by_split["drill"] > 2 * N and by_split["page"] > N and by_split["arithmetic"] > 900


def test_no_page_of_other_tasks_answers_a_held_out_problem():
    """Not even one whose author confuses numbers or names."""
    products, rng = get("products"), random.Random(0)
    for index in range(2000):
        for message in products.written(index).messages:
            for call in message.get("tool_calls", ()):
                expression = json.loads(call["function"]["arguments"])["expression"]
                assert split_of([int(number) for number in expression.split("*")]) == "train"
        request = general_requests.sample_request("helpful", "train", "en", rng)
        other = general_requests.mistaken(request, rng)
        assert general_requests.split_of(other.family, other.slots) == "train"


def test_an_author_who_gives_up_answers_with_the_last_try_as_often_as_set():
    def copied(share):
        task = get("countdown", direct=0.0, truncated=0.0, give_up_last=share)
        copies = []
        for page in (task.written(i) for i in range(1500)):
            think, _, answer = page.response.removesuffix("</answer>").partition("</think><answer>")
            last = think.removeprefix("<think>").split("\n")[-1]
            if not last.endswith((" yes", "对")):
                copies.append(last.startswith(answer + "="))
        return sum(copies) / len(copies)

    assert copied(1.0) == 1.0
    chance = copied(0.0)  # one of at most 27 random expressions may coincide with the last try
    assert chance < 0.1
    assert copied(0.6) == pytest.approx(0.6 + 0.4 * chance, abs=0.06)


def test_an_answer_after_yes_is_a_literal_copy_of_the_try():
    n_yes = 0
    for page in PAGES:
        think, closed, rest = page.response.partition("</think><answer>")
        last = think.split("\n")[-1].removeprefix("<think>")
        if closed and last.endswith((" yes", "对")):
            n_yes += 1
            assert last.startswith(rest.removesuffix("</answer>") + "="), page.response
    assert n_yes > 500


def test_settings_take_effect():
    task = get("countdown", direct=0.0, sloppy=0.0, average=0.0, careful=0.0, systematic=1.0, give_up_systematic=0.0)
    pages = [task.written(i) for i in range(500)]
    rate = sum(right(task, page) for page in pages) / 500
    assert 0.91 < rate < 0.99  # all but the truncated ones
    assert board(pages)["systematic"] == 1.0


def test_arithmetic_pages():
    task = get("arithmetic")
    groups = by_author(task.written(i) for i in range(3000))
    rate = {author: sum(right(task, page) for page in pages) / len(pages) for author, pages in groups.items()}
    assert 0.22 < rate["direct"] < 0.38
    assert 0.45 < rate["sloppy"] < 0.70
    assert 0.91 < rate["careful"] < 0.99  # all but the truncated ones
    for page in groups["careful"]:
        for left, op, other, value in re.findall(r"(\d+)([+*-])(\d+)=(\d+)", page.response):
            assert eval(f"{left}{op}{other}") == int(value)
        if page.response.endswith("</answer>"):
            assert task.verify(page.problem, page.response).correct
