"""Tree rollouts: real trees from the engine, what they share, what they cost, and what training makes of them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from sppo.errors import RecipeError
from sppo.learning.batch import pack
from sppo.learning.credit.base import credit
from sppo.learning.learner import Learner
from sppo.learning.update_stats import Tally
from sppo.rollout.engine import Branching, Sampling
from sppo.rollout.local import LocalEngine
from sppo.run.loop import train
from sppo.run.run import Run
from sppo.tasks.base import load_tasks
from sppo.types import Verdict

from ..conftest import logps_of, small_config, small_critic, small_policy, small_rollouts

OPEN = Branching(children=2, entropy=0.0, budget=60, segments="tokens", leaves=10**6)


def grown(policy, branching=OPEN, n=6, batch=16, max_tokens=12, temperature=1.0):
    source = load_tasks("chain:steps=1-2")
    prompts = [policy.prompt_ids(source[i]) for i in range(n)]
    engine = LocalEngine(policy)
    return prompts, engine.generate_trees(
        prompts, list(range(n)), Sampling(max_tokens, temperature, batch=batch), branching
    )


def config(**changes):
    return small_config(
        **{"objective.algorithm": "sppo-tree", "rollout.segments": "tokens", "rollout.entropy": 1.0} | changes
    )


# -- the trees --------------------------------------------------------------------------------------------------------


def test_leaves_share_what_lies_before_their_forks_and_stay_in_the_budget():
    policy = small_policy()
    prompts, trees = grown(policy)
    assert any(len(leaves) > 3 for leaves in trees)
    assert max(map(len, grown(policy, replace(OPEN, leaves=3, budget=10**6))[1])) == 2  # two forks could make four
    for leaves in trees:
        assert sum(1 / math.prod(k for _, _, k in s.forks) for s in leaves) == pytest.approx(1)
        rollouts = [(s.ids, s.forks) for s in leaves]
        distinct = {(tuple(f for f in forks if f[0] <= t), t) for ids, forks in rollouts for t in range(len(ids))}
        assert len(distinct) <= OPEN.budget
        for (a, fa), (b, fb) in pairwise(rollouts):
            at = next(x[0] for x, y in zip(fa, fb, strict=False) if x != y)
            assert a[:at] == b[:at]
    responses = [[s.ids for s in leaves] for leaves in trees]
    for prompt, same, leaves in zip(prompts, responses, trees, strict=True):
        found = policy.given_logps([prompt] * len(same), same)
        for mine, sample in zip(found, leaves, strict=True):
            assert mine == pytest.approx(sample.logps, abs=1e-4)


def test_a_tree_depends_on_its_prompt_and_seed_alone():
    policy = small_policy()
    trees = [grown(policy, batch=b)[1] for b in (1, 5, 64)]
    said = [[[(s.ids, s.forks) for s in leaves] for leaves in found] for found in trees]
    assert said[0] == said[1] == said[2]


def test_it_forks_where_the_whole_distribution_is_open_and_a_segment_has_ended():
    policy = small_policy()
    prompts, trees = grown(policy, replace(OPEN, entropy=4.4, budget=10**5), n=12, max_tokens=6, temperature=0.8)
    forks = 0
    for prompt, leaves in zip(prompts, trees, strict=True):
        for s in leaves:
            ids = torch.tensor([[*prompt, *s.ids]])
            logp_LV = (policy.model(ids).logits[0].detach()[len(prompt) - 1 :] / 0.8).log_softmax(-1)
            entropy = -(logp_LV.exp() * logp_LV).sum(-1)
            at = {t for t, _, _ in s.forks}
            forks += len(at)
            for t in range(len(s.ids)):
                if t in at:
                    assert entropy[t] >= 4.4 - 1e-3
                else:  # nothing else can forbid it: the budget is ample
                    assert entropy[t] < 4.4 + 1e-3
    assert forks > 10
    trees = grown(policy, replace(OPEN, segments="semicolons", budget=500), n=12)[1]
    places = [(s.ids, t) for leaves in trees for s in leaves for t, _, _ in s.forks]
    assert any(t > 0 for _, t in places)
    assert all(t == 0 or policy.text([ids[t - 1]]) in (";", "\n") for ids, t in places)


def test_weighted_leaves_are_samples_of_the_policy():
    """The chance of the first two tokens, from many small trees and from the policy itself."""
    policy = small_policy(seed=3)
    source = load_tasks("chain:steps=1")
    prompt = policy.prompt_ids(source[0])
    seeds = list(range(3000))
    trees = LocalEngine(policy).generate_trees([prompt] * 3000, seeds, Sampling(2), replace(OPEN, budget=8))
    weight: dict[tuple[int, ...], float] = {}
    for leaves in trees:
        for s in leaves:
            weight[tuple(s.ids)] = weight.get(tuple(s.ids), 0.0) + 1 / math.prod(k for _, _, k in s.forks)
    likeliest = sorted(weight, key=lambda ids: -weight[ids])[:8]
    theirs = [math.exp(sum(x)) for x in policy.given_logps([prompt] * 8, [list(ids) for ids in likeliest])]
    for ids, p in zip(likeliest, theirs, strict=True):
        assert weight[ids] / 3000 == pytest.approx(p, abs=4 * math.sqrt(p / 3000))


# -- what training makes of them --------------------------------------------------------------------------------------


def test_what_leaves_share_is_in_the_gradient_once():
    """The learner's gradient of a batch of trees, against one summed by hand, token by token."""
    policy = small_policy()
    rollouts = small_rollouts(policy, 6, branching=OPEN)
    scores = [0.0, 1.0, 1.0, 0.0, 0.25]
    rollouts = [r.judged(Verdict(scores[i % 5], "wrong", excluded=i == 3)) for i, r in enumerate(rollouts)]
    batch = pack(rollouts, policy.pad_id)
    assert batch.tokens < int(batch.response_len_B.sum())
    made = credit(config(), policy, small_critic())
    made.gate.cross, made.gate.square = [0.5] * 34, [1.0] * 34
    advantage_BT, _, metrics = made.advantage(batch, batch.reward_B)
    assert metrics["tree/leaves"] > 1
    assert 0 < metrics["tree/shared"] < 1
    learner = Learner(
        policy, small_critic(), None, config(**{"training.minibatches": 1, "training.max_grad_norm": 1e9})
    )
    learner.ratio_checked = True
    parts = learner._plan(batch, batch.keep_B.nonzero()[:, 0], 0, 0)[0]
    learner._policy_gradient(
        batch, advantage_BT, parts, torch.full_like(batch.behaviour_logp_BT, float("nan")), None, 0, Tally()
    )
    mine = torch.cat([p.grad.flatten() for p in policy.model.parameters()])
    policy.model.zero_grad()
    total, weight = 0.0, 0.0
    for b, r in enumerate(rollouts):
        if r.verdict.masked:
            continue
        one = logps_of(
            policy,
            torch.tensor([[*r.prompt_ids, *r.response_ids]]),
            torch.tensor([len(r.prompt_ids)]),
            torch.tensor([len(r.response_ids)]),
            1.0,
        ).logp_BT[0]
        for t in range(len(r.response_ids)):
            w = float(batch.count_BT[b, t])
            total = total + w * float(advantage_BT[b, t]) * one[t]
            weight += w
    (-total / weight).backward()
    theirs = torch.cat([p.grad.flatten() for p in policy.model.parameters()])
    assert torch.allclose(mine, theirs, atol=1e-5 * float(theirs.abs().max()) + 1e-7)
    trees = {}
    for b, r in enumerate(rollouts):
        for t in range(len(r.response_ids)):
            place = (int(batch.group_B[b]), t, tuple(f for f in r.forks if f[0] <= t))
            trees.setdefault(place, []).append(float(batch.count_BT[b, t]))
    for (_, _, forks), counts in trees.items():  # each token once, in one row, with its weight
        assert sorted(counts)[:-1] == [0.0] * (len(counts) - 1)
        assert max(counts) == pytest.approx(1 / math.prod(k for _, _, k in forks))


