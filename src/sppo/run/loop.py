"""The training loop. It fits on one screen and reads like the algorithm; `run/run.py` holds the parts it moves."""

from __future__ import annotations

from ..learning.batch import pack
from .run import Run
from .sample import gather


def train(run: Run) -> dict[str, object]:
    """Run from where the state is to the last step (or an interruption); returns the summary it also writes.

    Raises RunFailure (non-finite updates, stale weights, engine mismatch): whatever was recorded until then stays.
    """
    config = run.config
    run.begin()
    for step in range(run.state.step, config.training.steps):
        if run.interrupted:
            break
        with run.judging():
            with run.clock("rollout"):
                gathered = gather(run, step)  # tasks of the curriculum, responses of the engine, verdicts of the reward
            with run.clock("monitors"):
                gathered = run.inspect(step, gathered)  # is the verifier being fooled?
        beside = gathered.beside if run.critic else []  # what trains no policy still trains the critic
        batch = pack(gathered.rollouts, run.policy.pad_id, beside)
        with run.clock("update"):
            advantage, value_B, metrics = run.learner.advantage(batch)  # R − b(x), before the critic sees these rewards
            metrics |= run.learner.update(batch, advantage, step, gathered.lessons)  # clipped surrogate, critic's BCE
            run.sync(step + 1)  # checked by a fingerprint of the weights
        run.curriculum.observe(gathered.seen)
        run.record(step, gathered, batch, advantage, value_B, metrics)
    return run.finish()
