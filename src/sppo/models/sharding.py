"""Models whose weights are divided among ranks: which parts go round together, and what stays whole.

Adapters stay whole, since they are small, and so do a critic's read-out, which is float32 whatever its backbone, towers that read no text,
and a base that bitsandbytes quantised.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..distributed.fsdp import at_rest, divide, is_divided, local
from ..distributed.mesh import Mesh
from ..distributed.ranks import RankMesh
from ..errors import ModelError, RecipeError
from .adapter_critic import AdapterCritic
from .critic import Critic
from .head import backbone
from .mlp import ControlCritic, ControlPolicy
from .multimodal import shared, text_parameters
from .policy import Policy
from .reward_model import RewardModel
from .scorer import Scorer
from .weights import parameter_count


def shard(
    policy: Policy | None,
    critic: Critic | None,
    reference: Policy | None,
    mesh: Mesh,
    *,
    gather: str = "update",
    offload: bool = False,
) -> None:
    """Let these models be held by the ranks of a mesh, each of which has loaded them whole. Any of them may be None.

    With one shard every rank keeps all weights, and nothing changes but who writes files. Else the weights are divided, and afterwards
    only `logps`, the critic's values, `weights`, `take`, `save` and what stands on them can be asked for, by all ranks together: nothing
    can be sampled from these models. `as_reference` gives a policy that is divided likewise.

    Args:
        mesh: with `shards` undecided (0) it is decided by the size of the policy, else of the critic.
        gather: a recipe's cluster.gather.
        offload: a recipe's training.offload.

    Raises:
        RecipeError: models that cannot be divided.
    """
    models = [model for model in (policy, critic, reference) if model is not None]
    if isinstance(mesh, RankMesh):
        first = policy or critic or reference
        mesh.settle(parameter_count(first.model if isinstance(first, Policy) else first) if first is not None else 0)
    for model in models:
        model.mesh = mesh
    if not isinstance(mesh, RankMesh) or mesh.shards == 1:
        return
    if any(isinstance(model, ControlPolicy | ControlCritic) for model in models):
        raise RecipeError(
            "cluster.shards divides the weights of language models; control tasks need cluster.shards = 1"
        )
    if critic is not None and not isinstance(critic, AdapterCritic):
        _ = critic.reader  # what it replaces is found while the layers are whole
        _divide(critic, critic.backbone, set(critic.head.parameters()), mesh, gather, offload)
    for held in (policy, reference):
        if held is not None and not is_divided(held.scorer):
            _divide_policy(held, mesh, gather, offload)


def shard_reward_model(model: RewardModel, mesh: Mesh, *, gather: str = "update") -> None:
    """The same for a reward model, to be trained."""
    if isinstance(mesh, RankMesh):
        mesh.settle(parameter_count(model))
    model.mesh = mesh
    if isinstance(mesh, RankMesh) and mesh.shards > 1:
        _divide(model, model.model, set(), mesh, gather, False)


def _divide_policy(policy: Policy, mesh: RankMesh, gather: str, offload: bool) -> None:
    fingerprint = policy.frozen_fingerprint()
    dividing = partial(_divide_scorer, mesh=mesh, gather=gather, offload=offload)
    blank = None if policy.adapters is not None else _blank(policy.scorer)
    dividing(policy.scorer)
    if blank is not None:
        policy.twin = partial(_twin, blank, policy.scorer, dividing)
    policy.pin_frozen(fingerprint)


def _divide_scorer(scorer: Scorer, mesh: RankMesh, gather: str, offload: bool) -> None:
    model = scorer.model
    text = {id(p) for _, p in text_parameters(model)}
    whole = {p for p in model.parameters() if id(p) not in text or not p.is_floating_point()}
    if scorer.adapters is not None:
        base = {id(p) for p in _of_base(scorer)}
        whole |= {p for p in model.parameters() if id(p) not in base}
    scorer.head.forget()
    scorer.head.keeps = False
    _divide(scorer, model, whole, mesh, gather, offload)


def _of_base(scorer: Scorer) -> list[nn.Parameter]:
    """The weights below the adapters; none where they are quantised."""
    names: set[str] = set()
    assert scorer.adapters is not None
    for adapter in scorer.adapters.peft.peft_config:
        names |= set(scorer.adapters.named(adapter))
    base = {name: p for name, p in scorer.model.named_parameters() if name not in names}
    quantised = any(not p.is_floating_point() for p in base.values())
    return [] if quantised else list(base.values())


def _divide(
    module: nn.Module, model: Any, whole: set[nn.Parameter], mesh: RankMesh, gather: str, offload: bool
) -> None:
    divided = [p for p in module.parameters() if p not in whole]
    if not divided:
        return
    if len(kinds := {p.dtype for p in divided}) > 1:
        names = " and ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        raise ModelError(
            f"cluster.shards: the weights of {type(model).__name__} are {names}, and only those of one dtype are divided"
        )
    del divided  # else each would be held whole to the end
    divide(module, layers_of(model), whole, mesh, gather=gather, offload=offload)


def layers_of(model: Any) -> list[nn.Module]:
    """The parts of a transformers model that go round one by one."""
    inside = [m for m in backbone(model).modules() if isinstance(m, GradientCheckpointingLayer)]
    nested = {id(inner) for layer in inside for inner in layer.modules() if inner is not layer}
    return [layer for layer in inside if id(layer) not in nested]


def _blank(scorer: Scorer) -> Scorer:
    """A copy of a scorer whose weights have no memory yet (fsdp.py gives it to them)."""
    scorer.head.forget()
    memo = shared(scorer.model)
    for p in scorer.parameters():
        if id(p) not in memo:
            memo[id(p)] = nn.Parameter(torch.empty_like(p), requires_grad=False)
            memo[id(p)].untyped_storage().resize_(0)
    copied = copy.deepcopy(scorer, memo).eval()
    copied.checkpoint_activations(False)
    return copied


def _twin(blank: Scorer, scorer: Scorer, dividing: Any) -> Scorer:
    """A frozen scorer with the weights that another has now, made layer by layer."""
    made = _blank(blank)
    at_rest(scorer)
    own = dict(scorer.named_parameters())
    dividing(made)
    with torch.no_grad():
        for name, p in made.named_parameters():
            local(p).copy_(local(own[name]))
    return made
