"""One gate before sympy's parser, which evaluates its text as Python: `2*x`, but also `__import__("os").system(...)`.

Everything that parses a string ends in `stringify_expr`; once the gate is set up there, what is not plain algebra is
refused. What passes can still be expensive (`9**9**9`); the limits of the referee are for that.
"""

import re

FUNCTIONS = (
    "sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh",
    "exp", "log", "ln", "sqrt", "Abs", "erf", "Si", "Ci", "Ei", "li",
)  # fmt: skip
_PLAIN = re.compile(
    r"(?:[0-9.+\-*/^()\s]|(?<![A-Za-z])(?:[A-Za-z](?![A-Za-z])|pi(?![A-Za-z])|(?:" + "|".join(FUNCTIONS) + r")(?=\()))*"
)
MAX_CHARS = 2000


def plain(text: str) -> bool:
    """Numbers, one-letter names, pi, + - * / ^ and calls of FUNCTIONS; no attribute, no string, no other name."""
    return len(text) <= MAX_CHARS and _PLAIN.fullmatch(text) is not None and not re.search(r"\.\s*[A-Za-z]", text)


def guard_sympy() -> None:
    """From now on, in this process, sympy parses plain algebra alone."""
    import sympy.physics.units  # noqa: F401  what `simplify` imports late: it parses the names of its own units
    from sympy.parsing import sympy_parser

    unguarded = sympy_parser.stringify_expr

    def stringify_expr(s, local_dict, global_dict, transformations):
        if not plain(s):
            raise ValueError("not plain algebra")
        return unguarded(s, local_dict, global_dict, transformations)

    sympy_parser.stringify_expr = stringify_expr
