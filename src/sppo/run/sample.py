"""A step's judged rollouts, with what an algorithm wants beside them: greedy responses (ReMax), groups that can teach (DAPO)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ..rewards.combine import MixedReward
from ..rollout.collect import collect
from ..types import Rollout, Task

if TYPE_CHECKING:
    from ..experimental.search import Lessons
    from .run import Run


@dataclass(frozen=True)
class Gathered:
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
        """What was judged and thrown away, in groups of a prompt."""
        return [r for group in self.thrown_away for r in group]

    @property
    def seen(self) -> list[Rollout]:
        """All that was judged, in groups of a prompt."""
        return [*self.rollouts, *self.beside]


def gather(run: Run, step: int) -> Gathered:
    """Sample and judge `rollout.prompts` problems, and search those that look hopeless, where a recipe says so."""
    found = _sampled(run, step)
    if run.searcher is None:
        return found
    lessons, metrics = run.searcher.step(step, found.seen)
    return replace(
        found, lessons=lessons, metrics=metrics, beside_tokens=found.beside_tokens + metrics["search/tokens"]
    )


def _sampled(run: Run, step: int) -> Gathered:
    """See `rollout.resample` and `objective.baseline = "greedy"`."""
    r = run.config.rollout
    if isinstance(run.reward, MixedReward) and run.config.reward.anneal:
        run.reward.fade = max(0.0, 1 - step / run.config.reward.anneal)
    tasks = run.curriculum.sample(r.prompts)
    rollouts = _collect(run, tasks, (run.config.seed, "train", step))
    if run.config.objective.baseline == "greedy":
        return _with_greedy(run, tasks, rollouts, step)
    thrown_away: list[list[Rollout]] = []
    for again in range(r.resample):
        mixed, flat = _sorted_out(rollouts)
        if not flat:
            break
        fresh = _collect(run, run.curriculum.sample(len(flat)), (run.config.seed, "train", step, "again", again))
        thrown_away += flat
        rollouts = [x for group in mixed for x in group] + fresh
    return Gathered(rollouts, sum(len(x.response_ids) for group in thrown_away for x in group), thrown_away)


def _collect(run: Run, tasks: list[Task], seed: tuple[int | str, ...]) -> list[Rollout]:
    r = run.config.rollout
    return collect(
        run.engine, run.policy, run.reward, tasks, run.sampling,
        samples=r.samples, seed=seed, truncated=r.truncated,
        progress=lambda done: run.within("sampling", done, len(tasks) * r.samples), judging=lambda count: run.within("judging", 0, count),
    )  # fmt: skip


def _with_greedy(run: Run, tasks: list[Task], rollouts: list[Rollout], step: int) -> Gathered:
    greedy = collect(
        run.engine, run.policy, run.reward, tasks, replace(run.sampling, temperature=0.0),
        seed=(run.config.seed, "greedy", step), truncated=run.config.rollout.truncated,
    )  # fmt: skip
    samples = run.config.rollout.samples
    joined = [replace(x, greedy=greedy[i // samples]) for i, x in enumerate(rollouts)]
    return Gathered(joined, sum(len(g.response_ids) for g in greedy))


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
