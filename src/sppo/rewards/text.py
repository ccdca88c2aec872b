"""Answers as text: their normal form, the members of a list, and phrases that retract a value."""

from __future__ import annotations

import re

_THOUSANDS = re.compile(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?")
UPRIGHT = re.compile(r"\\(?:text|textbf|mathrm|mathbf|operatorname)\s{0,2}\{([^{}]*)\}")
DENIED_AFTER = (
    "is wrong", "is incorrect", "is not", "isn't", "isn’t", "is false", "was wrong", "are wrong", "cannot be", "can't be", "is impossible",
    "不对", "是错", "不正确", "不是答案",
)  # fmt: skip
"""Phrases after a value that retract it."""


def plain(text: str) -> str:
    """Text in lower case, without surrounding spaces, quotes and periods, and without LaTeX for upright type."""
    text = UPRIGHT.sub(r"\1", text).replace("\\ ", " ").replace("\\left", "").replace("\\right", "")
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
    if upright := UPRIGHT.fullmatch(text):
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
