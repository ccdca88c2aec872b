"""Credit between token and sequence: A_t = R − [(1 − η)·b(x) + η·Φ(prefix_t)], with Φ from what the steps written so far tell.

Φ_t and η see nothing of token t or of what follows, and η and what calibrates Φ are of earlier batches: the gradient is unbiased for *any*
Φ. (A step scorer must keep to that: a step's score may depend on what was written up to its end, not on later steps.) A step scorer
that the policy learns to please adds variance at most, and what explains nothing gets η = 0, so that SPPO's credit is left.

What is fitted is what lowers the variance of the *gradient*: each response counts by the squared score |∇ log π|² of the tokens that a number
will be held against (the optimal baseline is E[R |∇ log π|²] / E[|∇ log π|²]: optimal_baseline.py). Unlikely tokens have long scores, and they
are the wrong ones: where the policy is sure and right, the best baseline is far below the chance of success, which plain means would give.

Φ is b(x) plus what the worst score so far, at that many steps, has meant for the outcome in earlier batches. The scores are those that a steps
reward measured (`answer + 0 * steps:check=chain,split=semicolons`, or a process reward model).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional

from ...errors import RecipeError
from ...models.critic import Critic
from ...models.policy import Policy
from ...recipe.config import Config
from ...rewards.segments import SEPARATORS, seen_ends, token_ends
from ...types import Rollout
from ..batch import Batch
from ..earned import MEMORY
from .optimal_baseline import DOUBT, squared_scores
from .prompt import PromptCritic
from .protocol import Found, charged, scaled


def build(config: Config, policy: Policy, critic: Critic) -> StepCredit:
    """`objective.baseline` = hybrid."""
    return StepCredit(config, policy, critic)


PLACES = 16
"""Prefixes are told apart by how many steps they hold, up to so many."""

Prefix = tuple[int, int, int, float]
"""The row of a response, the first token after some of its steps, how many steps (at most PLACES), and Φ − b there."""


def stretch_scores(square_BT: Tensor, prefixes: Sequence[Prefix]) -> list[float]:
    """The squared scores from each prefix to the next of its row, or to the row's end; on average 1."""
    until_BT = functional.pad(square_BT.double().cumsum(1), (1, 0))
    out = []
    for i, (b, start, *_) in enumerate(prefixes):
        following = prefixes[i + 1 : i + 2]
        end = following[0][1] if following and following[0][0] == b else square_BT.size(1)
        out.append(float(until_BT[b, end] - until_BT[b, start]))
    return levelled(out)


def levelled(weights: Sequence[float]) -> list[float]:
    """Weights with mean 1; all 1 where they are all 0."""
    mean = sum(weights) / max(len(weights), 1)
    return [w / mean for w in weights] if mean > 0 else [1.0] * len(weights)


class Gate:
    """η by place, and by whether Φ is above b: the best factor of Φ − b for R − b in earlier batches, within [0, 1]; 0 where nothing is known."""

    def __init__(self) -> None:
        self.cross = [0.0] * (2 * (PLACES + 1))
        self.square = [0.0] * (2 * (PLACES + 1))

    def eta(self, place: int, gap: float) -> float:
        """What earlier batches advise."""
        k = 2 * place + (gap > 0)
        return min(1.0, max(0.0, self.cross[k] / self.square[k])) if self.square[k] > 0 else 0.0

    def learn(self, seen: Sequence[tuple[int, float, float, float]]) -> None:
        """Take in (place, R − b, Φ − b, squared score) of a batch's prefixes."""
        self.cross, self.square = ([MEMORY * x for x in sums] for sums in (self.cross, self.square))
        for place, rest, gap, weight in seen:
            self.cross[2 * place + (gap > 0)] += weight * rest * gap
            self.square[2 * place + (gap > 0)] += weight * gap * gap

    def less(
        self, rest_B: Tensor, prefixes: list[Prefix], weights: Sequence[float], width: int
    ) -> tuple[Tensor, dict[str, Any]]:
        """R − b − η·(Φ − b), [B, T = width], from R − b, [B], and the mean η; then the prefixes are learnt from, each with its weight."""
        out_BT = rest_B[:, None].repeat(1, width)
        for b, start, place, gap in prefixes:  # a later prefix of a row overrules an earlier one
            out_BT[b, start:] = rest_B[b] - self.eta(place, gap) * gap
        metrics = self.metrics([(place, gap) for _, _, place, gap in prefixes])
        self.learn([(place, float(rest_B[b]), gap, w) for (b, _, place, gap), w in zip(prefixes, weights, strict=True)])
        return out_BT, metrics

    def metrics(self, prefixes: Sequence[tuple[int, float]]) -> dict[str, Any]:
        """The mean η of these (place, Φ − b)."""
        return {"hybrid/eta": sum(self.eta(*p) for p in prefixes) / len(prefixes) if prefixes else None}


