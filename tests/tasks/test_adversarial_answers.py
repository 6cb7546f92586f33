"""Hostile answers to logic, words, mathematics and reasoning-gym: each fails for the expected reason, none is slow.

Judging an answer takes less than 50 ms of CPU time in this process, and by the referee less than a second on an idle
machine, bombs included.
"""

import time

import pytest

from bessemer.addons.tasks.clock import speed
from bessemer.addons.tasks.referee import CPU_SECONDS
from bessemer.tasks import Problem, get
from tests.tasks.test_adversarial import CASES, REASONS, WHOLE, expected

BAD = "unparsable"
LOGIC = {
    "": "empty",
    "true": BAD,
    "true, false": BAD,
    "true, false, true, true": BAD,
    "true, false, true, ": BAD,
    "true, false, true or false": BAD,
    "true, false, maybe": BAD,
    "TRUE, FALSE, TRUE": BAD,
    "t, f, t": BAD,
    "1, 0, 1": BAD,
    "true, 假, true": BAD,
    "真, 假, true": BAD,
    "not false, false, true": BAD,
    "true and true, false, true": BAD,
    "(true), (false), (true)": BAD,
    "ｔｒｕｅ, false, true": BAD,
    "tru\u0435, false, true": BAD,  # a Cyrillic letter
    "true\u200b, false, true": BAD,
    "true;false;true": BAD,
    "true, false, true.": BAD,
    "[true, false, true]": BAD,
    "\\text{true}, \\text{false}, \\text{true}": BAD,
    "true, false, true\n\ntrue, true, true": BAD,
    "真，假，真。": BAD,
    "真真、假、真": BAD,
    "true," * 300_000: BAD,
    "," * 1_000_000: BAD,
    "true, true, true": "wrong-value",
    "false, false, false": "wrong-value",
    "真、真、真": "wrong-value",
}
WORDS = {
    "": "empty",
    "3*4-5": BAD,
    "7 apples": BAD,
    "seven": BAD,
    "七": BAD,
    "７": BAD,
    "٧": BAD,
    "⁷": BAD,
    "VII": BAD,
    "7.0": BAD,
    "+7": BAD,
    "--7": BAD,
    "7 or 8": BAD,
    "7, 8": BAD,
    "6 7 8": BAD,
    "7!": BAD,
    "7e0": BAD,
    "0x7": BAD,
    "14/2": BAD,
    "\\boxed{8}": "wrong-value",
    "$7": BAD,
    "7元": BAD,
    "x=7": BAD,
    "9" * 10: "wrong-value",
    "9" * 301: BAD,
    "9" * 1_000_000: BAD,
    "7\x00": BAD,
    "7\u00a0": BAD,
    "7_0": BAD,
    "10**9999999": BAD,
    "-7": "wrong-value",
    "70": "wrong-value",
    "12": "wrong-value",  # the step before the last
}
NUMBER = {
    "": "empty",
    "6*7": BAD,
    "6 \\times 7": BAD,
    "2 \\cdot 3 \\cdot 7": BAD,
    "41=42": BAD,
    "1=2=3=42": BAD,
    "xy=42": BAD,
    "42 or 43": BAD,
    "41, 42": BAD,
    "\\{42\\}": BAD,
    "42 \\pm 1": BAD,
    "\\boxed{41}\\boxed{42}": "several-answers",
    "\\boxed{\\boxed{42}": "unclosed",
    "\\boxed{\\boxed{42}}": "bad-tags",
    "the answer is 42": BAD,
    "forty-two": BAD,
    "４２": BAD,
    "٤٢": BAD,
    "4²": BAD,
    "4 2": BAD,
    "42,": BAD,
    "4,2": BAD,
    "042,": BAD,
    "0b101010": BAD,
    "\\sqrt{1764}": BAD,
    "42^1": BAD,
    "42 + 0x": BAD,
    "\\int_0^{42} 1 dx": BAD,
    "9^{9^{9^{9}}}": BAD,
    "1e999999999": BAD,
    "10^{10^{10}}": BAD,
    "9" * 300: "wrong-value",
    "9" * 301: BAD,
    "9" * 1_000_000: BAD,
    "\\frac{" * 50: BAD,
    "\\frac{" * 200_000: BAD,
    "\\def\\x{\\x\\x}\\x": BAD,
    "\\frac{42}{0}": BAD,
    "42/0": BAD,
    "42\x00": BAD,
    "\\input{/etc/passwd}": BAD,
    "__import__('os').getpid()": BAD,
    "nan": BAD,
    "\\infty": BAD,
    "84/2": "unfinished",
    "\\frac{84}{2}": "unfinished",
    "42/1": "unfinished",
    "42.0000000001": "wrong-value",
    "4.2": "wrong-value",
    "-42": "wrong-value",
    "1,042": "wrong-value",
}
EXPRESSION = {
    "(x+1)^2": "echo",
    "(x+1)^{2}": "echo",
    " ( x + 1 )^2 ": "echo",
    "\\boxed{(x+1)^2}": "echo",
    "x^2": "wrong-value",
    "x^2+2x": "wrong-value",
    "x^2+2x+2": "wrong-value",
    "y^2+2y+1": "wrong-value",
    "x^2+2x+1, x^2": "wrong-value",
    "x^2 \\text{ or } x^2+2x+1": "wrong-value",
    "0=x^2+2x+1": BAD,
    "x^2=x^2+2x+1": BAD,
    "a=b=x^2+2x+1": BAD,
    "$x^2$ or $x^2+2x+1$": BAD,
    "x^2\nx^2+2x+1": BAD,
    "": "empty",
    "the expansion": "wrong-value",  # a product of letters
    "x^{99999999}": BAD,
    "(x+1)^{5000}": BAD,
    "9^{9^{9^{9^{9}}}}": "timeout",
    "x+" * 149 + "x": "wrong-value",
    "(" * 140 + ")" * 140: None,
    "\\frac{" * 49: None,
    "\\sqrt{" * 40 + "x" + "}" * 40: None,
    "\\sum_{n=1}^{999} \\frac{1}{n}": None,
    "\\prod_{n=1}^{999} n!": None,
    "\\int_0^1 e^{x^2}\\sin(x)^{50} dx": None,
    "((((9!)!)!)!)!": None,
    "\\begin{pmatrix} x \\\\": None,
    "\\left(" * 49: None,
    "{" * 300: None,
    "x" * 300: None,
    "\\text{" * 59: None,
    "\\\\" * 150: None,
    "^" * 300: BAD,
    "_" * 300: None,
    "\u202ex^2+2x+1": None,
    "ｘ^2+2ｘ+1": None,
    "\\input{/etc/passwd}": None,
    "__import__('os').system('id')": None,
    "\\lim_{x\\to\\infty} x^x": None,
    "\ud800": None,
}
"""None: any reason is fine as long as the answer earns nothing."""
POLYNOMIAL = {
    "": "empty",
    "0": "wrong-value",
    "().__class__.__bases__[0].__subclasses__()": "wrong-value",
    "__import__('os').system('id')": "wrong-value",
    "open('/etc/passwd').read()": "wrong-value",
    "lambda: 1": "wrong-value",
    "preview(x)": "wrong-value",
    "9**9**9**9": "timeout",
    "9**9**9**9*x": "timeout",
    "factorial(99999999)": "wrong-value",
    "(x+y+z)**400": None,
    "(" * 1000: None,
    "x*" * 50 + "x": "wrong-value",
    "9" * 5000: BAD,
    "x" * 1_000_000: BAD,
    "\ud800": None,
}


