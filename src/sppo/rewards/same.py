"""Whether a mathematical answer equals the reference: syntax trees, compared part by part.

Values are compared by `scalars.py`, sets of real numbers by `reals.py`; this module knows quantities, words, ratios,
lists and relations.
"""

from __future__ import annotations

from collections.abc import Sequence

from .evaluate import FAILS, Point, evaluate, walk
from .forms import by_letter, forwards, letterless, spread, without_indices
from .reals import same_reals
from .scalars import SCALAR, proportional, same_scalar
from .syntax import Node, integer, times
from .units import Unit


def same(gold: Node, given: Node) -> bool:
    """Whether an answer equals the reference. docs/rewards.md lists what counts as equal."""
    if gold == given:
        return True
    if "relation" in (gold.op, given.op) or "such" in (gold.op, given.op) or _has_relations(gold, given):
        return _same_relations(gold, given)
    if "labelled" in (gold.op, given.op):
        return _same_labelled(gold, given)
    gold, given = spread(gold), spread(given)
    ops = {gold.op, given.op}
    if ops & {"quantity", "counted"}:
        return _same_quantity(gold, given)
    if "based" in ops:  # a reference written in a base accepts the same digits only
        return gold.op != "based" and same_scalar(gold, integer(int(*given.args)))
    if "words" in ops:
        return _same_words(gold, given)
    if ops & {"ratio", "clock"}:
        return _same_ratio(gold, given)
    if ops & {"join", "reals"}:
        return same_reals(gold, given)
    if ops & {"list", "set", "bracket"}:
        return _same_members(gold, given)
    if "matrix" in ops:
        return _same_matrix(gold, given)
    return same_scalar(gold, given)


def _same_quantity(gold: Node, given: Node) -> bool:
    """A unit or noun missing on one side is taken from the other; percent may be omitted or computed (50, 50% and 0.5)."""
    a, unit_a, noun_a = _parts(gold)
    b, unit_b, noun_b = _parts(given)
    if (noun_a and (unit_b or (noun_b and noun_a.rstrip("s") != noun_b.rstrip("s")))) or (noun_b and unit_a):
        return False
    if unit_a and unit_b:
        scale = unit_b.factor / unit_a.factor
        scaled = b if scale == 1 else times(Node("number", (scale, None)), b)
        return unit_a.powers == unit_b.powers and same(a, scaled)
    if same(a, b):
        return True
    percent = [u for u in (unit_a, unit_b) if u and not u.powers and u.factor != 1]
    if not percent:
        return False
    worked = [times(Node("number", (u.factor, None)), x) if u else x for x, u in ((a, unit_a), (b, unit_b))]
    return same(worked[0], worked[1])


def _same_labelled(gold: Node, given: Node) -> bool:
    """An option with its letter equals the letter or the value alone; where both sides have a letter, letter and value
    must agree."""
    if gold.op == given.op:
        return gold.args[0] == given.args[0] and same(gold.args[1], given.args[1])
    labelled, other = (gold, given) if gold.op == "labelled" else (given, gold)
    letter, value = labelled.args
    if same(Node("words", (letter.casefold(),)), other):
        return True
    return same(value, other) if gold is labelled else same(other, value)


def _parts(node: Node) -> tuple[Node, Unit | None, str]:
    if node.op == "quantity":
        return node.args[0], node.args[1], ""
    if node.op == "counted":
        return node.args[0], None, node.args[1]
    return node, None, ""


def _same_words(gold: Node, given: Node) -> bool:
    """Words are compared letter by letter, ignoring case; a product of the same letters in another order differs."""
    if gold.op == given.op == "words":
        return _bare(gold.args[0]) == _bare(given.args[0])
    words, other = (gold, given) if gold.op == "words" else (given, gold)
    text = words.args[0]
    if other.op == "symbol":
        return other.args[0].casefold() == text
    if other.op == "product" and len(text) <= 4 and text.isalpha() and text.isascii():  # `ab` for `a \cdot b`
        letters = [Node("constant", (c,)) if c in "ei" else Node("symbol", (c,)) for c in text]
        return len(other.args) == len(letters) and same_scalar(Node("product", tuple(letters)), other)
    return False


