"""What a training pass leaves out of its graph comes back as the same bits."""

from __future__ import annotations

import contextlib
import shutil

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaForCausalLM, Qwen3ForCausalLM

from sppo.kernels import recomputed
from sppo.kernels.elementwise import gated_unit, rms_norm
from sppo.kernels.recomputed import recomputable, recomputing
from sppo.models import scorer, tiny
from sppo.models.adapters import Adapters
from sppo.models.policy import Policy
from sppo.recipe.sections import AdapterSection

from ..conftest import logps_of
from .test_patch_layers import SIZES

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")

TOKENS = 24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [LlamaForCausalLM, Qwen3ForCausalLM])
@pytest.mark.parametrize("adapter", ["", "lora", "dora"])
def test_gradients_are_the_same_bits(kind, adapter, dtype, monkeypatch):
    torch.manual_seed(0)
    model = kind(kind.config_class(**SIZES)).to(dtype)
    if adapter:
        adapters = Adapters.onto(model, AdapterSection(rank=4, dora=adapter == "dora"), seed=0)
        for name, weight in adapters.named(adapters.name).items():
            if "lora_B" in name:
                nn.init.normal_(weight, std=0.1)
        policy = Policy(model, tiny.character_tokenizer(), adapters=adapters)
    else:
        policy = Policy(model, tiny.character_tokenizer())
    ids, prompt, response = torch.arange(TOKENS).view(2, 12), torch.tensor([4, 5]), torch.tensor([8, 6])
    found = []
    for how in (recomputing, contextlib.nullcontext):
        monkeypatch.setattr(scorer, "recomputing", how)
        policy.model.zero_grad()
        logps_of(policy, ids, prompt, response, 1.0).logp_BT.sum().backward()
        found.append([p.grad.clone() for p in policy.model.parameters() if p.grad is not None])
    assert found[0]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_norms_and_gated_products_are_not_kept(monkeypatch):
    """A layer's graph holds what a norm and a gated unit read, not what they give."""
    torch.manual_seed(0)
    gate, up, down = (nn.Linear(48, 96), nn.Linear(48, 96), nn.Linear(96, 48))
    weight, x = torch.ones(48, requires_grad=True), torch.randn(1, TOKENS, 48, requires_grad=True)
    sizes: dict[int, int] = {}

    def counting(pack, unpack):
        def keep(tensor):
            packed = pack(tensor)
            if packed is tensor and tensor.numel() in (TOKENS * 48, TOKENS * 96):
                sizes[tensor.data_ptr()] = tensor.numel()
            return packed

        return saved_tensors_hooks(keep, unpack)

    monkeypatch.setattr(recomputed, "saved_tensors_hooks", counting)
    with recomputing():
        y = rms_norm(x * 1, weight, 1e-5)
        down(gated_unit(gate(y), up(y)))
    assert sum(sizes.values()) == TOKENS * (48 + 2 * 96)


def test_a_result_that_is_gone_is_not_taken_for_another():
    """A tensor that comes to lie where one lay is kept as it is."""
    place = torch.arange(64.0).numpy()
    with recomputing():
        first = torch.from_numpy(place).requires_grad_()
        recomputable(first, torch.zeros_like, first)
        at = first.data_ptr()
        del first
        other = torch.from_numpy(place).requires_grad_()
        assert other.data_ptr() == at
        total = (other * other).sum()
    total.backward()
    assert torch.equal(other.grad, 2 * torch.arange(64.0))


def test_what_a_result_was_computed_from_goes_with_it():
    """Or checkpointed layers would be held to the end of the pass."""
    x = torch.randn(8, 16, requires_grad=True)
    with recomputing():
        y = recomputable(x * 2, lambda t: t * 2, x)
        assert len(recomputed._results.get()) == 1
        del y
        assert recomputed._results.get() == {}


@pytest.mark.parametrize("which", ["result", "input"])
def test_what_was_modified_is_never_computed_again_from_other_numbers(which):
    x, w = torch.randn(8, 16, requires_grad=True), torch.randn(16, 4, requires_grad=True)
    with recomputing():
        read = x * 1
        y = recomputable(read * 2, lambda t: t * 2, read)
        if which == "result":
            y.add_(1)
        loss = (y @ w).sum()
        if which == "input":
            with torch.no_grad():
                read.add_(1)
    if which == "result":
        loss.backward()
        assert torch.allclose(w.grad, (2 * x + 1).detach().sum(0)[:, None].expand(16, 4))
    else:
        with pytest.raises(RuntimeError, match="modified in place"):
            loss.backward()
