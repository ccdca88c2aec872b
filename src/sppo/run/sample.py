"""A step's judged rollouts, with what an algorithm wants beside them: greedy responses (ReMax), groups that can teach (DAPO)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from ..audit.work import without_work
from ..errors import RewardError
from ..learning.lessons import Lessons
from ..memory import give_back, ran_out
from ..rollout.collect import collect
from ..spec import GIVEN
from ..types import Rollout, Task
from .build import Components
from .checkpoint import State


@dataclass(frozen=True)
class Sampled:
    """What the step trains on, and what it cost beside that."""

    rollouts: list[Rollout]
    beside_tokens: int = 0
    """Tokens sampled that no policy gradient is made of: greedy responses, groups thrown away, searches."""
    thrown_away: list[list[Rollout]] = field(default_factory=list)
    """Prompts' samples that all scored the same, replaced by others'; they train no policy."""
    lessons: Lessons | None = None
    """Verified solutions of hard problems, to be learnt beside the step's update."""
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def beside(self) -> list[Rollout]:
        """What was judged and thrown away, grouped by prompt."""
        return [r for group in self.thrown_away for r in group]

    @property
    def seen(self) -> list[Rollout]:
        """All that was judged, grouped by prompt."""
        return [*self.rollouts, *self.beside]


class Search(Protocol):
    """Looks for solutions of problems that sampling does not solve (experimental/search.py)."""

    def step(self, step: int, rollouts: Sequence[Rollout]) -> tuple[Lessons | None, dict[str, Any]]:
        """What is to be learnt with the step's update, given its judged rollouts; and metrics, `search/tokens` among them."""

    def recall(self, before: int) -> None:
        """Read back what was found before a step, when a run is resumed. Raises DataError."""


def sample(c: Components, step: int, search: Search | None = None) -> Sampled:
    """Sample and judge `rollout.prompts` problems; search those that look hopeless, where a recipe says so."""
    if c.config.reward.anneal:
        mixed: Any = c.reward  # as `build` has made sure; it may be judged elsewhere
        mixed.fade = max(0.0, 1 - step / c.config.reward.anneal)
    found = _with_greedy(c, step) if c.config.objective.baseline == "greedy" else _resampled(c, step)
    if search is not None:
        lessons, metrics = search.step(step, found.seen)
        tokens = found.beside_tokens + metrics["search/tokens"]
        found = replace(found, lessons=lessons, metrics=metrics, beside_tokens=tokens)
    if c.tight:
        give_back()
    return found


def _resampled(c: Components, step: int) -> Sampled:
    """Groups whose samples all scored the same are replaced by other prompts', up to `rollout.resample` times."""
    rollouts = _collect(c, c.curriculum.sample(c.config.rollout.prompts), (c.config.seed, "train", step))
    thrown_away: list[list[Rollout]] = []
    for again in range(c.config.rollout.resample):
        mixed, flat = _sorted_out(rollouts)
        if not flat:
            break
        fresh = _collect(c, c.curriculum.sample(len(flat)), (c.config.seed, "train", step, "again", again))
        thrown_away += flat
        rollouts = [x for group in mixed for x in group] + fresh
    return Sampled(rollouts, sum(len(x.response_ids) for group in thrown_away for x in group), thrown_away)


def _with_greedy(c: Components, step: int) -> Sampled:
    """Each rollout carries its prompt's greedy response, which is its baseline (`objective.baseline = "greedy"`)."""
    tasks = c.curriculum.sample(c.config.rollout.prompts)
    rollouts = _collect(c, tasks, (c.config.seed, "train", step))
    greedy = collect(
        c.engine, c.policy, c.reward, tasks, replace(c.sampling, temperature=0.0),
        seed=(c.config.seed, "greedy", step), truncated=c.config.rollout.truncated, environment=c.environment,
    )  # fmt: skip
    samples = c.config.rollout.samples
    joined = [replace(x, greedy=greedy[i // samples]) for i, x in enumerate(rollouts)]
    return Sampled(joined, sum(len(g.response_ids) for g in greedy))


def _collect(c: Components, tasks: list[Task], seed: tuple[int | str, ...]) -> list[Rollout]:
    r, within = c.config.rollout, c.observer.within
    return collect(
        c.engine, c.policy, c.reward, tasks, c.sampling, samples=r.samples, seed=seed, truncated=r.truncated,
        environment=c.environment,
        progress=lambda done: within("sampling", done, len(tasks) * r.samples),
        judging=lambda count: within("judging", 0, count),
    )  # fmt: skip


def _sorted_out(rollouts: list[Rollout]) -> tuple[list[list[Rollout]], list[list[Rollout]]]:
    """Groups that hold different scores, and groups that do not (or hold less than two graded samples)."""
    starts = [i for i, x in enumerate(rollouts) if x.sample == 0]
    mixed: list[list[Rollout]] = []
    flat: list[list[Rollout]] = []
    for start, end in zip(starts, [*starts[1:], len(rollouts)], strict=True):
        group = rollouts[start:end]
        scores = {x.verdict.score for x in group if x.verdict and not x.verdict.masked}
        (mixed if len(scores) > 1 else flat).append(group)
    return mixed, flat


def inspect(c: Components, step: int, sampled: Sampled) -> Sampled:
    """What the monitors find in a step's verdicts, before anything is learnt from them: some may be masked (`monitors.action`)."""
    if not c.monitors.on:
        return sampled
    n, every = len(sampled.rollouts), c.config.monitors.work_every
    seen, metrics = c.monitors.inspect(step, sampled.seen, n)
    rollouts, rest = seen[:n], iter(seen[n:])
    if every and step % every == 0:
        with contextlib.suppress(RewardError):  # that cannot judge a response that was cut
            kept = without_work(c.engine, c.policy, c.reward, rollouts, c.sampling, c.config.seed, step)
            metrics |= c.monitors.work(step, kept)
    thrown_away = [[next(rest) for _ in group] for group in sampled.thrown_away]
    return replace(sampled, rollouts=rollouts, thrown_away=thrown_away, metrics={**sampled.metrics, **metrics})


@contextlib.contextmanager
def judging(c: Components, state: State, save: Callable[[], None], before: dict[str, Any]) -> Iterator[None]:
    """When the reward fails for good, or memory runs out, the run is saved as it was before this step: mended, it goes on from there.
    `before` is where the curriculum stood then."""
    try:
        yield
    except RewardError as error:
        c.curriculum.load_state_dict(before)
        if state.step:
            save()
        how = f"sppo train --resume {c.directory.path}"
        if c.config.reward.use == GIVEN:
            how = "train again with resume_from_checkpoint=True"
        raise RewardError(f"{error}; step {state.step} is saved: mend the reward, then {how}") from error
    except (MemoryError, RuntimeError) as error:
        if state.step and ran_out(error):
            c.curriculum.load_state_dict(before)
            with contextlib.suppress(MemoryError, RuntimeError):  # then the last checkpoint has to do
                save()
        raise
