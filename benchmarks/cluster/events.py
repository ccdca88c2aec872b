"""A training run on a cluster, simulated event by event.

A step's responses are cut into chunks; a worker that is free takes the next one and decodes it as one batch, with continuous batching. When all are
there they are judged, then learnt: each minibatch's rows, sorted by length, are dealt to the ranks, which meet at its end. Then the weights go to the
workers. With a lag of k the responses of step s + k are sampled from the weights of step s while s is learnt, and the transfer waits for both.

Workers, ranks and verifiers of one machine share its cores: where more threads run than there are cores, all of them go proportionally slower.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .model import Layout, Measured, chunks, update, verdict_works

PARTS = ("sampling", "tail", "verdicts", "update", "transfer", "driver", "evaluation")
"""What a step's seconds are made of. `tail`: what sampling takes beyond responses of equal length."""


class Machine:
    """Runs tasks at once, in virtual time; with `cores`, threads beyond them slow all tasks down alike."""

    def __init__(self, cores: float | None) -> None:
        self.cores, self.now = cores, 0.0
        self._work, self._threads, self._count = 0.0, 0.0, 0
        self._heap: list[tuple[float, int, float, Callable[[], None]]] = []

    def start(self, seconds: float, then: Callable[[], None], threads: float = 1.0) -> None:
        """Begin a task that alone would take `seconds`; `then` is called when it is done."""
        heapq.heappush(self._heap, (self._work + seconds, self._count, threads, then))
        self._threads += threads
        self._count += 1

    def run(self) -> None:
        """Until nothing is left to do."""
        while self._heap:
            end, _, threads, then = heapq.heappop(self._heap)
            rate = 1.0 if self.cores is None else min(1.0, self.cores / max(self._threads, 1e-12))
            self.now += (end - self._work) / rate
            self._work = end
            self._threads -= threads
            then()


@dataclass
class Found:
    """What a simulation finds."""

    step_seconds: float
    parts: dict[str, float]
    """Seconds of a step by the part that it waited for; they add up to the step (with `sync = "each"`: what each part works, which overlaps)."""
    used: dict[str, float]
    """The share of the time that learners, rollouts and verifiers work."""

    @property
    def binds(self) -> str:
        """The part that takes most of the step."""
        return max(self.parts, key=lambda part: self.parts[part])


def simulate(m: Measured, layout: Layout, steps: int = 8, seed: int = 0) -> Found:
    """The mean of `steps` steps once the pipeline is full; an evaluation counts by its share of each step."""
    run = _Simulation(m, layout, steps, seed)
    run.go()
    run.machine.run()
    return run.found()


def sampling_seconds(m: Measured, layout: Layout, lengths: np.ndarray) -> float:
    """Of these responses on all workers, when nothing else runs."""
    works = chunks(m, layout, lengths)
    if m.cores is None and len(works) <= layout.rollouts:
        return max(works)
    machine, rest = Machine(m.cores), deque(works)

    def more() -> None:
        if rest:
            machine.start(rest.popleft(), more, m.pace(layout.rollouts)[0])

    for _ in range(layout.rollouts):
        more()
    machine.run()
    return machine.now


