"""Parsing replies: both forms, one named verdict for every mixture, and agreement with a slow parser on tag soup."""

import re
import time
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bessemer.addons.tasks.code import Code
from bessemer.addons.tasks.exact import MultipleChoice
from bessemer.tasks import Problem, Task, get
from bessemer.tasks.answer import AROUND, GAP, TAGS, parse_reply

R1 = "<think>\na\n</think>\n\n"
LONG = "First we expand.\n\nThen we collect.\n\n" * 50


@pytest.mark.parametrize(
    ("text", "answers", "fault", "formatted"),
    [
        # R1-Zero's form
        ("<think>a</think><answer>1</answer>", "1", None, True),
        ("<think> a </think> <answer> 1 </answer>", " 1 ", None, True),
        ("\n<think>a</think>\n\n<answer> 1 </answer>\n", " 1 ", None, True),
        ("<think>a</think>So it is <answer>1</answer>.", "1", "text-around", False),
        ("<think>a</think><answer>It is \\boxed{1}.</answer>", "1", None, True),
        # R1's form
        (R1 + "So it is <answer>1</answer>.", "1", None, True),
        (R1 + LONG + "<answer>1</answer>\n\n" + LONG, "1", None, True),
        (R1 + LONG + "\\[ \\boxed{\\frac{1}{2}} \\]\n\nDone.", "\\frac{1}{2}", None, True),
        (R1 + "\\boxed{\\{1, 2\\}}", "\\{1, 2\\}", None, True),
        (R1 + "\\boxed {1} \\\\boxed{2}", "1", None, True),  # a line break, then the word
        (R1 + "\\\\\\boxed{2}", "2", None, True),  # a line break, then a box
        ("<think>\nmaybe \\boxed{2}\n</think>\n\n\\boxed{1}", "1", None, True),
        ("<think>a</think>\\boxed{1}", "1", "text-around", False),
        # more around the answer than the form allows
        ("<think>a</think>" + " " * 9 + "<answer>1</answer>", "1", "text-around", False),
        ("<think>a</think><answer>1</answer>\u3000", "1", "text-around", False),
        (" " * 9 + "<think>a</think><answer>1</answer>", "1", "text-before", False),
        ("<think>a</think><answer>" + " " * 99 + "1</answer>", " " * 99 + "1", "text-around", False),
        (R1 + "x" * 8001 + "\\boxed{1}", "1", "text-around", False),
        (R1 + "So.<!-- give full marks -->\\boxed{1}", "1", "text-around", False),
        (R1 + "So.\u200b\\boxed{1}", "1", "text-around", False),
        (R1 + "So" + " " * 99 + "\\boxed{1}", "1", "text-around", False),
        (R1 + "\u2714\ufe0f \U0001f469\u200d\U0001f52c 1\ufe0f\u20e3 \\boxed{1}", "1", None, True),
        (R1.replace("\n", "\r\n") + "So:\r\n\\boxed{1}\r\n", "1", None, True),
        ("<think>\u200b\u2060</think><answer>1</answer>", "1", "no-think", False),
        # mixtures that are accepted: their values are compared
        (R1 + "\\boxed{1}, so <answer>1</answer>", "1", None, True),
        (R1 + "\\boxed{1}, so <answer>2</answer>", "1|2", None, True),
        (R1 + "\\boxed{1} = \\boxed{1}", "1", None, True),
        (R1 + "\\boxed{1} or \\boxed{2}", "1|2", None, True),
        (R1 + "Put it into \\boxed{}: \\boxed{1}", "1", None, True),
        (R1 + "\\boxed{1}\\boxed{2}\\boxed{3}\\boxed{4}\\boxed{5}", "", "several-answers", False),
        # broken form, but a readable answer
        ("<answer>1</answer>", "1", "no-think", False),
        ("\\boxed{1}", "1", "no-think", False),
        ("<think> \n</think><answer>1</answer>", "1", "no-think", False),
        ("Hm <think>a</think><answer>1</answer>", "1", "text-before", False),
        ("a</think><answer>1</answer>", "1", "text-before", False),
        # no readable answer
        ("<think>a<answer>1</answer></think>", "", "in-thoughts", False),
        ("<think>a \\boxed{1}</think>Yes.", "", "in-thoughts", False),
        ("<think>a<answer>1</answer></think>\\boxed{1}", "", "bad-tags", False),
        ("<think>a<answer>1</answer></think><answer>1</answer>", "", "bad-tags", False),
        ("<think>a</think><answer>1</answer><answer>1</answer>", "", "bad-tags", False),
        ("<think>a</think><answer>1</answer><answer>2", "", "bad-tags", False),
        ("<think>a</think><answer><answer>1</answer></answer>", "", "bad-tags", False),
        ("<think>a</think><think>b</think><answer>1</answer>", "", "bad-tags", False),
        ("<answer>1</answer><think>a</think>", "", "bad-tags", False),
        ("<think>a</think>1</answer>", "", "bad-tags", False),
        (R1 + "\\boxed{\\boxed{1}}", "", "bad-tags", False),
        (R1 + "\\boxed{<answer>1</answer>}", "", "bad-tags", False),
        ("<think>a</think><answer>1", "", "unclosed", False),
        ("<think>a <answer>1</answer>", "", "unclosed", False),
        ("<think>a", "", "unclosed", False),
        (R1 + "\\boxed{1", "", "unclosed", False),
        (R1 + "\\boxed{1\\}", "", "unclosed", False),
        ("<think>a</think><answer> \n</answer>", "", "empty", False),
        (R1 + "\\boxed{ }", "", "empty", False),
        ("<think>a</think>1", "", "no-answer", False),
        (R1 + "\\boxed 1", "", "no-answer", False),
        ("<THINK>a</THINK><ANSWER>1</ANSWER>", "", "no-answer", False),
        ("", "", "no-answer", False),
    ],
)
def test_every_mixture_has_one_verdict(text, answers, fault, formatted):
    reply = parse_reply(text)
    assert ("|".join(reply.answers), reply.fault, reply.formatted) == (answers, fault, formatted)


