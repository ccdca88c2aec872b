"""The local engine: continuous batching of any transformers decoder, in this process, on the learner's own weights.

A finished sequence leaves its slot and a waiting one takes it, so that every product is of live tokens alone. Prompts are
prefilled packed, and a prompt that is sampled several times is computed once. A model that keeps more than plain keys and
values, or cannot be packed, is sampled by the plain loop (rollout/plain.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..models import llama, packed
from ..models.narrow import narrow_products
from ..models.policy import Policy
from .engine import Sample, Sampling
from .plain import PlainEngine
from .responses import Drawn, Given, Responses, next_inputs
from .slots import Prefix, Slots

PREFILL = 4096
"""Prompt tokens a pass, about: memory only."""
REFILL = 16
"""Waiting prompts are admitted once a sixteenth of the slots is free: a pass for each one alone would cost more than the wait."""


def build(policy: Policy) -> LocalEngine:
    """The engine over a policy of this process; sampling sees the learner's weights directly."""
    return LocalEngine(policy)


class LocalEngine:
    """See `rollout.engine.Engine`."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.lean = llama.steps(policy.model) and _slots_hold(policy, lean=True)
        self.plain = None if self.lean or (policy.packs and _slots_hold(policy, lean=False)) else PlainEngine(policy)

    def sync(self, policy: Policy) -> None:
        """Hold this policy's weights (the very same tensors, so there is nothing to copy)."""
        self.policy = policy
        if self.plain is not None:
            self.plain.sync(policy)

    def holds(self, policy: Policy) -> bool:
        """Sampling reads the policy's own tensors."""
        return self.policy is policy

    def close(self) -> None:
        """Nothing to let go of."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        sampling: Sampling,
        progress: Callable[[int], None] | None = None,
    ) -> list[Sample]:
        """Sample one response a prompt; see the protocol."""
        if any(len(p) == 0 for p in prompts):
            raise ValueError("a prompt has no tokens")
        if self.plain is not None:
            return self.plain.generate(prompts, seeds, sampling, progress)
        drawn = Drawn(self.policy, seeds, sampling)
        _decode(self.policy, prompts, drawn, sampling.batch, self.lean, progress)
        return drawn.samples()

    def score(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[list[float]]:
        """See the protocol: the decoding loop, with the given tokens in place of drawn ones."""
        if self.plain is not None:
            return self.plain.score(prompts, responses)
        given = Given(responses)
        _decode(self.policy, prompts, given, len(prompts), self.lean)
        return given.logps


@torch.inference_mode()
def _decode(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    responses: Responses,
    batch: int,
    lean: bool,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Let every response grow to its end. `live[b]` is the prompt whose sequence is in slot b."""
    slots = Slots(policy.model.config, min(batch, len(prompts)), max(map(len, prompts)) + responses.longest)
    waiting = _Waiting(prompts)
    live: list[int] = []
    done = 0
    with narrow_products(policy.model):
        while live or waiting.order:
            free = slots.count - len(live)
            if waiting.order and free * REFILL >= slots.count:
                rows = waiting.take(free)
                logits_BV = _prefill(policy, slots, waiting, rows, first=len(live))
                finished = [len(live) + b for b in responses.take(logits_BV, rows)]
                live += rows
            else:
                finished = responses.take(_next(policy, slots, prompts, responses, live, lean), live)
            if finished:
                _close_ranks(slots, live, finished)
                done += len(finished)
                if progress:
                    progress(done)


def _next(
    policy: Policy,
    slots: Slots,
    prompts: Sequence[Sequence[int]],
    responses: Responses,
    live: Sequence[int],
    lean: bool,
) -> Tensor:
    """The logits after each live sequence's newest token, [B, V]."""
    last_B1, before = next_inputs(prompts, responses, live)
    columns = max(before) + 1
    length_B = torch.tensor(before, device=policy.device)
    if lean:
        return llama.next_logits(policy.model, slots, last_B1[:, 0], length_B, columns)
    slots.write_next(length_B, columns)
    beyond_BS = torch.arange(columns, device=policy.device) > length_B[:, None]
    mask_BS = torch.zeros(beyond_BS.shape, dtype=policy.dtype, device=policy.device).masked_fill_(beyond_BS, -torch.inf)
    return policy.next_logits(
        input_ids=last_B1.to(policy.device), position_ids=length_B[:, None], attention_mask=mask_BS[:, None, None],
        past_key_values=slots, **packed.slot_boundaries([n + 1 for n in before]),
    )  # fmt: skip


