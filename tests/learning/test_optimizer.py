"""How gradients of several micro-batches add up, whatever the model's dtype."""

from __future__ import annotations

import pytest
import torch
from torch.utils._pytree import tree_leaves

from sppo.learning.batch import pack
from sppo.learning.learner import Learner
from sppo.learning.lessons import Lessons
from sppo.learning.optimizer import MasterAdamW
from sppo.learning.update_stats import Tally

from ..conftest import graded, small_config, small_critic, small_policy, small_rollouts

PARTS = 256


def a_layer(dtype=torch.bfloat16):
    torch.manual_seed(0)
    return torch.nn.Linear(64, 32, bias=False).to(dtype)


def losses(layer):
    """Of many micro-batches, each about as large as any other: what a further one adds is small beside the sum."""
    for k in range(PARTS):
        generator = torch.Generator().manual_seed(k)
        x = (torch.randn(4, 64, generator=generator) + 1).to(layer.weight.dtype)
        yield layer(x).sum() / PARTS


def test_bfloat16_gradients_of_many_micro_batches_are_rounded_once_each():
    """Against float64: every micro-batch's own gradient is bfloat16, with a relative error of 2^-9 at most; their sum adds no further error."""
    one_by_one, rounded, exact = [], a_layer(), a_layer().double()
    for loss in losses(rounded):
        loss.backward()
        one_by_one.append(rounded.weight.grad.double())
        rounded.weight.grad = None
    for loss in losses(exact):
        loss.backward()

    ours = a_layer()
    optimiser = MasterAdamW(ours.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for loss in losses(ours):
        optimiser.backward(loss)
    (found,) = optimiser.gradients()
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), sum(one_by_one), rtol=1e-6, atol=1e-6)

    naive = a_layer()
    for loss in losses(naive):
        loss.backward()
    truth = exact.weight.grad
    error, naive_error = (float((g.double() - truth).norm() / truth.norm()) for g in (found, naive.weight.grad))
    assert error < 2**-9
    assert naive_error > 20 * error  # PyTorch's own accumulation: the sum stops growing


