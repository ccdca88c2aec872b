"""The learner once more, as plainly as it can be written: loops over responses and tokens in float64, from docs/algorithm.md.

Nothing here calls the package's objective, credit or learner: only the models themselves, and the rollouts as data. There are no batches,
no masks and no padding: each response runs through the model alone, and what is masked is skipped. `test_reference.py` compares.

A policy loss is a sum over elements: a response (sequence ratios) or a token (token ratios). To add a form of the loss, add its few lines to
`summand`, `exponent` or `kl`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sppo.recipe.objective import ObjectiveSection
from sppo.types import Rollout

Advantage = float | Sequence[float]
"""Of a response, or of each of its tokens."""


def number(x: float | Tensor) -> Tensor:
    return torch.as_tensor(x, dtype=torch.float64)


def table(model, rollout: Rollout, temperature: float) -> Tensor:
    """log π(· | x, y_<t) before each token of a response, [T, V], with gradient."""
    ids, first = [*rollout.prompt_ids, *rollout.response_ids], len(rollout.prompt_ids)
    return torch.log_softmax(model(torch.tensor([ids]), use_cache=False).logits[0] / temperature, -1)[first - 1 : -1]


def logps(model, rollout: Rollout, temperature: float) -> list[Tensor]:
    """log π(y_t | x, y_<t) of each token of a response, with gradient."""
    return [row[token] for row, token in zip(table(model, rollout, temperature), rollout.response_ids, strict=True)]


# -- the policy's loss ---------------------------------------------------------------------------------------------------


def exponent(o: ObjectiveSection) -> float:
    """κ: a response's log ratio is divided by its length to this power; where ratios are of tokens, only its weight for engine against learner."""
    return {"sequence": 0.0, "token": 0.0, "geometric": 1.0, "geometric-token": 1.0, "family": o.kappa}[o.ratio]


def summand(o: ObjectiveSection, log_ratio: Tensor, logp: Tensor, advantage: float) -> Tensor:
    """What one element contributes to the objective, which is maximised. Both are scaled as the ratio has it."""
    low, high = o.clip
    ratio = torch.exp(log_ratio)
    if o.surrogate == "clip":
        value = torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
        if o.dual_clip and advantage < 0:
            value = torch.maximum(value, number(o.dual_clip * advantage))
    elif o.surrogate == "cispo":
        value = ratio.clamp(1 - low, 1 + high).detach() * advantage * logp
    elif o.surrogate == "sapo":
        tau = o.gate_temperature[0] if advantage > 0 else o.gate_temperature[1]
        value = 4 / tau / (1 + torch.exp(-tau * (ratio - 1))) * advantage
    else:
        value = advantage * logp
    return value


def geometric_mean(o: ObjectiveSection, log_ratios: Sequence[Tensor], advantages: Sequence[float]) -> Tensor:
    """GMPO's of one response: (Π_t ρ_t)^(1/T), each ρ_t clipped where it goes further than its advantage should move it."""
    low, high = math.log1p(-o.clip[0]), math.log1p(o.clip[1])
    held = [x.clamp(max=high) if a > 0 else x.clamp(min=low) for x, a in zip(log_ratios, advantages, strict=True)]
    return torch.exp(mean(held))


def trust(o: ObjectiveSection, old: float, engine: float) -> float:
    """What a token, or a response, counts that the engine drew: π_old/μ, cut to the cap or left out beyond it."""
    weight = math.exp(old - engine)
    if weight > o.engine_correction:
        return o.engine_correction if o.engine_correction_beyond == "truncate" else 0.0
    return weight


def kl(o: ObjectiveSection, new: Tensor, reference: float | Tensor, old: Tensor) -> Tensor:
    """The KL term of one response or one token, as a part of the loss."""
    d = new - reference
    if o.kl_form == "k2":
        return 0.5 * d**2
    k3 = torch.exp(-d) - 1 + d
    return k3 * torch.exp(new - old) if o.kl_form == "k3-weighted" else k3


