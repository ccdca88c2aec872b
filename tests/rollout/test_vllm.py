"""The vLLM engine, for real; needs an environment with vLLM (`make test-vllm`), and is skipped elsewhere."""

from __future__ import annotations

import json
import math

import pytest
import torch

pytest.importorskip("vllm", reason="make test-vllm runs these in an environment of their own")

from sppo.errors import RecipeError, StaleWeights
from sppo.models import tiny
from sppo.models.policy import Policy
from sppo.recipe.sections import AdapterSection
from sppo.rollout.canary import Canary
from sppo.rollout.engine import Sampling
from sppo.rollout.local import LocalEngine
from sppo.rollout.sampler import Cut
from sppo.rollout.vllm import build
from sppo.rollout.vllm_weights import checksum
from sppo.run.loop import train
from sppo.run.run import Run

from ..conftest import logps_of, small_config

PROMPTS = [[5, 6, 7, 8 + i % 9] for i in range(32)]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy(*tiny.build(seed=0, hidden=64, layers=2, heads=2))


@pytest.fixture(scope="module")
def engine(policy):
    made = build(policy, eager=True, memory=0.1, context=256)
    yield made
    made.close()


def test_it_reports_what_the_learner_finds(policy, engine):
    engine.load(policy.weights(), 1)
    for temperature in (1.0, 0.7):
        samples = engine.generate(PROMPTS, range(32), Sampling(12, temperature))
        rows = [[*p, *s.ids] for p, s in zip(PROMPTS, samples, strict=True)]
        width = max(map(len, rows))
        ids = torch.tensor([r + [0] * (width - len(r)) for r in rows])
        mine = logps_of(policy, ids, torch.full((32,), 4), torch.tensor([len(s.ids) for s in samples]), temperature)
        for s, logps in zip(samples, mine.logp_BT.tolist(), strict=True):
            assert s.logps == pytest.approx(logps[: len(s.ids)], abs=1e-4)
            assert (s.finish == "stop") == (s.ids[-1] in policy.eos_ids)
    assert engine.generate(PROMPTS, range(32), Sampling(12)) == engine.generate(PROMPTS, range(32), Sampling(12))


