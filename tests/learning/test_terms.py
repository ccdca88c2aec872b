"""KL to the start and the entropy bonus through the learner, against loops over responses and tokens."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from sppo.errors import RecipeError
from sppo.learning.batch import Share, pack
from sppo.learning.learner import Learner
from sppo.learning.update_stats import Tally
from sppo.recipe.config import Config
from sppo.rewards.loading import load_reward
from sppo.rollout.collect import collect
from sppo.rollout.engine import Sampling
from sppo.rollout.local import LocalEngine
from sppo.rollout.sampler import Cut
from sppo.tasks.loading import load_tasks

from ..conftest import graded, small_config, small_critic, small_policy, small_rollouts

BETA = 0.3


def judged(rollouts):
    return [graded(r, float(i % 2)) for i, r in enumerate(rollouts)]


def a_batch(policy, n=8, *, cut=None, max_tokens=12):
    source = load_tasks("chain:steps=1-2")
    sampling = Sampling(max_tokens, cut=cut or Cut())
    tasks = [source[i] for i in range(n)]
    rollouts = collect(LocalEngine(policy), policy, load_reward("answer"), tasks, sampling, seed=("t",))
    return pack(judged(rollouts), policy.pad_id)


def a_learner(policy, reference, **changes):
    config = small_config(**{"rollout__prompts": 8, "objective__scale": "none", "training__critic_lr": 1e-2} | changes)
    learner = Learner(policy, small_critic() if config.critic_reads else None, reference, config.with_rates(1, 1))
    if learner.credit.critic is not None:
        torch.manual_seed(3)
        torch.nn.init.normal_(learner.credit.critic.head.weight)
    return learner


def table(policy, rollout):
    """log π(· | x, y_<t) before each token of a response, [T, V]."""
    ids, first = [*rollout.prompt_ids, *rollout.response_ids], len(rollout.prompt_ids)
    return torch.log_softmax(policy.model(torch.tensor([ids])).logits[0, first - 1 : -1].double(), -1)


def logps(policy, rollout):
    return table(policy, rollout).gather(1, torch.tensor(rollout.response_ids)[:, None])[:, 0]


# -- in the reward -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("cut", [None, Cut(top_k=4)])
@pytest.mark.parametrize("decay", [0.95, 1.0, 0.5])
@pytest.mark.parametrize("value_loss", ["cross-entropy", "squared"])
def test_ppos_kl_against_a_loop(cut, decay, value_loss):
    """β·(log π − log π_ref) of each token under the whole softmax. A chance of success does not hold it, so each token is charged with all that
    follows, and the target is correctness. A value that may be any number does: it is a reward among GAE's, and in the target."""
    policy, reference = small_policy(), small_policy(seed=5)
    batch = a_batch(policy, cut=cut)
    changes = {"objective__algorithm": "ppo", "objective__kl": BETA, "objective__gae_lambda": decay}
    learner = a_learner(policy, reference, objective__value_loss=value_loss, **changes)
    found, _, _ = learner.advantage(batch)
    values = learner.credit.values(batch)
    for b, r in enumerate(batch.rollouts):
        length = len(r.response_ids)
        v = [*values[b, :length].tolist(), 0.0]
        cost = [
            BETA * (new - ref) for new, ref in zip(logps(policy, r).tolist(), logps(reference, r).tolist(), strict=True)
        ]
        for t in range(length):
            alone = charge = 0.0
            for k in range(t, length):
                reward = r.verdict.score if k == length - 1 else 0.0
                alone += decay ** (k - t) * (reward + v[k + 1] - v[k])
                charge += cost[k] * (decay ** (k - t) if value_loss == "squared" else 1.0)
            assert float(found[b, t]) == pytest.approx(alone - charge, abs=1e-4)
            target = alone - charge + v[t] if value_loss == "squared" else min(max(alone + v[t], 0.0), 1.0)
            assert float(learner.credit.target_BT[b, t]) == pytest.approx(target, abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("value_loss", ["cross-entropy", "squared"])
def test_the_first_of_many_tokens_is_charged_for_those_that_follow(value_loss):
    """With λ = .95 a charge at the last of 200 tokens alone would reach the first one as .95^199 = 4e-5 of itself. Charged at each token, the next
    twenty or so reach it directly, and the rest through the value of the state they lead to; without such a value all of them."""
    policy, reference = small_policy(), small_policy(seed=5)
    batch = a_batch(policy, 4, max_tokens=200)
    assert int(batch.response_len_B.max()) > 100
    changes = {"objective__algorithm": "ppo", "objective__value_loss": value_loss}
    with_kl, without = (
        a_learner(policy, reference, objective__kl=kl, **changes).advantage(batch)[0] for kl in (BETA, 0.0)
    )
    for b, r in enumerate(batch.rollouts):
        cost = BETA * (logps(policy, r) - logps(reference, r))
        reaches = 0.95 ** torch.arange(len(cost)) if value_loss == "squared" else torch.ones(len(cost))
        assert float(without[b, 0] - with_kl[b, 0]) == pytest.approx(float((reaches * cost).sum()), rel=1e-3, abs=1e-3)
    assert float((without - with_kl)[:, 0].abs().max()) > 0.1


REWARDED = [
    {},
    {"objective__algorithm": "sppo-centred"},
    {"objective__algorithm": "reinforce"},
    {"objective__algorithm": "ppo"},
    {"objective__algorithm": "ppo", "objective__value_loss": "cross-entropy"},
    {"objective__algorithm": "sppo-hybrid"},
]


@pytest.mark.parametrize("changes", REWARDED)
def test_at_the_start_there_is_no_kl_to_it_whatever_a_cut_takes(changes):
    """Of the whole softmax: under the distribution that is left of it, each token's log π would be larger by the mass that was cut."""
    policy = small_policy()
    batch = a_batch(policy, cut=Cut(top_k=4))
    assert float(batch.kept_BT.sum()) < -1.0
    shaped, plain = (
        a_learner(policy, policy.as_reference(), objective__kl=kl, **changes).advantage(batch)[0] for kl in (BETA, 0.0)
    )
    assert torch.allclose(shaped, plain, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("changes", REWARDED)
def test_what_is_charged_to_whom(changes):
    """A whole response's KL where it has one advantage, and each token's from it on where tokens have their own."""
    policy, reference = small_policy(), small_policy(seed=5)
    batch = a_batch(policy)
    shaped, plain = (
        a_learner(policy, reference, objective__kl=kl, **changes).advantage(batch)[0] for kl in (BETA, 0.0)
    )
    costs = [BETA * (logps(policy, r) - logps(reference, r)) for r in batch.rollouts]
    whole = torch.stack([c.sum() for c in costs]).float()
    if shaped.dim() == 1:
        # batch means, and what a critic missed, are of the others' shaped rewards
        of_others = changes.get("objective__algorithm") in ("reinforce", "sppo-centred")
        expected = whole - (whole.sum() - whole) / 7 if of_others else whole
        assert torch.allclose(plain - shaped, expected, atol=1e-4)
        return
    decay = 0.95 if changes == {"objective__algorithm": "ppo"} else 1.0
    for b, cost in enumerate(costs):
        for t in range(len(cost)):
            expected = sum(decay ** (k - t) * float(cost[k]) for k in range(t, len(cost)))
            assert float(plain[b, t] - shaped[b, t]) == pytest.approx(expected, abs=1e-4)


# -- in the loss ---------------------------------------------------------------------------------------------------------


def gradients(policy):
    found = torch.cat([p.grad.flatten() for p in policy.model.parameters()])
    policy.model.zero_grad()
    return found


def ours(policy, reference, batch, **changes):
    """Loss and gradient of the learner's own path without an advantage: KL and bonus alone, in several micro-batches."""
    learner = a_learner(policy, reference, training__micro_tokens=150, objective__engine_correction=0, **changes)
    parts = [part for each in learner._plan(batch, torch.arange(len(batch)), 0, 0) for part in each]
    minibatch = Share(torch.cat(parts), parts)
    assert len(minibatch) > 1
    reference_BT, tally = learner._all_logps(reference, batch), Tally()
    zero_B = torch.zeros(len(batch))
    learner._policy_gradient(batch, zero_B, minibatch, batch.behaviour_logp_BT.clone(), reference_BT, 1, tally)
    return sum(tally.values["loss/1"]), gradients(policy)


def kl(o, d, log_r):
    """Of a response or a token: d to the reference, log_r to the policy that sampled."""
    if o.kl_form == "k2":
        return 0.5 * d**2
    k3 = torch.exp(-d) - 1 + d
    return k3 * log_r.exp() if o.kl_form == "k3-weighted" else k3


def by_hand(policy, reference, batch, o, max_tokens=12):
    """The same, response by response and token by token."""
    n, tokens = len(batch), int(batch.response_len_B.sum())
    value, loss = 0.0, 0.0
    for r in batch.rollouts:
        length = len(r.response_ids)
        kappa = {"sequence": 0.0, "geometric": 1.0, "family": o.kappa}.get(o.ratio)
        share = (
            1 / (n * length**kappa)
            if kappa is not None
            else {
                "auto": 1 / tokens,
                "tokens": 1 / tokens,
                "responses": 1 / (n * length),
                "constant": 1 / (n * max_tokens),
            }[o.average]
        )
        rows, new = table(policy, r), logps(policy, r)
        d = new - logps(reference, r).detach()
        for t in range(length):
            if o.kl_of_tokens:
                loss = loss + r.task.weight * o.kl * share * kl(o, d[t], new[t] - r.logps[t])
            entropy = -float((rows[t].exp() * rows[t]).sum().detach())
            ratio = min(math.exp(float(new[t].detach()) - r.logps[t]), 2.0)
            factor = ratio * (float(new[t].detach()) + entropy)
            loss = loss + r.task.weight * o.entropy_bonus * share * factor * new[t]
            value -= r.task.weight * o.entropy_bonus * share * (entropy + factor * float(new[t].detach()))
        if not o.kl_of_tokens:
            loss = loss + r.task.weight * o.kl / n * kl(o, d.sum(), new.sum() - sum(r.logps))
    loss.backward()
    return float(loss.detach()) + value, gradients(policy)


RATIOS = [
    {"ratio": "sequence"}, {"ratio": "geometric"}, {"ratio": "family", "kappa": 0.5},
    *({"ratio": "token", "average": average} for average in ("tokens", "responses", "constant")),
]  # fmt: skip
KLS = [
    # what a term is divided by depends on level and ratio, whatever its form
    *(("k3-weighted", level, ratio) for level in ("sequence", "token") for ratio in RATIOS),
    *((form, level, ratio) for form in ("k2", "k3") for level in ("sequence", "token") for ratio in (RATIOS[1], RATIOS[4])),
    *(("k3", "auto", ratio) for ratio in (RATIOS[0], RATIOS[3])),
]  # fmt: skip


@pytest.mark.parametrize(
    ("form", "level", "ratio"), KLS, ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x.values()))
)
def test_kl_and_bonus_in_the_learners_loss_are_those_of_a_loop(form, level, ratio):
    policy, reference = small_policy(), small_policy(seed=5).as_reference()
    rollouts = [
        replace(r, task=replace(r.task, weight=0.5 + i / 4)) for i, r in enumerate(judged(small_rollouts(policy, 8)))
    ]
    batch = pack(rollouts, policy.pad_id)
    with torch.no_grad():  # some updates later
        for p in policy.model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    changes = {f"objective__{k}": v for k, v in ratio.items()} | {
        "objective__kl": 0.1, "objective__kl_form": form, "objective__kl_level": level, "objective__entropy_bonus": 0.2,
    }  # fmt: skip
    loss, gradient = ours(policy, reference, batch, **changes)
    expected, true = by_hand(policy, reference, batch, small_config(**changes).objective)
    assert loss == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert torch.allclose(gradient, true, atol=1e-5 * max(1.0, float(true.abs().max())))
    assert float(true.abs().max()) > 1e-3


