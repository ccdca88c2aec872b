"""When memory runs out: one sentence that says what takes most of it, what to turn, and how to go on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ..errors import OutOfMemory
from ..memory import ran_out
from .build import Components
from .run import Run


@contextlib.contextmanager
def explained(run: Run) -> Iterator[None]:
    """Turn what a GPU or the machine raises into OutOfMemory; the newest checkpoint stays as it is."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        c = run.components
        advice = "" if c.plan is None else f": {c.plan.advice()}"
        saved = c.directory.checkpoints()
        kept = f"step {int(saved[-1].name.removeprefix('step-'))} is saved" if saved else "nothing is saved yet"
        where = f"in step {run.state.step + 1}" if saved else "before the first step"
        raise OutOfMemory(
            f"out of memory {where}{advice}; {kept}; go on with: sppo train --resume {c.directory.path}{_less(c)}"
        ) from error


def _less(c: Components) -> str:
    """The option with which a resumed run needs less in its largest phase; half of what it was."""
    if c.plan is None:
        return ""
    if c.plan.largest == "sampling":
        return f" --rollout.batch {max(1, c.config.rollout.batch // 2)}"
    return f" --training.micro_tokens {max(1, c.plan.micro_tokens // 2)}"
