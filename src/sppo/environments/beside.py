"""Environments that are asked in threads of their own, so that nobody waits for one of them; one that takes too long is given up."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from typing import Any

Answer = tuple[Any, Any]
"""Who was asked, and what came of it: a result, or what was raised."""


class Hung(TimeoutError):
    """An answer took too long; whoever was asked is busy still."""


class Beside:
    """`workers` threads that ask; threads that hang are replaced, and end with the process."""

    def __init__(self, workers: int, seconds: float) -> None:
        """`seconds`: how long an answer may take."""
        self.seconds, self.pending = seconds, 0
        self._todo: queue.SimpleQueue[tuple[Hashable, Callable[[], Any]] | None] = queue.SimpleQueue()
        self._come = threading.Condition()
        self._answers: deque[Answer] = deque()
        self._since: dict[Hashable, float] = {}
        self._threads = 0
        self._workers = workers

    def ask(self, who: Hashable, question: Callable[[], Any]) -> None:
        """Ask, and return at once. One question of each at a time."""
        self.pending += 1
        self._todo.put((who, question))
        if self._threads < self._workers:
            self._more()

    def answers(self, wait: bool) -> list[Answer]:
        """What has come. `wait` until something has, where anything is to come. `Hung` stands for what takes too long."""
        with self._come:
            while True:
                self._give_up()
                if self._answers or not (wait and self.pending):
                    found = list(self._answers)
                    self._answers.clear()
                    self.pending -= len(found)
                    return found
                first = min(self._since.values(), default=time.monotonic())
                self._come.wait(max(0.01, first + self.seconds - time.monotonic()))

    def close(self) -> None:
        """Let the threads end."""
        for _ in range(self._threads):
            self._todo.put(None)

    def _give_up(self) -> None:
        now = time.monotonic()
        for who in [who for who, since in self._since.items() if now - since >= self.seconds]:
            del self._since[who]
            self._answers.append((who, Hung(f"no answer within {self.seconds:g} s")))
            self._more()

    def _more(self) -> None:
        self._threads += 1
        threading.Thread(target=self._serve, name="sppo-environment", daemon=True).start()

    def _serve(self) -> None:
        while (asked := self._todo.get()) is not None:
            who, question = asked
            with self._come:
                self._since[who] = time.monotonic()
            try:
                found = question()
            except BaseException as error:  # handed to whoever asked
                found = error
            with self._come:
                if self._since.pop(who, None) is None:  # given up meanwhile, and replaced
                    self._threads -= 1
                    return
                self._answers.append((who, found))
                self._come.notify()
