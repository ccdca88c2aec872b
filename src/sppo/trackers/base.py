"""The socket of a tracker, which receives each step's numbers. A tracker that a recipe names must start; later failures
only warn.

A tracker is a file here, or `package.module:object` of your own: `build(run, **options)` returns an object with `id`,
`log(step, metrics)` and `close(summary)`, and raises any exception when it cannot start.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import RecipeError
from ..files import first_line, write_atomic
from ..spec import make, parse_spec


@dataclass(frozen=True)
class TrackedRun:
    """The run that a tracker receives. `previous` is the tracker's own `id` of it, for a run that resumes at `step`."""

    name: str
    folder: Path
    recipe: Mapping[str, Any]
    step: int = 0
    previous: str | None = None


class Tracker(Protocol):
    """Receives a run's numbers.

    `id` is its name for the run, kept in the run directory so that a resumed run continues there.
    """

    id: str

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One step's numbers, those of an evaluation after it included."""

    def close(self, summary: Mapping[str, Any]) -> None:
        """The run has ended; `summary` is empty where it failed."""


class Trackers:
    """All that a recipe names."""

    def __init__(self, specs: Sequence[str], run: TrackedRun, say: Callable[[str], None]) -> None:
        """Raises RecipeError naming the one that does not start, and why."""
        self.say = say
        self.running: dict[str, Tracker] = {}
        known, ids = run.folder / "trackers.json", dict[str, str]()
        if known.exists() and specs:
            ids = json.loads(known.read_text())
        for text in specs:
            name = parse_spec(text, "sppo.trackers").name
            tracked = TrackedRun(run.name, run.folder, run.recipe, run.step, ids.get(name))
            try:
                self.running[text] = make(text, "sppo.trackers", "tracker", tracked)
                missing = [part for part in ("id", "log", "close") if not hasattr(self.running[text], part)]
                if missing:
                    raise RecipeError(
                        f"run.trackers: {text} makes a {type(self.running.pop(text)).__name__} without {', '.join(missing)}"
                    )
            except RecipeError:
                self.close({})
                raise
            except ImportError as error:
                self.close({})
                raise RecipeError(
                    f"run.trackers: {name} is not installed ({error}): pip install 'sppo[trackers]'"
                ) from None
            except Exception as error:
                self.close({})
                raise RecipeError(f"run.trackers: {text} does not start: {first_line(error)}") from error
            ids[name] = self.running[text].id
        if specs:
            write_atomic(known, json.dumps(ids) + "\n")

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Pass on a step's numbers; other values are left out."""
        numbers = {k: float(v) for k, v in metrics.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
        self._each(lambda tracker: tracker.log(step, numbers), f"at step {step}")

    def close(self, summary: Mapping[str, Any]) -> None:
        """Close all of them."""
        self._each(lambda tracker: tracker.close(summary), "at the end")
        self.running = {}

    def _each(self, call: Callable[[Tracker], None], when: str) -> None:
        for text, tracker in list(self.running.items()):
            try:
                call(tracker)
            except Exception as error:
                del self.running[text]
                self.say(
                    f"warning: tracker {text} failed {when} and is left out from now on ({first_line(error)}); the run continues"
                )
