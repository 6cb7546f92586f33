"""Reading replies: the strict format, the last complete answer, and agreement with a slow scan on random tag soup."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.tasks.answer import TAGS, parse_reply


@pytest.mark.parametrize(
    ("text", "answer", "problem", "formatted"),
    [
        ("<think>a</think><answer>1</answer>", "1", None, True),
        ("\n<think>a</think>\n\n<answer> 1 </answer>\n", " 1 ", None, True),
        ("<think>a</think>So it is <answer>1</answer>.", "1", None, False),
        ("<think>\na\n</think>\n\nSo it is <answer>1</answer>.", "1", None, True),
        ("<think>\na\n</think>\n\nSo it\nis <answer>1</answer>.", "1", None, False),
        ("<think>\na\n</think>\n\n" + "so " * 70 + "<answer>1</answer>.", "1", None, False),
        ("<think>\na\n</think>\n\n<answer>1</answer> Then\nmore.", "1", None, False),
        ("Hm <think>a</think><answer>1</answer>", "1", "bad-tags", False),
        ("<answer>1</answer>", "1", "no-think", False),
        ("<think> \n</think><answer>1</answer>", "1", "no-think", False),
        ("<think>a<answer>1</answer></think>", "1", "bad-tags", False),
        ("<think>a</think><answer>1</answer><answer>2</answer>", "2", "bad-tags", False),
        ("<think>a</think><answer>1</answer><answer>2", "1", "bad-tags", False),
        ("<think>a</think><answer>1", None, "no-answer", False),
        ("<answer>1</answer><think>a</think>", "1", "bad-tags", False),
        ("<THINK>a</THINK><ANSWER>1</ANSWER>", None, "no-answer", False),
        ("", None, "no-answer", False),
    ],
)
def test_examples(text, answer, problem, formatted):
    reply = parse_reply(text)
    assert (reply.answer, reply.problem, reply.formatted) == (answer, problem, formatted)


def slow_blocks(text, tag):
    """All complete blocks, by walking one character at a time."""
    found, start, at = [], None, 0
    while at < len(text):
        if text.startswith(f"<{tag}>", at):
            start = at + len(tag) + 2
        elif text.startswith(f"</{tag}>", at) and start is not None:
            found.append(text[start:at])
            start = None
        at += 1
    return found


@settings(max_examples=600, deadline=None)
@given(st.lists(st.sampled_from([*TAGS, "x", " ", "<", ">", "</", "think>"]), max_size=12).map("".join))
def test_blocks_agree_with_a_slow_scan(text):
    reply, thinks, answers = parse_reply(text), slow_blocks(text, "think"), slow_blocks(text, "answer")
    assert reply.answer == (answers[-1] if answers else None)
    if reply.problem != "no-think":
        assert reply.think == (thinks[0] if thinks else None)
    if reply.formatted:
        assert text.strip() == f"<think>{thinks[0]}</think>" + text.strip()[len(thinks[0]) + 15 :]
        assert len(thinks) == len(answers) == 1 and all(text.count(tag) == 1 for tag in TAGS)
