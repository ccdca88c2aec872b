"""Sets of real numbers, as pieces of the line: intervals, unions, and inequalities in one letter."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import mpmath

from .evaluate import FAILS, FINE, Point, Undefined, Value, approximate, close, evaluate, infinite, is_real, walk
from .syntax import Node

Piece = tuple[Value, bool, Value, bool]
"""(from, whether that belongs to it, to, whether that does)."""


_LEAST, _MOST = mpmath.ninf, mpmath.inf


def same_reals(gold: Node, given: Node) -> bool:
    """Two sets of real numbers: intervals, unions, inequalities in one letter."""
    try:
        with mpmath.workdps(FINE):
            (variable_a, a), (variable_b, b) = _reals(gold), _reals(given)
            if variable_a is not None and variable_b is not None and variable_a != variable_b:
                return False
            return len(a) == len(b) and all(
                p[1] == q[1] and p[3] == q[3] and _same_end(p[0], q[0]) and _same_end(p[2], q[2])
                for p, q in zip(a, b, strict=True)
            )
    except FAILS:
        return False


def _same_end(x: Value, y: Value) -> bool:
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x == y
    return bool(x == y) or (
        bool(mpmath.isfinite(approximate(x)) and mpmath.isfinite(approximate(y))) and close(x, y, FINE)
    )


def _reals(node: Node) -> tuple[Node | None, list[Piece]]:
    """The variable, where one is named, and the pieces in order.

    Raises Undefined for anything but a set of real numbers.
    """
    op, args = node.op, node.args
    if op == "reals":
        return None, [(_LEAST, False, _MOST, False)]
    if op == "bracket" and len(args[2]) == 2:
        (low, high) = (_end(end) for end in args[2])
        if approximate(low) > approximate(high):
            raise Undefined
        return None, [(low, args[0] == "[", high, args[1] == "]")]
    if op in ("set", "list") and not any(m.op == "relation" for m in (args if op == "set" else args[1])):
        points = [_end(m) for m in (args if op == "set" else args[1])]
        return None, _united([(p, True, p, True) for p in points])
    if op == "join":
        variable, pieces = _reals(args[1])
        _, others = _reals(args[2])
        return variable, _joined(args[0], pieces, others)
    if op == "sum" and len(args) == 2 and args[1].op == "negative" and args[0].op in ("reals", "join", "bracket"):
        return None, _joined("minus", _reals(args[0])[1], _reals(args[1].args[0])[1])
    if op == "such":
        variable, pieces = _reals(args[1])
        name = args[0].args[1][0] if args[0].op == "relation" and args[0].args[0] == ("in",) else args[0]
        if variable is not None and variable != name:
            raise Undefined
        return None, pieces
    if op == "list":
        parts = [_reals(item) for item in args[1]]
        variables = {variable for variable, _ in parts}
        if len(variables) != 1:
            raise Undefined
        pieces = parts[0][1]
        for _, others in parts[1:]:
            pieces = _joined("intersection" if args[0] == "and" else "union", pieces, others)
        return parts[0][0], pieces
    if op == "relation":
        return _solved(node)
    raise Undefined


def _solved(node: Node) -> tuple[Node | None, list[Piece]]:
    """A chain of comparisons with one letter, as a set: `-2 \\le x < 7`, `x \\ne 3`, `x \\in S`."""
    operators, sides = node.args
    pieces: list[Piece] = [(_LEAST, False, _MOST, False)]
    variable: Node | None = None
    for operator, a, b in zip(operators, sides, sides[1:], strict=False):
        if b.op == "symbol" and a.op != "symbol":
            operator = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}.get(operator, operator)
            a, b = b, a
        if a.op != "symbol" or (variable is not None and variable != a) or (operator in ("in", "notin") and b is a):
            raise Undefined
        variable = a
        if operator in ("in", "notin"):
            found = _reals(b)[1]
            pieces = _joined("intersection" if operator == "in" else "minus", pieces, found)
            continue
        end = _end(b)
        if operator not in ("<", "<=", ">", ">=", "=", "!="):
            raise Undefined
        below: list[Piece] = [(_LEAST, False, end, operator == "<=")]
        above: list[Piece] = [(end, operator == ">=", _MOST, False)]
        here: list[Piece] = [(end, True, end, True)]
        kept = {"<": below, "<=": below, ">": above, ">=": above}.get(operator, here)
        pieces = _joined("minus" if operator == "!=" else "intersection", pieces, kept)
    return variable, pieces


def _end(node: Node) -> Value:
    beyond = infinite(node)
    if beyond in (1, -1):
        return _MOST if beyond == 1 else _LEAST
    if any(n.op in ("symbol", "dots") for n in walk(node)):
        raise Undefined
    value = evaluate(node, Point(0))
    if not is_real(value):
        raise Undefined
    return value if isinstance(value, Fraction) else mpmath.re(value)


def _joined(how: str, a: Sequence[Piece], b: Sequence[Piece]) -> list[Piece]:
    if how == "union":
        return _united([*a, *b])
    if how == "minus":
        return _joined("intersection", a, _complement(b))
    out = []
    for p in a:
        for q in b:
            low, low_in = max((p[0], not p[1]), (q[0], not q[1]), key=lambda end: (approximate(end[0]), end[1]))
            high, high_in = min((p[2], p[3]), (q[2], q[3]), key=lambda end: (approximate(end[0]), end[1]))
            piece = (low, not low_in, high, high_in)
            if approximate(low) < approximate(high) or (_same_end(low, high) and piece[1] and piece[3]):
                out.append(piece)
    return _united(out)


def _complement(pieces: Sequence[Piece]) -> list[Piece]:
    out: list[Piece] = []
    low, closed = _LEAST, False
    for p in _united(pieces):
        if approximate(low) < approximate(p[0]) or (closed and not p[1] and _same_end(low, p[0])):
            out.append((low, closed, p[0], not p[1]))
        low, closed = p[2], not p[3]
    if low != _MOST:
        out.append((low, closed, _MOST, False))
    return out


def _united(pieces: Sequence[Piece]) -> list[Piece]:
    """Sorted, and what touches is one piece; infinity belongs to none."""
    out: list[Piece] = []
    for p in sorted(pieces, key=lambda piece: (approximate(piece[0]), not piece[1])):
        p = (p[0], p[1] and p[0] != _LEAST, p[2], p[3] and p[2] != _MOST)
        if out:
            q = out[-1]
            touches = approximate(p[0]) < approximate(q[2]) or (_same_end(p[0], q[2]) and (p[1] or q[3]))
            if touches:
                high, high_in = max((q[2], q[3]), (p[2], p[3]), key=lambda end: (approximate(end[0]), end[1]))
                out[-1] = (q[0], q[1], high, high_in)
                continue
        out.append(p)
    return out
