"""The fast update against the plain one: packed log-probabilities and gradients, whose `old` serves, checkpointed
activations."""

from __future__ import annotations

import random

import pytest
import torch

from sppo.errors import EngineMismatch, ModelError, NonFinite, RecipeError, StaleWeights
from sppo.learning import optimizer
from sppo.learning.batch import micro_batches, pack
from sppo.learning.learner import Learner
from sppo.learning.optimizer import MasterAdamW
from sppo.models import tiny, weights
from sppo.models.policy import Policy
from sppo.rollout.canary import Canary
from sppo.rollout.local import LocalEngine
from sppo.rollout.sampler import Cut
from sppo.types import Verdict

from ..conftest import gradients_of, logps_of, small_config, small_critic, small_policy, small_rollouts
from ..rollout.test_local import FAMILIES, PACKED, TokenCount, of_family

LENGTHS = [(3, 5), (3, 5), (1, 1), (7, 2), (4, 9), (4, 9), (2, 12)]


def rectangle(vocabulary: int = 33):
    torch.manual_seed(3)
    prompt, response = torch.tensor(LENGTHS).T
    ids = torch.randint(1, vocabulary, (len(LENGTHS), int((prompt + response).max())))
    return ids, prompt, response


def gradients(policy: Policy, weight_BT: torch.Tensor) -> list[torch.Tensor]:
    policy.model.zero_grad()
    (logps_of(policy, *rectangle(), 0.8).logp_BT * weight_BT).sum().backward()
    return [p.grad for p in policy.model.parameters() if p.grad is not None]


@pytest.mark.parametrize("family", ["tiny", *FAMILIES])
def test_packed_is_padded(family):
    """The same numbers, and the same gradient, from rows of nothing but tokens as from a padded rectangle."""
    packed = small_policy() if family == "tiny" else of_family(family)
    assert packed.packs == (family == "tiny" or family in PACKED)
    padded = packed.as_reference()
    padded.scorer.packs = False
    padded.model.set_attn_implementation("eager")
    padded.model.requires_grad_(True)
    ids, prompt, response = rectangle()
    a, b = (logps_of(p, ids, prompt, response, 0.8) for p in (packed, padded))
    assert torch.allclose(a.logp_BT, b.logp_BT, atol=2e-5)
    assert torch.allclose(a.entropy_BT, b.entropy_BT, atol=2e-4)
    weight_BT = torch.randn(a.logp_BT.shape)
    for mine, theirs in zip(gradients(packed, weight_BT), gradients(padded, weight_BT), strict=True):
        assert torch.allclose(mine, theirs, atol=2e-4, rtol=1e-3)


def test_a_packed_row_holds_nothing_but_what_is_needed(policy):
    count = TokenCount(policy)
    logps_of(policy, *rectangle(), 1.0)
    assert count.passes == 1
    assert count.total == sum(p + r - 1 for p, r in LENGTHS)  # the last token predicts nothing


def test_checkpointed_activations_change_no_bit_and_leave_sampling_alone():
    plain, checkpointed = small_policy(), small_policy()
    checkpointed.checkpoint_activations()
    weight_BT = torch.randn(len(LENGTHS), 12)
    count = TokenCount(checkpointed)
    calls = []
    checkpointed.model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    for mine, theirs in zip(gradients(checkpointed, weight_BT), gradients(plain, weight_BT), strict=True):
        assert torch.equal(mine, theirs)
    assert count.passes == 1
    assert len(calls) == 2  # the layer was computed again
    assert not checkpointed.model.model.layers[0].training
    for module in checkpointed.model.modules():
        module._forward_hooks.clear()  # a model with hooks is not decoded in compiled code
    mine, theirs = (LocalEngine(p).score([[5, 6, 7]], [[8, 9, 10]]) for p in (checkpointed, plain))
    assert mine == theirs


def test_checkpointing_leaves_dropout_off():
    policy = of_family("OPT")  # its layers read their own training flag
    policy.checkpoint_activations()
    first = logps_of(policy, *rectangle(), 1.0).logp_BT
    first.sum().backward()
    with torch.no_grad():
        assert torch.equal(logps_of(policy, *rectangle(), 1.0).logp_BT, first)


