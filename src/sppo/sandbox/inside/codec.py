"""Plain values as type-tagged JSON. What a program returns is data when it leaves the jail: never an object, never a
pickle.

An integer subclass becomes an integer, an object with an `__eq__` of its own becomes opaque, and an opaque value equals
nothing. Integers travel as hexadecimal (no 4,300-digit limit), floats as `repr` (bit for bit, NaN and infinities too).
"""

import collections
import datetime
import decimal
import fractions
import itertools

DEPTH = 100
LINE = 1 << 24  # bytes of one message between two jails
ITEMS = 100_000
ITERATORS = (map, filter, zip, enumerate, reversed, type(iter([])), type(iter(())), type(iter("")), type(i for i in ()))

MOMENTS = (datetime.datetime, datetime.date, datetime.time)

PREDICATES = {
    name for kind in (str, bytes, set, float) for name in dir(kind)
    if name.startswith("is") or name in ("startswith", "endswith")
} | {"equals", "all", "any", "allclose"}  # fmt: skip
"""Methods of values whose answer is a verdict.

They are not asked of an object that a function of the program's returned.
"""


class Opaque(Exception):
    """A value that has no plain form."""


class Handle:
    """A number that stands for an object kept on the other side (`asserts` mode)."""

    def __init__(self, number):
        self.number = number


def encode(value, depth=0, keep=None):
    """A JSON tree.

    Subclasses of builtins lose everything but their plain value. `keep` makes the tree of a value without one.
    """
    if depth > DEPTH:
        raise Opaque("nested deeper than %d" % DEPTH)
    deeper = (depth + 1, keep)
    if value is None or value is True or value is False:
        return value
    if isinstance(value, int):
        return ["i", "%x" % int.__index__(value)]
    if isinstance(value, float):
        return ["f", float.__repr__(value)]
    if isinstance(value, str):
        return ["s", str.__str__(value)]
    if isinstance(value, list):
        return ["l", [encode(x, *deeper) for x in list.__iter__(value)]]
    if isinstance(value, tuple):
        return ["t", [encode(x, *deeper) for x in tuple.__iter__(value)]]
    if isinstance(value, dict):
        return ["d", [[encode(k, *deeper), encode(v, *deeper)] for k, v in dict.items(value)]]
    if isinstance(value, frozenset):
        return ["F", [encode(x, *deeper) for x in frozenset.__iter__(value)]]
    if isinstance(value, set):
        return ["S", [encode(x, *deeper) for x in set.__iter__(value)]]
    if isinstance(value, (bytes, bytearray)):
        return ["b" if isinstance(value, bytes) else "B", bytes(value).hex()]
    if isinstance(value, complex):
        return ["c", float.__repr__(value.real), float.__repr__(value.imag)]
    kind = type(value)
    if kind is range:
        return ["r", "%x" % value.start, "%x" % value.stop, "%x" % value.step]
    if kind is collections.deque:
        return ["q", [encode(x, *deeper) for x in value]]
    if kind is decimal.Decimal:
        return ["D", str(value)]
    if kind is fractions.Fraction:
        return ["Q", "%x" % value.numerator, "%x" % value.denominator]
    if kind in MOMENTS and getattr(value, "tzinfo", None) is None:
        return ["T", kind.__name__, value.isoformat()]
    if kind is datetime.timedelta:
        return ["P", value.days, value.seconds, value.microseconds]
    if kind is Handle:
        return ["h", value.number]
    if kind in ITERATORS:
        items = list(itertools.islice(value, ITEMS + 1))
        if len(items) <= ITEMS:
            return ["g", [encode(x, *deeper) for x in items]]
    return ["?", kind.__name__] if keep is None else keep(value)


WRITTEN = {
    "i": lambda tree: int(tree[1], 16),
    "f": lambda tree: float(tree[1]),
    "s": lambda tree: str(tree[1]),
    "b": lambda tree: bytes.fromhex(tree[1]),
    "B": lambda tree: bytearray.fromhex(tree[1]),
    "c": lambda tree: complex(float(tree[1]), float(tree[2])),
    "r": lambda tree: range(int(tree[1], 16), int(tree[2], 16), int(tree[3], 16)),
    "D": lambda tree: decimal.Decimal(tree[1]),
    "Q": lambda tree: fractions.Fraction(int(tree[1], 16), int(tree[2], 16)),
    "T": lambda tree: {k.__name__: k for k in MOMENTS}[tree[1]].fromisoformat(tree[2]),
    "P": lambda tree: datetime.timedelta(tree[1], tree[2], tree[3]),
}
"""What values without parts are made from, by tag."""
HOLDING = {"l": list, "t": tuple, "S": set, "F": frozenset, "q": collections.deque, "g": iter}
"""What holds its parts, by tag."""


def decode(tree, depth=0, handle=None, graph=None):
    """The value of a tree; raises Opaque for anything that is not the plain form of a value.

    `handle` makes the local stand-in of a kept object out of its number, `graph` the nodes of a linked structure
    (nodes.py).
    """
    if depth > DEPTH:
        raise Opaque("nested deeper than %d" % DEPTH)
    if tree is None or tree is True or tree is False:
        return tree
    if not isinstance(tree, list) or not tree:
        raise Opaque("not a tagged value")

    def part(x):
        return decode(x, depth + 1, handle, graph)

    try:
        tag = tree[0]
        if tag in WRITTEN:
            return WRITTEN[tag](tree)
        if tag in HOLDING:
            return HOLDING[tag]([part(x) for x in tree[1]])
        if tag == "d":
            return {part(k): part(v) for k, v in tree[1]}
        if tag == "h" and handle is not None and type(tree[1]) is int:
            return handle(tree[1])
        if tag == "N" and graph is not None:
            return graph(tree[1], part)
    except Opaque:
        raise
    except Exception as error:
        raise Opaque("malformed value: %s" % type(error).__name__) from None
    raise Opaque("a value of type %s has no plain form" % (tree[1] if len(tree) > 1 else "?"))


def failure(error):
    """An exception as data: its name, its text, and the builtin exception that it comes from."""
    return ["exception", type(error).__name__, str(error)[:200], builtin_base(type(error))]


def builtin_base(kind):
    """The name of the builtin exception that a class is, or comes from."""
    return next(k.__name__ for k in kind.__mro__ if k.__module__ == "builtins")
