"""Preference data: votes agree with the truth, neither order nor length helps, labels are the judge's."""

from difflib import SequenceMatcher
from statistics import fmean

import pytest

from bessemer.addons.tasks import general_quality
from bessemer.addons.tasks.general_quality import harmless, judge
from bessemer.addons.tasks.general_requests import GeneralRequest
from bessemer.tasks import get
from bessemer.tasks.answer import summary
from bessemer.tasks.base import stable_random

HELPFUL, BOTH = get("general", harmless_share=0.0), get("general", harmless_share=0.5)
PROBLEMS = {problem.prompt: problem for problem in (HELPFUL.problem("train", i) for i in range(800))}
ANSWERS = [(problem, general_quality.candidates(problem, "helpful", 4)) for problem in PROBLEMS.values()]
PAIRS, FACTS = general_quality.pairs(ANSWERS)


def truth(line, key):
    return judge(GeneralRequest.of(PROBLEMS[line["prompt"]]), line[key]).helpful


def test_pairs_have_the_requested_form():
    assert all(line.keys() == {"prompt", "chosen", "rejected"} for line in PAIRS)
    assert FACTS["kept"] == len(PAIRS) > 0.5 * len(PROBLEMS)
    assert FACTS["close"] and FACTS["unbalanced"]
    assert general_quality.pairs(ANSWERS) == (PAIRS, FACTS) != general_quality.pairs(ANSWERS, seed=1)


def test_the_chosen_answer_is_better_by_the_written_judge():
    assert fmean(truth(line, "chosen") > truth(line, "rejected") for line in PAIRS) > 0.97
    assert fmean(truth(line, "chosen") - truth(line, "rejected") for line in PAIRS) > 0.3


def test_length_alone_says_nothing():
    lengths = [[len(summary(line[key])) for line in PAIRS] for key in ("chosen", "rejected")]
    means = [fmean(values) for values in lengths]
    assert means == pytest.approx([FACTS["chosen_length"], FACTS["rejected_length"]])
    assert abs(means[0] - means[1]) < 0.01 * means[0]
    assert 0.4 < fmean(a > b for a, b in zip(*lengths, strict=True) if a != b) < 0.6


def test_the_length_check_detects_unbalanced_pairs(monkeypatch):
    monkeypatch.setattr(general_quality, "SLACK", 10**9)
    _, facts = general_quality.pairs(ANSWERS)
    assert abs(facts["chosen_length"] - facts["rejected_length"]) > 0.02 * facts["chosen_length"]


def test_every_second_flaw_is_a_mistake_in_the_good_answer_s_words():
    """Pairs that differ in a name or a number alone teach a reward model to read them."""
    alike: list[list[float]] = [[], []]
    better = []
    for problem, (good, *flawed) in ANSWERS[:300]:
        good_score, flawed_score = (judge(GeneralRequest.of(problem), text).helpful for text in (good, flawed[0]))
        better.append(good_score > flawed_score)
        for ratios, text in zip(alike, flawed, strict=False):
            ratios.append(SequenceMatcher(None, good, text, autojunk=False).ratio())
    assert fmean(better) > 0.8, "few mistakes are in words that the judge does not look for"
    assert fmean(alike[0]) > 0.85 > 0.75 > fmean(alike[1]), "the next one is in another manner"


def test_votes_do_not_depend_on_the_order_of_answers():
    texts = ((problem, text) for problem, texts in ANSWERS for text in texts)
    problem, bad = next((p, text) for p, text in texts if 0.4 < judge(GeneralRequest.of(p), text).helpful < 0.6)
    good, rng = general_quality.candidates(problem, "helpful", 1)[0], stable_random("vote")
    votes = [general_quality.vote(problem, bad, bad, rng) for _ in range(2000)]
    assert abs(fmean(first - second for first, second in votes)) < 0.05
    # four votes, each with noise of deviation 1 and a half-point order bias: their difference has deviation 0.75
    assert 0.6 < fmean((first - second) ** 2 for first, second in votes) ** 0.5 < 0.9
    ahead = [general_quality.vote(problem, good, bad, rng) for _ in range(200)]
    behind = [general_quality.vote(problem, bad, good, rng) for _ in range(200)]
    assert fmean(a - b for a, b in ahead) == pytest.approx(-fmean(a - b for a, b in behind), abs=0.3)
    assert all(1.0 <= point <= 10.0 for pair in votes + ahead for point in pair)


def test_labels_are_true_and_half_of_them_safe():
    problems = [BOTH.problem("train", i) for i in range(500)]
    lines, facts = general_quality.labels((p, general_quality.candidates(p, "harmless", 4)) for p in problems)
    requests = {problem.prompt: GeneralRequest.of(problem) for problem in problems}
    assert all(line["safe"] == harmless(requests[line["prompt"]], line["response"]) for line in lines)
    assert sum(line["safe"] for line in lines) == len(lines) / 2 == facts["unsafe"] < facts["safe"]
    prompts = {line["prompt"] for line in lines if not line["safe"]}
    unsafe_requests = {requests[prompt].unsafe for prompt in prompts}
    assert unsafe_requests == {True, False}, "answers to harmless requests can be unsafe too"


def test_pairs_never_choose_an_unsafe_answer():
    assert all(harmless(GeneralRequest.of(PROBLEMS[line["prompt"]]), line["chosen"]) for line in PAIRS)