def uncertainty(row: Tensor, token: int, engine: float) -> Tensor:
    """The entropy of one token's distribution, whose gradient is estimated by the token that was drawn from the engine's."""
    entropy, new = -float((row.exp() * row).sum().detach()), float(row[token].detach())
    factor = min(math.exp(new - engine), 2.0) * (new + entropy)
    return entropy - factor * (row[token] - new)


def policy_loss(
    model,
    rollouts: Sequence[Rollout],
    advantages: Sequence[Advantage],
    o: ObjectiveSection,
    *,
    old: Sequence[Sequence[float]],
    reference: Sequence[Sequence[float]] | None,
    temperature: float,
    max_tokens: int,
) -> Tensor:
    """The loss of one minibatch. `old` and `reference` are log-probabilities of the responses' tokens, under the weights that sampled (the
    whole softmax) and under the frozen start."""
    kept = [i for i, r in enumerate(rollouts) if not r.verdict.masked]
    sequences = len(kept)
    tokens = sum(len(rollouts[i].response_ids) for i in kept)
    loss = number(0.0)
    for i in kept:
        r, length = rollouts[i], len(rollouts[i].response_ids)
        rows, was, engine = table(model, r, temperature), [number(x) for x in old[i]], [number(x) for x in r.logps]
        new = [row[token] for row, token in zip(rows, r.response_ids, strict=True)]
        anchor = was if o.anchor == "behaviour" else [number(x) for x in reference[i]]
        trusted = [1.0] * length
        if o.engine_correction and o.engine_correction_level == "token":
            trusted = [trust(o, float(a), float(b)) for a, b in zip(was, engine, strict=True)]
        whole = 1.0
        if o.engine_correction and o.engine_correction_level == "sequence":
            whole = trust(o, *[float(sum(part)) / length ** exponent(o) for part in (was, engine)])
        if o.ratio in ("token", "geometric-token"):
            share = {
                "auto": 1 / tokens,
                "tokens": 1 / tokens,
                "responses": 1 / (length * sequences),
                "constant": 1 / (max_tokens * sequences),
            }[o.average]
            apart, logp = [x - y for x, y in zip(new, anchor, strict=True)], new
            if o.ratio == "geometric-token":  # the mean's value, the token's own gradient
                apart, logp = ([mean([y.detach() for y in xs]) + x - x.detach() for x in xs] for xs in (apart, new))
            mine = [advantages[i]] * length if isinstance(advantages[i], float) else advantages[i]
            for t in range(length):
                of_all = o.surrogate == "gmpo"
                value = geometric_mean(o, apart, mine) * mine[t] if of_all else summand(o, apart[t], logp[t], mine[t])
                loss = loss - share * whole * trusted[t] * value
        else:
            # tokens' weights leave the values alone, and weight each token's part of the gradient
            weighted = [w * x + (1 - w) * x.detach() for w, x in zip(trusted, new, strict=True)]
            logp, theirs = (sum(part) / length ** exponent(o) for part in (weighted, anchor))
            loss = loss - whole * summand(o, logp - theirs, logp, advantages[i]) / sequences
            share = 1 / (length ** exponent(o) * sequences)  # of a token
        by_token = o.kl_level == "token" or (o.kl_level == "auto" and o.ratio in ("token", "geometric-token"))
        if o.kl and o.kl_form != "reward" and by_token:
            for t in range(length):
                loss = loss + o.kl * r.task.weight * share * kl(o, new[t], reference[i][t], was[t])
        elif o.kl and o.kl_form != "reward":
            loss = loss + o.kl * r.task.weight * kl(o, sum(new), sum(reference[i]), sum(was)) / sequences
        if o.entropy_bonus:
            for t in range(length):
                bonus = uncertainty(rows[t], r.response_ids[t], r.logps[t])
                loss = loss - o.entropy_bonus * r.task.weight * share * bonus
    return loss


