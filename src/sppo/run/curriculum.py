"""Which problems come next. Each kind is a class; a recipe's `curriculum.kind` chooses.

    Uniform     every training problem once per epoch, in an order that is a function of the seed
    Staged      easy problems first; harder ones once the held-out accuracy on the present ones is surely high enough
    predicted   problems whose outcome the critic thinks open (experimental/predicted.py)

Prompts that are too long are passed over and counted, never cut. A resumed run continues at the very next problem: what is
drawn is a function of the seed, the position in the data, and what the run has learnt by then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from ..errors import RecipeError
from ..evaluation.intervals import accuracy_interval
from ..models.critic import Critic
from ..recipe.sections import CurriculumSection
from ..spec import make
from ..tasks.base import TaskSource
from ..tasks.epochs import Epochs, Refusal
from ..types import Rollout, Task


def curriculum(
    section: CurriculumSection,
    source: TaskSource,
    seed: int,
    refusal: Refusal,
    critic: Critic | None,
    held_out: Sequence[Task],
    token_budget: int = 16384,
) -> Uniform:
    """What a recipe's `curriculum` names.

    Args:
        refusal: says why a prompt cannot be used.
        held_out: the problems of every evaluation, by which a stage ends.
        token_budget: tokens per pass of the critic.

    Raises:
        RecipeError: the problems, or the algorithm, do not allow this kind.
    """
    if section.kind == "predicted":
        found: Uniform = make(
            "predicted", "sppo.experimental", "curriculum", section, source, seed, refusal, critic, token_budget
        )
        return found
    if section.kind == "staged":
        return Staged(section, source, seed, refusal, held_out)
    return Uniform(section, source, seed, refusal)


class Uniform(Epochs):
    """Without replacement. With `section.aside` problems that were always solved, or never, pause for some epochs."""

    def __init__(self, section: CurriculumSection, source: TaskSource, seed: int, refusal: Refusal) -> None:
        super().__init__(source, seed, refusal)
        self.section = section
        self.history = Aside(section.aside, section.revisit)

    def observe(self, rollouts: Sequence[Rollout]) -> None:
        """Learn from a step's verdicts."""
        self.history.observe(rollouts, max(self.position - 1, 0) // len(self.source))

    def evaluated(self, rollouts: Sequence[Rollout], samples: int) -> str | None:
        """Learn from an evaluation's held-out verdicts, `samples` per problem; returns what was decided, if anything."""
        return None

    def metrics(self) -> dict[str, float]:
        """What was decided, for the step's line of metrics."""
        return {"curriculum/aside": len(self.history)} if self.section.aside else {}

    def state_dict(self) -> dict[str, Any]:
        """The position in the data, and what was learnt."""
        return {"position": self.position, "passed_over": self.passed_over, "history": self.history.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.position, self.passed_over = state["position"], state["passed_over"]
        self.history.load_state_dict(state.get("history", {}))

    def _rests(self, task: Task, epoch: int) -> bool:
        return self.history.rests(task.id, epoch)

    def _wake(self) -> None:
        self.history.wake()


class Staged(Uniform):
    """Problems up to a difficulty (`Task.difficulty`), which rises stage by stage.

    Stage k holds difficulties in (stages[k−1], stages[k]]. Once the lower end of the 95% interval of the held-out accuracy on the present
    stage is at least `clear`, the next one begins; a share `rehearse` of every step is from earlier stages.
    """

    def __init__(
        self, section: CurriculumSection, source: TaskSource, seed: int, refusal: Refusal, held_out: Sequence[Task]
    ) -> None:
        super().__init__(section, source, seed, refusal)
        self.stage = 0
        # on the present stage's held-out problems, with its interval
        self.accuracy: tuple[float, float, float] | None = None
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
        """The next n tasks: of the present stage, and a share of earlier stages."""
        earlier = round(n * self.section.rehearse) if self.stage else 0
        return self._next(n - earlier, lambda t: self._stage_of(t) == self.stage) + self._next(
            earlier, lambda t: self._stage_of(t) < self.stage
        )

    def evaluated(self, rollouts: Sequence[Rollout], samples: int) -> str | None:
        """Begin the next stage where the present one is surely solved; returns a sentence that says so."""
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
        # by problem: its outcome (0 or 1), how often in a row, and the epoch in which it is back
        self.seen: dict[str, list[float]] = {}

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
