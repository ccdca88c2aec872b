"""Which credit a recipe names."""

from __future__ import annotations

from ...errors import RecipeError
from ...models.critic import Critic
from ...models.policy import Policy
from ...recipe.config import Config
from ...spec import make
from .protocol import Credit

ROOMS = {
    "critic": "prompt", "centred": "prompt", "hybrid": "hybrid", "token-critic": "token",
    "batch": "samples", "others": "samples", "group": "samples", "greedy": "samples",
}  # fmt: skip
"""The file here that makes each `objective.baseline`; any other one is the user's own, `package.module:object`."""


def load_credit(config: Config, policy: Policy, critic: Critic | None) -> Credit:
    """What `objective.baseline` names, made of the recipe, the policy and the critic. Raises RecipeError where it needs a critic and has none."""
    baseline = config.objective.baseline
    if config.critic_reads is not None and critic is None:
        raise RecipeError(f"objective.baseline = {baseline!r} needs a critic")
    return make(ROOMS.get(baseline, baseline), "sppo.learning.credit", "objective.baseline", config, policy, critic)
