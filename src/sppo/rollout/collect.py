"""Tasks in, judged rollouts out: the engine samples, the environment answers, the reward judges, the truncation rule applies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ..environments.base import Maker
from ..environments.single_turn import ALONE
from ..errors import RewardError
from ..models.policy import Policy
from ..rewards.base import Reward
from ..rewards.user_reward import TOLERATED
from ..types import Rollout, Task, Verdict
from .engine import Engine, Sampling
from .play import answer_once, play
from .trajectory import Trajectory


def collect(
    engine: Engine,
    policy: Policy,
    reward: Reward,
    tasks: Sequence[Task],
    sampling: Sampling,
    *,
    samples: int = 1,
    seed: tuple[int | str, ...],
    truncated: str = "penalise",
    environment: Maker = ALONE,
    progress: Callable[[int], None] | None = None,
    judging: Callable[[int], None] | None = None,
) -> list[Rollout]:
    """`samples` judged rollouts for each task, a task's samples next to each other.

    `policy` provides the tokenizer; the weights are the engine's. `sampling.max_tokens` is of all that the policy writes in a trajectory.
    `progress` is called with how many are sampled, `judging` with how many are to be judged. A response cut at the limit scores 0 under
    `penalise` (its outcome is never `correct`, and `truncated` is in the evidence), is masked under `mask`, and is as judged under `keep`.
    """
    tracks = sampled(
        engine, policy, tasks, sampling, samples=samples, seed=seed, environment=environment, progress=progress
    )
    _tolerable(tracks)
    if judging is not None:
        judging(len(tracks))
    rollouts = [track.rollout() for track in tracks]
    whole = [r for r, track in zip(rollouts, tracks, strict=True) if track.failure is None]
    verdicts = iter(reward.judge(whole) if whole else [])
    return [
        replace(r, environment=None).judged(track.failure or truncation_rule(r, next(verdicts), truncated))
        for r, track in zip(rollouts, tracks, strict=True)
    ]


def sampled(
    engine: Engine,
    policy: Policy,
    tasks: Sequence[Task],
    sampling: Sampling,
    *,
    samples: int,
    seed: tuple[int | str, ...],
    environment: Maker,
    progress: Callable[[int], None] | None = None,
) -> list[Trajectory]:
    """The same, not judged."""
    prompts = {id(task): policy.prompt_ids(task) for task in tasks}
    tracks = [
        Trajectory(task, k, environment(), prompts[id(task)], (*seed, position, k))
        for position, task in enumerate(tasks)
        for k in range(samples)
    ]
    if environment.answers:
        play(engine, policy, tracks, sampling, environment, progress)
    else:
        answer_once(engine, policy, tracks, sampling, progress)
    return tracks


def _tolerable(tracks: Sequence[Trajectory]) -> None:
    """Raises RewardError where an environment fails more than a tenth of the time, as a reward that does: it is broken."""
    failed = [t.failure for t in tracks if t.failure is not None]
    if len(failed) > TOLERATED * len(tracks):
        raise RewardError(
            f"environment.use failed in {len(failed)} of {len(tracks)} trajectories; the first time {failed[0].evidence['reason']}"
        )


def truncation_rule(rollout: Rollout, verdict: Verdict, rule: str) -> Verdict:
    """A response cut at the limit scores 0 (`penalise`), is masked (`mask`), or keeps its verdict (`keep`). What a reward would have paid stays in
    the evidence (`paid_before_cut`)."""
    if rollout.finish == "stop" or verdict.masked or rule == "keep":
        return verdict
    evidence = {**verdict.evidence, "truncated": rule}
    if verdict.score > 0:
        evidence["paid_before_cut"] = verdict.score
    if rule == "mask":
        return replace(verdict, excluded=True, evidence=evidence)
    outcome = "wrong" if verdict.outcome == "correct" else verdict.outcome
    return replace(verdict, score=0.0, correctness=0.0, outcome=outcome, evidence=evidence)


def overruled(verdicts: Sequence[Verdict]) -> float:
    """The share of responses that the reward would have paid, had they not been cut at the limit."""
    return sum("paid_before_cut" in v.evidence for v in verdicts) / max(len(verdicts), 1)
