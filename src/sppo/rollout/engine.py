"""The socket: what the loop asks of anything that samples. An engine is a file here with `build(policy, **options)`.

Token ids go in and token ids come out, never text: what is trained on is exactly what was sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from ..errors import RecipeError
from ..models.policy import Policy
from ..models.weights import Weights
from ..recipe.sections import RolloutSection
from ..spec import make
from .sampler import Cut


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample. `temperature` 0 is greedy; `batch` sequences at once, at most; a response that comes to hold one
    of the strings `stop` ends there (the tokens that completed it are part of it)."""

    max_tokens: int
    temperature: float = 1.0
    batch: int = 256
    cut: Cut = field(default_factory=Cut)
    stop: tuple[str, ...] = ()

    @classmethod
    def of(cls, section: RolloutSection, temperature: float | None = None) -> Sampling:
        """As a recipe says, at another temperature if one is given."""
        return cls(
            section.max_tokens,
            section.temperature if temperature is None else temperature,
            section.batch,
            Cut(section.top_k, section.top_p, section.min_p),
            section.stop,
        )


@dataclass(frozen=True, slots=True)
class Sample:
    """One response: its ids (EOS included if the model chose it), their log-probabilities as sampled, why it ended.

    `kept[t]` is the log of the mass among which token t was drawn; empty where the whole softmax was open, so that
    `logps[t] + kept[t]` is its log-probability under the softmax itself. `version` is that of the weights that wrote
    it (`Engine.load`).
    """

    ids: list[int]
    logps: list[float]
    finish: Literal["stop", "length"]
    kept: list[float] = field(default_factory=list)
    version: int = 0


@dataclass(frozen=True, slots=True)
class Turn:
    """Something to write: its number, what stands before it, its seed, and how many tokens it may have."""

    number: int
    ids: Sequence[int]
    seed: int
    limit: int


Wait = Literal["no", "one", "all"]


class Turns(Protocol):
    """Where turns come from, for an engine that takes them as they come."""

    def next(self, wait: Wait) -> list[Turn]:
        """Those that can begin now. An engine with nothing else to do waits for `one`, or, where it writes in rounds, until it is known
        of `all`; none then says that it is over."""

    def written(self, number: int, sample: Sample) -> None:
        """What became of one."""


class Engine(Protocol):
    """Samples responses from the weights that it loaded last: those of the policy that it was made with, at first.

    `stated` is a sentence for the user at the start, or empty; `context` the most tokens of a prompt and its
    response, if the engine has a limit of its own. An engine may also have `converse(turns: Turns, sampling)`, by which
    decoding never waits for an environment; else turns are written in rounds. A whole engine, which reads the sequence anew for every token (in
    slow.py; `rollout.engine = "slow:Slow"`):

        import torch

        from sppo.rollout.engine import Sample


        class Slow:
            stated, context = "", None

            def __init__(self, policy):
                self.policy, self.version = policy.copied(), 0  # weights of its own

            def load(self, weights, version):
                self.policy.take(weights)
                self.version = version

            def holds(self, fingerprint):
                return self.policy.fingerprint() == fingerprint

            def generate(self, prompts, seeds, sampling, progress=None, limits=None):
                limits = limits or [sampling.max_tokens] * len(prompts)
                return [self._one(list(p), s, sampling, n) for p, s, n in zip(prompts, seeds, limits, strict=True)]

            @torch.no_grad()
            def _one(self, prompt, seed, sampling, limit):
                random, ids, logps = torch.Generator().manual_seed(seed), [], []
                while len(ids) < limit and not (ids and ids[-1] in self.policy.eos_ids):
                    logits = self.policy.model(torch.tensor([prompt + ids])).logits[0, -1]
                    logp = (logits / sampling.temperature).log_softmax(-1)
                    ids.append(int(torch.multinomial(logp.exp(), 1, generator=random)))
                    logps.append(float(logp[ids[-1]]))
                finish = "stop" if ids[-1] in self.policy.eos_ids else "length"
                return Sample(ids, logps, finish, version=self.version)

            def score(self, prompts, responses):
                return self.policy.given_logps(prompts, responses)

            def close(self):
                pass
    """

    stated: str
    context: int | None

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: Sampling,
        progress: Callable[[int], None] | None = None,
        limits: Sequence[int] | None = None,
    ) -> list[Sample]:
        """One sample for each prompt, in order. A sample depends on its prompt, its seed and the weights alone: not
        on its neighbours, the batch size or the order. `progress` is called with how many sequences are finished;
        `limits` are tokens of each response, where some must be shorter than `sampling.max_tokens`."""

    def score(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[list[float]]:
        """log π of each token of given responses at temperature 1, by the code that samples, for the canary."""

    def load(self, weights: Weights, version: int) -> None:
        """Take over weights (`Policy.weights`), from now on those of a version: the number of steps after which they
        were taken."""

    def holds(self, fingerprint: str) -> bool:
        """Whether the weights that the engine would sample from now have this fingerprint (`Policy.fingerprint`),
        taken where they are."""

    def close(self) -> None:
        """Release processes and memory."""


def in_rounds(engine: Engine, turns: Turns, sampling: Sampling) -> None:
    """Write turns by an engine that does not take them as they come."""
    while asked := turns.next("all"):
        limits = [t.limit for t in asked]
        samples = engine.generate([t.ids for t in asked], [t.seed for t in asked], sampling, limits=limits)
        for turn, sample in zip(asked, samples, strict=True):
            turns.written(turn.number, sample)


ASKED = ("stated", "context", "generate", "score", "load", "holds", "close")


def load_engine(use: str, policy: Policy) -> Engine:
    """The engine that `rollout.engine` names, made with the policy. Raises RecipeError, also for an own object that
    lacks what an engine needs."""
    engine = make(use, "sppo.rollout", "engine", policy)
    missing = [name for name in ASKED if not hasattr(engine, name)]
    if missing:
        raise RecipeError(
            f"rollout.engine = {use!r} makes a {type(engine).__name__} without {', '.join(missing)}: an engine has "
            f"{', '.join(ASKED)} "
            "(rollout/engine.py says what each is)"
        )
    return engine
