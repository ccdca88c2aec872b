"""The chunked head against the plain one, and the claim that products of bfloat16 values lose nothing."""

from __future__ import annotations

import pytest
import torch

from sppo.kernels import logprobs
from sppo.kernels.cpu import head
from sppo.kernels.logprobs import chunk_size, exact_products, token_logps, token_logps_from_logits
from sppo.memory import keep_memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_chunked_log_probabilities_and_gradients_are_the_plain_ones(dtype: torch.dtype, bias: bool) -> None:
    """Against float64 on the same numbers; two chunks and a rest. A bfloat16 gradient is known to 2⁻⁸ of itself."""
    torch.manual_seed(0)
    vocabulary, width = 40_000, 64
    n = 2 * chunk_size(vocabulary) + 7
    hidden = torch.randn(n, width).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width) / 4).to(dtype).requires_grad_()
    offset = torch.randn(vocabulary).to(dtype).requires_grad_() if bias else None
    target, scale = torch.randint(0, vocabulary, (n,)), torch.randn(n)
    logp, entropy = token_logps(hidden, weight, offset, target, 0.7)
    (logp * scale).sum().backward()
    exact = [None if t is None else t.detach().double().requires_grad_() for t in (hidden, weight, offset)]
    h, w, b = exact
    assert h is not None
    assert w is not None
    logits = torch.nn.functional.linear(h, w, b)
    wanted, wanted_entropy = token_logps_from_logits(logits, target, 0.7)
    (wanted * scale.double()).sum().backward()
    assert logp.dtype == torch.float32
    assert float((logp - wanted).detach().abs().max()) < 1e-4
    assert float((entropy - wanted_entropy).abs().max()) < 1e-4
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for mine, theirs in zip((hidden, weight, offset), exact, strict=True):
        if mine is not None and theirs is not None:
            assert mine.grad is not None
            assert theirs.grad is not None
            error = (mine.grad.double() - theirs.grad).norm() / theirs.grad.norm()
            assert float(error) < tolerance


def test_the_compiled_head_is_taken_where_it_is_the_faster_way(monkeypatch) -> None:
    """And in parts, whose gradients add up to the plain way's."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(50, 64).bfloat16(), torch.randn(333, 64).bfloat16()
    target, scale = torch.randint(333, (50,)), torch.randn(50)
    if not head.fits(hidden, weight, None):
        pytest.skip("this processor does not multiply bfloat16")
    assert not head.fits(hidden.float(), weight.float(), None)
    assert not head.fits(hidden, weight, torch.zeros(333))
    assert not head.fits(hidden[:, :40], weight[:, :40], None)
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 16 * 333)
    found = []
    for fits in (True, False):
        monkeypatch.setattr(head, "fits", lambda *a, fits=fits: fits)
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logp, entropy = token_logps(h, w, None, target, 0.7)
        assert not entropy.requires_grad
        logp.backward(scale)
        found.append((logp.detach(), entropy, h.grad, w.grad))
    for a, b in zip(*found, strict=True):
        assert float((a.double() - b.double()).norm() / b.double().norm()) < 2**-7
    h = hidden.clone().requires_grad_()
    token_logps(h, weight, None, target, 0.7)[0].backward(scale)  # a head that is not trained
    assert float((h.grad.float() - found[0][2].float()).norm() / h.grad.float().norm()) < 2**-7


def test_exact_products_are_exact_and_the_setting_is_given_back() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(64, 576).bfloat16(), torch.randn(2048, 576).bfloat16()
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    with exact_products(torch.bfloat16):
        product = a.float() @ b.float().T
    assert matmul.fp32_precision == before
    wanted = a.double() @ b.double().T
    assert float((product - wanted).abs().max()) < 1e-4
    assert float(((a @ b.T).double() - wanted).abs().max()) > 0.05  # what a bfloat16 result would lose
    with pytest.raises(RuntimeError), exact_products(torch.bfloat16):
        raise RuntimeError
    assert matmul.fp32_precision == before


def test_the_heap_is_told_once_and_says_whether_it_listened() -> None:
    import platform

    assert keep_memory() is (platform.libc_ver()[0] == "glibc")
