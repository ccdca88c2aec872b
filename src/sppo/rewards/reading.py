r"""The possible readings of an answer: words, an expression, or a value with a unit or a counted noun.

An answer that cannot be read whole is `Unreadable`; a number inside it is never taken instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise

from .latex import Reader
from .syntax import Node
from .tokens import TEXT, Unreadable, places, tidy, tokens
from .units import unit
from .vocabulary import FUNCTIONS, lettered

LONGEST = 2000
"""The most characters of an answer that is read."""
NOT_NOUNS = places(
    "dozen dozens hundred hundreds thousand thousands million millions billion billions trillion percent pair pairs or and to x "
    "half halves third thirds quarter quarters not no times plus minus over squared cubed less more than if for when where is are "
    "least most approximately about mod modulo choose factorial root cos sin tan log ln"
).keys()
"""Words that change the number before them, so none of them is a counted noun."""


def read(text: str) -> list[Node]:
    r"""The readings of an answer, the likeliest first: `3 m` is a product, and a length. Raises Unreadable where there
    is none.

    >>> [node.op for node in read(r"\frac{1}{2}")], [node.op for node in read("3 m")]
    (['quotient'], ['product', 'quantity'])
    """
    if len(text) > LONGEST:
        raise Unreadable(f"it is longer than {LONGEST} characters")
    text = tidy(text)
    if not text:
        raise Unreadable("it is empty")
    if labelled := _labelled(text):
        return labelled
    if (compound := _compound(text)) is not None:
        return [compound]
    if prose := date(text) or _prose(text):
        return [Node("reals") if prose in _ALL_REALS else Node("words", (prose,))]
    readings: list[Node] = []
    why = Unreadable("it is not understood")
    try:
        readings.append(Reader(tokens(text)).whole())
    except (Unreadable, IndexError) as error:
        why = error if isinstance(error, Unreadable) else Unreadable("it ends too soon")
    readings += [reading for reading in _quantities(text) if reading not in readings]
    if not readings:
        raise why
    return readings


_ALL_REALS = ("all real numbers", "all reals", "the real numbers", "real numbers")


def _labelled(text: str) -> list[Node]:
    r"""The readings of an option given with its letter, `\textbf{(C)}\ 15`: none for anything else."""
    name, opened, rest = text[:30].partition("{")
    if not opened or name.strip().removeprefix("\\") not in TEXT:
        return []
    label, closed, _ = rest.partition("}")
    letter, after = label.strip().removesuffix("~"), text[len(name) + len(label) + 2 :]
    for space in ("\\ ", "~", "\\,", "\\quad", "\\;"):
        after = after.strip().removeprefix(space)
    if not closed or not after.strip() or len(letter) != 3 or letter[0] != "(" or letter[2] != ")":
        return []
    if not ("A" <= letter[1] <= "Z"):
        return []
    return [Node("labelled", (letter[1], value)) for value in read(after)]


def _compound(text: str) -> Node | None:
    """A length of time, a height or a weight in two or three units: `3 hours 20 minutes`, `5 ft 6 in`; None for
    anything else."""
    if len(text) > 100:
        return None
    words = _unwrapped(text).replace("\\ ", " ").replace("\\,", " ").replace("~", " ").replace(",", " ").split()
    words = [word for word in words if word != "and"]
    if len(words) not in (4, 6) or not all(w.isdigit() and w.isascii() and len(w) < 20 for w in words[::2]):
        return None
    found = [unit(word) if word.isalpha() else None for word in words[1::2]]
    parts = [part for part in found if part is not None]
    if len(parts) != len(found) or not parts[0].powers or len({part.powers for part in parts}) != 1:
        return None
    if any(a.factor <= b.factor for a, b in pairwise(parts)):
        return None
    value = sum((int(n) * p.factor for n, p in zip(words[::2], parts, strict=True)), Fraction(0)) / parts[0].factor
    return Node("quantity", (Node("number", (value, None)), parts[0]))


_MONTHS = places("january february march april may june july august september october november december")


def date(text: str) -> str | None:
    """A date in one spelling: `2024-03-15`, `July 4, 1776`, `4th July 1776`; None for anything else.

    A date is neither a number nor a difference.
    """
    if len(text) > 60:
        return None
    parts = text.split("-")
    if [len(part) for part in parts] == [4, 2, 2] and all(part.isdigit() and part.isascii() for part in parts):
        return text if 1 <= int(parts[1]) <= 12 and 1 <= int(parts[2]) <= 31 else None
    words = _unwrapped(text).replace(",", " ").replace(".", " ").replace("\\ ", " ").casefold().split()
    if not 2 <= len(words) <= 3:
        return None
    month = next((m for w in words[:2] for m in _MONTHS if w == m or (len(w) == 3 and m.startswith(w))), None)
    others = [w for w in words if month is None or not (w == month or w == month[:3])]
    if month is None or len(others) != len(words) - 1:
        return None
    day = others[0][:-2] if others[0].endswith(("st", "nd", "rd", "th")) else others[0]
    if not (day.isdigit() and day.isascii() and 1 <= int(day) <= 31):
        return None
    if len(others) == 2 and not (len(others[1]) == 4 and others[1].isdigit() and others[1].isascii()):
        return None
    return " ".join([month, str(int(day)), *others[1:]])


def _prose(text: str) -> str | None:
    r"""An answer that is words and nothing else, in one spelling: `\text{East}` and `east` are `east`; None for
    mathematics."""
    plain = _unwrapped(text)
    letters = plain.replace("\\ ", " ").replace("~", " ").strip(" .'\"")
    if plain != text and len(letters) > 2 and letters[0] + letters[-1] in ("()", "[]"):  # \text{(C)}
        letters = letters[1:-1].strip()
    if not letters or not all(c.isalpha() or c in " '’.-?!\"" for c in letters):
        return None
    words = letters.replace("-", " ").split()
    if not all(any(c.isalpha() for c in word) for word in words):
        return None
    if letters.lower() == "infinity":
        return None
    known = {"pi", "infty", "infinity", "inf", "oo", *FUNCTIONS}
    if plain == text and (len(letters) == 1 or any(word in known for word in words)):
        return None
    if lettered(words) and len(words) > 1:
        return None
    if ("-" in letters or "!" in letters) and all(len(word) < 3 for word in words):
        return None  # `a-b`, `n!`
    if len(letters) == 1:
        return None if plain.strip() in ("e", "i") and "\\mathrm" in text else letters.casefold()
    return " ".join(letters.split()).casefold()


def _unwrapped(text: str) -> str:
    r"""A text in which `\text{…}` and similar commands are replaced by their content."""
    out, at, n = [], 0, len(text)
    closers: list[int] = []
    depth = 0
    while at < n:
        if text[at] == "\\":
            end = at + 1
            while end < n and text[end].isalpha():
                end += 1
            start = end
            while start < n and text[start] == " ":
                start += 1
            if text[at + 1 : end] in TEXT and text[start : start + 1] == "{":
                depth += 1
                closers.append(depth)
                at = start + 1
                continue
            end = max(end, at + 2)
            out.append(text[at:end])
            at = end
            continue
        if text[at] == "{":
            depth += 1
        elif text[at] == "}":
            if closers and closers[-1] == depth:
                closers.pop()
                depth -= 1
                at += 1
                continue
            depth -= 1
        out.append(text[at])
        at += 1
    return "".join(out)


def _quantities(text: str) -> Iterator[Node]:
    r"""The readings of an answer as a value and its unit, or what is counted: `12 km`, `2\sqrt{3}\text{ cm}^2`, `72
    clips`."""
    for at, loose in _seams(text):
        head, tail = text[:at].strip(), text[at:].strip()
        for space in ("\\,", "\\;", "\\ ", "\\:", "~"):
            head, tail = head.removesuffix(space).strip(), tail.removeprefix(space).strip()
        plain = (
            _unwrapped(tail.replace("\\mu ", "\\mu").replace("\\mu", "µ").replace("\\Omega", "ohm"))
            .replace("a.m.", "am")
            .replace("p.m.", "pm")
            .replace("\\ ", " ")
            .replace("~", " ")
            .strip(" .")
        )
        if not head or not plain or "=" in plain:
            continue
        found = unit(plain.replace("\\cdot", "·").replace("\\,", " "))
        words = plain.split()
        noun = all(w.isalpha() and w.isascii() and len(w) > 1 for w in words) and len(words) <= 6
        if found is None and not (
            noun
            and (max(map(len, words)) > 2 or words[0].lower() in ("am", "pm"))
            and not NOT_NOUNS & {w.lower() for w in words}
            and not loose
        ):
            continue
        if found is not None and loose and len(plain) == 1:
            continue
        try:
            value = Reader(tokens(tidy(head))).whole()
        except (Unreadable, IndexError):
            continue
        if value.op in ("words", "list", "relation", "counted", "quantity") or (
            value.op == "symbol" and found is not None
        ):
            if value.op == "relation" and value.args[0] == ("=",) and value.args[1][-1].op not in ("words", "symbol"):
                value = value.args[1][-1]
            else:
                continue
        if value.op in ("symbol", "words"):
            continue
        yield (
            Node("quantity", (value, found))
            if found is not None
            else Node("counted", (value, " ".join(words).casefold()))
        )
        return


def _seams(text: str) -> list[tuple[int, bool]]:
    r"""Where a value may end and its unit begin, outside braces: (position, whether nothing but a letter says so).

    The earliest first, at most eight.
    """
    found: list[tuple[int, bool]] = []
    depth, at, n = 0, 0, len(text)
    while at < n and len(found) < 8:
        c = text[at]
        depth += (c in "{([") - (c in "})]")
        step = 1
        if c == "\\":
            end = at + 1
            while end < n and text[end].isalpha():
                end += 1
            of_units = text[at + 1 : end] in ("frac", "dfrac", "tfrac") and text.startswith(
                ("{\\text", "{\\mathrm"), end
            )
            if (depth == 0 and at and (text[at + 1 : end] in TEXT or of_units)) or (
                depth == 0 and at and text[at + 1 : at + 2] in (",", ";", " ", ":")
            ):
                found.append((at, False))
            step = max(end - at, 2)
        elif depth == 0 and at and c in " ~":
            found.append((at, False))
        elif depth == 0 and at and c.isalpha() and (text[at - 1].isdigit() or text[at - 1] in "})"):
            exponent = c in "eE" and text[at + 1 : at + 2].lstrip("+-")[:1].isdigit() if at + 1 < n else False
            signed = c in "eE" and text[at + 1 : at + 2] in ("+", "-") and text[at + 2 : at + 3].isdigit()
            if not (exponent or signed):
                found.append((at, True))
        at += step
    return found
