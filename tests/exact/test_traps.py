"""Known mistakes of sequence-level training: each has a test that fails when it is made."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from sppo.errors import EngineMismatch, RunFailure
from sppo.kernels.logprobs import token_logps, token_logps_from_logits
from sppo.learning.batch import micro_batches, pack
from sppo.learning.learner import Learner
from sppo.models.critic import Critic
from sppo.models.policy import Policy
from sppo.models.tiny import build
from sppo.objective.surrogate import normalised_sum
from sppo.recipe.sections import CurriculumSection
from sppo.rewards.combine import MixedReward, Part
from sppo.rewards.user_reward import CallableReward
from sppo.rollout.engine import Sampling
from sppo.rollout.local import LocalEngine
from sppo.run.curriculum import Uniform
from sppo.tasks.base import ListSource
from sppo.tasks.loading import load_tasks
from sppo.types import Task, Verdict

from ..conftest import gradients_of, logps_of, small_config, small_critic, small_policy, small_rollouts


def judged(rollouts, scores=None):
    """The same rollouts with alternating rewards, so that there is something to learn."""
    return [
        r.judged(Verdict(float(i % 2) if scores is None else scores[i], "correct" if i % 2 else "wrong"))
        for i, r in enumerate(rollouts)
    ]


def a_step(policy, critic, rollouts, **overrides):
    config = small_config(**overrides)
    learner = Learner(policy, critic, policy.as_reference() if config.needs_reference else None, config)
    batch = pack(rollouts, policy.pad_id)
    advantage_B, _, _ = learner.advantage(batch)
    return learner, batch, learner.update(batch, advantage_B, 0)


def first_gradient(rollouts, **overrides):
    """The gradient of a step's first update, before the optimiser takes it."""
    config, policy = small_config(**overrides), small_policy()
    learner = Learner(policy, small_critic(), policy.as_reference() if config.needs_reference else None, config)
    batch, seen = pack(rollouts, policy.pad_id), gradients_of(learner)
    learner.update(batch, learner.advantage(batch)[0], 0)
    return seen[0]


def same(a, b):
    """Two gradients, but for float32's rounding; and they are not zero."""
    largest = float(a.abs().max())
    return largest > 1e-3 and float((a - b).abs().max()) < 1e-5 * max(largest, 1.0)


def weights(policy):
    return torch.cat([p.detach().flatten() for p in policy.model.parameters()])


def learner_logps(policy, rollouts, temperature):
    batch = pack(rollouts, policy.pad_id)
    return policy.logps(batch.ids_BL, batch.action_BL, temperature)


# -- temperature ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_temperature_divides_the_logits_in_engine_and_learner_alike(policy, temperature):
    rollouts = small_rollouts(policy, temperature=temperature)
    logps = learner_logps(policy, rollouts, temperature)
    for b, r in enumerate(rollouts):
        assert torch.allclose(logps.logp_BT[b, : len(r.logps)], torch.tensor(r.logps), atol=2e-5)
    wrong = learner_logps(policy, rollouts, temperature + 0.3)
    assert not torch.allclose(wrong.logp_BT, logps.logp_BT, atol=1e-3)


def test_reference_uses_the_sampling_temperature_too(policy):
    """At the start π_θ = π_ref, so the reference anchor's first ratio is 1 at any temperature."""
    rollouts = judged(small_rollouts(policy, temperature=0.6))
    _, _, metrics = a_step(
        policy,
        small_critic(),
        rollouts,
        rollout__temperature=0.6,
        objective__anchor="reference",
        training__minibatches=1,
    )
    assert metrics["engine/gap_mean"] < 1e-4
    batch = pack(rollouts, policy.pad_id)
    frozen = small_policy().as_reference()
    learner = Learner(
        small_policy(), small_critic(), frozen, small_config(rollout__temperature=0.6, objective__anchor="reference")
    )
    ref = learner._all_logps(frozen, batch)
    assert torch.allclose(ref[batch.mask_BT], batch.behaviour_logp_BT[batch.mask_BT], atol=2e-5)


# -- EOS and padding -------------------------------------------------------------------------------------------------------