def test_a_model_that_cannot_checkpoint_says_so(policy):
    policy.model.model.layers = torch.nn.ModuleList()
    with pytest.raises(ModelError, match="checkpoint_activations"):
        policy.checkpoint_activations()


def test_eight_bit_moments_train_like_float32_ones_and_resume_to_the_bit(tmp_path):
    def train_some(kind: str, stop_after: int | None = None) -> torch.Tensor:
        torch.manual_seed(0)
        layer = torch.nn.Linear(64, 128, bias=False)
        optimiser = MasterAdamW(layer.parameters(), betas=(0.9, 0.99), weight_decay=0.0, kind=kind)
        for step in range(20):
            if step == stop_after:
                torch.save({"optimiser": optimiser.state_dict(), "model": layer.state_dict()}, tmp_path / "state")
                layer = torch.nn.Linear(64, 128, bias=False)
                saved = torch.load(tmp_path / "state", weights_only=True)
                layer.load_state_dict(saved["model"])
                optimiser = MasterAdamW(layer.parameters(), betas=(0.9, 0.99), weight_decay=0.0, kind=kind)
                optimiser.load_state_dict(saved["optimiser"])
            x = torch.randn(16, 64, generator=torch.Generator().manual_seed(step))
            (layer(x) - x.sum(1, keepdim=True)).square().mean().backward()
            optimiser.step(1e-2, 1.0)
        moments = [v for s in optimiser.inner.state.values() for k, v in s.items() if k in ("state1", "exp_avg")]
        assert {m.dtype for m in moments} == {torch.uint8 if kind == "adamw-8bit" else torch.float32}
        return layer.weight.detach()

    exact, eight = train_some("adamw"), train_some("adamw-8bit")
    assert (eight - exact).abs().max() < 0.02
    assert torch.equal(train_some("adamw-8bit", stop_after=11), eight)
    with pytest.raises(RecipeError, match="adamw-8bit"):
        train_some("paged-adamw-8bit")


def test_micro_batches_hold_every_row_once_within_the_budget():
    torch.manual_seed(0)
    length = torch.randint(1, 60, (200,))
    index = torch.randperm(200)[:150]
    for packed in (False, True):
        parts = micro_batches(index, length, 256, packed)
        assert sorted(torch.cat(parts).tolist()) == sorted(index.tolist())
        for part in parts:
            cost = int(length[part].sum()) if packed else int(length[part].max()) * len(part)
            assert cost <= 256
    assert [len(p) for p in micro_batches(torch.arange(2), torch.tensor([900, 5]), 100, True)] == [1, 1]
    assert micro_batches(torch.arange(0), length, 100) == []


# -- whose log-probabilities serve as `old` --------------------------------------------------------------------------------------


def judged_batch(policy: Policy, shift: float = 0.0, **kwargs):
    """Sixteen rollouts whose rewards alternate; the engine's log-probabilities off by `shift` a token."""
    rollouts = small_rollouts(policy, 16, **kwargs)
    rollouts = [r.judged(Verdict(float(i % 2), "correct" if i % 2 else "wrong")) for i, r in enumerate(rollouts)]
    batch = pack(rollouts, policy.pad_id)
    batch.behaviour_logp_BT += shift * batch.mask_BT
    return batch


def one_update(shift: float, minibatches: int = 4):
    policy = small_policy()
    batch = judged_batch(policy, shift)
    config = small_config(training__minibatches=minibatches, objective__engine_gap_limit=0.1)
    learner = Learner(policy, small_critic(), None, config.with_rates(1, 1))
    learner.ratio_checked = True
    count, seen = TokenCount(policy), gradients_of(learner)
    metrics = learner.update(batch, batch.reward_B - 0.5, 0)
    return torch.stack(seen), metrics, count.passes


