"""Which problems come next. Each kind is a class here; a recipe's `curriculum.kind` chooses.

    Uniform     every training problem once an epoch, in an order that is a function of the seed
    Predicted   of several candidates rather those whose outcome the critic thinks open, and each advantage divided by how much
                rather: the objective stays the uniform one, with less noise (the Neyman allocation)
    Staged      easy problems first; harder ones once the held-out accuracy on the present ones is surely high enough

Prompts that are too long are passed over and counted, never cut. A resumed run continues at the very next problem: what is
drawn is a function of the seed, the position in the data, and what the run has learnt by then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np

from ..errors import DataError, RecipeError
from ..evaluation.intervals import accuracy_interval
from ..models.critic import Critic
from ..recipe.sections import CurriculumSection
from ..tasks.base import TaskSource
from ..types import Rollout, Task

Refusal = Callable[[Task], str | None]
"""Why a task cannot be used, or None."""


def curriculum(
    section: CurriculumSection,
    source: TaskSource,
    seed: int,
    too_long: Refusal,
    critic: Critic | None,
    held_out: Sequence[Task],
    token_budget: int = 16384,
) -> Uniform:
    """What a recipe's `curriculum` names; `token_budget` is what the critic reads at once. Raises RecipeError where the problems do not allow it."""
    if section.kind == "predicted":
        if critic is None:
            raise RecipeError(
                "curriculum.kind = 'predicted' asks the critic, and this algorithm has none that reads the prompt"
            )
        return Predicted(section, source, seed, too_long, critic, token_budget)
    if section.kind == "staged":
        return Staged(section, source, seed, too_long, held_out)
    return Uniform(section, source, seed, too_long)


