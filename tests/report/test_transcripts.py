"""Answers before and after RL: their equations are checked, and a terminal sees the prompt that changed most."""

import json
from fractions import Fraction

import fake_run
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bessemer import tasks
from bessemer.addons.watch import card, facts, transcripts
from bessemer.tasks.countdown_traces import TraceMix


@pytest.mark.parametrize(
    ("line", "verdict"),
    [
        ("(9*4)-6=36-6=30:22 high", True),
        ("<think>(3+9)+10=12+10=22:2 high", True),
        ("3-(10-9)=3-1=2:2 yes</think><answer>3-(10-9)</answer>", True),
        ("(10+9)-3=19-3=14:2 high", False),
        ("(4+1)+5=5+5=11:20 low", False),
        ("(3+8)*3=11*3=33:48小", True),
        ("3+8*2 = 19 wait 3+8*2 = 20", False),
        ("7/2 = 3", False),
        ("order:10,9,3", None),
        ("x = 3, so f(2)=5", None),
        ("3.5=7/2 and a=1=b", None),
        ("1/0=1", None),
        ("=" * 5000 + "(" * 5000, None),
        ("", None),
    ],
)
def test_equations_of_a_line(line, verdict):
    assert transcripts.holds(line) is verdict


numbers = st.integers(1, 99)


@given(numbers, numbers, numbers, st.sampled_from("+-*"), st.sampled_from("+-*/"), st.integers(-2, 2))
def test_equations_against_pythons_fractions(a, b, c, op, then, off):
    inner = {"+": a + b, "-": a - b, "*": a * b}[op]
    value = {"+": inner + c, "-": inner - c, "*": inner * c, "/": Fraction(inner, c)}[then] + off
    if value < 0 or value.denominator != 1:
        return
    assert transcripts.holds(f"({a}{op}{b}){then}{c} = {value}") is (off == 0)


def test_pages_of_authors_that_never_slip_hold_and_slips_are_found():
    never = tasks.get("countdown", slip_sloppy=0.0, slip_average=0.0, drill_share=0.0)
    often = tasks.get("countdown", slip_sloppy=0.9, slip_average=0.9, drill_share=0.0)
    assert never.mix == TraceMix(slip_sloppy=0.0, slip_average=0.0, drill_share=0.0)
    verdicts = {name: [] for name in ("never", "often")}
    for name, task in (("never", never), ("often", often)):
        for index in range(300):
            verdicts[name] += map(transcripts.holds, task.document(index).split("\n"))
    assert verdicts["never"].count(True) > 300 and False not in verdicts["never"]
    assert verdicts["often"].count(False) > 300


def _answer(step, correct, completion, prompt="Get 2 from 3, 10, 9."):
    return {"step": step, "id": prompt, "prompt": prompt, "completion": completion, "correct": correct}


def test_a_terminal_sees_the_prompt_that_changed_most(tmp_path):
    root = fake_run.make(tmp_path / "run")
    path = root / "04-zero" / "rollouts.jsonl"
    lines = [
        _answer(0, False, "sometimes wrong", "half"),
        _answer(0, True, "sometimes right", "half"),
        _answer(80, True, "sometimes right", "half"),
        _answer(0, False, "<answer>3+9</answer>"),
        _answer(0, False, "<think>(3+9)+10=12+10=23:2 high\n\x1b[31m" + "\nagain" * 40),
        _answer(0, True, "never wrong", "easy"),
        _answer(80, True, "<think>3-(10-9)=3-1=2:2 yes</think><answer>3-(10-9)</answer>"),
        _answer(80, True, "never wrong", "easy"),
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = card.table(root)
    shown = text[text.index("zero, a problem") :].split("\n")
    assert shown[1].strip() == "Get 2 from 3, 10, 9."
    assert [line.strip() for line in shown if line.startswith("  step ")] == ["step 0, wrong:", "step 80, right:"]
    assert any(line.endswith("=23:2 high  ✗") for line in shown) and any(line.endswith("✓") for line in shown[-1:])
    assert "\x1b" not in text and "easy" not in text and len(shown) < 25
    page = card.write(root).read_text(encoding="utf-8")
    assert '=23:2 high <i class="wrong">✗</i>' in page and '3-(10-9)&lt;/answer&gt; <i class="right">✓</i>' in page


@pytest.mark.parametrize("lines", [[], [_answer(0, False, "a")], [_answer(0, False, "a"), _answer(80, False, "b")]])
def test_nothing_is_shown_without_a_problem_that_became_right(tmp_path, lines):
    root = fake_run.make(tmp_path / "run")
    (root / "04-zero" / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert transcripts.before_and_after(facts.read(root)) == ""
