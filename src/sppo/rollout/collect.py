"""Tasks in, judged rollouts out: the engine samples, the environment answers, the reward judges, the truncation rule applies."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from ..environments.base import Environment, Maker, Observation, Reply
from ..environments.single_turn import build as single_turn
from ..errors import RecipeError, RewardError, UserError
from ..models.policy import Policy
from ..rewards.base import Reward
from ..rewards.user_reward import TOLERATED
from ..types import Message, Rollout, Span, Task, Verdict
from .engine import Engine, Sample, Sampling


def sample_seed(*parts: int | str) -> int:
    """A 64-bit seed from what identifies a sample (run seed, stream, step, task, index): no state to save or lose."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def collect(
    engine: Engine,
    policy: Policy,
    reward: Reward,
    tasks: Sequence[Task],
    sampling: Sampling,
    *,
    samples: int = 1,
    seed: tuple[int | str, ...],
    truncated: str = "penalise",
    environment: Maker = single_turn,
    progress: Callable[[int], None] | None = None,
    judging: Callable[[int], None] | None = None,
) -> list[Rollout]:
    """`samples` judged rollouts for each task, a task's samples next to each other.

    `policy` provides the tokenizer; the weights are the engine's. `sampling.max_tokens` is of all that the policy writes in a trajectory.
    `progress` is called with how many are sampled, `judging` with how many are to be judged. A response cut at the limit scores 0 under
    `penalise` (its outcome is never `correct`, and `truncated` is in the evidence), is masked under `mask`, and is as judged under `keep`.
    """
    prompts = {id(task): policy.prompt_ids(task) for task in tasks}
    tracks = [
        _Trajectory(task, k, environment(), prompts[id(task)], (*seed, position, k))
        for position, task in enumerate(tasks)
        for k in range(samples)
    ]
    try:
        for track in tracks:
            track.begin(policy)
        _play(engine, policy, tracks, sampling, progress)
    finally:
        for track in tracks:
            track.close()
    _tolerable(tracks)
    if judging is not None:
        judging(len(tracks))
    rollouts = [track.rollout() for track in tracks]
    whole = [r for r, track in zip(rollouts, tracks, strict=True) if track.failure is None]
    verdicts = iter(reward.judge(whole) if whole else [])
    return [
        r.judged(track.failure or truncation_rule(r, next(verdicts), truncated))
        for r, track in zip(rollouts, tracks, strict=True)
    ]


@dataclass(slots=True)
class _Trajectory:
    """One trajectory as it grows."""

    task: Task
    sample: int
    environment: Environment
    ids: list[int]
    seed: tuple[int | str, ...]
    turns: list[Span] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    evidence: dict[str, Any] = field(default_factory=dict)
    messages: list[Message] = field(default_factory=list)
    text: str = ""
    version: int = 0
    finish: Any = "stop"
    done: bool = False
    room: int = 0
    """Tokens that the policy may still write."""
    failure: Verdict | None = None
    """Set where the environment could not go on."""

    def begin(self, policy: Policy) -> None:
        """Let the environment begin."""
        seen = self._ask(self.environment.reset, self.task)
        if seen.done and self.failure is None:
            raise RecipeError(
                f"task.environment: its reset said that task {self.task.id} is done before the policy wrote anything"
            )
        if seen.messages and not seen.done:
            own = self.task.prompt
            given: list[Message] = [{"role": "user", "content": own}] if isinstance(own, str) else own
            self.ids = policy.prompt_ids(replace(self.task, prompt=[*given, *seen.messages]))

    def answer(self, policy: Policy, sample: Sample) -> None:
        """Take in what the policy wrote, and what the environment says to it."""
        self.turns.append((len(self.ids), len(self.ids) + len(sample.ids)))
        self.ids = [*self.ids, *sample.ids]
        self.logps += sample.logps
        self.kept += sample.kept
        self.finish, self.text, self.version = sample.finish, policy.text(sample.ids), sample.version
        self.messages.append({"role": "assistant", "content": self.text})
        if sample.finish == "length":
            self.done = True
        else:
            seen = self._ask(self.environment.step, Reply(self.text, sample.ids))
            if seen.messages and not self.done:
                self.messages += seen.messages
                self.ids = [*self.ids, *policy.continuation_ids(seen.messages)]

    def _ask(self, step: Callable[[Any], Observation], what: Task | Reply) -> Observation:
        """Ask the environment; one that fails ends its own trajectory."""
        try:
            seen = _checked(step(what), step)
        except UserError:  # of a recipe that cannot work
            raise
        except Exception as error:  # whatever an environment raises is this trajectory's alone
            self._fail(error)
            return Observation(done=True)
        self.evidence |= seen.evidence
        self.done = seen.done
        return seen

    def close(self) -> None:
        """Let go of the environment."""
        try:
            self.environment.close()
        except Exception as error:  # as in `_ask`; the others must be closed all the same
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        reason = f"the environment raised {type(error).__name__}: {error}"
        self.failure, self.done = Verdict(0.0, "infra_error", {"reason": reason}), True

    def has_room(self, max_tokens: int, context: int | None) -> bool:
        """Whether the policy may write on; where it may not, the trajectory is cut."""
        self.room = max_tokens - len(self.logps)
        if self.turns and context is not None:
            self.room = min(self.room, context - len(self.ids))
        if self.room < 1:
            self.finish, self.done = "length", True
        return not self.done

    def rollout(self) -> Rollout:
        """What became of it. A trajectory that failed before the first token has an empty turn."""
        turns = self.turns or [(len(self.ids), len(self.ids))]
        return Rollout(
            self.task, self.ids, turns, self.logps, self.finish, self.text, self.sample, kept=self.kept, evidence=self.evidence,
            version=self.version, messages=self.messages if len(turns) > 1 else (),
        )  # fmt: skip


