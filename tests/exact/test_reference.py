"""The learner against tests/exact/reference.py: each update's gradient, just before the optimiser takes it, to 1e-9 in float64.

Every combination of ratio, surrogate, anchor and KL runs; the other settings are drawn for each of them, and every pair of settings occurs
(`test_every_pair_of_settings_occurs`). Between updates the weights move by a real optimiser step. The comparison is of gradients: Adam's first
step has the same size whatever the gradient's, so weights after it hide any factor.
"""

from __future__ import annotations

import copy
import functools
import itertools
import random
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from sppo.experimental.predicted import Predicted
from sppo.learning.batch import pack
from sppo.learning.learner import Learner
from sppo.learning.lessons import Lessons
from sppo.models import tiny
from sppo.models.critic import Critic
from sppo.models.policy import Policy
from sppo.recipe.sections import CurriculumSection
from sppo.tasks.base import ListSource
from sppo.types import Rollout, Task, Verdict

from ..conftest import small_config
from . import reference

pytestmark = pytest.mark.usefixtures("float64")
TOLERANCE = 1e-9
MAX_TOKENS = 12


# -- what is learnt from ---------------------------------------------------------------------------------------------------


class Norm(nn.Module):
    """RMSNorm without the detour through float32 that the model's own takes."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def doubled(model):
    """A model that computes in float64 throughout."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if "RMSNorm" in type(child).__name__:
                setattr(module, name, Norm(child.weight))
    return model.double()


@functools.cache
def built(seed: int, head: bool, dtype: torch.dtype):
    """Made once, since there are many cases."""
    model, tokenizer = tiny.build(seed=seed, head=head, hidden=8, layers=1, heads=2)
    return doubled(model), tokenizer


def a_policy(seed: int = 0) -> Policy:
    model, tokenizer = built(seed, True, torch.get_default_dtype())
    return Policy(copy.deepcopy(model), tokenizer)


def a_critic(seed: int = 1) -> Critic:
    backbone, tokenizer = built(seed, False, torch.get_default_dtype())
    critic = Critic(copy.deepcopy(backbone), tokenizer).double()
    nn.init.normal_(critic.head.weight, std=4.0, generator=torch.Generator().manual_seed(seed))
    nn.init.constant_(critic.head.bias, 13.3)  # so that V lies between .1 and .9
    return critic


def plain(model):
    """A copy that the package's packing and kernels do not touch."""
    out = copy.deepcopy(model)
    out.set_attn_implementation("sdpa")
    return out


def plain_critic(critic: Critic) -> Critic:
    out = copy.deepcopy(critic)
    out.backbone.set_attn_implementation("sdpa")
    return out


@torch.no_grad()
def numbers(model, rollouts, temperature=1.0) -> list[list[float]]:
    """log π of all responses, as numbers."""
    return [[float(x) for x in reference.logps(model, r, temperature)] for r in rollouts]


PROMPTS = ["1+2?", "7*8-3?", "9?", "12345-6?", "4-4+4?", "0*1?", "3+3+3+3?", "5?"]
LENGTHS = [3, 1, 6, 2, 5, 7, 4, 2]
SCORES = [1.0, 0.0, 0.3, 0.8, 0.0, 1.0, 0.6, 0.1]
RIGHT = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0]  # correctness, which shaping changes


