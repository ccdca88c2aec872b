"""`calculator`: exact arithmetic, + − * / ^ and brackets. Nothing is evaluated; what is absurdly large is refused."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from ..rewards.arithmetic import value_of

DIGITS = 12
"""Decimals of a number that has no end."""


def build() -> Callable[[str], str]:
    """The tool."""
    return calculate


def calculate(expression: str) -> str:
    """Compute the value of an arithmetic expression exactly.

    Args:
        expression: Numbers with + - * / ^ and brackets, such as (12+7)*34.
    """
    value = value_of(expression)
    if value is None:
        raise ValueError("this is no arithmetic expression: numbers with + - * / ^ and brackets")
    return decimal(value)


def decimal(value: Fraction) -> str:
    """A number as people write it, whole or with at most `DIGITS` decimals.

    >>> decimal(Fraction(7)), decimal(Fraction(1, 4)), decimal(Fraction(-1, 3))
    ('7', '0.25', '-0.333333333333')
    """
    if value.denominator == 1:
        return str(value.numerator)
    scaled = round(abs(value) * 10**DIGITS)
    whole, rest = divmod(scaled, 10**DIGITS)
    return f"{'-' if value < 0 else ''}{whole}.{rest:0{DIGITS}d}".rstrip("0").rstrip(".")