def test_the_chosen_eos_is_an_action_and_padding_is_not_even_when_pad_is_eos():
    policy = small_policy()
    policy.tokenizer.pad_token = policy.tokenizer.eos_token
    policy = Policy(policy.model, policy.tokenizer)
    assert policy.pad_id == policy.eos_ids[0]
    rollouts = small_rollouts(policy, 64, max_tokens=40)
    stopped = [r for r in rollouts if r.finish == "stop"]
    assert stopped, "the test needs responses that end"
    with torch.no_grad():
        logps = learner_logps(policy, rollouts, 1.0)
    for b, r in enumerate(rollouts):
        own = int(logps.mask_BT[b].sum())
        assert own == len(r.response_ids)
        assert (r.response_ids[-1] == policy.pad_id) == (r.finish == "stop")
        assert policy.pad_id not in r.response_ids[:-1]
        assert float(logps.logp_BT[b, own:].abs().sum()) == 0.0
        assert math.isclose(float(logps.logp_BT[b].sum()), sum(r.logps), abs_tol=1e-3)


def test_a_truncated_response_has_no_eos(policy):
    for r in small_rollouts(policy, 64, max_tokens=3):
        assert (r.finish == "length") == (r.response_ids[-1] not in policy.eos_ids)
        assert len(r.response_ids) <= 3


def test_truncated_is_penalised_or_masked(policy):
    def generous(prompts, completions):
        return [1.0] * len(prompts)

    rollouts = [r for r in small_rollouts(policy, 64, max_tokens=3) if r.finish == "length"]
    from sppo.rollout.collect import truncation_rule

    reward = CallableReward(generous, "generous")
    for r, v in zip(rollouts, reward.judge(rollouts), strict=True):
        assert truncation_rule(r, v, "penalise").score == 0.0
        assert not truncation_rule(r, v, "penalise").masked
        assert truncation_rule(r, v, "mask").masked


# -- masks and denominators ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", ["sequence", "token"])
def test_a_masked_sample_leaves_the_denominator(ratio):
    """The gradient of a batch with masked rows is that of the batch without them."""
    base = judged(small_rollouts(small_policy(), 16))
    masked = [r if i % 4 else replace(r, verdict=Verdict(0.0, "infra_error")) for i, r in enumerate(base)]
    kept = [r for r in masked if not r.verdict.masked]
    found = [first_gradient(rs, training__minibatches=1, objective__ratio=ratio) for rs in (masked, kept)]
    assert same(*found)
    assert not same(found[0], 0.75 * found[1])  # what a denominator of all sixteen would give


def test_a_fully_masked_batch_changes_nothing_and_still_back_propagates():
    policy = small_policy()
    before = weights(policy)
    rollouts = [r.judged(Verdict(0.0, "invalid_task")) for r in small_rollouts(policy)]
    _, _, metrics = a_step(policy, small_critic(), rollouts)
    assert torch.equal(weights(policy), before)
    assert "masked" in metrics["update/skipped"]
    x = torch.full((4,), float("nan"), requires_grad=True)
    total = normalised_sum(x, torch.zeros(4), 0.0)
    assert float(total.detach()) == 0.0
    total.backward()
    assert torch.equal(x.grad, torch.zeros(4))


@pytest.mark.parametrize("ratio", ["sequence", "geometric", "token"])
def test_micro_batches_do_not_change_the_update(ratio):
    """Global normalisation: one micro-batch or many give the same gradient. A mean of means would not."""
    rollouts = judged(small_rollouts(small_policy(), 16, max_tokens=30))
    assert len({len(r.response_ids) for r in rollouts}) > 1
    one, many = (
        first_gradient(rollouts, training__micro_tokens=budget, training__minibatches=1, objective__ratio=ratio)
        for budget in (100_000, 60)
    )
    assert same(one, many)


