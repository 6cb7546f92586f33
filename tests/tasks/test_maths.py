"""Mathematics from files: numbers compared exactly, the rest by math-verify, broken lines named, splits apart."""

import json
import re
import threading
from fractions import Fraction
from statistics import fmean

import pytest
import released_answers as released
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.addons.tasks.maths_questions import parse_numeral, peeled
from bessemer.data.chat import opening
from bessemer.errors import UserError
from bessemer.tasks import Problem, get, verdict_metrics

LINES = [
    {"question": f"What is {n}+{n}?", "answer": f"Add: <<{n}+{n}={2 * n}>>{2 * n}.\n#### {2 * n}"} for n in range(99)
]


@pytest.fixture
def file(tmp_path):
    def write(lines, name="maths.jsonl"):
        path = tmp_path / name
        path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), "utf-8")
        return path

    return write


@pytest.fixture
def task(file):
    return get(f"jsonl:{file([{'problem': 'Compute $1+1$.', 'answer': '2', 'level': 'Level 3'}] * 60)}")


def judged(task, gold, answer, prompt="Compute it."):
    verdict = task.verify(Problem("p", prompt, "en", {"gold": gold}), f"<think>t</think><answer>{answer}</answer>")
    return verdict.reason, verdict.answer


@settings(max_examples=200, deadline=None)
@given(st.integers(-(10**12), 10**12), st.integers(1, 10**6))
def test_numbers_are_read_exactly(n, d):
    assert parse_numeral(f"{n}").value == n
    assert parse_numeral(f"{n:,}").value == n
    assert abs(parse_numeral(f"{n}.50").value) == abs(n) + Fraction(1, 2)
    value = Fraction(n, d)
    for text in (f"{n}/{d}", f"\\frac{{{n}}}{{{d}}}", f"\\dfrac {{{n}}}{{{d}}}"):
        read = parse_numeral(text)
        assert read.value == value
        assert read.finished == (value.denominator == d and d > 1)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="0123456789.,/+-*^ $%\\{}()efrac９٣", max_size=40))
def test_what_is_read_is_a_number_to_python_too(text):
    read = parse_numeral(text)
    if read is not None and "frac" not in text:
        plain = re.sub(r"[, {}]", "", text).replace("*10^", "e")
        base, power, exponent = plain.partition("^")
        value = Fraction(base.lstrip("+-")) ** int(exponent) if power else Fraction(plain.removesuffix("."))
        assert read.value == (-value if power and plain.startswith("-") else value)


