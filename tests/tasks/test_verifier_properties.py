"""Answers that are right or wrong by construction (bench/verifier_properties.py): no verdict is wrong, either way.

The result of the whole run, 100,000 answers per family, is committed: bench/results/verifier_properties.json.
"""

import importlib.util
import json
import time
from pathlib import Path

import pytest

from bessemer.errors import UserError
from bessemer.tasks import Problem, get

BENCH = Path(__file__).parents[2] / "bench"
spec = importlib.util.spec_from_file_location("verifier_properties", BENCH / "verifier_properties.py")
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)


@pytest.mark.parametrize("name", bench.FAMILIES)
def test_no_verdict_is_wrong(name):
    failed, right, wrong = bench.wrong_verdicts(name, 24 if name in bench.SLOW else 1500, seed=1)
    assert [(problem.meta, problem.prompt, answer, is_right) for _, problem, answer, is_right in failed] == []
    assert right > 5 and wrong > 5


def test_the_committed_run_is_whole():
    result = json.loads((BENCH / "results" / "verifier_properties.json").read_text())
    assert result.keys() == bench.FAMILIES.keys()
    for name, row in result.items():
        assert row["right"] + row["wrong"] == bench.SLOW.get(name, bench.COUNT)
        assert row["refused though right"] == row["paid though wrong"] == 0


@pytest.mark.parametrize(
    ("family", "gold"),
    [
        *(
            ("jsonl", gold)
            for gold in ("nan", "NaN", "-inf", "Infinity", "N/A", "\\text{N/A}", "not available", "None")
        ),
        *(
            ("jsonl", gold)
            for gold in ("null", "not a number", float("nan"), float("inf"), "\\frac{1}{0}", "0/0", "", " ")
        ),
        *(("gsm8k", gold) for gold in ("2+2 #### nan", "#### ", "#### inf")),
        *(("puzzle", gold) for gold in ("nan", "N/A", float("inf"), {"a": [float("nan")]}, ["not available"])),
    ],
)
def test_a_gold_answer_that_is_no_value_is_named(tmp_path, family, gold):
    path = tmp_path / "file.jsonl"
    path.write_text(
        json.dumps({"question": "Fine?", "answer": "#### 7"}) + "\n" + json.dumps({"question": "Q", "answer": gold})
    )
    with pytest.raises(UserError, match=r"line 2: .*(not a value|is empty|with a value|no text or number|no answer)"):
        get(f"{family}:{path}")


@pytest.mark.parametrize(
    ("gold", "answer", "question", "reason"),
    [
        ("75", "75%", "What percent is it?", "correct"),
        ("75", "75%", "How many apples?", "wrong-value"),
        ("75\\%", "75", "How much?", "correct"),
        ("75\\%", "75^\\circ", "How much?", "wrong-value"),
        ("18", "\\$18", "An egg costs $2. How much does she make?", "correct"),
        ("18", "$18", "How many eggs are left?", "wrong-value"),
        ("\\$18", "£18", "How much?", "wrong-value"),
        ("10\\text{ cm}", "10 cm", "How long?", "correct"),
        ("10\\text{ cm}", "10\\text{ m}", "How long?", "wrong-value"),
        ("10\\text{ cm}", "10 m", "How long?", "wrong-value"),
        ("5t", "5", "Simplify 2t+3t.", "wrong-value"),  # math-verify takes t for a unit
        ("K", "\u212a", "Which?", "unparsable"),  # the Kelvin sign
        ("x^2+1", "\\mathrm{х}^2+1", "Which?", "unparsable"),
        ("1024", "2^{10}", "How many subsets?", "correct"),
        ("1024", "4^5", "Compute 2^{10}.", "unfinished"),
        ("3/4", "\\frac34", "What share?", "correct"),
        ("3/4", "6/8", "What share?", "correct"),
        ("3/4", "6/8", "Write 6/8 otherwise.", "unfinished"),
        ("3/4", "12/16", "Reduce 6/8 to lowest terms.", "unfinished"),
        ("12345678901234567890", "12,345,678,901,234,567,890", "How many?", "correct"),
        ("1234", "1{,}234\r\n", "How many?", "correct"),
        ("-2", "\u22122", "How many?", "correct"),
    ],
)
def test_units_letters_and_forms(gold, answer, question, reason):
    assert bench.MATHS.grade(Problem("p", question, "en", {"gold": gold}), answer)[0] == reason


