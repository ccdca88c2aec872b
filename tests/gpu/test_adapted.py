"""Adapters, quantised weights, offloading and running out of memory on CUDA: skipped where there is no GPU. `pytest
tests/gpu` on a machine that has one."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from sppo.cli.main import main
from sppo.learning.batch import pack
from sppo.learning.learner import Learner
from sppo.models.policy import Policy
from sppo.recipe.sections import AdapterSection
from sppo.rollout.canary import Canary
from sppo.rollout.engine import Sampling
from sppo.rollout.local import LocalEngine

from ..conftest import graded, small_config, small_rollouts

DEVICE = "cuda"
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
]
SHAPE = "tiny:hidden=128,layers=2,heads=4"
NEAR = {"float32": 1e-4, "bfloat16": 0.1}


def adapted(dtype: str = "float32", quantize: str = "", rank: int = 8, **kinds) -> Policy:
    pytest.importorskip("peft")
    if quantize:
        pytest.importorskip("bitsandbytes")
    device, section = torch.device(DEVICE), AdapterSection(rank=rank, **kinds)
    return Policy.load(SHAPE, dtype=dtype, device=device, seed=0, adapter=section, quantize=quantize)[0]


def batch_of(policy: Policy):
    """Sampled by the local engine; every other response was right."""
    rollouts = small_rollouts(policy)
    return pack([graded(r, float(i % 2)) for i, r in enumerate(rollouts)], policy.pad_id)


def taught(policy: Policy, batch, steps: int = 2, **training) -> tuple[Learner, list[dict]]:
    keys = {"training__minibatches": 1, "training__lr": 1e-3} | {f"training__{k}": v for k, v in training.items()}
    # the same responses train every step, so the engine's log-probabilities are soon of other weights
    learner = Learner(
        policy, None, None, small_config(objective__baseline="batch", objective__engine_gap_limit=10.0, **keys)
    )
    advantage_B = torch.linspace(-1, 1, len(batch))
    return learner, [learner.update(batch, advantage_B, step) for step in range(steps)]


@pytest.mark.parametrize(("dtype", "kinds"), [("float32", {}), ("bfloat16", {}), ("bfloat16", {"dora": True})])
def test_captured_decoding_follows_an_adapter(dtype, kinds):
    policy = adapted(dtype, **kinds)
    engine = LocalEngine(policy)
    assert engine.captured is not None, engine.stated
    prompts, responses = [[b + 3, 5, 6] for b in range(9)], [[7 + (b + t) % 60 for t in range(40)] for b in range(9)]
    with policy.adapters.using(None):
        base = policy.given_logps(prompts, responses)
    for turn in range(3):
        mine, theirs = engine.score(prompts, responses), policy.given_logps(prompts, responses)
        gaps = [abs(a - b) for x, y in zip(mine, theirs, strict=True) for a, b in zip(x, y, strict=True)]
        assert max(gaps) < NEAR[dtype] * (10 if dtype == "bfloat16" else 1), turn
        assert sum(gaps) / len(gaps) < NEAR[dtype], turn
        assert (turn == 0) == (sum(abs(a - b) for a, b in zip(theirs[0], base[0], strict=True)) < 1e-3)
        assert Canary(policy).check(engine, policy, policy.fingerprint()) < NEAR[dtype]
        samples = engine.generate(prompts, range(9), Sampling(20))
        for s, logps in zip(samples, policy.given_logps(prompts, [s.ids for s in samples]), strict=True):
            assert s.logps == pytest.approx(logps, abs=NEAR[dtype] * (10 if dtype == "bfloat16" else 1))
        with torch.no_grad():  # an update: in place, as the optimiser does it
            for p in policy.trained.values():
                p.add_(torch.randn_like(p) * 0.05)
    engine.close()


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_step_on_a_quantised_base(quantize):
    policy = adapted("bfloat16", quantize)
    batch, frozen, before = batch_of(policy), policy.frozen_fingerprint(), policy.sha256()
    learner, metrics = taught(policy, batch)
    assert all(0 < m["update/grad_norm"] < 1e3 for m in metrics)
    assert learner.bad_total == 0
    assert policy.frozen_fingerprint() == frozen
    assert policy.sha256() != before
    there, _ = taught(again := adapted("bfloat16", quantize), batch)
    assert again.sha256() == policy.sha256()  # to the bit
    assert there.bad_total == 0


@pytest.mark.parametrize("adapter", [False, True])
def test_an_offloaded_step_is_the_same_step(adapter):
    def policy() -> Policy:
        if adapter:
            return adapted("bfloat16")
        return Policy.load(SHAPE, dtype="bfloat16", device=torch.device(DEVICE), seed=0)[0]

    here, there = policy(), policy()
    batch = batch_of(here)
    start = {name: p.detach().clone() for name, p in here.trained.items()}
    kept, _ = taught(here, batch, steps=4)
    moved, _ = taught(there, batch, steps=4, offload=True)
    assert {m.device.type for m in moved.policy_optimiser.masters} == {"cpu"}
    assert {m.device.type for m in kept.policy_optimiser.masters} == {DEVICE}
    assert not any(p.grad is not None for p in there.trained.values())
    for name, p in there.trained.items():
        far = (here.trained[name] - start[name]).float().norm()
        assert (here.trained[name] - p).float().norm() <= 0.05 * far + 1e-6, name


def test_checkpointed_activations_change_no_gradient_of_an_adapter():
    policy = adapted()
    with torch.no_grad():
        for p in policy.trained.values():
            p.add_(torch.randn_like(p) * 0.05)
    other = copy.deepcopy(policy)
    other.checkpoint_activations()
    ids_BL, action_BL = torch.randint(3, 90, (5, 40)), torch.zeros(5, 40, dtype=torch.bool)
    action_BL[:, 8:] = True
    for one in (policy, other):
        one.logps(ids_BL, action_BL, 1.0).logp_BT.square().sum().backward()
    for name, p in policy.trained.items():
        assert torch.allclose(p.grad, other.trained[name].grad, rtol=1e-4, atol=1e-6), name


def test_running_out_of_memory_says_what_to_turn(tmp_path, capsys):
    """The GPU's own error, in a run that is given far less than it needs."""
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + 700 * 2**20
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
    recipe = [
        "--policy.model", "tiny:hidden=512,layers=8,heads=8", "--critic.model", SHAPE, "--task.train", "chain:steps=1-2",
        "--rollout.prompts", "512", "--rollout.max_tokens", "256", "--training.micro_tokens", "131072", "--training.steps", "2",
        "--evaluation.n", "8", "--evaluation.every", "0", "--monitors.action", "off", "--quiet", "--json",
    ]  # fmt: skip
    try:
        code = main(["train", *recipe, "--out", str(tmp_path / "run")])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    said = capsys.readouterr()
    assert code == 1
    sentence = json.loads(said.out.splitlines()[-1])["failed"]
    assert "out of memory" in sentence
    assert "the most goes into" in sentence
    assert "sppo train --resume" in sentence
    assert "Traceback" not in said.err