class StepCredit(PromptCritic):
    """Φ from the reward's step scores."""

    charges_tokens = True

    def __init__(self, config: Config, policy: Policy, critic: Critic) -> None:
        super().__init__(config, policy, critic)
        self.gate = Gate()
        # running sums of R − b, and of responses, by place and by the worst score so far: below a half, below one, one
        self.effect = [[0.0] * 3 for _ in range(PLACES + 1)]
        self.number = [[0.0] * 3 for _ in range(PLACES + 1)]

    def advantage(self, batch: Batch, reward_B: Tensor) -> Found:
        """See the protocol; [B, T]."""
        value_B = self.model.logits([r.task for r in batch.rollouts], self.config.training.micro_budget).sigmoid()
        rest_B = self.left(batch, reward_B, value_B) - value_B
        prefixes: list[Prefix] = []
        seen: list[tuple[int, int, float]] = []
        for b, rollout in enumerate(batch.rollouts):
            if not batch.graded_B[b]:
                continue
            for start, place, bad in self._stretches(rollout):
                mean = self.effect[place][bad] / (self.number[place][bad] + DOUBT)
                phi = min(max(float(value_B[b]) + mean, 0.0), 1.0)
                prefixes.append((b, start, place, phi - float(value_B[b])))
                seen.append((place, bad, float(rest_B[b])))
        for sums in (self.effect, self.number):
            sums[:] = [[MEMORY * x for x in row] for row in sums]
        weights = stretch_scores(squared_scores(self.policy, batch), prefixes)
        for (place, bad, rest), weight in zip(seen, weights, strict=True):
            self.effect[place][bad] += weight * rest
            self.number[place][bad] += weight
        advantage_BT, metrics = self.gate.less(rest_B, prefixes, weights, batch.behaviour_logp_BT.size(1))
        metrics |= self.quality(batch, value_B)
        return scaled(charged(advantage_BT, batch), reward_B, batch, self.config.objective.scale), value_B, metrics

    def _stretches(self, rollout: Rollout) -> list[tuple[int, int, int]]:
        """(first token, how many judged steps lie before it, how bad the worst of them is) of each stretch between two steps' ends."""
        steps, split = step_scores(rollout)
        ends = seen_ends(rollout.text, [s["end"] for s in steps], split)
        judged = [
            (s["score"], end) for s, end in zip(steps, ends, strict=True) if s["score"] is not None and end is not None
        ]
        starts = token_ends(self.policy, rollout, [end for _, end in judged])
        out, worst = [], 1.0
        for place, ((score, _), start) in enumerate(zip(judged, starts, strict=True), 1):
            worst = min(worst, score)
            if start < len(rollout.response_ids):
                out.append((start, min(place, PLACES), 0 if worst < 0.5 else 1 if worst < 1 else 2))
        return out

    def state_dict(self) -> dict[str, Any]:
        """Also the running sums."""
        return super().state_dict() | {"gate": dict(self.gate.__dict__), "effect": self.effect, "number": self.number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a saved state back."""
        super().load_state_dict(state)
        self.gate.__dict__.update(state["gate"])
        self.effect, self.number = state["effect"], state["number"]


def step_scores(rollout: Rollout) -> tuple[list[dict[str, Any]], str]:
    """The steps that a reward measured of a response (text, end in characters, score), and how it split them.

    Raises RecipeError where no reward measures steps, or one splits them by a look at the whole response.
    """
    verdict = rollout.verdict
    assert verdict is not None
    parts = verdict.evidence.get("parts", ())
    evidence = next((e for e in (verdict.evidence, *parts) if "steps" in e), None)
    if evidence is None and any(part["outcome"] == "infra_error" for part in parts):
        return [], "lines"  # its scorer failed on this one, which says nothing about the response
    if evidence is None:
        raise RecipeError(
            "objective.baseline = 'hybrid' (and search.value = 'steps') reads the scores of a steps reward, and reward.use measures none: add "
            "`+ 0 * steps:check=…,split=…` to it (0: measured, not paid)"
        )
    if evidence.get("split") not in SEPARATORS:
        raise RecipeError(
            "objective.baseline = 'hybrid' must know where a step ends from what was written so far, and split=auto looks at the whole response: "
            f"name one in reward.use, e.g. steps:check=…,split=lines (known: {', '.join(SEPARATORS)})"
        )
    return evidence["steps"], evidence["split"]
