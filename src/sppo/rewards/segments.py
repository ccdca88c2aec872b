"""Segments of a response: where it is split into steps, and at which tokens these begin.

A step counts as ended once its separator is written. Credit needs the separator named in the recipe: `auto` looks at
the whole response to choose one, and so at what comes later.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

from ..types import Rollout

SEPARATORS = {"lines": r"\n", "semicolons": r"[;\n]", "sentences": r"(?<=[.!?])\s|\n", "paragraphs": r"\n[^\S\n]*\n"}
"""Regular expressions, by the name that recipes use."""
STOPS = {
    "lines": ("\n",), "semicolons": (";", "\n"), "paragraphs": ("\n\n",),
    "sentences": (". ", "! ", "? ", ".\n", "!\n", "?\n", "\n"),
}  # fmt: skip
"""The same as strings, for engines that stop at one. A separator that they miss lengthens the segment."""


class Decodes(Protocol):
    """What turns tokens into text, such as a policy."""

    def text(self, ids: Sequence[int]) -> str:
        """The text of tokens."""


def split_steps(text: str, how: str = "auto") -> list[tuple[str, int]]:
    """The steps of a text with their ends, without empty ones. `auto`: lines, else semicolons, else sentences."""
    body = text.rstrip()
    if how == "auto":
        how = "lines" if "\n" in body.strip() else "semicolons" if ";" in body else "sentences"
    steps, start = [], 0
    for separator in re.finditer(SEPARATORS[how], body):
        steps.append((body[start : separator.start()].strip(), separator.start()))
        start = separator.end()
    steps.append((body[start:].strip(), len(body)))
    return [(step, end) for step, end in steps if step]


def token_ends(policy: Decodes, rollout: Rollout, ends: Sequence[int]) -> list[int]:
    """For each of `ends`, rising positions in the response's text: the fewest tokens whose text contains everything
    before it.

    Found by bisection over the text of the first t tokens. Texts are compared, not their lengths: half a character's
    bytes decode to a longer text.
    """
    out, low = [], 0
    for end in ends:
        first, last = low, len(rollout.response_ids)
        while first < last:
            middle = (first + last) // 2
            if policy.text(rollout.response_ids[:middle])[:end] == rollout.text[:end]:
                last = middle
            else:
                first = middle + 1
        out.append(first)
        low = first
    return out


def segment_starts(policy: Decodes, rollout: Rollout, split: str) -> list[int]:
    """The first token of each segment, beginning with 0; a segment without a token has none."""
    if split == "tokens":
        return list(range(len(rollout.response_ids)))
    ends = token_ends(policy, rollout, [m.end() for m in re.finditer(SEPARATORS[split], rollout.text)])
    return sorted({0, *(t for t in ends if t < len(rollout.response_ids))})


def seen_ends(text: str, ends: Sequence[int], split: str) -> list[int | None]:
    """For each end of a step, the end of the separator after it (white space may stand between), or None for a last
    step without one."""
    separator = re.compile(SEPARATORS[split])
    found = [(separator.search(text, end), end) for end in ends]
    return [m.end() if m and not text[end : m.start()].strip() else None for m, end in found]
