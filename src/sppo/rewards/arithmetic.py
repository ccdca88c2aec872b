"""Whether the equations that a step writes hold: `12 * 3 = 36`, `36 + 4 = 40 = 80/2`.

Exact, and nothing is executed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from ..types import Task

_RUN = re.compile(r"[-+*/×·÷−^=\d.,()\s]+")
_WORDS = re.compile(  # spaces are counted: an unbounded \s would make a text of spaces take quadratic time
    r"(?<=\d)\s{0,2}(?:[xX]|times)\s{0,2}(?=[\d(])|\s{1,2}(?:plus|minus|divided by)\s{1,2}(?=[\d(-])"
)
_SIGN = {"plus": "+", "minus": "-", "divided by": "/"}
_NUMBERING = re.compile(r"^\s*(?:\(?\d+[.)]|[-*•])\s+")
_TOKEN = re.compile(r"\s{0,9}(\d+(?:\.\d+)?|[-+*/()^])")
_SAME = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-"})
LONGEST, DEEPEST, HIGHEST_POWER = 400, 30, 64


def check_steps(task: Task, steps: Sequence[str]) -> list[float | None]:
    """1 for a step all of whose equations hold, 0 for one with a false equation, None for one that writes none."""
    return [check(step) for step in steps]


def check(step: str) -> float | None:
    """Whether every equation between numbers in a text holds (to the digits that it writes); None without any.

    An equation counts when its left side computes something and is whole: `3 dozen + 4 = 40` and `f(2) = 4` are not
    judged.
    """
    text = _WORDS.sub(lambda m: _SIGN.get(m.group().strip(), "*"), _NUMBERING.sub("", step).translate(_SAME))
    verdicts = []
    for found in _RUN.finditer(text):
        if "=" not in found.group() or found.end() - found.start() > LONGEST:
            continue
        sides = found.group().split("=")
        if found.start() > 0 and not sides[0][:1].isspace() and text[found.start() - 1].isalnum():
            sides[0] = ""  # `f(2)`, `x2`: not a number of its own
        if found.end() < len(text) and not sides[-1][-1:].isspace() and text[found.end()].isalpha():
            sides[-1] = ""  # `2x`
        sides = [side.strip(" \n\t.,") for side in sides]
        values = [value_of(side) for side in sides]
        if not _computes(sides[0]):
            values[0] = None
        for i in range(1, len(sides)):
            left, right = values[i - 1], values[i]
            if left is not None and right is not None:
                verdicts.append(_equal(left, right, sides[i]))
    return None if not verdicts else float(all(verdicts))


def _computes(side: str) -> bool:
    """Whether a side that begins with a number or a bracket has an operator between two operands."""
    dense = "".join(side.split())
    if not (dense[:1] == "(" or dense.removeprefix("-")[:1].isdigit()):
        return False
    return any(
        c in "-+*/^"
        and (dense[i - 1].isdigit() or dense[i - 1] == ")")
        and (dense[i + 1 : i + 2] in ("-", "(") or dense[i + 1 : i + 2].isdigit())
        for i, c in enumerate(dense)
        if i
    )


def _equal(a: Fraction, b: Fraction, written: str) -> bool:
    """Equal, or equal once rounded to the decimals that the right side writes: `10 / 3 = 3.33`."""
    decimals = re.fullmatch(r"[-+]?\d+\.(\d+)", written)
    half = Fraction(1, 2 * 10 ** len(decimals[1])) if decimals else Fraction(0)
    return abs(a - b) <= half


def value_of(text: str) -> Fraction | None:
    """The exact value of an arithmetic expression; None for anything else, and beyond LONGEST, DEEPEST or
    HIGHEST_POWER."""
    if len(text) > LONGEST:
        return None
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text.translate(_SAME)).strip()
    tokens: list[str] = []
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            return None
        tokens.append(match[1])
        at = match.end()
    try:
        value, rest = _sum(tokens, 0)
    except (ValueError, ZeroDivisionError, IndexError):
        return None
    return None if rest else value


def _sum(tokens: list[str], depth: int) -> tuple[Fraction, list[str]]:
    value, tokens = _product(tokens, depth)
    while tokens and tokens[0] in "+-":
        sign = 1 if tokens[0] == "+" else -1
        term, tokens = _product(tokens[1:], depth)
        value += sign * term
    return value, tokens


def _product(tokens: list[str], depth: int) -> tuple[Fraction, list[str]]:
    value, tokens = _power(tokens, depth)
    while tokens and tokens[0] in "*/":
        operator = tokens[0]
        factor, tokens = _power(tokens[1:], depth)
        value = value * factor if operator == "*" else value / factor
    return value, tokens


def _power(tokens: list[str], depth: int) -> tuple[Fraction, list[str]]:
    if depth > DEEPEST:
        raise ValueError("too deep")
    if tokens[0] in "+-":
        value, rest = _power(tokens[1:], depth + 1)
        return (value if tokens[0] == "+" else -value), rest
    if tokens[0] == "(":
        value, rest = _sum(tokens[1:], depth + 1)
        if rest[0] != ")":
            raise ValueError("unbalanced")
        rest = rest[1:]
    else:
        value, rest = Fraction(tokens[0]), tokens[1:]
    if rest and rest[0] == "^":
        exponent, rest = _power(rest[1:], depth + 1)
        size = max(value.numerator.bit_length(), value.denominator.bit_length())
        if exponent.denominator != 1 or abs(exponent) > HIGHEST_POWER or size * abs(exponent) > 4096:
            raise ValueError("absurd")
        value = value ** int(exponent)
    return value, rest