def slowdown():
    """How many times slower this machine is now than when idle: wall-clock time per CPU time of a loop."""
    wall, cpu = time.perf_counter(), time.process_time()
    while time.process_time() - cpu < 0.02:
        pass
    return max(1.0, (time.perf_counter() - wall) / 0.02)


def refused(task, problem, completion, reason, limit, clock):
    seconds = []
    for _ in range(3):
        factor = slowdown() if clock is time.perf_counter else 1.0
        start = clock()
        verdict = task.verify(problem, completion)
        seconds.append((clock() - start) / factor)
        if seconds[-1] < limit:
            break
    assert not verdict.sound and verdict.reason != "correct"
    assert not (verdict.correct and verdict.formatted)
    assert reason is None or verdict.reason == reason
    assert min(seconds) < limit


def think(answer):
    return f"<think>t</think><answer>{answer}</answer>"


def short(text):
    return repr(text[:24])


def here(*arguments):
    refused(*arguments, 0.05, time.process_time)


def by_referee(*arguments):
    """Within twice the processor time that the referee grants on this machine."""
    refused(*arguments, 2 * CPU_SECONDS * speed(), time.perf_counter)


LOGIC_PROBLEM = Problem("p", "True or false: ...", "en", {"values": [True, False, True]})
WORDS_PROBLEM = Problem("p", "...", "en", {"value": 7})


