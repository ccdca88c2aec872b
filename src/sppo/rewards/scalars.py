r"""Whether two expressions have the same value. Exact where both are rational; nothing is simplified.

Other values are computed twice, to 100 and to 400 digits, and must agree relative to their size at both: `e^{-50}` is
not 0, and 10^{-34} is not 10^{-19}. Expressions with letters are the same when they agree at random rational points
(Schwartz–Zippel): positive points, and negative ones where both are real there. So `\sqrt{1/n}` is `1/\sqrt{n}`, and
`|x|` is not `x`. Every evaluation has a budget: an answer that is too large to compute equals only itself.
"""

from __future__ import annotations

from fractions import Fraction

import mpmath

from .evaluate import (
    EVALUATED,
    FAILS,
    FINE,
    FINEST,
    Point,
    Value,
    approximate,
    close,
    evaluate,
    infinite,
    is_real,
    multiply,
    walk,
)
from .syntax import Node, integer

DIGITS = 6
"""The fewest significant digits with which a decimal stands for an exact value: 0.333333 for 1/3."""
SCALAR = {"number", "symbol", "constant", "sum", "product", "power", "negative", "quotient", "call", "factorial", "big"}
COUNTING = {"n", "k", "m"}
"""Letters that may stand for whole numbers only: (-1)^n = cos(n pi)."""


def same_scalar(a: Node, b: Node) -> bool:
    if a == b:
        return True
    if a.op not in SCALAR or b.op not in SCALAR:
        return False
    if infinite(a) is not None or infinite(b) is not None:
        return infinite(a) == infinite(b)
    if any(node.op == "dots" for tree in (a, b) for node in walk(tree)):
        return False  # 1 + 2 + … + n is not evaluated
    names = {node.args[0] for tree in (a, b) for node in walk(tree) if node.op == "symbol"}
    opaque = any(node.op == "big" or (node.op == "call" and node.args[0] not in EVALUATED) for tree in (a, b) for node in walk(tree))  # fmt: skip
    if not names and not opaque:
        return _agree(a, b, Point(0)) is True or _rounds(a, b)
    return _identical(a, b) or (bool(names) and names <= COUNTING and _identical(a, b, whole=True))


def _identical(a: Node, b: Node, whole: bool = False) -> bool:
    """Equality at random points."""
    found = [_agree(a, b, Point(i, whole=whole)) for i in range(1, 7)]
    if False in found or found.count(True) < 3:
        return False
    return whole or False not in [_agree(a, b, Point(i, negative=True), real=True) for i in range(1, 4)]


def _agree(a: Node, b: Node, point: Point, real: bool = False) -> bool | None:
    """Whether two expressions have the same value at a point; None where one is undefined (`real`: or not real)."""
    try:
        with mpmath.workdps(FINE):
            x, y = evaluate(a, point), evaluate(b, point)
            if isinstance(x, Fraction) and isinstance(y, Fraction):
                return x == y
            if real and not (is_real(x) and is_real(y)):
                return None
            tiny = mpmath.mpf(10) ** (40 - FINE)
            if not close(x, y, FINE) and min(abs(approximate(x)), abs(approximate(y))) > tiny:
                return False
        with mpmath.workdps(FINEST):
            u, v = evaluate(a, point), evaluate(b, point)
            shrink = mpmath.mpf(10) ** (
                FINE - FINEST + 20
            )  # noise around 0 shrinks with the precision, a small value does not
            zeros = [abs(approximate(fine)) <= shrink * abs(approximate(coarse)) for fine, coarse in ((u, x), (v, y))]
            return all(zeros) if any(zeros) else close(u, v, FINEST)
    except FAILS:
        return None


def _rounds(a: Node, b: Node) -> bool:
    """Whether one is a decimal of six significant digits or more that stands for the other: 0.333333 for 1/3, 3.141593
    for pi.

    An exact value that has no more places than the decimal must be written exactly: 0.9999996 is not 1.
    """
    for decimal, other in ((a, b), (b, a)):
        written = _decimal(decimal)
        if written is None:
            continue
        value, places = written
        if len(str(abs(int(value * Fraction(10) ** places)))) < DIGITS:
            continue
        try:
            with mpmath.workdps(FINE):
                exact = evaluate(other, Point(0))
                if not is_real(exact):
                    continue
                unit = Fraction(10) ** -places
                if isinstance(exact, Fraction):
                    if (exact * Fraction(10) ** places).denominator != 1 and abs(value - exact) < unit:
                        return True
                elif abs(approximate(value) - mpmath.re(exact)) < approximate(unit):
                    return True
        except FAILS:
            continue
    return False


def _decimal(node: Node) -> tuple[Fraction, int] | None:
    """The value and the places of a number written as a decimal: `1.20`, `-0.5`, `6.02 \\times 10^{23}`; None for
    anything else."""
    if node.op == "number":
        return None if node.args[1] is None else (node.args[0], node.args[1])
    if node.op == "negative" and (inner := _decimal(node.args[0])):
        return -inner[0], inner[1]
    if node.op == "product" and len(node.args) == 2 and (inner := _decimal(node.args[0])):
        power = node.args[1]
        if power.op == "power" and power.args[0] == integer(10):
            above, sign = power.args[1], 1
            if above.op == "negative":
                above, sign = above.args[0], -1
            exponent = sign * above.args[0] if above.op == "number" else None
            if isinstance(exponent, Fraction) and exponent.denominator == 1 and abs(exponent) < 1000:
                return inner[0] * Fraction(10) ** int(exponent), inner[1] - int(exponent)
    return None


def proportional(p: Node, q: Node, ordered: bool) -> bool:
    """Whether p / q is one constant, other than 0, wherever both are defined; `ordered`: a positive one."""
    if any(n.op in ("dots", "plusminus") or infinite(n) for tree in (p, q) for n in walk(tree)):
        return False
    ratio: Value = None
    found = 0
    for i in range(1, 7):
        try:
            with mpmath.workdps(FINE):
                x, y = evaluate(p, Point(i)), evaluate(q, Point(i))
                if x == 0 or y == 0:
                    return False
                this = multiply(x, 1 / y)
                if ratio is not None and not (this == ratio or close(this, ratio, FINE)):
                    return False
                ratio, found = this, found + 1
        except FAILS:
            continue
    return found >= 3 and (not ordered or (is_real(ratio) and mpmath.re(approximate(ratio)) > 0))