def _bare(text: str) -> str:
    words = text.replace(".", " ").replace("-", " ").split()
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("the", "a", "an") else words)


def _same_ratio(gold: Node, given: Node) -> bool:
    """a:b equals the fraction a/b and any multiple of both; a time of day equals only itself."""
    if gold.op == given.op == "clock":
        return False  # equal ones were handled by `same`
    sides = [list(node.args) if node.op in ("ratio", "clock") else _fraction(node) for node in (gold, given)]
    a, b = sides
    if a is None or b is None or len(a) != len(b) or any(_zero(x) for x in (*a, *b)):
        return False
    if (gold.op == "clock" and given.op != "ratio") or (given.op == "clock" and gold.op != "ratio"):
        return False
    return all(same_scalar(times(x, b[0]), times(y, a[0])) for x, y in zip(a[1:], b[1:], strict=True))


def _fraction(node: Node) -> list[Node] | None:
    if node.op == "quotient":
        return list(node.args)
    return [node, integer(1)] if node.op in SCALAR else None


def _zero(node: Node) -> bool:
    try:
        return bool(evaluate(node, Point(1)) == 0)
    except FAILS:
        return True


def _same_matrix(gold: Node, given: Node) -> bool:
    if gold.op != given.op or len(gold.args) != len(given.args):
        return False
    rows = list(zip(gold.args, given.args, strict=True))
    return all(len(p) == len(q) and all(map(same, p, q)) for p, q in rows)


def _same_members(gold: Node, given: Node) -> bool:
    """Brackets must match in kind and order, sets and bare lists in any order; a bare list may stand for a tuple in the
    same order."""
    if gold.op == given.op == "bracket":
        return gold.args[:2] == given.args[:2] and _in_order(gold.args[2], given.args[2])
    if "bracket" in (gold.op, given.op):
        bracket, other = (gold, given) if gold.op == "bracket" else (given, gold)
        return other.op == "list" and bracket.args[:2] == ("(", ")") and _in_order(bracket.args[2], other.args[1])
    a, b = _members(gold), _members(given)
    return len(a) == len(b) and _in_any_order(a, b)


def _members(node: Node) -> list[Node]:
    if node.op == "list":
        return list(node.args[1])
    if node.op != "set":
        return [node]
    found: list[Node] = []
    for member in node.args:  # a set contains each member once
        if not any(same(other, member) for other in found):
            found.append(member)
    return found


def _in_order(a: Sequence[Node], b: Sequence[Node]) -> bool:
    return len(a) == len(b) and all(map(same, a, b))


def _in_any_order(a: Sequence[Node], b: Sequence[Node]) -> bool:
    left = list(b)
    for member in a:
        match = next((i for i, other in enumerate(left) if same(member, other)), None)
        if match is None:
            return False
        left.pop(match)
    return True


def _has_relations(*nodes: Node) -> bool:
    return any(node.op == "list" and any(item.op == "relation" for item in node.args[1]) for node in nodes)


