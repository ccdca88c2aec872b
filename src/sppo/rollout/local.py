"""The local engine: continuous batching of any transformers decoder, in this process, on the learner's own weights.

A finished sequence leaves its slot and a waiting one takes it, so that every product is of live tokens alone. Prompts are
prefilled packed, and a prompt that is sampled several times is computed once. A model that keeps more than plain keys and
values, or cannot be packed, is sampled by the plain loop (rollout/reference.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..kernels import attention as packed
from ..kernels.cpu import decode
from ..kernels.patch_layers import fused
from ..models.policy import Policy
from ..models.weights import Weights
from .cuda_graphs import Captured, next_logits
from .engine import Sample, Sampling, Turn, Turns, in_rounds
from .kv_cache import Prefix, Slots
from .reference import PlainEngine, trouble
from .scheduler import Admitted, Key, Scheduler
from .sequences import Drawn, Forced, Responses

LONGEST = 1 << 16
"""Tokens of a trajectory where the model has no limit."""


def build(policy: Policy) -> LocalEngine:
    """The engine over a policy of this process; sampling sees the learner's weights directly."""
    return LocalEngine(policy)


class LocalEngine:
    """See `rollout.engine.Engine`."""

    context: int | None = None

    def __init__(self, policy: Policy) -> None:
        self.policy, self.version = policy, 0
        slow = policy.scorer.unpacked_why or _trouble(policy)
        self.plain = PlainEngine(policy) if slow else None
        self.compiled = not slow and decode.fits(policy.model)
        self.captured = Captured() if not slow and policy.device.type == "cuda" else None
        self.stated = f"engine local: the plain loop, several times slower: {slow}" if slow else ""
        if self.plain is not None and self.plain.stated:
            self.stated = f"engine local: {self.plain.stated}"
        if self.compiled and (why := _trouble(policy, compiled=True)):
            self.compiled = False
            self.stated = f"engine local: decoding is not compiled, about half as fast: {why}"
        if self.captured and (why := _trouble(policy, captured=self.captured)):
            self.captured = None
            self.stated = f"engine local: decoding steps are not captured as CUDA graphs, several times slower: {why}"

    def load(self, weights: Weights, version: int) -> None:
        """Take these weights; the policy's own lie here already, and are not copied."""
        self.policy.take(weights)
        self.version = version
        if self.plain is not None:
            self.plain.version = version

    def holds(self, fingerprint: str) -> bool:
        """Whether the policy that is sampled from has these weights."""
        return self.policy.fingerprint() == fingerprint

    def close(self) -> None:
        """Let go of what is kept between calls."""
        if self.captured is not None:
            self.captured.forget()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: Sampling,
        progress: Callable[[int], None] | None = None,
        limits: Sequence[int] | None = None,
    ) -> list[Sample]:
        """Sample one response a prompt; see the protocol."""
        if any(len(p) == 0 for p in prompts):
            raise ValueError("a prompt has no tokens")
        if not prompts:
            return []
        if self.plain is not None:
            return self.plain.generate(prompts, seeds, sampling, progress, limits)
        drawn = Drawn(self.policy, seeds, sampling, limits)
        self._decode(prompts, drawn, sampling.batch, progress)
        return drawn.samples(self.version)

    def converse(self, turns: Turns, sampling: Sampling) -> None:
        """Write turns as they come (`engine.Turns`)."""
        if self.plain is not None or type(self).generate is not LocalEngine.generate:  # of a subclass
            in_rounds(self, turns, sampling)
            return
        drawn = Drawn(self.policy, [], sampling)
        first = turns.next("one")
        if not first:
            return
        with self._forgetting():
            _converse(self.policy, first, turns, drawn, sampling.batch, self.compiled, self.captured, self.version)

    def score(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[list[float]]:
        """See the protocol: the decoding loop, with the given tokens in place of drawn ones."""
        if self.plain is not None:
            return self.plain.score(prompts, responses)
        given = Forced(responses)
        self._decode(prompts, given, len(prompts))
        return given.logps

    def _decode(
        self,
        prompts: Sequence[Sequence[int]],
        responses: Responses,
        batch: int,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        with self._forgetting():
            _decode(self.policy, prompts, responses, batch, self.compiled, self.captured, progress)

    @contextlib.contextmanager
    def _forgetting(self) -> Iterator[None]:
        """Let go of slots after a failure, and of large ones in any case."""
        try:
            yield
        except BaseException:
            self.close()
            raise
        if self.captured is not None:
            self.captured.settle()


@torch.inference_mode()
def _decode(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    responses: Responses,
    batch: int,
    compiled: bool,
    captured: Captured | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Let every response grow to its end."""
    count, longest = min(batch, len(prompts)), max(map(len, prompts)) + responses.longest
    slots = captured.slots_for(policy, count, longest) if captured else Slots(policy.model.config, count, longest)
    scheduler = Scheduler(prompts, responses, slots, count)
    model = _Forward(policy, scheduler, decode.Decoder(policy.model, slots) if compiled else None, captured)
    # what decode.c does on a CPU: fewer kernels between products
    with fused(policy.scorer.fusable if policy.device.type != "cpu" else []):
        while scheduler.unfinished:
            admitted = scheduler.schedule()
            logits_BV = model.prefill(admitted) if admitted else model.next()
            if scheduler.take(logits_BV) and progress:
                progress(scheduler.finished)
    if not captured:
        slots.release()


@torch.inference_mode()
def _converse(
    policy: Policy,
    first: list[Turn],
    turns: Turns,
    drawn: Drawn,
    batch: int,
    compiled: bool,
    captured: Captured | None,
    version: int,
) -> None:
    """Let turns grow to their ends as they come; how long a trajectory gets nobody knows."""
    needed = max(len(turn.ids) + turn.limit for turn in first)
    longest = max(policy.context or LONGEST, needed)
    slots = (
        captured.slots_for(policy, batch, longest)
        if captured
        else Slots(policy.model.config, batch, longest, columns=needed)
    )
    scheduler = Scheduler([], drawn, slots, batch)
    model = _Forward(policy, scheduler, decode.Decoder(policy.model, slots) if compiled else None, captured)
    numbers = list[int]()
    come = first
    with fused(policy.scorer.fusable if policy.device.type != "cpu" else []):
        while come or scheduler.unfinished:
            if come:
                drawn.add([turn.seed for turn in come], [turn.limit for turn in come])
                scheduler.add([turn.ids for turn in come])
                numbers += [turn.number for turn in come]
            admitted = scheduler.schedule()
            finished = scheduler.take(model.prefill(admitted) if admitted else model.next())
            for i in finished:
                turns.written(numbers[i], drawn.sample(i, version))
            come = turns.next("no" if scheduler.unfinished else "one")
    if not captured:
        slots.release()


class _Forward:
    """The passes over prompts and over next tokens, by whichever code computes them: decode.c, a captured graph, or the model as it is."""

    def __init__(
        self, policy: Policy, scheduler: Scheduler, decoder: decode.Decoder | None, captured: Captured | None
    ) -> None:
        self.policy, self.scheduler, self.slots = policy, scheduler, scheduler.slots
        self.decoder, self.captured = decoder, captured
        self.begun: tuple[Key, Prefix, Tensor] | None = None  # a prompt of which some responses still wait, as computed

    def next(self) -> Tensor:
        """The logits after each live sequence's newest token, [B, V]."""
        scheduler, device = self.scheduler, self.policy.device
        last_B1 = torch.tensor([[scheduler.responses.ids[i][-1]] for i in scheduler.live])
        before = [scheduler.length(i) for i in scheduler.live]
        if self.captured is not None:
            return self.captured.next_logits(last_B1, before)
        length_B = torch.tensor(before, device=device)
        if self.decoder is not None:
            self.slots.write_next(length_B, max(before) + 1)
            return self.decoder.next_logits(last_B1[:, 0])
        return next_logits(self.policy, self.slots, last_B1.to(device), length_B, [n + 1 for n in before])

    def prefill(self, admitted: Admitted) -> Tensor:
        """Read prompts into their slots, each different one once and then copied; the logits after each row's, [B, V]."""
        slots, first = self.slots, self.scheduler.first
        slot = {key: first + sum(map(len, list(admitted.values())[:n])) for n, key in enumerate(admitted)}
        logits: dict[Key, Tensor] = {}
        if self.begun is not None and self.begun[0] in admitted:
            key, prefix, logits[key] = self.begun
            slots.write(slot[key], prefix)
        if unread := [key for key in admitted if key not in logits]:
            logits |= dict(zip(unread, self._read(unread, [slot[key] for key in unread]), strict=True))
        for key, same in admitted.items():
            if len(same) > 1:
                slots.copy(slot[key], range(slot[key] + 1, slot[key] + len(same)), len(key))
        last = next(reversed(admitted))
        goes_on = self.scheduler.goes_on(last)
        self.begun = (last, slots.read(slot[last], len(last)), logits[last].clone()) if goes_on else None
        return torch.stack([logits[key] for key, same in admitted.items() for _ in same])

    def _read(self, prompts: Sequence[Key], where: Sequence[int]) -> Tensor:
        """One packed pass over whole prompts; the logits after each, [N, V]."""
        lengths, device = [len(key) for key in prompts], self.policy.device
        self.slots.write_prompts(where, lengths, device)
        ids_N = torch.tensor([i for key in prompts for i in key], device=device)
        last_B = torch.tensor(lengths, device=device).cumsum(0) - 1
        if self.decoder is not None:
            return self.decoder.next_logits(ids_N, last_B)
        return self.policy.next_logits(
            last_B, input_ids=ids_N[None], position_ids=self.slots.column_N[None], past_key_values=self.slots, **packed.boundaries(lengths)
        )  # fmt: skip


def _trouble(policy: Policy, compiled: bool = False, captured: Captured | None = None) -> str:
    """Why sampling through slots (and by the compiled or captured step) does not find what the policy itself finds; empty when it does."""
    rows, longest = (13, 40) if compiled else (3, 5)  # enough for every loop of decode.c to run, whole and in part
    return trouble(
        policy, lambda prompts, given: _decode(policy, prompts, given, rows - 1, compiled, captured), rows, longest
    )
