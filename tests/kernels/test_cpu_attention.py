"""The compiled attention against PyTorch's, forward and backward."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from sppo.kernels.attention import boundaries
from sppo.kernels.cpu import attention

from ..conftest import logps_of, small_policy

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
LENGTHS = [1, 5, 6, 7, 16, 17, 40, 95, 6]


def parts(heads: int, groups: int, size: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Queries, keys, values and a gradient of the output, laid as transformers lays them: [N, heads, D] transposed."""
    made = torch.Generator().manual_seed(seed)
    n = sum(LENGTHS)
    q, k, v = (torch.randn(n, h, size, generator=made, dtype=torch.float64) for h in (heads, groups, groups))
    grad = torch.randn(n, heads, size, generator=made, dtype=torch.float64)
    return *(x.to(dtype).transpose(0, 1) for x in (q, k, v)), grad.to(dtype)


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Each sequence alone, by PyTorch; [N, heads, D]."""
    out = [
        scaled_dot_product_attention(a[None], b[None], c[None], is_causal=True, scale=scale, enable_gqa=True)[0]
        for a, b, c in zip(*(x.split(LENGTHS, 1) for x in (q, k, v)), strict=True)
    ]
    return torch.cat(out, 1).transpose(0, 1)


def with_gradients(function, q, k, v, grad) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = function(*leaves)
    out.backward(grad)
    return [out.detach(), *(x.grad for x in leaves)]


def ours(q, k, v) -> torch.Tensor:
    return attention.attention(q, k, v, boundaries(LENGTHS)["cu_seq_lens_q"], 0.3)


@pytest.mark.parametrize(("heads", "groups", "size"), [(6, 2, 64), (4, 4, 32), (3, 1, 16), (2, 1, 128), (2, 2, 48)])
def test_it_is_attention_and_so_is_its_gradient(compiled_for, heads, groups, size):
    q, k, v, grad = parts(heads, groups, size, torch.float32)
    assert attention.fits(q, k, v, len(LENGTHS))
    exact = with_gradients(lambda *x: reference(*x, 0.3), *(x.double() for x in (q, k, v, grad)))
    for mine, right in zip(with_gradients(ours, q, k, v, grad), exact, strict=True):
        assert mine.shape == right.shape
        assert torch.allclose(mine.double(), right, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(("heads", "groups", "size"), [(6, 2, 64), (4, 4, 32)])
def test_in_bfloat16_it_is_at_least_as_exact_as_pytorchs(compiled_for, heads, groups, size):
    q, k, v, grad = parts(heads, groups, size, torch.bfloat16)
    exact = with_gradients(lambda *x: reference(*x, 0.3), *(x.double() for x in (q, k, v, grad)))
    theirs = with_gradients(lambda *x: reference(*x, 0.3), q, k, v, grad)
    for mine, other, right in zip(with_gradients(ours, q, k, v, grad), theirs, exact, strict=True):
        assert (mine.double() - right).square().mean() <= 1.1 * (other.double() - right).square().mean()


def test_large_scores_neither_overflow_nor_vanish():
    q, k, v, grad = parts(4, 2, 64, torch.float32)
    found = with_gradients(ours, 40 * q, k, v, grad)
    exact = with_gradients(lambda *x: reference(*x, 0.3), *(x.double() for x in (40 * q, k, v, grad)))
    for mine, right in zip(found, exact, strict=True):
        assert torch.allclose(mine.double(), right, atol=1e-3, rtol=1e-3)


def test_threads_and_neighbours_change_no_bit(monkeypatch):
    q, k, v, grad = parts(6, 2, 64, torch.float32)
    together = with_gradients(ours, q, k, v, grad)
    for threads in (1, 3, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        for mine, other in zip(with_gradients(ours, q, k, v, grad), together, strict=True):
            assert torch.equal(mine, other)
    start = sum(LENGTHS[:6])
    alone = attention.attention(*(x[:, start : start + 40] for x in (q, k, v)), torch.tensor([0, 40]), 0.3)
    assert torch.equal(alone, together[0][start : start + 40])


def test_what_it_cannot_take_goes_another_way():
    q, k, v, _ = parts(4, 2, 64, torch.float32)
    for wrong in (
        (q[..., :8], k[..., :8], v[..., :8]), (q.double(), k.double(), v.double()), (q.bfloat16(), k, v), (q[..., ::2], k[..., ::2], v[..., ::2])
    ):  # fmt: skip
        assert not attention.fits(*wrong, 9)
    assert not attention.fits(q, k, v, 0)


def test_a_model_is_trained_through_it(monkeypatch):
    """Log-probabilities and gradients of a whole model, with it and without."""
    policy = small_policy()
    calls: list[int] = []
    right = attention.attention
    monkeypatch.setattr(attention, "attention", lambda *a: calls.append(1) or right(*a))

    def trained() -> list[torch.Tensor]:
        policy.model.zero_grad()
        ids_BL = torch.arange(60).remainder(50).reshape(3, 20)
        scored = logps_of(policy, ids_BL, torch.tensor([4, 5, 6]), torch.tensor([16, 9, 14]), 1.0)
        scored.logp_BT.sum().backward()
        return [scored.logp_BT.detach(), *(p.grad.clone() for p in policy.model.parameters())]

    mine = trained()
    assert len(calls) == policy.model.config.num_hidden_layers
    monkeypatch.setattr(attention, "fits", lambda *a: False)
    for a, b in zip(mine, trained(), strict=True):
        assert torch.allclose(a, b, atol=1e-4, rtol=1e-4)
