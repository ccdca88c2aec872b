"""The syntax tree of a mathematical answer. Nothing is evaluated here."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from .tokens import Unreadable


@dataclass(frozen=True, slots=True)
class Node:
    """A node of an answer's tree. `op` determines `args`; two nodes are equal when they were written the same way.

    number (value, digits after the point or None)   symbol (name)   constant (e | i | pi | oo)
    sum (terms…)   product (factors…)   power (base, exponent)   negative (x)   quotient (a, b)
    plusminus (sign, a or None, b)   factorial (x, 1 or 2)   call (name, arguments…)
    big (name, below, above, body)   dots ()   list (connective, items)   bracket (opening, closing, items)
    set (items)   such (variable, condition)   reals ()   join (union | intersection | minus, a, b)
    matrix (rows)   relation (operators, sides)   ratio (parts)   clock (hour, minute…)
    words (text)   quantity (value, unit)   labelled (letter, value)   counted (value, noun)
    based (digits, base)
    """

    op: str
    args: tuple[Any, ...] = ()


def number_node(text: str) -> Node:
    """The node of a number's token. Raises Unreadable for an exponent of more than four digits."""
    mantissa, _, exponent = text.partition("e")
    if len(exponent.lstrip("+-")) > 4:
        raise Unreadable("a number's exponent is beyond reason")
    fixed, _, repeated = mantissa.removesuffix(")").partition("(")
    whole, point, fraction = fixed.partition(".")
    value = Fraction(int(whole or "0")) + (Fraction(int(fraction), 10 ** len(fraction)) if fraction else 0)
    if repeated:
        value += Fraction(int(repeated), (10 ** len(repeated) - 1) * 10 ** len(fraction))
        return Node("number", (value, None))
    if exponent:
        value *= Fraction(10) ** int(exponent)
    return Node("number", (value, len(fraction) - int(exponent or 0) if point or exponent else None))


def integer(value: int) -> Node:
    return Node("number", (Fraction(value), None))


def letter(letter: str) -> Node:
    return Node("constant", (letter,)) if letter in ("e", "i") else Node("symbol", (letter,))


def times(a: Node, b: Node) -> Node:
    """The product, flattened. Raises Unreadable for words."""
    if "words" in (a.op, b.op):
        raise Unreadable("it has words beside a value")
    return Node("product", (*(a.args if a.op == "product" else (a,)), b))


def proper(part: Node) -> bool:
    above, below = part.args
    return (
        above.op == below.op == "number"
        and above.args[1] is below.args[1] is None
        and above.args[0].denominator == below.args[0].denominator == 1
        and 0 < above.args[0] < below.args[0]
    )


def written(node: Node) -> str:
    """One spelling of a small tree, for a name: letters and digits in order."""
    out: list[str] = []
    for arg in node.args:
        if isinstance(arg, Node):
            out.append(written(arg))
        elif isinstance(arg, tuple):
            out.extend(written(a) if isinstance(a, Node) else str(a) for a in arg)
        else:
            out.append(str(arg))
    return node.op[:1] * (node.op not in ("symbol", "number", "product", "constant", "words")) + "".join(out)


def depth(node: Node) -> int:
    """Levels of a tree, counted without recursion."""
    deepest, stack = 0, [(node, 1)]
    while stack:
        node, level = stack.pop()
        deepest = max(deepest, level)
        for arg in node.args:
            parts = arg if isinstance(arg, tuple) else (arg,)
            stack.extend((part, level + 1) for part in parts if isinstance(part, Node))
            stack.extend(
                (part, level + 1) for row in parts if isinstance(row, tuple) for part in row if isinstance(part, Node)
            )
    return deepest


def literal(node: Node) -> Fraction | None:
    r"""The value of what is written as a number: `-3`, `1/2`, `2\frac{1}{2}`, `1.2 \times 10^{-3}`; None for anything that must be computed."""
    op, args = node.op, node.args
    if op == "number":
        return args[0]
    if op == "negative":
        inner = literal(args[0])
        return None if inner is None else -inner
    if op == "quotient" and args[0].op in ("number", "negative") and args[1].op == "number" and args[1].args[0]:
        above = literal(args[0])
        return None if above is None else above / args[1].args[0]
    if op == "sum" and len(args) == 2 and args[0].op == "number" and args[1].op == "quotient" and proper(args[1]):
        return args[0].args[0] + args[1].args[0].args[0] / args[1].args[1].args[0]
    if op == "power" and args[0] == integer(10):
        return literal(Node("product", (integer(1), node)))
    if op == "product" and len(args) == 2 and args[0].op in ("number", "negative") and args[1].op == "power":
        mantissa, (base, exponent) = literal(args[0]), args[1].args
        power = literal(exponent) if exponent.op in ("number", "negative") else None
        if (
            base == integer(10)
            and mantissa is not None
            and power is not None
            and power.denominator == 1
            and abs(power) < 1000
        ):
            return mantissa * Fraction(10) ** int(power)
    return None


def repeating(text: str) -> str | None:
    """A decimal whose digits repeat, written with its period: `0.333` is `0.(3)`; None where they do not: 3.14159, 2.718281828."""
    whole, _, digits = text.partition(".")
    if not digits.isdigit() or len(digits) > 60:
        return None
    for start in range(min(3, len(digits))):
        rest = digits[start:]
        for period in range(1, len(rest) // 2 + 1):
            times_written = 2 if period > 1 and start == 0 else 3
            if len(rest) >= period * times_written and rest == (rest[:period] * len(rest))[: len(rest)]:
                return f"{whole or '0'}.{digits[:start]}({rest[:period]})"
    return None
