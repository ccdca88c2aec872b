"""Problems whose outcome the critic thinks open are drawn more often, and each advantage is divided by how much more often.

The objective stays the uniform one, with less noise (the Neyman allocation). A recipe names it by `curriculum.kind = "predicted"`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..errors import RecipeError
from ..models.critic import Critic
from ..recipe.sections import CurriculumSection
from ..run.curriculum import Uniform
from ..tasks.base import TaskSource
from ..tasks.epochs import Refusal
from ..types import Task


def build(
    section: CurriculumSection,
    source: TaskSource,
    seed: int,
    refusal: Refusal,
    critic: Critic | None,
    token_budget: int,
) -> Uniform:
    """The curriculum for a run. Raises RecipeError where there is no critic."""
    if critic is None:
        raise RecipeError(
            "curriculum.kind = 'predicted' asks the critic, and this algorithm has none that reads the prompt"
        )
    return Predicted(section, source, seed, refusal, critic, token_budget)


class Predicted(Uniform):
    """Problems drawn in proportion to √(V(1−V)) + floor, the deviation of a reward that the critic predicts.

    With weights w_i over a pool of M candidates a problem is drawn n·w_i/Σw times on average, and its advantages are multiplied by
    (Σw/M)/w_i: the expected gradient is the uniform one for any V. Without the correction (`corrected = false`) the objective
    is another one, in which problems of medium difficulty count for more.
    """

    def __init__(
        self,
        section: CurriculumSection,
        source: TaskSource,
        seed: int,
        refusal: Refusal,
        critic: Critic,
        token_budget: int = 16384,
    ) -> None:
        super().__init__(section, source, seed, refusal)
        self.critic, self.token_budget = critic, token_budget
        self._range = (1.0, 1.0)

    def sample(self, n: int) -> list[Task]:
        """The next n tasks, each with the weight that undoes how it was chosen; some may come twice."""
        start = self.position
        pool = super().sample(n * self.section.pool)
        value_M = self.critic.logits(pool, self.token_budget).sigmoid().double().numpy()
        weight_M = np.sqrt(value_M * (1 - value_M)) + self.section.floor
        uniform = np.random.Generator(np.random.Philox(key=(self.seed << 64) + start)).random()
        chosen = systematic(weight_M, n, uniform)
        factor_M = weight_M.mean() / weight_M if self.section.corrected else np.ones_like(weight_M)
        self._range = float(factor_M[chosen].min()), float(factor_M[chosen].max())
        return [replace(pool[i], weight=float(factor_M[i])) for i in chosen]

    def metrics(self) -> dict[str, float]:
        """The least and the largest weight of the last step."""
        low, high = self._range
        return super().metrics() | {"curriculum/weight_min": low, "curriculum/weight_max": high}


def systematic(weight_M: np.ndarray, n: int, uniform: float) -> list[int]:
    """n indices, index i on average n·w_i/Σw times and never a whole time more or less: one random number in [0, 1), and n marks at equal distances."""
    edge_M = np.cumsum(weight_M)
    marks = (np.arange(n) + uniform) * (edge_M[-1] / n)
    return np.minimum(np.searchsorted(edge_M, marks, side="right"), len(weight_M) - 1).tolist()
