"""Whole runs on real (tiny) models: learning, files, interruption, resuming."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from sppo.audit.chain import GENESIS
from sppo.cli.train import interruptible
from sppo.errors import NonFinite, RecipeError, RewardError, RunFailure, StaleWeights, UserError
from sppo.files import file_sha256
from sppo.learning.learner import Learner
from sppo.recipe.config import Config
from sppo.run.loop import train
from sppo.run.run import Run

from ..conftest import small_config

KILLABLE = {
    "policy.model": "tiny:hidden=32,layers=2,heads=2", "critic.model": "tiny:hidden=32,layers=1,heads=2",
    "task.train": "chain:steps=1-2", "bootstrap.steps": "10", "bootstrap.batch": "8", "rollout.prompts": "16",
    "rollout.max_tokens": "14", "training.steps": "12", "training.lr": "1e-3", "training.schedule": "cosine",
    "evaluation.n": "16", "evaluation.every": "5", "run.checkpoint_every": "2", "run.threads": "1",
}  # fmt: skip


def run_small(tmp_path, **overrides):
    config = small_config(run__out=str(tmp_path / "run"), **overrides)
    job = Run.new(config)
    try:
        return job, train(job)
    finally:
        job.close()


def sppo(*arguments, **kwargs):
    return subprocess.Popen(
        [sys.executable, "-m", "sppo.cli.main", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def options(changes):
    return [piece for key, value in changes.items() for piece in (f"--{key}", value)]


def test_a_run_leaves_what_other_tools_rely_on(tmp_path):
    job, summary = run_small(
        tmp_path, training__steps=4, evaluation__every=2, evaluation__samples=2, run__checkpoint_every=2,
        objective__algorithm="sppo",
    )  # fmt: skip
    out = tmp_path / "run"
    assert Config.load(out / "recipe.toml").sha256 == summary["recipe_sha256"]
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == [0, 1, 2, 3]
    assert metrics[1]["eval/accuracy"] is not None
    assert "critic/ev_ceiling" in metrics[1]
    assert {"reward/mean", "critic/ece", "critic/brier", "critic/auc", "ratio/ess", "engine/gap_mean"} <= metrics[
        0
    ].keys()
    rows = pq.read_table(out / "rollouts" / "step-000003.parquet").to_pylist()
    assert len(rows) == 16
    assert all(len(r["logps"]) == len(r["response_ids"]) > 0 for r in rows)
    assert all(abs(r["advantage"] - (r["score"] - r["value"])) < 1e-5 for r in rows)
    folder = out / "checkpoints" / "step-000004"
    model = AutoModelForCausalLM.from_pretrained(folder / "policy")
    AutoTokenizer.from_pretrained(folder / "policy")
    AutoModel.from_pretrained(folder / "critic")
    for a, b in zip(model.parameters(), job.components.policy.model.parameters(), strict=True):
        assert torch.equal(a, b.cpu())
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-000002", "step-000004"]
    for key in ("accuracy_before", "accuracy_after", "accuracy_after_low", "accuracy_after_high", "steps", "seconds",
                "generated_tokens", "peak_rss_bytes", "seed", "policy_sha256"):  # fmt: skip
        assert summary[key] is not None
    assert summary["stopped"] == "finished"
    assert json.loads((out / "summary.json").read_text()) == summary
    previous = GENESIS
    for line in (out / "audit.jsonl").read_text().splitlines():
        entry = json.loads(line)
        assert entry["previous"] == previous
        if "step" in entry:
            assert entry["rollouts_sha256"] == file_sha256(out / "rollouts" / f"step-{entry['step']:06d}.parquet")
        previous = entry["sha256"]


def test_the_same_recipe_and_seed_give_the_same_policy(tmp_path):
    hashes = [run_small(tmp_path / str(i), seed=s)[1]["policy_sha256"] for i, s in enumerate((7, 7, 8))]
    assert hashes[0] == hashes[1] != hashes[2]


STEPS = "answer + 0 * steps:check=chain,split=semicolons"
RESUMED = {
    "prompt critic, groups thrown away": {
        "objective.ratio": "token", "objective.entropy_bonus": 0.01, "rollout.samples": 2, "rollout.resample": 2, "rollout.top_p": 0.9,
        "objective.engine_correction_level": "token",
    },
    "reference in the ratio and in the loss": {
        "objective.ratio": "family", "objective.kappa": 0.5, "objective.anchor": "reference", "objective.kl": 0.01, "objective.kl_form": "k2",
        "training.epochs": 2, "rollout.samples": 2, "rollout.truncated": "mask",
    },
    "reference in the reward": {
        "objective.kl": 0.01, "objective.kl_form": "reward", "rollout.overlong": 0.5, "reward.use": "answer + 0.5 * format:pattern=.",
        "rollout.truncated": "keep",
    },
    "optimal baseline": {"objective.algorithm": "sppo-optimal"},
    "token critic": {"objective.algorithm": "ppo", "objective.kl": 0.01, "objective.value_clip": 0.05, "training.minibatches": 4},
    "token critic of chances": {
        "objective.algorithm": "ppo", "objective.value_loss": "cross-entropy", "rollout.samples": 2, "rollout.resample": 2,
    },
    "hybrid": {
        "objective.algorithm": "sppo-hybrid", "objective.kl": 0.01, "reward.use": STEPS, "rollout.samples": 2, "rollout.resample": 2,
    },
    "no critic": {"objective.algorithm": "grpo", "objective.kl": 0.01, "objective.kl_form": "k3", "training.minibatches": 1},
    "no critic, groups thrown away": {"objective.algorithm": "dapo"},
    "greedy responses": {"objective.algorithm": "remax"},
    "float32 masters of bfloat16 weights": {
        "policy.dtype": "bfloat16", "critic.dtype": "bfloat16", "training.micro_tokens": 64, "objective.engine_correction_beyond": "mask",
    },
    "long responses, no correction": {
        "rollout.max_tokens": 70, "objective.ratio": "auto", "objective.dual_clip": 0, "objective.engine_correction": 0,
        "objective.engine_gap_limit": 0.5,
    },
}  # fmt: skip
"""One recipe for each kind of state that a checkpoint holds, and for each path through a step. Curricula, search, monitors and control tasks
have a resume test beside their own tests; what only changes a formula is in tests/learning and tests/exact."""


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, name):
    """Four steps straight; then the last two once more, from the checkpoint after the second."""
    config = {"training__steps": 4, "run__checkpoint_every": 2, "run__keep": 9, **RESUMED[name]}
    whole, summary = run_small(tmp_path, **config)
    assert (whole.learner.reference is not None) == whole.components.config.needs_reference
    out = tmp_path / "run"
    (out / "checkpoints" / "step-000004").rename(tmp_path / "lost")
    again = Run.resume(out)
    assert again.state.step == 2
    second = train(again)
    again.close()
    assert second["stopped"] == "finished"
    for key in ("policy_sha256", "generated_tokens", "masked", "mean_advantage", "accuracy_after"):
        assert second[key] == summary[key], key
    assert again.learner.gap_limit == whole.learner.gap_limit is not None
    assert again.sync.canary.limit == whole.sync.canary.limit == again.state.canary_limit is not None


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 5])
def test_sigkill_at_random_moments_and_resume_give_the_identical_policy(tmp_path, times):
    straight = sppo("train", *options(KILLABLE), "--out", tmp_path / "straight", "--json", "--quiet")
    began = time.monotonic()
    out, err = straight.communicate(timeout=300)
    whole = time.monotonic() - began
    assert straight.returncode == 0, err
    wanted = json.loads(out.splitlines()[-1])["policy_sha256"]
    rng = random.Random(os.urandom(8))
    run, command, moments = tmp_path / "killed", ["train", *options(KILLABLE), "--out", tmp_path / "killed"], []
    kills = 0
    while kills < times:
        process = sppo(*command, "--quiet")
        # From before the first file to about the end of the run.
        moment = rng.uniform(0.3, 1.0) * whole
        moments.append(round(moment, 2))
        try:
            process.communicate(timeout=moment)
            if process.returncode == 0:  # too quick for us: start over, so that the kills really happen
                subprocess.run(["rm", "-rf", run], check=True)
                command = ["train", *options(KILLABLE), "--out", run]
                continue
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
        if (run / "recipe.toml").exists():
            command = ["train", "--resume", run]
    final = sppo(*command, "--json", "--quiet")
    out, err = final.communicate(timeout=300)
    assert final.returncode == 0, f"{moments}: {err}"
    summary = json.loads(out.splitlines()[-1])
    assert summary["policy_sha256"] == wanted, f"killed after {moments} s"
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(12))
    assert len(list((run / "rollouts").glob("*.parquet"))) == 12


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_resume(tmp_path):
    process = sppo("train", *options(KILLABLE | {"training.steps": "2000"}), "--out", tmp_path / "run", "--json")
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert re.search(r"finishing step \d+.*then saves", err)
    assert f"sppo train --resume {tmp_path / 'run'}" in err
    summary = json.loads(out.splitlines()[-1])
    assert summary["stopped"] == "interrupted"
    assert (tmp_path / "run" / "checkpoints" / f"step-{summary['steps']:06d}" / "state.pt").exists()


@pytest.mark.parametrize("asked", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_interrupts_and_the_second_stops_at_once(asked, monkeypatch):
    monkeypatch.setattr(os, "dup2", lambda *_: None)  # a hang-up closes the terminal, and pytest may have one
    said = []
    job = SimpleNamespace(interrupt=lambda: said.append("interrupt"), grace=None)
    display = SimpleNamespace(end_soon=lambda: said.append("end soon"), hang_up=lambda: said.append("hang up"))
    given = signal.getsignal(asked)
    if given == signal.SIG_IGN:  # as nohup has it: then it is left so
        signal.signal(asked, signal.SIG_DFL)
    before = signal.getsignal(asked)
    with interruptible(job, display):
        os.kill(os.getpid(), asked)
        until = time.monotonic() + 10
        while not said and time.monotonic() < until:  # another thread may have been given it
            time.sleep(0.01)
        assert said == ["interrupt", *(["hang up"] if asked == signal.SIGHUP else []), "end soon"]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), asked)
    assert signal.getsignal(asked) == before
    signal.signal(asked, given)


def test_a_half_written_checkpoint_is_never_used(tmp_path):
    run_small(tmp_path, training__steps=2, run__checkpoint_every=1)
    out = tmp_path / "run"
    part = out / "checkpoints" / ".step-000009"
    part.mkdir()
    (part / "state.pt").write_bytes(b"half")
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "rew')
    job = Run.resume(out, steps=3)
    summary = train(job)
    job.close()
    assert summary["steps"] == 3
    assert not part.exists()
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2]


def test_non_finite_updates_are_skipped_counted_and_stop_the_run(tmp_path, monkeypatch):
    config = small_config(run__out=str(tmp_path / "run"), training__steps=5)
    job = Run.new(config)
    advantage = Learner.advantage

    def nan_advantage(self, batch):
        a, v, m = advantage(self, batch)
        return a * float("nan"), v, m

    monkeypatch.setattr(Learner, "advantage", nan_advantage)
    try:
        with pytest.raises(NonFinite, match="3 updates in a row"):
            train(job)
    finally:
        job.close()
    assert job.learner.bad_total >= 3
    assert all(torch.isfinite(p).all() for p in job.components.policy.model.parameters())


def test_a_policy_whose_logits_are_not_finite_is_not_sampled_from(policy):
    from sppo.rollout.engine import Sampling
    from sppo.rollout.local import LocalEngine

    engine = LocalEngine(policy)
    with torch.no_grad():
        policy.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(RunFailure, match="not finite"):
        engine.generate([[5, 6]], [0], Sampling(4))


def test_an_engine_with_other_weights_is_found_at_the_sync(tmp_path):
    job = Run.new(small_config(run__out=str(tmp_path / "run")))
    job.components.engine.load = lambda weights, version: None
    job.components.engine.policy = job.components.policy.as_reference()
    with torch.no_grad():
        next(job.components.engine.policy.model.parameters()).add_(1e-3)
    with pytest.raises(StaleWeights):
        job.sync(1)
    job.close()


def test_one_process_owns_a_run(tmp_path):
    job = Run.new(small_config(run__out=str(tmp_path / "run")))
    with pytest.raises(RecipeError, match="already holds a run"):
        Run.new(small_config(run__out=str(tmp_path / "run")))
    with pytest.raises(RecipeError, match=f"in use by process {os.getpid()}"):
        Run.resume(tmp_path / "run")
    job.close()


def test_a_start_that_fails_leaves_nothing_behind(tmp_path):
    with pytest.raises(UserError):
        Run.new(small_config(run__out=str(tmp_path / "run"), policy__model=str(tmp_path / "nowhere")))
    assert not (tmp_path / "run").exists()


def test_the_policy_learns(tmp_path):
    """A real if small effect: supervised start, then reinforcement from verdicts alone, on two-step problems."""
    _, summary = run_small(
        tmp_path, policy__model="tiny", task__train="chain:steps=2", bootstrap__task="chain:steps=1-2", bootstrap__steps=600,
        bootstrap__until=0.4, bootstrap__lr=2e-3,
        bootstrap__batch=32, training__steps=25, rollout__prompts=128, rollout__max_tokens=24, training__lr=2e-4, evaluation__n=256,
    )  # fmt: skip
    assert summary["accuracy_before"] < 0.9
    assert summary["accuracy_after"] > summary["accuracy_before"] + 0.1
    assert summary["accuracy_after_low"] <= summary["accuracy_after"] <= summary["accuracy_after_high"]


def test_encoder_critic_with_its_own_tokenizer(tmp_path):
    from transformers import BertConfig, BertModel

    from sppo.models.tiny import character_tokenizer

    tokenizer = character_tokenizer()
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    job, summary = run_small(tmp_path, critic__model=str(tmp_path / "bert"))
    assert summary["stopped"] == "finished"
    assert type(job.components.critic.backbone).__name__ == "BertModel"
    AutoModel.from_pretrained(Path(summary["policy"]).parent / "critic")


FLAKY = {"after": 10**9, "calls": 0}


def flaky(prompts, completions, answer):
    """A reward that breaks for good after so many calls."""
    FLAKY["calls"] += 1
    if FLAKY["calls"] > FLAKY["after"]:
        raise ConnectionError("the judge is gone")
    return [float(c[-1]["content"].endswith(a)) for c, a in zip(completions, answer, strict=True)]


def test_a_reward_that_breaks_loses_no_step(tmp_path):
    overrides = {
        "reward__use": f"{__name__}:flaky",
        "training__steps": 4,
        "evaluation__every": 0,
        "run__checkpoint_every": 100,
    }
    FLAKY.update(after=10**9, calls=0)
    whole, _ = run_small(tmp_path / "whole", **overrides)
    FLAKY.update(after=4, calls=0)  # the evaluation before, the base rate, and two steps
    with pytest.raises(RewardError, match=r"the judge is gone.*step 2 is saved.*--resume"):
        run_small(tmp_path / "broken", **overrides)
    FLAKY.update(after=10**9)
    again = Run.resume(tmp_path / "broken" / "run")
    assert again.state.step == 2
    train(again)
    again.close()
    assert again.components.policy.fingerprint() == whole.components.policy.fingerprint()
    assert again.components.curriculum.position == whole.components.curriculum.position
