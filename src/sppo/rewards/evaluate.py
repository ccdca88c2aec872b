"""The value of an expression at a point: a Fraction where it is rational, else an mpmath number of the precision in
force. Within a budget."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import mpmath

from .syntax import Node
from .vocabulary import DEGREE

FINE, FINEST = 100, 400
"""Significant digits of the two evaluations."""


BITS, STEPS, FACTORIAL, TERMS = 200_000, 20_000, 10_000, 1000
"""Limits of one evaluation: bits of an exact number, nodes visited, the largest exact factorial, terms of a sum."""


Value = Any
"""A Fraction where it is exact, else an mpmath number."""


class Undefined(Exception):
    """An expression has no value that can be computed here: a division by 0, infinity, a number beyond the budget."""


FAILS = (Undefined, ArithmeticError, ValueError, mpmath.libmp.NoConvergence)
"""Exceptions that end an evaluation without a value."""


def approximate(x: Value) -> Value:
    return mpmath.mpf(x.numerator) / x.denominator if isinstance(x, Fraction) else x


def is_real(x: Value) -> bool:
    return isinstance(x, (Fraction, mpmath.mpf)) or abs(x.imag) <= abs(x) * mpmath.mpf(10) ** (40 - FINE)


def close(x: Value, y: Value, digits: int) -> bool:
    x, y = approximate(x), approximate(y)
    return bool(abs(x - y) <= max(abs(x), abs(y)) * mpmath.mpf(10) ** (40 - digits))


def infinite(node: Node) -> int | None:
    """1 or -1 for infinity, 0 for an expression that holds it, None for all others."""
    if node == Node("constant", ("oo",)):
        return 1
    if node.op == "negative" and node.args[0] == Node("constant", ("oo",)):
        return -1
    return 0 if any(n == Node("constant", ("oo",)) for n in walk(node)) else None


def walk(node: Node) -> Iterator[Node]:
    stack = [node]
    while stack:
        node = stack.pop()
        yield node
        for arg in node.args:
            if isinstance(arg, Node):
                stack.append(arg)
            elif isinstance(arg, tuple):
                stack.extend(a for a in arg if isinstance(a, Node))
                stack.extend(a for row in arg if isinstance(row, tuple) for a in row if isinstance(a, Node))


# -- evaluation -----------------------------------------------------------------------------------------------------------------


class Point:
    """A value for every letter, and for every part that is not evaluated, the same wherever it stands.

    `index` 0: there are none.
    """

    def __init__(self, index: int, negative: bool = False, whole: bool = False) -> None:
        self.index, self.negative, self.whole = index, negative, whole
        self.bound: dict[str, Fraction] = {}
        self.steps = 0

    def of(self, what: str) -> Fraction:
        """The value of one letter."""
        if what in self.bound:
            return self.bound[what]
        draw = random.Random(f"{self.index} {what}")
        if self.whole:
            return Fraction(draw.randint(2, 40))
        value = Fraction(draw.randint(3, 60), draw.choice((7, 11, 13, 17, 19)))
        return -value if self.negative else value


def evaluate(node: Node, point: Point) -> Value:
    """The value of an expression: a Fraction where it is rational, else an mpmath number of the precision in force.

    Raises Undefined.
    """
    point.steps += 1
    if point.steps > STEPS:
        raise Undefined
    op, args = node.op, node.args
    if op == "number":
        return args[0]
    if op == "symbol":
        return point.of(args[0])
    if op == "constant":
        if args[0] == "oo":
            raise Undefined
        return {"e": mpmath.e, "i": mpmath.mpc(0, 1), "pi": mpmath.pi}[args[0]] + 0
    if op == "negative":
        return -evaluate(args[0], point)
    if op == "sum":
        total: Value = Fraction(0)
        for arg in args:
            total = _add(total, evaluate(arg, point))
        return total
    if op == "product":
        total = Fraction(1)
        for arg in args:
            total = multiply(total, evaluate(arg, point))
        return total
    if op == "quotient":
        above, below = evaluate(args[0], point), evaluate(args[1], point)
        if below == 0:
            raise Undefined
        return multiply(above, 1 / below)
    if op == "power":
        return _power(evaluate(args[0], point), evaluate(args[1], point))
    if op == "factorial":
        return _factorial(evaluate(args[0], point), args[1])
    if op == "quantity" and args[1] == DEGREE:
        return multiply(evaluate(args[0], point), mpmath.pi / 180)
    if op == "quantity" and not args[1].powers:
        return multiply(evaluate(args[0], point), args[1].factor)
    if op == "call" and args[0] in EVALUATED:
        return _called(args[0], [evaluate(arg, point) for arg in args[1:]])
    if op == "big":
        return _big(node, point)
    if op in ("call", "matrix"):
        return point.of(repr(node))
    raise Undefined


def _size(x: Value) -> int:
    return max(x.numerator.bit_length(), x.denominator.bit_length()) if isinstance(x, Fraction) else 0


def _add(x: Value, y: Value) -> Value:
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        if _size(x) + _size(y) > 2 * BITS:
            raise Undefined
        return x + y
    return approximate(x) + approximate(y)


def multiply(x: Value, y: Value) -> Value:
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        if _size(x) + _size(y) > 2 * BITS:
            raise Undefined
        return x * y
    return approximate(x) * approximate(y)


def _power(base: Value, exponent: Value) -> Value:
    if isinstance(exponent, Fraction) and isinstance(base, Fraction):
        if exponent.denominator == 1 and _size(base) * abs(exponent) <= BITS:
            if base == 0 and exponent < 0:
                raise Undefined
            return base ** int(exponent)
        if base in (0, 1):
            if exponent < 0 and base == 0:
                raise Undefined
            return base
        if exponent.denominator == 2 and base > 0 and _size(base) * abs(exponent) <= BITS:
            root = Fraction(math.isqrt(base.numerator), math.isqrt(base.denominator))
            if root * root == base:
                return root**exponent.numerator
    if isinstance(exponent, Fraction) and exponent.denominator % 2 and exponent.denominator > 1 and is_real(base):
        real = mpmath.re(approximate(base))
        if real < 0:  # the real root, as \sqrt[3]{-8} = -2
            return (-1) ** (exponent.numerator % 2) * _power(-real, exponent)
    x, y = approximate(base), approximate(exponent)
    if x == 0:
        if mpmath.re(y) <= 0:
            raise Undefined
        return mpmath.mpf(0)
    if abs(y) * (abs(mpmath.log(x)) + 1) > 10**15:
        raise Undefined
    return x**y


def _factorial(x: Value, step: int) -> Value:
    if isinstance(x, Fraction) and x.denominator == 1:
        n = int(x)
        if n < 0:
            raise Undefined
        if n <= FACTORIAL:
            return Fraction(math.factorial(n) if step == 1 else math.prod(range(n, 0, -2)))
    if abs(approximate(x)) > 10**12:
        raise Undefined
    return mpmath.factorial(approximate(x)) if step == 1 else mpmath.fac2(approximate(x))


def _big(node: Node, point: Point) -> Value:
    """A sum or product between whole numbers, term by term; any other is a letter of its own."""
    name, below, above, body = node.args
    if name in ("sum", "prod") and isinstance(below, Node) and isinstance(above, Node) and below.op == "relation":
        operators, (variable, start) = below.args[0], below.args[1][:2]
        if operators == ("=",) and variable.op == "symbol":
            low, high = evaluate(start, point), evaluate(above, point)
            if (
                isinstance(low, Fraction)
                and isinstance(high, Fraction)
                and low.denominator == high.denominator == 1
                and high - low < TERMS
            ):
                total: Value = Fraction(name == "prod")
                outer = point.bound.get(variable.args[0])
                for i in range(int(low), int(high) + 1):
                    point.bound[variable.args[0]] = Fraction(i)
                    term = evaluate(body, point)
                    total = _add(total, term) if name == "sum" else multiply(total, term)
                point.bound.pop(variable.args[0])
                if outer is not None:
                    point.bound[variable.args[0]] = outer
                return total
    return point.of(repr(node))


_MP = {
    "sin": mpmath.sin, "cos": mpmath.cos, "tan": mpmath.tan, "cot": mpmath.cot, "sec": mpmath.sec, "csc": mpmath.csc, "sinh": mpmath.sinh, "cosh": mpmath.cosh,
    "tanh": mpmath.tanh, "coth": mpmath.coth, "arcsin": mpmath.asin, "arccos": mpmath.acos, "arctan": mpmath.atan, "arccot": mpmath.acot, "arcsec": mpmath.asec,
    "arccsc": mpmath.acsc, "asin": mpmath.asin, "acos": mpmath.acos, "atan": mpmath.atan, "ln": mpmath.log,
    "log": mpmath.log, "lg": mpmath.log10, "exp": mpmath.exp,
    "Re": mpmath.re, "Im": mpmath.im, "arg": mpmath.arg,
}  # fmt: skip


_EXACT = {"abs", "sgn", "gcd", "lcm", "max", "min", "floor", "ceil", "mod", "binom", "logbase"}


EVALUATED = {*_MP, *_EXACT}


def _called(name: str, args: Sequence[Value]) -> Value:
    if name in _MP:
        if len(args) != 1 or abs(approximate(args[0])) > 10**15:
            raise Undefined
        if name in ("ln", "log", "lg") and args[0] == 0:
            raise Undefined
        return _MP[name](approximate(args[0]))
    if name == "abs":
        return abs(args[0])
    if name == "logbase":
        return mpmath.log(approximate(args[1])) / mpmath.log(approximate(args[0]))
    if not all(is_real(arg) for arg in args):
        raise Undefined
    if name in ("max", "min"):
        return (max if name == "max" else min)(args, key=lambda x: mpmath.re(approximate(x)))
    if name == "sgn":
        real = mpmath.re(approximate(args[0]))
        return Fraction((real > 0) - (real < 0))
    if name in ("floor", "ceil"):
        value = args[0] if isinstance(args[0], Fraction) else mpmath.re(args[0])
        if isinstance(value, Fraction):
            return Fraction(math.floor(value) if name == "floor" else math.ceil(value))
        return mpmath.floor(value) if name == "floor" else mpmath.ceil(value)
    if not all(isinstance(arg, Fraction) and arg.denominator == 1 for arg in args):
        raise Undefined
    whole = [int(arg) for arg in args]
    if name == "mod":
        return Fraction(whole[0] % whole[1]) if whole[1] else _undefined()
    if name == "binom":
        if not 0 <= whole[1] <= FACTORIAL or not 0 <= whole[0] <= 10**6 or whole[1] * whole[0].bit_length() > BITS:
            raise Undefined
        return Fraction(math.comb(*whole))
    return Fraction(math.gcd(*whole) if name == "gcd" else math.lcm(*whole))


def _undefined() -> Fraction:
    raise Undefined
