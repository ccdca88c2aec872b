"""The section `[objective]` of a recipe: what the loss is, with every key's default, bounds and help text."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from ..spec import is_import, nearest
from .presets import DEFAULT, LONG_RATIO, PRESETS, SHORT
from .sections import Positive, Section

PER_TOKEN = ("token", "geometric-token")
"""Values of `objective.ratio` that give every token a ratio, and can take an advantage for each."""


BASELINES = ("critic", "centred", "hybrid", "token-critic", "batch", "others", "group", "greedy")
"""Values of `objective.baseline` that come with the package (learning/credit/)."""


class ObjectiveSection(Section):
    """The clipped sequence-level surrogate, or a peer's."""

    algorithm: str = Field(
        DEFAULT, description="sets the keys below and rollout.samples where you leave them out: " + ", ".join(PRESETS)
    )
    baseline: str = Field(
        "critic",
        description="subtracted from the reward: critic: V(x); centred: V(x) plus the step's mean residual on other "
        "problems of that difficulty; hybrid: V(x) and the scores of the steps so far; token-critic: a value per "
        "token, with GAE; batch, others, group: the mean reward of the rest of the batch, of the prompt's other "
        "samples, of all its samples; greedy: the greedy response's reward; or package.module:object",
    )
    baseline_weight: float = Field(
        1.0, ge=0, le=1, description="baseline = 'critic': use this times V(x); 0.5 and 0 are controls"
    )
    optimal_baseline: bool = Field(
        False, description="critic, centred: shift the baseline to the one of least gradient variance in earlier steps"
    )
    scale: Literal["none", "group", "batch"] = Field(
        "none", description="divide the advantage by its group's deviation, or whiten it over the batch; both biased"
    )
    gae_lambda: float = Field(0.95, ge=0, le=1, description="baseline = 'token-critic': GAE's lambda")
    value_loss: Literal["cross-entropy", "squared"] = Field(
        "cross-entropy",
        description="baseline = 'token-critic': cross-entropy of a chance, or PPO's squared error of any value",
    )
    value_clip: float = Field(
        0.0, ge=0, description="value_loss = 'squared': how far a value may move per step (PPO2); 0: no clip"
    )
    surrogate: Literal["clip", "cispo", "gmpo", "sapo", "plain"] = Field(
        "clip",
        description="clip: PPO's; cispo: a clipped weight on the log-probability; gmpo: the geometric mean of clipped "
        "token ratios; sapo: a sigmoid gate instead of the clip; plain: the log-probability alone (REINFORCE)",
    )
    gate_temperature: tuple[Positive, Positive] = Field(
        (1.0, 1.05),
        description="surrogate = 'sapo': [positive advantage, negative]; a higher one drops off-policy tokens sooner",
    )
    average: Literal["auto", "tokens", "responses", "constant"] = Field(
        "auto",
        description="token ratios: over all tokens (auto), within each response and then over responses, or over "
        "responses times rollout.max_tokens (constant); other ratios: over responses (auto)",
    )
    ratio: Literal["auto", "sequence", "geometric", "token", "geometric-token", "family"] = Field(
        "auto",
        description="importance ratio of T tokens with log ratio l: sequence: exp(l); geometric: exp(l/T) (GSPO); token: one per token; "
        "geometric-token: exp(l/T) with each token's own gradient; family: exp(l/T^kappa); auto: sequence with one "
        f"update per step or rollout.max_tokens up to {SHORT}, else {LONG_RATIO['ratio']}",
    )
    kappa: float = Field(0.5, ge=0, le=1, description="ratio = 'family': the exponent; 0: sequence, 1: geometric")
    clip: tuple[float, float] = Field((0.2, 0.2), description="[low, high]: the ratio is clipped to [1-low, 1+high]")
    dual_clip: float = Field(3.0, ge=0, description="bound on the ratio where the advantage is negative; 0: none")
    anchor: Literal["behaviour", "reference"] = Field(
        "behaviour", description="denominator of the ratio: the policy that sampled (exact), or the frozen start"
    )
    kl: float = Field(0.0, ge=0, description="weight of the KL to the frozen start; 0 holds no reference model")
    kl_form: Literal["reward", "k2", "k3", "k3-weighted"] = Field(
        "reward",
        description="with x = log(policy/ref): reward: x inside the reward; in the loss: k2: x^2/2, k3: exp(-x)-1+x "
        "(GRPO), k3-weighted: k3 times the ratio (TRL); docs/algorithm.md has their gradients",
    )
    kl_level: Literal["auto", "sequence", "token"] = Field(
        "auto",
        description="a KL in the loss: per response, averaged over them, or per token, averaged as the loss is (GRPO); "
        "auto: as the ratio",
    )
    entropy_bonus: float = Field(
        0.0, ge=0, description="weight of each token's entropy, averaged as the loss is (PPO's bonus against collapse)"
    )
    engine_correction: float = Field(
        2.0, ge=0, description="cap of the importance weight that corrects engine-learner mismatch; 0 turns it off"
    )
    engine_correction_level: Literal["auto", "token", "sequence"] = Field(
        "auto",
        description="a weight per token, or one per response; auto: sequence for ratios of whole responses with "
        f"rollout.max_tokens up to {SHORT}, else token",
    )
    engine_correction_beyond: Literal["truncate", "mask"] = Field(
        "truncate", description="a weight above the cap becomes the cap (truncate) or 0 (mask)"
    )
    engine_gap_limit: float | None = Field(
        None,
        gt=0,
        description="stop when engine and learner log-probabilities differ by more than this per token on average; "
        "default: several times the first step's difference, which rounding in policy.dtype must explain",
    )

    @field_validator("dual_clip")
    @classmethod
    def _dual_clip_above_one(cls, value: float) -> float:
        if 0 < value <= 1:
            raise ValueError("must be above 1, or 0 to turn it off")
        return value

    @field_validator("clip")
    @classmethod
    def _clip_in_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        low, high = value
        if not (0 < low <= 1 and high > 0):
            raise ValueError("low must lie in (0, 1] and high above 0")
        return value

    @field_validator("baseline")
    @classmethod
    def _known_baseline(cls, value: str) -> str:
        if value not in BASELINES and not is_import(value, "sppo.learning.credit"):
            raise ValueError(nearest(value, list(BASELINES)))
        return value

    @field_validator("algorithm")
    @classmethod
    def _known_algorithm(cls, value: str) -> str:
        if value not in PRESETS:
            raise ValueError(nearest(value, list(PRESETS)))
        return value

    @property
    def kl_of_tokens(self) -> bool:
        """Whether a KL in the loss is taken per token."""
        return self.kl_level == "token" or (self.kl_level == "auto" and self.ratio in PER_TOKEN)
