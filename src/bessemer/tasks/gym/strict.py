"""What a full score must mean beyond the scorers of reasoning-gym, for those found to pay it for less.

Each rule answers whether an answer may be scored at all. They were found by giving every dataset the same unearned
answers (the question, 0, another problem's answer, the right one among others); the tests repeat some of them.
"""

import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

Rule = Callable[[str, dict[str, Any]], bool]


def _own_numbers(answer: str, item: dict[str, Any]) -> bool:
    """puzzle24 takes any four numbers that make 24."""
    return Counter(map(int, re.findall("[0-9]{1,6}", answer))) == Counter(item["metadata"]["numbers"])


def _near(answer: str, item: dict[str, Any]) -> bool:
    """coin_flip gives parts for a matching prefix, and 0 is a prefix of 0.0349."""
    try:
        exact = len(answer) < 40 and "e" not in answer.lower()  # 1e999999999 is a bomb
        return exact and abs(Fraction(answer) - Fraction(item["answer"])) < 1e-4
    except (ValueError, ZeroDivisionError):
        return False


def _one_number(answer: str, item: dict[str, Any]) -> bool:
    """gsm_symbolic looks for a number anywhere in the text."""
    return re.fullmatch(r"-?\$?[0-9][0-9,]{0,15}(?:\.[0-9]{1,15})?%?", answer) is not None


def _only_grid(answer: str, item: dict[str, Any]) -> bool:
    """kakurasu reads the zeros and ones out of any text."""
    return re.fullmatch("[01 \n]{1,500}", answer) is not None


def _only_moves(answer: str, item: dict[str, Any]) -> bool:
    """sokoban skips whatever is no move."""
    return re.fullmatch("[UDLRudlr \n]{1,500}", answer) is not None


def _only_numbers(answer: str, item: dict[str, Any]) -> bool:
    """survo reads the numbers out of any text."""
    return re.fullmatch("[0-9 \n]{1,500}", answer) is not None


RULES: dict[str, Rule] = {
    "coin_flip": _near,
    "gsm_symbolic": _one_number,
    "kakurasu": _only_grid,
    "puzzle24": _own_numbers,
    "sokoban": _only_moves,
    "survo": _only_numbers,
}


def allows(dataset: str, answer: str, item: dict[str, Any]) -> bool:
    rule = RULES.get(dataset)
    return rule is None or rule(answer, item)
