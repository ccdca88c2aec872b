"""Who calls what with what: the wiring between pure functions, where it shows in no gradient of a single update. By hand, or by plain loops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sppo.experimental.mcts import Node, walk
from sppo.learning.batch import pack
from sppo.learning.credit.hybrid import Gate, StepCredit
from sppo.learning.credit.loading import load_credit
from sppo.learning.credit.optimal_baseline import DOUBT, squared_scores
from sppo.learning.learner import Learner
from sppo.recipe.sections import CurriculumSection
from sppo.rollout.canary import PROBED, SAMPLED, Canary, noise_limit
from sppo.rollout.engine import Sampling
from sppo.rollout.local import LocalEngine
from sppo.run.curriculum import Uniform
from sppo.run.run import Run
from sppo.run.sample import _sorted_out, sample
from sppo.tasks.base import ListSource
from sppo.types import Rollout, Task, Verdict

from ..conftest import small_config, small_critic, small_policy, small_rollouts
from .test_reference import a_critic, a_policy, some_rollouts


def scored(rollouts, scores, masked=(), correct=None):
    return [
        r.judged(Verdict(s, "infra_error" if i in masked else "wrong", correctness=None if correct is None else correct[i]))
        for i, (r, s) in enumerate(zip(rollouts, scores, strict=True))
    ]  # fmt: skip


# -- what a step knows of earlier ones ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("float64")
def test_the_running_explained_variance_is_an_average_over_steps():
    policy, critic = a_policy(), a_critic()
    learner, averages = Learner(policy, critic, None, small_config()), []
    values = [float(x) for x in critic.logits([r.task for r in some_rollouts(policy)]).sigmoid()]
    middle = sorted(values)[4]
    good = [float(v >= middle) for v in values]
    bad = [1 - g for g in good]
    for scores in (good, good, bad, bad, bad, bad, bad):
        *_, metrics = learner.advantage(pack(scored(some_rollouts(policy), scores), policy.pad_id))
        ev = metrics["critic/explained_variance"]
        averages.append(0.9 * averages[-1] + 0.1 * ev if averages else ev)
        assert metrics["critic/running_ev"] == pytest.approx(averages[-1])
    assert averages[1] > 0 > averages[-2]


@pytest.mark.usefixtures("float64")
def test_a_prediction_is_judged_by_what_was_graded():
    policy, critic = a_policy(), a_critic()
    rollouts = some_rollouts(policy, masked=True)
    values = critic.logits([r.task for r in rollouts]).sigmoid().tolist()
    _, _, metrics = Learner(policy, critic, None, small_config()).advantage(pack(rollouts, policy.pad_id))
    errors = [(v - r.verdict.correct) ** 2 for v, r in zip(values, rollouts, strict=True) if not r.verdict.masked]
    assert metrics["critic/brier"] == pytest.approx(sum(errors) / len(errors))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_a_baseline_is_its_share_of_what_is_earned(weight):
    """R = 2·c + ½, which the baseline knows from the second step on."""
    policy, critic = a_policy(), a_critic()
    learner = Learner(policy, critic, None, small_config(objective__baseline_weight=weight))
    right = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0]
    paid = [9.0 if i in (3, 5) else 2 * c + 0.5 for i, c in enumerate(right)]
    batch = pack(scored(some_rollouts(policy), paid, masked=(3, 5), correct=right), policy.pad_id)
    first, value_B, _ = learner.advantage(batch)  # nothing was known: b is V
    assert first.tolist() == pytest.approx((batch.reward_B - weight * value_B).tolist(), abs=1e-9)
    then, value_B, _ = learner.advantage(batch)
    # of either kind three responses, and one that earned c: R − c is .5·3/4 where c is 0, and 1.5·3/4 where c is 1
    earned_B = value_B * (1 + 1.125) + (1 - value_B) * 0.375
    assert then.tolist() == pytest.approx((batch.reward_B - weight * earned_B).tolist(), abs=1e-9)


# -- the optimisers' rates ---------------------------------------------------------------------------------------------------


def test_policy_and_critic_have_rates_of_their_own():
    config = small_config(training__lr=1e-3, training__critic_lr=5e-3, training__warmup=4, training__steps=9)
    policy = small_policy()
    learner, rates = Learner(policy, small_critic(), None, config), []
    for optimiser in (learner.policy_optimiser, learner.credit.optimiser):
        step = optimiser.step
        optimiser.step = lambda lr, norm, step=step: rates.append(lr) or step(lr, norm)
    rollouts = scored(small_rollouts(policy), [float(i % 2) for i in range(16)])
    batch = pack(rollouts, policy.pad_id)
    learner.update(batch, learner.advantage(batch)[0], 2)  # the third of four steps of warm-up
    assert rates == pytest.approx([0.75e-3, 3.75e-3] * 2)


# -- squared scores ------------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("float64")
def test_squared_scores_are_of_the_whole_softmax_and_of_the_advantages_factor():
    policy = a_policy()
    rollouts = some_rollouts(policy, cut=True, weighted=True)
    batch = pack(rollouts, policy.pad_id)
    found = squared_scores(policy, batch)
    expected = [
        [(1 - torch.tensor(x + k).exp().item()) ** 2 for x, k in zip(r.logps, r.kept, strict=True)] for r in rollouts
    ]
    for b, own in enumerate(expected):
        assert found[b].tolist() == pytest.approx(own + [0.0] * (found.size(1) - len(own)))
    made = load_credit(small_config(objective__algorithm="sppo-optimal"), policy, a_critic())
    made.optimal.learn(batch, torch.full((8,), 0.3), batch.reward_B)
    weighted = [sum(own) * r.task.weight**2 for own, r in zip(expected, rollouts, strict=True)]
    right = [r.verdict.correct for r in rollouts]
    assert made.optimal.earned.sums[1] == pytest.approx(sum(w for w, c in zip(weighted, right, strict=True) if c))
    assert made.optimal.earned.sums[0] == pytest.approx(sum(weighted))
    assert made.optimal.paired == pytest.approx([
        0.3 * sum(w for w, c in zip(weighted, right, strict=True) if not c),
        0.7 * sum(w for w, c in zip(weighted, right, strict=True) if c),
    ])  # fmt: skip


# -- what only a critic learns from, and how far the engine may be off ---------------------------------------------------------


def test_groups_beside_are_dealt_out_whole_and_in_another_order_each_time():
    policy = small_policy()
    rollouts = scored(small_rollouts(policy, 5, samples=2), [float(i % 3 == 0) for i in range(10)])
    batch = pack(rollouts[:4], policy.pad_id, rollouts[4:])
    learner = Learner(policy, small_critic(), None, small_config(rollout__samples=2))
    found = set()
    for step in range(4):
        for epoch in range(2):
            parts = learner._beside(batch, step, epoch, 2)
            groups = [batch.group_B[rows].tolist() for rows in parts]
            assert sorted(torch.cat(parts).tolist()) == [4, 5, 6, 7, 8, 9]
            assert not set(groups[0]) & set(groups[1])
            found.add(tuple(parts[0].tolist()))
    assert len(found) > 2


def test_the_limit_of_the_gap_is_the_first_steps():
    policy = small_policy()
    learner = Learner(policy, small_critic(), None, small_config())
    batch = pack(scored(small_rollouts(policy), [float(i % 2) for i in range(16)]), policy.pad_id)
    learner.gap_limit = 0.7
    learner.update(batch, batch.reward_B - 0.5, 1)
    assert learner.gap_limit == 0.7


def test_limits_are_a_multiple_of_what_was_measured_and_no_less_than_half_of_what_rounding_explains():
    assert noise_limit(0.03, SAMPLED, torch.bfloat16) == pytest.approx(0.12)
    assert noise_limit(0.001, SAMPLED, torch.bfloat16) == pytest.approx(0.05)
    assert noise_limit(0.0, PROBED, torch.float32) == pytest.approx(5e-4)


def test_the_canarys_limit_is_the_first_looks():
    policy = small_policy()
    engine, canary = LocalEngine(policy), Canary(policy)
    gap = canary.check(engine, policy, policy.fingerprint())
    assert canary.limit == noise_limit(gap, PROBED, torch.float32)
    canary.limit = 0.7
    canary.check(engine, policy, policy.fingerprint())
    assert canary.limit == 0.7


# -- hybrid credit -----------------------------------------------------------------------------------------------------------


def test_the_gate_stays_within_0_and_1():
    gate = Gate()
    gate.cross[3], gate.square[3] = 5.0, 2.0
    gate.cross[5], gate.square[5] = -5.0, 2.0
    assert gate.eta(1, 0.1) == 1.0
    assert gate.eta(2, 0.1) == 0.0


def a_chain(policy, text: str, scores: list[float]) -> Rollout:
    """A response whose steps, split by semicolons, were given these scores."""
    ends = [i for i, c in enumerate(text) if c == ";"][: len(scores)]
    steps = [{"text": "", "end": end, "score": s} for end, s in zip(ends, scores, strict=True)]
    ids = [*policy.tokenizer(text)["input_ids"], policy.eos_ids[0]]
    task = Task("chain/0", "1+2?")
    verdict = Verdict(0.0, "wrong", {"steps": steps, "split": "semicolons"})
    return Rollout.answer(task, policy.prompt_ids(task), ids, [-1.0] * len(ids), "stop", text, verdict=verdict)


@pytest.mark.usefixtures("float64")
def test_a_prefix_is_as_bad_as_its_worst_step_and_one_response_proves_little():
    policy = a_policy()
    config = small_config(
        objective__algorithm="sppo-hybrid", reward__use="answer + 0 * steps:check=chain,split=semicolons"
    )  # fmt: skip
    made = load_credit(config, policy, a_critic())
    assert isinstance(made, StepCredit)
    rollout = a_chain(policy, "1;2;3;4;A", [1.0, 0.2, 1.0, 0.7])
    assert made._stretches(rollout) == [(2, 1, 2), (4, 2, 0), (6, 3, 0), (8, 4, 0)]
    batch = pack([rollout], policy.pad_id)
    _, value_B, _ = made.advantage(batch, batch.reward_B)  # nothing was known: Φ = b, and it learns R − b
    rest = float(batch.reward_B[0] - value_B[0])
    assert made.effect[2][0] == pytest.approx(made.number[2][0] * rest)
    gaps, less = [], made.gate.less
    made.gate.less = lambda rest_B, prefixes, *a: gaps.extend(gap for *_, gap in prefixes) or less(rest_B, prefixes, *a)
    before = made.effect[2][0] / (made.number[2][0] + DOUBT)
    made.advantage(batch, batch.reward_B)
    assert gaps[1] == pytest.approx(max(before, -float(value_B[0])))
    assert abs(before) < 0.3 * abs(rest)


# -- what a step samples -----------------------------------------------------------------------------------------------------


def test_a_greedy_response_is_of_its_own_prompt_and_is_greedy(tmp_path):
    config = small_config(
        objective__algorithm="remax", rollout__prompts=4, rollout__samples=2, run__out=str(tmp_path / "run")
    )
    job = Run.new(config)
    job.begin()
    found = sample(job.components, 0)
    assert len(found.rollouts) == 8
    for r in found.rollouts:
        assert r.greedy.task.id == r.task.id
        (again,) = LocalEngine(job.components.policy).generate([r.prompt_ids], [5], Sampling(12, 0.0))
        assert list(r.greedy.response_ids) == again.ids
    assert found.beside_tokens == sum(len(r.greedy.response_ids) for r in found.rollouts[::2])
    job.close()


def test_flat_groups_are_replaced_and_paid_for(tmp_path):
    config = small_config(
        objective__algorithm="dapo", rollout__prompts=4, rollout__samples=2, run__out=str(tmp_path / "run")
    )
    job = Run.new(config)
    job.begin()
    found = sample(replace(job.components, reward=Turns()), 0)
    groups = [found.rollouts[i : i + 2] for i in range(0, len(found.rollouts), 2)]
    assert len(groups) == 4
    assert found.thrown_away
    assert {r.task.id for g in found.thrown_away for r in g}.isdisjoint({r.task.id for r in found.rollouts})
    assert found.beside_tokens == sum(len(r.response_ids) for g in found.thrown_away for r in g)
    job.close()


def test_a_group_is_flat_where_nothing_graded_is_better():
    policy = small_policy()
    scores, masked = [1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0], (5, 6, 7)  # alike; mixed; one graded; none
    batch = pack(scored(small_rollouts(policy, 4, samples=2), scores, masked=masked), policy.pad_id)
    assert batch.flat_B.tolist() == [True, True, False, False, True, True, True, True]


def test_a_group_is_mixed_by_what_was_graded():
    policy = small_policy()
    rollouts = small_rollouts(policy, 4, samples=3)
    scores = [1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.5]
    mixed, flat = _sorted_out(
        scored(rollouts, scores, masked=(2, 9, 11))
    )  # of the first only what agrees, of the last one sample
    assert [group[0].task.id for group in mixed] == [rollouts[3].task.id]
    assert [group[0].task.id for group in flat] == [rollouts[i].task.id for i in (0, 6, 9)]
    assert all(len(group) == 3 for group in [*mixed, *flat])


class Turns:
    """Every second group agrees, until it was asked again."""

    def __init__(self) -> None:
        self.asked = 0

    def judge(self, rollouts):
        self.asked += 1
        flat = self.asked == 1
        return [Verdict(float(r.sample) if i // 2 % 2 or not flat else 1.0, "wrong") for i, r in enumerate(rollouts)]


def test_every_epoch_brings_every_problem_in_an_order_of_its_own():
    tasks = [Task(str(i), "1?") for i in range(30)]
    curriculum = Uniform(CurriculumSection(), ListSource(tasks), 0, lambda t: None)
    first, second = ([t.id for t in curriculum.sample(30)] for _ in range(2))
    assert sorted(first) == sorted(second) == sorted(t.id for t in tasks)
    assert first != second


# -- search ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def searching(tmp_path):
    """A run that has not begun to search, whose buffer holds three solutions; and responses to three problems."""
    config = small_config(**{
        "search.budget": 400, "search.below": 0.4, "search.enough": 0.8, "search.weight": 0.5, "search.batch": 5, "search.problems": 2,
        "rollout.segments": "semicolons", "rollout.max_tokens": 24, "run.out": str(tmp_path / "run"),
    })  # fmt: skip
    job = Run.new(config)
    job.begin()
    for r in small_rollouts(job.components.policy, 3):
        text = r.task.solution
        policy = job.components.policy
        ids = [*policy.tokenizer(text)["input_ids"], policy.eos_ids[0]]
        job.search._keep(r.answered(ids, text, finish="stop"))
    yield job
    job.close()


def test_lessons_weigh_what_is_left_to_learn_over_as_many_as_there_could_be(searching):
    with torch.no_grad():
        torch.nn.init.normal_(
            searching.components.critic.head.weight, std=0.1, generator=torch.Generator().manual_seed(0)
        )
        searching.components.critic.head.bias.fill_(-1.5)
    lessons, refused = searching.search._lessons(3)
    chances = searching.components.critic.logits([r.task for r in lessons.batch.rollouts]).sigmoid().tolist()
    assert lessons.weights == pytest.approx([0.5 * (1 - v / 0.8) for v in chances])
    assert len(set(lessons.weights)) == 3
    assert (lessons.most, refused) == (5, 0)
    wrong = next(iter(searching.search.solutions.values()))
    wrong.task.columns["answer"] = "no number"
    lessons, refused = searching.search._lessons(3)
    assert (len(lessons.weights), refused) == (2, 1)


def test_what_is_searched_failed_every_time_and_looks_hopeless(searching):
    with torch.no_grad():
        torch.nn.init.normal_(
            searching.components.critic.head.weight, std=0.3, generator=torch.Generator().manual_seed(0)
        )
        searching.components.critic.head.bias.fill_(-0.4)
    rollouts = [replace(r, finish="stop") for r in small_rollouts(searching.components.policy, 12)]
    judged = [r.judged(Verdict(*((1.0, "correct") if i == 3 else (0.0, "wrong")))) for i, r in enumerate(rollouts)]
    judged[5] = judged[5].judged(Verdict(0.0, "infra_error"))
    chances = searching.components.critic.logits([r.task for r in judged]).sigmoid().tolist()
    hopeless = [(v, r.task.id) for v, r in zip(chances, judged, strict=True) if v < 0.4]
    assert 2 < len(hopeless) < 12
    assert any(v < 0.4 for i, v in enumerate(chances) if i in (3, 5))
    open_ = [(v, n) for v, n in hopeless if n not in (judged[3].task.id, judged[5].task.id)]
    expected = [n for _, n in sorted(open_, reverse=True)[:2]]
    assert [r.task.id for r in searching.search._hard(judged)] == expected


def test_an_outcome_is_of_a_response_that_ended(searching):
    first, verdict = small_rollouts(searching.components.policy, 1)[0], Verdict(1.0, "correct")
    right, full = (first.answered(ids, "", finish="length", verdict=verdict) for ids in ([5, 6], [5] * 24))
    assert searching.search._outcome(right, ([1, 2], [None, 0.3])).outcome == 0.3
    assert searching.search._outcome(right, ([1, 2], [None, None])).outcome == 0.0
    assert searching.search._outcome(full, ([24], [0.9])).outcome == 0.0
    assert searching.search._outcome(replace(right, finish="stop"), ([1, 2], [None, 0.3])).outcome == 1.0


def test_a_prefix_is_worth_its_worst_step(searching):
    rollout = a_chain(searching.components.policy, "1;2;3;A", [0.9, 0.2, 0.6])
    found = searching.search._step_values(rollout, [1, 2, 4, 6, 8])
    assert found == [None, 0.9, 0.2, 0.2, 0.2]


def test_a_walk_prefers_what_the_policy_writes_more_often_and_what_is_worth_more():
    """Q of both children: (.4 + .5) / 2 = .45; the prior adds ½·1/2 to the first and ½·3/2 to the second."""
    often, seldom = Node((2,), drawn=3, visits=1, total=0.5), Node((1,), drawn=1, visits=1, total=0.5)
    root = Node((), visits=4, total=2.0, children={(1,): seldom, (2,): often})
    assert walk(root, 1.0, 0.5) == [root, often]
    seldom.total = 1.0  # a Q of .7
    assert walk(root, 0.1, 0.5) == [root, seldom]
    seldom.value = 0.0
    assert walk(root, 0.1, 0.5) == [root, often]
