"""What the critic learns from, and what its baseline is of: all that was judged, and the reward that is paid."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from sppo.learning.batch import pack
from sppo.learning.credit.loading import load_credit
from sppo.learning.earned import DOUBT, MEMORY, Earned
from sppo.learning.learner import Learner
from sppo.run.loop import train
from sppo.run.run import Run
from sppo.types import Verdict

from ..conftest import graded, small_config, small_critic, small_policy, small_rollouts

ONE_REWARD = ["sppo", "sppo-centred", "sppo-hybrid", "ppo", "sppo-optimal"]


def judged(rollouts, scores, correct=None):
    """With rewards, and how right each response is where that is not the same."""
    correct = scores if correct is None else correct
    return [graded(r, float(s), float(c)) for r, s, c in zip(rollouts, scores, correct, strict=True)]


def a_learner(name, policy=None, **changes):
    """Of a critic whose values differ from problem to problem."""
    config = small_config(**{"objective__algorithm": name, "training__minibatches": 2} | changes).with_rates(1, 1)
    learner = Learner(policy or small_policy(), small_critic(), None, config)
    torch.manual_seed(3)
    torch.nn.init.normal_(learner.credit.critic.head.weight)
    return learner


# -- the line --------------------------------------------------------------------------------------------------------


def test_right_and_wrong_means_by_hand():
    """Two batches: right ones earned 0.9 and 0.7, wrong ones −0.1 and 0.3; the doubt is of so many of either kind that earned 1 and 0."""
    earned, weight_B = Earned(), torch.ones(2)
    earned.learn(torch.tensor([1.0, 0.0]), torch.tensor([0.9, -0.1]), weight_B)
    earned.learn(torch.tensor([1.0, 0.0]), torch.tensor([0.7, 0.3]), weight_B)
    number = MEMORY + 1
    right = (MEMORY * 0.9 + 0.7 + DOUBT) / (number + DOUBT)
    wrong = (MEMORY * -0.1 + 0.3) / (number + DOUBT)
    chance = torch.tensor([0.0, 0.25, 1.0])
    expected = chance * right + (1 - chance) * wrong
    assert torch.allclose(chance + earned.beyond(chance), expected, atol=1e-6)


def test_partly_right_responses_lie_on_the_line():
    """R = 0.2 + 0.5·c for c of 0, ¼, …, 1, each with another weight. Means weighted by c and 1 − c would give half the slope."""
    earned, c = Earned(), torch.linspace(0, 1, 5)
    earned.learn(c, 0.2 + 0.5 * c, torch.tensor([1.0, 3.0, 0.5, 2.0, 1.0]))
    assert earned.line(1e-9) == pytest.approx((0.2, -0.5), abs=1e-6)
    unshaped = Earned()
    unshaped.learn(c, c.clone(), torch.ones(5))
    assert unshaped.line() == (0.0, 0.0)


@pytest.mark.parametrize("name", ["sppo", "sppo-centred", "sppo-hybrid"])
def test_an_unshaped_reward_leaves_the_published_baseline_to_the_bit(name):
    learner, policy = a_learner(name), small_policy()
    for scores in ([1.0, 0.0] * 4, [0.25, 0.5, 1.0, 0.0] * 2):
        batch = pack(judged(small_rollouts(policy, 8), scores), policy.pad_id)
        left_B = learner.credit.left(batch, batch.reward_B, torch.rand(8))
        assert torch.equal(left_B, batch.reward_B)
    if name == "sppo":
        advantage_B, value_B, _ = learner.advantage(batch)
        assert torch.equal(advantage_B, batch.reward_B - value_B)


SHAPED = {
    "a mixture": lambda c, noise: (c + 0.5 * (0.6 + 0.4 * noise)) / 1.5,
    "a KL": lambda c, noise: c - 0.8 - 0.2 * noise,
    "partly right": lambda c, noise: 0.6 * c + 0.1 * noise,
}


@pytest.mark.parametrize(
    ("kind", "name", "objective"),
    [
        *((kind, "sppo", {}) for kind in SHAPED),
        ("partly right", "sppo", {"objective__baseline_weight": 0.5}),
        *(("partly right", name, {}) for name in ("sppo-centred", "sppo-hybrid", "sppo-optimal")),
    ],
)
def test_no_baseline_of_a_shaped_reward_sees_its_samples_own(kind, name, objective):
    """What a sample earned, and how right it was, moves its own advantage by what it earned alone, whatever is remembered of earlier batches."""
    found = []
    for own, right in ((0.0, 0.0), (1.0, 0.0), (1.0, 1.0)):
        policy = small_policy()
        learner = a_learner(name, policy, **objective)
        generator = torch.Generator().manual_seed(1)
        for last in (False, False, True):
            c = torch.rand(16, generator=generator).round(decimals=0 if kind != "partly right" else 1)
            reward = SHAPED[kind](c, torch.rand(16, generator=generator))
            if last:
                reward[0], c[0] = own, right
            batch = pack(judged(small_rollouts(policy, 16), reward.tolist(), c.tolist()), policy.pad_id)
            advantage = learner.advantage(batch)[0][0]
        found.append(advantage)
    assert learner.credit.earned.line() != (0.0, 0.0) or name == "sppo-optimal"
    assert torch.allclose(found[1] - found[0], torch.ones_like(found[0]), atol=1e-6)
    assert torch.allclose(found[2], found[1], atol=1e-6)


@pytest.mark.parametrize(("kind", "name"), [*((kind, "sppo") for kind in SHAPED), ("a mixture", "sppo-hybrid")])
def test_the_mean_advantage_of_a_shaped_reward_goes_to_zero(kind, name):
    """V is the true chance: 0.3. A baseline of V alone stays where the reward's mean is away from it."""
    policy, generator = small_policy(), torch.Generator().manual_seed(0)
    learner = a_learner(name, policy)
    learner.credit.critic.start_at(0.3)
    rollouts, means, plain = small_rollouts(policy, 64), [], []
    for _ in range(40):
        c = (torch.rand(64, generator=generator) < 0.3).float()
        if kind == "partly right":
            c = 0.3 + 0.2 * (torch.rand(64, generator=generator) - 0.5)
        reward = SHAPED[kind](c, torch.rand(64, generator=generator))
        batch = pack(judged(rollouts, reward.tolist(), c.tolist()), policy.pad_id)
        means.append(float(learner.advantage(batch)[0].mean()))
        plain.append(float((batch.reward_B - 0.3).mean()))
    assert abs(sum(plain[20:]) / 20) > 0.05
    assert abs(sum(means[20:]) / 20) < 0.02
    assert means[0] == pytest.approx(plain[0], abs=1e-5)  # nothing is known before the first batch