LENGTH = 100_000
HOSTILE = {
    "digits": "9" * LENGTH,
    "zeros": "0." + "0" * LENGTH,
    "groups": "1" + ",234" * (LENGTH // 4),
    "blanks": " " * LENGTH + "7" + " " * LENGTH,
    "blanks inside": "7" + " " * LENGTH + "x",
    "signs": "-" * LENGTH,
    "braces": "{" * LENGTH,
    "boxes": "\\boxed{" * (LENGTH // 7) + "7" + "}" * (LENGTH // 7),
    "texts": "\\text{a}" * (LENGTH // 8),
    "open texts": "\\text{" * (LENGTH // 6),
    "thin spaces": "7" + "\\," * (LENGTH // 2) + "x",
    "fractions": "\\frac" * (LENGTH // 5),
    "powers": "9^" * (LENGTH // 2),
    "dollars": "$" * LENGTH,
    "units": "7 cm" * (LENGTH // 4),
    "commas": "true," * (LENGTH // 5),
    "fences": "```json\n" * (LENGTH // 8),
    "brackets": "[" * LENGTH,
    "quotes": '"' * LENGTH,
    "unseen": "\u200b" * LENGTH,
    "marks": "7" + "\u0301" * LENGTH,
    "lines": "A\n" * (LENGTH // 2),
    "parentheses": "(" * LENGTH + "7" + ")" * LENGTH,
    "stars": "** " * (LENGTH // 3),
}
CODE, GENERAL = get("code"), get("general")
PROBLEMS = {
    "code": (CODE, CODE.problem("test", 0)),
    "general": (GENERAL, GENERAL.problem("test", 0)),
    "number": (bench.MATHS, bench.ask("7", "How many cm?")),
    "expression": (bench.MATHS, bench.ask("x+\\text{ cm}")),
    "quantity": (bench.MATHS, bench.ask("7", unit="cm", tolerance=0.01)),
    "choice": (bench.CHOICE, bench.ask("A", choices=["7", "8"])),
    "puzzle": (bench.PUZZLE, bench.ask(["7"])),
    "words": (bench.NAMED["words"], bench.ask(7, key="value")),
    "logic": (bench.NAMED["logic"], bench.ask([True, False, True], key="values")),
    "countdown": (bench.NAMED["countdown"], Problem("p", "", "en", {"numbers": [3, 4], "target": 7})),
}
FRAMES = (
    "<think>t</think><answer>{}</answer>",
    "<think>t</think>\n\n{}\\boxed{{7}}{}",
    "<think>{}</think>\n\n\\boxed{{7}}",
    "{}",
)


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_hundred_thousand_hostile_characters_take_less_than_a_tenth_of_a_second(name):
    task, problem = PROBLEMS[name]
    slow = []
    for text in HOSTILE.values():
        for frame in FRAMES:
            completion, seconds = frame.replace("{}", text).replace("{{7}}", "{7}"), []
            for _ in range(3):  # best of three in CPU time
                began = time.process_time()
                verdict = task.verify(problem, completion)
                seconds.append(time.process_time() - began)
                if seconds[-1] < 0.05:
                    break
            slow += [(frame, text[:20], min(seconds))] if min(seconds) >= 0.1 else []
            # text inside the thoughts is free; the blanks around one 7 are white space in the answer tags
            assert not verdict.sound or frame.startswith("<think>{}"), (frame, text[:20])
    assert slow == []