class _Waiting:
    """The prompts that have not begun, the shortest first and equal ones together; and what was computed of the one that was
    admitted only in part."""

    def __init__(self, prompts: Sequence[Sequence[int]]) -> None:
        self.keys = [tuple(p) for p in prompts]
        self.order = sorted(range(len(prompts)), key=lambda i: (len(self.keys[i]), self.keys[i]), reverse=True)
        self.begun: tuple[tuple[int, ...], Prefix, Tensor] | None = None

    def take(self, count: int) -> list[int]:
        """The next ones: at most `count`, and no more different ones than a pass should hold."""
        rows: list[int] = []
        tokens = 0
        while self.order and len(rows) < count:
            key = self.keys[self.order[-1]]
            tokens += 0 if rows and key == self.keys[rows[-1]] else len(key)
            if rows and tokens > PREFILL:
                break
            rows.append(self.order.pop())
        return rows


def _prefill(policy: Policy, slots: Slots, waiting: _Waiting, rows: Sequence[int], first: int) -> Tensor:
    """Read the prompts of `rows` into the slots from `first` on, each different prompt once; the logits after them, [B, V]."""
    keys = [waiting.keys[i] for i in rows]
    leader_B = [b if b == 0 or keys[b] != keys[b - 1] else None for b in range(len(keys))]
    leaders = [b for b in leader_B if b is not None]
    logits_B: list[Tensor | None] = [None] * len(rows)
    if waiting.begun is not None and waiting.begun[0] == keys[0]:
        slots.write(first, waiting.begun[1])
        logits_B[0] = waiting.begun[2]
        leaders = leaders[1:]
    if leaders:
        lengths = [len(keys[b]) for b in leaders]
        slots.write_prompts([first + b for b in leaders], lengths, policy.device)
        logits_NV = policy.next_logits(
            torch.tensor(lengths, device=policy.device).cumsum(0) - 1,
            input_ids=torch.tensor([i for b in leaders for i in keys[b]], device=policy.device)[None],
            position_ids=torch.cat([torch.arange(n) for n in lengths]).to(policy.device)[None],
            past_key_values=slots, **packed.boundaries(lengths),
        )  # fmt: skip
        for b, logits_V in zip(leaders, logits_NV, strict=True):
            logits_B[b] = logits_V
    for b in range(1, len(rows)):
        if logits_B[b] is None:
            logits_B[b] = logits_B[b - 1]
            slots.copy([first + b - 1], [first + b], len(keys[b]))
    goes_on = waiting.order and waiting.keys[waiting.order[-1]] == keys[-1]
    last = logits_B[-1]
    waiting.begun = (
        (keys[-1], slots.read(first + len(rows) - 1, len(keys[-1])), last) if goes_on and last is not None else None
    )
    return torch.stack([x for x in logits_B if x is not None])


def _close_ranks(slots: Slots, live: list[int], finished: Sequence[int]) -> None:
    """Take the finished rows out; the last ones move into their slots."""
    gone, remaining = set(finished), len(live) - len(finished)
    holes = [b for b in finished if b < remaining]
    movers = [b for b in range(remaining, len(live)) if b not in gone]
    if holes:
        slots.copy(movers, holes, slots.columns)
    for hole, mover in zip(holes, movers, strict=True):
        live[hole] = live[mover]
    del live[remaining:]


def _slots_hold(policy: Policy, lean: bool) -> bool:
    """Whether sampling through slots (and by the lean step) finds what the policy itself finds of a few short sequences."""
    vocabulary = policy.model.get_input_embeddings().weight.size(0)
    prompts = [[(7 * b + 3 * t + 1) % vocabulary for t in range(n)] for b, n in enumerate((5, 3, 5))]
    responses = [[(5 * b + 2 * t + 2) % vocabulary for t in range(n)] for b, n in enumerate((2, 4, 3))]
    given = Given(responses)
    try:
        _decode(policy, prompts, given, 2, lean)
    except (ValueError, TypeError, RuntimeError, AttributeError, IndexError):
        return False
    theirs = policy.given_logps(prompts, responses)
    scale = max(abs(x) for row in theirs for x in row)
    return all(
        abs(a - b) <= packed.TOLERANCE[policy.dtype] * scale
        for mine, other in zip(given.logps, theirs, strict=True)
        for a, b in zip(mine, other, strict=True)
    )