def test_where_memory_is_tight_what_policy_and_critic_freed_goes_back_after_each_micro_batch(monkeypatch):
    policy, given_back = small_policy(), []
    monkeypatch.setattr(optimizer, "give_back", lambda: given_back.append(1))
    batch = judged_batch(policy)
    learner = Learner(policy, small_critic(), None, small_config(training__minibatches=2).with_rates(1, 1))
    learner.update(batch, learner.advantage(batch)[0], 0)
    assert not given_back
    learner.hold_little()
    batch = judged_batch(policy)
    learner.update(batch, learner.advantage(batch)[0], 1)
    assert len(given_back) == 2 * 2


def test_the_engine_spares_the_extra_pass_where_its_numbers_are_the_learners():
    exact, metrics, passes = one_update(0.0)
    assert metrics["engine/serves_as_old"] == 1.0
    assert passes == 4  # one a minibatch: forward and backward of the loss, and nothing else
    far, metrics, passes = one_update(0.02)  # 12 tokens × 0.02: a weight of 1.27 between engine and learner
    assert metrics["engine/serves_as_old"] == 0.0
    assert passes == 4 + 3
    assert metrics["engine/gap_mean"] == pytest.approx(0.02, abs=1e-4)
    assert (far[0] - exact[0]).norm() > 0.05 * exact[0].norm()  # it was corrected for


def test_engine_and_learner_as_old_give_the_same_gradients(monkeypatch):
    served, _, _ = one_update(0.0)
    monkeypatch.setattr("sppo.learning.learner.NEGLIGIBLE", -1.0)
    computed, metrics, passes = one_update(0.0)
    assert metrics["engine/serves_as_old"] == 0.0
    assert passes == 7
    assert torch.allclose(served, computed, atol=1e-5 * float(computed.abs().max()) + 1e-6)


def test_a_cut_is_no_gap_between_engine_and_learner_but_an_importance_weight(policy):
    from dataclasses import replace

    from sppo.rewards.loading import load_reward
    from sppo.rollout.collect import collect
    from sppo.rollout.engine import Sampling
    from sppo.tasks.loading import load_tasks

    source = load_tasks("chain:steps=1-2")
    rollouts = collect(
        LocalEngine(policy), policy, load_reward("answer"), [source[i] for i in range(16)], Sampling(12, cut=Cut(top_k=4)), seed=("t",)
    )  # fmt: skip
    batch = pack([replace(r, verdict=Verdict(1.0, "correct")) for r in rollouts], policy.pad_id)
    learner = Learner(policy, small_critic(), None, small_config(training__minibatches=2).with_rates(1, 1))
    metrics = learner.update(batch, torch.linspace(-1, 1, 16), 0)
    assert metrics["engine/gap_mean"] < 1e-5
    assert metrics["engine/serves_as_old"] == 1.0
    assert float(batch.kept_BT.sum()) < -1.0


def test_an_engine_that_is_right_in_the_first_minibatch_only_is_found_out(policy):
    batch = judged_batch(policy)
    learner = Learner(policy, small_critic(), None, small_config(training__minibatches=4).with_rates(1, 1))
    learner.ratio_checked = True
    first = torch.cat(learner._plan(batch, batch.keep_B.nonzero()[:, 0], 0, 0)[0])
    others = torch.ones(16, dtype=torch.bool)
    others[first] = False
    batch.behaviour_logp_BT[others] += 5.0 * batch.mask_BT[others]
    with pytest.raises(EngineMismatch, match="same weights"):
        learner.update(batch, batch.reward_B - 0.5, 0)


def test_what_a_cut_costs_the_sequence_ratio_is_reported(policy):
    """exp of a sum over tokens: hardly any weight is left to a long response."""
    batch = judged_batch(policy)
    batch.kept_BT -= torch.linspace(0, 1, 16)[:, None] * batch.mask_BT
    batch.behaviour_logp_BT -= batch.kept_BT
    learner = Learner(policy, small_critic(), None, small_config().with_rates(1, 1))
    metrics = learner.update(batch, batch.reward_B - 0.5, 0)
    assert metrics["engine/gap_mean"] < 1e-5
    assert metrics["engine/correction_ess"] < 0.35


# -- the canary ------------------------------------------------------------------------------------------------------------------


