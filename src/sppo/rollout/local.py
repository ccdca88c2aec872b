"""The local engine: continuous batching of any transformers decoder, in this process, on the learner's own weights.

A finished sequence leaves its slot and a waiting one takes it, so that every product is of live tokens alone. Prompts are
prefilled packed, and a prompt that is sampled several times is computed once. A model that keeps more than plain keys and
values, or cannot be packed, is sampled by the plain loop (rollout/reference.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor

from ..kernels import attention as packed
from ..kernels.cpu import decode
from ..kernels.cpu.build import NoCompiler
from ..kernels.patch_layers import fused
from ..models.loading import first_line
from ..models.policy import Policy
from ..models.weights import Weights, write
from .cuda_graphs import Captured, next_logits
from .engine import Branching, Sample, Sampling
from .kv_cache import Prefix, Slots
from .reference import PlainEngine
from .sequences import Drawn, Given, Responses, next_inputs
from .tree import Growing

PREFILL = 4096
"""Prompt tokens a pass, about: memory only."""
REFILL = 16
"""Waiting prompts are admitted once a sixteenth of the slots is free: a pass for each one alone would cost more than the wait."""


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
        self.branches = not slow
        self.compiled = not slow and decode.fits(policy.model)
        self.captured = Captured() if not slow and policy.device.type == "cuda" else None
        self.stated = f"engine local: the plain loop, several times slower: {slow}" if slow else ""
        if self.compiled and (why := _trouble(policy, compiled=True)):
            self.compiled = False
            self.stated = f"engine local: decoding is not compiled, about half as fast: {why}"
        if self.captured and (why := _trouble(policy, captured=self.captured)):
            self.captured = None
            self.stated = f"engine local: decoding steps are not captured as CUDA graphs, several times slower: {why}"

    def load(self, weights: Weights, version: int) -> None:
        """Take these weights; the policy's own lie here already, and are not copied."""
        write(self.policy.model, weights)
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

    def generate_trees(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: Sampling,
        branching: Branching,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[Sample]]:
        """Sample one tree of responses a prompt: its leaves. `progress` hears how many trees are finished, in parts of trees."""
        if self.plain is not None or any(len(p) == 0 for p in prompts):
            raise ValueError("the plain loop does not branch" if self.plain else "a prompt has no tokens")
        if not prompts:
            return []
        growing = Growing(self.policy, seeds, sampling, branching)
        heard = None if progress is None else lambda _: progress(int(growing.finished_share + 1e-9))
        self._decode(prompts, growing, sampling.batch, heard)
        return growing.trees()

    def score(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[list[float]]:
        """See the protocol: the decoding loop, with the given tokens in place of drawn ones."""
        if self.plain is not None:
            return self.plain.score(prompts, responses)
        given = Given(responses)
        self._decode(prompts, given, len(prompts))
        return given.logps

    def _decode(
        self,
        prompts: Sequence[Sequence[int]],
        responses: Responses,
        batch: int,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        try:
            _decode(self.policy, prompts, responses, batch, self.compiled, self.captured, progress)
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
    """Let every response grow to its end. `live[b]` is the one whose sequence is in slot b."""
    most = responses.branching.leaves if isinstance(responses, Growing) else 1
    count, longest = min(batch, most * len(prompts)), max(map(len, prompts)) + responses.longest
    slots = captured.slots_for(policy, count, longest) if captured else Slots(policy.model.config, count, longest)
    decoder = decode.Decoder(policy.model, slots) if compiled else None
    waiting = _Waiting(prompts)
    lengths = {i: len(p) for i, p in enumerate(prompts)}  # of each response's prompt
    live: list[int] = []
    done = 0
    # what decode.c does on a CPU: fewer kernels between products
    with fused(policy.scorer.fusable if policy.device.type != "cpu" else []):
        while live or waiting.order or waiting.forked:
            while waiting.forked and len(live) < count:
                child, prefix = waiting.forked.pop()  # the newest first: fewer prefixes wait than the other way round
                slots.write(len(live), prefix)
                live.append(child)
            first, free = 0, count - len(live)
            if waiting.order and free * REFILL >= count:
                admitted = waiting.take(free)
                first, rows = len(live), [i for same in admitted.values() for i in same]
                logits_BV = _prefill(policy, slots, waiting, admitted, first, decoder)
                live += rows
            else:
                rows = live
                logits_BV = _next(policy, slots, lengths, responses, live, decoder, captured)
            ended, forked = responses.take(logits_BV, rows)
            finished = [first + b for b in ended]
            for b, same in groupby(forked, key=lambda fork: fork[0]):
                children = [child for _, child in same]
                length = lengths[rows[b]]
                prefix = slots.read(first + b, length + len(responses.ids[children[0]]) - 1)
                waiting.forked.extend((child, prefix) for child in children)
                lengths |= dict.fromkeys(children, length)
            if finished:
                _close_ranks(slots, live, finished, lengths, responses)
                done += len(finished)
                if progress:
                    progress(done)
    if not captured:
        slots.release()


def _next(
    policy: Policy,
    slots: Slots,
    lengths: dict[int, int],
    responses: Responses,
    live: Sequence[int],
    decoder: decode.Decoder | None,
    captured: Captured | None,
) -> Tensor:
    """The logits after each live sequence's newest token, [B, V]."""
    last_B1, before = next_inputs(lengths, responses, live)
    if captured is not None:
        return captured.next_logits(last_B1, before)
    length_B = torch.tensor(before, device=policy.device)
    if decoder is not None:
        slots.write_next(length_B, max(before) + 1)
        return decoder.next_logits(last_B1[:, 0])
    return next_logits(policy, slots, last_B1.to(policy.device), length_B, [n + 1 for n in before])


Key = tuple[int, ...]
"""A prompt's ids."""


class _Waiting:
    """The prompts that have not begun, the shortest first and equal ones together; what was computed of the one that was admitted only in
    part; and branches without a slot, with what was computed of their prefixes."""

    def __init__(self, prompts: Sequence[Sequence[int]]) -> None:
        self.keys: list[Key] = [tuple(p) for p in prompts]
        self.order = sorted(range(len(prompts)), key=lambda i: (len(self.keys[i]), self.keys[i]), reverse=True)
        self.begun: tuple[Key, Prefix, Tensor] | None = None
        self.forked: list[tuple[int, Prefix]] = []

    def take(self, count: int) -> dict[Key, list[int]]:
        """The next ones: at most `count`, and no more different ones than a pass should hold."""
        rows: dict[Key, list[int]] = {}
        tokens = 0
        while self.order and count:
            key = self.keys[self.order[-1]]
            tokens += 0 if key in rows else len(key)
            if rows and tokens > PREFILL:
                break
            rows.setdefault(key, []).append(self.order.pop())
            count -= 1
        return rows


def _prefill(
    policy: Policy,
    slots: Slots,
    waiting: _Waiting,
    rows: dict[Key, list[int]],
    first: int,
    decoder: decode.Decoder | None,
) -> Tensor:
    """Read prompts into the slots from `first` on, each different one once and then copied; the logits after each row's, [B, V]."""
    slot = {key: first + sum(map(len, list(rows.values())[:n])) for n, key in enumerate(rows)}
    logits: dict[Key, Tensor] = {}
    if waiting.begun is not None and waiting.begun[0] in rows:
        key, prefix, logits[key] = waiting.begun
        slots.write(slot[key], prefix)
    unread = [key for key in rows if key not in logits]
    if unread:
        lengths = [len(key) for key in unread]
        slots.write_prompts([slot[key] for key in unread], lengths, policy.device)
        ids_N = torch.tensor([i for key in unread for i in key], device=policy.device)
        last_B = torch.tensor(lengths, device=policy.device).cumsum(0) - 1
        if decoder is not None:
            logits_BV = decoder.next_logits(ids_N, last_B)
        else:
            logits_BV = policy.next_logits(
                last_B, input_ids=ids_N[None], position_ids=slots.column_N[None], past_key_values=slots, **packed.boundaries(lengths)
            )  # fmt: skip
        logits |= dict(zip(unread, logits_BV, strict=True))
    for key, same in rows.items():
        if len(same) > 1:
            slots.copy(slot[key], range(slot[key] + 1, slot[key] + len(same)), len(key))
    last = next(reversed(rows))
    goes_on = waiting.order and waiting.keys[waiting.order[-1]] == last
    waiting.begun = (last, slots.read(slot[last], len(last)), logits[last].clone()) if goes_on else None
    return torch.stack([logits[key] for key, same in rows.items() for _ in same])


def _close_ranks(
    slots: Slots, live: list[int], finished: Sequence[int], lengths: dict[int, int], responses: Responses
) -> None:
    """Take the finished rows out; the last ones move into their slots."""
    gone, remaining = set(finished), len(live) - len(finished)
    holes = [b for b in finished if b < remaining]
    movers = [b for b in range(remaining, len(live)) if b not in gone]
    for hole, mover in zip(holes, movers, strict=True):
        slots.copy(mover, [hole], lengths[live[mover]] + len(responses.ids[live[mover]]) - 1)
        live[hole] = live[mover]
    del live[remaining:]


def _trouble(policy: Policy, compiled: bool = False, captured: Captured | None = None) -> str:
    """Why sampling through slots (and by the compiled or captured step) does not find what the policy itself finds of a few short sequences; empty
    when it does."""
    vocabulary = policy.model.get_input_embeddings().weight.size(0)
    rows, longest = (13, 40) if compiled else (3, 5)  # enough for every loop of decode.c to run, whole and in part
    longest = min(longest, (policy.context or longest) - 4)
    lengths = [max(1, longest - 2 * (b % 2) - b // 3) for b in range(rows)]
    prompts = [[(7 * b + 3 * t + 1) % vocabulary for t in range(n)] for b, n in enumerate(lengths)]
    responses = [[(5 * b + 2 * t + 2) % vocabulary for t in range(2 + b % 3)] for b in range(rows)]
    given = Given(responses)
    try:
        _decode(policy, prompts, given, rows - 1, compiled, captured)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, RuntimeError, AttributeError, IndexError, NoCompiler) as error:
        return first_line(error)
    theirs = policy.given_logps(prompts, responses)
    mine_N, theirs_N = (torch.tensor([x for row in found for x in row]) for found in (given.logps, theirs))
    gaps, scale = (mine_N - theirs_N).abs(), float(theirs_N.abs().max())
    if not math.isfinite(scale) or bool((gaps <= packed.TOLERANCE[policy.dtype] * scale).all()):
        return ""  # what is not a number is the policy's trouble, and said when it is sampled from
    way = "decode.c" if compiled else "captured steps" if captured else "slots"
    return f"its log-probabilities through {way} are off by {float(gaps.max()):.2g}"
