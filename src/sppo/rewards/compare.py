"""When two answers are the same: numbers, quantities, sets, choices, text. Pure functions, exact arithmetic, no parser that can hang."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from .units import Unit, unit

_THOUSANDS = re.compile(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?")
_FRACTION = re.compile(
    r"([-+−]?)(\d{0,9})\s{0,2}\\[dt]?frac\s{0,2}(?:\{\s{0,2}(-?\d+)\s{0,2}\}\s{0,2}\{\s{0,2}(\d+)\s{0,2}\}|(\d)(\d))"
)
_PLAIN_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3})?(?:/\d+)?")
_MULTIPLIERS = re.compile(
    r"(?i)\b(?:dozens?|hundreds?|thousands?|millions?|billions?|percent|pairs?|or|and|to|x|half|halves|thirds?|quarters?)\b"
)
_UPRIGHT = re.compile(r"\\(?:text|textbf|mathrm|mathbf|operatorname)\s{0,2}\{([^{}]*)\}")
_COUNTED = re.compile(r"[A-Za-z]+(?:\s[A-Za-z]+){0,2}")
_QUANTITY = re.compile(
    r"([$€£]?)\s{0,2}([-+−]?[\d.,]+(?:[eE][-+]?\d{1,3}|\s?[x×*]\s?10\^\{?-?\d{1,3}\}?)?(?:/\d+)?)\s{0,2}(\D.*)?",
    re.DOTALL,
)
_LETTER = re.compile(r"[(\[]?([A-Za-z])(?:[)\].:,]+(?:\s.*)?)?", re.DOTALL)
_SEVERAL = re.compile(
    r"[(\[]?[A-Za-z][)\].:,;/]*(?:\s{0,2}(?:and|or|/|,|;)?\s{0,2}[(\[]?[A-Za-z](?![A-Za-z])[)\].:,;/]*)+"
)
_OPTION = re.compile(r"(?i:\b(?:option|choice|answer)\s{1,2})[(\[]?([A-Za-z])[)\].:]?(?=\s|$)")


@dataclass(frozen=True)
class Quantity:
    """A number and its unit (None: it has none)."""

    value: Fraction
    unit: Unit | None
    noun: str = ""
    """What is counted, where that is no unit: `12 apples`."""


def number(text: str) -> Fraction | None:
    """The number that a text *is* (commas, fractions, mixed numbers, exponents, a currency or percent sign, a closing period), or None."""
    if len(text) > 400:
        return None
    text = re.sub(
        r"^([-+−]?)\s{0,3}(\d{1,9})\s(\d{1,9})/(\d{1,9})$",
        r"\1\2\\frac{\3}{\4}",
        re.sub(r"^([-+−])\s{1,3}(?=[\d.])", r"\1", text.strip()),
    )
    cleaned = _plain_fractions(text.strip("$ ").rstrip(".")).removesuffix("%").replace("−", "-").strip()
    if _THOUSANDS.fullmatch(cleaned):  # other commas separate: `1,2` is a pair, not twelve
        cleaned = cleaned.replace(",", "")
    if not _PLAIN_NUMBER.fullmatch(cleaned):  # Fraction itself takes more: `1_0`, exponents that would fill the memory
        return None
    try:
        return Fraction(cleaned)
    except (ValueError, ZeroDivisionError):
        return None


def _plain_fractions(text: str) -> str:
    r"""`\frac{1}{2}` as `1/2`, `1\frac{1}{2}` as `3/2`, `\frac12` as `1/2`."""

    def plainly(found: re.Match[str]) -> str:
        sign, whole, *parts = found.groups()
        above, below = (int(p) for p in parts if p is not None)
        return f"{sign}{int(whole or 0) * below + above}/{below}"

    return _FRACTION.sub(plainly, text)


def quantity(text: str) -> Quantity | None:
    r"""The number with its unit that a text is: `12.5 km`, `$3`, `40\%`, `3 × 10^8 m/s`, `x = 12`, `12 apples` (no unit); None for anything else."""
    if len(text) > 400:
        return None
    text = text.strip().removesuffix(".").rstrip(",;")
    text = text.strip("$ ") if text.count("$") > 1 else text
    text = re.sub(r"^\\\(|\\\)$|^\\\[|\\\]$", "", text)
    text = re.sub(r"^[A-Za-z]\s{0,2}=\s{0,2}", "", text).strip()
    if _enclosed(text) and text[0] == "(":
        text = text[1:-1].strip()
    text = _plain_fractions(text)
    text = text.replace("\\%", "%").replace("\\$", "$").replace("\\,", " ").replace("~", " ")
    match = _QUANTITY.fullmatch(text)
    if match is None:
        return None
    sign, digits, rest = match.groups()
    value = number(re.sub(r"\s?[x×*]\s?10\^\{?(-?\d+)\}?", r"e\1", digits))
    if value is None:
        return None
    if sign:
        return (
            None
            if rest and rest.strip()
            else Quantity(value, Unit(Fraction(1), ((f"currency {sign}".removesuffix(" $"), 1),)))
        )
    if not rest or not rest.strip():
        return Quantity(value, None)
    found = unit(rest)
    if found is not None:
        return Quantity(value, found)
    counted = _COUNTED.fullmatch(rest.strip()) and not _MULTIPLIERS.search(rest)
    return Quantity(value, None, plain(rest)) if counted else None


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
    if _SEVERAL.fullmatch(text[:400]):
        return None
    match = _LETTER.fullmatch(text)
    found = [match[1]] if match else _OPTION.findall(text[:400])
    if not found:
        return None
    letter = found[-1].upper()
    return None if options and ord(letter) - ord("A") >= len(options) else letter
