"""A learned reward model: any transformers sequence-classification model with one score (or two: bad, good).

    model:models/reward-model                      σ(r − center), center as its training measured it (0 if it says nothing)
    model:org/name,center=1.5,scale=4              σ((r − 1.5) / 4), for models whose scores spread wider
    model:models/reward-model,tokens=8192          tokens per micro-batch; affects memory only

One scalar per response, never one per token. Scores of 0.5 or more count as `correct`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..errors import RecipeError
from ..types import Rollout, Task, Verdict


def build(
    model: str = "", center: float | None = None, scale: float = 1.0, tokens: int = 8192, dtype: str = "auto"
) -> ModelReward:
    """The reward for `reward.use = "model:…"`. Raises RecipeError or ModelError before anything is sampled."""
    if not model:
        raise RecipeError("reward model: name the model: model:FOLDER (sppo reward-model train makes one)")
    for name, value in (("scale", scale), ("tokens", tokens)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise RecipeError(f"reward model: {name}={value} must be a number above 0")
    if center is not None and (isinstance(center, bool) or not isinstance(center, (int, float))):
        raise RecipeError(f"reward model: center={center} must be a number")
    if dtype not in ("auto", "float32", "bfloat16"):
        raise RecipeError(f"reward model: dtype={dtype} is not auto, float32 or bfloat16")
    return ModelReward(model, center, scale, int(tokens), dtype)


class ModelReward:
    """Verdicts from a `RewardModel`."""

    reference_free = True
    """It needs no reference answer, so the monitor `reference` skips it (audit/monitors.py)."""
    divisible = False
    """Scores differ in rounding by what else is in a micro-batch."""

    def __init__(self, name: str, center: float | None, scale: float, tokens: int, dtype: str) -> None:
        from ..models.loading import pick_device  # torch, which `sppo verify --help` does not need
        from ..models.reward_model import RewardModel

        self.model, self.stated = RewardModel.load(name, device=pick_device(), dtype=dtype)
        self.center = self.model.center if center is None else center
        self.scale, self.tokens = scale, tokens

    def judge(self, rollouts: Sequence[Rollout]) -> list[Verdict]:
        """Correct or wrong with a score in [0, 1]; infra_error (masked) for a response that is too long or whose score
        is not a number."""
        sequences = [self.model.ids(r.task.prompt, r.text) for r in rollouts]
        limit = self.model.context
        fits = [i for i, s in enumerate(sequences) if s and (limit is None or len(s) <= limit)]
        raw = dict(zip(fits, self.model.scores([sequences[i] for i in fits], self.tokens).tolist(), strict=True))
        return [self._verdict(raw.get(i), len(sequences[i])) for i in range(len(rollouts))]

    def _verdict(self, raw: float | None, tokens: int) -> Verdict:
        if raw is None:
            return Verdict(
                0.0, "infra_error", {"reason": f"{tokens} tokens; the reward model reads {self.model.context}"}
            )
        if not math.isfinite(raw):
            return Verdict(0.0, "infra_error", {"reason": f"the reward model's score is {raw}"})
        z = (raw - self.center) / self.scale
        score = 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))
        return Verdict(score, "correct" if score >= 0.5 else "wrong", {"reward_model": self.model.name, "raw": raw})

    def check(self, task: Task) -> str | None:
        """Why the prompt alone is too long for the model, or None."""
        tokens, limit = len(self.model.ids(task.prompt, "")), self.model.context
        return (
            None
            if limit is None or tokens < limit
            else f"the prompt has {tokens} tokens; the reward model reads {limit}"
        )

    def close(self) -> None:
        return None