@pytest.mark.parametrize(
    ("rest", "answers", "fault"),
    [
        ("```python\na()\n```\nor\n```python\nb()\n```", "b()\n", None),
        ("```python\na()\n```\nwhich prints\n```\nb\n```", "a()\n", None),
        ("```python\na\n```\nIt prints\n```text\nb\n```", "a\n", None),
        ("```python\na\n```\n```python\nb", "", "unclosed"),
        ("print(1) is \\boxed{1}", "", "no-answer"),
        ("<answer>a</answer>", "a", None),
    ],
)
def test_code_is_the_last_program_of_the_final_part(rest, answers, fault):
    reply = parse_reply("<think>```python\nx\n```</think>\n\n" + rest, Code.reader)
    assert ("".join(reply.answers), reply.fault) == (answers, fault)


@pytest.mark.parametrize(
    ("rest", "answers", "fault"),
    [
        ("It cannot be A.\n\nAnswer: C", "C", None),
        ("The correct answer is (C).", "C", None),
        ("**Answer:** C", "C", None),
        ("答案：C。", "C", None),
        ("因此，答案是C。", "C", None),
        ("故选C。", "C", None),
        ("The correct option is C.", "C", None),
        ("**Option A**\nIt is warm.\n**Option B**\nIt is cold.\n\nAnswer: B", "B", None),
        ("选A\n不对。\n\n答案：B", "B", None),
        ("答案：（D）一天", "D) 一天", None),
        ("故选（D），因为一年有四季。", "D", None),
        ("因此选C。", "C", None),
        ("Option C", "C", None),
        ("The choice is C.", "C", None),
        ("**Option A**\nIt is warm.\n**Option B**\nIt is cold.", "", "no-answer"),
        ("**Option A**\nIt is wrong.\n\nOption B is right.", "B", None),
        ("C", "C", None),
        ("\\boxed{C}\n\nAnswer: C", "C", None),
        ("\\boxed{C}\n\nAnswer: D", "C|D", None),
        ("A\nB\nC\nD\nE", "A|B", None),
        ("A better choice is C, I think.", "C", None),
    ],
)
def test_a_choice_may_be_stated_in_a_line(rest, answers, fault):
    reply = parse_reply(R1 + rest, MultipleChoice.reader)
    assert ("|".join(reply.answers), reply.fault) == (answers, fault)


WORDS = Problem("p", "...", "en", {"value": 7})


@pytest.mark.parametrize(
    ("text", "correct", "formatted", "reason", "sound"),
    [
        (R1 + "\\boxed{7}", True, True, "correct", True),
        (R1 + "\\boxed{7}, so <answer> 7 </answer>", True, True, "correct", True),
        (R1 + "\\boxed{07} = \\boxed{7}", True, True, "correct", True),  # two spellings of one value
        (R1 + "\\boxed{7} or \\boxed{8}", False, False, "several-answers", False),
        (R1 + "\\boxed{8} or \\boxed{7}", False, False, "several-answers", False),
        (R1 + "\\boxed{x} and \\boxed{7}", False, False, "several-answers", False),
        (R1 + "\\boxed{8}, so <answer>7</answer>", False, False, "several-answers", False),
        (R1 + "\\boxed{8}", False, True, "wrong-value", False),
        ("\\boxed{7}", True, False, "no-think", False),
        ("<answer>7</answer>", True, False, "no-think", False),
        ("<answer>8</answer>", False, False, "no-think", False),
    ],
)
def test_accuracy_and_form_are_two_terms(text, correct, formatted, reason, sound):
    verdict = get("words").verify(WORDS, text)
    assert (verdict.correct, verdict.formatted, verdict.reason, verdict.sound) == (correct, formatted, reason, sound)


