"""Programs that no sound row pays. A row is refused that one of them passes, because then nothing could fail it.

    returns nothing       every function returns None
    raises                every function raises
    agrees                every function returns an object whose every method and comparison says yes
    a number, text, list  every function returns the same odd one, whatever it is given
    other answers         the row's own reference solution, each of its answers changed

A row whose reference solution fails is refused too: the two jails cannot exchange what its tests ask for.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..sandbox.names import free_names, parsed
from ..sandbox.verdict import TestCode

NOTHING, RAISES, AGREES, TRUE, REFERENCE, OTHER = (
    "returns nothing",
    "raises",
    "agrees",
    "true",
    "reference",
    "other answers",
)

FUNCTION = "def {name}(*args, **kwargs):\n    {body}\n"
CLASS = "class {name}:\n    def __init__(self, *args, **kwargs): {made}\n    def __getattr__(self, name): return lambda *args, **kwargs: None\n"
ODD = "class Odd(Exception): pass\n"
YES = """class Yes:
    def __call__(self, *args, **kwargs): return Yes()
    def __getattr__(self, name): return Yes()
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    __lt__ = __le__ = __gt__ = __ge__ = __contains__ = lambda self, other: True
    def __hash__(self): return 0
    def __len__(self): return 1
    def __iter__(self): return iter([Yes()])
    def __getitem__(self, key): return Yes()
    def __bool__(self): return True
    def __enter__(self): return self
    def __exit__(self, *exc_info): return True
    def __str__(self): return ""
    __repr__ = __str__
"""
ODD_ANSWERS = {"number": "-1000003", "text": "'~sppo~'", "list": "['~sppo~']"}
"""Answers that nobody asks for, by what they are."""
CHANGED = """

class __SppoChanged:
    depth = 0

    @staticmethod
    def other(value):
        if value is None:
            raise RuntimeError("nothing is returned that could be changed")
        if isinstance(value, bool):
            return not value
        if isinstance(value, (int, complex)):
            return value + 1
        if isinstance(value, float):
            return value * 1.5 + 1 if value - value == 0 else -1.0
        if isinstance(value, str):
            return value + "x"
        if isinstance(value, list):
            return value + [None]
        if isinstance(value, tuple):
            return tuple(value) + (None,)
        if isinstance(value, (set, frozenset)):
            return set(value) | {"x"}
        if isinstance(value, dict):
            return {**value, "x": None}
        return None

    @classmethod
    def wrapped(cls, function):
        def changed(*args, **kwargs):
            cls.depth += 1
            try:
                value = function(*args, **kwargs)
            finally:
                cls.depth -= 1
            return value if cls.depth else cls.other(value)
        return changed

    @classmethod
    def everything(cls, names, world):
        for name in names:
            found = world.get(name)
            if isinstance(found, type) and not issubclass(found, BaseException):
                for key, value in list(vars(found).items()):
                    if not key.startswith("__") and hasattr(value, "__code__"):
                        setattr(found, key, cls.wrapped(value))
            elif callable(found) and not isinstance(found, type):
                world[name] = cls.wrapped(found)
            elif not isinstance(found, type):
                world[name] = cls.other(found)
"""


def probes(code: TestCode, reference: str | None) -> dict[str, str]:
    """The programs to run against a row's test code, by what they do."""
    names = sorted(code.names if code.names is not None else free_names(code.tests, code.setup)[0])

    def program(body: str, made: str) -> str:
        return "".join(
            CLASS.format(name=n, made=made) if n[:1].isupper() else FUNCTION.format(name=n, body=body) for n in names
        )

    found = {
        NOTHING: program("return None", "pass"),
        RAISES: ODD + program("raise Odd", "raise Odd"),
        AGREES: YES + "".join(f"{n} = Yes()\n" for n in names),
    }
    if names and not any(n[:1].isupper() for n in names):  # a class is judged by its methods
        found |= {what: program(f"return {answer}", "pass") for what, answer in ODD_ANSWERS.items()}
    if reference is not None and parsed(reference) is not None:
        found[REFERENCE] = reference
        found[OTHER] = f"{reference}{CHANGED}\n__SppoChanged.everything({names!r}, globals())\n"
    return found


def problem(tests: Sequence[str], held: dict[str, tuple[bool, ...]], decided: dict[str, bool]) -> str | None:
    """Why a row cannot be judged, from what each probe passed; or None.

    `decided`: whether a probe ran within its limits.
    """
    for i, test in enumerate(tests):
        if held[NOTHING][i] and held[RAISES][i] and held[AGREES][i]:
            return f"test {i} checks nothing: it holds for programs that return None, that raise and that agree to everything: {test[:60]!r}"
    for name, what in ((NOTHING, "returns None"), (RAISES, "raises an error")):
        if all(held[name]):
            return f"no program can fail it: one that only {what} passes"
    if all(held[AGREES]):
        return "a program can bring its own judge: an object that says yes to everything passes"
    for what, answer in ODD_ANSWERS.items():
        if all(held.get(what, (False,))):
            return f"no {what} can fail it: a program passes that returns {answer} each time"
    if REFERENCE in held:
        if not all(held[REFERENCE]):
            first = held[REFERENCE].index(False)
            return (
                f"the row's own reference solution fails test {first}: {tests[first][:60]!r}"
                if decided[REFERENCE]
                else None
            )
        if all(held[OTHER]):
            return "no program can fail it: its reference solution passes with each of its answers changed"
    return None
