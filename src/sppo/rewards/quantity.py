"""An answer as a number with its unit, and equality of two: `12 km` is `12000 m`, `50%` is `0.5`. Exact arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from .reading import read
from .syntax import Node, literal
from .tokens import Unreadable
from .units import Unit

LONGEST = 400
"""Characters of a text that is read as a quantity."""


@dataclass(frozen=True)
class Quantity:
    """A number and its unit (None: it has none)."""

    value: Fraction
    unit: Unit | None
    noun: str = ""
    """The counted noun, where there is no unit: `12 apples`."""


def quantity(text: str) -> Quantity | None:
    r"""The number with its unit that a text is: `12.5 km`, `$3`, `40\%`, `3 × 10^8 m/s`, `x = 12`, `12 apples` (no
    unit); None for anything else."""
    if len(text) > LONGEST:
        return None
    try:
        readings = read(text)
    except Unreadable:
        return None
    return next((found for node in readings if (found := _quantity(node)) is not None), None)


def _quantity(node: Node) -> Quantity | None:
    if node.op == "relation" and node.args[0] == ("=",) and node.args[1][0].op == "symbol":
        node = node.args[1][1]
    of_unit, noun = None, ""
    if node.op == "quantity":
        node, of_unit = node.args
    elif node.op == "counted":
        node, noun = node.args
    value = literal(node)
    return None if value is None else Quantity(value, of_unit, noun)


def same_number(a: Fraction, b: Fraction, tolerance: float) -> bool:
    """Whether a is within `tolerance` of the reference b, relative to b (absolute where b is 0)."""
    return abs(a - b) <= Fraction(tolerance) * (abs(b) if b else 1)


def same_quantity(given: Quantity, gold: Quantity, tolerance: float, units: str) -> bool:
    """Whether two quantities are equal in base units.

    `units`: `optional` (a missing unit is taken from the other side; `0.5` equals `50%`), `required` (as in the
    reference), or `ignore`.
    """
    if (given.noun and (gold.unit is not None or gold.noun not in ("", given.noun))) or (
        gold.noun and given.unit is not None
    ):
        return False
    if units == "ignore":
        return same_number(given.value, gold.value, tolerance)
    if given.unit is not None and gold.unit is not None:
        alike = given.unit.powers == gold.unit.powers
        return alike and same_number(given.value * given.unit.factor / gold.unit.factor, gold.value, tolerance)
    if units == "required":
        return given.unit is None and gold.unit is None and same_number(given.value, gold.value, tolerance)
    a, b = (q.value * q.unit.factor if q.unit is not None and not q.unit.powers else q.value for q in (given, gold))
    return same_number(given.value, gold.value, tolerance) or same_number(a, b, tolerance)
