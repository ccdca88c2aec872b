"""Episodes of a control policy, many side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ..environments.base import Reply
from ..environments.control import ControlTask
from ..environments.control import episode as begun
from .mlp_scorer import ControlScorer


@dataclass
class Episode:
    """One episode: what was observed, done, and how likely that was."""

    observations: list[np.ndarray] = field(default_factory=list)
    actions: list[np.ndarray] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    success: bool = False


_held: dict[str, list[ControlTask]] = {}
"""Made once per process: a physics engine takes its time."""


@torch.inference_mode()
def episodes(
    scorer: ControlScorer, starts: Sequence[int], seeds: Sequence[int], horizon: int, temperature: float
) -> list[Episode]:
    """One episode from each start, all its randomness from its seed; temperature 0 takes the likeliest action."""
    held = _held.setdefault(scorer.environment.name, [])
    while len(held) < len(starts):
        held.append(ControlTask(scorer.environment.name))
    found, live = [Episode() for _ in starts], list(range(len(starts)))
    now = [held[i].reset(begun(scorer.environment.name, start)).values for i, start in enumerate(starts)]
    noise = [_noise(scorer, seed, horizon) for seed in seeds]
    for t in range(horizon):
        observed = torch.from_numpy(np.stack([now[i] for i in live]))
        action_NA = _act(scorer, observed, torch.from_numpy(np.stack([noise[i][t] for i in live])), temperature)
        logp_N = scorer.action_logps(observed, action_NA, temperature or 1.0)[0].tolist()
        going = []
        for n, (i, action) in enumerate(zip(live, action_NA.numpy(), strict=True)):
            episode = found[i]
            episode.observations.append(now[i])
            episode.actions.append(action)
            episode.logps.append(logp_N[n])
            seen = held[i].step(Reply(action=action))
            now[i] = seen.values
            if seen.done or t + 1 == horizon:
                episode.success = held[i].success()
            else:
                going.append(i)
        live = going
        if not live:
            break
    return found


def _noise(scorer: ControlScorer, seed: int, horizon: int) -> np.ndarray:
    rng = np.random.Generator(np.random.Philox(key=seed))
    draw = rng.random if scorer.environment.actions else rng.standard_normal
    return draw((horizon, scorer.environment.size), dtype=np.float32)


def _act(scorer: ControlScorer, observed: torch.Tensor, noise_NA: torch.Tensor, temperature: float) -> torch.Tensor:
    out = scorer.model(observed)
    if not scorer.environment.actions:
        return out + noise_NA * scorer.model.log_std.exp() * temperature**0.5
    if temperature == 0:
        return out.argmax(-1, keepdim=True).float()
    # the inverse of the distribution function; rounding must not lead past the last action
    beyond = torch.softmax(out / temperature, -1).cumsum(-1) < noise_NA
    return beyond.sum(-1, keepdim=True).clamp(max=scorer.environment.actions - 1).float()