def lessons_loss(
    model,
    rollouts: Sequence[Rollout],
    weights: Sequence[float],
    most: int,
    updates: int,
    number: int,
    temperature: float,
) -> Tensor:
    """What an update learns of verified solutions: every updates-th from `number` on, as many as there could be in the mean's denominator."""
    loss = torch.zeros((), dtype=torch.float64)
    for r, w in list(zip(rollouts, weights, strict=True))[number::updates]:
        loss = loss - w * sum(logps(model, r, temperature)) / len(r.response_ids)
    return loss * updates / most


# -- the critic's loss ---------------------------------------------------------------------------------------------------


def cross_entropy(logit: Tensor, target: float) -> Tensor:
    chance = torch.sigmoid(logit)
    return -(target * torch.log(chance) + (1 - target) * torch.log(1 - chance))


def prompt_logit(critic, rollout: Rollout) -> Tensor:
    """c(x): the read-out at the prompt's last token."""
    hidden = critic.backbone(torch.tensor([critic.prompt_ids(rollout.task)]), use_cache=False).last_hidden_state[0]
    return (hidden[-1] * critic.head.weight[0]).sum() + critic.head.bias[0]


def token_logits(critic, rollout: Rollout) -> list[Tensor]:
    """The read-out before each token of the response."""
    ids, first = [*rollout.prompt_ids, *rollout.response_ids], len(rollout.prompt_ids)
    hidden = critic.backbone(torch.tensor([ids]), use_cache=False).last_hidden_state[0]
    return [
        (hidden[first + t - 1] * critic.head.weight[0]).sum() + critic.head.bias[0]
        for t in range(len(rollout.response_ids))
    ]


def prompt_critic_loss(critic, rollouts: Sequence[Rollout]) -> Tensor:
    """Cross-entropy against correctness, the mean over what is not masked."""
    kept = [r for r in rollouts if not r.verdict.masked]
    return sum(cross_entropy(prompt_logit(critic, r), r.verdict.correct) for r in kept) / len(kept)


def token_critic_loss(critic, rollouts: Sequence[Rollout], targets: Sequence[Sequence[float]]) -> Tensor:
    """Cross-entropy of each token's value against its target, the mean over all tokens of what is not masked."""
    kept = [i for i, r in enumerate(rollouts) if not r.verdict.masked]
    loss = number(0.0)
    for i in kept:
        for logit, target in zip(token_logits(critic, rollouts[i]), targets[i], strict=True):
            loss = loss + cross_entropy(logit, target)
    return loss / sum(len(rollouts[i].response_ids) for i in kept)


# -- advantages ----------------------------------------------------------------------------------------------------------


def costs(rollouts: Sequence[Rollout], o: ObjectiveSection, reference: Sequence[Sequence[float]]) -> list[list[float]]:
    """β·KL of each token to the frozen start, where the reward holds it. The sampling policy is the whole softmax: what a cut took is added
    back."""
    out = []
    for i, r in enumerate(rollouts):
        beta = o.kl if o.kl_form == "reward" else 0.0
        cut = r.kept or [0.0] * len(r.logps)
        out.append([beta * (x + mass - ref) for x, mass, ref in zip(r.logps, cut, reference[i], strict=True)])
    return out


def paid(rollouts: Sequence[Rollout], o: ObjectiveSection, charged: Sequence[Sequence[float]]) -> list[float]:
    """The reward of each response, less what it is charged; where tokens are, it is as it was judged."""
    whole = o.baseline != "token-critic"
    return [r.verdict.score - (sum(own) if whole else 0.0) for r, own in zip(rollouts, charged, strict=True)]


def mean(xs: Sequence[float], otherwise: float = 0.0) -> float:
    return sum(xs) / len(xs) if xs else otherwise


def deviation(xs: Sequence[float]) -> float:
    """The sample's, N − 1."""
    return math.sqrt(sum((x - mean(xs)) ** 2 for x in xs) / max(len(xs) - 1, 1))


