"""What a control policy computes with: a small MLP, the table of observed and done steps, and the module that scores
them.

A step of an episode is a token: its id is a row of the table.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..environments.control import ControlTask
from .actions import Actions
from .scorer import ActionLogps

PROBE = 8
"""Rows of the table that hold fixed observations, for the engine's canary."""
KEEP = 4
"""Calls of the engine whose steps are held."""


class States:
    """Observations and actions by id. Ids only grow; those of the last `KEEP` blocks are held, and the probe's
    always."""

    def __init__(self, observations: int, actions: int) -> None:
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(PROBE, observations, generator=generator), torch.zeros(PROBE, actions)
        self.blocks: list[tuple[Tensor, Tensor]] = [probe]
        self.next, self.outcomes = PROBE, dict[int, tuple[bool, int]]()
        self._table = probe

    def add(self, observation_ND: Tensor, action_NA: Tensor, ends: Sequence[tuple[int, bool]]) -> int:
        """Rows for the steps of whole episodes, one after the other; `ends` are their lengths and outcomes. Returns
        the first id."""
        self.blocks = [self.blocks[0], *self.blocks[1:][-KEEP + 1 :], (observation_ND, action_NA)]
        first = self.next
        self.next += len(observation_ND)
        self._table = torch.cat([b[0] for b in self.blocks]), torch.cat([b[1] for b in self.blocks])
        self.outcomes = {i: o for i, o in self.outcomes.items() if i >= self.oldest}
        at = first
        for length, success in ends:
            self.outcomes[at] = (success, length)
            at += length
        return first

    @property
    def oldest(self) -> int:
        """The first id that is held, the probe's apart."""
        return self.next - (len(self._table[0]) - PROBE)

    def rows(self, id_N: Tensor) -> tuple[Tensor, Tensor]:
        """Observations and actions, [N, D] and [N, A]. Raises IndexError for ids that are no longer held."""
        at_N = torch.where(id_N < PROBE, id_N, id_N - self.oldest + PROBE)
        if bool(((id_N >= PROBE) & (id_N < self.oldest)).any()):
            raise IndexError("steps of an episode that is no longer held")
        return self._table[0][at_N], self._table[1][at_N]


class MLP(nn.Module):
    """Tanh layers; the last one's gain is small, so that a fresh policy is nearly uniform."""

    def __init__(self, inputs: int, outputs: int, hidden: int, layers: int, spread: int = 0) -> None:
        super().__init__()
        sizes = [inputs, *[hidden] * layers]
        self.body = nn.Sequential(*(m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh())))
        self.head = nn.Linear(hidden, outputs)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        self.log_std: Any = nn.Parameter(torch.full((spread,), -0.5)) if spread else None

    def forward(self, x: Tensor) -> Tensor:
        """Logits, means, or a value's logit."""
        return self.head(self.body(x))


class ControlScorer(nn.Module):
    """See `Scorer`: the module whose forward pass is all of `ControlPolicy.logps`."""

    packs, unpacked_why = True, ""

    def __init__(self, model: MLP, environment: ControlTask, states: States) -> None:
        super().__init__()
        self.model, self.environment, self.states = model, environment, states
        self.eval()

    def forward(self, ids_BL: Tensor, action_BL: Tensor, temperature: float) -> ActionLogps:
        """See `Policy.logps`; the ids of actions are rows of `states`."""
        actions = Actions.of(action_BL)
        observation_ND, action_NA = self.states.rows(ids_BL[actions.row_N, actions.position_N])
        logp_N, entropy_N = self.action_logps(observation_ND, action_NA, temperature)
        return ActionLogps(actions.spread(logp_N), actions.spread(entropy_N), actions.mask_BT)

    def action_logps(self, observation_ND: Tensor, action_NA: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """log π of given actions, [N], and the entropies, [N] (without gradient). A Gaussian's variance is multiplied
        by the temperature."""
        out = self.model(observation_ND)
        if self.environment.actions:
            logp_NK = torch.log_softmax(out / temperature, -1)
            entropy_N = -(logp_NK.exp() * logp_NK).sum(-1)
            return logp_NK.gather(1, action_NA.long())[:, 0], entropy_N.detach()
        log_std = self.model.log_std + 0.5 * math.log(temperature)
        z = (action_NA - out) / log_std.exp()
        logp_N = (-0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)
        entropy = (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum().detach()
        return logp_N, entropy.expand_as(logp_N)