def _checked(seen: Any, step: Callable[[Any], Any]) -> Observation:
    """What an environment answered. Raises RecipeError where it is nothing that an environment answers."""
    who = getattr(step, "__qualname__", "the environment")
    if not isinstance(seen, Observation):
        raise RecipeError(
            f"task.environment: {who} returned {type(seen).__name__}; it must return an Observation, e.g. "
            "Observation([{'role': 'user', 'content': '…'}]) or Observation(done=True)"
        )
    for message in [seen.messages] if isinstance(seen.messages, str) else seen.messages:
        if not (isinstance(message, dict) and {"role", "content"} <= message.keys()):
            raise RecipeError(
                f"task.environment: {who} returned the message {str(message)[:60]!r}; a message is a dict with `role` and `content`"
            )
    return seen


def _tolerable(tracks: Sequence[_Trajectory]) -> None:
    """Raises RewardError where an environment fails more than a tenth of the time, as a reward that does: it is broken."""
    failed = [t.failure for t in tracks if t.failure is not None]
    if len(failed) > TOLERATED * len(tracks):
        raise RewardError(
            f"task.environment failed in {len(failed)} of {len(tracks)} trajectories; the first time {failed[0].evidence['reason']}"
        )


def _play(
    engine: Engine,
    policy: Policy,
    tracks: Sequence[_Trajectory],
    sampling: Sampling,
    progress: Callable[[int], None] | None,
) -> None:
    """Turn by turn, until every trajectory is over or has used up its tokens."""
    context = min([n for n in (policy.context, engine.context) if n is not None], default=None)
    for turn in itertools.count():
        going = [t for t in tracks if not t.done and t.has_room(sampling.max_tokens, context)]
        if not going:
            return
        seeds = [sample_seed(*t.seed, *(("turn", turn) if turn else ())) for t in going]
        limits = (
            [t.room for t in going] if turn else None
        )  # the first prompts are known to leave room for a whole response
        heard = progress if progress is None or not turn else partial(_later, progress, len(tracks) - len(going))
        samples = engine.generate([t.ids for t in going], seeds, sampling, heard, limits)
        for track, sample in zip(going, samples, strict=True):
            track.answer(policy, sample)


def _later(progress: Callable[[int], None], over: int, done: int) -> None:
    progress(over + done)


def truncation_rule(rollout: Rollout, verdict: Verdict, rule: str) -> Verdict:
    """A response cut at the limit scores 0 (`penalise`), is masked (`mask`), or keeps its verdict (`keep`). What a reward would have paid stays in
    the evidence (`paid_before_cut`)."""
    if rollout.finish == "stop" or verdict.masked or rule == "keep":
        return verdict
    evidence = {**verdict.evidence, "truncated": rule}
    if verdict.score > 0:
        evidence["paid_before_cut"] = verdict.score
    if rule == "mask":
        return replace(verdict, excluded=True, evidence=evidence)
    outcome = "wrong" if verdict.outcome == "correct" else verdict.outcome
    return replace(verdict, score=0.0, correctness=0.0, outcome=outcome, evidence=evidence)


def overruled(verdicts: Sequence[Verdict]) -> float:
    """The share of responses that the reward would have paid, had they not been cut at the limit."""
    return sum("paid_before_cut" in v.evidence for v in verdicts) / max(len(verdicts), 1)