class _Simulation:
    """What is where: chunks that wait, workers that are free; steps that are sampled, judged, learnt, and whose weights are published."""

    def __init__(self, m: Measured, layout: Layout, steps: int, seed: int) -> None:
        self.m, self.layout, self.random = m, layout, np.random.default_rng(seed)
        self.machine = Machine(m.cores)
        self.counted = range(
            layout.lag + 1, layout.lag + 1 + steps
        )  # the pipeline is full, and stays so until the last
        self.total = self.counted.stop + layout.lag
        self.lengths: list[np.ndarray] = []  # of each step that is begun
        self.waiting: deque[tuple[int, float]] = deque()  # chunks: the step, the seconds
        self.left: list[int] = []  # chunks of each step that are not done
        self.free = [0] * layout.rollouts  # of each free worker the version of its weights
        self.sampled: dict[int, float] = {}  # when
        self.judged: dict[int, float] = {}
        self.learnt: dict[int, float] = {}
        self.published = {0: 0.0}  # by the number of updates in the weights
        self.judging = self.learning = self.sending = False
        self.worked: list[tuple[str, float, float, float]] = []  # who, from when, until when, seconds of all of them

    @property
    def version(self) -> int:
        """Of the weights that workers may sample from."""
        return len(self.published) - 1

    # -- whatever can begin, begins ------------------------------------------------------------------------------------

    def go(self) -> None:
        """Look at everything that waits."""
        while self.free and self._next_chunk():
            self._sample()
        if not self.judging and len(self.judged) in self.sampled:
            self._judge(len(self.judged))
        if not self.learning and len(self.learnt) in self.judged and self.version >= len(self.learnt):
            self._learn(len(self.learnt))
        if not self.sending and len(self.learnt) > self.version and self._may_send(len(self.learnt)):
            self._send()

    def _next_chunk(self) -> bool:
        """Whether one waits whose weights are published."""
        step = self.waiting[0][0] if self.waiting else len(self.lengths)
        if step == self.total or step - self.layout.lag > self.version:
            return False
        if not self.waiting:
            self.lengths.append(lengths := self.m.draw(self.m.responses, self.random))
            self.waiting += [(step, seconds) for seconds in chunks(self.m, self.layout, lengths)]
            self.left.append(len(self.waiting))
        return True

    def _sample(self) -> None:
        """One chunk on one worker; all at once where there is a free worker for each, no chunk comes after them, and nothing slows them down."""
        step, version = self.waiting[0][0], max(0, self.waiting[0][0] - self.layout.lag)
        together = self.m.cores is None and self.layout.sync == "together"
        count = len(self.waiting) if together and len(self.waiting) <= len(self.free) else 1
        works = [self.waiting.popleft()[1] for _ in range(count)]
        held = [self.free.pop() for _ in range(count)]
        if self.layout.sync == "each" and held[0] < version:
            works[0] += self.m.transfer + self.m.transfer_each

        def done() -> None:
            self.free += [version] * count
            self.left[step] -= count
            if not self.left[step]:
                self.sampled[step] = self.machine.now

        self._work("rollouts", works, done, self.m.pace(self.layout.rollouts)[0])

    def _judge(self, step: int) -> None:
        def done() -> None:
            self.judging, self.judged[step] = False, self.machine.now

        self.judging = True
        self._work("verifiers", verdict_works(self.m, self.layout, self.m.responses, self.random), done, 1.0)

    def _learn(self, step: int) -> None:
        rest = deque(update(self.m, self.layout, self.lengths[step] + self.m.prompt, self.random))

        def minibatch() -> None:
            if rest:
                self._work("learners", rest.popleft(), minibatch, self.m.pace(self.layout.learners)[0])
            else:
                self.learning, self.learnt[step] = False, self.machine.now

        self.learning = True
        minibatch()

    def _may_send(self, version: int) -> bool:
        """Together: nothing is being sampled or judged."""
        sampled = version - 1 + self.layout.lag
        return self.layout.sync == "each" or sampled in self.judged or sampled >= self.total

    def _send(self) -> None:
        def done() -> None:
            self.sending, self.published[self.version + 1] = False, self.machine.now

        together = self.layout.sync == "together"
        seconds = self.m.transfer + self.m.transfer_each * self.layout.rollouts if together else 0.0
        self.sending = True
        self._work("", [seconds + self.m.driver], done, 1.0)

    def _work(self, who: str, works: Sequence[float], then: Callable[[], None], threads: float) -> None:
        """Tasks that begin together; `then` and whatever it makes possible come after the last one."""
        began, left = self.machine.now, len(works)

        def one() -> None:
            nonlocal left
            left -= 1
            if shared:
                self.worked.append((who, began, self.machine.now, 1.0))
            if not left:
                then()
                self.go()

        shared = self.m.cores is not None
        if shared:  # each slows the others down, and must be a task of its own
            for seconds in works:
                self.machine.start(seconds, one, threads)
            return
        left, longest = 1, max(works)
        self.worked.append((who, began, began + longest, sum(works) / longest if longest else 0.0))
        self.machine.start(longest, one, threads)

    # -- what came of it -----------------------------------------------------------------------------------------------

    def found(self) -> Found:
        """The means over the steps that count."""
        begin, end = self.published[self.counted.start], self.published[self.counted.stop]
        evaluation = self._evaluation()
        seconds = (end - begin) / len(self.counted)
        number = {
            "rollouts": self.layout.rollouts,
            "verifiers": max(1, self.layout.verifiers),
            "learners": self.layout.learners,
        }
        worked = dict.fromkeys(number, 0.0)
        for who, since, until, share in self.worked:
            if who:
                worked[who] += max(0.0, min(until, end) - max(since, begin)) * share / len(self.counted)
        used = {who: worked[who] / number[who] / (seconds + evaluation) if seconds else 0.0 for who in number}
        if self.layout.sync == "each":
            each = {"sampling": "rollouts", "verdicts": "verifiers", "update": "learners"}
            parts = {part: worked[each[part]] / number[each[part]] if part in each else 0.0 for part in PARTS}
        else:
            waited = [self._waited(step) for step in self.counted]
            parts = {part: sum(w.get(part, 0.0) for w in waited) / len(waited) for part in PARTS}
        return Found(seconds + evaluation, parts | {"evaluation": evaluation}, used)

    def _waited(self, step: int) -> dict[str, float]:
        """Where the time from one publication to the next went."""
        begin, end, learnt = self.published[step], self.published[step + 1], self.learnt[step]
        beside = step + self.layout.lag
        sampled, judged = self.sampled[beside], self.judged[beside]
        found = {"driver": self.m.driver, "transfer": end - max(learnt, judged) - self.m.driver}
        if not self.layout.lag or judged < learnt:
            found["update"] = learnt - (begin if self.layout.lag else judged)
        if not self.layout.lag or judged >= learnt:
            share = self._tail(self.lengths[beside])
            found |= {
                "sampling": (1 - share) * (sampled - begin),
                "tail": share * (sampled - begin),
                "verdicts": judged - sampled,
            }
        return found

    def _tail(self, lengths: np.ndarray) -> float:
        """The share of sampling that responses of equal length would save."""
        whole = sampling_seconds(self.m, self.layout, lengths)
        even = sampling_seconds(self.m, self.layout, np.full(len(lengths), lengths.mean()))
        return max(0.0, 1 - even / whole) if whole else 0.0

    def _evaluation(self) -> float:
        """Its share of each step: sampled by all workers, then judged, while the learners wait."""
        if not self.m.evaluate_every or not self.m.evaluated:
            return 0.0
        sampling = sampling_seconds(self.m, self.layout, self.m.draw(self.m.evaluated, self.random))
        verdicts = max(verdict_works(self.m, self.layout, self.m.evaluated, self.random))
        return (sampling + verdicts) / self.m.evaluate_every
