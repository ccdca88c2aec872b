"""The plain loop on models that keep states: prompts of several lengths decode together and do not notice each other."""

from __future__ import annotations

import pytest
import torch

from sppo.models.policy import Policy
from sppo.rollout import reference
from sppo.rollout.engine import Sampling
from sppo.rollout.local import LocalEngine
from sppo.rollout.reference import PlainEngine

from ..test_benchmarks import script

STATES = ["Mamba", "Mamba 2", "Falcon-H1", "Nemotron-H", "Qwen 3 Next", "LFM 2", "Gemma 2"]
PROMPTS = [[3 + (7 * (i // 2) + k) % 50 for k in range(2 + (i // 2) % 4 * 5)] for i in range(12)]
"""Of 2 to 17 tokens, each twice: longer than the small window of Gemma 2, and than none of the states'."""


@pytest.fixture(scope="module", params=STATES)
def policy(request, tmp_path_factory) -> Policy:
    folder = tmp_path_factory.mktemp("models") / "model"
    script("architectures").make(request.param, folder)
    return Policy.load(str(folder), dtype="float32", device=torch.device("cpu"), seed=0)[0]


def test_samples_do_not_depend_on_their_neighbours_and_the_learner_agrees(policy):
    engine = LocalEngine(policy)
    assert engine.plain is not None
    assert engine.plain.cached
    samples = engine.generate(PROMPTS, range(12), Sampling(12))
    for i in (0, 5, 11):
        alone = engine.generate([PROMPTS[i]], [i], Sampling(12))[0]
        assert alone.ids == samples[i].ids
        assert alone.logps == pytest.approx(samples[i].logps, abs=1e-4)
    theirs = policy.given_logps(PROMPTS, [s.ids for s in samples])
    for sample, logps in zip(samples, theirs, strict=True):
        assert sample.logps == pytest.approx(logps, abs=1e-4)


def test_a_prompt_is_read_once_and_all_lengths_decode_together(policy, monkeypatch):
    passes: list[tuple[int, int]] = []
    real = reference._next_logits

    def watched(policy, cache, ids_BS, *rest):
        passes.append(tuple(ids_BS.shape))
        return real(policy, cache, ids_BS, *rest)

    monkeypatch.setattr(reference, "_next_logits", watched)
    PlainEngine(policy)
    passes.clear()
    policy.eos_ids, ids = [], policy.eos_ids  # nothing ends early
    try:
        LocalEngine(policy).plain.generate(PROMPTS, range(12), Sampling(5))
    finally:
        policy.eos_ids = ids
    reads = [shape for shape in passes[-(4 + 4) :] if shape[1] > 1]
    assert sum(rows for rows, _ in reads) == 6  # of twelve, six differ
    assert passes[-4:] == [(12, 1)] * 4


def test_a_cache_of_its_own_kind_is_not_used_and_that_is_said(tmp_path):
    script("architectures").make("MiniMax", tmp_path)
    policy = Policy.load(str(tmp_path), dtype="float32", device=torch.device("cpu"), seed=0)[0]
    engine = LocalEngine(policy)
    assert "every token reads its whole sequence again" in engine.stated
    samples = engine.generate(PROMPTS, range(12), Sampling(6))
    for sample, logps in zip(samples, policy.given_logps(PROMPTS, [s.ids for s in samples]), strict=True):
        assert sample.logps == pytest.approx(logps, abs=1e-4)


def test_states_that_leak_between_calls_are_noticed(tmp_path):
    """RecurrentGemma keeps its states in its layers, so rows that leave a batch would leave theirs behind."""
    script("architectures").make("RecurrentGemma", tmp_path)
    policy = Policy.load(str(tmp_path), dtype="float32", device=torch.device("cpu"), seed=0)[0]
    assert not PlainEngine(policy).cached