def test_control_a_mean_of_means_would_differ():
    value = torch.tensor([[1.0, 1.0, 1.0, 1.0], [5.0, 0.0, 0.0, 0.0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    whole = normalised_sum(value, mask, 5)
    assert math.isclose(float(sum(normalised_sum(value[i], mask[i], 5) for i in range(2))), float(whole), rel_tol=1e-6)
    means = sum(normalised_sum(value[i], mask[i], float(mask[i].sum())) for i in range(2)) / 2
    assert abs(float(means - whole)) > 0.5


# -- positions ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_state_before_a_token_scores_it(policy):
    """Against a loop that feeds one more token at a time and looks at the last logits."""
    rollouts = small_rollouts(policy, 4)
    logps = learner_logps(policy, rollouts, 1.0)
    for b, r in enumerate(rollouts):
        for t, token in enumerate(r.response_ids):
            ids = torch.tensor([[*r.prompt_ids, *r.response_ids[:t]]])
            expected = torch.log_softmax(policy.model(ids).logits[0, -1].float(), -1)
            assert math.isclose(float(logps.logp_BT[b, t]), float(expected[token]), abs_tol=1e-5)
            entropy = float(-(expected.exp() * expected).sum())
            assert math.isclose(float(logps.entropy_BT[b, t]), entropy, abs_tol=1e-4)


def test_left_padding_and_batch_size_change_nothing(policy):
    """Prompts of very different lengths: alone, in pairs, all together: same tokens, log-probabilities to 1e-5."""
    tokenizer = policy.tokenizer
    prompts = [tokenizer(text)["input_ids"] for text in ("1+1?", "12345678+9?", "a" * 40, "7*8-3+2-1?", "?")]
    seeds = list(range(len(prompts)))
    engine = LocalEngine(policy)
    together = engine.generate(prompts, seeds, Sampling(20, 1.0, 16))
    for batch in (1, 2, 3):
        apart = engine.generate(prompts, seeds, Sampling(20, 1.0, batch))
        for a, b in zip(together, apart, strict=True):
            assert a.ids == b.ids
            assert torch.allclose(torch.tensor(a.logps), torch.tensor(b.logps), atol=1e-5)


def test_padding_leaves_hidden_states_to_1e_6(policy):
    ids = torch.tensor([policy.tokenizer("7*8-3+2?")["input_ids"]])
    alone = logps_of(policy, ids, torch.tensor([3]), torch.tensor([5]), 1.0).logp_BT
    padded = torch.cat([ids, torch.full((1, 9), policy.pad_id)], 1)
    assert torch.allclose(logps_of(policy, padded, torch.tensor([3]), torch.tensor([5]), 1.0).logp_BT, alone, atol=1e-6)


# -- the critic --------------------------------------------------------------------------------------------------------------


def test_the_critic_reads_the_prompt_only():
    policy, critic = small_policy(), small_critic()
    torch.nn.init.normal_(critic.head.weight)
    rollouts = judged(small_rollouts(policy, 8))
    altered = [r.answered([5, 6, 7], "something else", verdict=r.verdict) for r in rollouts]
    learner = Learner(policy, critic, None, small_config())
    values = [learner.advantage(pack(rs, policy.pad_id))[1] for rs in (rollouts, altered)]
    assert torch.equal(values[0], values[1])
    assert len(set(values[0].tolist())) > 1


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_the_critic_reads_its_last_real_token_whatever_the_padding(kind):
    if kind == "decoder":
        critic = small_critic()
        critic.tokenizer.pad_token = critic.tokenizer.eos_token
    else:
        from transformers import BertConfig, BertModel

        tokenizer = build(hidden=32, heads=2)[1]
        torch.manual_seed(0)
        shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        critic = Critic(BertModel(BertConfig(vocab_size=len(tokenizer), **shape)), tokenizer)
    torch.nn.init.normal_(critic.head.weight)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [20]]
    with torch.no_grad():
        together = critic.prompt_logits(prompts)
        alone = torch.cat([critic.prompt_logits([p]) for p in prompts])
    assert torch.allclose(together, alone, atol=1e-5)


def test_values_do_not_see_the_rewards_they_judge():
    """Advantages are computed from the critic as it was: the same batch judged otherwise has the same values."""
    policy, critic = small_policy(), small_critic()
    critic.start_at(0.3)
    rollouts = judged(small_rollouts(policy, 8))
    learner, batch, _ = a_step(policy, critic, rollouts)
    assert float(learner.credit.critic.head.weight.detach().abs().max()) > 0  # it did train
    fresh = small_critic()
    fresh.start_at(0.3)
    advantage_B, value_B, _ = Learner(small_policy(), fresh, None, small_config()).advantage(batch)
    assert torch.allclose(value_B, torch.full_like(value_B, 0.3), atol=1e-6)
    assert torch.allclose(advantage_B, batch.reward_B - 0.3, atol=1e-6)


def test_shaped_rewards_never_reach_the_critics_target():
    policy = small_policy()
    rollouts = small_rollouts(policy, 8)

    def right(prompts, completions):
        return [1.0] * len(prompts)

    def shaping(prompts, completions):
        return [0.0] * len(prompts)

    parts = [Part("right", CallableReward(right, "right")), Part("shaping", CallableReward(shaping, "shaping"))]
    verdicts = MixedReward(parts).judge(rollouts)
    batch = pack([r.judged(v) for r, v in zip(rollouts, verdicts, strict=True)], policy.pad_id)
    assert torch.equal(batch.reward_B, torch.full((8,), 0.5))
    assert torch.equal(batch.correct_B, torch.ones(8))
    # and a KL inside the reward shifts the advantage, not the target
    config = small_config(objective__kl=0.5)
    reference = small_policy(seed=9).as_reference()
    learner = Learner(policy, small_critic(), reference, config)
    advantage_B, value_B, _ = learner.advantage(batch)
    assert not torch.allclose(advantage_B, batch.reward_B - value_B, atol=1e-3)
    seen = []
    original = torch.nn.functional.binary_cross_entropy_with_logits
    torch.nn.functional.binary_cross_entropy_with_logits = lambda x, y, **k: seen.append(y) or original(x, y, **k)
    try:
        learner.update(batch, advantage_B, 0)
    finally:
        torch.nn.functional.binary_cross_entropy_with_logits = original
    assert all(torch.equal(y, torch.ones_like(y)) for y in seen)
    assert seen


# -- same mode, ratio 1 --------------------------------------------------------------------------------------------------------


def test_the_first_updates_ratio_is_exactly_one():
    policy = small_policy()
    rollouts = judged(small_rollouts(policy))
    batch = pack(rollouts, policy.pad_id)
    learner = Learner(policy, small_critic(), None, small_config())
    plan = learner._plan(batch, batch.keep_B.nonzero()[:, 0], 0, 0)
    old_BT = torch.full_like(batch.behaviour_logp_BT, float("nan"))
    with torch.no_grad():
        learner._fill_old(old_BT, batch, plan)
    for minibatch in plan:
        for part in minibatch:
            current = learner._logps(policy, batch, part).logp_BT.detach()
            assert torch.equal(old_BT[part, : current.size(1)], current)


def test_a_model_that_is_not_deterministic_stops_the_run():
    """Dropout that stays on in eval mode (a custom model's own) is found at the first update."""
    policy = small_policy()
    rollouts = judged(small_rollouts(policy))

    norm = policy.model.model.norm
    exact = norm.forward
    norm.forward = lambda x: torch.nn.functional.dropout(exact(x), 0.1, training=True)
    with pytest.raises(RunFailure, match="ratio is not 1"):
        a_step(policy, small_critic(), rollouts, objective__engine_gap_limit=1e9)


def test_ordinary_dropout_is_off():
    model, tokenizer = build(hidden=32, layers=2, heads=2)
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    policy = Policy(model, tokenizer)
    assert not policy.model.training
    rollouts = judged(small_rollouts(policy))
    a, b = learner_logps(policy, rollouts, 1.0), learner_logps(policy, rollouts, 1.0)
    assert torch.equal(a.logp_BT, b.logp_BT)


# -- precision and mismatch ------------------------------------------------------------------------------------------------------


def test_the_head_and_log_softmax_run_in_float32_for_bfloat16_models():
    policy = small_policy()
    policy.model.to(torch.bfloat16)
    policy.scorer.packs = False  # so that the hidden states are those of the comparison, to the bit
    rollouts = small_rollouts(policy)
    batch = pack(rollouts, policy.pad_id)
    found = policy.logps(batch.ids_BL, batch.action_BL, 1.0).logp_BT
    assert found.dtype == torch.float32
    hidden = policy.model.model(input_ids=batch.ids_BL, use_cache=False).last_hidden_state.float()
    exact = torch.log_softmax(hidden @ policy.model.lm_head.weight.float().T, -1)
    rounded = torch.log_softmax(policy.model(batch.ids_BL).logits, -1).float()
    gap_exact = gap_rounded = 0.0
    for b, r in enumerate(rollouts):
        for t, token in enumerate(r.response_ids):
            at = int(batch.prompt_len_B[b]) + t - 1
            gap_exact = max(gap_exact, float((found[b, t] - exact[b, at, token]).detach().abs()))
            gap_rounded = max(gap_rounded, float((found[b, t] - rounded[b, at, token]).detach().abs()))
    assert gap_exact < 1e-5
    assert gap_rounded > 1e-3  # what a bfloat16 head would have cost


def test_the_gap_between_engine_and_learner_is_measured_and_stops_the_run():
    policy = small_policy()
    rollouts = judged(small_rollouts(policy))
    _, _, metrics = a_step(small_policy(), small_critic(), rollouts)
    assert metrics["engine/gap_mean"] < 1e-5
    stale = [replace(r, logps=[x - 0.5 for x in r.logps]) for r in rollouts]
    with pytest.raises(EngineMismatch, match="nats per token"):
        a_step(small_policy(), small_critic(), stale)


@pytest.mark.parametrize("ratio", ["token", "sequence", "geometric", "family"])
def test_the_gap_is_corrected_by_a_truncated_importance_weight(ratio):
    """With a uniform shift δ every token's weight is min(e^δ, C), and the gradient of any ratio is scaled by that."""
    rollouts = judged(small_rollouts(small_policy()))
    grads = {}
    for shift, cap in ((0.0, 2.0), (0.05, 2.0), (3.0, 2.0), (0.05, 0.0)):
        policy = small_policy()
        shifted = [replace(r, logps=[x - shift for x in r.logps]) for r in rollouts]
        config = small_config(
            training__minibatches=1,
            objective__ratio=ratio,
            objective__engine_correction_level="token",
            objective__engine_correction=cap,
            objective__engine_gap_limit=1e9,
        )
        learner = Learner(policy, small_critic(), None, config)
        batch = pack(shifted, policy.pad_id)
        captured = gradients_of(learner)
        learner.update(batch, learner.advantage(batch)[0], 0)
        grads[shift, cap] = captured[0]
    base = grads[0.0, 2.0]
    assert torch.allclose(grads[0.05, 2.0], base * math.exp(0.05), rtol=1e-3, atol=1e-7)
    assert torch.allclose(grads[3.0, 2.0], base * 2.0, rtol=1e-3, atol=1e-7)
    assert torch.allclose(grads[0.05, 0.0], base, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("wrong", ["temperature", "dtype", "weights"])
def test_an_engine_that_is_a_little_wrong_stops_the_first_step(wrong):
    """Float32 explains a gap of 1e-5: one of 0.1 at the temperature, weights in bfloat16, or weights that moved by 0.001, are found."""
    policy = small_policy()
    other = policy.as_reference()
    if wrong == "dtype":
        other.model.to(torch.bfloat16)
    if wrong == "weights":
        with torch.no_grad():
            for p in other.model.parameters():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)) * 1e-2)
    rollouts = judged(small_rollouts(other, temperature=0.9 if wrong == "temperature" else 1.0))
    with pytest.raises(EngineMismatch, match="what float32 can explain"):
        a_step(policy, small_critic(), rollouts)


