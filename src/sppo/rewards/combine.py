"""Several rewards as one, written as a sentence:

    math + 0.2 * format       a weighted sum, divided by the sum of the weights
    code + 0 * quality        the second is measured and recorded, and pays nothing
    code and answer           both must hold
    code gate format          nothing is paid unless the format holds (its score is at least 0.5)

The first part and every `and` part make the correctness that the critic predicts; the others only shape the score. Each
part's verdict is kept in the evidence. A sample that any part cannot grade is masked. Parts that are added to the first
can fade during a run (`reward.anneal`): they help at the beginning and leave the objective unchanged at the end.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import RecipeError
from ..types import Rollout, Task, Verdict
from .base import Reward, divisible

Role = Literal["+", "and", "gate"]
_JOINT = re.compile(r"(?<!\s)\s+(\+|and|gate)\s+")
_WEIGHTED = re.compile(r"([0-9.]+)\s*\*\s*(\S.*)")
_DANGLING = re.compile(r"(?:\+|and|gate)\s.*|.*\s(?:\+|and|gate)|.*\s\*.*")


@dataclass(frozen=True)
class Part:
    """One reward of a mixture. `weight` is read in sums only."""

    name: str
    reward: Reward
    role: Role = "+"
    weight: float = 1.0


def is_mixture(use: str) -> bool:
    """Whether a `reward.use` names more than one reward (or weighs one)."""
    return any(
        found is not None
        for found in (_JOINT.search(use.strip()), _WEIGHTED.fullmatch(use.strip()), _DANGLING.fullmatch(use.strip()))
    )


def parse_mixture(use: str) -> list[tuple[Role, float, str]]:
    """`a + 0.2 * b gate c` as [(role, weight, spec)]. Raises RecipeError with the piece that cannot be read."""
    pieces = ["+", *_JOINT.split(use.strip())]
    out: list[tuple[Role, float, str]] = []
    for joint, piece in zip(pieces[::2], pieces[1::2], strict=True):
        role: Role = joint  # type: ignore[assignment]
        weighted = _WEIGHTED.fullmatch(piece)
        if weighted is None and (_DANGLING.fullmatch(piece) or not piece.strip()):
            raise RecipeError(
                f"reward {use!r}: {piece!r} is not a reward; write it as code + 0.2 * quality, or math gate mine:format"
            )
        try:
            weight, spec = (float(weighted[1]), weighted[2]) if weighted else (1.0, piece)
        except ValueError:
            raise RecipeError(f"reward {use!r}: {piece!r} has no weight that is a number") from None
        if weighted and role != "+":
            raise RecipeError(f"reward {use!r}: only a part of a sum has a weight, {piece!r} follows {role!r}")
        out.append((role, weight, spec))
    if not sum(weight for role, weight, _ in out if role == "+") > 0:
        raise RecipeError(f"reward {use!r}: at least one weight must be above 0")
    return out


def adds(parts: Sequence[Part]) -> bool:
    """Whether anything is added to a first part that pays."""
    return parts[0].weight > 0 and any(p.role == "+" and p.weight > 0 for p in parts[1:])


def _judged(part: Part, seen: Sequence[Rollout]) -> list[Verdict]:
    """A part's verdicts. One that is dear is not asked where the product with what is known is 0 anyway."""
    if part.role == "+" or not getattr(part.reward, "dear", False):
        return part.reward.judge(seen)
    asked = [r.verdict is not None and not r.verdict.masked and r.verdict.correct > 0 for r in seen]
    some = [r for r, ask in zip(seen, asked, strict=True) if ask]
    found = iter(part.reward.judge(some) if some else [])
    spared = Verdict(0.0, "wrong", {"not asked": "what comes before it is not right"})
    return [next(found) if ask else spared for ask in asked]


class MixedReward:
    """A sum of rewards, under conjunctions and gates."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        self.fade = 1.0
        """Factor on the weights of all parts but the first."""

    @property
    def divisible(self) -> bool:
        """Whether each part is."""
        return all(divisible(part.reward) for part in self.parts)

    def judge(self, rollouts: Sequence[Rollout]) -> list[Verdict]:
        """One verdict each.

        The outcome is the first part's, or that of the least correct `and` part. Later parts see the first part's
        verdict.
        """
        first = self.parts[0].reward.judge(rollouts)
        seen = [r.judged(v) for r, v in zip(rollouts, first, strict=True)]
        judged = zip(first, *(_judged(part, seen) for part in self.parts[1:]), strict=True)
        return [self._merge(verdicts) for verdicts in judged]

    def keep(self, path: Path) -> None:
        """Have parts that keep what they were told keep it there."""
        for part in self.parts:
            if callable(keep := getattr(part.reward, "keep", None)):
                keep(path)

    def begin(self, tasks: Sequence[Task], note: Callable[[str], None]) -> None:
        """Have parts say what they are worth."""
        for part in self.parts:
            if callable(begin := getattr(part.reward, "begin", None)):
                begin(tasks, note)

    def _merge(self, verdicts: tuple[Verdict, ...]) -> Verdict:
        pairs = list(zip(self.parts, verdicts, strict=True))
        evidence: dict[str, Any] = {
            "parts": [{"reward": p.name, "role": p.role, "score": v.score, "outcome": v.outcome, **v.evidence} for p, v in pairs],
            "measures": {f"part_{i}_{p.name.partition(':')[0]}": v.score for i, (p, v) in enumerate(pairs)}
            | {name: value for v in verdicts for name, value in v.evidence.get("measures", {}).items()},
        }  # fmt: skip
        if self.fade != 1.0:
            evidence["fade"] = self.fade
        weights = [p.weight * (self.fade if i else 1.0) for i, p in enumerate(self.parts)]
        masked = next(
            (v for (p, v), w in zip(pairs, weights, strict=True) if v.masked and (p.role != "+" or w > 0)), None
        )
        if masked is not None:
            why = {"reason": masked.evidence["reason"]} if "reason" in masked.evidence else {}
            return Verdict(0.0, masked.outcome, evidence | why, excluded=True)
        required = [verdicts[0], *(v for p, v in pairs[1:] if p.role == "and")]
        worst = min(required, key=lambda v: v.correct)
        held = min((v.correct for v in required[1:]), default=1.0)  # 1 where there is no conjunction
        summed = [(w, v.score) for (p, v), w in zip(pairs, weights, strict=True) if p.role == "+"]
        score = sum(weight * value for weight, value in summed) / sum(weight for weight, _ in summed)
        gates = all(v.score >= 0.5 for p, v in pairs if p.role == "gate")
        return Verdict(score * held * gates, worst.outcome, evidence, correctness=worst.correct)

    def check(self, task: Task) -> str | None:
        """The first reason that a part gives, or None."""
        return next((why for part in self.parts if (why := part.reward.check(task))), None)

    def close(self) -> None:
        for part in self.parts:
            part.reward.close()