@pytest.mark.parametrize(
    ("gold", "answer", "reason"),
    [
        ("42", "42", "correct"),
        ("42", "$42$", "correct"),
        ("42", "\\boxed{42}", "correct"),
        ("42", "\\(42\\).", "correct"),
        ("42", "x = 42", "correct"),
        ("42", "42.00", "correct"),
        ("42", "\\$42", "wrong-value"),  # the question does not mention dollars
        ("1,200", "1200", "correct"),
        ("75\\%", "75", "correct"),
        ("\\frac{3}{4}", "0.75", "correct"),
        ("\\frac{3}{4}", "6/8", "correct"),
        ("42", "84/2", "unfinished"),
        ("42", "6*7", "unparsable"),
        ("42", "6 \\cdot 7", "unparsable"),
        ("42", "41=42", "unparsable"),
        ("42", "42, 43", "unparsable"),
        ("42", "\\boxed{41} \\boxed{42}", "several-answers"),
        ("42", "forty-two", "unparsable"),
        ("42", "４２", "unparsable"),
        ("42", "42.0000001", "wrong-value"),
        ("42", "-42", "wrong-value"),
        ("\\text{Evelyn}", "evelyn", "correct"),
        ("even", "\\text{even}", "correct"),
        ("even", "veen", "wrong-value"),
        ("even", "7", "unparsable"),
        ("x^2+2x+1", "1 + 2x + x^2", "correct"),
        ("x^2+2x+1", "$(1+x)^2$", "echo"),
        ("x^2+2x+1", "y = x^2+2x+1", "correct"),
        ("x^2+2x+1", "1 = x^2+2x+1", "unparsable"),
        ("x^2+2x+1", "x^2 = x^2+2x+1", "unparsable"),
        ("x^2+2x+1", "(x+1)^2", "echo"),
        ("x^2+2x+1", "x^2", "wrong-value"),
        ("x^2+2x+1", "$x^2$ or $x^2+2x+1$", "unparsable"),
        ("x^2+2x+1", "\\frac{", "unparsable"),
        ("\\sqrt{3}", "\\frac{\\sqrt{12}}{2}", "correct"),
        ("\\sqrt{3}", "\\sqrt2, \\sqrt3", "wrong-value"),
        ("\\{1,2\\}", "\\{2,1\\}", "correct"),
        ("1:2:3", "2 : 4 : 6", "correct"),
        ("1:2:3", "a:b:c = 1:2:3", "correct"),
        ("1:2:3", "1:1:6", "wrong-value"),  # the same fraction, to math-verify
        ("1:2:3", "1:2", "wrong-value"),
        ("1:2:3", "1/6", "wrong-value"),
        ("1:\\sqrt{3}:2", "1:\\sqrt3:2", "correct"),
        ("1:\\sqrt{3}:2", "1:2:\\sqrt3", "wrong-value"),
        ("x:y=2:3", "4:6", "correct"),
        ("12:30", "12:30", "correct"),
        ("12:30", "2:5", "wrong-value"),
        ("12:30", "0.4", "wrong-value"),
        ("x=2, y=3", "y = 3, x = 2", "correct"),
        ("x=2, y=3", "2, 3", "correct"),
        ("x=2, y=3", "(3, 2)", "wrong-value"),
        ("x=2, y=3", "3, 2", "wrong-value"),
        ("x=2, x=3", "3, 2", "correct"),
        ("x=2, x=3", "x = 3 \\text{ or } x = 2", "correct"),
        ("1,-2", "x=1 \\text{ or } x=-2", "correct"),
        ("(5,5)", "x_1=5, x_2=5", "correct"),
        ("x_1=1, x_2=-2", "(-2,1)", "wrong-value"),
        ("(-\\infty,2)\\cup(3,\\infty)", "(-\\infty,2)\\:\\cup\\:(3,\\infty)", "correct"),
        ("1,-2", "x=1, x=2", "wrong-value"),
        ("(2,3)", "a=2, b=3", "correct"),
        ("(2,3)", "(a, b) = (2, 3)", "correct"),
        ("(2,3)", "(a, b) = (3, 2)", "wrong-value"),
        ("2", "AB=2", "correct"),
        ("2", "f(2) = 2", "correct"),
        ("2", "a_{10}=3", "wrong-value"),
        ("2", "2x = 2", "unparsable"),
        ("2", "x = 4 = 2", "unparsable"),
        ("\\sqrt5", "AB = \\sqrt{5}", "correct"),
        ("x^2+1", "P(x) = x^2+1", "correct"),
        ("\\frac{19}{6}", "3\\frac{1}{6}", "correct"),
        ("-3.5", "-3 \\frac12", "correct"),
        ("4.5", "3\\frac{3}{2}", "unparsable"),
        ("3\\frac{2}{4}", "3.5", "correct"),
        ("3.5", "3\\frac{2}{4}", "correct"),
        ("0.\\overline{3}", "\\frac13", "correct"),
        ("\\frac{7}{30}", "0.2\\overline{3}", "correct"),
        ("0.\\overline{45}", "0.45", "wrong-value"),
        ("2, 3", "x=2, y=3", "correct"),
        ("\\left(2,3\\right)", "x=2, y=3", "correct"),
        ("x_1=2, x_2=3", "x=2 \\text{ or } x=3", "correct"),
        ("\\{2,3\\}", "x_1=2, x_2=3", "correct"),
        ("x=2, x=3", "t=2, t=3", "correct"),
        ("AC:CB=2:1", "AC:BC=2:1", "correct"),
        ("AC:CB=2:1", "CB:AC=2:1", "wrong-value"),
        ("x=1, y=2", "x=2, x=1", "wrong-value"),
        ("x=1, y=2", "x=1 or x=2", "wrong-value"),
        ("x=1, y=2", "\\{1,2\\}", "wrong-value"),
        ("(2,3)", "y=2, x=3", "wrong-value"),
        ("(2,3)", "y=3, x=2", "correct"),
        ("(2,3)", "x=2, \\quad y=3", "correct"),
        ("\\{1,2\\}", "x=1, y=2", "unparsable"),
        ("1,-2", "x=1, or x=-2", "correct"),
        ("5", "\\theta = 5", "correct"),
        ("x:y=2:3", "y:x=2:3", "wrong-value"),
        ("2516_8", "2516_{8}", "correct"),
        ("10080", "10,\\! 080", "correct"),
        ("11,\\! 111", "11111", "correct"),
        ("11,\\! 111", "11112", "wrong-value"),
        ("[-2,7]", "x \\in [-2,7]", "correct"),
        ("x \\in [-2,7]", "x \\in [-2,7]", "correct"),
        ("x \\in [-2,7]", "x \\in [-2,8]", "wrong-value"),
        ("2516_8", "2516_9", "wrong-value"),
        ("12:00", "12:00", "correct"),
        ("12:00", "0:00", "wrong-value"),
    ],
)
def test_judgements(task, gold, answer, reason):
    assert judged(task, gold, answer, "Expand (x+1)^2, please.")[0] == reason


