"""A policy small enough to enumerate: vocabulary 3 (token 0 ends a response), up to four tokens, float64.

Each prefix has its own three logits, so that nothing is shared and every gradient entry says something. `responses` holds
all 31 responses: those that end with the EOS, and those cut at four tokens.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

VOCABULARY, LIMIT, EOS = 3, 4, 0


def _enumerate() -> list[tuple[int, ...]]:
    found = []
    for length in range(1, LIMIT + 1):
        for y in itertools.product(range(VOCABULARY), repeat=length):
            ended = y[-1] == EOS
            if EOS not in y[:-1] and (ended or length == LIMIT):
                found.append(y)
    return found


RESPONSES = _enumerate()
PREFIXES = sorted({y[:t] for y in RESPONSES for t in range(len(y))})
INDEX = {prefix: i for i, prefix in enumerate(PREFIXES)}
MASK_ST = torch.tensor([[t < len(y) for t in range(LIMIT)] for y in RESPONSES])


def parameters(seed: int) -> Tensor:
    """Random logits, [prefixes, vocabulary]."""
    return torch.randn(len(PREFIXES), VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logps(theta: Tensor, temperature: float = 1.0) -> Tensor:
    """log π(y_t | prefix) for every response, [31, T]; NaN beyond each response, as hostile padding."""
    table = torch.log_softmax(theta / temperature, -1)
    rows = []
    for y in RESPONSES:
        row = [table[INDEX[y[:t]], y[t]] for t in range(len(y))]
        rows.append(torch.stack(row + [torch.full((), float("nan"), dtype=theta.dtype)] * (LIMIT - len(y))))
    return torch.stack(rows)


def total(logp_ST: Tensor) -> Tensor:
    """log π(y) of each response."""
    return torch.where(MASK_ST, logp_ST, torch.zeros_like(logp_ST)).sum(1)


def probabilities(theta: Tensor, temperature: float = 1.0) -> Tensor:
    """π(y) of each response; sums to 1."""
    return total(logps(theta, temperature)).exp()


def rewards(seed: int) -> Tensor:
    """A reward in {0, 1} for each response."""
    return (
        torch.rand(len(RESPONSES), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) < 0.4
    ).double()


def gradient(f: Tensor, theta: Tensor) -> Tensor:
    """∂f/∂θ, flattened."""
    return torch.autograd.grad(f, theta)[0].flatten()


def true_gradient(theta: Tensor, reward_S: Tensor) -> Tensor:
    """∇J, J = Σ_y π(y) R(y), by differentiating the enumeration itself."""
    theta = theta.detach().requires_grad_()
    return gradient((probabilities(theta) * reward_S).sum(), theta)


def scores(theta: Tensor) -> Tensor:
    """∇_θ log π(y_t | prefix) by hand (onehot − softmax at the prefix's row), [31, T, θ]; zero beyond a response."""
    softmax = torch.softmax(theta.detach(), -1)
    out = torch.zeros(len(RESPONSES), LIMIT, *theta.shape, dtype=theta.dtype)
    for s, y in enumerate(RESPONSES):
        for t, token in enumerate(y):
            row = INDEX[y[:t]]
            out[s, t, row] = -softmax[row]
            out[s, t, row, token] += 1
    return out.flatten(2)
