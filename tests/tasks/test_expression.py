"""The expression parser against Python's own grammar, evaluated with exact Fractions by an independent tree walk."""

import ast
import re
import string
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bessemer.tasks.countdown_expressions import MAX_CHARS, MAX_DEPTH, Unparsable, parse_expression


def by_ast(text: str) -> Fraction:
    def walk(node):
        if isinstance(node, ast.Constant):
            return Fraction(node.value)
        left, right = walk(node.left), walk(node.right)
        match node.op:
            case ast.Add():
                return left + right
            case ast.Sub():
                return left - right
            case ast.Mult():
                return left * right
            case ast.Div():
                return left / right

    return walk(ast.parse(text.strip(), mode="eval").body)


def written(pair):
    left, op, right, bare, space = pair
    inside = f"{left}{space}{op}{space}{right}"
    return inside if bare else f"({inside})"


leaf = st.integers(0, 20).map(str)
expressions = st.recursive(
    leaf,
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner, st.booleans(), st.sampled_from(["", " "])).map(
        written
    ),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None)
@given(expressions)
def test_value_and_numbers_agree_with_python(text):
    try:
        expected = by_ast(text)
    except ZeroDivisionError:
        with pytest.raises(Unparsable):
            parse_expression(text)
        return
    expression = parse_expression(text)
    assert expression.value == expected
    assert Counter(expression.numbers) == Counter(
        n.value for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Constant)
    )


@settings(max_examples=300, deadline=None)
@given(expressions)
def test_canonical_form_is_a_fixed_point_with_the_same_value_and_numbers(text):
    try:
        first = parse_expression(text)
    except Unparsable:
        return
    reparsed = parse_expression(first.canonical)
    assert reparsed.canonical == first.canonical
    assert reparsed.value == first.value
    assert Counter(reparsed.numbers) == Counter(first.numbers)


@settings(max_examples=200, deadline=None)
@given(expressions, expressions, st.sampled_from("+*"))
def test_canonical_form_ignores_the_order_of_operands(left, right, op):
    try:
        one = parse_expression(f"({left}){op}({right})")
    except Unparsable:
        return
    assert one.canonical == parse_expression(f"({right}){op}({left})").canonical


@pytest.mark.parametrize(
    ("same", "as_this"),
    [("(3*7)+6", "6+7*3"), ("9-(5-2)", "2+9-5"), ("8/(4/2)", "2*8/4"), ("(1+2)+3", "3+(2+1)"), ("(5-3)*2", "2*(5-3)")],
)
def test_equivalent_expressions_share_a_vote(same, as_this):
    assert parse_expression(same).canonical == parse_expression(as_this).canonical


@pytest.mark.parametrize(
    ("one", "other"), [("2*3", "3+3"), ("2*(3+4)", "2*3+2*4"), ("8-3-2", "8-(3-2)"), ("4+2", "3*2")]
)
def test_different_expressions_do_not_share_a_vote(one, other):
    assert parse_expression(one).canonical != parse_expression(other).canonical


@settings(max_examples=400, deadline=None)
@given(st.text(alphabet=string.printable + "٣²½×÷−。３", max_size=40))
def test_any_text_parses_or_is_unparsable(text):
    try:
        value = parse_expression(text).value
    except Unparsable:
        return
    assert value == by_ast(text.replace("\n", " ").replace("\t", " "))


UNPARSABLE = """
-3 | +3 | 3+ | 3 4 | () | (3 | 3) | 3**2 | 3//2 | 1e9 | 0x10 | 03 | 3.0 | 1_0 | 1/0 | 1/(2-2) | ٣+٤ | ３+４ | 2² | 3×4
3÷4 | 03*9
9999999999999999
999999999999999*999999999999999*999999999999999
__import__('os') | x | 3=3 | 2^3 | 3,4 | \\frac{1}{2} | 3! | 5%3 | 1\u20032 | [1]
"""
TOO_DEEP = "(" * (MAX_DEPTH + 1) + "1" + ")" * (MAX_DEPTH + 1)


@pytest.mark.parametrize("text", [*re.split(r" \| |\n", UNPARSABLE), "", " ", TOO_DEEP, "1+" * MAX_CHARS + "1"])
def test_unparsable(text):
    with pytest.raises(Unparsable):
        parse_expression(text)


def test_the_bounds_themselves_are_allowed():
    assert parse_expression("(" * MAX_DEPTH + "1" + ")" * MAX_DEPTH).value == 1
    assert parse_expression("1+" * (MAX_CHARS // 2 - 1) + "10").value == MAX_CHARS // 2 + 9
