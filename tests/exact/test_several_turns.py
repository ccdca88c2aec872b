"""A conversation of two turns by enumeration: what the policy wrote is one action, and what the environment says is part of the world.

The model is real, with four tokens. A turn has up to two of them or ends with the EOS; then the environment says two tokens, one of two answers at
random, which depend on the turn; then comes a second turn. A turn that is cut ends the trajectory.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sppo.learning.batch import pack
from sppo.models.policy import Policy
from sppo.models.tiny import character_tokenizer
from sppo.objective.ratio import log_ratio
from sppo.objective.surrogate import surrogate
from sppo.types import Rollout, Task, Verdict

from .test_reference import doubled

VOCABULARY, EOS, LIMIT = 4, 1, 2
PROMPT = [2, 3]
TASK = Task("t", "?")


def turns():
    """Every turn, and whether it ended by itself."""
    for length in range(1, LIMIT + 1):
        for y in itertools.product(range(VOCABULARY), repeat=length):
            if EOS not in y[:-1] and (y[-1] == EOS or length == LIMIT):
                yield list(y), y[-1] == EOS


def answers(turn):
    """What the environment may say, with probabilities that are none of the policy's."""
    return [([sum(turn) % VOCABULARY, 0], 0.3), ([3, len(turn)], 0.7)]


def trajectories():
    """Ids, spans of the policy, and the environment's share of the probability."""
    for first, ended in turns():
        ids = PROMPT + first
        spans = [(len(PROMPT), len(ids))]
        if not ended:
            yield ids, spans, 1.0
            continue
        for said, chance in answers(first):
            for second, _ in turns():
                start = len(ids) + len(said)
                yield ids + said + second, [*spans, (start, start + len(second))], chance


@pytest.fixture
def policy() -> Policy:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=32, eos_token_id=EOS, pad_token_id=0, bos_token_id=None, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    return Policy(doubled(LlamaForCausalLM(config).double()), character_tokenizer())


def true_gradient(policy, all_of_them, reward_S):
    """∇ Σ_τ P(τ) R(τ), each trajectory alone through the model, its probability a product over the policy's own tokens."""
    total = torch.zeros((), dtype=torch.float64)
    for (ids, spans, chance), reward in zip(all_of_them, reward_S, strict=True):
        logp_LV = policy.model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
        own = sum(logp_LV[t - 1, ids[t]] for start, end in spans for t in range(start, end))
        total = total + chance * own.exp() * reward
    return torch.autograd.grad(total, list(policy.model.parameters()))


@pytest.mark.parametrize("counted", ["what the policy wrote", "what the environment said, too"])
def test_the_expectation_of_the_estimator_is_the_gradient(policy, counted):
    all_of_them = list(trajectories())
    generator = torch.Generator().manual_seed(1)
    reward_S = torch.rand(len(all_of_them), generator=generator, dtype=torch.float64)
    rollouts = []
    for ids, spans, _ in all_of_them:
        if counted != "what the policy wrote" and len(spans) == 2:
            spans = [(spans[0][0], spans[1][1])]
        length = sum(end - start for start, end in spans)
        rollouts.append(Rollout(TASK, ids, spans, [0.0] * length, "stop", "", verdict=Verdict(0.0, "wrong")))
    batch = pack(rollouts, policy.pad_id)
    made = policy.logps(batch.ids_BL, batch.action_BL, 1.0)
    log_r = log_ratio(made.logp_BT, made.logp_BT.detach(), made.mask_BT, "sequence")
    value_S, _ = surrogate(log_r, reward_S - 0.37, clip=None)
    chance_S = torch.tensor([chance for *_, chance in all_of_them], dtype=torch.float64)
    with torch.no_grad():
        probability_S = chance_S * torch.stack(
            [
                sum(
                    policy.model(torch.tensor([ids])).logits[0].log_softmax(-1)[t - 1, ids[t]]
                    for s, e in spans
                    for t in range(s, e)
                ).exp()
                for ids, spans, _ in all_of_them
            ]
        )
    assert float(probability_S.sum()) == pytest.approx(1.0, abs=1e-12)
    policy.model.zero_grad()
    (probability_S * value_S).sum().backward()
    found = [p.grad for p in policy.model.parameters()]
    error = max(
        float((a - b).abs().max()) for a, b in zip(found, true_gradient(policy, all_of_them, reward_S), strict=True)
    )
    if counted == "what the policy wrote":
        assert error < 1e-10
    else:
        assert error > 1e-3