def test_the_limit_of_the_gap_follows_from_the_first_step_and_is_kept():
    rollouts = judged(small_rollouts(small_policy()))
    learner, batch, metrics = a_step(small_policy(), small_critic(), rollouts)
    assert learner.gap_limit == max(4 * metrics["engine/gap_mean"], 5e-4)
    again = Learner(small_policy(), small_critic(), None, learner.config)
    again.load_state_dict(learner.state_dict())
    assert again.gap_limit == learner.gap_limit
    again.gap_limit = 1e-9
    with pytest.raises(EngineMismatch, match="measured in the first step"):
        again.update(batch, batch.reward_B - 0.5, 1)
    older = {k: v for k, v in learner.state_dict().items() if k != "gap_limit"}
    again.load_state_dict(older)
    assert again.gap_limit is None


def test_chunked_log_probabilities_and_gradients_equal_the_plain_ones():
    torch.manual_seed(0)
    import sppo.kernels.logprobs as module

    hidden = torch.randn(37, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(11, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 11, (37,))
    seed_N = torch.randn(37, dtype=torch.float64)
    for tau in (1.0, 0.7):
        logits = torch.nn.functional.linear(hidden, weight, bias)
        plain, plain_entropy = token_logps_from_logits(logits, target, tau)
        truth = torch.autograd.grad((plain * seed_N).sum(), (hidden, weight, bias))
        original, module.chunk_size = module.chunk_size, lambda _: 5
        try:
            found, entropy = token_logps(hidden, weight, bias, target, tau)
            got = torch.autograd.grad((found * seed_N).sum(), (hidden, weight, bias))
        finally:
            module.chunk_size = original
        assert torch.allclose(found, plain, atol=1e-12)
        assert torch.allclose(entropy, plain_entropy, atol=1e-12)
        assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(got, truth, strict=True))