@pytest.mark.parametrize(
    ("gold", "answer", "prompt", "reason"),
    [
        ("15", "15\\text{ cm}", "How long is it, in centimeters?", "correct"),
        ("15", "15 \\text{ cm}^2", "What is its area in square centimeters?", "correct"),
        ("15", "15 \\text{ cm}^2", "How long is it, in centimeters?", "wrong-value"),
        ("15", "15 \\text{ cm}", "What is its area in square centimeters?", "wrong-value"),
        ("15", "15 \\text{ km/h}", "How fast is it, in kilometers per hour?", "correct"),
        ("15", "15 mph", "How fast is it, in miles per hour?", "correct"),
        ("15", "15 \\text{ m/s}", "A ball falls at 9.8 m/s at first. And then?", "correct"),
        ("15", "15 \\text{ in}", "In which year is it in season?", "wrong-value"),
        ("864 \\mbox{ inches}^2", "864 \\text{ square inches}", "What is its area?", "correct"),
        ("12\\text{ in.}", "12 inches", "How long?", "correct"),
        ("12\\text{ in.}", "12 feet", "How long?", "wrong-value"),
        ("15", "15 \\text{ m/s}^2", "What is it in m/s^2?", "correct"),
        ("15", "15 \\text{ m}", "Let m be an integer; find n.", "wrong-value"),
        ("15", "15 \\text{ m}", "A pole of $20\\,\\text{m}$ breaks.", "correct"),
        ("15", "15 \\text{ m/s}", "It moves at $v$ m/s. Find v.", "correct"),
        ("15", "15 \\text{ cm/s}", "It moves at $v$ cm/s. Find v.", "correct"),
        ("15", "15 \\text{ sq. ft.}", "Give the area in sq. ft. please.", "correct"),
        ("15", "15 \\text{ L}", "多少L水？", "correct"),
        ("15", "15 \\text{ N}", "What is the force in N?", "correct"),
        ("15", "15\\mathrm{e}", "What is the value?", "wrong-value"),
        ("15", "15\\mathrm{x}", "Solve for x.", "wrong-value"),
        ("15", "15 \\text{ g}", "How many g are left?", "correct"),
        ("15", "15 \\text{ L}", "How many liters are left?", "correct"),
        ("1", "1 \\text{ box}", "How many boxes are left?", "correct"),
        ("15", "15元", "小明有多少元？", "correct"),
        ("15", "15个。", "有多少个苹果？", "correct"),
        ("15", "15米", "有多少个苹果？", "wrong-value"),
        ("15", "15 min", "How many minutes does it need?", "correct"),
        ("15", "15 min", "How many hours does it need?", "wrong-value"),
        ("\\$2.40", "\\$2.40/\\text{kg}", "How much does 1 kg cost?", "correct"),
        ("\\$2.40", "\\$2.40/\\text{m}", "How much does 1 kg cost?", "wrong-value"),
        ("36", "\\ 36\\ ", "What is it?", "correct"),
        ("\\frac{2a}{3b}", "\\frac{6a}{9b}", "Simplify the fraction.", "unfinished"),
        ("\\frac{2a}{3b}", "\\frac{2 a}{3 b}", "Simplify the fraction.", "correct"),
    ],
)
def test_a_unit_may_be_spelled_out_or_short(task, gold, answer, prompt, reason):
    assert judged(task, gold, answer, prompt)[0] == reason


