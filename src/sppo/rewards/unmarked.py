r"""The last value of a response without a marked answer: its last formula or number that is not retracted.

Linear in the text.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .quantity import quantity
from .reading import date, read
from .text import DENIED_AFTER
from .tokens import Unreadable, places
from .units import unit
from .vocabulary import FUNCTIONS

_DELIMITERS = {"$$": "$$", "\\(": "\\)", "\\[": "\\]"}
_NUMBER = re.compile(r"[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:/\d+)?(?:[eE][-+]?\d+)?")
_COORDINATES = frozenset("0123456789.,;/+-− ")
_DENIALS = {"not", "never", "nor", "neither", "cannot", "≠", "\\ne", "\\neq"}
_BETWEEN = places(
    "be equal to think believe that it it's it’s is the answer as option choice true correct right possible"
).keys()
"""Words that may stand between a denial and what it denies: `I don't think that it's 17`."""
_DENIED_BEFORE = ("rather than", "instead of", "anything but", "other than")
_DENIED_IN_CHINESE = ("不是", "并非", "不等于", "不为", "而非")


@dataclass(frozen=True)
class _Candidate:
    start: int
    end: int
    text: str
    formula: bool


def last_value(text: str, mathematics: bool) -> str | None:
    """The last value of a text without marks: the whole of a short one, else its last formula or number that is not
    retracted."""
    whole = text.strip()
    short = 0 < len(whole) <= 200 and "\n" not in whole and not any(mark in whole for mark in ("$", *_DELIMITERS))
    if mathematics and date(whole):
        return whole
    short = short and not _begins_as_prose(whole)
    if short and (is_value(whole) if mathematics else quantity(whole) is not None):
        return whole
    formulas = list(_formulas(text))
    inside = _covers(formulas)
    numbers = (_Candidate(*n, formula=False) for n in _numbers(text) if not inside(n[0]))
    for found in _from_the_right(formulas, numbers):
        if found.formula and _denied(text, found.start, found.end):
            continue
        if not found.formula or mathematics:
            return found.text
        if (value := _value_of_formula(found.text)) is not None:
            return value
    return None


def last_number(text: str) -> str | None:
    """The last number in a text that is not retracted, or None. `5x`, `x^2`, `2+1`, `H2` and `3rd` are no numbers."""
    return next((number for _, _, number in _numbers(text)), None)


def is_value(text: str) -> bool:
    """Whether a text is a value, and not prose."""
    if quantity(text) is not None:
        return True
    try:
        return any(node.op != "words" for node in read(text)) and not text.isalpha()
    except Unreadable:
        return False


def denied_before(text: str, start: int) -> bool:
    before = text[max(0, start - 60) : start].casefold().rstrip(" *_$\\([").replace("\n", " ")
    words = before.split()
    if " ".join(words[-2:]) in _DENIED_BEFORE or before.endswith(_DENIED_IN_CHINESE):
        return True
    while words and words[-1] in _BETWEEN:
        words.pop()
    return bool(words) and (words[-1] in _DENIALS or words[-1].endswith(("n't", "n’t")))


def _begins_as_prose(text: str) -> bool:
    """Whether a text with a number or an equation begins like a sentence: `Therefore, x = 3`, `she has 5 left`."""
    if not any(c.isdigit() or c == "=" for c in text):
        return False
    label, colon, value = text.partition(":")
    if colon and value[:1].isdigit() and len(label) > 2 and label.isalpha():
        return True  # Result:5
    first, _, rest = text.partition(" ")
    word = first.rstrip(",:").replace("'", "").replace("’", "")
    return len(word) > 1 and word.isalpha() and word.lower() not in FUNCTIONS and rest[:1].isalnum()


def _value_of_formula(formula: str) -> str | None:
    """The value of a formula, for comparisons that evaluate nothing: itself, its right side, or the last number of
    plain sums."""
    if formula.count("=") > 1 and "," in formula:
        return formula.strip()  # `x = 5, y = 7`: neither is the answer
    for part in (formula, formula.rpartition("=")[2]):
        if quantity(part) is not None:
            return part.strip()
    return formula.strip() if any(c in formula for c in "\\^_") else last_number(formula)


def _from_the_right(formulas: list[_Candidate], numbers: Iterator[_Candidate]) -> Iterator[_Candidate]:
    left, number = list(formulas), next(numbers, None)
    while left or number:
        if number is None or (left and left[-1].end > number.end):
            yield left.pop()
        else:
            yield number
            number = next(numbers, None)


def _covers(formulas: list[_Candidate]) -> Callable[[int], bool]:
    starts = [f.start for f in formulas]

    def inside(at: int) -> bool:
        i = bisect_left(starts, at + 1) - 1
        return i >= 0 and at < formulas[i].end

    return inside


def _formulas(text: str) -> Iterator[_Candidate]:
    r"""`$…$`, `$$…$$`, `\(…\)` and `\[…\]` in order. A dollar before a digit that no formula closes is a price."""
    marks = [i for i, c in enumerate(text) if c in "$\\"]
    closings = [
        i
        for i in marks
        if text[i] == "$"
        and i
        and not text[i - 1].isspace()
        and text[i - 1] != "\\"
        and not text[i + 1 : i + 2].isdigit()
    ]
    breaks = [i for i, c in enumerate(text) if c == "\n"]
    at = 0
    unclosed: set[str] = set()
    for mark in marks:
        if mark < at:
            continue
        opening = text[mark : mark + 2]
        if opening in _DELIMITERS:
            closing, width = _DELIMITERS[opening], 2
            end = text.find(closing, mark + 2) if closing not in unclosed else -1
            if end < 0:
                unclosed.add(closing)
        elif opening.startswith("$") and not opening[1:].isspace():
            closing_at, line_end = bisect_left(closings, mark + 2), bisect_left(breaks, mark)
            end, width = closings[closing_at] if closing_at < len(closings) else -1, 1
            if line_end < len(breaks) and end > breaks[line_end]:
                end = -1
        else:
            end, width = -1, 2 if text[mark] == "\\" else 1
        at = (end if end >= 0 else mark) + width
        if end >= 0:
            yield _Candidate(mark, at, text[mark + width : end], formula=True)


def _numbers(text: str) -> Iterator[tuple[int, int, str]]:
    """(start, end, number) from the last to the first, without those that belong to a name, an exponent or a denial."""
    found = [m for m in _NUMBER.finditer(text) if any(c.isdigit() for c in m.group())]
    for i in range(len(found) - 1, -1, -1):
        start, end = found[i].span()
        number = found[i].group()
        before, behind = text[start - 1 : start], text[end : end + 1]
        signed = number[0] in "+-−"
        if before == ":" and text[start - 2 : start - 1].isdigit():
            while text[start - 1 : start] == ":" or text[start - 1 : start].isdigit():
                start -= 1  # 12:00, 1:2:3
            before, number = text[start - 1 : start], text[start:end]
        if before == "±":
            start -= 1
            before, number = text[start - 1 : start], text[start:end]
        percent = "%" if behind == "%" else "\\%" if text.startswith("\\%", end) else ""
        if percent:
            end += len(percent)
            number, behind = number + percent, text[end : end + 1]
        if behind == ":" and text[end + 1 : end + 2].isdigit():
            continue
        if behind in (")", "]") and (opening := _opens_coordinates(text, start)) is not None:
            yield opening, end + 1, text[opening : end + 1]
            continue
        bold = text[max(0, start - 2) : start]
        if bold in ("**", "__") and not text[max(0, start - 3) : max(0, start - 2)].isalnum():
            before = ""
        if text[end : end + 2] in ("**", "__") and not text[end + 2 : end + 3].isalnum():
            behind = ""
        if (
            before in ("^", "_", "{", "\\", "/", "*")
            or _cased(before)
            or (signed and (before.isdigit() or before in (")", "}")))
        ):
            continue  # part of an expression or a name
        if behind in ("^", "_", "{", "!", "+", "*", "/") or (
            behind in ("-", "−", "–") and text[end + 1 : end + 2].isalnum()
        ):
            continue
        tail = text[end : end + 12]
        letters = tail[: next((j for j, c in enumerate(tail) if not c.isalpha()), len(tail))]
        if _cased(letters[:1]) and (len(letters) == 1 or unit(letters) is None):
            continue
        if _denied(text, start, end):
            continue
        whole = found[i - 1] if i and "/" in number else None
        if whole is not None and text[whole.end() : start] == " " and whole.group().lstrip("+-−").isdigit():
            start, number = whole.start(), text[whole.start() : end]  # 1 1/4
        yield start, end, number


def _cased(letter: str) -> bool:
    """Whether a character is a letter that makes a name with a number beside it; not one of a script without spaces:
    `答案是5`."""
    return letter.isalpha() and letter.lower() != letter.upper()


def _opens_coordinates(text: str, start: int) -> int | None:
    """Where the bracket opens whose last member is the number at `start`: `(3, -2)`; None where that's no list of
    numbers."""
    at, comma = start - 1, False
    while at >= max(0, start - 100) and text[at] in _COORDINATES:
        comma = comma or text[at] in ",;"
        at -= 1
    return at if at >= 0 and comma and text[at] in "([" and not text[at - 1 : at].isalnum() else None


def _denied(text: str, start: int, end: int) -> bool:
    """Whether a text says that a value is not the answer: `not 17`, `17 is wrong`."""
    after = text[end : end + 30].casefold().lstrip(" *_$\\)]").replace("\n", " ")
    return denied_before(text, start) or after.startswith(DENIED_AFTER)