def test_the_line_is_kept_in_checkpoints_and_those_of_earlier_versions_load():
    policy = small_policy()
    learner = a_learner("sppo", policy)
    batch = pack(judged(small_rollouts(policy, 8), [0.4] * 8, [1.0, 0.0] * 4), policy.pad_id)
    learner.advantage(batch)
    state = learner.credit.state_dict()
    again = a_learner("sppo", policy).credit
    again.load_state_dict(state)
    assert again.earned.line() == learner.credit.earned.line() != (0.0, 0.0)
    learner.advantage(batch)
    assert again.earned.line() != learner.credit.earned.line()  # the state was a copy
    del state["earned"]
    fresh = a_learner("sppo", policy).credit
    fresh.load_state_dict(state)
    assert fresh.earned.line() == (0.0, 0.0)


def test_the_optimal_baselines_sums_of_earlier_versions_load():
    """Sums of what wrong and right responses earned, squared score by squared score: doubt ¼·8, R₀ = 0.2/(2 + 2), R₁ = (1.5 + 2)/(3 + 2)."""
    made = load_credit(small_config(objective__algorithm="sppo-optimal"), small_policy(), small_critic())
    made.optimal.load_state_dict({"paired": [1.0, 1.0], "stake": [2.0, 3.0], "earned": [0.2, 1.5], "number": 20.0})
    assert made.optimal.shift == 0.0
    assert made.optimal.baseline(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0.2 / 4, 3.5 / 5])
    again = load_credit(small_config(objective__algorithm="sppo-optimal"), small_policy(), small_critic())
    again.optimal.load_state_dict(made.optimal.state_dict())
    assert again.optimal.earned.sums == made.optimal.earned.sums


# -- all that was judged ---------------------------------------------------------------------------------------------