class Uniform:
    """Without replacement. With `section.aside` problems that were always solved, or never, pause for some epochs."""

    def __init__(self, section: CurriculumSection, source: TaskSource, seed: int, too_long: Refusal) -> None:
        self.section, self.source, self.seed, self.too_long = section, source, seed, too_long
        self.position = 0
        self.passed_over = 0
        self.history = Aside(section.aside, section.revisit)
        self._order: tuple[int, np.ndarray] | None = None

    def sample(self, n: int) -> list[Task]:
        """The next n tasks. Raises DataError when a whole epoch holds none that can be used."""
        return self._next(n, lambda task: True)

    def _next(self, n: int, wanted: Callable[[Task], bool]) -> list[Task]:
        tasks: list[Task] = []
        refused, reason, resting = 0, "", 0
        while len(tasks) < n:
            epoch, index = self._place()
            task = self.source[index]
            self.position += 1
            if not wanted(task):
                refused, reason = refused + 1, reason or f"{task.id}: its difficulty is {task.difficulty}"
            elif self.history.rests(task.id, epoch):
                refused, resting = refused + 1, resting + 1
            elif (why := self.too_long(task)) is not None:
                self.passed_over += 1
                refused, reason = refused + 1, f"{task.id}: {why}"
            else:
                tasks.append(task)
                refused = resting = 0
            if refused >= len(self.source):
                if not resting:
                    raise DataError(
                        f"none of the {len(self.source)} training prompts can be used; the last one is {reason}"
                    )
                self.history.wake()  # better a solved problem again than none
                refused = resting = 0
        return tasks

    def observe(self, rollouts: Sequence[Rollout]) -> None:
        """Learn from a step's verdicts."""
        self.history.observe(rollouts, max(self.position - 1, 0) // len(self.source))

    def hear(self, rollouts: Sequence[Rollout], samples: int) -> str | None:
        """Learn from an evaluation's held-out verdicts, `samples` for each problem; what was decided, if anything."""
        return None

    def metrics(self) -> dict[str, float]:
        """What was decided, for the step's line of metrics."""
        return {"curriculum/aside": len(self.history)} if self.section.aside else {}

    def _place(self) -> tuple[int, int]:
        """The epoch, and the problem that comes next in it."""
        epoch, offset = divmod(self.position, len(self.source))
        if self._order is None or self._order[0] != epoch:
            rng = np.random.Generator(np.random.Philox(key=(self.seed << 32) + epoch))
            self._order = (epoch, rng.permutation(len(self.source)))
        return epoch, int(self._order[1][offset])

    def state_dict(self) -> dict[str, Any]:
        """The position in the data, and what was learnt."""
        return {"position": self.position, "passed_over": self.passed_over, "history": self.history.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.position, self.passed_over = state["position"], state["passed_over"]
        self.history.load_state_dict(state.get("history", {}))


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
        too_long: Refusal,
        critic: Critic,
        token_budget: int = 16384,
    ) -> None:
        super().__init__(section, source, seed, too_long)
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


class Staged(Uniform):
    """Problems up to a difficulty (`Task.difficulty`), which rises stage by stage.

    Stage k holds difficulties in (stages[k−1], stages[k]]. Once the lower end of the 95% interval of the held-out accuracy on the present
    stage is at least `clear`, the next one begins; a share `rehearse` of every step is from earlier stages.
    """

    def __init__(
        self, section: CurriculumSection, source: TaskSource, seed: int, too_long: Refusal, held_out: Sequence[Task]
    ) -> None:
        super().__init__(section, source, seed, too_long)
        self.stage = 0
        self.accuracy: tuple[float, float, float] | None = (
            None  # on the present stage's held-out problems, with its interval
        )
        if any(t.difficulty is None for t in (source[0], *held_out)):
            raise RecipeError(
                "curriculum.kind = 'staged' needs problems with a dial (Task.difficulty: chain's steps, a `difficulty` column of your rows); "
                f"{source[0].id} has none"
            )
        for stage in range(len(section.stages)):
            if not any(self._stage_of(t) == stage for t in held_out):
                low, high = self._bounds(stage)
                raise RecipeError(
                    f"curriculum.stages: no held-out problem has a difficulty above {low:g} and up to {high:g}, so nobody could tell when that "
                    "stage is done; change the stages, or raise evaluation.n"
                )

    def sample(self, n: int) -> list[Task]:
        """The next n tasks: of the present stage, and a share of earlier ones."""
        earlier = round(n * self.section.rehearse) if self.stage else 0
        return self._next(n - earlier, lambda t: self._stage_of(t) == self.stage) + self._next(
            earlier, lambda t: self._stage_of(t) < self.stage
        )

    def hear(self, rollouts: Sequence[Rollout], samples: int) -> str | None:
        """Go on to the next stage when the present one is surely solved; says so."""
        before = self.stage
        while True:
            means = [
                sum(graded) / len(graded)
                for _, same in groupby(rollouts, key=lambda r: r.task.id)
                if (graded := list(self._graded(same)))
            ]
            if not means:  # none could be graded
                return None
            self.accuracy = accuracy_interval(means, samples)
            if self.accuracy[1] < self.section.clear or self.stage + 1 == len(self.section.stages):
                break
            self.stage += 1
        if self.stage == before:
            return None
        low, high = self._bounds(self.stage)
        return f"curriculum: problems of difficulty {low:g} to {high:g} from here on (stage {self.stage + 1} of {len(self.section.stages)})"

    def _graded(self, rollouts: Iterator[Rollout]) -> Iterator[float]:
        for r in rollouts:
            if self._stage_of(r.task) == self.stage and r.verdict and not r.verdict.masked:
                yield r.verdict.correct

    def _stage_of(self, task: Task) -> int:
        """The stage that a task belongs to; beyond the last one for what is harder than all, or does not say."""
        if task.difficulty is None:
            return len(self.section.stages)
        return sum(task.difficulty > bound for bound in self.section.stages)

    def _bounds(self, stage: int) -> tuple[float, float]:
        return (self.section.stages[stage - 1] if stage else float("-inf")), self.section.stages[stage]

    def metrics(self) -> dict[str, float]:
        """The stage (from 1), and the held-out accuracy on it."""
        out = super().metrics() | {"curriculum/stage": self.stage + 1}
        if self.accuracy is not None:
            out |= dict(zip(("curriculum/accuracy", "curriculum/low", "curriculum/high"), self.accuracy, strict=True))
        return out

    def state_dict(self) -> dict[str, Any]:
        """Also the stage."""
        return super().state_dict() | {"stage": self.stage, "accuracy": self.accuracy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        super().load_state_dict(state)
        self.stage, self.accuracy = state["stage"], state["accuracy"]


class Aside:
    """Problems that taught nothing: solved, or not solved, at each of their last `after` visits. They rest for `epochs` epochs.

    A bias by name: the objective leaves out what rests. 0 visits turn it off.
    """

    def __init__(self, after: int, epochs: int) -> None:
        self.after, self.epochs = after, epochs
        self.seen: dict[
            str, list[float]
        ] = {}  # a problem's outcome (0 or 1), how often in a row, and the epoch in which it is back

    def __len__(self) -> int:
        return sum(back > 0 for _, _, back in self.seen.values())

    def rests(self, name: str, epoch: int) -> bool:
        """Whether a problem is not to be drawn in this epoch."""
        if name not in self.seen or not self.seen[name][2]:
            return False
        if epoch < self.seen[name][2]:
            return True
        self.seen[name][1:] = [self.after - 1, 0]  # back: one more such visit, and it rests again
        return False

    def wake(self) -> None:
        """Let all of them come back."""
        for entry in self.seen.values():
            entry[1:] = [self.after - 1, 0] if entry[2] else entry[1:]

    def observe(self, rollouts: Sequence[Rollout], epoch: int) -> None:
        """Note a step's outcomes; mixed ones, and partial scores, end a streak."""
        if not self.after:
            return
        for name, same in groupby(rollouts, key=lambda r: r.task.id):
            outcomes = {r.verdict.correct for r in same if r.verdict and not r.verdict.masked}
            if not outcomes:
                continue
            if not outcomes <= {0.0} and not outcomes <= {1.0}:
                self.seen.pop(name, None)
                continue
            outcome = outcomes.pop()
            entry = self.seen.setdefault(name, [outcome, 0, 0])
            streak = entry[1] + 1 if entry[0] == outcome else 1
            self.seen[name] = [outcome, streak, epoch + 1 + self.epochs if streak >= self.after else 0]

    def state_dict(self) -> dict[str, list[float]]:
        """All that was seen."""
        return {name: list(entry) for name, entry in self.seen.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Continue from a saved state."""
        self.seen = {name: list(entry) for name, entry in state.items()}
