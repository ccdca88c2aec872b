"""Whole runs with adapters: on a quantised base, with a critic on the same one, resumed, loaded by other tools."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from sppo.models.policy import Policy
from sppo.run.loop import train
from sppo.run.run import Run

from ..conftest import small_config
from ..models.test_adapters import CPU, TOLERANCE, logps, of_logits, packed, pytestmark, rows

__all__ = ["pytestmark"]


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_run_on_a_quantised_base_resumes_to_the_same_bits(tmp_path, quantize):
    def run(name: str, *steps: int) -> str:
        config = small_config(
            adapter__rank=4, policy__quantize=quantize, critic__model="policy", run__out=str(tmp_path / name),
            training__steps=steps[0], training__lr=1e-2, run__checkpoint_every=1, rollout__prompts=8,
        )  # fmt: skip
        job = Run.new(config)
        for more in (*steps[1:], None):
            try:
                sha = train(job)["policy_sha256"]
            finally:
                job.close()
            if more is not None:
                job = Run.resume(tmp_path / name, steps=more)
        return sha

    assert run("whole", 3) == run("halves", 1, 3)
    folder = tmp_path / "halves" / "checkpoints" / "step-000003" / "policy"
    policy, _ = Policy.load(str(folder), dtype="auto", device=CPU, seed=0)
    assert any(bool(p.any()) for n, p in policy.trained.items() if "lora_B" in n)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "halves" / "base", device_map={"": "cpu"})
    theirs = PeftModel.from_pretrained(plain, folder).eval()
    with torch.no_grad():
        elsewhere = of_logits(theirs(input_ids=rows()[0]).logits)
        assert torch.allclose(packed(logps(policy)).double(), elsewhere, atol=TOLERANCE[quantize])


@pytest.mark.parametrize("algorithm", ["sppo", "ppo", "sppo-hybrid", "sppo-optimal"])
def test_every_baseline_with_a_critic_has_it_as_an_adapter_and_resumes_to_the_same_bits(tmp_path, algorithm):
    def run(name: str, *steps: int) -> tuple[str, dict]:
        config = small_config(
            objective__algorithm=algorithm, adapter__rank=4, critic__model="policy", run__out=str(tmp_path / name),
            training__steps=steps[0], training__lr=1e-2, run__checkpoint_every=1, rollout__prompts=8,
            training__checkpoint_activations=True, objective__kl=0.1,
        )  # fmt: skip
        job = Run.new(config)
        for more in (*steps[1:], None):
            try:
                sha = train(job)["policy_sha256"]
                values = {n: p.detach().clone() for n, p in job.components.critic.named_parameters()}
            finally:
                job.close()
            if more is not None:
                job = Run.resume(tmp_path / name, steps=more)
        return sha, values

    (sha, values), (other, others) = run("whole", 2), run("halves", 1, 2)
    assert sha == other
    assert values.keys() == others.keys()
    assert all(torch.equal(values[n], others[n]) for n in values)
    assert any(bool(v.any()) for n, v in values.items() if n.startswith("own."))
