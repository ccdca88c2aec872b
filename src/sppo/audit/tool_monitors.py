"""A monitor of tools: calls without end, calls that fail, and results that hold what would be a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..types import Rollout
from .detect import Rate
from .step_monitors import Finding, Rated

WATCHED = {
    "endless": ("more trajectories call tools until they may not any more",
                "look at what they ask: a call may be paid for, or an answer too dear; lower environment.turns"),
    "failing": ("more trajectories are of calls that fail", "read the errors: the form of calls is being lost, or a tool is"),
    "injected": ("results of tools hold what would be a call if the policy wrote it",
                 "nothing is called by them; see where they come from: a page, a file or the policy itself"),
}  # fmt: skip


class ToolUse(Rated):
    """Shares of the trajectories with tools."""

    name = "tools"

    def __init__(self) -> None:
        self.rates = {
            "endless": Rate(0.2, level=10.0),
            "failing": Rate(0.2, level=10.0),
            "injected": Rate(0.05, level=10.0),
        }

    def look(
        self, step: int, rollouts: Sequence[Rollout], metrics: dict[str, Any], out: dict[str, float]
    ) -> list[Finding]:
        """See `Stepwise`."""
        used = [i for i, r in enumerate(rollouts) if "calls" in r.evidence]
        found: list[Finding] = []
        for name, rate in self.rates.items():
            rows = [i for i in used if _is(name, rollouts[i])]
            if used:
                out[f"tools/{name}"] = len(rows) / len(used)
            if rate.feed(step, len(rows), len(used)):
                what, advice = WATCHED[name]
                why = f"{len(rows)} of {len(used)} in this step, usual is {rate.usual:.0%} or less"
                found.append((f"tools_{name}", what, rate.since, why, advice, rows))
        return found


def _is(name: str, rollout: Rollout) -> bool:
    evidence = rollout.evidence
    if name == "endless":
        return bool(evidence.get("out_of_turns")) or rollout.finish == "length"
    if name == "failing":
        return int(evidence["calls"]) > 0 and 2 * int(evidence.get("failed_calls", 0)) > int(evidence["calls"])
    return bool(evidence.get("calls_in_results"))
