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
from collections.abc import Sequence
from dataclasses import dataclass
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
        judged = zip(first, *(part.reward.judge(seen) for part in self.parts[1:]), strict=True)
        return [self._merge(verdicts) for verdicts in judged]

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
