"""`Policy.logps` is the forward pass of a module, and scores the action tokens of any mask as a plain loop over a
full forward pass does."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from sppo.models.policy import Policy

from ..conftest import small_critic, small_policy
from ..rollout.test_local import of_family

# two turns of the policy with something else before, between and after; one turn; none; one up to the row's end
TURNS: list[list[tuple[int, int]]] = [[(2, 5), (7, 10)], [(4, 6)], [], [(1, 12)]]


def two_turns() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and actions, [4, 12]."""
    torch.manual_seed(2)
    action_BL = torch.zeros(4, 12, dtype=torch.bool)
    for b, turns in enumerate(TURNS):
        for start, end in turns:
            action_BL[b, start:end] = True
    return torch.randint(1, 33, (4, 12)), action_BL


def plain(model, ids_BL: torch.Tensor, action_BL: torch.Tensor, temperature: float) -> list[list[torch.Tensor]]:
    """log π of each action, row by row and token by token, from the logits of the whole row by itself."""
    rows = []
    for ids, action in zip(ids_BL, action_BL, strict=True):
        logits = model(input_ids=ids[None], use_cache=False).logits[0] / temperature
        rows.append([logits[t - 1][ids[t]] - logits[t - 1].exp().sum().log() for t in range(len(ids)) if action[t]])
    return rows


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("family", ["tiny", "Gemma 2, soft caps"])
def test_actions_of_several_turns_are_scored_as_by_a_float64_loop(family, packs):
    policy = small_policy() if family == "tiny" else of_family(family)
    policy = Policy(policy.model.double(), policy.tokenizer)
    policy.scorer.packs = packs and policy.packs
    ids_BL, action_BL = two_turns()
    oracle = copy.deepcopy(policy.model)
    found = policy.logps(ids_BL, action_BL, 0.7)
    expected = plain(oracle, ids_BL, action_BL, 0.7)
    assert found.logp_BT.shape == found.mask_BT.shape == (4, 11)
    assert found.logp_BT.dtype == torch.float64
    assert found.mask_BT.sum(1).tolist() == [6, 2, 0, 11]
    weight_BT = torch.randn(4, 11, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for b, row in enumerate(expected):
        for t, logp in enumerate(row):
            assert float((found.logp_BT[b, t] - logp).detach().abs()) < 1e-9
            total = total + weight_BT[b, t] * logp
        assert not found.logp_BT[b, len(row) :].any()
    (found.logp_BT * weight_BT).sum().backward()
    total.backward()
    for (name, mine), theirs in zip(policy.model.named_parameters(), oracle.parameters(), strict=True):
        assert torch.allclose(mine.grad, theirs.grad, atol=1e-9), name


def test_what_follows_the_last_action_is_not_read(policy):
    ids_BL, action_BL = two_turns()
    changed_BL = ids_BL.clone()
    changed_BL[0, 10:], changed_BL[1, 6:] = 3, 4
    with torch.no_grad():
        assert torch.equal(
            policy.logps(ids_BL, action_BL, 1.0).logp_BT, policy.logps(changed_BL, action_BL, 1.0).logp_BT
        )


def test_an_action_that_nothing_precedes_is_refused(policy):
    with pytest.raises(ValueError, match="the first of its row"):
        policy.logps(torch.tensor([[5, 6]]), torch.tensor([[True, True]]), 1.0)


def test_rows_without_actions_go_through_the_layers_all_the_same(policy):
    """Ranks must run the same number of passes, whatever they hold."""
    seen = []
    policy.model.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    found = policy.logps(torch.tensor([[5, 6], [7, 8]]), torch.zeros(2, 2, dtype=torch.bool), 1.0)
    assert found.logp_BT.shape == (2, 0)
    found.logp_BT.sum().backward()
    assert seen == [1]


def test_logps_and_values_are_forward_passes_of_modules_and_their_hooks_fire(policy):
    """What wraps a module (FSDP2, adapters, checkpointing) acts in hooks: before and after the pass, and before its
    gradients."""
    critic = small_critic()
    ids_BL, action_BL = two_turns()
    for module, call in (
        (policy.scorer, lambda: policy.logps(ids_BL, action_BL, 1.0).logp_BT),
        (critic, lambda: critic(ids_BL, action_BL)),
        (critic, lambda: critic.prompt_logits([[5, 6], [7, 8, 9]])),
    ):
        seen: list[str] = []

        def after(_, __, out, seen=seen):
            seen.append("after")
            for leaf in tree_leaves(out):  # what comes out must be something that hooks can look into
                if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                    leaf.register_hook(lambda _: seen.append("gradient"))

        handles = [
            module.register_forward_pre_hook(lambda *_, seen=seen: seen.append("before")),
            module.register_forward_hook(after),
        ]
        call().sum().backward()
        assert seen == ["before", "after", "gradient"]
        for handle in handles:
            handle.remove()


def test_fully_sharded_it_gives_the_same_bits(policy, tmp_path):
    """FSDP2 on each layer and on the scorer, in a group of one process: it finds its hooks, also for the head's
    product."""
    plain = Policy(copy.deepcopy(policy.model), policy.tokenizer)
    ids_BL, action_BL = two_turns()
    found = []
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for layer in policy.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(policy.scorer, mesh=mesh)
        for one in (policy, plain):
            scored = one.logps(ids_BL, action_BL, 0.7)
            (scored.logp_BT * torch.arange(11)).sum().backward()
            grads = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in one.model.parameters()]
            found.append([scored.logp_BT.detach(), *grads])
        assert policy.fingerprint() == plain.fingerprint()
    finally:
        dist.destroy_process_group()
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine, theirs)


def test_names_of_weights_and_saved_files_are_transformers_own(policy, tmp_path):
    policy.save(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "model.layers.0.self_attn.q_proj.weight" in file.keys()  # noqa: SIM118
    assert [n for n, _ in policy.scorer.named_parameters()] == [
        f"model.{n}" for n, _ in policy.model.named_parameters()
    ]
