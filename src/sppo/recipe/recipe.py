"""The sections as one tree, and what follows from their keys: what `auto` stands for, rates by model size, and keys
without effect.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field

from .objective import PER_TOKEN, ObjectiveSection
from .presets import LONG_RATIO, SHORT
from .sections import (
    AdapterSection,
    BootstrapSection,
    ClusterSection,
    CriticSection,
    CurriculumSection,
    EnvironmentSection,
    EvaluationSection,
    MonitorsSection,
    PolicySection,
    RewardSection,
    RolloutSection,
    RunSection,
    SearchSection,
    Section,
    TaskSection,
    TrainingSection,
)

POLICY = "policy"
"""`critic.model` where the critic is an adapter on the policy's frozen weights."""
OF_ADAPTERS = 10.0
"""Learning rates of adapters, in those of whole models: where their products begin at nothing, ten times is best over
four orders of model size (Schulman et al., "LoRA Without Regret", 2025)."""

MOST_OF_CRITIC = 1e-3
"""The most of a critic that is an adapter: on a model of 0.65M parameters one explains 8% of the variance at 1e-3, as a
whole small critic does, 6% at 3e-3, and nothing at 1e-2."""


class Recipe(Section):
    """All sections, in the order in which data flows."""

    seed: int = Field(1, ge=0, lt=2**31, description="every random choice of the run derives from this")
    policy: PolicySection = Field(default_factory=PolicySection, description="the model that is trained")
    adapter: AdapterSection | None = Field(
        None, description="low-rank matrices beside frozen weights; leave it out to train all weights"
    )
    critic: CriticSection = Field(default_factory=CriticSection, description="the prompt-only value model")
    task: TaskSection = Field(default_factory=TaskSection, description="which problems")
    environment: EnvironmentSection = Field(
        default_factory=EnvironmentSection, description="what answers the policy between its turns"
    )
    curriculum: CurriculumSection = Field(
        default_factory=CurriculumSection, description="the order of the training problems"
    )
    reward: RewardSection = Field(default_factory=RewardSection, description="what judges a response")
    bootstrap: BootstrapSection | None = Field(
        None, description="a supervised start; leave it out for a model that already solves some problems"
    )
    rollout: RolloutSection = Field(default_factory=RolloutSection, description="how responses are sampled")
    search: SearchSection | None = Field(
        None, description="tree search for hard problems; leave it out if sampling solves some of each"
    )
    objective: ObjectiveSection = Field(default_factory=ObjectiveSection, description="the surrogate")
    training: TrainingSection = Field(default_factory=TrainingSection, description="the update")
    monitors: MonitorsSection = Field(
        default_factory=MonitorsSection, description="what watches for reward hacking and collapse"
    )
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection, description="held-out accuracy")
    cluster: ClusterSection | None = Field(
        None, description="several learner ranks and rollout workers; leave it out for one process"
    )
    run: RunSection = Field(default_factory=RunSection, description="the run directory")

    @property
    def critic_reads(self) -> Literal["prompt", "tokens"] | None:
        """What the critic reads: the prompt alone, or every token; None if the algorithm has no critic."""
        baseline = self.objective.baseline
        if baseline == "token-critic":
            return "tokens"
        return None if baseline in ("batch", "others", "group", "greedy") else "prompt"

    @property
    def needs_reference(self) -> bool:
        """Whether anything in the recipe reads the frozen reference policy."""
        return self.objective.kl > 0 or self.objective.anchor == "reference"

    def with_rates(self, policy_parameters: int, critic_parameters: int, *, adapted: bool = False) -> Self:
        """The recipe with defaults for the learning rates that it leaves out, by the sizes of its models, and
        `OF_ADAPTERS` times as much where these are `adapted` (of a critic `MOST_OF_CRITIC` at most)."""
        policy, critic = _size_class(policy_parameters), _size_class(critic_parameters)
        times = OF_ADAPTERS if adapted else 1.0
        of_critic = (1e-3, 5e-5, 5e-6)[critic]
        if self.critic.model == POLICY:
            of_critic = min(times * of_critic, MOST_OF_CRITIC)
        training = {
            "lr": self.training.lr or times * (2e-4, 1e-5, 1e-6)[policy],
            "critic_lr": self.training.critic_lr or of_critic,
        }
        changes: dict[str, Any] = {"training": self.training.model_copy(update=training)}
        if self.bootstrap is not None:
            rate = self.bootstrap.lr or times * bootstrap_rate(policy_parameters)
            changes["bootstrap"] = self.bootstrap.model_copy(update={"lr": rate})
        return self.model_copy(update=changes)

    def settled(self) -> tuple[Self, str]:
        """The recipe without `auto` in its objective; and its ratio in words, with the reason where it was `auto`.

        A static rule: it depends on the recipe alone, so a run's resolved recipe says what ran.
        """
        o, length = self.objective, self.rollout.max_tokens
        changes, because = self._ratio() if o.ratio == "auto" else ({}, "")
        ratio = changes.get("ratio", o.ratio)
        if o.engine_correction_level == "auto" and o.engine_correction:
            exact = ratio not in PER_TOKEN and length <= SHORT
            changes["engine_correction_level"] = "sequence" if exact else "token"
        out = self.model_copy(update={"objective": o.model_copy(update=changes)})
        words = f"ratio {ratio}" + (f" with kappa {out.objective.kappa:g}" if ratio == "family" else "")
        return out, words + (f" (auto: {because})" if because else "")

    def _ratio(self) -> tuple[dict[str, Any], str]:
        """The keys of [objective] that replace `ratio = "auto"`, and why."""
        o, length = self.objective, self.rollout.max_tokens
        updates = self.training.minibatches * self.training.epochs
        if updates == 1:
            return {"ratio": "sequence"}, "a step has one update"
        if length <= SHORT:
            why = f"responses have up to {length} tokens, and up to {SHORT} the exact weight can be used"
            return {"ratio": "sequence"}, why
        fields = ObjectiveSection.model_fields
        changes = {k: v for k, v in LONG_RATIO.items() if k == "ratio" or getattr(o, k) == fields[k].default}
        return changes, f"a step has {updates} updates, and up to {length} tokens make the exact weight vary too much"

    def without_effect(self) -> list[str]:
        """A sentence for each key that is not at its default and that nothing in the recipe reads."""
        o, k = self.settled()[0].objective, self.curriculum
        of_predicted, of_staged = ("floor", "pool", "corrected"), ("clear", "rehearse")
        reads: list[tuple[str, bool, str]] = [
            ("objective.gae_lambda", o.baseline == "token-critic", "objective.baseline = 'token-critic'"),
            ("objective.kappa", o.ratio == "family", "objective.ratio = 'family'"),
            ("objective.gate_temperature", o.surrogate == "sapo", "objective.surrogate = 'sapo'"),
            ("objective.engine_correction_level", o.engine_correction > 0, "objective.engine_correction above 0"),
            ("objective.engine_correction_beyond", o.engine_correction > 0, "objective.engine_correction above 0"),
            ("objective.kl_form", o.kl > 0, "objective.kl above 0"),
            ("objective.kl_level", o.kl > 0 and o.kl_form != "reward", "objective.kl above 0, kl_form not 'reward'"),
            ("rollout.segments", self.search is not None, "[search]"),
            *((f"curriculum.{key}", k.kind == "predicted", "curriculum.kind = 'predicted'") for key in of_predicted),
            *((f"curriculum.{key}", k.kind == "staged", "curriculum.kind = 'staged'") for key in of_staged),
            ("curriculum.revisit", k.aside > 0, "curriculum.aside above 0"),
            ("monitors.second", self.monitors.sample > 0, "monitors.sample above 0"),
            ("monitors.second", self.monitors.action != "off", "monitors.action other than 'off'"),
            ("monitors.sample", self.monitors.action != "off", "monitors.action other than 'off'"),
        ]  # fmt: skip
        out = []
        for dotted, read, of in reads:
            name, _, key = dotted.partition(".")
            section = getattr(self, name)
            if not read and getattr(section, key) != type(section).model_fields[key].default:
                out.append(f"{dotted} has no effect here: it needs {of}")
        return out


def _size_class(parameters: int) -> int:
    return 0 if parameters < 10_000_000 else 1 if parameters < 1_000_000_000 else 2


def bootstrap_rate(parameters: int) -> float:
    """The default supervised learning rate for a model of this size."""
    return (2e-3, 1e-4, 1e-5)[_size_class(parameters)]