def some_rollouts(
    policy: Policy,
    *,
    samples: int = 1,
    noise: float = 0.0,
    cut: bool = False,
    masked: bool = False,
    weighted: bool = False,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[Rollout]:
    """Eight judged rollouts of random tokens. The engine's log-probabilities are the policy's, off by `noise` a token, and of a `cut`
    distribution, whose kept mass they are divided by."""
    rng = random.Random(seed)
    out = []
    for b in range(8):
        name = b // samples
        task = Task(f"p{name}", PROMPTS[name], weight=[0.5, 2.0, 1.25, 0.8][name % 4] if weighted else 1.0)
        ids = [rng.randrange(3, 90) for _ in range(LENGTHS[b])]
        outcome = "infra_error" if masked and b in (1, 6) else "wrong"
        verdict = Verdict(SCORES[b], outcome, correctness=RIGHT[b])
        greedy = Rollout.answer(task, [5], [6], [0.0], "stop", "", verdict=Verdict(float(b % 3 == 0), "wrong"))
        out.append(
            Rollout.answer(
                task, policy.prompt_ids(task), ids, [0.0] * len(ids), "stop", "", b % samples, verdict, greedy=greedy
            )
        )
    for b, logps in enumerate(numbers(plain(policy.model), out, temperature)):
        kept = [-0.5 * rng.random() for _ in logps] if cut else []
        shift = noise * (1 if b % 2 else -1)
        engine = [x + shift + 0.3 * noise * rng.gauss(0, 1) for x in logps]
        out[b] = replace(
            out[b], kept=kept, logps=[x - k for x, k in zip(engine, kept or [0.0] * len(logps), strict=True)]
        )
    return out


# -- what the learner does ---------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """Weights and gradients of an update, by name, just before the optimiser step."""

    weights: dict[str, torch.Tensor]
    gradient: dict[str, torch.Tensor]


def watch(optimiser, model) -> list[Seen]:
    """Note every update's gradient; the step itself goes on."""
    seen, step = [], optimiser.step

    def watched(lr, norm):
        found = dict(model.named_parameters())
        seen.append(
            Seen({n: p.detach().clone() for n, p in found.items()}, {n: p.grad.clone() for n, p in found.items()})
        )
        return step(lr, norm)

    optimiser.step = watched
    return seen


def agree(seen: Seen, model, loss) -> float:
    """The largest difference between the gradient seen and that of `loss(model)` at the same weights, which must be small beside either."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(seen.weights[name])
            p.grad = None
    loss(model).backward()
    worst = largest = 0.0
    for name, p in model.named_parameters():
        expected = torch.zeros_like(p) if p.grad is None else p.grad
        worst = max(worst, float((seen.gradient[name] - expected).abs().max()))
        largest = max(largest, float(expected.abs().max()))
    assert worst <= TOLERANCE * max(1.0, largest), f"off by {worst:.3g}, the largest entry is {largest:.3g}"
    return largest


@dataclass(frozen=True)
class Case:
    """One combination of settings."""

    ratio: str
    surrogate: str
    anchor: str
    kl: str
    kl_level: str = "auto"
    entropy_bonus: float = 0.0
    average: str = "auto"
    dual_clip: float = 3.0
    correction: float = 2.0
    level: str = "sequence"
    beyond: str = "truncate"
    baseline: str = "critic"
    samples: int = 1
    masked: bool = False
    weighted: bool = False
    cut: bool = False
    noise: float = 0.0
    micro: int = 100_000
    updates: tuple[int, int] = (2, 1)
    """Minibatches, and epochs."""
    temperature: float = 1.0


OTHERS = {
    "kl_level": ["auto", "sequence", "token"],
    "entropy_bonus": [0.0, 0.05],
    "average": ["auto", "tokens", "responses", "constant"],
    "dual_clip": [0.0, 1.05],
    "correction": [0.0, 1.15],
    "level": ["token", "sequence"],
    "beyond": ["truncate", "mask"],
    "baseline": ["critic", "token-critic", "others", "group"],
    "samples": [1, 4],
    "masked": [False, True],
    "weighted": [False, True],
    "cut": [False, True],
    "noise": [0.0, 1e-5, 0.15],
    "micro": [100_000, 20],
    "updates": [(1, 1), (2, 1), (1, 2), (2, 2)],
    "temperature": [1.0, 0.7],
}
FIRST = {
    "ratio": ["sequence", "geometric", "family", "token", "geometric-token"],
    "surrogate": ["clip", "cispo", "plain", "sapo", "gmpo"],
    "anchor": ["behaviour", "reference"],
    "kl": ["off", "reward", "k2", "k3", "k3-weighted"],
}


def sound(case: Case) -> Case:
    """With what does not go together made to."""
    if case.surrogate == "gmpo":
        case = replace(case, ratio="token", average="responses")
    if case.ratio not in ("token", "geometric-token"):
        case = replace(case, average="auto", baseline="critic" if case.baseline == "token-critic" else case.baseline)
    if case.samples == 1 and case.baseline in ("others", "group"):
        case = replace(case, baseline="batch")
    return case


def new_with_old(ratio: str, surrogate: str) -> int:
    """0 for what is tested with everything, 1 for what a third of it is enough for, 2 for what does not go together."""
    if surrogate == "gmpo" and ratio != "token":
        return 2
    return int(surrogate in ("sapo", "gmpo") or ratio == "geometric-token")


def cases() -> list[Case]:
    """All combinations of FIRST (a third of the newer ones, whose formulas have tests of their own). The rest is shuffled so that each level comes
    equally often with each ratio. Then what pairs that leaves out."""
    rng, out = random.Random(48), []
    for ratio in FIRST["ratio"]:
        product = list(itertools.product([ratio], *list(FIRST.values())[1:]))
        product = [
            x for n, x in enumerate(product) if new_with_old(*x[:2]) < 2 and (n % 3 == 0 or not new_with_old(*x[:2]))
        ]
        columns = [(levels * len(product))[: len(product)] for levels in OTHERS.values()]
        for column in columns:
            rng.shuffle(column)
        out += [sound(Case(*first, *rest)) for first, *rest in zip(product, *columns, strict=True)]
    out = list(dict.fromkeys(out))
    out += pairs_left_out(out)
    rng.shuffle(out)  # what is wrong with one ratio shows soon
    return out


def pairs_left_out(found: list[Case]) -> list[Case]:
    """A case for each pair of levels that could occur together, and does not."""
    levels, out = FIRST | OTHERS, []
    for a, b in itertools.combinations(levels, 2):
        pairs = {(getattr(c, a), getattr(c, b)) for c in found}
        for x, y in itertools.product(levels[a], levels[b]):
            possible = sound(replace(found[0], **{"ratio": "token", "samples": 4} | {a: x, b: y}))
            if (getattr(possible, a), getattr(possible, b)) == (x, y) and (x, y) not in pairs:
                out.append(possible)
    return out


def test_every_pair_of_settings_occurs():
    assert pairs_left_out(cases()) == []


def configured(case: Case, **changes):
    return small_config(
        objective__ratio=case.ratio,
        objective__surrogate=case.surrogate,
        objective__anchor=case.anchor,
        objective__kl=0.0 if case.kl == "off" else 0.07,
        objective__kl_form="reward" if case.kl == "off" else case.kl,
        objective__kl_level=case.kl_level,
        objective__entropy_bonus=case.entropy_bonus,
        objective__average=case.average,
        objective__dual_clip=case.dual_clip,
        objective__clip=(0.1, 0.15),
        objective__baseline=case.baseline,
        objective__engine_correction=case.correction,
        objective__engine_correction_level=case.level,
        objective__engine_correction_beyond=case.beyond,
        objective__engine_gap_limit=1e9,
        rollout__samples=case.samples,
        rollout__prompts=8 // case.samples,
        rollout__max_tokens=MAX_TOKENS,
        rollout__temperature=case.temperature,
        training__micro_tokens=case.micro,
        training__minibatches=case.updates[0],
        training__epochs=case.updates[1],
        training__lr=6e-3,
        **changes,
    )


def judged_by(critic: Critic, rollouts, baseline: str):
    """The reference's values: of prompts, or of tokens."""
    with torch.no_grad():
        if baseline == "token-critic":
            return [[float(x.sigmoid()) for x in reference.token_logits(critic, r)] for r in rollouts]
        return [float(reference.prompt_logit(critic, r).sigmoid()) for r in rollouts]


def compare_advantages(found, expected, rollouts) -> None:
    for b, r in enumerate(rollouts):
        if not r.verdict.masked:
            own = found[b, : len(r.response_ids)].tolist() if found.dim() == 2 else float(found[b])
            assert own == pytest.approx(expected[b], abs=1e-9)


# -- advantages --------------------------------------------------------------------------------------------------------------

BASELINES = {
    "critic": {},
    "half": {"objective__baseline": "critic", "objective__baseline_weight": 0.5},
    "centred": {},
    "batch": {},
    "others": {},
    "group": {},
    "greedy": {},
    "token-critic": {"objective__ratio": "token"},
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", ["none", "group", "batch"])
@pytest.mark.parametrize("name", BASELINES)
def test_advantages_are_the_plain_ones(name, scale, masked):
    """With a KL in the reward, a cut, and a curriculum's weights."""
    changes = {"objective__baseline": name} | BASELINES[name]
    config = small_config(
        **changes, objective__scale=scale, objective__kl=0.1, objective__kl_form="reward", rollout__samples=4,
        rollout__prompts=2, rollout__temperature=0.8, training__micro_tokens=20, objective__gae_lambda=0.9,
    )  # fmt: skip
    policy, critic, start = a_policy(), a_critic(), a_policy(seed=5)
    rollouts = some_rollouts(policy, samples=4, cut=True, masked=masked, weighted=True, noise=0.1, temperature=0.8)
    learner = Learner(policy, critic if config.critic_reads else None, start.as_reference(), config)
    o = config.objective
    found, value_B, _ = learner.advantage(pack(rollouts, policy.pad_id))
    ref = numbers(plain(start.model), rollouts, 0.8)
    values = judged_by(plain_critic(critic), rollouts, o.baseline)
    charged = reference.costs(rollouts, o, ref)
    expected = reference.advantages(rollouts, reference.paid(rollouts, o, charged), o, values, charged)
    compare_advantages(found, expected, rollouts)
    if value_B is not None:
        first = [v[0] for v in values] if name == "token-critic" else values
        assert value_B.tolist() == pytest.approx(first, abs=1e-9)


# -- the critic --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [100_000, 12])
@pytest.mark.parametrize("updates", [(1, 1), (2, 2)])
@pytest.mark.parametrize("baseline", ["critic", "token-critic"])
def test_the_critics_gradient_is_the_plain_one(baseline, updates, micro):
    """It learns correctness, whatever is paid: rewards here are shaped, and hold a KL. Its targets are of the values before the step."""
    config = small_config(
        objective__baseline=baseline, objective__ratio="token", objective__kl=0.1, objective__kl_form="reward",
        objective__gae_lambda=0.9, training__micro_tokens=micro, training__minibatches=updates[0], training__epochs=updates[1],
        training__critic_lr=3e-3, training__lr=1e-3, objective__engine_gap_limit=1e9,
    )  # fmt: skip
    policy, critic, start = a_policy(), a_critic(), a_policy(seed=5)
    rollouts = some_rollouts(policy, masked=True, weighted=True, noise=0.1, cut=True)
    learner = Learner(policy, critic, start.as_reference(), config)
    batch = pack(rollouts, policy.pad_id)
    model = plain_critic(critic)
    values = judged_by(model, rollouts, baseline)
    advantage, _, _ = learner.advantage(batch)
    kept = batch.keep_B.nonzero()[:, 0]
    plan = [torch.cat(part).tolist() for epoch in range(updates[1]) for part in learner._plan(batch, kept, 0, epoch)]
    seen = watch(learner.credit.optimiser, critic)
    learner.update(batch, advantage, 0)
    assert len(seen) == len(plan)
    for rows, update in zip(plan, seen, strict=True):
        some = [rollouts[i] for i in rows]
        if baseline == "critic":
            assert agree(update, model, lambda m, some=some: reference.prompt_critic_loss(m, some)) > 1e-3
        else:
            aims = reference.targets(some, [values[i] for i in rows], 0.9)
            assert (
                agree(update, model, lambda m, some=some, aims=aims: reference.token_critic_loss(m, some, aims)) > 1e-3
            )


# -- which rows, when --------------------------------------------------------------------------------------------------------


def test_every_epoch_trains_on_every_row_once_and_keeps_a_prompts_samples_together():
    policy = a_policy()
    batch = pack(some_rollouts(policy, samples=2, masked=True), policy.pad_id)
    kept = batch.keep_B.nonzero()[:, 0]
    learner = Learner(policy, a_critic(), None, small_config(training__minibatches=2, training__micro_tokens=20))
    orders = []
    for step, epoch in itertools.product(range(4), range(3)):
        plan = learner._plan(batch, kept, step, epoch)
        minibatches = [torch.cat(parts).tolist() for parts in plan]
        assert sorted(i for rows in minibatches for i in rows) == kept.tolist()
        assert len(minibatches) == 2
        groups = [{int(batch.group_B[i]) for i in rows} for rows in minibatches]
        assert not groups[0] & groups[1]
        assert all(len(g) == 2 for g in groups)  # of four prompts
        orders.append(tuple(sorted(groups[0])))
        assert minibatches == [torch.cat(parts).tolist() for parts in learner._plan(batch, kept, step, epoch)]
    assert len(set(orders)) > 3  # another order in each step and epoch
    assert len(set(orders[:3])) > 1


# -- lessons -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("updates", [(1, 1), (2, 2)])
def test_lessons_add_their_own_gradient_and_no_more(updates):
    config = small_config(
        objective__ratio="token", training__minibatches=updates[0], training__epochs=updates[1], training__micro_tokens=20,
        rollout__temperature=0.7, training__lr=1e-3,
    )  # fmt: skip
    policy, critic = a_policy(), a_critic()
    rollouts, solutions = some_rollouts(policy, temperature=0.7), some_rollouts(policy, seed=9, temperature=0.7)[1:6]
    weights, most, number = [0.5, 1.0, 0.25, 0.8, 0.1], 7, updates[0] * updates[1]
    learner = Learner(policy, critic, None, config)
    batch = pack(rollouts, policy.pad_id)
    model, old = plain(policy.model), numbers(plain(policy.model), rollouts, 0.7)
    advantage, _, _ = learner.advantage(batch)
    expected = [float(a) for a in advantage]
    plan = [
        torch.cat(part).tolist()
        for epoch in range(updates[1])
        for part in learner._plan(batch, torch.arange(8), 0, epoch)
    ]
    seen = watch(learner.policy_optimiser, policy.model)
    learner.update(batch, advantage, 0, Lessons(pack(solutions, policy.pad_id), weights, most))
    assert len(seen) == number
    for n, (rows, update) in enumerate(zip(plan, seen, strict=True)):

        def loss(model, rows=rows, n=n):
            mine = [[x[i] for i in rows] for x in (rollouts, expected, old)]
            own = reference.policy_loss(
                model, mine[0], mine[1], config.objective, old=mine[2], reference=None, temperature=0.7, max_tokens=12
            )
            return own + reference.lessons_loss(model, solutions, weights, most, number, n, 0.7)

        agree(update, model, loss)


# -- a curriculum's weights --------------------------------------------------------------------------------------------------


def test_a_curriculums_weights_are_the_plain_ones():
    critic = a_critic()
    tasks = [Task(f"t{i}", p) for i, p in enumerate(PROMPTS)]
    chances = judged_by(
        plain_critic(critic), [Rollout.answer(t, [], [], [], "stop", "") for t in tasks], "critic"
    )  # what it reads is the prompt alone
    section = CurriculumSection(kind="predicted", pool=4, floor=0.07)
    found = Predicted(section, ListSource(tasks), 0, lambda t: None, critic).sample(2)  # of a pool of all eight
    expected = dict(zip((t.id for t in tasks), reference.neyman(chances, 0.07), strict=True))
    assert [t.weight for t in found] == pytest.approx([expected[t.id] for t in found], rel=1e-9)
    assert len(set(expected.values())) == 8


# -- the policy's gradient ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases(), ids=lambda c: f"{c.ratio}-{c.surrogate}-{c.anchor}-{c.kl}")
def test_every_updates_gradient_is_the_plain_one(case):
    config = configured(case)
    policy, critic, start = a_policy(), a_critic(), a_policy(seed=5)
    rollouts = some_rollouts(
        policy, samples=case.samples, noise=case.noise, cut=case.cut, masked=case.masked, weighted=case.weighted,
        temperature=case.temperature,
    )  # fmt: skip
    learner = Learner(
        policy,
        critic if config.critic_reads else None,
        start.as_reference() if config.needs_reference else None,
        config,
    )
    batch = pack(rollouts, policy.pad_id)
    model, o = plain(policy.model), config.objective
    ref = numbers(plain(start.model), rollouts, case.temperature) if config.needs_reference else [None] * 8
    old = numbers(model, rollouts, case.temperature)
    advantage, _, _ = learner.advantage(batch)
    charged = reference.costs(rollouts, o, ref) if config.needs_reference else [[0.0] * len(r.logps) for r in rollouts]
    values = judged_by(plain_critic(critic), rollouts, o.baseline) if config.critic_reads else None
    expected = reference.advantages(rollouts, reference.paid(rollouts, o, charged), o, values, charged)
    compare_advantages(advantage, expected, rollouts)

    kept = batch.keep_B.nonzero()[:, 0]
    plan = [
        torch.cat(part).tolist() for epoch in range(case.updates[1]) for part in learner._plan(batch, kept, 0, epoch)
    ]
    seen = watch(learner.policy_optimiser, policy.model)
    metrics = learner.update(batch, advantage, 0)
    assert len(seen) == len(plan) == case.updates[0] * case.updates[1]
    if metrics.get("engine/serves_as_old"):  # whose numbers differ by next to nothing
        assert case.noise < 0.01
        for i in set(range(8)) - set(plan[0]):
            old[i] = [x + k for x, k in zip(rollouts[i].logps, rollouts[i].kept or [0.0] * 8, strict=False)]
    for rows, update in zip(plan, seen, strict=True):

        def loss(model, rows=rows):
            mine = [[x[i] for i in rows] for x in (rollouts, expected, old, ref)]
            return reference.policy_loss(
                model, mine[0], mine[1], o, old=mine[2], reference=mine[3], temperature=case.temperature, max_tokens=MAX_TOKENS
            )  # fmt: skip

        assert agree(update, model, loss) > 1e-4 or case.surrogate == "clip"


@pytest.mark.parametrize("surrogate", ["clip", "cispo"])
def test_the_cases_clip_some_and_not_all(surrogate):
    """Bounds that never bite would prove nothing."""
    shares = []
    for case in cases():
        if case.surrogate != surrogate or case.anchor == "reference" or case.updates == (1, 1):
            continue
        policy = a_policy()
        learner = Learner(policy, a_critic(), None, configured(replace(case, kl="off", baseline="critic")))
        batch = pack(some_rollouts(policy, samples=case.samples, noise=case.noise), policy.pad_id)
        shares.append(learner.update(batch, batch.reward_B - 0.5, 0)["ratio/clip_fraction"])
        if sum(0.1 < x < 0.9 for x in shares) == 5:
            return
    pytest.fail(f"the shares that are clipped: {shares}")
