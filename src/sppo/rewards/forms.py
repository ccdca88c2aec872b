r"""Several ways of writing one answer, rewritten as one: `1 \pm \sqrt{2}`, `x_1 = 3, x_2 = -3`, `y = -2, x = 3`, `3 >
x`."""

from __future__ import annotations

from .evaluate import walk
from .scalars import SCALAR
from .syntax import Node


def spread(node: Node) -> Node:
    """Expand ±: `1 \\pm \\sqrt{2}` is a list of two; in a list or set it is two members."""
    if node.op in ("list", "set"):
        items = node.args[1] if node.op == "list" else node.args
        spread = [member for item in items for member in _signs(item)]
        if len(spread) == len(items):
            return node
        return Node("list", (node.args[0], tuple(spread))) if node.op == "list" else Node("set", tuple(spread))
    found = _signs(node) if node.op in SCALAR | {"plusminus", "quantity"} else [node]
    return node if len(found) == 1 else Node("list", (",", tuple(found)))


def _signs(node: Node) -> list[Node]:
    if not any(n.op == "plusminus" for n in walk(node)):
        return [node]
    return [_signed(node, plus=True), _signed(node, plus=False)]


def _signed(node: Node, plus: bool) -> Node:
    if node.op == "plusminus":
        sign, left, right = node.args
        right = _signed(right, plus)
        if (sign == "pm") != plus:
            right = Node("negative", (right,))
        return right if left is None else Node("sum", (_signed(left, plus), right))
    return Node(node.op, tuple(_signed(arg, plus) if isinstance(arg, Node) else arg for arg in node.args))


def equations(node: Node) -> list[tuple[str, Node]] | None:
    """The names and values of a list of `letter = value`, two or more of them; None for anything else."""
    if node.op != "list" or node.args[0] == "or":
        return None
    items = node.args[1]
    if not all(i.op == "relation" and i.args[0] == ("=",) and i.args[1][0].op == "symbol" for i in items):
        return None
    return [(item.args[1][0].args[0], item.args[1][1]) for item in items]


def without_indices(node: Node) -> Node | None:
    """`x_1 = 3, x_2 = -3` as `x = 3, x = -3`: numbered roots; None for anything else."""
    found = equations(node if node.op != "list" else Node("list", (",", node.args[1])))
    if found is None or [name[1:] for name, _ in found] != [f"_{i}" for i in range(1, len(found) + 1)]:
        return None
    if len({name[0] for name, _ in found}) != 1:
        return None
    letter = Node("symbol", (found[0][0][0],))
    return Node("list", (node.args[0], tuple(Node("relation", (("=",), (letter, value))) for _, value in found)))


def by_letter(node: Node) -> list[Node] | None:
    """The values of `y = -2, x = 3` in the order of their letters, where these follow each other: a point's
    coordinates."""
    found = sorted(equations(node) or (), key=lambda pair: pair[0])
    names = "".join(name for name, _ in found)
    follow = len(names) == len(found) > 1 and names in "abcdefghijklmnopqrstuvwxyz"
    return [value for _, value in found] if follow else None


_FLIPPED = {">": "<", ">=": "<="}


def forwards(node: Node) -> tuple[tuple[str, ...], tuple[Node, ...]]:
    operators, sides = node.args
    if all(op in _FLIPPED for op in operators):
        return tuple(_FLIPPED[op] for op in reversed(operators)), tuple(reversed(sides))
    return operators, sides


def letterless(node: Node) -> bool:
    return node.op in SCALAR | {"plusminus", "set", "list", "bracket"} and not any(n.op in ("symbol", "big", "dots") for n in walk(node))  # fmt: skip