def test_a_single_micro_batch_makes_no_float32_copy_before_the_step():
    layer = a_layer()
    optimiser = MasterAdamW(layer.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    optimiser.backward(next(losses(layer)))
    assert optimiser.masters[0].grad is None
    assert layer.weight.grad is not None
    optimiser.step(1e-3, 1.0)
    assert layer.weight.grad is None
    assert optimiser.masters[0].grad is None


def test_a_float32_models_gradients_stay_where_pytorch_puts_them():
    layer = a_layer(torch.float32)
    optimiser = MasterAdamW(layer.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    for loss in losses(layer):
        optimiser.backward(loss)
    assert optimiser.gradients()[0] is layer.weight.grad


def a_batch(policy):
    rollouts = small_rollouts(policy, 16)
    return pack([graded(r, float(i % 2)) for i, r in enumerate(rollouts)], policy.pad_id)


def recorded(optimiser):
    """What each backward pass left in the model's own bfloat16 gradients, in float64; the value head is float32, and adds up by itself."""
    found = []
    whole = optimiser.backward

    def backward(loss, last=True):
        whole(loss, last)
        narrow = [p for p in optimiser.parameters if p.dtype == torch.bfloat16]
        found.append([torch.zeros(()) if p.grad is None else p.grad.double() for p in narrow])

    optimiser.backward = backward
    return found


@pytest.mark.parametrize("algorithm", ["sppo", "ppo", "sppo-hybrid"])
def test_the_learner_adds_up_in_float32_for_policy_lessons_and_critic(algorithm):
    """The gradient of many micro-batches is the float64 sum of each one's own, in both models."""
    policy, critic = small_policy(), small_critic()
    policy.model.bfloat16()
    critic.backbone.bfloat16()
    settings = {"objective__algorithm": algorithm, "training__micro_tokens": 24}
    learner = Learner(policy, critic, None, small_config(**settings).with_rates(1, 1))
    batch = a_batch(policy)
    advantage = learner.advantage(batch)[0]
    (minibatch, *_) = learner._plan(batch, torch.arange(len(batch)), 0, 0)
    rows = torch.cat(minibatch)
    passes = recorded(learner.policy_optimiser)
    learner._policy_gradient(batch, advantage, minibatch, batch.behaviour_logp_BT, None, 1, Tally())
    assert len(passes) == len(minibatch) > 3
    learner._teach(Lessons(batch, [1.0] * len(batch), len(batch)), 0, 2, Tally())
    assert len(passes) > len(minibatch) + 3
    check(learner.policy_optimiser, passes)

    optimiser = learner.credit.optimiser
    passes, step = recorded(optimiser), optimiser.step
    optimiser.step = lambda *given: check(optimiser, passes) or step(*given)
    learner.credit.learn(batch, rows, 1e-3)
    assert len(passes) > 1


def check(optimiser, passes):
    sums = [g for g, p in zip(optimiser.gradients(), optimiser.parameters, strict=True) if p.dtype == torch.bfloat16]
    for found, *parts in zip(sums, *passes, strict=True):
        assert found.dtype == torch.float32
        wanted = sum(parts)
        assert torch.allclose(found.double(), wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()) + 1e-12)


# -- offloading --------------------------------------------------------------------------------------------------------


def trained(dtype, tmp_path, *, kind="adamw", offload=(False, False), steps=8):
    """The weights and the state after some steps of three micro-batches each; `offload` is that of the first half, and
    of the second, which goes on from what was saved."""
    layers = torch.nn.Sequential(a_layer(dtype), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    made = {"betas": (0.9, 0.95), "weight_decay": 0.1, "kind": kind}
    optimiser = MasterAdamW(layers.parameters(), offload=offload[0], **made)
    for step in range(steps):
        if step == steps // 2:
            torch.save({"optimiser": optimiser.state_dict(), "model": layers.state_dict()}, tmp_path / "state")
            saved = torch.load(tmp_path / "state", weights_only=True)
            layers.load_state_dict(saved["model"])
            optimiser = MasterAdamW(layers.parameters(), offload=offload[1], **made)
            optimiser.load_state_dict(saved["optimiser"])
        for part in range(3):
            x = torch.randn(16, 64, generator=torch.Generator().manual_seed(3 * step + part))
            hidden = layers[1](layers[0](x.to(dtype)).float())
            optimiser.backward((layers[2](hidden)[:, 0] - x.sum(1)).square().mean())
        norm = optimiser.step(1e-2, 1.0)
        assert norm > 0
    return [p.detach() for p in layers.parameters()], optimiser


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["adamw", "adamw-8bit"])
@pytest.mark.parametrize("offload", [(True, True), (True, False), (False, True)])
def test_offloaded_or_not_the_weights_are_the_same_bits_and_each_resumes_the_other(dtype, kind, offload, tmp_path):
    plain, of_plain = trained(dtype, tmp_path, kind=kind)
    found, of_found = trained(dtype, tmp_path, kind=kind, offload=offload)
    for mine, theirs in zip(found, plain, strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)
    mine, theirs = of_found.state_dict(), of_plain.state_dict()
    assert len(mine["masters"]) == len(theirs["masters"]) == (dtype == torch.bfloat16)
    assert all(map(torch.equal, mine["masters"], theirs["masters"]))
    for key, state in theirs["inner"]["state"].items():
        for one, other in zip(tree_leaves(state), tree_leaves(mine["inner"]["state"][key]), strict=True):
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_an_offloaded_gradient_leaves_its_parameter_while_the_backward_pass_still_runs():
    layers = torch.nn.Sequential(*(torch.nn.Linear(8, 8, bias=False) for _ in range(5)))
    optimiser = MasterAdamW(layers.parameters(), betas=(0.9, 0.95), weight_decay=0.0, offload=True)
    held: list[int] = []
    for layer in layers:  # called once its own gradient is there, after the optimiser's hook
        layer.register_full_backward_hook(lambda *_: held.append(sum(x.weight.grad is not None for x in layers)))
    for _ in range(2):
        optimiser.backward(layers(torch.ones(2, 8).requires_grad_()).sum())
    assert len(held) == 10
    assert max(held) <= 1
    assert all(master.grad is not None and master is not p for p, master in optimiser._apart)
    assert not any(layer.weight._post_accumulate_grad_hooks for layer in layers)  # another optimiser may follow


def test_a_policy_and_its_critic_learn_the_same_bits_offloaded():
    """The embedding's gradient goes around autograd, and its weights are tied to the head's: two parts of one sum."""
    found = []
    for offload in (False, True):
        policy, critic = small_policy(), small_critic()
        settings = {"training__micro_tokens": 60, "training__offload": offload}
        learner = Learner(policy, critic, None, small_config(**settings).with_rates(1, 1))
        critic.start_at(0.3)  # once the optimiser has its copies, as in a run
        assert learner.policy_optimiser.offload == learner.credit.optimiser.offload == offload
        for step in range(2):
            batch = a_batch(policy)
            learner.update(batch, learner.advantage(batch)[0], step)
        found.append([p.detach().clone() for p in (*policy.model.parameters(), *critic.parameters())])
    assert all(map(torch.equal, *found))
