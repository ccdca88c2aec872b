"""Where the steps of a response begin, in tokens, as who has read so far could tell: a step has ended once its separator was written.

How a text is split must be named beforehand: what looks at the whole response to choose (`auto`) knows what comes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..models.policy import Policy
from ..types import Rollout
from .steps import SPLITS


def token_ends(policy: Policy, rollout: Rollout, ends: Sequence[int]) -> list[int]:
    """For each position in the response's text (rising) the least number of tokens whose text reaches so far.

    Tokens are asked for, not guessed: the text of the first t tokens, by bisection. It is compared, not measured: bytes of half a character
    decode to more than it.
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


def segment_starts(policy: Policy, rollout: Rollout, split: str) -> list[int]:
    """The first token of each segment, 0 among them, as long as there is a token there."""
    if split == "tokens":
        return list(range(len(rollout.response_ids)))
    ends = token_ends(policy, rollout, [m.end() for m in re.finditer(SPLITS[split], rollout.text)])
    return sorted({0, *(t for t in ends if t < len(rollout.response_ids))})


def seen_ends(text: str, ends: Sequence[int], split: str) -> list[int | None]:
    """For each step's end where its separator ends; None for a last step without one. Space may lie between: a step is stripped of it."""
    separator = re.compile(SPLITS[split])
    found = [(separator.search(text, end), end) for end in ends]
    return [m.end() if m and not text[end : m.start()].strip() else None for m, end in found]
