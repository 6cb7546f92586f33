"""Quantities in readable form: token counts ("8M"), durations ("90s"), schedules in consumed tokens.

    Tokens    "200K", "8M", "1.5B", "14.8T" or a whole number        -> int
    Bytes     "64MB", "1GB" or a whole number                        -> int
    Seconds   "90s", "8m", "1h30m", "2d" or a number of seconds      -> float
    Points    [["0", 0.0], ["200K", 3e-3], ["8M", 3e-4, "cosine"]] or a number -> a callable on tokens

`Tokens` and `Seconds` are pydantic annotations; `Points` is a type of its own. Suffixes are decimal (1K = 1000), as in
the paper. Decimal arithmetic keeps "1.1B" exact.
"""

import math
import re
from bisect import bisect_right
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    GetCoreSchemaHandler,
    PlainSerializer,
    PlainValidator,
)
from pydantic_core import CoreSchema, core_schema

from bessemer.errors import UserError

_COUNT = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_SIZE = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
_TIME = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
TOKENS_HELP = 'a whole number of tokens such as 200000, "200K", "8M" or "1.5B"'
SECONDS_HELP = 'a duration such as "90s", "8m", "1h30m", or a number of seconds'
POINTS_HELP = 'a number, or points in consumed tokens such as [["0", 0.0], ["200K", 3e-3], ["8M", 3e-4]]'
COSINE = "cosine"
"""The third element of a point that is reached by half a cosine instead of a straight line."""


def parse_tokens(value: object) -> int:
    """ "8M" -> 8_000_000. Raises UserError for anything that is not a whole, non-negative count."""
    wrong = UserError(f"expected {TOKENS_HELP}")
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise wrong
    match = re.fullmatch(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:e\+?[0-9]+)?)\s*([KMBT]?)\s*", str(value), re.IGNORECASE)
    if not match:
        raise wrong
    try:
        count = Decimal(match[1].replace("_", "")) * _COUNT[match[2].upper()]
    except ArithmeticError:
        raise wrong from None
    if count >= 2**63:  # torch and numpy count no further, and int() would take for ever
        raise UserError(f"expected {TOKENS_HELP}, below 2^63")
    if count != int(count):
        raise UserError(f"expected {TOKENS_HELP}; this is not a whole number")
    return int(count)


