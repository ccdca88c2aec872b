"""What surrounds a captured step, with a stand-in for the graph that computes anew at every replay: tests/gpu has the graph itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sppo.rollout import cuda_graphs as step
from sppo.rollout.cuda_graphs import Captured, columns_of, rows_of
from sppo.rollout.engine import Sampling
from sppo.rollout.local import LocalEngine
from sppo.rollout.reference import PlainEngine
from tests.conftest import small_policy

PROMPTS = [[3 + (7 * i + k) % 20 for k in range(2 + (i // 3) % 9)] for i in range(24)]


@pytest.fixture
def captures(monkeypatch) -> list[tuple[int, int]]:
    """The rows and columns of every capture."""
    seen = []

    def capture(self, inputs_2B, columns):
        seen.append((inputs_2B.size(1), columns))
        return step._Step(inputs_2B, SimpleNamespace(replay=lambda: self._run(inputs_2B, columns)))

    monkeypatch.setattr(Captured, "_capture", capture)
    monkeypatch.setattr(step, "_device_bytes", lambda: 1 << 30)
    return seen


def engine_of(policy) -> LocalEngine:
    engine = LocalEngine(policy)
    engine.compiled, engine.captured = False, Captured()
    return engine


def test_shapes_are_rounded_up_to_few_and_not_beyond_what_is_asked():
    assert [rows_of(n, 999) for n in (1, 2, 3, 5, 9, 16, 17, 24, 25, 48, 49, 96, 97, 200)] == [
        1, 2, 4, 8, 16, 16, 24, 24, 32, 48, 64, 96, 128, 256,
    ]  # fmt: skip
    assert all(rows_of(n, 600) >= n for n in range(1, 601))
    assert len({rows_of(n, 256) for n in range(1, 257)}) == 13
    assert rows_of(70, 72) == 72
    assert [columns_of(n, 9999) for n in (1, 256, 257, 512, 5000)] == [256, 256, 512, 512, 8192]
    assert columns_of(4200, 4352) == 4352


@pytest.mark.parametrize("batch", [24, 5, 1])
def test_captured_steps_draw_what_the_plain_loop_draws(captures, batch):
    policy = small_policy()
    asked = (PROMPTS, list(range(24)), Sampling(12, 1.0, batch))
    assert [s.ids for s in engine_of(policy).generate(*asked)] == [s.ids for s in PlainEngine(policy).generate(*asked)]
    assert captures
    assert all(rows <= batch for rows, _ in captures)


def test_steps_outlive_a_call_and_see_new_weights(captures):
    policy = small_policy()
    engine = engine_of(policy)
    responses = [[5, 9, 7, 4]] * 24
    for _ in range(3):
        mine, theirs = engine.score(PROMPTS, responses), policy.given_logps(PROMPTS, responses)
        assert torch.allclose(torch.tensor(mine), torch.tensor(theirs), atol=1e-5)
        with torch.no_grad():
            for p in policy.model.parameters():
                p.add_(torch.randn_like(p) * 0.05)
    assert len(captures) == 1
    engine.policy = other = small_policy(seed=3)  # another model's weights lie elsewhere
    assert engine.score(PROMPTS, responses) != mine
    assert torch.allclose(
        torch.tensor(engine.score(PROMPTS, responses)), torch.tensor(other.given_logps(PROMPTS, responses)), atol=1e-5
    )
    assert len(captures) == 2


def test_what_was_sampled_before_changes_no_bit(captures):
    policy = small_policy()
    used, fresh = engine_of(policy), engine_of(policy)
    used.generate([[5, 6]] * 60, list(range(60)), Sampling(300, 1.0, 60))
    asked = (PROMPTS, list(range(24)), Sampling(20, 1.0, 7))
    one, two = used.generate(*asked), fresh.generate(*asked)
    assert [(s.ids, s.logps) for s in one] == [(s.ids, s.logps) for s in two]


def test_slots_that_grow_forget_steps_of_the_old_ones(captures, monkeypatch):
    policy = small_policy()
    monkeypatch.setattr("sppo.rollout.kv_cache._lazily", lambda states: False)  # as on an accelerator
    engine = engine_of(policy)
    responses = [[5 + t % 30 for t in range(300)]]
    mine, theirs = engine.score([[4, 5]], responses), policy.given_logps([[4, 5]], responses)
    assert torch.allclose(torch.tensor(mine), torch.tensor(theirs), atol=1e-4)
    assert captures == [(1, 256), (1, 512)]


def test_what_is_large_or_broke_is_let_go(captures, monkeypatch):
    policy = small_policy()
    engine = engine_of(policy)
    asked = (PROMPTS, list(range(24)), Sampling(4, 1.0, 24))
    engine.generate(*asked)
    assert engine.captured.slots is not None
    with pytest.raises(RuntimeError, match="enough"):
        engine.generate(*asked, progress=lambda _: (_ for _ in ()).throw(RuntimeError("enough")))
    assert engine.captured.slots is None
    monkeypatch.setattr(step, "_device_bytes", lambda: 1 << 10)
    engine.generate(*asked)
    assert engine.captured.slots is None


def test_what_was_not_a_number_is_not_there_the_next_time(captures):
    policy = small_policy()
    engine = engine_of(policy)
    responses = [[5, 9, 7, 4]] * 24
    before = engine.score(PROMPTS, responses)
    kept = {name: p.clone() for name, p in policy.model.named_parameters()}
    with torch.no_grad():
        policy.model.get_input_embeddings().weight.fill_(torch.nan)
        engine.score(PROMPTS, responses)
        for name, p in policy.model.named_parameters():
            p.copy_(kept[name])
    assert engine.score(PROMPTS, responses) == before


def test_weights_that_were_moved_are_captured_anew(captures):
    policy = small_policy()
    engine = engine_of(policy)
    engine.score(PROMPTS, [[5, 9]] * 24)
    for p in policy.model.parameters():
        p.data = p.data.clone()
    engine.score(PROMPTS, [[5, 9]] * 24)
    assert len(captures) == 2


def test_the_head_that_a_captured_step_may_read_stays_where_it_is():
    policy = small_policy()
    policy.model.to(torch.bfloat16)
    weight = policy.model.get_output_embeddings().weight
    with torch.inference_mode():
        first = policy.scorer.head.float32_weight()
    with torch.no_grad():
        weight.add_(1)
    again = policy.scorer.head.float32_weight()
    assert again.data_ptr() == first.data_ptr()
    assert torch.equal(again, weight.float())
    frozen = policy.as_reference()
    before = frozen.scorer.head.float32_weight().clone()
    with torch.no_grad():
        weight.add_(1)
    assert not torch.equal(policy.scorer.head.float32_weight(), before)
    assert torch.equal(frozen.scorer.head.float32_weight(), before)  # and not this policy's room
