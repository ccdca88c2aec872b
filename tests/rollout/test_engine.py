"""What an engine must be: the example of the protocol's docstring, run as it stands; weights that are loaded, held
and noted in samples."""

from __future__ import annotations

import inspect
import textwrap

import pytest
import torch

from sppo.errors import RecipeError, StaleWeights
from sppo.models.weights import write
from sppo.rewards.loading import load_reward
from sppo.rollout.canary import Canary
from sppo.rollout.collect import collect
from sppo.rollout.engine import Engine, Sampling, load_engine
from sppo.rollout.local import LocalEngine
from sppo.rollout.reference import PlainEngine
from sppo.run.loop import train
from sppo.run.run import Run
from sppo.tasks.loading import load_tasks

from ..conftest import small_config, small_policy

PROMPTS = [[5, 6, 7], [8, 9], [5, 6, 7]]


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The docstring's engine in a file of the current folder."""
    doc = inspect.getdoc(Engine)
    code = doc[doc.index("    import torch") :]
    (tmp_path / "slow_example.py").write_text(textwrap.dedent(code))
    monkeypatch.chdir(tmp_path)
    return "slow_example:Slow"


def nudge(policy) -> None:
    with torch.no_grad():
        for p in policy.model.parameters():
            p.add_(torch.randn_like(p) * 5e-3)


def test_the_docstrings_example_samples_scores_and_holds(policy, example):
    engine, canary = load_engine(example, policy), Canary(policy)
    samples = engine.generate(PROMPTS, [1, 2, 1], Sampling(6, 0.8))
    assert samples[0] == samples[2]
    assert samples[0].ids != samples[1].ids
    assert canary.check(engine, policy, policy.fingerprint()) < 1e-5
    nudge(policy)
    with pytest.raises(StaleWeights, match="fingerprints"):
        canary.check(engine, policy, policy.fingerprint())
    engine.load(policy.weights(), 7)
    assert canary.check(engine, policy, policy.fingerprint()) < 1e-5
    (sample,) = engine.generate([[5, 6, 7]], [3], Sampling(6))
    assert sample.version == 7
    assert sample.logps == pytest.approx(policy.given_logps([[5, 6, 7]], [sample.ids])[0], abs=1e-5)


def test_a_run_trains_through_the_docstrings_example(tmp_path, example):
    run = Run.new(small_config(rollout__engine=example, run__out=str(tmp_path / "run"), training__steps=2))
    try:
        assert train(run)["steps"] == 2
    finally:
        run.close()


@pytest.mark.parametrize("kind", [LocalEngine, PlainEngine])
def test_samples_say_which_weights_wrote_them(policy, kind):
    engine = kind(policy)
    assert [s.version for s in engine.generate(PROMPTS, [1, 2, 3], Sampling(4))] == [0, 0, 0]
    before = [p.data_ptr() for p in policy.model.parameters()]
    engine.load(policy.weights(), 3)
    assert before == [p.data_ptr() for p in policy.model.parameters()]  # the learner's own: nothing to copy
    assert [s.version for s in engine.generate(PROMPTS, [1, 2, 3], Sampling(4))] == [3, 3, 3]


def test_versions_are_numbers_of_steps_and_go_on_in_a_resumed_run(tmp_path):
    run = Run.new(small_config(run__out=str(tmp_path / "run"), training__steps=2))
    train(run)
    assert run.components.engine.version == 2
    run.close()
    again = Run.resume(tmp_path / "run", steps=3)
    again.begin()
    (sample,) = again.components.engine.generate([[5, 6]], [1], Sampling(3))
    again.close()
    assert sample.version == 2


def test_rollouts_carry_the_version_of_their_samples(policy):
    engine = LocalEngine(policy)
    engine.version = 5
    source = load_tasks("chain:steps=1-2")
    tasks = [source[0], source[1]]
    rollouts = collect(engine, policy, load_reward("answer"), tasks, Sampling(6), seed=("versions",))
    assert [r.version for r in rollouts] == [5, 5]


def test_weights_come_in_one_order_and_tied_ones_once():
    policy = small_policy()
    names = [name for name, _ in policy.weights()]
    assert names == sorted(names)
    assert policy.model.config.tie_word_embeddings == ("lm_head.weight" not in names)
    other = small_policy(seed=3)
    assert other.fingerprint() != policy.fingerprint()
    write(dict(other.model.named_parameters()), policy.weights())
    assert (other.fingerprint(), other.sha256()) == (policy.fingerprint(), policy.sha256())


def test_weights_of_another_model_are_refused(policy):
    some = list(policy.weights())
    with pytest.raises(ValueError, match="among the given weights"):
        write(dict(policy.model.named_parameters()), some[1:])
    with pytest.raises(ValueError, match="has no weight other"):
        write(dict(policy.model.named_parameters()), [("other", some[0][1])])
    with pytest.raises(ValueError, match="of shape"):
        write(dict(policy.model.named_parameters()), [(some[0][0], some[0][1][:1])])


def test_an_engine_that_lacks_something_is_named(policy, tmp_path, monkeypatch):
    (tmp_path / "half_engine.py").write_text(
        "class Half:\n    def __init__(self, policy): ...\n    def sync(self): ...\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="without stated, context, generate, score, load, holds, close"):
        load_engine("half_engine:Half", policy)