def _same_relations(gold: Node, given: Node) -> bool:
    """`x = 5` is 5, `y = 2x` is `2y = 4x`, `m \\ge 2` is `m \\in [2, \\infty)` and `[2, \\infty)`."""
    roots, others = without_indices(gold), without_indices(given)
    if (roots is None) != (others is None):  # x_1 = 3, x_2 = -3 for x = 3 or x = -3
        gold, given = roots or gold, others or given
    for values, point in ((by_letter(gold), given), (by_letter(given), gold)):
        if values is not None and point.op == "bracket" and point.args[:2] == ("(", ")"):
            return _in_order(values, point.args[2])
    (name_a, a), (name_b, b) = _named(gold), _named(given)
    if name_a is not None and name_b is not None:
        if same(name_a, name_b) and same(a, b):
            return True
    elif name_a is not None or name_b is not None:
        whole, value = (given, a) if name_a is not None else (gold, b)
        known = name_a if name_a is not None else name_b
        assert known is not None
        if whole.op not in ("relation", "such") and not _has_relations(whole) and (name_a is None or _nameable(known)):
            return same(value, whole) if name_a is not None else same(whole, value)
    if gold.op == given.op == "relation" and _same_equation(gold, given):
        return True
    if gold.op == given.op == "list" and name_a is name_b is None:
        p, q = gold.args[1], given.args[1]
        if len(p) == len(q) and all(item.op == "relation" for item in (*p, *q)) and _in_any_order(p, q):
            return gold.args[0] == given.args[0] or not any(_ordering(item) for item in p)
    if gold.op == given.op == "such" and gold.args[0] == given.args[0] and same(gold.args[1], given.args[1]):
        return True
    return same_reals(gold, given)


def _ordering(node: Node) -> bool:
    return any(operator != "=" for operator in node.args[0])


def _named(node: Node) -> tuple[Node | None, Node]:
    r"""(name, value) of `x = 5`, `5 = x`, `x = 1 + 1 = 2`, `x \in S`, `n = 2, 3, 4`, `x = 1 or x = 2`; (None, node) for
    all others."""
    if node.op == "relation":
        operators, sides = node.args
        if operators == ("in",):
            return (sides[0], sides[1]) if sides[0].op == "symbol" else (None, node)
        if set(operators) != {"="}:
            return None, node
        if letterless(sides[0]) and sides[-1].op == "symbol" and len(sides) == 2:
            return sides[1], sides[0]
        if any(not same(side, sides[-1]) for side in sides[1:-1]) or (
            letterless(sides[0]) and not same(sides[0], sides[-1])
        ):
            return None, node
        return sides[0], sides[-1]
    if node.op == "list":
        how, items = node.args
        first, value = _named(items[0])
        if first is None or items[0].op != "relation":
            return None, node
        values = [value]
        for item in items[1:]:
            name, value = _named(item)
            if item.op == "relation" and name != first:
                return None, node
            values.append(value)
        if any(item.op == "relation" and item.args[0] == ("in",) for item in items):
            return None, node
        return first, Node("list", (how, tuple(values)))
    return None, node


def _nameable(node: Node) -> bool:
    """Whether a reference's left side only names the unknown: `x`, `f(x)`, `AB`, `a + b`; not `2x + z`."""
    if node.op in ("words", "symbol", "call"):
        return True
    inside = [n.op for n in walk(node)]
    return "symbol" in inside and "number" not in inside


def _same_equation(gold: Node, given: Node) -> bool:
    """Whether two relations are equivalent: sides exchanged, or both multiplied by the same number."""
    if len(gold.args[0]) != len(given.args[0]):
        return False
    (ops_a, a), (ops_b, b) = forwards(gold), forwards(given)
    if ops_a != ops_b:
        return False
    if len(ops_a) > 1 or ops_a[0] not in ("=", "!=", "<", "<="):
        return _in_order(a, b) or (set(ops_a) <= {"=", "equiv", "sim", "cong", "parallel", "perp"} and _in_order(a, b[::-1]))  # fmt: skip
    if _in_order(a, b) or (ops_a[0] in ("=", "!=") and _in_order(a, b[::-1])):
        return True
    if not all(side.op in SCALAR for side in (*a, *b)):
        return False
    p, q = (Node("sum", (x, Node("negative", (y,)))) for x, y in (a, b))
    if not any(n.op == "symbol" for n in walk(p)):
        return False
    return proportional(p, q, ordered=ops_a[0] in ("<", "<="))