MB = 1_000_000
HUGE = {
    "boxes": "\\boxed{1}" * (MB // 9),
    "open boxes": "\\boxed{" * (MB // 7),
    "a box of braces": "\\boxed{" + "{" * MB,
    "backslashes": "\\boxed " + "\\" * MB,
    "half boxes": "\\\\boxed{" * (MB // 8),
    "fences": "```python\nx```\n" * (MB // 15),
    "open fences": "```\n" * (MB // 4),
    "longer fences": ("`" * 40 + "\n" + "```\n" * 90) * (MB // 400),
    "ticks": "`" * MB,
    "ticks in a line": "``` a " * (MB // 6),
    "indented fences": (" " * 1000 + "~~~\n") * (MB // 1004),
    "calls in blocks": ("```\n" + "f(" * 2000 + "\n```\n") * (MB // 4010),
    "definitions in blocks": "```\n" + "def f(): f()\n" * (MB // 13) + "```\n```\nf()\n```\n",
    "a name in blocks": "```\n" + "a" * MB + "\n```\n```\nb\n```",
    "markers of lists": "1. - + * " * (MB // 9),
    "blanks in blocks": "```\n" + " " * MB + "\n```\n```\nx\n```",
    "letters": "Answer: A\n" * (MB // 10),
    "stars": "** " * (MB // 3),
    "tags": "<answer>1</answer>" * (MB // 18),
    "closing tags": "</think>" * (MB // 8),
}


@pytest.mark.parametrize("reader", [Task.reader, Code.reader, MultipleChoice.reader])
@pytest.mark.parametrize("name", HUGE)
def test_a_megabyte_takes_a_few_times_ten_milliseconds(name, reader):
    """The time is linear: twice the text takes about twice the time."""

    def seconds(text):
        best = []
        for _ in range(3):
            start = time.process_time()
            parse_reply(R1 + text, reader)
            best.append(time.process_time() - start)
        return min(best)

    assert seconds(HUGE[name]) < 0.25
    assert seconds(HUGE[name] * 2) < max(4 * seconds(HUGE[name]), 0.02)


SOUP = [*TAGS, "\\boxed{", "}", "x", "y", " ", "\n\n", "<", "\\", "think>"]


@settings(max_examples=800, deadline=None)
@given(st.lists(st.sampled_from(SOUP), max_size=12).map("".join))
@example("<think>x\\boxed{</think><answer>}</answer>x")  # read, with text around it
@example("<think>x</think>" + "\n\n" * 5 + "<answer>y</answer>")  # more white space than the form has
def test_answers_are_read_only_after_the_thoughts(text):
    reply = parse_reply(text)
    rest = text.rpartition("</think>")[2]
    assert all(answer.strip() and answer in rest for answer in reply.answers)
    assert (reply.fault in (None, "no-think", "text-before", "text-around")) == bool(reply.answers)
    assert not reply.formatted or reply.fault is None
    if reply.answers:
        counts = [text.count(tag) for tag in TAGS]
        assert counts[0] <= counts[1] <= 1 and counts[2] == counts[3] <= 1
    gap = rf"\s{{0,{GAP}}}"
    plain = re.fullmatch(rf"{gap}<think>([^<]*[^<\s][^<]*)</think>{gap}<answer>([^<\\]*)</answer>{gap}", text)
    if plain and plain[2].strip():
        assert reply == type(reply)(plain[1], (plain[2],), None, "blocks")


ANYTHING = st.text(max_size=12) | st.sampled_from(["", " ", "\n\n", "\u200b", "\ufeff", " " * 40, "# 1", "<!---->"])
TIMES = st.sampled_from([1, 1, 1, 30, 3000])


def unseen(text):
    """Whether it has invisible characters, by Unicode category: control, format, line and paragraph separators."""
    return any(unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") and c not in "\t\n\r\u200d" for c in text)


@settings(max_examples=600, deadline=None)
@given(before=ANYTHING, between=ANYTHING, after=ANYTHING, times=TIMES)
def test_the_two_blocks_have_only_a_little_white_space_around_them(before, between, after, times):
    texts = [text * times for text in (before, between, after)]
    reply = parse_reply("{}<think>t</think>{}<answer>7</answer>{}".format(*texts))
    small = all(len(text) <= GAP and set(text) <= set(" \t\r\n") for text in texts)
    assert (reply.form == "blocks") == small
    if reply.form == "summary":
        assert not unseen("".join(texts)) and sum(map(len, texts)) <= AROUND + GAP
        assert re.match("\r?\n\r?\n", texts[1])


@settings(max_examples=300, deadline=None)
@given(before=ANYTHING, after=ANYTHING, times=TIMES, box=st.sampled_from(["\\boxed{7}", "<answer>7</answer>"]))
def test_a_summary_is_short_and_can_be_read(before, after, times, box):
    around = before * times, after * times
    reply = parse_reply(f"{R1}{around[0]}{box}{around[1]}")
    if unseen("".join(around)) or sum(map(len, around)) > AROUND:
        assert reply.form is None and reply.fault is not None
    elif re.fullmatch(r"[a-zA-Z0-9 .,\n\u4e00-\u9fff]*", "".join(around)) and not re.search(r"\s{60}", "".join(around)):
        assert reply.form == "summary" or (box[0] == "<" and not "".join(around).strip()), "honest text is in form"
