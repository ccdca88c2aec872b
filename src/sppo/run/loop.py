"""The training loop. It fits on one screen and reads like the algorithm; `run/build.py` makes the components that it moves."""

from __future__ import annotations

from ..errors import WorkerLost
from ..learning.batch import pack
from .out_of_memory import explained
from .run import Run
from .sample import inspect, judging


def train(run: Run) -> dict[str, object]:
    """Run from where the state is to the last step (or an interruption); returns the summary it also writes.

    Raises RunFailure (non-finite updates, stale weights, engine mismatch): whatever was recorded until then stays. OutOfMemory says what to turn.
    """
    while True:
        try:
            with explained(run):
                return _train(run)
        except WorkerLost as lost:
            run.recover(lost)  # the newest checkpoint, and what was sampled since, lead to the same result


def _train(run: Run) -> dict[str, object]:
    c = run.components
    run.begin()
    for step in range(run.state.step, c.config.training.steps):
        if run.interrupted:
            break
        with judging(c, run.state, run.save, run.ahead.before(step)):
            with run.clock("rollout"):
                sampled = run.ahead.sampled(step)  # the curriculum's tasks, the engine's responses, verdicts
            with run.clock("monitors"):
                sampled = inspect(c, step, sampled)  # is the verifier being fooled?
        beside = sampled.beside if c.critic else []  # what trains no policy still trains the critic
        batch = pack(sampled.rollouts, c.policy.pad_id, beside)
        run.ahead.begin(step)  # what is sampled from these weights while they change (cluster.lag)
        with run.clock("update"):
            advantage, value_B, metrics = run.learner.advantage(batch)  # R − b(x), before the critic sees these rewards
            metrics |= run.learner.update(batch, advantage, step, sampled.lessons)  # clipped surrogate, critic's BCE
        with run.clock("sync"):
            run.ahead.settle()
            run.sync(step + 1)  # verified by a fingerprint of the weights
        c.curriculum.observe(sampled.seen)
        run.record(step, sampled, batch, advantage, value_B, metrics)
    return run.recorder.finish(run.state, run.stopped)