def parse_bytes(value: object) -> int:
    """ "64MB" -> 64_000_000."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMG]?)B?\s*", str(value), re.IGNORECASE)
    if isinstance(value, bool) or not match:
        raise UserError('expected a number of bytes such as "64MB" or "1GB"')
    return int(Decimal(match[1]) * _SIZE[match[2].upper()])


def parse_seconds(value: object) -> float:
    """ "1h30m" -> 5400.0. A bare number is seconds."""
    wrong = UserError(f"expected {SECONDS_HELP}")
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise wrong
    text = str(value).replace(" ", "")
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        return float(text)
    parts = re.findall(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h|d)", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise wrong
    return sum(float(number) * _TIME[unit] for number, unit in parts)


def show_tokens(count: float) -> str:
    """8_000_000 -> "8M"; three significant digits, for people."""
    rounded = float(f"{count:.3g}")  # 999_936 is 1M, not 1000K
    for suffix, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if rounded >= size:
            return f"{count / size:.3g}{suffix}" if rounded / size < 1000 else f"{count / size:.0f}{suffix}"
    return f"{count:.3g}"


def show_seconds(seconds: float) -> str:
    """95 -> "1m 35s", for people; from three days on in days, from three years on in years."""
    rounded = round(max(0.0, seconds))
    if rounded < 60:
        return f"{seconds:.1f}s" if seconds < 10 else f"{rounded}s"
    if rounded < 3600:
        return f"{rounded // 60}m {rounded % 60:02d}s"
    if rounded >= 3 * 365 * 86400:
        return f"{rounded / (365 * 86400):,.0f} years"
    if rounded >= 3 * 86400:
        return f"{rounded / 86400:,.0f} days"
    return f"{rounded // 3600}h {rounded % 3600 // 60:02d}m"


class Points:
    """A function of consumed tokens, straight between its points; constant before the first and after the last.

    Two points at the same count are a jump: the value there and after is the second one. A point [tokens, value,
    "cosine"] is reached by half a cosine, flat at both of its ends.
    """

    tokens: list[int]
    values: list[float]
    cosine: list[bool]
    """Whether a cosine leads to the point."""

    def __init__(self, points: "Points | float | list[Any]") -> None:
        self.tokens, self.values, self.cosine = [], [], []
        if isinstance(points, Points):
            self.tokens, self.values, self.cosine = points.tokens, points.values, points.cosine
            return
        if isinstance(points, int | float) and not isinstance(points, bool):
            points = [[0, points]]
        if not isinstance(points, list | tuple) or not points:
            raise UserError(f"expected {POINTS_HELP}")
        for number, point in enumerate(points, start=1):
            self._add(number, point)

    def _add(self, number: int, point: object) -> None:
        if not isinstance(point, list | tuple) or len(point) not in (2, 3):
            raise UserError(f"point {number} is {point!r}, expected a pair [tokens, value]; write {POINTS_HELP}")
        if len(point) == 3 and point[2] != COSINE:
            raise UserError(f'point {number}: its third element is {point[2]!r}, which can only be "{COSINE}"')
        try:
            at = parse_tokens(point[0])
        except UserError as error:
            raise UserError(f"point {number}: tokens are {point[0]!r}, {error}") from None
        value = point[1]
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"point {number}: value is {value!r}, expected a finite number")
        if self.tokens and at < self.tokens[-1]:
            raise UserError(
                f"point {number} is at {at:,} tokens, before point {number - 1} at {self.tokens[-1]:,}; sort the points"
            )
        if self.tokens[-2:] == [at, at]:
            raise UserError(f"three points at {at:,} tokens; a jump needs two")
        if len(point) == 3 and self.tokens[-1:] in ([], [at]):
            raise UserError(f"point {number}: a cosine comes from a point before it, at fewer tokens")
        self.tokens.append(at)
        self.values.append(float(value))
        self.cosine.append(len(point) == 3)

    def __call__(self, tokens: float) -> float:
        upper = bisect_right(self.tokens, tokens)
        if upper == 0:
            return self.values[0]
        if upper == len(self.tokens):
            return self.values[-1]
        left, right = self.tokens[upper - 1], self.tokens[upper]
        share = (tokens - left) / (right - left)
        if self.cosine[upper]:
            share = (1 - math.cos(math.pi * share)) / 2
        return self.values[upper - 1] + share * (self.values[upper] - self.values[upper - 1])

    def plain(self) -> list[list[Any]]:
        """The points as lists, as they are written to JSON and TOML."""
        points = zip(self.tokens, self.values, self.cosine, strict=True)
        return [[at, value, COSINE] if cosine else [at, value] for at, value, cosine in points]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Points) and self.plain() == other.plain()

    def __hash__(self) -> int:
        return hash(str(self.plain()))

    def __repr__(self) -> str:
        return f"Points({[[show_tokens(at), *more] for at, *more in self.plain()]})"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls, serialization=core_schema.plain_serializer_function_ser_schema(lambda points: points.plain())
        )


class Steps(Points):
    """`Points` without interpolation: each value holds until the next point, so rows have 128 or 256 tokens and nothing
    between."""

    def _add(self, number: int, point: object) -> None:
        super()._add(number, point)
        if self.cosine[-1]:
            raise UserError(f"point {number}: these values change in steps, so leave 'cosine' out")

    def __call__(self, tokens: float) -> float:
        return self.values[max(0, bisect_right(self.tokens, tokens) - 1)]


def weight(value: Points | float | list[Any]) -> float | Points:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return Points(value)


Weight = Annotated[
    float | Points, PlainValidator(weight),
    PlainSerializer(lambda value: value.plain() if isinstance(value, Points) else value),
]  # fmt: skip
"""A number, or points in consumed tokens; a number stays one."""


@dataclass(frozen=True)
class AtMost:
    """Checks that all values of a schedule lie between 0 and `most`; `why` they must."""

    most: float
    why: str

    def __call__(self, points: Points) -> Points:
        if min(points.values) < 0:
            raise UserError("expected values of 0 or more")
        if max(points.values) > self.most:
            raise UserError(f"expected values of at most {self.most:g}, for {self.why}")
        return points


LearningRates = Annotated[
    Points, AfterValidator(AtMost(1, "a learning rate above 1 moves every weight by more than its size"))
]
"""Learning rates over tokens or steps."""
LossWeights = Annotated[Points, AfterValidator(AtMost(100, "a heavier term leaves nothing of the others"))]
"""Weights of a term of the loss over tokens."""
Gammas = Annotated[Points, AfterValidator(AtMost(1, "routing scores lie between 0 and 1"))]
"""Update speeds of the routing bias over tokens."""
Tokens = Annotated[int, BeforeValidator(parse_tokens)]
Bytes = Annotated[int, BeforeValidator(parse_bytes)]
Seconds = Annotated[float, BeforeValidator(parse_seconds)]