def test_the_bonus_makes_the_policy_less_sure():
    """Some updates without any advantage raise the entropy of every response's tokens, and a KL alone would not."""
    found = []
    for bonus in (0.0, 1.0):
        policy = small_policy()
        learner = a_learner(policy, None, objective__entropy_bonus=bonus, training__lr=1e-3)
        metrics = [learner.update(a_batch(policy, 16), torch.zeros(16), step) for step in range(5)]
        found.append(metrics[-1]["policy/entropy"] - metrics[0]["policy/entropy"])
    assert abs(found[0]) < 1e-6
    assert found[1] > 1e-3


# -- recipes -------------------------------------------------------------------------------------------------------------


def test_keys_that_nothing_reads_are_said():
    for changes in ({"objective.kl_level": "token"}, {"objective.kl_level": "token", "objective.kl": 0.1}):
        assert any("objective.kl_level" in said for said in Config.load(None, changes).without_effect())
    assert not Config.load(
        None, {"objective.kl_level": "token", "objective.kl": 0.1, "objective.kl_form": "k3"}
    ).without_effect()


def test_a_bonus_is_no_malus():
    with pytest.raises(RecipeError, match="entropy_bonus"):
        Config.load(None, {"objective.entropy_bonus": -0.1})


def test_trls_beta_is_trls_kl():
    from sppo.trainer import SPPOConfig

    o = Config.load(None, SPPOConfig(beta=0.04, recipe={"objective.algorithm": "grpo"}).overrides()).objective
    assert (o.kl, o.kl_form, o.kl_of_tokens, o.average) == (0.04, "k3-weighted", True, "responses")
    assert SPPOConfig(beta=0.04, use_bias_correction_kl=False).overrides()["objective.kl_form"] == "k3"
    assert Config.load(None, SPPOConfig(beta=0.04).overrides()).objective.kl_of_tokens
    o = Config.load(None, SPPOConfig(beta=0.04, recipe={"objective.kl_form": "reward"}).overrides()).objective
    assert (o.kl, o.kl_form) == (0.04, "reward")
    assert "objective.kl_form" not in SPPOConfig(beta=0.0).overrides()
    assert Config.load(None, SPPOConfig(entropy_coef=0.01).overrides()).objective.entropy_bonus == 0.01
    SPPOConfig(entropy_coef=0.0, use_adaptive_entropy=False)
    with pytest.raises(RecipeError, match="entropy_bonus"):
        SPPOConfig(entropy_target=0.3)
