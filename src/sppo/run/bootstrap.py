"""The supervised start of a run: worked solutions until enough is solved; the rest is left to verdicts."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ..evaluation.evaluate import held_out_tasks
from ..learning.sft import supervised
from ..tasks.base import load_tasks

if TYPE_CHECKING:
    from .run import Run

UNTIL_EVERY, UNTIL_PROBLEMS = 10, 256
"""`bootstrap.until` is looked at every so many updates, on so many problems."""


def bootstrap(run: Run) -> None:
    """Learn from worked solutions, until enough of the training problems are solved; nothing where the recipe has no such section."""
    section = run.config.bootstrap
    if section is None:
        return
    source = run.train_tasks
    if section.task is not None:
        source = load_tasks(
            section.task,
            instruction=run.config.task.instruction,
            default_split="train",
            columns=run.config.task.columns,
        )
    run.observer.stage("bootstrap", section.steps)
    began = time.monotonic()

    probe = [
        t for t in held_out_tasks(run.train_tasks, UNTIL_PROBLEMS) if run.too_long(t) is None
    ]  # training problems: held-out ones must not steer anything

    def on_step(done: int, metrics: dict[str, float]) -> bool:
        run.observer.step(done, dict(metrics))
        if section.until is None or done % UNTIL_EVERY:
            return not run.interrupted
        run.sync(0)
        quarter = probe[: len(probe) // 4]
        if len(quarter) >= 32 and run.evaluate(quarter).accuracy < section.until / 2:
            return not run.interrupted  # so far from it that a quarter tells
        solved = run.evaluate(probe).accuracy
        if solved >= section.until:
            run.observer.note(
                f"bootstrap: {solved:.0%} of {len(probe)} training problems solved after {done} updates; that is enough"
            )
        return not run.interrupted and solved < section.until

    supervised(
        run.policy, source, section, seed=run.config.seed, micro_tokens=run.config.training.micro_budget,
        limit=run.policy.context, on_step=on_step,
    )  # fmt: skip
    run.state.seconds_bootstrap = time.monotonic() - began - run.state.seconds_evaluating
    run.state.seconds += run.state.seconds_bootstrap
