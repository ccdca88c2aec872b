"""The supervised start of a run: worked solutions until enough is solved; the rest is left to verdicts."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from ..evaluation.evaluate import held_out_tasks
from ..learning.sft import supervised
from ..rollout.trajectory import asked
from ..tasks.loading import load_tasks
from .accuracy import accuracy
from .build import Components
from .checkpoint import State

UNTIL_EVERY, UNTIL_PROBLEMS = 10, 256
"""`bootstrap.until` is measured every 10 updates, on up to 256 problems."""


def bootstrap(c: Components, state: State, sync: Callable[[int], None], interrupted: Callable[[], bool]) -> None:
    """Learn from worked solutions, until enough of the training problems are solved or the run is interrupted.

    Nothing where the recipe has no such section.
    """
    section, source = c.config.bootstrap, c.train_tasks
    if section is None:
        return
    if section.task is not None:
        task = c.config.task
        source = load_tasks(
            section.task, instruction=task.instruction, default_split="train", columns=task.columns
        )  # fmt: skip
    c.observer.stage("bootstrap", section.steps)
    began = time.monotonic()
    # Training problems: held-out ones must not steer anything.
    probe = [t for t in held_out_tasks(c.train_tasks, UNTIL_PROBLEMS) if c.prompt_limit(t) is None]

    def on_step(done: int, metrics: dict[str, float]) -> bool:
        c.observer.step(done, dict(metrics))
        if section.until is None or done % UNTIL_EVERY:
            return not interrupted()
        sync(0)
        quarter = probe[: len(probe) // 4]
        if len(quarter) >= 32 and accuracy(c, state, quarter).accuracy < section.until / 2:
            return not interrupted()  # so far from it that a quarter is enough to see it
        solved = accuracy(c, state, probe).accuracy
        if solved >= section.until:
            c.observer.note(
                f"bootstrap: {solved:.0%} of {len(probe)} training problems solved after {done} updates; that is enough"
            )
        return not interrupted() and solved < section.until

    supervised(
        c.policy, c.models.imitation(c.config), source, section, seed=c.config.seed, on_step=on_step, asked=partial(asked, c.environment, c.policy),
    )  # fmt: skip
    state.seconds_bootstrap = time.monotonic() - began - state.seconds_evaluating
    state.seconds += state.seconds_bootstrap
