"""reasoning-gym as tasks: right answers pay, partial ones and those of other problems do not, splits are disjoint."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest

from bessemer.addons.tasks.gym import _datasets, allows
from bessemer.errors import UserError
from bessemer.tasks import get
from bessemer.tasks.base import split_of_text

QUICK = ["word_sorting", "chain_sum", "gcd", "spell_backward", "simple_equations", "knights_knaves", "number_sorting"]


def reply(answer):
    return f"<think>t</think><answer>{answer}</answer>"


def reason(task, problem, answer):
    return task.verify(problem, reply(answer)).reason


@pytest.mark.parametrize("name", QUICK)
def test_own_answers_pay_and_those_of_others_do_not(name):
    task = get(f"gym:{name}")
    assert (task.name, task.domain, task.languages) == (f"gym:{name}", "gym", ("en",))
    problems = [task.problem("test", i) for i in range(4)]
    for problem in problems:
        assert reason(task, problem, problem.meta["answer"]) == "correct"
        assert problem.meta["difficulty"] == 0
        for other in problems:
            if other.meta["answer"] != problem.meta["answer"]:
                assert reason(task, problem, other.meta["answer"]) in ("wrong-value", "unparsable")


def test_a_scorer_s_partial_score_is_credit_where_it_is_asked_for():
    plain, fine = get("gym:chain_sum"), get("gym:chain_sum", partial_credit=True)
    problem = fine.problem("train", 0)
    assert problem == plain.problem("train", 0)
    right = problem.meta["answer"]
    for answer, credit in ((right, 1.0), (f"{right}{right}", 0.5), ("banana", 0.0), (f"-{right}", None)):
        graded, strict = (task.verify(problem, reply(answer)) for task in (fine, plain))
        assert (graded.correct, graded.reason) == (strict.correct, strict.reason)
        assert strict.partial is None and strict.score == float(answer == right)
        assert credit is None or graded.score == credit
    ignores = get("gym:gcd", partial_credit=True)  # what the scorer pays without the sign as well earns nothing with it
    problem = ignores.problem("train", 0)
    assert ignores.verify(problem, reply("-" + problem.meta["answer"])).score < 1


def test_a_dataset_s_own_settings_are_options():
    task = get("gym:chain_sum", min_terms=5, max_terms=5)
    problem = task.problem("test", 1)
    assert problem.prompt.count("+") + problem.prompt.count(" - ") == 4
    assert task.verify(problem, reply(problem.meta["answer"])).correct
    for settings, fault in (
        ({"terms": 5}, "no setting 'terms'.*min_terms"),
        ({"min_terms": 9, "max_terms": 2}, "max_terms must be"),
        ({"min_terms": "x"}, "cannot generate"),
    ):
        with pytest.raises(UserError, match=fault):
            get("gym:chain_sum", **settings)
    with pytest.raises(UserError, match="level decides min_terms"):
        get("gym:chain_sum@2", min_terms=5)


@pytest.mark.parametrize("name", ["gcd", "coin_flip", "chain_sum"])
def test_no_question_is_in_both_splits(name):
    """coin_flip has so few questions that two streams of seeds would share some."""
    task = get(f"gym:{name}")
    questions = {
        split: {task.problem(split, i, seed).prompt for i in range(30) for seed in (0, 1)}
        for split in ("train", "test")
    }
    assert not questions["train"] & questions["test"] and len(questions["train"]) > 10
    for split, prompts in questions.items():
        assert {split_of_text(prompt, 0.5) for prompt in prompts} == {split}


def test_the_same_in_every_process():
    """This includes generators that use the global random state or iterate over sets."""
    code = (
        "from bessemer.tasks import get\n"
        "def drawn():\n"
        "    for n in ('isomorphic_strings', 'ransom_note', 'list_functions', 'pool_matrix', 'gcd'):\n"
        "        yield from (get('gym:' + n).problem(split, 1, 5) for split in ('train', 'test'))\n"
    )
    other = subprocess.run(
        [sys.executable, "-c", code + "print(list(drawn()))"], env={**os.environ, "PYTHONHASHSEED": "77"},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    room: dict = {}
    exec(code, room)
    assert len(other) > 1000 and other == f"{list(room['drawn']())}\n"


NUMBER = r"-?[0-9]+(?:\.[0-9]+)?"
PARTS = [
    ("word_sorting", lambda gold: ", ".join(reversed(gold.split(", ")))),
    ("spell_backward", lambda gold: gold[::-1]),
    ("spell_backward", lambda gold: gold[:-1]),
    ("simple_equations", lambda gold: f"the answer is {gold}"),
    ("chain_sum", lambda gold: f"{gold} or {int(gold) + 1}"),
    ("gsm_symbolic", lambda gold: f"{gold} or 1"),
    ("gsm_symbolic", lambda gold: f"1 or {gold}"),
    ("kakurasu", lambda gold: f"the answer is {gold}"),
    ("survo", lambda gold: f"the answer is {gold}"),
    ("coin_flip", lambda gold: "0"),
    ("sokoban", lambda gold: f"{gold} or ULLRDRDLRDL"),
    ("puzzle24", lambda gold: "4*6*1*1" if "6" not in gold else "3*8*1*1"),
    ("number_sorting", lambda gold: "[]"),
    ("number_sorting", lambda gold: re.sub(NUMBER, "nan", gold)),
    ("number_sorting", lambda gold: re.sub(NUMBER, lambda number: f"{float(number[0]) + 0.5}", gold)),
    ("game_of_life_halting", lambda gold: "banana"),
    ("game_of_life_halting", lambda gold: "True" if gold == "False" else "False"),
    ("complex_arithmetic", lambda gold: "nan"),
    ("complex_arithmetic", lambda gold: "0 + nani"),
    ("gsm_symbolic", lambda gold: f"-{gold}"),
    ("word_sorting", lambda gold: f"{gold}, and"),
    ("prime_factorization", lambda gold: "a × b"),  # its scorer raises
    ("knights_knaves", lambda gold: gold.split(",")[0]),
    ("knights_knaves", lambda gold: f"It is false that {gold}"),
    ("knights_knaves", lambda gold: gold.replace(", and", ", or")),
    ("knights_knaves", lambda gold: f"{gold[:-1]}, and not really."),
    ("fraction_simplification", lambda gold: f"{gold} or 151/377"),
    ("fraction_simplification", lambda gold: f"{gold}5"),
    ("letter_jumble", lambda gold: f"{gold} and any other words"),
    ("quantum_lock", lambda gold: f"-{gold}"),
    ("quantum_lock", lambda gold: gold.replace("→", "nor")),
    ("tower_of_hanoi", lambda gold: f"-{gold}"),
    ("gsm_symbolic", lambda gold: f"{gold}%"),
]


@pytest.mark.parametrize(("name", "part"), PARTS, ids=lambda value: value if isinstance(value, str) else "")
def test_parts_do_not_pay(name, part):
    task = get(f"gym:{name}")
    problem = task.problem("train", 0)
    answer = part(problem.meta["answer"])
    assert answer != problem.meta["answer"]
    assert reason(task, problem, answer) in ("wrong-value", "unparsable")


def test_what_the_library_rounds_or_adds_up_does_not_pay():
    """puzzle24 cuts 24.1 down to 24, spell_backward's ninths add up to more than 1, and game_of_life compares the cells
    that both grids have."""
    twenty_four = {"answer": "8*9/(3*1)", "metadata": {"numbers": [8, 9, 3, 1]}}
    assert not allows("puzzle24", "8 * 3 + 1 / 9", twenty_four) and allows("puzzle24", "8*9/(3*1)", twenty_four)
    spelling, life = get("gym:spell_backward"), get("gym:game_of_life")
    for n in range(40):
        problem = spelling.problem("train", n)
        assert reason(spelling, problem, f"{problem.meta['answer']}zq") == "wrong-value"
    problem = life.problem("train", 0)
    grid = json.loads(problem.meta["answer"])
    wider = [[*row, 0] for row in grid]
    for other in (wider, [*wider, wider[0]]):
        assert reason(life, problem, json.dumps(other)) == "wrong-value"
    assert reason(life, problem, json.dumps(grid)) == "correct"


@pytest.mark.parametrize(("gold", "answer"), [("50 days", "{} banana"), ("50 days", "50 hours"), ("00:47", "-{}")])
def test_of_an_interval_every_word_counts(gold, answer):
    """Python reads -00 as 0."""
    task = get("gym:time_intervals")
    problem = next(p for p in (task.problem("train", i) for i in range(20)) if p.meta["answer"] == gold)
    assert reason(task, problem, answer.format(gold)) in ("wrong-value", "unparsable")


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("knights_knaves", lambda gold: ", ".join(reversed(gold.rstrip(".").split(", and ")))),
        ("fraction_simplification", lambda gold: gold.strip("$").replace("dfrac", "frac")),
        ("quantum_lock", lambda gold: gold.lower().replace(" ", "")),
        ("word_sorting", lambda gold: gold.replace(", ", ",")),
        ("prime_factorization", lambda gold: " × ".join(reversed(gold.split(" × ")))),
        ("polynomial_multiplication", lambda gold: f"({gold})*1"),
        ("complex_arithmetic", lambda gold: gold.replace(" ", "")),
    ],
)
def test_right_answers_in_other_words_pay(name, written):
    task = get(f"gym:{name}")
    for problem in (task.problem("train", i) for i in range(6)):
        assert reason(task, problem, written(problem.meta["answer"])) == "correct"


def test_a_word_may_be_one_of_those_that_python_reads_as_numbers():
    item = {"answer": "FAN,FUN,NUN", "metadata": {}}
    assert allows("word_ladder", "FAN,NAN,NUN", item) and not allows("gcd", "nan", {"answer": "4"})


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_no_dataset_pays_for_what_is_no_answer(part):
    paid = []
    unasked = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
    for name in sorted(_datasets()[0] - unasked)[part::8]:
        task = get(f"gym:{name}")
        for problem, other in pairwise(task.problem("train", i) for i in range(3)):
            gold, wrong = problem.meta["answer"], other.meta["answer"]
            negative = re.sub(NUMBER, lambda number: f"-{number[0]}".replace("--", ""), gold)
            answers = {"nan", "banana", re.sub(NUMBER, "nan", gold), gold if name == "puzzle24" else negative}
            right = {gold, "-0", "-0.0"} if gold in ("0", "0.0") else {gold}
            answers |= {f"-{gold}", f"not {gold}", f"{gold} banana", f"{gold} or {wrong}"}
            paid += [(name, gold, answer) for answer in answers - right if reason(task, problem, answer) == "correct"]
    assert paid == []


@pytest.mark.parametrize(("written", "correct"), [("{}", True), ("{}, {}", False)])
def test_an_answer_must_be_one_point(written, correct):
    task = get("gym:advanced_geometry")
    problem = next(p for p in (task.problem("train", i) for i in range(20)) if p.meta["answer"].startswith("("))
    point = problem.meta["answer"].replace(" ", "")
    assert (reason(task, problem, written.format(point, "(1, 2)")) == "correct") is correct


@pytest.mark.parametrize("name", ["spiral_matrix", "string_insertion", "binary_matrix", "n_queens", "number_sorting"])
def test_answers_are_never_run(name, tmp_path):
    task = get(f"gym:{name}")
    problem = task.problem("train", 0)
    mark = tmp_path / "mark"
    for answer in (f"open('{mark}', 'w')", f"__import__('pathlib').Path('{mark}').touch()"):
        assert reason(task, problem, answer) != "correct"
    assert not mark.exists()


def test_every_use_of_an_evaluator_in_the_library_is_known():
    """If a new version of the library evaluates answers elsewhere, it must be reviewed first."""
    root = Path(find_spec("reasoning_gym").origin).parent
    uses = {
        path.stem
        for path in root.rglob("*.py")
        if re.search(r"(?<![\w.])(?:eval|exec)\(|literal_eval|pickle|subprocess|os\.system", path.read_text())
    }
    answers = {"spiral_matrix", "string_insertion", "binary_matrix", "n_queens"}
    own = {"number_sorting", "bitwise_arithmetic", "basic_arithmetic", "codeio", "generators_00_49", "generators_50_99"}
    assert uses <= answers | own


def test_levels():
    easy, hard = get("gym:chain_sum@1"), get("gym:chain_sum@4")
    assert easy.problem("train", 0).meta["difficulty"] == 1 and hard.problem("train", 0).meta["difficulty"] == 4
    lengths = [sum(len(task.problem("train", i).prompt) for i in range(12)) for task in (easy, hard)]
    assert lengths[0] < lengths[1]
    assert reason(hard, hard.problem("test", 0), hard.problem("test", 0).meta["answer"]) == "correct"


def test_every_dataset_of_the_library_is_available():
    names, levelled = _datasets()
    assert len(names) >= 100 and len(levelled) >= 95 and "composite" not in names


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (lambda: get("gym:word_sortign"), "word_sorting"),
        (lambda: get("gym:"), "did you mean"),
        (lambda: get("gym"), "gym:NAME"),
        (lambda: get("gym:gcd@0"), "1 to 20"),
        (lambda: get("gym:gcd@two"), "1 to 20"),
        (lambda: get("gym:acre@1"), "no levels"),
        (lambda: get("gym:gcd").document(0), "no pre-training documents"),
        (lambda: get("gym:gcd", languages=["zh"]), "no language 'zh'"),
        (lambda: get("gym:graph_color").problem("train", 0), "its own scorer"),
    ],
)
def test_an_error_names_the_fix(wrong, hint):
    with pytest.raises(UserError, match=hint):
        wrong()
