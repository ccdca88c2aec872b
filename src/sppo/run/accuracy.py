"""What the policy can do with its present weights: on held-out problems, and on training problems for the critic's start."""

from __future__ import annotations

import time
from collections.abc import Sequence

from ..errors import DataError
from ..evaluation.evaluate import Evaluation, evaluate
from ..rewards.loading import fitting_reward
from ..rollout.collect import collect
from ..rollout.engine import Sampling
from ..tasks.rows import columns_found
from ..types import Task
from .build import Components
from .checkpoint import State

BASE_RATE_PROBLEMS = 256
"""Training problems on which the critic's start is measured, at most; no more than two steps' either."""


def accuracy(c: Components, state: State, problems: Sequence[Task] | None = None) -> Evaluation:
    """The held-out (or given) problems, with the current weights; its seconds are counted apart from training's."""
    began = time.monotonic()
    e = c.config.evaluation
    tried = problems or c.held_out
    result = evaluate(
        c.engine,
        c.policy,
        c.reward,
        tried,
        Sampling.of(c.config.rollout, e.temperature),
        samples=e.samples,
        seed=c.config.seed,
        checker=c.checker,
        critic=c.critic if problems is None and c.config.critic_reads == "prompt" else None,
        keep_cut=c.config.rollout.truncated == "keep",
        environment=c.environment,
        progress=lambda done: c.observer.within("evaluating", done, len(tried) * e.samples),
    )
    state.seconds_evaluating += time.monotonic() - began
    return result


def measure_start(c: Components, state: State) -> None:
    """Held-out accuracy before the first step, written down; the critic, unless it is trained, begins at the base rate.

    Raises DataError, with the reward that would fit, where not one held-out problem can be graded.
    """
    result = accuracy(c, state)
    if result.n == 0:
        reasons = {str(r.verdict.evidence.get("reason", r.verdict.outcome)) for r in result.rollouts if r.verdict}
        fits, use = fitting_reward(c.held_out[0]), c.config.reward.use
        hint = "" if fits == use else f"; these problems look made for reward.use = {fits!r}"
        raise DataError(
            f"none of the {len(c.held_out)} held-out problems can be graded by {use!r}: {min(reasons)}{hint}"
            f"; the columns are {columns_found(c.held_out[0].columns)}"
        )
    state.before = result.as_dict()
    c.directory.data(c.data)
    c.directory.start(state.before)
    c.observer.evaluation(0, result)
    c.warnings.evaluated(result)
    if c.critic is not None and not c.critic.trained:
        c.critic.start_at(base_rate(c, state, result.accuracy))


def base_rate(c: Components, state: State, otherwise: float) -> float:
    """The share solved of training problems as the first steps will sample them; `otherwise` where none can be graded."""
    began = time.monotonic()
    before = c.curriculum.state_dict()  # the first step gets the same problems as without this look
    tasks = c.curriculum.sample(min(BASE_RATE_PROBLEMS, 2 * c.config.rollout.prompts))
    c.curriculum.load_state_dict(before)
    rollouts = collect(
        c.engine, c.policy, c.reward, tasks, c.sampling, seed=(c.config.seed, "base rate"),
        truncated=c.config.rollout.truncated, environment=c.environment,
        progress=lambda done: c.observer.within("evaluating", done, len(tasks)),
    )  # fmt: skip
    state.seconds_evaluating += time.monotonic() - began
    graded = [r.verdict.correct for r in rollouts if r.verdict and not r.verdict.masked]
    return sum(graded) / len(graded) if graded else otherwise