def gae(reward: float, values: Sequence[float], decay: float) -> list[float]:
    """Σ_k λ^(k−t)·δ_k with γ = 1, the reward with the last token."""
    length = len(values)
    following = [*values[1:], 0.0]
    delta = [following[k] - values[k] + (reward if k == length - 1 else 0.0) for k in range(length)]
    return [sum(decay ** (k - t) * delta[k] for k in range(t, length)) for t in range(length)]


def targets(rollouts: Sequence[Rollout], values: Sequence[Sequence[float]], decay: float) -> list[list[float]]:
    """The token critic's: λ-returns of correctness, within [0, 1]."""
    out = []
    for r, own in zip(rollouts, values, strict=True):
        advantage = gae(r.verdict.correct, own, decay)
        out.append([min(max(a + v, 0.0), 1.0) for a, v in zip(advantage, own, strict=True)])
    return out


def advantages(
    rollouts: Sequence[Rollout],
    rewards: Sequence[float],
    o: ObjectiveSection,
    values: Sequence[float] | Sequence[Sequence[float]] | None = None,
    charged: Sequence[Sequence[float]] | None = None,
) -> list[Advantage]:
    """R − b for each response, or each of its tokens; 0 where masked. `values`: V(x), or the token critic's. (What learns from earlier steps,
    `hybrid` and `optimal_baseline`, has hand-worked tests of its own.)"""
    kept = [i for i, r in enumerate(rollouts) if not r.verdict.masked]
    of = {i: [j for j in kept if rollouts[j].task.id == rollouts[i].task.id] for i in kept}  # i's group
    out: list[Advantage] = [0.0] * len(rollouts)
    for i in kept:
        if o.baseline == "critic":
            out[i] = rewards[i] - o.baseline_weight * values[i]
        elif o.baseline == "centred":  # with few problems a difficulty, all are one stratum
            out[i] = rewards[i] - values[i] - mean([rewards[j] - values[j] for j in kept if j != i])
        elif o.baseline == "batch":
            out[i] = rewards[i] - mean([rewards[j] for j in kept if j != i])
        elif o.baseline == "others":
            out[i] = rewards[i] - mean([rewards[j] for j in of[i] if j != i])
        elif o.baseline == "group":
            out[i] = rewards[i] - mean([rewards[j] for j in of[i]])
        elif o.baseline == "greedy":
            out[i] = rewards[i] - rollouts[i].greedy.verdict.score
        else:
            assert o.baseline == "token-critic"
            out[i] = [a - sum(charged[i][t:]) for t, a in enumerate(gae(rewards[i], values[i], o.gae_lambda))]
    if o.scale == "group":
        divisors = {i: deviation([rewards[j] for j in of[i]]) + 1e-4 for i in kept}
        for i in kept:
            out[i] = [a / divisors[i] for a in out[i]] if isinstance(out[i], list) else out[i] / divisors[i]
    if o.scale == "batch":
        every = [a for i in kept for a in (out[i] if isinstance(out[i], list) else [out[i]])]
        middle, spread = mean(every), deviation(every) + 1e-8
        for i in kept:
            whole = isinstance(out[i], list)
            out[i] = [(a - middle) / spread for a in out[i]] if whole else (out[i] - middle) / spread
    for i in kept:  # what undoes how a curriculum chose the problems
        w = rollouts[i].task.weight
        out[i] = [w * a for a in out[i]] if isinstance(out[i], list) else w * out[i]
    return out


# -- a curriculum's weights ----------------------------------------------------------------------------------------------


def neyman(values: Sequence[float], floor: float) -> list[float]:
    """(Σw/M)/w_i with w = √(V(1−V)) + floor: what a drawn problem's advantages are multiplied by."""
    w = [math.sqrt(v * (1 - v)) + floor for v in values]
    return [mean(w) / x for x in w]
