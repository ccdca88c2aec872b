"""Shared pieces: tiny real models, real rollouts. Nothing here is mocked."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"  # these models are too small to share, and spinning threads starve each other

import pytest

from sppo.config import Config
from sppo.models import tiny
from sppo.models.critic import Critic
from sppo.models.policy import Policy
from sppo.rewards.base import load_reward
from sppo.rollout.collect import collect
from sppo.rollout.engine import Sampling
from sppo.rollout.local import LocalEngine
from sppo.tasks.base import load_tasks

SMALL = "tiny:hidden=32,layers=2,heads=2"


def small_policy(seed: int = 0, **changes) -> Policy:
    model, tokenizer = tiny.build(seed=seed, hidden=32, layers=2, heads=2, **changes)
    return Policy(model, tokenizer)


def small_critic(seed: int = 1) -> Critic:
    backbone, tokenizer = tiny.build(seed=seed, head=False, hidden=32, layers=1, heads=2)
    return Critic(backbone, tokenizer)


def small_config(**overrides) -> Config:
    base = {
        "policy.model": SMALL, "critic.model": "tiny:hidden=32,layers=1,heads=2", "task.train": "chain:steps=1-2",
        "rollout.prompts": 16, "rollout.max_tokens": 12, "training.lr": 1e-3, "training.critic_lr": 1e-3,
        "training.steps": 3, "evaluation.n": 16, "evaluation.every": 0,
    }  # fmt: skip
    return Config.load(None, base | {k.replace("__", "."): v for k, v in overrides.items()})


def small_rollouts(policy: Policy, n: int = 16, *, max_tokens: int = 12, temperature: float = 1.0, **kwargs):
    source = load_tasks("chain:steps=1-2")
    return collect(
        LocalEngine(policy), policy, load_reward("answer"), [source[i] for i in range(n)],
        Sampling(max_tokens, temperature), seed=("test",), **kwargs,
    )  # fmt: skip


@pytest.fixture
def policy() -> Policy:
    return small_policy()


@pytest.fixture
def critic() -> Critic:
    return small_critic()
