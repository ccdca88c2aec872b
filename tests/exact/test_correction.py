"""The correction from the engine's distribution to the learner's: its level, its cap, and what length does to it."""

from __future__ import annotations

import math

import pytest
import torch

from sppo.objective.diagnostics import effective_sample_size
from sppo.objective.loss import Scored, capped, mismatch, policy_loss
from sppo.recipe.config import Config

from .tabular import MASK_ST, logps, parameters, probabilities, rewards, true_gradient


def objective(**keys):
    return Config.load(None, {f"objective.{k}": v for k, v in keys.items()}).settled()[0].objective


def figures(spread: float, tokens: int, number: int, **keys) -> tuple[float, float]:
    """Mean weight and ESS of responses whose tokens are off by independent normal noise, e to the power of which has mean 1."""
    generator = torch.Generator().manual_seed(0)
    old_BT = torch.randn(number, tokens, generator=generator) * spread - spread**2 / 2
    o = objective(**keys)
    weight = capped(mismatch(old_BT, torch.zeros_like(old_BT), torch.ones_like(old_BT), o), o).flatten()
    return float(weight.exp().mean()), effective_sample_size(weight)


@pytest.mark.parametrize(("spread", "tokens", "mean", "ess"), [(0.02, 2048, 0.84, 0.67), (0.03, 8192, 0.24, 0.18)])
def test_a_whole_responses_weight_does_not_survive_length_and_a_tokens_does(spread, tokens, mean, ess):
    whole = figures(spread, tokens, 2000, ratio="sequence", engine_correction_level="sequence")
    assert whole == pytest.approx((mean, ess), abs=0.03)
    each = figures(spread, tokens, 100, ratio="sequence")  # auto, at rollout.max_tokens = 256
    assert each == pytest.approx((1.0, 1.0), abs=2e-3)
    scaled = figures(spread, tokens, 2000, ratio="family", engine_correction_level="sequence")
    assert scaled == pytest.approx((1.0, 1.0), abs=0.05)


LEVELS = {  # weights of 2 and 0.5, together 1; and of 2 and 2, together 4; the cap is 1.5
    ("token", "truncate"): ([1.5, 0.5], [1.5, 1.5]),
    ("token", "mask"): ([0.0, 0.5], [0.0, 0.0]),
    ("sequence", "truncate"): ([1.0, 1.0], [1.5, 1.5]),
    ("sequence", "mask"): ([1.0, 1.0], [0.0, 0.0]),
}


@pytest.mark.parametrize("surrogate", ["clip", "cispo", "plain"])
@pytest.mark.parametrize("ratio", ["sequence", "token"])
@pytest.mark.parametrize(("level", "beyond"), LEVELS)
def test_each_level_by_hand(level, beyond, ratio, surrogate):
    """Two responses of two tokens, advantages 0.6 and −0.4, the policy a step further (ratios within the clip): the gradient of each token is
    its weight times the ratio times the advantage; the denominator stays, whatever is masked."""
    old = torch.log(torch.tensor([[0.4, 0.2], [0.4, 0.2]], dtype=torch.float64))
    behaviour = torch.log(torch.tensor([[0.2, 0.4], [0.2, 0.1]], dtype=torch.float64))
    logp = (old + torch.tensor([[0.03, 0.02], [-0.04, 0.01]], dtype=torch.float64)).requires_grad_(True)
    keys = {"engine_correction": 1.5, "engine_correction_level": level, "engine_correction_beyond": beyond}
    o = objective(ratio=ratio, surrogate=surrogate, **keys)
    mask = torch.ones(2, 2, dtype=torch.bool)
    advantage = torch.tensor([0.6, -0.4], dtype=torch.float64)
    found = policy_loss(Scored(logp, old, behaviour, mask), advantage, o, sequences=2.0, divisor=2.0)
    found.value.backward()
    moved = (logp - old).detach()
    ratios = moved.exp() if ratio == "token" else moved.sum(1, keepdim=True).exp().expand(2, 2)
    weight = torch.tensor(LEVELS[level, beyond], dtype=torch.float64)
    expected = -weight * (1.0 if surrogate == "plain" else ratios) * advantage[:, None] / 2
    assert torch.allclose(logp.grad, expected, atol=1e-12)
    assert found.correction is not None
    weights = weight[:, 0] if level == "sequence" else weight.flatten()
    assert torch.allclose(found.correction.exp(), weights)
    assert torch.allclose(found.log_ratio.detach(), moved if ratio == "token" else moved.sum(1))


def expected_gradient(theta, engine, reward_S, **keys):
    """Over all responses as the engine samples them."""
    leaf = theta.clone().requires_grad_(True)
    logp = logps(leaf)
    x = Scored(logp, logp.detach(), logps(engine), MASK_ST)
    advantage_S = probabilities(engine) * (reward_S - 0.3)
    policy_loss(x, advantage_S, objective(engine_correction=1e9, **keys), sequences=1.0, divisor=1.0).value.backward()
    return -leaf.grad.flatten()


@pytest.mark.parametrize("ratio", ["sequence", "token"])
@pytest.mark.parametrize("seed", range(3))
def test_the_whole_weight_is_exact_and_the_tokens_is_not(seed, ratio):
    theta, engine, reward_S = parameters(seed), parameters(seed) + 0.2 * parameters(seed + 50), rewards(seed)
    truth = true_gradient(theta, reward_S)
    whole = expected_gradient(theta, engine, reward_S, ratio=ratio, engine_correction_level="sequence")
    assert float((whole - truth).abs().max()) < 1e-10
    token = expected_gradient(theta, engine, reward_S, ratio=ratio, engine_correction_level="token")
    assert float((token - truth).abs().max()) > 1e-4
    same = expected_gradient(theta, theta, reward_S, ratio=ratio, engine_correction_level="token")
    assert float((same - truth).abs().max()) < 1e-10


def test_what_is_masked_everywhere_leaves_nothing():
    o = objective(engine_correction_beyond="mask", engine_correction_level="sequence", ratio="sequence")
    weight = capped(torch.full((4,), math.log(3.0)), o)
    assert weight.exp().tolist() == [0.0] * 4
    assert effective_sample_size(weight) == 0.0


def test_nothing_beyond_a_response_reaches_a_weighted_gradient():
    """Padding may be anything, NaN included."""
    logp = torch.tensor([[-1.0, float("nan")]], requires_grad=True)
    mask = torch.tensor([[True, False]])
    behaviour = torch.tensor([[-1.5, float("nan")]])
    o = objective(ratio="sequence", engine_correction_level="token")
    x = Scored(logp, logp.detach(), behaviour, mask)
    policy_loss(x, torch.tensor([1.0]), o, sequences=1.0, divisor=1.0).value.backward()
    assert logp.grad.tolist() == [[pytest.approx(-math.exp(0.5)), 0.0]]