def test_a_sync_is_proven_inside_the_engine(policy, engine):
    canary = Canary(policy)
    engine.load(policy.weights(), 1)
    assert canary.check(engine, policy, policy.fingerprint()) < 1e-4
    parameters = list(policy.model.parameters())
    for parameter in parameters:  # every weight is seen: one changed number anywhere is noticed, and mended by a sync
        with torch.no_grad():
            parameter.view(-1)[parameter.numel() // 2] += 0.01
        assert not engine.holds(policy.fingerprint())
        with pytest.raises(StaleWeights, match="fingerprints"):
            canary.check(engine, policy, policy.fingerprint())
        engine.load(policy.weights(), 1)
        assert engine.holds(policy.fingerprint())
    assert engine.score([[5, 6, 7]], [[8, 9]])[0] == pytest.approx(
        policy.given_logps([[5, 6, 7]], [[8, 9]])[0], abs=1e-4
    )


def test_same_distribution_as_the_local_engine(policy, engine):
    engine.load(policy.weights(), 1)
    n = 2000
    theirs = engine.generate([[5, 6, 7]] * n, range(n), Sampling(1))
    exact = policy.given_logps([[5, 6, 7]] * 33, [[i] for i in range(33)])
    for token in range(33):
        p = math.exp(exact[token][0])
        share = sum(s.ids == [token] for s in theirs) / n
        assert abs(share - p) < 4.5 * math.sqrt(p * (1 - p) / n) + 1e-3


def test_stop_strings_and_cuts(policy, engine):
    engine.load(policy.weights(), 1)
    free = LocalEngine(policy).generate(PROMPTS, range(32), Sampling(12, 0.0))
    text = next(t for s in free if len(t := policy.text(s.ids)) > 4)
    stopped = engine.generate(PROMPTS, range(32), Sampling(12, 0.0, stop=(text[1:3],)))
    assert any(text[1:3] in policy.text(s.ids) and s.finish == "stop" and len(s.ids) < 12 for s in stopped)
    with pytest.raises(RecipeError, match="top_k"):
        engine.generate(PROMPTS, range(32), Sampling(12, cut=Cut(top_k=5)))


def test_the_checksum_does_not_mind_fusing_but_any_bit():
    a, b = torch.randn(7, 5), torch.randn(3, 5)
    assert checksum([a, b]) == checksum([torch.cat([b, a, torch.zeros(2, 5)])])
    assert checksum([a]) != checksum([a.nextafter(torch.tensor(9.0))])


def adapted(dtype: str = "float32", quantize: str = "", **kinds) -> Policy:
    section = AdapterSection(rank=4, alpha=6, **kinds)
    name, device = "tiny:hidden=64,layers=2,heads=2", torch.device("cpu")
    return Policy.load(name, dtype=dtype, device=device, seed=0, adapter=section, quantize=quantize)[0]


@torch.no_grad()
def moved(policy: Policy) -> Policy:
    for p in policy.trained.values():
        p.add_(0.05 * torch.randn_like(p))
    return policy


@pytest.mark.parametrize(
    ("dtype", "quantize", "near"), [("float32", "", 1e-4), ("bfloat16", "", 0.1), ("float32", "nf4", 1e-4)]
)
def test_the_adapter_alone_is_sent(dtype, quantize, near):
    policy = adapted(dtype, quantize)
    engine = build(policy, eager=True, memory=0.1, context=128)
    try:
        assert "the adapter alone" in engine.stated
        assert ("nf4, widened" in engine.stated) == bool(quantize)
        canary = Canary(policy)
        assert canary.check(engine, policy, policy.fingerprint()) < near  # before any step
        for version in range(1, 4):
            before = engine.score([[5, 6, 7]], [[8, 9]])
            moved(policy)
            with pytest.raises(StaleWeights, match="fingerprints"):  # nothing was sent
                canary.check(engine, policy, policy.fingerprint())
            engine.load(policy.weights(), version)
            assert canary.check(engine, policy, policy.fingerprint()) < near
            assert engine.score([[5, 6, 7]], [[8, 9]]) != before
            assert len(engine.llm.llm_engine.list_loras()) == 1
            samples = engine.generate(PROMPTS, range(32), Sampling(12))
            mine = policy.given_logps(PROMPTS, [s.ids for s in samples])
            gaps = [
                abs(a - b) for s, logps in zip(samples, mine, strict=True) for a, b in zip(s.logps, logps, strict=True)
            ]
            assert sum(gaps) / len(gaps) < near
            assert all(s.version == version for s in samples)
    finally:
        engine.close()


def test_an_adapter_that_is_stale_or_spoiled_is_refused(monkeypatch):
    policy = moved(adapted())
    engine = build(policy, eager=True, memory=0.1, context=128)

    def refused() -> None:
        with pytest.raises(StaleWeights, match="fingerprints"):
            Canary(policy).check(engine, policy, policy.fingerprint())

    def send() -> None:
        engine.load(policy.weights(), 1)

    def ok() -> None:
        assert Canary(policy).check(engine, policy, policy.fingerprint()) < 1e-4

    try:
        ok()
        for p in policy.trained.values():  # every matrix is seen
            with torch.no_grad():
                p.view(-1)[p.numel() // 2] += 0.01
            refused()
            send()
            ok()
        with monkeypatch.context() as patch:  # a load that does nothing
            patch.setattr(engine.llm.llm_engine, "add_lora", lambda request: True)
            moved(policy)
            send()
            refused()
        send()
        ok()
        moved(policy)
        engine._way.number -= 1  # of a number that vLLM knows: it keeps the adapter of that number
        send()
        refused()
        send()
        ok()
        assert engine.llm.apply_model(_spoil) == [True]
        refused()
        send()
        ok()
        with torch.no_grad():  # the engine's base is the one that it began with
            policy.model.get_input_embeddings().weight[5, 5] += 0.01
        send()
        refused()
    finally:
        engine.close()


def _spoil(model) -> bool:
    model.lora_manager.modules["model.layers.1.mlp.down_proj"].lora_b_stacked[0][0, 0, 3, 2] += 0.001
    return True


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_vllm_cannot_add_is_merged(dtype):
    policy = moved(adapted(dtype, dora=True))
    engine = build(policy, eager=True, memory=0.1, context=128)
    try:
        assert "merged (vLLM adds low-rank products only" in engine.stated
        canary = Canary(policy)
        for version in range(1, 4):
            engine.load(moved(policy).weights(), version)
            assert canary.check(engine, policy, policy.fingerprint()) < (1e-4 if dtype == "float32" else 0.1)
        moved(policy)
        with pytest.raises(StaleWeights, match="fingerprints"):
            canary.check(engine, policy, policy.fingerprint())
    finally:
        engine.close()


def test_a_quantised_base_under_dora_is_refused():
    with pytest.raises(RecipeError, match="only plain LoRA can be merged"):
        build(adapted(quantize="nf4", dora=True), eager=True, memory=0.1, context=128)


@pytest.mark.parametrize("changes", [{}, {"adapter__rank": 4, "critic__model": "policy"}])
def test_a_run_trains_through_it(tmp_path, changes):
    config = small_config(
        rollout__engine="vllm:eager=true,memory=0.1,context=128", policy__model="tiny:hidden=64,layers=2,heads=2",
        run__out=str(tmp_path / "run"), training__steps=3, rollout__prompts=32, **changes,
    )  # fmt: skip
    run = Run.new(config)
    try:
        summary = train(run)
    finally:
        run.close()
    assert summary["steps"] == 3
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len({line["update/grad_norm"] for line in lines}) == 3
    assert all(line["engine/gap_mean"] < 1e-4 and line["engine/canary_gap"] < 1e-4 for line in lines)
