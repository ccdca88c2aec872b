"""The hybrid's credit: what it may see, what it makes of step scores, and that it is unbiased whatever they are."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from sppo.errors import RecipeError
from sppo.learning.batch import pack
from sppo.learning.credit.hybrid import PLACES, Gate, StepCredit, levelled, stretch_scores
from sppo.learning.credit.loading import load_credit
from sppo.learning.credit.optimal_baseline import squared_scores
from sppo.rewards.loading import load_reward
from sppo.rewards.segments import seen_ends, segment_starts, token_ends
from sppo.run.loop import train
from sppo.run.run import Run
from sppo.types import Rollout, Task, Verdict

from ..conftest import small_config, small_critic, small_policy
from ..exact.tabular import INDEX, LIMIT, MASK_ST, RESPONSES, parameters, rewards, true_gradient
from ..exact.test_estimators import error, expected_gradient

STEPS = "answer + 0 * steps:check=chain,split=semicolons"
KINDS = 2 * (PLACES + 1)
CHAIN = Task("chain/0", [{"role": "user", "content": "7+5-3*2?"}], {"answer": "8"})


def said(policy, text: str, task: Task = CHAIN, use: str = STEPS) -> Rollout:
    ids = [*policy.tokenizer(text)["input_ids"], policy.eos_ids[0]]
    rollout = Rollout.answer(task, policy.prompt_ids(task), ids, [-1.0] * len(ids), "stop", policy.text(ids))
    return rollout.judged(load_reward(use).judge([rollout])[0])


def config(**changes):
    return small_config(
        **{"objective.algorithm": "sppo-hybrid", "rollout.segments": "semicolons", "reward.use": STEPS} | changes
    )


# -- where steps begin ------------------------------------------------------------------------------------------------


def test_a_step_has_ended_once_its_separator_was_written():
    policy = small_policy()
    rollout = said(policy, "7+5=2;2-3=9;9*2=8;A:8")
    assert segment_starts(policy, rollout, "semicolons") == [0, 6, 12, 18]
    assert segment_starts(policy, rollout, "lines") == [0]
    assert segment_starts(policy, said(policy, ";;a;"), "semicolons") == [0, 1, 2, 4]  # an EOS follows the last one
    assert seen_ends("a; b\n\nc", [1, 4, 7], "semicolons") == [2, 5, None]
    assert seen_ends("a \n", [1], "lines") == [3]  # a step is stripped of space: it has ended all the same
    assert seen_ends("a\n \nb", [1, 5], "paragraphs") == [4, None]
    assert token_ends(policy, rollout, [0, 1, 6, 21]) == [0, 1, 6, 21]


# -- what it may see --------------------------------------------------------------------------------------------------


def test_credit_before_a_token_does_not_depend_on_it_or_what_follows():
    """The same outcome after another continuation: what was credited up to there is the same number."""
    policy = small_policy()
    made = load_credit(config(), policy, small_critic())
    made.gate.cross, made.gate.square = [0.7] * KINDS, [1.0] * KINDS
    made.effect, made.number = [[-3.0, 1.0, 2.0]] * (PLACES + 1), [[5.0, 5.0, 5.0]] * (PLACES + 1)
    state = made.state_dict()
    text = "7+5=2;2-3=8;8*2=6;A:6"
    others = ["9;;1=2;", " ;2", " \n1;", "\n\n3;A:1", "", ";", "2-3=9;9*2=8;A:8"]
    reward_B = torch.tensor([0.3])
    whole = _advantage(made, state, policy, text, reward_B)
    assert len(set(whole.tolist())) > 2  # it does tell stretches apart
    for t in range(1, len(text)):
        for other in others:
            changed = _advantage(made, state, policy, text[:t] + other, reward_B)
            assert torch.allclose(changed[: t + 1], whole[: t + 1], atol=1e-6), (t, other)


def _advantage(made, state, policy, text, reward_B):
    import copy

    made.load_state_dict(copy.deepcopy(state))
    batch = pack([said(policy, text)], policy.pad_id)
    return made.advantage(batch, reward_B)[0][0]


@pytest.mark.parametrize("seed", range(4))
def test_the_gradient_is_unbiased_for_any_scores_and_any_gate(seed):
    """Enumerated: Φ − b a random function of what was written, η a random number of each place."""
    theta, reward_S = parameters(seed), rewards(seed)
    random = torch.Generator().manual_seed(seed)
    gap = torch.randn(len(INDEX), generator=random, dtype=torch.float64)
    gate = Gate()
    gate.cross, gate.square = torch.rand(KINDS, generator=random).tolist(), [1.0] * KINDS
    prefixes = [(s, t, t, float(gap[INDEX[y[:t]]])) for s, y in enumerate(RESPONSES) for t in range(1, len(y))]
    square_ST = torch.rand(len(RESPONSES), LIMIT, generator=random)
    advantage_ST, metrics = gate.less(reward_S - 0.37, prefixes, stretch_scores(square_ST, prefixes), LIMIT)
    assert metrics["hybrid/eta"] > 0.1
    found = expected_gradient(theta, theta, advantage_ST, ratio="token", mask=MASK_ST)
    assert error(found, true_gradient(theta, reward_S)) < 1e-10
    late = [(s, t - 1, place, g) for s, t, place, g in prefixes]  # the control: credit that sees its own token
    gate.cross, gate.square = [0.8] * KINDS, [1.0] * KINDS
    biased, _ = gate.less(reward_S - 0.37, late, stretch_scores(square_ST, late), LIMIT)
    assert (
        error(expected_gradient(theta, theta, biased, ratio="token", mask=MASK_ST), true_gradient(theta, reward_S))
        > 1e-3
    )


# -- what it makes of scores ------------------------------------------------------------------------------------------


def test_the_gate_by_hand():
    gate = Gate()
    rest_B = torch.tensor([0.5, -0.5])
    square_BT = torch.tensor([[9.0, 0.5, 0.5], [9.0, 1.0, 1.0]])  # from each prefix on, 1

    def learnt(prefixes):
        return gate.less(rest_B, prefixes, stretch_scores(square_BT, prefixes), 3)

    first, metrics = learnt([(0, 1, 1, 0.4), (1, 1, 1, 0.2), (1, 2, 2, 0.3)])
    assert torch.equal(first, torch.tensor([[0.5] * 3, [-0.5] * 3]))  # nothing is known yet
    assert metrics == {"hybrid/eta": 0.0}
    # place 1: cross 0.5·0.4 − 0.5·0.2 = 0.1, square 0.16 + 0.04 = 0.2: a half. Place 2: −0.15 / 0.09: 0. Below b nothing is known
    second, metrics = learnt([(0, 1, 1, 0.4), (0, 2, 2, 0.4), (1, 1, 1, -0.4)])
    assert second[0].tolist() == pytest.approx([0.5, 0.3, 0.5])
    assert second[1].tolist() == pytest.approx([-0.5] * 3)
    assert metrics["hybrid/eta"] == pytest.approx(0.5 / 3)
    # squared scores 0.5, 0.5 and 2, their mean 1
    assert gate.cross[3] == pytest.approx(0.9 * 0.1 + 0.5 * 0.5 * 0.4)
    assert gate.cross[2] == pytest.approx(2 * 0.5 * 0.4)


def test_squared_scores_are_what_a_wrong_baseline_costs():
    """(1 − π)² of the tokens from a prefix to the next, with mean 1; nothing beyond a response."""
    policy = small_policy()
    batch = pack([said(policy, "7+5=2;A:2"), said(policy, "A:2")], policy.pad_id)
    square_BT = squared_scores(policy, batch)
    assert torch.allclose(square_BT[0], torch.tensor((1 - math.exp(-1)) ** 2))
    assert square_BT[1, 4:].abs().max() == 0
    found = stretch_scores(square_BT, [(0, 2, 1, 0.1), (0, 6, 2, 0.1), (1, 1, 1, 0.1)])  # 4, 4 and 3 tokens
    assert found == pytest.approx([12 / 11, 12 / 11, 9 / 11])
    assert levelled([0.0, 0.0]) == [1.0, 1.0]
    assert levelled([]) == []


def test_the_fit_is_the_baseline_of_least_variance():
    """A token right with 0.9: the wrong one's score is long, so the best baseline is 0.1, not the 0.9 that a mean would be. By hand:
    in one of two cases each weighs (1 − π)², 0.9 · 0.01 for a reward of 1 and 0.1 · 0.81 for 0."""
    gate, b = Gate(), 0.5
    rest_B = torch.tensor([0.5] * 9 + [-0.5])
    square_BT = torch.tensor([[0.1**2]] * 9 + [[0.9**2]])
    for gap in (0.4, -0.5):
        prefixes = [(i, 0, 1, gap) for i in range(10)]
        gate.less(rest_B, prefixes, stretch_scores(square_BT, prefixes), 1)
    assert gate.eta(1, 0.4) == 0.0  # a Φ of 0.9 would be worse than b
    assert b + gate.eta(1, -0.5) * -0.5 == pytest.approx(0.1)  # of one of 0 four fifths are taken


def hundred(policy, wrong_text: str, right_text: str, use: str = STEPS):
    """Half of them fail with a wrong first step, half succeed."""
    return pack([said(policy, right_text if i % 2 else wrong_text, use=use) for i in range(40)], policy.pad_id)


def test_a_wrong_step_takes_the_blame():
    policy = small_policy()
    made = load_credit(config(), policy, small_critic())
    assert isinstance(made, StepCredit)
    batch = hundred(policy, "7+5=3;3-3=0;0*2=0;A:0", "7+5=2;2-3=9;9*2=8;A:8")
    for _ in range(20):
        advantage_BT, value_B, _ = made.advantage(batch, batch.reward_B)
    wrong, right = advantage_BT[0], advantage_BT[1]
    assert torch.allclose(wrong[:6], (0 - value_B[0]).expand(6))  # the wrong step itself: all of it
    assert wrong[6:].abs().max() < 0.15  # afterwards nothing could be saved
    assert torch.allclose(right[:6], (1 - value_B[1]).expand(6))
    assert right[6:].abs().max() < 0.15


def test_a_scorer_that_is_pleased_with_everything_changes_nothing():
    policy = small_policy()
    pleased = f"answer + 0 * steps:check={__name__}:pleased,split=semicolons"
    made = load_credit(config(**{"objective.phi": "steps", "reward.use": pleased}), policy, small_critic())
    batch = hundred(policy, "7+5=3;3-3=0;0*2=0;A:0", "7+5=2;2-3=9;9*2=8;A:8", pleased)
    for _ in range(20):
        advantage_BT, value_B, _ = made.advantage(batch, batch.reward_B)
    plain_B = batch.reward_B - value_B
    assert (advantage_BT - plain_B[:, None]).abs().max() < 0.1


def pleased(task, steps):
    return [1.0 for _ in steps]


def test_masked_responses_teach_nothing():
    policy = small_policy()
    made = load_credit(config(), policy, small_critic())
    rollouts = [said(policy, "7+5=2;2-3=9;9*2=8;A:8") for _ in range(4)]
    masked = [replace(r, verdict=replace(r.verdict, excluded=True)) for r in rollouts]
    made.advantage(pack(masked, policy.pad_id), torch.ones(4))
    assert sum(made.gate.square) == 0


# -- in a run ---------------------------------------------------------------------------------------------------------


def test_a_run_resumes_to_the_same_bits(tmp_path):
    def run(name, steps):
        job = Run.new(
            config(
                **{
                    "run.out": str(tmp_path / name),
                    "training.steps": steps,
                    "run.checkpoint_every": 2,
                }
            )
        )
        train(job)
        job.close()
        return job

    whole, broken = run("whole", 4), run("broken", 2)
    again = Run.resume(broken.components.directory.path, steps=4)
    train(again)
    again.close()
    assert again.components.policy.fingerprint() == whole.components.policy.fingerprint()


def test_nonsense_is_one_sentence(tmp_path):
    for changes, why in (
        ({"objective.ratio": "sequence"}, "set ratio = 'token'"),
        ({"rollout.segments": "auto"}, "rollout.segments"),
    ):
        with pytest.raises(RecipeError, match=why):
            config(**changes)
    policy = small_policy()
    made = load_credit(config(), policy, small_critic())
    for use, why in (("answer", "names none"), ("answer + 0 * steps:check=chain", "name a split")):
        with pytest.raises(RecipeError, match=why):
            config(**{"reward.use": use})
    for use, why in (("answer", "measures none"), ("answer + 0 * steps:check=chain", "split=auto looks at the whole")):
        batch = pack([said(policy, "7+5=2;A:2", use=use)], policy.pad_id)
        with pytest.raises(RecipeError, match=why):
            made.advantage(batch, batch.reward_B)
    blank = Rollout.answer(
        CHAIN, [1], [2], [-1.0], "stop", "", verdict=Verdict(1.0, "correct", {"steps": [], "split": "lines"})
    )
    assert made._stretches(blank) == []


def test_a_scorer_that_failed_on_one_response_says_nothing_of_it():
    policy = small_policy()
    made = load_credit(config(), policy, small_critic())
    evidence = {"parts": [{"reward": "answer", "outcome": "correct"}, {"reward": "steps:…", "outcome": "infra_error"}]}
    failed = replace(said(policy, "7+5=2;A:2"), verdict=Verdict(1.0, "correct", evidence))
    assert made._stretches(failed) == []


def test_bytes_of_half_a_character_end_no_step():
    class Bytes:
        def text(self, ids):
            return bytes(ids).decode(errors="replace")

    text = "😀\n1"
    rollout = Rollout.answer(CHAIN, [1], list(text.encode()), [-1.0] * 6, "stop", text)
    assert token_ends(Bytes(), rollout, [1, 2]) == [4, 5]