def test_what_looks_like_a_time_may_be_a_ratio(task):
    assert judged(task, "3:10", "6:20", "In which ratio do they stand?")[0] == "correct"
    assert judged(task, "7:10", "\\frac{7}{10}", "What is BF : FC?")[0] == "correct"
    assert judged(task, "3:10", "3 : 10", "When does the train leave?")[0] == "correct"
    assert judged(task, "3:10", "6:20", "The duration is 90 minutes. When does it end?")[0] == "wrong-value"
    assert judged(task, "3:10", "6:20", "Q: A train leaves at 2:40. When does it arrive?")[0] == "wrong-value"
    assert judged(task, "2:3:4", "12:18:24", "Simplify 12:18:24.")[0] == "echo"


@pytest.mark.parametrize("gold", ["(3,5)", "m=3, b=5"])
def test_the_order_of_a_pair_is_the_question_s(task, gold):
    prompt = "Find the ordered pair (m, b) of the line y = mx + b."
    assert judged(task, gold, "m=3, b=5", prompt)[0] == judged(task, gold, "(3, 5)", prompt)[0] == "correct"
    for wrong in ("m=5, b=3", "(5, 3)"):
        assert judged(task, gold, wrong, prompt)[0] == "wrong-value"


def test_a_vote_is_cast_for_the_value(task):
    assert judged(task, "1:2:3", "2:4:6")[1] == judged(task, "1:2:3", "1:2:3")[1]
    assert {judged(task, "42", form)[1] for form in ("42", "42.0", "$42$", "84/2")} == {"42"}
    assert judged(task, "x^2+2x+1", "1+2x+x^2")[1] == judged(task, "x^2+2x+1", "x^2+2x+1")[1]


def test_judging_works_in_a_thread(task):
    """math-verify's own timeout uses an alarm signal, which would fail here."""
    verdicts = []
    thread = threading.Thread(target=lambda: verdicts.append(judged(task, "a+b", "b+a")[0]))
    thread.start()
    thread.join()
    assert verdicts == ["correct"]


@pytest.mark.parametrize("text", ["$$\\boxed{ \\(7\\) }$$.", "\\boxed{\\boxed{7}}", "7", " 7\n"])
def test_peeling(text):
    assert peeled(text) == "7"


@pytest.mark.parametrize("text", ["\\boxed{1} or \\boxed{2}", "$1$ or $2$", "{1}{2}", "\\frac{1}{2}"])
def test_only_a_wrapping_around_the_whole_is_removed(text):
    assert peeled(text) == text


def test_a_file_is_split_by_a_hash_and_walked_without_repeats(file):
    task = get(f"gsm8k:{file(LINES)}")
    assert task.size("train") + task.size("test") == 99 and 3 <= task.size("test") <= 25
    by_split = {split: [task.problem(split, i) for i in range(task.size(split))] for split in ("train", "test")}
    prompts = {split: {p.prompt for p in problems} for split, problems in by_split.items()}
    assert not prompts["train"] & prompts["test"]
    assert all(len(prompts[split]) == task.size(split) for split in prompts)
    for problem in (*by_split["train"], *by_split["test"]):
        line = LINES[problem.meta["line"] - 1]
        assert line["question"] == problem.prompt and line["answer"].endswith(f"#### {problem.meta['gold']}")
        assert problem.meta["difficulty"] == 1
    reopened = [get(f"gsm8k:{file(LINES)}").problem("train", i, seed=3) for i in range(20)]
    assert [task.problem("train", i, seed=3) for i in range(20)] == reopened != by_split["train"][:20]


def test_a_directory_has_its_own_splits_and_training_drops_test_questions(file):
    file(LINES[:50], "train.jsonl")
    folder = file(LINES[40:60], "test.jsonl").parent
    task = get(f"gsm8k:{folder}")
    assert (task.size("train"), task.size("test")) == (40, 20)
    (folder / "train.jsonl").unlink()
    with pytest.raises(UserError, match="no train problem"):
        get(f"gsm8k:{folder}").problem("train", 0)


