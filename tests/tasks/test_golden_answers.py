"""The golden answers (tests/data/golden): their form, the command that measures graders on them, and our graders."""

import importlib.util
from collections import Counter, defaultdict
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench" / "golden_answers.py"
spec = importlib.util.spec_from_file_location("golden_answers", BENCH)
golden = importlib.util.module_from_spec(spec)
spec.loader.exec_module(golden)
ANSWERS, SECOND = golden.entries(), golden.entries(folder=golden.SECOND)
NEEDED = {"id", "family", "task", "language", "question", "completion", "label"}
ALLOWED = NEEDED | {"gold", "choices", "unit", "tolerance", "tests", "entry_point", "why"}


def test_every_line_has_the_fields_of_its_task():
    for entry in ANSWERS + SECOND:
        assert entry.keys() >= NEEDED and entry.keys() <= ALLOWED, entry["id"]
        assert entry["label"] in ("right", "wrong") and entry["language"] in ("en", "zh"), entry["id"]
        assert entry["id"].rpartition("-")[0] == entry["family"], entry["id"]
        if entry["task"] == "code":
            assert entry["tests"] and "gold" not in entry, entry["id"]
        elif entry["task"] == "choice":
            assert entry["gold"] in golden._letters(entry), entry["id"]
        else:
            assert entry["gold"] and "choices" not in entry and "tests" not in entry, entry["id"]
            assert ("####" in entry["gold"]) == (entry["task"] == "gsm8k"), entry["id"]


def test_no_answer_is_listed_twice_and_no_question_has_two_golds():
    every = ANSWERS + SECOND
    assert len({entry["id"] for entry in every}) == len(every)
    assert len({(entry["question"], entry["completion"]) for entry in every}) == len(every)
    golds, labels = defaultdict(set), defaultdict(set)
    for entry in every:
        golds[entry["question"]].add(str([entry.get(key) for key in ("gold", "choices", "tests", "unit", "tolerance")]))
        labels[entry["question"]].add(entry["label"])
    assert all(len(gold) == 1 for gold in golds.values())
    assert all(label == {"right", "wrong"} for label in labels.values())  # no question that one verdict satisfies
    assert not {entry["question"] for entry in ANSWERS} & {entry["question"] for entry in SECOND}


def test_the_shares_match_those_of_a_useful_measure():
    families = Counter(entry["family"] for entry in ANSWERS)
    right = sum(entry["label"] == "right" for entry in ANSWERS)
    assert len(ANSWERS) >= 340 and 0.55 <= right / len(ANSWERS) <= 0.60
    assert len(families) >= 12 and min(families.values()) >= 20
    assert sum(entry["language"] == "zh" for entry in ANSWERS) >= 60
    assert sum("<think>" in entry["completion"] for entry in ANSWERS) >= 100


def test_counts_distinguish_refusals_from_payments():
    paid = {grader: {entry["id"]: value for entry in ANSWERS} for grader, value in (("yes", True), ("no", False))}
    yes, no = (golden.count(ANSWERS, verdicts) for verdicts in paid.values())
    assert yes["judged"] == no["judged"] == len(ANSWERS)
    assert yes["right_refused"] == no["wrong_paid"] == 0
    assert yes["agree"] == no["right_refused"] == yes["right"]
    assert no["agree"] == yes["wrong_paid"] == len(ANSWERS) - yes["right"]


def test_the_peers_are_the_installed_ones_and_judge_no_programs():
    pytest.importorskip("lm_eval")
    first = {}
    for entry in ANSWERS:
        marks = {"choice": f"({entry.get('gold')})", "code": "```"}  # what every grader of that kind reads
        if entry["label"] == "right" and marks.get(entry["task"], "\\boxed") in entry["completion"]:
            first.setdefault(entry["task"], entry)
    chosen = list(first.values())
    assert {entry["task"] for entry in chosen} == {"jsonl", "gsm8k", "choice", "code"}
    by_task = {entry["task"]: golden.lm_eval(chosen)[entry["id"]] for entry in chosen}
    assert by_task == {"jsonl": True, "gsm8k": True, "choice": True, "code": None}
    by_task = {entry["task"]: golden.math_verify(chosen)[entry["id"]] for entry in chosen}
    assert by_task["jsonl"] is by_task["gsm8k"] is True and by_task["code"] is None


@pytest.mark.slow
def test_our_graders_agree_with_the_labels_and_pay_no_wrong_answer():
    verdicts = golden.ours(ANSWERS)
    counts = golden.count(ANSWERS, verdicts)
    wrong_paid = [e["id"] for e in ANSWERS if e["label"] == "wrong" and verdicts[e["id"]]]
    assert wrong_paid == []
    assert counts["agree"] >= 0.98 * counts["judged"], [
        e["id"] for e in ANSWERS if e["label"] == "right" and not verdicts[e["id"]]
    ]