class Deaf(LocalEngine):
    """An engine that takes no weights after its first, though it says that it holds them."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy.as_reference())

    def holds(self, fingerprint: str) -> bool:
        return True


def test_the_canary_finds_stale_weights_that_a_fingerprint_does_not(policy):
    engine, canary = Deaf(policy), Canary(policy)
    assert canary.check(engine, policy, policy.fingerprint()) < 1e-5
    with torch.no_grad():
        for p in policy.model.parameters():
            p.add_(torch.randn_like(p) * 5e-3)
    with pytest.raises(StaleWeights, match="fixed probe"):
        canary.check(engine, policy, policy.fingerprint())


def test_a_broken_policy_is_not_called_stale(policy):
    engine, canary = LocalEngine(policy), Canary(policy)
    with torch.no_grad():
        policy.model.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(NonFinite, match=r"lower training\.lr"):
        canary.check(engine, policy, policy.fingerprint())


def test_the_canary_is_the_same_in_every_run():
    first, again = (Canary(Policy(*tiny.build(seed=s, hidden=32, layers=2, heads=2))) for s in (0, 5))
    assert (first.prompt, first.response) == (again.prompt, again.response)


def test_an_engine_of_other_weights_is_not_held(policy):
    other = policy.as_reference()
    assert LocalEngine(policy).holds(policy.fingerprint())
    assert LocalEngine(other).holds(policy.fingerprint())  # a copy of them is as good
    with torch.no_grad():
        next(other.model.parameters())[0, 0] += 1e-3
    assert not LocalEngine(other).holds(policy.fingerprint())


def fingerprint_of(model: torch.nn.Module) -> str:
    return weights.fingerprint(weights.weights_of(dict(model.named_parameters())))


def blocks(*rows, dtype=torch.int64):
    """A model of one parameter with these rows of 4,096 words of eight bytes."""
    model = torch.nn.Module()
    model.p = torch.nn.Parameter(torch.stack(rows).flatten().view(dtype), requires_grad=False)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fingerprint_knows_where_every_word_is(dtype):
    """Swapped, moved and doubled blocks, and flipped highest bits, which a product cannot carry up."""
    rows = [torch.randint(-(2**63), 2**63 - 1, (4096,), generator=torch.Generator().manual_seed(i)) for i in range(40)]
    whole = fingerprint_of(blocks(*rows, dtype=dtype))
    assert whole == fingerprint_of(blocks(*[r.clone() for r in rows], dtype=dtype))
    top = torch.tensor(-(2**63))
    others = [[*rows[1:], rows[0]], rows[:-1], [*rows, rows[0] * 0]]
    for i in range(len(rows)):
        for j in range(i):
            swapped, flipped = list(rows), list(rows)
            swapped[i], swapped[j] = rows[j], rows[i]
            flipped[i], flipped[j] = rows[i] ^ top, rows[j] ^ top
            others += [swapped, flipped]
    lanes = list(rows)
    lanes[3] = rows[3].roll(1)
    found = {fingerprint_of(blocks(*r, dtype=dtype)) for r in [*others, lanes]}
    assert whole not in found
    assert len(found) == len(others) + 1


def test_every_single_bit_changes_a_fingerprint():
    model, _ = tiny.build(hidden=32, layers=1, heads=2)
    before, rng = fingerprint_of(model), random.Random(1)
    assert fingerprint_of(model) == before
    for _ in range(300):
        p = rng.choice(list(model.parameters()))
        bits = p.detach().view(-1).view(torch.uint8)
        at, bit = rng.randrange(len(bits)), 1 << rng.randrange(8)
        bits[at] ^= bit
        assert fingerprint_of(model) != before
        bits[at] ^= bit
    assert fingerprint_of(model) == before


def test_two_blocks_that_change_places_change_a_fingerprint():
    model, _ = tiny.build(hidden=128, layers=3, heads=4)
    before = fingerprint_of(model)
    with torch.no_grad():
        for p in model.parameters():
            flat = p.view(-1)
            if flat.numel() >= 16384:
                flat[:8192], flat[8192:16384] = flat[8192:16384].clone(), flat[:8192].clone()
    assert fingerprint_of(model) != before
