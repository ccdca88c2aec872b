"""Trajectories of several turns, played: the engine writes, environments answer beside it, and neither waits for the other.

An engine that takes turns as they come (`converse`) gets each as soon as its environment has answered. Any other one gets all that can be
written, round by round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ..environments.base import Maker, Observation, Reply
from ..environments.beside import Beside, Hung
from ..errors import UserError
from ..models.policy import Policy
from ..types import Task
from .engine import Engine, Sample, Sampling, Turn, Wait, in_rounds
from .sampler import sample_seed
from .trajectory import Trajectory

Progress = Callable[[int], None]


def play(
    engine: Engine,
    policy: Policy,
    tracks: Sequence[Trajectory],
    sampling: Sampling,
    made: Maker,
    progress: Progress | None = None,
) -> None:
    """Play every trajectory to its end, and close the environments."""
    source = Source(engine, policy, tracks, sampling, made, progress)
    try:
        converse = getattr(engine, "converse", None) or partial(in_rounds, engine)
        converse(source, sampling)
    finally:
        source.close()


def answer_once(
    engine: Engine, policy: Policy, tracks: Sequence[Trajectory], sampling: Sampling, progress: Progress | None = None
) -> None:
    """The same where nothing answers the policy: one turn each."""
    samples = engine.generate([t.ids for t in tracks], [sample_seed(*t.seed) for t in tracks], sampling, progress)
    for track, sample in zip(tracks, samples, strict=True):
        track.wrote(policy, sample)


def _waits(wait: Wait, turns: Sequence[Turn]) -> bool:
    return wait == "all" or (wait == "one" and not turns)


class Source:
    """See `engine.Turns`: what can be written, as environments answer."""

    def __init__(
        self,
        engine: Engine,
        policy: Policy,
        tracks: Sequence[Trajectory],
        sampling: Sampling,
        made: Maker,
        progress: Progress | None,
    ) -> None:
        self.policy, self.tracks, self.most, self.progress = policy, tracks, sampling.max_tokens, progress
        self.context = min(
            [n for n in (policy.context, engine.context, made.tokens or None) if n is not None], default=None
        )
        self.beside = Beside(min(made.workers, len(tracks)), made.seconds)
        self.over = 0
        """Trajectories that are."""
        self._hung: set[int] = set()
        for number, track in enumerate(tracks):
            self._ask(number, track.task)

    def next(self, wait: Wait) -> list[Turn]:
        """See `engine.Turns`."""
        turns = list[Turn]()
        while True:
            answers = self.beside.answers(_waits(wait, turns))
            turns += [turn for who, seen in answers if (turn := self._heard(who, seen)) is not None]
            if not (_waits(wait, turns) and self.beside.pending):
                return sorted(turns, key=lambda turn: turn.number)

    def written(self, number: int, sample: Sample) -> None:
        """See `engine.Turns`."""
        reply = self.tracks[number].wrote(self.policy, sample)
        if reply is None:
            self._ended()
        else:
            self._ask(number, reply)

    def close(self) -> None:
        """Let go of all environments but those that hang: somebody is still inside."""
        self.beside.close()
        for number, track in enumerate(self.tracks):
            track.close(hung=number in self._hung)

    def _ask(self, number: int, what: Task | Reply) -> None:
        self.beside.ask(number, partial(self.tracks[number].ask, what))

    def _heard(self, number: int, seen: Any) -> Turn | None:
        """Take in an answer; returns what is to be written next, None where nothing is."""
        track = self.tracks[number]
        if isinstance(seen, Hung):
            self._hung.add(number)
        elif isinstance(seen, UserError) or not isinstance(seen, Observation | Exception):
            raise seen
        (track.answered if track.turns else track.begin)(self.policy, seen)
        if track.done or not track.has_room(self.most, self.context):
            self._ended()
            return None
        seed = sample_seed(*track.seed, *(("turn", len(track.turns)) if track.turns else ()))
        return Turn(number, track.ids, seed, track.room)

    def _ended(self) -> None:
        self.over += 1
        if self.progress is not None:
            self.progress(self.over)