def test_a_run_on_trees_learns_resumes_to_the_same_bits_and_records_its_forks(tmp_path):
    import pyarrow.parquet as pq

    def run(name, steps):
        job = Run.new(config(**{"run.out": str(tmp_path / name), "training.steps": steps, "run.checkpoint_every": 2}))
        train(job)
        job.close()
        return job

    whole, broken = run("whole", 4), run("broken", 2)
    again = Run.resume(broken.directory.path, steps=4)
    train(again)
    again.close()
    assert again.policy.fingerprint() == whole.policy.fingerprint()
    rows = pq.read_table(whole.directory.path / "rollouts" / "step-000003.parquet").to_pylist()
    assert any(row["forks"] for row in rows)


def test_nonsense_is_one_sentence():
    for changes, why in (
        ({"rollout.branch": 1}, "rollout.branch: input should be greater than or equal to 2"),
        ({"rollout.branch": 9, "rollout.leaves": 8}, "more than a tree may have leaves"),
        ({"rollout.budget": 5}, "rollout.budget = 5 tokens a tree is less than one response"),
        ({"rollout.samples": 4}, "makes its samples by branching"),
        ({"rollout.engine": "vllm"}, "needs rollout.engine = 'local'"),
        ({"objective.phi": "segments"}, "needs the credit made for it"),
        ({"rollout.kind": "samples"}, "compares the branches of trees"),
        (
            {"objective.kl": 0.1, "objective.kl_form": "k2", "objective.kl_level": "sequence"},
            "no whole responses in its loss",
        ),
        ({"objective.average": "responses"}, "counts every shared token once"),
    ):
        with pytest.raises(RecipeError, match=why):
            config(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"curriculum.kind": "predicted"},
        {"objective.kl": 0.1},
        {"objective.kl_form": "k3", "objective.kl": 0.1},
        {"objective.entropy_bonus": 0.1},
        {"rollout.top_p": 0.9},
        {"rollout.truncated": "mask"},
        {"training.minibatches": 4, "rollout.prompts": 4},
    ],
    ids=lambda c: next(iter(c)),
)
def test_trees_go_with_the_rest(changes, tmp_path):
    job = Run.new(config(**{"run.out": str(tmp_path / "run"), "training.steps": 2} | changes))
    before = job.policy.fingerprint()
    train(job)
    job.close()
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(m["tree/leaves"] > 1 and m["update/skipped_non_finite"] == 0 for m in metrics)
    assert all(m["rollout/tokens"] <= 4 * 12 * 16 for m in metrics)
    if changes.get("rollout.truncated") != "mask":  # where next to all are cut off, nothing may be left to learn from
        assert job.policy.fingerprint() != before
