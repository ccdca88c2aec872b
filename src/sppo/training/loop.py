"""The training loop. It fits on one screen and reads like the algorithm; `training/run.py` holds the parts it moves."""

from __future__ import annotations

from ..rollout.collect import collect
from .batch import pack
from .run import Run


def train(run: Run) -> dict[str, object]:
    """Run from where the state is to the last step (or an interruption); returns the summary it also writes.

    Raises RunFailure (non-finite updates, stale weights, engine mismatch): whatever was recorded until then stays.
    """
    config = run.config
    run.begin()
    for step in range(run.state.step, config.training.steps):
        if run.interrupted:
            break
        with run.clock("rollout"), run.judging():
            tasks = run.curriculum.sample(config.rollout.prompts)
            rollouts = collect(
                run.engine, run.policy, run.reward, tasks, run.sampling,
                samples=config.rollout.samples, seed=(config.seed, "train", step), truncated=config.rollout.truncated,
                progress=run.on_rollout,
            )  # fmt: skip
        batch = pack(rollouts, run.policy.pad_id)
        with run.clock("update"):
            advantage_B, value_B, critic_metrics = run.learner.advantage(batch)  # R − V(x), before V sees these rewards
            update_metrics = run.learner.update(batch, advantage_B, step)  # clipped surrogate, and the critic's BCE
            run.sync()  # checked by a fingerprint of the weights
        run.curriculum.observe(rollouts)
        run.record(step, batch, advantage_B, value_B, critic_metrics | update_metrics)
    return run.finish()
