"""The compiled head against logits in float64."""

from __future__ import annotations

import shutil

import pytest
import torch

from sppo.models import head
from sppo.models.logprobs import token_logps_from_logits

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")


@pytest.fixture
def compiled_head(compiled_for):
    head._compiled.cache_clear()
    yield
    head._compiled.cache_clear()


def case(count: int, width: int, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(count)
    hidden = torch.randn(count, width, generator=made).bfloat16()
    weight = (torch.randn(vocabulary, width, generator=made) / 2).bfloat16()
    target = torch.randint(vocabulary, (count,), generator=made)
    target[0], target[-1] = 0, vocabulary - 1
    return hidden, weight, target, torch.randn(count, generator=made)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("count", "width", "vocabulary"), [(1, 64, 5), (2, 64, 96), (7, 128, 333), (29, 64, 1040), (2050, 64, 4200)]
)
def test_it_is_the_log_softmax_and_its_gradient(compiled_head, count, width, vocabulary, threads):
    """Vocabularies of whole registers and not, an odd token out, fewer columns than threads; several slices of several parts."""
    hidden, weight, target, scale = case(count, width, vocabulary)
    mine = head.Head(weight, 0.7)
    mine.threads = threads
    logp, entropy, normaliser = mine.forward(hidden, target)
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = h @ w.T
    logits.retain_grad()
    wanted, wanted_entropy = token_logps_from_logits(logits, target, 0.7)
    wanted.backward(scale.double())
    assert torch.allclose(logp.double(), wanted, atol=2e-5)
    assert torch.allclose(entropy.double(), wanted_entropy, atol=5e-5)
    assert torch.allclose(normaliser.double(), torch.logsumexp(logits / 0.7, -1), atol=2e-5)
    gradients = mine.backward(hidden, target, normaliser, scale)
    for grad, exact in zip(gradients, (h.grad, w.grad), strict=True):
        assert grad.dtype == torch.bfloat16
        assert float((grad.double() - exact).norm() / exact.norm()) < 2**-8
    assert torch.equal(mine.backward(hidden, target, normaliser, scale, with_weight=False)[0], gradients[0])


def test_a_token_is_the_same_bits_whoever_is_beside_it(compiled_head):
    hidden, weight, target, _ = case(23, 128, 333)
    mine = head.Head(weight, 1.0)
    together = torch.stack(mine.forward(hidden, target))
    for n in (0, 5, 6, 22):
        assert torch.equal(torch.stack(mine.forward(hidden[n : n + 1], target[n : n + 1]))[:, 0], together[:, n])


def test_what_is_far_apart_or_not_a_number(compiled_head):
    """Logits of ±3,000 neither overflow nor vanish into NaN; a NaN is not hidden."""
    hidden, weight, target, _ = case(7, 64, 333)
    logp, entropy, _ = head.Head(weight, 1.0).forward(hidden * 200, target)
    wanted, wanted_entropy = token_logps_from_logits((hidden * 200).double() @ weight.double().T, target, 1.0)
    assert torch.allclose(logp.double(), wanted, rtol=1e-5, atol=1e-3)
    assert torch.allclose(entropy.double(), wanted_entropy, atol=1e-2)
    hidden[3, 5] = float("nan")
    logp, entropy, _ = head.Head(weight, 1.0).forward(hidden, target)
    assert logp.isnan().tolist() == entropy.isnan().tolist() == [n == 3 for n in range(7)]


def test_a_target_that_the_head_does_not_have_is_refused(compiled_head):
    hidden, weight, target, _ = case(7, 64, 333)
    for wrong in (333, -1):
        target[2] = wrong
        with pytest.raises(IndexError, match="333 rows"):
            head.Head(weight, 1.0).forward(hidden, target)


def test_many_tokens_are_taken_in_parts(compiled_head, monkeypatch):
    hidden, weight, target, _ = case(23, 64, 333)
    whole = head.Head(weight, 1.0).forward(hidden, target)
    monkeypatch.setattr(head, "PART", 5)
    assert all(torch.equal(a, b) for a, b in zip(head.Head(weight, 1.0).forward(hidden, target), whole, strict=True))
