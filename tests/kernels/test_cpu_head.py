"""The compiled head against logits in float64."""

from __future__ import annotations

import shutil

import pytest
import torch

from sppo.kernels.cpu import head
from sppo.kernels.logprobs import token_logps, token_logps_from_logits

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")


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
def test_it_is_the_log_softmax_and_its_gradient(compiled_for, count, width, vocabulary, threads):
    """Vocabularies of whole registers and not, an odd token out, fewer columns than threads; several slices of
    several parts."""
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


def test_a_frozen_head_takes_no_room_for_its_gradient():
    hidden, weight, target, scale = case(29, 64, 1040)
    mine, room = head.Head(weight, 1.0), {}
    outputs = {"grad_hidden": torch.empty(29, 64), "grad_weight": torch.empty_like(weight)}
    for names in (("grad_hidden",), ("grad_hidden", "grad_weight")):
        job = mine._job(hidden, target, normaliser=scale, grad=scale, **{name: outputs[name] for name in names})
        room[len(names)] = mine._library.head_bytes(job)
    sums, sides = 1040 * 64 * 4, 29 * (1040 + 64) * 2  # of the gradient, and of what it is multiplied from
    assert room[2] - room[1] >= sums + sides


def test_a_token_is_the_same_bits_whoever_is_beside_it(compiled_for):
    hidden, weight, target, _ = case(23, 128, 333)
    mine = head.Head(weight, 1.0)
    together = torch.stack(mine.forward(hidden, target))
    for n in (0, 5, 6, 22):
        assert torch.equal(torch.stack(mine.forward(hidden[n : n + 1], target[n : n + 1]))[:, 0], together[:, n])


def test_what_is_far_apart_or_not_a_number(compiled_for):
    """Logits of ±3,000 neither overflow nor vanish into NaN; a NaN is not hidden."""
    hidden, weight, target, _ = case(7, 64, 333)
    logp, entropy, _ = head.Head(weight, 1.0).forward(hidden * 200, target)
    wanted, wanted_entropy = token_logps_from_logits((hidden * 200).double() @ weight.double().T, target, 1.0)
    assert torch.allclose(logp.double(), wanted, rtol=1e-5, atol=1e-3)
    assert torch.allclose(entropy.double(), wanted_entropy, atol=1e-2)
    hidden[3, 5] = float("nan")
    logp, entropy, _ = head.Head(weight, 1.0).forward(hidden, target)
    assert logp.isnan().tolist() == entropy.isnan().tolist() == [n == 3 for n in range(7)]


def test_a_target_that_the_head_does_not_have_is_refused(compiled_for):
    hidden, weight, target, _ = case(7, 64, 333)
    for wrong in (333, -1):
        target[2] = wrong
        with pytest.raises(IndexError, match="333 rows"):
            head.Head(weight, 1.0).forward(hidden, target)


def test_many_tokens_are_taken_in_parts(compiled_for, monkeypatch):
    hidden, weight, target, _ = case(23, 64, 333)
    whole = head.Head(weight, 1.0).forward(hidden, target)
    monkeypatch.setattr(head, "PART", 5)
    assert all(torch.equal(a, b) for a, b in zip(head.Head(weight, 1.0).forward(hidden, target), whole, strict=True))


@pytest.mark.parametrize("tokens", [0, 13, 29])
@pytest.mark.parametrize("threads", [1, 3])
def test_kept_logits_give_the_gradients_that_computed_ones_give(compiled_for, monkeypatch, tokens, threads):
    """None kept, the first thirteen, all; parts of five tokens, so that they are kept by several passes."""
    hidden, weight, target, scale = case(29, 64, 1040)
    mine = head.Head(weight, 0.7)
    mine.threads = threads
    normaliser = mine.forward(hidden, target)[2]
    exact = mine.backward(hidden, target, normaliser, scale)
    monkeypatch.setattr(head, "PART", 5)
    monkeypatch.setattr(head, "KEPT", 2 * 1040 * tokens)
    head._spare.clear()
    kept = mine.room(29)
    assert (kept is None) == (tokens == 0)
    if kept is not None:
        assert kept.size(1) == tokens
    assert torch.equal(mine.forward(hidden, target, kept)[2], normaliser)
    for grad, wanted in zip(mine.backward(hidden, target, normaliser, scale, kept=kept), exact, strict=True):
        assert float((grad.float() - wanted.float()).norm() / wanted.float().norm()) < 2e-3


@pytest.mark.parametrize("by", [40, -40])
def test_logits_out_of_the_kept_range_are_computed_again(compiled_for, by):
    hidden, weight, target, scale = case(7, 64, 333)
    hidden[:, 0], weight[:, 0] = by, 4.0  # all logits far above or below what two bytes hold
    mine = head.Head(weight, 1.0)
    kept = mine.room(7)
    normaliser = mine.forward(hidden, target, kept)[2]
    exact, found = (mine.backward(hidden, target, normaliser, scale, kept=k) for k in (None, kept))
    assert all(torch.equal(a, b) for a, b in zip(exact, found, strict=True))


def test_room_is_lent_once_and_a_second_backward_pass_does_not_read_anothers(compiled_for):
    if not head.fits(*case(7, 64, 333)[:2], None):
        pytest.skip("another way is taken on this processor")
    hidden, weight, target, scale = case(7, 64, 333)
    h = hidden.clone().requires_grad_()
    logp, _ = token_logps(h, weight, None, target, 1.0)
    logp.backward(scale, retain_graph=True)
    first = h.grad.clone()
    token_logps((2 * hidden).requires_grad_(), weight, None, target, 1.0)  # takes the room that was given back
    h.grad = None
    logp.backward(scale)
    assert float((h.grad.float() - first.float()).norm() / first.float().norm()) < 2e-3
    mine = head.Head(weight, 1.0)
    one, two = mine.room(7), mine.room(7)
    assert one.untyped_storage().data_ptr() != two.untyped_storage().data_ptr()