def test_languages_come_from_the_text(file):
    lines = [*LINES, *({"question": f"{n}加{n}等于几？", "answer": f"#### {2 * n}"} for n in range(40))]
    task = get(f"gsm8k:{file(lines)}")
    assert task.languages == ("en", "zh")
    assert task.problem("train", 0, language="zh").prompt.endswith("等于几？")
    assert task.size("train") + task.size("test") == 139  # lines of both languages are served
    assert get(task.name, languages=["zh"]).size("train") < 45
    assert get(f"jsonl:{file([{'problem': 'Add 1 and 1.', 'answer': 2, 'level': 'Level 4'}])}").all_languages == ("en",)


@pytest.mark.parametrize(
    ("family", "lines", "hint"),
    [
        ("gsm8k", [LINES[0], {"question": "Q?", "answer": "7"}], "line 2: the answer has no '#### n'"),
        ("jsonl", [LINES[0], "{"], "line 2: not JSON"),
        ("jsonl", ["[1]"], "line 1: a list"),
        ("jsonl", [{"answer": "1"}], "no text under 'question' or 'problem'"),
        ("jsonl", [{"problem": "Q?"}], "no text or number under 'answer'"),
        ("jsonl", [{"problem": "Q?", "answer": True}], "no text or number under 'answer'"),
        ("jsonl", [{"problem": "Q?", "answer": "\\boxed{}"}], "the final answer is empty"),
        ("jsonl", [LINES[0], "", {"problem": "Q?", "answer": "\\frac{1}{"}], "line 3: the answer .* is not a number"),
        ("jsonl", [{"problem": "Q?", "answer": "9^{9^{9^{9}}}!" + "!" * 40 + "\\\\frac"}], "line 1"),
        ("jsonl", ["", " "], "contains no problem"),
        ("jsonl", ["[" * 100_000], "line 1: not JSON"),
    ],
)
def test_a_broken_line_is_named(file, family, lines, hint):
    with pytest.raises(UserError, match=hint):
        get(f"{family}:{file(lines)}")


def test_other_mistakes(file, tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        get(f"gsm8k:{tmp_path}/nothing.jsonl")
    with pytest.raises(UserError, match=r"neither train\.jsonl nor test\.jsonl"):
        get(f"gsm8k:{tmp_path}")
    path = file(LINES)
    with pytest.raises(UserError, match="no pre-training documents"):
        get(f"gsm8k:{path}").document(0)
    with pytest.raises(UserError, match="no phrasing 'held-out'"):
        get(f"gsm8k:{path}", phrasing="held-out")
    with pytest.raises(UserError, match=r"no setting 'slip'.*Known: plain_answers"):
        get(f"gsm8k:{path}", slip=0.1)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        get(f"gsm8k:{path}")


def test_200_answers_of_a_released_r1_get_the_score_computed_by_hand(tmp_path):
    lines = [{"question": question, "answer": gold} for question, gold, _, _ in released.PROBLEMS]
    for split in ("train", "test"):
        rows = lines if split == "test" else [{"question": "What is 1 + 1?", "answer": "2"}]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = get(f"jsonl:{tmp_path}")
    by_question = {question: (right, wrong) for question, _, right, wrong in released.PROBLEMS}
    problems = [task.problem("test", index) for index in range(10)]
    verdicts = []
    for problem in problems:
        labelled = released.answers(*by_question[problem.prompt])
        verdicts.append([task.verify(problem, opening("r1") + text) for text, _, _ in labelled])
        assert [(v.correct, v.formatted) for v in verdicts[-1]] == [(right, form) for _, right, form in labelled]
    rates = verdict_metrics.rates(verdicts, 20)
    assert fmean(rates["pass_at_1"]) == pytest.approx(released.PASS_AT_1)
    assert fmean(v.formatted for group in verdicts for v in group) == pytest.approx(released.FORMATTED)
    assert fmean(rates["maj_at_k"]) == 1.0, "most answers of every problem agree, and they are right"
    assert verdict_metrics.reasons(verdicts) == released.REASONS
