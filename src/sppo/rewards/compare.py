"""When two answers are the same: numbers, quantities, sets, choices, text. Pure functions, exact arithmetic, no parser that can hang."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from .reading import read
from .syntax import Node, literal
from .tokens import Unreadable
from .units import Unit

_THOUSANDS = re.compile(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?")
_UPRIGHT = re.compile(r"\\(?:text|textbf|mathrm|mathbf|operatorname)\s{0,2}\{([^{}]*)\}")
_LETTER = re.compile(r"[(\[]?([A-Za-z])(?:[)\].:,]+(?:\s.*)?)?", re.DOTALL)
_OPTION = re.compile(
    r"\b(?i:option|choice|answer|choose|chose|pick|select)\s(?:\s|(?i:is|option)\s)?(?:[(\[]([A-Za-z])[)\]]|([A-Z])\b|(?<=[nN]\s)([a-z]))[)\].:,]?(?=\s|$)"
)
_REASON = re.compile(r",?\s(?:because|since|as|due)\b")
DENIED_AFTER = (
    "is wrong", "is incorrect", "is not", "isn't", "isn’t", "is false", "was wrong", "are wrong", "cannot be", "can't be", "is impossible",
    "不对", "是错", "不正确", "不是答案",
)  # fmt: skip
"""What follows a value that is taken back."""
_DENIED = ("not", "never", "cannot", "nor", "neither", "wrong", "incorrect")
_ANOTHER = re.compile(r"[\s,]{0,2}(?:(?i:or|and)\s|[/,&]\s?)(?i:option\s)?[(\[]?[A-Z](?![A-Za-z])")
_LONGEST_VALUE, _LONGEST_CHOICE = 400, 400


@dataclass(frozen=True)
class Quantity:
    """A number and its unit (None: it has none)."""

    value: Fraction
    unit: Unit | None
    noun: str = ""
    """What is counted, where that is no unit: `12 apples`."""


def number(text: str) -> Fraction | None:
    """The number that a text *is* (separators, fractions, mixed numbers, exponents, a currency or percent sign), or None."""
    found = quantity(text)
    if (
        found is None
        or found.noun
        or (found.unit is not None and any("currency" not in base for base, _ in found.unit.powers))
    ):
        return None
    return found.value


def quantity(text: str) -> Quantity | None:
    r"""The number with its unit that a text is: `12.5 km`, `$3`, `40\%`, `3 × 10^8 m/s`, `x = 12`, `12 apples` (no unit); None for anything else."""
    if len(text) > _LONGEST_VALUE:
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
    """Within `tolerance` of the reference b, relative to it (absolute where it is 0)."""
    return abs(a - b) <= Fraction(tolerance) * (abs(b) if b else 1)


def same_quantity(given: Quantity, gold: Quantity, tolerance: float, units: str) -> bool:
    """Equal in base units.

    `units`: `optional` (where one side has none, it is the other's; `0.5` is `50%` too), `required` (as the reference has
    it), or `ignore`.
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


def plain(text: str) -> str:
    """Text less case, spaces and quotes at the ends, closing periods, and LaTeX that only sets it upright."""
    text = _UPRIGHT.sub(r"\1", text).replace("\\ ", " ").replace("\\left", "").replace("\\right", "")
    return " ".join(text.split()).strip(" .").strip("\"'$").casefold()


def members(text: str) -> list[str]:
    r"""The members of a set or list written as text: `{1, 2}`, `1; 2`, `(a, b)`, `\{1, 2\}`, `1, 2 and 3`."""
    text = (
        text.strip()
        .strip("$")
        .replace("\\left", "")
        .replace("\\right", "")
        .replace("\\{", "{")
        .replace("\\}", "}")
        .strip()
    )
    if upright := _UPRIGHT.fullmatch(text):
        text = upright[1].strip()
    if _enclosed(text):
        text = text[1:-1]
    if _THOUSANDS.fullmatch(text.strip()):
        return [text.strip()]
    parts, depth, start = [], 0, 0
    text = re.sub(r",?\s(?:and|or)\s", ", ", text)
    separator = ";" if ";" in text else ","
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if c == separator and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [p.strip() for p in (*parts, text[start:]) if p.strip()]


def _enclosed(text: str) -> bool:
    """Whether the bracket that a text begins with is closed by its last character: `(1, 2)`, not `(1, 2), (3, 4)`."""
    if (text[:1], text[-1:]) not in (("{", "}"), ("(", ")"), ("[", "]")):
        return False
    depth = 0
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if depth == 0:
            return i == len(text) - 1
    return False


def choice(text: str, options: Sequence[str] | None) -> str | None:
    """The letter of the option that an answer chooses: `B`, `(B) Paris`, `Option B`, or the option's own text; None if it chooses none."""
    text = _UPRIGHT.sub(r"\1", text).replace("\\ ", " ").strip().strip("*$` ")
    text = re.sub(r"^([A-Za-z])\s[-–—]\s", r"\1. ", text)
    if options:
        for i, option in enumerate(options):
            if plain(str(option)) == plain(text):
                return chr(ord("A") + i)
    if _several(text[:_LONGEST_CHOICE]):
        return None
    reason = _REASON.search(text[:_LONGEST_CHOICE])
    match = _LETTER.fullmatch(text[: reason.start()] if reason else text)
    found = [match[1]] if match else _named_options(text[-_LONGEST_CHOICE:])
    if not found:
        return None
    letter = found[-1].upper()
    return None if options and ord(letter) - ord("A") >= len(options) else letter


def _named_options(text: str) -> list[str]:
    """The letters that a sentence chooses, `the correct option is B`; less those it denies; none where it leaves it open (`option B or C`)."""
    found: list[str] = []
    for match in _OPTION.finditer(text):
        before = text[max(0, match.start() - 30) : match.start()].lower().split()[-3:]
        if _ANOTHER.match(text, match.end()):
            return []
        if any(w in _DENIED or w.endswith(("n't", "n’t")) for w in before):
            continue
        if text[match.end() : match.end() + 30].lstrip().casefold().startswith(DENIED_AFTER):
            continue
        found.append(next(group for group in match.groups() if group))
    return found


_PUNCTUATION = str.maketrans(dict.fromkeys("()[].:,;/", " "))


def _several(text: str) -> bool:
    """Whether a text is several letters and nothing else: `B, C, D`, `(B) or (C)`. None of them is the choice."""
    words = text.translate(_PUNCTUATION).split()
    letters = [word for word in words if word.lower() not in ("and", "or")]
    return len(letters) > 1 and all(len(word) == 1 and word.isascii() and word.isalpha() for word in letters)
