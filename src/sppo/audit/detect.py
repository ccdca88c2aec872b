"""Has something changed? Two sequential tests, small enough to be checked by hand; their state is plain numbers.

Source: Page 1954, "Continuous inspection schemes" (CUSUM). Wald's bound gives the false alarms: an alarm level of h is
crossed about once in e^h observations or more where nothing has changed.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Cusum:
    """A rate of events that must stay at `usual`, and is looked at for having become `bad`.

    Each observation adds log(bad/usual) for an event and log((1−bad)/(1−usual)) for none, never below 0; the alarm is
    at `level`. `since` is when the sum last left 0: the best guess of when it began.

    >>> test = Cusum(0.01, 0.2, 5.0)
    >>> [test.feed(step, events, 10) for step, events in enumerate([0, 1, 0, 2, 3])], test.since
    ([False, False, False, False, True], 3)
    """

    usual: float
    bad: float
    level: float = 8.0
    sum: float = 0.0
    since: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.usual < self.bad < 1:
            raise ValueError(f"0 < usual < bad < 1 is needed, not {self.usual}, {self.bad}")

    def feed(self, step: int, events: float, trials: float) -> bool:
        """Hear of `events` in `trials` at a step; True where the sum stands at or above the level."""
        before = self.sum
        self.sum += events * math.log(self.bad / self.usual) + (trials - events) * math.log(
            (1 - self.bad) / (1 - self.usual)
        )
        if self.sum <= 0:
            self.sum = 0.0
        elif before == 0.0:
            self.since = step
        return self.sum >= self.level

    def state_dict(self) -> dict[str, Any]:
        """Everything."""
        return asdict(self)


@dataclass
class Rate:
    """A rate whose usual height is that of the first `learn` steps, then under a `Cusum` for `rise` more.

    What is usual lies between `least` and `most`, and is taken one standard error higher than it was seen: few steps
    tell little. A rate that cannot rise by so much is not tested.
    """

    rise: float
    learn: int = 10
    least: float = 0.02
    most: float = 1.0
    level: float = 8.0
    events: float = 0.0
    trials: float = 0.0
    steps: int = 0
    test: Cusum | None = None

    def feed(self, step: int, events: float, trials: float) -> bool:
        """As `Cusum.feed`; never while it still learns."""
        if not trials:
            return False
        if self.test is None and self.steps >= self.learn > 0:
            return False
        if self.test is None:
            self.events, self.trials, self.steps = self.events + events, self.trials + trials, self.steps + 1
            if self.steps >= self.learn:
                seen = (self.events + 1) / (self.trials + 2)
                usual = min(max(seen + math.sqrt(seen * (1 - seen) / self.trials), self.least), self.most)
                if usual + self.rise < 0.99:
                    self.test = Cusum(usual, usual + self.rise, self.level)
            return False
        return self.test.feed(step, events, trials)

    @property
    def usual(self) -> float | None:
        """What it took for usual, once it knows."""
        return self.test.usual if self.test else None

    @property
    def since(self) -> int:
        """When the rise began."""
        return self.test.since if self.test else 0

    def load(self, state: dict[str, Any]) -> None:
        """Take a saved `state_dict` back."""
        self.events, self.trials, self.steps = state["events"], state["trials"], state["steps"]
        self.test = Cusum(**state["test"]) if state["test"] else None

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes."""
        test = self.test.state_dict() if self.test else None
        return {"events": self.events, "trials": self.trials, "steps": self.steps, "test": test}


@dataclass
class Level:
    """A number followed by its moving mean, beside its mean over the first `learn` steps."""

    learn: int = 10
    weight: float = 0.2
    seen: int = 0
    start: float = 0.0
    now: float = 0.0

    def feed(self, value: float) -> bool:
        """Hear a value; True once `start` is known and `now` has had as long to follow."""
        self.seen += 1
        if self.seen <= self.learn:
            self.start += (value - self.start) / self.seen
            self.now = self.start
        else:
            self.now += self.weight * (value - self.now)
        return self.seen > 2 * self.learn

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes."""
        return {"seen": self.seen, "start": self.start, "now": self.now}

    def load(self, state: dict[str, Any]) -> None:
        """Take a saved `state_dict` back."""
        self.seen, self.start, self.now = state["seen"], state["start"], state["now"]