# -- ids, not text; limits; honesty ------------------------------------------------------------------------------------------------


def test_training_uses_the_sampled_ids_never_text_again(policy):
    """Rollouts whose text would tokenise to other ids (special tokens vanish from it) still train on what was sampled."""
    rollouts = small_rollouts(policy, 64, max_tokens=12)
    odd = [r for r in rollouts if policy.tokenizer(r.text)["input_ids"] != list(r.response_ids)]
    assert odd, "the test needs a response whose text does not round-trip"
    batch = pack(odd, policy.pad_id)
    for b, r in enumerate(odd):
        start, length = int(batch.prompt_len_B[b]), int(batch.response_len_B[b])
        assert batch.ids_BL[b, start : start + length].tolist() == list(r.response_ids)


def test_no_double_bos_from_a_chat_template():
    from tokenizers import processors

    model, tokenizer = build(hidden=32, layers=1, heads=2)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    model.resize_token_embeddings(len(tokenizer))
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <eos>", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.bos_token_id), ("<eos>", 1)]
    )
    task = Task("t", [{"role": "user", "content": "1+1?"}])
    plain = Policy(model, tokenizer).prompt_ids(task)
    assert plain.count(tokenizer.bos_token_id) == 1
    assert plain[-1] != 1, "a prompt that ends with EOS is over before it began"
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    chat = Policy(model, tokenizer).prompt_ids(task)
    assert chat.count(tokenizer.bos_token_id) == 1
    assert chat[0] == tokenizer.bos_token_id


