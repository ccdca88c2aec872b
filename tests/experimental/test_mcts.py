"""Tree search for hard problems, its buffer, and what training makes of both."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import pytest
import torch

from sppo.errors import RecipeError, RewardError
from sppo.experimental.mcts import Judged, Node, hang, search, walk
from sppo.experimental.search import _correct, _solution, _task
from sppo.learning.batch import pack
from sppo.learning.learner import Learner
from sppo.learning.lessons import Lessons
from sppo.learning.update_stats import Tally
from sppo.rewards.loading import load_reward
from sppo.run.loop import train
from sppo.run.run import Run
from sppo.types import Rollout, Task, Verdict

from ..conftest import logps_of, small_config, small_critic, small_policy, small_rollouts

# -- the search -------------------------------------------------------------------------------------------------------
# A lock of eight digits; a "policy" that knows nothing; segments are single digits, and the value says how far the prefix is right.

LOCK = (3, 1, 4, 1, 5, 9, 2, 6)


def pick_locks(value: bool, budget: int, problems: int = 3, seed: int = 1):
    def write_on(prefixes, seeds):
        return [
            tuple(random.Random(s).choices(range(10), k=len(LOCK) - len(p)))
            for (_, p), s in zip(prefixes, seeds, strict=True)
        ]

    def judge(responses):
        out = []
        for _, ids in responses:
            values = [float(ids[:n] == LOCK[:n]) if value else None for n in range(1, len(LOCK) + 1)]
            out.append(Judged(ids, range(1, len(LOCK) + 1), values, float(ids == LOCK), ids == LOCK))
        return out

    return search(problems, write_on, judge, budget=budget, longest=len(LOCK), seed=seed, width=4.0)


def test_a_prefix_value_finds_what_outcomes_alone_cannot():
    guided, blind = pick_locks(True, 8_000), pick_locks(False, 8_000)
    assert all(f.solution == LOCK for f in guided)
    assert all(f.solution is None for f in blind)  # one in 10⁸
    for f in (*guided, *blind):
        assert f.tokens <= 8_000
    assert guided == pick_locks(True, 8_000)  # a function of the seed
    assert guided != pick_locks(True, 8_000, seed=2)


def test_the_budget_is_never_exceeded_and_spent():
    for budget in (8, 9, 31, 100):
        for f in pick_locks(False, budget):
            assert budget - len(LOCK) < f.tokens <= budget


def test_outcomes_go_all_the_way_up_and_puct_follows_them():
    root = Node(())
    hang([root], Judged((1, 2, 3), [1, 3], [None, None], 0.0, False))
    hang([root], Judged((1, 2, 4), [1, 3], [None, None], 1.0, False))
    hang([root], Judged((5, 6), [1, 2], [None, None], 0.0, False))
    one = root.children[(1,)]
    assert (root.visits, root.total, one.visits, one.total, one.drawn) == (3, 1.0, 2, 1.0, 2)
    assert one.children[(2, 4)].over
    assert not one.over
    assert one.q(0.5) == pytest.approx((0.5 + 1) / 3)
    assert walk(root, explore=0.0, width=1.0)[1:] == [
        one
    ]  # drawn from three times ≥ √3: it goes on to the better child
    assert walk(root, explore=0.0, width=2.0) == [root]  # fewer than 2√3: once more
    # by hand: Q + P √N / (1 + n) with the root's Q = 1/4 where nobody knows the value
    five = root.children[(5,)]
    scores = {
        "one": (0.25 + 1) / 3 + 2 / 3 * math.sqrt(3) / 3,
        "five": (0.25 + 0) / 2 + 1 / 3 * math.sqrt(3) / 2,
    }
    assert scores["one"] > scores["five"]
    assert walk(root, explore=1.0, width=1.0)[1] is one
    one.visits, one.total = 20, 1.0
    assert walk(root, explore=1.0, width=0.1)[1] is five


def test_an_ungraded_response_is_forgotten():
    found = search(
        1, lambda prefixes, seeds: [(1, 2)] * len(prefixes), lambda responses: [None] * len(responses),
        budget=20, longest=2, seed=0,
    )  # fmt: skip
    assert found[0].tokens == 20
    assert found[0].solution is None


STEPS = "answer + 0 * steps:check=chain,split=semicolons"

# -- in training ------------------------------------------------------------------------------------------------------


def config(**changes):
    base = {
        "task.train": "chain:steps=1-2", "rollout.segments": "semicolons", "rollout.max_tokens": 24, "search.budget": 400,
        "search.below": 1.0, "search.enough": 1.0, "search.problems": 4, "bootstrap.steps": 60, "bootstrap.batch": 16, "bootstrap.lr": 3e-3,
        "training.steps": 4,
    }  # fmt: skip
    return small_config(**base | changes)


def trained(tmp_path, name, **changes):
    job = Run.new(config(**{"run.out": str(tmp_path / name), "run.checkpoint_every": 2} | changes))
    train(job)
    job.close()
    return job


def test_a_run_searches_learns_only_verified_solutions_and_resumes_to_the_same_bits(tmp_path):
    whole, broken = trained(tmp_path, "whole"), trained(tmp_path, "broken", **{"training.steps": 2})
    again = Run.resume(broken.components.directory.path, steps=4)
    train(again)
    again.close()
    assert again.components.policy.fingerprint() == whole.components.policy.fingerprint()
    folder = whole.components.directory.path
    entries = [json.loads(line) for line in (folder / "buffer.jsonl").read_text().splitlines()]
    assert entries
    assert len({(e["task"]["id"], e["response"]) for e in entries}) == len(entries)
    for e in entries:
        said = _solution(e)
        assert load_reward("answer").judge([said])[0].outcome == "correct"
        assert e["found_by"] == "mcts, value=outcomes"
        assert e["simulations"] >= 1
        assert e["policy_fingerprint"]
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert sum(m["search/fresh"] for m in steps) == len(entries) == steps[-1]["search/buffer"]
    assert any(m.get("search/loss") for m in steps)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["generated_tokens"] == sum(m["rollout/tokens"] + m["search/tokens"] for m in steps)


def test_what_the_verifier_no_longer_accepts_is_not_learnt(tmp_path):
    job = trained(tmp_path, "run")
    for solution in job.search.solutions.values():
        solution.task.columns["answer"] = "no number"
    lessons, refused = job.search._lessons(9)
    assert lessons is None
    assert refused == min(len(job.search.solutions), job.components.config.search.batch)


def test_a_lesson_weighs_less_the_likelier_its_problem_is_solved(tmp_path):
    job = trained(tmp_path, "run", **{"search.below": 0.6, "search.enough": 0.6, "search.weight": 0.8})
    with torch.no_grad():
        job.components.critic.head.weight.zero_()
        job.components.critic.head.bias.fill_(math.log(0.3 / 0.7))
    lessons, _ = job.search._lessons(9)
    assert lessons.weights == pytest.approx([0.4] * len(lessons.weights))
    with torch.no_grad():
        job.components.critic.head.bias.fill_(math.log(0.6 / 0.4) + 0.01)
    assert job.search._lessons(9)[0] is None


def test_step_scores_guide_the_search(tmp_path):
    job = trained(tmp_path, "run", **{"search.value": "steps", "reward.use": STEPS, "training.steps": 1})
    judge = load_reward(STEPS)
    first, *_ = small_rollouts(job.components.policy, 4)
    text = first.task.solution.replace("=", "=1", 1)  # the first step is wrong
    ids = [*job.components.policy.tokenizer(text)["input_ids"], job.components.policy.eos_ids[0]]
    said = Rollout.answer(first.task, first.prompt_ids, ids, [0.0] * len(ids), "stop", text)
    said = said.judged(judge.judge([said])[0])
    (ends, values), *_ = job.search._values([said])
    assert ends[-1] == len(ids)
    assert values[-1] == 0.0
    assert not job.search._outcome(said, (ends, values)).solved


def test_the_lessons_gradient_is_the_weighted_likelihood():
    policy = small_policy()
    rollouts = small_rollouts(policy, 3)
    batch, weights = pack(rollouts, policy.pad_id), [0.5, 1.0, 0.25]
    learner = Learner(policy, small_critic(), None, small_config())
    learner._teach(Lessons(batch, weights, 4), 0, 1, Tally())  # there could have been four
    mine = torch.cat([p.grad.flatten() for p in policy.model.parameters()])
    policy.model.zero_grad()
    loss = 0.0
    for r, w in zip(rollouts, weights, strict=True):
        ids = torch.tensor([[*r.prompt_ids, *r.response_ids]])
        logp = logps_of(
            policy, ids, torch.tensor([len(r.prompt_ids)]), torch.tensor([len(r.response_ids)]), 1.0
        ).logp_BT
        loss = loss - w * logp.mean() / 4
    loss.backward()
    theirs = torch.cat([p.grad.flatten() for p in policy.model.parameters()])
    assert torch.allclose(mine, theirs, atol=1e-6 + 1e-5 * float(theirs.abs().max()))


def test_what_the_search_counts_is_what_was_sampled_and_no_response_is_too_long(tmp_path):
    job = trained(tmp_path, "run", **{"training.steps": 1})
    written = []
    generate = job.components.engine.generate

    def heard(prompts, seeds, sampling, progress=None, limits=None):
        samples = generate(prompts, seeds, sampling, progress, limits)
        written.append(
            (sum(len(s.ids) for s in samples), [len(p) + len(s.ids) for p, s in zip(prompts, samples, strict=True)])
        )
        return samples

    job.components.engine.generate = heard
    hard = small_rollouts(job.components.policy, 4)
    found = job.search._search(0, hard)
    assert sum(f.tokens for f in found) == sum(n for n, _ in written) > 0
    longest = max(len(r.prompt_ids) for r in hard) + job.components.config.rollout.max_tokens
    assert max(n for _, lengths in written for n in lengths) <= longest


def test_a_reward_that_fails_on_prefixes_is_no_broken_reward(tmp_path):
    job = trained(tmp_path, "run", **{"training.steps": 1})

    def judge(rollouts):
        raise RewardError("cannot read half a response")

    job.components.reward.judge = judge
    hard = small_rollouts(job.components.policy, 2)
    found = job.search._search(0, hard)
    assert all(f.solution is None and f.tokens > 0 for f in found)
    assert job.search.ungraded == sum(f.simulations for f in found)
    assert "half a response" in job.search.reason


def test_groups_that_dapo_throws_away_are_searched(tmp_path):
    job = trained(
        tmp_path, "run", **{"objective.algorithm": "dapo", "rollout.samples": 2, "rollout.prompts": 4, "training.steps": 1, "bootstrap.steps": 1}
    )  # fmt: skip
    (line,) = [json.loads(x) for x in (job.components.directory.path / "metrics.jsonl").read_text().splitlines()]
    assert line["rollout/thrown_away"] > 0
    assert line["search/problems"] == 4


def test_an_unfinished_step_is_not_judged_yet(tmp_path):
    job = trained(
        tmp_path,
        "run",
        **{"search.value": "steps", "reward.use": STEPS, "rollout.segments": "tokens", "training.steps": 1},
    )
    first, *_ = small_rollouts(job.components.policy, 4)
    half, _, _ = first.task.solution.partition("=")
    ids = job.components.policy.tokenizer(half)["input_ids"]
    said = Rollout.answer(first.task, first.prompt_ids, ids, [0.0] * len(ids), "length", half)
    said = said.judged(load_reward(STEPS).judge([said])[0])
    (ends, values), *_ = job.search._values([said])
    assert ends == list(range(1, len(ids) + 1))
    assert values == [None] * len(ids)


def test_what_a_gate_refuses_or_what_was_cut_off_is_no_solution():
    first, *_ = small_rollouts(small_policy(), 4)
    right = replace(first, finish="stop").judged(Verdict(1.0, "correct"))
    assert _correct(right)
    assert not _correct(right.judged(Verdict(0.0, "correct", correctness=1.0)))
    assert not _correct(replace(right, finish="length"))
    assert not _correct(right.judged(Verdict(1.0, "correct", excluded=True)))


def test_columns_that_json_would_change_are_refused():
    assert _task(Task("t", "p", {"answer": "4", "tests": [1, {"a": None}]}))["columns"]["answer"] == "4"
    for value in ((1, 2), {1: "a"}, b"x", object()):
        with pytest.raises(RecipeError, match="JSON cannot hold the columns of task t: answer"):
            _task(Task("t", "p", {"answer": value}))


def test_nonsense_is_one_sentence():
    for changes, why in (
        ({"search.budget": 5}, "search.budget = 5 tokens per problem is less than one response"),
        ({"search.value": "critic"}, "asks a critic that reads prefixes"),
        ({"search.value": "steps"}, "reward.use names none"),
        ({"search.value": "steps", "reward.use": "answer + 0 * steps:check=chain"}, "name a split"),
        ({"search.value": "luck"}, "search.value"),
        ({"search.below": 0.9, "search.enough": 0.1}, "would weigh nothing"),
    ):
        with pytest.raises(RecipeError, match=why):
            config(**changes)


def test_a_critic_that_reads_prefixes_guides_the_search(tmp_path):
    changes = {"objective.algorithm": "ppo", "search.value": "critic", "training.steps": 2}
    job = trained(tmp_path, "run", **changes)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(m["search/simulations"] > 0 for m in lines)
    first, *_ = small_rollouts(job.components.policy, 2)
    ((_, values),) = job.search._values([first])
    assert all(0 <= v <= 1 for v in values)
