"""The option that an answer chooses: `B`, `(B) Paris`, `Option B`, or the text of an option."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .text import DENIED_AFTER, UPRIGHT, plain

_LETTER = re.compile(r"[(\[]?([A-Za-z])(?:[)\].:,]+(?:\s.*)?)?", re.DOTALL)
_OPTION = re.compile(
    r"\b(?i:option|choice|answer|choose|chose|pick|select)\s(?:\s|(?i:is|option)\s)?(?:[(\[]([A-Za-z])[)\]]|([A-Z])\b|(?<=[nN]\s)([a-z]))[)\].:,]?(?=\s|$)"
)
_REASON = re.compile(r",?\s(?:because|since|as|due)\b")
_DENIED = ("not", "never", "cannot", "nor", "neither", "wrong", "incorrect")
_ANOTHER = re.compile(r"[\s,]{0,2}(?:(?i:or|and)\s|[/,&]\s?)(?i:option\s)?[(\[]?[A-Z](?![A-Za-z])")
_PUNCTUATION = str.maketrans(dict.fromkeys("()[].:,;/", " "))
LONGEST = 400
"""Characters of an answer that are searched for a choice."""


def choice(text: str, options: Sequence[str] | None) -> str | None:
    """The letter of the option that an answer chooses: `B`, `(B) Paris`, `Option B`, or the option's own text; None if
    it chooses none."""
    text = UPRIGHT.sub(r"\1", text).replace("\\ ", " ").strip().strip("*$` ")
    text = re.sub(r"^([A-Za-z])\s[-–—]\s", r"\1. ", text)
    if options:
        for i, option in enumerate(options):
            if plain(str(option)) == plain(text):
                return chr(ord("A") + i)
    if _several(text[:LONGEST]):
        return None
    reason = _REASON.search(text[:LONGEST])
    match = _LETTER.fullmatch(text[: reason.start()] if reason else text)
    found = [match[1]] if match else _named_options(text[-LONGEST:])
    if not found:
        return None
    letter = found[-1].upper()
    return None if options and ord(letter) - ord("A") >= len(options) else letter


def _named_options(text: str) -> list[str]:
    """The letters that a sentence chooses and does not deny: `the correct option is B`; none where it leaves the choice
    open (`option B or C`)."""
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


def _several(text: str) -> bool:
    """Whether a text is several letters and nothing else: `B, C, D`, `(B) or (C)`. None of them is the choice."""
    words = text.translate(_PUNCTUATION).split()
    letters = [word for word in words if word.lower() not in ("and", "or")]
    return len(letters) > 1 and all(len(word) == 1 and word.isascii() and word.isalpha() for word in letters)