def test_over_long_prompts_are_passed_over_and_counted():
    tasks = [Task(str(i), "x" * (i + 1), {"answer": "1"}) for i in range(10)]
    curriculum = Uniform(CurriculumSection(), ListSource(tasks), 0, lambda t: "too long" if len(t.text) > 5 else None)
    got = curriculum.sample(20)
    assert all(len(t.text) <= 5 for t in got)
    assert curriculum.passed_over > 0
    assert {t.text for t in got} == {"x" * i for i in range(1, 6)}


def test_one_update_a_rollout_reports_no_clip_fraction():
    policy = small_policy()
    rollouts = judged(small_rollouts(policy))
    _, _, one = a_step(policy, small_critic(), rollouts, training__minibatches=1)
    assert one["ratio/clip_fraction"] is None
    assert one["ratio/ess"] is None
    _, _, two = a_step(small_policy(), small_critic(), rollouts, training__minibatches=2, training__lr=0.01)
    assert two["ratio/clip_fraction"] is not None
    assert 0 < two["ratio/ess"] <= 1


def test_micro_batches_cover_every_row_once_within_the_budget():
    length = torch.tensor([3, 50, 7, 7, 20, 1, 100, 9])
    parts = micro_batches(torch.arange(8), length, 60)
    assert sorted(torch.cat(parts).tolist()) == list(range(8))
    assert all(int(length[p].max()) * len(p) <= 60 or len(p) == 1 for p in parts)


def test_no_gradient_flows_through_the_reward():
    """The KL in the reward and the advantage are numbers, not functions of the weights."""
    policy = small_policy()
    batch = pack(judged(small_rollouts(policy)), policy.pad_id)
    learner = Learner(policy, small_critic(), policy.as_reference(), small_config(objective__kl=0.1))
    advantage_B, value_B, _ = learner.advantage(batch)
    assert not advantage_B.requires_grad
    assert not value_B.requires_grad


def test_tasks_of_chain_are_disjoint_between_splits():
    train, held = (load_tasks(f"chain:steps=1-2,split={s},size=2000") for s in ("train", "held-out"))
    assert not {train[i].text for i in range(2000)} & {held[i].text for i in range(2000)}