GROUPS = [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
"""Of two samples each; the last three say the same, and are thrown away."""


def kept_and_beside(policy, masked=()):
    rollouts = judged(small_rollouts(policy, 5, samples=2), [s for group in GROUPS for s in group])
    rollouts = [
        r.judged(replace(r.verdict, outcome="infra_error")) if i in masked else r for i, r in enumerate(rollouts)
    ]
    return rollouts[:4], rollouts[4:]


def test_rows_beside_train_no_policy():
    policy = small_policy()
    batch = pack(*(lambda k, b: (k, policy.pad_id, b))(*kept_and_beside(policy, masked=(1, 7))))
    assert batch.keep_B.tolist() == [True, False, True, True] + [False] * 6
    assert batch.graded_B.tolist() == [i not in (1, 7) for i in range(10)]
    assert batch.group_B.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    first = batch.first(4)
    assert len(first) == 4
    assert torch.equal(first.ids_BL, batch.ids_BL[:4])
    assert first.graded_B.tolist() == [True, False, True, True]
    assert batch.first(10) is batch


@pytest.mark.parametrize("name", ["sppo", "ppo", "sppo-hybrid"])
def test_the_policys_gradient_is_of_the_kept_groups_alone(name):
    """Weights after one update, from a plain sum of gradients: the rows beside change nothing of what the policy learns."""
    found = []
    for with_beside in (True, False):
        policy = small_policy()
        learner = a_learner(name, policy, rollout__samples=2, rollout__prompts=2, training__minibatches=1)
        kept, beside = kept_and_beside(policy)
        batch = pack(kept, policy.pad_id, beside if with_beside else ())
        advantage, _, _ = learner.advantage(batch)
        gradient = []
        step = learner.policy_optimiser.step
        learner.policy_optimiser.step = lambda lr, norm, gradient=gradient, learner=learner, step=step: (
            gradient.append(learner._gradient().clone()), step(lr, norm))[1]  # fmt: skip
        learner.update(batch, advantage, 0)
        found.append((advantage[:4], gradient[0]))
        width = int(batch.response_len_B[:4].max())
    (a, g), (b, h) = found
    shown = (slice(None), slice(width)) if a.dim() == 2 else slice(None)
    assert torch.allclose(a[shown], b[shown], atol=1e-6)
    assert torch.allclose(g, h, atol=1e-6)
    assert float(h.abs().max()) > 1e-4


def critics_gradients(learner, batch, advantage):
    """Of every update, and the rows that each was of."""
    seen, learn, step = [], learner.credit.learn, learner.credit.optimiser.step

    def noted(b, rows, lr):
        seen.append([rows])
        return learn(b, rows, lr)

    def kept(lr, norm):
        parts = [p.grad.flatten().clone() for p in learner.credit.model.parameters() if p.grad is not None]
        seen[-1].append(torch.cat(parts))
        for p in learner.credit.model.parameters():
            p.grad = None
        return 0.0

    learner.credit.learn, learner.credit.optimiser.step = noted, kept
    learner.update(batch, advantage, 0)
    learner.credit.learn, learner.credit.optimiser.step = learn, step
    return seen


@pytest.mark.parametrize("epochs", [1, 2])
def test_the_critic_learns_from_all_that_was_judged(epochs):
    """Every graded row once an epoch, whole groups dealt out to the updates; each update's gradient is that of the mean over its rows."""
    policy = small_policy()
    learner = a_learner(
        "sppo", policy, rollout__samples=2, rollout__prompts=2, training__epochs=epochs, training__micro_tokens=40
    )
    kept, beside = kept_and_beside(policy, masked=(7,))
    batch = pack(kept, policy.pad_id, beside)
    seen = critics_gradients(learner, batch, learner.advantage(batch)[0])
    assert len(seen) == 2 * epochs
    for epoch in range(epochs):
        rows = torch.cat([r for r, _ in seen[2 * epoch : 2 * epoch + 2]])
        assert sorted(rows.tolist()) == [i for i in range(10) if i != 7]
    model = learner.credit.model
    for rows, gradient in seen:
        assert {2, 3, 4, 5, 6, 8, 9} >= set(rows[2:].tolist())
        prompts = [model.prompt_ids(batch.rollouts[i].task) for i in rows.tolist()]
        loss = functional.binary_cross_entropy_with_logits(model.prompt_logits(prompts), batch.correct_B[rows])
        plain = torch.cat(
            [
                g.flatten()
                for g in torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
                if g is not None
            ]
        )
        assert torch.allclose(gradient, plain, atol=1e-6)


def test_a_critic_of_the_kept_groups_alone_would_say_a_half():
    """Problems solved nine times in ten, two samples each: of the groups whose samples differ, half of the samples are right."""
    generator = torch.Generator().manual_seed(0)
    right_GN = (torch.rand(4000, 2, generator=generator) < 0.9).float()
    mixed_G = right_GN.sum(1) == 1
    assert float(right_GN[mixed_G].mean()) == 0.5
    policy = small_policy()
    rollouts = small_rollouts(policy, 40, samples=2)
    scores = right_GN[:40].flatten().tolist()
    groups = [judged(rollouts[2 * g : 2 * g + 2], scores[2 * g : 2 * g + 2]) for g in range(40)]
    kept = [r for g, m in zip(groups, mixed_G, strict=False) if m for r in g]
    beside = [r for g, m in zip(groups, mixed_G, strict=False) if not m for r in g]
    bias = []
    for batch in (pack(kept, policy.pad_id, beside), pack(kept, policy.pad_id)):
        learner = a_learner("sppo", rollout__samples=2, training__minibatches=1)
        learner.credit.critic.start_at(0.9)
        ((rows, gradient),) = critics_gradients(learner, batch, learner.advantage(batch)[0])
        bias.append(float(gradient[-1]))  # V − the mean outcome
        assert bias[-1] == pytest.approx(0.9 - float(batch.correct_B[rows].mean()), abs=1e-5)
    assert abs(bias[0]) < 0.06
    assert bias[1] == pytest.approx(0.4, abs=1e-5)


@pytest.mark.parametrize("name", ONE_REWARD)
def test_whatever_predicts_sees_all_that_was_judged(name):
    """Running sums and the quality of predictions are the same as if nothing had been thrown away."""
    states = []
    for thrown in (True, False):
        policy = small_policy()
        learner = a_learner(name, policy, rollout__samples=2, rollout__prompts=2)
        kept, beside = kept_and_beside(policy)
        batch = pack(kept, policy.pad_id, beside) if thrown else pack([*kept, *beside], policy.pad_id)
        *_, metrics = learner.advantage(batch)
        state = learner.credit.state_dict()
        state.pop("optimiser")
        states.append(
            (
                state,
                {k: v for k, v in metrics.items() if k.startswith("critic/")},
                getattr(learner.credit, "target_BT", None),
            )
        )
    assert states[0][0] == states[1][0]
    assert states[0][1] == states[1][1]
    if states[0][2] is not None:
        assert torch.equal(states[0][2], states[1][2])


def test_whitening_is_over_what_trains_the_policy():
    policy = small_policy()
    learner = a_learner("ppo", policy, rollout__samples=2, rollout__prompts=2)
    kept, beside = kept_and_beside(policy)
    batch = pack(kept, policy.pad_id, beside)
    advantage_BT = learner.advantage(batch)[0]
    own = advantage_BT[batch.keep_B[:, None] & batch.mask_BT]
    assert float(own.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(own.std()) == pytest.approx(1.0, abs=1e-4)


class HalfFlat:
    """The first sample of a prompt is right; the second one where the prompt's name is odd."""

    def judge(self, rollouts):
        right = [float(r.sample == 0 or sum(map(ord, r.task.id)) % 2) for r in rollouts]
        return [Verdict(c, "correct" if c else "wrong") for c in right]

    def check(self, task):
        return None

    def close(self):
        pass


@pytest.mark.parametrize("name", ["sppo", "grpo"])
def test_a_run_writes_down_what_trained_its_policy(tmp_path, name):
    import pyarrow.parquet as pq

    from sppo.run.build import Parts

    config = small_config(
        objective__algorithm=name, rollout__samples=2, rollout__prompts=4, rollout__resample=2, training__steps=2,
        run__out=str(tmp_path / "run"),
    )  # fmt: skip
    job = Run.new(config, parts=Parts(reward=HalfFlat()))
    widths = []
    original = Run.record

    def record(step, gathered, batch, *rest):
        widths.append((len(batch), len(gathered.rollouts), len(gathered.beside)))
        original(job, step, gathered, batch, *rest)

    job.record = record
    train(job)
    job.close()
    assert any(beside for _, _, beside in widths)
    for total, kept, beside in widths:
        assert kept == 8
        assert total == (kept + beside if name == "sppo" else kept)  # without a critic nobody reads the rest
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for step, line in enumerate(lines):
        rows = pq.read_table(tmp_path / "run" / "rollouts" / f"step-{step:06d}.parquet").to_pylist()
        assert len(rows) == 8
        assert line["advantage/mean"] == pytest.approx(sum(r["advantage"] for r in rows) / 8, abs=1e-5)
        assert not math.isnan(line["advantage/mean"])