@pytest.fixture(scope="module")
def maths(tmp_path_factory):
    path = tmp_path_factory.mktemp("maths") / "maths.jsonl"
    path.write_text('{"problem": "What?", "answer": "1"}\n')
    task = get(f"jsonl:{path}")
    task.verify(Problem("p", "", "en", {"gold": "a+b"}), think("b+a"))  # this starts the referee
    return task


@pytest.mark.parametrize("blank", "\t ")
def test_a_statement_with_nothing_but_blanks(blank):
    text = f"<think>x</think>\n\nThe answer is \\[{blank * 3900}x"
    here(get("arithmetic"), Problem("p", "...", "en", {"value": 7}), text, None)


@pytest.mark.parametrize("answer", LOGIC, ids=short)
def test_logic(answer):
    here(get("logic"), LOGIC_PROBLEM, think(answer), LOGIC[answer])


@pytest.mark.parametrize("answer", WORDS, ids=short)
def test_words(answer):
    here(get("words"), WORDS_PROBLEM, think(answer), WORDS[answer])


@pytest.mark.parametrize("answer", NUMBER, ids=short)
def test_numbers(answer, maths):
    here(maths, Problem("p", "Compute 6*7.", "en", {"gold": "42"}), think(answer), NUMBER[answer])


@pytest.mark.parametrize("answer", EXPRESSION, ids=short)
def test_expressions(answer, maths):
    problem = Problem("p", "Expand (x+1)^2, i.e. ( x + 1 )^2.", "en", {"gold": "x^2+2x+1"})
    by_referee(maths, problem, think(answer), EXPRESSION[answer])


@pytest.fixture(scope="module")
def polynomial():
    task = get("gym:polynomial_multiplication")
    problem = task.problem("test", 0)
    task.verify(problem, think("x"))
    return task, problem


@pytest.mark.parametrize("answer", POLYNOMIAL, ids=short)
def test_reasoning_gym(answer, polynomial):
    by_referee(*polynomial, think(answer), POLYNOMIAL[answer])


RIGHT = {"logic": "true, false, true", "words": "7", "maths": "42"}
PROBLEMS = {"logic": LOGIC_PROBLEM, "words": WORDS_PROBLEM, "maths": Problem("p", "6*7?", "en", {"gold": "42"})}


@pytest.mark.parametrize("name", RIGHT)
def test_no_task_is_fooled_by_the_form(name, maths):
    """The tricks with the form, applied to this task's right answer."""
    task = maths if name == "maths" else get(name)
    assert task.verify(PROBLEMS[name], think(RIGHT[name])).correct
    for case, completion in WHOLE.items():
        if case not in REASONS[BAD] and case != "every answer there is":
            here(task, PROBLEMS[name], completion.replace("(3*7)+6", RIGHT[name]), expected(case))


def test_there_are_more_than_two_hundred():
    distinct = {think(answer) for cases in (LOGIC, WORDS, NUMBER, EXPRESSION, POLYNOMIAL) for answer in cases}
    assert len(distinct | set(CASES.values())) > 240
